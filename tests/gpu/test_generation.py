"""Generation on a GPU: a step as one CUDA graph, which nothing waits for."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from almostgpt import GPT, GPTConfig, kernels
from almostgpt.data.tokenizer import ByteTokenizer
from almostgpt.inference.cache import KVCache
from almostgpt.inference.decoder import Decoder, cuda_graph
from almostgpt.inference.generate import stream
from almostgpt.inference.sampling import Sampling
from almostgpt.inference.text import TextStream
from almostgpt.model.quantized import quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNEQUAL = [[5, 6, 7], [1], list(range(40)), list(range(100, 117))]


def make(dtype: torch.dtype, quantized: str = "none", position: str = "rope") -> GPT:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=160,
            vocab_size=250,
            n_layer=3,
            n_head=4,
            n_kv_head=2,
            n_embd=256,
            position=position,
        )
    ).cuda()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # wide logits: rounding breaks no tie
    return quantize(model, quantized).to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantized", ["none", "int8"])
@pytest.mark.parametrize("cache", ["full", "rolling", "int8"])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_graphs_give_the_bits_of_steps_launched_one_by_one(dtype, quantized, cache, position):
    model = make(dtype, quantized, position)
    options = {"cache": cache, "logprobs": True, "seed": 3}
    if cache == "rolling":
        options |= {"window": 48, "sink_tokens": 4}
    sampling = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}
    for drawn_by in ({"temperature": 0}, {}, sampling):
        graphed, launched = (
            model.generate(UNEQUAL, 100, graph=graph, **drawn_by, **options)
            for graph in (True, False)
        )
        for ours, theirs in zip(graphed[0], launched[0], strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(graphed[1], launched[1], strict=True):
            assert torch.equal(ours, theirs)


def test_the_kernels_that_run_are_ours():
    model = make(torch.bfloat16, "int8")
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
    layer = model.blocks[0].attention.out
    answer = kernels.explain("int8_linear", x, layer.weight, layer.scales)
    assert answer.backend == "cuda", str(answer)
    rows = (torch.zeros(1, dtype=torch.int64, device="cuda"),) * 3
    answer = kernels.explain("sample", x, *rows, top_p=0.9)
    assert answer.backend == "cuda", str(answer)


@pytest.mark.parametrize("quantized", ["none", "int8"])
def test_a_step_waits_for_nothing(no_host_sync, quantized):
    model = make(torch.bfloat16, quantized)
    cache = KVCache.full(model.config, 4, dtype=torch.bfloat16, device="cuda")
    decoder = Decoder(
        model, cache, Sampling(top_k=20, top_p=0.9), seed=1, sequences=range(4), logprobs=True,
        capture=partial(cuda_graph, torch.device("cuda", 0)),
    )  # fmt: skip
    texts = [torch.tensor(ids, device="cuda") for ids in UNEQUAL]
    decoder.begin(texts)
    decoder.step()  # libraries start up
    decoder.step()  # captured
    no_host_sync()
    for _ in range(10):
        decoder.step()


def test_draws_are_those_of_the_cpu():
    """The generator counts, so a seed means the same everywhere; logits are as good as equal."""
    model = make(torch.float32)
    options = {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "min_p": 0.001, "seed": 11}
    on_gpu = model.generate(UNEQUAL, 60, **options)
    on_cpu = model.cpu().generate(UNEQUAL, 60, **options)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_a_sequence_draws_the_same_whatever_is_beside_it():
    model = make(torch.float32)
    together = model.generate(UNEQUAL, 60, seed=5, temperature=1.5)
    for number, prompt in enumerate(UNEQUAL):
        alone = model.generate([prompt], 60, seed=5, temperature=1.5, sequences=[number])
        assert torch.equal(alone[0], together[number])


def test_streams_end_soon_after_the_last_stop_id():
    model = make(torch.bfloat16)
    whole = model.generate(UNEQUAL, 100, seed=2)
    stops = [int(ids[len(prompt) + 5]) for ids, prompt in zip(whole, UNEQUAL, strict=True)]
    steps = 0
    for drawn in stream(model, UNEQUAL, 100, seed=2, stop_ids=stops):
        steps += 1
        torch.cuda.synchronize()  # so that the host knows
        ended = drawn.ids < 0
    assert bool(ended.all()) or steps <= 8
    assert steps < 100
    cut = model.generate(UNEQUAL, 100, seed=2, stop_ids=stops)
    for ids, short, prompt in zip(whole, cut, UNEQUAL, strict=True):
        new = ids[len(prompt) :].tolist()
        first = min(new.index(stop) for stop in stops if stop in new)
        assert short.tolist() == prompt + new[: first + 1]


def test_a_stream_with_many_stop_ids_waits_for_nothing(no_host_sync):
    model = make(torch.bfloat16)
    drawn = stream(model, UNEQUAL, 60, seed=2, stop_ids=range(200, 240))
    for _ in range(3):  # libraries start up, and the step is captured
        next(drawn)
    no_host_sync()
    for _ in zip(range(20), drawn, strict=False):
        pass


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_graph_on_another_gpu_than_the_current_one():
    model = make(torch.bfloat16)
    expected = model.generate(UNEQUAL, 40, seed=1)
    for ours, theirs in zip(
        model.to("cuda:1").generate(UNEQUAL, 40, seed=1), expected, strict=True
    ):
        assert torch.equal(ours.cpu(), theirs.cpu())


def test_text_streams_and_stops():
    model = make(torch.bfloat16)
    tokenizer = ByteTokenizer()
    texts = TextStream(model, tokenizer, ["to be", "or"], 40, seed=1).run()
    stop = texts[0].text[3:5]
    again = TextStream(model, tokenizer, ["to be", "or"], 40, seed=1, stop=[stop]).run()
    assert again[0].text == texts[0].text[: texts[0].text.index(stop)]
    assert again[0].finish == "stop"
