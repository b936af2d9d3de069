"""Models of SentencePiece: the ids of the package, and only of models that give text back."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.data.sentence_piece import SentencePieceTokenizer
from almostgpt.data.tokenizer import FILE_NAME, load_tokenizer
from almostgpt.errors import UserError

sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra `data`")

ODD = "Grüße, 世界! 🙂\r\n\t  the quick  brown\x0c é e\u0301 'tis "
LOSSLESS = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
}


def train(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 20),
        model_writer=model,
        minloglevel=2,
        **({"vocab_size": 300, "model_type": "bpe", "hard_vocab_limit": False} | options),
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=[True, False], ids=["space first", "as it is"])
def model(request):
    return train(**LOSSLESS, add_dummy_prefix=request.param)


def test_ids_are_those_of_the_package(model):
    ours = SentencePieceTokenizer(model)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)

    @settings(max_examples=100, deadline=None)
    @given(st.text().filter(lambda text: "▁" not in text and "\x00" not in text) | st.just(ODD))
    def check(text):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == text

    check()
    assert (ours.vocab_size, ours.end_of_text) == (theirs.vocab_size(), theirs.eos_id())
    assert ours.end_of_text not in ours.encode("a</s>b")
    pieces = b"".join(ours.decode_bytes([id]) for id in ours.encode(ODD)).decode()
    assert pieces.removeprefix(" ") == ODD
    with pytest.raises(UserError, match="not in the vocabulary"):
        ours.decode([ours.vocab_size])
    with pytest.raises(UserError, match="lone surrogate"):
        ours.encode("\ud800")


def test_found_in_a_folder_by_name_and_saved(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    ours = SentencePieceTokenizer(model)
    for name in (tmp_path, tmp_path / "tokenizer.model"):
        assert load_tokenizer(name).same_as(ours)
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(ODD) == ours.encode(ODD)


@pytest.mark.parametrize(
    "options",
    [
        {},
        LOSSLESS | {"byte_fallback": False},
        LOSSLESS | {"remove_extra_whitespaces": True},
        LOSSLESS | {"normalization_rule_name": "nfkc"},
    ],
)
def test_a_model_that_loses_text_is_refused(options, tmp_path):
    file = tmp_path / "some.model"
    file.write_bytes(train(vocab_size=60 + 256 * options.get("byte_fallback", False), **options))
    with pytest.raises(UserError, match=r"some\.model.*--normalization_rule_name=identity"):
        load_tokenizer(file)


@pytest.mark.parametrize("content", [b"", b"\x00", b"no model", b"\x0a\xff\xff\xff\xff"])
def test_damage_is_named(content, tmp_path):
    (tmp_path / "some.model").write_bytes(content)
    with pytest.raises(UserError, match="some.model.*no SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"kind": "sentencepiece", "model": "?"}')
    with pytest.raises(UserError, match=FILE_NAME):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="name the file, or the folder"):
        load_tokenizer("sentencepiece")
