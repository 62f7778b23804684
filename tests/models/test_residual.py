"""`run` against the literal loop of the design, for rows that enter anywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bridge.models.residual import EMBEDDING, Enter, Trace, run

N_SUBLAYERS, VOCABULARY, WIDTH, TOKENS = 4, 7, 5, 3
LAST = N_SUBLAYERS


class Toy:
    """A residual model whose sublayers mix tokens; it notes how many rows each of them was given."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def matrix(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.embedding, self.unembedding, self.table = matrix(VOCABULARY, WIDTH), matrix(WIDTH, VOCABULARY), matrix(VOCABULARY, 1)
        self.weights = [matrix(WIDTH, WIDTH) for _ in range(N_SUBLAYERS)]
        self.rows_seen: list[int] = []

    def embed(self, tokens_bt: Tensor) -> Tensor:
        return self.embedding[tokens_bt]

    def sublayer(self, index: int, x_btd: Tensor) -> Tensor:
        self.rows_seen.append(len(x_btd))
        return x_btd + torch.tanh(x_btd.cumsum(1) @ self.weights[index])

    def unembed(self, x_btd: Tensor, tokens_bt: Tensor) -> Tensor:
        return x_btd @ self.unembedding + self.table[tokens_bt]

    def run(self, tokens_bt: Tensor, enter: Enter | None = None) -> Trace:
        self.rows_seen = []
        sublayers = [lambda x, index=index: self.sublayer(index, x) for index in range(N_SUBLAYERS)]
        return run(self.embed, sublayers, self.unembed, tokens_bt, enter)

    def literally(self, tokens_bt: Tensor, enter: Enter) -> tuple[Tensor, list[Tensor]]:
        """logits_btv and the residuals x_btd of every site, every row computed everywhere (architecture, the one idea)."""

        def place(site: int, x_btd: Tensor) -> Tensor:
            entering_b = enter.site_b == site
            return torch.where(entering_b[:, None, None], enter.x_btd, x_btd)

        residuals = []
        x_btd = self.embed(tokens_bt)
        for site in range(N_SUBLAYERS):
            x_btd = place(site, x_btd)
            residuals.append(x_btd)
            x_btd = self.sublayer(site, x_btd)
        x_btd = place(N_SUBLAYERS, x_btd)
        return self.unembed(x_btd, tokens_bt), [*residuals, x_btd]


def batch(sites: list[int], seed: int = 1) -> tuple[Tensor, Enter]:
    """Tokens, and an entry with a residual of its own for every row."""
    generator = torch.Generator().manual_seed(seed)
    tokens_bt = torch.randint(VOCABULARY, (len(sites), TOKENS), generator=generator)
    x_btd = torch.randn(len(sites), TOKENS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    return tokens_bt, Enter(torch.tensor(sites), x_btd)


mixtures = st.lists(st.integers(EMBEDDING, LAST), min_size=1, max_size=6)
always = pytest.mark.parametrize("sites", [[EMBEDDING] * 3, [0] * 3, [LAST] * 3, [LAST, EMBEDDING], [2], [LAST]], ids=str)


def check_mixture(sites: list[int]) -> None:
    model = Toy()
    tokens_bt, enter = batch(sites)
    trace = model.run(tokens_bt, enter)
    assert model.rows_seen == [count for site in range(LAST) if (count := sum(each <= site for each in sites))]
    logits_btv, residuals = model.literally(tokens_bt, enter)
    torch.testing.assert_close(trace.logits_btv, logits_btv)
    for site, x_btd in enumerate(residuals):
        there_b = [row for row in enter.site_b.argsort(stable=True).tolist() if sites[row] <= site]
        torch.testing.assert_close(trace.residuals[site], x_btd[there_b])


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(sites=mixtures)
def test_rows_that_enter_anywhere_give_what_the_literal_loop_gives(sites: list[int]) -> None:
    check_mixture(sites)


@always
def test_extreme_mixtures(sites: list[int]) -> None:
    check_mixture(sites)


@settings(deadline=None, max_examples=30, derandomize=True, database=None)
@given(sites=mixtures)
def test_gradients_are_those_of_the_literal_loop(sites: list[int]) -> None:
    model = Toy()
    tokens_bt, enter = batch(sites)
    inputs = [enter.x_btd, model.embedding, *model.weights, model.unembedding]

    def gradients(logits_btv: Tensor, residuals: Tensor) -> list[Tensor]:
        loss = logits_btv.square().sum() + residuals.sin().sum()
        given = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, given, strict=True)]

    trace = model.run(tokens_bt, enter)
    entered_x, *entered_weights = gradients(trace.logits_btv, trace.residuals[LAST])
    logits_btv, residuals = model.literally(tokens_bt, enter)
    expected_x, *expected_weights = gradients(logits_btv, residuals[LAST])
    torch.testing.assert_close(entered_x, expected_x)
    torch.testing.assert_close(entered_weights, expected_weights)
    for row, site in enumerate(sites):  # a row is told about its residual exactly where it used it
        assert bool(entered_x[row].any()) == (site != EMBEDDING)


def test_the_plain_run_is_nobody_entering() -> None:
    model = Toy()
    tokens_bt, enter = batch([EMBEDDING] * 4)
    plain, entered = model.run(tokens_bt), model.run(tokens_bt, enter)
    assert torch.equal(plain.logits_btv, entered.logits_btv)
    for site in range(LAST + 1):
        assert torch.equal(plain.residuals[site], entered.residuals[site])


@pytest.mark.parametrize("site", range(LAST + 1))
def test_resuming_from_a_runs_own_residual_changes_nothing(site: int) -> None:
    model = Toy()
    tokens_bt, _ = batch([0] * 4)
    plain = model.run(tokens_bt)
    resumed = model.run(tokens_bt, Enter.at(site, plain.residuals[site]))
    assert torch.equal(resumed.logits_btv, plain.logits_btv)
    assert len(model.rows_seen) == LAST - site


@pytest.mark.parametrize("site", [-2, LAST + 1])
def test_sites_that_do_not_exist_are_refused(site: int) -> None:
    tokens_bt, enter = batch([0, site, 2])
    with pytest.raises(ValueError, match=rf"site {site} does not exist; sites run from 0 to {LAST} "):
        Toy().run(tokens_bt, enter)


def test_an_entry_needs_a_site_and_a_residual_for_the_same_rows() -> None:
    with pytest.raises(ValueError, match="there are 2 sites and 3 residuals; each row needs one of each"):
        Enter(torch.tensor([0, 1]), torch.zeros(3, TOKENS, WIDTH))
