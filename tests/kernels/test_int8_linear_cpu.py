"""int8_linear on a processor: exact sums of whole numbers, so one right answer to the last bit."""

import hypothesis.strategies as st
import pytest
import torch
from cpu_kernels import available, needs_library, on_every_set, threads  # noqa: F401
from hypothesis import given, settings

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import cpu
from almostgpt.kernels.int8_linear import dequantize_rows, quantize_rows, reference

op = torch.ops.almostgpt.cpu_int8_linear


def formula(x, weight, scales, bias):
    """What csrc/cpu/linear.h promises, in whole numbers and float64."""
    wide = x.double()
    largest = wide.abs().amax(-1, keepdim=True)
    units = torch.full_like(largest, 32767) / largest  # 32767 / largest takes a reciprocal
    codes = torch.where(largest > 0, wide * units, 0).round().long()
    sums = codes @ weight.long().T
    y = sums.double() * (largest / 32767 * scales.double())
    return (y if bias is None else y + bias.double()).float().to(x.dtype)


def layer(inputs, outputs, seed=0):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, inputs), generator=random, dtype=torch.int8)
    return weight, torch.rand(outputs, generator=random), torch.randn(outputs, generator=random)


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 400),
    outputs=st.integers(1, 200),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    exponent=st.integers(-130, 110),
    seed=st.integers(0, 2**31),
)
def test_every_instruction_set_gives_the_bits_of_the_formula(
    rows, inputs, outputs, biased, dtype, exponent, seed
):
    weight, scales, bias = layer(inputs, outputs, seed)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    x = (x.double() * 2.0**exponent).to(dtype)
    bias = bias if biased else None
    expected = formula(x, weight, scales, bias)
    for number in available:
        assert torch.equal(op(x, weight, scales, bias, number), expected)


@needs_library
@on_every_set
@pytest.mark.parametrize("inputs", [512, 513, 4096, 8192, 8193, 40_000])
def test_the_largest_sums_do_not_overflow(inputs, number):
    """Every product at its largest, and of one sign: 40,000 of them need 38 bits."""
    weight = torch.full((3, inputs), -128, dtype=torch.int8)
    weight[1] = 127
    x, scales = torch.ones(5, inputs), torch.ones(3)
    expected = torch.tensor([-128.0, 127.0, -128.0]) * inputs
    assert torch.equal(op(x, weight, scales, None, number), expected.expand(5, 3))
    assert torch.equal(op(-x, weight, scales, None, number), -expected.expand(5, 3))


@needs_library
@on_every_set
@pytest.mark.parametrize("inputs", [768, 3072])
def test_the_error_is_that_of_16_bits(inputs, number):
    """Of x no more than half a unit, max |x| / 65534, times Σ |w|; and a rounding to float32."""
    x, dense = torch.randn(7, inputs), torch.randn(130, inputs)
    weight, scales = quantize_rows(dense)
    exact = x.double() @ dequantize_rows(weight, scales, torch.float64).T
    half_a_unit = x.double().abs().amax(-1, keepdim=True) / 65534
    bound = half_a_unit * (weight.double().abs().sum(-1) * scales) + 2**-24 * exact.abs()
    # dequantize_rows rounds each product to float32, the kernel does not.
    bound += 2**-24 * (x.double().abs() @ (weight.double().abs() * scales[:, None]).T)
    assert (
        (op(x, weight, scales, None, number).double() - exact).abs() <= bound * (1 + 1e-9)
    ).all()


@needs_library
def test_closer_to_the_truth_than_bfloat16_activations():
    x, dense = torch.randn(4, 768), torch.randn(100, 768)
    weight, scales = quantize_rows(dense)
    exact = x.double() @ (weight.double() * scales[:, None].double()).T
    ours = (kernels.int8_linear(x, weight, scales).double() - exact).norm()
    rounded = (reference(x.bfloat16().float(), weight, scales).double() - exact).norm()
    assert 20 * ours < rounded


@needs_library
@on_every_set
def test_rows_that_are_not_finite_show_and_rows_of_zeros_are_the_bias(number):
    weight, scales, bias = layer(100, 9)
    x = torch.randn(6, 100)
    x[1, 99], x[2, 0], x[3, 5] = torch.nan, torch.inf, -torch.inf
    x[4] = 0
    x[5] = -0.0
    y = op(x, weight, scales, bias, number)
    assert y[1:4].isnan().all()
    assert torch.equal(y[4:], bias.expand(2, 9))
    assert torch.equal(y[:1], formula(x[:1], weight, scales, bias))  # its neighbours are left alone


@needs_library
@on_every_set
def test_any_number_of_threads_and_any_company(number, threads):  # noqa: F811
    weight, scales, bias = layer(1000, 777)
    x = torch.randn(37, 1000)
    threads(1)
    one = op(x, weight, scales, bias, number)
    threads(2)
    assert torch.equal(op(x, weight, scales, bias, number), one)
    assert torch.equal(op(x[5:6], weight, scales, bias, number), one[5:6])


@needs_library
def test_strides_and_emptiness():
    weight, scales, bias = layer(33, 70)
    base = torch.randn(4, 3, 80)
    for x in (base[..., 5:38], base.transpose(0, 1)[..., ::2][..., :33], base[2, 1, 3:36]):
        expected = formula(x, weight, scales, bias)
        assert torch.equal(kernels.int8_linear(x, weight, scales, bias), expected)
    assert kernels.int8_linear(torch.empty(0, 33), weight, scales).shape == (0, 70)
    assert kernels.int8_linear(base[..., :33], weight[:0], scales[:0]).shape == (4, 3, 0)
    nothing = kernels.int8_linear(torch.empty(2, 0), weight[:, :0].contiguous(), scales, bias)
    assert torch.equal(nothing, bias.expand(2, 70))


@needs_library
def test_which_one_runs():
    weight, scales, bias = layer(16, 8)
    x = torch.randn(300, 16)
    answer = kernels.explain("int8_linear", x, weight, scales, bias)
    if cpu.best() != "portable":
        assert (answer.backend, answer.kernel) == ("cpu", "int8_linear")
    answer = kernels.explain("int8_linear", x.half(), weight, scales)
    assert answer.backend == "reference" and "not torch.float16" in answer.reasons["cpu"]
    with kernels.use_backend("cpu"), pytest.raises(UserError, match="not torch.float64"):
        kernels.int8_linear(x.double(), weight, scales)
    for b in (bias.double(), bias.half()):
        got = kernels.int8_linear(x[:4], weight, scales, b)
        assert torch.equal(got, formula(x[:4], weight, scales, b.float()))


@needs_library
def test_under_compile():
    weight, scales, bias = layer(16, 8)
    x = torch.randn(2, 16)
    compiled = torch.compile(kernels.int8_linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, weight, scales, bias), formula(x, weight, scales, bias))


@needs_library
def test_opcheck_and_what_the_op_itself_refuses():
    weight, scales, bias = layer(8, 4)
    x = torch.randn(2, 8)
    torch.library.opcheck(op.default, (x, weight, scales, bias, cpu.BEST))
    for arguments, message in [
        ((x[:, :7], weight, scales, bias, -1), "x must be"),
        ((x, weight.short(), scales, bias, -1), "weight must be int8"),
        ((x, weight, scales.double(), bias, -1), "scales must be float32"),
        ((x, weight, scales[:3], bias, -1), "scales must be float32"),
        ((x, weight, scales, bias.half(), -1), "bias must be float32"),
        ((x.half(), weight, scales, bias, -1), "float32 or bfloat16"),
        ((x, weight, scales, bias, 7), "no instruction set 7"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
