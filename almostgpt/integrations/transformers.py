"""The kernels in models of Hugging Face transformers::

    from almostgpt.integrations import transformers as integration

    model = AutoModelForCausalLM.from_pretrained(ID, attn_implementation=integration.register())
    print(integration.patch(model))             # RMSNorm and SwiGLU of Llama-type models, too
    with integration.observe() as attention:    # which kernel ran how often, what fell back and why
        model.generate(...)
    print(attention)

transformers is imported by the functions, not here: it is no dependency of this package.
docs/integrations.md says what runs on a kernel and what does not.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections import Counter
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from almostgpt.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from almostgpt.integrations.transformers_layers import Patched

NAME = "almostgpt"
INSTALL = 'pip install "transformers>=5.23"'


def register() -> str:
    """Make ``kernels.flash_attention`` the ``attn_implementation`` of the name that it returns.

    For ``from_pretrained(..., attn_implementation=register())`` or
    ``model.set_attn_implementation(register())``. Called again it changes nothing.

    Both the attention and its mask are registered: to an attention without a mask of the same name
    transformers gives no mask at all, without a word, and padding would be attended to.

    Raises:
        UserError: transformers is missing or too old.
    """
    _need_transformers()
    from transformers import AttentionInterface, AttentionMaskInterface

    from almostgpt.integrations.transformers_attention import attention
    from almostgpt.integrations.transformers_mask import mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


def observe() -> AbstractContextManager[Counter[str]]:
    """Count what the attention of this thread's forwards within the ``with`` block ran on.

    Returns:
        A context manager that gives a ``Counter``: ``"flash_attention: cuda"`` and the like, and
        ``"sdpa: …"`` with the reason where PyTorch served. Calls in compiled code are not seen.

    Raises:
        UserError: transformers is missing or too old.
    """
    _need_transformers()
    from almostgpt.integrations.transformers_attention import observe

    return observe()


def patch(model: nn.Module) -> Patched:
    """Let ``kernels.rms_norm`` and ``kernels.swiglu`` serve a model's RMSNorms and gated MLPs.

    Only modules that are exactly those of Llama, Mistral, Qwen2 and Qwen3 are touched (Gemma's
    RMSNorm, say, multiplies by 1 + weight); parameters keep their names, values and identity, and an
    optimizer that holds them goes on. What is patched already stays so.

    An MLP needs gate and up side by side, as one product makes them; so the two weights are moved
    into one block of memory, of which each is a half. That costs a copy of one MLP's two weights at
    a time, once. Whatever parts the halves again later (``model.to`` another device or dtype, a
    sharding wrapper, a hook on a projection) gives the MLP its own forward back, as does
    torch.compile, which fuses the activation itself; so patch a model where it is to run.

    Args:
        model: any ``nn.Module``; nothing else than its known parts is touched.

    Returns:
        What was patched, and which known modules were not and why; ``print`` reads well.

    Raises:
        UserError: transformers is missing or too old.
    """
    _need_transformers()
    from almostgpt.integrations.transformers_layers import patch

    return patch(model)


def unpatch(model: nn.Module) -> int:
    """Undo ``patch``: every module has its own forward and memory of its own for its weights.

    Returns:
        How many modules were changed back.

    Raises:
        UserError: transformers is missing or too old.
    """
    _need_transformers()
    from almostgpt.integrations.transformers_layers import unpatch

    return unpatch(model)


def _need_transformers() -> None:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UserError(f"almostgpt.integrations needs transformers: {INSTALL}") from error
    masks = importlib.util.find_spec("transformers.masking_utils")
    if masks is not None:
        from transformers.masking_utils import sdpa_mask

        if "q_offset" in inspect.signature(sdpa_mask).parameters:
            return
    raise UserError(
        f"transformers {transformers.__version__} describes masks in an older way: {INSTALL}"
    )
