"""The ops of AlmostGPT: ordinary tensors in, the best kernel that serves them chosen by itself.

Every op has a plain PyTorch reference that runs anywhere. Faster backends (``cuda``, ``triton``,
``cpu``, ``emulator``) stand before it where they exist and serve the device, dtype, shape and options::

    y = kernels.rms_norm(x, weight)
    print(kernels.explain("rms_norm", x, weight))      # which kernel ran, and why no other did
    with kernels.use_backend("reference"):             # force one; it fails rather than fall back
        y = kernels.rms_norm(x, weight)

``ALMOSTGPT_BACKEND=reference`` forces a backend for a whole process (``emulator,triton``: for
each op the one that it has). ``kernels.emulator`` runs the CUDA kernels on a CPU and finds their
errors.
"""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package almostgpt.kernels: install the project (pip install -e .) and "
        "`from almostgpt import kernels`; as top-level `kernels` it would hide another package"
    )

from almostgpt.errors import UserError
from almostgpt.kernels import cpu, dispatch, emulator, native  # noqa: F401
from almostgpt.kernels.activations import GELU, RELU_SQUARED, SWIGLU, gelu, relu_squared, swiglu
from almostgpt.kernels.block_sparse_attention import (
    BLOCK_SPARSE_ATTENTION,
    BlockPattern,
    block_sparse_attention,
    random_blocks,
)
from almostgpt.kernels.cross_entropy import CROSS_ENTROPY, cross_entropy
from almostgpt.kernels.dispatch import BACKENDS, Explanation, use_backend
from almostgpt.kernels.emulator import EmulatorError
from almostgpt.kernels.expert_linear import EXPERT_LINEAR, expert_linear
from almostgpt.kernels.flash_attention import FLASH_ATTENTION, flash_attention
from almostgpt.kernels.int8_linear import (
    INT8_LINEAR,
    dequantize_rows,
    int8_linear,
    quantize_rows,
)
from almostgpt.kernels.kv_cache import DECODE_ATTENTION, KV_APPEND, decode_attention, kv_append
from almostgpt.kernels.kv_layer import KVLayer
from almostgpt.kernels.linear import LINEAR, linear
from almostgpt.kernels.linear_attention import LINEAR_ATTENTION, LinearState, linear_attention
from almostgpt.kernels.linear_cross_entropy import LINEAR_CROSS_ENTROPY, linear_cross_entropy
from almostgpt.kernels.rms_norm import RMS_NORM, rms_norm
from almostgpt.kernels.rope import ROPE, rope
from almostgpt.kernels.sample import SAMPLE, sample

OPS: dict[str, dispatch.Op] = {
    op.name: op
    for op in (
        RMS_NORM,
        FLASH_ATTENTION,
        ROPE,
        CROSS_ENTROPY,
        LINEAR_CROSS_ENTROPY,
        SWIGLU,
        GELU,
        RELU_SQUARED,
        KV_APPEND,
        DECODE_ATTENTION,
        SAMPLE,
        LINEAR,
        INT8_LINEAR,
        LINEAR_ATTENTION,
        EXPERT_LINEAR,
        BLOCK_SPARSE_ATTENTION,
    )
}

__all__ = [
    "BACKENDS",
    "OPS",
    "BlockPattern",
    "EmulatorError",
    "Explanation",
    "KVLayer",
    "LinearState",
    "block_sparse_attention",
    "build_info",
    "cross_entropy",
    "decode_attention",
    "dequantize_rows",
    "emulator",
    "expert_linear",
    "explain",
    "flash_attention",
    "gelu",
    "int8_linear",
    "kv_append",
    "linear",
    "linear_attention",
    "linear_cross_entropy",
    "quantize_rows",
    "random_blocks",
    "relu_squared",
    "rms_norm",
    "rope",
    "sample",
    "swiglu",
    "use_backend",
]


def explain(
    op_name: str, *args, capability: tuple[int, int] | None = None, **kwargs
) -> Explanation:
    """Say which backend would run an op on these arguments, and why the others would not.

    Args:
        op_name: a name in ``OPS``, such as ``"rms_norm"``.
        *args, **kwargs: what the op itself would be called with.
        capability: ask about a CUDA card of this compute capability and an install with every
            CUDA kernel, such as ``(9, 0)`` for an H100, instead of what is here. The tensors may
            then be on any device, ``"meta"`` too.

    Returns:
        An ``Explanation`` with ``.backend``, ``.kernel`` and ``.reasons``; ``print`` reads well.

    Raises:
        UserError: unknown op, arguments the op refuses, a capability that is not known, or a
            forced backend that cannot serve.
    """
    if op_name not in OPS:
        raise UserError(f"no op named {op_name!r}; the ops are {', '.join(OPS)}")
    return OPS[op_name].explain(*args, capability=capability, **kwargs)


def build_info() -> dict:
    """What the native library holds: ``path error cuda archs torch compiler plan`` (JSON values).

    ``error`` is None where the library is loaded, otherwise why it is not; ``cuda`` is the
    version of the CUDA toolkit that compiled the kernels, or None where none were compiled.
    """
    return native.NATIVE.as_dict()
