"""block_sparse_attention against dense attention in float64, its mask built element by element."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import BlockPattern, block_sparse_attention, random_blocks
from almostgpt.kernels import block_sparse_attention_reference as reference_module
from almostgpt.kernels.block_sparse_attention_reference import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def make(B=2, H=4, Hkv=2, T=21, Tk=None, D=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, D)] + [(B, Hkv, T if Tk is None else Tk, D)] * 2
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def make_pattern(H=4, n=12, block=4, window=1, global_blocks=1, count=2, layer=3):
    random = random_blocks(layer, H, n, window, global_blocks, count)
    return BlockPattern(block, window, global_blocks, random)


def sees(pattern, head, p, j):
    """Whether the query at position p sees the key at position j, as it is defined."""
    i, block = p // pattern.block, j // pattern.block
    return j <= p and (
        block < pattern.global_blocks
        or i - pattern.window < block <= i
        or block in pattern.random[head, i].tolist()
    )


def truth(q, k, v, pattern, starts=None, slopes=None, documents=None):
    """In the dtype of its inputs."""
    (B, H, T, D), Tk = q.shape, k.shape[2]
    mask = torch.zeros(B, H, T, Tk, dtype=torch.bool)
    distance = torch.zeros(B, 1, T, Tk, dtype=q.dtype)
    for b in range(B):
        row = None if documents is None else documents[b].tolist()
        for t in range(T):
            p = t + (0 if starts is None else starts[b])
            for j in range(Tk):
                distance[b, 0, t, j] = p - j
                at = (p, j)
                if row is not None:
                    if row[p] != row[j]:
                        continue
                    at = p - row.index(row[p]), j - row.index(row[p])
                for h in range(H):
                    mask[b, h, t, j] = sees(pattern, h, *at)
    k, v = (
        t.nan_to_num(nan=0.0).repeat_interleave(H // k.shape[1], 1) for t in (k, v)
    )  # NaN is what nobody sees
    scores = q @ k.mT / math.sqrt(D)
    if slopes is not None:
        scores = scores - slopes.to(q.dtype)[:, None, None] * distance
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


PATTERNS = st.fixed_dictionaries(
    {
        "block": st.integers(1, 7),
        "window": st.integers(1, 3),
        "global_blocks": st.integers(0, 3),
        "count": st.integers(0, 3),
        "layer": st.integers(0, 99),
    }
)


def assert_close(got, wanted, dtype):
    assert got.dtype == dtype and got.shape == wanted.shape
    if wanted.numel():
        unit = torch.finfo(dtype).eps
        assert (got.double() - wanted).abs().max() <= 8 * unit * max(1.0, wanted.abs().max())


@settings(deadline=None, max_examples=50)
@given(
    options=PATTERNS,
    T=st.integers(0, 26),
    Hkv=st.integers(1, 2),
    groups=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    alibi=st.booleans(),
    most=st.sampled_from([1, 3000, 1 << 24]),
    seed=st.integers(0, 2**31),
)
def test_whole_sequences(options, T, Hkv, groups, dtype, alibi, most, seed):
    """Outputs and gradients, at once and in parts."""
    H = Hkv * groups
    q, k, v = (t.requires_grad_() for t in make(2, H, Hkv, T, dtype=dtype, seed=seed))
    pattern = make_pattern(H, 26, **options)
    slopes = torch.linspace(0.5, 0.1, H) if alibi else None
    y = reference(q, k, v, pattern, alibi_slopes=slopes, most=most)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wanted = truth(*exact, pattern, slopes=slopes)
    assert_close(y, wanted, dtype)
    if dtype in (torch.float32, torch.float64):
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        gradients = torch.autograd.grad(y, (q, k, v), dy)
        for got, own in zip(
            gradients, torch.autograd.grad(wanted, exact, dy.double()), strict=True
        ):
            torch.testing.assert_close(got.double(), own, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(
    options=PATTERNS,
    T=st.integers(1, 5),
    starts=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    alibi=st.booleans(),
    most=st.sampled_from([1, 1 << 24]),
    seed=st.integers(0, 2**31),
)
def test_queries_on_a_cache(options, T, starts, dtype, alibi, most, seed):
    """Rows of different lengths; what is after a query is not looked at."""
    B, Tk = len(starts), 26
    q, k, v = make(B, T=T, Tk=Tk, dtype=dtype, seed=seed)
    for row, start in enumerate(starts):
        k[row, :, start + T :], v[row, :, start + T :] = torch.nan, torch.nan
    pattern = make_pattern(n=26, **options)
    slopes = torch.linspace(0.5, 0.1, 4) if alibi else None
    start = torch.tensor(starts, dtype=torch.int32 if seed % 2 else torch.int64)
    y = reference(q, k, v, pattern, start=start, alibi_slopes=slopes, most=most)
    wanted = truth(*(t.double() for t in (q, k, v)), pattern, starts, slopes)
    assert_close(y, wanted, dtype)
    if len(set(starts)) == 1:
        same = block_sparse_attention(q, k, v, pattern, start=starts[0], alibi_slopes=slopes)
        torch.testing.assert_close(same, y, rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(
    options=PATTERNS,
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    alibi=st.booleans(),
    most=st.sampled_from([1, 1 << 24]),
)
def test_documents_are_each_as_if_alone(options, lengths, alibi, most):
    T = sum(lengths)
    q, k, v = (t.requires_grad_() for t in make(B=2, T=T))
    pattern = make_pattern(n=52, **options)
    slopes = torch.linspace(0.5, 0.1, 4) if alibi else None
    orders = [lengths, lengths[::-1]]
    documents = torch.stack(
        [torch.repeat_interleave(torch.arange(len(o)) * 2, torch.tensor(o)) for o in orders]
    )
    y = reference(q, k, v, pattern, alibi_slopes=slopes, documents=documents, most=most)
    for row, order in enumerate(orders):
        parts = zip(*(t[row : row + 1].split(order, dim=2) for t in (q, k, v)), strict=True)
        alone = [block_sparse_attention(*part, pattern, alibi_slopes=slopes) for part in parts]
        torch.testing.assert_close(y[row : row + 1], torch.cat(alone, dim=2))
    torch.testing.assert_close(
        y.detach(), truth(q, k, v, pattern, slopes=slopes, documents=documents).detach()
    )
    own = documents[0] == documents[0, 0]
    for gradient in torch.autograd.grad(y[0, :, own].sum(), (q, k, v)):
        assert not gradient[0, :, ~own].any() and not gradient[1].any()


def test_in_pieces_it_is_the_same_as_whole():
    q, k, v = make(T=40)
    pattern = make_pattern(n=10)
    whole = block_sparse_attention(q, k, v, pattern)
    for pieces in ([1] * 40, [13, 1, 4, 20, 2]):
        start, found = 0, []
        for piece in pieces:
            seen = slice(0, start + piece)
            part = (q[:, :, start : start + piece], k[:, :, seen], v[:, :, seen])
            found.append(block_sparse_attention(*part, pattern, start=start))
            start += piece
        torch.testing.assert_close(torch.cat(found, dim=2), whole)


def test_a_change_of_a_later_token_changes_not_a_bit_before():
    q, k, v = make(T=30, dtype=torch.float32)
    pattern = make_pattern()
    before = block_sparse_attention(q, k, v, pattern)
    for place in (0, 3, 4, 17, 29):
        changed = [t.clone() for t in (q, k, v)]
        for t in changed:
            t[:, :, place] += 1
        after = block_sparse_attention(*changed, pattern)
        assert torch.equal(after[:, :, :place], before[:, :, :place])
        assert not torch.equal(after[:, :, place:], before[:, :, place:])


def test_a_key_counts_once_however_the_sets_overlap():
    """Draws that are global, in the window, in the future, nothing, or there twice."""
    q, k, v = make(B=1, T=32)
    random = torch.tensor([0, 3, 2, 2, 7, -1, 1, 2], dtype=torch.int32).expand(4, 8, 8)
    pattern = BlockPattern(4, 3, 1, random)
    # By the definition a block in the future is not seen, and one that is in two sets is seen.
    torch.testing.assert_close(block_sparse_attention(q, k, v, pattern), truth(q, k, v, pattern))
    last = block_sparse_attention(q[:, :, 29:], k, v, pattern, start=29)
    torch.testing.assert_close(last, truth(q, k, v, pattern)[:, :, 29:])


def test_a_window_over_everything_is_full_attention():
    q, k, v = make(T=33, D=16)
    pattern = make_pattern(n=9, window=9, global_blocks=0, count=1)
    full = kernels.flash_attention(q, k, v, causal=True)
    torch.testing.assert_close(block_sparse_attention(q, k, v, pattern), full)
    scaled = block_sparse_attention(q, k, v, pattern, scale=0.3)
    torch.testing.assert_close(scaled, kernels.flash_attention(q, k, v, causal=True, scale=0.3))


def test_gradcheck():
    q, k, v = (t.requires_grad_() for t in make(B=1, H=2, Hkv=1, T=7, D=2))
    pattern = make_pattern(H=2, n=4, block=2, count=1)
    slopes = torch.tensor([0.5, 0.25])
    for options in ({}, {"most": 1}, {"documents": torch.tensor([[0, 0, 0, 0, 1, 1, 1]])}):
        assert gradcheck(
            lambda q, k, v, o=options: reference(q, k, v, pattern, alibi_slopes=slopes, **o),
            (q, k, v),
        )


# --- the draw ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    layer=st.integers(0, 200),
    heads=st.integers(0, 4),
    n=st.integers(0, 20),
    window=st.integers(1, 4),
    global_blocks=st.integers(0, 4),
    count=st.integers(0, 4),
)
def test_draws_are_distinct_candidates_and_do_not_depend_on_the_length(
    layer, heads, n, window, global_blocks, count
):
    table = random_blocks(layer, heads, n, window, global_blocks, count)
    assert table.dtype == torch.int32 and table.shape == (heads, n, count)
    for row in table:
        for i, drawn in enumerate(row.tolist()):
            candidates = set(range(global_blocks, i - window + 1))
            there = [block for block in drawn if block >= 0]
            assert drawn == there + [-1] * (count - len(there))
            assert len(set(there)) == len(there) == min(count, len(candidates))
            assert set(there) <= candidates
    longer = random_blocks(layer, heads + 1, n + 7, window, global_blocks, count)
    assert torch.equal(longer[:heads, :n], table)


def test_every_choice_is_as_likely():
    """Chi-square over the pairs that many layers, heads and blocks draw out of eight."""
    counts: dict[tuple[int, ...], int] = {}
    for layer in range(60):
        for drawn in random_blocks(layer, 50, 11, 2, 2, 2)[:, 11 - 1].tolist():
            counts[tuple(sorted(drawn))] = counts.get(tuple(sorted(drawn)), 0) + 1
    pairs = 7 * 6 // 2  # blocks 2 … 8
    expected = 60 * 50 / pairs
    chi = sum((n - expected) ** 2 / expected for n in counts.values())
    assert len(counts) == pairs and chi < 45.3  # 0.1 % beyond it with 20 degrees of freedom
    rows = random_blocks(0, 8, 64, 1, 0, 3)
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 8


def test_the_draw_is_the_same_on_every_machine():
    """SplitMix64 by Python's own whole numbers, and its published first outputs."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF  # of the seed 0, as in Vigna's splitmix64.c
    for layer, head, block in ((0, 0, 9), (5, 2, 12), (11, 3, 30)):
        candidates = block - 2 - 1 + 1
        drawn = mix(mix(mix(mix(layer) + head) + block)) % candidates + 1
        table = random_blocks(layer, 4, 31, 2, 1, 1)
        assert table[head, block].tolist() == [drawn]


# --- where models run it -----------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that any tensor within has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


def test_memory_grows_with_the_length_and_a_step_does_not_grow():
    def largest(T, step=False):
        q, k, v = make(B=1, H=2, Hkv=1, T=T, D=8, dtype=torch.float32)
        pattern = make_pattern(H=2, n=T // 8, block=8)
        with Largest() as mode:
            if step:
                start = torch.tensor([T - 1])
                block_sparse_attention(q[:, :, -1:], k, v, pattern, start=start)
            else:
                leaves = [t.requires_grad_() for t in (q, k, v)]
                block_sparse_attention(*leaves, pattern).sum().backward()
        return mode.elements

    assert largest(2048) <= 2 * largest(1024)
    assert largest(1024, step=True) == largest(256, step=True)


@pytest.mark.parametrize("start", [0, 1])  # by blocks, and each query by itself
def test_as_many_small_attentions_at_once_as_a_grid_takes(start, monkeypatch):
    """Blocks may be small and many; PyTorch's kernels for GPUs take their heads by the grid's side."""
    heads = []
    attend = reference_module.scaled_dot_product_attention

    def counted(q, *args, **kwargs):
        heads.append(q.shape[1])
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(reference_module, "scaled_dot_product_attention", counted)
    T = 35000
    pattern = BlockPattern(1, 1, 0, random_blocks(0, 2, T + start, 1, 0, 0))
    v = torch.randn(1, 2, T + start, 4)
    y = block_sparse_attention(torch.randn(1, 2, T, 4), v, v, pattern, start=start)
    assert torch.equal(y, v[:, :, start:])  # of one key that is all there is
    assert sum(heads) == 2 * T and max(heads) < 2**16


@pytest.mark.parametrize("kind", ["whole", "parts", "documents", "alibi"])
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_it_is_whole_and_the_same(compiler, kind):
    torch._dynamo.reset()
    leaves = [t.requires_grad_() for t in make(T=21, dtype=torch.float32)]
    pattern, options = make_pattern(), {}
    if kind == "documents":
        options["documents"] = torch.tensor([[0] * 9 + [1] * 12, [0] * 21])
    if kind == "alibi":
        options["alibi_slopes"] = torch.linspace(0.5, 0.1, 4)
    function = block_sparse_attention
    if kind == "parts":
        function, options = reference, {"most": 3000}

    def run(q, k, v, pattern, options):
        return function(q, k, v, pattern, **options)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    outs = (f(*leaves, pattern, options) for f in (compiled, run))
    found, wanted = ((y, *torch.autograd.grad(y.square().sum(), leaves)) for y in outs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_compiled_step_serves_every_position():
    torch._dynamo.reset()
    q, k, v = make(T=1, Tk=40, dtype=torch.float32)
    pattern, graphs = make_pattern(), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(block_sparse_attention, fullgraph=True, backend=count)
    for start in ([0, 39], [17, 4], [20, 21]):
        y = step(q, k, v, pattern, start=torch.tensor(start))
        torch.testing.assert_close(y, truth(q, k, v, pattern, start))
    assert len(graphs) == 1


def test_where_models_run_it():
    q, k, v = make(dtype=torch.float32)
    pattern = make_pattern()
    wanted = block_sparse_attention(q, k, v, pattern)
    leaf = q.clone().requires_grad_()
    outs = [
        block_sparse_attention(leaf, k, v, pattern),
        checkpoint(block_sparse_attention, leaf, k, v, pattern, use_reentrant=False),
    ]
    plain, checkpointed = (torch.autograd.grad(out.sum(), leaf)[0] for out in outs)
    torch.testing.assert_close(outs[1], wanted)
    assert torch.equal(plain, checkpointed)
    with torch.inference_mode():
        torch.testing.assert_close(block_sparse_attention(q, k, v, pattern), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        y = block_sparse_attention(q, k, v, pattern)
    assert torch.equal(y, block_sparse_attention(*(t.bfloat16() for t in (q, k, v)), pattern))
    on_meta = BlockPattern(4, 1, 1, pattern.random.to("meta"))
    for start in (0, torch.zeros(2, dtype=torch.int32, device="meta")):
        meta = block_sparse_attention(*(t.to("meta") for t in (q, k, v)), on_meta, start=start)
        assert meta.shape == wanted.shape and meta.is_meta
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (leaf, k, v)]
        fake = BlockPattern(4, 1, 1, mode.from_tensor(pattern.random))
        for options in (
            {},
            {"start": mode.from_tensor(torch.zeros(2, dtype=torch.int32))},
            {"documents": mode.from_tensor(torch.zeros(2, 21, dtype=torch.int32))},
        ):
            y = block_sparse_attention(*fakes, fake, **options)
            y.sum().backward()
            assert y.shape == wanted.shape and fakes[0].grad.shape == q.shape
    found = kernels.explain("block_sparse_attention", q, k, v, pattern)
    assert found.backend == "reference" and "no cuda kernel" in found.reasons["cuda"]


def test_a_query_beyond_the_keys_is_finite():
    """Of a row with fewer tokens than the others."""
    q, k, v = make(T=3, Tk=8)
    y = block_sparse_attention(q, k, v, make_pattern(), start=torch.tensor([5, 8]))
    assert y.isfinite().all()
    torch.testing.assert_close(y[:1], truth(q[:1], k[:1], v[:1], make_pattern(), [5]))


Q, K, V = make(T=4, Tk=8)
PATTERN = make_pattern()
INT = torch.int32


@pytest.mark.parametrize(
    "args, options, says",
    [
        ((Q[0], K, V, PATTERN), {}, r"must be \(B, H, T, D\) with D ≥ 1"),
        ((Q, K, V[:, :, 1:], PATTERN), {}, "k and v must have one shape"),
        ((Q[:, :3], K, V, PATTERN), {}, "3 query heads are no multiple of 2"),
        ((Q, K.float(), V, PATTERN), {}, "one floating dtype"),
        ((Q, K, V.to("meta"), PATTERN), {}, "cpu and meta"),
        ((Q, K, 0, PATTERN), {}, "must be tensors"),
        ((Q, K, V, PATTERN), {"scale": 0}, "scale must be a number above 0"),
        ((Q, K, V, PATTERN), {"alibi_slopes": torch.ones(3)}, r"must be \(4,\) floats"),
        (
            (Q, K, V, PATTERN),
            {"alibi_slopes": torch.ones(4, requires_grad=True)},
            "get no gradient",
        ),
        ((Q, K, V, PATTERN.random), {}, "must be a BlockPattern, not Tensor"),
        ((Q, K, V, BlockPattern(0, 1, 1, PATTERN.random)), {}, "block of a pattern must be at"),
        ((Q, K, V, BlockPattern(4, 0, 1, PATTERN.random)), {}, "window of a pattern must be at"),
        ((Q, K, V, BlockPattern(4, 1, 1, PATTERN.random[1:])), {}, r"int32 and \(4, blocks, count"),
        ((Q, K, V, BlockPattern(4, 1, 1, PATTERN.random.long())), {}, "not torch.int64"),
        (
            (Q, K, V, BlockPattern(1, 1, 1, PATTERN.random[:, :3])),
            {},
            "3 blocks of 1 .* 4 positions",
        ),
        ((Q, K, V, PATTERN), {"start": 5}, "4 queries from position 5 are not within 8 keys"),
        ((Q, K, V, PATTERN), {"start": True}, "an int or a tensor"),
        ((Q, K, V, PATTERN), {"start": torch.zeros(2)}, r"\(2,\) int32 or int64"),
        ((Q, K, V, PATTERN), {"start": torch.tensor([0, 9])}, "start of 9"),
        ((Q, K, V, PATTERN), {"start": torch.tensor([-1, 0])}, "start of -1"),
        ((Q, K, V, PATTERN), {"documents": torch.zeros(2, 4, dtype=INT)}, "for whole sequences"),
        ((Q, Q, Q, PATTERN), {"documents": torch.tensor([[0, 1, 0, 1]] * 2)}, "never decrease"),
    ],
)
def test_bad_inputs_are_named(args, options, says):
    with pytest.raises(UserError, match=says):
        block_sparse_attention(*args, **options)


@pytest.mark.parametrize("numbers", [(0, 1, 1, 0, 0, 0), (0, -1, 1, 1, 0, 0), (0, 1, 1, 1, 0, 0.5)])
def test_what_cannot_be_drawn_is_said(numbers):
    with pytest.raises(UserError, match="whole numbers from 0, and window from 1"):
        random_blocks(*numbers)
