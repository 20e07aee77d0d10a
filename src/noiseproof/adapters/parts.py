"""The pieces of an adapter, and the gates that let rows pass through them or by them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

START_STD = 0.02  # of prompts and prefixes


class Gates:
    """The gates of the rows that the model is called with; plain, no parameter and no buffer.

    Attributes:
        gate: (B, U) with a column for each gated unit; None is all open.
        off: Leave the adapters out altogether.
    """

    def __init__(self) -> None:
        self.gate: Tensor | None = None
        self.off = False

    def of(self, unit: int, like: Tensor) -> Tensor | None:
        """The gates of one unit, shaped to scale ``like`` (B, ...); None is open."""
        if self.gate is None:
            return None
        return self.gate[:, unit].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


class Part(nn.Module):
    """One gated piece of an adapter.

    Attributes:
        gates: Shared by all parts of a model.
        unit: Column of its gate.
        layer: Number of the layer it works in.
    """

    def __init__(self, gates: Gates, layer: int) -> None:
        super().__init__()
        self.gates = gates
        self.layer = self.unit = layer

    def shut(self) -> bool:
        """Whether no row of this call may pass."""
        gate = self.gates.gate
        return gate is not None and not bool((gate[:, self.unit] > 0).any())

    def front(self, bias: Tensor, count: int) -> Tensor:
        """Log a of each row, to be added to the scores of its columns.  -> (B, 1, Tq, count)."""
        front = bias.new_zeros(len(bias), 1, bias.shape[2], count)
        if self.gates.gate is None:
            return front
        lowest = torch.finfo(bias.dtype).min
        opening = self.gates.gate[:, self.unit].float().log().clamp(min=lowest)
        return front + opening.to(bias.dtype).view(-1, 1, 1, 1)

    def opened(self, output: Tensor, update: Tensor) -> Tensor:
        """``output`` plus the update of the rows whose gate is open."""
        gate = self.gates.of(self.unit, update)
        return output + (update if gate is None else gate * update)


class Bottleneck(Part):
    """``h + a f(h)`` with f(h) = W_up GELU(W_down h + b_down) + b_up  (Houlsby et al. 2019)."""

    def __init__(self, gates: Gates, layer: int, width: int, size: int, start: str) -> None:
        super().__init__(gates, layer)
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        if start == "zero":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def hook(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """On the output (B, T, D) of a projection of the layer."""
        if self.gates.off:
            return None
        return self.opened(output, self.up(F.gelu(self.down(output))))


class BiasShift(Part):
    """``module(h) + a d``: the bias becomes b0 + a d (Ben Zaken et al. 2022)."""

    def __init__(self, gates: Gates, layer: int, module: nn.Module) -> None:
        super().__init__(gates, layer)
        self.shift = nn.Parameter(torch.zeros_like(module.bias))  # type: ignore[arg-type]

    def hook(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """On the output (B, ..., d) of the module that the bias belongs to."""
        return None if self.gates.off else self.opened(output, self.shift.expand_as(output))


class Columns(Part):
    """More keys and values for the attention of one layer, with log a added to their scores."""

    def __init__(self, gates: Gates, layer: int) -> None:
        super().__init__(gates, layer)
        self.capturing = False

    def columns(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values, each (1, heads, P, d); None is none."""
        raise NotImplementedError

    def extend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put the columns before keys and values, and their gates before the mask."""
        if self.capturing:
            raise _Captured(key, value)
        more = None if self.gates.off or self.shut() else self.columns()
        if more is None:
            return key, value, mask
        gate = self.gates.gate
        rows, count = len(key), more[0].shape[2]
        wide = torch.cat([more[0].to(key.dtype).expand(rows, -1, -1, -1), key], dim=2)
        deep = torch.cat([more[1].to(value.dtype).expand(rows, -1, -1, -1), value], dim=2)
        if gate is None and mask is None:
            return wide, deep, None
        bias = additive(mask, query, key).expand(rows, -1, query.shape[2], -1)
        return wide, deep, torch.cat([self.front(bias, count), bias], dim=3)


def additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """A mask as numbers to add to the scores: 0 attends, the lowest number does not."""
    if mask is None:
        return query.new_zeros(1, 1, query.shape[2], key.shape[2])
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)


class Prefix(Columns):
    """Learned keys and values (Li & Liang 2021)."""

    def __init__(self, gates: Gates, layer: int, size: int, keys: Sequence[int]) -> None:
        super().__init__(gates, layer)
        _, heads, _, width = keys
        self.key = nn.Parameter(torch.randn(1, heads, size, width) * START_STD)
        self.value = nn.Parameter(torch.randn(1, heads, size, width) * START_STD)

    def columns(self) -> tuple[Tensor, Tensor]:
        """The parameters themselves."""
        return self.key, self.value


class DeepPrompt(Columns):
    """Learned vectors that stand among the inputs of one layer and are dropped behind it.

    What a layer computes *for* them is thrown away, so all they do is offer the frozen layer's keys
    and values of themselves. These are computed once a call and shared by its rows, instead of
    sending P more tokens a row through the layer; the result is the same.
    """

    def __init__(self, gates: Gates, layer: int, size: int, width: int) -> None:
        super().__init__(gates, layer)
        self.vectors = nn.Parameter(torch.randn(size, width) * START_STD)
        self.projected: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model starts without what the last call left."""
        return self.__dict__ | {"projected": None}

    def columns(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of this call; kept, as layers may run again in the backward pass."""
        return self.projected

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Project the vectors with the layer's own weights, just before it runs."""
        self.projected = None
        if self.gates.off or self.shut():
            return
        given = inspect.signature(block.forward).bind(*args, **kwargs)
        hidden, *others = given.arguments
        given.arguments[hidden] = self.vectors[None].to(given.arguments[hidden].dtype)
        for name in others:
            given.arguments[name] = self._alone(given.arguments[name])
        self.capturing = True
        try:
            block.forward(*given.args, **given.kwargs)
        except _Captured as found:
            self.projected = (found.key, found.value)
        finally:
            self.capturing = False

    def _alone(self, value: Any) -> Any:
        """An argument of the layer for the vectors alone: no mask, no cache, no position."""
        if isinstance(value, dict):
            return {name: self._alone(part) for name, part in value.items()}
        if isinstance(value, tuple) and len(value) == 2 and all(map(torch.is_tensor, value)):
            cosine, sine = value  # of a rotation by position, here by none
            shape = (1, len(self.vectors), cosine.shape[-1])
            return cosine.new_ones(shape), sine.new_zeros(shape)
        return value if isinstance(value, bool | int | float | str) else None


class ShallowPrompt(Part):
    """Learned vectors behind the first token of the first layer; they leave behind the last one.

    They take no position: the tokens keep theirs. One gate a row holds for all layers.
    """

    def __init__(self, gates: Gates, size: int, width: int) -> None:
        super().__init__(gates, 0)
        self.vectors = nn.Parameter(torch.randn(size, width) * START_STD)
        self.inside = False

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Insert the vectors before the first layer."""
        self.inside = not (self.gates.off or self.shut())
        return self.stay(block, args, kwargs, self.vectors)

    def stay(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        vectors: Tensor | None = None,
    ) -> Any:
        """Make room for the vectors in what every layer gets besides its input."""
        if not self.inside:
            return None
        given = inspect.signature(block.forward).bind(*args, **kwargs)
        hidden, *others = given.arguments
        if vectors is not None:
            given.arguments[hidden] = inserted(given.arguments[hidden], vectors)
        for name in others:
            given.arguments[name] = self._stretched(given.arguments[name])
        return given.args, given.kwargs

    def leave(self, _block: nn.Module, _args: Any, output: Any) -> Any:
        """Drop the vectors behind the last layer."""
        if not self.inside:
            return None
        if torch.is_tensor(output):
            return without(output, len(self.vectors))
        return (without(output[0], len(self.vectors)), *output[1:])

    def extend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Make room for the vectors in the mask; a closed row's tokens do not see them."""
        gate, count = self.gates.gate, len(self.vectors)
        if not self.inside or (mask is None and gate is None):
            return key, value, mask
        tokens = query[:, :, count:]
        bias = additive(mask, tokens, tokens).expand(len(query), -1, tokens.shape[2], -1)
        first, rest = bias[:, :, :1], bias[:, :, 1:]
        bias = torch.cat([first, first.expand(-1, -1, count, -1), rest], dim=2)
        front = self.front(bias, count)
        return key, value, torch.cat([bias[..., :1], front, bias[..., 1:]], dim=3)

    def _stretched(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._stretched(part) for name, part in value.items()}
        if isinstance(value, tuple) and len(value) == 2 and all(map(torch.is_tensor, value)):
            cosine, sine = value
            turn = (len(self.vectors), cosine.shape[-1])
            return (
                inserted(cosine, cosine.new_ones(turn)),
                inserted(sine, sine.new_zeros(turn)),
            )
        return value


def inserted(tokens: Tensor, vectors: Tensor) -> Tensor:
    """Put vectors (P, D) behind the first token.  (B, T, D) -> (B, T + P, D).

    >>> inserted(torch.zeros(1, 2, 1), torch.ones(1, 1)).flatten().tolist()
    [0.0, 1.0, 0.0]
    """
    more = vectors.to(tokens.dtype).expand(len(tokens), -1, -1)
    return torch.cat([tokens[:, :1], more, tokens[:, 1:]], dim=1)


def without(tokens: Tensor, count: int) -> Tensor:
    """Undo `inserted`.  (B, T + P, D) -> (B, T, D)."""
    return torch.cat([tokens[:, :1], tokens[:, 1 + count :]], dim=1)


class _Captured(Exception):
    """Ends a layer once its keys and values are known."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__("keys and values")
        self.key, self.value = key, value


def set_adapters(model: nn.Module, on: bool) -> None:
    """Let the adapters of a model act, or leave them out; what else was trained stays.

    ``disable_adapter`` of peft would put the head, too, back to what was loaded.
    """
    module: Any
    for module in model.modules():
        if isinstance(module, Part):
            module.gates.off = not on
        elif hasattr(module, "base_layer") and hasattr(module, "enable_adapters"):  # of peft
            module.enable_adapters(on)
    if hasattr(model, "prompt_encoder"):  # of peft, before an encoder that knows nothing of it
        if on:
            model.__dict__.pop("forward", None)
        else:
            model.forward = model.base_model.forward  # type: ignore[union-attr]
    model.__dict__["noiseproof_off"] = not on


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What adapters add to a model, without their copies of whole modules such as the head."""
    for module in model.modules():
        if isinstance(module, Part):
            yield from module.parameters()
        elif isinstance(base := getattr(module, "base_layer", None), nn.Module):  # of peft
            own = set(map(id, base.parameters()))
            yield from (part for part in module.parameters() if id(part) not in own)
    prompts = getattr(model, "prompt_encoder", None)  # of peft
    if isinstance(prompts, nn.Module):
        yield from prompts.parameters()


def idle_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What an adapter multiplies by 0: A of LoRA where B is 0, and its like in a bottleneck.

    Whatever they are, the model answers the same; so adapters start, and what is computed before
    they have trained can be shared by runs that drew them differently. Where adapters are left out,
    see `set_adapters`, all of them are idle.
    """
    if getattr(model, "noiseproof_off", False):
        yield from adapter_parameters(model)
        return
    for module in model.modules():
        pairs: list[tuple[nn.Module, nn.Module]] = []
        if isinstance(module, Bottleneck):
            pairs = [(module.down, module.up)]
        first, last = getattr(module, "lora_A", None), getattr(module, "lora_B", None)  # of peft
        if isinstance(first, nn.ModuleDict) and isinstance(last, nn.ModuleDict):
            pairs = [(first[name], last[name]) for name in first]
        for before, after in pairs:
            if not any(bool(parameter.any()) for parameter in after.parameters()):
                yield from before.parameters()
