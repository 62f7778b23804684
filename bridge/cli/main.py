"""The commands: each checks its arguments, imports its modules, calls the library, and prints.

Nothing heavy is imported before a command runs, so --help answers at once. An error that the user can correct is one line on
standard error, with exit code 2; a run that had to stop exits with 1, one that was asked to stop with 130.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from bridge.cli import console
from bridge.cli.console import Adapter, Commands, Dense, Device, Gguf, Revision, SearchProgress, seed_option
from bridge.cli.finetunes import finetune_commands
from bridge.cli.tasks import task_commands
from bridge.errors import UserError
from bridge.recipe import RecipeError, parse_setting, recipe_values

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(task_commands)
app.add_typer(finetune_commands)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"bridge {version('bridge')}")
        raise typer.Exit


@app.callback()
def _of_all(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Explain answers of a trained dense language model by circuits of a weight-sparse transformer that is coupled to it."""


Chat = Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template, as a user's text.")]
Model = Annotated[str | None, typer.Argument(help="A causal LM: hub id, folder in Hugging Face format, or .gguf file.")]


@app.command()
def info(
    model: Model = None, gguf: Gguf = None, adapter: Adapter = None, revision: Revision = None, device: Device = "auto"
) -> None:
    """Load a model, find its sites, check that its run can be resumed at each of them, and print the results."""
    from bridge.models.dense import load_dense

    if (name := console.chosen_model(model, gguf)) is None:
        raise RecipeError("the model", "is missing", "give a hub id, a folder or a .gguf file")
    dense = load_dense(name, adapter=adapter, revision=revision, device=console.choose_device(device))
    kinds = list(dense.sublayers)
    parameters = sum(p.numel() for p in dense.model.parameters())
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    rows = [
        ("model", f"{dense.name} ({type(dense.model).__name__}, {parameters / 1e6:.1f} M parameters)"),
        ("fingerprint", f"{dense.fingerprint()[:16]}, of weights and configuration"),
        ("sublayers", f"{len(kinds)}: {counts}"),
        ("width", f"{dense.width}"),
        ("vocabulary", f"{dense.vocabulary:,}" + (f" ({missing})" if (missing := dense.prompts.missing) else "")),
        ("context", f"{dense.context:,}" if dense.context else "unlimited"),
        ("sites", f"{dense.n_sites}"),
        ("parity", f"largest logit error {dense.parity.largest:.1e}, at most {dense.parity.tolerance:.0e} allowed"),
    ]
    for name, value in rows:
        print(f"{name:<11} {value}")
    print("\nsite  read by   largest logit error when resumed there")
    for site, (kind, error) in enumerate(zip(dense.readers, dense.parity.errors, strict=True)):
        print(f"{site:>4}  {kind:<9} {error:.1e}")


@app.command()
def fit(
    model: Annotated[str | None, typer.Argument(help="A causal LM: hub id, folder or .gguf file; default the recipe's.")] = None,
    l0: Annotated[
        float | None, typer.Option(help="Weights to keep: below 1 the fraction (default 1/16), from 1 on the number.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Text: stdlib, stdlib+packages, self, a file or folder, or a hub id.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training budget in tokens of text.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Training budget in minutes.")] = None,
    width: Annotated[int | None, typer.Option(help="Residual width of the sparse model; default twice the model's.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Couple only these blocks of the model: a slice, such as 12:16.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file with all numbers of a fit, such as those in recipes/.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Set a number of the recipe: key=value; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default runs/MODEL.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, if there is one.")] = False,
    uncoupled: Annotated[bool, typer.Option("--uncoupled", help="Train the sparse model on text only, without bridges.")] = False,
    stretch: Annotated[float | None, typer.Option(help="Stop after this many minutes; --resume continues.")] = None,
    gguf: Gguf = None,
    adapter: Adapter = None,
    revision: Revision = None,
    seed: Annotated[int | None, seed_option("Seed of weights, order of text and sampled sites.")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Precision: float32, or bfloat16 products of float32 weights.")] = "float32",
    dense_dtype: Annotated[
        str | None, typer.Option(help="Precision of the dense model's weights: float32 (default), bfloat16 or float16.")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Spread the dense model over devices, as transformers does: auto, balanced or sequential.")
    ] = None,
    log_with: Annotated[str | None, typer.Option(help="Log to this tracker of accelerate, such as tensorboard.")] = None,
) -> None:
    """Train a weight-sparse transformer and its bridges to a dense model, and save the coupling."""
    if stretch is not None and not 0 <= stretch < float("inf"):
        raise RecipeError(f"--stretch {stretch:g}", "is not a number of minutes", "give one, such as 9")
    if resume and out is not None and (out / "coupling.json").is_file():
        from bridge.training.prepare import check_resumable

        check_resumable(out)
    values = recipe_values(
        recipe=recipe, l0=l0, data=data, tokens=tokens, minutes=minutes, width=width, blocks=blocks, uncoupled=uncoupled,
        seed=seed, adapter=adapter, revision=revision, dense_dtype=dense_dtype,
        settings=dict(parse_setting(text) for text in set_ or []),
    )  # fmt: skip
    name = console.chosen_model(model, gguf, values.get("dense"))
    if name is None and resume and out is not None and (out / "training.json").is_file():
        from bridge.models.store import read_json

        name = (read_json(out / "training.json").get("recipe") or {}).get("dense")
    if name is None:
        raise RecipeError("the model", "is missing", "give a hub id or folder, or a --recipe that names one")
    folder = out or Path("runs") / Path(name).name
    from bridge.training.prepare import prepare

    reading = SearchProgress()
    run = prepare(
        name, values, out=folder, resume=resume, device=device, dtype=dtype, device_map=device_map, log_with=log_with,
        progress=reading,
    )  # fmt: skip
    reading.clear()
    console.train_to_end(run, folder, stretch, f"bridge eval {folder}; bridge explain --bridge {folder} --prompt '...'")


@app.command("eval")
def eval_(
    bridge: Annotated[Path, typer.Argument(help="A coupling: a folder that `bridge fit` wrote, or a hub id.")],
    data: Annotated[str | None, typer.Option(help="Text to use instead of the held-out text stored with the coupling.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of text to use, at most.", min=1)] = 256,
    dense: Dense = None,
    device: Device = "auto",
) -> None:
    """Measure how faithful a coupling is, per site and overall; print the results and save them as eval.json in its folder."""
    from bridge.models.store import write_json
    from bridge.training.evaluate import evaluate

    coupling = console.open_coupling(bridge, dense, device)
    result = evaluate(coupling, console.held_out_text(coupling, bridge, data, rows))
    print(console.evaluation_table(result))
    if bridge.is_dir():
        write_json(bridge / "eval.json", result.to_json())


@app.command()
def explain(
    prompt: Annotated[str, typer.Option(help="The text whose next token is explained.")],
    bridge: Annotated[str | None, typer.Option(help="A coupling: folder or hub id; default the one that ships.")] = None,
    target: Annotated[str | None, typer.Option(help="Token to explain, by text or #id; default the model's answer.")] = None,
    contrast: Annotated[str | None, typer.Option(help="Explain the target against this token; default all others.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the explanation as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write it as a page: one self-contained HTML file.")] = None,
    counterfactual: Annotated[
        str | None, typer.Option(help="A prompt of as many tokens with another answer: adds patching to the evidence.")
    ] = None,
    chat: Chat = False,
    seed: Annotated[int, seed_option("Seed of the search and of the controls.")] = 0,
    dense: Dense = None,
    device: Device = "auto",
) -> None:
    """Explain a model's next token by a circuit of the sparse model, with the evidence for and against it."""
    from bridge.explanations.build import explain as explain_prompt
    from bridge.explanations.page import described_nodes, page_data, render_html, write_page
    from bridge.explanations.parts import Answered, Drawn
    from bridge.explanations.text import render_answer, render_text
    from bridge.models.store import write_json

    console.check_outputs(html=html, json=json)
    coupling = console.open_coupling(bridge, dense, device)
    if chat:
        prompt, counterfactual = coupling.dense.prompts.chat(prompt), console.as_chat(coupling, counterfactual)
    watch = SearchProgress()
    width = console.terminal_width()

    def show(known: Answered | Drawn) -> None:
        if isinstance(known, Answered):
            watch.clear()
            console.print_output(f"{render_answer(known, width)}\n")

    explanation = explain_prompt(
        coupling, prompt, target=target, contrast=contrast, counterfactual=counterfactual, seed=seed, progress=watch,
        stage=show,
    )  # fmt: skip
    watch.clear()
    if json is not None:
        write_json(json, explanation.to_json())
    if html is not None:
        write_page(html, render_html(page_data(explanation, described_nodes(coupling, explanation))))
    console.print_output(render_text(explanation, width, answer=False))
    console.print_written(json, html)


@app.command()
def view(
    explanation: Annotated[Path, typer.Argument(help="A file that `bridge explain --json` wrote.")],
    html: Annotated[Path, typer.Option(help="The page to write: one self-contained HTML file.")],
    bridge: Annotated[str | None, typer.Option(help="Its coupling, to add what `bridge nodes` collected on its nodes.")] = None,
    dense: Dense = None,
    device: Device = "auto",
) -> None:
    """Make a page from an explanation that was saved as JSON."""
    from bridge.explanations.explanation import read_explanation
    from bridge.explanations.page import described_nodes, page_data, render_html, write_page

    read, nodes = read_explanation(explanation), {}
    console.check_outputs(html=html, read=[explanation])
    if bridge is not None:
        nodes = described_nodes(console.open_coupling(bridge, dense, device), read)
    write_page(html, render_html(page_data(read, nodes)))
    print(f"wrote {html}")


@app.command()
def export(
    explanation: Annotated[Path, typer.Argument(help="A file that `bridge explain --json` wrote.")],
    to: Annotated[str, typer.Option(help="Format: circuit-tracer, neuronpedia or graphml.")],
    out: Annotated[Path, typer.Option(help="Output: a folder for circuit-tracer, a file for the others.")],
    slug: Annotated[str | None, typer.Option(help="Name of the graph; default made from the prompt.")] = None,
    scan: Annotated[
        str | None, typer.Option(help="Neuronpedia's id of the dense model, such as gpt2-small; needed for neuronpedia.")
    ] = None,
    features_url: Annotated[str | None, typer.Option(help="Address where Neuronpedia will find the features.")] = None,
    bridge: Annotated[str | None, typer.Option(help="Coupling with facts of `bridge nodes`; default the explanation's.")] = None,
    dense: Dense = None,
) -> None:
    """Write an explanation for circuit-tracer's front end, for Neuronpedia, or as GraphML."""
    from bridge.explanations.explanation import read_explanation
    from bridge.explanations.export import export as export_to
    from bridge.explanations.export import pages_for

    explained = read_explanation(explanation)
    if bridge is not None and (to == "graphml" or (to == "neuronpedia" and features_url is None)):
        raise UserError(f"--bridge {bridge!r}", f"adds pages of features, and this export to {to} has none", "leave it out")
    if to != "circuit-tracer" and out.parent.is_dir():
        console.check_outputs(out=out, read=[explanation])
    else:
        console.check_outputs(out)
    pages = pages_for(explained, bridge, dense=dense) if to == "circuit-tracer" or features_url is not None else None
    done = export_to(explained, out, to, slug=slug, scan=scan, features_url=features_url, pages=pages)  # pyright: ignore[reportArgumentType]
    about = f", {done.features:,} features" if done.features else ""
    print(f"wrote {done.file}: {done.nodes:,} nodes, {done.links:,} links{about}")
    if done.features and pages is None:
        print("features show only this prompt; run `bridge nodes` on the coupling first to add contexts and tokens")
    for step in done.next:
        print(f"next: {step}")


@app.command()
def steer(
    prompt: Annotated[str | None, typer.Option(help="The text after which the dense model is steered.")] = None,
    counterfactual: Annotated[str | None, typer.Option(help="A prompt of as many tokens: nodes take their values on it.")] = None,
    node: Annotated[
        list[str] | None, typer.Option(help="A node: 1.mlp_act[37], then optionally @4 (a position), =2.5 or +1; repeatable.")
    ] = None,
    chat: Chat = False,
    circuit: Annotated[Path | None, typer.Option(help="Change all nodes of a circuit that `bridge circuit --out` wrote.")] = None,
    explanation: Annotated[Path | None, typer.Option(help="Change all nodes of what `bridge explain --json` wrote.")] = None,
    strength: Annotated[list[float] | None, typer.Option(help="Strength, 0 to 1; repeatable; default 0, .1, ... 1.")] = None,
    site: Annotated[int | None, typer.Option(help="Add the whole change at this site; default at each sublayer's own.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Token to measure, by text or #id; default the answer to the prompt.")
    ] = None,
    contrast: Annotated[str | None, typer.Option(help="Second token to measure; default the counterfactual's answer.")] = None,
    tokens: Annotated[int, typer.Option(help="Number of tokens to generate at strength 0 and at the largest.", min=0)] = 16,
    draws: Annotated[int, typer.Option(help="Number of random directions, as a control.", min=1, max=1000)] = 20,
    seed: Annotated[int, seed_option("Seed of the random directions.")] = 0,
    bridge: Annotated[str | None, typer.Option(help="A coupling: folder or hub id; default the one that ships.")] = None,
    dense: Dense = None,
    svg: Annotated[Path | None, typer.Option(help="Also write the plot of probability against strength.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers as JSON.")] = None,
    device: Device = "auto",
) -> None:
    """Change nodes of the sparse model, patch the change into the dense model, and print how its answers and text change."""
    from bridge.models.store import write_json, write_text
    from bridge.steering.curves import STRENGTHS, check_strengths
    from bridge.steering.curves import steer as steer_prompt
    from bridge.steering.figure import render_steering, steering_plot
    from bridge.steering.interventions import collect_interventions

    check_strengths(strength or STRENGTHS)
    console.check_outputs(svg=svg, json=json, read=[explanation])
    coupling = console.open_coupling(bridge, dense, device)
    if chat:
        prompt, counterfactual = console.as_chat(coupling, prompt), console.as_chat(coupling, counterfactual)
    text, interventions = collect_interventions(coupling, prompt, node or [], circuit, explanation)
    steering = steer_prompt(
        coupling, text, interventions, counterfactual=counterfactual, target=target, contrast=contrast,
        strengths=strength or STRENGTHS, site=site, tokens=tokens, draws=draws, seed=seed,
    )  # fmt: skip
    if svg is not None:
        write_text(svg, steering_plot(steering))
    if json is not None:
        write_json(json, steering.to_json())
    console.print_output(render_steering(steering, console.terminal_width()))
    console.print_written(svg, json)


@app.command()
def serve(
    bridge: Annotated[
        list[Path] | None, typer.Option(help="A coupling's folder, or a folder of couplings; repeatable; default what ships.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve on; if not local, a token is required.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on; 0 for any free port.", min=0, max=65535)] = 8765,
    circuits: Annotated[Path | None, typer.Option(help="A folder of circuits that `bridge circuit --out` wrote.")] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="BRIDGE_TOKEN", help="Token that every request must send; random by default if --host is not local."),
    ] = None,
    dense: Dense = None,
    device: Device = "auto",
) -> None:
    """Serve explanations over HTTP: a page on which to enter prompts, and an API that /openapi.json describes."""
    try:
        from bridge.server.run import serve as run_server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise RecipeError(f"{error.name}", "is not installed, but serving needs it", "pip install 'bridge[serve]'") from None
    folders = bridge or [Path(console.shipped_coupling())]
    beside = folders[0].parent / "circuits"
    if circuits is None and not bridge and beside.is_dir():
        circuits = beside  # the circuits of the coupling that ships
    stopped = run_server(
        folders, host=host, port=port, circuits=circuits, token=token, dense=dense, device=console.choose_device(device),
        progress=lambda line: print(line, flush=True),
    )  # fmt: skip
    if not stopped:
        os._exit(0)  # a phase is still being computed, and a normal exit would crash in its thread


def main() -> NoReturn:
    """Entry point of the `bridge` command."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make every other process on the machine slower
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    gc.set_threshold(100_000, 20, 50)  # the default spends a quarter of the imports of torch and transformers on garbage
    try:
        code = app(prog_name="bridge", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # not Typer's error, whose class (click's or its own) depends on its version
            raise
        code = 2
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            print(f"bridge: {console.usage_line(error)}", file=sys.stderr)
    gc.freeze()  # imported modules are not searched for garbage at exit, which takes a second
    raise SystemExit(code)


if __name__ == "__main__":
    main()
