"""A job given to a peer: measured and recorded as a run of ours is."""

from __future__ import annotations

import importlib
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from noiseproof.checkpoint import Interrupted, StopSignals, Stopwatch
from noiseproof.errors import InputError, path_of, unknown_name
from noiseproof.job import OPT_IN, Job
from noiseproof.method import require
from noiseproof.peers.cleanlab import CleanlabProbe, CleanlabPrune
from noiseproof.peers.contract import Fitted, Measure, Peer, Work
from noiseproof.peers.trainer import Trainer, TrainerLabelSmoothing, TrainerLoRA
from noiseproof.preparation import OOD, Prepared
from noiseproof.record import (
    RunRecord,
    clear_run,
    empty_folders_removed,
    missing_folders,
    peak_memory_mb,
    prepare_folder,
)
from noiseproof.results import (
    detection_metrics,
    epoch_metrics,
    ood_metrics,
    sample_table,
    test_metrics,
    write_results,
)
from noiseproof.saving import merged
from noiseproof.tasks import TextClassification

PEERS: dict[str, type[Peer]] = {
    peer.__name__: peer
    for peer in (Trainer, TrainerLabelSmoothing, TrainerLoRA, CleanlabProbe, CleanlabPrune)
}


def find_peer(name: str) -> type[Peer]:
    """The class of a peer.

    Raises:
        InputError: Unknown name; gives the nearest and all names.
    """
    if name not in PEERS:
        raise InputError(unknown_name("peer", name, PEERS))
    return PEERS[name]


def run_peer(
    job: Job,
    peer: Peer,
    *,
    out: str | Path,
    overwrite: bool = False,
    labels: dict[str, str] | None = None,
    search: dict[str, Any] | None = None,
) -> RunRecord:
    """Run a peer on the rows, noise and seeds of a job; its method is not used.

    Args:
        job: Data, noise, model and training settings.
        peer: Who trains.
        out: Folder of the run: the files of a run of ours, without ``model/`` where no network was
            trained.
        overwrite: Replace what is in ``out``.
        labels: Names for the record, such as those of a grid's cell.
        search: How the settings were found, for the record.

    Raises:
        InputError: The data or a setting is wrong, or the library is not installed.
        Interrupted: SIGINT or SIGTERM; there is nothing to resume from.

    Example:
        >>> from noiseproof.job import Job
        >>> job = Job("train.csv", test="test.csv", noise="symmetric:0.4")  # doctest: +SKIP
        >>> record = run_peer(job, CleanlabPrune(), out="runs/prune")  # doctest: +SKIP
    """
    watch = Stopwatch()
    peer.check_installed()
    _check_job(job)
    folder = path_of(out)
    record = RunRecord(
        job.spec() | {"method": peer.to_dict()},
        labels=dict(labels or {}),
        search=dict(search or {}),
    )
    new = missing_folders(folder)
    prepare_folder(folder, record, resume=False, overwrite=overwrite)
    with empty_folders_removed(new):
        prepared = Prepared(job)
    prepared.describe(record)
    for package in peer.needs:
        record.versions[package] = importlib.import_module(package).__version__
    if overwrite:  # not before the new data are known to be good
        clear_run(folder)
    measure, scratch = Measure(prepared), folder / "checkpoints"
    try:
        record.write(folder)
        with _own_random_state(), StopSignals() as stop:
            task = prepared.task
            assert isinstance(task, TextClassification)
            work = Work(
                prepared.model,
                task.tokenizer,
                prepared.encoded,
                prepared.data.labels,
                prepared.num_classes,
                job.train,
                prepared.seeds,
                scratch,
                measure,
                stop,
            )
            fitted = peer.fit(work)
        _conclude(record, prepared, fitted, measure, folder)
        record.status = "done"
    except Exception as error:
        record.status = "interrupted" if isinstance(error, Interrupted) else "failed"
        record.error = " ".join(str(error).split()) or type(error).__name__
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        record.timings |= watch.seconds()
        record.write(folder)
    return record


def _check_job(job: Job) -> None:
    """Refuse what peers cannot do."""
    train = job.train
    for name in OPT_IN:
        require(not getattr(job, name), f"peers do not offer {name}; leave it out")
    require(job.task == "text", f"peers run on texts alone, got task={job.task}")
    micro = train.micro_batch_size
    require(
        micro is None or train.batch_size % micro == 0,
        f"peers need a micro_batch_size that divides batch_size={train.batch_size}, got {micro}",
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    require(processes == 1, f"peers run in one process, got {processes}")
    devices = torch.cuda.device_count()
    require(
        train.device == "cpu" or devices <= 1,
        f"peers run on one GPU, found {devices}; set CUDA_VISIBLE_DEVICES=0",
    )


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Put back the global random states: the libraries seed them and draw from them."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _conclude(
    record: RunRecord, prepared: Prepared, fitted: Fitted, measure: Measure, folder: Path
) -> None:
    """Put into the record what came out, and write the files."""
    record.model = {
        "name": prepared.job.model,
        "class": fitted.kind,
        "parameters": prepared.parameters,
        "trained_parameters": fitted.trained,
        "trained_head_parameters": None,  # a peer does not say
        "precision": fitted.precision,
        "device": str(next(prepared.model.parameters()).device),
        "processes": 1,
    }
    row, logits = measure.deployed(fitted.predict)
    record.timings |= {**fitted.seconds, "eval_s": measure.seconds}
    record.peak_memory_mb = peak_memory_mb()
    epoch_metrics(record, prepared, row)
    if "test" in logits:
        curve = [row["test_accuracy"] for row in measure.history if "test_accuracy" in row]
        test_metrics(record, prepared, logits["test"], curve)
    ood_metrics(record, prepared, {n: found for n, found in logits.items() if n.startswith(OOD)})
    samples = sample_table(prepared, logits["train"], fitted.columns)
    if fitted.suspicious is not None:
        samples["suspicious"] = fitted.suspicious
    detection_metrics(record, prepared, samples)
    if fitted.model is not None:
        model = merged(fitted.model) if prepared.job.merge else fitted.model
        prepared.task.save(model, folder / "model")
    write_results(folder, measure.history, samples, prepared)
