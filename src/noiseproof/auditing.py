"""Which labels look wrong, why, and whether such errors can be seen at all. Nothing is trained.

    rows -> frozen features (N, D) -> two looks at every label, out of sample -> (N, C)
    -> loss of the given label -> mixture -> clean_prob -> verdict and reasons for every row
    -> the same once more with errors planted on purpose: how many of them would be found?

Where labels are responses, a language model takes the two looks, and the mixture is on what lies
between them:

    prompts and responses -> loss after the own prompt, loss after an empty one -> (N,), (N,)

A finished run adds a third look: what its model says of its training rows.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

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
from noiseproof.noise import Swap, Symmetric, estimate_transition_from_labels
from noiseproof.prediction import predict_logits
from noiseproof.preparation import Prepared, frozen_features
from noiseproof.record import RunRecord
from noiseproof.selection import confident_class, kappa
from noiseproof.tables import Strings, read_table
from noiseproof.tasks import CausalLM, EncodedDialogues, find_task
from noiseproof.tasks.dialogues import Dialogues
from noiseproof.tokens import losses_of_statistics

PLANTED_SHARE = 0.05  # labels that are flipped on purpose ...
LEAST_PLANTED = 40  # ... and how many at least, for a number that means something
GOOD, FAIR = 0.9, 0.75  # AUROC of finding them
LEAST_AGREEMENT = 0.05  # kappa of labels and features; below it features say nothing of labels
SURE = 0.5  # what a look must give another label to be a reason
UNSEEN_SHARE = 0.1  # of the exchanged responses that look more right than any that is doubted
MIXTURE = LossMixture(min_gap=0.0)  # prompts may help by little; the planted errors are the guard
NEIGHBOURS = 20
MOST_TOLD, LONGEST_TOLD = 3, 60  # other responses in a reason, and characters of each


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        table: A row for every training row, worst first (a DataFrame): ``row_id``, what shows the
            row, ``label``, ``suggested_label``, ``confidence`` of that, ``score`` (probability that
            the label is wrong), ``suspicious``, ``reasons``, and ``clean_label`` where known. Where
            labels are responses nothing is suggested; there are ``loss`` after the own prompt and
            ``loss_alone`` after an empty one, both per token.
        summary: Numbers by name: ``rows``, ``classes``, ``suspicious``, ``estimated_rate`` of wrong
            labels (rather too high: hard rows count too), ``agreement`` (kappa of labels and what
            features say of rows not trained on), ``conflicts`` (rows whose like has another label),
            ``planted`` errors made on purpose and ``planted_auroc`` and ``planted_auroc_most`` of
            finding them, a lower and an upper bound; where the truth is known ``noise_rate``,
            ``auroc``, ``ap``, ``precision`` and ``recall``. For responses ``prompt_gain`` stands in
            the place of ``classes`` and ``agreement``: by how many nats a token prompts make them
            likelier, in the median; and ``estimated_rate`` is rather too low.
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


@dataclass(frozen=True)
class ResponseLooks:
    """What a language model that was not trained on them says of N responses.

    Attributes:
        loss: Per token after the own prompt (N,).
        loss_alone: Of the same tokens after an empty prompt (N,).
        seen: Whether any token of the response was read (N,) bool; the prompt may have taken all
            the room.
    """

    loss: Tensor
    loss_alone: Tensor
    seen: Tensor

    @property
    def excess(self) -> Tensor:
        """How little the prompt helps, in nats a token (N,); below 0 it makes tokens likelier.

        Li et al., "From Quantity to Quality" (NAACL 2024, arXiv:2308.12032), take the ratio of
        the same two losses; their difference is the logarithm of the ratio of the perplexities.
        """
        return self.loss - self.loss_alone


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


def look_at_responses(
    model: nn.Module,
    task: CausalLM,
    rows: Dialogues,
    encoded: EncodedDialogues,
    settings: TrainSettings,
) -> ResponseLooks:
    """Let a language model read every response twice: after its prompt, and after an empty one."""
    after, alone = (
        predict_logits(model, some, settings)  # (N, 3)
        for some in (encoded, task.encode_alone(rows, encoded))
    )
    return ResponseLooks(
        losses_of_statistics(after), losses_of_statistics(alone), seen=after[:, 1] > 0
    )


def exchanged(
    model: nn.Module,
    task: CausalLM,
    rows: Dialogues,
    looks: ResponseLooks,
    settings: TrainSettings,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Exchange some responses on purpose and look at those rows again.

    Args:
        model: The language model.
        task: Of the rows.
        rows: N prompts with responses.
        looks: At these rows as they are.
        settings: Device and precision.
        seed: Of the exchange.

    Returns:
        Which rows have another response now (N,) bool, and the excess of these rows (P,).
    """
    seen = looks.seen.nonzero().flatten()
    responses = [(response,) for response in rows.take(seen.numpy()).responses or ()]
    share = min(0.5, max(PLANTED_SHARE, LEAST_PLANTED / max(1, len(seen))))
    own_seed = derive_seed(seed, "planted")  # no injected noise draws from it
    planted = Swap(share).apply(np.zeros(len(seen), dtype=np.int64), 1, own_seed, texts=responses)
    places = seen[torch.from_numpy(planted.extras["swapped"])]
    chosen = torch.zeros_like(looks.seen)
    chosen[places] = True
    if not len(places):
        return chosen, torch.zeros(0)
    new = planted.extras["responses"][planted.extras["swapped"]].tolist()
    wrong = rows.take(places.numpy()).with_responses(new)
    return chosen, look_at_responses(model, task, wrong, task.encode(wrong), settings).excess


def clean_responses(excess: Tensor, planted: Tensor) -> tuple[Tensor, Tensor] | None:
    """How likely responses are right, by how little their prompts help.

    The mixture is on the rows and the planted errors together: without errors to find it would
    split right rows. Below nearly all of the planted errors no row is doubted.

    Args:
        excess: See `ResponseLooks.excess` (N,).
        planted: That of responses that were exchanged on purpose (P,).

    Returns:
        The probability (N,) and which rows are doubted (N,) bool; None where the mixture finds no
        two kinds of rows.

    >>> excess = torch.cat([torch.arange(30) / 100 - 2, torch.tensor([0.0, 0.1])])
    >>> clean, doubted = clean_responses(excess, torch.tensor([-0.1, 0.0, 0.2, 0.3]))
    >>> doubted.nonzero().flatten().tolist(), clean.round().int().tolist()[28:]
    ([30, 31], [1, 1, 0, 0])
    """
    with warnings.catch_warnings():  # a mixture that means nothing shows in the verdict
        warnings.simplefilter("ignore", RuntimeWarning)
        fit = fit_loss_mixture(torch.cat([excess, planted]), None, MIXTURE)
    if fit.fallback != [None]:
        return None
    clean = fit.clean_prob[: len(excess)].double()
    least = planted.quantile(UNSEEN_SHARE) if len(planted) else excess.min()
    return clean, (clean < 0.5) & (excess >= least)


def audit(source: Any, *, neighbours: int = NEIGHBOURS, seed: int = 0, **settings: Any) -> Audit:
    """Find the rows of a table, or of a finished run, whose label looks wrong.

    Args:
        source: Rows as for `noiseproof.fit`, or the folder of a finished run, whose rows, labels
            and injected noise are taken again.
        neighbours: Nearest rows that are asked; rows with responses have none.
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
    responses = find_task(job.task).text_labels
    require(
        not responses or neighbours == NEIGHBOURS,
        f"neighbours is for labels that are classes, and rows of task {job.task!r} have responses; "
        "leave neighbours out",
    )
    prepared = Prepared(job)
    said = None if folder is None else _said_by_run(folder, prepared.data)
    if responses:
        return _audit_responses(prepared, said, seed)
    return _audit_classes(prepared, said, neighbours, seed)


def verdict(summary: Mapping[str, Any]) -> str:
    """What the numbers of an audit mean, in words; without ``agreement``, those of responses.

    >>> bounds = {"planted_auroc": 0.52, "planted_auroc_most": 0.55}
    >>> verdict({"planted": 50, "agreement": 0.2, **bounds})[:47]
    'Do not trust this list: of 50 labels flipped on'
    >>> verdict({"planted": 50, **bounds})[:51]
    'Do not trust this list: of 50 responses exchanged o'
    """
    planted, least, most = (
        summary[name] for name in ("planted", "planted_auroc", "planted_auroc_most")
    )
    words = OF_CLASSES if "agreement" in summary else OF_RESPONSES
    if least is None or most is None:
        return f"Whether errors can be seen could not be tested. {words.unseen}"
    number = f"AUROC {least:.2f}" if most - least < 0.02 else f"AUROC {least:.2f} to {most:.2f}"
    if most < FAIR or summary.get("agreement", 1) < LEAST_AGREEMENT:
        return (
            f"Do not trust this list: of {planted} {words.planted} it finds little more than "
            f"chance would ({number}; chance is 0.5). {words.blind}"
        )
    test = f"{planted} {words.planted} are found with {number}"
    if least < GOOD:
        return f"A help, not a judge: {test}; look at every row. {words.unseen}"
    return f"Random errors are seen well: {test}. {words.unseen}"


class Words(NamedTuple):
    """What a verdict says of labels of one kind: planted errors, those unseen, why none is seen."""

    planted: str
    unseen: str
    blind: str


OF_CLASSES = Words(
    "labels flipped on purpose",
    "Errors that follow a rule, such as those of a labelling function, are learned like a class "
    "and stay unseen.",
    "The features do not tell the classes apart, or too many labels are wrong; use another model, "
    "or more rows.",
)
OF_RESPONSES = Words(
    "responses exchanged on purpose",
    "Wrong responses that fit their prompts, such as a plausible wrong answer, stay unseen.",
    "To the model as it was before fine-tuning, prompts say nothing of their responses, or too "
    "many are wrong; use a model that knows more.",
)


def conflicting(data: Examples) -> dict[int, list[int]]:
    """Rows that stand in the data again with another label: row -> those other labels.

    >>> from noiseproof.data import Texts
    >>> data = Examples(["a", "b", "c"], Texts(["x", "x", "y"]), np.array([0, 1, 1]), None, "no")
    >>> conflicting(data)
    {0: [1], 1: [0]}
    """
    return _conflicts(zip(*data.inputs.shown().values(), strict=True), data.labels.tolist())


def conflicting_responses(rows: Dialogues) -> dict[int, list[str]]:
    """Rows whose prompt stands in the data again with another response: row -> those responses.

    >>> conflicting_responses(Dialogues(["a", "a", "b"], ["yes", "no", "no"]))
    {0: ['no'], 1: ['yes']}
    """
    return _conflicts(rows.prompts, list(rows.responses or ()))


# --- parts ---------------------------------------------------------------------------------------


def _audit_classes(prepared: Prepared, said: Any, neighbours: int, seed: int) -> Audit:
    """Judge labels that are classes; ``said`` is the sample table of a run, or None."""
    data = prepared.data
    settings = prepared.job.train
    features = torch.from_numpy(frozen_features(prepared.model, prepared.encoded, settings))
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
    summary |= _measured(prepared, clean, looks.loss, table)
    transition = None
    if data.clean_labels is not None:
        known = data.clean_labels >= 0  # no class is right for a foreign row
        transition = estimate_transition_from_labels(
            data.clean_labels[known], data.labels[known], classes
        )
    return Audit(table.reset_index(drop=True), summary, verdict(summary), transition)


def _audit_responses(prepared: Prepared, said: Any, seed: int) -> Audit:
    """Judge labels that are responses; ``said`` is the sample table of a run, or None."""
    task, rows, settings = prepared.task, prepared.data.inputs, prepared.job.train
    assert isinstance(task, CausalLM)
    assert isinstance(rows, Dialogues)
    assert isinstance(prepared.encoded, EncodedDialogues)
    looks = look_at_responses(prepared.model, task, rows, prepared.encoded, settings)
    seen = looks.seen
    chosen, wrong = exchanged(prepared.model, task, rows, looks, settings, seed)
    found = clean_responses(looks.excess[seen], wrong) if bool(seen.any()) else None
    clean, doubted = torch.ones(len(rows), dtype=torch.float64), torch.zeros_like(seen)
    rate = 0.0
    if found is not None:
        clean[seen], doubted[seen] = found
        rate = min(float((1 - found[0]).mean()), float(found[1].double().mean()))
    excess = looks.excess.masked_scatter(chosen, wrong)
    auroc = detection(excess[seen].numpy(), chosen[seen].numpy())["auroc"]
    most = corrected(auroc, rate, len(set(rows.responses or ())))
    suspicious = doubted
    if said is not None:  # a model that does not even find planted errors is not asked
        own = torch.from_numpy(said["clean_prob"].to_numpy(float))
        asked = seen if found is not None and (most or 0) >= FAIR else torch.zeros_like(seen)
        clean = torch.where(asked, (clean + own) / 2, own)
        suspicious = clean < 0.5
    conflicts = conflicting_responses(rows)
    reasons = _reasons_of_responses(looks, doubted, conflicts, said)
    table = _table_of_responses(prepared, looks, clean, suspicious, reasons)
    gain = -looks.excess[seen]
    summary: dict[str, Any] = {
        "rows": len(rows),
        "suspicious": int(suspicious.sum()),
        "estimated_rate": rate,
        "prompt_gain": float(gain.median()) if len(gain) else None,
        "conflicts": len(conflicts),
        "planted": int(chosen.sum()),
        "planted_auroc": auroc,
        "planted_auroc_most": None if most is None or auroc is None else max(auroc, most),
    }
    summary |= _measured(prepared, clean, looks.excess, table)
    return Audit(table.reset_index(drop=True), summary, verdict(summary))


def _measured(prepared: Prepared, clean: Tensor, loss: Tensor, table: Any) -> dict[str, Any]:
    """How well the wrong rows were found, where they are known; the loss (N,) breaks ties."""
    if prepared.wrong is None:
        return {}
    score, flagged = 1 - clean.numpy(), table["suspicious"].sort_index().to_numpy()
    measured = detection(score + loss.double().numpy() * 1e-9, prepared.wrong, flagged=flagged)
    return {"noise_rate": float(prepared.wrong.mean()), **measured}


def _conflicts(keys: Iterable[Hashable], given: Sequence[Any]) -> dict[int, list[Any]]:
    """Rows (N,) of one key that were given different things: row -> those of the others."""
    same: dict[Hashable, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        same[key].append(row)
    found: dict[int, list[Any]] = {}
    for rows in same.values():
        all_given = {given[row] for row in rows}
        if len(all_given) > 1:
            found |= {row: sorted(all_given - {given[row]}) for row in rows}
    return dict(sorted(found.items()))


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


def _table_of_responses(
    prepared: Prepared,
    looks: ResponseLooks,
    clean: Tensor,
    suspicious: Tensor,
    reasons: Sequence[str],
) -> Any:
    """One row per training row, worst first, numbered as in the data."""
    import pandas as pd

    data = prepared.data
    labels = prepared.task.measures.labels(data)
    shown = {name: column for name, column in data.inputs.shown().items() if name != "response"}
    score = (1 - clean).numpy()
    table: dict[str, Any] = {
        "row_id": list(Strings.of(data.row_ids)),
        **{name: list(Strings.of(column)) for name, column in shown.items()},
        "label": labels.pop("label"),
        "score": score,
        "suspicious": suspicious.numpy(),
        "reasons": reasons,
        "loss": looks.loss.numpy(),
        "loss_alone": looks.loss_alone.numpy(),
        **labels,  # the true ones, where they are known
    }
    order = np.lexsort((-looks.excess.numpy(), -score, ~suspicious.numpy()))
    return pd.DataFrame(table).iloc[order]


def _reasons_of_responses(
    looks: ResponseLooks, doubted: Tensor, conflicts: dict[int, list[str]], said: Any
) -> Sequence[str]:
    """Why a response is doubted, row by row; empty where nothing speaks against it."""
    gain, seen = -looks.excess, looks.seen
    usual = float(gain[seen].median()) if bool(seen.any()) else 0.0
    found: list[list[str]] = [[] for _ in range(len(seen))]
    for row in ((doubted | (gain <= 0)) & seen).nonzero().flatten().tolist():
        how = "does not make it likelier" if gain[row] <= 0 else "hardly makes it likelier"
        found[row].append(f"the prompt {how} ({gain[row]:+.2f} nats a token; median {usual:+.2f})")
    for row in (~seen).nonzero().flatten().tolist():
        found[row].append("not judged: its prompt leaves no room for the response")
    for row, others in conflicts.items():
        told = ", ".join(repr(_brief(other)) for other in others[:MOST_TOLD])
        more = f" and {len(others) - MOST_TOLD} more" if len(others) > MOST_TOLD else ""
        found[row].append(f"its prompt stands here again with {told}{more}")
    if said is not None:
        for row in np.flatnonzero(said["clean_prob"].to_numpy(float) < 0.5).tolist():
            loss = float(said["loss"].iloc[row])
            found[row].append(f"the fine-tuned model finds it unlikely (loss {loss:.2f})")
    return ["; ".join(reasons) for reasons in found]


def _brief(text: str) -> str:
    """A text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_TOLD else line[: LONGEST_TOLD - 3] + "..."
