"""Conversations by a chat template: what is fed, what is kept, what the tokens are."""

import pytest
import torch

from almostgpt import GPT, GPTConfig
from almostgpt.data.tokenizer import load_tokenizer
from almostgpt.errors import UserError
from almostgpt.inference.chat import Chat
from almostgpt.inference.sampling import Sampling

END = 2  # <|im_end|>


class Fixed:
    """Answers with given tokens, whatever was said, and remembers how many tokens it was fed."""

    def __init__(self, model: GPT, tokens: list[int], monkeypatch):
        self.fed: list[int] = []
        left = iter(tokens)
        forward = GPT.forward

        def answering(this, ids, *args, **kwargs):
            self.fed.append(ids.shape[1])
            logits, loss = forward(this, ids, *args, **kwargs)
            return torch.full_like(logits, -9.0).index_fill(2, torch.tensor(next(left)), 9.0), loss

        monkeypatch.setattr(GPT, "forward", answering)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=200, vocab_size=330, n_layer=1, n_head=2, n_embd=16)).eval()


def chat(model, tokenizer, **options) -> Chat:
    options = {"stop_ids": tokenizer.stop_ids, **options}
    return Chat(model, tokenizer, 20, Sampling(1.0, 0.0, None, None, None), **options)


def ids_of(tokenizer, *turns: str) -> list[int]:
    """The ids of a conversation by ``encode_rendered``, which test_tokenizers.py compares."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return tokenizer.encode_rendered(tokenizer.render(messages))


def test_turns_go_on_in_the_cache(model, byte_level_folder, monkeypatch):
    tokenizer = load_tokenizer(byte_level_folder)
    answer = [*tokenizer.encode("the lazy dog"), END]
    fixed = Fixed(model, answer * 2, monkeypatch)
    conversation = chat(model, tokenizer)
    assert "".join(conversation.say("fox?")) == "the lazy dog"  # the end of the turn is not shown
    first = ids_of(tokenizer, "fox?")
    assert conversation.history == first + answer
    assert fixed.fed == [len(first)] + [1] * (len(answer) - 1)

    fixed.fed.clear()
    assert "".join(conversation.say("and?")) == "the lazy dog"
    whole = ids_of(tokenizer, "fox?", "the lazy dog", "and?")
    assert conversation.history == whole + answer
    # The token drawn last, which the cache has not had, and what is new.
    assert fixed.fed[0] == len(whole) - len(first + answer) + 1


def test_an_answer_stays_the_tokens_that_were_drawn(model, byte_level_folder, monkeypatch):
    """Letter by letter: encoding the text again would give fewer tokens."""
    tokenizer = load_tokenizer(byte_level_folder)
    letters = [tokenizer.encode(letter)[0] for letter in "the lazy dog"]
    assert len(tokenizer.encode("the lazy dog")) < len(letters)
    Fixed(model, [*letters, END] * 2, monkeypatch)
    conversation = chat(model, tokenizer)
    assert "".join(conversation.say("a")) == "the lazy dog"
    list(conversation.say("b"))
    assert conversation.history[len(ids_of(tokenizer, "a")) :][: len(letters)] == letters


def test_an_answer_cut_off_is_ended_by_the_template(model, byte_level_folder, monkeypatch):
    tokenizer = load_tokenizer(byte_level_folder)
    (letter,) = tokenizer.encode("x")
    Fixed(model, [letter] * 40, monkeypatch)
    conversation = chat(model, tokenizer)
    assert "".join(conversation.say("a")) == "x" * 20
    assert "".join(conversation.say("b")) == "x" * 20
    text = tokenizer.decode(conversation.history)
    assert f"assistant\n{'x' * 20}<|im_end|>\n<|im_start|>user\nb<|im_end|>" in text


@pytest.mark.parametrize("how", ["stop string", "unread", "special token"])
def test_what_the_cache_does_not_hold_is_fed_anew(how, model, byte_level_folder, monkeypatch):
    tokenizer = load_tokenizer(byte_level_folder)
    drawn = tokenizer.encode("the lazy")
    drawn += [1] if how == "special token" else []  # <|im_start|>, in the middle of an answer
    drawn += tokenizer.encode(" dog. The quick")
    fixed = Fixed(model, [*drawn, *[END] * 9], monkeypatch)
    conversation = chat(model, tokenizer, stop=["."] if how == "stop string" else [])
    answer = conversation.say("a")
    if how == "unread":
        said = next(answer)
        conversation.history += tokenizer.encode("y")  # drawn, and not yet shown
    else:
        said = "".join(answer)
    fixed.fed.clear()
    list(conversation.say("b"))
    whole = ids_of(tokenizer, "a", said, "b")
    assert conversation.history[: len(whole)] == whole
    assert fixed.fed[0] == len(whole)


def test_after_sentencepiece_and_with_a_begin_of_text(model, metaspace_folder, monkeypatch):
    tokenizer = load_tokenizer(metaspace_folder)
    answer = [*tokenizer.encode("the lazy dog"), 2]
    fixed = Fixed(model, answer * 2, monkeypatch)
    conversation = chat(model, tokenizer)
    assert "".join(conversation.say("fox?")) == " the lazy dog"
    assert conversation.history[0] == 1 and conversation.history.count(1) == 1  # <s>
    before = len(conversation.history)
    fixed.fed.clear()
    list(conversation.say("and?"))
    assert conversation.messages[1] == {"role": "assistant", "content": "the lazy dog"}
    assert conversation.history[:before] == ids_of(tokenizer, "fox?") + answer
    assert fixed.fed[0] < before
    text = tokenizer.decode(conversation.history[: -len(answer)])
    assert text == "<s> [INST] fox? [/INST] the lazy dog</s> [INST] and? [/INST]"


def test_clear_forgets_and_an_error_says_nothing(model, byte_level_folder, monkeypatch):
    tokenizer = load_tokenizer(byte_level_folder)
    Fixed(model, [END] * 9, monkeypatch)
    conversation = chat(model, tokenizer)
    list(conversation.say("a"))
    history = list(conversation.history)
    with pytest.raises(UserError, match="do not fit|more than"):
        chat(model, tokenizer, cache="full").say("x y " * 300)
    with pytest.raises(UserError, match="surrogate"):
        conversation.say("\ud800")
    assert conversation.history == history and len(conversation.messages) == 1
    conversation.clear()
    list(conversation.say("a"))
    assert conversation.history == history
