"""What the terms of NMTune cost, and how long its estimator takes.

    python benchmarks/nmtune_cost.py step --out step.json
    python benchmarks/nmtune_cost.py estimator --out estimator.json

``step`` times one training step at 128 rows of 2,048 features in rounds, each variant once a round:
the MLP alone, NMTune as it is, and NMTune with plain singular values and the D x D covariance.
``estimator`` fits `NMTuneClassifier` to 50,000 rows of 512 generated features.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from noiseproof import NMTuneClassifier
from noiseproof.methods.nmtune import NMTune, Reshaped, Reshaping

VARIANTS = {
    "mlp": NMTune.preset("mlp"),
    "nmtune": NMTune(),
    "plain": NMTune(svd_route="svdvals", cov_route="direct"),
}


def stepper(method: NMTune, rows: int, width: int, classes: int = 10) -> Callable[[], None]:
    """One training step of a network of its own, to be called again and again."""
    torch.manual_seed(0)
    features, labels = torch.randn(rows, width), torch.randint(0, classes, (rows,))
    module = Reshaping(width, classes)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        answer: Reshaped = module(features)
        loss, _ = method.objective(answer.logits, answer.transformed, answer.features, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def term_timer(method: NMTune, rows: int, width: int, classes: int = 10) -> Callable[[], float]:
    """Processor seconds of the terms alone, forward and backward, to be asked again and again."""
    torch.manual_seed(0)
    transformed = torch.randn(rows, width, requires_grad=True)
    original, labels = torch.randn(rows, width), torch.randint(0, classes, (rows,))
    logits = torch.zeros(rows, classes)

    def seconds() -> float:
        began = time.process_time()
        loss, _ = method.objective(logits, transformed, original, labels)
        loss.backward()
        transformed.grad = None
        return time.process_time() - began

    return seconds


def time_steps(rows: int, width: int, rounds: int) -> dict[str, float | int]:
    """Median seconds of a step by variant, over rounds in which each takes its turn.

    And processor seconds of the terms by themselves, which are too short to be told from the steps.
    """
    steps = {name: stepper(method, rows, width) for name, method in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number >= 2:  # the first allocate
                seconds[name].append(time.perf_counter() - began)
    terms = {name: term_timer(VARIANTS[name], rows, width) for name in ("nmtune", "plain")}
    alone = {name: [ask() for _ in range(rounds)] for name, ask in terms.items()}
    pairs = list(zip(*(seconds[name] for name in VARIANTS), strict=True))
    return {
        "rows": rows,
        "width": width,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        **{f"{name}_s": statistics.median(values) for name, values in seconds.items()},
        "nmtune_over_mlp": statistics.median(own / mlp for mlp, own, _ in pairs),
        "plain_over_mlp": statistics.median(plain / mlp for mlp, _, plain in pairs),
        "terms_cpu_s": statistics.median(alone["nmtune"]),
        "plain_terms_cpu_s": statistics.median(alone["plain"]),
        "plain_terms_over_ours": (
            statistics.median(alone["plain"]) / statistics.median(alone["nmtune"])
        ),
    }


def time_estimator(
    rows: int, width: int, epochs: int, batch_size: int, precision: str
) -> dict[str, float | int | str]:
    """Seconds of one fit to features with ten overlapping classes."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(10, width))
    labels = random.integers(0, 10, rows)
    features = (centres[labels] * 0.3 + random.normal(size=(rows, width))).astype(np.float32)
    began, cpu = time.perf_counter(), time.process_time()
    model = NMTuneClassifier(
        epochs=epochs, batch_size=batch_size, precision=precision, random_state=0
    )
    model.fit(features, labels)
    return {
        "rows": rows,
        "width": width,
        "epochs": epochs,
        "batch_size": batch_size,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count() or 1,
        "fit_s": time.perf_counter() - began,
        "fit_cpu_s": time.process_time() - cpu,
        "train_accuracy": float(model.score(features[:5000], labels[:5000])),
    }


def main() -> None:
    """Measure what is asked for, print it, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("step", "estimator"))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found: Mapping[str, float | int | str]
    if asked.what == "step":
        found = time_steps(asked.rows or 128, asked.width or 2048, asked.rounds)
    else:
        found = time_estimator(
            asked.rows or 50_000,
            asked.width or 512,
            asked.epochs,
            asked.batch_size,
            asked.precision,
        )
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if asked.out is not None:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
