"""The machine code of Hopper's attention forward: the loop over the tiles of keys, taken apart; a module.

scripts/attention_model_sm90.py asks it how many instructions a step issues beside its products, and
scripts/attention_tiles.py whether a candidate fits into the registers. Needs nvcc and nvdisasm, which
check_kernels.py finds, but no GPU.
"""

from __future__ import annotations

import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import check_kernels

SOURCE = """
#include "attention/forward_sm90.cuh"

namespace almostgpt {{
template KERNEL
attention_forward_sm90_kernel<{dtype}, {tile}, {score}>(GRID_CONSTANT const HopperForwardArgs);
}}
"""


@dataclass(frozen=True)
class Loop:
    """The instructions of a warp in the loop over the tiles of keys.

    Attributes:
        products: HGMMA.
        others: the rest, on the common way: no mask, no base of a row that moves.
        to_start: from the warpgroup's turn (or, without turns, the fence) to the first product.
        exp2: exponentials on the common way, and how many of them are behind the wait for O += P V.
        late_exp2: see ``exp2``.
    """

    products: int
    others: int
    to_start: int
    exp2: int
    late_exp2: int


@dataclass(frozen=True)
class Code:
    """What became of a kernel.

    Attributes:
        registers: the highest that the code names, and one. (ptxas reports those at launch, before
            setmaxnreg moves them.)
        instructions: how often the whole of it has each instruction that check_kernels.py counts.
        loop: None where it was not found.
    """

    name: str
    registers: int
    spills: int
    instructions: dict[str, int]
    loop: Loop | None


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str


LINE = re.compile(
    r"^(?:\.(?P<label>L_x_\d+):|\s+/\*(?P<address>[0-9a-f]+)\*/\s+(?:@(?P<predicate>!?U?P\w+) )?"
    r"(?P<opcode>[A-Z][\w.]+)(?P<operands>[^;]*))",
    re.M,
)


def read(section: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a kernel, and where its labels stand among them."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for match in LINE.finditer(section):
        if match["label"]:
            labels[match["label"]] = len(instructions)
        else:
            instructions.append(
                Instruction(
                    int(match["address"], 16),
                    match["predicate"] or "",
                    match["opcode"],
                    match["operands"],
                )
            )
    return instructions, labels


def find_loop(instructions: list[Instruction], labels: dict[str, int]) -> Loop | None:
    """The innermost loop with products of both kinds: Q K^T and, V being transposed, P V."""

    def target(one: Instruction) -> int | None:
        found = re.search(r"`\(\.(L_x_\d+)\)", one.operands)
        return labels[found[1]] if found and one.opcode.startswith("BRA") else None

    def is_product(one: Instruction) -> bool:
        return one.opcode.startswith("HGMMA")

    loops = []
    for end, one in enumerate(instructions):
        begin = target(one)
        if begin is None or begin > end:
            continue
        products = [i for i in instructions[begin:end] if is_product(i)]
        if len({"tnspB" in i.operands for i in products}) == 2:
            loops.append((end - begin, begin, end))
    if not loops:
        return None
    _, begin, end = min(loops)
    common, at = [], begin
    while at <= end:
        one = instructions[at]
        common.append(one)
        to = target(one)
        # A branch ahead that stays in the loop jumps over what is rare; those that leave it wait again.
        at = to if to is not None and one.predicate and at < to <= end else at + 1
    first = next(i for i, one in enumerate(common) if is_product(one))
    starts = ("BAR.SYNC", "WARPGROUP.ARRIVE")
    turn = next(
        (i for start in starts for i in range(first) if common[i].opcode.startswith(start)), first
    )
    exp2 = [i for i, one in enumerate(common) if one.opcode == "MUFU.EX2"]
    waits = [i for i, one in enumerate(common) if one.opcode.startswith("WARPGROUP.DEPBAR")]
    return Loop(
        products=sum(map(is_product, common)),
        others=sum(not is_product(one) for one in common),
        to_start=first - turn - 1,
        exp2=len(exp2),
        late_exp2=sum(i > waits[-1] for i in exp2),
    )


@cache
def compiled(tile: str, score: str = "PlainScore", dtype: str = "bf16") -> Code | str:
    """The kernel of a tile, ``HopperForwardTile<...>``, or what the compiler says against it."""
    tools = check_kernels.find_tools("nvcc")
    if isinstance(tools, str):
        raise FileNotFoundError(tools)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cu"
        source.write_text(SOURCE.format(tile=tile, score=score, dtype=dtype))
        messages, code = check_kernels.machine_code(tools, source, "90a")
    if code is None:
        error = next((line for line in messages.splitlines() if "error" in line), messages)
        return error.strip()
    (kernel,) = check_kernels.parse(
        messages,
        "90a",
        check_kernels.count_instructions(code),
        lambda names: check_kernels.demangle(tools, names),
    )
    registers = 1 + max(int(number) for number in re.findall(r"\bR(\d+)\b", code))
    return Code(kernel.name, registers, kernel.spills, kernel.instructions, find_loop(*read(code)))


def compile_all(works: list[tuple[str, str]], jobs: int = 2) -> list[Code | str]:
    """``compiled`` of each (tile, score)."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda work: compiled(*work), works))
