"""Asking a model for its layers: what runs in them, in which order, on a tiny input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.models import encoder_layers, evaluation_mode, trial_inputs

Hook = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Call:
    """A module of a layer at work on the trial input.

    Attributes:
        name: Inside its layer.
        module: The module.
        source: What it was called with.
        output: Shape of what it gave.
        by_row: Whether it works on the rows, not on something that all rows share.
    """

    name: str
    module: nn.Module
    source: Tensor
    output: torch.Size
    by_row: bool


def calls_in_layers(model: nn.Module) -> list[list[Call]]:
    """What runs in every layer, in order: modules without children that have parameters."""
    inputs = trial_inputs(model)
    rows = len(next(iter(inputs.values())))
    layers: list[list[Call]] = []
    handles = []

    def note(name: str, calls: list[Call]) -> Hook:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and torch.is_tensor(args[0]) and torch.is_tensor(output):
                calls.append(Call(name, module, args[0], output.shape, len(output) == rows))

        return hook

    for block in encoder_layers(model):
        layers.append([])
        for name, module in block.named_modules():
            own = any(True for _ in module.parameters(recurse=False))
            if own and not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(note(name, layers[-1])))
    try:
        with evaluation_mode(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return layers


def bottleneck_places(calls: Sequence[Call], targets: Sequence[str] | None) -> list[Call]:
    """Where bottlenecks work in a layer: behind the attention's and the feed-forward's last matrix.

    The latter is the last matrix that runs. The matrices before it with one common input expand the
    width, and the one before those ends the attention.

    Raises:
        InputError: The layer is built otherwise, or a target does not exist; gives the candidates.
    """
    matrices = [call for call in calls if is_matrix(call.module) and call.by_row]
    names = ", ".join(dict.fromkeys(call.name for call in matrices)) or "none"
    if targets is not None:
        chosen = [call for call in matrices if call.name in targets]
        missing = sorted(set(targets) - {call.name for call in chosen})
        if missing:
            raise InputError(f"no module {missing[0]!r} in a layer for an adapter; it has: {names}")
        return chosen
    found = []
    if len(matrices) >= 3:
        last, expansion = matrices[-1], matrices[-2]
        rest = [call for call in matrices[:-1] if call.source is not expansion.source]
        found = [rest[-1], last] if rest else []
    if not found or found[0].output[-1] != found[1].output[-1]:
        raise InputError(
            "cannot tell where attention and feed-forward end in a layer of this encoder; name the "
            f"modules in target_modules, out of: {names}"
        )
    return found


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a linear map: torch's, or the transposed one of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
