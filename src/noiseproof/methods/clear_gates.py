"""The gates of CleaR: which rows of a batch pass through which adapters.

A gate of 0 is an exact bypass: the row meets the frozen layer alone and sends no gradient into the
adapter. No second copy of a layer is kept. Adapters of our own multiply their update by the gate;
an adapter of peft is gated from outside, by choosing between its output and that of the frozen
module inside it.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.adapters import AdaptedModel, Gates, calls_in_layers
from noiseproof.errors import InputError
from noiseproof.frozen import shaken
from noiseproof.models import encoder_layers, encoder_of, evaluation_mode, plain_model, trial_inputs

SALT_EVAL = 13


def gate_table(rows: int, units: int, *words: int) -> np.ndarray:
    """Uniform numbers in [0, 1), one per row and unit, from these words alone.  -> (N, U) fp32."""
    return np.random.default_rng(list(words)).random((rows, units), dtype=np.float32)


def open_gates(uniform: Tensor, rate: Tensor) -> Tensor:
    """Bernoulli gates from uniform numbers: rate 1 is always open, rate 0 never.

    (B, U), (B,) -> (B, U) of zeros and ones.
    """
    return (uniform < rate[:, None]).to(torch.float32)


class Routing(Gates):
    """The gates of one model, and how they are drawn where nobody sets them.

    A call of the model uses the gate that `set` left, once; it stays valid until the next call,
    because gradient checkpointing runs layers again in the backward pass.

    Attributes:
        units: U, the columns of a gate: a layer each, or a module each; `route` counts them.
    """

    def __init__(
        self,
        units: int = 0,
        gamma: float = 1.0,
        eval_gate: str = "all_on",
        eval_passes: int = 1,
        free: str = "sample",
        unit: str = "layer",
    ) -> None:
        super().__init__()
        self.units = units
        self.gamma = gamma
        self.eval_gate = eval_gate
        self.eval_passes = eval_passes
        self.free = free
        self.unit = unit
        self.pending = False
        self.frozen: Tensor | None = None  # (N, D, 2), see CleaR._logits; empty where impossible
        self._table: tuple[tuple[int, ...], Tensor] | None = None
        self._soft: tuple[Tensor | None, bool] = (None, False)

    @property
    def soft(self) -> bool:
        """Whether some gate of this call is neither open nor closed."""
        gate = self.gate
        if gate is not None and self._soft[0] is not gate:
            self._soft = (gate, bool(((gate > 0) & (gate < 1)).any()))
        return self._soft[1]

    def set(self, gate: Tensor | None) -> None:
        """Use this gate in the next call of the model."""
        self.gate = gate
        self.pending = True

    def table(self, rows: int, *words: int) -> Tensor:
        """`gate_table` of the training rows, kept for the epoch."""
        key = (rows, *words)
        if self._table is None or self._table[0] != key:
            self._table = (key, torch.from_numpy(gate_table(rows, self.units, *words)))
        return self._table[1]

    def eval_gates(self, inputs: dict[str, Tensor], number: int) -> Tensor | None:
        """Gates of a call that nobody set gates for, by ``eval_gate``.

        Sampled gates are keyed by the content of the row, so they do not depend on the order of
        the rows, on the batch, on the process, or on whether the model was saved in between. Those
        of a whole batch are keyed by the content of all its rows.
        """
        if self.eval_gate == "all_on":
            return None
        some = next(iter(inputs.values()))
        if self.eval_gate == "expected":
            return torch.full((len(some), self.units), self.gamma, device=some.device)
        keys = row_keys(inputs)
        if self.free == "batch":
            keys = [zlib.crc32(np.sort(keys).tobytes())] * len(keys)
        uniform = np.stack([gate_table(1, self.units, SALT_EVAL, number, key)[0] for key in keys])
        if self.unit == "network":
            uniform = np.repeat(uniform[:, :1], self.units, axis=1)
        rate = torch.full((len(some),), self.gamma)
        return open_gates(torch.from_numpy(uniform), rate).to(some.device)


def row_keys(inputs: dict[str, Tensor]) -> list[int]:
    """A number per row from its content, not its padding; without a mask all is content."""
    ids = inputs.get("input_ids")
    if ids is None:
        rows = next(iter(inputs.values())).detach().cpu().float().numpy()
        return [zlib.crc32(np.ascontiguousarray(row).tobytes()) for row in rows]
    given = inputs.get("attention_mask")
    mask = (torch.ones_like(ids) if given is None else given).cpu().numpy().astype(bool)
    return [
        zlib.crc32(row[real].tobytes())
        for row, real in zip(ids.cpu().numpy().astype(np.int64), mask, strict=True)
    ]


# --- around a model ------------------------------------------------------------------------------


class PeftGate:
    """Gates one adapted module of peft: ``y = frozen(x) + a (adapted(x) - frozen(x))``.

    ``frozen(x)`` is computed inside the adapted module anyway and is only kept for a moment. Hooks
    are bound methods, so that a copy of the model has gates of its own.
    """

    def __init__(self, routing: Routing, name: str) -> None:
        self.routing, self.name = routing, name
        self.unit = 0
        self.given: Tensor | None = None
        self.frozen: Tensor | None = None

    def keep(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """On the frozen module inside."""
        if self.routing.gate is not None:
            self.given, self.frozen = args[0], output

    def choose(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """On the adapted module."""
        gate = self.routing.of(self.unit, output)
        given, frozen, self.given, self.frozen = self.given, self.frozen, None, None
        if gate is None:
            return None
        if frozen is None or given is not args[0]:
            raise InputError(
                f"CleaR cannot gate {self.name}: its adapter changes what the frozen module gets"
            )
        if len(output) != len(gate):
            raise InputError(
                f"CleaR cannot gate {self.name}: it serves all rows at once; choose other "
                "target_modules"
            )
        frozen = frozen.to(output.dtype)
        if self.routing.soft:
            return frozen + gate * (output - frozen)
        return torch.where(gate > 0, output, frozen)


def route(model: nn.Module, routing: Routing) -> None:
    """Let ``routing`` gate every adapter of a model, and try on a tiny input that it does.

    Raises:
        InputError: The model has no adapter in numbered layers, or one that cannot be gated.
    """
    if isinstance(model, AdaptedModel):
        parts: list[Any] = model.gated_parts
        model.use(routing)
    else:
        parts = _gate_peft(model, routing)
    if routing.unit == "module":
        for number, part in enumerate(parts):
            part.unit = number
    routing.units = 1 + max(part.unit for part in parts)
    _try(model, routing)
    model.noiseproof_routing = routing  # type: ignore[assignment]
    model.forward = RoutedForward(model.forward, model, routing)


def unroute(model: nn.Module) -> None:
    """Remove the gates: afterwards the model is what it was before `route`."""
    if isinstance(model, AdaptedModel):
        model.use(Gates())
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), PeftGate):
                del module._forward_hooks[key]
    model.__dict__.pop("forward", None)
    model.__dict__.pop("noiseproof_routing", None)


def gated_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What the gates of a model guard."""
    if isinstance(model, AdaptedModel):
        yield from model.parts.parameters()
        return
    for _, module in _tuners(model):
        frozen = {id(parameter) for parameter in module.base_layer.parameters()}
        yield from (part for part in module.parameters() if id(part) not in frozen)


def only_gated_trains(model: nn.Module) -> bool:
    """Whether nothing inside the encoder trains but what is gated."""
    gated = {id(parameter) for parameter in gated_parameters(model)}
    _, encoder = encoder_of(model)
    return all(id(part) in gated for part in encoder.parameters() if part.requires_grad)


def row_wise_targets(model: nn.Module) -> list[str] | None:
    """What LoRA adapts by default, without modules that serve all rows at once.

    DeBERTa-v3 sends its relative positions through the same query and key matrices as the tokens:
    an update of these cannot be left out for one row alone.

    Returns:
        Names for ``target_modules``; None where peft's own choice will do.
    """
    from peft.utils import constants

    kind = str(getattr(plain_model(model).config, "model_type", ""))
    shared = {
        call.name.rpartition(".")[2]
        for calls in calls_in_layers(model)
        for call in calls
        if not call.by_row
    }
    names = list(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, ()))
    return [name for name in names if name not in shared] if shared & set(names) else None


def _tuners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _gate_peft(model: nn.Module, routing: Routing) -> list[PeftGate]:
    layer_of = {
        id(module): number
        for number, block in enumerate(encoder_layers(model))
        for module in block.modules()
    }
    gates = []
    for name, module in _tuners(model):
        if id(module) not in layer_of:
            raise InputError(f"CleaR cannot gate {name}: it lies outside the numbered layers")
        if module.merged:
            raise InputError(f"CleaR cannot gate {name}: a merged adapter has no bypass")
        gate = PeftGate(routing, name)
        gate.unit = layer_of[id(module)]
        module.base_layer.register_forward_hook(gate.keep)
        module.register_forward_hook(gate.choose)
        gates.append(gate)
    if not gates:
        raise InputError(
            "CleaR found no adapter to gate in the layers; use lora, adapter, bitfit, prompt or "
            "prefix, or another kind of peft that adds to the output of linear modules"
        )
    return gates


def _try(model: nn.Module, routing: Routing) -> None:
    """Closed gates must give the frozen encoder bit for bit, open ones must not."""
    _, encoder = encoder_of(model)
    inputs = trial_inputs(model)
    rows = len(next(iter(inputs.values())))

    def states(gate: Tensor | None) -> Tensor:
        routing.gate = gate
        hidden: Tensor = encoder(**inputs).last_hidden_state
        return hidden

    closed = torch.zeros(rows, routing.units, device=next(encoder.parameters()).device)
    guarded = {id(parameter) for parameter in gated_parameters(model)}
    names = {name for name, part in model.named_parameters() if id(part) in guarded}
    try:
        with evaluation_mode(model), shaken(model, names.__contains__):
            with model.disable_adapter():  # type: ignore[operator]
                frozen = states(None)
            exact = torch.equal(states(closed), frozen)
            acts = not torch.equal(states(None), frozen)
    finally:
        routing.gate = None
    if not (exact and acts):
        kind = getattr(getattr(model, "adapter", None), "family", None) or "this adapter of peft"
        raise InputError(
            f"CleaR cannot gate {kind} in {type(plain_model(model)).__name__}: "
            + ("its closed gates do not give the frozen encoder" if acts else "it changes nothing")
            + "; use lora, adapter, bitfit, prompt or prefix"
        )


class RoutedForward:
    """The forward of a gated model. An object, so that a copy of the model calls its own parts."""

    def __init__(self, forward: Callable[..., Any], model: nn.Module, routing: Routing) -> None:
        self.forward, self.model, self.routing = forward, model, routing

    def __call__(self, *given: Any, **inputs: Any) -> Any:
        """Answer with the gates that were set, or with those of ``eval_gate``."""
        routing, forward = self.routing, self.forward
        if given:
            inputs = self._named(given, inputs)
        if routing.pending:
            routing.pending = False
            return forward(**inputs)
        if self.model.training:
            raise RuntimeError("CleaR: no gates were set for this training step")
        passes = routing.eval_passes if routing.eval_gate == "mean" else 1
        routing.gate = routing.eval_gates(inputs, 0)
        output = forward(**inputs)
        for number in range(1, passes):
            routing.gate = routing.eval_gates(inputs, number)
            output.logits = output.logits + forward(**inputs).logits
        if passes > 1:
            output.logits = output.logits / passes
        return output

    def _named(self, given: tuple[Any, ...], inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of which some came without a name; a forward that names none hands them on."""
        signature = inspect.signature(self.forward)
        first = next(iter(signature.parameters.values()))
        if first.kind is first.VAR_POSITIONAL:
            signature = inspect.signature(plain_model(self.model).forward)
        signature.bind_partial(*given, **inputs)  # none comes twice
        return {**signature.bind_partial(*given).arguments, **inputs}
