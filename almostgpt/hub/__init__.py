"""Models of Hugging Face, in and out, without transformers.

    model, tokenizer = load_pretrained("HuggingFaceTB/SmolLM2-135M")
    save_pretrained(model, "folder", tokenizer)

``families.py`` is the registry of model types; ``gpt2.py`` and ``llama.py`` say what of a
``config.json`` is which of our settings and which tensor is which parameter. ``download.py`` and
``weights.py`` read, ``writing.py`` and ``tokenizer_files.py`` write.
"""

from almostgpt.hub.loading import load_model, load_pretrained
from almostgpt.hub.writing import save_pretrained

__all__ = ["load_model", "load_pretrained", "save_pretrained"]
