"""The attention kernels in the emulator: ordered, minimal in bytes, no barrier idle; and in a model."""

from pathlib import Path

import pytest
import torch
from attention_kernels import CARDS, attend_on
from attention_truth import assert_close_to_float64, make, sinks, slopes, with_gradients
from torch.library import opcheck

from almostgpt import GPT, GPTConfig, kernels
from almostgpt.errors import UserError
from almostgpt.kernels import emulator

pytestmark = pytest.mark.skipif(
    emulator.refuse() is not None, reason=f"no emulator: {emulator.refuse()}"
)


def bits(tensors) -> tuple[bytes, ...]:
    return tuple(t.contiguous().view(torch.int16).numpy().tobytes() for t in tensors)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("card", CARDS, ids=str)
def test_the_same_bits_whatever_the_order(card, D):
    """Forward and the ordered backward: over schedules of threads and blocks, and of copies."""
    inputs = make(140, 140, H=2 if D == 64 else 1, Hkv=1, D=D, dtype=torch.bfloat16)
    options = {"causal": True, "sink_logits": sinks(inputs.q.shape[1])}
    ordered, fast = set(), []
    for asynchrony in ("late", "early", "random"):
        for seed in range(2):
            with emulator.settings(seed=seed, asynchrony=asynchrony, multiprocessors=2):
                ordered.add(bits(with_gradients(attend_on(card, True), inputs, **options).values()))
                if asynchrony == "random":
                    fast.append(with_gradients(attend_on(card), inputs, **options))
    assert len(ordered) == 1
    # The fast mode adds dQ in any order; all else is the same.
    for name in ("out", "lse", "dk", "dv", "dsink"):
        assert len({bits([run[name]]) for run in fast}) == 1, name
    torch.testing.assert_close(fast[0]["dq"], fast[1]["dq"], atol=1e-2, rtol=1e-2)


def test_opcheck():
    emulator.load()
    ops = torch.ops.almostgpt_emulator
    for D, with_options in ((16, True), (128, False)):
        q, k, v, dout, dlse = make(21, 21, H=4, Hkv=2, D=D, dtype=torch.bfloat16)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        options = (None, None, None)
        if with_options:
            borders = torch.tensor([0, 4, 21, 21], dtype=torch.int32)
            options = (slopes(4), sinks(4).requires_grad_(), borders)
        rest = (3, 0, 0.3, 2.0 if with_options else 0.0, True)
        opcheck(ops.flash_attention_forward.default, (*leaves, *options, *rest, 80))
        out, lse = (t.detach() for t in ops.flash_attention_forward(*leaves, *options, *rest, 80))
        inputs = [t.detach() for t in (dout, dlse, q, k, v, out, lse)]
        options = tuple(t if t is None else t.detach() for t in options)
        opcheck(ops.flash_attention_backward.default, (*inputs, *options, *rest, 90))


# --- bytes -----------------------------------------------------------------------------------------


def moved(statistics, kernel: str) -> dict[str, tuple[int, int]]:
    """(bytes read, bytes written) of each buffer that a kernel touched; checks its bank conflicts."""
    (found,) = (v for name, v in statistics["kernels"].items() if name.startswith(kernel))
    assert found["shared_conflicts"] == 0, kernel
    buffers = {name: (b["read"], b["written"]) for name, b in found["buffers"].items()}
    return {name: both for name, both in buffers.items() if any(both)}


# (queries, keys) of a forward tile, (keys, queries) of a backward tile.
TILES = {
    ((8, 0), 64): ((128, 64), (128, 64)),
    ((9, 0), 64): ((128, 128), (128, 64)),
    ((9, 0), 128): ((128, 128), (128, 64)),
    ((9, 0), 256): ((128, 80), (64, 64)),
    ((8, 0), 128): ((128, 32), (128, 64)),
    ((8, 6), 128): ((128, 64), (64, 64)),
    ((8, 0), 256): ((128, 32), (64, 64)),
    ((8, 6), 256): ((64, 32), (32, 32)),
}


@pytest.mark.parametrize("causal, deterministic", [(False, True), (True, False)])
@pytest.mark.parametrize("card, D", TILES, ids=str)
def test_bytes_are_those_of_the_tiles_that_are_seen(card, D, causal, deterministic):
    T, H, Hkv, size = 256, 2, 1, 2
    inputs = make(T, T, H=H, Hkv=Hkv, D=D, dtype=torch.bfloat16, with_dlse=False)
    inputs = inputs._replace(q=inputs.q.contiguous(), k=inputs.k.clone(), v=inputs.v.clone())
    emulator.reset_statistics()
    with emulator.settings(multiprocessors=1):  # one block takes all heads that read its keys
        with_gradients(attend_on(card, deterministic), inputs, causal=causal)
    statistics = emulator.statistics()
    (rows, columns), (keys, queries) = TILES[card, D]

    def seen(rows, columns):
        """The corners of the tiles of rows × columns that hold a pair that sees each other."""
        corners = [(i, j) for i in range(0, T, rows) for j in range(0, T, columns)]
        return [(i, j) for i, j in corners if not causal or min(i + rows, T) > j]

    head = T * D * size
    key_bytes = H * sum(min(columns, T - j) for _, j in seen(rows, columns)) * D * size
    assert moved(statistics, "attention_forward_") == {
        "q": (H * head, 0),
        "k": (key_bytes, 0),
        "v": (key_bytes, 0),
        "out": (0, H * head),
        "lse": (0, H * T * 4),
    }
    tiles = H * len(seen(queries, keys))
    backward = moved(statistics, "attention_backward_kernel")
    turns = backward.pop("turns", (0, 0))
    if deterministic:  # a ticket for each block; each turn is waited for and handed on
        assert turns == (4 * tiles, 4 * (tiles + T // keys * Hkv))
    sums = tiles * queries * D * 4
    assert backward == {
        "k": (Hkv * head, 0),
        "v": (Hkv * head, 0),
        "q": (tiles * queries * D * size, 0),
        "dout": (tiles * queries * D * size, 0),
        "lse2": (tiles * queries * 4, 0),
        "delta": (tiles * queries * 4, 0),
        "dq sums": (sums if deterministic else 0, sums),
        "dk": (0, Hkv * head),
        "dv": (0, Hkv * head),
    }
    finish = moved(statistics, "finish_kernel")
    assert finish == {"dq sums": (2 * H * head, 0), "dq": (0, H * head)}
    prepare = moved(statistics, "prepare_kernel")
    assert prepare.pop("out") == prepare.pop("dout") == (H * head, 0)
    assert prepare.pop("dq sums") == (0, 2 * H * head)


def test_a_window_costs_what_it_keeps():
    """Bytes of keys in proportion to the tiles that a window or a document leaves."""
    T, D = 1024, 64
    inputs = make(T, T, H=1, D=D, dtype=torch.bfloat16)
    q, k, v = (t.clone() for t in inputs[:3])

    def key_bytes(**options):
        emulator.reset_statistics()
        attend_on((8, 0))(q, k, v, causal=True, **options)
        return moved(emulator.statistics(), "attention_forward_kernel")["k"][0]

    tile = 64 * D * 2
    # 128 queries see 128 + 127 keys, which begin within a tile of 64.
    assert key_bytes(window=(128, 0)) <= 8 * 5 * tile
    borders = torch.arange(0, T + 1, 128, dtype=torch.int32)
    assert key_bytes(cu_seqlens=borders) == 8 * 2 * tile
    assert key_bytes() == sum(2 * (i + 1) for i in range(8)) * tile


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_heads_of_a_key_are_shared_among_multiprocessors_that_have_nothing_else(deterministic):
    inputs = make(200, 200, H=8, Hkv=1, dtype=torch.bfloat16)
    tiles, attend = 2, attend_on((9, 0), deterministic)
    for multiprocessors, parts in ((1, 1), (2, 2), (4, 4), (100, 8)):
        emulator.reset_statistics()
        with emulator.settings(multiprocessors=multiprocessors, seed=1):
            assert_close_to_float64(attend, inputs, causal=True)
        (backward,) = (
            kernel
            for name, kernel in emulator.statistics()["kernels"].items()
            if name.startswith("attention_backward")
        )
        assert backward["blocks"] == tiles * parts


# --- every synchronisation -----------------------------------------------------------------------------


def test_every_synchronisation_is_needed():
    """Dropped or weakened, one at a time, each is noticed: by the checker, or by a wrong result."""
    cases = [
        ((9, 0), dict(Tq=150, Tk=150, H=2, Hkv=1), {"causal": True, "sink_logits": sinks(2)}),
        ((8, 0), dict(Tq=140, Tk=200, H=1), {}),
        ((8, 6), dict(Tq=70, Tk=140, H=1, D=128), {"causal": True}),
        ((9, 0), dict(Tq=130, Tk=130, H=1, D=128), {}),
        ((8, 0), dict(Tq=200, Tk=60, H=1, D=256), {"causal": True}),
        ((8, 0), dict(Tq=60, Tk=200, H=1), {"window": (5, 0)}),
    ]
    cases = [
        (attend_on(card, deterministic), make(**shape, dtype=torch.bfloat16), options)
        for card, shape, options in cases
        for deterministic in (True, False)
    ]
    # The fast mode's dQ is compared within rounding: its order of adding is its own.
    with emulator.settings(multiprocessors=1):
        emulator.reset_statistics()
        truths = [with_gradients(attend, inputs, **options) for attend, inputs, options in cases]
        ours = ("forward_sm80", "backward", "softmax", "mask", "fragments", "shared_tile")
        sites = [site for site in emulator.sites() if site["site"].startswith(ours)]
        kinds = {site["site"].split()[1] for site in sites}
        assert kinds == {
            "cta_sync", "warp_sync", "cp_async_commit", "cp_async_wait",
            "load_acquire", "store_release",
        }  # fmt: skip
        for site in sites:
            for mutation in site["mutations"]:
                assert noticed(site["site"], mutation, cases, truths), (site["site"], mutation)


def noticed(site, mutation, cases, truths) -> bool:
    try:
        with emulator.fault(site, mutation):
            for (attend, inputs, options), truth in zip(cases, truths, strict=True):
                try:
                    got = with_gradients(attend, inputs, **options)
                except kernels.EmulatorError:
                    return True
                if not all(torch.equal(got[name], truth[name]) for name in truth):
                    return True
    except UserError:
        pass  # no case reached it
    return False


# --- in a model ----------------------------------------------------------------------------------------


def training_losses(text: bytes, steps: int, *, packed: bool) -> list[float]:
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=48, vocab_size=128, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, position="rope",
        norm="rmsnorm",
    )  # fmt: skip
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127)
    generator = torch.Generator().manual_seed(1)
    options = {}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 20, 48, 96, 101, 144, 192], dtype=torch.int32)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(ids) - 49, (4,), generator=generator)
        window = torch.stack([ids[start : start + 49] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):  # as training.precision=bf16 has it
            loss = model(window[:, :-1], window[:, 1:], **options)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("card", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_training_steps_agree_with_the_reference(packed, card):
    text = (Path(__file__).read_text() * 3).encode("ascii", "ignore")
    compare_training(text, steps=10, packed=packed, card=card)


@pytest.mark.parametrize("card", [(8, 0), (9, 0)], ids=str)
def test_twenty_training_steps_on_shakespeare(test_data, card):
    text = (test_data / "tinyshakespeare.txt").read_bytes()[:100_000]
    compare_training(text, steps=20, packed=False, card=card)


def compare_training(text: bytes, steps: int, packed: bool, card: tuple[int, int]) -> None:
    with kernels.use_backend("reference"):
        reference = training_losses(text, steps, packed=packed)
    emulator.reset_statistics()
    # Every op of the model, as with ALMOSTGPT_BACKEND=emulator.
    with kernels.use_backend("emulator", capability=card):
        ours = training_losses(text, steps, packed=packed)
    launches = {k.split("<")[0]: 0 for k in emulator.statistics()["kernels"]}
    for name, kernel in emulator.statistics()["kernels"].items():
        launches[name.split("<")[0]] += kernel["launches"]
    forward = "attention_forward_sm90_kernel" if card == (9, 0) else "attention_forward_kernel"
    assert launches[forward] == launches["attention_backward_kernel"] == 2 * steps
    assert max(abs(a - b) for a, b in zip(ours, reference, strict=True)) <= 0.02
    assert ours[-1] < ours[0] - 0.5
