"""Adapters around a whole model, their saving and loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noiseproof.adapters.asking import bottleneck_places, calls_in_layers
from noiseproof.adapters.attention import ATTENTION, calls_noted, register_attention
from noiseproof.adapters.parts import (
    BiasShift,
    Bottleneck,
    DeepPrompt,
    Gates,
    Part,
    Prefix,
    ShallowPrompt,
)
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
"""Values of ``tune`` that this package makes."""


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

    def forward(self, *given: Any, **inputs: Any) -> Any:
        """Output of the classifier."""
        return self.model(*given, **inputs)

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
        with calls_noted() as calls:
            try:
                with quiet(), evaluation_mode(inner):
                    inner.set_attn_implementation(ATTENTION)
                    inner(**trial_inputs(inner))
            except (AttributeError, ValueError, NotImplementedError):
                calls.clear()
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
