#!/usr/bin/env python3
# ruff: noqa: E501  (lines of the C++ that it writes)
"""Writes wgmma.inc: the wgmma instruction needs every accumulator register by name, for each N.

python csrc/device/cuda/generate_wgmma.py > csrc/device/cuda/wgmma.inc
"""

# Those of the attention kernels' tiles, and small ones.
WIDTHS = (16, 32, 64, 80, 96, 128, 160, 176, 192, 256)
TYPES = {"bf16": "bf16", "fp16": "f16"}

SHARED = """\
template <bool a_mn_major, bool b_mn_major>
DEVICE void wgmma_ss({t}, Width<{n}>, float (&d)[{half}], uint64_t a, uint64_t b, bool accumulate) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{acc}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx}.{ptx} {{{regs}}}, %{a}, %{b}, p, 1, 1, %{ta}, %{tb};\\n}}"
    : {outputs}
    : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(a_mn_major ? 1 : 0), "n"(b_mn_major ? 1 : 0) : "memory");
}}
"""
REGISTERS = """\
template <bool b_mn_major>
DEVICE void wgmma_rs({t}, Width<{n}>, float (&d)[{half}], const uint32_t (&a)[4], uint64_t b, bool accumulate) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{acc}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx}.{ptx} {{{regs}}}, {{%{a}, %{a1}, %{a2}, %{a3}}}, %{b}, p, 1, 1, %{tb};\\n}}"
    : {outputs}
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(b_mn_major ? 1 : 0) : "memory");
}}
"""


def generate() -> str:
    parts = [
        "// Written by generate_wgmma.py; included inside almostgpt::device::detail by sm90.cuh.\n"
    ]
    for n in WIDTHS:
        half = n // 2
        common = {
            "n": n,
            "half": half,
            "regs": ", ".join(f"%{i}" for i in range(half)),
            "outputs": ", ".join(f'"+f"(d[{i}])' for i in range(half)),
        }
        for t, ptx in TYPES.items():
            numbers = {"a": half, "b": half + 1, "acc": half + 2, "ta": half + 3, "tb": half + 4}
            parts.append(SHARED.format(t=t, ptx=ptx, **common, **numbers))
            numbers = {f"a{i}": half + i for i in (1, 2, 3)}
            numbers |= {"a": half, "b": half + 4, "acc": half + 5, "tb": half + 6}
            parts.append(REGISTERS.format(t=t, ptx=ptx, **common, **numbers))
    return "\n".join(parts)


if __name__ == "__main__":
    print(generate(), end="")
