"""What tests of the C++ kernels for a processor share."""

import pytest
import torch

from almostgpt.kernels import cpu

needs_library = pytest.mark.skipif(
    cpu.missing() is not None, reason=f"no C++ kernels here: {cpu.missing()}"
)

# Each instruction set by its name; those that this processor does not have are skipped.
on_every_set = pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            number,
            id=name,
            marks=pytest.mark.skipif(name not in cpu.available(), reason=f"no {name} here"),
        )
        for number, name in enumerate(cpu.INSTRUCTION_SETS)
    ],
)
available = [cpu.INSTRUCTION_SETS.index(name) for name in cpu.available()]


@pytest.fixture
def threads():
    """``threads(2)`` sets the number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
