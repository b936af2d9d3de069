"""Fixtures that several folders of tests share."""

import os
import shutil
from pathlib import Path

import pytest
import torch

# Triton reads it when it decorates a kernel, which is when almostgpt.kernels is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# File names under which tiktoken looks for the two files of the gpt2 vocabulary.
TIKTOKEN_NAMES = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests use tiny tensors: a second thread only waits, and on a busy machine it waits long."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the processes that tests start
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real texts: ``$ALMOSTGPT_TEST_DATA``, or ``shared/data`` beside the clone."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ALMOSTGPT_TEST_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no folder of test data at {folder}; set ALMOSTGPT_TEST_DATA to one")
    return folder


@pytest.fixture
def tiktoken_cache(test_data, tmp_path, monkeypatch) -> Path:
    """A tiktoken cache with the gpt2 vocabulary, so that no test needs a network."""
    source, cache = test_data / "gpt2_bpe", tmp_path / "tiktoken"
    if not source.is_dir():
        pytest.skip(f"no gpt2 vocabulary in {source}")
    cache.mkdir()
    for name, cached in TIKTOKEN_NAMES.items():
        # Copies: tiktoken deletes a file in its cache whose hash is wrong.
        shutil.copyfile(source / name, cache / cached)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    return cache
