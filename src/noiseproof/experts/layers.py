"""The layer: a frozen module, a shared A, experts and a router; and what all layers share."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noiseproof.errors import InputError
from noiseproof.experts.mixing import Experts, expert_weights, similarities

if TYPE_CHECKING:
    from noiseproof.experts.watching import Watch


class Reading:
    """Which tokens are real in one call of a model, while its parts run one after the other.

    Attributes:
        mask: Real tokens (B, T) of the stack that runs; None where nobody said.
        rows: B; None where nobody said.
        decoder_mask: Those of a decoder, which runs behind an encoder.
        source: What the encoder gave the decoder (B, S, d).
        source_mask: Its real tokens (B, S).
    """

    def __init__(
        self, mask: Tensor | None, decoder_mask: Tensor | None = None, rows: int | None = None
    ) -> None:
        self.mask, self.decoder_mask, self.rows = mask, decoder_mask, rows
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

    def foreign(self, read: Tensor) -> bool:
        """Whether a module reads something else than tokens of the rows.  (b, t, d) -> bool.

        DeBERTa projects its table of relative positions so. It has another number of rows, or, in a
        batch of one, more of them than the row has tokens.
        """
        if read.ndim < 3 or self.rows is None:
            return False
        if len(read) != self.rows:
            return True
        longer = self.mask is not None and read.shape[1] > self.mask.shape[1]
        return longer and self.real(read) is None


class Switch:
    """What all layers of a model share; plain, no parameter and no buffer.

    Attributes:
        mode: How poisoning experts count in eval mode.
        training_mode: How they count in training.
        absent: Rows (B,) bool of a training batch that go without poisoning experts; None is none
            of them.
        absent_mode: How the others count then: mask or renorm.
        reading: Which tokens are real in the call that runs; None outside of calls.
        watch: Gets what each layer sees, in a call for the sake of that.
        loads: Gets each layer's mean load of the normal experts (NE,), with gradient; None gets
            nothing.
        poison: Gets each layer's mean weight of the poisoning experts (), without; None gets
            nothing.
        warned: Whether it was said that masks are missing.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.training_mode = "none"
        self.absent: Tensor | None = None
        self.absent_mode = "renorm"
        self.reading: Reading | None = None
        self.watch: Watch | None = None
        self.loads: list[Tensor] | None = None
        self.poison: list[Tensor] | None = None
        self.warned = False

    def foreign(self, read: Tensor) -> bool:
        """Whether a module reads something else than tokens of the rows, see `Reading.foreign`."""
        return self.reading is not None and self.reading.foreign(read)

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
    def weight(self) -> Tensor:
        """Of the frozen module, for models that ask their layers (T5 does)."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """Of the frozen module."""
        return self.base_layer.bias  # type: ignore[return-value]

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
        if self.training and self.switch.absent is not None:
            without = expert_weights(logits, self.settings, self.switch.absent_mode)
            weights = torch.where(self._absent(input, weights), without, weights)
        tokens = not self.switch.foreign(input)
        if self.switch.watch is not None and tokens:
            self.switch.watch.note(self, input, output, hidden, logits)
        if self.switch.loads is not None and tokens:
            self.switch.loads.append(self._load(logits[self.switch.real(input)]))
        if self.switch.poison is not None and tokens:
            self.switch.poison.append(self._poison(logits.detach(), self.switch.real(input)))
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

    def _absent(self, read: Tensor, weights: Tensor) -> Tensor:
        """Which tokens belong to rows that go without poisoning experts.  (.., N) -> (.., 1).

        What belongs to no row goes without where all rows do.

        Raises:
            InputError: The module reads tokens that belong to no row.
        """
        absent, places = self.switch.absent, weights.shape[:-1]
        assert absent is not None
        if self.switch.foreign(read):
            return absent.all()
        tokens, left = divmod(places.numel(), len(absent))
        if left:
            raise InputError(
                f"poison_dropout leaves rows out, and a module reads {places.numel()} tokens that "
                f"do not belong to {len(absent)} rows alike, as in a mixture of experts; leave "
                "poison_dropout out, or name other target_modules"
            )
        return absent.repeat_interleave(tokens).reshape(*places, 1)

    def _load(self, logits: Tensor) -> Tensor:
        """Mean share of each normal expert among them.  (M, N) -> (NE,)."""
        return torch.softmax(logits[:, : self.settings.normal], dim=-1).mean(dim=0)

    def _poison(self, logits: Tensor, real: Tensor) -> Tensor:
        """Mean weight of the poisoning experts over real tokens.  (.., N), (..) -> ()."""
        weight = torch.softmax(logits, dim=-1)[..., self.settings.normal :].sum(dim=-1)
        return (weight * real).sum() / real.sum().clamp_min(1)

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
