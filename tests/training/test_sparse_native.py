"""Sparse-native training: the same step as dense-masked training between moves, and masks that move as they say."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from bridge.models.bridges import CoupledModels
from bridge.models.residual import Enter
from bridge.recipe import recipe_values
from bridge.training import sparse_native as native
from bridge.training.loop import FitStopped, finish, train
from bridge.training.objective import Objective, draw_splice
from bridge.training.optimizer import SharkfinAdamW
from bridge.training.prepare import Run, prepare

FRACTION = 0.2


def one_step(coupling: CoupledModels, optimizer: SharkfinAdamW, *, masked: bool) -> None:
    """A step; the reference sets the gradients of zero weights to zero, and leaves them zero."""
    generator = torch.Generator().manual_seed(1)
    tokens_bt = torch.randint(2, 40, (4, 16), generator=generator)
    losses = coupling.recipe.losses
    splice = draw_splice(4, coupling.n_sites, losses, generator)
    Objective(coupling.dense, coupling.sparse, coupling.bridges, losses)(tokens_bt, splice)["total"].backward()
    weights = {name: weight for name, weight in coupling.sparse.sparse_weights().items() if name != "positions"}
    zeros = {name: weight.detach() == 0 for name, weight in weights.items()}
    if masked:
        for name, weight in weights.items():
            assert weight.grad is not None
            weight.grad[zeros[name]] = 0
        group, *rest = optimizer.normalised_groups  # the mean square is over what lives
        live = sum(int((~zero).sum()) for zero in zeros.values()) + sum(
            p.numel() for p in group if all(p is not weight for weight in weights.values())
        )
        scale = (sum(p.numel() for p in group) / live) ** 0.5
        for p in group:
            assert p.grad is not None
        optimizer.normalised_groups = rest
        norm = torch.stack([p.grad.square().sum() for p in group if p.grad is not None]).sum().sqrt()
        for p in group:
            assert p.grad is not None
            p.grad *= (sum(p.numel() for p in group) ** 0.5) / norm / scale
    optimizer.step(0.5, FRACTION)
    if masked:
        with torch.no_grad():
            for name, weight in weights.items():
                weight[zeros[name]] = 0
        optimizer.normalised_groups = [group, *rest]


def test_a_step_on_the_nonzeros_is_the_dense_step_with_the_zeros_left_out(coupling: CoupledModels) -> None:
    coupling.sparse.shape = coupling.sparse.shape.model_copy(update={"keep": 1.0})  # a rounding may change what AbsTopK keeps
    for site in range(coupling.n_sites):
        coupling.bridges[site].keep = 1.0
    coupling.sparse.project(FRACTION)
    other = copy.deepcopy(coupling)
    reference, by_nonzeros = SharkfinAdamW(coupling), SharkfinAdamW(other)
    for name in list(other.sparse.packable()):
        by_nonzeros.pack_matrix(name, other)
    for _ in range(3):
        one_step(coupling, reference, masked=True)
        one_step(other, by_nonzeros, masked=False)
    native.unpack(other.sparse)
    expected = dict(coupling.sparse.named_parameters())
    for name, parameter in other.sparse.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-3, atol=1e-5), name


def test_holding_and_releasing_changes_nothing(coupling: CoupledModels) -> None:
    coupling.sparse.project(FRACTION)
    before = {name: parameter.detach().clone() for name, parameter in coupling.sparse.named_parameters()}
    tokens_bt = torch.randint(2, 40, (3, 16), generator=torch.Generator().manual_seed(0))
    logits_btv, l0 = coupling.sparse(tokens_bt), coupling.sparse.achieved_l0()
    for name in list(coupling.sparse.packable()):
        native.pack(coupling.sparse, name)
    assert torch.allclose(coupling.sparse(tokens_bt), logits_btv, rtol=1e-4, atol=1e-5)
    assert coupling.sparse.achieved_l0() == l0
    native.unpack(coupling.sparse)
    assert {name: parameter.shape for name, parameter in coupling.sparse.named_parameters()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert all(torch.equal(parameter, before[name]) for name, parameter in coupling.sparse.named_parameters())


def test_the_mask_drops_the_smallest_and_grows_the_steepest(coupling: CoupledModels) -> None:
    sparse, name = coupling.sparse, "blocks.0.up.weight"
    sparse.project(FRACTION)
    weight_mn = sparse.get_parameter(name).detach().clone()
    native.pack(sparse, name)
    native.collect_gradients(sparse)
    matrix = sparse.compact[name]
    assert matrix.gradient_mn is not None
    gradient_mn = torch.randn(weight_mn.shape, generator=torch.Generator().manual_seed(0))
    matrix.gradient_mn.copy_(gradient_mn)
    moment_p = matrix.value_p.detach() * 3
    native.update_mask(sparse, 0.25, {matrix.value_p: {"exp_avg": moment_p}})

    nonzeros = int((weight_mn != 0).sum())
    n_changed = nonzeros // 4
    magnitude = weight_mn.abs().view(-1)
    dropped = torch.where(magnitude == 0, torch.inf, magnitude).topk(n_changed, largest=False).indices
    steepness = torch.where(weight_mn == 0, gradient_mn.abs(), 0).view(-1)
    grown = steepness.topk(n_changed).indices
    expected = weight_mn.clone()
    expected.view(-1)[dropped] = 0
    places = set(expected.view(-1).nonzero().flatten().tolist()) | set(grown.tolist())
    assert set(matrix.pattern.index_p.tolist()) == places and len(places) == nonzeros
    assert torch.equal(matrix.dense(), expected), "what stays keeps its value, what grows starts from zero"
    assert torch.equal(moment_p, matrix.value_p * 3), "moments move with their weights"


def test_what_min_per_neuron_protects_is_not_dropped(coupling: CoupledModels) -> None:
    sparse, name = coupling.sparse, "blocks.0.up.weight"
    sparse.project(FRACTION, min_per_neuron=2)
    native.pack(sparse, name)
    for _ in range(5):
        native.collect_gradients(sparse)
        matrix = sparse.compact[name]
        assert matrix.gradient_mn is not None
        matrix.gradient_mn.normal_()
        native.update_mask(sparse, 0.5, {}, min_per_neuron=2)
        assert int(matrix.pattern.start_m1.diff().min()) >= 2


def values(text_file: Path, **settings: object) -> dict:
    return recipe_values(
        l0=0.1, data=str(text_file), tokens=16 * 4 * 40, width=32,
        settings={
            "data.rows": 4, "data.context": 16, "sparsity.anneal": 0.3, "sparsity.native": "always", "sparsity.look_every": 4,
            **settings,
        },
    )  # fmt: skip


def weights_of(coupling: CoupledModels) -> dict[str, torch.nn.Parameter]:
    return dict(coupling.sparse.named_parameters()) | dict(coupling.bridges.named_parameters())


def test_a_native_fit_ends_at_its_l0_with_masks_that_moved(dense_folder: Path, text_file: Path) -> None:
    run = prepare(dense_folder, values(text_file))
    progress = list(train(run))[-1]
    assert native.packed_names(run.coupling.sparse)
    places = {name: run.coupling.sparse.compact[name].pattern.count for name in native.packed_names(run.coupling.sparse)}
    coupling = finish(run)
    assert not native.packed_names(coupling.sparse) and places
    assert progress.l0 == pytest.approx(0.1, rel=0.05) and coupling.sparse.achieved_l0() == pytest.approx(progress.l0, rel=0.02)
    still = finish(_trained(prepare(dense_folder, values(text_file, **{"sparsity.move": 0.0}))))
    name = "blocks.0.up.weight"
    moved = (coupling.sparse.get_parameter(name) != 0) ^ (still.sparse.get_parameter(name) != 0)
    assert int(moved.sum()) > 0


def test_a_native_run_cut_while_native_ends_where_an_uncut_one_does(
    dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights_of(finish(_trained(prepare(dense_folder, values(text_file)))))
    monkeypatch.setattr("bridge.training.loop.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("bridge.training.loop.REPORT_SECONDS", 0.0)
    cut = train(prepare(dense_folder, values(text_file), out=tmp_path / "run"))
    for progress in cut:
        if progress.step == 27:
            break
    cut.close()
    resumed = finish(_trained(prepare(dense_folder, values(text_file), out=tmp_path / "run", resume=True)))
    found = weights_of(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "run" / "training.json").exists()


def _trained(run: Run) -> Run:
    try:
        for _ in train(run):
            pass
    except FitStopped:
        raise AssertionError("nobody asked it to stop") from None
    return run


# -- inference ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def frozen(coupling: CoupledModels, monkeypatch: pytest.MonkeyPatch) -> CoupledModels:
    """A sparse coupling that would use sparse products for every matrix."""
    coupling.sparse.project(FRACTION)
    coupling.sparse.requires_grad_(False)
    monkeypatch.setattr("bridge.models.sparse_weights.pays", lambda *_: True)
    return coupling


@pytest.mark.parametrize("rows, length", [(1, 16), (5, 16), (3, 1)])
def test_a_frozen_model_is_the_same_through_sparse_products(frozen: CoupledModels, rows: int, length: int) -> None:
    tokens_bt = torch.randint(2, 40, (rows, length), generator=torch.Generator().manual_seed(0))
    enter = Enter(torch.arange(rows) % 4 - 1, torch.randn(rows, length, frozen.sparse.width))
    seen: list[list[torch.Tensor]] = []
    for _ in range(2):
        traces = [frozen.sparse.run(tokens_bt), frozen.sparse.run(tokens_bt, enter), frozen.sparse.run(tokens_bt, last_only=True)]
        seen.append([traces[0].logits_btv, *traces[0].residuals, traces[1].logits_btv, traces[2].logits_btv])
        frozen.sparse.use_products()
    assert len(frozen.sparse.compact) == 14  # all but the positions
    for found, expected in zip(seen[1], seen[0], strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share, products", [(0.3, 14), (0.5, 0)])
def test_what_runs_through_sparse_products_is_not_measured(
    coupling: CoupledModels, monkeypatch: pytest.MonkeyPatch, share: float, products: int
) -> None:
    """Otherwise answers near the density where both take as long would differ from process to process, and circuits with them."""
    monkeypatch.setattr("bridge.kernels.products.SMALLEST", 1)
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("it was measured"))
    coupling.sparse.project(share)
    coupling.sparse.requires_grad_(False).use_products()
    assert len(coupling.sparse.compact) == products


def test_a_weight_that_was_changed_is_seen(frozen: CoupledModels) -> None:
    tokens_bt = torch.randint(2, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    frozen.sparse.use_products()
    before = frozen.sparse(tokens_bt)
    with torch.no_grad():
        frozen.sparse.get_parameter("blocks.0.up.weight").mul_(2)
    changed = frozen.sparse(tokens_bt)
    assert not torch.allclose(changed, before)
    frozen.sparse.compact.clear()
    assert torch.allclose(frozen.sparse(tokens_bt), changed, rtol=1e-4, atol=1e-5)
    frozen.sparse.use_products()
    frozen.sparse.project(FRACTION / 4)
    assert not frozen.sparse.compact, "a projection packs anew"


def test_a_copy_does_not_see_the_weights_of_the_original(frozen: CoupledModels) -> None:
    tokens_bt = torch.randint(2, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    weight = frozen.sparse.get_parameter("blocks.0.up.weight")
    with torch.no_grad():
        for _ in range(3):
            weight.mul_(1.0)
    frozen.sparse.use_products()
    before, other = frozen.sparse(tokens_bt), copy.deepcopy(frozen.sparse)
    with torch.no_grad():
        for _ in range(weight._version):  # as often as the original was written to
            other.get_parameter("blocks.0.up.weight").mul_(1.5)
    assert not torch.allclose(other(tokens_bt), before)


def test_a_dense_gradient_can_be_asked_for(frozen: CoupledModels) -> None:
    tokens_bt = torch.randint(2, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    frozen.sparse.use_products()
    weight = frozen.sparse.get_parameter("blocks.0.up.weight").requires_grad_()
    (gradient_mn,) = torch.autograd.grad(frozen.sparse(tokens_bt).square().sum(), weight)
    assert int(gradient_mn[weight == 0].count_nonzero()) > 0


def test_a_converted_model_goes_back_to_dense_products(frozen: CoupledModels) -> None:
    tokens_bt = torch.randint(2, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = frozen.sparse(tokens_bt)
    frozen.sparse.use_products()
    assert torch.allclose(frozen.sparse.double()(tokens_bt).float(), expected, rtol=1e-4, atol=1e-4)
