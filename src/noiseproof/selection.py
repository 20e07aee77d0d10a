"""Which rows to trust, beside the mixture: low scores, class balance, transition estimates."""

from __future__ import annotations

import torch
from torch import Tensor

from noiseproof.errors import InputError


def lowest(scores: Tensor, share: float) -> Tensor:
    """Mark the lowest share of the scores, at least one row.  (N,) -> (N,) bool.

    Of equal scores the first rows are taken.

    >>> lowest(torch.tensor([3.0, 1.0, 2.0, 0.5]), share=0.5).tolist()
    [False, True, False, True]
    """
    if not 0 < share <= 1:
        raise InputError(f"share must lie in (0, 1], got {share}; 1 keeps every row")
    kept = max(1, round(share * len(scores)))
    mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    mask[scores.argsort(stable=True)[:kept]] = True
    return mask


def finite_losses(losses: Tensor) -> Tensor:
    """Replace losses that are not finite by the largest that is.  (N,) -> (N,).

    >>> finite_losses(torch.tensor([1.0, float("nan"), 2.0, float("inf")])).tolist()
    [1.0, 2.0, 2.0, 2.0]
    """
    usable = torch.isfinite(losses)
    if bool(usable.all()) or not bool(usable.any()):
        return losses
    return torch.where(usable, losses, losses[usable].max())


def estimate_transition(
    probabilities: Tensor, labels: Tensor | None = None, percentile: float = 97.0
) -> Tensor:
    """Estimate T from anchor points.  (N, C), (N,) -> (C, C), row = true class, column = given.

    Patrini et al. 2017, eq. 13: row i is what a model trained on the given labels predicts at the
    row it finds most typical of class i. The percentile instead of the maximum makes it robust to
    outliers (as in their code). With `labels` it is taken among the rows given label i; without,
    among all rows, which misses the class once it holds less than 100 - percentile % of them. A
    class that is nowhere the most likely one, or has no rows, gets the identity row.

    >>> estimate_transition(torch.tensor([[0.8, 0.2], [0.4, 0.6]]), percentile=100)
    tensor([[0.8000, 0.2000],
            [0.4000, 0.6000]])
    """
    if not 0 <= percentile <= 100:
        raise InputError(f"percentile must lie in [0, 100], got {percentile}; 100 is the maximum")
    _check_probabilities(probabilities, labels)
    transition = torch.eye(probabilities.shape[1], device=probabilities.device)
    predicted = probabilities.argmax(dim=1)  # (N,)
    for i in range(len(transition)):
        rows = probabilities if labels is None else probabilities[labels == i]
        if len(rows) and bool((predicted == i).any()):
            place = round(percentile / 100 * (len(rows) - 1))
            transition[i] = rows[rows[:, i].argsort(stable=True)[place]].float()
    return transition / transition.sum(dim=1, keepdim=True)


def confident_class(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Estimate the true class of each row, or -1.  (N, C), (N,) -> (N,) int64.

    Northcutt et al. 2021, eq. 2 (confident learning): the likeliest of the classes whose
    probability reaches that class's mean self-confidence; -1 where none does. The probabilities
    must be out of sample; a model that has memorised the labels confirms them all.

    >>> probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.95, 0.05]])
    >>> confident_class(probabilities, torch.tensor([0, 0, 1, 1])).tolist()
    [0, -1, 1, 0]
    """
    _check_probabilities(probabilities, labels)
    labels = labels.long()
    scores = probabilities.double()
    own = scores.gather(1, labels[:, None]).squeeze(1)  # (N,) self-confidence
    count = torch.bincount(labels, minlength=scores.shape[1])
    threshold = (
        torch.bincount(labels, weights=own, minlength=len(count)) / count
    )  # (C,), empty: NaN
    reaches = scores >= threshold - 1e-6  # rounding must not exclude a class of equal confidences
    best, true = scores.where(reaches, -1.0).max(dim=1)  # (N,)
    return torch.where(best >= 0, true, -1)


def candidates(
    clean_prob: Tensor,
    losses: Tensor,
    labels: Tensor,
    threshold: float,
    min_class_fraction: float = 0.0,
) -> Tensor:
    """Mark the rows whose label looks right, and at least some of every class.  -> (N,) bool.

    TURN (Ahn et al. 2024) takes the rows above the threshold. The floor is ours: a class that keeps
    fewer than `min_class_fraction` of its rows (at least one) keeps that many of its best, by
    posterior, then loss, then row number. 0 sets no floor.

    >>> prob, loss = torch.tensor([0.9, 0.7, 0.5, 0.4]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    >>> candidates(prob, loss, torch.tensor([0, 0, 1, 1]), threshold=0.6).tolist()
    [True, True, False, False]
    >>> candidates(prob, loss, torch.tensor([0, 0, 1, 1]), 0.6, min_class_fraction=0.5).tolist()
    [True, True, True, False]
    """
    marked = clean_prob > threshold
    if not min_class_fraction:
        return marked
    sizes = torch.bincount(labels)  # (C,)
    floor = (min_class_fraction * sizes.double() - 1e-9).ceil().long().clamp_min(1)  # (C,)
    short = torch.bincount(labels[marked], minlength=len(sizes)) < floor
    order = best_first(clean_prob, losses)
    place = torch.empty_like(order)  # (N,) place of a row among those of its class
    place[order] = place_in_class(labels[order])
    return torch.where(short[labels], place < floor[labels], marked)


def spared_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of which a high loss proves nothing, and rows of classes that the model knows.

    Ours. A row is spared if its given label is predicted, or if its class is not known: the loss of
    a row whose class a model has not learned yet says nothing about its label. A class is known
    when its rows are predicted as labelled at least half as often as all rows.

    Args:
        logits: Scores of the rows (N, C).
        labels: Given labels (N,).

    Returns:
        Spared, and of a known class: (N,) and (N,), bool.

    >>> logits = torch.eye(2)[[0, 0, 1, 0, 0]]
    >>> spared_rows(logits, torch.tensor([0, 0, 0, 1, 1]))
    (tensor([ True,  True, False,  True,  True]), tensor([ True,  True,  True, False, False]))
    """
    agrees = logits.argmax(dim=1) == labels  # (N,)
    rows = torch.bincount(labels, minlength=logits.shape[1])  # (C,)
    right = torch.bincount(labels, weights=agrees.double(), minlength=logits.shape[1])
    known = (right >= rows * agrees.double().mean() / 2)[labels]
    return agrees | ~known, known


def borne_out(logits: Tensor, labels: Tensor, clean_prob: Tensor) -> tuple[float, float]:
    """Share of rows that a model contradicts, and how far the doubts of a mixture can be true.

    Ours. A mixture of two parts finds two parts, whether labels are wrong or rows merely hard. No
    more labels can be wrong than a model contradicts, but for those that it has memorised; their
    losses are low, and the mixture doubts them no longer either.

    Args:
        logits: Scores of the rows (N, C).
        labels: Given labels (N,).
        clean_prob: Probability that each label is right (N,).

    Returns:
        The share, and contradicted rows per doubted row, at most 1; 0 where no row is either.

    >>> logits, labels = torch.eye(2)[[0, 0, 1, 0]], torch.tensor([0, 0, 1, 1])
    >>> borne_out(logits, labels, torch.tensor([1.0, 0.5, 0.5, 0.0]))
    (0.25, 0.5)
    """
    contradicted = float((logits.argmax(dim=1) != labels).double().mean())
    doubted = float((1 - clean_prob.double()).mean())
    return contradicted, min(1.0, contradicted / max(doubted, 1e-12))


def trusted(clean_prob: Tensor, losses: Tensor, labels: Tensor, share: float) -> Tensor:
    """Trust at least this share of every class.  (N,), (N,), (N,) -> (N,) clean probabilities.

    Ours: rows of a small class are hard, hard rows have high losses, and one mixture over all rows
    calls the whole class wrong. In a class where fewer than `share` of the rows (at least one) look
    clean (above 1/2), that many of the best, as in `candidates`, get 1.

    >>> prob, loss = torch.tensor([1.0, 0.75, 0.25, 0.125]), torch.tensor([0.1, 0.2, 0.8, 0.9])
    >>> trusted(prob, loss, torch.tensor([0, 0, 1, 1]), share=0.5).tolist()
    [1.0, 0.75, 1.0, 0.125]
    """
    marked = candidates(clean_prob, losses, labels, 0.5, share)
    return torch.where(marked & (clean_prob <= 0.5), 1.0, clean_prob)


def best_first(clean_prob: Tensor, losses: Tensor) -> Tensor:
    """Order rows by falling posterior, then rising loss, then row number.  (N,), (N,) -> (N,).

    >>> best_first(torch.tensor([0.5, 0.9, 0.9]), torch.tensor([0.1, 0.3, 0.2])).tolist()
    [2, 1, 0]
    """
    order = losses.argsort(stable=True)
    return order[clean_prob[order].argsort(stable=True, descending=True)]


def place_in_class(classes: Tensor) -> Tensor:
    """Count for each entry how many before it have the same class.  (M,) -> (M,).

    >>> place_in_class(torch.tensor([1, 0, 1, 1, 0])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = classes.argsort(stable=True)
    counts = torch.bincount(classes)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(len(classes), device=classes.device) - starts[classes[order]]
    return place


def class_quota(
    counts: Tensor, balance: str = "min", ratio: float = 1.0, min_keep: float = 0.0
) -> Tensor:
    """How many of its candidates each class may keep.  (C,) -> (C,) int64.

    "min" caps every class at `ratio` times the smallest count (TURN: ratio 1), "none" caps nothing.
    "auto" (ours) is "min" unless that would keep less than a share `min_keep` of all candidates.
    Classes without a candidate are left out of the minimum.

    >>> class_quota(torch.tensor([5, 3, 8])).tolist()
    [3, 3, 3]
    >>> class_quota(torch.tensor([50, 50, 1]), balance="auto", min_keep=0.3).tolist()
    [50, 50, 1]
    """
    if balance not in ("auto", "min", "none"):
        raise InputError(f"balance must be auto, min or none, got {balance!r}")
    if balance == "none" or not bool(counts.any()):
        return counts
    quota = counts.clamp_max(int(ratio * int(counts[counts > 0].min())))
    starved = int(quota.sum()) < min_keep * int(counts.sum())
    return counts if balance == "auto" and starved else quota


def draw_per_class(marked: Tensor, labels: Tensor, quota: Tensor, order: Tensor) -> Tensor:
    """Keep the first marked rows of each class, in this order.  (N,), (N,), (C,), (N,) -> (N,).

    `order` holds every row number once; a random one draws without replacement.

    >>> marked, labels = torch.tensor([True, True, False, True]), torch.tensor([0, 0, 0, 1])
    >>> draw_per_class(marked, labels, torch.tensor([1, 1]), torch.tensor([3, 2, 1, 0])).tolist()
    [False, True, False, True]
    """
    rows = order[marked[order]]
    keep = torch.zeros_like(marked)
    keep[rows[place_in_class(labels[rows]) < quota[labels[rows]]]] = True
    return keep


def column_scales(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every column, 1 for a constant one.  (N, D) -> (D,), (D,).

    >>> column_scales(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    (tensor([2., 5.]), tensor([1., 1.]))
    """
    scale = features.std(dim=0, correction=0)
    return features.mean(dim=0), torch.where(scale > 0, scale, 1.0)


def held_out_scores(
    features: Tensor, labels: Tensor, num_classes: int, folds: int = 5, ridge: float = 1.0
) -> Tensor:
    """Score every class for rows not trained on.  (N, D), (N,) -> (N, C) float64.

    A ridge classifier (least squares on standardised features, penalty `ridge` times the rows) is
    trained on all folds but one and scores that one. Every fold has its share of each class. The
    cost is one product of D x N and N x D, and D^3 a fold.

    >>> labels = torch.arange(40) % 2
    >>> held_out_scores(labels[:, None] * 2.0, labels, num_classes=2)[:2].round(decimals=2).tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """
    columns = features.double()
    mean, scale = column_scales(columns)
    columns = (columns - mean) / scale  # (N, D)
    target = torch.nn.functional.one_hot(labels, num_classes).double()  # (N, C)
    fold = place_in_class(labels) % folds
    scores = torch.zeros_like(target)
    parts = [fold == number for number in range(folds)]
    grams = torch.stack([columns[part].T @ columns[part] for part in parts])  # (folds, D, D)
    sums = torch.stack([columns[part].T @ target[part] for part in parts])  # (folds, D, C)
    for part, own_gram, own_sum in zip(parts, grams, sums, strict=True):
        base = target[~part].mean(dim=0)  # (C,)
        gram = grams.sum(dim=0) - own_gram  # of the rows of the other folds
        gram.diagonal().add_(ridge * max(1, int((~part).sum())))
        wanted = sums.sum(dim=0) - own_sum - columns[~part].sum(dim=0)[:, None] * base
        scores[part] = columns[part] @ torch.linalg.solve(gram, wanted) + base
    return scores


def kappa(predicted: Tensor, labels: Tensor) -> float:
    """Cohen's kappa: 1 is agreement, 0 what chance gives.  (N,), (N,) -> scalar.

    >>> kappa(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    0.0
    """
    classes = 1 + int(torch.maximum(predicted.max(), labels.max()))
    agreement = float((predicted == labels).double().mean())
    shares = [torch.bincount(x, minlength=classes) / len(labels) for x in (predicted, labels)]
    chance = float(shares[0].double() @ shares[1].double())
    return (agreement - chance) / (1 - chance) if chance < 1 else 0.0


def _check_probabilities(probabilities: Tensor, labels: Tensor | None) -> None:
    """Refuse anything but (N, C) probabilities with labels (N,) in 0..C-1."""
    if probabilities.ndim != 2 or len(probabilities) == 0:
        shape = tuple(probabilities.shape)
        raise InputError(f"probabilities must have shape (N, C) with N >= 1, got {shape}")
    if labels is None:
        return
    classes = probabilities.shape[1]
    if labels.shape != (len(probabilities),):
        raise InputError(
            f"labels must have shape ({len(probabilities)},), got {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InputError(
            f"labels must lie in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}"
        )
