"""Helpers of the commands: one-line errors, progress, a fit that is run to its end, and printed results."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from bridge.errors import OneLineError, RunError, UserError
from bridge.recipe import MAX_SEED, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from bridge.data.task_pairs import Example
    from bridge.display.progress import Phase
    from bridge.models.bridges import CoupledModels
    from bridge.training.evaluate import Evaluation
    from bridge.training.loop import Progress
    from bridge.training.prepare import Run

Adapter = Annotated[str | None, typer.Option(help="Folder of a PEFT (LoRA) adapter to merge into the model first.")]
Dense = Annotated[
    str | None, typer.Option(help="Where the coupling's dense model is, if it has moved: hub id, folder or .gguf file.")
]
Gguf = Annotated[str | None, typer.Option(help="Load this .gguf file: a path, or a name in the model's folder or repository.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the model on the hub.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")]


def seed_option(what: str) -> Any:
    """The option --seed of a command, with `what` as its help."""
    return typer.Option(help=what, min=0, max=MAX_SEED)


class RepeatedOptionsCommand(TyperCommand):
    """A command that reads `--l0 .1 .2 --tasks a b` as `--l0 .1 --l0 .2 --tasks a --tasks b`."""

    numbers, words = ("--l0", "--width"), ("--tasks", "--load")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat an option for each of the values that follow it; for --l0 and --width, for each number."""
        spread: list[str] = []
        option, values = "", 0
        for word in args:
            if word.startswith("-"):
                option, values = word if word in self.numbers + self.words else "", 0
            elif option:
                if values and option in self.numbers and not is_number(word):
                    option = ""  # the word is the model
                elif values:
                    spread.append(option)
                values += 1
            spread.append(word)
        return super().parse_args(ctx, spread)


class Commands(TyperGroup):
    """The commands. On an error each ends with one line: exit code 2 for a user's error, 1 for a run that had to stop.

    A fit that was asked to stop has saved its state and ends with exit code 130.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run a command; print an error that it raises as one line, and exit."""
        try:
            return super().invoke(ctx)
        except (UserError, RunError) as error:
            exit_with_error(error.line(option_name), 2 if isinstance(error, UserError) else 1)
        except OneLineError as stopped:  # the only other kind is FitStopped
            exit_with_error(f"{stopped.what}; run the same command to continue", 130)
        except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
            _print_to_nobody()
            raise typer.Exit(141) from None
        except OSError as error:
            if not error.filename:
                exit_with_error(
                    f"could not read or write ({error.strerror or error}); free space, or redirect the output elsewhere", 2
                )
            exit_with_error(
                f"could not read or write {str(error.filename)!r} ({error.strerror}); free space or name another place", 2
            )


def option_name(name: str) -> str:
    """The command-line option that sets a parameter of the library."""
    return "--set" if name == "settings" else f"--{name.replace('_', '-')}"


def exit_with_error(message: str, code: int) -> NoReturn:
    """Print one line on standard error and exit."""
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(f"bridge: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


def usage_line(error: Any) -> str:
    """Typer's error on a command line as one line, with the value and a pointer to --help."""
    text = " ".join(error.format_message().split()).rstrip(".")
    if hasattr(error.__cause__, "errors"):
        text += f" (given: {error.__cause__.errors()[0]['input']!r})"
    more = "" if text.endswith("?") else f"; see {getattr(error.ctx, 'command_path', 'bridge')} --help"
    return f"{text[0].lower()}{text[1:]}{more}"


def check_outputs(folder: Path | None = None, *, read: Iterable[str | Path | None] = (), **files: Path | None) -> None:
    """Refuse an --out folder, or files (given by option name), that cannot be written, before anything is computed.

    A file that two options name, or that the command reads, is refused too.
    """
    from bridge.models.store import CheckpointError, check_writable_file, check_writable_folder

    if folder is not None:
        check_writable_folder(folder)
    taken = {Path(file).resolve(): "an input" for file in read if file is not None and Path(file).is_file()}
    for name, file in files.items():
        if file is None:
            continue
        check_writable_file(file, name)
        if file.exists() and not file.is_file():
            continue  # a pipe or a device may be written to twice
        if (other := taken.setdefault(file.resolve(), f"--{name}")) != f"--{name}":
            raise CheckpointError(f"--{name} {str(file)!r}", f"is also {other}, and would overwrite it", "name another file")


def print_output(text: str) -> None:
    """Print, and continue if the reader has closed the pipe, so that files are still written."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _print_to_nobody()


def _print_to_nobody() -> None:
    """Redirect further output to the null device; otherwise the interpreter would complain about the closed pipe at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_written(*files: Path | None) -> None:
    """Print which files were written, if any."""
    names = [str(file) for file in files if file is not None]
    if names:
        print(f"\nwrote {', '.join(names)}")


def choose_device(device: str) -> str:
    """The device to use; auto is cuda if available, otherwise cpu. Raises RecipeError if the named device is not available."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise RecipeError(f"device {device!r}", "is not available here", "give --device cpu or auto")
    return device


def as_chat(coupling: CoupledModels, prompt: str | None) -> str | None:
    """A user's text as a prompt in the dense model's chat template. Raises PromptError if the model has no template."""
    return None if prompt is None else coupling.dense.prompts.chat(prompt)


def held_out_text(coupling: CoupledModels, name: str | Path, data: str | None, rows: int) -> Tensor:
    """tokens_bt: the held-out text stored with a coupling or, if `data` is given, held-out text of `data`."""
    from bridge.data.blocks import DataError, load_blocks

    if data is None:
        if coupling.reference_bt is None:
            raise DataError(f"{str(name)!r}", "has no held-out text of its own", "give --data")
        return coupling.reference_bt[:rows]
    limit = rows * coupling.context * 60  # one document in 50 is held out, in an order that the fit's seed decides
    dense, seed = coupling.dense, coupling.recipe.seed
    return load_blocks(data, dense.prompts, coupling.context, max_tokens=limit, seed=seed, dense=dense.model).heldout(rows)


def shipped_coupling() -> str:
    """The folder of the coupling that ships. Raises CheckpointError if it is missing."""
    from bridge.models.store import CheckpointError

    folder = Path(__file__).resolve().parents[2] / "checkpoints" / "python-bridge-32"
    if not folder.is_dir():
        raise CheckpointError("the shipped coupling", f"is not at {str(folder)!r}", "name a coupling with --bridge")
    here = Path.cwd()  # explanations that are passed on name this path, so it shows no more folders than needed
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def chosen_model(model: str | None, gguf: str | None, default: str | None = None) -> str | None:
    """The model that a command names, or the default; with --gguf, that GGUF file."""
    from bridge.huggingface.gguf_file import named_gguf

    return named_gguf(model or default, gguf) if gguf is not None else model or default


def open_coupling(bridge: str | Path | None, dense: str | None, device: str) -> CoupledModels:
    """The coupling that --bridge names (default the one that ships), loaded with its dense model, from --dense if given."""
    from bridge.models.bridges import CoupledModels

    return CoupledModels.from_pretrained(choose_coupling(bridge), dense=dense, device=choose_device(device))


def choose_coupling(bridge: str | Path | None) -> str | Path:
    """The name of the coupling: --bridge, or by default the one that ships. Raises CheckpointError if the name is empty."""
    if bridge is None:
        return shipped_coupling()
    if not str(bridge).strip():
        from bridge.models.store import CheckpointError

        raise CheckpointError(
            f"--bridge {bridge!r}", "names no coupling", "give a folder or hub id, or leave it out for the one that ships"
        )
    return bridge


def terminal_width() -> int:
    """The number of columns to print in."""
    return min(120, max(72, shutil.get_terminal_size((100, 24)).columns))


def is_number(word: str) -> bool:
    """Whether a word can be read as a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def sample_prompt(example: Example | None, taken: int) -> str:
    """The end of a prompt, as much of it as fits on a line, and its answer."""
    if example is None:
        return ""
    answer = repr(example.answer[0]) if example.answer else f"not {example.wrong[0]!r}"
    room = max(16, terminal_width() - taken - len(answer) - 5)
    prompt = repr(example.prompt)
    return f"{prompt if len(prompt) <= room else f'...{prompt[3 - room :]}'} -> {answer}"


class ProgressLine:
    """A line of progress: rewritten on a terminal; elsewhere a new line at most every `seconds` seconds."""

    def __init__(self, stream: TextIO, seconds: float, *, first: bool = False) -> None:
        self.stream, self.seconds, self.terminal = stream, seconds, stream.isatty()
        self.last = -math.inf if first else time.monotonic()

    def show(self, text: str, *, final: bool = False) -> None:
        """Show a text, unless the last line is too recent; a terminal and a final text are always shown."""
        now = time.monotonic()
        if not (self.terminal or now - self.last >= self.seconds or final):
            return
        self.last = now
        shown = f"\r\033[K{text[: terminal_width()]}" if self.terminal else f"{text}\n"
        print(shown, end="", file=self.stream, flush=True)

    def clear(self) -> None:
        """Clear the line on a terminal."""
        if self.terminal:
            print("\r\033[K", end="", file=self.stream, flush=True)


class SearchProgress(ProgressLine):
    """Progress of a search on standard error, with a bar if the total amount of work is known."""

    def __init__(self) -> None:
        super().__init__(sys.stderr, 15)
        self.started = time.monotonic()

    def __call__(self, phase: Phase) -> None:
        """Show the progress of a search."""
        done = round(16 * phase.done / phase.total) if phase.total else 0
        bar = f"[{'#' * done}{'.' * (16 - done)}] " if phase.total else ""
        self.show(f"{int(time.monotonic() - self.started):>4} s  {bar}{phase}")

    def print(self, text: str) -> None:
        """Clear the line, and print a text on standard output."""
        self.clear()
        print(text, flush=True)


def print_run(run: Run, needed: int, seconds: float) -> None:
    """Print what a fit will do and how long it takes; `needed` is its memory in bytes, `seconds` the time of a step."""
    import psutil

    recipe, sparse, dense = run.coupling.recipe, run.coupling.sparse, run.coupling.dense
    weights = sparse.n_sparse_weights()
    kept = sparse.n_kept(sparse.fractions(recipe.sparsity))
    alone = "uncoupled: trained on text and the dense model's answers" if recipe.losses.kl else "uncoupled: trained on text alone"
    how = "coupled at every site" if recipe.losses.coupled else alone
    how = how if recipe.optimizer.rate else "frozen: only the bridges are trained"
    free = psutil.virtual_memory().available
    part = "" if run.coupling.blocks is None else f"blocks {run.coupling.blocks}, "
    print(f"dense   {dense.name}: {part}{len(dense.sublayers)} sublayers of width {dense.width}, {dense.vocabulary:,} tokens")
    print(f"sparse  width {sparse.width}, {weights / 1e6:.1f} M weights, {kept / 1e6:.2f} M kept (1/{weights / kept:.0f}), {how}")
    if not run.resume:
        print(f"start   {run.started or 'random'}")
    if recipe.optimizer.rate:
        print(f"rate    {recipe.optimizer.rate:.2g} at its peak (--set optimizer.rate), AbsTopK keeps {sparse.keep:.3g}")
    print(f"data    {run.blocks.description}")
    per_step = (recipe.data.rows or 0) * (recipe.data.context or 0)
    steps = math.inf if recipe.budget.tokens is None else math.ceil(recipe.budget.tokens / per_step)
    minutes = min(steps * seconds / 60, recipe.budget.minutes or math.inf)
    takes = f"{minutes:,.1f} minutes" if minutes < 120 else f"{minutes / 60:,.0f} hours"
    tokens = int(min(steps, minutes * 60 / seconds)) * per_step
    print(f"time    about {takes} for {tokens:,} tokens, {per_step:,} a step of {seconds:.2g} s (--minutes, --tokens)")
    print(f"memory  about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free", flush=True)
    if needed > free and dense.device.type == "cpu":
        print("        the memory may be too small; lower --width or --set data.rows=...", flush=True)


class FitProgress(ProgressLine):
    """Progress of a fit on standard output; if that is not a terminal, every 30 seconds."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(sys.stdout, 30, first=True)
        self.quiet = quiet

    def __call__(self, progress: Progress) -> None:
        """Show the progress of a fit."""
        if not self.quiet:
            self.show(progress_line(progress), final=progress.fraction >= 1)

    def end(self) -> None:
        """Keep the last line on a terminal, and end it."""
        if self.terminal and not self.quiet:
            print()


def train_to_end(run: Run, folder: Path, stretch: float | None, then: str) -> None:
    """Print what a fit needs, train it, write the coupling, and print the next commands; a fit asked to stop ends the command."""
    from bridge.training.loop import FitStopped, finish, train
    from bridge.training.prepare import memory_needed, seconds_a_step

    main = run.accelerator.is_main_process
    if main:
        print_run(run, memory_needed(run.coupling.dense, run.coupling.recipe), seconds_a_step(run))
    watch = FitProgress(quiet=not main)
    started = time.monotonic()
    try:
        for progress in train(run, stretch_minutes=stretch):
            watch(progress)
    except FitStopped as stopped:
        watch.end()
        print(f"bridge: {stopped.line(option_name)}", file=sys.stderr)
        raise typer.Exit(0 if stopped.planned else 130) from None
    watch.end()
    refitting = SearchProgress()
    finish(run, refitting if main else lambda _: None)
    refitting.clear()
    if main:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
        print(f"wrote {folder} ({size:.1f} MB) after {(time.monotonic() - started) / 60:.1f} minutes\nnext: {then}")


def progress_line(progress: Progress) -> str:
    """The progress of a fit in one line."""
    short = {"nmse_encoder": "nmse-f", "nmse_decoder": "nmse-g", "hybrid_in": "in", "hybrid_out": "out", "hybrid_both": "both"}
    losses = "  ".join(f"{short.get(name, name)} {value:.3f}" for name, value in progress.losses.items() if name != "total")
    left = int(progress.seconds_left)
    clock = f"{left // 3600}:{left % 3600 // 60:02}:{left % 60:02}"
    return (
        f"{progress.fraction:4.0%}  {progress.tokens / 1e6:.2f} M tokens  {losses}  L0 {progress.l0:.4f}  "
        f"{progress.tokens_per_second:,.0f} tok/s  {clock} left"
    )


def _format_l0(l0: float) -> str:
    return f"{l0:.4f} (1/{1 / max(l0, 1e-9):.1f})"


def evaluation_table(result: Evaluation) -> str:
    """An evaluation as a table."""
    lines = [
        f"{result.tokens:,} held-out tokens; KL and CE in nats per token",
        "",
        "                explained variance             KL to dense      CE recovered",
        "site  read by   encoder (later)  decoder (later)    in     out      in     out   CE in   CE out  CE mean",
    ]
    for row in result.sites:
        lines.append(
            f"{row.site:>4}  {row.read_by:<8}  {row.ev_encoder:7.3f} {row.ev_encoder_later:7.3f} {row.ev_decoder:8.3f} "
            f"{row.ev_decoder_later:7.3f} {row.kl_in:7.3f} {row.kl_out:7.3f} {row.recovered_in:7.3f} {row.recovered_out:7.3f} "
            f"{row.ce_in:7.3f} {row.ce_out:8.3f} {row.ce_mean:8.3f}"
        )
    dead = result.dead_neurons / result.neurons if result.neurons else 0.0
    ends = f"embeddings {_format_l0(result.l0_embed)}"  # a span of blocks has none
    facts: list[tuple[str, Any]] = [
        ("cross-entropy", f"dense {result.ce_dense:.3f}, sparse {result.ce_sparse:.3f}"),
        ("KL of sparse to dense", f"{result.kl_sparse:.3f}"),
        ("CE recovered, mean", f"dense to sparse {result.recovered_in:.3f}, sparse to dense {result.recovered_out:.3f}"),
        ("explained variance, mean", f"encoder {result.ev_encoder:.3f}, decoder {result.ev_decoder:.3f}"),
        (
            "top-1 agreement with dense",
            f"sparse {result.top1_sparse:.3f}, hybrids in {result.top1_in:.3f}, out {result.top1_out:.3f}",
        ),
        (
            "nonzero weights",
            _format_l0(result.l0) + (f"; blocks {_format_l0(result.l0_blocks)}, {ends}" if result.l0_embed else ""),
        ),
        ("dead neurons", f"{result.dead_neurons} of {result.neurons} ({dead:.1%})"),
    ]
    lines += ["", *(f"{name:<27} {value}" for name, value in facts)]
    lines += ["", "in: dense up to the site, encoded, then sparse; out: the reverse; later: without the first position."]
    return "\n".join(lines)
