"""``almostgpt convert`` both ways, and the other commands on what it wrote."""

import json
import shutil

import pytest
import torch

from almostgpt import load
from almostgpt.cli.main import main
from almostgpt.data.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers", reason="needs the extra `test`")

# The model has ids that the tokenizer has not: ours draws none of them. One of them pads.
ONLY = {"do_sample": False, "suppress_tokens": list(range(280, 288)), "pad_token_id": 287}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}<assistant>"


@pytest.fixture
def theirs(tmp_path):
    """A random Llama with a byte-level tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path / "theirs"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        show_progress=False,
        special_tokens=["<|begin|>", "<|end|>", "<assistant>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["to be or not to be, that is the question"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=288,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model, fast


def result(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_in_used_and_out_again(theirs, tmp_path, text, capsys, monkeypatch):
    model, fast = theirs
    assert main(["convert", "--from", str(tmp_path / "theirs"), "--to", "mine"]) == 0
    found = result(capsys)
    assert (found["out"], found["vocab_size"], found["block_size"]) == ("mine", 288, 64)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())

    # Text, which begins with the token that begins texts.
    prompt = ["--prompt=to be", "--max-tokens=12", "--temperature=0", "--past-the-end"]
    assert main(["generate", "--checkpoint=mine", "--device=cpu", *prompt]) == 0
    ids = fast("to be", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 0
    new = model.generate(ids, max_new_tokens=12, eos_token_id=None, **ONLY)[0, ids.shape[1] :]
    _, tokenizer = load("mine")
    assert capsys.readouterr().out == "to be" + tokenizer.decode(new.tolist()) + "\n"

    assert main(["eval", "--checkpoint=mine", f"--perplexity={text}", "--device=cpu"]) == 0
    assert result(capsys)["perplexity"] > 1

    # A conversation: messages by the template, and no echo of what was typed.
    lines = iter(["hello", "quit"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    chat = ["--interactive", "--max-tokens=6", "--temperature=0", "--device=cpu"]
    assert main(["generate", "--checkpoint=mine", *chat]) == 0
    ids = fast.apply_chat_template(
        [{"role": "user", "content": "hello"}], return_tensors="pt", return_dict=False
    )
    new = model.generate(ids, max_new_tokens=6, **ONLY)[0, ids.shape[1] :]
    answer = [id for id in new.tolist() if id != 1]
    assert capsys.readouterr().out == tokenizer.decode(answer) + "\n"
    lines = iter(["hello", "quit"])
    assert main(["generate", "--checkpoint=mine", *chat, "--plain"]) == 0
    assert capsys.readouterr().out.startswith("hello")

    assert main(["convert", "--from", "mine", "--to-hf", "back"]) == 0
    assert result(capsys)["model_type"] == "llama"
    back = transformers.AutoModelForCausalLM.from_pretrained("back")
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    again = transformers.AutoTokenizer.from_pretrained("back")
    assert again("to be, ä")["input_ids"] == fast("to be, ä")["input_ids"]
    assert again.chat_template == TEMPLATE
    assert back.generation_config.eos_token_id == 1


def test_training_data_by_the_tokenizer_of_a_folder(theirs, tmp_path, text, capsys):
    """Every document begins with the begin of text, and ends are between them."""
    arguments = [f"--data.path={text}", f"--data.tokenizer={tmp_path / 'theirs'}", "--out=tokens"]
    assert main(["prepare", *arguments]) == 0
    assert result(capsys)["tokenizer"] == "huggingface"
    from almostgpt.data.dataset import open_dataset

    dataset = open_dataset("tokens", progress=False)
    _, fast = theirs
    expected = fast(text.read_text(encoding="utf-8"))["input_ids"]
    found = [id for shard in (*dataset.train, *dataset.val) for id in shard[:].tolist()]
    assert found == expected and found[0] == 0


def test_precision_and_a_shorter_block(theirs, tmp_path, capsys):
    source = str(tmp_path / "theirs")
    options = ["--precision", "bf16", "--block-size", "32"]
    assert main(["convert", "--from", source, "--to", "mine", *options]) == 0
    model, _ = load("mine")
    assert model.config.block_size == 32
    their_weight = theirs[0].model.norm.weight
    assert torch.equal(model.norm.weight, their_weight.bfloat16().float())
    assert main(["convert", "--from", "mine", "--to-hf", "back", "--precision", "fp16"]) == 0
    assert transformers.AutoModelForCausalLM.from_pretrained("back").dtype == torch.float16


def test_a_run_of_ours_opens_in_transformers(trained, capsys):
    assert main(["convert", "--from", "run", "--to-hf", "hf"]) == 0
    assert result(capsys)["model_type"] == "llama"
    model, tokenizer = load("run")
    ids = torch.tensor([tokenizer.encode("to be")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("hf").eval()
    assert transformers.AutoTokenizer.from_pretrained("hf")("to be")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (
            model(ids, all_logits=True)[0] - expected
        ).abs().max() <= 1e-4 * expected.abs().max()
    assert load_tokenizer("hf").encode("ä") == tokenizer.encode("ä")


def test_what_cannot_be(theirs, tmp_path, capsys):
    source = str(tmp_path / "theirs")
    for arguments, expected in (
        (["--from", source], "give either --to"),
        (["--from", source, "--to", "a", "--to-hf", "b"], "give either --to"),
        (["--from", source, "--to", "a", "--precision", "fp8"], "--precision is 'fp8'"),
        (["--from", source, "--to", "a", "--revision", "x"], "a revision is for an id"),
        (["--from", source, "--to", source], "already exists"),
        (["--from", source, "--to-hf", "a"], "a model of Hugging Face; make a checkpoint"),
        (["--from", source, "--to-hf", "a", "--block-size", "8"], "are for --to"),
        (["--from", "./nowhere", "--to", "a"], "no such folder"),
    ):
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert expected in error and "Traceback" not in error
        assert not (tmp_path / "a").exists()
    assert main(["generate", "--checkpoint", source, "--plain"]) == 2
    shutil.rmtree(source)


def test_imported_weights_are_trained_on_and_go_out_again(theirs, tmp_path, text, capsys):
    model, fast = theirs
    theirs_ids = fast(text.read_text())["input_ids"]
    assert main(["convert", "--from", str(tmp_path / "theirs"), "--to", "mine"]) == 0
    tune = ["train", "--init=mine", f"--data.path={text}", "--model.block-size=16", "--device=cpu"]
    tune += ["--training.batch-size=2", "--training.log-every=1", "--training.eval-batches=1"]
    tune += ["--data.sampling=sequential", "--schedule.decay-steps=4"]
    assert main([*tune, "--out=whole", "--training.steps=4"]) == 0
    assert main([*tune, "--out=half", "--training.steps=2"]) == 0
    shutil.rmtree("mine")  # it is in the checkpoint, with its tokenizer
    assert main(["train", "--out=half", "--resume", "--training.steps=4"]) == 0
    assert main(["eval", "--checkpoint=half", f"--perplexity={text}", "--device=cpu"]) == 0
    capsys.readouterr()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").open()]
        for run in ("whole", "half")
    ]
    assert losses[0] == losses[1]
    # The first loss is transformers' own, on the first two windows of the text.
    windows = torch.tensor(theirs_ids[:33])
    ids = torch.stack([windows[0:16], windows[16:32]])
    targets = torch.stack([windows[1:17], windows[17:33]])
    with torch.no_grad():
        logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert losses[0][0] == pytest.approx(expected.item(), rel=1e-5)
    assert main(["convert", "--from", "half", "--to-hf", "back"]) == 0
    back = transformers.AutoModelForCausalLM.from_pretrained("back")
    assert not torch.equal(back.lm_head.weight, model.lm_head.weight)
    assert main([*tune, "--init=half", "--data.tokenizer=byte"]) == 2
    assert "the model was trained with huggingface" in capsys.readouterr().err
