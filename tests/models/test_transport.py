"""A change of the sparse model reaches the dense one at one site, through the decoder, and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.models.bridges import CoupledModels
from bridge.models.residual import Trace
from bridge.models.sparse import Location
from bridge.models.transport import change_between, decode_changes, run_with_changes

TOKENS_BT = torch.tensor([[3, 5, 7, 9, 2], [4, 8, 6, 11, 30]])


def _pushed(coupling: CoupledModels) -> tuple:
    def push(location: Location, x_btn: Tensor) -> Tensor:
        return x_btn + 1.5 * (torch.arange(x_btn.shape[-1]) == 3) if location == Location(0, "mlp_out") else x_btn

    return coupling.sparse.run(TOKENS_BT), coupling.sparse.run(TOKENS_BT, gate=push)


@torch.no_grad()
def test_a_change_is_the_decoders_difference(coupling: CoupledModels) -> None:
    plain, changed = _pushed(coupling)
    site_b = torch.tensor([2, 3])
    change_btd = decode_changes(coupling, site_b, change_between(plain, changed, site_b))
    for row, site in enumerate((2, 3)):
        decode = coupling.bridges[site].decode
        expected_td = decode(changed.residuals[site][row]) - decode(plain.residuals[site][row])
        torch.testing.assert_close(change_btd[row], expected_td, rtol=1e-4, atol=1e-5)
        assert change_btd[row].abs().max() > 1e-3


@torch.no_grad()
def test_before_the_changed_node_nothing_changes(coupling: CoupledModels) -> None:
    plain, changed = _pushed(coupling)
    assert not change_between(plain, changed, torch.tensor([1, 0])).any()


@torch.no_grad()
def test_the_dense_model_goes_on_from_the_sum(coupling: CoupledModels) -> None:
    dense, plain = coupling.dense, coupling.dense.run(TOKENS_BT)
    site_b = torch.tensor([1, coupling.n_sites - 1])
    change_btd = torch.randn(2, 5, dense.width, generator=torch.Generator().manual_seed(0))
    trace = run_with_changes(coupling, TOKENS_BT, plain, site_b, change_btd)
    for row, site in enumerate(site_b.tolist()):
        plain_1 = Trace(plain.logits_btv[[row]], tuple(x_btd[[row]] for x_btd in plain.residuals))
        alone = run_with_changes(coupling, TOKENS_BT[[row]], plain_1, site_b[[row]], change_btd[[row]])
        torch.testing.assert_close(trace.logits_btv[row], alone.logits_btv[0], rtol=1e-4, atol=1e-5)
        assert (trace.logits_btv[row] - plain.logits_btv[row]).abs().max() > 1e-2, site
    unchanged = run_with_changes(coupling, TOKENS_BT, plain, site_b, torch.zeros_like(change_btd))
    torch.testing.assert_close(unchanged.logits_btv, plain.logits_btv, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_plain_row_serves_every_row(coupling: CoupledModels) -> None:
    dense, tokens_bt = coupling.dense, TOKENS_BT[:1].expand(3, -1)
    one, all_ = dense.run(TOKENS_BT[:1]), dense.run(tokens_bt)
    site_b, change_btd = torch.tensor([0, 1, 2]), torch.ones(3, 5, dense.width)
    expected = run_with_changes(coupling, tokens_bt, all_, site_b, change_btd).logits_btv
    torch.testing.assert_close(run_with_changes(coupling, tokens_bt, one, site_b, change_btd).logits_btv, expected)
