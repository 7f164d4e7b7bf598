"""Images: a small vision transformer learns digits, then an adapter teaches it mirrored ones.

    python examples/digits_vit.py

The model is transformers' ViT, the images are drawn here. LoRA sits on the attention's queries and values and the head
is trained beside it; without the adapter the model is what it was.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import lorafold

SEGMENTS = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")  # of each digit
PLACES = {  # segment -> rows and columns of an 11 x 7 drawing
    "a": (slice(0, 1), slice(1, 6)),
    "b": (slice(1, 5), slice(6, 7)),
    "c": (slice(6, 10), slice(6, 7)),
    "d": (slice(10, 11), slice(1, 6)),
    "e": (slice(6, 10), slice(0, 1)),
    "f": (slice(1, 5), slice(0, 1)),
    "g": (slice(5, 6), slice(1, 6)),
}


def digits(count: int, seed: int, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Noisy images [count, 1, 16, 16] of digits at random places, and the digits [count]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = 0.2 * torch.randn(count, 1, 16, 16, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = torch.randint(2, 4, (2,), generator=generator).tolist()
        drawing = torch.zeros(11, 7)
        for segment in SEGMENTS[label]:
            drawing[PLACES[segment]] = 1.0
        image[0, top : top + 11, left : left + 7] += drawing
    return (images.flip(-1) if mirrored else images), labels


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """Train whatever requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=epochs * -(-len(labels) // 64))
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            loss = model(images[rows], labels=labels[rows]).loss
            loss.backward()
            optimizer.step()
            fall.step()
            optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose digit is found."""
    return float((model(images).logits.argmax(-1) == labels).float().mean())


def main() -> dict[str, float]:
    """The whole example; returns the accuracies."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    train(model, *digits(2000, seed=1), epochs=10, rate=3e-3)
    plain, mirrored = digits(500, seed=2), digits(500, seed=3, mirrored=True)
    found = {"digits": accuracy(model, *plain), "mirrored, before": accuracy(model, *mirrored)}
    spec = lorafold.AdapterSpec("lora", r=8, target_modules=("all-linear",), modules_to_save=("classifier",))
    adaptation = lorafold.adapt(model, spec)
    train(model, *digits(2000, seed=4, mirrored=True), epochs=10, rate=5e-3)
    found["mirrored, adapted"] = accuracy(model, *mirrored)
    with lorafold.unmerged(model):
        found["digits, adapter off"] = accuracy(model, *plain)
    lorafold.unload(model, merge=True)
    found["mirrored, merged"] = accuracy(model, *mirrored)
    sys.stdout.write(f"{adaptation.trained:,} of {adaptation.total:,} parameters trained\n")
    sys.stdout.writelines(f"{name:<20} {value:6.1%}\n" for name, value in found.items())
    return found


if __name__ == "__main__":
    main()
