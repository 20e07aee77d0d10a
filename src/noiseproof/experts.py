"""Linear layers with one shared down-projection and several up-projections, mixed token by token.

    h = A x (.., r);  w = softmax(Wg x) (.., N);  y = W0 x + b0 + s sum_i w_i B_i h,  s = alpha / r

The layout of HydraLoRA (Tian et al., NeurIPS 2024, arXiv:2404.19245); with poisoning experts behind
the normal ones it is the layer of LoPE (Wang et al., NeurIPS 2025, arXiv:2505.23868). Experts are
numbered normal first. At inference the poisoning experts can be left out in several ways, see
`expert_weights`, without training again.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noiseproof.errors import InputError
from noiseproof.models import fill_adapter, kept_parameters, save_adapter, saved_adapter

MODES = ("none", "mask", "renorm", "compensate")
FAMILY = "experts"  # in adapters.json
SHORTEST = 1e-12  # an output of a smaller norm has no direction

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
        mode: How poisoning experts count at inference, one of `MODES`.
        online: compensate: similarities of the token at hand instead of the calibrated ones.
        sign: compensate: sign of the similarities; 0 is renorm.
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
    mode: str = "compensate"
    online: bool = False
    sign: int = 1
    most: int | None = None
    order: str = "theta"
    beta: str | float = "sum_to_one"

    @property
    def count(self) -> int:
        """All experts, N."""
        return self.normal + self.poison


# --- pure functions ------------------------------------------------------------------------------


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


# --- layers --------------------------------------------------------------------------------------


class Reading:
    """Which tokens are real in one call of a model, while its parts run one after the other.

    Attributes:
        mask: Real tokens (B, T) of the stack that runs; None where nobody said.
        decoder_mask: Those of a decoder, which runs behind an encoder.
        source: What the encoder gave the decoder (B, S, d).
        source_mask: Its real tokens (B, S).
    """

    def __init__(self, mask: Tensor | None, decoder_mask: Tensor | None = None) -> None:
        self.mask, self.decoder_mask = mask, decoder_mask
        self.source: Tensor | None = None
        self.source_mask: Tensor | None = None

    def enter_decoder(self, source: Tensor | None) -> None:
        """The decoder runs from here on."""
        self.source, self.source_mask, self.mask = source, self.mask, self.decoder_mask

    def real(self, read: Tensor) -> Tensor | None:
        """The mask of what a module reads, (B, T, d) -> (B, T); None where none fits.

        Decoders have modules that read the encoder's output: these are told by the tensor itself,
        as both may have equally many tokens. Rows may come in one piece: (B T, d) -> (B T,).
        """
        own = (self.source_mask,) if read is self.source else (self.mask, self.source_mask)
        shape = read.shape[:-1]
        for mask in own:
            if mask is not None and (mask.shape == shape or shape == (mask.numel(),)):
                return mask.reshape(shape)
        return None


class Switch:
    """What all layers of a model share; plain, no parameter and no buffer.

    Attributes:
        mode: How poisoning experts count in eval mode.
        training_mode: How they count in training.
        reading: Which tokens are real in the call that runs; None outside of calls.
        watch: Gets what each layer sees, in a call for the sake of that.
        loads: Gets each layer's mean load of the normal experts (NE,), with gradient; None gets
            nothing.
        warned: Whether it was said that masks are missing.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.training_mode = "none"
        self.reading: Reading | None = None
        self.watch: Watch | None = None
        self.loads: list[Tensor] | None = None
        self.warned = False

    def real(self, read: Tensor) -> Tensor:
        """Real tokens of what a module reads, bool.  (B, T, d) -> (B, T).

        All of them, with a warning, where no mask is known.
        """
        mask = None if self.reading is None else self.reading.real(read)
        if mask is not None:
            return mask.bool()
        if not self.warned:
            self.warned = True
            shape = tuple(read.shape[:-1])
            warnings.warn(
                f"no attention mask is known for a batch of {shape} tokens: noise on embeddings "
                "falls on padding too, and experts are measured on it; give the model "
                "attention_mask, and decoder_attention_mask if it has an encoder and a decoder",
                UserWarning,
                stacklevel=2,
            )
        return torch.ones(read.shape[:-1], dtype=torch.bool, device=read.device)


class DroppedProduct(torch.autograd.Function):
    """dropout(x) A'.  (.., d_in), (r, d_in) -> (.., r).

    Keeps x, which the router keeps anyway, and a mask of one byte an entry; dropout and product by
    themselves would keep dropout(x) beside x, and twice the memory.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, down: Tensor, rate: float) -> Tensor:
        """The product; draws the mask."""
        dropped, mask = torch.native_dropout(given, rate, True)
        ctx.save_for_backward(given, mask, down)
        ctx.scale = 1 / (1 - rate)
        return F.linear(dropped, down)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of x and A, by the same mask."""
        (gradient,) = gradients
        given, mask, down = ctx.saved_tensors
        of_given = of_down = None
        if ctx.needs_input_grad[0]:
            of_given = (gradient @ down.to(gradient.dtype)) * mask * ctx.scale
        if ctx.needs_input_grad[1]:
            dropped = (given * mask * ctx.scale).to(gradient.dtype)
            of_down = gradient.flatten(0, -2).T @ dropped.flatten(0, -2)
        return of_given, of_down, None


class ExpertLinear(nn.Module):
    """A frozen linear module with experts beside it.

    Attributes:
        base_layer: The module as it was: `nn.Linear`, or the Conv1D of GPT-2.
        lora_A: Shared down-projection.
        lora_gate: The router; one row per expert, normal ones first.
        lora_theta: Calibrated similarities (NE,).
        lora_calibrated: Whether they are.
        lora_gram: G_ij = B_i' B_j (N, N, r, r) of the calibration.
        down_before: A as it was when the poisoning experts were done; not saved with the model.
    """

    lora_theta: Tensor
    lora_gram: Tensor
    lora_calibrated: Tensor
    down_before: Tensor

    def __init__(self, base: nn.Module, settings: Experts, switch: Switch) -> None:
        super().__init__()
        self.base_layer = base
        self.settings, self.switch = settings, switch
        wide, out = shape_of(base)
        rank, count = settings.rank, settings.count
        self.lora_A = nn.Linear(wide, rank, bias=False)
        for name in self.expert_names:
            self.add_module(name, nn.Linear(rank, out, bias=False))
            nn.init.zeros_(self.get_submodule(name).weight)  # type: ignore[arg-type]
        read = wide if settings.gate_input == "x" else rank
        self.lora_gate = nn.Linear(read, count, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        if settings.gate_init == "normal":
            nn.init.normal_(self.lora_gate.weight, std=0.02)
        else:  # never zeros: equal normal experts would get equal gradients for ever
            nn.init.kaiming_uniform_(self.lora_gate.weight, a=5**0.5)
        self.register_buffer("lora_theta", torch.zeros(settings.normal))
        self.register_buffer("lora_calibrated", torch.tensor(False))
        self.register_buffer("lora_gram", torch.zeros(count, count, rank, rank))
        self.register_buffer("down_before", torch.zeros(rank, wide))

    @property
    def expert_names(self) -> list[str]:
        """Names of the up-projections, in order: lora_B0, .., lora_BD, lora_BD1, .."""
        normal = [f"lora_B{number}" for number in range(self.settings.normal)]
        poison = [f"lora_BD{number or ''}" for number in range(self.settings.poison)]
        return normal + poison

    def up(self) -> list[Tensor]:
        """Weights of the experts, (d_out, r) each."""
        return [self.get_submodule(name).weight for name in self.expert_names]  # type: ignore[misc]

    def forward(self, input: Tensor) -> Tensor:
        """(.., d_in) -> (.., d_out)."""
        output: Tensor = self.base_layer(input)
        own = self.lora_A.weight.dtype
        cast = torch.is_autocast_enabled(input.device.type)
        given = input if cast else input.to(own)
        rate = self.settings.dropout if self.training else 0.0
        hidden = self._down(given, rate)  # (.., r)
        undropped = hidden if not rate or self.settings.gate_input == "x" else self.lora_A(given)
        logits = self._logits(input if self.settings.gate_input == "x" else undropped)
        mode = self.switch.training_mode if self.training else self.switch.mode
        theta = self._theta(hidden, mode)
        weights = expert_weights(logits, self.settings, mode, theta)  # (.., N)
        if self.switch.watch is not None:
            self.switch.watch.note(self, input, output, hidden, logits)
        if self.switch.loads is not None:
            self.switch.loads.append(self._load(logits[self.switch.real(input)]))
        used = self.settings.count if mode == "none" else self.settings.normal
        if rate and self.settings.dropout_mode == "per_expert":
            more = [self._down(given, rate) for _ in range(used - 1)]
            shared = torch.stack([hidden, *more], dim=-2)  # (.., used, r)
        else:
            shared = hidden.unsqueeze(-2)
        scale = self.settings.alpha / self.settings.rank  # times what is narrow
        mixed = ((scale * weights[..., :used]).to(hidden.dtype).unsqueeze(-1) * shared).flatten(-2)
        update = F.linear(mixed, torch.cat(self.up()[:used], dim=1))
        return output + update.to(output.dtype)

    def calibrate(self, theta: Tensor) -> None:
        """Keep the similarities (NE,) and the Gram matrices for inference."""
        with torch.no_grad():
            self.lora_theta.copy_(theta)
            self.lora_gram.copy_(self.gram())
            self.lora_calibrated.fill_(True)

    def gram(self) -> Tensor:
        """G_ij = B_i' B_j  (N, N, r, r), fp32."""
        experts = torch.stack([weight.detach().float() for weight in self.up()])  # (N, d_out, r)
        return torch.einsum("ioa,job->ijab", experts, experts)

    def drift(self) -> dict[str, float]:
        """How far A has moved since the poisoning experts were done, and with it what they do."""
        with torch.no_grad():
            old, new = self.down_before.double(), self.lora_A.weight.double()
            poison = [up.double() for up in self.up()[self.settings.normal :]]
            pairs = {"A": (old, new)}
            if poison:
                both = torch.cat(poison)  # (PE d_out, r)
                pairs["poison"] = (both @ old, both @ new)
            found = {}
            for name, (one, other) in pairs.items():
                norms = (one.norm() * other.norm()).clamp_min(1e-30)
                found[f"drift_{name}"] = float((other - one).norm() / one.norm().clamp_min(1e-30))
                found[f"cosine_{name}"] = float((one * other).sum() / norms)
        return found

    def _down(self, given: Tensor, rate: float) -> Tensor:
        """A x, with dropout on x in training.  (.., d_in) -> (.., r)."""
        down = self.lora_A.weight
        if not rate:
            return F.linear(given, down)
        found: Tensor = DroppedProduct.apply(given, down, rate)  # type: ignore[no-untyped-call]
        return found

    def _load(self, logits: Tensor) -> Tensor:
        """Mean share of each normal expert among them.  (M, N) -> (NE,)."""
        return torch.softmax(logits[:, : self.settings.normal], dim=-1).mean(dim=0)

    def _logits(self, read: Tensor) -> Tensor:
        """What the router says, always in fp32."""
        with torch.autocast(read.device.type, enabled=False):
            return F.linear(read.float(), self.lora_gate.weight.float())

    def _theta(self, hidden: Tensor, mode: str) -> Tensor | None:
        if mode != "compensate" or not self.settings.poison:
            return None
        if not self.training and not self.settings.online:
            return self.lora_theta
        gram = self.gram() if self.training else self.lora_gram
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return similarities(hidden, gram, self.settings.normal)


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


class Watch:
    """What layers see of some rows: sums over the real tokens of every row and layer.

    Attributes:
        places: Where the rows of the call at hand stand among all, 0 to R - 1; set by the caller.
        sums: (R, layers, K), -inf where nothing was seen: `SUMS`, load (NE,), similarity (NE,), and
            similarity of the row's first token (NE,).
    """

    def __init__(self, layers: Mapping[str, ExpertLinear], rows: int) -> None:
        self._numbers = {id(layer): number for number, layer in enumerate(layers.values())}
        self._names = list(layers)
        self._settings = next(iter(layers.values())).settings
        self._device = torch.device("cpu")
        self.places: list[int] = []
        width = len(SUMS) + 3 * self._settings.normal
        self.sums = torch.full((rows, len(layers), width), -torch.inf, dtype=torch.float64)

    def note(
        self, layer: ExpertLinear, read: Tensor, output: Tensor, hidden: Tensor, logits: Tensor
    ) -> None:
        """Add one call of one layer: what it read (B, T, d_in); for the rest see `seen_by`.

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
            sums = torch.cat([values.sum(dim=1), theta], dim=1).cpu().double()
        self._device = hidden.device
        self.sums[self.places, self._numbers[id(layer)]] = sums

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
        count = sums.shape[-1] - self._settings.normal
        tokens = sums[..., 0].sum(dim=0)[:, None]
        means = sums[..., 1:count].sum(dim=0) / tokens.clamp_min(1)
        rows = (sums[..., 0] > 0).sum(dim=0)[:, None]
        return torch.cat([tokens, means, sums[..., count:].sum(dim=0) / rows.clamp_min(1)], dim=1)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Width of input and output of a linear module.

    Raises:
        InputError: It is none.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        wide, out = module.weight.shape  # type: ignore[misc]
        return int(wide), int(out)
    raise InputError(f"experts go beside linear modules, got a {type(module).__name__}")


# --- around a model ------------------------------------------------------------------------------


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
        for name in target_modules(model, targets):
            parent, _, last = name.rpartition(".")
            layer = ExpertLinear(model.get_submodule(name), self.settings, self.switch)
            setattr(model.get_submodule(parent), last, layer)
        self.save_poison, self.has_poison = True, settings.poison > 0
        self.seal: dict[str, str] = {}
        self.noise: Callable[[Tensor, Tensor], Tensor] | None = None
        for embeddings in token_embeddings(model):
            embeddings.register_forward_hook(self._embedded)
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
        self.switch.reading = Reading(*masks)
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
    def mode(self) -> str:
        """How poisoning experts count at inference."""
        return self.switch.mode

    def set_inference_mode(self, mode: str) -> None:
        """Count poisoning experts in another way from now on.

        Raises:
            InputError: Unknown, or the saved model cannot answer so.
        """
        if mode not in MODES:
            raise InputError(f"unknown inference mode {mode!r}; available: {', '.join(MODES)}")
        if mode != "none" and not self.settings.poison:
            raise InputError(f"a model without poisoning experts has the mode none, not {mode!r}")
        if mode == "none" and self.settings.poison > 0 and not self.has_poison:
            raise InputError("the poisoning experts were not saved; use mask, renorm or compensate")
        calibrated = all(bool(layer.lora_calibrated) for layer in self.layers.values())
        if mode == "compensate" and not (self.settings.online or calibrated):
            raise InputError("compensate needs a calibrated model; use renorm or mask")
        self.switch.mode = mode

    @contextmanager
    def watching(self, rows: int) -> Iterator[Watch]:
        """Note what the layers see of so many rows, for a while."""
        watch = Watch(self.layers, rows)
        self.switch.watch = watch
        try:
            yield watch
        finally:
            self.switch.watch = None

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

    Args:
        model: What `noiseproof.models.load_saved_model` gave.
        folder: Where `ExpertModel.save_pretrained` wrote.

    Raises:
        InputError: The file belongs to another model, or is not whole.
    """
    settings = saved_adapter(folder, (FAMILY,))
    if settings is None:
        return model
    mode, save_poison = settings.pop("mode"), settings.pop("save_poison")
    del settings["family"]
    adapted = ExpertModel(model, Experts(**settings))
    adapted.has_poison = adapted.save_poison = save_poison
    fill_adapter(adapted, folder, adapted._saved_names(), "model")
    adapted.set_inference_mode(mode)
    return adapted.eval()


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


def target_modules(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Full names of the linear modules whose names end so.

    Raises:
        InputError: There is none, or one is not linear.
    """
    found = []
    for name, module in model.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in targets):
            shape_of(module)
            found.append(name)
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
