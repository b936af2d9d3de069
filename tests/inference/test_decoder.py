"""Batches of unequal prompts, seeded draws, stop ids, log-probabilities, and the captured step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tape import tape

from almostgpt import GPT, GPTConfig
from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.inference.decoder import Decoder
from almostgpt.inference.generate import stream
from almostgpt.inference.sampling import Sampling

POSITIONS = ["rope", "learned"]


def make(position: str = "rope", block_size: int = 48) -> GPT:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=block_size,
            vocab_size=53,
            n_layer=2,
            n_head=4,
            n_kv_head=2,
            n_embd=32,
            position=position,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # wide logits: rounding breaks no tie
    return model.double()


@pytest.fixture(scope="module", params=POSITIONS)
def model(request) -> GPT:
    return make(request.param)


def text(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(53, (length,), generator=torch.Generator().manual_seed(seed))


UNEQUAL = [text(5, 1), text(1, 2), text(17, 3), text(9, 4)]


def alone(model: GPT, prompt: torch.Tensor, new: int, number: int, **options) -> torch.Tensor:
    return model.generate(prompt[None], new, sequences=[number], **options)[0]


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("cache", ["auto", "full", "rolling", "int8", "none"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_unequal_prompts_in_a_batch_are_each_continued_as_alone(model, cache, sampled):
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 3} if sampled else {"temperature": 0}
    together = model.generate(UNEQUAL, 20, cache=cache, **options)
    for number, (prompt, ids) in enumerate(zip(UNEQUAL, together, strict=True)):
        assert torch.equal(ids, alone(model, prompt, 20, number, cache=cache, **options))


@pytest.mark.parametrize("window", [12, 30])
def test_unequal_prompts_in_a_rolling_cache(window):
    model = make()
    options = {"cache": "rolling", "window": window, "sink_tokens": 3, "temperature": 0}
    together = model.generate(UNEQUAL, 60, **options)
    for number, (prompt, ids) in enumerate(zip(UNEQUAL, together, strict=True)):
        assert torch.equal(ids, alone(model, prompt, 60, number, **options))


def test_unequal_prompts_past_the_block_without_a_cache(model):
    together = model.generate([text(60), text(3), text(47)], 5, cache="none", seed=1)
    for number, prompt in enumerate((text(60), text(3), text(47))):
        assert torch.equal(together[number], alone(model, prompt, 5, number, cache="none", seed=1))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=5),
    st.integers(0, 2**64 - 1),
    st.randoms(use_true_random=False),
)
def test_draws_depend_on_seed_sequence_and_position_alone(texts, seed, random):
    """Whatever else is in the batch, and in which order."""
    model = make()
    rows = [(text(length, kind), number) for number, (length, kind) in enumerate(texts)]
    options = {"temperature": 1.5, "seed": seed}
    expected = {number: alone(model, ids, 6, number, **options) for ids, number in rows}
    random.shuffle(rows)
    shuffled = model.generate(
        [ids for ids, _ in rows], 6, sequences=[number for _, number in rows], **options
    )
    for (_, number), ids in zip(rows, shuffled, strict=True):
        assert torch.equal(ids, expected[number])


def test_sequences_of_one_prompt_differ_and_positions_too():
    """Same logits everywhere: what is drawn differs by sequence and by position, and by seed."""
    model = make()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    ids = model.generate(text(4).expand(6, 4), 30, seed=5)[:, 4:]
    assert len({tuple(row) for row in ids.tolist()}) == 6
    assert all(len(set(row)) > 10 for row in ids.tolist())
    longer = model.generate(text(5).expand(6, 5), 29, seed=5)[:, 5:]
    assert torch.equal(longer, ids[:, 1:])  # position 5 is position 5
    assert not torch.equal(model.generate(text(4).expand(6, 4), 30, seed=6)[:, 4:], ids)
    high = model.generate(text(4).expand(6, 4), 30, seed=5 + 2**63)[:, 4:]
    assert not torch.equal(high, ids)  # all 64 bits of a seed count


def test_lists_of_numbers_are_prompts_and_empty_batches_are_none(model):
    ids = model.generate([[1, 2, 3], [4]], 3, temperature=0)
    assert [len(row) for row in ids] == [6, 4] and ids[0][:3].tolist() == [1, 2, 3]
    assert model.generate(torch.zeros(0, 4, dtype=torch.int64), 3).shape[0] == 0
    assert model.generate([], 3) == []


@pytest.mark.parametrize(
    "prompts, expected",
    [
        ([[1], []], "prompt 1: generation starts from at least 1 token"),
        ([[1], [2, 53]], "token id 53 is outside the vocabulary of 53"),
        ([[1.5]], "must be torch.int64"),
        ([["a"]], "a prompt must be token ids"),
        (torch.zeros(3, dtype=torch.int64), "a list of texts"),
    ],
)
def test_prompts_that_are_none(model, prompts, expected):
    with pytest.raises(UserError, match=expected):
        stream(model, prompts, 3)  # at once


# ---------------------------------------------------------------- stop ids, log-probabilities


def test_stop_ids_end_each_sequence_by_itself(model):
    whole = model.generate(UNEQUAL, 20, temperature=1.2, seed=2)
    new = [ids[len(prompt) :].tolist() for ids, prompt in zip(whole, UNEQUAL, strict=True)]
    stops = [new[0][4], new[2][9]]
    ended = model.generate(UNEQUAL, 20, temperature=1.2, seed=2, stop_ids=stops)
    for row, ids, prompt in zip(new, ended, UNEQUAL, strict=True):
        first = min((row.index(stop) for stop in stops if stop in row), default=19)
        assert ids.tolist() == prompt.tolist() + row[: first + 1]


def test_streaming_ends_when_all_have_ended(model):
    prompts = text(4).expand(2, 4)
    drawn = [step.ids.tolist() for step in stream(model, prompts, 30, seed=1)]
    stops = {drawn[3][0], drawn[6][1]}
    steps = [step.ids.tolist() for step in stream(model, prompts, 30, seed=1, stop_ids=[*stops])]
    expected, ended = [], [False, False]
    for pair in drawn:
        if all(ended):
            break
        expected.append([-1 if over else id for id, over in zip(pair, ended, strict=True)])
        ended = [over or id in stops for id, over in zip(pair, ended, strict=True)]
    assert steps == expected and len(steps) < 30
    one = model.generate(prompts[:1], 30, seed=1, stop_ids=[drawn[3][0]])
    assert isinstance(one, list) and len(one[0]) <= 8


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_logprobs_are_those_of_the_model(model, cache):
    ids, logprobs = model.generate(
        UNEQUAL, 12, temperature=0.5, top_k=5, repetition_penalty=1.3, seed=1, logprobs=True,
        cache=cache,
    )  # fmt: skip
    for prompt, row, scores in zip(UNEQUAL, ids, logprobs, strict=True):
        with torch.no_grad():
            logits = model(row[None, :-1], all_logits=True)[0][0, len(prompt) - 1 :]
        expected = logits.log_softmax(-1).gather(-1, row[len(prompt) :, None])[:, 0]
        torch.testing.assert_close(scores, expected.float(), atol=1e-5, rtol=1e-5)


def test_logprobs_of_equal_prompts_are_a_matrix(model):
    ids, logprobs = model.generate(text(4).expand(3, 4), 5, logprobs=True, seed=0)
    assert ids.shape == (3, 9) and logprobs.shape == (3, 5) and (logprobs < 0).all()
    ids, logprobs = model.generate(text(4).expand(3, 4), 0, logprobs=True)
    assert ids.shape == (3, 4) and logprobs.shape == (3, 0)


# ---------------------------------------------------------------- repetition penalty, vocabulary


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_repetition_penalty_by_hand(model, cache):
    """Greedy with the penalty of transformers: over the prompt and all that was drawn."""
    expected = text(6)[None]
    with torch.no_grad():
        for _ in range(15):
            logits = model(expected)[0][0, 0]
            there = expected[0].unique()
            logits[there] = torch.where(logits[there] < 0, logits[there] * 1.7, logits[there] / 1.7)
            expected = torch.cat([expected, logits.argmax().view(1, 1)], dim=1)
    options = {"temperature": 0, "repetition_penalty": 1.7, "cache": cache}
    assert torch.equal(model.generate(text(6)[None], 15, **options), expected)
    together = model.generate([text(3, 9), text(6)], 15, **options)
    assert torch.equal(together[1], expected[0])


def test_what_a_given_cache_holds_was_seen_too():
    model = make()
    options = {"temperature": 0, "repetition_penalty": 2.0}
    whole = model.generate(text(6)[None], 15, **options)
    cache = KVCache.full(model.config, 1, dtype=torch.float64)
    half = model.generate(text(6)[None], 7, cache=cache, **options)
    assert torch.equal(model.generate(half, 8, cache=cache, **options), whole)


def test_ids_past_the_tokenizer_are_neither_drawn_nor_marked(model):
    prompts = [torch.tensor([50, 3]), torch.tensor([1, 2])]
    ids = model.generate(
        prompts, 20, vocab_size=10, temperature=3.0, repetition_penalty=1.1, seed=1
    )
    assert all((row[2:] < 10).all() for row in ids)


# ---------------------------------------------------------------- the captured step


def as_on_a_gpu(monkeypatch):
    """On a CPU the references look at values, for speed; on a GPU they do not."""
    monkeypatch.setattr("almostgpt.kernels.kv_cache_reference._common_length", lambda layer: None)
    monkeypatch.setattr("almostgpt.kernels.kv_layer.has_values", lambda tensor: False)
    monkeypatch.setattr("almostgpt.kernels.sample_reference.unread", lambda tensor: True)


@pytest.mark.parametrize("kind", ["full", "rolling", "int8"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_step_taken_down_once_is_right_at_every_length(monkeypatch, kind, penalty):
    """As a CUDA graph does: Python is frozen at one step, and only tensors move on."""
    as_on_a_gpu(monkeypatch)
    model = make()
    sampling = Sampling(penalty, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
    expected, captures = None, 0

    def counted(step):
        nonlocal captures
        captures += 1
        return tape(step)

    for capture in (None, counted):
        cache = KVCache.for_model(model, 4, kind, 17 + 40 if kind == "rolling" else 17 + 30)
        decoder = Decoder(
            model, cache, sampling, seed=7, sequences=range(4), logprobs=True, capture=capture
        )
        steps = 39 if kind == "rolling" else 29
        drawn = [decoder.begin(UNEQUAL)] + [decoder.step() for _ in range(steps)]
        ids = torch.stack([step.ids for step in drawn])
        logprobs = torch.stack([step.logprobs for step in drawn])
        if expected is None:
            expected = ids, logprobs, cache.lengths, cache.device_lengths
        assert torch.equal(ids, expected[0]) and torch.equal(logprobs, expected[1])
        assert cache.lengths == expected[2] and torch.equal(cache.device_lengths, expected[3])
    assert captures == 1


def test_a_captured_step_does_not_run_past_the_cache(monkeypatch):
    as_on_a_gpu(monkeypatch)
    model = make()
    cache = KVCache.full(model.config, 1, 10, dtype=torch.float64)
    options = {"seed": 0, "sequences": [0], "capture": tape}
    decoder = Decoder(model, cache, Sampling(), **options)
    decoder.begin([text(5)])
    for _ in range(5):
        decoder.step()
    with pytest.raises(UserError, match="1 tokens after 10 cached ones are more than the 10"):
        decoder.step()
    assert cache.length == 10


@pytest.mark.parametrize("when", ["capture", "replay"])
def test_after_a_capture_or_a_replay_that_failed_the_cache_says_so(monkeypatch, when):
    """Whether the device has counted is not known then; the caller's cache must not go on."""
    as_on_a_gpu(monkeypatch)

    def interrupted(step):
        if when == "capture":
            step()
            raise KeyboardInterrupt

        def replay():
            raise KeyboardInterrupt

        step()
        return replay

    model = make()
    cache = KVCache.full(model.config, 1, 20, dtype=torch.float64)
    decoder = Decoder(model, cache, Sampling(), seed=0, sequences=[0], capture=interrupted)
    decoder.begin([text(5)])
    decoder.step()
    with pytest.raises(KeyboardInterrupt):
        decoder.step()
    with pytest.raises(UserError, match="reset"):
        cache.begin(1)
    cache.reset()
    assert torch.equal(
        model.generate(text(5)[None], 5, cache=cache, seed=0),
        model.generate(text(5)[None], 5, seed=0),
    )


def test_what_is_drawn_stays_and_is_an_ordinary_tensor(model):
    steps = list(stream(model, text(4).expand(2, 4), 6, seed=1))
    ids = model.generate(text(4).expand(2, 4), 6, seed=1)
    assert torch.equal(torch.stack([step.ids for step in steps], 1), ids[:, 4:])
    assert not any(step.ids.is_inference() for step in steps)
    ids[0, 0] = 1
    model.train()
    model(ids[:, :-1], ids[:, 1:])[1].backward()  # generated text can be trained on
    model.zero_grad()
