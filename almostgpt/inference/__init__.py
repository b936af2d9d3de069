"""Text from a model: the key/value cache, sampling, and the decoding loop."""
