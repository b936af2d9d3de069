"""Perplexity against closed forms, transformers' sliding window, and counting by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt import GPT, GPTConfig
from almostgpt.data.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer
from almostgpt.errors import UserError
from almostgpt.evaluation.perplexity import Perplexity, perplexity, sliding

VOCAB, BLOCK = 31, 16


def make(seed: int = 0, **options) -> GPT:
    torch.manual_seed(seed)
    defaults = dict(vocab_size=VOCAB, block_size=BLOCK, n_layer=2, n_embd=32, n_head=4)
    model = GPT(GPTConfig(**{**defaults, **options}))
    for parameter in model.parameters():  # away from the initialisation, where much is nearly zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_tokens(n: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.uint16)


def bigram_model() -> tuple[GPT, torch.Tensor]:
    """A model of float64 whose next token depends on the last one alone, and the (V, V) ln p that it has.

    Blocks add nothing, so the final norm sees a token's one-hot embedding, which it scales by a number
    that is known: the head's rows over that number are the logits.
    """
    model = make(n_embd=32, n_head=4, tie_weights=False, vocab_multiple=1).double()
    logits = torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=torch.manual_seed(1)) * 3
    scale = 1 / math.sqrt(1 / 32 + model.config.norm_eps)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
            block.feedforward.down.weight.zero_()
        model.token_embedding.weight.copy_(torch.eye(VOCAB, 32))
        model.norm.weight.fill_(1)
        model.head.weight.zero_()
        model.head.weight[:, :VOCAB] = logits.t() / scale
    return model, logits.log_softmax(-1)


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("vocab_multiple", [1, 64])
def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(vocab_multiple):
    model = make(vocab_multiple=vocab_multiple)
    torch.nn.init.zeros_(model.output_weight)
    result = perplexity(model, random_tokens(100))
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert result.nll == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert result.tokens == 99


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_bigram_model_has_the_sum_of_its_bigrams(data):
    """Whatever the windows: a token left out, scored twice or paired wrongly changes the sum."""
    n = data.draw(st.integers(2, 80), "n")
    window = data.draw(st.integers(2, BLOCK), "window")
    stride = data.draw(st.integers(1, window), "stride")
    batch_size = data.draw(st.integers(1, 9), "batch_size")
    model, log_p = bigram_model()
    tokens = random_tokens(n, seed=n).astype(np.int64)
    scored = [i for i in range(1, n) if stride < window or i % window]
    expected = -sum(log_p[tokens[i - 1], tokens[i]].item() for i in scored)
    result = perplexity(model, tokens, window=window, stride=stride, batch_size=batch_size)
    assert result.nats == pytest.approx(expected, rel=1e-9)
    assert result.tokens == len(scored)
    assert result.perplexity == pytest.approx(math.exp(expected / len(scored)), rel=1e-9)


@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_every_token_is_scored_once_with_all_of_its_window_before_it(n, window, data):
    stride = data.draw(st.integers(1, window), "stride")
    windows = list(sliding(n, window, stride))
    scored = [i for w in windows for i in range(w.first, w.end)]
    without_context = set(range(0, n, window)) if stride == window else {0}
    assert scored == sorted(set(range(n)) - without_context)
    for number, (start, first, end) in enumerate(windows):
        assert start == number * stride
        assert start < first < end == min(start + window, n)
        assert number == 0 or first - start >= min(window - stride, first) or stride == window


# ---------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def twins():
    """The same random GPT-2 in float64: (transformers', ours)."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `test`")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=BLOCK, n_embd=32, n_layer=2, n_head=4
    )
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    parts = dict(norm="layernorm", feedforward="gelu_tanh", position="learned", bias=True)
    ours = make(**parts, vocab_multiple=1).double()
    names = {
        "transformer.wte": "token_embedding",
        "transformer.wpe": "position",
        "transformer.h.": "blocks.",
        "transformer.ln_f": "norm",
        "ln_1": "attention_norm",
        "ln_2": "feedforward_norm",
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.out",
        "mlp.c_fc": "feedforward.up",
        "mlp.c_proj": "feedforward.down",
    }
    state = {}
    for name, value in theirs.state_dict().items():
        transposed = ".c_" in name and value.dim() == 2  # Conv1D: (in, out)
        for their_part, our_part in names.items():
            name = name.replace(their_part, our_part)
        state[name] = value.t() if transposed else value
    del state["lm_head.weight"]
    ours.load_state_dict(state)
    return theirs, ours


@torch.no_grad()
def as_transformers_documents_it(model, tokens, max_length: int, stride: int):
    """The loop of "Perplexity of fixed-length models": total −ln p, and of how many tokens.

    Where the page multiplies each mean by an approximate count, the labels that count are counted.
    """
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    length = ids.shape[1]
    nats, scored, previous_end = 0.0, 0, 0
    for begin in range(0, length, stride):
        end = min(begin + max_length, length)
        target_length = end - previous_end
        input_ids = ids[:, begin:end]
        labels = input_ids.clone()
        labels[:, :-target_length] = -100
        count = int((labels[:, 1:] != -100).sum())  # they are shifted within
        if count:
            nats += model(input_ids, labels=labels).loss.item() * count
            scored += count
        previous_end = end
        if end == length:
            break
    return nats, scored


@pytest.mark.parametrize(
    ("n", "window", "stride"),
    [
        (100, None, None),
        (100, 16, 8),
        (101, 16, 5),
        (64, 16, 16),
        (65, 16, 16),  # the last window has one token, which nothing scores
        (40, 7, 3),
        (9, 16, 8),
        (16, 16, 1),
        (2, None, None),
    ],
)
def test_equals_transformers(twins, n, window, stride):
    theirs, ours = twins
    tokens = random_tokens(n, seed=n)
    nats, scored = as_transformers_documents_it(theirs, tokens, window or BLOCK, stride or 8)
    result = perplexity(ours, tokens, window=window, stride=stride, batch_size=3)
    assert result.nats == pytest.approx(nats, rel=1e-6)  # their loss is float32, whatever the model
    assert result.tokens == scored


def test_equals_transformers_in_float32(twins):
    theirs, ours = twins
    tokens = random_tokens(500)
    nats, _ = as_transformers_documents_it(theirs, tokens, BLOCK, 8)
    single = make(
        norm="layernorm", feedforward="gelu_tanh", position="learned", bias=True, vocab_multiple=1
    )
    single.load_state_dict(ours.state_dict())
    assert perplexity(single, tokens).nats == pytest.approx(nats, rel=1e-5)


# ---------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
def test_the_batch_size_changes_rounding_only(position):
    model = make(position=position)
    tokens = random_tokens(203)
    results = [perplexity(model, tokens, batch_size=size, stride=5) for size in (1, 2, 7, 1000)]
    for result in results[1:]:
        assert result.nats == pytest.approx(results[0].nats, rel=1e-6)
        assert (result.tokens, result.windows) == (results[0].tokens, results[0].windows)
    assert results[0].windows == 1 + math.ceil((203 - BLOCK) / 5)


def test_more_context_helps_a_model_that_uses_it():
    """It repeats what came eight tokens before: windows that see eight tokens can know it."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(vocab_size=8, block_size=24, n_layer=1, n_embd=32, n_head=1, position="learned")
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(8, (16, 8), generator=generator).repeat(1, 4)[:, :25]
        _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    text = np.tile(np.random.default_rng(5).integers(0, 8, 8), 40)
    near, far = (perplexity(model, text, window=16, stride=stride) for stride in (16, 4))
    assert far.perplexity < 1.5 < near.perplexity


def test_the_models_mode_is_left_as_it_was_and_dropout_is_off():
    model = make(dropout=0.5)
    expected = perplexity(model, random_tokens(50)).nats
    model.train()
    assert perplexity(model, random_tokens(50)).nats == expected and model.training
    with pytest.raises(UserError):
        perplexity(model, [VOCAB, 0])
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_kept_for_a_backward(monkeypatch):
    forward, seen = GPT.forward, []

    def watched(self, *arguments):
        loss = forward(self, *arguments)
        seen.append(loss[1].requires_grad)
        return loss

    monkeypatch.setattr(GPT, "forward", watched)
    perplexity(make(), random_tokens(50), batch_size=2)
    assert len(seen) == 3 and not any(seen)


def test_lists_tensors_and_arrays_of_any_integer_are_the_same_text():
    model, tokens = make(), random_tokens(50)
    expected = perplexity(model, tokens).nats
    for same in (tokens.tolist(), torch.from_numpy(tokens.astype(np.int64)), tokens.astype("<u4")):
        assert perplexity(model, same).nats == expected


def test_under_autocast_it_is_nearly_the_same():
    model, tokens = make(), random_tokens(100)
    exact = perplexity(model, tokens).nll
    with torch.autocast("cpu", torch.bfloat16):
        rounded = perplexity(model, tokens).nll
    assert rounded != exact and rounded == pytest.approx(exact, rel=2e-2)


def test_progress_is_told_of_every_scored_token():
    told = []
    result = perplexity(make(), random_tokens(100), batch_size=4, progress=told.append)
    assert sum(told) == result.tokens == 99
    assert len(told) == math.ceil(result.windows / 4)
    assert result.seconds > 0 and result.tokens_per_second == result.tokens / result.seconds


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    "tokenizer, text",
    [
        (ByteTokenizer(), "Ärger! 🙂 und\nmehr" * 9),
        (CharTokenizer("Ärge! 🙂und\nmh"), "Ärger! 🙂 und\nmehr" * 9),
    ],
)
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 8), (16, 1)])
def test_bits_per_byte_counts_the_bytes_of_scored_tokens(tokenizer, text, window, stride):
    tokens = tokenizer.encode_array(text)
    model = make(vocab_size=tokenizer.vocab_size)
    result = perplexity(model, tokens, tokenizer=tokenizer, window=window, stride=stride)
    scored = [i for w in sliding(len(tokens), window, stride) for i in range(w.first, w.end)]
    size = sum(len(tokenizer.decode_bytes([tokens[i]])) for i in scored)
    assert result.bytes == size
    assert result.bits_per_byte == pytest.approx(result.nats / math.log(2) / size)
    assert perplexity(model, tokens).bits_per_byte is None


def test_a_model_of_bytes_that_knows_nothing_needs_log2_of_its_vocabulary():
    model = make(vocab_size=257)
    torch.nn.init.zeros_(model.output_weight)
    tokens = ByteTokenizer().encode_array("any text at all")
    result = perplexity(model, tokens, tokenizer=ByteTokenizer())
    assert result.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)


def test_an_end_of_text_costs_nats_and_is_no_text():
    model = make(vocab_size=257)
    tokens = np.array([*b"one", 256, *b"two"], np.uint16)
    result = perplexity(model, tokens, tokenizer=ByteTokenizer())
    assert (result.tokens, result.bytes) == (6, 5)
    nothing = perplexity(model, [256, 256], tokenizer=ByteTokenizer())
    assert nothing.bytes == 0 and nothing.bits_per_byte is None


def test_bytes_of_gpt2_tokens_are_those_of_the_text(tiktoken_cache, monkeypatch):
    """In several pieces, borders of which fall within characters."""
    monkeypatch.setattr("almostgpt.evaluation.perplexity.PIECE", 3)
    tokenizer = load_tokenizer("gpt2")
    text = "Ärger! 🙂🙃 日本語 and plain words"
    tokens = tokenizer.encode_array(text)
    model = make(vocab_size=tokenizer.vocab_size, n_embd=8, n_head=1, n_layer=1)
    result = perplexity(model, tokens, tokenizer=tokenizer)
    assert result.bytes == len(text.encode()) - len(tokenizer.decode_bytes(tokens[:1]))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "2 tokens or more"),
        ([1], {}, "2 tokens or more"),
        ([[1, 2], [3, 4]], {}, "2 tokens or more"),
        ([1.0, 2.0], {}, "whole numbers"),
        ([1, VOCAB, 2], {}, f"token id {VOCAB} is not in the model's vocabulary of {VOCAB}"),
        ([1, -1], {}, "token id -1"),
        ([1, 2], {"window": 1}, "window is 1, but must be in 2 … 16"),
        ([1, 2], {"window": 17}, "window is 17, but must be in 2 … 16"),
        ([1, 2], {"stride": 0}, "stride is 0, but must be in 1 … 16"),
        ([1, 2], {"window": 8, "stride": 9}, "stride is 9, but must be in 1 … 8"),
        ([1, 2], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_mistakes_are_named(tokens, options, message):
    with pytest.raises(UserError, match=message):
        perplexity(make(), tokens, **options)


def test_endless_positions_have_no_longer_windows():
    """Distances beyond block_size were never trained."""
    with pytest.raises(UserError, match="window is 17"):
        perplexity(make(position="rope"), [1, 2], window=17)


def test_a_tokenizer_smaller_than_the_model_refuses_its_ids():
    with pytest.raises(UserError, match="token id 258"):
        perplexity(make(vocab_size=300), [1, 258], tokenizer=ByteTokenizer())


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_said(broken):
    model = make()
    with torch.no_grad():
        model.norm.weight[0] = broken
    with pytest.raises(UserError, match="not finite"):
        perplexity(model, random_tokens(20))


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert (
        Perplexity(nats=1e6, tokens=10, windows=1, seconds=1.0, bytes=None).perplexity == math.inf
    )


def test_a_gpu_without_room_says_what_to_lower(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT, "forward", full)
    with pytest.raises(UserError, match="8 windows of 16 tokens: lower the batch size"):
        perplexity(make(), random_tokens(200))
