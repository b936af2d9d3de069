"""Pages of docs/: snippets run, one after the other, and print what the page says; models build."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from almostgpt import GPT
from almostgpt.config import overlay
from almostgpt.config_file import load_config
from almostgpt.kernels import cpu

DOCS = Path(__file__).resolve().parents[2] / "docs"
KINDS = ["attention_kinds.md", "feedforward.md", "normalization.md", "positional_encoding.md"]

NEEDS_CPP = pytest.mark.skipif(cpu.missing() is not None, reason=f"{cpu.missing()}")
NEEDS_BPE = pytest.mark.skipif(find_spec("almostgpt._bpe") is None, reason="no tokenizer trainer")


@pytest.mark.parametrize(
    "page",
    [
        *KINDS,
        "int8_linear.md",
        "integrations.md",
        "kv_cache.md",
        "sampling.md",
        pytest.param("cpu.md", marks=NEEDS_CPP),
        pytest.param("tokenizer.md", marks=NEEDS_BPE),
    ],
)
def test_snippets_run(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text()
    snippets = re.findall(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", text, re.S)
    assert snippets
    names: dict = {"__name__": "snippet"}
    for code, prints in snippets:
        exec(compile(code, f"docs/{page}", "exec"), names)
        assert capsys.readouterr().out == prints


@pytest.mark.parametrize("page", KINDS)
def test_settings_make_a_model(page, tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert len(blocks) > 1
    for block in blocks:
        (tmp_path / "model.yaml").write_text(block)
        config = overlay(load_config(tmp_path / "model.yaml"), {"model.vocab_size": 65})
        with torch.device("meta"):
            model = GPT(config.model)
        asked = yaml.safe_load(block)["model"]
        assert {key: str(getattr(model.config, key)) for key in asked} == {
            key: str(float(value) if key == "norm_eps" else value) for key, value in asked.items()
        }


def test_links_lead_somewhere():
    root = DOCS.parent
    for page in [*DOCS.glob("*.md"), root / "README.md", root / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            file, _, anchor = link.partition("#")
            if link.startswith(("http:", "https:")):
                continue
            target = page if not file else page.parent / file
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
                assert anchor in map(slug, headings), f"{page.name}: {link}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
