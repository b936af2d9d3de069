"""Every kind of corpus on real files of it: the cleaned text, exactly, and back from shards."""

import csv
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from almostgpt.config import DataConfig
from almostgpt.data.corpora import read_documents
from almostgpt.data.prepare import prepare

# corpus -> where its sample is; a folder, a file or a pattern below the folder of test data
SAMPLES = {
    "gutenberg": "samples/gutenberg",
    "cnn": "samples/cnn_dailymail/*.csv",
    "cnn parquet": "samples/cnn_dailymail/*.parquet",
    "enron": "samples/enron/*.jsonl",
    "enron parquet": "samples/enron/train.parquet",
    "enron subject": "samples/enron/raw",
    "openwebtext": "samples/openwebtext/*.jsonl",
    "openwebtext parquet": "samples/openwebtext/train.parquet",
    "wikipedia": "samples/wikipedia/wiki_00.jsonl",
    "wikipedia parquet": "samples/wikipedia/train.parquet",
    "wikitext": "wikitext2/valid.txt",
    "text books": "books",
    "text hellaswag": "hellaswag_val_500.jsonl",
    "shakespeare": "tinyshakespeare.txt",
}


def settings_of(sample, test_data: Path, **changed) -> DataConfig:
    column = {"column": "ctx"} if sample == "text hellaswag" else {}
    path = str(test_data / SAMPLES[sample])
    if path.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    return DataConfig(corpus=sample.split()[0], path=path, **{**column, **changed})


def texts(sample, test_data) -> list[str]:
    data = settings_of(sample, test_data)
    return [document.text for document in read_documents(data, test_data)]


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line]


# ---------------------------------------------------------------- the cleaned text


def test_gutenberg(test_data):
    alice, pride = texts("gutenberg", test_data)
    raw = (test_data / "samples/gutenberg/alice_pg11-0.txt").read_text("utf-8-sig").split("\n")
    assert raw[20].startswith("*** START") and raw[3375].startswith("End of Project Gutenberg")
    assert alice == "\n".join(raw[21:3375]).strip()
    assert alice.startswith("ALICE’S ADVENTURES IN WONDERLAND\n\nLewis Carroll")
    assert alice.endswith("THE END") and "\r" not in alice
    raw = (test_data / "samples/gutenberg/pride_pg1342-0.txt").read_text("utf-8-sig").split("\n")
    credit = raw.index("Produced by Anonymous Volunteers")
    end = raw.index("End of the Project Gutenberg EBook of Pride and Prejudice, by Jane Austen")
    assert pride == "\n".join(raw[credit + 1 : end]).strip()
    assert pride.startswith("PRIDE AND PREJUDICE\n\nBy Jane Austen")


def test_cnn(test_data):
    cleaned = texts("cnn", test_data)
    with open(test_data / "samples/cnn_dailymail/validation_150.csv", newline="") as file:
        articles = [row["article"] for row in csv.DictReader(file)]
    assert len(cleaned) == len(articles) == 150
    for text, article in zip(cleaned, articles, strict=True):
        assert article.strip().endswith(text)
        cut = article.strip().removesuffix(text)
        assert re.fullmatch(r"([A-Z][\w.,' ]+ )?\([A-Z][\w ]+\)|", cut), cut
        assert cut or "(CNN)" not in article[:60]
    assert cleaned[0].startswith("Share, and your gift will be multiplied.")
    assert sum(text.startswith("Police in Japan say") for text in cleaned) == 1
    assert cleaned == texts("cnn parquet", test_data)


def test_enron(test_data):
    cleaned = texts("enron", test_data)
    bodies = [row["email_body"] for row in rows(test_data / "samples/enron/aeslc_dev_300.jsonl")]
    # AESLC took headers and replies out: what is left to do is at the ends of lines.
    assert cleaned == [
        "\n".join(line.rstrip() for line in body.split("\n")).strip() for body in bodies
    ]
    assert texts("enron parquet", test_data) == cleaned
    subjects = texts("enron subject", test_data)
    assert len(subjects) == 10 and set(subjects) <= set(cleaned)
    assert subjects[0].startswith("Hi Phillip,") and subjects[0].endswith("Thanks,")


def test_openwebtext(test_data):
    raw = rows(test_data / "samples/openwebtext/webtext_test_1500.jsonl")
    cleaned = texts("openwebtext", test_data)
    assert cleaned == [row["text"].strip() for row in raw]
    assert cleaned == texts("openwebtext parquet", test_data)


def test_wikipedia(test_data):
    cleaned = texts("wikipedia", test_data)
    raw = rows(test_data / "samples/wikipedia/wiki_00.jsonl")
    assert len(cleaned) == 24 and cleaned == texts("wikipedia parquet", test_data)
    for text, row in zip(cleaned, raw, strict=True):
        assert text.split("\n\n", 1)[0] == row["title"]
        # Nothing but white space, tags and empty brackets is gone.
        left, given = (re.sub(r"[\s(),;'\"]|</?\w+>", "", t) for t in (text, row["text"]))
        assert left == given
    assert cleaned[2].startswith("Albedo\n\nAlbedo is a measure for reflectance")
    assert "Lincoln (February 12, 1809" in cleaned[6]


def test_wikitext(test_data):
    cleaned = texts("wikitext", test_data)
    raw = (test_data / "wikitext2/valid.txt").read_text("utf-8")
    lines = re.sub(" @([-,.])@ ", r"\1", raw).split("\n")
    titles = [line.strip() for line in lines if re.match(r" = [^=]", line)]
    assert [text.split("\n")[0] for text in cleaned] == titles
    assert len(titles) == 60 and titles[0] == "= Homarus gammarus ="
    assert "\n".join(cleaned).split() == "\n".join(lines).split()
    assert "weigh 0.7 – 2.2 kg" in cleaned[0]


def test_books_are_left_as_they_are(test_data):
    files = sorted((test_data / "books").glob("*.gz"))
    assert texts("text books", test_data) == [gzip.open(f).read().decode() for f in files]


# ---------------------------------------------------------------- and back from shards


@pytest.mark.parametrize("sample", SAMPLES)
def test_shards_decode_to_the_cleaned_text(sample, test_data, tmp_path):
    expected = texts(sample, test_data)
    data = settings_of(sample, test_data, tokenizer="byte", shard_tokens=1_000_003)
    dataset = prepare(data, tmp_path / "out", progress=False)
    tokens = np.concatenate([np.asarray(shard) for shard in dataset.train + dataset.val])
    documents = np.split(tokens, np.flatnonzero(tokens == dataset.tokenizer.end_of_text))
    separated = [documents[0], *(document[1:] for document in documents[1:])]
    assert [part.astype(np.uint8).tobytes().decode() for part in separated] == expected
    manifest = json.loads((dataset.folder / "dataset.json").read_text())
    assert manifest["source"]["documents"] == len(expected)
    assert manifest["source"]["characters"] == sum(map(len, expected))


@pytest.mark.slow
@pytest.mark.parametrize("sample", SAMPLES)
def test_training_on_each(sample, test_data, tmp_path, monkeypatch, tiktoken_cache):
    """gpt2 tokens of every corpus: the loss falls within a few steps from ln(50257)."""
    from almostgpt.cli.main import main

    monkeypatch.setenv("ALMOSTGPT_CACHE", str(tmp_path / "cache"))
    data = settings_of(sample, test_data)
    arguments = f"--data.corpus={data.corpus} --data.path={data.path} --data.tokenizer=gpt2".split()
    if data.column:
        arguments.append(f"--data.column={data.column}")
    assert main(["prepare", "--out", str(tmp_path / "tokens"), *arguments]) == 0
    small = (
        "--model.n_layer=1 --model.n_head=2 --model.n_embd=32 --model.block_size=32 --device=cpu"
    )
    steps = (
        "--training.steps=20 --training.batch_size=8 --schedule.warmup_steps=2 --optimizer.lr=0.01"
    )
    run = ["train", "--out", str(tmp_path / "run"), "--data.path", str(tmp_path / "tokens")]
    rest = ["--training.eval_batches=2", "--training.log_every=1"]
    assert main([*run, *small.split(), *steps.split(), *rest]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert abs(losses[0] - np.log(50257)) < 0.5
    assert losses[-1] < losses[0] - 0.5
