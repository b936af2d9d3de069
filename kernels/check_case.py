"""What one way to call an op consists of, for ``info --check``; see check_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from almostgpt.kernels.block_sparse_attention import BlockPattern
from almostgpt.kernels.kv_layer import KVLayer

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """The least that must be done: elements read or written, each once, and operations.

    Elements are those of the first input; ``bytes`` is what is moved beside them.
    """

    elements: int
    flops: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Attributes:
        op: its name in ``kernels.OPS``.
        dimensions: what a shape of it means, for messages.
        inputs: the op's positional arguments, by name, from a shape and a source of tensors; one of
            them may be a ``KVLayer`` or a ``BlockPattern``.
        plain: the definition, in the dtype of its inputs; it takes what the op takes.
        outputs: names of what it returns.
        work: from a shape, of ``"forward"``, and where there are gradients of ``"backward"``.
        shapes: what is checked where no shape is given: on ``"cuda"``, another device (``"cpu"``),
            or in the ``"emulator"``.
        options: keyword arguments of the op.
        constants: more of them: the tensors that have no gradient, by name, from a shape.
        output: the shape of each output.
        gradients: whether the op has any; otherwise only what it gives is checked.
        writes: whether it writes into its ``KVLayer``, whose keys and values then are outputs too.
        slack: how far off the ``"cpu"`` kernel may be beyond the rule, from the inputs: what it
            rounds on purpose.
    """

    op: str
    dimensions: str
    inputs: Callable[
        [Shape, Callable[..., Tensor]], dict[str, Tensor | float | KVLayer | BlockPattern]
    ]
    plain: Callable[..., Tensor | tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    work: Callable[[Shape], dict[str, Work]]
    shapes: dict[str, Shape]
    options: dict[str, object] = field(default_factory=dict)
    constants: Callable[[Shape], dict[str, Tensor]] = lambda shape: {}
    output: Callable[[Shape], Shape] = lambda shape: shape
    gradients: bool = True
    writes: bool = False
    slack: Callable[[dict], float] = lambda inputs: 0.0
