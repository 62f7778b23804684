"""The commands on fine-tunes: adapt a coupling to a fine-tuned model, and compare the two couplings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bridge.cli import console
from bridge.cli.console import Dense, Device, SearchProgress, seed_option
from bridge.recipe import parse_setting

finetune_commands = typer.Typer()


@finetune_commands.command()
def adapt(
    coupling: Annotated[str, typer.Argument(help="A coupling of the base model: a folder that `bridge fit` wrote, or a hub id.")],
    adapter: Annotated[str | None, typer.Option(help="Folder of a PEFT (LoRA) adapter of the base model.")] = None,
    model: Annotated[str | None, typer.Option(help="Instead, a fine-tuned model of the same shape: hub id or folder.")] = None,
    data: Annotated[str | None, typer.Option(help="Text to train on; default the base coupling's.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training budget in tokens; default 1/20 of the base's tokens.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Training budget in minutes.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Set a number of the recipe: key=value; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default runs/NAME of the fine-tune.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, if there is one.")] = False,
    stretch: Annotated[float | None, typer.Option(help="Stop after this many minutes; --resume continues.")] = None,
    seed: Annotated[int | None, seed_option("Seed of the order of text and of sampled sites; default the base's.")] = None,
    dense: Dense = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Precision: float32, or bfloat16 products of float32 weights.")] = "float32",
) -> None:
    """Train a coupling further on a fine-tune of its dense model, by default with 1/20 of the tokens of the base."""
    from bridge.training.adapt import prepare_adapted

    settings: dict[str, Any] = dict(parse_setting(text) for text in set_ or [])
    folder = out or Path("runs") / Path(adapter or model or coupling).name
    base, reading = console.open_coupling(coupling, dense, device), SearchProgress()
    run = prepare_adapted(
        base, adapter=adapter, model=model, data=data, tokens=tokens, minutes=minutes, settings=settings, out=folder,
        resume=resume, seed=seed, device=device, dtype=dtype, progress=reading,
    )  # fmt: skip
    reading.clear()
    console.train_to_end(run, folder, stretch, f"bridge eval {folder}; bridge diff {coupling} {folder} --prompt '...'")


@finetune_commands.command()
def diff(
    base: Annotated[str, typer.Argument(help="The coupling of the base model: folder or hub id.")],
    tuned: Annotated[str, typer.Argument(help="The coupling that `bridge adapt` wrote for the fine-tuned model.")],
    prompt: Annotated[list[str] | None, typer.Option(help="The text whose next token is compared; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one JSON string per line.")] = None,
    target: Annotated[str | None, typer.Option(help="Token to explain, by text or #id; default the fine-tune's answer.")] = None,
    contrast: Annotated[str | None, typer.Option(help="Explain the target against this token; default all others.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the whole comparison as JSON.")] = None,
    seed: Annotated[int, seed_option("Seed of the controls.")] = 0,
    dense: Dense = None,
    tuned_dense: Annotated[str | None, typer.Option(help="Where the fine-tuned model is, if it has moved.")] = None,
    device: Device = "auto",
) -> None:
    """Compare answers before and after a fine-tune: find changed nodes and weights, and transplant them into the base model."""
    from bridge.finetunes.diff import diff as diff_couplings
    from bridge.finetunes.diff import read_prompts
    from bridge.finetunes.result import render_diff
    from bridge.models.store import write_json

    console.check_outputs(json=json, read=[prompts])
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts is not None else [])]
    couplings = console.open_coupling(base, dense, device), console.open_coupling(tuned, tuned_dense, device)
    watch = SearchProgress()
    found = diff_couplings(*couplings, texts, target=target, contrast=contrast, seed=seed, progress=watch)
    watch.clear()
    if json is not None:
        write_json(json, found.to_json())
    console.print_output(render_diff(found, console.terminal_width()))
    console.print_written(json)
