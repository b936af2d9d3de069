"""A KV cache as lists of tokens, attention over them in float64, and how far off a kernel may be.

    run = Run("reference", Case(D=64, capacity=40, window=20, sinks=4, rotated=64))
    run.feed(30, attend=False)  # more tokens than decode_attention takes
    run.feed(5, new=[3])  # appended, attended, every result held to the truth

The truth remembers q, k and v of every token as they were given. A score is of vectors that are
turned by the distance of their positions, so nothing in it knows of slots, or of keys that are
stored turned. The rule of the house: at most twice the error of the same maths by PyTorch in the
kernel's own dtype, plus four units in the last place of the size before anything cancels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from attention_truth import sinks, slopes
from torch import Tensor
from torch.nn.functional import pad

from almostgpt import kernels
from almostgpt.kernels import KVLayer, cpu, emulator
from almostgpt.kernels.rope import turns_of

OPS = ("kv_append", "decode_attention")
FLOAT32 = torch.finfo(torch.float32).eps

Backend = (
    str | tuple[int, int]
)  # "reference", "ops", "cpu", "cuda", or the card that the emulator plays


def missing(backend: Backend) -> str | None:
    """Why the two ops cannot run there, or None."""
    if backend == "cpu":
        return cpu.missing()
    if backend == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if isinstance(backend, tuple):
        if why := emulator.refuse():
            return f"no emulator: {why}"
        emulator.load()
    if backend == "cuda" or isinstance(backend, tuple):
        side, key = ("almostgpt", "CUDA") if backend == "cuda" else ("almostgpt_emulator", "CPU")
        for name in OPS:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{side}::{name}", key):
                return f"no {key} kernel of {side}::{name} is built"
    return None


def on(backend: Backend):
    """A context in which both ops run there, and nowhere else."""
    if isinstance(backend, tuple):
        return kernels.use_backend("emulator", ops=OPS, capability=backend)
    return kernels.use_backend(backend, ops=OPS)


def calls(backend: Backend) -> tuple[Callable, Callable]:
    """``kv_append`` and ``decode_attention`` there; "ops": what ``torch.ops.almostgpt`` has for a CPU."""
    if backend == "ops":
        return tuple(
            next(kernel.run for kernel in kernels.OPS[name].kernels if kernel.backend == "cuda")
            for name in OPS
        )

    def forced(op):
        def call(*args, **options):
            with on(backend):
                return op(*args, **options)

        return call

    return forced(kernels.kv_append), forced(kernels.decode_attention)


# --- a cache and what is fed to it -----------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A cache, the heads on it, and the options of attention over it.

    Attributes:
        group: query heads of a key head.
        rotated: R, dimensions that turn with the position; 0: ``turns`` is None.
        layout: how q, k and v lie in memory: see ``laid_out``.
    """

    B: int = 1
    Hkv: int = 1
    group: int = 1
    D: int = 64
    dtype: torch.dtype = torch.float32
    capacity: int = 32
    window: int | None = None
    sinks: int = 0
    rotated: int = 0
    int8: bool = False
    scale: float | None = None
    softcap: float = 0.0
    alibi: bool = False
    sink_logits: bool = False
    layout: str = "fused"
    seed: int = 0

    @property
    def H(self) -> int:
        return self.Hkv * self.group

    @property
    def most_decoded(self) -> int:
        """Tokens that one decode_attention may take."""
        return 16 if self.window is None else min(16, self.capacity - self.window + 1)

    def options(self, device: str | torch.device = "cpu") -> dict:
        """Of ``decode_attention``."""
        options = {"scale": self.scale, "softcap": self.softcap}
        if self.alibi:
            options["alibi_slopes"] = slopes(self.H, device)
        if self.sink_logits:
            options["sink_logits"] = sinks(self.H, device=device)
        return options

    def turns(self, device: str | torch.device = "cpu") -> Tensor | None:
        return turns_of(frequencies(self.rotated)).to(device) if self.rotated else None

    def empty(self, device: str | torch.device = "cpu", *, zeros: bool = False) -> KVLayer:
        """A cache whose free slots hold NaN: what nobody has written nobody may use."""
        layer = KVLayer.empty(
            *(self.B, self.Hkv, self.capacity, self.D),
            dtype=torch.int8 if self.int8 else self.dtype,
            window=self.window,
            sink_tokens=self.sinks,
            device=device,
        )
        if zeros:
            return layer
        for slots in (layer.keys, layer.values):
            slots[..., : self.D] = 77 if self.int8 else math.nan
        if self.int8:
            layer.key_scales.fill_(math.nan)
            layer.value_scales.fill_(math.nan)
        return layer

    def draw(self, T: int, generator: torch.Generator) -> list[Tensor]:
        """q, k and v of T tokens of each sequence, on the CPU."""
        heads = [self.H, self.Hkv, self.Hkv]
        fused = torch.randn(self.B, T, sum(heads), self.D, generator=generator).to(self.dtype)
        return [laid_out(x, self.layout) for x in fused.transpose(1, 2).split(heads, dim=1)]


LAYOUTS = ("fused", "contiguous", "unaligned", "columns apart")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory; ``"fused"``: where they are, in a projection of all heads."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "unaligned":
        return pad(x, (1, 2))[..., 1:-2]
    if layout == "columns apart":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


def moved_to(x: Tensor, device: str | torch.device) -> Tensor:
    """A copy on a device with the memory around it: as far apart, and no better aligned."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device, copy=True)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


# --- angles ----------------------------------------------------------------------------------------

_BITS = 256
_PI = (
    31415926535897932384626433832795028841971693993751058209749445923078164062862089986280348253421
)
_TWO_PI = (2 * _PI << _BITS) // 10**94


def exact_angle(position: int, frequency: float) -> float:
    """position · frequency without whole turns, in [0, 2π): rounded once."""
    numerator, denominator = frequency.as_integer_ratio()
    return (((position * numerator) << _BITS) // denominator % _TWO_PI) / 2**_BITS


def angle_bound(position, frequency):
    """How far off the angle of ``turns_of`` and ``angles_at`` may be, in radians.

    ``frequency / 2π`` is rounded, and so is 2π itself: 1.4 · 2⁻⁵³ of it together; what is below
    2⁻⁶⁴ of a turn is cut off, and a negative frequency loses 2⁻⁵⁴ of a turn when it is made
    positive. All of these count for each position. Then the angle, up to π, is rounded thrice.
    Of numbers, or of tensors.
    """
    each = 1.4 * abs(frequency) * 2**-53 + 2 * math.pi * (2**-64 + 2**-54 * (frequency < 0))
    return position * each + 3.5 * math.pi * 2**-53


@functools.cache
def frequencies(rotated: int) -> Tensor:
    """(R/2,) float64, as RoPE has them."""
    half = rotated // 2
    return 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)


@functools.lru_cache(maxsize=1 << 16)
def _angles_of(position: int, rotated: int) -> Tensor:
    angles = [exact_angle(position, f) for f in frequencies(rotated).tolist()]
    return torch.tensor(angles, dtype=torch.float64)


def angles_of(positions: list[int], rotated: int) -> Tensor:
    """(n, R/2) float64."""
    if not positions:
        return torch.empty(0, rotated // 2, dtype=torch.float64)
    return torch.stack([_angles_of(position, rotated) for position in positions])


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """x (…, D) float64 with its pairs as complex numbers times e^(i·angle); angles (…, R/2)."""
    half = angles.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag, rest.expand(*z.shape[:-1], -1)], dim=-1)


def plainly_turned(x: Tensor, angles: Tensor) -> Tensor:
    """The same in x's dtype, by float32 products."""
    half = angles.shape[-1]
    if half == 0:
        return x
    cos, sin = angles.cos().float(), angles.sin().float()
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    pair = [(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)]
    return torch.cat([*pair, x[..., 2 * half :]], dim=-1)


def turning_bound(x: Tensor, positions: list[int], case: Case, dtype: torch.dtype) -> Tensor:
    """How far what is turned, x (…, n, D) float64, may be off: float32 maths, then ``dtype``."""
    half = case.rotated // 2
    bound = torch.zeros_like(x)
    if half == 0:
        return bound
    off = angle_bound(torch.tensor(positions)[:, None], frequencies(case.rotated))
    size = torch.hypot(x[..., :half], x[..., half : 2 * half])
    bound[..., : 2 * half] = torch.cat([size * (4 * FLOAT32 + off)] * 2, dim=-1)
    if torch.finfo(dtype).eps > FLOAT32:
        finfo = torch.finfo(dtype)
        rounding = finfo.eps / 2 * x.abs().clamp(min=finfo.smallest_normal)
        bound[..., : 2 * half] += rounding[..., : 2 * half]
    return bound


# --- the truth -------------------------------------------------------------------------------------


class Token(NamedTuple):
    """Keys and values (Hkv, D) of one token.

    k and v are float64: as they were given, or of an int8 cache what it has made of them, turned.
    The peer's are in the dtype of the cache's queries, the key turned.
    """

    k: Tensor
    v: Tensor
    peer_k: Tensor
    peer_v: Tensor


class Expected(NamedTuple):
    """Of some queries of one sequence: (H, n, D) in float64, the peer's, and (n,) ulps allowed."""

    exact: Tensor
    peer: Tensor
    ulps: Tensor


class Truth:
    """What each sequence has had, token by token, and what its queries see of it."""

    def __init__(self, case: Case):
        self.case = case
        self.lengths = [0] * case.B
        self.tokens: list[dict[int, Token]] = [{} for _ in range(case.B)]

    def slot(self, position: int) -> int:
        S, C = self.case.sinks, self.case.capacity
        return position if position < S else S + (position - S) % (C - S)

    def visible(self, b: int, t: int) -> list[int]:
        """The positions that the query at t sees."""
        S, W = self.case.sinks, self.case.window
        before = [p for p in sorted(self.tokens[b]) if p <= t]
        return before if W is None else [p for p in before if p < S or p > t - (W - S)]

    def distance(self, t: int, p: int) -> int:
        """From the query at t to a key that it sees."""
        inside = self.case.window is not None and p < self.case.sinks
        return min(t, self.case.window - 1) - p if inside else t - p

    def sink_position(self, t: int) -> int:
        return t if self.case.window is None else min(t, self.case.window - 1)

    def attend(self, b: int, q: Tensor) -> Expected:
        """q (H, n, D), not turned, of the tokens after ``lengths[b]``, which are appended already."""
        case, n = self.case, q.shape[1]
        queries = [self.lengths[b] + i for i in range(n)]
        seen = [self.visible(b, t) for t in queries]
        positions = sorted(set().union(*seen))
        column = {p: i for i, p in enumerate(positions)}
        sees = torch.zeros(n, len(positions), dtype=torch.bool)
        distance = torch.zeros(n, len(positions), dtype=torch.int64)
        for i, t in enumerate(queries):
            columns = [column[p] for p in seen[i]]
            sees[i, columns] = True
            distance[i, columns] = torch.tensor([self.distance(t, p) for p in seen[i]])
        k, v, peer_k, peer_v = (
            torch.stack(each, dim=1)
            for each in zip(*(self.tokens[b][p] for p in positions), strict=True)
        )
        sink = torch.tensor([p < case.sinks for p in positions])
        angles = angles_of(queries, case.rotated)
        sink_angles = angles_of([self.sink_position(t) for t in queries], case.rotated)
        wide = q.double().unflatten(0, (case.Hkv, case.group))  # (Hkv, group, n, D)
        if case.int8:  # k is turned already
            q_window, q_sink = turned(wide, angles), turned(wide, sink_angles)
            exact_scores = _scores(q_window, q_sink, k, sink)
            sizes = _scores(q_window.square(), q_sink.square(), k.square(), sink).sqrt()
        else:
            table = angles_of(list(range(int(distance.max()) + 1)), case.rotated)
            k = turned(k[:, None], -table[distance])  # (Hkv, n, keys, D)
            exact_scores = torch.einsum("hgnd,hnkd->hgnk", wide, k)
            sizes = torch.einsum("hgnd,hnkd->hgnk", wide.square(), k.square()).sqrt()
        p = self._weights(exact_scores, sees, distance)
        exact, size = p @ v[:, None], (p.square() @ v.square()[:, None]).sqrt()
        # What a score is rounded by, before it is a sum of D products, moves every weight.
        scale = case.D**-0.5 if case.scale is None else case.scale
        largest = scale * sizes.masked_fill(~sees, 0.0).amax((0, 1, 3))
        in_float64 = case.dtype == torch.float64 and not case.rotated and not case.int8
        computed_in = torch.finfo(torch.float64).eps if in_float64 else FLOAT32
        ulps = 4 * (torch.finfo(case.dtype).eps + computed_in * largest)
        if case.dtype == torch.float64:
            ulps = 4 * ulps  # the truth is no more exact than that itself
        # The same in the dtype of the kernel.
        q = q.to(case.dtype).unflatten(0, (case.Hkv, case.group))
        scores = _scores(plainly_turned(q, angles), plainly_turned(q, sink_angles), peer_k, sink)
        p = self._weights(scores.to(torch.promote_types(case.dtype, torch.float32)), sees, distance)
        peer = p.to(case.dtype) @ peer_v[:, None]
        return Expected(exact.flatten(0, 1), peer.flatten(0, 1), ulps * size.amax((0, 1, 3)))

    def _weights(self, scores: Tensor, sees: Tensor, distance: Tensor) -> Tensor:
        """(Hkv, group, n, keys) of q · k → what of each value goes into the sum."""
        case = self.case
        options = case.options()
        scores = scores * (case.D**-0.5 if case.scale is None else case.scale)
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)

        def per_head(name: str) -> Tensor:
            return options[name].to(scores.dtype).view(case.Hkv, case.group, 1, 1)

        if case.alibi:
            scores = scores - per_head("alibi_slopes") * distance
        scores = scores.masked_fill(~sees, -math.inf)
        if case.sink_logits:
            logits = per_head("sink_logits").expand(*scores.shape[:3], 1)
            return torch.cat([scores, logits], dim=-1).softmax(-1)[..., :-1]
        return scores.softmax(-1)


def _scores(q: Tensor, q_sink: Tensor, k: Tensor, sink: Tensor) -> Tensor:
    """q, q_sink (Hkv, group, n, D) and k (Hkv, keys, D) → (Hkv, group, n, keys)."""
    return torch.where(sink, q_sink @ k.mT[:, None], q @ k.mT[:, None])


# --- the ops, step by step, against the truth --------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """Its bits as integers: NaN equals NaN."""
    return tensor.view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def parts_of(layer: KVLayer) -> dict[str, Tensor]:
    """What append writes into, copied to the CPU."""
    names = ("keys", "values", "key_scales", "value_scales")
    parts = {name: getattr(layer, name) for name in names}
    return {name: part.cpu().clone() for name, part in parts.items() if part is not None}


class Run:
    """A cache of a backend and the truth about it, fed with the same tokens."""

    def __init__(self, backend: Backend, case: Case):
        self.case, self.device = case, "cuda" if backend == "cuda" else "cpu"
        self.append, self.decode = calls(backend)
        self.layer, self.truth = case.empty(self.device), Truth(case)
        self.generator = torch.Generator().manual_seed(case.seed)

    def jump(self, length: int) -> None:
        """From here on the sequences have had so many tokens; the ring must be filled anew."""
        self.layer.lengths.fill_(length)
        for b, tokens in enumerate(self.truth.tokens):
            self.truth.lengths[b] = length
            self.truth.tokens[b] = {p: k for p, k in tokens.items() if p < self.case.sinks}

    def feed(
        self,
        T: int,
        new: list[int] | None = None,
        *,
        attend: bool = True,
        tokens: list[Tensor] | None = None,
    ) -> Tensor | None:
        """Append T tokens of each sequence, of which ``new`` are there, attend, and check all of it.

        Args:
            T: tokens.
            new: of each sequence; None: all T, and no ``new_lengths`` is given.
            attend: whether ``decode_attention`` follows.
            tokens: q, k and v on the CPU; None: drawn.

        Returns:
            What ``decode_attention`` gave, on the CPU.
        """
        case, layer = self.case, self.layer
        given = case.draw(T, self.generator) if tokens is None else tokens
        q, k, v = (moved_to(x, self.device) for x in given)
        new_lengths = None
        if new is not None:
            new_lengths = torch.tensor(new, dtype=torch.int32, device=self.device)
        there = [T] * case.B if new is None else new
        before, lengths = parts_of(layer), layer.lengths.clone()
        turns = case.turns(self.device)
        got = self.append(q, k, v, layer, new_lengths=new_lengths, turns=turns)
        assert all(same_bits(x.cpu(), y) for x, y in zip((q, k, v), given, strict=True))
        self._check_queries(given[0], got, there)
        self._check_slots(before, given[1], given[2], there)
        out = None
        if attend:
            out = self.decode(
                got[0], layer, q_sink=got[1], new_lengths=new_lengths, **case.options(self.device)
            )
            assert out.shape == q.shape and out.dtype == q.dtype and out.device == q.device
            out = out.cpu()
            self._check_out(out, given[0], there)
        assert torch.equal(layer.lengths, lengths) and not layer.tickets.any()
        layer.lengths.add_(torch.tensor(there, dtype=torch.int32, device=self.device))
        self.truth.lengths = [n + m for n, m in zip(self.truth.lengths, there, strict=True)]
        return out

    def _check_queries(self, q: Tensor, got: tuple[Tensor, Tensor], there: list[int]) -> None:
        case = self.case
        assert all(x.shape == q.shape and x.dtype == q.dtype for x in got)
        if case.rotated == 0 or case.sinks == 0:
            assert got[1] is got[0]
        for b, n in enumerate(there):
            queries = [self.truth.lengths[b] + i for i in range(n)]
            places = [queries, [self.truth.sink_position(t) for t in queries]]
            for x, positions in zip(got, places if case.sinks else [queries] * 2, strict=True):
                self._check_turned(x[b, :, :n].cpu(), q[b, :, :n], positions)

    def _check_turned(self, got: Tensor, x: Tensor, positions: list[int]) -> None:
        exact = turned(x.double(), angles_of(positions, self.case.rotated))
        off = (got.double() - exact).abs()
        assert (off <= turning_bound(exact, positions, self.case, got.dtype)).all(), off.max()
        assert same_bits(got[..., self.case.rotated :], x[..., self.case.rotated :])

    def _check_slots(self, before: dict, k: Tensor, v: Tensor, there: list[int]) -> None:
        """The new tokens are in their slots, nothing else has changed, and the truth learns of them."""
        case, truth, after = self.case, self.truth, parts_of(self.layer)
        for b, n in enumerate(there):
            positions = [truth.lengths[b] + i for i in range(n)]
            slots = [truth.slot(p) for p in positions]
            others = sorted(set(range(case.capacity)) - set(slots))
            for name, part in after.items():
                assert same_bits(part[b][:, others], before[name][b][:, others]), (name, b)
            assert not after["keys"][b, ..., case.D :].any()
            assert not after["values"][b, ..., case.D :].any()
            held_k, held_v = (after[name][b][:, slots, : case.D] for name in ("keys", "values"))
            new_k, new_v = k[b, :, :n], v[b, :, :n]
            peer_k = plainly_turned(new_k, angles_of(positions, case.rotated))
            peer_v = new_v
            exact_k, exact_v = new_k.double(), new_v.double()
            if case.int8:
                scale_k, scale_v = (after[f"{x}_scales"][b][:, slots] for x in ("key", "value"))
                turned_k = turned(exact_k, angles_of(positions, case.rotated))
                slack = turning_bound(turned_k, positions, case, torch.float32)
                check_int8(held_k, scale_k, turned_k, slack)
                check_int8(held_v, scale_v, exact_v, torch.zeros_like(exact_v))
                exact_k, exact_v = (
                    codes.double() * scale.double()[..., None]
                    for codes, scale in ((held_k, scale_k), (held_v, scale_v))
                )
                peer_k, peer_v = (
                    (codes.float() * scale[..., None]).to(case.dtype)
                    for codes, scale in ((held_k, scale_k), (held_v, scale_v))
                )
            else:
                self._check_turned(held_k, new_k, positions)
                assert same_bits(held_v, new_v)
            for i, p in enumerate(positions):
                columns = (x[:, i] for x in (exact_k, exact_v, peer_k, peer_v))
                truth.tokens[b][p] = Token(*columns)

    def _check_out(self, out: Tensor, q: Tensor, there: list[int]) -> None:
        found = {b: self.truth.attend(b, q[b, :, :n]) for b, n in enumerate(there) if n > 0}
        errors = [(e.peer.double() - e.exact).abs().max().item() for e in found.values()]
        peer_error = max([0.0, *(e for e in errors if math.isfinite(e))])
        for b, n in enumerate(there):
            assert (out[b, :, n:] == 0).all()
            if n > 0:
                exact, _, ulps = found[b]
                off = (out[b, :, :n].double() - exact).abs().amax((0, 2))
                bound = 2 * peer_error + ulps
                assert (off <= bound).all(), (b, off.tolist(), bound.tolist())  # False of NaN


def check_int8(codes: Tensor, scales: Tensor, x: Tensor, slack: Tensor) -> None:
    """Codes (…, D) and scales (…) of x (…, D) float64, known but for ``slack``."""
    largest = x.abs().amax(-1)
    wanted = largest / 127
    ulps = 2 * FLOAT32 * wanted + 1e-45  # float32 has nothing finer
    assert ((scales.double() - wanted).abs() <= slack.amax(-1) / 127 + ulps).all()
    assert codes.dtype == torch.int8 and (codes >= -127).all()
    off = (x - codes.double() * scales.double()[..., None]).abs()
    bound = scales.double() / 2 + 4 * FLOAT32 * largest
    assert (off <= bound[..., None] + slack).all(), (off / bound[..., None]).max()
