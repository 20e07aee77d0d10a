"""Networks of your own: any torch module that gives logits, with the parts that methods ask for.

A module whose last step is a linear layer on one vector a row is split there: what comes before is
the encoder, the layer is the head. So a head can be trained alone, on features that are computed
once. A module that answers with its ``features`` (B, D) beside its logits is split behind them.
Whether a split is right is found by trying; a module that cannot be split trains whole.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping
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


class Split(NamedTuple):
    """Where a module is split.

    Attributes:
        head: Name of the part that makes logits of features.
        given: Whether the module answers with the features; else they are what it gives without
            the head.
    """

    head: str
    given: bool = False


class SplitModule(nn.Module):
    """A module that is split into encoder and head.

    Attributes:
        encoder: All but the head: rows (B, ...) -> features (B, D).
        classifier: The head: a linear layer, or what stands behind features that are given.
        main_input_name: What its rows are called.
    """

    base_model_prefix = "encoder"
    encoder_gives_tensor = True

    def __init__(
        self,
        module: nn.Module,
        split: Split,
        main_input: str,
        labels: list[str],
        width: int,
        description: str = "",
    ) -> None:
        """Split a module, which is changed.

        Args:
            module: With its head.
            split: Where.
            main_input: What its rows are called.
            labels: Class names.
            width: Number of features, D.
            description: See `ModuleConfig`.
        """
        super().__init__()
        layer = module.get_submodule(split.head)
        _put(module, split.head, Blank(len(labels)) if split.given else nn.Identity())
        self.config = ModuleConfig(width, dict(enumerate(labels)), description)
        self.encoder = Beheaded(module, split, main_input, self.config)
        self.classifier = layer
        self.main_input_name = main_input
        self.name_or_path = ""

    def forward(self, **inputs: Tensor) -> Logits:
        """Rows (B, ...) -> logits (B, C)."""
        return Logits(self.classifier(self.encoder(**inputs)))

    def plain(self) -> nn.Module:
        """The module with its head, ready to be used without this library; a copy."""
        module = copy.deepcopy(self.encoder.module)
        _put(module, self.encoder.split.head, copy.deepcopy(self.classifier))
        return module

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write the weights under the names that the module itself has for them."""
        _write(self.plain(), Path(folder))


class ModuleConfig(NamedTuple):
    """What methods ask a model's ``config`` for.

    Attributes:
        hidden_size: Number of features, D.
        id2label: Class names by number.
        description: Digest of what the encoder computes besides its weights; empty where that is
            not known.
    """

    hidden_size: int
    id2label: dict[int, str]
    description: str = ""

    @property
    def num_labels(self) -> int:
        """Number of classes, C."""
        return len(self.id2label)

    def to_dict(self) -> dict[str, Any]:
        """What peft reads of a config."""
        values = {"hidden_size": self.hidden_size, "id2label": self.id2label}
        return {"model_type": "custom", **values}

    def to_json_string(self, use_diff: bool = True) -> str:
        """What tells encoders of equal weights apart, see `fingerprint`."""
        return self.description


class Blank(nn.Module):
    """Stands where a head was whose logits nobody reads."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> zeros (B, C)."""
        return features.new_zeros(*features.shape[:-1], self.classes)


class Beheaded(nn.Module):
    """A module without its head."""

    def __init__(
        self, module: nn.Module, split: Split, main_input: str, config: ModuleConfig
    ) -> None:
        super().__init__()
        self.module, self.split, self.main_input, self.config = module, split, main_input, config

    def forward(self, **inputs: Tensor) -> Tensor:
        """Rows (B, ...) -> features (B, D)."""
        answer = self.module(inputs[self.main_input])
        given = features_in(answer) if self.split.given else None
        return logits_in(answer) if given is None else given

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write the weights that are left."""
        _write(self.module, Path(folder))


def wrap_module(
    module: nn.Module, labels: list[str], main_input: str, example: Tensor
) -> SplitModule | WholeModule:
    """Make a copy of a module answer as a classifier of transformers does.

    Args:
        module: Takes rows (B, ...) and gives logits (B, C): a tensor, the first of a tuple,
            ``["logits"]`` of a dict, or an attribute of that name. A dict or object may hold
            ``features`` (B, D) too.
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
    for split in _candidates(module, example, wanted):
        features = _features(copy.deepcopy(module), split, main_input, labels, example)
        if features is not None:
            width, described = features.shape[1], _described(module, features)
            return SplitModule(module, split, main_input, labels, width, described)
    return WholeModule(module, main_input)


def _candidates(module: nn.Module, example: Tensor, logits: Tensor) -> list[Split]:
    """Where a module may be split: behind the features that it gives, or at its linear layers.

    The outermost part that reads the features and gives the logits is the first, so that dropout
    in a head stays in it; of the linear layers it is the last.
    """
    found: list[tuple[str, Tensor]] = []  # parts that gave the logits, and what they read

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(part: nn.Module, inputs: Any, output: Any) -> None:
            alone = len(inputs) == 1 and _equal(output, logits)
            if name and alone and any(True for _ in part.parameters()):
                found.append((name, inputs[0]))

        return look

    hooks = [part.register_forward_hook(watch(name)) for name, part in module.named_modules()]
    try:
        features = features_in(_answer(module, example))
    finally:
        for hook in hooks:
            hook.remove()
    behind = [name for name, read in reversed(found) if _equal(read, features)]
    linear = [
        name
        for name, layer in module.named_modules()
        if name and isinstance(layer, nn.Linear) and layer.out_features == logits.shape[1]
    ]
    return [Split(name, given=True) for name in behind] + [Split(name) for name in linear[::-1]]


def _equal(one: Any, two: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(two, Tensor)
    return both and torch.equal(one.float(), two.float())


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
    return logits_in(_answer(module, example)).float()


def _answer(module: nn.Module, example: Tensor) -> Any:
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return module(example)
    except Exception as error:  # whatever a foreign module raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"the module {type(module).__name__} fails on rows of shape {tuple(example.shape)}: "
            f"{reason}"
        ) from error
    finally:
        module.train(training)


def _features(
    module: nn.Module, split: Split, main_input: str, labels: list[str], example: Tensor
) -> Tensor | None:
    """Features (B, D) of the rows, if the answer is that of the head on them. Changes the module.

    Decided by trying, with random numbers in the head: one that starts from 0 answers the same
    whatever it reads and whatever comes after it. Dropout between features that are given and the
    head would be lost by the split, and shows in training alone.
    """
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.get_submodule(split.head).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    whole = copy.deepcopy(module)
    layer = module.get_submodule(split.head)
    width = layer.in_features if isinstance(layer, nn.Linear) else 0
    parted = SplitModule(module, split, main_input, labels, width)
    features = None
    try:
        for training in (False, True) if split.given else (False,):
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                wanted = logits_in(whole.train(training)(example)).float()
                torch.manual_seed(0)
                read = parted.train(training).encoder(**{main_input: example})
                got = parted.classifier(read).float()
            if read.ndim != 2 or len(read) != len(example) or (width and read.shape[1] != width):
                return None
            if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=1e-4, atol=1e-5):
                return None
            features = read if features is None else features
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, InputError):
        return None
    return features


def _described(module: nn.Module, features: Tensor) -> str:
    """Digest of what a module computes besides its weights: its code, and what it makes of rows.

    Code that the files of its classes call, numbers that they hold and buffers that are not saved
    show in the features. Empty where a class has no file, or the features do not hang on the rows:
    then nothing that was computed earlier can be trusted to be the same.
    """
    if torch.equal(features[0], features[1]):
        return ""
    digest = hashlib.sha256(features.float().cpu().numpy().tobytes())
    names = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in map(type, module.modules())}
    for name, kind in sorted(names.items()):
        digest.update(f"{name}\n".encode())
        if not name.startswith("torch."):
            try:
                digest.update(Path(inspect.getfile(kind)).read_bytes())
            except (TypeError, OSError):
                return ""
    return digest.hexdigest()


def features_in(answer: Any) -> Tensor | None:
    """The features (B, D) in what a module answers; None where it gives none."""
    held = isinstance(answer, Mapping)
    found = answer.get("features") if held else getattr(answer, "features", None)
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


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
