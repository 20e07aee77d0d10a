"""Tiny rows of every kind with their labels, for tests that run once per task."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from language import language_model
from tiny import LABELS, table


def labels_of(rows: int, wrong: float, seed: int) -> tuple[list[str], list[str]]:
    """Given and true labels; the classes take turns."""
    random = np.random.default_rng([seed, 1])
    clean = [LABELS[row % 3] for row in range(rows)]
    given = list(clean)
    for row in random.permutation(rows)[: round(wrong * rows)]:
        given[row] = LABELS[(LABELS.index(given[row]) + 1) % 3]
    return given, clean


def feature_rows(
    rows: int = 25, *, wrong: float = 0.2, seed: int = 0, width: int = 6
) -> dict[str, Any]:
    """Vectors around a centre per class, each feature at a scale of its own."""
    given, clean = labels_of(rows, wrong, seed)
    random = np.random.default_rng(seed)
    centres = 3 * np.eye(3, width)
    table = centres[[LABELS.index(name) for name in clean]] + random.normal(size=(rows, width))
    table = table * 10.0 ** np.arange(-2, width - 2) + np.arange(width)
    return {"features": table.astype(np.float32), "label": given, "clean_label": clean}


def image_rows(
    rows: int = 25, *, wrong: float = 0.2, seed: int = 0, side: int = 8
) -> dict[str, Any]:
    """Noise around a colour per class."""
    given, clean = labels_of(rows, wrong, seed)
    random = np.random.default_rng(seed)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    base = colours[[LABELS.index(name) for name in clean]][:, None, None]
    noise = random.normal(0, 40, (rows, side, side, 3))
    pixels = np.clip(base + noise, 0, 255).astype(np.uint8)
    return {"image": pixels, "label": given, "clean_label": clean}


def response_rows(rows: int = 25, *, wrong: float = 0.2, seed: int = 0) -> dict[str, Any]:
    """Prompts of topic words; the response names the topic."""
    given, clean = labels_of(rows, wrong, seed)
    return {"text": table(rows, seed=seed)["text"].tolist(), "label": given, "clean_label": clean}


SOURCES: dict[str, Callable[..., dict[str, Any]]] = {
    "features": feature_rows,
    "image": image_rows,
    "causal-lm": response_rows,
}
"""Task -> rows as `fit` takes them."""


@cache
def image_model(name: str = "vit") -> str:
    """Folder of a random image classifier with its processor, made once."""
    import torch
    from transformers import AutoModelForImageClassification

    folder = Path(tempfile.mkdtemp(prefix=f"noiseproof-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(IMAGE_CONFIGS[name]())
    model.save_pretrained(str(folder))
    kind, size = PROCESSORS.get(name, ("ViTImageProcessor", {"height": 8, "width": 8}))
    values = {
        "image_processor_type": kind,
        "size": size,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.5],
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


def _vit() -> Any:
    from families import config

    return config("vit")


def _convnext() -> Any:
    from transformers import ConvNextConfig

    return ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2,
                          initializer_range=0.2, num_labels=3)  # fmt: skip


def _resnet() -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                        layer_type="basic", num_labels=3)  # fmt: skip


def _swin() -> Any:
    from transformers import SwinConfig

    return SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
                      window_size=2, initializer_range=0.2, num_labels=3)  # fmt: skip


IMAGE_CONFIGS: dict[str, Callable[[], Any]] = {
    "vit": _vit, "convnext": _convnext, "resnet": _resnet, "swin": _swin,
}  # fmt: skip
PROCESSORS = {
    "convnext": ("ConvNextImageProcessor", {"shortest_edge": 8}),
    "resnet": ("ConvNextImageProcessor", {"shortest_edge": 8}),
}


def settings_of(task: str) -> dict[str, Any]:
    """Further settings of a job on the rows of a task."""
    models = {"image": image_model, "causal-lm": lambda: language_model("gpt2")}
    return {"model": models[task]()} if task in models else {}
