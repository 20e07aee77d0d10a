"""Losses per row on noisy labels: pure functions of logits, (B, C), ... -> (B,).

All of them compute in fp32 whatever the precision of the logits, take given labels as int64
class numbers, leave the reduction to the caller, and stay finite (value and gradient) at logits
of +-1e4. `p` below is softmax(logits), `y` the given label, `T` a transition matrix (C, C) with
row = true class, column = given class, rows summing to 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from noiseproof.errors import InputError

NEVER = -1e30  # stands in for log 0: finite, and exactly nothing beside any real log-probability


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -log p_y.  (B, C), (B,) -> (B,).

    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).round(decimals=4)  # log 4
    tensor([1.3863])
    """
    return F.cross_entropy(logits.float(), labels, reduction="none")


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Compute -sum_c target_c log p_c for soft targets.  (B, C), (B, C) -> (B,).

    >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]])).round(decimals=4)  # log 2
    tensor([0.6931])
    """
    return -(target.float() * logits.float().log_softmax(dim=-1)).sum(dim=-1)


def label_smoothing(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Compute cross-entropy against (1 - s) onehot(y) + s / C.  (B, C), (B,) -> (B,).

    Szegedy et al. 2016 (section 7), in torch's convention: the given class keeps 1 - s + s / C.

    >>> logits = torch.tensor([[4.0, 0.0]])
    >>> label_smoothing(logits, torch.tensor([0]), smoothing=0.5).round(decimals=4)
    tensor([1.0181])
    """
    if not 0 <= smoothing <= 1:
        raise InputError(f"smoothing must lie in [0, 1], got {smoothing}; 0 is cross-entropy")
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)


def generalized_cross_entropy(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """Compute (1 - p_y^q) / q.  (B, C), (B,) -> (B,).

    Zhang & Sabuncu 2018, eq. 6. q -> 0 is cross-entropy, q = 1 is 1 - p_y; the range is [0, 1/q].

    >>> generalized_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), q=0.7).round(decimals=4)
    tensor([0.5492])
    """
    if not 0 < q <= 1:
        raise InputError(f"q must lie in (0, 1], got {q}; 0.7 is the paper's, near 0 is CE")
    return -torch.expm1(q * _log_given(logits, labels)) / q  # expm1: exact for tiny q as well


def symmetric_cross_entropy(
    logits: Tensor, labels: Tensor, alpha: float, beta: float, log_zero: float = -4.0
) -> Tensor:
    """Compute alpha CE + beta reverse CE, with log 0 read as `log_zero`.  (B, C), (B,) -> (B,).

    Wang et al. 2019, eq. 8; the reverse term -sum_c p_c log onehot_c is -log_zero (1 - p_y).

    >>> symmetric_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), alpha=0.0, beta=1.0).item()
    2.0
    """
    if not log_zero < 0:
        raise InputError(f"log_zero must be negative, got {log_zero}; the paper uses -4")
    log_given = _log_given(logits, labels)
    return -alpha * log_given + beta * log_zero * torch.expm1(log_given)


def mean_absolute_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute sum_c |onehot(y)_c - p_c| = 2 (1 - p_y).  (B, C), (B,) -> (B,).

    Ghosh et al. 2017: bounded and symmetric, hence robust to symmetric noise, and slow to learn.

    >>> mean_absolute_error(torch.zeros(1, 4), torch.tensor([2])).item()
    1.5
    """
    return -2 * torch.expm1(_log_given(logits, labels))


def bootstrapping(logits: Tensor, labels: Tensor, beta: float, hard: bool) -> Tensor:
    """Compute cross-entropy against beta onehot(y) + (1 - beta) own prediction.  -> (B,).

    Reed et al. 2015, eq. 6 (soft: the prediction is p) and eq. 7 (hard: its argmax); shapes
    (B, C), (B,). The target is detached: the model must not move it to lower the loss.

    >>> logits = torch.tensor([[0.0, 2.0]])
    >>> bootstrapping(logits, torch.tensor([0]), beta=0.0, hard=True).round(decimals=3)  # CE of 1
    tensor([0.1270])
    """
    if not 0 <= beta <= 1:
        raise InputError(f"beta must lie in [0, 1], got {beta}; 1 is cross-entropy")
    own = logits.detach().float().softmax(dim=-1)  # (B, C)
    if hard:
        own = F.one_hot(own.argmax(dim=-1), own.shape[-1]).float()
    given = F.one_hot(labels, own.shape[-1]).float()
    return soft_cross_entropy(logits, beta * given + (1 - beta) * own)


def forward_correction(logits: Tensor, labels: Tensor, transition: Tensor) -> Tensor:
    """Compute -log (T' p)_y, the loss of the given label.  (B, C), (B,), (C, C) -> (B,).

    Patrini et al. 2017, theorem 2: T' p is the prediction after the noise. A label that T calls
    impossible (zero column) costs 1e30: finite, and impossible to overlook.

    >>> flip = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> forward_correction(logits, torch.tensor([1]), flip).round(decimals=3)  # CE of class 0
    tensor([0.1270])
    """
    return marginal_cross_entropy(logits, _checked(transition, logits).T[labels])


def marginal_cross_entropy(logits: Tensor, likelihood: Tensor) -> Tensor:
    """Compute -log sum_c l_c p_c.  (B, C), (B, C) -> (B,).

    `likelihood` is the chance of the given label under each true class c: for class-conditional
    noise column y of T, as in `forward_correction`; it may differ from row to row. A chance of 0
    in all classes costs 1e30.

    >>> likelihood = torch.tensor([[0.0, 1.0]])  # the label is only given to rows of class 1
    >>> marginal_cross_entropy(torch.zeros(1, 2), likelihood).round(decimals=4)  # log 2
    tensor([0.6931])
    """
    likelihood = likelihood.float()
    log_likelihood = torch.where(likelihood > 0, likelihood.clamp_min(1e-38).log(), NEVER)
    return -(logits.float().log_softmax(dim=-1) + log_likelihood).logsumexp(dim=-1)


def backward_correction(logits: Tensor, labels: Tensor, transition: Tensor) -> Tensor:
    """Compute (T^-1 l)_y with l_j = -log p_j.  (B, C), (B,), (C, C) -> (B,).

    Patrini et al. 2017, theorem 1: its mean over the noise is the clean cross-entropy. A single
    row's value can be negative.

    >>> transition = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    >>> backward_correction(torch.zeros(1, 2), torch.tensor([0]), transition).round(decimals=4)
    tensor([0.6931])
    """
    inverse: Tensor  # (C, C)
    inverse, singular = torch.linalg.inv_ex(_checked(transition, logits))
    if singular.item() != 0 or not bool(inverse.isfinite().all()):
        raise InputError(
            "backward correction needs an invertible transition matrix, got a singular one;"
            " use forward correction, or mix in the identity"
        )
    return soft_cross_entropy(logits, inverse[labels])


def consistency(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, squared: bool = True
) -> Tensor:
    """Compute cross-entropy against a detached teacher at a temperature.  (B, C), (B, C) -> (B,).

    CleaR (Kim et al. 2024), consistency term: -sum_c softmax(teacher / t)_c log softmax(z / t)_c,
    times t^2 where `squared`. Not KL: it keeps the teacher's entropy, a constant.

    >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
    >>> consistency(student, teacher).round(decimals=4)  # log(2 cosh 1)
    tensor([1.1269])
    """
    if not temperature > 0:
        raise InputError(f"temperature must be > 0, got {temperature}; 1 leaves logits as they are")
    target = (teacher_logits.detach().float() / temperature).softmax(dim=-1)  # (B, C)
    row_loss = soft_cross_entropy(logits.float() / temperature, target)
    return row_loss * temperature**2 if squared else row_loss


def early_learning_regularizer(probabilities: Tensor, target: Tensor) -> Tensor:
    """Compute log(1 - <p, t>), lower where prediction and target agree.  (B, C), (B, C) -> (B,).

    Liu et al. 2020, eq. 6, without its factor lambda; `target` is the running average of past
    predictions. 1 - <p, t> is held at 1e-4 or above (the released code clamps p by the same
    amount), so neither value nor gradient can blow up.

    >>> even = torch.tensor([[0.5, 0.5]])
    >>> early_learning_regularizer(even, even).round(decimals=4)  # log 0.5
    tensor([-0.6931])
    """
    agreement = (probabilities.float() * target.float()).sum(dim=-1)  # (B,)
    return (1 - agreement).clamp_min(1e-4).log()


def _log_given(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute log p_y.  (B, C), (B,) -> (B,)."""
    return -cross_entropy(logits, labels)


def _checked(transition: Tensor, logits: Tensor) -> Tensor:
    """Bring T to the logits' device in fp32, or say which shape was expected."""
    classes = logits.shape[-1]
    if transition.shape != (classes, classes):
        raise InputError(
            f"transition must have shape ({classes}, {classes}) (row = true class, column ="
            f" given class), got {tuple(transition.shape)}"
        )
    return transition.to(logits.device, torch.float32)
