"""Experts around the modules of a model, their freezing, saving and loading."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noiseproof import __version__
from noiseproof.errors import InputError
from noiseproof.experts.layers import ExpertLinear, Reading, Switch, shape_of
from noiseproof.experts.mixing import COMPENSATION, MODES, Experts, check_compensation
from noiseproof.experts.watching import Watch
from noiseproof.models import kept_parameters
from noiseproof.saving import ADAPTERS_CONFIG, fill_adapter, save_adapter, saved_adapter

FAMILY = "experts"  # in adapters.json
SAMPLED = 64  # values of a tensor of the model that `base_digest` covers
READ = ("input_ids", "inputs_embeds", "attention_mask")  # one of which tells the rows of a call
TARGETS: dict[str, tuple[str, ...]] = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "electra": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "deberta-v2": ("query_proj", "value_proj"),
    "modernbert": ("Wqkv",),
    "vit": ("query", "value"),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "t5": ("q", "v"),
}
"""Names of query and value projections by architecture; fused ones are adapted whole."""
FUSED = ("Wqkv", "c_attn", "query_key_value")  # those that give keys as well


class ExpertModel(nn.Module):
    """A model of transformers whose target modules have experts; it answers as the model does.

    Attributes:
        model: The model; linear modules are replaced inside it.
        settings: Of the layers.
        switch: Shared by the layers.
        noise: Called with the embeddings (B, T, d) and the mask in training; None adds none.
        fresh_head: Weights of the head before training, by name.
        save_poison: Whether the poisoning experts are written with the rest.
        seal: What the frozen tensors were when a stage began, for the method.
    """

    def __init__(self, model: nn.Module, settings: Experts) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        targets = settings.targets or default_targets(model)
        self.settings = dataclasses.replace(settings, targets=targets)
        self.switch = Switch("none" if not settings.poison else "renorm")
        self.kept = kept_parameters(model)
        for name in target_modules(model, targets, self.kept):
            parent, _, last = name.rpartition(".")
            layer = ExpertLinear(model.get_submodule(name), self.settings, self.switch)
            setattr(model.get_submodule(parent), last, layer)
        self.save_poison, self.has_poison = True, settings.poison > 0
        self.seal: dict[str, str] = {}
        self.noise: Callable[[Tensor, Tensor], Tensor] | None = None
        self._shaken = [
            embeddings.register_forward_hook(self._embedded)
            for embeddings in token_embeddings(model)
        ]
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
            decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)
        trained = set(self.trained)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)
        self.fresh_head = {
            name: parameter.detach().clone()
            for name, parameter in self.named_parameters()
            if name in {f"model.{kept}" for kept in self.kept}
        }

    def forward(self, **inputs: Any) -> Any:
        """Output of the model."""
        masks = (inputs.get("attention_mask"), inputs.get("decoder_attention_mask"))
        read = next((inputs[name] for name in READ if inputs.get(name) is not None), None)
        self.switch.reading = Reading(*masks, None if read is None else len(read))
        try:
            return self.model(**inputs)
        finally:
            self.switch.reading = None

    def generate(self, *args: Any, **settings: Any) -> Any:
        """Generate as the model does."""
        return self.model.generate(*args, **settings)  # type: ignore[operator]

    def get_base_model(self) -> nn.Module:
        """The model, as peft names it; its experts are inside."""
        return self.model

    @property
    def layers(self) -> dict[str, ExpertLinear]:
        """The layers with experts, by name."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, ExpertLinear)
        }

    @property
    def trained(self) -> list[str]:
        """Names of what may train: experts, routers, head, and what the checkpoint did not hold."""
        own = [name for name, _ in self.named_parameters() if ".lora_" in name]
        return own + [f"model.{name}" for name in self.kept]

    @property
    def calibrated(self) -> bool:
        """Whether similarities were measured."""
        return all(bool(layer.lora_calibrated) for layer in self.layers.values())

    @property
    def mode(self) -> str:
        """How poisoning experts count at inference."""
        return self.switch.mode

    def set_inference_mode(self, mode: str, **compensation: Any) -> None:
        """Count poisoning experts in another way from now on.

        Args:
            mode: One of `MODES`.
            compensation: How compensate works: some of online, sign, most, order and beta, see
                `Experts`. What is not given stays.

        Raises:
            InputError: Unknown or out of range, or the saved model cannot answer so.
        """
        unknown = sorted(compensation.keys() - set(COMPENSATION))
        if unknown:
            raise InputError(
                f"compensate has no setting {unknown[0]!r}; it has {', '.join(COMPENSATION)}"
            )
        check_compensation(compensation, self.settings.normal)
        settings = dataclasses.replace(self.settings, **compensation)
        if mode not in MODES:
            raise InputError(f"unknown inference mode {mode!r}; available: {', '.join(MODES)}")
        if mode != "none" and not self.settings.poison:
            raise InputError(f"a model without poisoning experts has the mode none, not {mode!r}")
        if mode == "none" and self.settings.poison > 0 and not self.has_poison:
            raise InputError("the poisoning experts were not saved; use mask, renorm or compensate")
        if mode == "compensate" and not self.calibrated:
            if not settings.online:
                raise InputError("compensate needs a calibrated model; use renorm or mask")
            with torch.no_grad():
                for layer in self.layers.values():
                    layer.lora_gram.copy_(layer.gram())
        self.switch.mode = mode
        self.settings = settings
        for layer in self.layers.values():
            layer.settings = self.settings

    @contextmanager
    def watching(self, rows: int) -> Iterator[Watch]:
        """Note what the layers see of so many rows, for a while."""
        watch = Watch(self.layers, rows)
        self.switch.watch = watch
        try:
            yield watch
        finally:
            self.switch.watch = None

    def remove_noise(self) -> None:
        """Training is over: nothing is added to embeddings any more."""
        for hook in self._shaken:
            hook.remove()

    def keep_down(self) -> None:
        """Remember A as it is now, for `ExpertLinear.drift`."""
        with torch.no_grad():
            for layer in self.layers.values():
                layer.down_before.copy_(layer.lora_A.weight)

    def restore_head(self) -> None:
        """Give the head the weights that it had before training."""
        named = dict(self.named_parameters())
        with torch.no_grad():
            for name, tensor in self.fresh_head.items():
                named[name].copy_(tensor)

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write experts and head, and which model they belong to."""
        named = dict(self.named_parameters()) | dict(self.named_buffers())
        tensors = {name: named[name] for name in self._saved_names()}
        settings = {"family": FAMILY, "save_poison": self.save_poison}
        settings |= dataclasses.asdict(self.settings) | {"mode": self.switch.mode}
        settings |= {
            "layers": list(self.layers),
            "calibrated": self.calibrated,
            "base_digest": base_digest(self),
            "version": __version__,
        }
        save_adapter(Path(folder), tensors, str(self.config.name_or_path), settings)

    def _saved_names(self) -> list[str]:
        buffers = [name for name, _ in self.named_buffers() if ".lora_" in name]
        names = self.trained + buffers
        return [name for name in names if self.save_poison or ".lora_BD" not in name]

    def _embedded(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if self.noise is None or not self.training:
            return None
        return output + self.noise(output, self.switch.real(output))

    def _enter_decoder(self, _module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        if self.switch.reading is not None:
            self.switch.reading.enter_decoder(given.get("encoder_hidden_states"))


def restored_experts(model: nn.Module, folder: Path) -> nn.Module:
    """Put saved experts into their model; without any the model itself.

    A file from before a field of it was kept has no less: what is missing is not checked.

    Args:
        model: What `noiseproof.saving.load_saved_model` gave.
        folder: Where `ExpertModel.save_pretrained` wrote.

    Raises:
        InputError: The file belongs to another model, is not whole, or is of a version that knew
            other settings.
    """
    settings = saved_adapter(folder, (FAMILY,))
    if settings is None:
        return model
    about = ("family", "mode", "save_poison", "layers", "calibrated", "base_digest", "version")
    _, mode, save_poison, _, _, digest, version = (settings.pop(name, None) for name in about)
    known = {item.name for item in dataclasses.fields(Experts)}
    for name in sorted(settings.keys() - known):
        raise InputError(
            f"{folder / ADAPTERS_CONFIG} has the setting {name!r}, which noiseproof {__version__} "
            f"does not know; it was written by noiseproof {version}: install that version"
        )
    adapted = ExpertModel(model, Experts(**settings))
    adapted.has_poison = adapted.save_poison = save_poison
    fill_adapter(adapted, folder, adapted._saved_names(), "model")
    adapted.set_inference_mode(mode)
    adapted.remove_noise()
    if digest is not None and base_digest(adapted) != digest:
        warnings.warn(
            f"{adapted.config.name_or_path} has other weights than the model that the experts in "
            f"{folder} were trained beside, so what they add means nothing there; put the old "
            "weights back, or train again",
            UserWarning,
            stacklevel=2,
        )
    return adapted.eval()


def base_digest(model: ExpertModel) -> str:
    """Digest of the frozen model: the first values of every tensor that no stage trains.

    They are rounded to bf16, so that a model in half precision is the same one.
    """
    trained = set(model.trained)
    found = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        if name not in trained:
            values = parameter.detach().flatten()[:SAMPLED].to(torch.bfloat16).cpu()
            found.update(name.encode() + values.view(torch.int16).numpy().tobytes())
    return found.hexdigest()


def token_embeddings(model: Any) -> list[nn.Module]:
    """The modules that turn tokens into vectors; encoder and decoder may each have their own."""
    parts = [model]
    if model.config.is_encoder_decoder:
        parts += [model.get_encoder(), model.get_decoder()]
    return list(dict.fromkeys(part.get_input_embeddings() for part in parts))


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """Query and value projections of a known architecture.

    Raises:
        InputError: It is not known; lists its linear modules.
    """
    kind = str(getattr(model.config, "model_type", ""))
    if kind in TARGETS:
        return TARGETS[kind]
    raise InputError(
        f"experts do not know the query and value projections of {type(model).__name__}; give "
        f"target_modules, some of {', '.join(linear_endings(model))}"
    )


def target_modules(model: nn.Module, targets: Sequence[str], kept: Sequence[str] = ()) -> list[str]:
    """Full names of the linear modules whose names end so.

    Args:
        model: What they are in.
        targets: Ends of names.
        kept: Names of parameters that train as a whole, such as the head's; modules that hold one
            of them are left out.

    Raises:
        InputError: There is none, or one is not linear.
    """
    found: list[str] = []
    whole: list[str] = []
    for name, module in model.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in targets):
            shape_of(module)
            trains = any(parameter.startswith(f"{name}.") for parameter in kept)
            (whole if trains else found).append(name)
    if whole and not found:
        raise InputError(
            f"{' and '.join(whole)} of {type(model).__name__} train as a whole with the head, and "
            "get no experts; give other target_modules, or leave them out"
        )
    if not found:
        raise InputError(
            f"no module of {type(model).__name__} is called {' or '.join(targets)}; its linear "
            f"modules are {', '.join(linear_endings(model))}"
        )
    return found


def linear_endings(model: nn.Module) -> list[str]:
    """Last parts of the names of all linear modules."""
    kinds = (name.rpartition(".")[2] for name, module in model.named_modules() if _linear(module))
    return list(dict.fromkeys(kinds))


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
