"""Heads of our own on pooled features of an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from noiseproof.frozen import mean_pooled, token_states
from noiseproof.models import encoder_of, plain_model
from noiseproof.saving import HEAD_FILE


class PooledClassifier(nn.Module):
    """The encoder of a transformers classifier with a head of one's own on pooled features.

    Attributes:
        classifier: The head: (B, D) -> an output with ``logits`` (B, C).
        position: What is pooled: the ``first`` hidden state, or the ``mean`` over the real tokens.
    """

    def __init__(self, model: nn.Module, head: nn.Module, position: str = "mean") -> None:
        super().__init__()
        self.base_model_prefix, encoder = encoder_of(model)
        self.add_module(self.base_model_prefix, encoder)
        self.classifier = head
        self.position = position
        self.config: Any = plain_model(model).config

    def forward(self, **inputs: Tensor) -> Any:
        """Inputs of the encoder, (B, T) each -> what the head answers."""
        if self.position == "mean":
            return self.classifier(mean_pooled(self, inputs))
        _, encoder = encoder_of(self)
        return self.classifier(token_states(encoder(**inputs))[:, 0].float())

    def save_pretrained(self, folder: str, **settings: Any) -> None:
        """Write the encoder as transformers does, and the head beside it."""
        from safetensors.torch import save_file

        _, encoder = encoder_of(self)
        encoder.save_pretrained(folder, **settings)  # type: ignore[operator]
        tensors = {name: value.contiguous() for name, value in self.classifier.state_dict().items()}
        save_file(tensors, str(Path(folder) / HEAD_FILE))


def saved_head(model: Any) -> dict[str, Tensor]:
    """Tensors of the head that `PooledClassifier` wrote beside the encoder of a loaded model."""
    from safetensors.torch import load_file

    return load_file(str(Path(str(model.name_or_path)) / HEAD_FILE))


class Scores(NamedTuple):
    """What `LinearHead` answers.

    Attributes:
        logits: (B, C).
    """

    logits: Tensor


class LinearHead(nn.Linear):
    """A linear layer that answers as a classifier does.

    Attributes:
        normalize: Whether features are scaled to length 1 first.
    """

    def __init__(self, width: int, classes: int, *, normalize: bool = False) -> None:
        super().__init__(width, classes)
        self.normalize = normalize

    def forward(self, input: Tensor) -> Scores:  # type: ignore[override]
        """(B, D) -> logits (B, C)."""
        return Scores(super().forward(F.normalize(input, dim=1) if self.normalize else input))
