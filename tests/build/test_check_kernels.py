"""What scripts/check_kernels.py reads out of the messages of ptxas and the code of nvdisasm."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

_FILE = Path(__file__).parents[2] / "scripts" / "check_kernels.py"
_SPEC = importlib.util.spec_from_file_location("check_kernels", _FILE)
check_kernels = importlib.util.module_from_spec(_SPEC)
sys.modules["check_kernels"] = check_kernels  # where its dataclasses look up their annotations
_SPEC.loader.exec_module(check_kernels)
Expectation, Kernel = check_kernels.Expectation, check_kernels.Kernel

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4copyPf' for 'sm_90a'
ptxas info    : Function properties for _Z4copyPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compile time = 1.0 ms
ptxas info    : Compiling entry function '_Z3sumPf' for 'sm_90a'
ptxas info    : Function properties for _Z3sumPf
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""

SASS = """\
//--------------------- .nv.info                  --------------------------
//--------------------- .text._Z4copyPf           --------------------------
	.section	.text._Z4copyPf,"ax",@progbits
_Z4copyPf:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.NA.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R9, desc[UR4][R2.64] ;
.L_x_0:
        /*0030*/              @UP1 LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64] ;
        /*0040*/                   LDGDEPBAR ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   STG.E desc[UR4][R2.64], R9 ;
//--------------------- .text._Z3sumPf            --------------------------
        /*0000*/                   STL [R1+0x4], R9 ;
//--------------------- .nv.shared._Z3sumPf       --------------------------
"""


def kernels():
    return check_kernels.parse(PTXAS, "90a", check_kernels.count_instructions(SASS), list)


def test_registers_shared_memory_spills_and_instructions_are_read():
    copy, total = kernels()
    assert (copy.name, copy.registers, copy.shared, copy.spills) == ("_Z4copyPf", 32, 64, 0)
    assert copy.instructions == {"LDG.128": 1, "LDG.16": 1, "LDGSTS": 1, "HGMMA": 2, "STG.32": 1}
    assert (total.registers, total.shared, total.spills) == (255, 0, 12)
    assert total.instructions == {"STL": 1}


@pytest.mark.parametrize(
    "opcode, kind",
    [
        ("LDG.E.128", "LDG.128"),
        ("LDG.E.S8", "LDG.8"),
        ("LDG.E.64.STRONG.GPU", "LDG.64"),
        ("LDG.E.ENL2.256", "LDG.256"),
        ("STG.E", "STG.32"),
        ("LDL.64", "LDL"),
        ("LDSM.16.MT88.4", "LDSM"),
        ("USETMAXREG.TRY_ALLOC.CTAPOOL", "USETMAXREG"),
        ("LDS.128", None),
        ("IMAD.MOV.U32", None),
    ],
)
def test_an_instruction_is_counted_by_its_width(opcode, kind):
    assert check_kernels.kind_of(opcode) == kind


@pytest.mark.parametrize(
    "name, short",
    [
        (
            "void almostgpt::(anonymous namespace)::forward_kernel<almostgpt::device::bf16, float, 2>"
            "(almostgpt::(anonymous namespace)::ForwardArgs<almostgpt::device::bf16, float>)",
            "forward_kernel<bf16, float, 2>",
        ),
        (
            "void a::apply_kernel<(a::Function)0>(a::Global<float>, int)",
            "apply_kernel<(Function)0>",
        ),
        (
            "void a::gemm_kernel<(bool)1, 64>((anonymous namespace)::Args)",
            "gemm_kernel<(bool)1, 64>",
        ),
        ("a::copy_kernel(float*, int (*)(int))", "copy_kernel"),
    ],
)
def test_names_lose_namespaces_and_parameters(name, short):
    assert check_kernels.short_name(name) == short


def test_what_is_not_as_expected_is_named():
    found = [
        Kernel("copy<1>", "80", 32, 0, 0, {"LDG.128": 1}),
        Kernel("copy<2>", "80", 32, 0, 0, {"LDG.16": 2, "STL": 1}),
        Kernel("copy<1>", "90a", 32, 0, 0, {"LDG.128": 1}),
    ]

    def unmet(*expected, archs=("80", "90a")):
        return check_kernels.unmet(found, list(archs), expected)

    assert unmet(Expectation(r"copy<1>", has="LDG.128", lacks="STL")) == []
    assert unmet(Expectation(r"copy<\d>", has="LDG.128", lacks="LDG.16 STL")) == [
        "copy<2> (sm_80) has no LDG.128",
        "copy<2> (sm_80) has LDG.16",
        "copy<2> (sm_80) has STL",
    ]
    assert unmet(Expectation(r"copy", has="LDG.128", archs=("90a",))) == [
        "no kernel for sm_90a matches 'copy'"
    ]
    # An architecture that was not compiled is not missed.
    assert unmet(Expectation(r"copy<2>", has="LDG.16", archs=("80", "90a")), archs=("80",)) == []


def test_each_attention_kernel_meets_the_expectations_of_its_own_architecture():
    sm80 = "attention_forward_kernel<bf16, ForwardTile<64, 128, 64, 4>, PlainScore>"
    sm90 = "attention_forward_sm90_kernel<bf16, HopperForwardTile<64, 3, 128, 2>, PlainScore>"
    back = "attention_backward_kernel<bf16, BackwardTile<64, 128, 64, 2, 4, 1>, PlainScore>"
    meant = {
        name: [e for e in check_kernels.EXPECTED if e.has and re.fullmatch(e.kernels, name)]
        for name in (sm80, sm90, back)
    }
    assert [len(found) for found in meant.values()] == [1, 1, 1]
    assert "HMMA" in meant[sm80][0].has.split() and "HMMA" in meant[sm90][0].lacks.split()
    assert (meant[sm80][0].archs, meant[sm90][0].archs) == (check_kernels.ARCHS, ("90a",))


def test_the_files_of_hopper_are_compiled_for_hopper_alone():
    archs_of = check_kernels.archs_of
    assert archs_of(Path("forward_sm90.cu"), ["80", "90a", "120"]) == ["90a"]
    assert archs_of(Path("forward.cu"), ["80", "90a"]) == ["80", "90a"]


def test_a_missing_program_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_kernels.find_tools("nvcc") == "no nvcc; install a CUDA toolkit"
