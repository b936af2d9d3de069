"""AlmostGPT: train, probe and run small GPTs at the speed of the hardware, and read how it is made.

text -> tokens (data) -> a GPT assembled from parts (model) -> kernels -> a checkpoint -> text
"""

from almostgpt import kernels
from almostgpt.checkpoint import load
from almostgpt.config import GPTConfig
from almostgpt.model import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "__version__", "kernels", "load"]
