"""Adapters that peft lacks: bottlenecks, biases, prompts and prefixes.

Each is put around the frozen encoder with hooks, and each can be gated row by row and layer by
layer: where a gate is 0 the row meets the frozen layer alone. Where they go is found by asking the
model: it is called once on a tiny input, and what ran in which order tells the rest.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noiseproof.errors import InputError
from noiseproof.models import (
    encoder_layers,
    evaluation_mode,
    kept_parameters,
    pooler_name,
    quiet,
    trial_inputs,
)
from noiseproof.saving import fill_adapter, save_adapter, saved_adapter

FAMILIES = ("adapter", "bitfit", "prompt", "prefix")
"""Values of ``tune`` that this module makes."""

ATTENTION = "noiseproof_columns"  # the attention of transformers with more keys and values
START_STD = 0.02  # of prompts and prefixes

Hook = Callable[..., Any]


@dataclass(frozen=True)
class Adapter:
    """Settings of an own family.

    Attributes:
        family: adapter, bitfit, prompt or prefix.
        size: Width of the bottleneck, or number of prompt or prefix vectors; bitfit reads it not.
        start: Start of a bottleneck's up-projection: zero (the bare encoder) or linear (torch's).
        depth: deep (own prompts in every layer) or shallow (before the first layer).
        outer_biases: bitfit: train the biases outside the layers too, but for the pooler's.
        pooler: Train the encoder's pooler.
        targets: Names inside a layer, for adapter: modules on whose output a bottleneck works.
    """

    family: str
    size: int = 16
    start: str = "zero"
    depth: str = "deep"
    outer_biases: bool = True
    pooler: bool = False
    targets: tuple[str, ...] | None = None


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


# --- around a model ------------------------------------------------------------------------------


class AdaptedModel(nn.Module):
    """A classifier of transformers with one of these adapters; it answers as the classifier does.

    Attributes:
        model: The classifier; its parameters keep their names behind ``model.``.
        adapter: The settings.
        gates: Of the rows of a call.
        parts: What was added, in the order of the layers.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter
        self.gates = Gates()
        self.parts = nn.ModuleDict()
        self.config: Any = model.config
        {
            "adapter": self._add_bottlenecks,
            "bitfit": self._add_biases,
            "prompt": self._add_prompts,
            "prefix": self._add_prefixes,
        }[adapter.family]()
        self.kept = trained_beside(model, adapter)
        trained = set(self.trained)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)

    def forward(self, **inputs: Any) -> Any:
        """Output of the classifier."""
        return self.model(**inputs)

    def generate(self, **inputs: Any) -> Any:
        """What a language model writes; see transformers."""
        return self.model.generate(**inputs)  # type: ignore[operator]

    def get_base_model(self) -> nn.Module:
        """The classifier, as peft names it."""
        return self.model

    @property
    def gated_parts(self) -> list[Part]:
        """What was added, in the order of the layers."""
        return [part for part in self.parts.values() if isinstance(part, Part)]

    def use(self, gates: Gates) -> None:
        """Let these gates guard every part."""
        self.gates = gates
        for part in self.gated_parts:
            part.gates = gates

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Leave the adapters out for a while, as peft names it."""
        self.gates.off = True
        try:
            yield
        finally:
            self.gates.off = False

    @property
    def trained(self) -> list[str]:
        """Names of what trains: the adapter, the head, and what the checkpoint did not hold."""
        own = [name for name, _ in self.named_parameters() if name.startswith("parts.")]
        return own + [f"model.{name}" for name in self.kept]

    def merge_and_unload(self) -> nn.Module:
        """The classifier alone, with its bias shifts added to the biases; as peft names it.

        Raises:
            InputError: The family is not bitfit; the others compute what the classifier cannot.
        """
        if self.adapter.family != "bitfit":
            raise InputError(f"{self.adapter.family} cannot be merged into its encoder")
        for module in list(self.model.modules()):
            for key, hook in list(module._forward_hooks.items()):
                part = getattr(hook, "__self__", None)
                if isinstance(part, BiasShift):
                    with torch.no_grad():
                        module.bias += part.shift  # type: ignore[operator]
                    del module._forward_hooks[key]
        return self.model

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write what was trained, and which encoder it belongs to."""
        named = dict(self.named_parameters())
        tensors = {name: named[name] for name in self.trained}
        base = str(self.config.name_or_path)
        save_adapter(Path(folder), tensors, base, dataclasses.asdict(self.adapter))

    # --- parts -----------------------------------------------------------------------------------

    def _add(self, name: str, part: nn.Module) -> Any:
        self.parts[name.replace(".", "_")] = part
        return part

    def _add_bottlenecks(self) -> None:
        for layer, calls in enumerate(calls_in_layers(self.model)):
            for call in bottleneck_places(calls, self.adapter.targets):
                width, size = int(call.output[-1]), self.adapter.size
                part = Bottleneck(self.gates, layer, width, size, self.adapter.start)
                call.module.register_forward_hook(self._add(f"{layer}.{call.name}", part).hook)

    def _add_biases(self) -> None:
        found = 0
        for layer, (block, calls) in enumerate(
            zip(encoder_layers(self.model), calls_in_layers(self.model), strict=True)
        ):
            ran = {f"{call.name}.bias": call for call in calls}
            for name, parameter in block.named_parameters():
                if not name.endswith("bias"):
                    continue
                call = ran.get(name)
                if call is None or parameter.shape != call.output[-1:]:
                    raise InputError(
                        f"bitfit cannot gate the bias {name} of layer {layer}: it is not simply "
                        "added to the output of its module; use adapter, lora or prefix"
                    )
                if not call.by_row:  # it serves all rows at once, as DeBERTa's for its positions
                    continue
                part = BiasShift(self.gates, layer, call.module)
                call.module.register_forward_hook(self._add(f"{layer}.{call.name}", part).hook)
                found += 1
        if not found:
            raise InputError(
                f"{type(self.model).__name__} has no biases in its layers for bitfit to train; "
                "use adapter, lora or prefix"
            )

    def _add_prompts(self) -> None:
        width = int(calls_in_layers(self.model)[0][-1].output[-1])
        attentions = self._own_attention()
        blocks, size = encoder_layers(self.model), self.adapter.size
        if self.adapter.depth == "shallow":
            shallow = self._add("prompt", ShallowPrompt(self.gates, size, width))
            for layer, (block, (attention, _)) in enumerate(zip(blocks, attentions, strict=True)):
                before = shallow.stay if layer else shallow.enter
                block.register_forward_pre_hook(before, with_kwargs=True)
                attention.__dict__[ATTENTION] = shallow
            blocks[-1].register_forward_hook(shallow.leave)
            return
        for layer, (block, (attention, _)) in enumerate(zip(blocks, attentions, strict=True)):
            part = self._add(str(layer), DeepPrompt(self.gates, layer, size, width))
            block.register_forward_pre_hook(part.before, with_kwargs=True)
            attention.__dict__[ATTENTION] = part

    def _add_prefixes(self) -> None:
        for layer, (attention, keys) in enumerate(self._own_attention()):
            part = Prefix(self.gates, layer, self.adapter.size, keys)
            attention.__dict__[ATTENTION] = self._add(str(layer), part)

    def _own_attention(self) -> list[tuple[nn.Module, Sequence[int]]]:
        """Let the model attend through `attend`; its attention modules, layer by layer.

        Raises:
            InputError: It has an attention of its own.
        """
        inner: Any = self.model
        register_attention()
        calls: list[tuple[nn.Module, Sequence[int]]] = []
        seen = _SEEN.set(calls)
        try:
            with quiet(), evaluation_mode(inner):
                inner.set_attn_implementation(ATTENTION)
                inner(**trial_inputs(inner))
        except (AttributeError, ValueError, NotImplementedError):
            calls.clear()
        finally:
            _SEEN.reset(seen)
        blocks = [set(map(id, block.modules())) for block in encoder_layers(inner)]
        found = [call for call, block in zip(calls, blocks, strict=False) if id(call[0]) in block]
        if len(calls) != len(blocks) or len(found) != len(blocks):
            raise InputError(
                f"{self.adapter.family} cannot reach the attention of {type(inner).__name__}, "
                "which does not use the attention interface of transformers; "
                "use adapter, lora or bitfit"
            )
        if any(bool(getattr(module, "is_causal", False)) for module, _ in found):
            # Rows are padded at the front there, and what has no position would tell by how much.
            raise InputError(
                f"{self.adapter.family} is for encoders, {type(inner).__name__} is a decoder; "
                "use adapter, lora or bitfit"
            )
        return found


def restored(model: nn.Module, folder: Path) -> nn.Module:
    """Put a saved adapter of ours around its encoder; without one the model itself.

    Args:
        model: What `noiseproof.saving.load_saved_model` gave.
        folder: Where `AdaptedModel.save_pretrained` wrote.

    Raises:
        InputError: The file belongs to another encoder.
    """
    settings = saved_adapter(folder, FAMILIES)
    if settings is None:
        return model
    adapted = AdaptedModel(model, Adapter(**settings))
    fill_adapter(adapted, folder, adapted.trained, "encoder")
    return adapted.eval()


def trained_beside(model: nn.Module, adapter: Adapter) -> list[str]:
    """Names of the model's own parameters that train beside an adapter, in order."""
    inside = {id(part) for block in encoder_layers(model) for part in block.parameters()}
    pooled = tuple(f"{module}." for module in pooler_name(model))
    outer = adapter.family == "bitfit" and adapter.outer_biases
    kept = set(kept_parameters(model))
    return [
        name
        for name, parameter in model.named_parameters()
        if name in kept
        or (adapter.pooler and name.startswith(pooled))
        or (
            outer
            and name.endswith("bias")
            and id(parameter) not in inside
            and not name.startswith(pooled)
        )
    ]


# --- asking the model ----------------------------------------------------------------------------


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


_SEEN: ContextVar[list[tuple[nn.Module, Sequence[int]]] | None] = ContextVar("seen", default=None)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> Any:
    """Attention of transformers (sdpa) with the columns of this module, if it has some."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = _SEEN.get()
    if seen is not None:
        seen.append((module, key.shape))
    part = module.__dict__.get(ATTENTION)
    if part is not None:
        key, value, attention_mask = part.extend(query, key, value, attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


def register_attention() -> None:
    """Make `attend` known to transformers under `ATTENTION`, with masks that are always given."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(*args: Any, **settings: Any) -> Tensor | None:
        settings |= {"allow_is_causal_skip": False}
        built: Tensor | None = sdpa_mask(*args, **settings)
        return built

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, mask)
