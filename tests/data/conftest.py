"""Texts that several files here prepare."""

import pytest

POEM = "The quick brown fox\njumps over the lazy dog.\nÄrger! 🙂\n" * 30


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "poem.txt"
    file.write_bytes(POEM.encode())
    return file


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_bytes(f"document {i}: {'la ' * i}".encode())
    return folder


@pytest.fixture
def poem() -> str:
    """The text of ``text_file``."""
    return POEM
