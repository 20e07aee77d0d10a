"""Features of a frozen encoder, encoded once: what a head reads, and a head without its encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.models import encoder_of, evaluation_mode, is_head, main_input, plain_model


class HeadOnly(nn.Module):
    """A classifier whose encoder is replaced by its cached output at one position.

    Features are (B, D, 2): the last hidden state at the chosen position and the pooled output; or
    (B, D, 1) where the encoder has no pooler.
    Holding the wrapped model as a plain attribute keeps its parameter names unchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.encoder_name, _ = encoder_of(model)

    def forward(self, features: Tensor) -> Any:
        """Output of the model for cached encoder outputs (B, D, 1 or 2)."""
        inner = plain_model(self.inner)
        encoder = getattr(inner, self.encoder_name)
        token = features[:, :, 0]
        pooled = features[:, :, 1] if features.shape[2] > 1 else torch.zeros_like(token)
        output: Any = token
        if not getattr(inner, "encoder_gives_tensor", False):
            output = _encoder_output(token[:, None], pooled)
        ones = torch.ones(len(features), 1, dtype=torch.long, device=features.device)
        name = main_input(inner)
        inputs = {name: ones} | ({"attention_mask": ones} if name == "input_ids" else {})
        inner._modules[self.encoder_name] = _StandIn(output)
        try:
            return inner(**inputs)
        finally:
            inner._modules[self.encoder_name] = encoder


class _StandIn(nn.Module):
    """Answers with a fixed encoder output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _encoder_output(hidden: Tensor, pooled: Tensor) -> Any:
    """What an encoder of transformers answers."""
    return _output_class()(last_hidden_state=hidden, pooler_output=pooled)


@cache
def _output_class() -> type[Any]:
    """The usual class of outputs, in which what only some encoders answer is None."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

    class Output(BaseModelOutputWithPoolingAndCrossAttentions):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Output


def token_states(output: Any) -> Tensor:
    """The hidden states (B, T, D) of an encoder's output; positions of a map are its tokens.

    >>> token_states(torch.zeros(2, 5)).shape, token_states(torch.zeros(2, 5, 3, 3)).shape
    (torch.Size([2, 1, 5]), torch.Size([2, 9, 5]))
    """
    hidden: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    if hidden.ndim == 2:
        return hidden[:, None]
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def encode_batch(model: nn.Module, inputs: dict[str, Tensor], position: str) -> Tensor:
    """Frozen features of a batch: hidden state at one position, and pooled.

    Args:
        model: The classifier.
        inputs: Of its encoder.
        position: first, last, or mean over the real tokens.

    Returns:
        (B, D, 2) fp32, or (B, D, 1) where the encoder pools nothing, or to another width.
    """
    _, encoder = encoder_of(model)
    accepted = {k: v for k, v in inputs.items() if k != "labels"}
    output = encoder(**accepted)
    hidden = token_states(output)  # (B, T, D)
    if position == "mean":
        token = _mean_over_tokens(hidden, inputs.get("attention_mask"))
    else:
        index = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        if position == "last":
            mask = inputs.get("attention_mask")
            index = index + hidden.shape[1] - 1 if mask is None else last_token(mask)
        token = hidden[torch.arange(len(hidden), device=hidden.device), index].float()
    pooled = getattr(output, "pooler_output", None)
    if pooled is None or pooled.flatten(1).shape != token.shape:
        return token[:, :, None]
    return torch.stack([token, pooled.float().flatten(1)], dim=2)


def feature_position(model: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    """Which hidden state is enough for the head: ``first``, ``last``, ``mean``, or None.

    Decided by trying: the logits from the cached features must equal those of the whole model. A
    head that starts from 0 gives the same logits whatever it reads, so all heads are shaken first.
    """
    with evaluation_mode(model), shaken(model, is_head(model)):
        wanted = model(**inputs).logits.float()
        for position in ("first", "last", "mean"):
            try:
                got = HeadOnly(model)(encode_batch(model, inputs, position)).logits.float()
            except (RuntimeError, TypeError, AttributeError, IndexError, ValueError, KeyError):
                continue
            if got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-3, atol=1e-4):
                return position
    return None


@contextmanager
def shaken(model: nn.Module, chosen: Callable[[str], bool]) -> Iterator[None]:
    """Add fixed random numbers to the chosen parameters for a while; then all is as it was."""
    random = torch.Generator().manual_seed(0)
    before = {
        parameter: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if chosen(name)
    }
    try:
        with torch.no_grad():
            for parameter, value in before.items():
                noise = torch.randn(value.shape, generator=random)
                parameter.copy_(value + 0.1 * noise.to(value.device, value.dtype))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)


def mean_pooled(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean of the last hidden state over the real tokens or positions.  -> (B, D) fp32."""
    _, encoder = encoder_of(model)
    return _mean_over_tokens(token_states(encoder(**inputs)), inputs.get("attention_mask"))


def encoder_width(model: nn.Module) -> int:
    """Number of features, D, that `mean_pooled` gives.

    Raises:
        InputError: The config of the encoder does not tell it.
    """
    _, encoder = encoder_of(model)
    config = getattr(encoder, "config", None)
    width = (
        getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [0])[-1]
    )
    if not isinstance(width, int) or width < 1:
        raise InputError(
            f"the config of {type(encoder).__name__} names no hidden_size; use another encoder"
        )
    return width


def last_token(mask: Tensor) -> Tensor:
    """Position of the last real token of every row.  (B, T) -> (B,).

    >>> last_token(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist()
    [1, 2]
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    return (mask * steps).argmax(dim=1)


def _mean_over_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, D), (B, T) -> (B, D) fp32; all tokens count where there is no mask."""
    if mask is None:
        return hidden.float().mean(dim=1)
    weight = mask[..., None].float()
    pooled: Tensor = (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    return pooled
