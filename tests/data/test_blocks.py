"""Text to token blocks: what is read, how it is cut, what is held out, and how each thing that can be wrong with it is said."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from datasets import IterableDataset
from support.data_cases import BEGIN, END, letters, refusal, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel

from bridge.data import blocks as data
from bridge.data import packing
from bridge.data.blocks import HELD_OUT_EVERY, Blocks, DataError, load_blocks
from bridge.data.corpora import documents

# -- blocks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
def test_documents_are_joined_by_end_of_text_and_cut_into_blocks(bos: bool, tmp_path: Path) -> None:
    tokenizer, context = letters(bos=bos), 8
    texts = [f"{index}: {'x' * (index % 7)}\n" for index in range(3 * HELD_OUT_EVERY + 20)]
    blocks = load_blocks(write_jsonl(tmp_path / "a.jsonl", ({"text": text} for text in texts)), tokenizer, context)
    ids: dict[str, int] = tokenizer.get_vocab()
    streams: dict[bool, list[int]] = {False: [], True: []}
    for index, text in enumerate(texts):
        coded = text.replace(" ", "\u0120").replace("\n", "\u010a")  # how a byte-level vocabulary spells them
        streams[(index + 1) % HELD_OUT_EVERY == 0] += [ids[letter] for letter in coded] + [END]
    first = [BEGIN] if bos else []
    body = context - len(first)
    for stream, block_nt in [(streams[False], blocks.train_nt), (streams[True], blocks.heldout_nt)]:
        whole = [first + stream[start : start + body] for start in range(0, len(stream) - body + 1, body)]
        assert block_nt.tolist() == whole
    assert blocks.train_nt.dtype == torch.int32


def test_held_out_documents_never_appear_in_training(tmp_path: Path) -> None:
    rows = [{"input_ids": [index + 2] * 9} for index in range(4 * HELD_OUT_EVERY)]
    blocks = load_blocks(write_jsonl(tmp_path / "a.jsonl", rows), letters(), 4)
    trained, heldout = (set(block_nt.flatten().tolist()) - {END} for block_nt in (blocks.train_nt, blocks.heldout_nt))
    assert heldout == {HELD_OUT_EVERY * n + 1 for n in range(1, 5)}
    assert not trained & heldout
    assert len(trained) + len(heldout) == len(rows)


def test_of_few_documents_the_tail_is_held_out(tmp_path: Path) -> None:
    text = "".join(chr(97 + index % 26) for index in range(999))
    (tmp_path / "one.txt").write_text(text)
    blocks = load_blocks(str(tmp_path / "one.txt"), letters(), 10)
    assert letters().decode(torch.cat([blocks.train_nt, blocks.heldout_nt]).flatten()) == text + "<end>"
    assert (len(blocks.train_nt), len(blocks.heldout_nt)) == (98, 2)


def test_a_short_held_out_part_is_made_up_from_the_tail(tmp_path: Path) -> None:
    """Where the 50th document is the only long one, or too short to fill a block, nothing is lost."""
    for lengths in ([1] * 49 + [300], [30] * 49 + [2]):
        rows = [{"input_ids": [7] * length} for length in lengths]
        blocks = load_blocks(write_jsonl(tmp_path / "a.jsonl", rows), None, 60)
        assert len(blocks.train_nt) >= len(blocks.heldout_nt) == 1
        assert blocks.train_nt.numel() + blocks.heldout_nt.numel() > sum(lengths) - 2 * 60


def test_empty_documents_and_missing_texts_leave_no_trace(tmp_path: Path) -> None:
    full = [{"text": f"number {index}"} for index in range(60)]
    gaps = [row for each in full for row in (each, {"text": ""}, {"text": None}, {"text": " \n"}, {"input_ids": []})]
    plain, gappy = (load_blocks(write_jsonl(tmp_path / "a.jsonl", rows), letters(), 8) for rows in (full, gaps))
    assert torch.equal(plain.train_nt, gappy.train_nt)
    assert torch.equal(plain.heldout_nt, gappy.heldout_nt)


def test_a_document_that_ends_with_end_of_text_gets_no_second_one(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, END]}] * 20
    blocks = load_blocks(write_jsonl(tmp_path / "a.jsonl", rows), letters(), 4)
    assert torch.cat([blocks.train_nt, blocks.heldout_nt]).tolist() == [[5, 6, 7, END]] * 20


@pytest.mark.parametrize("text", ["line\n" * 300, "x" * 1500], ids=["lines", "no line ends"])
def test_a_huge_document_is_read_in_parts_and_stays_one(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(text)
    whole = load_blocks(str(tmp_path / "a.txt"), letters(), 10)
    monkeypatch.setattr(packing, "PART_CHARACTERS", 33)
    parts = load_blocks(str(tmp_path / "a.txt"), letters(), 10)
    assert torch.equal(whole.train_nt, parts.train_nt)
    assert torch.equal(whole.heldout_nt, parts.heldout_nt)
    stopped = load_blocks(str(tmp_path / "a.txt"), letters(), 10, max_tokens=200)
    assert 200 - 10 <= stopped.train_nt.numel() + stopped.heldout_nt.numel() <= 200 + 33


def test_reading_stops_when_enough_tokens_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PART_CHARACTERS", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "x" * 99 + '"}\n', encoding="utf-8")
    path.write_text(path.read_text() * 100 + "this is no JSON")
    assert "is not JSON lines (Expecting value: line 101, column 1)" in refusal(path)
    blocks = load_blocks(str(path), letters(), 10, max_tokens=5000)
    assert 5000 - 20 <= blocks.train_nt.numel() + blocks.heldout_nt.numel() <= 5100


# -- batches ----------------------------------------------------------------------------------------------------------------


def numbered(n_blocks: int) -> Blocks:
    return Blocks(torch.arange(n_blocks, dtype=torch.int32)[:, None].expand(-1, 3), torch.zeros(2, 3, dtype=torch.int32), "")


@pytest.mark.parametrize(("n_blocks", "rows"), [(12, 4), (10, 4), (7, 7), (3, 8), (1, 2)])
def test_an_epoch_visits_every_block_once(n_blocks: int, rows: int) -> None:
    blocks = numbered(n_blocks)
    epochs = 3
    steps = -(-epochs * n_blocks // rows)
    order = torch.cat([blocks.batch(step, rows, seed=5)[:, 0] for step in range(steps)])
    for epoch in range(epochs):
        visited = order[epoch * n_blocks : (epoch + 1) * n_blocks]
        assert visited.sort().values.tolist() == list(range(n_blocks))


def test_a_batch_is_a_pure_function() -> None:
    blocks = numbered(50)
    first = {step: blocks.batch(step, 8, seed=1) for step in (0, 3, 9, 1000)}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for step in (1000, 0, 9, 3):
        assert torch.equal(numbered(50).batch(step, 8, seed=1), first[step])
    assert torch.equal(torch.get_rng_state(), state)
    assert first[0].dtype == torch.int64

    def order(epoch: int, seed: int) -> list[int]:
        return torch.cat([blocks.batch(5 * epoch + step, 10, seed)[:, 0] for step in range(5)]).tolist()

    assert order(0, seed=1) != order(1, seed=1) != order(0, seed=2) != order(0, seed=1)
    assert blocks.batch(0, 4, seed=2**62).shape == (4, 3)


def test_an_epochs_order_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = torch.randperm
    monkeypatch.setattr("torch.randperm", lambda n, **options: (drawn.append(n), draw(n, **options))[1])
    blocks = numbered(1001)
    for step in range(300):
        blocks.batch(step, 8, seed=77)
    assert drawn == [1001] * 3


def test_held_out_blocks_come_first_ones_first() -> None:
    blocks = Blocks(torch.zeros(1, 2, dtype=torch.int32), torch.arange(6, dtype=torch.int32).view(3, 2), "")
    assert blocks.heldout(2).tolist() == [[0, 1], [2, 3]]
    assert blocks.heldout(99).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert blocks.heldout(1).dtype == torch.int64


# -- sources ----------------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, kind: str, texts: list[str]) -> Path:
    """The texts in one of the formats that are read."""
    path = folder / f"corpus.{kind}"
    match kind:
        case "jsonl" | "JSONL":
            write_jsonl(path, ({"id": index, "content": text} for index, text in enumerate(texts)))
        case "json":
            path.write_text(json.dumps(texts))
        case "parquet":
            parquet.write_table(pa.table({"image": [b"\xff"] * len(texts), "text": texts}), path, row_group_size=2)
        case "folder":
            for index, text in enumerate(texts):
                file = path / ("deep" if index % 2 else ".") / f"{index}.{('txt', 'md', 'rst', 'py', 'TXT')[index % 5]}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            for name in ("picture.png", ".git/notes.txt", ".hidden.txt"):
                (path / name).parent.mkdir(exist_ok=True)
                (path / name).write_bytes(b"\xff\xfe")
        case _:
            path.write_text("".join(texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["txt", "py", "no-suffix", "jsonl", "JSONL", "json", "parquet", "folder"])
def test_every_format_gives_the_same_documents(kind: str, tmp_path: Path) -> None:
    texts = ["one\n", "tw\u00f6\n", "3 \u2014 three\n", "four", "f\u00ef\u00efve", "six"]
    path = write_corpus(tmp_path, kind, texts)
    read = list(documents(str(path)))
    if kind == "folder":
        assert read != texts and sorted(read) == sorted(texts)
        assert read == list(documents(str(path))) != list(documents(str(path), seed=1))
    else:
        assert read == (texts if "json" in kind.lower() or kind == "parquet" else ["".join(texts)])


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_token_ids_are_taken_as_they_are(kind: str, tmp_path: Path) -> None:
    rows = [{"input_ids": [index, index + 1, index + 2], "text": "not this"} for index in range(30)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        _ = write_jsonl(path, rows) if kind == "jsonl" else path.write_text(json.dumps(rows))
    blocks = load_blocks(str(path), None, 3, dense=tiny_gpt2())
    assert torch.cat([blocks.train_nt, blocks.heldout_nt]).tolist() == [row["input_ids"] for row in rows]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in [("a.txt", "text"), ("a.jsonl", '{"text": "text"}'), ("a.json", '["text"]')]:
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert list(documents(str(tmp_path / name))) == ["text"]


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert list(documents("~/a.txt")) == ["at home"]
    assert "'~/b.txt' does not exist" in refusal("~/b.txt")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library and packages in the place of this machine's."""
    (tmp_path / "lib" / "site-packages").mkdir(parents=True)
    paths = {"stdlib": str(tmp_path / "lib"), "purelib": str(tmp_path / "lib" / "site-packages")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    files = {f"module{index}.py": f"x = {index}\n" for index in range(30)}
    files |= {"deep/er/module.py": "deep = 1", "copy.py": "x = 3\n", "empty.py": " \n", "notes.txt": "no code"}
    files |= {"__pycache__/a.py": "cached", "long.py": "x" * 200_001, "site-packages/package/__init__.py": "package = 1"}
    for name, text in files.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(text)
    (tmp_path / "lib" / "latin.py").write_bytes(b"# caf\xe9")
    (tmp_path / "lib" / "gone.py").symlink_to(tmp_path / "nowhere.py")
    return tmp_path


@pytest.mark.parametrize(("source", "more"), [("stdlib", []), ("stdlib+packages", ["package = 1"])])
def test_the_source_of_the_library_is_read_once_each(source: str, more: list[str], library: Path) -> None:
    read = list(documents(source))
    assert sorted(read) == sorted([f"x = {index}\n" for index in range(30)] + ["deep = 1", *more])
    assert read == list(documents(source)) != list(documents(source, seed=1))
    moved = library.rename(library.with_name(f"{library.name}-moved"))
    sysconfig.get_paths().update(stdlib=str(moved / "lib"), purelib=str(moved / "lib" / "site-packages"))
    assert list(documents(source)) == read  # the order is that of the names within the library, wherever it lies


def test_this_machines_library_is_there() -> None:
    first, again = (list(islice(documents("stdlib"), 5)) for _ in range(2))
    assert first == again
    assert len(set(first)) == 5 and all(text.strip() for text in first)


def test_a_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rows() -> Iterator[dict[str, Any]]:
        yield {"id": 1, "text": "one"}
        yield {"id": 2, "text": "two"}
        raise ConnectionError("the line went dead\nTraceback of forty lines")

    def load_dataset(name: str, configuration: str | None, **options: Any) -> IterableDataset:
        asked.append((name, configuration, options))
        return IterableDataset.from_generator(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(islice(documents("some/set:small"), 2)) == ["one", "two"]
    assert asked == [("some/set", "small", {"split": "train", "streaming": True})]
    reason = "is not a file here, and cannot be streamed from the hub (the line went dead); name another source"
    assert refusal("some/set") == f"data 'some/set' {reason}"
    assert asked[1][:2] == ("some/set", None)


def test_a_hub_data_set_offline_is_one_line_at_once() -> None:
    code = """if True:
        from bridge.data.blocks import DataError, load_blocks
        try:
            load_blocks("no-one/nothing", None, 16)
        except DataError as error:
            print(error)
    """
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(data.__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=60)
    (line,) = result.stdout.splitlines()
    assert line.startswith("data 'no-one/nothing' is not a file here, and cannot be streamed from the hub (")
    assert "retry" not in result.stderr.lower()


# -- what is wrong with a corpus --------------------------------------------------------------------------------------------


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    for name in (f"{tmp_path}/absent", "./absent", "absent.txt", "some/absent.jsonl", "../absent.parquet"):
        assert refusal(name) == f"data {name!r} does not exist; name a file, a folder, 'stdlib', 'self' or a hub data set"


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\xff")
    known = ".txt, .md, .rst, .py, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"
    packed = ".gz, .bz2, .xz, .zst"
    assert refusal(tmp_path) == f"data {str(tmp_path)!r} contains no file ending in {known} (each may be followed by {packed})"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"caf\xe9", "is not UTF-8 text; convert it, or give jsonl or parquet"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "is not UTF-8 text; convert it, or give jsonl or parquet"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "is not JSON lines (Expecting value: line 3, column 9)"),
        ("a.json", b"[1, 2", "is not JSON (Expecting ',' delimiter: line 1 column 6 (char 5))"),
        ("a.jsonl", b'{"body": "a", "id": 3}', "has no text column (found: body, id); rename a column to "),
        ("a.jsonl", b'{"text": 3}', "has a number in its column 'text'; store one text per row"),
        ("a.jsonl", b"{}", "has no text column (found: none); rename a column to "),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": ' + b"1" * 5000 + b"}",
            "is not JSON lines (Exceeds the limit (4300 digits) for integer",
        ),
        ("a.jsonl", b"[" * 100_000, "is not JSON lines (maximum recursion depth exceeded"),
        ("a.json", b"1" * 5000, "is not JSON (Exceeds the limit (4300 digits) for integer"),
        ("a.json", b"[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
        ("a.json", b'["caf\xe9"]', "is not UTF-8 text; convert it, or give jsonl or parquet"),
        ("a.json", rb'["a", "\ud800"]', r"has '\ud800', which is not a character of UTF-8 text; remove it"),
        ("a.jsonl", rb'{"code": "\udcff"}', r"has '\udcff', which is not a character of UTF-8 text; remove it"),
        ("a.json", b"[3]", "has no text column (found: int); rename a column to "),
        ("a.parquet", b"PAR1 but not really", "is not a readable parquet file ("),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for source in (path, tmp_path):
        assert refusal(source).startswith(f"data {str(path)!r} {reason}")


def test_a_parquet_file_without_a_text_column(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    assert "a.parquet' has no text column (found: body, id)" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", ["", " \n", "short"])
def test_too_little_text(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    message = refusal(tmp_path / "a.txt", context=8)
    assert f"holds {len(content.strip())} tokens; at least 16 are needed" in message
    assert message.endswith("give more text or a shorter context (data.context)")


def test_a_small_token_budget_is_not_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    assert len(load_blocks(str(tmp_path / "a.txt"), letters(), 16, max_tokens=1).train_nt) >= 1


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([3, 300, 4], "has the token id 300, but the dense model has 258 tokens; tokenize it with the model's own "),
        ([3, -100, 4], "has the token id -100, but ids start at 0; tokenize it with the model's own tokenizer"),
        ([3, 1.5, 4], "has input_ids that are not whole numbers ("),
        ([3, "4", 4], "has input_ids that are not whole numbers ("),
        ([[3], [4]], "has input_ids that are not whole numbers ("),
        ([3, 2**40], "has input_ids that are not whole numbers ("),
    ],
    ids=str,
)
def test_token_ids_that_the_model_does_not_have(ids: list[Any], reason: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1] * 20}, {"input_ids": ids}])
    assert refusal(source, dense=tiny_gpt2()).startswith(f"data {source!r} {reason}")


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="the data is text, but the model has no tokenizer; give the model a tokenizer that"):
        load_blocks(str(tmp_path / "a.txt"), None, 4)


# -- text sampled from the dense model --------------------------------------------------------------------------------------


def tiny_gpt2(**options: Any) -> GPT2LMHeadModel:
    """Random, sharp enough that its next token is anything but uniform, and with generation settings that must not matter."""
    torch.manual_seed(0)
    shape = {"vocab_size": 258, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 9, "eos_token_id": 9}
    model = GPT2LMHeadModel(GPT2Config(**{**shape, **options})).eval()
    for parameter in model.parameters():
        parameter.data.mul_(10)
    assert model.generation_config is not None
    model.generation_config.repetition_penalty, model.generation_config.top_k = 50.0, 1
    return model


def test_sampling_is_deterministic_and_leaves_the_global_random_state_alone() -> None:
    model = tiny_gpt2()
    state = torch.get_rng_state()
    first, again, other = (load_blocks("self", letters(), 12, max_tokens=1000, seed=seed, dense=model) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.train_nt, again.train_nt)
    assert not torch.equal(first.train_nt, other.train_nt)
    said: list[str] = []
    told = load_blocks("self", letters(), 12, max_tokens=1000, dense=model, progress=lambda phase: said.append(str(phase)))
    assert torch.equal(told.train_nt, first.train_nt)
    assert said[0] == "data: self, 12 tokens sampled, 1,000 at most" and len(said) == 84
    assert 1000 <= first.train_nt.numel() + first.heldout_nt.numel() <= 1012
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
def test_every_block_is_one_sample_from_the_beginning_of_text(bos: bool) -> None:
    """At a temperature of almost 0 a sample is the likeliest continuation, here found without a cache and without `generate`."""
    model = tiny_gpt2()
    model.transformer.ln_f.weight.data.mul_(1e4)
    blocks = load_blocks("self", letters(bos=bos), 12, max_tokens=300, dense=model)
    expected_bt = torch.tensor([[BEGIN]])
    with torch.no_grad():
        while expected_bt.shape[1] < 12:
            next_b = model(expected_bt).logits[:, -1].argmax(-1)
            expected_bt = torch.cat([expected_bt, next_b[:, None]], 1)
    for block_nt in (blocks.train_nt, blocks.heldout_nt):
        assert len(block_nt) and torch.equal(block_nt.long(), expected_bt.expand(len(block_nt), -1))


def test_sampling_follows_the_models_probabilities() -> None:
    """The first sampled token, against the model's own distribution: a chi-squared test of its likeliest tokens and the rest."""
    model = tiny_gpt2()
    blocks = load_blocks("self", None, 2, max_tokens=4096, dense=model)
    sampled_n = torch.cat([blocks.train_nt, blocks.heldout_nt])
    assert (sampled_n[:, 0] == 9).all()  # the model's own beginning of text, where there is no tokenizer
    with torch.no_grad():
        probability_v = model(torch.tensor([[9]])).logits[0, -1].softmax(-1)
    likeliest = probability_v.argsort(descending=True)[:6]
    expected = torch.cat([probability_v[likeliest], 1 - probability_v[likeliest].sum(0, keepdim=True)]) * len(sampled_n)
    count_v = sampled_n[:, 1].long().bincount(minlength=258)
    counts = torch.cat([count_v[likeliest], len(sampled_n) - count_v[likeliest].sum(0, keepdim=True)])
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # 6 degrees of freedom: one seed in a thousand exceeds it


def test_sampling_needs_a_model() -> None:
    assert refusal("self").startswith("data 'self' samples from the dense model, and none was given")
