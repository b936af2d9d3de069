"""Tokenizers trained on a few lines, in the two forms that Hugging Face's models have."""

import json

import pytest

TEXT = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind\n",
    "Grüße, 世界! 🙂 12345 <|user|> def f(x):\n\treturn x  # spaces   and more\n",
]
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{%- generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA2 = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('no such role') }}{% endif %}\
{% endfor %}"""


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory):
    """As of SmolLM2 and Qwen: byte-level BPE, ``<|im_end|>`` ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("byte-level")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return folder


@pytest.fixture(scope="session")
def metaspace_folder(tmp_path_factory):
    """As of Llama 2 and Mistral: ``▁`` for a space, bytes where no token is, ``<s>`` first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    folder = tmp_path_factory.mktemp("metaspace")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, special_tokens=special + fallback, limit_alphabet=30
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    # The trainer makes all of them special; bytes are not.
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(LLAMA2)
    return folder
