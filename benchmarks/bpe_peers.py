"""Trainers of byte-level BPE, each in a process of its own that trains whenever it is told to.

    python benchmarks/bpe_peers.py PEER PATTERN VOCAB_SIZE FILE

FILE is a JSON list of documents. For each line on stdin it trains once on them, and answers with a JSON
line: seconds, and the peak of memory over what the process had before, in bytes; the first answer also
has ``tokens``, a hash of the vocabulary, where that can be compared.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": GPT2, "gpt4": GPT4}

Train = Callable[[list[str]], Iterable[bytes] | None]


def ours(pattern: str, vocab_size: int) -> Train:
    from almostgpt.data.tokenizer import train_bpe

    return lambda documents: train_bpe(documents, vocab_size, pattern, special_tokens=()).tokens


def rustbpe(pattern: str, vocab_size: int) -> Train:
    import rustbpe

    def train(documents: list[str]) -> list[bytes]:
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(iter(documents), vocab_size, pattern=PATTERNS[pattern])
        return [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()]

    return train


def tokenizers(pattern: str, vocab_size: int) -> Train:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    def train(documents: list[str]) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(iter(documents), trainer)

    return train


def sentencepiece(pattern: str, vocab_size: int) -> Train:
    import io
    import os

    import sentencepiece

    def train(documents: list[str]) -> None:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in documents for line in text.split("\n")),
            model_writer=io.BytesIO(),
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=len(os.sched_getaffinity(0)),
            minloglevel=2,
        )

    return train


PEERS = {peer.__name__: peer for peer in (ours, rustbpe, tokenizers, sentencepiece)}


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", status)[1])


def main(name: str, pattern: str, vocab_size: str, file: str) -> None:
    train = PEERS[name](pattern, int(vocab_size))
    documents = json.loads(Path(file).read_text("utf-8"))
    for _ in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        start = time.perf_counter()
        tokens = train(documents)
        seconds = time.perf_counter() - start
        peak = resident("VmHWM") - before
        same = tokens and hashlib.sha256(b"\0".join(tokens)).hexdigest()
        print(json.dumps({"seconds": seconds, "peak": peak, "tokens": same}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
