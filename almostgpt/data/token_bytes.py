"""What bytes a token of a Hugging Face tokenizer stands for, by the steps of its decoder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from almostgpt.errors import UserError

# Steps of a decoder that only concern how tokens are put together, or that piece carries out.
DECODERS = {"ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip", "Replace"}


def decoder_steps(tokenizer) -> list[dict[str, Any]]:
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


def piece(token: str, steps: Sequence[dict[str, Any]]) -> bytes:
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
