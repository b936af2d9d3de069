"""Tokenizers of Hugging Face: ``tokenizer.json`` by the library ``tokenizers``, without transformers.

Two families of them give text back byte for byte, and are served: byte-level ones (GPT-2, Llama 3,
Qwen, SmolLM2), whose tokens are written in an alphabet of 256 visible characters, one a byte; and
those after SentencePiece (Llama 2, Mistral), with ``▁`` for a space and ``<0x0A>`` for a byte that
no token has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from almostgpt.data.chat_template import ChatTemplate, Message
from almostgpt.data.token_bytes import decoder_steps, piece
from almostgpt.data.tokenizer_base import Tokenizer, unicode_bytes
from almostgpt.errors import UserError

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
# Vocabulary and merges of a byte-level BPE in GPT-2's form, by today's names and by OpenAI's.
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

# Where a person writes what spells a special token, this and a character for the token take its place
# until all is tokens. A noncharacter, and those of private use: no text has them one after the other.
MARK, FIRST_PRIVATE = "\ufdd0", 0xF0000
MARKED = re.compile(f"{MARK}([\U000f0000-\U000ffffd])")
PROBE = "A  b\n\tÉ c. "  # what a lossy tokenizer changes: case, accents, spaces


class HuggingFaceTokenizer(Tokenizer):
    """What a ``tokenizer.json`` describes.

    Special tokens stand for themselves only in what a chat template writes: in ordinary text they are
    text. Where the tokenizer puts a space before a text (as SentencePiece does), ``decode`` takes it
    away again; ``decode_bytes``, which is also for the middle of a text, leaves it.

    Args:
        tokenizer_json: the content of that file.
        config: of ``tokenizer_config.json``: ``bos_token``, ``eos_token``, ``chat_template`` and so on.
        chat_template: of ``chat_template.jinja``; it goes before the one in ``config``.
        end_ids: the ids that end a text or a turn beside ``eos_token``.

    Raises:
        UserError: damaged, or a tokenizer that does not give text back.
    """

    name = "huggingface"

    def __init__(
        self,
        tokenizer_json: str,
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
        end_ids: Sequence[int] = (),
    ):
        self.tokenizer_json, self.config = tokenizer_json, dict(config or {})
        self.template_file, self._end_ids = chat_template, tuple(end_ids)
        self._tokenizer = _from_json(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._add_special_tokens()
        self._decoder = decoder_steps(self._tokenizer)
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        if not self.vocab_size:
            raise UserError("the vocabulary is empty")
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._specials = [token.content for token in self._added.values() if token.special]
        self._special_ids = {id for id, token in self._added.items() if token.special}
        model = json.loads(self._tokenizer.to_str())["model"]
        # Unigram models have its id, all others its text.
        self._unknown = model.get("unk_id", self._vocabulary.get(model.get("unk_token") or ""))
        self.begin = self._what_it_puts_first()
        self.end_of_text = self._find_end_of_text()
        source = chat_template or _default_template(self.config.get("chat_template"))
        if source is not None:
            self.chat_template = ChatTemplate(source, self._named_tokens())
        self._check_that_text_comes_back()

    @classmethod
    def from_folder(cls, folder: Path) -> HuggingFaceTokenizer:
        """The tokenizer of a Hugging Face folder; ``UserError`` names what is missing or damaged."""
        config = {}
        for name in (SPECIAL_TOKENS, TOKENIZER_CONFIG):
            if (folder / name).is_file():
                config |= read_json(folder / name)
        ends: list[int] = []
        for name in ("generation_config.json", "config.json"):
            if not ends and (folder / name).is_file():
                ends = _ids(read_json(folder / name).get("eos_token_id"))
        template = folder / TEMPLATE
        try:
            source = _read_text(template) if template.is_file() else None
            return cls(_tokenizer_json(folder, config), config, source, ends)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error

    # ------------------------------------------------------------ the contract

    def encode_array(self, text: str) -> np.ndarray:
        unicode_bytes(text)  # tokenizers itself would fail on a lone surrogate with a TypeError
        return np.array(self._encode(text), self.dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        pieces = self._pieces
        return b"".join([pieces[id] for id in self._known(ids)])

    def decode(self, ids: Iterable[int]) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._puts_a_space_first else text

    @property
    def stop_ids(self) -> tuple[int, ...]:
        ends = dict.fromkeys((*super().stop_ids, *self._end_ids))
        return tuple(id for id in ends if id < self.vocab_size)

    def settings(self) -> dict[str, Any]:
        return {
            "tokenizer_json": self.tokenizer_json,
            "config": self.config,
            "chat_template": self.template_file,
            "end_ids": list(self._end_ids),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> HuggingFaceTokenizer:
        if not settings:
            raise UserError(
                "the huggingface tokenizer needs its files: name a folder with a tokenizer.json"
            )
        text, config = settings.get("tokenizer_json"), settings.get("config")
        template, ends = settings.get("chat_template"), settings.get("end_ids")
        if (
            not isinstance(text, str)
            or not isinstance(config, dict)
            or not isinstance(template, str | None)
            or not isinstance(ends, list)
            or not all(isinstance(id, int) for id in ends)
        ):
            raise UserError("damaged: no settings of a huggingface tokenizer")
        return cls(text, config, template, ends)

    # ------------------------------------------------------------ conversations

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as its chat template writes it, up to where the model's turn begins.

        Where a message spells a special token, a mark stands for what it spells.
        """
        return self.chat_template.render(
            [{key: self._marked(text) for key, text in message.items()} for message in messages]
        )

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of what :meth:`render` wrote, or of a part: special tokens stand for themselves.

        The same as those of transformers' ``apply_chat_template``, but for messages that spell special
        tokens: these are ordinary text here.
        """
        unicode_bytes(text)
        if MARK not in text:
            return self._encode(text, specials=True)
        # Every special token that is whole is the template's. What is between them is cut out, so
        # that it can be encoded as ordinary text, with what its marks stand for.
        ids: list[int] = []
        for part in self._any_special.split(text):
            if part in self._specials:
                ids.append(self._vocabulary[part])
            elif part:
                ids += self._encode(self._unmarked(part))
        return ids

    def _marked(self, text: str) -> str:
        def mark(spelled: re.Match) -> str:
            return MARK + chr(FIRST_PRIVATE + self._specials.index(spelled[0]))

        return self._any_special.sub(mark, text.replace(MARK, ""))

    def _unmarked(self, text: str) -> str:
        def spelled(mark: re.Match) -> str:
            number = ord(mark[1]) - FIRST_PRIVATE
            # A template may have cut the text between a mark and its character.
            return self._specials[number] if number < len(self._specials) else mark[1]

        return MARKED.sub(spelled, text).replace(MARK, "")

    @cached_property
    def _any_special(self) -> re.Pattern:
        longest_first = sorted(self._specials, key=len, reverse=True)
        pattern = "|".join(re.escape(token) for token in longest_first) or r"(?!)"
        return re.compile(f"({pattern})")

    # ------------------------------------------------------------ what is inside

    def _encode(self, text: str, *, specials: bool = False) -> list[int]:
        self._tokenizer.encode_special_tokens = not specials
        try:
            found = self._run(text)
        finally:
            self._tokenizer.encode_special_tokens = True
        if self._unknown is not None and self._unknown in found.ids:
            start, end = found.offsets[found.ids.index(self._unknown)]
            raise UserError(
                f"{text[start:end]!r} (position {start}) is not in the vocabulary of the tokenizer"
            )
        if not specials and not self._special_ids.isdisjoint(found.ids):
            # Where the vocabulary of the model has them, too (Unigram), nothing else can be made of it.
            at = next(n for n, id in enumerate(found.ids) if id in self._special_ids)
            raise UserError(
                f"the text spells {found.tokens[at]!r} (position {found.offsets[at][0]}), which this "
                "tokenizer cannot tell from its special token: leave it out, or write it otherwise"
            )
        return found.ids

    def _run(self, text: str, *, add_special_tokens: bool = False):
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        # tokenizers has no type of its own, for an unknown word, say; what its Rust code did not
        # expect (a damaged tokenizer.json) is not even an Exception.
        except BaseException as error:
            raise UserError(f"the tokenizer cannot express the text: {error}") from error

    def _add_special_tokens(self) -> None:
        """Those of the vocabulary that the configuration names: ``tokenizer.json`` may not say that
        they are special, or have them only among ordinary tokens. transformers does so, too.
        """
        named = [token for key, token in self.config.items() if key.endswith("_token")]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = self.config.get(key) or []
            named += (
                more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
            )
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        special = {
            t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special
        }
        wanted = dict.fromkeys(map(_content, named))
        self._tokenizer.add_special_tokens(
            [token for token in wanted if token in known and token not in special]
        )

    def _check_that_text_comes_back(self) -> None:
        """Normalizers that write in small letters, say, and pre-tokenizers that leave spaces out."""
        try:
            back = self.decode(self._encode(PROBE))
        except UserError:  # its vocabulary has not even these: it will say so of other texts
            return
        if back != PROBE:
            raise UserError(
                f"this tokenizer does not give its text back ({PROBE!r} becomes {back!r}): "
                "byte-level ones and those after SentencePiece do"
            )

    @cached_property
    def _pieces(self) -> list[bytes]:
        """Of each id the bytes that it stands for; of one that is not given to any token, none."""
        pieces = [b""] * self.vocab_size
        for token, id in self._vocabulary.items():
            pieces[id] = token.encode() if id in self._added else piece(token, self._decoder)
        return pieces

    @cached_property
    def _puts_a_space_first(self) -> bool:
        try:
            return self.decode_bytes(self._encode("a")) == b" a"
        except UserError:  # a vocabulary without the letter
            return False

    def _what_it_puts_first(self) -> tuple[int, ...]:
        """The ids before a text where special tokens are added to it: the begin of text, if any."""
        whole = self._run("", add_special_tokens=True)
        first = [
            id for id, special in zip(whole.ids, whole.special_tokens_mask, strict=True) if special
        ]
        end = self._vocabulary.get(_content(self.config.get("eos_token")) or "")
        begin = self._vocabulary.get(_content(self.config.get("bos_token")) or "")
        # Some add the end of text, too: to a text that is to be classified, not continued.
        return tuple(first[:-1] if first[-1:] == [end] and end != begin else first)

    def _find_end_of_text(self) -> int | None:
        for token in (_content(self.config.get("eos_token")), "<|endoftext|>"):
            if token in self._vocabulary:
                return self._vocabulary[token]
        return self._end_ids[0] if self._end_ids and self._end_ids[0] < self.vocab_size else None

    def _named_tokens(self) -> dict[str, str]:
        named = {
            key: _content(value) for key, value in self.config.items() if key.endswith("_token")
        }
        return {key: content for key, content in named.items() if content is not None}


# ---------------------------------------------------------------- reading


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; ``UserError`` if there is none."""
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: damaged: it holds no JSON object")
    return values


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: not a text in UTF-8: {error}") from error


def _tokenizer_json(folder: Path, config: dict[str, Any]) -> str:
    if (folder / TOKENIZER_JSON).is_file():
        return _read_text(folder / TOKENIZER_JSON)
    for vocabulary, merges in GPT2_FILES:
        if (
            (folder / vocabulary).is_file()
            and (folder / merges).is_file()
            and _is_gpt2(folder, config)
        ):
            return _gpt2_json(folder / vocabulary, folder / merges)
    found = ", ".join(sorted(path.name for path in folder.glob("*token*"))) or "none"
    raise UserError(
        f"no {TOKENIZER_JSON} (files of a tokenizer here: {found}). Where there is a tokenizer in an "
        "older form, write it anew with transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _is_gpt2(folder: Path, config: dict[str, Any]) -> bool:
    """Vocabulary and merges alone do not say how text is split: GPT-2's way is known."""
    if str(config.get("tokenizer_class", "")).startswith("GPT2Tokenizer"):
        return True
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "gpt2"


def _gpt2_json(vocabulary: Path, merges: Path) -> str:
    """``tokenizer.json`` of the byte-level BPE of GPT-2."""
    from tokenizers import AddedToken
    from tokenizers.models import BPE

    try:
        tokenizer = byte_level(BPE(*BPE.read_file(str(vocabulary), str(merges))))
    except Exception as error:  # tokenizers has no type of its own
        raise UserError(f"{vocabulary.name} and {merges.name}: damaged: {error}") from error
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return tokenizer.to_str()


def byte_level(model, *, split: bool = True):
    """A ``tokenizers.Tokenizer`` over bytes; ``split``: into words first, by GPT-2's pattern."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_json(text: str):
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "a Hugging Face tokenizer needs tokenizers: pip install tokenizers"
        ) from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers has no type of its own
        raise UserError(
            f"{TOKENIZER_JSON} is damaged, or of another version of tokenizers: {error}"
        ) from error


# ---------------------------------------------------------------- values of its files


def _content(token: Any) -> str | None:
    """A token of ``tokenizer_config.json``: its text, or an object that has it as ``content``."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _default_template(value: Any) -> str | None:
    """The template of ``tokenizer_config.json``: one, or a list of named ones."""
    if isinstance(value, list):
        named = [v for v in value if isinstance(v, dict) and v.get("name") == "default"]
        value = named[0].get("template") if named else None
    return value if isinstance(value, str) else None


def _ids(value: Any) -> list[int]:
    """``eos_token_id``: an id, a list of them, or null."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
