"""The attention of transformers with more keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

ATTENTION = "noiseproof_columns"
"""Its name in transformers, and where a module keeps its columns."""

_SEEN: ContextVar[list[tuple[nn.Module, Sequence[int]]] | None] = ContextVar("seen", default=None)


@contextmanager
def calls_noted() -> Iterator[list[tuple[nn.Module, Sequence[int]]]]:
    """The modules that attend here meanwhile, in order, with the shapes of their keys."""
    calls: list[tuple[nn.Module, Sequence[int]]] = []
    seen = _SEEN.set(calls)
    try:
        yield calls
    finally:
        _SEEN.reset(seen)


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
