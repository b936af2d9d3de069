"""``--init``: a run that begins with the weights of another model, and what those weights refuse."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from almostgpt import GPTConfig, checkpoint, load
from almostgpt.cli import plan
from almostgpt.cli.main import main
from almostgpt.config import overlay, resolve
from almostgpt.config_file import load_config
from almostgpt.data.loader import TokenLoader
from almostgpt.data.prepare import cached_dataset
from almostgpt.data.tokenizer import ByteTokenizer
from almostgpt.errors import UserError
from almostgpt.model import GPT
from almostgpt.training.initial import begin_with, defaults_from, read_initial

SIZES = ["--model.n-layer=2", "--model.n-head=2", "--model.n-embd=16", "--model.block-size=16"]
STEPS = ["--training.batch-size=2", "--training.log-every=1", "--schedule.warmup-steps=2"]
STEPS += ["--training.eval-batches=3", "--checkpoint.every=3", "--device=cpu"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Runs of five steps on a made text of lower-case words, by their positions; and the text."""
    folder = tmp_path_factory.mktemp("sources")
    text = folder / "text.txt"
    words = random.Random(0).choices(
        "the quick brown fox jumps over a lazy dog\n".split(" "), k=2000
    )
    text.write_text(" ".join(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALMOSTGPT_CACHE", str(folder / "cache"))
        for position in ("rope", "learned"):
            out = [f"--out={folder / position}", f"--model.position={position}"]
            steps = [*STEPS, "--training.steps=5"]
            assert main(["train", f"--data.path={text}", *SIZES, *steps, *out]) == 0
    return {"rope": folder / "rope", "learned": folder / "learned", "text": text}


@pytest.fixture
def source(sources, tmp_path, monkeypatch) -> Path:
    """A run that the test may destroy, in the working folder; beside it a text of the same letters."""
    monkeypatch.setenv("ALMOSTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sources["rope"], "source")
    Path("new.txt").write_text("a dog jumps over the brown fox\n" * 100)
    return Path("source")


def tune(*arguments: str, out: str = "tuned", steps: int = 6) -> int:
    common = ["--init=source", "--data.path=new.txt", *STEPS, f"--training.steps={steps}"]
    return main(["train", *common, f"--out={out}", *arguments])


def losses(run: str) -> list[tuple]:
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.find(run) / "model.safetensors")


# ---------------------------------------------------------------- where it begins


def test_the_first_loss_is_that_of_the_source_on_the_new_text(source):
    assert tune("--training.accumulate=2", steps=1) == 0
    model, tokenizer = load("source")
    config = load_config("tuned/config.yaml")
    dataset = cached_dataset(config.data, tokenizer=tokenizer)
    assert dataset.tokenizer.same_as(tokenizer)
    own = {"block_size": 16, "batch_size": 2, "seed": 1337, "vocab_size": tokenizer.vocab_size}
    loader = TokenLoader(dataset.train, **own)
    with torch.no_grad():
        expected = sum(float(model(*loader.next_batch())[1]) for _ in range(2)) / 2
    assert losses("tuned")[0][1] == pytest.approx(expected, rel=1e-6)


def test_validation_before_the_first_step_is_an_evaluation_of_the_source(source):
    from almostgpt.training.trainer import Trainer

    initial = read_initial("source")
    config = resolve(begin_with(initial, defaults_from(initial, load_config("quickstart"))))
    config = overlay(config, {"data.path": "new.txt", "training.eval_batches": 3, "device": "cpu"})
    dataset = cached_dataset(config.data, tokenizer=initial.tokenizer)
    Path("run").mkdir()
    trainer = Trainer(config, dataset, Path("run"), torch.device("cpu"))
    model, _ = load("source")
    loader = TokenLoader(
        dataset.val, block_size=16, batch_size=16, seed=1337, vocab_size=dataset.vocab_size
    )
    with torch.no_grad():
        expected = sum(float(model(*loader.next_batch())[1]) for _ in range(3)) / 3
    assert trainer.validation_loss() == pytest.approx(expected, rel=1e-6)
    trainer.batches.close()


def test_an_exported_folder_in_bfloat16_with_room_for_more_ids(source):
    model = GPT(GPTConfig(vocab_size=300, n_layer=1, n_head=2, n_embd=16, block_size=16))
    config = overlay(load_config("quickstart"), {"model": model.config})
    checkpoint.export(Path("exported"), model.bfloat16(), ByteTokenizer(), config)
    assert tune("--init=exported", "--optimizer.lr=0", "--schedule.min-lr=0", steps=1) == 0
    stored = load_config("tuned/config.yaml")
    assert stored.model == model.config and stored.data.tokenizer == "byte"
    for name, tensor in weights("tuned").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].float())


def test_init_in_a_file_is_init_and_a_preset_model_does_not_count(source, capsys):
    """quickstart has 4 layers of 128; the weights have 2 of 16."""
    Path("mine.yaml").write_text("base: quickstart\ninit: source\nmodel: {dropout: 0.25}\n")
    assert main(["train", "--config=mine.yaml", "--print-config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    printed, quickstart = load_config("printed.yaml"), load_config("quickstart")
    assert printed.model.n_layer == 2 and printed.model.dropout == 0.25
    assert printed.optimizer == quickstart.optimizer
    assert printed.init == str(Path("source/checkpoints/step-00000005").absolute())
    assert main(["train", "--config=printed.yaml", "--print-config"]) == 0  # what it printed, again
    assert load_config(_written(capsys)) == printed
    assert main(["train", "--config=mine.yaml", "--init=null", "--print-config"]) == 0
    fresh = load_config(_written(capsys))
    assert fresh.init is None and fresh.model.n_layer == 4


def _written(capsys) -> str:
    Path("again.yaml").write_text(capsys.readouterr().out)
    return "again.yaml"


# ---------------------------------------------------------------- it goes on


def test_resumed_is_uninterrupted_and_the_source_is_needed_no_more(source):
    assert tune(out="whole") == 0
    assert tune("--schedule.decay-steps=6", out="half", steps=4) == 0
    shutil.rmtree("source")
    assert main(["train", "--out=half", "--resume", "--training.steps=6"]) == 0
    assert losses("half") == losses("whole")
    for name, tensor in weights("whole").items():
        assert torch.equal(tensor, weights("half")[name])


def test_without_checkpoint_it_begins_again_where_it_began(source):
    """Also when the source has been trained on in the meantime: a run means the checkpoint it took."""
    assert tune(out="whole", steps=3) == 0
    assert tune(steps=3) == 0
    lose_checkpoints("tuned")
    assert main(["train", "--out=source", "--resume", "--training.steps=6"]) == 0
    assert main(["train", "--out=tuned", "--resume"]) == 0
    assert losses("tuned") == losses("whole")


def lose_checkpoints(run: str) -> None:
    """What a kill before the first one leaves."""
    shutil.rmtree(f"{run}/checkpoints")
    Path(run, "metrics.jsonl").unlink()


@pytest.mark.slow  # it starts a process
def test_killed_before_the_first_checkpoint_and_resumed_is_uninterrupted(source):
    endless = ["--checkpoint.every=100000", "--schedule.decay-steps=100000"]
    killed = ["train", "--init=source", "--out=killed", "--data.path=new.txt", *STEPS, *endless]
    code = "import sys; from almostgpt.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *killed, "--training.steps=100000"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    metrics = Path("killed/metrics.jsonl")
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not Path("killed/checkpoints").exists()
    assert main(["train", "--out=killed", "--resume", "--training.steps=4"]) == 0
    assert tune(*endless, out="whole", steps=4) == 0
    assert losses("killed") == losses("whole")


def test_without_checkpoint_and_without_source_it_says_what_is_missing(source, capsys):
    assert tune(steps=2) == 0
    lose_checkpoints("tuned")
    assert (
        main(["train", "--out=tuned", "--resume", "--init=source"]) == 0
    )  # what it means is there
    lose_checkpoints("tuned")
    shutil.rmtree("source")
    capsys.readouterr()
    assert main(["train", "--out=tuned", "--resume"]) == 2
    err = capsys.readouterr().err
    assert "no checkpoint yet" in err and "step-00000005: no such folder" in err


def test_resume_refuses_another_beginning(source, sources, capsys):
    assert tune(steps=1) == 0
    assert main(["train", "--out=tuned", "--resume", f"--init={sources['learned']}"]) == 2
    err = capsys.readouterr().err
    assert "init: the run has" in err and "source/checkpoints/step-00000005" in err


# ---------------------------------------------------------------- what may change, what may not


def test_everything_that_contradicts_the_weights_is_named_at_once(source, capsys):
    asked = [
        "--model.n-embd=32",
        "--model.n-layer=3",
        "--model.norm=layernorm",
        "--model.bias=true",
    ]
    asked += ["--model.dropout=0.1", "--model.vocab-size=60", "--model.mlp-ratio=8"]
    asked += ["--data.tokenizer=byte", "--model.feedforward=gelu"]
    assert tune(*asked) == 2
    err = capsys.readouterr().err
    assert "model.n_embd: the weights have 16, now 32" in err
    assert "model.n_layer: the weights have 2, now 3" in err
    assert "model.bias: the weights have False, now True" in err
    assert "model.vocab_size: the weights have" in err and "model.mlp_ratio" in err
    assert "model.feedforward: the weights have 'swiglu', now 'gelu'" in err
    assert "data.tokenizer: the model was trained with char" in err
    assert (
        "dropout" not in err and "model.norm" not in err
    )  # a norm of another kind has one weight, too
    assert not Path("tuned").exists()


def test_a_users_file_contradicts_too(source, capsys):
    Path("mine.yaml").write_text("base: quickstart\nmodel: {n_layer: 3}\n")
    assert tune("--config=mine.yaml") == 2
    assert "model.n_layer: the weights have 2, now 3" in capsys.readouterr().err


def test_without_a_table_of_positions_texts_may_be_longer(source):
    assert tune("--model.block-size=32", "--model.dropout=0.1", steps=1) == 0
    assert load("tuned")[0].config.block_size == 32


def test_learned_positions_are_never_more_and_fewer_are_the_first(source, sources, capsys):
    learned = f"--init={sources['learned']}"
    assert tune(learned, "--model.block-size=17") == 2
    assert "model.block_size: the weights have 16, now 17" in capsys.readouterr().err
    still = ["--optimizer.lr=0", "--schedule.min-lr=0"]
    assert tune(learned, "--model.block-size=12", *still, steps=1) == 0
    assert "of its 16 learned positions the first 12 are taken" in capsys.readouterr().err
    before = load_file(checkpoint.find(sources["learned"]) / "model.safetensors")
    for name, tensor in weights("tuned").items():
        assert torch.equal(tensor, before[name][:12] if name == "position.weight" else before[name])


def test_a_quantised_model_cannot_be_trained(source, capsys):
    assert main(["quantize", "--checkpoint=source", "--out=small"]) == 0
    capsys.readouterr()
    assert tune("--init=small") == 2
    assert "quantised (int8)" in capsys.readouterr().err


def test_data_prepared_with_the_tokenizer_or_with_another(source, sources, capsys):
    prepare = ["prepare", f"--data.path={sources['text']}", "--out"]
    assert main([*prepare, "bytes", "--data.tokenizer=byte"]) == 0
    assert main([*prepare, "characters"]) == 0
    Path("upper.txt").write_text("A TEXT OF OTHER LETTERS. " * 50)
    assert main(["prepare", "--data.path=upper.txt", "--out=upper"]) == 0
    capsys.readouterr()
    assert tune("--data.path=characters", steps=1) == 0
    assert tune("--data.path=bytes", out="no") == 2
    assert "prepared with the byte tokenizer" in capsys.readouterr().err
    assert tune("--data.path=upper", out="no") == 2
    assert "prepared with another char tokenizer" in capsys.readouterr().err
    assert tune("--data.path=upper.txt", out="no") == 2
    assert "'A'" in capsys.readouterr().err  # the letter that the vocabulary lacks
    tokenizer = checkpoint.find("source") / "tokenizer"
    assert tune(f"--data.tokenizer={tokenizer}", out="same", steps=1) == 0
    assert not Path("no").exists()


@pytest.mark.parametrize(
    "init, expected", [("nowhere", "no such folder"), (".", "no checkpoint in")]
)
def test_no_folder_or_nothing_in_it(source, init, expected, capsys):
    assert tune(f"--init={init}") == 2
    assert expected in capsys.readouterr().err
    file = checkpoint.find("source") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        read_initial(file.parent)


def test_a_plan_is_of_that_model(source, monkeypatch):
    def planned(config, _device):
        assert config.model == read_initial("source").model
        raise UserError("seen")

    monkeypatch.setattr(plan, "make_plan", planned)
    assert main(["info", "--plan", "--init=source", "--device=cpu"]) == 2
