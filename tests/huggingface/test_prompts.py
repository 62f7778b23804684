"""Text to tokens: prefix and body everywhere, tokens by names that are read back, and what is refused, in one line."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import CONTEXT, VOCABULARY, tiny_gpt2, tiny_tokenizer, untrained
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from bridge.data.blocks import load_blocks
from bridge.data.task_pairs import Example, Task, TaskError
from bridge.data.task_tokens import resolve
from bridge.explanations.build import explain
from bridge.explanations.parts import Answered
from bridge.explanations.text import render_answer
from bridge.huggingface.prompts import PromptError, Prompts
from bridge.models.bridges import CoupledModels
from bridge.models.dense import DenseModel, load_dense
from bridge.steering.curves import steer
from bridge.steering.figure import render_steering

SOURCE = Path(__file__).parents[2] / "bridge"
PROMPTS = ("x = 1", "the cat", "the cat ", "<s>", "def f(self):\n    ", "\u4e2d\u6587")


def corpus() -> list[str]:
    lines = [line for path in sorted(SOURCE.rglob("[a-e]*.py")) for line in path.read_text(encoding="utf-8").splitlines()]
    return [*lines, *["na\u00efve caf\u00e9 \u4e2d\u6587 \u2603 a=b = == The cats"] * 3]


def trained(model: Any, trainer: Any, decoder: Any, *, added: str = "$A", normalizer: Any = None, split: Any = None) -> Tokenizer:
    tokenizer: Any = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, split, decoder
    tokenizer.train_from_iterator(corpus(), trainer)
    around = [word for word in added.split() if word != "$A"]
    special = [(word, tokenizer.token_to_id(word)) for word in around]
    tokenizer.post_processor = processors.TemplateProcessing(single=added, special_tokens=special)
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained(models.BPE(), trainer, decoders.ByteLevel(), split=split), eos_token="<|end|>"
    )


def llama(scheme: str) -> PreTrainedTokenizerFast:
    """Llama 2's kind: spaces as marks, one put before a text by `scheme`, bytes to fall back on, BOS before and EOS behind."""
    decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, limit_alphabet=90, max_token_length=8, show_progress=False
    )
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer: Any = trained(model, trainer, decoder, added="<s> $A </s>", split=pre_tokenizers.Metaspace())
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = values["added_tokens"][:3]  # bytes are pieces like others
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's other kind, with GLM's prefix of two tokens, neither of them BOS."""
    special = ["<unk>", "<s>", "</s>", "[gMASK]", "<sop>"]
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer = trained(
        models.Unigram(), trainer, decoders.Metaspace(), added="[gMASK] <sop> $A", normalizer=normalizers.NFKC(),
        split=pre_tokenizers.Metaspace(),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: lowercased, ## where a word goes on."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer = trained(
        models.WordPiece(unk_token="[UNK]"), trainer, decoders.WordPiece(cleanup=True), added="[CLS] $A [SEP]",
        normalizer=normalizers.BertNormalizer(lowercase=True), split=pre_tokenizers.BertPreTokenizer(),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def end_of_word() -> PreTrainedTokenizerFast:
    """The first GPT's kind: </w> where a word ends."""
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )  # fmt: skip
    tokenizer = trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), trainer, decoders.BPEDecoder("</w>"),
        normalizer=normalizers.BertNormalizer(lowercase=True), split=pre_tokenizers.BertPreTokenizer(),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KINDS = {
    "byte-level": byte_level,
    "Llama 2, first": lambda: llama("first"),
    "Llama 2, always": lambda: llama("always"),
    "Llama 2, never": lambda: llama("never"),
    "Llama 2, legacy": lambda: llama("legacy"),
    "unigram": unigram,
    "WordPiece": wordpiece,
    "end of word": end_of_word,
    "words": tiny_tokenizer,
    "bytes, in Python": ByT5Tokenizer,
}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture
def kind(request: pytest.FixtureRequest, made: dict[str, Any]) -> Any:
    """A tokenizer, of each kind one for all tests."""
    if request.param not in made:
        made[request.param] = KINDS[request.param]()
    return made[request.param]


def of_kinds(*names: str) -> Any:
    return pytest.mark.parametrize("kind", names or KINDS, indirect=True)


# -- names ------------------------------------------------------------------------------------------------------------------


@of_kinds()
def test_what_is_printed_is_taken_back_as_the_same_token(kind: Any) -> None:
    tokenizer = copy.deepcopy(kind)
    tokenizer.add_tokens(["<tool>", "#5", "two words"])
    size = len(tokenizer) + 3  # a model's vocabulary is often padded
    prompts = Prompts(tokenizer, size)
    names = [prompts.text(token) for token in range(size)]
    assert len(set(names)) == size
    for prompt in PROMPTS:
        assert [prompts.target(name, prompt) for name in names] == [*range(size)]
    assert [prompts.target(f"#{token}", "a") for token in range(size)] == [prompts.target(i, "a") for i in range(size)]
    assert "#5" not in names or names.index("#5") == 5  # the token that is written so has another name
    assert names[-3:] == [f"#{size - 3}", f"#{size - 2}", f"#{size - 1}"]


@of_kinds("Llama 2, first", "Llama 2, always", "Llama 2, legacy")
def test_pieces_are_named_by_their_own_text(kind: Any) -> None:
    """Every piece by what SentencePiece means by it; a byte that has a piece, too, by its spelling."""
    prompts, pieces = Prompts(kind), kind.get_vocab()
    for piece, token in pieces.items():
        byte = re.fullmatch("<0x(..)>", piece)
        if byte is None:
            assert prompts.text(token) == piece.replace("\u2581", " ")
        else:
            assert prompts.text(token) in (piece, chr(int(byte[1], 16)))
    assert prompts.text(pieces["="]) == "=" and prompts.text(pieces["<0x3D>"]) == "<0x3D>"
    assert prompts.target("=", "x") == pieces["="] and prompts.target(" =", "x") == pieces["\u2581="]
    assert prompts.text(pieces["<0x0A>"]) == "\n"


def test_part_of_a_character_has_no_text() -> None:
    prompts, alphabet = Prompts(byte_level()), pre_tokenizers.ByteLevel.alphabet()
    ids: dict[str, int] = prompts.tokenizer.get_vocab()  # pyright: ignore[reportOptionalMemberAccess]
    cent = ids["\u00a2"]  # how the byte A2 is spelled, which is part of many characters and not the cent sign's text
    assert "\u00a2" in alphabet and prompts.text(cent) == f"#{cent}"
    with pytest.raises(PromptError, match=rf"target '\u00a2' is 2 tokens .* give the #id of the token meant: #{cent}"):
        prompts.target("\u00a2", "x")


@of_kinds("byte-level", "Llama 2, first", "unigram", "WordPiece", "end of word")
def test_a_text_that_is_no_name_is_taken_where_it_stands(kind: Any) -> None:
    """Against the tokenizer itself: the prompt with the text behind it."""
    prompts = Prompts(kind)

    def plain(text: str) -> list[int]:
        return kind(text, add_special_tokens=False)["input_ids"]

    taken = 0
    for prompt in PROMPTS[:3]:
        for said in ("s", " s", "S", "=", " =", "The", " The", " the", "self", " self", "\n", ")", "1"):
            try:
                token = prompts.target(said, prompt)
            except PromptError as error:
                assert "\n" not in str(error)
                continue
            there, alone = plain(prompt + said), plain(prompt)
            assert prompts.text(token) == said or there == [*alone, token]
            taken += prompts.text(token) != said
    assert taken or not isinstance(kind.backend_tokenizer.normalizer, normalizers.BertNormalizer)  # S is taken as s


def test_what_goes_on_in_a_word_is_not_what_begins_one() -> None:
    prompts = Prompts(wordpiece())
    ids: dict[str, int] = prompts.tokenizer.get_vocab()  # pyright: ignore[reportOptionalMemberAccess]
    within, begins = ids["##s"], ids["s"]
    assert (prompts.text(within), prompts.text(begins)) == ("##s", " s")
    assert prompts.target("S", "the cat") == within and prompts.target("s", "the cat ") == begins  # the place decides
    assert prompts.target(" s", "the cat") == begins and prompts.target("##s", "the cat.") == within


def test_an_escape_is_taken_as_the_character_that_it_is_printed_for() -> None:
    prompts = Prompts(byte_level())
    assert prompts.target("\\n", "x") == prompts.target("\n", "x")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("", "target '' is 0 tokens (none), but only a single token can be explained; give a single token"),
        (
            "w5 w6",
            "target 'w5 w6' is 2 tokens ('w5' 'w6'), but only a single token can be explained; give a single token, such as 'w5'",
        ),
        ("zebra", "target 'zebra' is not in the dense model's vocabulary; give one of its tokens"),
        ("\ud800", r"target '\ud800' has '\ud800', which is not a character of UTF-8 text; give one token in UTF-8"),
        ("#40", "target #40 is not a token of the dense model; give an id from 0 to 39"),
        (40, "target 40 is not a token of the dense model; give an id from 0 to 39"),
        (-1, "target -1 is not a token of the dense model; give an id from 0 to 39"),
        ("<new>", "target <new> is not a token of the dense model; give an id from 0 to 39"),
    ],
)
def test_what_names_no_token_is_refused_in_one_line(said: str | int, message: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(PromptError) as error:
        Prompts(tokenizer, VOCABULARY).target(said, "w5 w6")
    assert str(error.value) == message


def test_a_refusal_names_what_may_be_meant() -> None:
    prompts = Prompts(wordpiece())
    ids: dict[str, int] = prompts.tokenizer.get_vocab()  # pyright: ignore[reportOptionalMemberAccess]
    said = f"give the #id of the token meant: ' coupling' (#{ids['coupling']})"
    with pytest.raises(PromptError, match=re.escape(said)):
        prompts.target("coupling", "the cat")


# -- prefix and body --------------------------------------------------------------------------------------------------------


@of_kinds()
def test_a_text_has_what_the_tokenizer_puts_before_it_and_nothing_behind(kind: Any) -> None:
    prompts = Prompts(kind)
    whole: list[int] = kind("the cat")["input_ids"]
    behind = [kind.convert_tokens_to_ids(word) for word in ("</s>", "[SEP]") if word in kind.get_vocab()]
    (read,) = prompts.encode(["the cat"])
    assert read == (whole[:-1] if whole[-1] in behind else whole)
    assert prompts.read("the cat", 99) == read if set(read) - set(kind.all_special_ids) else True
    assert tuple(read[: len(prompts.prefix)]) == prompts.prefix


def test_a_prefix_that_the_text_brings_along_is_not_doubled() -> None:
    prompts = Prompts(llama("first"))
    with_own = prompts.encode(["<s>the cat", "<s> the cat"])
    assert all(row.count(1) == 1 for row in with_own)
    assert [row[0] for row in with_own] == [1, 1]


def around(single: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with tokens around every text."""
    tokenizer = tiny_tokenizer()
    words = {word: tokenizer.convert_tokens_to_ids(word) for word in single.split() if word != "$A"}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[*words.items()])
    return tokenizer


class StopError(Exception):
    pass


def answered(coupling: CoupledModels, prompt: str, **arguments: Any) -> Answered:
    """What an explanation begins with."""
    found: list[Any] = []

    def stage(known: Any) -> None:
        found.append(known)
        raise StopError

    with pytest.raises(StopError):
        explain(coupling, prompt, stage=stage, **arguments)
    return found[0]


def with_text(dense: DenseModel) -> CoupledModels:
    reference_bt = torch.randint(2, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(5))
    return replace(untrained(dense), reference_bt=reference_bt)


@pytest.mark.parametrize(("single", "before"), [("$A <end>", []), ("w2 w3 $A", [2, 3]), ("w4 $A <end>", [4])])
def test_every_way_to_the_model_has_the_same_prefix(single: str, before: list[int], tmp_path: Path) -> None:
    model, tokenizer = tiny_gpt2(), around(single)
    dense = load_dense(model, tokenizer=tokenizer)
    coupling, tokens = with_text(dense), [*before, 5, 6, 7]
    with torch.no_grad():
        best: list[int] = model(torch.tensor([tokens])).logits[0, -1].topk(5).indices.tolist()

    explained = answered(coupling, "w5 w6 w7")
    assert [token.id for token in explained.tokens] == tokens and [each.token.id for each in explained.dense] == best
    steered = steer(coupling, "w5 w6 w7", ["0.v[5]=1"], strengths=(1,), tokens=1, draws=1)
    assert [token.id for token in steered.tokens] == tokens and steered.curve[0].dense[0].token.id == best[0]
    assert steered.curve[0].text == f" {tokenizer.decode(best[:1])}"

    example = Example("w5 w6 w7", "w5 w6 w8", (" w9",), (" w10",))
    task = Task("one", "user", "", {"test": (example,)}, {"test": 1})
    pairs = resolve(task, dense.prompts, splits=("test",)).splits["test"]
    assert pairs.prompt_bt.tolist() == [tokens] and pairs.answer_bk.tolist() == [[9]]

    file = tmp_path / "text.txt"
    file.write_text("w5 w6 w7 w8 w9 " * 30)
    for source in (str(file), "self"):
        blocks = load_blocks(source, dense.prompts, 8, dense=dense.model, max_tokens=200)
        for rows_bt in (blocks.train_nt, blocks.heldout(9)):  # reference text is held-out text
            assert rows_bt[:, : len(before)].tolist() == [before] * len(rows_bt)
        if source != "self":
            body = blocks.train_nt[0, len(before) :].tolist()
            assert body == [5 + place % 5 for place in range(8 - len(before))]


def test_text_sampled_from_the_model_goes_on_from_the_whole_prefix() -> None:
    model, tokenizer = tiny_gpt2(), around("w2 w3 $A")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so sharp that one token follows
    rows = load_blocks("self", Prompts(tokenizer, VOCABULARY), 6, dense=model, max_tokens=400).train_nt
    first_v = torch.bincount(rows[:, 2].long(), minlength=VOCABULARY) / len(rows)
    with torch.no_grad():
        wanted_v = model(torch.tensor([[2, 3]])).logits[0, -1].softmax(-1)
    assert float((first_v - wanted_v).abs().max()) < 0.2


def test_a_context_with_no_room_behind_the_prefix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w5 " * 99)
    with pytest.raises(
        ValueError,
        match="a context of 2 has no room for text, because the tokenizer puts 2 tokens before it; give a longer context",
    ):
        load_blocks(str(tmp_path / "a.txt"), around("w2 w3 $A"), 2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty; give the text whose next token is to be explained"),
        ("  \n", "the prompt is empty; give the text whose next token is to be explained"),
        ("<end>", "the prompt is empty except for '<end>'; give the text whose next token is to be explained"),
        (" ".join(["w5"] * 16), "the prompt is 17 tokens long, but the context is 16; give only its last part"),
    ],
)
def test_prompts_that_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(PromptError) as error:
        Prompts(around("w4 $A <end>"), VOCABULARY).read(prompt, CONTEXT)
    assert str(error.value) == message


# -- what the model does not have, and tokenizers that cannot be read -------------------------------------------------------


def test_ids_beyond_the_models_are_refused_everywhere(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    dense = load_dense(tiny_gpt2(), tokenizer=tokenizer)
    coupling = with_text(dense)
    message = (
        "the text has '<new>' (#40), but the dense model 'GPT2LMHeadModel' has only the ids 0 to 39: tokens were added to the "
        "tokenizer alone; resize the model's embeddings (resize_token_embeddings), or leave out the token"
    )
    example = Example("w5 <new>", "w6 <new>", (" w9",), (" w10",))
    task = Task("one", "user", "", {"test": (example,)}, {"test": 1})
    (tmp_path / "a.txt").write_text("w5 w6 <new> " * 99)
    ways = [
        lambda: explain(coupling, "w5 <new>"),
        lambda: steer(coupling, "w5 <new>", ["0.v[5]=1"]),
        lambda: resolve(task, dense.prompts, splits=("test",)),
        lambda: load_blocks(str(tmp_path / "a.txt"), dense.prompts, 8, dense=dense.model),
        lambda: load_blocks(str(tmp_path / "a.txt"), tokenizer, 8, dense=dense.model),
    ]
    for way in ways:
        with pytest.raises((PromptError, TaskError)) as error:
            way()
        assert str(error.value).replace("the model has", "the dense model 'GPT2LMHeadModel' has").endswith(message)
        assert "\n" not in str(error.value)
    assert answered(coupling, "w5 w6").tokens[0].id == 5  # what the model has is read as before


def test_a_prefix_or_an_end_that_the_model_does_not_have() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<new> $A", special_tokens=[("<new>", 40)])
    with pytest.raises(
        PromptError, match=r"the prefix of its tokenizer has '<new>' \(#40\), but the model has only the ids 0 to"
    ):
        Prompts(tokenizer, VOCABULARY).read("w5", 9)
    ends = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, unk_token="<unk>", eos_token="<new>")
    with pytest.raises(
        PromptError, match=r"the end token of its tokenizer is '<new>' \(#40\), but the model has only the ids 0 to 39: "
    ):
        _ = Prompts(ends, VOCABULARY).end


def damages() -> Iterator[tuple[str, Any, str]]:
    yield "cut short", lambda text: text[:100], "JSONDecodeError: "
    yield "a pointer", lambda _: "version https://git-lfs.github.com/spec/v1\n", "JSONDecodeError: Expecting value"
    yield "another model", lambda text: text.replace('"WordLevel"', '"Foreign"'), "Exception: data did not match any variant"
    yield "no tokens", lambda _: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str(), "no tokens except special ones"


@pytest.mark.parametrize(("damage", "reason"), [(each[1], each[2]) for each in damages()], ids=[each[0] for each in damages()])
def test_a_damaged_tokenizer_is_said_where_one_is_needed(damage: Any, reason: str, dense_folder: Path, tmp_path: Path) -> None:
    for file in dense_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "tokenizer.json"
    file.write_text(damage(file.read_text()))
    config = tmp_path / "tokenizer_config.json"
    if reason.startswith("no tokens"):
        config.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "a"}))
    dense = load_dense(tmp_path)  # the model itself is sound
    assert dense.tokenizer is None and dense.prompts.missing is not None
    (tmp_path / "a.txt").write_text("w5 " * 99)
    ways = [
        lambda: explain(with_text(dense), "w5"),
        lambda: resolve(Task("one", "user", "", {"test": ()}, {"test": 1}), dense.prompts, splits=("test",)),
        lambda: load_blocks(str(tmp_path / "a.txt"), dense.prompts, 8),
        lambda: load_blocks("self", dense.prompts, 8, dense=dense.model),  # what stands before a text is not known
    ]
    for way in ways:
        with pytest.raises((PromptError, TaskError), match="repair its files, or load the model with another tokenizer") as error:
            way()
        assert f"the tokenizer of the dense model {str(tmp_path)!r} cannot be read (" in str(error.value)
        assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapters_own_tokenizer_is_not_passed_over_where_it_is_damaged(dense_folder: Path, tmp_path: Path) -> None:
    import peft

    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_gpt2(), lora).save_pretrained(str(tmp_path))
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_dense(dense_folder, adapter=tmp_path).prompts.missing is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(
        PromptError, match=r"cannot be read \(JSONDecodeError: .*\); repair its files, or load the model with another tokenizer"
    ):
        load_dense(dense_folder, adapter=tmp_path).prompts.read("w5", 9)


def test_a_model_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    dense = load_dense(tmp_path)
    assert dense.tokenizer is None and dense.prompts.missing == f"the dense model {str(tmp_path)!r} has no tokenizer"
    assert dense.prompts.prefix == () and dense.prompts.text(7) == "#7"


# -- what is said -----------------------------------------------------------------------------------------------------------


def test_which_token_was_taken_is_said(dense: DenseModel) -> None:
    coupling = with_text(dense)
    for target in ("w7", "#7", 7):
        explained = answered(coupling, "w5 w6", target=target, contrast="w8")
        assert explained.contrast is not None
        assert (explained.answer.id, explained.answer.text, explained.contrast.id) == (7, "w7", 8)
        assert "why 'w7' (#7) rather than 'w8' (#8)" in " ".join(render_answer(explained).split())
    steered = steer(coupling, "w5 w6", ["0.v[5]=1"], target="#7", contrast="w8", strengths=(1,), tokens=0, draws=1)
    assert "question        'w8' (#8) against 'w7' (#7)" in render_steering(steered)


def test_a_users_text_is_put_into_the_chat_template() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for turn in messages %}[{{ turn['role'] }}] {{ turn['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prompts = Prompts(tokenizer)
    text = prompts.chat("x = 1")
    assert text == "[user] x = 1<|end|>[assistant]"
    assert prompts.decode(prompts.read(text, 64)) == text and tokenizer.eos_token_id in prompts.read(text, 64)
    tokenizer.chat_template = "{{ raise_exception('only two turns') }}"
    with pytest.raises(PromptError, match=r"rejects the text \(only two turns\); leave out chat="):
        prompts.chat("x")
    with pytest.raises(PromptError, match="has no chat template; leave out chat="):
        Prompts(byte_level()).chat("x")
