"""Make the labels of a table wrong on purpose, and say exactly how wrong they became."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from noiseproof.data import FOREIGN, read_labels, read_table, read_texts
from noiseproof.engine import TrainSettings, derive_seed
from noiseproof.errors import InputError
from noiseproof.models import load_text_classifier
from noiseproof.noise import Corruption, parse_noise
from noiseproof.preparation import frozen_features
from noiseproof.tasks import TextClassification

if TYPE_CHECKING:
    from noiseproof.tables import Source


def corrupt(
    data: Source,
    noise: str,
    *,
    label: str = "label",
    seed: int = 0,
    text: str = "text",
    clean_label: str = "clean_label",
    model: str = "minilm",
    noise_pool: str | None = None,
    split: str = "train",
) -> tuple[Any, Corruption]:
    """Corrupt the labels (or, with open-set noise, the texts) of a table.

    Args:
        data: Rows, read like training data.
        noise: Such as ``symmetric:0.4``; see `noiseproof.noise`.
        label: Column of the labels, taken as true.
        seed: Seed of the noise.
        text: Text column or columns; read by instance-dependent and open-set noise only.
        clean_label: New column that keeps the true labels. A row whose text was replaced has none:
            it gets `noiseproof.data.FOREIGN`.
        model: Encoder whose frozen features steer instance-dependent noise.
        noise_pool: File of foreign rows for open-set noise.
        split: Split of a hub data set.

    Returns:
        The table (a DataFrame) and what was done to it.

    Raises:
        InputError: The noise cannot be parsed, or the table does not fit it.
    """
    model_of_noise = parse_noise(noise)
    if model_of_noise is None:
        raise InputError("noise is 'none': nothing to do; give for example symmetric:0.4")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must lie in [0, 2^32), got {seed}")
    if model_of_noise.needs_pool and noise_pool is None:
        raise InputError(f"noise {noise!r} replaces texts; give noise_pool, a file of foreign rows")
    if not clean_label.strip():
        raise InputError("clean_label must name the column that keeps the true labels, got ''")
    table = read_table(data, split)
    if clean_label in table.columns:
        raise InputError(
            f"the data has a column {clean_label!r} already; name another one for the true labels"
        )
    labels, names = read_labels(data, label, split)
    columns = [text] if text in table.columns else [name.strip() for name in text.split(",")]
    features, pool = None, None
    if model_of_noise.needs_features or model_of_noise.needs_pool:
        if label in columns:
            raise InputError(f"column {label!r} cannot be both text and label; give another text")
        texts = read_texts(data, text, split)
    if model_of_noise.needs_features:
        features = _features(*texts, names, model)
    if model_of_noise.needs_pool and noise_pool is not None:
        pool = read_texts(noise_pool, text)
    corruption = model_of_noise.apply(
        labels,
        len(names),
        seed,
        features=features,
        pool_size=None if pool is None else len(pool[0]),
    )
    noisy = _relabelled(table[label], labels, corruption.labels, names)
    truth = table[label]
    if pool is not None:
        truth = _foreign(truth, corruption.extras["replacement"] >= 0)
    table = table.assign(**{clean_label: truth, label: noisy})
    if pool is not None:
        _replace(table, columns, corruption, pool)
    return table, corruption


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
    texts: Sequence[str], pairs: Sequence[str] | None, names: tuple[str, ...], model: str
) -> np.ndarray:
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(0, "head"))
        encoder, tokenizer = load_text_classifier(model, names)
    task = TextClassification(tokenizer)
    return frozen_features(encoder, task.encode(texts, pairs), TrainSettings())


def _replace(
    table: Any,
    columns: list[str],
    corruption: Corruption,
    pool: tuple[Sequence[str], Sequence[str] | None],
) -> None:
    replacement = corruption.extras["replacement"]
    rows = np.flatnonzero(replacement >= 0)
    for column, texts in zip(columns, pool, strict=False):
        if texts is not None:
            place = table.columns.get_loc(column)
            for row in rows:
                table.iat[int(row), place] = texts[replacement[row]]
