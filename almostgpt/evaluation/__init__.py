"""How good a model is: what it is scored on (text), and its perplexity."""
