"""Regularisers on a batch of features: pure functions (n, D) -> scalar, lower is better.

Formulas and constants are those of NMTune (Chen et al., ICLR 2024, arXiv:2309.17002) in the form of
its released code; where they are not clear, the choice is ours and said so. All of them compute in
fp32, or float64 if they get it, whatever the precision around them; n are the rows of the batch
(two views of B rows are n = 2 B), D the width of the features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from noiseproof.errors import InputError

SHORTEST = 1e-8  # a row with a smaller norm has no direction

MSE_REDUCTIONS = ("element_mean", "row_sum")
COV_ROUTES = ("auto", "gram", "direct")
SVD_ROUTES = ("gram", "svdvals")


def feature_consistency(
    transformed: Tensor, original: Tensor, reduction: str = "element_mean"
) -> Tensor:
    """Mean squared difference of the normalised rows.  (n, D), (n, D) -> scalar.

    sum_b |z_b / |z_b| - f_b / |f_b||^2, divided by n D (element_mean, the released code) or by n
    (row_sum, our reading of the paper). The original is no target to move: it gets no gradient. A
    row that is zero in either has no direction and contributes nothing.

    >>> features = torch.tensor([[3.0, 4.0]])
    >>> feature_consistency(2 * features, features).item()  # the same direction
    0.0
    >>> feature_consistency(-features, features).item()  # (2 - 2 cos) / D = 4 / 2
    2.0
    """
    require_choice("reduction", reduction, MSE_REDUCTIONS)
    if transformed.shape != original.shape or transformed.ndim != 2:
        raise InputError(
            "transformed and original features must have the same shape (n, D), got "
            f"{tuple(transformed.shape)} and {tuple(original.shape)}"
        )
    new, old = _wide(transformed), _wide(original).detach()
    has_direction = (new.detach().norm(dim=1) >= SHORTEST) & (old.norm(dim=1) >= SHORTEST)  # (n,)
    new, old = (torch.where(has_direction[:, None], rows, 1.0) for rows in (new, old))
    new, old = (rows / rows.norm(dim=1, keepdim=True) for rows in (new, old))
    count = max(1, len(new) * (new.shape[1] if reduction == "element_mean" else 1))
    distance: Tensor = (new - old).square().sum() / count
    return distance


def without_direction(features: Tensor) -> int:
    """How many rows of features (n, D) are too short to have a direction.

    >>> without_direction(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    1
    """
    return int((_wide(features).norm(dim=1) < SHORTEST).sum())


def covariance_penalty(features: Tensor, route: str = "auto") -> Tensor:
    """Sum of the squared covariances between different dimensions, over D.  (n, D) -> scalar.

    sum_{i != j} Cov_ij^2 / D with Cov = Zc' Zc / (n - 1), Zc the column-centred features; the
    covariance term of VICReg (Bardes et al. 2022). It grows with the fourth power of the scale.
    Fewer than two rows, or one dimension, have no covariance: 0.

    Args:
        features: (n, D).
        route: direct builds the D x D matrix, O(n D^2); gram uses |Zc' Zc|_F = |Zc Zc'|_F and needs
            only n x n, O(n^2 D). The value is the same; auto takes the smaller matrix.

    >>> covariance_penalty(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).item()  # Cov is 2 everywhere
    4.0
    """
    require_choice("route", route, COV_ROUTES)
    rows = _table(features)
    count, width = rows.shape
    if count < 2 or width < 2:
        return rows.sum() * 0.0
    centred = rows - rows.mean(dim=0)
    if route == "gram" or (route == "auto" and count < width):
        variance = centred.square().sum(dim=0) / (count - 1)  # (D,)
        gram = _product(centred, centred.T) / (count - 1)  # (n, n)
        return (gram.square().sum() - variance.square().sum()) / width
    covariance = _product(centred.T, centred) / (count - 1)  # (D, D)
    apart = covariance - torch.diag(covariance.diagonal())
    return apart.square().sum() / width


def singular_value_penalty(
    features: Tensor,
    k: int = 5,
    *,
    center: bool = False,
    route: str = "gram",
    eps: float = 1e-12,
) -> Tensor:
    """Minus the mean share of the k leading singular values.  (n, D) -> scalar.

    -(1 / k) sum_{i <= k} s_i / sum_j s_j over all min(n, D) singular values, uncentred in the
    released code. It lies in [-1 / k, -1 / min(n, D)] for k up to min(n, D), and does not change
    with the scale.

    Only values enter, so its gradient has no factor 1 / (s_i^2 - s_j^2): equal values are harmless.
    Features that are zero throughout give 0 without gradient.

    Args:
        features: (n, D).
        k: Leading values.
        center: Centre the columns before.
        route: gram takes the roots of the eigenvalues of the smaller of Z Z' and Z' Z; eigenvalues
            below max(eps, 4 x machine precision x the largest) count as 0 and get no gradient, so
            that a batch with equal rows has one gradient and not an arbitrary one. svdvals is the
            plain form.
        eps: Smallest eigenvalue, and smallest sum of the singular values.

    >>> singular_value_penalty(torch.diag(torch.tensor([3.0, 1.0])), k=1).item()
    -0.75
    """
    require_choice("route", route, SVD_ROUTES)
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    rows = _table(features)
    if center:
        rows = rows - rows.mean(dim=0)
    if not bool(torch.isfinite(rows.detach()).all()):  # the decompositions would raise
        return rows.sum() * float("nan")
    values = _gram_values(rows, eps) if route == "gram" else torch.linalg.svdvals(rows)
    total = values.sum()
    if bool(total.detach() < eps):
        return rows.sum() * 0.0
    return -values[:k].sum() / total / k


def _gram_values(rows: Tensor, eps: float) -> Tensor:
    """Singular values by the smaller Gram matrix, largest first.  (n, D) -> (min(n, D),)."""
    gram = _product(rows, rows.T) if len(rows) <= rows.shape[1] else _product(rows.T, rows)
    if not bool(torch.isfinite(gram.detach()).all()):  # the products of finite rows overflow
        return gram.sum(dim=0) * float("nan")
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0)
    largest = float(eigenvalues[0].detach())
    kept = eigenvalues.detach() > max(eps, 4 * torch.finfo(rows.dtype).eps * largest)
    values: Tensor = torch.where(kept, eigenvalues, 1.0).sqrt() * kept  # never the root of 0
    return values


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product in the precision of its factors, also inside autocast."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _wide(values: Tensor) -> Tensor:
    """In fp32, float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def _table(features: Tensor) -> Tensor:
    if features.ndim != 2 or not features.numel():
        raise InputError(f"features must have shape (n, D), got {tuple(features.shape)}")
    return _wide(features)


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `InputError` unless the value is one of the choices.

    >>> require_choice("route", "gram", ("gram", "svdvals"))
    """
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
