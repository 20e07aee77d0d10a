"""What experts add, as pure functions: weights in every mode, similarities, noise on embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noiseproof.errors import InputError, check_type

MODES = ("none", "mask", "renorm", "compensate")
COMPENSATION: dict[str, Any] = {
    "online": bool,
    "sign": int,
    "most": int | None,
    "order": str,
    "beta": float | str,
}
"""Settings of `Experts` that say how compensate works, with their types; training needs none."""
SHORTEST = 1e-12  # an output of a smaller norm has no direction


@dataclass(frozen=True)
class Experts:
    """Settings of the layers.

    Attributes:
        rank: Of A and of every expert, r.
        alpha: Scaling numerator; s = alpha / r.
        dropout: On the input of A; the router sees all of it.
        dropout_mode: shared (one mask a layer) or per_expert.
        targets: Ends of the names of the linear modules to adapt; None takes `TARGETS`.
        normal: Number of normal experts.
        poison: Number of poisoning experts.
        gate_input: What the router reads: x, or Ax.
        gate_init: kaiming, or normal (deviation 0.02).
        online: compensate: similarities of the token at hand instead of the calibrated ones.
        sign: compensate: sign of the similarities; 0 leaves them out, which is renorm with
            beta=sum_to_one and mask with keep_mass.
        most: compensate: how many experts are compensated; None is all.
        order: compensate: which ones, theta (most similar first) or index.
        beta: compensate: sum_to_one, keep_mass, or a factor.
    """

    rank: int = 4
    alpha: float = 32.0
    dropout: float = 0.05
    dropout_mode: str = "shared"
    targets: tuple[str, ...] | None = None
    normal: int = 3
    poison: int = 1
    gate_input: str = "x"
    gate_init: str = "kaiming"
    online: bool = False
    sign: int = 1
    most: int | None = None
    order: str = "theta"
    beta: float | str = "sum_to_one"

    @property
    def count(self) -> int:
        """All experts, N."""
        return self.normal + self.poison


def check_compensation(
    given: Mapping[str, Any], normal: int, names: Mapping[str, str] | None = None
) -> None:
    """Refuse settings of `COMPENSATION` that mean nothing.

    Args:
        given: Some of them, by name.
        normal: Number of normal experts.
        names: What messages call them; None takes their own names.

    Raises:
        InputError: One is of another type, or out of its range.
    """
    for name, value in given.items():
        named = (names or {}).get(name, name)
        check_type(named, value, COMPENSATION[name])
        number = isinstance(value, float | int)
        ok, wanted = {
            "online": (True, ""),
            "sign": (value in (-1, 0, 1), "be -1, 0 or 1"),
            "most": (value is None or (number and 0 <= value <= normal), f"lie in [0, {normal}]"),
            "order": (value in ("theta", "index"), "be one of theta, index"),
            "beta": (
                0 < value <= 1e6 if number else value in ("sum_to_one", "keep_mass"),
                "be sum_to_one, keep_mass or a number above 0",
            ),
        }[name]
        if not ok:
            raise InputError(f"{named} must {wanted}, got {value!r}")


def expert_weights(
    logits: Tensor, settings: Experts, mode: str, theta: Tensor | None = None
) -> Tensor:
    """Weights of all experts from the logits of the router.  (.., N) -> (.., N) fp32.

    ``none``: softmax. ``mask``: the same with 0 for the poisoning experts. ``renorm``: softmax over
    the normal experts alone. ``compensate`` (DyCompEnSate, our reconstruction: the equation of the
    paper was not available): each normal weight times 1 + sign theta, clamped to [0, 2], and
    divided by their sum (beta=sum_to_one), also times the weight that normal experts had
    (keep_mass), or times beta without a division.

    Args:
        logits: Of the router (.., N), normal experts first.
        settings: Numbers of experts, and how compensate works.
        mode: One of `MODES`.
        theta: compensate: similarity of each normal expert to the poisoning ones, (NE,) or
            (.., NE).

    >>> logits = torch.tensor([0.2, 0.3, 0.1, 0.4]).log()
    >>> theta = torch.tensor([0.5, 0.0, -0.5])
    >>> [round(x, 4) for x in expert_weights(logits, Experts(), "compensate", theta).tolist()]
    [0.4615, 0.4615, 0.0769, 0.0]
    >>> [round(x, 4) for x in expert_weights(logits, Experts(), "renorm").tolist()]
    [0.3333, 0.5, 0.1667, 0.0]
    """
    normal = settings.normal
    everything = torch.softmax(logits.float(), dim=-1)
    if mode == "none" or not settings.poison:
        return everything
    masked = torch.zeros_like(everything)
    if mode == "mask":
        masked[..., :normal] = everything[..., :normal]
        return masked
    relative = torch.softmax(logits[..., :normal].float(), dim=-1)  # no 0 / 0 where D has it all
    if mode == "renorm":
        masked[..., :normal] = relative
        return masked
    assert theta is not None
    factor = (1 + settings.sign * theta.float()).clamp(0, 2)
    if settings.most is not None and settings.most < normal:
        chosen = torch.zeros_like(factor)
        if settings.order == "index":
            chosen[..., : settings.most] = 1
        else:
            chosen.scatter_(-1, theta.topk(settings.most, dim=-1).indices, 1)
        factor = torch.where(chosen > 0, factor, 1.0)
    if isinstance(settings.beta, float | int):
        masked[..., :normal] = settings.beta * everything[..., :normal] * factor
        return masked
    weights = relative * factor
    total = weights.sum(dim=-1, keepdim=True)
    weights = torch.where(total < 1e-6, 1 / normal, weights / total.clamp_min(1e-6))
    if settings.beta == "keep_mass":
        weights = weights * everything[..., :normal].sum(dim=-1, keepdim=True)
    masked[..., :normal] = weights
    return masked


def similarities(hidden: Tensor, gram: Tensor, normal: int) -> Tensor:
    """Cosine of each normal expert's output and that of the poisoning ones.  -> (.., NE) fp32.

    cos(B_i h, B_D h) = h' G_iD h / sqrt(h' G_ii h  h' G_DD h) with G_ij = B_i' B_j, so the outputs
    themselves are not needed. With several poisoning experts the mean over them; 0 where an output
    has no direction.

    Args:
        hidden: h (.., r).
        gram: G (N, N, r, r).
        normal: NE.
    """
    hidden, gram = hidden.float(), gram.float()
    own = gram.diagonal().permute(2, 0, 1)  # (N, r, r)
    squares = torch.einsum("...a,nab,...b->...n", hidden, own, hidden).clamp_min(0)
    cross = torch.einsum("...a,npab,...b->...np", hidden, gram[:normal, normal:], hidden)
    norms = squares.sqrt()
    product = norms[..., :normal, None] * norms[..., None, normal:]
    cosine = torch.where(product < SHORTEST, 0.0, cross / product.clamp_min(SHORTEST))
    return cosine.clamp(-1, 1).mean(dim=-1)


def embedding_noise(
    embeddings: Tensor, mask: Tensor, draws: Sequence[np.random.Generator], kind: str, alpha: float
) -> Tensor:
    """Uniform noise for token embeddings, none on padding.  (B, T, d), (B, T) -> (B, T, d).

    a U with U uniform in (-1, 1). absolute: a = alpha (the paper, read literally). relative: alpha
    times the root mean square of the row's real entries, so that a row's noise does not depend on
    its neighbours (ours). neftune: alpha / sqrt(T_i d), T_i real tokens of the row (Jain et al.
    2023, arXiv:2310.05914).

    Args:
        embeddings: Output of the embedding layer.
        mask: 1 for real tokens.
        draws: A random generator for each row, so that its noise depends on nothing else.
        kind: absolute, relative or neftune.
        alpha: Amplitude; 0 for a row without noise is up to the caller.
    """
    width = embeddings.shape[-1]
    noise = torch.zeros(embeddings.shape, dtype=torch.float32)
    real = mask.bool().cpu()
    for row, random in enumerate(draws):
        count = int(real[row].sum())
        values = random.random((count, width), dtype=np.float32) * 2 - 1
        noise[row][real[row]] = torch.from_numpy(values)
    scale = torch.full((len(noise), 1, 1), float(alpha))
    if kind == "relative":
        scale *= rms_of_tokens(embeddings.detach(), mask).cpu()[:, None, None]
    elif kind == "neftune":
        lengths = real.sum(dim=1).clamp_min(1).float()
        scale /= (lengths * width).sqrt()[:, None, None]
    return (scale * noise).to(embeddings.device, embeddings.dtype)


def rms_of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Root mean square over the entries of a row's real tokens.  (B, T, d), (B, T) -> (B,).

    >>> rms_of_tokens(torch.tensor([[[3.0, 3.0], [9.0, 9.0]]]), torch.tensor([[1, 0]]))
    tensor([3.])
    """
    real = mask.unsqueeze(-1).float()
    squares = (values.float().square() * real).sum(dim=(1, 2))
    return (squares / (real.sum(dim=(1, 2)) * values.shape[-1]).clamp_min(1)).sqrt()


def update_norm(weights: Tensor, hidden: Tensor, gram: Tensor) -> Tensor:
    """Norm of sum_i w_i B_i h, from the Gram matrices.  -> (..).

    Args:
        weights: w (.., N).
        hidden: h (.., r).
        gram: G_ij = B_i' B_j (N, N, r, r).
    """
    mixed = (weights.unsqueeze(-1) * hidden.unsqueeze(-2)).flatten(-2)  # (.., N r)
    whole = gram.permute(0, 2, 1, 3).reshape(mixed.shape[-1], -1)  # (N r, N r)
    return ((mixed @ whole) * mixed).sum(dim=-1).clamp_min(0).sqrt()
