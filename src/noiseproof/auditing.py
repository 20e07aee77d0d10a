"""Which labels look wrong, why, and whether such errors can be seen at all. Nothing is trained.

    rows -> frozen features (N, D) -> two looks at every label, out of sample -> (N, C)
    -> loss of the given label -> mixture -> clean_prob -> verdict and reasons for every row
    -> the same once more with errors planted on purpose: how many of them would be found?

A finished run adds a third look: what its model says of its training rows.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noiseproof.data import Examples
from noiseproof.engine import TrainSettings, derive_seed
from noiseproof.errors import check_type, path_of
from noiseproof.evidence import (
    held_out_probabilities,
    loss_of_given,
    neighbour_labels,
    neighbour_probabilities,
)
from noiseproof.job import Job, check_names
from noiseproof.method import require
from noiseproof.methods import CrossEntropy
from noiseproof.metrics import detection
from noiseproof.mixture import LossMixture, fit_loss_mixture
from noiseproof.noise import Symmetric, estimate_transition_from_labels
from noiseproof.preparation import Prepared, frozen_features
from noiseproof.record import RunRecord
from noiseproof.selection import confident_class, kappa
from noiseproof.tables import Strings, read_table
from noiseproof.tasks import find_task

PLANTED_SHARE = 0.05  # labels that are flipped on purpose ...
LEAST_PLANTED = 40  # ... and how many at least, for a number that means something
GOOD, FAIR = 0.9, 0.75  # AUROC of finding them
LEAST_AGREEMENT = 0.05  # kappa of labels and features; below it features say nothing of labels
SURE = 0.5  # what a look must give another label to be a reason


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        table: A row for every training row, worst first (a DataFrame): ``row_id``, what shows the
            row, ``label``, ``suggested_label``, ``confidence`` of that, ``score`` (probability that
            the label is wrong), ``suspicious``, ``reasons``, and ``clean_label`` where known.
        summary: Numbers by name: ``rows``, ``classes``, ``suspicious``, ``estimated_rate`` of wrong
            labels (rather too high: hard rows count too), ``agreement`` (kappa of labels and what
            features say of rows not trained on), ``conflicts`` (rows whose like has another label),
            ``planted`` errors made on purpose and ``planted_auroc`` and ``planted_auroc_most`` of
            finding them, a lower and an upper bound; where the truth is known ``noise_rate``,
            ``auroc``, ``ap``, ``precision`` and ``recall``.
        verdict: What these numbers mean, in a sentence or two.
        transition: How true classes became given ones, where the truth is known (C, C): row = true
            class, column = given class.
    """

    table: Any
    summary: dict[str, Any]
    verdict: str
    transition: np.ndarray | None = None

    @property
    def suspects(self) -> Any:
        """The suspicious rows, worst first."""
        return self.table[self.table["suspicious"]]


@dataclass(frozen=True)
class Looks:
    """What features say of N labels.

    Attributes:
        probabilities: Mean of both looks (N, C).
        held_out: Of a classifier that was not trained on the row (N, C).
        near: Labels of the nearest rows (N, k).
        loss: Of the given label under ``probabilities`` (N,).
    """

    probabilities: Tensor
    held_out: Tensor
    near: Tensor
    loss: Tensor


def look(features: Tensor, labels: Tensor, num_classes: int, *, neighbours: int = 20) -> Looks:
    """Judge labels (N,) by features (N, D): a held-out classifier and the nearest other rows."""
    held_out = held_out_probabilities(features, labels, num_classes)
    near, cosine = neighbour_labels(features, labels, neighbours)
    both = (held_out + neighbour_probabilities(labels, near, cosine, num_classes)) / 2
    return Looks(both, held_out, near, loss_of_given(both, labels))


def planted_errors(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    noise_rate: float = 0.0,
    neighbours: int = 20,
    seed: int = 0,
) -> tuple[int, float | None, float | None]:
    """Flip some labels on purpose and measure how well the looks find them.

    It says nothing of errors that follow a rule: a rule is learned like a class. Labels that are
    wrong already count as right, so the AUROC is a lower bound; `corrected` for as many as there
    may be at most, it is an upper one.

    Args:
        features: (N, D).
        labels: Given labels (N,).
        num_classes: C.
        noise_rate: Share of labels that are wrong already, at most.
        neighbours: As for `look`.
        seed: Of the flips.

    Returns:
        How many were flipped, and the AUROC of the loss, at least and at most (None where it
        cannot be told).
    """
    share = min(0.5, max(PLANTED_SHARE, LEAST_PLANTED / len(labels)))
    own_seed = derive_seed(seed, "planted")  # no injected noise draws from it
    planted = Symmetric(share).apply(labels.numpy(), num_classes, own_seed)
    found = look(features, torch.from_numpy(planted.labels), num_classes, neighbours=neighbours)
    auroc = detection(found.loss.numpy(), planted.mask)["auroc"]
    most = corrected(auroc, noise_rate, num_classes)
    return (
        int(planted.mask.sum()),
        auroc,
        None if most is None or auroc is None else max(auroc, most),
    )


def corrected(auroc: float | None, noise_rate: float, num_classes: int) -> float | None:
    """The AUROC of wrong against right labels, from that of flipped against other labels.

    Of the other labels a share r is wrong already, and a wrong label that is flipped becomes right
    with 1 in C - 1. So flipped labels are wrong with w = 1 - r / (C - 1), the others with r, and
    pairs of two wrong or two right ones count one half. None where the two kinds hardly differ.

    >>> corrected(0.9, noise_rate=0.0, num_classes=3)
    0.9
    >>> corrected(0.5 * (0.75 * 0.25 * 2) + 0.75 * 0.75, noise_rate=0.25, num_classes=2)
    1.0
    """
    if auroc is None:
        return None
    wrong = 1 - noise_rate / (num_classes - 1)
    alike = (wrong * noise_rate + (1 - wrong) * (1 - noise_rate)) / 2
    apart, turned = wrong * (1 - noise_rate), (1 - wrong) * noise_rate
    if apart - turned < 0.1:
        return None
    return min(1.0, max(0.0, (auroc - alike - turned) / (apart - turned)))


def confidently_wrong(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Rows that stand beside the diagonal of the confident joint.  -> (N,) bool, their share.

    Confident learning (Northcutt et al. 2021): of the classes whose probability reaches the mean
    probability of their own rows, the likeliest is another than the given one. The share is that
    among the rows that have such a class, an estimate of the share of wrong labels.

    >>> probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.95, 0.05]])
    >>> doubted, share = confidently_wrong(probabilities, torch.tensor([0, 1, 1]))
    >>> doubted.tolist(), round(share, 4)
    ([False, False, True], 0.3333)
    """
    choice = confident_class(probabilities, labels)
    sure = choice >= 0
    doubted = sure & (choice != labels)
    return doubted, int(doubted.sum()) / max(1, int(sure.sum()))


def audit(source: Any, *, neighbours: int = 20, seed: int = 0, **settings: Any) -> Audit:
    """Find the rows of a table, or of a finished run, whose label looks wrong.

    Args:
        source: Rows as for `noiseproof.fit`, or the folder of a finished run, whose rows, labels
            and injected noise are taken again.
        neighbours: Nearest rows that are asked.
        seed: Of the errors that are planted.
        **settings: For rows: fields of `Job` such as ``label``, ``text``, ``model``, ``task``,
            ``clean_label``, ``noise``.

    Raises:
        InputError: The data or a setting is wrong, or the run is not finished.
    """
    check_type("neighbours", neighbours, int)
    check_type("seed", seed, int)
    require(neighbours >= 1, f"neighbours must be at least 1, got {neighbours}")
    require(0 <= seed < 2**32, f"seed must lie in [0, 2^32), got {seed}")
    folder = _run_folder(source)
    if folder is None:
        job = _job(source, settings)
    else:
        require(
            not settings,
            f"{folder} is a run, which has its own {', '.join(settings)}; leave this out",
        )
        job = _job_of_run(folder)
    require(
        not find_task(job.task).text_labels,
        f"audit judges labels that are classes; rows of task {job.task!r} have responses, whose "
        "doubtful ones a run of fit lists in suspects.csv",
    )
    prepared = Prepared(job)
    data = prepared.data
    features = torch.from_numpy(frozen_features(prepared.model, prepared.encoded, job.train))
    labels, classes = torch.from_numpy(data.labels), prepared.num_classes
    looks = look(features, labels, classes, neighbours=neighbours)
    with warnings.catch_warnings():  # a mixture that means nothing shows in the verdict
        warnings.simplefilter("ignore", RuntimeWarning)
        clean = fit_loss_mixture(looks.loss, labels, LossMixture()).clean_prob.double()
    doubted, share = confidently_wrong(looks.probabilities, labels)
    rate = min(float((1 - clean).mean()), share)
    planted, least, most = planted_errors(
        features, labels, classes, noise_rate=rate, neighbours=neighbours, seed=seed
    )
    conflicts = conflicting(data)
    said = None if folder is None else _said_by_run(folder, data)
    if said is not None:
        clean = (clean + torch.from_numpy(said["clean_prob"].to_numpy(float))) / 2
    table = _table(prepared, looks, clean, doubted, conflicts, said)
    summary: dict[str, Any] = {
        "rows": len(data),
        "classes": classes,
        "suspicious": int(table["suspicious"].sum()),
        "estimated_rate": rate,
        "agreement": kappa(looks.held_out.argmax(dim=1), labels),
        "conflicts": len(conflicts),
        "planted": planted,
        "planted_auroc": least,
        "planted_auroc_most": most,
    }
    if prepared.wrong is not None:
        score, flagged = 1 - clean.numpy(), table["suspicious"].sort_index().to_numpy()
        ties = looks.loss.double().numpy() * 1e-9  # rows of the same score, by their loss
        measured = detection(score + ties, prepared.wrong, flagged=flagged)
        summary |= {"noise_rate": float(prepared.wrong.mean()), **measured}
    transition = None
    if data.clean_labels is not None:
        known = data.clean_labels >= 0  # no class is right for a foreign row
        transition = estimate_transition_from_labels(
            data.clean_labels[known], data.labels[known], classes
        )
    return Audit(table.reset_index(drop=True), summary, verdict(summary), transition)


def verdict(summary: Mapping[str, Any]) -> str:
    """What the numbers of an audit mean, in words.

    >>> bounds = {"planted_auroc": 0.52, "planted_auroc_most": 0.55}
    >>> verdict({"planted": 50, "agreement": 0.2, **bounds})[:47]
    'Do not trust this list: of 50 labels flipped on'
    """
    planted, least, most = (
        summary[name] for name in ("planted", "planted_auroc", "planted_auroc_most")
    )
    rule = (
        "Errors that follow a rule, such as those of a labelling function, are learned like a "
        "class and stay unseen."
    )
    if least is None or most is None:
        return f"Whether errors can be seen could not be tested. {rule}"
    number = f"AUROC {least:.2f}" if most - least < 0.02 else f"AUROC {least:.2f} to {most:.2f}"
    if most < FAIR or summary["agreement"] < LEAST_AGREEMENT:
        return (
            f"Do not trust this list: of {planted} labels flipped on purpose it finds little more "
            f"than chance would ({number}; chance is 0.5). The features do not tell the classes "
            "apart, or too many labels are wrong; use another model, or more rows."
        )
    test = f"{planted} labels flipped on purpose are found with {number}"
    if least < GOOD:
        return f"A help, not a judge: {test}; look at every row. {rule}"
    return f"Random errors are seen well: {test}. {rule}"


def conflicting(data: Examples) -> dict[int, list[int]]:
    """Rows that stand in the data again with another label: row -> those other labels.

    >>> from noiseproof.data import Texts
    >>> data = Examples(["a", "b", "c"], Texts(["x", "x", "y"]), np.array([0, 1, 1]), None, "no")
    >>> conflicting(data)
    {0: [1], 1: [0]}
    """
    same: dict[tuple[str, ...], list[int]] = defaultdict(list)
    columns = list(data.inputs.shown().values())
    for row, shown in enumerate(zip(*columns, strict=True)):
        same[shown].append(row)
    found: dict[int, list[int]] = {}
    for rows in same.values():
        given = {int(data.labels[row]) for row in rows}
        if len(given) > 1:
            found |= {row: sorted(given - {int(data.labels[row])}) for row in rows}
    return dict(sorted(found.items()))


# --- parts ---------------------------------------------------------------------------------------


def _run_folder(source: Any) -> Path | None:
    if not isinstance(source, str | Path):
        return None
    folder = path_of(source)
    return folder if (folder / "record.json").is_file() else None


def _job(source: Any, settings: dict[str, Any]) -> Job:
    check_names("audit", settings)
    return Job(source, method=CrossEntropy(tune="head"), **settings)


def _job_of_run(folder: Path) -> Job:
    """The job of a finished run, to read its rows again; test rows are left alone."""
    record = RunRecord.read(folder)
    require(
        record.status == "done",
        f"the run in {folder} is {record.status}; finish it with --resume",
    )
    spec = dict(record.spec)
    require(
        not str(spec["data"]).startswith("<"),
        f"the run in {folder} was made from an object in Python; give the rows themselves",
    )
    known = {item.name for item in dataclasses.fields(Job)} - {"method", "train", "test_ood"}
    values = {name: value for name, value in spec.items() if name in known}
    train = TrainSettings(**spec["train"])
    return Job(**values | {"merge": False}, method=CrossEntropy(tune="head"), train=train)


def _said_by_run(folder: Path, data: Examples) -> Any:
    """What the model of a run said of its training rows; they must be these."""
    path = folder / "samples.parquet"
    require(path.exists(), f"{path} is missing; the run is not whole")
    said = read_table(path)
    require(
        len(said) == len(data) and list(map(str, said["row_id"])) == list(data.row_ids),
        f"the data of the run in {folder} have changed since: {len(said)} rows then, {len(data)} "
        "now, or other ids; audit the table itself",
    )
    return said


def _table(
    prepared: Prepared,
    looks: Looks,
    clean: Tensor,
    doubted: Tensor,
    conflicts: dict[int, list[int]],
    said: Any,
) -> Any:
    """One row per training row, worst first, numbered as in the data."""
    import pandas as pd

    data = prepared.data
    labels = prepared.task.measures.labels(data)
    names = list(data.label_names)
    confidence, suggested = looks.probabilities.max(dim=1)
    score = (1 - clean).numpy()
    suspicious = (clean < 0.5) & doubted & (suggested != torch.from_numpy(data.labels))
    table: dict[str, Any] = {
        "row_id": list(Strings.of(data.row_ids)),
        **{name: list(Strings.of(column)) for name, column in data.inputs.shown().items()},
        "label": labels.pop("label"),
        "suggested_label": pd.Categorical.from_codes(suggested.numpy(), names),
        "confidence": confidence.float().numpy(),
        "score": score,
        "suspicious": suspicious.numpy(),
        "reasons": _reasons(data, looks, conflicts, said),
        **labels,  # the true ones, where they are known
    }
    order = np.lexsort((-looks.loss.numpy(), -score, ~suspicious.numpy()))
    return pd.DataFrame(table).iloc[order]


def _reasons(
    data: Examples, looks: Looks, conflicts: dict[int, list[int]], said: Any
) -> Sequence[str]:
    """Why a label is doubted, row by row; empty where nothing speaks against it."""
    names, labels = data.label_names, torch.from_numpy(data.labels)
    chance, choice = looks.held_out.max(dim=1)
    counts = torch.zeros(len(labels), len(names), dtype=torch.int64)
    counts.scatter_add_(1, looks.near, torch.ones_like(looks.near))
    most, common = counts.max(dim=1)
    asked = looks.near.shape[1]
    found: list[list[str]] = [[] for _ in range(len(labels))]
    for row in ((choice != labels) & (chance >= SURE)).nonzero().flatten().tolist():
        found[row].append(f"looks like {names[choice[row]]} ({chance[row]:.0%})")
    for row in ((common != labels) & (most > SURE * asked)).nonzero().flatten().tolist():
        found[row].append(f"{most[row]} of {asked} nearest rows are {names[common[row]]}")
    for row, others in conflicts.items():
        found[row].append(f"stands here again as {', '.join(names[other] for other in others)}")
    if said is not None:
        suggested, sure = said["suggested_label"].astype(str), said["confidence"].to_numpy()
        for row, (name, part) in enumerate(zip(suggested, sure, strict=True)):
            if name != names[data.labels[row]] and part >= SURE:
                found[row].append(f"the fine-tuned model says {name} ({part:.0%})")
    return ["; ".join(reasons) for reasons in found]
