"""Language models: loading one that can be trained on responses, and letting it answer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.models import (
    cannot_load,
    evaluation_mode,
    longest_input,
    plain_model,
    quiet,
    resolve_model,
)
from noiseproof.saving import load_saved_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATE_ROWS = 16  # rows that are answered together


def load_language_model(
    name: str, *, reserved_tokens: int = 0
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a decoder, or an encoder with a decoder, and its tokenizer.

    Args:
        name: Local folder or hub name.
        reserved_tokens: Positions to keep free for prompts that an adapter puts before every row;
            the tokenizer's ``model_max_length`` counts them out.

    Raises:
        InputError: It cannot be loaded, has no output layer of its own, sees the tokens it should
            predict, or has no tokenizer.
    """
    import transformers

    source = resolve_model(name)
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise InputError(cannot_load(name, ValueError("the folder has no config.json")))
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            model, loading = getattr(transformers, auto_class(config)).from_pretrained(
                source, output_loading_info=True, use_safetensors=True, dtype=torch.float32
            )
        except Exception as error:  # transformers raises many types for what is the user's mistake
            raise InputError(f"{cannot_load(name, error)}; {WANTED}") from error
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        except Exception as error:
            raise InputError(cannot_load(name, ValueError(f"no tokenizer: {error}"))) from error
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise InputError(f"model {name!r} has no weights for {missing}; {WANTED}")
    if not model.config.is_encoder_decoder and not is_causal(model):
        raise InputError(
            f"model {name!r} ({type(model).__name__}) reads the tokens that it should predict; "
            f"{WANTED}"
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers 5 makes one up
        raise InputError(cannot_load(name, ValueError("its tokenizer has no vocabulary")))
    if longest := longest_input(model):
        limit = longest - reserved_tokens
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    if tokenizer.pad_token_id is None:  # the end of text pads, and is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return model, tokenizer


WANTED = (
    "expected a language model that writes from left to right, such as GPT-2, Llama, Qwen or T5; "
    "for an encoder use task text"
)


def auto_class(config: Any) -> str:
    """The class of transformers that loads such a language model."""
    return "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"


def load_saved_language_model(folder: Path, name: str | None) -> tuple[nn.Module, Any]:
    """Load what `noiseproof.saving.save_model` wrote of a language model.

    Args:
        folder: ``model/`` of a run.
        name: Of the model that the run was started from.
    """
    import transformers

    auto = "AutoModelForCausalLM"
    if (folder / "config.json").exists():
        auto = auto_class(transformers.AutoConfig.from_pretrained(str(folder)))
    return load_saved_model(folder, name, auto)


def is_causal(model: nn.Module) -> bool:
    """Whether no position sees the tokens after it; found by trying."""
    device = next(model.parameters()).device
    size = int(plain_model(model).config.vocab_size)  # type: ignore[union-attr, arg-type]
    ids = torch.arange(1, 7, device=device)[None] % size
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % size
    with evaluation_mode(model):
        first, second = model(input_ids=ids).logits, model(input_ids=other).logits
    return torch.allclose(first[:, :-1], second[:, :-1], rtol=1e-4, atol=1e-4)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a language model reads the prompt with an encoder of its own."""
    return bool(plain_model(model).config.is_encoder_decoder)  # type: ignore[union-attr]


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """Answer prompts greedily: N lists of token ids -> N texts.

    Prompts of one batch are padded on the left, so that all responses start at one place. What a
    model answers does not depend on the batch: prompts that follow learned tokens, which must
    stand right before them, share a batch only where they are equally long.
    """
    answers = [""] * len(prompts)
    device = next(model.parameters()).device
    pad = int(tokenizer.pad_token_id or 0)
    alike = bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
    for rows in _batches(prompts, alike):
        width = max(len(prompts[row]) for row in rows)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for place, row in enumerate(rows):
            start = width - len(prompts[row])
            ids[place, start:] = torch.tensor(prompts[row])
            mask[place, start:] = 1
        with evaluation_mode(model), quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported")  # they are not
            made: Tensor = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
            )
        new = made[:, 1:] if is_encoder_decoder(model) else made[:, width:]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text.strip()
    return answers


def _batches(prompts: Sequence[Sequence[int]], alike: bool) -> Iterator[list[int]]:
    """Rows of similar length together, or of equal length alone."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for _, group in groupby(order, lambda row: len(prompts[row]) if alike else 0):
        rows = list(group)
        for start in range(0, len(rows), GENERATE_ROWS):
            yield rows[start : start + GENERATE_ROWS]
