"""The network that is pre-trained: three convolutions and two linear layers, a minute to train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 128  # of the features


class SmallNet(nn.Module):
    """Convolutions with group normalisation, a hidden layer whose output are the features, a head.

    Group normalisation keeps no statistics of the data, so features depend on the weights alone.
    """

    def __init__(self, num_classes: int, channels: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for after in (channels, 2 * channels, 4 * channels):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(8, after),
                nn.ReLU(),
            ]
            before = after
        pooled = [nn.AdaptiveAvgPool2d(3), nn.Flatten()]
        hidden = [nn.Linear(9 * before, WIDTH), nn.ReLU()]
        self.features = nn.Sequential(*layers, *pooled, *hidden)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> logits (B, C)."""
        logits: Tensor = self.head(self.features(pixel_values))
        return logits


def fresh(num_classes: int, seed: int) -> SmallNet:
    """A network whose weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallNet(num_classes)
