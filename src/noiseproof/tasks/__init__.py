"""The kinds of rows, by name. A new one costs a file and an entry here."""

from __future__ import annotations

from noiseproof.encoding import Encoded, EncodedFeatures, cache_folder
from noiseproof.errors import InputError, unknown_name
from noiseproof.tasks.base import LabelColumns, RowSettings, Task
from noiseproof.tasks.causal import CausalLM, EncodedDialogues
from noiseproof.tasks.features import FeatureClassification
from noiseproof.tasks.images import ImageClassification
from noiseproof.tasks.text import EncodedTexts, TextClassification

__all__ = [
    "TASKS",
    "CausalLM",
    "Encoded",
    "EncodedDialogues",
    "EncodedFeatures",
    "EncodedTexts",
    "FeatureClassification",
    "ImageClassification",
    "LabelColumns",
    "RowSettings",
    "Task",
    "TextClassification",
    "cache_folder",
    "find_task",
]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (TextClassification, FeatureClassification, ImageClassification, CausalLM)
}


def find_task(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        InputError: Unknown name; gives the nearest and all names.
    """
    if name not in TASKS:
        raise InputError(unknown_name("task", name, TASKS))
    return TASKS[name]
