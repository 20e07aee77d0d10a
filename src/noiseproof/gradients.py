"""How much of the gradient comes from wrongly labelled rows, and how often they pass the gates.

Measured beside training, on a fixed sample of rows, with the loss of the method as it stands (its
columns, its gates, its selection) and without dropout. It needs the truth, which no method sees, so
it is a measure and no part of a method; it changes neither weights nor columns nor random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.method import Batch, Method, Run
from noiseproof.models import evaluation_mode, is_head

Inputs = Callable[[np.ndarray], dict[str, Tensor]]
"""Row numbers (B,) -> what the model is called with."""


@dataclass(frozen=True)
class GradientSample:
    """Rows that are measured.

    Attributes:
        wrong: Numbers of wrongly labelled rows.
        right: Numbers of rightly labelled rows.
        rate: Share of wrong labels among all rows; weighs the two.
    """

    wrong: np.ndarray
    right: np.ndarray
    rate: float


def draw_sample(wrong: np.ndarray, count: int, seed: int) -> GradientSample | None:
    """Draw half of ``count`` rows from the wrong ones and half from the right ones.

    Args:
        wrong: Which rows are labelled wrongly (N,) bool.
        count: Rows of the sample; fewer where a half has not enough.
        seed: The same seed, the same rows.

    Returns:
        The sample; None unless there are both wrong and right rows.
    """
    random = np.random.default_rng(seed)
    halves = [np.sort(random.permutation(np.flatnonzero(rows))[: count // 2])
              for rows in (wrong, ~wrong)]  # fmt: skip
    if not all(map(len, halves)):
        return None
    return GradientSample(halves[0], halves[1], float(wrong.mean()))


def measure_gradients(
    method: Method, run: Run, inputs: Inputs, sample: GradientSample
) -> dict[str, float | None]:
    """Compare the gradients of wrong and of right rows, each row alone.

    Args:
        method: Its loss is differentiated; a row that it leaves out has the gradient 0.
        run: Read only; the method gets a copy whose columns it may write.
        inputs: Encodes training rows.
        sample: Rows to measure.

    Returns:
        By part, ``encoder`` (what trains inside it, such as adapters) and ``head``, if it trains:
        ``gradient_PART_wrong`` and ``_right``, mean norms of the gradients of single rows;
        ``_share``, the share of wrong rows in the sum of these norms over all rows;
        ``_mean_share``, the same with the norms of the mean gradients, in which rows may cancel;
        ``_cosine`` of the two mean gradients. None where all gradients are 0.
    """
    parts = _trained_parts(run.model)
    copy = replace(
        run,
        columns={name: column.clone() for name, column in run.columns.items()},
        generator=torch.Generator(),
        logged={},
        sums={},
        warned=[],
    )
    with evaluation_mode(run.model), torch.enable_grad(), torch.random.fork_rng():
        wrong = _gradients(method, copy, inputs, sample.wrong, parts)
        right = _gradients(method, copy, inputs, sample.right, parts)
    measured: dict[str, float | None] = {}
    for name, one in wrong.items():
        two, rate = right[name], sample.rate
        measured |= {
            f"gradient_{name}_wrong": one.norm,
            f"gradient_{name}_right": two.norm,
            f"gradient_{name}_share": share(one.norm, two.norm, rate),
            f"gradient_{name}_mean_share": share(_norm(one.mean), _norm(two.mean), rate),
            f"gradient_{name}_cosine": _cosine(one.mean, two.mean),
        }
    return measured


def measure_gates(method: Method, run: Run, wrong: np.ndarray) -> dict[str, float | None]:
    """How often the gates were open for wrong and for right rows, over the epoch that has ended.

    Args:
        method: Tells its gates; the truth stays here.
        run: Gets the finding ``gates``: ``wrong`` and ``right``, the rates by layer or module.
        wrong: Which rows are labelled wrongly (N,) bool.

    Returns:
        ``gates_open_wrong`` and ``gates_open_right``, means over rows and layers; nothing of a
        method without gates, or where all rows are right or all wrong.
    """
    gates = method.row_gates(run)
    if gates is None or wrong.all() or not wrong.any():
        return {}
    drawn = gates.float().cpu().numpy()  # (N, U)
    rates = {"wrong": drawn[wrong].mean(axis=0), "right": drawn[~wrong].mean(axis=0)}
    run.findings["gates"] = {name: rate.tolist() for name, rate in rates.items()}
    return {f"gates_open_{name}": float(rate.mean()) for name, rate in rates.items()}


def share(wrong: float, right: float, rate: float) -> float | None:
    """Share of wrong rows in a sum over all rows, from means over wrong and right ones.

    >>> share(wrong=3.0, right=1.0, rate=0.25), share(0.0, 0.0, 0.5)
    (0.5, None)
    """
    total = rate * wrong + (1 - rate) * right
    return rate * wrong / total if total > 0 else None


@dataclass(frozen=True)
class _Gradient:
    """Gradients of some rows on one part: mean norm of a row, and the mean gradient."""

    norm: float
    mean: list[Tensor]


def _trained_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters inside and outside the task head; a part without any is left out."""
    try:
        head = is_head(model)
    except InputError:  # several networks in one: no part is told from another
        head = frozenset[str]().__contains__
    parts: dict[str, list[nn.Parameter]] = {"encoder": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts["head" if head(name) else "encoder"].append(parameter)
    return {name: found for name, found in parts.items() if found}


def _gradients(
    method: Method,
    run: Run,
    inputs: Inputs,
    rows: np.ndarray,
    parts: dict[str, list[nn.Parameter]],
) -> dict[str, _Gradient]:
    """Gradients of the loss of each row alone, by part."""
    parameters = [parameter for found in parts.values() for parameter in found]
    sums = {name: [torch.zeros_like(p) for p in found] for name, found in parts.items()}
    norms = dict.fromkeys(parts, 0.0)
    keep = run.columns.get("keep")
    for row in rows if keep is None else rows[keep[torch.from_numpy(rows)].numpy()]:
        loss = method.compute_loss(run.model, _batch(run, inputs, int(row)), run)
        found = iter(torch.autograd.grad(loss, parameters, allow_unused=True))
        for name, total in sums.items():
            squares = 0.0
            for part in total:
                gradient = next(found)
                if gradient is not None:
                    part += gradient
                    squares += float(gradient.float().square().sum())
            norms[name] += squares**0.5
    count = len(rows)
    return {
        name: _Gradient(norms[name] / count, [part.float().div_(count) for part in total])
        for name, total in sums.items()
    }


def _batch(run: Run, inputs: Inputs, row: int) -> Batch:
    device = next(run.model.parameters()).device
    index = torch.tensor([row])
    return Batch(
        inputs={name: value.to(device) for name, value in inputs(np.array([row])).items()},
        labels=run.labels[index].to(device),
        rows=index,
        columns={name: column[index].to(device) for name, column in run.columns.items()},
    )


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


def _cosine(one: Sequence[Tensor], two: Sequence[Tensor]) -> float | None:
    """Cosine between two gradients; None where one of them is 0."""
    product = sum(float((a * b).sum()) for a, b in zip(one, two, strict=True))
    norms = _norm(one) * _norm(two)
    return product / norms if norms > 0 else None
