"""Losses of rows whose label is a text: one number per row from the tokens of its response.

A batch of such rows holds `TARGETS` (B, T) beside what the model is called with: the token that
each position has to predict, and `IGNORED` at the prompt and at pads. A row's loss is the mean over
its response tokens, and 0 where no token is left, so a loss of classes (M, V), (M,) -> (M,) becomes
one of rows. M is the number of response tokens of the batch, V the size of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = "targets"
IGNORED = -100
RowLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, C) and labels (B,) -> losses (B,)."""


class Predicted(NamedTuple):
    """What a model says at the response tokens of a batch.

    Attributes:
        logits: (M, V), fp32.
        targets: (M,), the tokens of the responses.
        rows: (M,), the place of the token's row in the batch, from 0 to B - 1.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor


def at_targets(model: nn.Module, inputs: Mapping[str, Tensor]) -> Predicted:
    """Call the model on a batch and take its logits where there is a target.

    Positions before the first target of the batch are no work for the output layer, where the model
    takes ``logits_to_keep``. Positions count from the end, so prompts that an adapter puts before
    the rows shift nothing.
    """
    targets = inputs[TARGETS]  # (B, T)
    asked = {name: tensor for name, tensor in inputs.items() if name != TARGETS}
    there = (targets != IGNORED).any(dim=0)
    first = int(there.int().argmax()) if bool(there.any()) else targets.shape[1] - 1
    last = targets.shape[1] - first  # positions from the end on that are read
    keep = {"logits_to_keep": last} if _takes(model, "logits_to_keep") else {}
    logits: Tensor = model(**asked, **keep).logits[:, -last:]  # (B, last, V)
    targets = targets[:, -last:]
    chosen = targets != IGNORED
    return Predicted(logits[chosen].float(), targets[chosen], chosen.nonzero()[:, 0])


def token_losses(model: nn.Module, inputs: Mapping[str, Tensor], loss: RowLoss) -> Tensor:
    """Compute the mean loss of every row's response tokens.  -> (B,).

    Args:
        model: Gives logits (B, T, V).
        inputs: Of the model, and `TARGETS` (B, T).
        loss: Of one token.
    """
    found = at_targets(model, inputs)
    values = loss(found.logits, found.targets)  # (M,)
    return row_means(values, found.rows, len(inputs[TARGETS]))


def row_means(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Average the values of each row; a row without values has 0.  (M,), (M,) -> (count,).

    >>> row_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 3)
    tensor([2., 0., 5.])
    """
    return row_sums(values, rows, count) / row_sums(torch.ones_like(values), rows, count).clamp(1)


def row_sums(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Add the values of each row.  (M,), (M,) -> (count,)."""
    return values.new_zeros(count).index_add(0, rows, values)


def token_statistics(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Compute what is kept of every row in a scoring pass; logits of all rows would be too large.

    Returns:
        (B, 3): summed cross-entropy of the response tokens, their number, and how many of them the
        model ranks first.
    """
    found, count = at_targets(model, inputs), len(inputs[TARGETS])
    loss = F.cross_entropy(found.logits, found.targets, reduction="none")
    right = (found.logits.argmax(dim=1) == found.targets).to(loss.dtype)
    columns = (loss, torch.ones_like(loss), right)
    return torch.stack([row_sums(column, found.rows, count) for column in columns], dim=1)


def losses_of_statistics(statistics: Tensor) -> Tensor:
    """Mean loss per response token of every row.  (N, 3) -> (N,).

    >>> losses_of_statistics(torch.tensor([[6.0, 3.0, 1.0], [0.0, 0.0, 0.0]])).tolist()
    [2.0, 0.0]
    """
    return statistics[:, 0] / statistics[:, 1].clamp(min=1)


def _takes(model: nn.Module, argument: str) -> bool:
    """Whether the transformers model inside takes this argument."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):  # several processes
        model = inner
    get_base = getattr(model, "get_base_model", None)
    plain: nn.Module = get_base() if callable(get_base) else model
    return argument in inspect.signature(plain.forward).parameters
