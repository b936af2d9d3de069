#!/usr/bin/env python3
"""Writes unicode_tables.inc: which characters are letters, numbers and spaces, as `regex` has them.

python csrc/bpe/generate_unicode.py > csrc/bpe/unicode_tables.inc

Two stages: characters in blocks of 128, equal blocks stored once. A character takes 2 bits, of which
character i of a block has bits 2i and 2i + 1 of its 32 bytes.
"""

from importlib.metadata import version

import regex

BLOCK = 128
CLASSES = {1: r"\p{L}", 2: r"\p{N}", 3: r"\s"}  # 0: everything else


def classes() -> bytearray:
    """The class of every code point; of surrogates, which text in UTF-8 cannot have, 0."""
    found = bytearray(0x110000)
    text = "".join(map(chr, range(0x110000)))
    for number, pattern in CLASSES.items():
        for match in regex.finditer(f"(?:{pattern})+", text):
            for code in range(*match.span()):
                found[code] = number
    return found


def packed(block: bytes) -> bytes:
    """2 bits a character."""
    return bytes(sum(block[i + j] << 2 * j for j in range(4)) for i in range(0, len(block), 4))


def rows(values: bytes, width: int) -> str:
    lines = [values[i : i + width] for i in range(0, len(values), width)]
    return "\n".join("".join(f"{value}," for value in line) for line in lines)


def main() -> None:
    found = classes()
    end = max(code for code in range(len(found)) if found[code])
    blocks: dict[bytes, int] = {}
    index = bytes(
        blocks.setdefault(packed(found[start : start + BLOCK]), len(blocks))
        for start in range(0, end + 1, BLOCK)
    )
    print(f"// Written by generate_unicode.py with regex {version('regex')}; not to be edited.")
    print("// clang-format off")
    print(f"constexpr uint32_t table_end = {len(index) * BLOCK};  // beyond it all are `other`")
    print(f"constexpr uint8_t block_of[] = {{\n{rows(index, 32)}\n}};")
    print(f"constexpr uint8_t blocks[][{BLOCK // 4}] = {{")
    for block in blocks:
        print("{" + ",".join(map(str, block)) + "},")
    print("};\n// clang-format on")


if __name__ == "__main__":
    main()
