"""noiseproof: fine-tune pre-trained models on labels you cannot trust.

Public names are listed here; importing the package imports neither torch nor transformers. Reports
and studies are packages of their own: `noiseproof.report.report`, `noiseproof.study`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "fit": "finetune",
    "predict": "prediction",
    "load": "prediction",
    "corrupt": "corruption",
    "relabel": "relabelling",
    "audit": "auditing",
    "Audit": "auditing",
    "Job": "job",
    "FitResult": "finetune",
    "Predictor": "prediction",
    "TrainSettings": "engine",
    "RunRecord": "record",
    "InputError": "errors",
    "Interrupted": "checkpoint",
    "Method": "method",
    "Stage": "method",
    "Batch": "method",
    "Run": "method",
    "Columns": "method",
    "METHODS": "methods",
    "LossMixture": "mixture",
    "fit_loss_mixture": "mixture",
    "parse_noise": "noise",
    "read_grid": "grid",
    "run_grid": "benchmark",
    "run_peer": "peers",
    "read_examples": "data",
    "CleaR": "methods",
    "TURN": "methods",
    "LoPE": "methods",
    "NMTune": "methods",
    "CrossEntropy": "methods",
    "LabelSmoothing": "methods",
    "GCE": "methods",
    "SCE": "methods",
    "Bootstrapping": "methods",
    "ForwardCorrection": "methods",
    "ELR": "methods",
    "CoTeaching": "methods",
    "SmallLoss": "methods",
    "NMTuneClassifier": "estimators",
    "RobustProbeClassifier": "estimators",
}

__all__ = ["__version__", *_PLACES]

if TYPE_CHECKING:
    from noiseproof.auditing import Audit, audit
    from noiseproof.benchmark import run_grid
    from noiseproof.checkpoint import Interrupted
    from noiseproof.corruption import corrupt
    from noiseproof.data import read_examples
    from noiseproof.engine import TrainSettings
    from noiseproof.errors import InputError
    from noiseproof.estimators import NMTuneClassifier, RobustProbeClassifier
    from noiseproof.finetune import FitResult, fit
    from noiseproof.grid import read_grid
    from noiseproof.job import Job
    from noiseproof.method import Batch, Columns, Method, Run, Stage
    from noiseproof.methods import (
        ELR,
        GCE,
        METHODS,
        SCE,
        TURN,
        Bootstrapping,
        CleaR,
        CoTeaching,
        CrossEntropy,
        ForwardCorrection,
        LabelSmoothing,
        LoPE,
        NMTune,
        SmallLoss,
    )
    from noiseproof.mixture import LossMixture, fit_loss_mixture
    from noiseproof.noise import parse_noise
    from noiseproof.peers import run_peer
    from noiseproof.prediction import Predictor, load, predict
    from noiseproof.record import RunRecord
    from noiseproof.relabelling import relabel


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _PLACES:
        raise AttributeError(f"module 'noiseproof' has no attribute {name!r}")
    return getattr(import_module(f"noiseproof.{_PLACES[name]}"), name)
