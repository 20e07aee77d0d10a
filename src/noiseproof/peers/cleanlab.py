"""cleanlab: CleanLearning on frozen features, and pruning before fine-tuning."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from noiseproof.encoding import Encoded
from noiseproof.method import Columns, require, require_count
from noiseproof.peers.contract import Fitted, Peer, Work
from noiseproof.peers.trainer import Trainer, TrainerLoRA

TINY = 1e-12  # the least probability of which a logarithm is taken


@dataclass(frozen=True)
class CleanlabProbe(Peer):
    """``cleanlab.CleanLearning`` around a logistic regression on frozen embeddings.

    The library's: cross-validation, which rows have a label issue, weights of the remaining rows,
    the refit on them, the quality of every label.
    Ours: mean-pooled embeddings of the frozen encoder, the iteration limit, ``seed``, and one
    process for the search (it changes the time alone). Suspicious rows are the library's issues,
    and rows are ranked by 1 - label quality.

    Attributes:
        folds: Folds of the cross-validation (the library's default).
        max_iter: Iterations of the logistic regression at most.
    """

    folds: int = 5
    max_iter: int = 1000

    needs: ClassVar[tuple[str, ...]] = ("cleanlab",)

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_folds(self.name, self.folds, self.max_iter)

    def fit(self, work: Work) -> Fitted:
        """Cross-validate, find issues, refit; there is one epoch."""
        from cleanlab.classification import CleanLearning

        started = time.perf_counter()
        classes, labels = np.unique(work.labels, return_inverse=True)
        learner = CleanLearning(
            _regression(self.max_iter),
            seed=work.seeds["order"],
            cv_n_folds=self.folds,
            find_label_issues_kwargs={"n_jobs": 1},
        )
        learner.fit(work.features(work.encoded), labels)
        seconds = time.perf_counter() - started
        issues = learner.get_label_issues()
        flagged = issues["is_label_issue"].to_numpy()
        columns = _quality_columns(issues["label_quality"].to_numpy(), ~flagged)

        def predict(encoded: Encoded) -> Tensor:
            probabilities = np.zeros((len(encoded), work.num_classes))
            probabilities[:, classes] = learner.predict_proba(work.features(encoded))
            return torch.from_numpy(np.log(probabilities.clip(TINY))).float()

        work.check_stop()
        kept = int((~flagged).sum())
        work.measure(predict, columns, last=True, steps=1, rows=kept, loss=None, learning_rate=None)
        regression = learner.clf
        return Fitted(
            predict,
            kind=type(regression).__name__,
            trained=regression.coef_.size + regression.intercept_.size,
            precision="fp32",
            seconds={"train_s": seconds, "score_s": 0.0},
            columns=columns,
            suspicious=flagged,
        )


@dataclass(frozen=True)
class CleanlabPrune(Peer):
    """Drop the rows that ``cleanlab.filter.find_label_issues`` names, fine-tune on the others.

    The library's: which rows have an issue, the quality of every label; the fine-tuning is that of
    `TrainerLoRA` or `Trainer`.
    Ours: the out-of-sample probabilities, by cross-validated logistic regression on mean-pooled
    embeddings of the frozen encoder, and one process for the search. Suspicious rows are the
    library's issues, and rows are ranked by 1 - label quality.

    Attributes:
        tune: ``lora`` or ``full``.
        folds: Folds of the cross-validation.
        max_iter: Iterations of the logistic regression at most.
        rank: Rank of the adapters.
        alpha: Scaling numerator; None is twice the rank.
        learning_rate: Peak rate; None is 2e-3 (lora) or 5e-5 (full). The job's
            ``train.learning_rate`` goes first.
    """

    tune: str = "lora"
    folds: int = 5
    max_iter: int = 1000
    rank: int = 8
    alpha: float | None = None
    learning_rate: float | None = None

    needs: ClassVar[tuple[str, ...]] = ("cleanlab",)

    def __post_init__(self) -> None:
        """Check the settings."""
        require(
            self.tune in ("lora", "full"),
            f"{self.name}.tune must be lora or full, got {self.tune!r}",
        )
        _check_folds(self.name, self.folds, self.max_iter)
        self.tuner()

    def tuner(self) -> Trainer | TrainerLoRA:
        """The peer that trains on the rows that are left."""
        given = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        if self.tune == "full":
            return Trainer(**given)
        return TrainerLoRA(self.rank, self.alpha, **given)

    def fit(self, work: Work) -> Fitted:
        """Score all rows once, then train on those without an issue."""
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
        from sklearn.model_selection import StratifiedKFold, cross_val_predict

        started = time.perf_counter()
        _, labels = np.unique(work.labels, return_inverse=True)
        folds = StratifiedKFold(self.folds, shuffle=True, random_state=work.seeds["order"])
        probabilities = cross_val_predict(
            _regression(self.max_iter),
            work.features(work.encoded),
            labels,
            cv=folds,
            method="predict_proba",
        )
        flagged = find_label_issues(labels, probabilities, n_jobs=1)
        quality = get_label_quality_scores(labels, probabilities)
        columns = _quality_columns(quality, ~flagged)
        seconds = time.perf_counter() - started
        work.check_stop()
        fitted = self.tuner().fit(work, columns)
        fitted.seconds["score_s"] = seconds
        fitted.suspicious = flagged
        return fitted


def _check_folds(name: str, folds: int, max_iter: int) -> None:
    require_count(name, "folds", folds, 1000, least=2)
    require_count(name, "max_iter", max_iter, 1_000_000)


def _regression(max_iter: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=max_iter)


def _quality_columns(quality: np.ndarray, keep: np.ndarray) -> Columns:
    """Columns of a label quality, the out-of-sample probability of the given label (N,)."""
    return {
        "loss": torch.from_numpy(-np.log(quality.clip(TINY))).float(),
        "clean_prob": torch.tensor(quality, dtype=torch.float32),  # pandas may lend it read-only
        "keep": torch.tensor(keep),
    }
