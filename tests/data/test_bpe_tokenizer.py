"""A trained tokenizer: the ids of tiktoken and of Hugging Face's tokenizers, saved and loaded."""

import base64
import json

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tokenizers
from bpe_truth import chunks_of, merged, merges_by_definition, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.data.bpe import PATTERNS, RANKS_FILE, BPETokenizer
from almostgpt.data.huggingface import HuggingFaceTokenizer
from almostgpt.data.token_bytes import BYTE_OF_CHARACTER
from almostgpt.data.tokenizer import FILE_NAME, load_tokenizer
from almostgpt.errors import UserError

ODD = "Grüße, 世界! 🙂\r\n\t it'S\u017f 12345 <|endoftext|>\x00 e\u0301  \n\n "
TEXTS = ["low lower lowest newer newest wider\n" * 4, "def f(x):\n    return x[0]\r\n" * 3, ODD * 2]
SPECIALS = ["<|endoftext|>", "<|user|>"]
several = settings(max_examples=100, deadline=None)
# What every library's version of Unicode knows, so that they split it in the same way.
TEXT = st.text(st.characters(exclude_categories=["Cn", "Cs"])) | st.text(
    st.sampled_from("lowerst newid ()[0]:\n'sS\u017f🙂世1")
)


@pytest.fixture(scope="module", params=[*PATTERNS, r"\p{L}+|[^\p{L}]"])
def tokenizer(request):
    """Made by the definition, so that it does not take the trainer."""
    merges = merges_by_definition(chunks_of(TEXTS, request.param), 40)
    return BPETokenizer(tokens_of(merges), request.param, SPECIALS)


@pytest.fixture
def folder(tokenizer, tmp_path):
    return tokenizer.save(tmp_path / "new" / "folder").parent


# ---------------------------------------------------------------- ids


def test_ids_are_those_of_the_merges_in_their_order(tokenizer):
    """Encoding as training does it: merge after merge, chunk by chunk."""
    merges = [
        (tokenizer.tokens.index(left), tokenizer.tokens.index(right))
        for left, right in tokenizer.merges
    ]
    assert merges == merges_by_definition(chunks_of(TEXTS, tokenizer.pattern), 40)

    @several
    @given(TEXT)
    def check(text):
        expected = []
        for chunk in chunks_in_order(text, tokenizer.pattern):
            word = list(chunk)
            for number, pair in enumerate(merges):
                word = merged(word, pair, 256 + number)
            expected += word
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == text

    check()


def chunks_in_order(text, pattern):
    import regex

    found = regex.findall(PATTERNS.get(pattern, pattern), text)
    return [chunk.encode() for chunk in found]


def test_saved_files_give_the_same_ids(tokenizer, folder):
    assert {file.name for file in folder.iterdir()} == {FILE_NAME, RANKS_FILE, "tokenizer.json"}
    ours = load_tokenizer(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    by_tiktoken = tiktoken.Encoding(
        "saved",
        pat_str=PATTERNS.get(tokenizer.pattern, tokenizer.pattern),
        mergeable_ranks=tiktoken.load.load_tiktoken_bpe(str(folder / RANKS_FILE)),
        special_tokens=tokenizer.special_ids,
    )
    assert ours.same_as(tokenizer) and type(ours) is BPETokenizer
    assert theirs.get_vocab_size() == by_tiktoken.n_vocab == ours.vocab_size == 256 + 40 + 2

    @several
    @given(TEXT | st.just(ODD))
    def check(text):
        ids = ours.encode(text)
        assert ids == tokenizer.encode(text)
        assert ids == theirs.encode(text).ids
        assert ids == by_tiktoken.encode_ordinary(text)
        assert theirs.decode(ids, skip_special_tokens=False) == text

    check()


def test_special_tokens_are_the_last_ids(tokenizer, folder):
    end, user = 296, 297
    assert tokenizer.special_ids == {"<|endoftext|>": end, "<|user|>": user}
    assert (tokenizer.end_of_text, tokenizer.stop_ids) == (end, (end,))
    assert tokenizer.decode([end, 97, user]) == "<|endoftext|>a<|user|>"
    assert not {end, user} & set(tokenizer.encode("".join(SPECIALS)))  # ordinary text stays it
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert theirs.encode("<|endoftext|>a<|user|>").ids == [end, 97, user]
    assert HuggingFaceTokenizer.from_folder(folder).end_of_text == end
    assert BPETokenizer(tokenizer.tokens, "gpt4", ["<|user|>"]).end_of_text is None


def test_contract(tokenizer):
    ids = tokenizer.encode_array(ODD)
    assert ids.dtype == np.uint16 and tokenizer.decode(ids) == ODD
    for start in range(len(ids)):
        assert isinstance(tokenizer.decode(ids[start : start + 3]), str)
    assert tokenizer.encode("") == []
    with pytest.raises(UserError, match="token id 298 is not in the vocabulary"):
        tokenizer.decode([298])
    with pytest.raises(UserError, match="lone surrogate at position 1"):
        tokenizer.encode("a\udfff")


def test_the_vocabulary_of_gpt2(test_data, tiktoken_cache):
    """OpenAI's files: the ids of tiktoken's gpt2, and the merges that were published."""
    ids = json.loads((test_data / "gpt2_bpe" / "encoder.json").read_text("utf-8"))
    tokens = [bytes(BYTE_OF_CHARACTER[c] for c in token) for token in list(ids)[:-1]]
    ours, gpt2 = BPETokenizer(tokens, "gpt2"), load_tokenizer("gpt2")
    text = (test_data / "tinyshakespeare.txt").read_text("utf-8")[:200_000]
    text += (test_data / "wikitext2" / "valid.txt").read_text("utf-8")[:200_000] + ODD
    assert np.array_equal(ours.encode_array(text), gpt2.encode_array(text))
    assert (ours.vocab_size, ours.end_of_text) == (gpt2.vocab_size, gpt2.end_of_text)
    lines = (test_data / "gpt2_bpe" / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
    published = [tuple(line.split(" ")) for line in lines]
    written = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
    shown = [tuple("".join(written[b] for b in part) for part in pair) for pair in ours.merges]
    assert shown == published


# ---------------------------------------------------------------- what is none


def test_a_pattern_that_leaves_text_out():
    tokenizer = BPETokenizer(tokens_of([]), r"\w+|\s")
    assert tokenizer.encode("a b") == [97, 32, 98]
    with pytest.raises(UserError, match="leaves out parts of the text"):
        tokenizer.encode("a!")


@pytest.mark.parametrize(
    ("tokens", "pattern", "specials", "message"),
    [
        (tokens_of([])[:-1], "gpt4", [], "each of the 256 bytes"),
        ([*tokens_of([]), b"a"], "gpt4", [], "more than once"),
        ([*tokens_of([]), b""], "gpt4", [], "empty"),
        (tokens_of([]), "(", [], "neither one of gpt2, gpt4 nor a regular expression"),
        (tokens_of([]), "gpt4", ["a"], "is an ordinary token, too"),
        (tokens_of([]), "gpt4", ["<a>", "<a>"], "given twice"),
        (tokens_of([]), "gpt4", ["\ud800"], "lone surrogate"),
        (tokens_of([]), "gpt4", [None], "not None"),
    ],
)
def test_no_such_vocabulary(tokens, pattern, specials, message):
    with pytest.raises(UserError, match=message):
        BPETokenizer(tokens, pattern, specials)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": None},
        {"tokens": ["YQ=="]},
        {"tokens": [3]},
        {"tokens": ["not base64!"] * 256},
        {"pattern": 3},
        {"pattern": "("},
        {"special_tokens": "<|endoftext|>"},
        {"special_tokens": [""]},
    ],
)
def test_damage_is_named(change, tmp_path):
    file = BPETokenizer(tokens_of([])).save(tmp_path)
    settings = json.loads(file.read_text())
    assert settings["tokens"][97] == base64.b64encode(b"a").decode()
    file.write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=FILE_NAME):
        load_tokenizer(tmp_path)


def test_by_name_alone_it_is_none():
    with pytest.raises(UserError, match="name the folder that `almostgpt tokenizer train` wrote"):
        load_tokenizer("bpe")
