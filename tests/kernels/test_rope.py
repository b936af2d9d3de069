"""RoPE: the reference, the Triton kernel and its torch ops against complex numbers in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import triton_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference",) if triton_ops.MISSING else ("reference", "triton")
needs_triton = pytest.mark.skipif(triton_ops.MISSING is not None, reason=str(triton_ops.MISSING))
both = pytest.mark.parametrize("backend", BACKENDS)


def tables(positions: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, rounded from float64."""
    turns = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), turns)
    return angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)


def by(backend: str):
    """The op, forced to one backend."""

    def run(*args, **options):
        with kernels.use_backend(backend, ops=["rope"]):
            return kernels.rope(*args, **options)

    return run


def truth(x, cos, sin, positions):
    """Pairs as complex numbers, in x's dtype (complex32 is none): (x_i + j·x_k) · (cos + j·sin)."""
    if not isinstance(positions, torch.Tensor):
        positions = torch.arange(positions, positions + x.shape[1], device=x.device)
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.complex(a, b) * torch.complex(cos, sin).to(torch.complex128)[positions, None]
    return torch.cat([turned.real, turned.imag, rest], dim=-1)


def plain(x, cos, sin, positions):
    """The four products in x's own dtype."""
    if not isinstance(positions, torch.Tensor):
        positions = torch.arange(positions, positions + x.shape[1], device=x.device)
    half = cos.shape[1]
    cos, sin = (table[positions, None].to(x.dtype) for table in (cos, sin))
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def with_gradient(function, x, dy, *others):
    x = x.detach().requires_grad_()
    y = function(x, *others)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def assert_close_to_truth(function, x, dy, cos, sin, positions):
    exact = with_gradient(truth, x.double(), dy.double(), cos.double(), sin.double(), positions)
    same = with_gradient(plain, x, dy, cos, sin, positions)
    ours = with_gradient(function, x, dy, cos, sin, positions)
    for got, peer, wanted, terms in zip(ours, same, exact, (x, dy), strict=True):
        assert got.dtype == x.dtype and got.shape == wanted.shape and got.is_contiguous()
        if wanted.numel():
            largest = terms.double().abs().max()
            bound = 2 * (peer - wanted).abs().max() + 4 * torch.finfo(x.dtype).eps * largest
            assert (got - wanted).abs().max() <= bound


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same (B, T, H, D) values in another memory."""
    if layout == "projection":  # queries and keys; values follow them
        return torch.cat([values, values[:, :, :1]], dim=2)[:, :, :-1]
    if layout == "heads first":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other element":
        return values.repeat_interleave(2, dim=-1)[..., ::2]
    return values


LAYOUTS = ("contiguous", "projection", "heads first", "every other element")


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*(st.integers(0, 4) for _ in range(2)), st.integers(1, 5), st.integers(1, 52)),
    fraction=st.floats(0, 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    layouts=st.tuples(*(st.sampled_from(LAYOUTS) for _ in range(2))),
    packed=st.booleans(),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_error_is_within_twice_that_of_plain_maths(
    shape, fraction, dtype, layouts, packed, backend, seed
):
    B, T, _, D = shape
    if dtype == torch.float64:
        backend = "reference"
    generator = torch.Generator().manual_seed(seed)
    x, dy = (
        laid_out(torch.randn(shape, generator=generator).to(DEVICE, dtype), layout)
        for layout in layouts
    )
    positions = torch.randint(0, 50, (B, T), generator=generator)
    positions = positions.to(DEVICE) if packed else int(seed % 45)
    assert_close_to_truth(by(backend), x, dy, *tables(50, int(fraction * (D // 2))), positions)


@both
@pytest.mark.parametrize("heads, D", [(18, 64), (3, 96), (1, 128), (7, 48), (5, 20)])
def test_heads_as_models_have_them(backend, heads, D):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 2, 7, heads, D, device=DEVICE, dtype=torch.bfloat16)
    for R in (D, D // 4 * 2, 0):
        assert_close_to_truth(by(backend), x, dy, *tables(9, R // 2), 2)


@both
def test_as_transformers_has_it(backend):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    cos, sin = tables(40, 32)
    q, k = torch.randn(2, 5, 4, 64, device=DEVICE), torch.randn(2, 5, 2, 64, device=DEVICE)
    wide = (torch.cat([table[7:12]] * 2, dim=-1)[None] for table in (cos, sin))
    theirs = llama.apply_rotary_pos_emb(q, k, *wide, unsqueeze_dim=2)
    ours = by(backend)(torch.cat([q, k], dim=2), cos, sin, 7).split([4, 2], dim=2)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted)


@both
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_by_a_start_and_by_a_tensor_are_equal(backend, dtype):
    x, (cos, sin) = torch.randn(3, 6, 2, 16, device=DEVICE), tables(40, 8)
    every = torch.arange(11, 17, dtype=dtype, device=DEVICE).expand(3, 6)
    assert torch.equal(by(backend)(x, cos, sin, 11), by(backend)(x, cos, sin, every))
    # A row of a batch has its own positions.
    every = every + torch.tensor([[0], [5], [20]], device=DEVICE, dtype=dtype)
    y = by(backend)(x, cos, sin, every)
    for row, start in enumerate((11, 16, 31)):
        assert torch.equal(y[row], by(backend)(x, cos, sin, start)[row])


@both
def test_turned_back_it_is_what_it_was(backend):
    x, (cos, sin) = torch.randn(2, 9, 3, 20, device=DEVICE), tables(30, 8)
    y = by(backend)(x, cos, sin, 4)
    assert not torch.allclose(x, y, atol=0.1)
    torch.testing.assert_close(by(backend)(y, cos, -sin, 4), x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 79), st.sampled_from(BACKENDS))
def test_scores_depend_on_the_distance_alone(at_q, at_k, shift, backend):
    q, k = torch.randn(2, 1, 1, 2, 16, device=DEVICE)
    rope, (cos, sin) = by(backend), tables(100, 8)

    def score(at_q, at_k):
        return (rope(q, cos, sin, at_q) * rope(k, cos, sin, at_k)).sum(-1)

    torch.testing.assert_close(
        score(at_q, at_k), score(at_q + shift, at_k + shift), atol=1e-5, rtol=1e-5
    )


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_are_as_accurate_as_near_ones(backend, dtype):
    far, half = 100_000, 8
    x, (cos, sin) = torch.ones(1, 1, 1, 2 * half, device=DEVICE, dtype=dtype), tables(far + 1, half)
    y = by(backend)(x, cos, sin, torch.tensor([[far]], device=DEVICE)).flatten().tolist()
    for i in range(half):
        angle = far * 10000.0 ** (-i / half)
        ulps = 4 * torch.finfo(dtype).eps
        assert y[i] == pytest.approx(math.cos(angle) - math.sin(angle), abs=ulps)
        assert y[i + half] == pytest.approx(math.cos(angle) + math.sin(angle), abs=ulps)


@both
def test_no_dimension_rotated_is_the_identity(backend):
    x = torch.randn(2, 3, 2, 8, device=DEVICE)
    y, dx = with_gradient(by(backend), x, x, *tables(5, 0))
    assert torch.equal(y, x) and torch.equal(dx, x) and y.data_ptr() != x.data_ptr()


# ---------------------------------------------------------------- gradients


def test_gradients_in_float64():
    x = torch.randn(2, 3, 2, 10, dtype=torch.float64, device=DEVICE, requires_grad=True)
    cos, sin = tables(8, 4)
    assert gradcheck(lambda x: kernels.rope(x, cos, sin, 3), x)
    assert gradgradcheck(lambda x: kernels.rope(x, cos, sin, 3), x)


def op(x, cos, sin, positions):
    """The torch op itself, as compiled code calls it."""
    packed = isinstance(positions, torch.Tensor)
    return torch.ops.almostgpt.rope(
        x, cos, sin, positions if packed else None, 0 if packed else positions, False
    )


@needs_triton
@pytest.mark.parametrize("rotate", [by("triton"), op])
def test_second_derivatives_of_the_kernel(rotate):
    x, dy, v = torch.randn(3, 2, 3, 2, 10, device=DEVICE)
    x.requires_grad_(), dy.requires_grad_()
    cos, sin = tables(8, 4)
    y = rotate(x, cos, sin, 3)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx, dy, v)
    torch.testing.assert_close(ddy, rotate(v, cos, sin, 3))


@both
def test_nothing_of_x_is_kept_for_backward(backend):
    x, kept = torch.randn(8, 4, 6, 16, device=DEVICE, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        by(backend)(x, *tables(4, 8))
    assert kept and all(tensor.numel() <= 4 * 16 for tensor in kept)


def test_torch_func_runs_the_reference():
    x, (cos, sin) = torch.randn(3, 2, 4, 2, 8), [table.cpu() for table in tables(4, 4)]
    each = torch.func.vmap(lambda x: kernels.rope(x, cos, sin))(x)
    torch.testing.assert_close(each[1], kernels.rope(x[1], cos, sin))
    y, dy = torch.func.jvp(lambda x: kernels.rope(x, cos, sin), (x[0],), (x[1],))
    torch.testing.assert_close(dy, each[1])


# ---------------------------------------------------------------- in place


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_place_it_writes_into_the_projection(backend, dtype):
    qkv = torch.randn(2, 5, 6, 12, device=DEVICE, dtype=dtype)
    before, qk, (cos, sin) = qkv.clone(), qkv[:, :, :4], tables(9, 4)
    wanted = by(backend)(qk, cos, sin, 2)
    with torch.no_grad():
        assert by(backend)(qk, cos, sin, 2, inplace=True) is qk
    assert torch.equal(qk, wanted)
    assert torch.equal(qkv[:, :, 4:], before[:, :, 4:])
    assert torch.equal(qkv[..., 8:], before[..., 8:])


@both
def test_in_place_is_for_inference(backend):
    x, (cos, sin) = torch.randn(1, 2, 1, 4, device=DEVICE), tables(4, 2)
    weight = torch.ones_like(x, requires_grad=True)
    with pytest.raises(UserError, match="a gradient of x is recorded"):
        by(backend)(weight, cos, sin, inplace=True)
    product = (weight * x).sum()  # has saved x
    by(backend)(x, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        x = torch.randn(1, 2, 1, 4, device=DEVICE)
        wanted = by(backend)(x, cos, sin, 1)
        assert torch.equal(by(backend)(x, cos, sin, 1, inplace=True), wanted)


# ---------------------------------------------------------------- torch ops and compilation


@needs_triton
def test_opcheck():
    cos, sin = tables(20, 4)
    positions = torch.randint(0, 20, (2, 3), device=DEVICE)
    for shape in ((2, 3, 3, 9), (2, 0, 3, 8)):
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        opcheck(torch.ops.almostgpt.rope.default, (x, cos, sin, None, 5, False))
    x = torch.randn(2, 3, 3, 9, device=DEVICE)
    opcheck(torch.ops.almostgpt.rope_.default, (x, cos, sin, None, 5))
    x = torch.randn(2, 3, 4, 8, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    opcheck(torch.ops.almostgpt.rope.default, (x, cos, sin, positions, 0, True))


@both
def test_compiles_whole_with_dynamic_shapes_forward_and_backward(backend):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    cos, sin = tables(40, 4)
    with kernels.use_backend(backend, ops=["rope"]):
        for of in (lambda T: T + 6, lambda T: torch.arange(2 * T, device=DEVICE).view(2, T)):
            graphs.clear()
            compiled = torch.compile(kernels.rope, fullgraph=True, dynamic=True, backend=count)
            for T in (7, 6, 5):
                x, dy = torch.randn(2, 2, T, 3, 10, device=DEVICE)
                got = with_gradient(compiled, x, dy, cos, sin, of(T))
                for a, b in zip(
                    got, with_gradient(kernels.rope, x, dy, cos, sin, of(T)), strict=True
                ):
                    torch.testing.assert_close(a, b)
            assert len(graphs) == 1


@both
def test_compiled_in_place(backend):
    cos, sin = tables(9, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def rotate(x):
        kernels.rope(x, cos, sin, 2, inplace=True)
        return x * 2

    x = torch.randn(2, 3, 2, 10, device=DEVICE)
    wanted = kernels.rope(x, cos, sin, 2)
    with kernels.use_backend(backend, ops=["rope"]), torch.no_grad():
        twice = rotate(x)
    torch.testing.assert_close(x, wanted)
    torch.testing.assert_close(twice, 2 * wanted)


@both
def test_autocast_changes_nothing(backend):
    x, (cos, sin) = torch.randn(1, 3, 2, 8, device=DEVICE), tables(4, 4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = by(backend)(x, cos, sin)
        assert y.dtype == torch.float32
        assert by(backend)(x.bfloat16(), cos, sin).dtype == torch.bfloat16
    assert torch.equal(y, by(backend)(x, cos, sin))


# ---------------------------------------------------------------- what cannot be


X, TABLE = torch.zeros(2, 3, 4, 8), torch.zeros(9, 4)


@pytest.mark.parametrize(
    "args, says",
    [
        ((X[0], TABLE, TABLE), r"x must be \(B, T, heads, D\), not \(3, 4, 8\)"),
        ((X.int(), TABLE, TABLE), "floating tensor of 16 bits or more, not torch.int32"),
        ((X[..., :7], TABLE, TABLE), r"R at most 7 for x of \(2, 3, 4, 7\), not \(9, 4\)"),
        ((X, TABLE, TABLE[:5]), r"not \(9, 4\) and \(5, 4\)"),
        ((X, TABLE, TABLE.double()), "must be float32, not torch.float32 and torch.float64"),
        ((X, TABLE.to("meta"), TABLE), "x is on cpu, cos on meta and sin on cpu"),
        ((X, TABLE, TABLE.clone().requires_grad_()), "are constants"),
        ((X, TABLE, TABLE, 7), "3 tokens from position 7 are not within the 9 of cos and sin"),
        ((X, TABLE, TABLE, -1), "from position -1"),
        ((X, TABLE, TABLE, 1.0), "an int or a tensor, not float"),
        ((X, TABLE, TABLE, True), "an int or a tensor, not bool"),
        ((X, TABLE, TABLE, torch.zeros(3, dtype=torch.int32)), r"\(2, 3\) for x of .*, not \(3,\)"),
        ((X, TABLE, TABLE, torch.zeros(2, 3)), "int32 or int64, not torch.float32"),
        (
            (X, TABLE, TABLE, torch.zeros(2, 3, dtype=torch.int64, device="meta")),
            "x is on cpu and positions on meta",
        ),
    ],
)
def test_bad_inputs_are_named(args, says):
    with pytest.raises(UserError, match=says):
        kernels.rope(*args)


def test_memory_that_elements_share_is_not_written():
    x = torch.zeros(1, 1, 4, 8).expand(2, 3, 4, 8)
    with pytest.raises(UserError, match="each have their own memory"):
        kernels.rope(x, TABLE, TABLE, inplace=True)


@pytest.mark.parametrize(
    "x, options, why",
    [
        (X.double(), {}, "float64"),
        (torch.zeros(1, 1, 1, 8192), {}, "heads of 8192 dimensions are above 4096"),
        (torch.empty(2**15, 2**15, 2, 8, device="meta"), {}, "more than 1073741824"),
        (X.mT.contiguous().mT, {"inplace": True}, "the last dimension must be contiguous"),
    ],
)
@needs_triton
def test_what_the_kernel_does_not_serve(x, options, why):
    table = torch.zeros(2**16, 4, device=x.device)
    found = kernels.explain("rope", x, table, table, capability=(9, 0), **options)
    assert found.backend == "reference" and why in found.reasons["triton"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nobody looks at the positions")
@pytest.mark.parametrize("position", [-1, 10])
def test_a_position_beyond_the_tables_is_named_on_a_cpu(position):
    table = torch.ones(10, 2)
    with pytest.raises(UserError, match=rf"rope: position {position} is not within the 10 of"):
        kernels.rope(torch.ones(1, 2, 1, 4), table, table, torch.tensor([[0, position]]))
