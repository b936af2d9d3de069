"""Text in, text out: stop strings wherever tokens begin and end, characters never cut, conversations."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt import GPT, GPTConfig
from almostgpt.data.tokenizer import ByteTokenizer, CharTokenizer
from almostgpt.errors import UserError
from almostgpt.inference.chat import Conversation
from almostgpt.inference.sampling import Sampling
from almostgpt.inference.text import Assembler, TextStream

BYTES = ByteTokenizer()


class Pieces:
    """A tokenizer whose tokens are the given byte strings."""

    end_of_text = None

    def __init__(self, *pieces: bytes):
        self.pieces, self.vocab_size = pieces, len(pieces)

    def decode_bytes(self, ids):
        return b"".join(self.pieces[id] for id in ids)


def assembled(tokenizer, ids, stop=()) -> tuple[list[str], str | None]:
    assembler, pieces = Assembler(tokenizer, stop), []
    for id in ids:
        pieces.append(assembler.push(id))
        if assembler.stopped_by is not None:
            return pieces, assembler.stopped_by
    return [*pieces, assembler.end()], None


def by_definition(whole: str, stop) -> tuple[str, str | None]:
    """Up to the stop string that is complete first, and of those that end there the longest."""
    for end in range(len(whole) + 1):
        if ending := [s for s in stop if whole[:end].endswith(s)]:
            longest = max(ending, key=len)
            return whole[: end - len(longest)], longest
    return whole, None


# ---------------------------------------------------------------- the assembler


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_text_ends_before_the_first_stop_string_however_it_is_cut_into_tokens(data):
    whole = data.draw(st.text("abé🙂", max_size=24))
    stop = data.draw(st.lists(st.text("abé🙂", min_size=1, max_size=4), max_size=3))
    raw = whole.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    tokens = Pieces(*(raw[a:b] for a, b in itertools.pairwise(cuts)))
    pieces, stopped_by = assembled(tokens, range(tokens.vocab_size), stop)
    expected, by = by_definition(whole, stop)
    assert "".join(pieces) == expected
    assert stopped_by == by


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_characters_come_out_whole_and_as_soon_as_they_can(whole):
    pieces, _ = assembled(BYTES, BYTES.encode(whole))
    assert "".join(pieces) == whole
    assert [piece for piece in pieces if piece] == list(whole)  # byte by byte: one at a time


@pytest.mark.parametrize("cuts", [(b"x", b"abc"), (b"x", b"ab", b"c"), (b"xabc",)])
def test_the_stop_string_that_is_complete_first_counts(cuts):
    pieces, stopped_by = assembled(Pieces(*cuts), range(len(cuts)), ["b", "abc"])
    assert "".join(pieces) == "xa" and stopped_by == "b"
    pieces, stopped_by = assembled(Pieces(*cuts), range(len(cuts)), ["c", "bc"])
    assert "".join(pieces) == "xa" and stopped_by == "bc"


def test_only_what_may_begin_a_stop_string_is_held_back():
    assembler = Assembler(BYTES, ["\n\nQ:"])
    assert [assembler.push(id) for id in b"a\nb\n\nA"] == ["a", "", "\nb", "", "", "\n\nA"]
    assert [assembler.push(id) for id in b"\n\nQ"] == ["", "", ""]
    assert assembler.end() == "\n\nQ"  # the stop string never came


def test_a_character_that_is_not_finished_is_shown_as_such_at_the_end():
    pieces, _ = assembled(BYTES, BYTES.encode("aä")[:-1])
    assert pieces == ["a", "", "\ufffd"]
    pieces, stopped_by = assembled(BYTES, [*b"x\xff"], ["\ufffd"])
    assert "".join(pieces) == "x" and stopped_by == "\ufffd"


# ---------------------------------------------------------------- completions


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_completions_are_what_the_tokens_say(model):
    prompts = ["to be", "日本", "x" * 20]
    options = {"temperature": 0.9, "seed": 4, "logprobs": True}
    texts = TextStream(model, BYTES, prompts, 12, **options)
    shown = ["", "", ""]
    for number, piece in texts:
        assert piece
        shown[number] += piece
    ids, logprobs = model.generate([BYTES.encode(p) for p in prompts], 12, **options)
    for number, done in enumerate(texts.completions):
        new = ids[number][len(BYTES.encode(prompts[number])) :].tolist()
        assert done.prompt == prompts[number] and done.ids == new and done.finish == "length"
        assert done.text == shown[number] == BYTES.decode(new)
        assert done.logprobs == logprobs[number].tolist() and done.stopped_by is None


def test_each_text_stops_by_itself(model):
    options = {"temperature": 1.0, "seed": 0}
    whole = TextStream(model, BYTES, ["ab", "cd", "ef"], 40, **options).run()
    stop = [whole[0].text[5:8], whole[1].text[2:4]]
    ended = TextStream(model, BYTES, ["ab", "cd", "ef"], 40, stop=stop, **options).run()
    for long, short in zip(whole, ended, strict=True):
        expected, by = by_definition(long.text, stop)
        assert short.text == expected and short.finish == ("length" if by is None else "stop")
        assert short.stopped_by == by
        assert short.ids == long.ids[: len(short.ids)]
    assert ended[0].finish == ended[1].finish == "stop"


def test_a_stop_id_ends_the_text_and_is_not_in_it(model):
    whole = TextStream(model, BYTES, ["ab"], 20, seed=2).run()[0]
    stop = whole.ids[7]
    done = TextStream(model, BYTES, ["ab"], 20, seed=2, stop_ids=[stop]).run()[0]
    at = whole.ids.index(stop)
    assert done.ids == whole.ids[: at + 1] and done.text == BYTES.decode(whole.ids[:at])
    assert done.finish == "stop" and done.stopped_by == stop


def test_nothing_more_is_computed_when_all_have_stopped(model):
    whole = TextStream(model, BYTES, ["ab", "cd"], 30, seed=3).run()
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    stop = [done.text[4] for done in whole]
    done = TextStream(model, BYTES, ["ab", "cd"], 30, seed=3, stop=stop).run()
    handle.remove()
    assert len(calls) == max(len(each.ids) for each in done) < 30


def test_an_empty_prompt_begins_after_the_end_of_a_text(model):
    done = TextStream(model, BYTES, [""], 5, temperature=0).run()[0]
    ids = model.generate(torch.tensor([[256]]), 5, temperature=0)[0, 1:]
    assert done.ids == ids.tolist()


def test_where_texts_have_no_end_an_empty_prompt_begins_at_random():
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8))
    tokenizer = CharTokenizer("abcde")
    firsts = set()
    for number in range(20):
        done = TextStream(model, tokenizer, [""], 3, seed=1, sequences=[number]).run()[0]
        assert len(done.text) == 4 and done.text[1:] == tokenizer.decode(done.ids)
        firsts.add(done.text[0])
    assert len(firsts) > 2


def test_a_stop_string_may_begin_in_the_random_token_of_an_empty_prompt():
    model = GPT(GPTConfig(block_size=8, vocab_size=2, n_layer=1, n_head=1, n_embd=8))
    tokenizer = CharTokenizer("ab")
    found = set()
    for seed in range(30):
        options = {"stop": ["ab", "ba"], "seed": seed}
        done = TextStream(model, tokenizer, [""], 6, **options).run()[0]
        assert "ab" not in done.text and "ba" not in done.text
        found.add(done.stopped_by)
        said = "".join(Conversation(model, tokenizer, 6, Sampling(), **options).say(""))
        assert said == done.text
    assert {"ab", "ba"} <= found


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8])
def test_numbers_of_numpy_are_numbers(model, number):
    options = {"top_k": number(50), "temperature": np.float32(0.5), "seed": number(5)}
    ids = model.generate(
        [[1, 2]], number(4), sequences=[number(3)], stop_ids=[number(200)], **options
    )
    plain = model.generate(
        [[1, 2]], 4, sequences=[3], stop_ids=[200], top_k=50, temperature=0.5, seed=5
    )
    assert ids[0].tolist() == plain[0].tolist()


@pytest.mark.parametrize(
    "prompts, options, expected",
    [
        ([5, 6], {}, r"give \[\[5, 6\]\] for one"),
        (None, {}, "prompts must be a list of texts"),
        ([[1]], {"stop_ids": 5}, "stop_ids must be a list"),
        ([[1]], {"sequences": 3}, "sequences must be a list"),
        ([[1]], {"vocab_size": 0}, "vocab_size is 0"),
        ([[1]], {"vocab_size": 2.5}, "vocab_size is 2.5"),
        ([[1]], {"temperature": 10**400}, "temperature is 1000"),
        ([[1]], {"repetition_penalty": 10**400}, "repetition_penalty is 1000"),
        ([[1]], {"max_new_tokens": 3.0}, "max_new_tokens is 3.0"),
        ([[1]], {"max_new_tokens": True}, "max_new_tokens is True"),
        ([[1]], {"max_new_tokens": "3"}, "max_new_tokens is '3'"),
    ],
)
def test_arguments_of_another_kind(model, prompts, options, expected):
    with pytest.raises(UserError, match=expected):
        model.generate(prompts, **{"max_new_tokens": 3, **options})


def test_a_generator_of_prompts_is_read_once(model):
    texts = [[1, 2], [3]]
    expected = model.generate(texts, 4, seed=0)
    ids = model.generate((text for text in texts), 4, seed=0)
    assert [row.tolist() for row in ids] == [row.tolist() for row in expected]


@pytest.mark.parametrize("prompts", ["abc", [b"a"], [None], 5])
def test_prompts_that_are_no_texts(model, prompts):
    with pytest.raises(UserError, match="prompts (is|must be) a list of strings"):
        TextStream(model, BYTES, prompts, 3)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"stop": None}, "stop must be a list of strings"),
        ({"stop": "ab"}, r"stop is a list of strings: give \['ab'\]"),
        ({"stop": [""]}, "at least one character"),
        ({"stop_ids": [257]}, "stop_ids has 257"),
        ({"sequences": [1, 2]}, "sequences must be 1"),
        ({"temperature": -1}, "temperature is -1"),
        ({"max_new_tokens": 65, "cache": "full"}, "66 tokens"),
    ],
)
def test_what_cannot_be_is_an_error_at_once(model, options, expected):
    with pytest.raises(UserError, match=expected):
        TextStream(model, BYTES, ["a"], options.pop("max_new_tokens", 3), **options)


# ---------------------------------------------------------------- conversations


def talk(model, **options) -> Conversation:
    sampling = options.pop("sampling", Sampling(temperature=0.8, top_k=50))
    return Conversation(model, BYTES, 10, sampling, **{"seed": 1, **options})


@pytest.mark.parametrize("cache", ["auto", "rolling", "none"])
def test_turns_continue_one_text(model, cache):
    conversation = talk(model, cache=cache)
    first = "".join(conversation.say("hello"))
    second = "".join(conversation.say(" you"))
    ids = model.generate([BYTES.encode("hello")], 10, temperature=0.8, top_k=50, seed=1)[0].tolist()
    assert first == BYTES.decode(ids[5:])
    ids = ids + BYTES.encode(" you")
    ids = model.generate([ids], 10, temperature=0.8, top_k=50, seed=1)[0].tolist()
    assert conversation.history == ids and second == BYTES.decode(ids[-10:])
    conversation.clear()
    assert conversation.history == [] and "".join(conversation.say("hello")) == first


def test_settings_take_effect_with_the_next_turn(model):
    conversation = talk(model)
    assert "".join(conversation.say("a")) == "".join(talk(model).say("a"))
    conversation.clear()
    conversation.seed = 7
    assert "".join(conversation.say("a")) == "".join(talk(model, seed=7).say("a"))
    conversation.clear()
    assert conversation.seed == 7  # what was set stays
    conversation.seed = 1
    conversation.sampling = greedy = Sampling(temperature=0)
    assert "".join(conversation.say("a")) == "".join(talk(model, sampling=greedy).say("a"))


def test_without_a_seed_each_conversation_has_another(model):
    conversation = talk(model, seed=None)
    seeds = [conversation.seed]
    for _ in range(3):
        conversation.clear()
        seeds.append(conversation.seed)
    assert len(set(seeds)) == 4


def test_an_answer_is_over_with_the_next_turn(model):
    conversation, alone = talk(model), talk(model)
    first = conversation.say("one")
    next(first)
    so_far = len(conversation.history)
    second = "".join(conversation.say("two"))
    assert list(first) == []
    history = conversation.history[:so_far]
    ids = model.generate([history + BYTES.encode("two")], 10, temperature=0.8, top_k=50, seed=1)
    assert conversation.history == ids[0].tolist() and second == BYTES.decode(ids[0][-10:].tolist())
    third = conversation.say("three")
    next(third)
    conversation.clear()
    assert list(third) == [] and "".join(conversation.say("a")) == "".join(alone.say("a"))


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(model):
    whole = talk(model)
    "".join(whole.say("hello"))
    for stop_by in ("nobody reads on", "inside the model"):
        conversation = talk(model)
        answer = conversation.say("hello")
        next(answer)
        if stop_by == "nobody reads on":
            answer.close()
        else:

            def interrupt(*_):
                raise KeyboardInterrupt

            handle = model.blocks[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(answer)
            handle.remove()
        n = len(conversation.history)
        assert 6 <= n < 15 and conversation.history == whole.history[:n]
        assert conversation.answer == n - 5
        said = "".join(conversation.say(" on"))
        prompt = whole.history[:n] + BYTES.encode(" on")
        ids = model.generate([prompt], 10, temperature=0.8, top_k=50, seed=1)[0].tolist()
        assert said == BYTES.decode(ids[-10:])


def test_a_prompt_that_cannot_be_is_not_said():
    model = GPT(GPTConfig(block_size=12, vocab_size=5, n_layer=1, n_head=1, n_embd=8,
                          position="learned"))  # fmt: skip
    conversation = Conversation(model, CharTokenizer("abcde"), 6, Sampling(), seed=0)
    list(conversation.say("ab"))
    before = list(conversation.history)
    with pytest.raises(UserError, match="'z'"):
        conversation.say("z")
    with pytest.raises(UserError, match="18 tokens, .* do not fit"):
        conversation.say("abcd")
    assert conversation.history == before
    conversation.clear()
    assert len(list(conversation.say(""))) > 1  # begins at random, and shows what with


def test_a_stop_string_ends_an_answer(model):
    whole = "".join(talk(model).say("hello"))
    conversation = talk(model, stop=[whole[3:5]])
    assert "".join(conversation.say("hello")) == whole[: whole.index(whole[3:5])]
