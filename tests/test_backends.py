"""``almostgpt info --config``: what it says of a model is what a real one does."""

import json

import pytest
import torch

from almostgpt import GPT, kernels
from almostgpt.backends import generation_uses, training_uses
from almostgpt.cli.info_model import _ranges
from almostgpt.cli.main import main
from almostgpt.config import Config, overlay, resolve
from almostgpt.inference.cache import KVCache
from almostgpt.inference.decoder import Decoder
from almostgpt.inference.sampling import Sampling
from almostgpt.kernels.dispatch import observing

CPU = torch.device("cpu")
SMALL = {"vocab_size": 100, "block_size": 32, "n_layer": 3, "n_head": 4, "n_embd": 32}
MODELS = {
    "plain": {"norm": "layernorm", "feedforward": "gelu", "position": "learned"},
    "llama": {"n_kv_head": 2, "tie_weights": False, "qk_norm": True},
    "local": {"attention": "sliding_window", "window_pattern": "LG", "position": "alibi"},
    "linear": {"attention": "linear", "feedforward": "moe", "norm": "scalenorm"},
    "sparse": {"attention": "block_sparse", "gradient_checkpointing": "full"},
    "selective": {"gradient_checkpointing": "selective", "feedforward": "relu2"},
}


def config(name: str, **settings) -> Config:
    model = {f"model.{key}": value for key, value in {**SMALL, **MODELS.get(name, {})}.items()}
    return resolve(overlay(Config(), {**model, "training.batch_size": 2, **settings}))


def chosen(uses) -> set[tuple]:
    return {(use.op, use.backend, use.kernel, *use.reasons.items()) for use in uses if use.op}


def real(run) -> set[tuple]:
    """The same of real tensors: what each call of an op says when it is made."""
    seen = set()

    def tell(op, args, kwargs):
        why = op.explain(*args, **kwargs)
        seen.add((why.op, why.backend, why.kernel, *why.reasons.items()))

    with observing(tell):
        run()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_training_is_as_a_real_step_does_it(name):
    asked = config(name, **{"training.precision": "bf16" if name == "llama" else "fp32"})
    model = GPT(asked.model)
    ids = torch.randint(100, (2, 32))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "llama"):
            model(ids, ids)

    assert chosen(training_uses(asked, CPU)) == real(step)


@pytest.mark.parametrize("name", [*MODELS, "int8"])
def test_generation_is_as_a_real_step_does_it(name):
    asked = config(name, **{"model.quantize": "int8" if name == "int8" else "none"})
    model = GPT(asked.model).eval()
    cache = KVCache.for_model(model, batch=1, tokens=32)
    decoder = Decoder(model, cache, Sampling(), seed=0, sequences=[0])
    decoder.begin([torch.randint(100, (9,))])
    assert chosen(generation_uses(asked, CPU)) == real(decoder.step)


def test_calls_are_of_their_parts():
    uses = training_uses(config("llama"), CPU)
    found = {(use.part, use.op): use for use in uses}
    assert found["attention", "linear"].modules == ("qkv", "out")
    assert found["attention", "linear"].blocks == (0, 1, 2)
    assert found["attention", "rms_norm"].modules == ("q_norm", "k_norm")
    assert found["attention", "flash_attention"].kind == "full"
    assert found["position", "rope"].kind == "rope"
    assert found["attention_norm", "rms_norm"].kind == found["norm", "rms_norm"].kind == "rmsnorm"
    assert found["feedforward", "swiglu"].blocks == (0, 1, 2)
    assert found["loss", "linear_cross_entropy"].blocks == ()
    assert found["token_embedding", None].backend == "PyTorch"
    drawn = {(use.part, use.op): use for use in generation_uses(config("llama"), CPU)}
    assert drawn["head", "linear"].kind == "untied" and ("sampling", "sample") in drawn
    assert {("attention", "kv_append"), ("attention", "decode_attention")} <= set(drawn)
    plain = {(use.part, use.op): use for use in training_uses(config("plain"), CPU)}
    assert plain["attention_norm", None].kind == "layernorm"  # it calls no op of ours


def test_layers_that_differ_are_told_apart(monkeypatch):
    """Kernels that refuse windows: then local layers have another than global ones."""

    def without_windows(refuse):
        def refuse_windows(card, *args, window=None, **kwargs):
            return "no windows" if window else refuse(card, *args, **kwargs)

        return refuse_windows

    for kernel in kernels.OPS["flash_attention"].kernels:
        if kernel.backend == "cuda":
            monkeypatch.setitem(vars(kernel), "refuse", without_windows(kernel.refuse))
    uses = training_uses(config("local", **{"training.precision": "bf16"}), CPU, card=(9, 0))
    by_backend = {use.backend: use for use in uses if use.op == "flash_attention"}
    assert by_backend["reference"].blocks == (0, 2) and by_backend["cuda"].blocks == (1,)
    assert by_backend["reference"].reasons["cuda"] == "no windows"


def test_a_card_that_is_not_here():
    uses = training_uses(config("llama", **{"training.precision": "bf16"}), CPU, card=(9, 0))
    by_op = {use.op: use for use in uses}
    assert by_op["flash_attention"].kernel == "flash_attention_sm90"
    assert by_op["flash_attention"].dtypes == ("bfloat16",)
    assert by_op["rope"].backend == by_op["linear_cross_entropy"].backend == "triton"
    drawn = {use.op: use for use in generation_uses(config("llama"), CPU, card=(9, 0))}
    assert drawn["decode_attention"].kernel == "decode_attention_sm80"
    assert drawn["rms_norm"].dtypes == ("bfloat16",)  # weights are in 16 bits there


@pytest.mark.parametrize("block_size", [1, 2, 17])
def test_however_short_the_texts(block_size):
    short = config("plain", **{"model.block_size": block_size})
    drawn = {use.op for use in generation_uses(short, CPU)}
    assert {"decode_attention", "sample"} <= drawn


def test_a_forced_backend_is_what_is_shown():
    with kernels.use_backend("reference"):
        uses = generation_uses(config("plain"), CPU)
        assert {use.backend for use in uses if use.op} == {"reference"}
    with kernels.use_backend("cuda", ops=["flash_attention"]):
        uses = {use.op: use for use in training_uses(config("plain"), CPU)}
    assert uses["flash_attention"].backend == "none"
    assert "forced but cannot run" in uses["flash_attention"].kernel


# ---------------------------------------------------------------- the command


def test_tables_and_json(capsys):
    arguments = ["info", "--config=gpt2-124m", "--model.n-layer=2", "--capability=9.0"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "training, bf16, 32 x 1024 tokens" in out and "a GPU of compute capability 9.0" in out
    assert "blocks 0-1 attention (full)" in out
    assert "flash_attention: cuda (flash_attention_sm90), given bfloat16" in out
    assert "linear: not cpu: the C++ kernels are for a processor" in out
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"] == "gpt2-124m" and set(report) >= {"training", "generation", "notes"}
    assert {use["part"] for use in report["generation"]} >= {"attention", "head", "sampling"}


def test_what_cannot_be_trained_is_shown_for_generation(capsys):
    assert main(["info", "--model.quantize=int8", "--device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "int8_linear (qkv, out)" in out and "int8 cannot be trained" in out
    assert "training, " not in out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config=nope"], "no configuration named 'nope'"),
        (["--model.norm=rsmnorm"], "did you mean rmsnorm"),
        (["--config=quickstart", "--capability=7.5"], "capability must be one of"),
        (["--config=quickstart", "--capability=new"], "capability must be one of 8.0, "),
        (["--config=quickstart", "--capability=9.0", "--device=cpu"], "leave --device out"),
    ],
)
def test_mistakes_are_named(arguments, expected, capsys):
    assert main(["info", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_ranges_of_layers():
    assert _ranges((0, 1, 2, 4, 6, 7)) == "0-2, 4, 6-7" and _ranges(()) == ""
