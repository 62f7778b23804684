"""The commands on tasks, circuits and nodes, by the rules of `cli.main`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge.cli import console
from bridge.cli.console import Adapter, Dense, Device, RepeatedOptionsCommand, Revision, SearchProgress, seed_option
from bridge.errors import RunError
from bridge.recipe import RecipeError, parse_setting

task_commands = typer.Typer()


@task_commands.command()
def circuit(
    task: Annotated[str | None, typer.Option(help="A built-in task, or a .jsonl or .yaml file of examples.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Search all built-in tasks in --language and compare them.")] = False,
    language: Annotated[str, typer.Option(help="Language of the tasks for --all: python or english.")] = "python",
    bridge: Annotated[str | None, typer.Option(help="Coupling: folder or hub id; default the one that ships.")] = None,
    level: Annotated[float, typer.Option(help="Faithfulness of the circuit: .8, .9, .95 or .99.")] = 0.9,
    explains: Annotated[str, typer.Option(help="Model whose answers are explained: dense or sparse.")] = "dense",
    seeds: Annotated[int, typer.Option(help="Number of searches; the smallest circuit is kept.", min=1)] = 1,
    seed: Annotated[int, seed_option("Seed of the first search.")] = 0,
    null: Annotated[str | None, typer.Option(help="Run a null, which must fail: labels, weights or shuffled.")] = None,
    dense: Dense = None,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Do not search the dense model's own circuit.")] = False,
    no_nested: Annotated[bool, typer.Option("--no-nested", help="Search only the --level circuit, in 1/3 of the time.")] = False,
    budget: Annotated[float, typer.Option(help="Steps of the search, as a multiple of the default.", min=0.01)] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; with --all, tasks found there are skipped.")] = None,
    device: Device = "auto",
) -> None:
    """Find a task's nested circuits in the sparse model, with their evidence, and the dense model's own for comparison."""
    if (task is None) == (not all_):
        raise RecipeError("the task", "must be given in one way", "give either --task NAME, --task FILE, or --all")
    if null not in (None, "labels", "weights", "shuffled"):
        raise RecipeError(f"null {null!r}", "is unknown", "give labels, weights or shuffled")
    of = _explains(explains)
    from bridge.data.task_pairs import task_names
    from bridge.studies.search import Subjects, search_config
    from bridge.studies.suite import run_suite, run_task

    search_config(level, budget)  # raises before anything is loaded

    console.check_outputs(out)
    subjects = Subjects.of(console.open_coupling(bridge, dense, device))
    watch = SearchProgress()
    options: dict[str, Any] = {
        "level": level, "explains": of, "seeds": seeds, "seed": seed, "dense": not no_dense, "null": null, "budget": budget,
        "nested": not no_nested,
    }  # fmt: skip
    if task is not None:
        watch.print(run_task(subjects, task, out=out, progress=watch, width=console.terminal_width(), **options))
    else:
        for text in run_suite(subjects, task_names(language), out=out, progress=watch, width=console.terminal_width(), **options):
            watch.print(f"{text}\n")


@task_commands.command()
def card(
    task: Annotated[str | None, typer.Option(help="A built-in task, or a .jsonl or .yaml file of examples.")] = None,
    circuit: Annotated[Path | None, typer.Option(help="Folder of a circuit, or of several, that `bridge circuit` wrote.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Test all built-in tasks in --language.")] = False,
    language: Annotated[str, typer.Option(help="Language of the tasks for --all: python or english.")] = "python",
    bridge: Annotated[str | None, typer.Option(help="Coupling: folder or hub id; default the one that ships.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of searches, if no circuit is given; the smallest is kept.", min=1)] = 1,
    seed: Annotated[int, seed_option("Seed of searches and controls.")] = 0,
    budget: Annotated[float, typer.Option(help="Steps of a search, as a multiple of the default.", min=0.01)] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder for cards and circuits; results found there are reused.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the card, or the list of several, as JSON.")] = None,
    dense: Dense = None,
    device: Device = "auto",
) -> None:
    """Test a task's circuit on the dense model: tests with ceilings, controls and intervals, the nulls, and a verdict."""
    if (task is not None or circuit is not None) == all_:
        raise RecipeError("the circuit", "must be given in one way", "give --task NAME or FILE, --circuit DIR, or --all")
    from bridge.cards.suite import requested_cards, run_cards
    from bridge.data.task_pairs import task_names
    from bridge.models.store import write_json
    from bridge.studies.search import Subjects

    console.check_outputs(out, json=json, read=[task])
    wanted = requested_cards(task=task, circuit=circuit, names=task_names(language) if all_ else (), out=out)
    subjects = Subjects.of(console.open_coupling(bridge, dense, device))
    watch, cards = SearchProgress(), []
    for one, text in run_cards(
        subjects, wanted, seed=seed, seeds=seeds, budget=budget, width=console.terminal_width(), progress=watch
    ):
        watch.clear()
        console.print_output(f"{text}\n")
        cards += [] if one is None else [one.to_json()]
    if json is not None:
        write_json(json, cards if len(wanted) > 1 else cards[0])
        console.print_written(json)


@task_commands.command(cls=RepeatedOptionsCommand)
def nulls(
    bridge: Annotated[str, typer.Argument(help="Folder of a coupling, in which nulls.json is kept.")],
    tasks: Annotated[list[str] | None, typer.Option(help="Tasks or task files; default the first 3 that both models do.")] = None,
    circuits: Annotated[Path | None, typer.Option(help="Folder of the coupling's circuits; missing ones are searched.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Folder of the uncoupled coupling, made if missing; default runs/COUPLING-uncoupled.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Training budget of the uncoupled model in minutes.", min=0.01)] = 20.0,
    budget: Annotated[float, typer.Option(help="Steps of each search, as a multiple of the default.", min=0.01)] = 0.2,
    prompts: Annotated[int, typer.Option(help="Run on this many prompts of held-out text instead of on tasks.", min=0)] = 0,
    seed: Annotated[int, seed_option("Seed of everything that is random.")] = 0,
    dense: Dense = None,
    device: Device = "auto",
) -> None:
    """Run the nulls of a coupling, which must fail the whole evidence, and keep them with it; on tasks this is resumable."""
    from bridge.cards.suite import run_nulls
    from bridge.models.store import check_writable_folder
    from bridge.studies.search import Subjects

    if against is not None and not (against / "coupling.json").is_file():
        check_writable_folder(against, "against")
    coupling, watch = console.open_coupling(bridge, dense, device), SearchProgress()
    uncoupled = against or Path("runs") / f"{Path(bridge).resolve().name}-uncoupled"
    if prompts:
        from bridge.verdicts.nulls import cut_prompts, render_prompt_nulls, run_prompt_nulls

        rows = cut_prompts(coupling, prompts, seed)
        table = run_prompt_nulls(coupling, rows, uncoupled, minutes=minutes, seed=seed, progress=watch)
        watch.print(render_prompt_nulls(table))
        return
    for text in run_nulls(
        Subjects.of(coupling), names=tasks or (), circuits=circuits, against=uncoupled,
        minutes=minutes, budget=budget, seed=seed, width=console.terminal_width(), progress=watch,
    ):  # fmt: skip
        watch.print(text)


@task_commands.command(cls=RepeatedOptionsCommand)
def sweep(
    model: Annotated[str | None, typer.Argument(help="A Hugging Face causal LM: hub id or folder; default the recipe's.")] = None,
    l0: Annotated[list[float] | None, typer.Option(help="Weights to keep: below 1 fractions, from 1 on numbers.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="Residual widths; a fit for each width and L0.")] = None,
    load: Annotated[list[str] | None, typer.Option(help="Existing couplings to measure as further points.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Tasks or task files; default all in python.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget of each fit in tokens of text.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget of each fit in minutes.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file with all other numbers of the fits.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Set a number of the recipe: key=value; repeatable.")] = None,
    data: Annotated[str | None, typer.Option(help="Text: stdlib, stdlib+packages, self, a file or folder, or a hub id.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep; results found there are reused.")] = None,
    level: Annotated[float, typer.Option(help="Faithfulness of the circuits: .8, .9, .95 or .99.")] = 0.9,
    explains: Annotated[str, typer.Option(help="Model whose answers the circuits explain: dense or sparse.")] = "dense",
    seeds: Annotated[int, typer.Option(help="Number of searches per task; the smallest circuit is kept.", min=1)] = 1,
    seed: Annotated[int | None, seed_option("Seed of the fits.")] = None,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Do not search the dense model's own circuits.")] = False,
    budget: Annotated[float, typer.Option(help="Steps of a search, as a multiple of the default.", min=0.01)] = 1.0,
    rows: Annotated[int, typer.Option(help="Rows of held-out text to evaluate on, at most.", min=1)] = 256,
    adapter: Adapter = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Precision of the fits: float32, or bfloat16 products.")] = "float32",
) -> None:
    """Fit or load couplings over several L0 and widths, and plot capability against the size of circuits; resumable."""
    if out is None:
        raise RecipeError("the folder of the sweep", "is missing", "give --out FOLDER")
    settings = dict(parse_setting(text) for text in set_ or [])
    from bridge.studies.sweep import sweep as run_sweep

    watch = SearchProgress()
    frontier = run_sweep(
        model, out=out, l0=l0 or (), width=width or (), load=load or (), tasks=tasks or (), tokens=tokens, minutes=minutes,
        recipe=recipe, settings=settings, data=data, seed=seed, adapter=adapter,
        revision=revision, level=level, explains=_explains(explains), seeds=seeds, dense=not no_dense, budget=budget, rows=rows,
        device=console.choose_device(device), dtype=dtype, on_step_end=watch.print, progress=watch,
    )  # fmt: skip
    plot = " and frontier.svg" if (out / "frontier.svg").is_file() else ""
    watch.print(f"\n{frontier}\n\nwrote {out / 'sweep.json'}, sweep.txt{plot}")
    if frontier.failures:
        of = len(frontier.failures) + len(frontier.points)
        raise RunError(f"{len(frontier.failures)} of {of} points failed", remedy="run the same command to try them again")


@task_commands.command()
def nodes(
    bridge: Annotated[str | None, typer.Option(help="Coupling: folder or hub id; default the one that ships.")] = None,
    node: Annotated[list[str] | None, typer.Option(help="A node to print, such as 1.mlp_act[37]; repeatable.")] = None,
    circuit: Annotated[Path | None, typer.Option(help="Print all nodes of a circuit that `bridge circuit --out` wrote.")] = None,
    data: Annotated[str | None, typer.Option(help="Text to use instead of the held-out text stored with the coupling.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of text to use, at most; default 256.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to keep the results in; default the coupling's.")] = None,
    describe_with: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint to ask for a line on each node.")] = None,
    model: Annotated[str | None, typer.Option(help="Model at the endpoint; a key is read from BRIDGE_DESCRIBE_KEY.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the facts on the printed nodes as JSON.")] = None,
    dense: Dense = None,
    device: Device = "auto",
) -> None:
    """Collect what every node of the sparse model does on text (once), and print what is known about the named nodes."""
    from bridge.nodes.endpoint import Descriptions, Endpoint, EndpointError

    if (describe_with is None) != (model is None):
        raise EndpointError("--describe-with and --model", "need each other", "give both or neither")
    if describe_with is not None and not node and circuit is None:
        raise EndpointError("the nodes to describe", "are missing", "give --node NAME or --circuit DIR")
    endpoint = Endpoint(describe_with, model) if describe_with is not None and model is not None else None
    from bridge.models.store import write_json
    from bridge.nodes.description import describe_node, render_page
    from bridge.nodes.statistics import collect_nodes, parse_node, render_summary, stored_facts
    from bridge.studies.result import TaskResult

    console.check_outputs(None if out is None or (out / "nodes.json").is_file() else out, json=json)
    name = console.choose_coupling(bridge)
    coupling = console.open_coupling(name, dense, device)
    sizes = coupling.sparse.locations()
    chosen = [parse_node(text, sizes) for text in node or []]
    if circuit is not None:
        chosen += [parse_node(each.name, sizes) for each in TaskResult.load(circuit).circuit.nodes]
    folder = out or (Path(name) if Path(name).is_dir() else None)
    facts = stored_facts(coupling, folder) if data is None and rows is None else None
    if facts is None:
        console.check_outputs(folder)
        watch = SearchProgress()
        facts = collect_nodes(coupling, console.held_out_text(coupling, name, data, rows or 256), folder=folder, progress=watch)
        watch.clear()
    descriptions = Descriptions(folder, facts.fingerprint)
    pages: list[dict[str, Any]] = []
    for each in dict.fromkeys(chosen):
        page = describe_node(coupling, facts, each)
        description = descriptions.ask(endpoint, page) if endpoint is not None else descriptions.text(page.name)
        pages.append(page.to_json() | {"description": description})
        print(f"{render_page(page, console.terminal_width(), description)}\n", flush=True)
    if not chosen:
        print(render_summary(facts))
        print(f"\nstored in {folder}" if folder else "\nnot stored: the coupling has no local folder; give --out")
        kept_at = "" if out is None else f" --out {out}"
        print(f"next: bridge nodes --bridge {name}{kept_at} --node '0.mlp_act[0]'")
    if json is not None:
        write_json(json, pages)
        console.print_written(json)


@task_commands.command()
def tasks(
    names: Annotated[list[str] | None, typer.Argument(help="Tasks, by name or as a .jsonl or .yaml file; default all.")] = None,
    bridge: Annotated[str | None, typer.Option(help="A coupling: folder or hub id; default the one that ships.")] = None,
    dense: Annotated[
        str | None, typer.Option(help="Score only this dense model (hub id, folder, .gguf file); with --bridge, where it is.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Only the tasks in this language: python or english.")] = None,
    split: Annotated[str, typer.Option(help="Split to measure on: train, validation or test.")] = "validation",
    seed: Annotated[int, seed_option("Seed of names, templates and splits.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the table as JSON.")] = None,
    device: Device = "auto",
) -> None:
    """List the tasks, and how well the dense and the sparse model do on them."""
    from bridge.data.task_pairs import SPLITS, TaskError, load_task, task_names
    from bridge.data.task_tokens import resolve, score
    from bridge.models.store import write_json
    from bridge.verdicts.task_search import SOLVED

    if split not in SPLITS:
        raise TaskError(f"there is no split {split!r}", remedy=f"give one of {', '.join(SPLITS)}")
    console.check_outputs(json=json, read=names or [])
    chosen = [load_task(name, seed=seed) for name in names or task_names(language)]
    chosen = [task for task in chosen if language in (None, task.language)]
    if not chosen:
        raise TaskError("none of the named tasks", f"is in the language {language!r}", "leave out --language")
    if dense is not None and bridge is None:
        from bridge.models.dense import load_dense

        of = load_dense(dense, device=console.choose_device(device))
        models: dict[str, Any] = {"dense": of}
        context = of.context
    else:
        coupling = console.open_coupling(bridge, dense, device)
        of, context, models = coupling.dense, coupling.context, {"dense": coupling.dense, "sparse": coupling.sparse}
    print(f"{split} split; both prompts of every pair are scored; dense model {of.name}\n")
    columns = "".join(f"{name:>8}" for name in models)
    print(f"{'task':<27}{columns}{'pairs':>7}{'dropped':>9}  a prompt, and its answer")
    rows: list[dict[str, Any]] = []
    for task in chosen:
        resolved = resolve(task, of.prompts, context=context, splits=(split,))
        pairs = resolved.splits[split]
        scores = {name: score(model, pairs.to(of.device)) for name, model in models.items()} if len(pairs) else {}
        rows.append(
            {
                "task": task.name, "language": task.language, "about": task.about, "split": split, "seed": seed,
                "pairs": len(pairs), "looked_at": resolved.seen, "drop_rate": resolved.drop_rate,
                "dropped": dict(resolved.dropped), "scores": {name: asdict(one) for name, one in scores.items()},
            }
        )  # fmt: skip
        numbers = "".join(f"{scores[name].accuracy:8.2f}" if scores else f"{'-':>8}" for name in models)
        example = next(iter(pairs.examples or task.examples[split]), None)
        sample = console.sample_prompt(example, 43 + 8 * len(models))
        print(f"{task.name:<27}{numbers}{len(pairs):7}{resolved.drop_rate:9.0%}  {sample}")
    solved = {name: sum(row["scores"].get(name, {}).get("accuracy", 0) >= SOLVED for row in rows) for name in models}
    print(f"\n{f'solved at .9, of {len(rows)}':<27}" + "".join(f"{count:8}" for count in solved.values()))
    if json is not None:
        write_json(json, rows)
        console.print_written(json)


def _explains(text: str) -> Any:
    """The model whose answers are explained. Raises RecipeError if it is neither dense nor sparse."""
    if text not in ("dense", "sparse"):
        raise RecipeError(f"--explains {text!r}", "names no model of a coupling", "give dense or sparse")
    return text
