"""`lorafold train --task embedding`: every method, and what becomes of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM, MPNetConfig, MPNetModel, RobertaConfig, RobertaModel
from transformers.models.bert.modeling_bert import BertSelfAttention

from lorafold.cli.main import run
from lorafold.evals.embed import embed
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from tests.cli.conftest import METHODS, Make, runs_of_task, summary
from tests.practice import command
from tests.tiny import tiny_gguf
from tests.tiny_classifier import pair_rows, tiny_bert, write_rows

peft = pytest.importorskip("peft")
TASK = ("--task", "embedding")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_rows(folder / "test.jsonl", pair_rows(40, seed=1))
    return write_rows(folder / "train.jsonl", pair_rows(96)).parent


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Make:
    """`embedder("bert", "lora")`: (model, run folder)."""
    return runs_of_task(
        tmp_path_factory, "embedding", "--data", rows, "--num-train-epochs", 3, "--negative", "{negative}"
    )


def texts(rows: Path, column: str) -> list[str]:
    return [json.loads(line)[column] for line in (rows / "test.jsonl").read_text().splitlines()]


@torch.no_grad()
def alone(model: Any, tokenizer: Any, given: list[str]) -> Tensor:
    """Vectors of texts, each by itself, as transformers computes the hidden states."""
    hidden = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in given]
    return torch.stack([F.normalize(states.mean(0), dim=-1) for states in hidden])


def recall_at_1(model: Any, tokenizer: Any, rows: Path) -> float:
    anchors, positives = (alone(model, tokenizer, texts(rows, column)) for column in ("anchor", "positive"))
    assert len(set(texts(rows, "positive"))) == len(set(texts(rows, "anchor"))) == 40
    return float(((anchors @ positives.T).argmax(-1) == torch.arange(40)).float().mean())


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"head"}))
def test_a_run_learns_and_becomes_a_folder(
    embedder: Make, rows: Path, kind: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = embedder(kind, method)
    s = summary(path)
    losses = [m["loss"] for m in read_run(path).metrics if "loss" in m]
    assert sum(losses[-8:]) < sum(losses[:8])
    if kind == "bert" and method != "vera":  # else the rows are learned by heart: the base is random
        assert s["recall_at_1_after"] > s["recall_at_1_before"]
    loaded = load_trained(read_run(path))
    assert recall_at_1(loaded.model, loaded.tokenizer, rows) == pytest.approx(s["recall_at_1_after"])
    assert command("fold", path, "-o", tmp_path / "tuned") == 0
    theirs, tokenizer = (kind.from_pretrained(tmp_path / "tuned") for kind in (AutoModel, AutoTokenizer))
    given = texts(rows, "anchor")
    wanted = alone(loaded.model, loaded.tokenizer, given)
    torch.testing.assert_close(alone(theirs.eval(), tokenizer, given), wanted, atol=1e-5, rtol=0)
    capsys.readouterr()
    assert command("eval", tmp_path / "tuned", *TASK, "--data", rows / "test.jsonl") == 0
    assert command("eval", model, *TASK, "--data", rows / "test.jsonl", "--adapter", path) == 0
    assert command("eval", model, *TASK, "--data", path, "--adapter", path) == 0
    out = capsys.readouterr().out
    assert out.count(f"{s['mrr_after']:.4f}") == 3
    assert out.count(f"{s['mrr_before']:.4f}") == 2


def test_peft_reads_the_adapter(embedder: Make, rows: Path) -> None:
    model, path = embedder("bert", "lora")
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(model), path / "adapter").eval()
    assert theirs.peft_config["default"].task_type == "FEATURE_EXTRACTION"
    loaded, given = load_trained(read_run(path)), texts(rows, "positive")
    ids = [loaded.tokenizer(text)["input_ids"] for text in given]
    with torch.no_grad():
        ours = embed(loaded, ids, 64)
    torch.testing.assert_close(ours, alone(theirs, AutoTokenizer.from_pretrained(model), given), atol=1e-5, rtol=0)


def test_batches_change_nothing(embedder: Make, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text at a time, all at once, or computed again in the backward pass: the same trajectory."""
    model, _ = embedder("bert", "lora")
    losses, calls, forward = [], [0], BertSelfAttention.forward

    def counted(self: BertSelfAttention, *given: Any, **options: Any) -> Any:
        calls[-1] += self.training
        return forward(self, *given, **options)

    monkeypatch.setattr(BertSelfAttention, "forward", counted)
    for i, options in enumerate(
        (["--micro-batch-tokens", 1], ["--micro-batch-tokens", 4096], ["--gradient-checkpointing"])
    ):
        line = [*options, "--data", rows, "--method", "lora", "--max-steps", 6, "--dtype", "float32"]
        assert command("train", model, *TASK, *line, "--output-dir", tmp_path / str(i)) == 0
        losses.append([m["loss"] for m in read_run(tmp_path / str(i)).metrics if "loss" in m])
        calls.append(0)
    assert calls[2] == 2 * calls[1] > 0  # the two that compute everything at once
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)


def test_blocks_that_cannot_be_computed_again(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers checkpoints no MPNet: refused before anything is written, and trained without."""
    model = tiny_bert(tmp_path / "m")
    config = {"vocab_size": 19, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    MPNetModel(MPNetConfig(**config, intermediate_size=48, pad_token_id=0)).save_pretrained(model)
    line = [model, *TASK, "--data", rows, "--method", "lora", "--max-steps", 1, "--output-dir", tmp_path / "out"]
    assert command("train", *line, "--gradient-checkpointing") == 2
    assert "gradient_checkpointing: transformers cannot do it with MPNetModel" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "out").exists()
    assert command("train", *line) == 0


def test_a_pooler_is_neither_trained_nor_lost(embedder: Make, tmp_path: Path) -> None:
    model, path = embedder("bert", "full")
    trained = load_file(path / "adapter" / "adapter_model.safetensors")
    assert not any("pooler" in key for key in trained)
    assert command("fold", path, "-o", tmp_path / "tuned", "--lossy") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "tuned"))
    assert before.keys() == after.keys()
    assert torch.equal(before["pooler.dense.weight"], after["pooler.dense.weight"])
    assert not torch.equal(before["encoder.layer.0.output.dense.weight"], after["encoder.layer.0.output.dense.weight"])


def test_folders_of_other_kinds(embedder: Make, rows: Path, tmp_path: Path) -> None:
    """A masked language model's folder names weights with a prefix; one of sentence-transformers says how it pools."""
    model = tiny_bert(tmp_path / "m")
    BertForMaskedLM.from_pretrained(model).save_pretrained(model)
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{k}", "path": v} for k, v in kinds.items()]
    (model / "modules.json").write_text(json.dumps(modules))
    line = [*TASK, "--data", rows, "--method", "lora", "--max-steps", 2, "--dtype", "float32", "--learning-rate", 0.1]
    assert command("train", model, *line, "--output-dir", tmp_path / "run") == 0
    assert command("fold", tmp_path / "run", "-o", tmp_path / "tuned") == 0
    assert (tmp_path / "tuned" / "1_Pooling" / "config.json").is_file()
    loaded, given = load_trained(read_run(tmp_path / "run")), texts(rows, "anchor")[:5]
    tuned = AutoModel.from_pretrained(tmp_path / "tuned").eval()
    wanted = alone(loaded.model, loaded.tokenizer, given)
    torch.testing.assert_close(alone(tuned, loaded.tokenizer, given), wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(
        alone(AutoModel.from_pretrained(model).eval(), loaded.tokenizer, given), wanted, atol=1e-3
    )


def test_folders_of_one_name_are_compared(
    embedder: Make, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = embedder("bert", "lora")
    model = tiny_bert(tmp_path / "a" / "minilm")
    assert command("fold", path, "-o", tmp_path / "b" / "minilm") == 0
    capsys.readouterr()
    assert command("eval", model, tmp_path / "b" / "minilm", *TASK, "--data", path) == 0
    s, out = summary(path), capsys.readouterr().out
    assert [f"{s[f'mrr_{when}']:.4f}" in out for when in ("before", "after")] == [True, True]
    assert "pairs" in out


def test_adapters_are_computed_with(embedder: Make, rows: Path, tmp_path: Path) -> None:
    """A run taken twice by half is the run; the result knows that it is of an encoder."""
    _, path = embedder("bert", "lora")
    both = tmp_path / "both"
    assert command("adapters", "combine", path, path, "--weights", 0.5, 0.5, "-o", both) == 0
    assert command("fold", both, "-o", tmp_path / "tuned") == 0
    loaded, given = load_trained(read_run(path)), texts(rows, "anchor")[:5]
    wanted = alone(loaded.model, loaded.tokenizer, given)
    tuned = AutoModel.from_pretrained(tmp_path / "tuned").eval()
    torch.testing.assert_close(alone(tuned, loaded.tokenizer, given), wanted, atol=1e-5, rtol=0)


BAD: dict[str, tuple[list[object], list[str]]] = {
    "no column": (["--anchor", "{question}"], ["no column 'question'", "anchor, positive, negative"]),
    "empty": (["--data", "empty.jsonl"], ["row 1: positive empty"]),
    "one positive": (["--positive", "x"], ["the positives of the training rows are one text"]),
    "head": (["--method", "head"], ["no head to train", "last-layers"]),
    "one row": (["--per-device-train-batch-size", "1"], ["nothing to tell its positive from"]),
    "scale": (["--scale", "0"], ["scale is 0.0; it must be positive"]),
    "label": (["--label-column", "stars"], ["label_column means nothing to --task embedding", "--task classification"]),
    "memory": (["--memory", "1MB"], ["memory: the longest text has", "max_length"]),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    model = tiny_bert(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", pair_rows(24))
    write_rows(tmp_path / "empty.jsonl", [*pair_rows(1), {"anchor": "a", "positive": " "}, *pair_rows(9)])
    options, words = BAD[case]
    given = {"--task": "embedding", "--method": "lora", "--data": "rows.jsonl", "--output-dir": "out"}
    line = ["train", str(model), *(x for k, v in given.items() if k not in options for x in (k, v)), *map(str, options)]
    assert run(line) == 2
    message = capsys.readouterr().err.partition("lorafold: ")[2]
    assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "out").exists()


def test_models_that_pool_otherwise_or_are_packed(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*TASK, "--data", rows, "--method", "lora", "--output-dir", tmp_path / "out"]
    assert command("train", tiny_gguf(tmp_path, "llama", "Q4_1"), *line) == 2
    assert "embeddings are of models in transformers format" in capsys.readouterr().err
    model = tiny_bert(tmp_path / "m")
    (model / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (model / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [{"type": "x.Pooling", "path": "1_Pooling"}, {"type": "x.Dense", "path": "2_Dense"}]
    (model / "modules.json").write_text(json.dumps(modules))
    assert command("train", model, *line) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "has a module Dense and pools by pooling_mode_cls_token; only the mean of the tokens is known" in message
    (model / "modules.json").write_text("{")
    assert command("train", model, *line) == 2
    assert "modules.json, or what it names, is damaged" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_long_texts_are_cut_where_the_positions_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny BERT has 40 positions; a RoBERTa's begin after that of padding."""
    rows = [{"anchor": f"good {'film ' * 60}", "positive": f"{'the ' * (i + 1)}"} for i in range(12)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    line = [*TASK, "--data", data, "--eval-data", data, "--method", "lora", "--max-steps", 1]
    assert command("train", tiny_bert(tmp_path / "m"), *line, "--output-dir", tmp_path / "out") == 0
    assert "texts reach 40 tokens, where they are cut" in " ".join(capsys.readouterr().err.split())
    roberta = tiny_bert(tmp_path / "r")
    config = {"vocab_size": 19, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}
    RobertaModel(RobertaConfig(**config)).save_pretrained(roberta)
    assert command("train", roberta, *line, "--output-dir", tmp_path / "too") == 0
    assert "texts reach 39 tokens, where they are cut" in " ".join(capsys.readouterr().err.split())
