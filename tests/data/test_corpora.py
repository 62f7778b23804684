"""Corpora as people have them: each kind of file, row, folder and data set is read as its own loader reads it, or refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from support.data_cases import BEGIN, END, letters, refusal, write_jsonl

from bridge.data.blocks import load_blocks
from bridge.data.corpora import documents, open_corpus

TEXTS = ["one, two\n", 'a "quoted" word', "tw\u00f6\r\nlines\tand a tab", "NA", "2024-01-01", "7"]


def write_table(path: Path, columns: dict[str, list[Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


def write_folder(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def line(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


def refused(source: str | Path) -> str:
    """The one line with which reading a source's documents is refused."""
    return refusal(source, context=8).partition(repr(str(source)))[2].strip()


@pytest.fixture(autouse=True)
def _nothing_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whatever is read leaves nothing in the cache of `datasets`."""
    cache = tmp_path.parent / f"{tmp_path.name}-cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(cache))
    yield
    assert not cache.exists()


# -- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("A.CSV", ",")])
def test_tables_are_records(name: str, delimiter: str, tmp_path: Path) -> None:
    """As `datasets` reads them, but that a text which looks like a number, a date or nothing is text."""
    path = write_table(tmp_path / name, {"id": list(range(6)), "content": TEXTS}, delimiter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        rows = datasets.load_dataset("csv", data_files=str(path), split="train", streaming=True, sep=delimiter, na_filter=False)
        assert list(documents(str(path))) == [str(row["content"]) for row in rows] == TEXTS


@pytest.mark.parametrize("kind", ["txt", "jsonl", "ndjson", "json", "csv"])
@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
def test_packed_files_are_what_is_in_them(kind: str, packed: str, tmp_path: Path) -> None:
    if kind == "csv":
        plain = write_table(tmp_path / "a.csv", {"text": TEXTS})
    else:
        plain = tmp_path / f"a.{kind}"
        plain.write_text("text" if kind == "txt" else json.dumps(TEXTS) if kind == "json" else "".join(map(line, TEXTS)))
    path = tmp_path / f"packed.{kind}.{packed}"
    if packed == "zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(plain.read_bytes())
    else:
        pack: Callable[[bytes], bytes] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[packed]
        path.write_bytes(pack(plain.read_bytes()))
    assert list(documents(str(path))) == list(documents(str(plain))) == (["text"] if kind == "txt" else TEXTS)
    if kind == "jsonl":
        path.write_bytes(path.read_bytes()[:-12])
        assert refused(path).startswith("cannot be unpacked (")


def test_json_is_one_value_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"text": text} for text in TEXTS]
    for content in (
        "".join(map(line, TEXTS)),
        "\n" + "\n".join(map(line, TEXTS)),
        "".join(json.dumps(text) + "\n" for text in TEXTS),
        json.dumps(rows),
        json.dumps(rows, indent=2),
    ):
        path.write_text(content)
        assert list(documents(str(path))) == TEXTS
    path.write_text(json.dumps({"text": "one"}, indent=2))
    assert list(documents(str(path))) == ["one"]
    path.write_text(line("a") + "\n{")
    assert refused(path).startswith("is not JSON lines (Expecting property name")
    assert "line 3" in refused(path)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_of_both_formats(kind: str, tmp_path: Path) -> None:
    table = pa.table({"picture": [b"\xff"] * 6, "content": pa.array(TEXTS, pa.large_string())})
    writer = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with writer(str(tmp_path / "a.arrow"), table.schema) as out:
        for batch in table.to_batches(max_chunksize=4):
            out.write(batch)
    assert list(documents(str(tmp_path / "a.arrow"))) == TEXTS


# -- rows ---------------------------------------------------------------------------------------------------------------


def test_the_column_that_is_filled_is_taken_row_by_row(tmp_path: Path) -> None:
    names = ("text", "content", "code", "document")
    filled = [("a", "not this"), (None, "b"), (" ", None, "c"), (None, "", None, "d")]
    rows = [dict(zip(names, (*values, None, None, None), strict=False)) for values in filled]
    assert [text for text in documents(write_jsonl(tmp_path / "a.jsonl", rows)) if text] == ["a", "b", "c", "d"]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    assert [text for text in documents(str(tmp_path / "a.parquet")) if text] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": ["a", "b"]}, "has a list of strings in its column 'text'; store one text per row"),
        ({"text": [{"a": 1}]}, "has a list in its column 'text'; store one text per row"),
        ({"content": {"parts": ["a"]}}, "has a nested value in its column 'content'; store one text per row"),
        ({"messages": "Hello"}, "has a message without role or content; give each message both"),
        ({"messages": [{"role": "user"}]}, "has a message without role or content; give each message both"),
        ({"input_ids": "1 2 3"}, "has input_ids that are not whole numbers (a text); tokenize it again"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "has 2 input_ids and an attention_mask of length 1; tokenize it again"),
        ({"instruction": "a", "output": "b"}, "has no text column (found: instruction, output); rename a column to text, "),
    ],
)
def test_rows_that_are_no_text_say_why(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert refused(write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, row])).startswith(reason)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"text\nhello, world\n", "is not CSV (more fields than the first line has names: line 2)"),
        ("a.csv", b'text\n"open\n', "is not CSV (unexpected end of data: line "),
        ("a.csv", b"text;label\na;1\n", "has no text column (found: text;label); rename a column to "),
        ("a.csv", b"text\ncaf\xe9\n", "is not UTF-8 text; convert it, or give jsonl or parquet"),
        ("a.zip", b"PK\x03\x04", "is an archive; unpack it, and name the unpacked file"),
        ("a.tar.gz", b"\x1f\x8b", "is an archive; unpack it, and name the unpacked file"),
        ("a.parquet.gz", b"\x1f\x8b", "is an archive; unpack it, and name the unpacked file"),
        ("a.txt.gz", b"plain", "cannot be unpacked (Not a gzipped file"),
        ("a.arrow", b"nothing of the kind", "is not a readable arrow file ("),
        (
            "a.txt",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "is a pointer to a file that was not fetched; run `git lfs pull`",
        ),
    ],
)
def test_files_that_are_none(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).startswith(reason)


# -- chat ---------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'odd' %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{{ eos_token }}"
)


@pytest.mark.parametrize("form", ["messages", "conversations", "by columns"])
@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
def test_chats_are_written_out_by_the_tokenizers_template(form: str, bos: bool, tmp_path: Path) -> None:
    tokenizer = letters(bos=bos)
    tokenizer.chat_template = TEMPLATE
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(60)]
    rows: list[dict[str, Any]] = [{"id": n, "messages": chat, "text": None} for n, chat in enumerate(chats)]
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        rows = [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]} for chat in chats]
    elif form == "by columns":
        rows = [{"messages": {key: [m[key] for m in chat] for key in ("role", "content")}} for chat in chats]
    blocks = load_blocks(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, 12)
    stream: list[int] = []
    for n, chat in enumerate(chats):
        ids: Any = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert ids[0] == BEGIN and ids[-1] == END
        if n != 49:  # held out
            stream += ids[1:] if bos else ids  # what each block begins with is not within it too
    body = 11 if bos else 12
    whole = [[BEGIN] * bos + stream[at : at + body] for at in range(0, len(stream) - body + 1, body)]
    assert blocks.train_nt.tolist() == whole


def test_chats_that_cannot_be_written_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "odd", "content": "a"}]}])
    assert refused(path) == "is chat, but the model's tokenizer has no chat template; give it as text"
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    assert refusal(path, tokenizer).endswith("has a chat that the tokenizer's template rejects (no such role); remove the chat")


# -- folders ------------------------------------------------------------------------------------------------------------

CARD = "---\nlicense: mit\ntask_categories:\n- text-generation\n---\n# About these data\n"


def read(source: str | Path) -> tuple[list[str], str]:
    """The documents of a source, sorted, and what is left out."""
    corpus = open_corpus(str(source))
    return sorted(value for _, value in corpus.pieces), corpus.left_out


@pytest.mark.parametrize(
    ("files", "texts", "left_out"),
    [
        (  # a clone from a hub
            {
                "README.md": CARD,
                "LICENSE.txt": "no text",
                ".gitattributes": "*.parquet filter=lfs",
                "dataset_infos.json": "{}",
                "data/train-00000-of-00002.jsonl": line("a"),
                "data/train-00001-of-00002.jsonl": line("b"),
                "data/validation-00000-of-00001.jsonl": line("v"),
                "data/test-00000-of-00001.jsonl": line("t"),
            },
            ["a", "b"],
            "splits validation, test",
        ),
        (  # whose card says which files are of which split
            {
                "README.md": "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: some/*\n"
                "  - split: dev\n    path: more/x.csv\n---\n",
                "some/x.csv": "text\na\n",
                "more/x.csv": "text\nv\n",
            },
            ["a"],
            "split dev",
        ),
        ({"README.md": CARD, "train.txt": "a", "valid.txt": "v", "test.txt": "t"}, ["a"], "splits validation, test"),
        # without a card
        ({"README.md": "# About", "LICENSE.md": "x", "data.jsonl": line("a"), "notes.md": "b"}, ["a", "b"], ""),
        ({"en/train.csv": "text\na\n", "en/test.csv": "text\nt\n", "make.py": "code"}, ["a"], "split test"),
        ({"train/1.jsonl": line("a"), "test/1.jsonl": line("t"), "eval.jsonl": line("v")}, ["a"], "split test"),
        ({"part-1.jsonl": line("a"), "part-2.jsonl": line("b"), "test.jsonl": line("t")}, ["a", "b"], "split test"),
        ({"wiki.train.txt": "a", "wiki.valid.txt": "v", "wiki.test.txt": "t"}, ["a"], "splits test, validation"),
        # text and code are what they were, whatever it is called
        ({"README.md": "r", "test.py": "t", "train.py": "a", "notes.txt": "n", "tests/a.py": "b"}, ["a", "b", "n", "r", "t"], ""),
        ({"README.md": "---\ntitle: notes\n---\nr", "penetration-test.txt": "t"}, ["---\ntitle: notes\n---\nr", "t"], ""),
        ({"latest.jsonl": line("a"), "contest.jsonl": line("b"), "retrain.jsonl": line("c")}, ["a", "b", "c"], ""),
    ],
)
def test_what_a_folder_is_to_be_trained_on(files: dict[str, str], texts: list[str], left_out: str, tmp_path: Path) -> None:
    assert read(write_folder(tmp_path / "set", files)) == (texts, left_out)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {"train.jsonl": line("a" * 99), "test.jsonl": line("b" * 99)})
    blocks = load_blocks(str(folder), letters(), 8)
    assert blocks.description.endswith("blocks of 8; left out: split test")
    seen = set(blocks.train_nt.flatten().tolist()) | set(blocks.heldout_nt.flatten().tolist())
    assert letters().get_vocab()["b"] not in seen
    assert read(folder / "test.jsonl") == (["b" * 99], "")  # what is named itself is meant


def test_a_data_set_of_several_configurations_is_asked_which(tmp_path: Path) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("en", "de"))
    folder = write_folder(
        tmp_path / "set", {"README.md": f"---\nconfigs:\n{configs}---\n", "en/a.jsonl": line("a"), "de/a.jsonl": line("b")}
    )
    assert refused(folder) == f"has the configurations en, de; name one, as in {folder}:en"
    assert read(f"{folder}:de") == (["b"], "")
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}  default: true\n---\n")
    assert read(folder) == (["b"], "")
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert refused(f"{folder}:fr") == f"has the configurations en, de; name one, as in {folder}:en"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {"README.md": CARD, "test.jsonl": line("a")},
            "has the splits test, but not exactly one to train on; name one of its files",
        ),
        ({"test.jsonl": line("a")}, "has only its split test, and nothing to train on; name one of its files to use it"),
        (
            {"README.md": CARD, "set.py": "code", "train.jsonl": line("a")},
            "is a data set that cannot be resolved (Dataset scripts are no longer supported, but found set.py); name one of its ",
        ),
        (
            {"README.md": "---\nconfigs:\n- config_name: x\n  data_files: gone/*\n---\n", "a.jsonl": line("a")},
            "is a data set that cannot be resolved (",
        ),
    ],
)
def test_data_sets_that_cannot_be_read(files: dict[str, str], reason: str, tmp_path: Path) -> None:
    assert refused(write_folder(tmp_path / "set", files)).startswith(reason)


def test_what_datasets_saved(tmp_path: Path) -> None:
    """Also one that was saved to give tensors, one that is a choice of rows, and of several splits that to train on."""
    table = Dataset.from_dict({"id": list(range(6)), "text": TEXTS})
    table.with_format("torch", columns=["id"]).save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one") == (sorted(TEXTS), "")
    table.select([4, 1]).save_to_disk(str(tmp_path / "some"))
    assert list(documents(str(tmp_path / "some"))) == [TEXTS[4], TEXTS[1]]
    DatasetDict({"train": table.select([0]), "test": table.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "splits") == ([TEXTS[0]], "split test")
    assert read(tmp_path / "splits" / "test") == ([TEXTS[1]], "")
    DatasetDict({"train_sft": table.select([2]), "test_sft": table.select([1])}).save_to_disk(str(tmp_path / "sft"))
    assert read(tmp_path / "sft") == ([TEXTS[2]], "split test_sft")
    DatasetDict({"a": table, "b": table}).save_to_disk(str(tmp_path / "two"))
    assert refused(tmp_path / "two") == "has the splits a, b, but not exactly one to train on; name the folder of one split"
    table.remove_columns("text").save_to_disk(str(tmp_path / "none"))
    assert refused(tmp_path / "none").startswith("has no text column (found: id); rename a column to ")
    shutil.rmtree(tmp_path / "splits" / "train")
    assert refused(tmp_path / "splits").startswith("is a saved data set that cannot be loaded (")


# -- rows of tokens -----------------------------------------------------------------------------------------------------


def blocks_of(rows: list[Any], tokenizer: Any, context: int, path: Path, **columns: list[Any]) -> list[list[int]]:
    """Trained on and held out, of rows of input_ids (or of texts)."""
    name = "text" if isinstance(rows[0], str) else "input_ids"
    Dataset.from_dict({name: rows, **columns}).to_parquet(str(path / "a.parquet"))
    blocks = load_blocks(str(path / "a.parquet"), tokenizer, context)
    return [*blocks.train_nt.tolist(), *blocks.heldout_nt.tolist()]


@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
def test_rows_of_the_contexts_length_are_blocks(bos: bool, tmp_path: Path) -> None:
    """As they are, whatever of BOS and end-of-text is in them; every 50th is held out."""
    rows = [[BEGIN, 2 + n % 200, END, BEGIN, 7, 2 + n % 100, 5, 9 + n % 3] for n in range(120)]
    found = blocks_of(rows, letters(bos=bos), 8, tmp_path)
    assert found == [row for n, row in enumerate(rows) if n not in (49, 99)] + [rows[49], rows[99]]


@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
def test_longer_packed_rows_are_cut_and_no_document_ends_with_them(bos: bool, tmp_path: Path) -> None:
    rows = [[BEGIN] * bos + [2 + (n * 7 + t) % 200 for t in range(24 - bos)] for n in range(40)]
    found = blocks_of(rows, letters(bos=bos), 8, tmp_path)
    if bos:  # each block is to begin with it
        stream = [token for row in rows for token in row[1:]]
        assert found[:100] == [[BEGIN, *stream[at : at + 7]] for at in range(0, 700, 7)]
    else:
        assert found == [row[at : at + 8] for row in rows for at in (0, 8, 16)]


@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["of its own", "end", "end, no mask", "of its own, no mask"])
def test_padding_is_no_text(bos: bool, side: str, pad: str, tmp_path: Path) -> None:
    """Rows that the tokenizer padded to the longest give what the same texts give."""
    tokenizer, texts = letters(bos=bos), [f"{'x' * (n % 9)} {n}" for n in range(70)]
    expected = blocks_of(texts, tokenizer, 16, tmp_path)
    if pad.startswith("end"):
        tokenizer.pad_token = "<end>"
    else:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    padded = tokenizer(texts, padding="max_length", max_length=14, padding_side=side)
    masks = {} if "no mask" in pad else {"attention_mask": padded["attention_mask"]}
    assert len(padded["input_ids"][0]) == 14
    assert blocks_of(padded["input_ids"], tokenizer, 16, tmp_path, **masks) == expected


def test_documents_bring_their_bos_and_end_once(tmp_path: Path) -> None:
    tokenizer, texts = letters(bos=True), [f"text {n}" for n in range(60)]
    rows = [[*row, END] for row in tokenizer(texts)["input_ids"]]
    assert rows[0][0] == BEGIN
    found = blocks_of(rows, tokenizer, 16, tmp_path)
    assert found == blocks_of(texts, tokenizer, 16, tmp_path)
    assert all(row.index(BEGIN) == 0 and row.count(BEGIN) == 1 for row in found)


def test_few_rows_hold_their_last_out(tmp_path: Path) -> None:
    rows = [[n + 2] * 8 for n in range(10)]
    assert blocks_of(rows, letters(), 8, tmp_path) == rows
    blocks = load_blocks(str(tmp_path / "a.parquet"), letters(), 8)
    assert blocks.heldout_nt.tolist() == rows[-1:]
    assert "holds 8 tokens; at least 16 are needed" in refusal(
        write_jsonl(tmp_path / "b.jsonl", [{"input_ids": [5] * 8}]), context=8
    )
