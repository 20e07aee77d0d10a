"""Saving and loading models: heads and adapters of our own beside what transformers writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.models import cannot_load, mark_new, plain_model, quiet, resolve_model

HEAD_FILE = "head.safetensors"  # in model/: a head that transformers and peft have no class for
ADAPTERS_CONFIG = "adapters.json"  # in model/: settings and encoder of an adapter of our own
ADAPTERS_FILE = "adapters.safetensors"  # in model/: what it trained, head included
ADAPTERS = ("adapter_config.json", ADAPTERS_CONFIG)  # peft's, and ours


def save_adapter(
    folder: Path, tensors: Mapping[str, Tensor], base: str, settings: Mapping[str, Any]
) -> None:
    """Write an adapter of our own: its tensors, its settings, and which model it belongs to."""
    from safetensors.torch import save_file

    found = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(found, str(folder / ADAPTERS_FILE))
    about = json.dumps({"base_model_name_or_path": base, **settings}, indent=1)
    (folder / ADAPTERS_CONFIG).write_text(about + "\n", encoding="utf-8")


def saved_adapter(folder: Path, families: Sequence[str]) -> dict[str, Any] | None:
    """Settings of a saved adapter of one of these families; None where there is no such."""
    about = folder / ADAPTERS_CONFIG
    if not about.exists():
        return None
    settings: dict[str, Any] = json.loads(about.read_bytes())
    if settings["family"] not in families:
        return None
    del settings["base_model_name_or_path"]
    if settings["targets"] is not None:
        settings["targets"] = tuple(settings["targets"])
    return settings


def fill_adapter(adapted: Any, folder: Path, wanted: Iterable[str], inner: str) -> None:
    """Put saved tensors into the parameters and buffers of an adapted model.

    Args:
        adapted: The model.
        folder: Where `save_adapter` wrote.
        wanted: Names of the tensors that must be there, and no others.
        inner: What messages call the model inside.

    Raises:
        InputError: The file has other names or shapes than these.
    """
    from safetensors.torch import load_file

    tensors = load_file(str(folder / ADAPTERS_FILE))
    named = dict(adapted.named_parameters()) | dict(adapted.named_buffers())
    names = set(wanted)
    wrong = names ^ set(tensors)
    wrong |= {name for name in names & set(tensors) if tensors[name].shape != named[name].shape}
    if wrong:
        raise InputError(
            f"{folder / ADAPTERS_FILE} does not fit the {inner} {adapted.config.name_or_path}: "
            f"{sorted(wrong)[0]} differs; was the {inner} replaced by another one?"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[name].copy_(tensor)


def merged(model: Any) -> nn.Module:
    """The plain model with its adapters merged into the weights; a plain model as it is."""
    plain: nn.Module = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return plain


def save_model(model: nn.Module, processor: Any, folder: Path) -> None:
    """Write what transformers (and peft, for adapters) load without noiseproof, head included.

    Args:
        model: A model of transformers or peft, or another that has ``save_pretrained``.
        processor: Its tokenizer or image processor; None where there is none.
        folder: Where to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(str(folder), safe_serialization=True)  # type: ignore[operator]
        inner = plain_model(model)
        if inner is not model:
            inner.config.save_pretrained(str(folder))  # type: ignore[union-attr, operator]
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty form, with a local path
        if processor is not None:
            processor.save_pretrained(str(folder))


def load_saved_model(
    folder: Path,
    encoder: str | None = None,
    auto: str = "AutoModelForSequenceClassification",
    load_processor: Callable[[str], Any] | None = None,
) -> tuple[nn.Module, Any]:
    """Load a saved ``model/`` folder: a plain transformers model or a peft adapter.

    Of an adapter of our own this gives its encoder alone; `noiseproof.adapters.restored` adds it.

    Args:
        folder: Where `save_model` wrote.
        encoder: Name under which the encoder of an adapter was asked for; looked up anew when the
            place that the adapter names is gone, as on another machine.
        auto: Class of transformers that loads the model.
        load_processor: Loads its image processor; None loads a tokenizer.

    Raises:
        InputError: The folder holds neither, or the encoder of the adapter cannot be loaded.
    """
    import transformers

    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no model (config.json is missing); expected RUN/model")
    classifier = getattr(transformers, auto)
    load_processor = load_processor or transformers.AutoTokenizer.from_pretrained
    base, place, about = str(folder), folder, None
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(str(folder))
            processor = load_processor(str(folder))
            about = next((folder / name for name in ADAPTERS if (folder / name).exists()), None)
            if about is not None:
                base = str(json.loads(about.read_bytes())["base_model_name_or_path"])
                place = Path(base)
                if encoder is not None and not place.is_dir():
                    base = resolve_model(encoder)
                model: nn.Module
                model, loading = classifier.from_pretrained(
                    base,
                    config=config,
                    ignore_mismatched_sizes=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
                mark_new(model, loading)
                if about.name != ADAPTERS_CONFIG:
                    from peft import PeftModel

                    model = PeftModel.from_pretrained(model, str(folder))
            else:
                model = classifier.from_pretrained(str(folder), dtype=torch.float32)
    except Exception as error:  # transformers and peft raise many types here
        if about is not None and place.is_absolute() and not place.exists():
            found = "" if encoder is None else f", and {encoder!r} cannot be loaded instead"
            raise InputError(
                f"cannot load model '{place}': the adapter in {folder} was trained on this "
                f"encoder, which is gone{found}; put it back, or write its folder or hub name into "
                f"{about} as base_model_name_or_path"
            ) from error
        raise InputError(cannot_load(base, error)) from error
    return model.eval(), processor
