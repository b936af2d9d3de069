"""A CUDA graph on the CPU: what a step did is written down once, op by op, and done again as it stands.

As in a captured graph, tensors that the step found stay where they are, everything that Python knew
(a length, a slice, a branch) is frozen, and nobody may ask for a tensor's value.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

VALUES_ASKED_FOR = ("_local_scalar_dense", "is_nonzero", "equal.default", "nonzero")


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in VALUES_ASKED_FOR), f"{func} waits for the GPU"
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out


def tape(step):
    """As ``almostgpt.inference.decoder.cuda_graph``, but the first call of what it returns is free.

    The step runs while it is written down; a graph runs when it is first replayed.
    """
    with _Tape() as written:
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
