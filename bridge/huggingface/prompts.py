"""Text -> tokens, in one way for all tokenizers: the prefix of a text, the text's own tokens, and the token that a text names.

    prefix      the tokens that the tokenizer puts before a text: BOS, several tokens (GLM: [gMASK]<sop>), or none
    read        a prompt -> prefix and body, at most `context` long; tokens that the tokenizer puts after a text (EOS, SEP) are
                left out, because a prompt is to be continued
    text        a token -> its name: a text that means this token and no other
    target      a name, a text that continues a prompt, or #id -> the token

The prefix is found by tokenizing the same texts with and without added tokens. Ids are checked against the model's vocabulary.

A token's own text is the text that it adds when it continues another: decode(a, token) less decode(a). To see whether this text
can name the token, it is tokenized after a letter, after a digit and after a mark. Places where it is not one token, or changes
the tokens before it, are ignored; the others must all give this token. A name is thus read back by tokenizing it, and no two
tokens share one. Otherwise the token is named by its spelling in the tokenizer, if that is ASCII (##s, <0x41>) and no text of
another token. All other tokens (part of a character, a text that another token has) are named #id.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bridge.errors import UserError, first_line, reraise_as
from bridge.huggingface.gguf_file import find_gguf
from bridge.recipe import encoding_fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACES = ("a", "1", ".")  # the texts after which a name is tried
_PROBES = 8  # tokens of the vocabulary whose texts are used to find the prefix
_SHOWN = 8  # maximum number of tokens that an error lists
_NUMBER = re.compile(r"#([0-9]{1,18})")
_ESCAPE = re.compile(r"\\(?:[nrt\\'\"]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
_HUB_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


class PromptError(UserError):
    """Error for text that cannot be read as tokens of the dense model, or names none: one line that includes the remedy."""


class Prompts:
    """A tokenizer as bridge uses it, with the number of ids that its model has (None: not known).

    `name` is the model's; `damage` is the reason why an existing tokenizer could not be read. Methods that need a tokenizer raise
    PromptError if there is none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int | None = None, *, name: str = "", damage: str = ""
    ) -> None:
        self.tokenizer, self.vocabulary, self.damage = tokenizer, vocabulary, damage
        self._who = f"the dense model {name!r}" if name else "the model"
        self._texts: dict[int, str] = {}

    @classmethod
    def of(cls, given: Prompts | PreTrainedTokenizerBase | None, vocabulary: int | None = None) -> Prompts:
        """Return the given Prompts, or those of a tokenizer."""
        return given if isinstance(given, Prompts) else cls(given, vocabulary)

    @property
    def missing(self) -> str | None:
        """Reason why no text can be read, without the remedy; None if text can be read."""
        if self.tokenizer is not None:
            return None
        if self.damage:
            return f"the tokenizer of {self._who} cannot be read ({self.damage})"
        return f"{self._who} has no tokenizer"

    def check(self) -> None:
        """Raise PromptError if no text can be read."""
        self._require_tokenizer()

    # -- text to tokens -------------------------------------------------------------------------------------------------

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """Ids that the tokenizer puts before a text; () if there is no tokenizer. Raises PromptError if they cannot be found."""
        if self.tokenizer is None and not self.damage:
            return ()
        tokenizer: Any = self._require_tokenizer()
        ordinary = sorted(self._ids - self._added.keys())
        texts = ["a", "1 b.", *(self.decode([token]) for token in ordinary[:: 1 + len(ordinary) // _PROBES])]
        rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        pairs = [(row, body) for row, body in zip(rows, self._plain(texts), strict=True) if body]
        starts = [{at for at in range(len(row)) if row[at : at + len(body)] == body} for row, body in pairs]
        both = set.intersection(*starts) if starts else {0}
        prefixes = {tuple(row[: min(both)]) for row, _ in pairs} if both else set()
        if not both or len(prefixes) > 1:
            what = f"the tokenizer of {self._who} changes a text's own tokens when it adds special tokens"
            raise PromptError(what, remedy="give another tokenizer")
        prefix = prefixes.pop() if prefixes else ()
        self._check_vocabulary(prefix, "the prefix of its tokenizer has")
        return prefix

    @property
    def end(self) -> int | None:
        """Id of the token that ends a text; None if the tokenizer has none."""
        end: Any = getattr(self.tokenizer, "eos_token_id", None)
        if end is not None:
            self._check_vocabulary([end], "the end token of its tokenizer is")
        return end

    @property
    def special(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(self._require_tokenizer().all_special_ids)

    def bodies(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's own tokens, with none added before or after. Raises PromptError for an id that the model lacks."""
        rows = self._plain(texts)
        for row in rows:
            self._check_vocabulary(row, "the text has")
        return rows

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's tokens as the model receives them: the prefix, unless the text begins with it, and its own."""
        return [[*self._prefix_for(body), *body] for body in self.bodies(texts)]

    def read(self, prompt: str, context: int) -> list[int]:
        """Return a prompt's tokens. Raises PromptError if it is empty, longer than `context`, or not readable as text."""
        self.check()
        if fault := encoding_fault(prompt):
            raise PromptError("the prompt", fault, "give it in UTF-8")
        remedy = "give the text whose next token is to be explained"
        (body,) = self.bodies([prompt]) if prompt else [[]]
        if self.special.issuperset(body):
            but = f" except for {self._listed(body)}" if body else ""
            raise PromptError("the prompt", f"is empty{but}", remedy)
        tokens = [*self._prefix_for(body), *body]
        if len(tokens) > context:
            rule = f"is {len(tokens)} tokens long, but the context is {context}"
            raise PromptError("the prompt", rule, "give only its last part")
        return tokens

    def chat(self, text: str) -> str:
        """Return a user's text as the prompt that the model answers, by its chat template. Raises PromptError if that fails."""
        tokenizer: Any = self._require_tokenizer()
        if not tokenizer.chat_template:
            remedy = "leave out ‹chat›, or write the turns yourself"
            raise PromptError(f"the tokenizer of {self._who}", "has no chat template", remedy)
        turns = [{"role": "user", "content": text}]
        with reraise_as(PromptError, f"the chat template of {self._who}", "rejects the text", "leave out ‹chat›"):
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    # -- tokens to text -------------------------------------------------------------------------------------------------

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text, with special tokens and without any clean-up of spaces."""
        return str(self._require_tokenizer().decode(list(tokens), clean_up_tokenization_spaces=False))

    def continued(self, tokens: Sequence[int], more: Sequence[int]) -> str:
        """Return the text that `more` adds after `tokens`, with the space that many tokenizers drop at the start of a text."""
        head, whole = self.decode(tokens), self.decode([*tokens, *more])
        return whole.removeprefix(head) if whole.startswith(head) else self.decode(more)

    def text(self, token: int) -> str:
        """Return the text that names this token alone, and that `target` accepts; #id if there is none."""
        if token not in self._texts:
            self._texts[token] = self._name(token)
        return self._texts[token]

    # -- a text to the token that it names ------------------------------------------------------------------------------

    def target(self, given: str | int, prompt: str, role: str = "target") -> int:
        """Return the id of the token named by its text (as from `text`, or as a continuation of the prompt), or by #id.

        `role` is the token's name in errors. Raises PromptError if the text is not one token, with the tokens it may mean.
        """
        if isinstance(given, int) or _NUMBER.fullmatch(given):
            token = given if isinstance(given, int) else int(given[1:])
        else:
            self.check()
            if fault := encoding_fault(given):
                raise PromptError(f"{role} {given!r}", fault, "give one token in UTF-8")
            token = self._named(given)
            token = self._after_prompt(given, prompt) if token is None else token
            if token is None:  # tokens are printed with Python escapes such as \n: undo these
                token = self._named(_ESCAPE.sub(lambda match: ast.literal_eval(f'"{match[0]}"'), given))
            if token is None:
                raise self._ambiguity_error(given, prompt, role)
        if token < 0 or (self.vocabulary is not None and token >= self.vocabulary):
            remedy = "give an id of 0 or more" if self.vocabulary is None else f"give an id from 0 to {self.vocabulary - 1}"
            raise PromptError(f"{role} {given}", "is not a token of the dense model", remedy)
        return token

    def _named(self, text: str) -> int | None:
        """Return the token named by a text; None if there is none."""
        after = self._tokens_in_contexts(text)
        token: Any = after.pop() if len(after) == 1 else self._token_spelled(text)
        return token if token is not None and self.text(token) == text else None

    def _after_prompt(self, text: str, prompt: str) -> int | None:
        """Return the token that a text adds to the prompt; None unless it adds one known token and changes none of the prompt."""
        head, whole = self._plain([prompt, prompt + text])
        one = len(whole) == len(head) + 1 and whole[:-1] == head
        return whole[-1] if one and whole[-1] != self._require_tokenizer().unk_token_id else None

    def _ambiguity_error(self, given: str, prompt: str, role: str) -> PromptError:
        """Return the error for a text that names no token, with the tokens that it may mean."""
        unknown: Any = self._require_tokenizer().unk_token_id
        head, whole, alone = self._plain([prompt, prompt + given, given]) if given else ([], [], [])
        tokens = whole[len(head) :] if whole[: len(head)] == head and len(whole) > len(head) else alone
        if tokens and set(tokens) == {unknown}:
            return PromptError(f"{role} {given!r}", "is not in the dense model's vocabulary", "give one of its tokens")
        spaced = [self._named(f" {given}"), self._after_prompt(f" {given}", prompt)] if given else []
        meant: dict[int | None, None] = dict.fromkeys([self._token_spelled(given), *(alone if len(alone) == 1 else []), *spaced])
        near = [t for t in meant if t is not None and t != unknown and (self.vocabulary is None or t < self.vocabulary)]
        what, pieces = f"{role} {given!r}", f"is {len(tokens)} token{'' if len(tokens) == 1 else 's'} ({self._listed(tokens)})"
        if near:
            meanings = " or ".join(map(self._shown, near))
            remedy = f"give the #id of the token meant: {meanings}"
            return PromptError(what, f"{pieces}, not a single token after the prompt", remedy)
        such = f", such as {self.text(tokens[0])!r}" if tokens else ""
        return PromptError(what, f"{pieces}, but only a single token can be explained", f"give a single token{such}")

    # -- helpers --------------------------------------------------------------------------------------------------------

    def _require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            if self.damage:
                raise PromptError(self.missing, remedy="repair its files, or load the model with another tokenizer")
            raise PromptError(f"{self.missing},", "so no text can be read", "load the model with a tokenizer")
        return self.tokenizer

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        rows: Any = self._require_tokenizer()(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return rows

    def _prefix_for(self, body: Sequence[int]) -> tuple[int, ...]:
        """Return the prefix, or () if the text already begins with it, as the text of a chat template does."""
        return () if tuple(body[: len(self.prefix)]) == self.prefix else self.prefix

    def _check_vocabulary(self, tokens: Sequence[int], whose: str) -> None:
        """Raise PromptError for an id beyond the model's vocabulary."""
        if self.vocabulary is not None and tokens and (beyond := max(tokens)) >= self.vocabulary:
            rule = f"has only the ids 0 to {self.vocabulary - 1}: tokens were added to the tokenizer alone"
            remedy = "resize the model's embeddings (resize_token_embeddings), or leave out the token"
            raise PromptError(f"{whose} {self._shown(beyond)}, but {self._who}", rule, remedy)

    def _shown(self, token: int) -> str:
        return describe_token(self.text(token), token)

    def _listed(self, tokens: Sequence[int]) -> str:
        names = [repr(self.text(token)) for token in tokens[:_SHOWN]]
        return " ".join([*names, *(["..."] if len(tokens) > _SHOWN else [])]) or "none"

    @cached_property
    def _joins_with_spaces(self) -> bool:
        """Whether the tokenizer joins its tokens with spaces, so that a token that continues a text always follows a space."""
        backend: Any = getattr(self._require_tokenizer(), "backend_tokenizer", None)
        return backend is not None and backend.decoder is None

    @cached_property
    def _trial_contexts(self) -> list[tuple[str, list[int]]]:
        """Texts after which names are tried, and their tokens."""
        texts = [f"{place} " if self._joins_with_spaces else place for place in PLACES]
        return [(text, tokens) for text, tokens in zip(texts, self._plain(texts), strict=True) if tokens]

    def _tokens_in_contexts(self, text: str) -> set[int]:
        """Return the tokens of a text after a letter, a digit and a mark, leaving out those after which it is not one token."""
        rows = self._plain([place + text for place, _ in self._trial_contexts]) if text and self._trial_contexts else []
        pairs = zip(rows, (tokens for _, tokens in self._trial_contexts), strict=False)
        return {row[-1] for row, head in pairs if len(row) == len(head) + 1 and row[:-1] == head}

    def _token_spelled(self, text: str) -> int | None:
        """Return the token with that spelling in the tokenizer; None if there is none."""
        tokenizer = self._require_tokenizer()
        token: Any = tokenizer.convert_tokens_to_ids(text) if text else None
        return token if token is not None and tokenizer.convert_ids_to_tokens(token) == text else None

    def _name(self, token: int) -> str:
        if token not in self._ids:  # padding of the model's vocabulary, or there is no tokenizer
            return f"#{token}"
        piece: Any = self._require_tokenizer().convert_ids_to_tokens(token)
        own = self._continuation_text(token)
        for text in dict.fromkeys((own, piece)):
            if _NUMBER.fullmatch(text) or encoding_fault(text):
                continue
            after = self._tokens_in_contexts(text)
            spelled = not after and text == piece and (text == own or text.isascii())
            if after == {token} or (spelled and self._token_spelled(text) == token):
                return text
        return f"#{token}"

    @cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset() if self.tokenizer is None else frozenset(self.tokenizer.get_vocab().values())

    @cached_property
    def _added(self) -> dict[int, str]:
        return {token: str(added) for token, added in cast(Any, self._require_tokenizer()).added_tokens_decoder.items()}

    def _continuation_text(self, token: int) -> str:
        """Return the text that a token adds when it continues a text."""
        if token in self._added:
            return self._added[token]
        head = [] if self._joins_with_spaces or not self._trial_contexts else self._trial_contexts[0][1]
        return self.continued(head, [token]) if head else self.decode([token])


def describe_token(text: str, token: int) -> str:
    """Return a token as messages show it: its name as a Python literal, and its id."""
    return text if _NUMBER.fullmatch(text) else f"{text!r} (#{token})"


def load_tokenizer(name: str, revision: str | None = None) -> tuple[PreTrainedTokenizerBase | None, str]:
    """Return the tokenizer of a folder, hub id or .gguf file (None if there is none), and the reason if it cannot be read."""
    from transformers import AutoTokenizer

    where, gguf = find_gguf(name) or (name, None)
    its = {} if gguf is None else {"gguf_file": gguf}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False, **its)
    except Exception as error:  # without a tokenizer, a model can still be coupled on token ids
        return None, f"{type(error).__name__}: {first_line(error)}" if gguf or _has_files(where, revision) else ""
    # a folder without tokenizer files can give an empty tokenizer rather than an error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        return None, "its files have no tokens except special ones" if gguf or _has_files(where, revision) else ""
    return tokenizer, ""


def _has_files(name: str, revision: str | None) -> bool:
    """Return whether a folder, or the cache of a hub id, has files of a tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    if (folder := Path(name)).is_dir():
        return any(path.is_file() for pattern in _FILES for path in folder.glob(pattern))
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _HUB_FILES)
