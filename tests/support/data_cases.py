"""What tests share: data_cases."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bridge.data.blocks import DataError, load_blocks
from bridge.data.corpora import open_corpus

END, BEGIN = 0, 1


def letters(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte, which puts BEGIN before a text or does not."""
    alphabet = ["<end>", "<begin>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", BEGIN)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>")


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refusal(source: str | Path, tokenizer: Any = None, **options: Any) -> str:
    """The one line with which a corpus is refused."""
    with pytest.raises(DataError) as caught:
        load_blocks(str(source), tokenizer or letters(), options.pop("context", 4), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def documents(source: str, seed: int = 0) -> Iterator[str]:
    """The texts of a corpus."""
    for kind, value in open_corpus(source, seed).pieces:
        if kind == "text":
            yield value
