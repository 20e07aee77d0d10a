"""Tiny models and tables for the tests: our own words, random weights, no download."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import noiseproof
from noiseproof.engine import TrainSettings
from noiseproof.loop import Outcome, train
from noiseproof.method import Batch, Method
from noiseproof.models import load_text_classifier
from noiseproof.tasks import EncodedTexts, TextClassification

TOPICS = {
    "garden": ("rose", "soil", "seed", "leaf", "bloom", "hedge"),
    "harbour": ("boat", "sail", "anchor", "tide", "wharf", "mast"),
    "kitchen": ("bread", "oven", "spoon", "salt", "broth", "knife"),
}
LABELS = tuple(TOPICS)
FILLER = ("the", "a", "old", "new", "we", "saw", "near", "with", "and", "some", "more", "today")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")

SOURCE = Path(noiseproof.__file__).resolve().parents[1]
"""The folder that ``import noiseproof`` needs on its path in a subprocess."""


def build_model(folder: Path) -> Path:
    """Save a random two-layer BERT and its fast WordPiece tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = [*SPECIAL, *FILLER, *(word for topic in TOPICS.values() for word in topic)]
    words += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(str(vocabulary), model_max_length=64)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # as random as 0.02, and it learns within a few steps
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def table(rows: int = 24, *, wrong: float = 0.0, seed: int = 0, length: int = 0) -> pd.DataFrame:
    """Sentences whose topic words tell the class.

    Args:
        rows: Number of rows; the classes take turns.
        wrong: Share of rows whose ``label`` is changed; ``clean_label`` keeps the truth.
        seed: Of words and wrong labels.
        length: Words in every text; 0 draws 3 to 9.
    """
    random = np.random.default_rng(seed)
    columns: dict[str, list[str]] = {"text": [], "context": [], "clean_label": []}
    for row in range(rows):
        label = LABELS[row % len(LABELS)]
        size = length or int(random.integers(3, 10))
        topic = random.choice(TOPICS[label], max(2, size // 2)).tolist()
        words = topic + random.choice(FILLER, size - len(topic)).tolist()
        random.shuffle(words)
        columns["text"].append(" ".join(words))
        columns["context"].append(" ".join(random.choice(FILLER, int(random.integers(2, 5)))))
        columns["clean_label"].append(label)
    given = list(columns["clean_label"])
    for row in random.permutation(rows)[: round(wrong * rows)]:
        given[row] = LABELS[(LABELS.index(given[row]) + 1) % len(LABELS)]
    return pd.DataFrame(columns | {"label": given})


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny model with the rows it learns from."""

    folder: Path
    model: nn.Module
    task: TextClassification
    encoded: EncodedTexts
    labels: Tensor
    clean_labels: Tensor

    def fit(
        self,
        method: Method,
        *,
        labels: Tensor | None = None,
        encoded: EncodedTexts | None = None,
        num_classes: int = len(LABELS),
        extra: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Outcome:
        """Train a fresh copy of the model with the loop, without a job around it.

        Args:
            method: What to train with.
            labels: Other given labels.
            encoded: Other rows.
            num_classes: C, where the labels do not use all classes.
            extra: Further arguments of `train`.
            **settings: Fields of `TrainSettings`; small and quick unless given.
        """
        return train(
            method,
            copy.deepcopy(self.model),
            self.encoded if encoded is None else encoded,
            self.labels if labels is None else labels,
            num_classes,
            train_settings(**settings),
            **(extra or {}),
        )


def train_settings(**changes: Any) -> TrainSettings:
    """Settings for a run of a second: one device, no probing of the machine."""
    quick: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "device": "cpu",
        "precision": "fp32",
    }
    return TrainSettings(**(quick | changes))


def tiny(folder: Path, rows: pd.DataFrame, classes: tuple[str, ...] = LABELS) -> Tiny:
    """Load the model of ``folder`` through the real code and encode ``rows``."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, tokenizer = load_text_classifier(str(folder), classes)
    task = TextClassification(tokenizer)
    return Tiny(
        folder,
        model,
        task,
        task.encode(rows["text"].tolist()),
        numbers(rows["label"]),
        numbers(rows["clean_label"]),
    )


def numbers(labels: Any) -> Tensor:
    """Class numbers (N,) of label names."""
    return torch.tensor([LABELS.index(label) for label in labels])


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> a copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    """Whether two models hold the same parameters under the same names, bit for bit."""
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def trained_values(model: nn.Module) -> list[Tensor]:
    """Parameters in order, whatever their names are."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def as_batch(labels: list[int], **columns: Tensor) -> Batch:
    """A batch for a model that ignores its inputs."""
    return Batch({}, torch.tensor(labels), torch.arange(len(labels)), columns)


class Answers(nn.Module):
    """A model whose logits are its one parameter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, **_: Tensor) -> Answers:
        """The object itself has ``logits``."""
        return self


def python(*arguments: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a Python process that imports this source tree; ask it to end when it takes too long."""
    command = [sys.executable, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment(**env)
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher then ends its workers
            output, errors = process.communicate(timeout=60)
            errors += f"\nended after {timeout} s"
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def environment(**changes: str) -> dict[str, str]:
    """The environment of a subprocess: this source tree first on its path."""
    paths = [str(SOURCE), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)} | changes


def last_json(text: str) -> Any:
    """The last line of a program's output, as JSON."""
    return json.loads(text.strip().splitlines()[-1])
