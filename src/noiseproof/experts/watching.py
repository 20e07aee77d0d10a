"""What layers see of some rows, summed token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noiseproof.errors import InputError
from noiseproof.experts.layers import ExpertLinear
from noiseproof.experts.mixing import MODES, SHORTEST, expert_weights, similarities, update_norm

SUMS = ("tokens", "poison", "poison_square", "above", "entropy", *MODES)
"""What `seen_by` says of a token, before load and similarity of every normal expert."""


def seen_by(layer: ExpertLinear, output: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
    """What a layer does with each token, as numbers.  -> (.., K) fp32.

    `SUMS` in order: 1; weight of the poisoning experts, its square, and whether it exceeds their
    even share; entropy of all weights; norm of what the experts add in each mode, by that of the
    frozen module (compensate needs a calibrated layer). Then the share of each normal expert among
    them (NE,), and its similarity to the poison (NE,).

    Args:
        layer: With its router and experts.
        output: Of the frozen module (.., d_out).
        hidden: A x (.., r).
        logits: Of the router (.., N).
    """
    settings, hidden = layer.settings, hidden.float()
    normal, gram = settings.normal, layer.gram()
    weights = torch.softmax(logits.float(), dim=-1)
    poison = weights[..., normal:].sum(dim=-1)
    above = (poison > settings.poison / settings.count).float()
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(dim=-1)
    load = torch.softmax(logits[..., :normal].float(), dim=-1)
    theta = similarities(hidden, gram, normal) if settings.poison else torch.zeros_like(load)
    scale = settings.alpha / settings.rank / output.float().norm(dim=-1).clamp_min(SHORTEST)
    similar = theta if settings.online else layer.lora_theta
    by_mode = [expert_weights(logits, settings, mode, similar) for mode in MODES]
    updates = [scale * update_norm(mixed, hidden, gram) for mixed in by_mode]
    single = [torch.ones_like(poison), poison, poison.square(), above, entropy, *updates]
    return torch.cat([torch.stack(single, dim=-1), load, theta], dim=-1)


class Watch:
    """What layers see of some rows: sums over the real tokens of every row and layer.

    Attributes:
        places: Where the rows of the call at hand stand among all, 0 to R - 1.
        sums: (R, layers, K), -inf where nothing was seen: `SUMS`, load (NE,), similarity (NE,),
            similarity of the row's first token (NE,), and number of calls.
    """

    def __init__(self, layers: Mapping[str, ExpertLinear], rows: int) -> None:
        self._numbers = {id(layer): number for number, layer in enumerate(layers.values())}
        self._names = list(layers)
        self._settings = next(iter(layers.values())).settings
        self._device = torch.device("cpu")
        self.places: list[int] = []
        width = len(SUMS) + 3 * self._settings.normal + 1
        self.sums = torch.full((rows, len(layers), width), -torch.inf, dtype=torch.float64)

    def begin(self, places: list[int]) -> None:
        """A call of the model with these rows comes next; what was seen of them counts no more."""
        self.places = places
        self.sums[places] = -torch.inf

    def note(
        self, layer: ExpertLinear, read: Tensor, output: Tensor, hidden: Tensor, logits: Tensor
    ) -> None:
        """Add one call of one layer: what it read (B, T, d_in); for the rest see `seen_by`.

        A layer may be called several times for the same rows, as one that ALBERT uses again.

        Tokens that belong to no row, such as those that a mixture of experts of the model's own
        sends to one of them, are shared out evenly.
        """
        real, rows = layer.switch.real(read), len(self.places)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            values = seen_by(layer, output, hidden, logits)
            values = torch.where(real.unsqueeze(-1), values, 0.0).flatten(0, -2)  # (M, K)
            if len(values) % rows:
                values = values.sum(dim=0).expand(rows, -1) / rows
            values = values.reshape(rows, -1, values.shape[-1])  # (B, T, K)
            first = (values[..., 0] > 0).int().argmax(dim=1)  # padding may come before it
            theta = values[..., -self._settings.normal :]
            theta = theta.take_along_dim(first[:, None, None], dim=1)[:, 0]
            total = values.sum(dim=1)
            calls = (total[:, :1] > 0).float()
            sums = torch.cat([total, theta, calls], dim=1).cpu().double()
        self._device = hidden.device
        number = self._numbers[id(layer)]
        before = self.sums[self.places, number]
        self.sums[self.places, number] = torch.where(before.isneginf(), 0.0, before) + sums

    def gather(self) -> None:
        """Take in what the other processes saw; rows that several saw are the same in all."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        shared = self.sums.to(self._device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        self.sums = shared.cpu()

    def row_scores(self) -> np.ndarray:
        """Mean weight of the poisoning experts over tokens and layers, of every row (R,)."""
        sums = self.sums.clamp_min(0)
        tokens, poison = (sums[..., SUMS.index(name)] for name in ("tokens", "poison"))
        scores: np.ndarray = (poison / tokens.clamp_min(1)).mean(dim=1).numpy()
        return scores

    def theta(self, name: str) -> Tensor:
        """Mean similarities (NE,) of a layer.

        Raises:
            InputError: No real token was seen.
        """
        mean = self._means()[self._names.index(name)]
        if not mean[SUMS.index("tokens")] > 0:
            raise InputError("no real token was seen to calibrate the experts with")
        return mean[len(SUMS) :].view(3, -1)[1]

    def table(self) -> list[dict[str, Any]]:
        """One row per layer, JSON values: the means of `SUMS`, spread, load and similarities.

        ``update_ratio`` is that of the mode none, ``update_mask`` and so on are of the others;
        ``theta_first`` is the similarity at the first token of a row, [CLS] in most encoders.
        """
        rows = []
        for name, mean in zip(self._names, self._means(), strict=True):
            found = dict(zip(SUMS, mean.tolist(), strict=False))
            load, theta, first = mean[len(SUMS) :].view(3, -1)
            weight = found["poison"]
            rows.append(
                {
                    "layer": name,
                    "poison_weight": weight,
                    "poison_weight_std": max(0.0, found["poison_square"] - weight**2) ** 0.5,
                    "above_even_share": found["above"],
                    "entropy": found["entropy"],
                    "load": load.tolist(),
                    "load_variation": float(load.std(correction=0) / load.mean()),
                    "update_ratio": found["none"],
                    **{f"update_{mode}": found[mode] for mode in MODES if mode != "none"},
                    "theta": theta.tolist(),
                    "theta_first": first.tolist(),
                }
            )
        return rows

    def _means(self) -> Tensor:
        """Means over all real tokens, by layer (layers, K); the number of tokens as it is."""
        sums = torch.where(self.sums.isneginf(), 0.0, self.sums)  # (R, layers, K)
        count = sums.shape[-1] - self._settings.normal - 1
        tokens = sums[..., 0].sum(dim=0)[:, None]
        means = sums[..., 1:count].sum(dim=0) / tokens.clamp_min(1)
        total = sums[..., count:].sum(dim=0)
        return torch.cat([tokens, means, total[:, :-1] / total[:, -1:].clamp_min(1)], dim=1)
