"""How far fine-tuning bends the features of an encoder, and what they are still good for.

Sources: the re-probe, nearest neighbours and the distance of weights are what Ahn et al. (TURN,
IJCAI 2024, arXiv:2310.17668) ask about; their measures are not known to us, so these are our
choice. Linear CKA: Kornblith et al., "Similarity of Neural Network Representations Revisited",
ICML 2019, arXiv:1905.00414. Features are the last hidden states of the encoder, averaged over
tokens or positions: neither head nor pooler takes part. Letters: N training rows, M held-out rows,
D features, C classes. A measure that has nothing to be measured on is None.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noiseproof.encoding import Encoded
from noiseproof.engine import Engine, TrainSettings
from noiseproof.models import encoder_of
from noiseproof.selection import column_scales

NEIGHBOURS = 20
QUERIES = 1024  # held-out rows that are compared with all training rows at once


def linear_cka(one: Tensor, two: Tensor) -> float | None:
    """Similarity of two sets of features of the same rows.  (M, D), (M, D') -> [0, 1] or None.

    ||X'Y||^2 / (||X'X|| ||Y'Y||) with centred columns: 1 for features that are turned, shifted or
    scaled as a whole. None where one of them is constant.

    >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    >>> round(linear_cka(features, 5 - 2 * features.flip(1)), 6)
    1.0
    """
    x, y = (part.double() - part.double().mean(dim=0) for part in (one, two))
    norms = float((x.T @ x).norm() * (y.T @ y).norm())
    return float((x.T @ y).square().sum()) / norms if norms > 0 else None


def ridge_accuracy(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    ridge: float = 1.0,
) -> float:
    """Accuracy of a linear probe on rows that it was not trained on.

    Least squares on standardised features with the penalty ``ridge`` times the rows, in closed
    form, as `selection.held_out_scores`.

    Args:
        features: Of the rows to train on (N, D).
        labels: Their labels (N,).
        queries: Features of the held-out rows (M, D).
        query_labels: Their labels (M,).
        num_classes: C.
        ridge: Penalty per row.

    >>> rows = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> ridge_accuracy(rows, torch.tensor([0, 0, 1, 1]), rows, torch.tensor([0, 0, 1, 0]), 2)
    0.75
    """
    columns = features.double()
    mean, scale = column_scales(columns)
    columns = (columns - mean) / scale
    target = F.one_hot(labels, num_classes).double()  # (N, C)
    base = target.mean(dim=0)
    gram = columns.T @ columns
    gram.diagonal().add_(ridge * len(columns))
    weights = torch.linalg.solve(gram, columns.T @ (target - base))  # (D, C)
    scores = ((queries.double() - mean) / scale) @ weights + base  # (M, C)
    return float((scores.argmax(dim=1) == query_labels).double().mean())


def neighbour_accuracy(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    k: int = NEIGHBOURS,
) -> float:
    """Accuracy of a vote of the k nearest rows by cosine; all votes weigh the same.

    Args:
        features: Of the rows that vote (N, D); fewer than k of them all vote.
        labels: Their labels (N,).
        queries: Features of the held-out rows (M, D).
        query_labels: Their labels (M,).
        num_classes: C.
        k: Rows that vote. Of classes with equally many votes the first wins.

    >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    >>> neighbour_accuracy(rows, torch.tensor([0, 0, 1]), rows, torch.tensor([0, 0, 1]), 2, k=1)
    1.0
    """
    known = F.normalize(features.float(), dim=1)
    right = 0
    for start in range(0, len(queries), QUERIES):
        some, wanted = (part[start : start + QUERIES] for part in (queries, query_labels))
        near = (F.normalize(some.float(), dim=1) @ known.T).topk(min(k, len(known)), dim=1).indices
        votes = F.one_hot(labels[near], num_classes).sum(dim=1)  # (B, C)
        right += int((votes.argmax(dim=1) == wanted).sum())
    return right / len(queries)


def relative_distance(before: dict[str, Tensor], after: dict[str, Tensor]) -> float | None:
    """How far weights have moved: ||after - before|| / ||before|| over all of them.

    None unless both have the same names (an encoder with adapters has not).

    >>> relative_distance({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([3.0, 5.0])})
    0.2
    """
    if before.keys() != after.keys():
        return None
    moved = sum(float((after[name] - old).double().square().sum()) for name, old in before.items())
    size = sum(float(old.double().square().sum()) for old in before.values())
    return float(np.sqrt(moved / size)) if size > 0 else None


@dataclass(frozen=True)
class Look:
    """An encoder at one moment.

    Attributes:
        train: Features of the training rows (N, D).
        held_out: Features of the held-out rows (M, D).
        weights: Copies of its parameters.
    """

    train: Tensor
    held_out: Tensor
    weights: dict[str, Tensor]


def encoder_features(
    model: nn.Module, encoded: Encoded, settings: TrainSettings, *, keep: bool = False
) -> Tensor:
    """What an encoder makes of rows in eval mode, averaged over tokens or positions (N, D).

    Args:
        model: The classifier.
        encoded: The rows.
        settings: Of the run; they choose the device.
        keep: Whether the features are kept on disk, as those of a head: for an encoder as loaded.

    Raises:
        InputError: The model does not tell its encoder.
    """
    engine = Engine(settings)
    model.to(engine.device)
    encode = engine.frozen if keep else engine.encode
    return encode(model, encoded, "mean")[:, :, 0]


def look_at(
    model: nn.Module,
    train: Encoded,
    held_out: Encoded,
    settings: TrainSettings,
    *,
    keep: bool = False,
) -> Look:
    """Features and weights of the encoder as it is now, in eval mode; nothing is changed.

    Args:
        model: The classifier.
        train: The training rows.
        held_out: The held-out rows.
        settings: Of the run.
        keep: As in `encoder_features`.

    Raises:
        InputError: The model does not tell its encoder.
    """
    _, encoder = encoder_of(model)
    tables = [encoder_features(model, rows, settings, keep=keep) for rows in (train, held_out)]
    weights = {name: part.detach().cpu().clone() for name, part in encoder.named_parameters()}
    return Look(tables[0], tables[1], weights)


def distortion(
    before: Look, after: Look, labels: np.ndarray, held_out_labels: np.ndarray, num_classes: int
) -> dict[str, float | None]:
    """Compare an encoder with what it was.

    Args:
        before: As it was loaded.
        after: As it is deployed.
        labels: True labels of the training rows (N,); rows without a true class (-1) do not count.
        held_out_labels: Of the held-out rows (M,).
        num_classes: C.

    Returns:
        ``distortion_probe`` and ``distortion_knn``: accuracy on the held-out rows of a linear probe
        and of nearest neighbours that know the true labels of the training rows, with the features
        after, and ``_before`` with those before; ``distortion_cka``: linear CKA of the features of
        the held-out rows; ``distortion_parameters``: relative distance of the encoder's parameters.
    """
    known = torch.from_numpy(labels >= 0)
    given, wanted = torch.from_numpy(labels)[known], torch.from_numpy(held_out_labels)
    found: dict[str, float | None] = {}
    for suffix, look in (("", after), ("_before", before)):
        tables = (look.train[known], given, look.held_out, wanted, num_classes)
        found[f"distortion_probe{suffix}"] = ridge_accuracy(*tables)
        found[f"distortion_knn{suffix}"] = neighbour_accuracy(*tables)
    found["distortion_cka"] = linear_cka(before.held_out, after.held_out)
    found["distortion_parameters"] = relative_distance(before.weights, after.weights)
    return found
