"""The forward of Hopper in the emulator: what sets it apart from that of every card.

Its results against float64, strides, documents and whole models are tested with those of the other
cards, in test_flash_attention_kernels.py and test_flash_attention_emulated.py.
"""

import pytest
import torch
from attention_kernels import attend_on
from attention_truth import make, plain, sinks, slopes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import emulator

HOPPER = (9, 0)
pytestmark = pytest.mark.skipif(
    emulator.refuse() is not None, reason=f"no emulator: {emulator.refuse()}"
)
attend = attend_on(HOPPER)


def forward(inputs, **options):
    """(out, lse) by the kernel, and its statistics."""
    emulator.reset_statistics()
    with torch.no_grad():
        result = attend(*inputs[:3], **options)
    ((name, found),) = emulator.statistics()["kernels"].items()
    assert name.startswith("attention_forward_sm90_kernel"), name
    return result, {"name": name, **found}


def assert_right(result, inputs, **options):
    """Twice the error of the reference in the same dtype, and a few roundings."""
    q, k, v = inputs[:3]
    exact = plain(q.double(), k.double(), v.double(), **options)
    with kernels.use_backend("reference"):
        peer = kernels.flash_attention(q, k, v, return_lse=True, **options)
    for got, same, truth in zip(result, peer, exact, strict=True):
        finite = truth.isfinite()
        assert torch.equal(got[~finite].double(), truth[~finite])
        if not finite.any():
            continue
        got, same, truth = (t.double()[finite] for t in (got, same, truth))
        slack = 4 * torch.finfo(q.dtype).eps * truth.abs().max().clamp(min=1e-3)
        assert (got - truth).abs().max() <= 2 * (same - truth).abs().max() + slack


def same(results) -> bool:
    first, *others = results
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


# --- blocks that stay ------------------------------------------------------------------------------

WORKS = [
    (64, dict(Tq=380, Tk=430, H=4, Hkv=2), {"causal": True}),
    (64, dict(Tq=200, Tk=330, H=2, Hkv=2), {"softcap": 8.0, "alibi_slopes": slopes(2)}),
    (128, dict(Tq=300, Tk=300, H=2, Hkv=1), {"causal": True, "sink_logits": sinks(2)}),
    (128, dict(Tq=150, Tk=640, H=3, Hkv=3), {}),
    (256, dict(Tq=260, Tk=300, H=2, Hkv=1), {"causal": True}),
]


@pytest.mark.parametrize(
    "D, shape, options", WORKS, ids=[f"{D}-{i}" for i, (D, *_) in enumerate(WORKS)]
)
def test_one_block_does_what_many_do(D, shape, options):
    """All tiles of queries, one after another, through the same places: the same bits as apart."""
    inputs = make(**shape, D=D, dtype=torch.bfloat16)
    results = []
    for multiprocessors in (0, 1, 2, 3):
        for asynchrony, seed in (("late", 0), ("early", 1), ("random", 2)):
            order = dict(multiprocessors=multiprocessors, asynchrony=asynchrony, seed=seed)
            with emulator.settings(**order):
                result, statistics = forward(inputs, **options)
            assert multiprocessors == 0 or statistics["blocks"] == multiprocessors
            results.append(result)
    assert same(results)
    assert_right(results[0], inputs, **options)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_order_of_any_works(data):
    """Packed heads, documents, windows and rows that see nothing, by few blocks, in drawn schedules."""
    H = data.draw(st.sampled_from([1, 2, 4, 6, 8]))
    Hkv = data.draw(st.sampled_from([h for h in (1, 2, 3, 4, 8) if H % h == 0]))
    Tq = data.draw(st.integers(1, 420))
    D = data.draw(st.sampled_from([16, 64, 72, 128, 200, 256]))
    options = {"causal": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        Tk = Tq
        borders = sorted(data.draw(st.lists(st.integers(0, Tq), max_size=5)))
        options["cu_seqlens"] = torch.tensor([0, *borders, Tq], dtype=torch.int32)
    else:
        Tk = data.draw(st.integers(1, 420))
        options["window"] = data.draw(
            st.sampled_from([(-1, -1), (0, 0), (70, -1), (130, 5), (-1, 64)])
        )
    inputs = make(
        Tq, Tk, H=H, Hkv=Hkv, D=D, dtype=torch.float16, seed=data.draw(st.integers(0, 99))
    )
    order = {
        "multiprocessors": data.draw(st.integers(1, 4)),
        "asynchrony": data.draw(st.sampled_from(["late", "early", "random"])),
        "seed": data.draw(st.integers(0, 99)),
    }
    with emulator.settings(**order):
        result, _ = forward(inputs, **options)
    assert_right(result, inputs, **options)


# --- tiles, packs, and who else serves ---------------------------------------------------------------


@pytest.mark.parametrize(
    "D, Tk, options, tile",
    [
        (64, 300, {"softcap": 5.0}, "<64, 2, 128"),
        (128, 640, {"causal": True}, "<128, 2, 128"),
        (128, 640, {}, "<128, 2, 160"),
        (128, 640, {"softcap": 5.0}, "<128, 2, 160"),
        (128, 256, {}, "<128, 2, 128"),  # two tiles either way
        (256, 300, {}, "<256, 2, 80"),
    ],
)
def test_the_tile_that_suits_the_call(D, Tk, options, tile):
    inputs = make(20, Tk, H=1, D=D, dtype=torch.bfloat16)
    _, statistics = forward(inputs, **options)
    assert f"HopperForwardTile{tile}" in statistics["name"]


@pytest.mark.parametrize(
    "Tq, H, Hkv, consumers",
    [
        (192, 1, 1, 3),
        (2048, 1, 1, 3),  # 2,112 rows for 2,048
        (1024, 1, 1, 2),  # 1,152 for 1,024
        (128, 1, 1, 2),
        (1024, 8, 1, 3),  # but 8 heads of them packed are 43 tiles of 192, 8,256 rows for 8,192
    ],
)
def test_three_warpgroups_where_their_rows_are_filled(Tq, H, Hkv, consumers):
    inputs = make(Tq, 64, H=H, Hkv=Hkv, D=64, dtype=torch.bfloat16)
    _, statistics = forward(inputs)
    assert f"HopperForwardTile<64, {consumers}, 128" in statistics["name"]


@pytest.mark.parametrize(
    "Tq, H, Hkv, blocks",
    [
        (16, 8, 1, 1),  # 16 tokens of 8 heads are 128 rows
        (16, 8, 2, 2),  # those of 4 heads fit too
        (128, 8, 1, 8),  # tiles are full as it is
        (16, 6, 1, 3),  # packs of 2: 3 does not divide 64 rows
        (1, 64, 1, 1),
        (5, 7, 1, 7),  # no even number of heads to pack
    ],
)
def test_heads_are_packed_where_tiles_would_be_empty(Tq, H, Hkv, blocks):
    inputs = make(Tq, 200, H=H, Hkv=Hkv, D=128, dtype=torch.bfloat16)
    options = {"causal": True, "alibi_slopes": slopes(H), "sink_logits": sinks(H)}
    result, statistics = forward(inputs, **options)
    assert statistics["blocks"] == blocks
    assert_right(result, inputs, **options)
    # Every head as alone, where there is nothing to pack.
    for head in {0, H // 2, H - 1}:
        of = slice(head, head + 1)
        kv = slice(head // (H // Hkv), head // (H // Hkv) + 1)
        alone = inputs.q[:, of], inputs.k[:, kv], inputs.v[:, kv]
        its = {"causal": True, "alibi_slopes": slopes(H)[of], "sink_logits": sinks(H)[of]}
        (out, lse), _ = forward(alone, **its)
        assert torch.equal(out, result[0][:, of]) and torch.equal(lse, result[1][:, of])


def test_what_tma_cannot_take_goes_to_the_kernel_of_every_card():
    """And ``explain`` says so beforehand."""
    q, k, v = make(70, 90, H=4, Hkv=4, dtype=torch.bfloat16)[:3]
    expanded = k[:, :1].expand(1, 4, 90, 64)
    cases = [
        ((q, k, v), "sm90"),
        ((q, expanded, v), "sm80"),
        ((q, k, expanded), "sm80"),
        ((q[:, :, :1].expand_as(q), k, v), "sm80"),
        ((q, k[:, :, :0], v[:, :, :0]), "sm80"),
        ((q[..., :20], k[..., :20], expanded[..., :20]), "sm90"),  # padded, and so copied
        ((q[..., 1:], k[..., 1:], v[..., 1:]), "sm90"),
        ((q.mT.contiguous().mT, k, v), "sm90"),  # columns apart: copied
        # Expanded, and copied for another reason.
        ((q, pad(k, (0, 4))[:, :1, :, :64].expand(1, 4, 90, 64), v), "sm90"),
        ((q, pad(k, (1, 7))[:, :1, :, 1:65].expand(1, 4, 90, 64), v), "sm90"),
    ]
    for tensors, which in cases:
        explained = kernels.explain("flash_attention", *tensors, capability=HOPPER)
        assert explained.kernel == f"flash_attention_{which}"
        better = {name: why for name, why in explained.reasons.items() if name.startswith("flash")}
        assert [*better] == ([] if which == "sm90" else ["flash_attention_sm90"])
        assert all("TMA" in why for why in better.values())
        emulator.reset_statistics()
        with torch.no_grad():
            result = attend(*tensors)
        (name,) = emulator.statistics()["kernels"]
        assert name.startswith("attention_forward_sm90") == (which == "sm90")
        assert_right(result, tensors)
    for card in ((8, 0), (8, 9), (10, 0), (12, 0)):
        explained = kernels.explain("flash_attention", q, k, v, capability=card)
        # That another card has a better one is no news.
        assert explained.kernel.endswith("sm80") and "alone" not in str(explained)
        explained = kernels.explain(
            "flash_attention", *(t.float() for t in (q, k, v)), capability=card
        )
        assert "alone" not in explained.reasons["cuda"]


def test_a_library_without_hoppers_own_code_does_without(monkeypatch):
    native = kernels.native
    built = native.Native("_C.so", None, cuda="13.0", archs=("80-real", "90"))
    monkeypatch.setattr(native, "NATIVE", built)
    assert native.refuse((9, 0)) is None
    assert (
        native.refuse_own_code((9, 0)) == "the native library was built for 80-real;90, without 90a"
    )
    monkeypatch.setattr(
        native, "NATIVE", native.Native("_C.so", None, archs=("80-real", "90a-real"))
    )
    assert native.refuse_own_code((9, 0)) is None


def test_a_window_costs_the_tiles_that_it_leaves():
    T, D = 1536, 64
    inputs = [t.clone() for t in make(T, T, H=1, D=D, dtype=torch.bfloat16)[:3]]
    tile, blocks = 128 * D * 2, T // 192

    def key_tiles(**options):
        _, statistics = forward(inputs, causal=True, **options)
        return statistics["buffers"]["k"]["read"] // tile

    starts = range(0, T, 192)
    assert key_tiles() == sum(-(-(start + 192) // 128) for start in starts)
    seen = [(max(start - 100, 0) // 128, -(-(start + 192) // 128)) for start in starts]
    assert key_tiles(window=(100, 0)) == sum(end - begin for begin, end in seen)
    borders = torch.arange(0, T + 1, 192, dtype=torch.int32)
    # 192 tokens that begin at a border of tiles, or in the middle of one: two tiles either way.
    assert key_tiles(cu_seqlens=borders) == 2 * blocks


def test_nothing_conflicts_in_shared_memory():
    for D in (64, 128, 256):
        inputs = make(300, 300, H=1, D=D, dtype=torch.bfloat16)
        _, statistics = forward(inputs, causal=True)
        assert statistics["shared_conflicts"] == 0


# --- every synchronisation ---------------------------------------------------------------------------

CASES = [
    (64, dict(Tq=380, Tk=700, H=1), {}),
    (64, dict(Tq=200, Tk=300, H=2), {"causal": True, "softcap": 5.0}),
    (128, dict(Tq=300, Tk=700, H=1), {"causal": True}),
    (256, dict(Tq=300, Tk=400, H=1), {}),
    # Tiles that pass by some warpgroups, and rows that see nothing.
    (
        256,
        dict(Tq=322, Tk=322, H=1),
        {"cu_seqlens": torch.tensor([0, 320, 322], dtype=torch.int32)},
    ),
    (
        128,
        dict(Tq=400, Tk=400, H=1),
        {"cu_seqlens": torch.tensor([0, 60, 260, 400], dtype=torch.int32)},
    ),
    (64, dict(Tq=900, Tk=200, H=1), {"causal": True}),
]
OURS = ("forward_sm90", "pipeline_sm90", "warpgroup_sm90")


@pytest.fixture(scope="module")
def truths():
    """The cases, by one block that does all their work; and the sites of synchronisation that run."""
    cases = [(make(**shape, D=D, dtype=torch.bfloat16), options) for D, shape, options in CASES]
    with emulator.settings(multiprocessors=1):
        emulator.reset_statistics()
        with torch.no_grad():
            results = [attend(*inputs[:3], **options) for inputs, options in cases]
        sites = [site for site in emulator.sites() if site["site"].startswith(OURS)]
    return list(zip(cases, results, strict=True)), sites


# What only shows when some lane, or some copy, is late: the schedule of threads decides.
ORDERS = [("late", 0), *(("early", seed) for seed in range(1, 9)), ("random", 1), ("random", 2)]


def noticed(site, mutation, truths) -> bool:
    for asynchrony, seed in ORDERS:
        for (inputs, options), truth in truths:
            try:
                with (
                    emulator.settings(asynchrony=asynchrony, seed=seed, multiprocessors=1),
                    torch.no_grad(),
                ):
                    with emulator.fault(site, mutation):
                        got = attend(*inputs[:3], **options)
            except kernels.EmulatorError:
                return True
            except UserError:
                continue  # this case does not reach it
            if not same([truth, got]):
                return True
    return False


def test_every_synchronisation_is_needed(truths):
    """Each fence, arrival, parity, count of bytes, wait and stride: changed alone, it is noticed."""
    truths, sites = truths
    assert {site["site"].split()[1] for site in sites} == {
        "cta_sync", "bar_sync", "bar_arrive", "warp_sync", "mbar_init", "fence_mbarrier_init",
        "mbar_arrive", "mbar_arrive_expect_tx", "mbar_wait", "fence_proxy_async", "tma_commit",
        "tma_wait_read", "wgmma_fence", "wgmma_commit", "wgmma_wait", "wgmma_ss", "wgmma_rs",
    }  # fmt: skip
    unnoticed = [
        (site["site"], mutation)
        for site in sites
        for mutation in site["mutations"]
        if not noticed(site["site"], mutation, truths)
    ]
    assert not unnoticed
