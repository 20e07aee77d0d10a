"""How well an audit finds wrong labels, beside cleanlab on the same features.

    python benchmarks/audit.py ../shared/data --out docs/results/audit.md

The folder holds the data sets of this project's grids. Noise is injected where labels are right;
`weak_*`, `hausa_newsclass`, `snow_rte_crowd` and `cifar10_features` have wrong ones of their own.
cleanlab gets out-of-sample probabilities of a logistic regression, as its documentation has it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from noiseproof import CrossEntropy, Job, audit
from noiseproof.metrics import detection
from noiseproof.preparation import Prepared, frozen_features

NOISY = {"label": "noisy_label", "clean_label": "label"}
RULES = {**NOISY, "drop_label": "-1"}
VECTORS = {"task": "features", "features": "x", "clean_label": "y", "sample": 10_000}
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("TREC-6, 2 % flipped", "trec6/train.csv", {"noise": "symmetric:0.02", "sample": 2000}),
    ("TREC-6, 20 % flipped", "trec6/train.csv", {"noise": "symmetric:0.2", "sample": 2000}),
    ("TREC-6, 40 % flipped", "trec6/train.csv", {"noise": "symmetric:0.4", "sample": 2000}),
    ("TREC-6, 40 % to one class", "trec6/train.csv", {"noise": "pairflip:0.4", "sample": 2000}),
    ("BANKING77, 20 % flipped", "banking77/train.csv", {"noise": "symmetric:0.2", "sample": 3000}),
    ("SST-2, 20 % flipped", "sst2/train.csv", {"noise": "symmetric:0.2", "sample": 3000}),
    ("weak_trec, rules", "weak_trec/train.csv", {**RULES, "sample": 3000}),
    ("weak_youtube, rules", "weak_youtube/train.csv", RULES),
    ("hausa_newsclass, rules", "hausa_newsclass/train.csv", NOISY),
    ("snow_rte_crowd, crowd", "snow_rte_crowd/train.csv", {**NOISY, "text": "text,text2"}),
    ("CIFAR-10N worst, crowd", "cifar10_features/cifar10_squeezenet_96.npz",
     {**VECTORS, "label": "worse"}),
    ("CIFAR-10N aggregate, crowd", "cifar10_features/cifar10_squeezenet_96.npz",
     {**VECTORS, "label": "aggre"}),
)  # fmt: skip
HEAD = (
    "Data", "Rows", "Wrong", "AUROC", "AP", "Precision", "Recall", "Planted", "Estimate",
    "s", "cleanlab AUROC", "AP", "Precision", "Recall", "s",
)  # fmt: skip


def with_cleanlab(source: str, settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """What ``find_label_issues`` finds on the same rows, and its seconds, features left out."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    prepared = Prepared(Job(source, method=CrossEntropy(tune="head"), **settings))
    features = frozen_features(prepared.model, prepared.encoded, prepared.job.train)
    began = time.process_time()
    labels = prepared.data.labels
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    chance = cross_val_predict(model, features, labels, cv=5, method="predict_proba")
    flagged = find_label_issues(labels, chance, n_jobs=1)
    quality = get_label_quality_scores(labels, chance)
    seconds = time.process_time() - began
    assert prepared.wrong is not None
    return detection(1 - quality, prepared.wrong, flagged=flagged), seconds


def row(name: str, source: str, settings: dict[str, Any]) -> list[str]:
    """One line of the table."""
    audit(source, **settings)  # encodes, so that the time below is that of the audit alone
    began = time.process_time()
    found = audit(source, **settings).summary
    seconds = time.process_time() - began
    peer, peer_seconds = with_cleanlab(source, settings)
    names = ("auroc", "ap", "precision", "recall")
    bounds = f"{found['planted_auroc']:.2f} to {found['planted_auroc_most']:.2f}"
    return [
        name, f"{found['rows']:,}", f"{found['noise_rate']:.1%}",
        *(f"{found[name]:.3f}" for name in names),
        bounds, f"{found['estimated_rate']:.1%}", f"{seconds:.1f}",
        *(f"{peer[name]:.3f}" for name in names), f"{peer_seconds:.1f}",
    ]  # fmt: skip


def main() -> None:
    """Audit every data set and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    np.random.seed(0)
    lines = ["| " + " | ".join(HEAD) + " |", "|---" + "|---:" * (len(HEAD) - 1) + "|"]
    for name, file, settings in CASES:
        lines.append("| " + " | ".join(row(name, str(asked.folder / file), settings)) + " |")
        print(lines[-1], flush=True)
    if asked.out is not None:
        asked.out.write_text(PAGE.format(table="\n".join(lines)), encoding="utf-8")


PAGE = """<!-- Written by benchmarks/audit.py; do not edit. -->
# Finding wrong labels without training

`noiseproof audit` at its default settings, and cleanlab's `find_label_issues` with a
cross-validated logistic regression, on the same frozen features (minilm; SqueezeNet for CIFAR-10N).
The scores never see the truth; it is used for the measures alone. Precision and recall are of the
rows that are called suspicious. *Planted* is what the audit says of itself: lower and upper bound
of the AUROC of finding labels that it flipped. *Estimate* is its upper bound of the share of wrong
labels. Seconds are of one core, without encoding; those of the audit include reading the data and
the second pass with planted errors.

{table}

One draw of the noise each, so no intervals. Errors by rules are where every audit fails: the
features tell what the rule says, and the planted errors, which are random, do not warn of it.
"""


if __name__ == "__main__":
    main()
