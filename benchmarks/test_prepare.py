"""Preparing a corpus against bare tiktoken: from JSON lines to checked shards, or lists in memory.

``tiktoken.encode_ordinary_batch`` gets its texts ready in memory, takes as many threads as we take
processes, and throws its lists away. Ours reads and parses JSON, hashes every document, encodes,
writes shards and verifies them; what it saves is that its tokens never become Python's integers.

What we aim at, on any machine: 90 % of tiktoken's tokens a second; nothing is asserted. The text is the
standard library's sources, over and over (tiktoken remembers nothing from one to the next).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from almostgpt.config import DataConfig
from almostgpt.data.corpora import read_documents
from almostgpt.data.prepare import prepare
from almostgpt.data.tokenizer import GPT2Tokenizer
from almostgpt.errors import UserError

from . import harness

BYTES = 24 << 20  # of text: the start of the processes must not count much
BATCH = 1000  # texts that tiktoken gets at a time
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
TIKTOKEN_NAMES = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


@pytest.fixture
def encoding(tmp_path, monkeypatch):
    """tiktoken's gpt2: by its own cache, or from the folder of test data."""
    import tiktoken

    source = Path(os.environ.get("ALMOSTGPT_TEST_DATA", ""), "gpt2_bpe")
    if "TIKTOKEN_CACHE_DIR" not in os.environ and source.is_dir():
        for name, cached in TIKTOKEN_NAMES.items():
            shutil.copyfile(source / name, tmp_path / cached)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    try:
        GPT2Tokenizer()
    except UserError as error:
        pytest.skip(f"no gpt2 vocabulary: {harness.first_line(error)}")
    return tiktoken.get_encoding("gpt2")


@pytest.fixture
def corpus(tmp_path):
    """The texts, and the file that holds them as JSON lines."""
    library = [document.text for document in read_documents(DataConfig(), tmp_path)]
    pieces = [text[at : at + 5000] for text in library for at in range(0, len(text), 5000)]
    texts = list(itertools.islice(itertools.cycle(pieces), BYTES // 4500))
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts, file


@pytest.mark.parametrize("cores", sorted({1, CORES}))
def test_prepare(cores, encoding, corpus, tmp_path, race, report, benchmark):
    texts, file = corpus
    data = DataConfig(path=str(file), tokenizer="gpt2", shard_tokens=10_000_000)
    out, tokens = tmp_path / "out", {}

    def ours():
        shutil.rmtree(out, ignore_errors=True)

        def work():
            dataset = prepare(data, out, progress=False, workers=cores)
            tokens["ours"] = dataset.train_tokens + dataset.val_tokens - (len(texts) - 1)

        return work

    def tiktoken():
        def work():
            counts = 0
            for at in range(0, len(texts), BATCH):
                batch = encoding.encode_ordinary_batch(texts[at : at + BATCH], num_threads=cores)
                counts += sum(map(len, batch))
            tokens["tiktoken"] = counts

        return work

    for peer in (ours, tiktoken):
        peer()()
    assert tokens["ours"] == tokens["tiktoken"]  # separators aside
    names = {"almostgpt prepare": ours, "tiktoken.encode_ordinary_batch": tiktoken}
    result = race(names, harness.wall_timer(1), seconds=5, fewest=3, warm_up=0)
    report(
        harness.Table(
            f"{len(texts):,} documents, {tokens['ours'] / 1e6:.1f} M tokens of gpt2, {cores} cores",
            ("", "s", "± %", "M tokens/s", "share of tiktoken's"),
            [
                [
                    name,
                    result.median(name),
                    100 * result.spread(name),
                    tokens["ours"] / result.median(name) / 1e6,
                    result.speedup(name, over="tiktoken.encode_ordinary_batch"),
                ]
                for name in names
            ],
        )
    )
    benchmark.extra_info["tokens_per_second"] = tokens["ours"] / result.median("almostgpt prepare")
