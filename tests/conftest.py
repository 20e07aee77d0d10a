"""Fixtures of all tests: tiny models from our own words, own caches, no network, one thread."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

# Set before torch, tokenizers or huggingface_hub are imported, and inherited by subprocesses.
CACHE = tempfile.mkdtemp(prefix="noiseproof-tests-")
os.environ["NOISEPROOF_CACHE"] = CACHE
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from noiseproof.loop import Outcome  # noqa: E402
from noiseproof.method import Method  # noqa: E402
from tiny import Tiny, build_model, table, tiny  # noqa: E402

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_unconfigure() -> None:
    """Remove what the session cached."""
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the public data sets and models beside the checkout, where there is one."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent; it holds the public data that this test reads")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer BERT with its tokenizer, for ``model=<folder>``."""
    folder = build_model(tmp_path_factory.mktemp("tiny") / "bert")
    gc.freeze()  # accelerate collects garbage after every stage: spare it the imported libraries
    return folder


@pytest.fixture(scope="session")
def tiny_table() -> pd.DataFrame:
    """25 learnable rows, a fifth of them with a wrong label: batches of 8 leave one row over."""
    return table(25, wrong=0.2)


@pytest.fixture(scope="session")
def tiny_run(tiny_model: Path, tiny_table: pd.DataFrame) -> Tiny:
    """The loaded model with the encoded rows of `tiny_table`; `Tiny.fit` trains a copy."""
    return tiny(tiny_model, tiny_table)


FitCache: TypeAlias = Callable[[Method], Outcome]


@pytest.fixture(scope="session")
def tiny_fits(tiny_run: Tiny) -> FitCache:
    """`Tiny.fit` at its defaults, each method once for all tests; do not change the outcome."""
    made: dict[Method, Outcome] = {}

    def fit(method: Method) -> Outcome:
        if method not in made:
            made[method] = tiny_run.fit(method)
        return made[method]

    return fit


@pytest.fixture(autouse=True)
def _random_state() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
