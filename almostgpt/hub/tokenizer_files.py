"""Tokenizers as the files that ``AutoTokenizer`` reads: the same ids for the same text.

A Hugging Face tokenizer goes out as it came in. Ours are built from what ``tokenizers`` has:

    char   a vocabulary of whole words, and every character is a word; one that is not in it is an error
    byte   the 256 characters of GPT-2's alphabet in the order of their bytes, and no merges
    gpt2   the byte-level BPE that tiktoken has, its merges recovered from the order of its tokens
    bpe    the same, split by its own pattern

One of SentencePiece is left to transformers, which has converters for each family of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from almostgpt.data.bpe import BPETokenizer, as_hugging_face, byte_pairs, merges_of
from almostgpt.data.huggingface import (
    TEMPLATE,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    HuggingFaceTokenizer,
    byte_level,
)
from almostgpt.data.token_bytes import character_of_byte
from almostgpt.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from almostgpt.data.tokenizer_base import END_OF_TEXT, Tokenizer
from almostgpt.errors import UserError


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The content of each file, by name; ``UserError`` for a kind that is not known here."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _as_it_came(tokenizer)
    build = BUILDERS.get(type(tokenizer))
    if build is None:
        raise UserError(f"the {tokenizer.name} tokenizer cannot be written for transformers")
    built = build(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.end_of_text is not None:
        built.add_special_tokens([END_OF_TEXT.decode()])
        config |= {"eos_token": END_OF_TEXT.decode()}
    return {
        TOKENIZER_JSON: built.to_str(pretty=True),
        TOKENIZER_CONFIG: json.dumps(config, indent=2) + "\n",
    }


def _as_it_came(tokenizer: HuggingFaceTokenizer) -> dict[str, str]:
    files = {
        TOKENIZER_JSON: tokenizer.tokenizer_json,
        TOKENIZER_CONFIG: json.dumps(tokenizer.config, indent=2, ensure_ascii=False) + "\n",
    }
    return files | ({TEMPLATE: tokenizer.template_file} if tokenizer.template_file else {})


def _char(tokenizer: CharTokenizer):
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Built

    ids = {character: id for id, character in enumerate(tokenizer.characters)}
    # Words that are not in the vocabulary become unk_token; there is none, which is an error.
    built = Built(models.WordLevel(ids, unk_token="<no such character>"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    built.decoder = decoders.Fuse()
    return built


def _byte(tokenizer: ByteTokenizer):
    from tokenizers import models

    ids = {character: byte for byte, character in character_of_byte().items()}
    return byte_level(models.BPE(ids, []), split=False)


def _gpt2(tokenizer: GPT2Tokenizer):
    return byte_level(byte_pairs(tokenizer.ranks, merges_of(tokenizer.ranks)))


BUILDERS: dict[type[Tokenizer], Callable] = {
    CharTokenizer: _char,
    ByteTokenizer: _byte,
    GPT2Tokenizer: _gpt2,
    BPETokenizer: as_hugging_face,
}
