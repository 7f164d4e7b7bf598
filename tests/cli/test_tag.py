"""`lorafold train --task token-classification`: encoders and decoders, every method, and what becomes of the result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from lorafold.cli.main import run
from lorafold.data.tags import tokenize_tagged
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from lorafold.train.objectives import logits_of_words
from tests.cli.conftest import METHODS, Make, runs_of_task, summary
from tests.practice import command
from tests.tiny import tiny_gguf, tiny_model
from tests.tiny_classifier import tagged_rows, tiny_bert, write_rows

peft = pytest.importorskip("peft")
TAGS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
TASK = ("--task", "token-classification")
HEADS = {"bert": "classifier", "llama": "score"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagged")
    write_rows(folder / "test.jsonl", tagged_rows(30, seed=1))
    return write_rows(folder / "train.jsonl", tagged_rows(96)).parent


@pytest.fixture(scope="session")
def tagger(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Make:
    """`tagger("bert", "lora")`: (model, run folder)."""
    return runs_of_task(tmp_path_factory, "token-classification", "--data", rows, "--num-train-epochs", 3)


def held_out(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (rows / "test.jsonl").read_text().splitlines()]


def alone(model: Any, tokenizer: Any, rows: Path) -> torch.Tensor:
    """Logits of the first tokens of words, each row by itself, in transformers' own way for rows of words."""
    parts = []
    for row in held_out(rows):
        encoded = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        numbers = encoded.word_ids(0)
        first = [i for i, n in enumerate(numbers) if n is not None and (i == 0 or numbers[i - 1] != n)]
        with torch.no_grad():
            parts.append(model(**encoded).logits[0, first])
    return torch.cat(parts)


def by_offsets(loaded: Any, rows: Path) -> torch.Tensor:
    """The same for tokenizers that put the space before a word into its token, one row after the other."""
    parts = []
    for row in held_out(rows):
        words = (0, row["tokens"], row["ner_tags"])
        (tokens,) = tokenize_tagged([words], [0] * len(row["tokens"]), loaded.tokenizer, 1000)
        with torch.no_grad():
            parts.append(loaded.model(torch.tensor([tokens.ids])).logits[0, tokens.places])
    return torch.cat(parts)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", HEADS)
def test_a_run_learns_and_becomes_a_folder(
    tagger: Make, rows: Path, kind: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = tagger(kind, method)
    s = summary(path)
    assert s["labels"] == TAGS
    true = torch.tensor([TAGS.index(tag) for row in held_out(rows) for tag in row["ner_tags"]])
    assert sum(map(sum, s["confusion_after"])) == len(true)
    losses = [m["loss"] for m in read_run(path).metrics if "loss" in m]
    assert sum(losses[-8:]) < sum(losses[:8])
    if kind == "bert" and method in ("lora", "full"):
        assert s["entity_f1_after"] >= 0.8 > s["entity_f1_before"]
    loaded = load_trained(read_run(path))
    logits = alone(loaded.model, loaded.tokenizer, rows) if kind == "bert" else by_offsets(loaded, rows)
    assert (logits.argmax(-1) == true).float().mean() == pytest.approx(s["accuracy_after"])
    assert F.cross_entropy(logits, true) == pytest.approx(s["eval_loss_after"], abs=1e-4)
    assert command("fold", path, "-o", tmp_path / "tuned") == 0
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "tuned").eval()
    assert theirs.config.id2label == dict(enumerate(TAGS))
    if kind == "bert":
        theirs_logits = alone(theirs, AutoTokenizer.from_pretrained(tmp_path / "tuned"), rows)
        torch.testing.assert_close(theirs_logits, logits, atol=1e-4, rtol=0)
    capsys.readouterr()
    assert command("eval", tmp_path / "tuned", *TASK, "--data", rows / "test.jsonl") == 0
    assert command("eval", model, *TASK, "--data", rows / "test.jsonl", "--adapter", path) == 0
    assert command("eval", model, *TASK, "--data", path, "--adapter", path) == 0
    out = capsys.readouterr().out
    assert out.count(f"{s['accuracy_after']:.2%}") == 3
    assert out.count(f"{s['entity_f1_after']:.4f}") >= 3


@pytest.mark.parametrize("kind", HEADS)
def test_peft_reads_the_adapter(tagger: Make, rows: Path, kind: str) -> None:
    model, path = tagger(kind, "lora")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForTokenClassification.from_pretrained(model, num_labels=5), path / "adapter"
    ).eval()
    assert theirs.peft_config["default"].task_type == "TOKEN_CLS"
    loaded = load_trained(read_run(path))
    ids = torch.tensor([loaded.tokenizer("the good film is bad")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, loaded.model(ids).logits, atol=1e-5, rtol=0)


def test_what_is_trained_is_counted_and_stored(tagger: Make) -> None:
    for kind, head in {"bert": 32 * 5 + 5, "llama": 64 * 5 + 5}.items():
        for method in ("head", "lora"):
            _, path = tagger(kind, method)
            tensors = load_file(path / "adapter" / "adapter_model.safetensors")
            assert sum(t.numel() for t in tensors.values()) == summary(path)["trainable_parameters"]
            assert sum(t.numel() for key, t in tensors.items() if f".{HEADS[kind]}." in key) == head


def test_batches_change_nothing(tagger: Make, rows: Path, tmp_path: Path) -> None:
    """One row at a time or all at once: the same trajectory, to the order of sums; the loss is a mean over words."""
    model, _ = tagger("bert", "lora")
    losses = []
    for tokens in (1, 4096):
        options = ["--data", rows, "--method", "lora", "--max-steps", 6, "--micro-batch-tokens", tokens]
        options += ["--dtype", "float32", "--output-dir", tmp_path / str(tokens)]
        assert command("train", model, *TASK, *options) == 0
        losses.append([m["loss"] for m in read_run(tmp_path / str(tokens)).metrics if "loss" in m])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_report_shows_entities(tagger: Make) -> None:
    _, path = tagger("bert", "lora")
    html = (path / "report.html").read_text()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html.partition("Entities after training")[2])
    found = summary(path)["entities_after"]
    assert list(found) == ["LOC", "PER"]
    assert cells[:4] == ["LOC", *(f"{found['LOC'][key]:.4f}" for key in ("precision", "recall", "f1"))]
    assert "Confusion after training" in html


def test_numbers_have_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers without names have no entities; with --label-names they do, and the names go into the folder."""
    model = tiny_bert(tmp_path / "m")
    data = write_rows(tmp_path / "rows.jsonl", tagged_rows(40, numbers=True))
    options = ["--data", data, "--max-steps", 1, "--method", "head"]
    assert command("train", model, *TASK, *options, "--output-dir", tmp_path / "plain") == 0
    assert summary(tmp_path / "plain")["labels"] == ["0", "1", "2", "3", "4"]
    assert "entity_f1_after" not in summary(tmp_path / "plain")
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    options += ["--label-names", *names]
    assert command("train", model, *TASK, *options, "--output-dir", tmp_path / "named") == 0
    s = summary(tmp_path / "named")
    assert s["labels"] == names
    assert sum(f["true"] for f in s["entities_after"].values()) > 0
    assert s["eval_loss_before"] == pytest.approx(summary(tmp_path / "plain")["eval_loss_before"], abs=1e-6)
    line = ["eval", model, *TASK, "--adapter", tmp_path / "named", "--data", data]
    capsys.readouterr()
    assert command(*line) == 2
    assert "--label-names says what numbers mean" in capsys.readouterr().err
    assert command(*line, "--label-names", *names) == 0


def test_lost_tags_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tagged_rows(20)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = ["--data", data, "--eval-data", data, "--max-length", 6, "--max-steps", 1, "--method", "head"]
    assert command("train", tiny_bert(tmp_path / "m"), *TASK, *options, "--output-dir", tmp_path / "run") == 0
    lengths = [len(row["tokens"]) for row in rows]  # type: ignore[arg-type]
    lost, longer = sum(max(0, n - 4) for n in lengths), sum(n > 4 for n in lengths)  # between [CLS] and [SEP]
    wanted = f"{lost:,} tags are lost: {longer} rows are cut at 6 tokens (--max-length)"
    assert " ".join(capsys.readouterr().err.split()).count(wanted) == 2
    assert sum(map(sum, summary(tmp_path / "run")["confusion_after"])) == sum(lengths) - lost


BAD: dict[str, tuple[list[object], list[str]]] = {
    "lengths": (
        ["--data", "uneven.jsonl", "--eval-data", "rows.jsonl"],
        ["row 1: 3 words and 2 tags", "row 2: the words are 'a b'"],
    ),
    "unseen tag": (["--eval-data", "other.jsonl"], ["held-out rows", "'B-ORG' (2 words)", "it has B-LOC, B-PER"]),
    "no column": (["--tags-column", "ner_tag"], ["'ner_tag'", "did you mean 'ner_tags'", "tokens, ner_tags"]),
    "one name": (["--label-names", "O"], ["label_names are O; give at least two"]),
    "too few names": (["--data", "numbers.jsonl", "--label-names", "O", "B-PER"], ["'4'", "it has O, B-PER"]),
    "no tag": (["--data", "ignored.jsonl"], ["the tag -100 is below 0"]),
    "two kinds": (["--data", "mixed.jsonl"], ["'ner_tags' are text and whole numbers"]),
    "text": (["--text", "{title}"], ["text means nothing to --task token-classification"]),
    "qa-lora": (["--method", "qa-lora"], ["--method lora"]),
    "too short": (["--max-length", "2"], ["no word of the training rows", "--max-length"]),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    model = tiny_bert(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", tagged_rows(24))
    write_rows(tmp_path / "numbers.jsonl", tagged_rows(24, numbers=True))
    write_rows(tmp_path / "other.jsonl", [{"tokens": ["the", "film"], "ner_tags": ["O", "B-ORG"]}] * 2)
    uneven = [{"tokens": ["a", "b"], "ner_tags": ["O", "O"]}, {"tokens": ["a", "b", "c"], "ner_tags": ["O", "O"]}]
    write_rows(tmp_path / "uneven.jsonl", [*uneven, {"tokens": "a b", "ner_tags": ["O", "O"]}])
    write_rows(tmp_path / "ignored.jsonl", [{"tokens": ["a", "b"], "ner_tags": [-100, 1]}] * 4)
    write_rows(tmp_path / "mixed.jsonl", [{"tokens": ["a"], "ner_tags": [tag]} for tag in ("O", "O", 1, 1)])
    options, words = BAD[case]
    given = {"--task": "token-classification", "--method": "lora", "--data": "rows.jsonl", "--output-dir": "out"}
    line = ["train", str(model), *(x for k, v in given.items() if k not in options for x in (k, v)), *map(str, options)]
    assert run(line) == 2
    message = capsys.readouterr().err.partition("lorafold: ")[2]
    assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "out").exists()


def test_another_number_of_labels_than_the_head(
    tagger: Make, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = tagger("bert", "lora")
    assert command("fold", path, "-o", tmp_path / "tuned") == 0
    options = [*TASK, "--method", "head", "--max-steps", 1, "--data", rows]
    assert command("train", tmp_path / "tuned", *options, "--output-dir", tmp_path / "on") == 0
    assert summary(tmp_path / "on")["accuracy_before"] == pytest.approx(summary(path)["accuracy_after"], abs=0.02)
    names = ["--label-names", "O", "B-PER", "I-PER"]
    capsys.readouterr()
    assert command("train", tmp_path / "tuned", *options, *names, "--output-dir", tmp_path / "no") == 2
    message = capsys.readouterr().err
    assert "label_names are 3: O, B-PER, I-PER" in message
    assert "has 5: B-LOC, B-PER, I-LOC, I-PER, O" in message
    assert not (tmp_path / "no").exists()


def test_the_head_of_another_task_is_replaced(rows: Path, tmp_path: Path) -> None:
    """A text classifier with two labels becomes a tagger with five, and lends it its encoder."""
    model = tiny_bert(tmp_path / "m")
    config = BertConfig.from_pretrained(model, num_labels=2)
    BertForSequenceClassification.from_pretrained(model, config=config).save_pretrained(model)
    options = [*TASK, "--method", "head", "--max-steps", 1, "--data", rows]
    assert command("train", model, *options, "--output-dir", tmp_path / "run") == 0
    assert summary(tmp_path / "run")["labels"] == TAGS
    assert summary(tmp_path / "run")["trainable_parameters"] == 32 * 5 + 5


@pytest.mark.parametrize(("architecture", "method"), [("llama", "qa-lora"), ("llama", "head"), ("qwen3", "lora")])
def test_a_quantized_model_stays_packed(
    architecture: str, method: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits are those of the head on transformers' hidden states with the weights that the file decodes to."""
    model, path = tiny_gguf(tmp_path, architecture, "Q4_1", tied=False), tmp_path / "run"
    options = ["--data", rows, "--method", method, "--learning-rate", 0.02, "--num-train-epochs", 2]
    assert command("train", model, *TASK, *options, "--dtype", "float32", "--output-dir", path) == 0
    losses = [m["loss"] for m in read_run(path).metrics if "loss" in m]
    assert sum(losses[-8:]) < sum(losses[:8])
    if method == "head":
        loaded = load_trained(read_run(path))
        words = [(i, row["tokens"], row["ner_tags"]) for i, row in enumerate(held_out(rows))]
        tokens = tokenize_tagged(words, [0] * sum(len(w) for _, w, _ in words), loaded.tokenizer, 1000)
        stored = load_file(path / "adapter" / "adapter_model.safetensors")
        dense = tiny_model(architecture, "Q4_1", tied=False).model
        with torch.no_grad():
            ours = logits_of_words(loaded, tokens)
            hidden = torch.cat([dense(torch.tensor([row.ids])).last_hidden_state[0, row.places] for row in tokens])
        wanted = hidden @ stored["base_model.model.score.weight"].T + stored["base_model.model.score.bias"]
        torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-3)
    capsys.readouterr()
    assert command("eval", model, *TASK, "--data", rows / "test.jsonl", "--adapter", path) == 0
    assert f"{summary(path)['accuracy_after']:.2%}" in capsys.readouterr().out
