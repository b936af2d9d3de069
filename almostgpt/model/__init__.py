"""The model: a GPT assembled from parts that the configuration names.

``gpt.py`` is the whole; ``block.py`` one layer of it; ``attention.py``, ``feedforward.py``,
``norm.py`` and ``position.py`` hold one registry dict each. A new part is a class and one entry.
"""

from almostgpt.model.gpt import GPT

__all__ = ["GPT"]
