"""Compare a coupling's circuits with those of other methods on the same dense model, prompts and text: one search, one table.

    python tests/benchmarks/alternatives.py --bridge DIR [DIR ...] [--recipe FILE] [--peers PYTHON] [--out DIR] [--count N]

    dense        the dense model's own neurons and channels at positions (`MaskedDense`); nothing is trained
    transcoders  its MLPs replaced by transcoders of the library sparsify; nodes are latents and the channels of attention
    latents      the same, but only latents are nodes and attention is fixed, as in attribution graphs
    coupling     each DIR
    uncoupled    a weight-sparse model trained by the coupling's recipe on text alone, from a random start, or the one that is
                 given; its bridges are fitted by ridge regression

The question is why the dense model's first answer follows rather than any other token. The circuit is that of F .9
(`find_nested`), under the same bounds, with error nodes at the same price and everything else at its mean over the same text.
`lost` is the share of the span that the *dense* model loses when the circuit is deleted: directly for nodes of its own, by
subtracting their decoded values from the MLP's output for latents, and transported at the best site for sparse models.

--out gets the text, the trained models with their cost, and a line for each prompt and alternative; a killed run continues from
it. Training budgets are in tokens, so a busy machine trains as much; processor minutes are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands do, before torch is imported

import numpy as np
import torch
from dense_edges import DenseEdges
from prompts import SHIPPED, held_out_prompts, middle
from torch import Tensor
from transcoders import LATENT, MaskedTranscoded, Transcoded, load_transcoders

import bridge
from bridge.circuits.dense_nodes import DenseSubject, MaskedDense
from bridge.circuits.error_nodes import follow_dense, reference_means, reference_rows
from bridge.circuits.loss import CircuitLoss, Level, SearchConfig
from bridge.circuits.masked_model import Masked, MaskedModel
from bridge.circuits.question import Question
from bridge.circuits.search import find_nested
from bridge.data.blocks import load_blocks
from bridge.evidence.carry import Transporter
from bridge.evidence.deletion import delete_circuits
from bridge.evidence.sufficiency import measure_circuit, superset_draws
from bridge.explanations.build import MAX_EDGES_TO_GROUP, prompt_tokens
from bridge.graph.attribution import draw_edges
from bridge.graph.edge_pruning import prune_edges
from bridge.graph.flow import flow_through
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import COUNTED, kl
from bridge.models.store import read_json, write_json, write_text
from bridge.training.loop import Progress
from bridge.verdicts.null_couplings import RATE, with_ridge_bridges

LEVEL = Level(0.9)
NEURONS = ("mlp_act", LATENT)
DRAWS = 20  # supersets of a circuit
TEXT_TOKENS = 6_000_000  # for transcoders: the beginning of the text that couplings learn from
EVALUATED_ROWS = 32  # of held-out text
PROMPTS = 100
NO_CLOCK = 1e6  # minutes


@dataclass(frozen=True)
class Line:
    """Results of one prompt under one alternative; only the span if it is too small to explain."""

    span: float
    nodes: int | None = None
    neurons: int | None = None  # among the nodes: MLP neurons or latents
    errors: int | None = None
    edges: int | None = None  # needed by the circuit
    edges_between: int | None = None  # all weights between its nodes
    faithfulness: float | None = None
    supersets_mean: float | None = None
    supersets_worst: float | None = None
    error_share: float | None = None
    lost: float | None = None
    seconds: float | None = None  # of the processor, for the search
    within: bool = False


@dataclass(frozen=True)
class Alternative:
    """Name, training cost, KL to the dense model and CE without errors (in nats), and the function that explains a prompt."""

    name: str
    training: str
    kl: float | None
    ce: float | None
    explain: Callable[[Tensor], Line]


# -- training -----------------------------------------------------------------------------------------------------------------


def text(coupling: CoupledModels, out: Path) -> tuple[Path, Tensor]:
    """Return the file of the couplings' training text, tokens as uint16, and rows of held-out text."""
    train, held = out / "text.bin", out / "heldout.bin"
    if not held.is_file():
        source, seed = coupling.recipe.data.source, coupling.recipe.seed
        tokenizer, model = coupling.dense.tokenizer, coupling.dense.model
        blocks = load_blocks(source, tokenizer, coupling.context, max_tokens=TEXT_TOKENS, seed=seed, dense=model)
        blocks.train_nt.numpy().astype(np.uint16).tofile(train)
        blocks.heldout_nt[:EVALUATED_ROWS].numpy().astype(np.uint16).tofile(held)
    rows = np.fromfile(held, np.uint16).reshape(-1, coupling.context).astype(np.int64)
    return train, torch.from_numpy(rows)[:EVALUATED_ROWS]


def transcoders(coupling: CoupledModels, options: argparse.Namespace) -> Path:
    """Return the folder of the transcoders; train them if it has none."""
    folder = options.out / "transcoders"
    if not (folder / "cost.json").is_file():
        file, _ = text(coupling, options.out)
        script = Path(__file__).with_name("train_transcoders.py")
        subprocess.run(
            [options.peers, script, coupling.dense.name, file, folder, "--context", str(coupling.context),
             "--rows", str(options.transcoder_tokens // coupling.context), *options.transcoder.split()], check=True,
        )  # fmt: skip
    return folder


def uncoupled(coupling: CoupledModels, options: argparse.Namespace) -> tuple[CoupledModels, str]:
    """Return a sparse model trained without the dense one's residuals, its bridges fitted by regression, and its minutes."""
    fitted, whole = options.uncoupled or options.out / "uncoupled-fit", options.out / "uncoupled"
    cost = options.out / "uncoupled-cost.json"
    spent = read_json(cost)["cpu_minutes"] if cost.is_file() else 0.0
    began = time.process_time()

    def note(_: Progress | None = None) -> None:
        write_json(cost, {"cpu_minutes": spent + (time.process_time() - began) / 60})

    if not (fitted / "coupling.json").is_file():
        bridge.fit(
            coupling.dense.name, recipe=options.recipe, uncoupled=True, tokens=options.uncoupled_tokens, minutes=NO_CLOCK,
            settings={"sparse.start": "random", "optimizer.rate": RATE}, out=fitted, resume=fitted.exists(), on_progress=note,
        )  # fmt: skip
        note()
    if not (whole / "coupling.json").is_file():
        assert coupling.reference_bt is not None
        other = with_ridge_bridges(CoupledModels.from_pretrained(fitted, dense=coupling.dense), coupling.reference_bt)
        other.save_pretrained(whole)
    training = f"{read_json(cost)['cpu_minutes']:.1f}" if cost.is_file() else minutes_of(fitted)
    return CoupledModels.from_pretrained(whole, dense=coupling.dense), training


def minutes_of(folder: Path) -> str:
    """Return the training time from a coupling's log, as text."""
    log = folder / "log.jsonl"
    if not log.is_file():
        return "not logged"
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return f"<= {last['tokens'] / last['tokens_per_second'] / 60:.1f} (wall)"


# -- explaining a prompt ------------------------------------------------------------------------------------------------------


def searched(
    masked: Masked, model_bv: Tensor, lost: Callable[[CircuitLoss, Tensor], float], edges: Callable[..., tuple[int | None, ...]]
) -> Line:
    """Find the circuit of a prompt at F .9 and measure it."""
    began = time.process_time()
    loss = CircuitLoss(masked, model_bv, SearchConfig())
    if abs(loss.span) < loss.config.least_span:
        return Line(loss.span)
    nested = find_nested(loss, levels=(LEVEL,))
    seconds, kept_f, within = time.process_time() - began, nested.kept(0), nested.distances[0] <= 1
    found = measure_circuit(loss, kept_f, superset_draws(loss, DRAWS, 0), LEVEL.faithfulness, within)
    needed, between = edges(loss, kept_f)
    kept = masked.space.split(kept_f)
    neurons = sum(int(kept_tn.sum()) for at, kept_tn in kept.items() if at.kind in NEURONS)
    return Line(
        loss.span, found.nodes, neurons, found.errors, needed, between, found.faithfulness, found.supersets_mean,
        found.supersets_worst, found.error_share, lost(loss, kept_f), seconds, within,
    )  # fmt: skip


def question_of(coupling: CoupledModels, tokens_t: Tensor) -> tuple[Question, Tensor]:
    """Return the question why the dense model's first answer follows a prompt, and the model's logits_1v."""
    dense_1v = coupling.dense.run(tokens_t[None]).logits_btv[:, -1].float()
    return Question.of_prompt(tokens_t, int(dense_1v.argmax())), dense_1v


def by_dense(subject: DenseSubject, coupling: CoupledModels, tokens_t: Tensor) -> Line:
    """Explain a prompt by the dense model's own nodes."""
    question, dense_1v = question_of(coupling, tokens_t)

    def lost(loss: CircuitLoss, kept_f: Tensor) -> float:
        return 1 - float(loss.fraction_left(loss.masked.logits(~kept_f[None])))

    def edges(loss: CircuitLoss, kept_f: Tensor) -> tuple[int, int]:
        between = DenseEdges(subject, loss, kept_f)
        return between.needed(LEVEL), between.count

    return searched(MaskedDense(subject, question, by_position=True), dense_1v, lost, edges)


def by_transcoders(model: Transcoded, coupling: CoupledModels, tokens_t: Tensor) -> Line:
    """Explain a prompt by latents."""
    question, dense_1v = question_of(coupling, tokens_t)

    def lost(loss: CircuitLoss, kept_f: Tensor) -> float:
        return 1 - float(loss.fraction_left(model.dense_without(question, loss.masked.space.split(kept_f[None]))))

    return searched(MaskedTranscoded(model, question), dense_1v, lost, lambda *_: (None, None))


def by_sparse(coupling: CoupledModels, tokens_t: Tensor) -> Line:
    """Explain a prompt by a sparse model that follows the dense one."""
    followed = follow_dense(coupling, tokens_t[None], torch.tensor([len(tokens_t) - 1]))
    question, _ = question_of(coupling, tokens_t)
    assert coupling.reference_bt is not None
    means = reference_means(coupling, reference_rows(coupling, coupling.reference_bt))

    def lost(loss: CircuitLoss, kept_f: Tensor) -> float:
        return delete_circuits(Transporter(coupling, loss, followed.dense, kept_f), kept_f[None])[0].best

    def edges(loss: CircuitLoss, kept_f: Tensor) -> tuple[int, int]:
        flow = flow_through(loss.masked, kept_f)
        pruned = prune_edges(loss, flow, draw_edges(flow, MAX_EDGES_TO_GROUP), LEVEL)
        return pruned.edges.count(*COUNTED), pruned.before

    return searched(MaskedModel(coupling.sparse, question, means, followed.errors), followed.dense_bv, lost, edges)


def fidelity(dense_btv: Tensor, other_btv: Tensor, tokens_bt: Tensor) -> tuple[float, float]:
    """Return the KL from the dense model's next-token distributions and the cross-entropy on the text, in nats."""
    ce = torch.nn.functional.cross_entropy(other_btv[:, :-1].flatten(0, 1), tokens_bt[:, 1:].flatten())
    return float(kl(dense_btv, other_btv).mean()), float(ce)


def alternatives(couplings: Sequence[CoupledModels], options: argparse.Namespace) -> Iterator[Alternative]:
    """Yield the requested alternatives; train missing ones first."""
    first = couplings[0]
    assert first.reference_bt is not None
    corpus_bt = reference_rows(first, first.reference_bt)
    _, held_bt = text(first, options.out)
    dense_btv = first.dense.run(held_bt).logits_btv.float()
    measured = partial(fidelity, dense_btv, tokens_bt=held_bt)
    subject = DenseSubject(first.dense, corpus_bt)
    if "dense" in options.only:
        yield Alternative("dense", "0", *measured(dense_btv), partial(by_dense, subject, first))
    for name in ("transcoders", "latents"):
        if name in options.only:
            folder = transcoders(first, options)
            coders = load_transcoders(folder, len(first.dense.blocks))
            model = Transcoded(subject, coders, corpus_bt, attention=name == "transcoders")
            alone_btv = model.run(held_bt, lambda _, x: x, lambda _, x: x)
            training = f"{read_json(folder / 'cost.json')['cpu_minutes']:.1f}"
            yield Alternative(name, training, *measured(alone_btv), partial(by_transcoders, model, first))

    def sparse(coupling: CoupledModels, name: str, training: str) -> Alternative:
        alone_btv = coupling.sparse.run(held_bt).logits_btv.float()
        return Alternative(name, training, *measured(alone_btv), partial(by_sparse, coupling))

    if "coupling" in options.only:
        for coupling in couplings:
            folder = Path(coupling.path or "")
            yield sparse(coupling, f"coupling {folder.name}", minutes_of(folder))
    if "uncoupled" in options.only:
        other, training = uncoupled(first, options)
        yield sparse(other, "uncoupled", training)


# -- the table ----------------------------------------------------------------------------------------------------------------


def lines_of(alternative: Alternative, prompts: Sequence[Tensor], file: Path) -> list[Line]:
    """Return the lines of all prompts; read those that are in the file, and add the others to it."""
    known = [Line(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    for place, tokens_t in enumerate(prompts[len(known) :], len(known)):
        line = alternative.explain(tokens_t)
        known.append(line)
        write_text(file, "".join(json.dumps(asdict(each)) + "\n" for each in known))
        print(f"{alternative.name}, prompt {place + 1} of {len(prompts)}: {line}", flush=True)
    return known[: len(prompts)]


def summary(alternative: Alternative, lines: Sequence[Line]) -> dict[str, Any]:
    """Return medians and 90 % quantiles over the prompts that have a circuit, and their number."""
    some = [line for line in lines if line.nodes is not None]

    def of(name: str, quantile: float = 0.5) -> float | None:
        return middle((getattr(line, name) for line in some), quantile)

    return {
        "name": alternative.name, "training": alternative.training, "kl": alternative.kl, "ce": alternative.ce,
        "prompts": len(lines), "with_circuit": len(some), "within": sum(line.within for line in some),
        "with_errors": sum(bool(line.errors) for line in some), "span": middle(abs(line.span) for line in lines),
        "nodes_p90": of("nodes", 0.9), "lowest_supersets": middle((line.supersets_worst for line in some), 0.1),
        **{name: of(name) for name in ("nodes", "neurons", "errors", "edges", "edges_between", "faithfulness", "supersets_mean",
                                       "supersets_worst", "error_share", "lost", "seconds")},
    }  # fmt: skip


HEAD = (
    "", "training, CPU minutes", "KL alone (CE)", "circuits within the bounds", "span", "nodes (nine of ten)",
    "neurons or latents", "edges needed (between the nodes)", "F alone", "in supersets, mean; worst", "with errors; share",
    "span lost in dense", "CPU seconds",
)  # fmt: skip


def row(s: dict[str, Any]) -> list[str]:
    """Return an alternative's row of the table."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    nodes, nodes_p90, neurons, edges, between = (
        number(s[name], ",.0f") for name in ("nodes", "nodes_p90", "neurons", "edges", "edges_between")
    )
    return [
        s["name"], s["training"], f"{number(s['kl'])} ({number(s['ce'])})", f"{s['within']} of {s['prompts']}",
        number(s["span"], ".1f"), f"{nodes} ({nodes_p90})", neurons, f"{edges} ({between})", number(s["faithfulness"]),
        f"{number(s['supersets_mean'])}; {number(s['supersets_worst'])}", f"{s['with_errors']}; {number(s['error_share'])}",
        number(s["lost"]), number(s["seconds"], ".1f"),
    ]  # fmt: skip


def main() -> None:
    """Train and explain what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", nargs="+", type=Path, default=[SHIPPED])
    parser.add_argument("--recipe", default="recipes/python-bridge-32.toml", help="of the uncoupled model")
    parser.add_argument("--peers", default="runs/peers/bin/python", help="a Python that has sparsify (see train_transcoders.py)")
    parser.add_argument("--out", type=Path, default=Path("runs/alternatives"))
    parser.add_argument("--count", type=int, default=PROMPTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transcoder-tokens", type=int, default=2_500_000)
    parser.add_argument("--transcoder", default="", help='options of train_transcoders.py, such as "--k=16 --rate=3e-3"')
    parser.add_argument(
        "--uncoupled", type=Path, help="one that is there, of `bridge fit --uncoupled` or `bridge nulls --against`"
    )
    parser.add_argument("--uncoupled-tokens", type=int, default=2_000_000)
    parser.add_argument(
        "--only", nargs="+", default=["dense", "transcoders", "latents", "coupling", "uncoupled"], help="of the alternatives"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    couplings = [CoupledModels.from_pretrained(folder) for folder in options.bridge]
    drawn = options.out / f"prompts-{options.seed}.json"
    if not drawn.is_file() or len(json.loads(drawn.read_text(encoding="utf-8"))) < options.count:
        write_json(drawn, held_out_prompts(couplings[0], max(PROMPTS, options.count), options.seed))
    texts = json.loads(drawn.read_text(encoding="utf-8"))[: options.count]
    prompts = [prompt_tokens(couplings[0], prompt) for prompt in texts]
    found = []
    for alternative in alternatives(couplings, options):
        name = f"{alternative.name.replace(' ', '-')}-{options.seed}.jsonl"
        found.append(summary(alternative, lines_of(alternative, prompts, options.out / name)))
    print("\n".join("| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *map(row, found))))
    print(json.dumps({"bounds": str(LEVEL), "alternatives": found}))


if __name__ == "__main__":
    main()
