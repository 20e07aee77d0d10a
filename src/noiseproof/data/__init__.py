"""Examples with given labels: from any table to inputs, class numbers and row ids.

What the inputs are is up to a task, see `Inputs` and `Reader`; texts are at home here.

`labels` are the given, possibly wrong labels; `clean_labels` exist where the truth is known and are
for metrics and reports alone. Every complaint names the file, the row and what to do.
"""

from __future__ import annotations

from noiseproof.data.examples import (
    Examples,
    Inputs,
    Reader,
    TextColumns,
    Texts,
    content_of,
    read_examples,
    read_inputs,
    read_row_ids,
    read_texts,
)
from noiseproof.data.labels import (
    FOREIGN,
    UNSEEN,
    Ints,
    check_classes,
    read_label_names,
    read_labels,
)
from noiseproof.data.splits import stratified_sample, stratified_split
from noiseproof.tables import read_table, write_table

__all__ = [
    "FOREIGN",
    "UNSEEN",
    "Examples",
    "Inputs",
    "Ints",
    "Reader",
    "TextColumns",
    "Texts",
    "check_classes",
    "content_of",
    "read_examples",
    "read_inputs",
    "read_label_names",
    "read_labels",
    "read_row_ids",
    "read_table",
    "read_texts",
    "stratified_sample",
    "stratified_split",
    "write_table",
]
