"""Live models as people hold them: what wraps one is left off, and weights that are not numbers in memory are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from support.dense_cases import hooks_on, refusal
from support.tiny_families import some_tokens, tiny
from torch import nn

from bridge.huggingface.live import check_weights, unwrap
from bridge.huggingface.site_discovery import DenseModelError
from bridge.models.dense import load_dense
from bridge.models.residual import Enter

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # of torch's


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compiled_by_block(model: Any) -> Any:
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = compiled(block)
    return model


def compiled_inside_blocks(model: Any) -> Any:
    for block in model.model.layers:
        block.mlp = compiled(block.mlp)
    return compiled(model)


def compiled_forward(model: Any) -> Any:
    model.forward = compiled(model.forward)
    return model


def dispatched(model: Any) -> Any:
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def mixed_precision(model: Any) -> Any:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    AcceleratorState._reset_state(True)
    return prepared


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "torch.compile": compiled,
    "module.compile": compiled_in_place,
    "blocks": compiled_by_block,
    "inside blocks": compiled_inside_blocks,
    "forward": compiled_forward,
    "DataParallel": nn.DataParallel,
    "DataParallel of compiled": lambda model: nn.DataParallel(compiled(model)),
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "dispatched to one device": dispatched,
    "mixed precision": mixed_precision,
}


@torch.no_grad()
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_model_is_the_model(wrap: Callable[[Any], Any], used: bool) -> None:
    plain, tokens_bt = load_dense(tiny("llama")), some_tokens()
    model = wrap(tiny("llama"))
    before_btv = model(tokens_bt).logits if used else None
    dense = load_dense(model)
    assert dense.fingerprint() == plain.fingerprint() and plain.identity().difference(dense.identity()) is None
    assert dense.name == "LlamaForCausalLM" and dense.parity.largest <= 1e-4
    enter = Enter.at(3, torch.randn(4, 10, 32))
    torch.testing.assert_close(dense.run(tokens_bt, enter).logits_btv, plain.run(tokens_bt, enter).logits_btv, rtol=0, atol=1e-5)
    weights = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in dense.model.parameters()} == weights  # shared, as with any live model
    assert hooks_on(model) == 0
    if before_btv is not None:
        assert torch.equal(model(tokens_bt).logits, before_btv)  # and left as it was


def test_an_adapter_on_a_compiled_model_is_merged() -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(tiny("llama"), config).eval()
    wanted_btv = model(some_tokens()).logits
    torch.testing.assert_close(load_dense(compiled(model)).run(some_tokens()).logits_btv, wanted_btv, rtol=0, atol=1e-4)


def test_a_wrapper_that_does_more_is_left_on() -> None:
    class Louder(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
            return 2 * self.module(x_btd)

    model, tokens_bt = tiny("llama"), some_tokens()
    model.model.layers[1].mlp = Louder(model.model.layers[1].mlp)
    assert unwrap(model.model.layers[1].mlp) is model.model.layers[1].mlp
    torch.testing.assert_close(load_dense(model).run(tokens_bt).logits_btv, model(tokens_bt).logits, rtol=0, atol=1e-5)


# --- what is refused


def test_offloaded_models_are_refused(tmp_path: Path) -> None:
    for model in (
        accelerate.cpu_offload(tiny("llama")),
        accelerate.disk_offload(tiny("llama"), str(tmp_path)),
        copy.deepcopy(tiny("llama")).to("meta"),
    ):
        message = refusal(model)
        assert message.startswith(
            "model 'LlamaForCausalLM' cannot be read: 30 of its 30 weights are not in memory (model.embed_tokens"
        )
        assert message.endswith("load it whole, without a device_map that offloads")


def test_a_model_of_which_a_part_is_offloaded_is_refused() -> None:
    model = tiny("llama")
    accelerate.cpu_offload(model.model.layers[2])
    assert "9 of its 30 weights are not in memory (model.layers.2." in refusal(model)


def test_weights_on_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")

    class There(nn.Parameter):  # as of a second device, which there is none of here
        device = property(lambda _: torch.device("cuda:1"))  # type: ignore[assignment]

    There.__name__, monkeypatched = "Parameter", There(model.lm_head.weight.detach())
    monkeypatch.setattr("bridge.huggingface.live.PLAIN", (nn.Parameter, There))
    model.lm_head.weight = monkeypatched
    message = refusal(model)
    assert "its weights are on several devices (cpu, cuda:1), and bridge runs a dense model on one; load it without" in message


def test_quantized_models_are_refused() -> None:
    dynamic = torch.ao.quantization.quantize_dynamic(tiny("llama"), {nn.Linear}, dtype=torch.qint8)
    assert refusal(dynamic) == "model 'LlamaForCausalLM' is quantized by torch; give the model as it was before"
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        packed = tiny("llama")
        packed.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 16).to(dtype), requires_grad=False)
        name = str(dtype).removeprefix("torch.")
        assert f"is quantized (model.layers.1.mlp.up_proj.weight is {name}); give the model as it was before" in refusal(packed)
    buffers = tiny("llama")
    buffers.config.quantization_config = {"quant_method": "gptq"}
    buffers.model.layers[0].mlp.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))
    assert "is quantized (model.layers.0.mlp.qweight is int32)" in refusal(buffers)


def test_a_flag_alone_is_no_quantization() -> None:
    """A model whose weights were turned into numbers at load keeps the flag."""
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "mxfp4", "dequantize": True}
    assert load_dense(model).fingerprint() == load_dense(tiny("llama")).fingerprint()


def test_sharded_weights_are_refused() -> None:
    class DTensor(nn.Parameter):
        pass

    model = tiny("llama")
    model.lm_head.weight = DTensor(model.lm_head.weight.detach())
    with pytest.raises(DenseModelError, match="lm_head.weight is sharded over processes; give the whole model"):
        check_weights(model, "model 'it'")
