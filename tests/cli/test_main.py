"""The commands as a person meets them: what they print, what they leave on disk, and how they refuse."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cli_cases import assert_refused, run
from support.models import CONTEXT, tiny_gpt2, tiny_tokenizer, untrained
from transformers import BertConfig, BertLMHeadModel
from typer.main import get_command
from typer.testing import Result

from bridge import __version__
from bridge.cli.console import FitProgress
from bridge.cli.main import app, main
from bridge.errors import RunError, UserError
from bridge.models import store as checkpoint
from bridge.models.bridges import CoupledModels
from bridge.models.dense import load_dense
from bridge.recipe import MAX_SEED
from bridge.training import loop as training
from bridge.training.loop import Progress

TINY = ["--set", "sparse.width=32", "--set", "sparse.head_channels=8", "--set", "data.rows=4", "--device", "cpu"]


@pytest.fixture(scope="module")
def fitted(dense_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder that `bridge fit` wrote, and what it printed."""
    out = tmp_path_factory.mktemp("fitted") / "coupling"
    result = run("fit", dense_folder, "--l0", 0.2, "--data", text_file, "--tokens", 640, "--out", out, *TINY)
    assert result.exit_code == 0, result.output
    return out, result


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    shape = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertLMHeadModel(shape).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# -- what works ---------------------------------------------------------------------------------------------------------


def test_the_version_is_the_packages() -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.stdout == f"bridge {__version__}\n"


def test_help_is_light() -> None:
    """Nothing heavy is imported before a command runs."""
    code = """
import sys
from typer.testing import CliRunner
from bridge.cli.main import app
commands = ("fit", "info", "eval", "explain", "steer", "export", "tasks", "circuit", "sweep", "nodes", "serve")
for arguments in (["--help"], *([name, "--help"] for name in commands)):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "Usage" in result.stdout, result.output
assert not {"torch", "transformers", "accelerate", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_info_prints_every_site(dense_folder: Path) -> None:
    result = run("info", dense_folder, "--device", "cpu")
    lines = result.stdout.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    assert facts["sublayers"] == "4: 2 attn, 2 mlp"
    assert (facts["width"], facts["vocabulary"], facts["context"], facts["sites"]) == ("16", "40", str(CONTEXT), "5")
    table = [line.split() for line in lines[lines.index("") + 2 :]]
    assert [row[:2] for row in table] == [["0", "attn"], ["1", "mlp"], ["2", "attn"], ["3", "mlp"], ["4", "unembed"]]
    assert all(float(row[2]) <= 1e-4 for row in table)


def test_fit_says_what_it_does_and_how_it_stands(fitted: tuple[Path, Result], dense_folder: Path) -> None:
    out, result = fitted
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:7]] == ["dense", "sparse", "start", "rate", "data", "time", "memory"]
    assert "coupled at every site" in lines[1] and "from the dense model" in lines[2] and "GB needed" in lines[6]
    progress = next(line for line in lines if line.lstrip().startswith("100%"))
    for name in ("ce", "kl", "nmse-f", "nmse-g", "in", "out", "both", "L0 0.2", "tok/s", "0:00:00 left"):
        assert f"  {name}" in progress or f" {name}" in progress, name
    assert "\r" not in result.stdout and "\033" not in result.stdout  # what is redirected is plain
    assert lines[-2].startswith(f"wrote {out} (") and lines[-1].startswith(f"next: bridge eval {out}")
    assert CoupledModels.from_pretrained(out).dense.name == str(dense_folder)
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 10


def test_progress_when_redirected_is_a_line_now_and_then(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watch = FitProgress(quiet=False)
    for second in range(0, 100, 5):
        clock[0] = float(second)
        watch(Progress(second, 100, second * 64, second / 100, {"total": 2.0, "ce": 1.25}, 0.5, 64.0, 3723.0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # at 0, 30, 60 and 90 seconds
    assert lines[1].split() == ["30%", "0.00", "M", "tokens", "ce", "1.250", "L0", "0.5000", "64", "tok/s", "1:02:03", "left"]


def test_eval_prints_and_saves(fitted: tuple[Path, Result]) -> None:
    out, _ = fitted
    result = run("eval", out, "--rows", 8, "--device", "cpu")
    assert result.exit_code == 0 and "top-1 agreement with dense" in result.stdout and "dead neurons" in result.stdout

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in eval.json")

    values = json.loads((out / "eval.json").read_text(), parse_constant=refuse)
    reference_bt = CoupledModels.from_pretrained(out).reference_bt
    assert reference_bt is not None and values["tokens"] == reference_bt[:8].numel() and len(values["sites"]) == 5
    assert all(math.isfinite(value) for row in values["sites"] for value in row.values() if isinstance(value, float))
    table = result.stdout.split("\n\n")[1].splitlines()[2:]
    sites = [line.split()[:2] for line in table]
    assert sites == [["0", "attn"], ["1", "mlp"], ["2", "attn"], ["3", "mlp"], ["4", "unembed"]]


def test_eval_of_other_text(fitted: tuple[Path, Result], text_file: Path) -> None:
    out, _ = fitted
    assert run("eval", out, "--rows", 2, "--data", text_file).exit_code == 0
    assert json.loads((out / "eval.json").read_text())["tokens"] == 2 * CONTEXT


def own_task(folder: Path) -> Path:
    """A task in the tiny tokenizer's words."""
    file = folder / "own.jsonl"
    pairs = ({"prompt": f"w5 w{n}", "counterfactual": f"w6 w{n}", "answer": " w7", "wrong": " w8"} for n in range(10, 18))
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


def test_tasks_are_listed_with_what_the_models_do_on_them(fitted: tuple[Path, Result], tmp_path: Path) -> None:
    out, table = fitted[0], tmp_path / "tasks.json"
    result = run("tasks", own_task(tmp_path), "for_while", "--bridge", out, "--json", table, "--device", "cpu")
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith("validation split; both prompts of every pair are scored; dense model ")
    assert lines[2].split()[:5] == ["task", "dense", "sparse", "pairs", "dropped"]
    own, unfit = (line.split() for line in lines[3:5])
    assert (own[0], own[3], own[4]) == ("own", "2", "0%") and lines[3].endswith("-> ' w7'")
    assert unfit[:5] == ["for_while", "-", "-", "0", "100%"]  # of a vocabulary of w1 to w38 nothing is left
    first, second = json.loads(table.read_text())
    assert [f"{first['scores'][name]['accuracy']:.2f}" for name in ("dense", "sparse")] == own[1:3]
    assert second["scores"] == {} and second["drop_rate"] == 1 and sum(second["dropped"].values()) == second["looked_at"]
    solved = sum(score["accuracy"] >= 0.9 for score in [first["scores"]["dense"]])
    assert lines[-3].split() == ["solved", "at", ".9,", "of", "2", str(solved), *lines[-3].split()[-1:]]
    assert lines[-1] == f"wrote {table}"


def test_tasks_of_a_dense_model_alone(dense_folder: Path, tmp_path: Path) -> None:
    result = run("tasks", own_task(tmp_path), "--dense", dense_folder, "--split", "train", "--device", "cpu")
    assert result.exit_code == 0 and result.stdout.splitlines()[2].split()[:4] == ["task", "dense", "pairs", "dropped"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["for_whlie"], "there is no task 'for_whlie'; did you mean 'for_while'?"),
        (["--language", "latin"], "there are no tasks in the language 'latin'; use one of python, english"),
        (["ioi", "--language", "python"], "none of the named tasks is in the language 'python'; leave out --language"),
        (["--split", "dev"], "there is no split 'dev'; give one of train, validation, test"),
        (["--bridge", "nowhere", "--dense", "b"], "'nowhere' does not exist"),
    ],
)
def test_tasks_refuses(arguments: list[str], message: str) -> None:
    assert_refused(run("tasks", *arguments), message)


def test_fit_stops_at_the_end_of_a_stretch_and_goes_on(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run("fit", dense_folder, "--l0", 0.2, "--data", text_file, "--tokens", 640, "--out", out, "--stretch", 0, *TINY)
    assert first.exit_code == 0 and "stopped at step 1" in first.stderr and f"continue with --resume --out {out}" in first.stderr
    second = run("fit", "--resume", "--out", out, "--device", "cpu")  # what was fitted is in the folder
    assert second.exit_code == 0, second.output
    assert CoupledModels.from_pretrained(out).recipe.sparsity.l0 == 0.2


def test_a_run_that_is_asked_to_stop_exits_with_130(
    dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    draw = training.draw_splice
    monkeypatch.setattr("bridge.training.prepare.seconds_a_step", lambda run: 1.0)
    monkeypatch.setattr(training, "draw_splice", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), draw(*a))[1])
    result = run("fit", dense_folder, "--l0", 0.2, "--data", text_file, "--tokens", 640, "--out", tmp_path / "run", *TINY)
    assert result.exit_code == 130 and "continue with --resume --out" in result.stderr
    assert (tmp_path / "run" / "training.json").is_file()


def test_a_run_that_fails_exits_with_1(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    settings = ["--set", "optimizer.rate=1000.0", *TINY]
    result = run("fit", dense_folder, "--l0", 0.2, "--data", text_file, "--tokens", 6400, "--out", tmp_path / "run", *settings)
    assert result.exit_code == 1 and "try a lower rate" in result.stderr and "\n" not in result.stderr.strip()


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, which must still be empty afterwards."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--l0", "0"], "sparsity.l0 = 0.0: must keep some weights"),
        (["--l0", "-1"], "sparsity.l0 = -1.0: must keep some weights"),
        (["--l0", "1e9"], "more than the"),
        (["--l0", "0.1", "--data", "nowhere.txt"], "data 'nowhere.txt' does not exist"),
        (["--l0", "0.1", "--set", "sparse.wdth=3"], "the setting sparse.wdth is not one of the recipe's settings"),
        (["--l0", "0.1", "--set", "width"], "is not of the form key=value"),
        (["--l0", "0.1", "--recipe", "no.toml"], "recipe 'no.toml' does not exist"),
        (["--l0", "0.1", "--device", "tpu"], "device 'tpu' is not supported"),
        (["--l0", "0.1", "--dtype", "int8"], "dtype 'int8' is not supported"),
        (["--l0", "0.1", "--out", "/proc/version/run"], "cannot be created"),
    ],
)
def test_fit_refuses(dense_folder: Path, place: Path, options: list[str], message: str) -> None:
    assert_refused(run("fit", dense_folder, *TINY[:6], *options), message)
    assert not list(place.iterdir())


@pytest.mark.parametrize("command", [["info"], ["fit", "--l0", "0.1"]])
def test_a_model_that_is_none_is_refused(encoder_folder: Path, place: Path, command: list[str]) -> None:
    assert_refused(run(*command, "no/such-model"), "model 'no/such-model' is neither a folder here nor")
    assert_refused(run(*command, "gpt2-nowhere"), "neither a folder here nor")
    assert_refused(run(*command, encoder_folder), "an encoder, such as BERT?")
    assert not list(place.iterdir())


def test_no_model_at_all_is_refused(place: Path) -> None:
    assert_refused(run("fit", "--l0", 0.1), "the model is missing")
    assert_refused(run("fit", "--resume", "--out", "nowhere"), "the model is missing")


def test_data_without_text_is_refused(dense_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"label": 3, "score": 0.5}\n' * 10)
    result = run("fit", dense_folder, "--l0", 0.1, "--data", data, "--out", tmp_path / "run", *TINY)
    assert_refused(result, "has no text column (found: label, score); rename a column to text")
    assert list(tmp_path.iterdir()) == [data]


def test_a_folder_in_use_is_refused(dense_folder: Path, text_file: Path, tmp_path: Path, fitted: tuple[Path, Result]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    arguments = ["fit", dense_folder, "--l0", 0.1, "--data", text_file, *TINY]
    assert_refused(run(*arguments, "--out", tmp_path), "exists and is not empty; name a new folder")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert_refused(run(*arguments, "--out", fitted[0], "--resume"), "is finished; name a new --out")


def test_a_full_disk_is_said_in_one_line(
    dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    result = run("fit", dense_folder, "--l0", 0.2, "--data", text_file, "--tokens", 64, "--out", tmp_path / "run", *TINY)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "No space left on device" in result.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


UNWRITABLE = [
    (["explain", "--prompt", "w3", "--json"], "nodir/x.json"),
    (["explain", "--prompt", "w3", "--html"], "file/x.html"),
    (["steer", "--prompt", "w3", "--svg"], "nodir/x.svg"),
    (["steer", "--prompt", "w3", "--json"], "."),
    (["tasks", "--json"], "file/x.json"),
    (["nodes", "--json"], "nodir/x.json"),
    (["card", "--all", "--json"], "nodir/x.json"),
    (["circuit", "--task", "for_while", "--out"], "file"),
    (["circuit", "--all", "--out"], "file/inside"),
    (["card", "--all", "--out"], "file"),
    (["nodes", "--out"], "file"),
    (["nulls", "bridge", "--against"], "file"),
    (["sweep", "--l0", "0.1", "--out"], "lost"),
]


@pytest.mark.parametrize(("command", "path"), UNWRITABLE, ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_where_nothing_can_be_written_is_said_before_the_work(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], path: str
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("models were loaded first")

    monkeypatch.setattr(CoupledModels, "from_pretrained", load)
    monkeypatch.setattr(importlib.import_module("bridge.studies.sweep"), "load_dense", load)
    (place / "file").write_text("mine")
    (place / "lost").symlink_to("nowhere/x")
    arguments = ["sweep", "model", *command[1:]] if command[0] == "sweep" else command
    can = "cannot be created" if command[-1] in ("--out", "--against") else "cannot be written"
    assert_refused(run(*arguments, path), f"{command[-1]} {path!r} {can}")
    assert sorted(each.name for each in place.iterdir()) == ["file", "lost"] and (place / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("to", "path"), [("circuit-tracer", "file"), ("graphml", "."), ("graphml", "file/x"), ("neuronpedia", "file/x")]
)
def test_export_looks_where_to_first(place: Path, monkeypatch: pytest.MonkeyPatch, to: str, path: str) -> None:
    monkeypatch.setattr("bridge.explanations.explanation.read_explanation", lambda _: None)
    (place / "file").write_text("mine")
    assert_refused(run("export", "x.json", "--to", to, "--out", path), f"--out {path!r} cannot be ")


def test_a_write_that_fails_in_the_end_names_what_was_asked_for(
    fitted: tuple[Path, Result], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "replace", full)
    result = run("tasks", "for_while", "--bridge", fitted[0], "--device", "cpu", "--json", "table.json")
    assert result.exit_code == 2 and not list(place.iterdir())
    assert result.stderr == (
        "bridge: could not read or write 'table.json' (No space left on device); free space or name another place\n"
    )


def test_every_seed_has_the_same_bounds() -> None:
    bounds = {
        name: (option.min, option.max)
        for name, command in get_command(app).commands.items()  # pyright: ignore[reportAttributeAccessIssue]
        for option in command.params
        if option.name == "seed"
    }
    assert set(bounds) == {"adapt", "diff", "fit", "explain", "steer", "circuit", "card", "nulls", "sweep", "tasks"}
    assert set(bounds.values()) == {(0, MAX_SEED)}


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999"])
def test_a_seed_that_is_none_is_refused(place: Path, seed: str) -> None:
    for command in (["explain", "--prompt", "w3"], ["tasks"], ["circuit", "--task", "for_while"], ["nulls", "x"], ["sweep"]):
        result = run(*command, f"--seed={seed}")
        assert result.exit_code == 2 and "--seed" in result.stderr and not result.stdout


@pytest.fixture
def main_with(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The entry point with some arguments: exit code, standard output, standard error."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def call(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["bridge", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("circuit --seeds 0", ["'--seeds'", "1", "(given: ", "0", "; see bridge circuit --help"]),
        ("nodes --rows 0", ["'--rows'", "(given: ", "; see bridge nodes --help"]),
        ("steer --strength abc", ["'--strength'", "(given: 'abc')"]),
        ("tasks --seed=-1", ["'--seed'", "-1", "; see bridge tasks --help"]),
        ("tasks --seed=99999999999999999999", ["'--seed'", str(MAX_SEED), "99999999999999999999"]),
        ("explain", ["issing option '--prompt'; see bridge explain --help"]),
        ("info", ["the model is missing; give a hub id, a folder or a .gguf file"]),
        ("info a b", ["unexpected extra argument", "b"]),
        ("tasks --frob", ["o such option", "--frob"]),
        ("tasks --seed", ["'--seed' requires an argument"]),
        ("explian", ["o such command 'explian'", "explain"]),
        ("tasks nowhere", ["there is no task 'nowhere'"]),
    ],
)
def test_a_command_line_that_cannot_be_taken_is_one_line(main_with, arguments: str, parts: list[str]) -> None:
    code, printed, told = main_with(*arguments.split())
    assert code == 2 and not printed and told.startswith("bridge: ") and told.count("\n") == 1
    for part in parts:
        assert part in told


def test_help_and_exit_codes_stay(main_with, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed, told = main_with("tasks", "--help")
    assert not code and printed.startswith("Usage: bridge tasks") and not told
    code, printed, told = main_with()
    assert "Usage: bridge" in printed + told and "explain" in printed + told

    def ends_with(error: BaseException):
        def load_task(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("bridge.data.task_pairs.load_task", load_task)
        return main_with("tasks", "x")

    assert ends_with(KeyboardInterrupt()) == (130, "", "")
    assert ends_with(RunError("had to stop")) == (1, "", "bridge: had to stop\n")
    assert ends_with(UserError("mend it")) == (2, "", "bridge: mend it\n")
    monkeypatch.setattr("bridge.data.task_pairs.load_task", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["bridge", "tasks", "x"])
    with pytest.raises(ZeroDivisionError):  # a defect is no mistake of the user's
        main()


def damaged(folder: Path) -> Path:
    """A coupling in which one bit of a tensor is wrong."""
    folder.parent.mkdir(exist_ok=True)
    untrained(load_dense(tiny_gpt2(), tokenizer=tiny_tokenizer())).save_pretrained(folder)
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    return folder


def test_a_damaged_coupling_is_refused(tmp_path: Path) -> None:
    folder = damaged(tmp_path / "coupling")
    before = sorted(folder.iterdir())
    assert_refused(run("eval", folder), "is damaged: its content is not what was written")
    assert_refused(run("explain", "--bridge", folder, "--prompt", "w3 w5"), "is damaged: its content is not what was written")
    assert_refused(run("eval", tmp_path / "nowhere"), "does not exist")
    assert sorted(folder.iterdir()) == before


def test_a_file_is_not_written_twice_or_over_what_is_read(fitted: tuple[Path, Result], place: Path) -> None:
    assert_refused(
        run("explain", "--bridge", fitted[0], "--prompt", "w3", "--json", "x", "--html", "./x"),
        "is also --html, and would overwrite it",
    )
    file = own_task(place)
    before = file.read_bytes()
    assert_refused(run("tasks", file, "--bridge", fitted[0], "--json", file), "is also an input, and would overwrite it")
    read = place / "explanation.json"
    read.write_text("{}")
    for command in (["export", read, "--to", "graphml", "--out", read], ["view", read, "--html", read]):
        assert run(*command).exit_code == 2 and read.read_text() == "{}"
    assert file.read_bytes() == before


@pytest.mark.slow
def test_what_is_asked_for_is_written_though_nobody_reads(fitted: tuple[Path, Result], tmp_path: Path) -> None:
    out, words = tmp_path / "out.json", "--prompt 'w3 w5' --device cpu"
    command = f"{sys.executable} -m bridge.cli.main explain --bridge {fitted[0]} {words} --json {out} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.stderr == "" and json.loads(out.read_text())["prompt"] == "w3 w5"


def test_a_fit_that_cannot_fit_is_refused_before_it_begins(dense_folder: Path, text_file: Path, place: Path) -> None:
    options = ("--l0", 0.2, "--data", text_file, "--tokens", 640, "--out", place / "run", "--device", "cpu")
    assert_refused(run("fit", dense_folder, *options, "--width", 10**8), "lower --width or data.rows")
    assert_refused(run("fit", dense_folder, *options, "--stretch", "nan"), "--stretch nan is not a number of minutes")
    assert not list(place.iterdir())


def test_what_has_diverged_is_not_written(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["--set", "optimizer.rate=1e30", "--set", "refit.slopes=0", "--set", "optimizer.warmup=0"]
    result = run("fit", dense_folder, "--l0", 0.2, "--data", text_file, "--tokens", 40, "--out", out, *TINY, *settings)
    assert result.exit_code == 1 and "stopped at the end: the cross-entropy on held-out text is" in result.stderr, result.output
    assert not (out / "coupling.json").exists()


def test_explain_says_the_question_first_and_writes_what_it_found(coupling_folder: Path, tmp_path: Path) -> None:
    files = tmp_path / "why.json", tmp_path / "why.html"
    command = ("explain", "--bridge", coupling_folder, "--prompt", "w30 w31 w4 w8", "--device", "cpu")
    result = run(*command, "--json", files[0], "--html", files[1])
    assert result.exit_code == 0, result.output
    values = json.loads(files[0].read_text())
    told = [line.split(" ")[0] for line in result.stdout.splitlines() if line[:1].isalpha()]
    assert told[:8] == ["prompt", "dense", "sparse", "question", "VERDICT", "CIRCUITS", "PATH", "GROUPS"]
    assert values["contrast"] is None and f"why {values['answer']['text']!r} (#{values['answer']['id']}) at all" in result.stdout
    assert values["report"]["verdict"].upper() in result.stdout and files[1].read_text().startswith("<!")
    against = run(*command, "--contrast", "w7", "--target", "w9")
    assert against.exit_code == 0 and "why 'w9' (#9) rather than 'w7' (#7), which is not the dense model's answer" in " ".join(
        against.stdout.split()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "w3 w4", "--target", "w5 w6"], "token"),
        (["--prompt", "w3 w4", "--contrast", "w5 w6"], "token"),
        (["--prompt", " ".join(["w3"] * (CONTEXT + 1))], "context"),
    ],
)
def test_explain_refuses(fitted: tuple[Path, Result], place: Path, options: list[str], message: str) -> None:
    assert_refused(run("explain", "--bridge", fitted[0], "--json", "explanation.json", *options), message)
    assert not list(place.iterdir())
