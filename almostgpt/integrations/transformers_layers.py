"""RMSNorm and SwiGLU of Llama-type transformers models by our kernels. See ``patch``."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import activations
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from almostgpt import kernels

RMS_NORMS = (
    llama.LlamaRMSNorm,
    mistral.MistralRMSNorm,
    qwen2.Qwen2RMSNorm,
    qwen3.Qwen3RMSNorm,
)
MLPS = (llama.LlamaMLP, mistral.MistralMLP, qwen2.Qwen2MLP, qwen3.Qwen3MLP)
SILU = (nn.SiLU, activations.SiLUActivation)


@dataclass
class Patched:
    """What ``patch`` did.

    Attributes:
        rms_norm, swiglu: names of the modules that the kernels serve now.
        left: name → why a module of a known class is as it was.
    """

    rms_norm: list[str] = field(default_factory=list)
    swiglu: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"kernels.rms_norm: {len(self.rms_norm)}, kernels.swiglu: {len(self.swiglu)}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.left.items()])


def patch(model: nn.Module) -> Patched:
    """See ``almostgpt.integrations.transformers.patch``."""
    patched = Patched()
    for name, module in model.named_modules():
        norm = type(module) in RMS_NORMS
        if not norm and type(module) not in MLPS:
            continue
        forward = _rms_norm if norm else _swiglu
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__func__", None) not in (_rms_norm, _swiglu):
            why = "its forward is replaced already"
        else:
            why = None if norm else _refuse_mlp(module)
        if why is not None:
            patched.left[name] = why
            continue
        if not norm:
            _join(module.gate_proj, module.up_proj)
        module.forward = MethodType(forward, module)
        (patched.rms_norm if norm else patched.swiglu).append(name)
    return patched


def unpatch(model: nn.Module) -> int:
    """See ``almostgpt.integrations.transformers.unpatch``."""
    count = 0
    for module in model.modules():
        forward = getattr(vars(module).get("forward"), "__func__", None)
        if forward not in (_rms_norm, _swiglu):
            continue
        del module.forward
        if forward is _swiglu:
            for projection in (module.gate_proj, module.up_proj):
                for parameter in projection.parameters(recurse=False):
                    parameter.data = parameter.data.clone()
        count += 1
    return count


# --- RMSNorm -----------------------------------------------------------------------------------------


def _rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """Theirs rounds to x's dtype before the weight, ours once at the end: an ulp or two apart."""
    if self.weight.dtype != hidden_states.dtype:  # theirs then gives another dtype than x's
        return type(self).forward(self, hidden_states)
    return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)


# --- SwiGLU ------------------------------------------------------------------------------------------


def _swiglu(self: nn.Module, x: Tensor) -> Tensor:
    gate, up = self.gate_proj, self.up_proj
    if torch.compiler.is_compiling() or _hooked(gate, up) or not _joined(gate, up):
        return type(self).forward(self, x)
    weight = _Both.apply(gate.weight, up.weight)
    bias = None if gate.bias is None else _Both.apply(gate.bias, up.bias)
    return self.down_proj(kernels.swiglu(linear(x, weight, bias)))


class _Both(torch.autograd.Function):
    """Two parameters, neighbours in memory, as the one tensor that they are: nothing is copied."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        # What changes gate in place is noticed by autograd, as it would be of gate itself.
        return gate.detach().as_strided((2 * gate.shape[0], *gate.shape[1:]), gate.stride())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(gradient.chunk(2))


def _pairs(gate: nn.Linear, up: nn.Linear) -> list[tuple[nn.Parameter, nn.Parameter]]:
    pairs = [(gate.weight, up.weight)]
    return pairs if gate.bias is None else [*pairs, (gate.bias, up.bias)]


def _join(gate: nn.Linear, up: nn.Linear) -> None:
    if _joined(gate, up):
        return
    for first, second in _pairs(gate, up):
        first.data, second.data = torch.cat([first.data, second.data]).chunk(2)


def _joined(gate: nn.Linear, up: nn.Linear) -> bool:
    """Whether up's parameters follow gate's in the same block of memory."""
    for first, second in _pairs(gate, up):
        if not (first.is_contiguous() and second.is_contiguous() and first.shape == second.shape):
            return False
        if first.dtype != second.dtype or first.device != second.device:
            return False
        if second.data_ptr() != first.data_ptr() + first.numel() * first.element_size():
            return False
        if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
            return False
    return True


def _hooked(*modules: nn.Module) -> bool:
    """Whether a call of a module would do more than its forward."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)


def _refuse_mlp(mlp: nn.Module) -> str | None:
    gate, up = mlp.gate_proj, mlp.up_proj
    if type(mlp.act_fn) not in SILU:
        return f"its activation is {type(mlp.act_fn).__name__}, not SiLU"
    for projection in (gate, up):
        if type(projection) is not nn.Linear or "forward" in vars(projection):
            return "its projections are not plain nn.Linear"
        for parameter in projection.parameters(recurse=False):
            if type(parameter.data) is not Tensor or not parameter.is_floating_point():
                return "its weights are not plain floating tensors"
            if parameter.is_meta:
                return "its weights are on the meta device"
    if (gate.bias is None) != (up.bias is None):
        return "only one of its projections has a bias"
    if any(a.dtype != b.dtype or a.device != b.device for a, b in _pairs(gate, up)):
        return "its two weights are of different dtypes or devices"
    if _hooked(gate, up):
        return "its projections have hooks"
    return None
