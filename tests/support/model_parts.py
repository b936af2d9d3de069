"""Models of all combinations of parts, drawn by hypothesis, and what they must count to."""

import torch
from hypothesis import strategies as st

from almostgpt import GPT, GPTConfig
from almostgpt.config_model import GPTConfig as Config

VOCAB = 31

FULL = st.just({"attention": "full"})
SLIDING = st.fixed_dictionaries(
    {
        "attention": st.just("sliding_window"),
        "attention_window": st.integers(1, 16),
        "window_pattern": st.sampled_from([None, "L", "LG", "GLL"]),
    }
)
LINEAR = st.fixed_dictionaries(
    {"attention": st.just("linear"), "feature_map": st.sampled_from([None, "elu1", "softmax"])}
)
BLOCK_SPARSE = st.fixed_dictionaries(
    {
        "attention": st.just("block_sparse"),
        "sparse_block": st.integers(1, 5),
        "sparse_window": st.integers(1, 3),
        "sparse_global": st.integers(0, 2),
        "sparse_random": st.integers(0, 2),
    }
)
ATTENTIONS = {
    "full": FULL,
    "sliding_window": SLIDING,
    "linear": LINEAR,
    "block_sparse": BLOCK_SPARSE,
}
PLAIN = st.fixed_dictionaries(
    {"feedforward": st.sampled_from(["gelu", "gelu_tanh", "relu2", "swiglu"])}
)
MOE = st.fixed_dictionaries(
    {
        "feedforward": st.just("moe"),
        "n_experts": st.integers(2, 5),
        "experts_per_token": st.integers(1, 2),
        "expert": st.sampled_from([None, "gelu", "swiglu"]),
        "mlp_hidden": st.sampled_from([None, 12]),
    }
)
ROPE = st.fixed_dictionaries({"position": st.just("rope")}) | st.fixed_dictionaries(
    {
        "position": st.just("rope"),
        "rope_base": st.sampled_from([10000.0, 500.0]),
        "rope_fraction": st.sampled_from([None, 0.5]),
        "rope_scaling": st.sampled_from(["linear", "ntk", "llama3"]),
        "rope_factor": st.sampled_from([None, 2.5]),
    }
)
POSITIONS = ROPE | st.fixed_dictionaries(
    {"position": st.sampled_from(["learned", "sinusoidal", "alibi", "none"])}
)
SHAPES = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(["layernorm", "rmsnorm", "scalenorm"]),
        "n_kv_head": st.sampled_from([None, 1, 2, 4]),
        "head_dim": st.sampled_from([None, 12, 16]),
        "bias": st.booleans(),
        "qkv_bias": st.sampled_from([None, True, False]),
        "qk_norm": st.booleans(),
        "tie_weights": st.booleans(),
        "logit_softcap": st.sampled_from([0.0, 20.0]),
    }
)


def models(attention=None, position=None):
    """Options of a model of any parts that go together; or of some kinds of attention or positions."""
    attention = st.one_of(*ATTENTIONS.values()) if attention is None else attention
    parts = st.tuples(attention, PLAIN | MOE, POSITIONS if position is None else position, SHAPES)
    return parts.map(lambda drawn: {k: v for part in drawn for k, v in part.items()}).filter(
        lambda o: not (o["attention"] == "linear" and o["position"] == "alibi")
    )


def small_config(**options) -> Config:
    sizes = dict(block_size=16, vocab_size=VOCAB, vocab_multiple=8, n_layer=2, n_head=4, n_embd=32)
    return GPTConfig(**{**sizes, **options})


def make(seed: int = 0, **options) -> GPT:
    """In evaluation mode, its weights away from their initialisation, where much is nearly zero."""
    torch.manual_seed(seed)
    model = GPT(small_config(**options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def matrices(c: Config, *, used: bool) -> int:
    """Values of the matrices of a block, or of those that a token is multiplied with."""
    width, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    attention = c.n_embd * (width + 2 * kv) + width * c.n_embd
    gated = c.feedforward == "swiglu" or c.expert == "swiglu"
    feedforward = (3 if gated else 2) * c.n_embd * c.mlp_hidden
    if c.feedforward == "moe":
        experts = c.experts_per_token if used else c.n_experts
        return attention + experts * feedforward + c.n_experts * c.n_embd
    return attention + feedforward


def parameters(c: Config) -> int:
    """The closed form of a model's size."""
    width, kv, bias = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, int(c.bias)
    gated = c.feedforward == "swiglu" or c.expert == "swiglu"
    biases = bias * ((2 if gated else 1) * c.mlp_hidden + c.n_embd) * (c.n_experts or 1)
    biases += int(c.qkv_bias) * (width + 2 * kv) + bias * c.n_embd
    norm = {"layernorm": c.n_embd * (1 + bias), "rmsnorm": c.n_embd, "scalenorm": 1}[c.norm]
    block = matrices(c, used=False) + biases + 2 * norm + 2 * c.head_dim * int(c.qk_norm)
    total = c.n_layer * block + norm
    total += c.padded_vocab_size * c.n_embd * (1 if c.tie_weights else 2)
    return total + (c.block_size * c.n_embd if c.position == "learned" else 0)
