"""The weight-sparse transformer against a literal one, written out token by token; its gates; its projection."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bridge.models.residual import EMBEDDING, Enter
from bridge.models.sparse import Location, SparseTransformer, identity_gate
from bridge.models.sparse_weights import Fractions, annealed_l0
from bridge.recipe import RecipeError, SparseShape, Sparsity

VOCABULARY, CONTEXT, WIDTH, CHANNELS = 11, 8, 16, 4
SEQUENTIAL, PARALLEL = ("attn", "mlp", "attn", "mlp"), ("parallel", "parallel")


def build(kinds: tuple[str, ...] = SEQUENTIAL, dtype: torch.dtype = torch.float64, **shape: object) -> SparseTransformer:
    """A small model all of whose parameters are random, those that start at zero too."""
    options = {"width": WIDTH, "head_channels": CHANNELS, "mlp_ratio": 2, "bigram_rank": 3, **shape}
    model = SparseTransformer(SparseShape.model_validate(options), kinds, VOCABULARY, CONTEXT, seed=1).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def some_tokens(rows: int = 3, length: int = CONTEXT, seed: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def linear(model: SparseTransformer, name: str, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.bias"))


def literal_logits(model: SparseTransformer, tokens: list[int]) -> np.ndarray:
    """The forward pass of the module's docstring and method.md for one row, with loops where the model has kernels."""
    shape = model.shape
    weight = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}

    def keep(x: np.ndarray) -> np.ndarray:
        kept = np.zeros_like(x)
        first = np.argsort(-np.abs(x), kind="stable")[: max(1, round(model.keep * len(x)))]
        kept[first] = x[first]
        return kept

    def norm(x: np.ndarray) -> np.ndarray:
        return x / math.sqrt(np.mean(x**2) + 1e-6)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return weight[f"{name}.weight"] @ x + weight[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def at_position(x: np.ndarray, position: int) -> np.ndarray:
        """A head's query or key as complex numbers, turned by the position."""
        half = len(x) // 2
        turned = [complex(x[c], x[c + half]) * cmath.exp(1j * position * 10_000 ** (-c / half)) for c in range(half)]
        return np.array([z.real for z in turned] + [z.imag for z in turned])

    def attention(block: int, residuals: list[np.ndarray]) -> list[np.ndarray]:
        name = f"blocks.{block}"
        reads = [keep(norm(x)) for x in residuals]
        q, k, v = ([keep(linear(f"{name}.{kind}", r)) for r in reads] for kind in "qkv")
        writes = []
        for t in range(len(residuals)):
            attended = np.zeros(WIDTH)
            for head in range(WIDTH // CHANNELS):
                part = slice(head * CHANNELS, (head + 1) * CHANNELS)
                if shape.positions == "rotary":
                    scores = [at_position(q[t][part], t) @ at_position(k[u][part], u) for u in range(t + 1)]
                else:
                    scores = [q[t][part] @ k[u][part] for u in range(t + 1)]
                terms = [math.exp(score / math.sqrt(CHANNELS)) for score in scores]
                sink = math.exp(weight[f"{name}.sinks"][head]) if shape.sinks else 0.0
                for u, term in enumerate(terms):
                    attended[part] += term / (sink + sum(terms)) * v[u][part]
            writes.append(keep(linear(f"{name}.o", attended)))
        return writes

    def mlp(block: int, residuals: list[np.ndarray]) -> list[np.ndarray]:
        name = f"blocks.{block}"
        acts = [keep(gelu(linear(f"{name}.up", keep(norm(x))))) for x in residuals]
        return [keep(linear(f"{name}.down", act)) for act in acts]

    residuals = [weight["embedding"][token].copy() for token in tokens]
    if shape.positions == "learned":
        residuals = [x + weight["positions"][t] for t, x in enumerate(residuals)]
    for block in range(len(model.blocks)):
        if "parallel" in model.sublayer_kinds:
            both = zip(attention(block, residuals), mlp(block, residuals), strict=True)
            residuals = [x + a + m for x, (a, m) in zip(residuals, both, strict=True)]
        else:
            residuals = [x + write for x, write in zip(residuals, attention(block, residuals), strict=True)]
            residuals = [x + write for x, write in zip(residuals, mlp(block, residuals), strict=True)]
    logits = np.stack([linear("unembedding", norm(x)) for x in residuals])
    if shape.bigram == "full":
        logits = logits + weight["bigram.0"][tokens]
    elif shape.bigram == "low-rank":
        logits = logits + weight["bigram.1"][tokens] @ weight["bigram.0"].T
    return logits


# -- the forward pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bigram", ["none", "full", "low-rank"])
@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
@pytest.mark.parametrize("positions", ["none", "learned", "rotary"])
@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL], ids=["sequential", "parallel"])
def test_the_model_is_the_literal_one(kinds: tuple[str, ...], positions: str, sinks: bool, bigram: str) -> None:
    model = build(kinds, positions=positions, sinks=sinks, bigram=bigram)
    tokens_bt = some_tokens(rows=2, length=6)
    expected_btv = np.stack([literal_logits(model, row) for row in tokens_bt.tolist()])
    tolerance = 1e-6 if positions == "rotary" else 1e-10  # angles are float32 whatever the model's type
    np.testing.assert_allclose(model(tokens_bt).detach().numpy(), expected_btv, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("channels", [2, 8, 16])
def test_head_widths(channels: int) -> None:
    """The sink's extra channels suit every width of head; over one token a head's pattern is 1 / (1 + e^(sink - score))."""
    model = build(head_channels=channels, keep=1.0)
    (record,) = recorded(model, some_tokens(1, 1))
    q, k, v = (record[Location(0, kind)].view(-1, channels) for kind in "qkv")
    share_h = torch.sigmoid((q * k).sum(-1) / math.sqrt(channels) - model.get_parameter("blocks.0.sinks"))
    expected = linear(model, "blocks.0.o", (share_h[:, None] * v).flatten())
    torch.testing.assert_close(record[Location(0, "attn_out")].flatten(), expected)


def test_bigram_tables_of_equal_product_are_equal() -> None:
    low, full = build(bigram="low-rank"), build(bigram="full")
    full.load_state_dict({**low.state_dict(), "bigram.0": low.bigram[1] @ low.bigram[0].T}, strict=False)
    tokens_bt = some_tokens()
    torch.testing.assert_close(full(tokens_bt), low(tokens_bt))


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    model = build(positions="rotary", sinks=False)
    generator = torch.Generator().manual_seed(0)
    q_n, k_n = (torch.randn(WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    pattern_htt = model.pattern(0, q_n.expand(1, CONTEXT, -1), k_n.expand(1, CONTEXT, -1))[0]
    log_htt = pattern_htt.log()
    difference_htt = log_htt - log_htt.diagonal(dim1=1, dim2=2)[..., None]  # score(t, u) - score(t, t)
    for distance in range(1, CONTEXT):
        along = difference_htt.diagonal(-distance, dim1=1, dim2=2)
        torch.testing.assert_close(along, along[:, :1].expand_as(along))
        assert along.abs().min() > 1e-6


@pytest.mark.parametrize("positions", ["none", "learned", "rotary"])
def test_later_tokens_change_no_earlier_logits(positions: str) -> None:
    model, tokens_bt = build(positions=positions), some_tokens()
    before_btv = model(tokens_bt)
    for t in range(CONTEXT):
        changed_bt = tokens_bt.clone()
        changed_bt[:, t] = (changed_bt[:, t] + 1) % VOCABULARY
        change_bt = (model(changed_bt) - before_btv).abs().amax(-1)
        assert change_bt[:, :t].sum() < 1e-12
        assert (change_bt[:, t:] > 1e-9).all()


def test_without_positions_only_what_came_before_matters_not_its_order() -> None:
    tokens_bt = some_tokens(rows=1)
    shuffled_bt = torch.cat([tokens_bt[:, :-1].flip(1), tokens_bt[:, -1:]], 1)
    one_layer = ("attn", "mlp")
    last = {name: [build(one_layer, positions=name)(x)[0, -1] for x in (tokens_bt, shuffled_bt)] for name in ("none", "rotary")}
    torch.testing.assert_close(*last["none"])
    assert not torch.allclose(*last["rotary"])


def test_rows_too_long_for_learned_positions_are_refused() -> None:
    long_bt = some_tokens(length=CONTEXT + 1)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens are more than the sparse model's context of {CONTEXT}"):
        build(positions="learned")(long_bt)
    for positions in ("none", "rotary"):
        assert build(positions=positions)(long_bt).shape == (3, CONTEXT + 1, VOCABULARY)


def test_last_only_gives_the_logits_of_the_last_position() -> None:
    model, tokens_bt = build(), some_tokens()
    torch.testing.assert_close(model.run(tokens_bt, last_only=True).logits_btv, model(tokens_bt)[:, -1:])


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL], ids=["sequential", "parallel"])
def test_rows_entering_anywhere_are_the_rows_of_plain_runs(kinds: tuple[str, ...]) -> None:
    """A row that enters with another row's residual continues as that row, but for the bigram's own tokens."""
    model = build(kinds, bigram="none", positions="learned")
    sites = [EMBEDDING, *range(model.n_sites)]
    tokens_bt = some_tokens(rows=len(sites))
    other_bt = tokens_bt.roll(1, 0)
    plain, other = model.run(tokens_bt), model.run(other_bt)
    x_btd = torch.stack([other.residuals[max(site, 0)][row] for row, site in enumerate(sites)])
    mixed = model.run(tokens_bt, Enter(torch.tensor(sites), x_btd))
    torch.testing.assert_close(mixed.logits_btv[0], plain.logits_btv[0])
    torch.testing.assert_close(mixed.logits_btv[1:], other.logits_btv[1:])


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL], ids=["sequential", "parallel"])
def test_gradients_are_those_of_finite_differences(kinds: tuple[str, ...]) -> None:
    """Along a random direction through all parameters, sinks and rotary positions included; and each kind has a gradient."""
    model, tokens_bt = build(kinds, positions="rotary"), some_tokens()
    names, parameters = zip(*model.named_parameters(), strict=True)
    targets = some_tokens(seed=4).flatten()
    generator = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def loss(step: float) -> Tensor:
        moved = {n: p + step * d for n, p, d in zip(names, parameters, direction, strict=True)}
        logits_btv = torch.func.functional_call(model, moved, (tokens_bt,))
        return torch.nn.functional.cross_entropy(logits_btv.flatten(0, 1), targets)

    gradients = torch.autograd.grad(loss(0), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    epsilon = 1e-7
    with torch.no_grad():
        torch.testing.assert_close(slope, (loss(epsilon) - loss(-epsilon)) / (2 * epsilon), rtol=1e-5, atol=1e-8)
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("positions", ["none", "learned", "rotary"])
def test_bfloat16_autocast_stays_close_and_trains(positions: str) -> None:
    model = build(dtype=torch.float32, positions=positions, keep=1.0)
    tokens_bt = some_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        logits_btv = model(tokens_bt)
    reference_btv = model(tokens_bt)
    error = (logits_btv.float() - reference_btv).square().mean().sqrt() / reference_btv.std()
    assert error < 0.05  # two or three bfloat16 roundings (each 2**-9) per sublayer, over four sublayers
    logits_btv.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    sparse = build(dtype=torch.float32, positions=positions)
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(tokens_bt).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_converted_model_runs_in_its_type(dtype: torch.dtype) -> None:
    assert build(dtype=dtype)(some_tokens()).dtype == dtype


def test_the_seed_decides_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        torch.rand(1)  # not the global random state
        model = SparseTransformer(SparseShape(width=16), ("attn", "mlp"), VOCABULARY, CONTEXT, seed=seed)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_width_that_is_no_multiple_of_the_heads_is_refused() -> None:
    shape = SparseShape.model_construct(**{**SparseShape().model_dump(), "width": 24})
    with pytest.raises(ValueError, match="width of 24 is not a multiple of 16 head channels"):
        SparseTransformer(shape, SEQUENTIAL, VOCABULARY, CONTEXT)


# -- nodes and gates --------------------------------------------------------------------------------------------------------


def recorded(model: SparseTransformer, tokens_bt: Tensor) -> tuple[dict[Location, Tensor]]:
    """What a recording gate sees, in the order in which it sees it."""
    record: dict[Location, Tensor] = {}

    def gate(location: Location, x_btn: Tensor) -> Tensor:
        assert location not in record, f"{location} is visited twice"
        record[location] = x_btn
        return x_btn

    model.run(tokens_bt, gate=gate)
    return (record,)


all_kinds = pytest.mark.parametrize(
    "kinds", [SEQUENTIAL, PARALLEL, ("attn", "mlp", "parallel")], ids=["sequential", "parallel", "mixed"]
)


@all_kinds
def test_the_identity_gate_is_the_model_exactly(kinds: tuple[str, ...]) -> None:
    model, tokens_bt = build(kinds), some_tokens()
    plain, gated = model.run(tokens_bt), model.run(tokens_bt, gate=identity_gate)
    assert torch.equal(plain.logits_btv, gated.logits_btv)
    assert all(torch.equal(a, b) for a, b in zip(plain.residuals, gated.residuals, strict=True))


def test_a_gated_run_takes_rows_that_enter() -> None:
    model, tokens_bt = build(), some_tokens()
    assert (model.n_sites, model.width, model.vocabulary) == (5, WIDTH, VOCABULARY)
    entered = model.run(tokens_bt, Enter.at(2, model.run(tokens_bt).residuals[2]), identity_gate)
    torch.testing.assert_close(entered.logits_btv, model(tokens_bt))


@all_kinds
def test_every_location_is_visited_once_in_order_with_its_size(kinds: tuple[str, ...]) -> None:
    model, tokens_bt = build(kinds), some_tokens()
    (record,) = recorded(model, tokens_bt)
    assert {location: x_btn.shape[-1] for location, x_btn in record.items()} == model.locations()
    assert list(record) == list(model.locations())
    one_block = ["attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_act", "mlp_out"]
    assert [str(location) for location in record] == [f"{layer}.{kind}" for layer in range(2) for kind in one_block]


@pytest.mark.parametrize("keep", [0.25, 0.1, 0.01, 1.0])
def test_abs_top_k_leaves_the_kept_share_at_every_location(keep: float) -> None:
    model = build(keep=keep)
    (record,) = recorded(model, some_tokens())
    for x_btn in record.values():
        allowed = max(1, round(keep * x_btn.shape[-1]))
        assert (x_btn.count_nonzero(dim=-1) == allowed).all()  # the inputs are random: nothing else is zero


@all_kinds
def test_reads_are_normalised_and_writes_are_what_the_residual_gains(kinds: tuple[str, ...]) -> None:
    model, tokens_bt = build(kinds), some_tokens()
    (record,) = recorded(model, tokens_bt)
    residuals = model.run(tokens_bt).residuals
    gained = [torch.zeros_like(residuals[0]) for _ in residuals[1:]]
    for location, x_btn in record.items():
        site = model.site(location)
        if location.kind.endswith("_out"):
            gained[site] = gained[site] + x_btn
        if location.kind.endswith("_in"):
            scale_bt1 = residuals[site].square().mean(-1, keepdim=True).sqrt()
            ratio = x_btn * scale_bt1 / residuals[site]
            torch.testing.assert_close(ratio[x_btn != 0], torch.ones_like(ratio[x_btn != 0]), rtol=1e-4, atol=0)
    for site, gain_btd in enumerate(gained):
        torch.testing.assert_close(residuals[site + 1] - residuals[site], gain_btd)


def downstream(model: SparseTransformer, location: Location, other: Location) -> bool:
    """Whether a change at `location` can reach `other`, read off the docstring's equations."""
    within = {
        "attn_in": {"q", "k", "v", "attn_out"},
        **dict.fromkeys("qkv", {"attn_out"}),
        "mlp_in": {"mlp_act", "mlp_out"},
        "mlp_act": {"mlp_out"},
    }
    if other.layer != location.layer:
        return other.layer > location.layer
    if model.site(other) != model.site(location):
        return model.site(other) > model.site(location)
    return other.kind in within.get(location.kind, set())


@all_kinds
def test_a_gate_changes_what_is_downstream_and_nothing_else(kinds: tuple[str, ...]) -> None:
    model, tokens_bt = build(kinds, keep=1.0), some_tokens()  # all kept, so that no change is lost on the way
    (before,) = recorded(model, tokens_bt)
    plain = model.run(tokens_bt)
    gated_at = 3
    for location in model.locations():
        after: dict[Location, Tensor] = {}

        def gate(here: Location, x_btn: Tensor, location: Location = location, after: dict = after) -> Tensor:
            after[here] = x_btn
            if here != location:
                return x_btn
            changed_btn = x_btn.clone()
            changed_btn[:, gated_at] *= -1.5
            return changed_btn

        trace = model.run(tokens_bt, gate=gate)
        for other, x_btn in after.items():
            changed = not torch.equal(x_btn, before[other])
            assert changed == downstream(model, location, other), f"{location} on {other}"
        for site in range(model.n_sites):
            assert torch.equal(trace.residuals[site], plain.residuals[site]) == (site <= model.site(location))
        change_bt = (trace.logits_btv - plain.logits_btv).abs().amax(-1)
        assert change_bt[:, :gated_at].max() < 1e-12
        assert change_bt[:, gated_at:].max() > 1e-6


def test_gradients_pass_through_gates() -> None:
    model, tokens_bt = build(), some_tokens()
    masks = {location: torch.ones(size, dtype=torch.float64, requires_grad=True) for location, size in model.locations().items()}
    model.run(tokens_bt, gate=lambda location, x_btn: x_btn * masks[location]).logits_btv.square().sum().backward()
    assert all(mask.grad is not None and mask.grad.any() for mask in masks.values())


@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no sinks"])
def test_the_pattern_is_that_of_the_fused_attention(sinks: bool, positions: str) -> None:
    model, tokens_bt = build(sinks=sinks, positions=positions, keep=1.0), some_tokens()
    (record,) = recorded(model, tokens_bt)
    for layer in range(2):
        q_btn, k_btn, v_btn = (record[Location(layer, kind)] for kind in "qkv")
        pattern_bhtt = model.pattern(layer, q_btn, k_btn)
        attended = torch.einsum("bhtu,buhc->bthc", pattern_bhtt, v_btn.unflatten(-1, (-1, CHANNELS))).flatten(2)
        torch.testing.assert_close(linear(model, f"blocks.{layer}.o", attended), record[Location(layer, "attn_out")])
        assert pattern_bhtt.triu(1).abs().max() == 0
        total = pattern_bhtt.sum(-1)
        assert (total < 1).all() if sinks else torch.allclose(total, torch.ones_like(total))


# -- sparsity ---------------------------------------------------------------------------------------------------------------


def matrices(model: SparseTransformer) -> dict[str, Tensor]:
    """A copy of every matrix that is made sparse, found by shape and not by the model's own list."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 2 and "bigram" not in n}


def largest(weight: Tensor, count: int) -> Tensor:
    """`weight` with all but its `count` largest entries zeroed, by an independent sort."""
    order = np.argsort(-weight.abs().flatten().numpy(), kind="stable")[:count]
    kept = torch.zeros(weight.numel(), dtype=weight.dtype)
    kept[order] = weight.flatten()[order]
    return kept.view_as(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("l0", [0.5, 0.1, 1 / 64, 1e-9])
def test_projection_keeps_the_same_share_of_each_matrix(l0: float, dtype: torch.dtype) -> None:
    model = build(dtype=dtype, positions="learned")
    before = matrices(model)
    others = {name: p.detach().clone() for name, p in model.named_parameters() if name not in before}
    model.project(l0)
    nonzero = 0
    for name, weight in matrices(model).items():
        expected = largest(before[name], max(1, math.floor(l0 * weight.numel() + 0.5)))
        assert torch.equal(weight, expected), name
        nonzero += int((expected != 0).sum())
    total = sum(weight.numel() for weight in before.values())
    assert model.achieved_l0() == nonzero / total
    assert abs(model.achieved_l0() - l0) <= len(before) / total
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if name in others)
    assert {"embedding", "positions", "unembedding.weight", "blocks.1.up.weight"} < before.keys()
    assert {"bigram.0", "unembedding.bias", "blocks.0.sinks"} < others.keys()


def test_projection_to_the_whole_changes_nothing() -> None:
    """L0 anneals from 1, which is the fraction and not one weight."""
    model = build()
    before = matrices(model)
    model.project(annealed_l0(0.01, 0.0, 0.5))
    assert all(torch.equal(weight, before[name]) for name, weight in matrices(model).items())
    assert model.achieved_l0() == 1


def test_what_embeds_may_keep_another_fraction() -> None:
    model = build()
    before = matrices(model)
    ends = {"embedding", "positions", "unembedding.weight"}
    fractions = Fractions(blocks=0.0625, embed=0.25)
    model.project(fractions)
    for name, weight in matrices(model).items():
        wanted = round((0.25 if name in ends else 0.0625) * weight.numel())
        assert torch.equal(weight, largest(before[name].flatten(), wanted).view_as(weight)), name
    assert model.n_kept(fractions) == sum(int(weight.count_nonzero()) for weight in matrices(model).values())
    achieved = model.achieved_fractions()
    assert achieved.embed == pytest.approx(0.25, rel=1e-2) and achieved.blocks == pytest.approx(0.0625, rel=1e-2)


def test_a_number_of_weights_is_of_those_that_l0_speaks_of() -> None:
    model = build()
    sizes = {name: weight.numel() for name, weight in matrices(model).items()}
    blocks = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    assert model.fractions(Sparsity(l0=blocks / 2)).blocks == pytest.approx(blocks / 2 / sum(sizes.values()))
    assert model.fractions(Sparsity(l0=blocks / 2, embed_l0=0.5)) == Fractions(blocks=0.5, embed=0.5)
    with pytest.raises(RecipeError, match=f"more than the number of weights, {blocks};"):
        model.fractions(Sparsity(l0=blocks + 1, embed_l0=0.5))


def test_biases_are_projected_on_request() -> None:
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 1}
    model.project(0.25, biases=True)
    for name, bias in before.items():
        assert torch.equal(model.get_parameter(name), largest(bias, max(1, round(0.25 * len(bias))))), name


def neuron_sides(model: SparseTransformer) -> list[Tensor]:
    """Number of nonzeros on each side of every neuron and attention channel."""
    axis = {"q": 1, "k": 1, "v": 1, "up": 1, "o": 0, "down": 0}  # inputs; and outputs, of values and neurons
    named = ((name.split(".")[-2:], p) for name, p in model.named_parameters() if name.startswith("blocks") and p.dim() == 2)
    return [parameter.count_nonzero(dim=axis[name]) for (name, _), parameter in named]


@pytest.mark.parametrize("minimum", [1, 2, 4])
def test_a_minimum_per_neuron_protects_both_sides_within_the_same_total(minimum: int) -> None:
    plain, protected = build(), build()
    before = matrices(plain)
    plain.project(0.3)
    protected.project(0.3, min_per_neuron=minimum)
    assert min(int(side.min()) for side in neuron_sides(plain)) < minimum
    assert min(int(side.min()) for side in neuron_sides(protected)) >= minimum
    for name, weight in matrices(protected).items():
        assert weight.count_nonzero() == matrices(plain)[name].count_nonzero(), name
        assert torch.equal(weight, torch.where(weight != 0, before[name], 0)), name


def test_what_a_minimum_does_not_claim_goes_to_the_largest() -> None:
    model = build()
    before = matrices(model)["blocks.0.up.weight"]
    model.project(0.3, min_per_neuron=2)
    after = matrices(model)["blocks.0.up.weight"]
    claimed = torch.stack([largest(row, 2) != 0 for row in before])
    assert (after[claimed] != 0).all()
    kept = after.abs()[(after != 0) & ~claimed]
    dropped = before.abs()[after == 0]
    assert kept.min() >= dropped.max()


def test_a_minimum_that_does_not_fit_is_refused() -> None:
    rule = r"l0 leaves 13 weights of blocks\.0\.q\.weight, but min_per_neuron 4 needs 64; raise l0 or lower min_per_neuron"
    with pytest.raises(RecipeError, match=rule):
        build().project(0.05, min_per_neuron=4)


@pytest.mark.parametrize("l0", [0.5, 1 / 16, 0.001])
@pytest.mark.parametrize("anneal", [0.1, 0.5, 1.0])
def test_l0_falls_from_1_to_its_target_by_equal_factors(l0: float, anneal: float) -> None:
    assert annealed_l0(l0, 0.0, anneal) == 1
    assert annealed_l0(l0, anneal, anneal) == annealed_l0(l0, 1.0, anneal) == l0
    path = [annealed_l0(l0, anneal * step / 8, anneal) for step in range(9)]
    np.testing.assert_allclose([b / a for a, b in zip(path, path[1:], strict=False)], l0 ** (1 / 8))
