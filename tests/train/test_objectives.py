"""Losses and gradients of objectives against plain torch in float64, one text after the other."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from lorafold.data.pairs import Pair, pair_texts, tokenize_pairs
from lorafold.evals.embed import embed_at_once
from lorafold.models.encoder import load_encoder
from lorafold.models.load import LoadedModel
from lorafold.train.objectives import InfoNCE
from tests.tiny_classifier import pair_rows, tiny_bert


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    loaded = load_encoder(tiny_bert(tmp_path_factory.mktemp("bert")))
    loaded.model.requires_grad_(True)
    return loaded


def pairs(loaded: LoadedModel, negative: str | None) -> list[Pair]:
    rows = enumerate(pair_rows(7))
    texts = pair_texts(rows, ("anchor", "positive", "negative"), "{anchor}", "{positive}", negative)
    return tokenize_pairs([(n, a, p, no if n % 2 else "") for n, a, p, no in texts], loaded.tokenizer, 40)


def dense_loss(folder: Path, rows: list[Pair], scale: float) -> tuple[float, dict[str, Tensor]]:
    """Multiple negatives as sentence-transformers writes it, and its gradients, in float64."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()

    def vector(ids: tuple[int, ...]) -> Tensor:
        return F.normalize(model(torch.tensor([ids])).last_hidden_state[0].mean(0), dim=-1)

    anchors = torch.stack([vector(row.anchor) for row in rows])
    texts = torch.stack(
        [*(vector(row.positive) for row in rows), *(vector(row.negative) for row in rows if row.negative)]
    )
    loss = F.cross_entropy(scale * anchors @ texts.T, torch.arange(len(rows)))
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("max_tokens", [1, 40, 4096])
@pytest.mark.parametrize("negative", [None, "{negative}"])
def test_info_nce(encoder: LoadedModel, negative: str | None, max_tokens: int) -> None:
    rows = pairs(encoder, negative)
    assert any(row.negative for row in rows) == (negative is not None)
    wanted, gradients = dense_loss(encoder.path, rows, 20.0)
    encoder.model.zero_grad()
    loss, count = InfoNCE(20.0).add_gradients(encoder, rows, max_tokens)
    assert count == 7
    assert loss == pytest.approx(wanted, abs=1e-5)
    for name, parameter in encoder.model.named_parameters():
        if name in gradients:  # scale 20 and float32: a ten-thousandth of the largest entry
            atol = 1e-4 * float(gradients[name].abs().max()) + 1e-7
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.double(), gradients[name], atol=atol, rtol=1e-3)


def test_limited_tokens_keep_one_batch_and_drop_out_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GradCache against one graph over all batches, with dropout, from the same random state."""
    encoder = load_encoder(tiny_bert(tmp_path))
    encoder.model.requires_grad_(True).train()
    for module in encoder.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    rows, kept, alive, most = pairs(encoder, "{negative}"), embed_at_once, [], []

    def watched(loaded: LoadedModel, texts: list[tuple[int, ...]]) -> Tensor:
        vectors = kept(loaded, texts)
        if vectors.requires_grad:
            alive.append(weakref.ref(vectors))
            most.append(sum(one() is not None for one in alive))
        return vectors

    monkeypatch.setattr("lorafold.evals.embed.embed_at_once", watched)
    monkeypatch.setattr("lorafold.train.objectives.embed_at_once", watched)
    monkeypatch.setattr("lorafold.train.objectives.usual_tokens", lambda _: 40)
    found = []
    for limit in (None, 40):
        torch.manual_seed(3)
        encoder.model.zero_grad()
        alive.clear()
        most.clear()
        loss, _ = InfoNCE(20.0).add_gradients(encoder, rows, limit)
        gradients = {name: p.grad for name, p in encoder.model.named_parameters() if p.grad is not None}
        found.append((loss, gradients, torch.get_rng_state()))
        assert len(most) > 2
        assert max(most) == (1 if limit else len(most))
    (loss, wanted, state), (again, gradients, after) = found
    assert again == pytest.approx(loss, abs=1e-6)
    assert torch.equal(after, state)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():  # float32, sums in another order
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-8, rtol=1e-4)


def test_scale_is_that_of_the_cosines(encoder: LoadedModel) -> None:
    rows = pairs(encoder, None)
    with torch.no_grad():
        found = [InfoNCE(scale).evaluate(encoder, rows, 4096) for scale in (1.0, 20.0)]
    assert found[0].ranks == found[1].ranks
    assert found[0].loss == pytest.approx(dense_loss(encoder.path, rows, 1.0)[0], abs=1e-6)
    assert found[1].loss == pytest.approx(dense_loss(encoder.path, rows, 20.0)[0], abs=1e-5)
