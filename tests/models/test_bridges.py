"""Bridges and couplings: the maps against their formulas, hybrids against compositions, and folders against what was saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bridges_cases import lora_folder
from support.models import CONTEXT, VOCABULARY, tiny_gpt2, tiny_tokenizer, untrained

import bridge
from bridge.models.bridges import Bridge, Bridges, CoupledModels
from bridge.models.dense import DenseModel, load_dense
from bridge.models.residual import Enter
from bridge.models.store import CheckpointError

TOKENS_BT = torch.randint(0, VOCABULARY, (3, CONTEXT), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> CoupledModels:
    """A sparse coupling whose dense model and own folder lie beside each other; its path is the folder."""
    root = tmp_path_factory.mktemp("saved")
    tiny_gpt2().save_pretrained(root / "dense")
    tiny_tokenizer().save_pretrained(root / "dense")
    coupling = untrained(load_dense(root / "dense"))
    coupling.sparse.project(0.1)
    with torch.no_grad():
        for site in range(coupling.n_sites):
            coupling.bridges[site].mean_d.normal_(generator=torch.Generator().manual_seed(site))
            coupling.bridges[site].scale.fill_(1.5 + site)
    coupling = CoupledModels(
        coupling.dense, coupling.sparse, coupling.bridges, coupling.recipe, TOKENS_BT, str(root / "coupling")
    )
    coupling.save_pretrained(root / "coupling")
    return coupling


@pytest.fixture
def folder(saved: CoupledModels, tmp_path: Path) -> Path:
    """A copy of the coupling's folder, its dense model beside it, moved to somewhere else."""
    assert saved.path is not None
    shutil.copytree(Path(saved.path).parent, tmp_path / "elsewhere")
    return tmp_path / "elsewhere" / "coupling"


def edit(folder: Path, change) -> None:
    facts = json.loads((folder / "coupling.json").read_text())
    change(facts)
    (folder / "coupling.json").write_text(json.dumps(facts))


def assert_refused(folder: Path, match: str, **options: object) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        bridge.load(folder, **options)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)


# -- the maps -----------------------------------------------------------------------------------------------------------


def moved(dense_width: int = 6, sparse_width: int = 16, keep: float = 0.25) -> Bridge:
    bridge = Bridge(dense_width, sparse_width, keep)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (*bridge.parameters(), bridge.mean_d):
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        bridge.scale.fill_(1.7)
    return bridge


def test_encoder_and_decoder_are_their_formulas() -> None:
    one = moved()
    h, x = torch.randn(6), torch.randn(16)
    full = one.encoder.weight @ ((h - one.mean_d) / one.scale) + one.encoder.bias
    largest = full.abs().topk(4).indices
    expected = torch.zeros(16).index_copy(0, largest, full[largest])
    torch.testing.assert_close(one.encode(h.view(1, 1, -1))[0, 0], expected)
    torch.testing.assert_close(one.decode(x.view(1, 1, -1))[0, 0], (one.decoder.weight @ x + one.decoder.bias) * 1.7 + one.mean_d)


def test_decode_change_is_the_linear_part_of_decode() -> None:
    one = moved()
    x_bts, change_bts = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    torch.testing.assert_close(one.decode_change(change_bts), one.decode(x_bts + change_bts) - one.decode(x_bts))
    assert not one.decode_change(torch.zeros(1, 1, 16)).any()


@pytest.mark.parametrize(("dense_width", "sparse_width"), [(8, 24), (8, 8)])
def test_a_new_bridge_gives_back_what_it_is_given(dense_width: int, sparse_width: int) -> None:
    one = Bridge(dense_width, sparse_width, keep=1.0, seed=4)
    h_btd = torch.randn(2, 3, dense_width)
    torch.testing.assert_close(one.decode(one.encode(h_btd)), h_btd)


def test_calibration_makes_residuals_standard_apart_from_the_first_position() -> None:
    torch.manual_seed(0)  # unseeded, rounding exceeded the tolerance now and then
    bridges = Bridges(2, 5, 16, 0.25)
    offset, size = torch.tensor([1.0, -2.0, 0.0, 30.0, 4.0]), torch.tensor([0.1, 1.0, 3.0, 2.0, 0.5])
    residuals = [offset + size * torch.randn(4, 50, 5), 1000 * torch.randn(4, 50, 5)]
    for h_btd in residuals:
        h_btd[:, 0] = 1e6
    bridges.calibrate(residuals)
    for site, h_btd in enumerate(residuals):
        rest = h_btd[:, 1:].reshape(-1, 5)
        torch.testing.assert_close(bridges[site].mean_d, rest.mean(0))
        torch.testing.assert_close(bridges[site].scale, (rest - rest.mean(0)).pow(2).mean().sqrt())
    alone = torch.randn(4, 1, 5)  # where there is nothing but the first position, it has to do
    bridges.calibrate([alone, alone])
    torch.testing.assert_close(bridges[0].mean_d, alone.mean((0, 1)))


def test_hybrids_are_the_compositions(coupling: CoupledModels) -> None:
    """Sublayer by sublayer: one model until the site, the bridge, the other model from there."""
    dense, sparse = coupling.dense.run(TOKENS_BT), coupling.sparse.run(TOKENS_BT)
    for site in range(coupling.n_sites):
        one = coupling.bridges[site]
        into = coupling.sparse.run(TOKENS_BT, Enter.at(site, one.encode(dense.residuals[site])))
        out = coupling.dense.run(TOKENS_BT, Enter.at(site, one.decode(sparse.residuals[site])))
        torch.testing.assert_close(into.residuals[site], one.encode(dense.residuals[site]), rtol=0, atol=0)
        assert torch.equal(coupling.dense_to_sparse(TOKENS_BT, dense.residuals, site), into.logits_btv)
        assert torch.equal(coupling.sparse_to_dense(TOKENS_BT, sparse.residuals, site), out.logits_btv)
        assert not torch.equal(into.logits_btv, sparse.logits_btv)
        assert not torch.equal(out.logits_btv, dense.logits_btv)


def test_a_coupling_needs_models_that_fit(dense: DenseModel, coupling: CoupledModels) -> None:
    deeper = load_dense(tiny_gpt2(layers=3))
    with pytest.raises(ValueError, match="has 7 sites, the sparse model 5, and there are 5 bridges"):
        CoupledModels(deeper, coupling.sparse, coupling.bridges, coupling.recipe)
    with pytest.raises(ValueError, match="there are 4 bridges"):
        CoupledModels(dense, coupling.sparse, Bridges(4, 16, 32, 0.25), coupling.recipe)


# -- folders ------------------------------------------------------------------------------------------------------------


def assert_same_function(found: CoupledModels, saved: CoupledModels) -> None:
    one, other = found.sparse.run(TOKENS_BT), saved.sparse.run(TOKENS_BT)
    assert torch.equal(one.logits_btv, other.logits_btv)
    h = saved.dense.run(TOKENS_BT).residuals
    for site in range(saved.n_sites):
        assert torch.equal(found.bridges[site].encode(h[site]), saved.bridges[site].encode(h[site]))
        assert torch.equal(found.bridges[site].decode(other.residuals[site]), saved.bridges[site].decode(other.residuals[site]))
    assert torch.equal(found.dense.run(TOKENS_BT).logits_btv, saved.dense.run(TOKENS_BT).logits_btv)


def test_a_coupling_comes_back_bit_for_bit(saved: CoupledModels) -> None:
    assert saved.path is not None
    found = bridge.load(saved.path, device="cpu")
    assert_same_function(found, saved)
    assert found.recipe == saved.recipe and found.path == saved.path
    assert found.reference_bt is not None and torch.equal(found.reference_bt, TOKENS_BT)
    assert found.context == saved.context and found.sparse.achieved_l0() == saved.sparse.achieved_l0()
    assert found.dense.tokenizer is not None
    assert not any(p.requires_grad for module in (found.sparse, found.bridges) for p in module.parameters())


def test_a_coupling_can_be_saved_again(saved: CoupledModels, folder: Path) -> None:
    """The same tensors give the same file, and a folder may be overwritten by its own coupling."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    bridge.load(folder).save_pretrained(folder)
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(before) == set(after)
    assert all(after[name] == before[name] for name in before if name.endswith(".safetensors"))


@pytest.mark.parametrize("positions", ["none", "learned", "rotary"])
@pytest.mark.parametrize("bigram", ["none", "full", "low-rank"])
def test_every_shape_comes_back(dense: DenseModel, tmp_path: Path, positions: str, bigram: str) -> None:
    coupling = untrained(dense, sparse={"width": 32, "positions": positions, "bigram": bigram, "sinks": bigram != "none"})
    coupling.save_pretrained(tmp_path / "it")
    assert_same_function(bridge.load(tmp_path / "it", dense=dense), coupling)


def test_sparse_weights_are_stored_by_their_nonzeros(dense: DenseModel, tmp_path: Path) -> None:
    coupling = untrained(dense, sparse={"width": 128, "bigram": "none"})
    coupling.sparse.project(0.01)
    coupling.save_pretrained(tmp_path / "it")
    weights = coupling.sparse.sparse_weights().values()
    packed = sum(6 * int(weight.count_nonzero()) + 4 * len(weight) for weight in weights)
    rest = sum(p.numel() for p in coupling.sparse.parameters()) - sum(weight.numel() for weight in weights)
    rest += sum(tensor.numel() for tensor in coupling.bridges.state_dict().values())
    file = next((tmp_path / "it").glob("*.safetensors"))
    assert file.stat().st_size < packed + 4 * rest + 20_000  # the header names every tensor
    assert file.stat().st_size < 4 * sum(weight.numel() for weight in weights) / 3


def test_a_dense_model_is_found_beside_the_coupling(saved: CoupledModels, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bridge.load(folder)
    assert_same_function(found, saved)
    assert Path(found.dense.name) == folder.parent / "dense"
    monkeypatch.chdir(folder.parent)
    assert_same_function(bridge.load("coupling"), saved)


def test_a_coupling_is_found_through_a_link(saved: CoupledModels, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "link").symlink_to(folder)
    assert_same_function(bridge.load(elsewhere / "link"), saved)
    tiny_gpt2(seed=1).save_pretrained(elsewhere / "dense")  # where `..` of the link's own name would lead
    found = bridge.load(elsewhere / "link")
    assert_same_function(found, saved)
    assert Path(found.dense.name) == (folder.parent / "dense").resolve()


def test_another_dense_model_is_refused(saved: CoupledModels, folder: Path) -> None:
    another = r"the dense model .* is not the one .* was fitted to \(.*\): its weights differ; give that model with dense="
    assert_refused(folder, another, dense=tiny_gpt2(seed=1))
    file = folder.parent / "dense" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("mlp.c_fc.weight"))
    weights[name][0, 0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert_refused(folder, another)


def test_a_missing_dense_model_is_refused(saved: CoupledModels, folder: Path) -> None:
    shutil.rmtree(folder.parent / "dense")
    edit(folder, lambda facts: facts["dense"].update(name="no/such-model"))
    assert_refused(folder, r"dense model of .* not found: .*no/such-model.*; or give its path with dense=")
    assert_same_function(bridge.load(folder, dense=tiny_gpt2()), saved)


def test_a_live_model_has_to_be_passed(dense: DenseModel, coupling: CoupledModels, tmp_path: Path) -> None:
    coupling.save_pretrained(tmp_path / "it")
    assert_refused(tmp_path / "it", r"GPT2LMHeadModel.*; or give its path with dense=")
    for given in (tiny_gpt2(), dense):
        found = bridge.load(tmp_path / "it", dense=given, tokenizer=tiny_tokenizer())
        assert_same_function(found, coupling)
        assert found.dense.tokenizer is not None


def lose_a_tensor(folder: Path) -> None:
    """A file whose digest is right and whose bias is not there."""
    from bridge.models.store import read_folder, write_folder

    tensors, facts = read_folder(folder, "coupling")
    write_folder(folder, "coupling", {key: value for key, value in tensors.items() if key != "sparse.blocks.0.q.bias"}, facts)


def lose_nonzeros(folder: Path) -> None:
    from bridge.models.store import read_folder, write_folder

    tensors, facts = read_folder(folder, "coupling")
    write_folder(folder, "coupling", {key: value for key, value in tensors.items() if key != "sparse.embedding.values"}, facts)


def replace_a_number(name: str, number: float) -> Callable[[Path], None]:
    """The folder with the first number of a tensor replaced, digests and all."""

    def damage(folder: Path) -> None:
        from bridge.models.store import read_folder, write_folder

        tensors, facts = read_folder(folder, "coupling")
        tensors[name].view(-1)[0] = number
        write_folder(folder, "coupling", tensors, facts)

    return damage


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (replace_a_number("sparse.embedding.values", float("nan")), "sparse.embedding.values of .* not finite"),
        (replace_a_number("bridges.at_site.0.decoder.weight", float("inf")), "decoder.weight of .* not finite"),
        (replace_a_number("reference_bt", VOCABULARY), f"has tokens outside 0 to {VOCABULARY - 1}"),
        (replace_a_number("reference_bt", -1), f"has tokens outside 0 to {VOCABULARY - 1}"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"x"), "damaged"),
        (lambda folder: (folder / "coupling.json").unlink(), "holds no coupling.json"),
        (lose_a_tensor, "do not fit its recipe"),
        (lose_nonzeros, "nonzeros of sparse.embedding"),
        (lambda folder: edit(folder, lambda facts: facts.update(format=99)), "has format 99"),
        (lambda folder: edit(folder, lambda facts: facts.pop("dense")), "no coupling that this version reads"),
        *(
            (lambda folder, key=key: edit(folder, lambda facts: facts["dense"].update({key: 3})), "no coupling that this version")
            for key in ("fingerprint", "name", "beside", "adapter_beside")
        ),
        (lambda folder: edit(folder, lambda facts: facts["dense"].update(fingerprint=None)), "no coupling that this version"),
        (lambda folder: edit(folder, lambda facts: facts.update(recipe=[])), "no coupling that this version reads"),
        (
            lambda folder: edit(folder, lambda facts: facts["recipe"].update(sparse={"width": 17})),
            "no coupling that this version",
        ),
        (lambda folder: edit(folder, lambda facts: facts["recipe"]["sparse"].update(width=64)), "do not fit"),
        (lambda folder: edit(folder, lambda facts: facts["dense"].update(sublayers=["attn", "mlp"])), "do not fit its recipe"),
    ],
)
def test_a_damaged_coupling_is_refused(folder: Path, damage, why: str) -> None:
    damage(folder)
    assert_refused(folder, why)


def test_neither_a_folder_nor_on_the_hub() -> None:
    for name in ("/no/such/folder", "./nowhere", "no/such-repository"):
        assert_refused(Path(name), "does not exist|neither a folder here nor available from the hub")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_travels_with_the_coupling(dense_folder: Path, tmp_path: Path) -> None:
    adapter = lora_folder(tmp_path / "here" / "adapter")
    coupling = untrained(load_dense(dense_folder, adapter=adapter), adapter=adapter)  # pyright: ignore[reportArgumentType]
    coupling.save_pretrained(tmp_path / "here" / "coupling")
    (tmp_path / "here").rename(tmp_path / "there")
    for given in (None, dense_folder):
        assert_same_function(bridge.load(tmp_path / "there" / "coupling", dense=given), coupling)


def test_pushing_uploads_a_folder_with_a_card(saved: CoupledModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its card names the repository, and nothing in it names folders of this machine beside it."""
    calls: dict[str, object] = {}

    class FakeApi:
        def __init__(self, token: str | None = None) -> None:
            calls["token"] = token

        def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
            calls["created"] = (repo, private, exist_ok)
            return f"https://hub/{repo}"

        def upload_folder(self, *, repo_id: str, folder_path: str | Path) -> None:
            calls["uploaded"] = repo_id
            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    assert saved.push_to_hub("someone/tiny", private=True, token="t") == "https://hub/someone/tiny"
    assert calls == {"token": "t", "created": ("someone/tiny", True, True), "uploaded": "someone/tiny"}
    names = {file.name for file in (tmp_path / "hub").iterdir()}
    assert {"README.md", "coupling.json"} < names and len(names) == 3
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "library_name: bridge" in card and 'bridge.load("someone/tiny")' in card
    assert json.loads((tmp_path / "hub" / "coupling.json").read_text())["dense"]["beside"] is None
    assert_same_function(bridge.load(tmp_path / "hub", dense=tiny_gpt2()), saved)


def test_a_card_says_how_sparse_the_model_is(saved: CoupledModels) -> None:
    assert saved.path is not None
    card = (Path(saved.path) / "README.md").read_text()
    weights = saved.sparse.sparse_weights().values()
    share = sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
    assert f"{share:.2%} are nonzero" in card and "2 blocks of width 32" in card and "5 sites" in card


# -- the package --------------------------------------------------------------------------------------------------------


def test_importing_the_package_is_light() -> None:
    code = "import sys, bridge; assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_exported_is_there() -> None:
    assert (
        issubclass(bridge.Coupling, CoupledModels) and bridge.Coupling.from_pretrained is bridge.load and "load" in bridge.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'lode'; it has Card, Coupling, DenseModel"):
        bridge.lode  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_what_was_computed_once_is_kept_until_weights_or_text_change(coupling: CoupledModels):
    text_bt, computed = torch.arange(8).view(2, 4), []

    def ask(text_bt: torch.Tensor, what: str = "sum") -> int:
        return coupling.once(what, text_bt, lambda: computed.append(what) or len(computed))

    assert ask(text_bt) == ask(text_bt.clone()) == 1
    assert ask(text_bt, "other") == 2 and ask(text_bt) == 1
    assert ask(text_bt + 1) == 3 and ask(text_bt.view(4, 2) + 1) == 4
    with torch.no_grad():
        coupling.sparse.unembedding.bias.add_(1)
    assert ask(text_bt.view(4, 2) + 1) == 5
    with pytest.raises(ZeroDivisionError):
        coupling.once("never", text_bt, lambda: 1 // 0)
    assert ask(text_bt, "never") == 6
