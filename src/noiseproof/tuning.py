"""What trains: the whole model, its head, or one of many adapters, by one word."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from noiseproof.adapters import FAMILIES, AdaptedModel, Adapter
from noiseproof.errors import InputError, unknown_name
from noiseproof.models import (
    head_modules,
    is_head,
    is_language_model,
    layer_modules,
    main_input,
    new_modules,
    plain_model,
    pooler_name,
    quiet,
    set_trainable,
)

PLAIN_TUNING = ("full", "head")
NEUTRAL_TUNING = (*PLAIN_TUNING, "adapter", "bitfit", "lora")
"""Values of ``tune`` with which a model answers as without, until they have trained."""
PROMPTS = ("prompt", "prefix")  # of our own; they need an encoder
RATES = {
    "full": 5e-5,
    "head": 5e-3,
    "adapter": 5e-4,
    "bitfit": 5e-3,
    "prompt": 1e-2,
    "prefix": 1e-2,
}
ADAPTER_RATE = 2e-3  # of every other adapter
VIRTUAL_TOKENS = 20  # that prompt-like families put before every text
NOT_OFFERED = {
    "adalora": "its rank budget must be told the number of steps and be updated in each of them",
    "cpt": "it is made for causal language models",
    "multitask_prompt_tuning": "it needs a task number per row",
    "poly": "it needs a task number per row",
    "trainable_tokens": "it needs a list of token numbers",
    "xlora": "it mixes adapters that are trained already",
}


def tuning_names() -> tuple[str, ...]:
    """All values of ``tune``: full, head, our adapters, and peft's that need nothing else."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    return (*PLAIN_TUNING, *FAMILIES, *sorted(kinds - set(NOT_OFFERED)))


def usual_rate(tune: str) -> float:
    """Peak learning rate of a value of ``tune`` where none is given: ours, see docs/results.

    >>> usual_rate("full"), usual_rate("lora")
    (5e-05, 0.002)
    """
    return RATES.get(tune, ADAPTER_RATE)


def virtual_tokens(tune: str) -> int:
    """Number of learned tokens that a value of ``tune`` puts before every text.

    They take positions like others, so as many fewer are left for the text.

    >>> virtual_tokens("prompt_tuning"), virtual_tokens("lora")
    (20, 0)
    """
    if tune in PLAIN_TUNING or tune in FAMILIES:  # ours stand behind the position table
        return 0
    import peft

    for kind, config_class in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind.value.lower() == tune:
            fields = {field.name for field in dataclasses.fields(config_class)}
            return VIRTUAL_TOKENS if "num_virtual_tokens" in fields else 0
    return 0


def tune_model(
    model: nn.Module,
    tune: str,
    *,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] | None = None,
    settings: dict[str, Any] | None = None,
    pooler: bool = False,
) -> nn.Module:
    """Make the part of ``model`` trainable that ``tune`` names.

    Args:
        model: A transformers classifier.
        tune: ``full``, ``head`` (linear probe), ``adapter``, ``bitfit``, ``prompt`` or ``prefix``,
            or a peft type in lower case such as ``lora``.
        rank: Rank of the low-rank families, width of the bottleneck of ``adapter``; families
            without one do not read it.
        alpha: Scaling numerator of LoRA-like families; None is twice the rank.
        target_modules: Module names to adapt; None takes peft's choice for the architecture, and
            where it has none every linear module of the layers, or every convolution.
        settings: Further fields of the peft config of this family.
        pooler: Train the encoder's pooler as well.

    Raises:
        InputError: Unknown family, or peft refuses the settings.
    """
    if tune == "full":
        return model
    if tune == "head":
        head = is_head(model)
        if not any(head(name) for name, _ in model.named_parameters()):
            raise InputError(
                f"tune=head: {type(model).__name__} reads and writes with the same weights, so it "
                "has no head of its own; use lora"
            )
        if new := new_modules(model):
            warnings.warn(
                f"the checkpoint of the encoder does not hold {', '.join(new)}, which stays random "
                "with tune=head: the probe reads a random projection of the features; tune more "
                "than the head, or take an encoder whose pooler was trained",
                UserWarning,
                stacklevel=2,
            )
        set_trainable(model, head)
        return model
    if tune in FAMILIES:
        size = rank if tune == "adapter" else VIRTUAL_TOKENS
        targets = None if target_modules is None else tuple(target_modules)
        return AdaptedModel(model, Adapter(tune, size, pooler=pooler, targets=targets))
    import peft

    kinds = {kind.value.lower(): kind for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    if tune in NOT_OFFERED:
        raise InputError(
            f"tune={tune!r} is not offered: {NOT_OFFERED[tune]}; lora is the usual one"
        )
    if tune not in kinds:
        raise InputError(unknown_name("tuning", tune, tuning_names()))
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kinds[tune]]
    fields = {field.name for field in dataclasses.fields(config_class)}
    given: dict[str, Any] = {
        "task_type": _task_type(model),
        "r": rank,
        "rank": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "alpha": 2 * rank if alpha is None else alpha,
        "num_virtual_tokens": VIRTUAL_TOKENS,
        "oft_block_size": 0,  # follows from the rank
    }
    if not is_language_model(model):  # whose head is no new one
        saved = head_modules(model) + new_modules(model) + (pooler_name(model) if pooler else [])
        given["modules_to_save"] = list(dict.fromkeys(saved))
    if target_modules is not None:
        given["target_modules"] = list(target_modules)
    given = {name: value for name, value in given.items() if name in fields} | (settings or {})
    try:
        try:
            return _adapted(model, config_class(**given))
        except ValueError as error:
            if "target_modules" in given or "specify `target_modules`" not in str(error):
                raise
        kind = nn.LayerNorm if tune == "ln_tuning" else nn.Linear
        names = layer_modules(model, kind)
        given["target_modules"] = names or layer_modules(model, nn.Conv2d)
        return _adapted(model, config_class(**given))
    except Exception as error:  # peft raises many types for what does not fit the model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(f"peft cannot apply tune={tune!r} to this model: {reason}") from error


def _task_type(model: nn.Module) -> Any:
    """What peft calls the task of a model; None where it has no name for it."""
    import peft

    if main_input(model) != "input_ids":
        return None
    if not is_language_model(model):
        return peft.TaskType.SEQ_CLS
    several = bool(plain_model(model).config.is_encoder_decoder)  # type: ignore[union-attr]
    return peft.TaskType.SEQ_2_SEQ_LM if several else peft.TaskType.CAUSAL_LM


def _adapted(model: nn.Module, config: Any) -> nn.Module:
    import peft

    with quiet():
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted
