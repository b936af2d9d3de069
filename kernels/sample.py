"""The next token of every sequence, drawn from its logits.

For one row of logits:

1. Of a token that was in the sequence l becomes l · penalty where it is negative, else l / penalty.
2. All are divided by the temperature.
3. top_k keeps those that are no less than the k-th largest.
4. top_p keeps, of these, those that are no less than the largest value t for which the
   probabilities of all that are no less than t reach p.
5. min_p keeps those with a probability of at least min_p times the largest.
6. Of what is kept, the token with the largest l + g is drawn, where g = −ln(−ln(1 − v)) and v is
   uniform. This is a draw from softmax(l) that needs no sum (the Gumbel-max trick).

Every filter is a threshold: equal logits are kept or dropped together, and no order of them matters.

v = (w + ½) / 2³², with w a word of Philox4x32-10: of token i word i & 3 of the block whose counter
is (i >> 2, position, sequence, sequence >> 32) and whose key is (seed, seed >> 32), each taken modulo
2³². So a draw depends on (seed, sequence, position) and the row's own logits alone: not on the other
rows, nor on how far the vocabulary is padded, nor on how a kernel was launched.

Sources: Keskar et al., "CTRL", arXiv:1909.05858 (1); Fan et al., "Hierarchical Neural Story
Generation", arXiv:1805.04833 (3); Holtzman et al., "The Curious Case of Neural Text Degeneration",
arXiv:1904.09751 (4); Nguyen et al., "Min-p Sampling", arXiv:2407.01082 (5); Gumbel, "Statistical
Theory of Extreme Values" (1954) and Maddison et al., "A* Sampling", arXiv:1411.0030 (6); Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from almostgpt.errors import UserError
from almostgpt.kernels import sample_reference
from almostgpt.kernels.csrc import csrc_kernels, define
from almostgpt.kernels.dispatch import Kernel, Op
from almostgpt.kernels.sample_reference import Options, Streams

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Below the lowest only equal logits are drawn among, and from the highest on all are equally likely;
# between them neither a temperature nor its reciprocal leaves the range of float32.
_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 1e-10, 1e10


def sample(
    logits: Tensor,
    positions: Tensor,
    seeds: Tensor,
    sequences: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
    logprobs: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Draw one token for each row of logits; the filters' definitions are at the top of this file.

    Nothing has a gradient. A row with a NaN gives the id of its first NaN, and a log-probability of
    NaN; of infinite logits one is drawn; a row of −inf alone gives 0. An id is always in [0, V).

    Args:
        logits: (B, V), V ≥ 1; float32, float16, bfloat16 or float64, in rows that are contiguous,
            any stride apart (others are copied first). Arithmetic is in float32, or float64.
        positions: (B,) int64, the position in its sequence of the token that is drawn.
        seeds: (B,) int64, 64 bits each.
        sequences: (B,) int64, the number of each sequence under its seed.
        temperature: 0 takes the largest logit, the lowest id of equal ones.
        top_k: at least 1; None: all.
        top_p: in (0, 1]; None or 1: all.
        min_p: in [0, 1]; None or 0: all.
        repetition_penalty: above 0; 1: none.
        seen: (B, V) bool, the tokens that were in each sequence; the drawn one is marked in it.
        logprobs: also give the log-probabilities.

    Returns:
        ids (B,) int64, and with ``logprobs`` (B,) float32, otherwise None: log softmax of the
        logits as they were given, before penalty, temperature and filters, at the drawn ids.

    Raises:
        UserError: shapes, dtypes or devices that do not fit, an option out of its range, or a
            penalty without ``seen``.
    """
    options = Options(temperature, top_k, top_p, min_p, repetition_penalty)
    return SAMPLE(logits, positions, seeds, sequences, seen, logprobs, **options._asdict())


def check_options(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Raises ``UserError`` for values that mean nothing."""
    if not (_number(temperature) and temperature >= 0):
        raise UserError(f"temperature is {temperature}, but must be 0 (greedy) or above")
    if top_k is not None and not (is_whole(top_k) and top_k >= 1):
        raise UserError(f"top_k is {top_k}, but must be a whole number from 1 on")
    if top_p is not None and not (_number(top_p) and 0 < top_p <= 1):
        raise UserError(f"top_p is {top_p}, but must be in (0, 1]")
    if min_p is not None and not (_number(min_p) and 0 <= min_p <= 1):
        raise UserError(f"min_p is {min_p}, but must be in [0, 1]")
    if not (_number(repetition_penalty) and repetition_penalty > 0):
        raise UserError(
            f"repetition_penalty is {repetition_penalty}, but must be above 0 (1: none)"
        )


def is_whole(value: object) -> bool:
    """A whole number, Python's or numpy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _number(value: object) -> bool:
    """A number that fits into a float."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _check(logits, positions, seeds, sequences, seen=None, logprobs=False, **options) -> None:
    name = "sample"
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise UserError(f"{name}: logits must be (B, V) with V ≥ 1, not {tuple(logits.shape)}")
    if logits.dtype not in _DTYPES:
        raise UserError(
            f"{name}: logits must be a floating tensor of 16 bits or more, not {logits.dtype}"
        )
    rows = {"positions": positions, "seeds": seeds, "sequences": sequences}
    for what, tensor in rows.items():
        if tensor.shape != logits.shape[:1] or tensor.dtype != torch.int64:
            raise UserError(
                f"{name}: {what} must be int64 and ({logits.shape[0]},), one for each row of "
                f"logits, not {tensor.dtype} and {tuple(tensor.shape)}"
            )
    if seen is not None and (seen.shape != logits.shape or seen.dtype != torch.bool):
        raise UserError(
            f"{name}: seen must be bool and {tuple(logits.shape)} as logits, not {seen.dtype} and "
            f"{tuple(seen.shape)}"
        )
    for what, tensor in {**rows, "seen": seen}.items():
        if tensor is not None and tensor.device != logits.device:
            raise UserError(f"{name}: logits are on {logits.device} and {what} on {tensor.device}")
    try:
        check_options(**options)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if options.get("repetition_penalty", 1.0) != 1 and seen is None:
        raise UserError(
            f"{name}: a repetition_penalty needs seen, the tokens that were in each sequence"
        )


def _usable(options: dict) -> Options:
    """Of checked options: temperatures so low, or so high, that they make no difference made one."""
    given = Options(**options)
    temperature = float(given.temperature)
    if temperature > 0:
        temperature = min(max(temperature, _LOWEST_TEMPERATURE), _HIGHEST_TEMPERATURE)
    top_k = None if given.top_k is None else int(given.top_k)
    return given._replace(temperature=temperature, top_k=top_k)


# --- torch.ops.almostgpt.sample and torch.ops.almostgpt_emulator.sample ----------------------------
# In place of None: top_k 0, top_p 1, min_p 0; log-probabilities that nobody asks for are empty.


def _sample_cpu(
    logits, positions, seeds, sequences, seen, temperature, top_k, top_p, min_p, penalty, logprobs
):
    streams = Streams(positions, seeds, sequences)
    options = Options(temperature, top_k or None, top_p, min_p, penalty)
    ids, found = sample_reference.sample(logits, streams, options, seen, logprobs)
    return ids, logits.new_empty(0, dtype=torch.float32) if found is None else found


def _sample_fake(logits, positions, seeds, sequences, seen, *options):
    B, logprobs = logits.shape[0], options[-1]
    ids = logits.new_empty(B, dtype=torch.int64)
    return ids, logits.new_empty(B if logprobs else 0, dtype=torch.float32)


define(
    "sample",
    "(Tensor logits, Tensor positions, Tensor seeds, Tensor sequences, Tensor(a!)? seen, "
    "float temperature, int top_k, float top_p, float min_p, float repetition_penalty, "
    "bool logprobs) -> (Tensor ids, Tensor logprobs)",
    fake=_sample_fake,
    cpu=_sample_cpu,
)


# --- kernels -------------------------------------------------------------------------------------


@torch.no_grad()
def _run_csrc(ops, logits, positions, seeds, sequences, seen=None, logprobs=False, **options):
    given = _usable(options)
    ids, found = ops.sample(
        *(logits, positions, seeds, sequences, seen),
        *(float(given.temperature), given.top_k or 0, _or(given.top_p, 1.0), _or(given.min_p, 0.0)),
        *(float(given.repetition_penalty), logprobs),
    )
    return ids, found if logprobs else None


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


@torch.no_grad()
def _reference(logits, positions, seeds, sequences, seen=None, logprobs=False, **options):
    streams = Streams(positions, seeds, sequences)
    return sample_reference.sample(logits, streams, _usable(options), seen, logprobs)


def _refuse_card(card, logits, positions, seeds, sequences, seen=None, *_, **options) -> str | None:
    if logits.dtype == torch.float64:
        return "the CUDA kernel does not compute in float64"
    if logits.shape[1] > 2**24:
        return f"the CUDA kernel takes up to 2^24 logits a row, not {logits.shape[1]}"
    if seen is not None and seen.shape[1] > 1 and seen.stride(1) != 1:
        return "the CUDA kernel marks seen in contiguous rows alone"
    return None


SAMPLE = Op(
    "sample",
    _check,
    (
        *csrc_kernels("sample", _refuse_card, _run_csrc),
        Kernel("reference", "plain PyTorch", lambda *args, **kwargs: None, _reference),
    ),
)
