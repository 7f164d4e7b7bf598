"""`lorafold train --task classification`: encoders and decoders, every method, and what is done with the result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lorafold.cli.main import run
from lorafold.data.labels import Labelled
from lorafold.models.classifier import load_classifier
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from lorafold.train.objectives import logits_of_rows
from tests.cli.conftest import METHODS, Make, runs_of_task, summary
from tests.practice import command
from tests.tiny import tiny_gguf, tiny_model
from tests.tiny_classifier import labelled_rows, tiny_bert, write_rows

peft = pytest.importorskip("peft")
LABELS = ["negative", "positive"]
HEADS = {"bert": "classifier", "llama": "score"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    write_rows(folder / "test.jsonl", labelled_rows(40, seed=1))
    return write_rows(folder / "train.csv", labelled_rows(96)).parent


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Make:
    """`classifier("bert", "lora")`: (model, run folder)."""
    return runs_of_task(tmp_path_factory, "classification", "--data", rows, "--num-train-epochs", 4)


def texts(rows: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (rows / "test.jsonl").read_text().splitlines()]


def alone(model: Any, tokenizer: Any, rows: Path) -> torch.Tensor:
    """Logits of each held-out row by itself, unpadded, as transformers computes them."""
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts(rows)])


def logits_of_run(path: Path, rows: Path) -> torch.Tensor:
    loaded = load_trained(read_run(path))
    return alone(loaded.model, loaded.tokenizer, rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", HEADS)
def test_a_run_learns_and_becomes_a_folder(
    classifier: Make, rows: Path, kind: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = classifier(kind, method)
    s = summary(path)
    assert s["labels"] == LABELS
    assert sum(map(sum, s["confusion_after"])) == s["eval_rows"] == 40
    losses = [m["loss"] for m in read_run(path).metrics if "loss" in m]
    assert sum(losses[-8:]) < sum(losses[:8])
    if kind == "bert" and method not in ("head", "vera"):  # else the rows are learned by heart: the base is random
        assert s["accuracy_after"] >= 0.9 > s["accuracy_before"]
    logits = logits_of_run(path, rows)
    true = [LABELS.index(json.loads(line)["label"]) for line in (rows / "test.jsonl").read_text().splitlines()]
    assert (logits.argmax(-1) == torch.tensor(true)).float().mean() == pytest.approx(s["accuracy_after"])
    assert torch.nn.functional.cross_entropy(logits, torch.tensor(true)) == pytest.approx(
        s["eval_loss_after"], abs=1e-4
    )
    assert command("fold", path, "-o", tmp_path / "tuned") == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()
    assert theirs.config.id2label == dict(enumerate(LABELS))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(alone(theirs, tokenizer, rows), logits, atol=1e-4, rtol=0)
    capsys.readouterr()
    options = ("--task", "classification", "--data", rows / "test.jsonl")
    assert command("eval", tmp_path / "tuned", *options) == 0
    assert command("eval", model, *options, "--adapter", path) == 0
    assert command("eval", model, "--task", "classification", "--data", path, "--adapter", path) == 0
    assert capsys.readouterr().out.count(f"{s['accuracy_after']:.2%}") == 3


@pytest.mark.parametrize("kind", HEADS)
def test_what_each_method_trains_is_counted_and_stored(classifier: Make, kind: str) -> None:
    head = {"bert": 32 * 2 + 2, "llama": 64 * 2}[kind]
    stored = {}
    for method in METHODS:
        _, path = classifier(kind, method)
        tensors = load_file(path / "adapter" / "adapter_model.safetensors")
        stored[method] = sum(
            t.numel() for key, t in tensors.items() if key not in ("base_model.vera_A", "base_model.vera_B")
        )
        assert stored[method] == summary(path)["trainable_parameters"]
        assert any(f".{HEADS[kind]}." in key for key in tensors)
    assert stored["head"] == head
    model = load_classifier(classifier(kind, "full")[0], LABELS).model
    assert stored["full"] == sum(p.numel() for p in model.parameters())
    block = model.bert.encoder.layer[1] if kind == "bert" else model.model.layers[2]  # type: ignore[index]
    after = model.bert.pooler if kind == "bert" else model.model.norm  # type: ignore[union-attr]
    assert stored["last-layers"] == head + sum(p.numel() for m in (block, after) for p in m.parameters())


@pytest.mark.parametrize("kind", HEADS)
def test_peft_reads_the_adapter(classifier: Make, rows: Path, kind: str) -> None:
    model, path = classifier(kind, "lora")
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    base.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(base, path / "adapter").eval()
    assert theirs.peft_config["default"].task_type == "SEQ_CLS"
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.testing.assert_close(alone(theirs, tokenizer, rows), logits_of_run(path, rows), atol=1e-5, rtol=0)


def test_batches_change_nothing(classifier: Make, rows: Path, tmp_path: Path) -> None:
    """One row at a time or all at once: the same trajectory, to the order of sums."""
    model, _ = classifier("bert", "lora")
    losses = []
    for tokens in (1, 4096):
        options = ["--data", rows, "--method", "lora", "--max-steps", 6, "--micro-batch-tokens", tokens]
        options += ["--dtype", "float32", "--output-dir", tmp_path / str(tokens)]
        assert command("train", model, "--task", "classification", *options) == 0
        losses.append([m["loss"] for m in read_run(tmp_path / str(tokens)).metrics if "loss" in m])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_report_shows_who_is_taken_for_whom(classifier: Make) -> None:
    _, path = classifier("bert", "lora")
    html = (path / "report.html").read_text()
    assert "Confusion after training" in html
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html.partition("Confusion after training")[2])
    confusion = summary(path)["confusion_after"]
    assert cells[:3] == ["negative", *map(str, confusion[0])]


def test_a_trained_head_goes_on(
    classifier: Make, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folded classifier is trained further with its own labels; other labels are refused."""
    _, path = classifier("bert", "lora")
    assert command("fold", path, "-o", tmp_path / "tuned", "--lossy") == 0
    options = ["--task", "classification", "--method", "head", "--max-steps", 1, "--dtype", "float32"]
    assert command("train", tmp_path / "tuned", *options, "--data", rows, "--output-dir", tmp_path / "on") == 0
    assert summary(tmp_path / "on")["eval_loss_before"] == pytest.approx(summary(path)["eval_loss_after"], abs=1e-4)
    other = write_rows(tmp_path / "other.jsonl", labelled_rows(20, ("yes", "no")))
    capsys.readouterr()
    assert command("train", tmp_path / "tuned", *options, "--data", other, "--output-dir", tmp_path / "no") == 2
    message = capsys.readouterr().err
    assert "'yes'" in message
    assert "'no'" in message
    assert "it has negative, positive" in message
    assert not (tmp_path / "no").exists()


def test_whole_numbers_and_templates(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [r | {"stars": n % 3 + 9} for n, r in enumerate(labelled_rows(30))])
    options = ["--text", "{title} {text}", "--label-column", "stars", "--max-steps", 1, "--method", "head"]
    assert command("train", tiny_bert(tmp_path / "m"), "--task", "classification", "--data", data, *options,
                   "--output-dir", tmp_path / "run") == 0  # fmt: skip
    assert summary(tmp_path / "run")["labels"] == ["9", "10", "11"]
    names = [*map(str, range(9)), "nine", "ten", "eleven"]
    assert command("train", tmp_path / "m", "--task", "classification", "--data", data, *options,
                   "--label-names", *names, "--output-dir", tmp_path / "named") == 0  # fmt: skip
    counts = [sum(row) for row in summary(tmp_path / "named")["confusion_after"]]
    assert summary(tmp_path / "named")["labels"] == names
    assert counts[9:] == [sum(row) for row in summary(tmp_path / "run")["confusion_after"]]


def test_a_pooler_that_the_folder_lacks_is_trained(tmp_path: Path, rows: Path) -> None:
    model = tiny_bert(tmp_path / "m", pooler=False)
    options = ["--data", rows, "--max-steps", 1, "--method", "head", "--output-dir", tmp_path / "run"]
    assert command("train", model, "--task", "classification", *options) == 0
    assert summary(tmp_path / "run")["trainable_parameters"] == 32 * 2 + 2 + 32 * 32 + 32


BAD: dict[str, tuple[list[object], list[str]]] = {
    "unseen label": (["--eval-data", "other.jsonl"], ["held-out rows", "'maybe' (4 rows)", "negative, positive"]),
    "no column": (["--label-column", "lable"], ["'lable'", "did you mean 'label'", "title, text, label"]),
    "no text": (["--text", "{body}"], ["'body'"]),
    "own labels": (["--label-column", "title"], ["label of its own"]),
    "one label": (["--limit", "1", "--eval-data", "other.jsonl"], ["at least two labels", "sorted"]),
    "qa-lora": (["--method", "qa-lora"], ["--method lora"]),
    "prompt": (["--prompt", "{text}", "--completion", "{label}"], ["prompt means nothing", "completion means nothing"]),
    "memory": (["--memory", "1MB"], ["memory: the longest row has", "max_length"]),
    "prefixes": (["--shared-prefix-tokens", "5"], ["shared_prefix_tokens means nothing"]),
    "eva": (["--init-lora-weights", "eva"], ["eva is for language models"]),
    "lora+": (["--method", "head", "--loraplus-lr-ratio", "4"], ["for adapters with a B"]),
    "foreign": (["--method", "full", "--r", "4"], ["r means nothing to full"]),
    "targets": (["--method", "head", "--target-modules", "query"], ["target_modules means nothing to head"]),
    "too many": (["--method", "last-layers", "--layers", "3"], ["layers is 3", "2 blocks"]),
    "text alone": (["--task", "causal-lm", "--text", "{title}"], ["text means nothing to --task causal-lm"]),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    model = tiny_bert(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", labelled_rows(24))
    write_rows(tmp_path / "other.jsonl", labelled_rows(8, ("positive", "maybe")))
    options, words = BAD[case]
    given = {"--task": "classification", "--method": "lora", "--data": "rows.jsonl", "--output-dir": "out"}
    line = ["train", str(model), *(x for k, v in given.items() if k not in options for x in (k, v)), *map(str, options)]
    assert run(line) == 2
    message = capsys.readouterr().err.partition("lorafold: ")[2]
    assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "out").exists()


QUANTIZED = [("llama", "qa-lora"), ("llama", "lora"), ("qwen2", "qa-lora"), ("qwen3", "head"), ("gemma3", "lora")]


@pytest.mark.parametrize(("architecture", "method"), QUANTIZED)
def test_a_quantized_model_stays_packed(
    architecture: str, method: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head is trained on the packed model; logits are transformers' on the weights that the file decodes to."""
    model = tiny_gguf(tmp_path, architecture, "Q4_1", tied=False)
    options = ["--data", rows, "--method", method, "--learning-rate", 0.02, "--num-train-epochs", 3]
    path = tmp_path / "run"
    line = ["train", model, "--task", "classification", *options, "--dtype", "float32", "--output-dir", path]
    assert command(*line) == 0
    losses = [m["loss"] for m in read_run(path).metrics if "loss" in m]
    assert sum(losses[-8:]) < sum(losses[:8])
    loaded = load_trained(read_run(path))
    ids = loaded.tokenizer(texts(rows))["input_ids"]
    with torch.no_grad():
        ours = logits_of_rows(loaded, [Labelled(row, 0, i) for i, row in enumerate(ids)])
        dense = tiny_model(architecture, "Q4_1", tied=False).model
        if method == "head":
            weight = load_file(path / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
            hidden = torch.cat([dense(input_ids=torch.tensor([row])).last_hidden_state[:, -1] for row in ids])
            torch.testing.assert_close(ours, hidden @ weight.T, atol=1e-3, rtol=1e-3)
    options = ("--task", "classification", "--data", rows / "test.jsonl", "--adapter", path)
    capsys.readouterr()
    assert command("eval", model, *options) == 0
    assert f"{summary(path)['accuracy_after']:.2%}" in capsys.readouterr().out
    assert command("fold", path, "-o", tmp_path / "tuned.gguf") == 2
    assert "tiny.gguf has no place for a classifier's head; lorafold export keeps all of it" in capsys.readouterr().err


def test_an_expanded_adapter_keeps_the_head(rows: Path, tmp_path: Path) -> None:
    """QA-LoRA on a GGUF file, exported to PEFT, gives the same logits on the decoded weights."""
    model, path = tiny_gguf(tmp_path, "llama", "Q4_1", tied=False), tmp_path / "run"
    line = ["train", model, "--task", "classification", "--data", rows, "--max-steps", 4, "--learning-rate", 0.02]
    assert command(*line, "--dtype", "float32", "--output-dir", path) == 0
    assert command("export", path, "--to", "peft", "-o", tmp_path / "peft") == 0
    dense = tiny_model("llama", "Q4_1", tied=False)
    base = AutoModelForSequenceClassification.from_config(dense.config)
    base.model.load_state_dict(dense.model.state_dict())
    base.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    loaded = load_trained(read_run(path))
    ids = loaded.tokenizer(texts(rows))["input_ids"]
    with torch.no_grad():
        ours = logits_of_rows(loaded, [Labelled(row, 0, i) for i, row in enumerate(ids)])
        wanted = torch.cat([theirs(input_ids=torch.tensor([row])).logits for row in ids])
    torch.testing.assert_close(ours, wanted, atol=5e-3, rtol=0)  # the file holds offsets in float16, of some 1e-3
    assert (wanted[:, 0] - wanted[:, 1]).abs().mean() > 0.05


def test_what_a_classifier_cannot_do_is_named(
    tiny_file: Callable[..., Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], classifier: Make
) -> None:
    options = ["--task", "classification", "--method", "full", "--data", rows, "--output-dir", tmp_path / "out"]
    assert command("train", tiny_file("llama", "Q4_1"), *options) == 2
    assert "--method full needs weights that are not quantized" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    model, path = classifier("bert", "full")
    assert command("eval", model, "--task", "classification", "--data", rows / "test.jsonl") == 2
    assert "no trained head" in capsys.readouterr().err
    assert command("export", path, "--to", "peft", "-o", tmp_path / "adapter") == 2
    assert "lorafold fold" in capsys.readouterr().err


def test_rows_of_a_batch_come_out_as_each_alone(classifier: Make, rows: Path) -> None:
    _, path = classifier("llama", "lora")
    loaded = load_trained(read_run(path))
    ids = loaded.tokenizer(texts(rows))["input_ids"]
    with torch.no_grad():
        together = logits_of_rows(loaded, [Labelled(row, 0, i) for i, row in enumerate(ids)])
    torch.testing.assert_close(together, logits_of_run(path, rows), atol=1e-5, rtol=0)
