"""What features say about labels: out-of-sample probabilities, and labels of neighbours.

features (N, D), labels (N,) -> `held_out_probabilities`, `neighbour_labels` -> probabilities (N, C)

Pure functions on tensors; nothing here trains on the row that it judges. The choices are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from noiseproof.errors import InputError
from noiseproof.selection import column_scales, held_out_scores

MOST_SEARCHED = 50_000  # rows among which neighbours are looked for
BLOCK = 1024  # rows whose neighbours are looked for at a time
TEMPERATURES = torch.logspace(-2.5, 0.5, 61, dtype=torch.float64)


def held_out_probabilities(
    features: Tensor, labels: Tensor, num_classes: int, folds: int = 5
) -> Tensor:
    """Class probabilities of rows not trained on.  (N, D), (N,) -> (N, C) float64.

    The softmax of `held_out_scores`, with the temperature under which the given labels are most
    likely. Least squares averages random errors of labels out, so it needs no clean rows.

    >>> labels = torch.arange(40) % 2
    >>> held_out_probabilities(labels[:, None] * 2.0, labels, 2)[0].round(decimals=2).tolist()
    [1.0, 0.0]
    """
    if len(labels) < 2 * folds:
        raise InputError(
            f"too few rows to hold some out: expected at least {2 * folds}, got {len(labels)}; an "
            "audit of so few is done faster by eye"
        )
    scores = held_out_scores(features, labels, num_classes, folds)
    losses = [torch.nn.functional.cross_entropy(scores / t, labels) for t in TEMPERATURES]
    best = TEMPERATURES[int(torch.stack(losses).argmin())]
    return torch.softmax(scores / best, dim=1)


def neighbour_labels(
    features: Tensor, labels: Tensor, neighbours: int = 20, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Labels of the nearest other rows, and how near they are.  -> (N, k) int64, (N, k) float32.

    Nearness is the cosine of standardised features. Of more than `MOST_SEARCHED` rows, so many are
    drawn to be searched, so that the cost grows with N and not with its square.

    >>> features = torch.tensor([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.0], [-1.0, -0.1]])
    >>> neighbour_labels(features, torch.tensor([0, 1, 2, 3]), neighbours=1)[0].flatten().tolist()
    [1, 0, 3, 2]
    """
    count = len(labels)
    columns = features.float()
    mean, scale = column_scales(columns)
    columns = torch.nn.functional.normalize((columns - mean) / scale, dim=1)  # (N, D)
    searched = torch.arange(count)
    if count > MOST_SEARCHED:
        random = torch.Generator().manual_seed(seed)
        searched = torch.randperm(count, generator=random)[:MOST_SEARCHED].sort().values
    place = torch.full((count,), -1)
    place[searched] = torch.arange(len(searched))
    k = min(neighbours, len(searched) - 1)
    if k < 1:
        raise InputError(f"neighbours need at least 2 rows, got {count}")
    found, near = torch.empty(count, k, dtype=torch.int64), torch.empty(count, k)
    for start in range(0, count, BLOCK):
        cosine = columns[start : start + BLOCK] @ columns[searched].T  # (BLOCK, M)
        own = place[start : start + BLOCK]
        inside = own >= 0
        cosine[inside.nonzero().flatten(), own[inside]] = -2.0  # a row is no neighbour of its own
        values, numbers = cosine.topk(k, dim=1)
        found[start : start + BLOCK] = labels[searched[numbers]]
        near[start : start + BLOCK] = values
    return found, near


def neighbour_probabilities(
    labels: Tensor, found: Tensor, near: Tensor, num_classes: int
) -> Tensor:
    """Class probabilities by the neighbours' labels.  (N,), (N, k), (N, k) -> (N, C) float64.

    Every neighbour votes with its cosine, if that is positive; one more vote is shared among the
    classes as they occur, so that no class has probability 0 and far neighbours say little.

    >>> found, near = torch.tensor([[1, 1]]), torch.tensor([[1.0, 1.0]])
    >>> neighbour_probabilities(torch.tensor([0, 1, 1, 0]), found, near, 2).round(decimals=2)
    tensor([[0.1700, 0.8300]], dtype=torch.float64)
    """
    votes = torch.zeros(len(found), num_classes, dtype=torch.float64)
    votes.scatter_add_(1, found, near.clamp_min(0).double())
    prior = torch.bincount(labels, minlength=num_classes).double() / len(labels)  # (C,)
    return (votes + prior) / (votes.sum(dim=1, keepdim=True) + 1)


def loss_of_given(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the given labels under these probabilities.  (N, C), (N,) -> (N,) float32.

    >>> loss_of_given(torch.tensor([[0.25, 0.75]]), torch.tensor([1])).exp().item()
    1.3333332538604736
    """
    own = probabilities.gather(1, labels[:, None]).squeeze(1)
    return -own.clamp_min(1e-9).log().float()
