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
from almostgpt.data.tokenizer_base import Tokenizer, unicode_bytes
from almostgpt.errors import UserError

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
# Vocabulary and merges of a byte-level BPE in GPT-2's form, by today's names and by OpenAI's.
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

# Put into what a person writes where it spells a special token. A noncharacter: no text has it.
MARK = "\ufdd0"
# Steps of a decoder that only concern how tokens are put together, or that _pieces carries out.
DECODERS = {"ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip", "Replace"}


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
        self._decoder = _decoder_steps(self._tokenizer)
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        if not self.vocab_size:
            raise UserError("the vocabulary is empty")
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._specials = [token.content for token in self._added.values() if token.special]
        model = json.loads(self._tokenizer.to_str())["model"]
        self._unknown = self._vocabulary.get(model.get("unk_token") or "")
        self.begin = self._what_it_puts_first()
        self.end_of_text = self._find_end_of_text()
        source = chat_template or _default_template(self.config.get("chat_template"))
        if source is not None:
            self.chat_template = ChatTemplate(source, self._named_tokens())

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
            source = template.read_text("utf-8") if template.is_file() else None
            return cls(_tokenizer_json(folder, config), config, source, ends)
        except UnicodeDecodeError as error:
            raise UserError(f"{error.object!r:.40}: not a text in UTF-8: {error}") from error
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

        Where a message spells a special token, a mark in the middle keeps it from being one.
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
        # that it can be encoded as ordinary text without its marks.
        ids: list[int] = []
        for part in re.split(f"({self._any_special})", text):
            if part in self._specials:
                ids.append(self._vocabulary[part])
            elif part:
                ids += self._encode(part.replace(MARK, ""))
        return ids

    def _marked(self, text: str) -> str:
        text = text.replace(MARK, "")
        if not self._specials:
            return text
        found = re.compile(self._any_special)
        return found.sub(lambda match: match[0][0] + MARK + match[0][1:], text)

    @cached_property
    def _any_special(self) -> str:
        longest_first = sorted(self._specials, key=len, reverse=True)
        return "|".join(re.escape(token) for token in longest_first) or r"(?!)"

    # ------------------------------------------------------------ what is inside

    def _encode(self, text: str, *, specials: bool = False) -> list[int]:
        self._tokenizer.encode_special_tokens = not specials
        try:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers has no type of its own: an unknown word, say
            raise UserError(f"the tokenizer cannot express the text: {error}") from error
        finally:
            self._tokenizer.encode_special_tokens = True
        if self._unknown is not None and self._unknown in found.ids:
            start, end = found.offsets[found.ids.index(self._unknown)]
            raise UserError(
                f"{text[start:end]!r} (position {start}) is not in the vocabulary of the tokenizer"
            )
        return found.ids

    @cached_property
    def _pieces(self) -> list[bytes]:
        """Of each id the bytes that it stands for; of one that is not given to any token, none."""
        pieces = [b""] * self.vocab_size
        for token, id in self._vocabulary.items():
            pieces[id] = token.encode() if id in self._added else _piece(token, self._decoder)
        return pieces

    @cached_property
    def _puts_a_space_first(self) -> bool:
        try:
            return self.decode_bytes(self._encode("a")) == b" a"
        except UserError:  # a vocabulary without the letter
            return False

    def _what_it_puts_first(self) -> tuple[int, ...]:
        """The ids before a text where special tokens are added to it: the begin of text, if any."""
        whole = self._tokenizer.encode("", add_special_tokens=True)
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


def _tokenizer_json(folder: Path, config: dict[str, Any]) -> str:
    if (folder / TOKENIZER_JSON).is_file():
        return (folder / TOKENIZER_JSON).read_text("utf-8")
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


# ---------------------------------------------------------------- from tokens to bytes


def _decoder_steps(tokenizer) -> list[dict[str, Any]]:
    """The steps of a decoder; ``UserError`` for one that would not give the text back."""
    decoder = json.loads(tokenizer.to_str())["decoder"]
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    unknown = [step["type"] for step in steps if step["type"] not in DECODERS]
    patterns = [step["pattern"] for step in steps if step["type"] == "Replace"]
    if unknown or not steps or any("String" not in pattern for pattern in patterns):
        what = f"its decoder has {unknown[0]}" if unknown else "of its decoder"
        raise UserError(
            f"this tokenizer does not give its text back ({what}): byte-level ones and those after "
            "SentencePiece do"
        )
    return steps


def _piece(token: str, steps: Sequence[dict[str, Any]]) -> bytes:
    """The bytes of a token of the vocabulary in the middle of a text."""
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            alphabet = BYTE_OF_CHARACTER
            known = all(character in alphabet for character in token)
            return bytes([alphabet[c] for c in token]) if known else token.encode()
        if kind == "ByteFallback" and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if kind == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif kind == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
    return token.encode()


def character_of_byte() -> dict[int, str]:
    """GPT-2's alphabet: visible bytes of Latin-1 as themselves, the others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + number) for number, byte in enumerate(hidden)
    }


BYTE_OF_CHARACTER = {character: byte for byte, character in character_of_byte().items()}


def _content(token: Any) -> str | None:
    """A token of ``tokenizer_config.json``: its text, or an object that has it as ``content``."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _default_template(value: Any) -> str | None:
    """The template of ``tokenizer_config.json``: one, or a list of named ones."""
    if isinstance(value, list):
        named = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _ids(value: Any) -> list[int]:
    """``eos_token_id``: an id, a list of them, or null."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
