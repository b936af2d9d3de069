"""A CUDA graph on the CPU: what a step did is written down once, op by op, and done again as it stands.

As in a captured graph, tensors that the step found stay where they are, everything that Python knew
(a length, a slice, a branch) is frozen, and nobody may ask for a tensor's value.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# Ops whose result, or its shape, depends on values: on a GPU the host waits for them.
VALUES_ASKED_FOR = ("_local_scalar_dense", "is_nonzero", "equal.default", "nonzero", "_unique",
                    "masked_select", "repeat_interleave.Tensor")  # fmt: skip


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in VALUES_ASKED_FOR), f"{func} waits for the GPU"
        if "aten.index" in str(func):
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
            assert not masks, f"{func} by a mask waits for the GPU"
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out


def _refused(*_, **__):
    raise AssertionError("a tensor's values are asked for, which waits for the GPU")


def tape(step):
    """As ``almostgpt.inference.decoder.cuda_graph``, but the first call of what it returns is free.

    The step runs while it is written down; a graph runs when it is first replayed.
    """
    with pytest.MonkeyPatch.context() as patch, _Tape() as written:
        for name in ("tolist", "numpy", "__array__"):  # not ops
            patch.setattr(torch.Tensor, name, _refused)
        step()
    done = False

    def replay():
        nonlocal done
        if not done:
            done = True
            return
        now = {}

        def current(x):
            return now.get(id(x), x) if isinstance(x, torch.Tensor) else x

        for func, args, kwargs, out in written.ops:
            new = func(*tree_map(current, args), **tree_map(current, kwargs))
            olds = out if isinstance(out, (tuple, list)) else (out,)
            news = new if isinstance(new, (tuple, list)) else (new,)
            for old, renewed in zip(olds, news, strict=True):
                if isinstance(old, torch.Tensor):
                    now[id(old)] = renewed

    replay.ops = len(written.ops)
    return replay
