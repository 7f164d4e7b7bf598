"""Speech models: a small wav2vec 2.0 tells four pitches apart, then an adapter teaches it a harsher voice.

    python examples/tones_wav2vec2.py

The model is transformers' wav2vec 2.0 for classification, the sounds are synthesized here: sine tones first, then
sawtooth tones in noise. LoRA sits on linear layers and convolutions, and the head is trained beside it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

import lorafold

RATE = 2000  # samples per second
PITCHES = (110.0, 147.0, 196.0, 262.0)  # Hz


def tones(count: int, seed: int, harsh: bool = False) -> tuple[Tensor, Tensor]:
    """A quarter of a second of tones [count, 500] out of tune by up to 3 %, and the number of the pitch [count]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(PITCHES), (count,), generator=generator)
    detuned = 1 + 0.06 * (torch.rand(count, generator=generator) - 0.5)
    phase = torch.rand(count, 1, generator=generator)
    cycles = (torch.tensor(PITCHES)[labels] * detuned)[:, None] * torch.arange(500) / RATE + phase
    wave = 2 * (cycles % 1) - 1 if harsh else torch.sin(2 * torch.pi * cycles)
    return wave + (0.5 if harsh else 0.1) * torch.randn(wave.shape, generator=generator), labels


def train(model: nn.Module, sounds: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """Train whatever requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(32):
            loss = model(sounds[rows], labels=labels[rows]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, sounds: Tensor, labels: Tensor) -> float:
    """Share of the tones whose pitch is found."""
    return float((model(sounds).logits.argmax(-1) == labels).float().mean())


def main() -> dict[str, float]:
    """The whole example; returns the accuracies."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(24, 24),
        conv_kernel=(20, 4),
        conv_stride=(10, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=32,
        num_labels=len(PITCHES),
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    model = Wav2Vec2ForSequenceClassification(config)
    train(model, *tones(800, seed=1), epochs=8, rate=3e-3)
    clean, harsh = tones(400, seed=2), tones(400, seed=3, harsh=True)
    found = {"sine tones": accuracy(model, *clean), "sawtooth, before": accuracy(model, *harsh)}
    spec = lorafold.AdapterSpec(
        "lora",
        r=8,
        target_modules=("all-linear", "conv_layers.0.conv", "conv_layers.1.conv"),
        modules_to_save=("projector", "classifier"),
    )
    adaptation = lorafold.adapt(model, spec)
    train(model, *tones(800, seed=4, harsh=True), epochs=8, rate=5e-3)
    found["sawtooth, adapted"] = accuracy(model, *harsh)
    with lorafold.unmerged(model):
        found["sine, adapter off"] = accuracy(model, *clean)
    lorafold.unload(model, merge=True)
    found["sawtooth, merged"] = accuracy(model, *harsh)
    sys.stdout.write(f"{adaptation.trained:,} of {adaptation.total:,} parameters trained\n")
    sys.stdout.writelines(f"{name:<20} {value:6.1%}\n" for name, value in found.items())
    return found


if __name__ == "__main__":
    main()
