"""Packed documents against each of them computed alone, and by perturbation."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt import GPT, GPTConfig
from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.model.gpt import PARTS
from almostgpt.model.position import positions_in_documents

B, T, VOCABULARY = 3, 12, 31


def make(seed: int = 0, **options) -> GPT:
    torch.manual_seed(seed)
    sizes = {"block_size": T, "vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**{**sizes, "n_kv_head": 2, **options}))
    for parameter in model.parameters():  # away from the initialisation, where much is nearly zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_ids(seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(seed))


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def borders(draw) -> list[int]:
    """At every row and anywhere between, some twice (an empty document), the last one repeated."""
    inner = draw(st.lists(st.integers(0, B * T), max_size=8))
    return sorted([*range(0, B * T + 1, T), *inner]) + [B * T] * draw(st.integers(0, 3))


def spans(borders: list[int]) -> list[tuple[int, int]]:
    """Begin and end of the documents that hold a token, in B·T."""
    return [(begin, end) for begin, end in itertools.pairwise(borders) if begin < end]


position = pytest.mark.parametrize("position", sorted(PARTS["position"]))


@position
@settings(max_examples=25, deadline=None)
@given(borders(), st.sampled_from(sorted(PARTS["norm"])), st.integers(0, 100))
def test_packed_is_each_document_alone(position, borders, norm, seed):
    model = make(seed, position=position, norm=norm)
    ids, targets, cu_seqlens = random_ids(seed), random_ids(seed + 1), int32(borders)
    targets[0, 2:5] = -1
    with torch.no_grad():
        alone = [
            model(ids.flatten()[begin:end].unsqueeze(0), all_logits=True)[0][0]
            for begin, end in spans(borders)
        ]
        expected = torch.cat(alone).view(B, T, VOCABULARY)
        logits = model(ids, cu_seqlens=cu_seqlens, all_logits=True)[0]
        last = model(ids, cu_seqlens=cu_seqlens)[0]
        loss = model(ids, targets, cu_seqlens)[1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-4, atol=1e-4)
    log_p = expected.log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(loss, -log_p[targets != -1].mean(), rtol=1e-4, atol=1e-4)


@position
@settings(max_examples=25, deadline=None)
@given(borders(), st.integers(0, B * T - 1))
def test_no_change_and_no_gradient_leaves_a_document(position, borders, at):
    """Exactly: not a bit of another document's logits, and 0.0 for every token of another."""
    model, ids, cu_seqlens = make(position=position), random_ids(0), int32(borders)
    (own,) = [slice(begin, end) for begin, end in spans(borders) if begin <= at < end]
    outside = torch.ones(B * T, dtype=torch.bool)
    outside[own] = False

    changed = ids.clone()
    changed.view(-1)[at] = (changed.view(-1)[at] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = (
            model(i, cu_seqlens=cu_seqlens, all_logits=True)[0].flatten(0, 1)
            for i in (ids, changed)
        )
    assert torch.equal(before[outside], after[outside])
    assert (before[at] - after[at]).abs().max() > 1e-3

    embeddings = []
    model.token_embedding.register_forward_hook(lambda *call: embeddings.append(call[2]))
    targets = random_ids(1)
    targets.view(-1)[outside] = -1
    loss = model(ids, targets, cu_seqlens)[1]
    (gradient,) = torch.autograd.grad(loss, embeddings)
    gradient = gradient.flatten(0, 1)
    assert torch.all(gradient[outside] == 0)
    assert torch.all(gradient[own].abs().amax(dim=1) > 0)


@given(borders())
def test_positions_restart_at_every_document(borders):
    expected = [i for begin, end in spans(borders) for i in range(end - begin)]
    positions = positions_in_documents(int32(borders), B, T)
    assert positions.shape == (B, T) and positions.flatten().tolist() == expected


def test_a_document_a_row_is_the_model_without_documents():
    model, ids = make(), random_ids(0)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=int32([0, T, 2 * T, 3 * T]), all_logits=True)[0]
        torch.testing.assert_close(packed, model(ids, all_logits=True)[0], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    ids, cu_seqlens, gradients = random_ids(0), int32([0, 5, T, 2 * T, 30, 3 * T]), []
    for checkpointing in ("none", "selective", "full"):
        model = make(gradient_checkpointing=checkpointing, dropout=0.2).train()
        torch.manual_seed(7)
        model(ids, ids, cu_seqlens)[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, *recomputed in zip(*gradients, strict=True):
        assert all(torch.equal(plain, gradient) for gradient in recomputed)


@position
def test_under_autocast_it_follows_fp32(position):
    model, ids, cu_seqlens = make(position=position), random_ids(0), int32([0, 5, T, 2 * T, 3 * T])
    full = model(ids, ids, cu_seqlens)[1]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids, ids, cu_seqlens)[1]
    mixed.backward()
    assert mixed.item() == pytest.approx(full.item(), rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def _compiles_once(backend: str, **options) -> None:
    """However many documents the fixed length holds: one graph, the eager losses and gradients."""
    torch._dynamo.reset()
    model, ids, targets, graphs = make(**options).train(), random_ids(0), random_ids(1), []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for inner in ([], [5], [1, 2, 3, 20, 30]):
        starts = sorted([*range(0, B * T, T), *inner])
        cu_seqlens = int32(starts + [B * T] * (B * T + 1 - len(starts)))
        losses, gradients = [], []
        for call in (model, compiled):
            losses.append(call(ids, targets, cu_seqlens)[1])
            gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        for eager, ours in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_other_documents_compile_nothing_anew(checkpointing):
    _compiles_once("aot_eager", gradient_checkpointing=checkpointing)


@pytest.mark.slow
@position
def test_compiled_by_inductor(position):
    _compiles_once("inductor", position=position)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_compiled_by_inductor_with_checkpointing(checkpointing):
    _compiles_once("inductor", gradient_checkpointing=checkpointing)


def test_bad_calls_are_named():
    model, ids = make(), random_ids(0)
    good = int32([0, T, 2 * T, 3 * T])
    with pytest.raises(UserError, match="cu_seqlens cannot be used with a cache"):
        model(ids, cu_seqlens=good, cache=KVCache.full(model.config, batch=B))
    for bad, what in (
        (good.long(), r"not torch.int64 of \(4,\)"),
        (good.unsqueeze(0), r"not torch.int32 of \(1, 4\)"),
        (good[:1], r"not torch.int32 of \(1,\)"),
    ):
        with pytest.raises(UserError, match=r"int32 of the shape \(documents \+ 1,\), " + what):
            model(ids, cu_seqlens=bad)
    with pytest.raises(UserError, match="block_size of 12"):  # that of a row, not of all of them
        model(random_ids(0).view(1, B * T), cu_seqlens=good)
