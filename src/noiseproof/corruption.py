"""Make the labels of a table wrong on purpose, and say exactly how wrong they became."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from noiseproof.data import FOREIGN, Examples, Inputs, Reader, read_labels
from noiseproof.engine import TrainSettings, derive_seed
from noiseproof.errors import InputError, check_type, path_of, unknown_name
from noiseproof.noise import Corruption, NoiseModel, parse_noise
from noiseproof.preparation import frozen_features
from noiseproof.tables import Table, load_table
from noiseproof.tasks import RowSettings, Task, find_task

if TYPE_CHECKING:
    from noiseproof.tables import Source


def corrupt(data: Source, noise: str | NoiseModel, **settings: Any) -> tuple[Any, Corruption]:
    """Corrupt the labels (or, with open-set and text noise, the inputs) of a table.

    Args:
        data: Rows, read like training data.
        noise: Such as ``symmetric:0.4``, or a model of `noiseproof.noise`.
        **settings: Further arguments of `corrupt_table`: ``label``, ``seed``, ``task``, ...

    Returns:
        The table (a DataFrame, without the arrays of an archive) and what was done to it.

    Raises:
        InputError: The noise cannot be parsed, or the table does not fit it.
    """
    named = signature(corrupt_table).parameters.values()
    known = [item.name for item in named if item.kind is Parameter.KEYWORD_ONLY]
    known += [item.name for item in dataclasses.fields(RowSettings)]
    for name in settings:
        if name not in known:
            line = unknown_name("setting", name, known, "help(noiseproof.corruption.corrupt_table)")
            raise InputError(f"corrupt: {line}")
    table, corruption = corrupt_table(data, noise, **settings)
    return table.frame, corruption


def corrupt_table(
    data: Source,
    noise: str | NoiseModel,
    *,
    label: str = "label",
    seed: int = 0,
    clean_label: str = "clean_label",
    task: str = "text",
    model: Any = None,
    noise_pool: Any = None,
    split: str = "train",
    out: str | Path | None = None,
    **rows: Any,
) -> tuple[Table, Corruption]:
    """Corrupt a table and keep its arrays, see `corrupt`.

    Args:
        data: Rows, read like training data.
        noise: Such as ``symmetric:0.4``.
        label: Column of the labels, taken as true.
        seed: Seed of the noise.
        clean_label: New column that keeps the true labels. A row whose input was replaced has none:
            it gets `noiseproof.data.FOREIGN`.
        task: Kind of the rows; they are read by instance-dependent, open-set and text noise only.
        model: Encoder whose frozen features steer instance-dependent noise; None is the default of
            the task.
        noise_pool: File of foreign rows for open-set noise.
        split: Split of a hub data set or of an archive.
        out: File that the table is to be written to; paths in it will hold from there.
        **rows: Fields of `RowSettings`: ``text``, ``features``, ...

    Raises:
        InputError: The noise cannot be parsed, or the table does not fit it.
    """
    for name, value in (("label", label), ("clean_label", clean_label), ("task", task)):
        check_type(name, value, str)
    check_type("seed", seed, int)
    model_of_noise = parse_noise(noise)
    if model_of_noise is None:
        raise InputError("noise is 'none': nothing to do; give for example symmetric:0.4")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must lie in [0, 2^32), got {seed}")
    if model_of_noise.needs_pool and noise_pool is None:
        raise InputError(
            f"noise {model_of_noise.spec!r} replaces inputs; give noise_pool, a file of foreign "
            "rows"
        )
    if not clean_label.strip():
        raise InputError("clean_label must name the column that keeps the true labels, got ''")
    kind, settings = find_task(task), RowSettings(**rows)
    table = load_table(data, split)
    if clean_label in (*table.frame.columns, *table.arrays):
        raise InputError(
            f"the data has a column {clean_label!r} already; name another one for the true labels"
        )
    kind.check_noise(model_of_noise)
    reader = kind.reader(settings)
    if kind.text_labels:
        return _other_responses(table, model_of_noise, reader, label, clean_label, seed)
    labels, names = read_labels(data, label, split)
    features, pool, pool_rows = None, None, None
    reads = model_of_noise.needs_features or model_of_noise.needs_pool
    if reads or model_of_noise.needs_texts:
        if label in reader.columns(table):
            raise InputError(
                f"column {label!r} cannot be both {reader.kind} and label; give another "
                f"{reader.kind}"
            )
        inputs = reader.read(table, np.arange(len(table)))
    if model_of_noise.needs_features:
        features = _features(kind, inputs, labels, names, model, settings)
    if model_of_noise.needs_pool and noise_pool is not None:
        pool = load_table(noise_pool)
        pool_rows = reader.read(pool, np.arange(len(pool)))
    model_of_noise = model_of_noise.for_classes(names)
    corruption = model_of_noise.apply(
        labels,
        len(names),
        seed,
        features=features,
        pool_size=None if pool_rows is None else len(pool_rows),
        texts=inputs.as_texts() if model_of_noise.needs_texts else None,
    )
    noisy = _relabelled(table.frame[label], labels, corruption.labels, names)
    truth = table.frame[label]
    if pool is not None:
        truth = _foreign(truth, corruption.extras["replacement"] >= 0)
    table = dataclasses.replace(
        table, frame=table.frame.assign(**{clean_label: truth, label: noisy})
    )
    if model_of_noise.needs_texts:
        changed = _noised(corruption, reader.columns(table))
        table = dataclasses.replace(table, frame=table.frame.assign(**changed))
    if pool is not None:
        table = _replaced(table, pool, reader, corruption)
    if out is not None:
        table = reader.moved(table, path_of(out).absolute().parent)
    return table, corruption


def _other_responses(
    table: Table, noise: NoiseModel, reader: Reader, label: str, clean_label: str, seed: int
) -> tuple[Table, Corruption]:
    """Corrupt rows whose label is a text: swap the labels, or put text noise on all texts."""
    table.require(label, "responses")
    columns = [label] if noise.needs_responses else [*reader.columns(table), label]
    for column in columns:
        if not all(isinstance(cell, str) for cell in table.frame[column]):
            raise InputError(
                f"column {column!r} of {table.name} must hold texts for noise {noise.spec!r}; chat "
                "messages take swap noise on a column of responses alone"
            )
    texts = list(zip(*(table.frame[column].tolist() for column in columns), strict=True))
    corruption = noise.apply(np.zeros(len(table), dtype=np.int64), 1, seed, texts=texts)
    changed = {clean_label: table.frame[label]}
    if noise.needs_responses:
        changed[label] = corruption.extras["responses"].tolist()
    else:
        changed |= _noised(corruption, columns)
    frame = table.frame.assign(**changed)
    return dataclasses.replace(table, frame=frame, texts={}), corruption


def _noised(corruption: Corruption, columns: Sequence[str]) -> dict[str, list[str]]:
    """The texts of all rows after text noise, column by column."""
    texts = zip(*corruption.extras["texts"], strict=True)
    return {name: list(cells) for name, cells in zip(columns, texts, strict=True)}


def _relabelled(column: Any, old: np.ndarray, new: np.ndarray, names: tuple[str, ...]) -> Any:
    """The column with new labels (N,), in the values and the type that it had."""
    import pandas as pd

    cells = column.to_numpy(dtype=object)
    values = np.asarray(names, dtype=object)  # a class without rows has its name
    values[old] = cells
    noisy = pd.Series(np.where(new != old, values[new], cells), index=column.index)
    return noisy.astype(column.dtype)


def _foreign(column: Any, rows: np.ndarray) -> Any:
    """The column of true labels, as text, without one in the rows (N,) bool of the pool."""
    import pandas as pd

    cells = [FOREIGN if hit else str(cell) for hit, cell in zip(rows, column, strict=True)]
    return pd.Series(cells, index=column.index, dtype=object)


def _features(
    kind: type[Task],
    inputs: Inputs,
    labels: np.ndarray,
    names: tuple[str, ...],
    model: Any,
    settings: RowSettings,
) -> np.ndarray:
    """Frozen features of the rows (N, D)."""
    name = kind.default_model if model is None else model
    if name is None:
        raise InputError(f"task {kind.name!r} needs a model: give model")
    data = Examples([str(row) for row in range(len(labels))], inputs, labels, None, names)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(0, "head"))
        task, encoder = kind.load(name, data, settings)
    task.learn(encoder, inputs)
    return frozen_features(encoder, task.encode(inputs), TrainSettings())


def _with_cells(column: Any, rows: np.ndarray, cells: Sequence[Any]) -> Any:
    """The column with other cells in these rows, in the type that it had."""
    import pandas as pd

    if isinstance(column.dtype, np.dtype):
        changed = column.copy()
        for row, cell in zip(rows.tolist(), cells, strict=True):
            changed.iat[row] = cell
        return changed
    values = column.tolist()  # Arrow would copy the whole column for every cell
    for row, cell in zip(rows.tolist(), cells, strict=True):
        values[row] = cell
    return pd.Series(values, index=column.index, dtype=column.dtype)


def _replaced(table: Table, pool: Table, reader: Reader, corruption: Corruption) -> Table:
    """Put cells of the pool in the place of the marked rows."""
    replacement = corruption.extras["replacement"]
    rows = np.flatnonzero(replacement >= 0)
    frame, arrays = table.frame.copy(), dict(table.arrays)
    for column, other in zip(reader.columns(table), reader.columns(pool), strict=True):
        cells = [reader.cell(pool, other, int(replacement[row])) for row in rows]
        if column in arrays:
            changed = np.array(arrays[column])
            if cells:
                stacked = np.stack(cells)
                if stacked.shape[1:] != changed.shape[1:]:
                    raise InputError(
                        f"rows of {pool.name} have the shape {stacked.shape[1:]}, those of "
                        f"{table.name} {changed.shape[1:]}; give a noise_pool of the same shape"
                    )
                changed[rows] = stacked
            arrays[column] = changed
            continue
        frame[column] = _with_cells(frame[column], rows, cells)
    return dataclasses.replace(table, frame=frame, arrays=arrays, texts={})
