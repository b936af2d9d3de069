"""The optimizer, its state in checkpoints, and the guard that keeps bad numbers out of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from almostgpt.config import OptimizerConfig
from almostgpt.errors import UserError
from almostgpt.model import GPT
from almostgpt.training.muon import Muon

# Devices whose AdamW is one fused kernel, which also reads `found_inf` on the device. On two CPU cores
# it takes 23 ms for 28 M parameters where the default takes 117.
FUSED_DEVICES = {"cpu", "cuda", "mps"}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW for every parameter of ``model``; with ``muon``, Muon for the matrices of a GPT's blocks."""
    groups = _muon_groups(model) if config.name == "muon" else []
    taken = {parameter for group in groups for parameter in group["params"]}
    adamw = _adamw([p for p in model.parameters() if p.requires_grad and p not in taken], config)
    if not groups:
        return adamw
    muon = Muon(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return Combined(adamw, muon)


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices only: norms and biases have none."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=parameters[0].device.type in FUSED_DEVICES,
    )


def _muon_groups(model: GPT) -> list[dict[str, Any]]:
    """The matrices of the blocks, by what each of them holds: see ``rows`` of :class:`Muon`."""
    c = model.config
    queries, keys = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    experts = c.n_experts or 1
    several = {
        "qkv.weight": (queries, keys, keys),
        "gate_up.weight": (c.mlp_hidden, c.mlp_hidden) * experts,
    }
    if c.feedforward == "moe":  # an expert's matrix beside the next
        several |= {"up.weight": (c.mlp_hidden,) * experts, "down.weight": (c.n_embd,) * experts}
    groups: dict[tuple[int, ...] | None, list[nn.Parameter]] = {}
    for name, parameter in model.blocks.named_parameters():
        if parameter.dim() >= 2 and parameter.requires_grad and "router" not in name:
            rows = several.get(".".join(name.split(".")[-2:]))
            groups.setdefault(rows, []).append(parameter)
    return [{"params": parameters, "rows": rows} for rows, parameters in groups.items()]


class Combined(torch.optim.Optimizer):
    """Optimizers of different parameters as one: one list of groups, one state, one flag to skip a step.

    So a step is taken by all of them or by none, whoever's gradients overflowed.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets the flag and does not read it

    def __init__(self, *optimizers: torch.optim.Optimizer):
        super().__init__([group for part in optimizers for group in part.param_groups], {})
        self.optimizers = optimizers
        for part in optimizers:  # the groups are shared already: they are the same dicts
            part.state = self.state

    def step(self, closure: None = None) -> None:
        """Gradients must be unscaled before."""
        for part in self.optimizers:
            part.grad_scale, part.found_inf = None, getattr(self, "found_inf", None)
            part.step()


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state as ``{"<parameter name>/<moment>": tensor}``."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what :func:`optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        if parameter_name not in parameters:
            raise UserError(
                f"the optimizer state names {parameter_name!r}, which the model does not have"
            )
        parameter = parameters[parameter_name]
        if key != "step" and value.shape != parameter.shape:
            raise UserError(f"the optimizer state of {name} has the shape {tuple(value.shape)}")
        # A fused kernel reads its step count on the device of the parameter.
        optimizer.state[parameter][key] = value.to(parameter.device)


class FiniteGuard:
    """Lets no step with a non-finite loss or gradient norm reach the weights.

    Where reading a value is free (the CPU) the step is checked at once. Elsewhere a read would make the
    host wait for the device in every step, so the first bad step is remembered on the device, the
    update (of a fused AdamW, or Muon) reads the flag there (``optimizer.found_inf``) and from then on
    leaves the weights alone, and :meth:`first_bad_step` is asked at the next log point.
    """

    def __init__(self, device: torch.device, *, immediate: bool):
        self.immediate = immediate
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)  # 0: none so far

    def check(self, step: int, *values: Tensor) -> None:
        """Remembers ``step`` if a value is not finite and no earlier step was bad. No host sync."""
        finite = torch.stack([torch.isfinite(value) for value in values]).all()
        self._first_bad.masked_fill_((self._first_bad == 0) & ~finite, step)

    def hold_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Tells the optimizer's next update to leave the weights alone if a step has been bad."""
        optimizer.grad_scale = None
        optimizer.found_inf = (self._first_bad > 0).float()

    def first_bad_step(self) -> int | None:
        """The first step that was kept out, or ``None``. Waits for the device."""
        return int(self._first_bad) or None
