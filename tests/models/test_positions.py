"""Models that learn a vector for each position, and have none for longer rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.models.auto import AutoConfig, AutoModelForCausalLM

from lorafold.adapters.inject import inject
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.data.tokens import Tokens
from lorafold.errors import ConfigError, DataError
from lorafold.evals.generate import generate
from lorafold.evals.loss import evaluate
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.load import LoadedModel, load
from lorafold.models.positions import check_positions, table_of_positions
from lorafold.models.tokenizer import load_tokenizer
from lorafold.train.loop import plan_step, train_steps
from tests.practice import command, row_losses, tiny_folder, write_data
from tests.tiny import VOCABULARY, tiny_gguf

POSITIONS = 50  # not a multiple of what rows in packs are lengthened to
KINDS = {
    "gptj": {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "gpt2": {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "opt": {
        "max_position_embeddings": POSITIONS,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    },
}


@pytest.fixture(params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model with a table of positions, as a transformers folder."""
    path = tmp_path / request.param
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **KINDS[path.name]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    load_tokenizer(GGUFFile(tiny_gguf(tmp_path / "gguf", "llama"))).save_pretrained(path)
    return path


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load(folder)


def test_a_row_may_fill_the_table(folder: Path, loaded: LoadedModel) -> None:
    """Packs lengthen it, which needs no position that is not there."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row, length in enumerate((POSITIONS, 7, POSITIONS)):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Tokens(ids, [False] * 4 + [True] * (length - 4), row))
    losses = row_losses(AutoModelForCausalLM.from_pretrained(folder), rows)
    count = sum(sum(row.supervised) for row in rows)
    assert evaluate(loaded, rows) == pytest.approx(float(losses.detach()) / count, rel=1e-5)


def test_packs_stay_within_a_square_of_what_sees_what(tmp_path: Path) -> None:
    """GPT-Neo's: a longer pack would have no mask."""
    path, side = tmp_path / "gpt_neo", 2048
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=VOCABULARY, max_position_embeddings=side, hidden_size=32, num_layers=2, num_heads=2,
        attention_types=[[["global", "local"], 1]], window_size=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    load_tokenizer(GGUFFile(tiny_gguf(tmp_path / "gguf", "llama"))).save_pretrained(path)
    loaded = load(path)
    ids = torch.randint(3, VOCABULARY, (900,)).tolist()
    rows = [Tokens(ids, [False] + [True] * 899, row) for row in range(3)]
    expected = float(row_losses(AutoModelForCausalLM.from_pretrained(path), rows).detach()) / (3 * 899)
    inject(loaded.model, AdapterSpec("lora", 2))
    for more in ({"memory": "10GB"}, {"micro_batch_tokens": 4096}):
        training = TrainingConfig(3, learning_rate=1e-3, max_steps=1, shared_prefix_tokens=0, **more)
        assert plan_step(loaded, rows, training).micro_batch_tokens == side
        assert next(train_steps(loaded, rows, training)).loss == pytest.approx(expected, rel=1e-4)


def test_longer_rows_are_refused(loaded: LoadedModel) -> None:
    assert table_of_positions(loaded) == POSITIONS
    check_positions(loaded, [[0] * POSITIONS, [0]])
    with pytest.raises(ConfigError, match=f"51 tokens, and .* {POSITIONS} positions; give --max-length {POSITIONS}"):
        check_positions(loaded, [[0], [0] * (POSITIONS + 1)])


def test_rotary_positions_go_on(tmp_path: Path) -> None:
    """Also where there are as many tokens as positions, and an adapter stands in the embedding's place."""
    loaded = load(tiny_folder(tmp_path / "llama"))
    loaded.model.config.max_position_embeddings = VOCABULARY
    assert table_of_positions(loaded) is None
    inject(loaded.model, AdapterSpec("lora", r=2, target_modules=("embed_tokens",)))
    assert table_of_positions(loaded) is None
    check_positions(loaded, [[0] * 10**6])


def test_generation_ends_where_positions_end(loaded: LoadedModel) -> None:
    loaded.model.generation_config.eos_token_id = loaded.model.config.eos_token_id = -1
    loaded.tokenizer.eos_token = None
    assert len(generate(loaded, [5] * (POSITIONS - 3), 20)) == 4
    with pytest.raises(DataError, match=f"prompt has {POSITIONS + 1} tokens, and the model {POSITIONS} positions"):
        generate(loaded, [5] * (POSITIONS + 1), 1)


def test_commands_say_how_long_rows_may_be(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_data(tmp_path / "rows.jsonl"), tmp_path / "run"
    long = {"prompt": "word " * 80, "completion": "is"}
    data.write_text(data.read_text() + json.dumps(long) + "\n")
    training = ("train", folder, "--data", data, "-o", out, "--method", "lora", "--max-steps", 2)
    assert command(*training) == 2
    assert f"give --max-length {POSITIONS}" in capsys.readouterr().err
    assert not out.exists()
    assert command("eval", folder, "--data", data) == 2
    assert f"give --max-length {POSITIONS}" in capsys.readouterr().err
    short = ("--max-length", POSITIONS, "--eval-data", data, "--sample-rows", 21, "--sample-tokens", 4)
    assert command(*training, *short) == 0
    assert f"and the model {POSITIONS} positions; shorten it)" in (out / "report.html").read_text()
    capsys.readouterr()
    assert command("eval", folder, "--adapter", out, "--data", out) == 0
    assert capsys.readouterr().out.count("torch") == 2
    other = tmp_path / "other"  # rows of a run of another model, which can be longer
    llama = ("train", tiny_folder(tmp_path / "llama"), "--data", data, "-o", other)
    assert command(*llama, *training[6:], *short[2:]) == 0
    assert command("eval", folder, "--data", other) == 2
    assert f"give --max-length {POSITIONS}" in capsys.readouterr().err
