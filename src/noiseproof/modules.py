"""Networks of your own: any torch module that gives logits, with the parts that methods ask for.

A module whose last step is a linear layer on one vector a row is split there: what comes before is
the encoder, the layer is the head. So a head can be trained alone, on features that are computed
once. Whether the split is right is found by trying; a module that cannot be split trains whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.models import plain_model
from noiseproof.saving import HEAD_FILE, merged

WEIGHTS = "model.safetensors"


class Logits(NamedTuple):
    """What a wrapped module answers."""

    logits: Tensor


class WholeModule(nn.Module):
    """A module that trains whole.

    Attributes:
        module: The module, as it was given.
        main_input_name: What its rows are called.
    """

    def __init__(self, module: nn.Module, main_input: str) -> None:
        super().__init__()
        self.module = module
        self.main_input_name = main_input

    def forward(self, **inputs: Tensor) -> Logits:
        """Rows (B, ...) -> logits (B, C)."""
        return Logits(logits_in(self.module(inputs[self.main_input_name])))

    def plain(self) -> nn.Module:
        """The module, ready to be used without this library."""
        return self.module

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write the weights under the names that the module itself has for them."""
        _write(self.plain(), Path(folder))


class SplitModule(nn.Module):
    """A module that is split into encoder and head.

    Attributes:
        encoder: All but the last layer: rows (B, ...) -> features (B, D).
        classifier: The last layer.
        main_input_name: What its rows are called.
    """

    base_model_prefix = "encoder"
    encoder_gives_tensor = True

    def __init__(self, module: nn.Module, head: str, main_input: str, labels: list[str]) -> None:
        super().__init__()
        layer = module.get_submodule(head)
        assert isinstance(layer, nn.Linear)
        _put(module, head, nn.Identity())
        self.config = ModuleConfig(layer.in_features, dict(enumerate(labels)))
        self.encoder = Beheaded(module, head, main_input, self.config)
        self.classifier = layer
        self.main_input_name = main_input
        self.name_or_path = ""

    def forward(self, **inputs: Tensor) -> Logits:
        """Rows (B, ...) -> logits (B, C)."""
        return Logits(self.classifier(self.encoder(**inputs)))

    def plain(self) -> nn.Module:
        """The module with its head, ready to be used without this library; a copy."""
        module = copy.deepcopy(self.encoder.module)
        _put(module, self.encoder.head, copy.deepcopy(self.classifier))
        return module

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write the weights under the names that the module itself has for them."""
        _write(self.plain(), Path(folder))


class ModuleConfig(NamedTuple):
    """What methods ask a model's ``config`` for.

    Attributes:
        hidden_size: Number of features, D.
        id2label: Class names by number.
    """

    hidden_size: int
    id2label: dict[int, str]

    @property
    def num_labels(self) -> int:
        """Number of classes, C."""
        return len(self.id2label)

    def to_dict(self) -> dict[str, Any]:
        """What peft reads of a config."""
        return {"model_type": "custom", **self._asdict()}


class Beheaded(nn.Module):
    """A module without its last layer."""

    def __init__(self, module: nn.Module, head: str, main_input: str, config: ModuleConfig) -> None:
        super().__init__()
        self.module, self.head, self.main_input, self.config = module, head, main_input, config

    def forward(self, **inputs: Tensor) -> Tensor:
        """Rows (B, ...) -> features (B, D)."""
        return logits_in(self.module(inputs[self.main_input]))

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write the weights that are left."""
        _write(self.module, Path(folder))


def wrap_module(
    module: nn.Module, labels: list[str], main_input: str, example: Tensor
) -> SplitModule | WholeModule:
    """Make a copy of a module answer as a classifier of transformers does.

    Args:
        module: Takes rows (B, ...) and gives logits (B, C): a tensor, the first of a tuple,
            ``["logits"]`` of a dict, or an attribute of that name.
        labels: Class names in label order.
        main_input: What its rows are called.
        example: Two different rows, to try it on.

    Raises:
        InputError: It fails on the rows, or gives no logits of so many classes.
    """
    module = copy.deepcopy(module)
    wanted = _tried(module, example)
    if wanted.shape != (len(example), len(labels)):
        raise InputError(
            f"the module {type(module).__name__} gives {tuple(wanted.shape)} for {len(example)} "
            f"rows, expected logits ({len(example)}, {len(labels)}); give it a last layer of "
            f"{len(labels)} classes"
        )
    heads = [
        name
        for name, layer in module.named_modules()
        if name and isinstance(layer, nn.Linear) and layer.out_features == len(labels)
    ]
    if heads and _splits(copy.deepcopy(module), heads[-1], main_input, labels, example):
        return SplitModule(module, heads[-1], main_input, labels)
    return WholeModule(module, main_input)


def load_weights(module: nn.Module, folder: Path) -> nn.Module:
    """A copy of a module with the weights that a run saved.

    Raises:
        InputError: They are of another module.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    module = copy.deepcopy(module)
    try:
        found = module.load_state_dict(
            load_file(str(folder / WEIGHTS)), strict=not (folder / HEAD_FILE).exists()
        )
        if found.unexpected_keys:
            raise RuntimeError(f"unexpected {', '.join(found.unexpected_keys)}")
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the weights in {folder} do not fit the module {type(module).__name__} ({reason}); "
            "give one that is built as the one that was trained"
        ) from error
    return module


def numbered_classes(module: nn.Module, example: Tensor) -> list[str]:
    """Names for the classes of a module that was loaded: their numbers."""
    return [str(label) for label in range(_tried(module, example).shape[1])]


def without_adapters(model: nn.Module) -> nn.Module:
    """A wrapped module with the adapters of peft merged into it; any other model as it is."""
    inner = plain_model(model)
    if inner is model or not isinstance(inner, SplitModule | WholeModule):
        return model
    plain: nn.Module = merged(copy.deepcopy(model))
    return plain


def module_is_missing(model: str, folder: Path) -> str:
    """A line on a run that was started from a torch module, which only its owner can build."""
    return (
        f"the model was a torch module, {model}; give load(run, model=...) one that is built "
        f"alike, into which the weights of {folder} are put"
    )


def _tried(module: nn.Module, example: Tensor) -> Tensor:
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return logits_in(module(example)).float()
    except InputError:
        raise
    except Exception as error:  # whatever a foreign module raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"the module {type(module).__name__} fails on rows of shape {tuple(example.shape)}: "
            f"{reason}"
        ) from error
    finally:
        module.train(training)


def _splits(
    module: nn.Module, head: str, main_input: str, labels: list[str], example: Tensor
) -> bool:
    """Whether the answer is that of the head on one vector a row. The module is changed.

    Decided by trying, with random numbers in the head: one that starts from 0 answers the same
    whatever it reads and whatever comes after it.
    """
    layer = module.get_submodule(head)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    wanted = _tried(module, example)
    split = SplitModule(module, head, main_input, labels).eval()
    try:
        with torch.no_grad():
            features = split.encoder(**{main_input: example})
            got = split.classifier(features).float()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, InputError):
        return False
    return (
        features.shape == (len(example), split.config.hidden_size)
        and got.shape == wanted.shape
        and torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)
    )


def logits_in(answer: Any) -> Tensor:
    """The logits in whatever a module answers.

    Raises:
        InputError: There are none.
    """
    if isinstance(answer, Mapping):
        answer = answer.get("logits")
    elif isinstance(answer, tuple | list) and answer and not hasattr(answer, "logits"):
        answer = answer[0]
    found = getattr(answer, "logits", answer)
    if not isinstance(found, Tensor):
        raise InputError(
            f"the module answers with a {type(answer).__name__}, expected logits: a tensor, the "
            "first of a tuple, or under the name 'logits'"
        )
    return found


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def _write(module: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = module.state_dict()
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    save_file(tensors, str(folder / WEIGHTS))
