"""NMTune: reshape the features of a frozen encoder before they are classified.

Paper: Chen, Wang, Shah, Tao, Wei, Xie, Sugiyama & Raj, "Understanding and Mitigating the Label
Noise in Pre-training on Downstream Tasks", ICLR 2024, arXiv:2309.17002; journal form
arXiv:2403.06869. We had the released code, which covers images, and others' readings of the paper.
Idea: here the noise was in the pre-training: it flattens the spectrum of the features, which costs
accuracy on shifted data above all. A small network behind the encoder repairs them, with nothing
but features and labels, so the encoder may as well be a service.
Steps: (1) F, one vector per row: the mean of the last hidden state over its tokens, computed once;
(2) Z = s h(F) + F with h = Linear(D, 4D), BatchNorm, ReLU, Linear(4D, D) and s of D numbers, 1 at
first; logits are linear in Z; (3) minimise cross-entropy + lambda_mse x the distance of the
normalised Z and F + lambda_cov x the squared covariances of the dimensions of Z + lambda_svd x
minus the mean share of the svd_k leading singular values of Z, all on the rows of a step.
With ``views=2`` each of the B rows of a step comes twice: an image in two random changes through
the frozen encoder, a table (rows, 2, features) as it is. h, cross-entropy and the terms on Z take
all 2 B rows; the distance is that of Z of the second view to F of the first.
With ``tune`` lora or full (journal form) there is no h and no distance: the other two terms act on
what the last layer of the model's own head reads, the adapters on feed-forward layers alone.
Deviations: images have one view, as they are and encoded once, unless ``views=2`` is asked for; the
released code has two, encoded in every step. No preset asks for them, as presets serve texts and
fixed tables too, which have one. Both views are changed by the job's ``augment``: moved by up to an
eighth and mirrored, where published crops keep 80 to 100 % of the area; a strong second view, off
in the released code, is left out. Scales and biases do not decay, as everywhere in this loop. A
step of a single row, where BatchNorm has no statistics, is normalised by the running ones. The
classifier starts from 0 in all presets, not at random (head_init=kaiming): at this rate some
hundred steps do not undo a bad draw. Not offered: a head from zero-shot text weights, a weak beside
a strong view, h beside adapters. A run does not measure its spectra; `noiseproof study spectrum`
does, of any run. The estimator takes a preset by ``NMTuneClassifier.from_preset(NAME)``, not by an
argument, as scikit-learn keeps settings as they are given; its controls are the presets lp and mlp,
without classes of their own.
Settings: weights 1.0, 0.04 and 0.001, svd_k = 5, the mean over elements, h, rate 1e-3, rank = alpha
= 8 (released code); weights 0.01, svd_k = 1, a sum over rows (preset paper, by others' readings);
rates 2e-4 for adapters and 2e-5 for full (ours). Published runs: 30 epochs of 64 rows, cosine
schedule without warm-up, decay 1e-4; give these as train settings. Presets: default and code (the
same), paper, mlp (no terms), lp (linear probe on F), lora, full.
Needs: no noise rate, no clean rows. It is not made for wrong labels in the data at hand, and
re-runs by others do not always find it better than its control mlp.
Cost: one pass for the features; with two views of images two in every epoch, and one more where
training rows are scored, all without gradient. Then 8 D^2 weights train, more than it sounds (34
million at D = 2048), and the terms add a few products of n x n and n x D.
Model: model/head.safetensors holds h and the classifier, the rest of model/ is the encoder;
noiseproof.load puts them together, as transformers has no class for it. After lora and full, model/
is as usual.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.frozen import encoder_width, last_token
from noiseproof.heads import PooledClassifier, saved_head
from noiseproof.losses import cross_entropy
from noiseproof.method import Batch, Columns, Run, Stage, require, require_range
from noiseproof.methods.baselines import Tuned
from noiseproof.models import (
    encoder_layers,
    head_modules,
    is_head,
    plain_model,
    set_dropout,
    set_trainable,
)
from noiseproof.regularizers import (
    COV_ROUTES,
    MSE_REDUCTIONS,
    SVD_ROUTES,
    covariance_penalty,
    feature_consistency,
    require_choice,
    singular_value_penalty,
    without_direction,
)
from noiseproof.tuning import tune_model

RATES = {"head": 1e-3, "full": 2e-5, "adapter": 2e-4}
OF_THE_HEAD = (
    "use_mlp",
    "mlp_hidden_layers",
    "mlp_ratio",
    "mlp_norm",
    "mlp_residual",
    "residual_init",
    "head_init",
    "feature_scale",
)
SMALLEST_RMS = 0.1  # below it the covariance term, of the fourth power of the scale, is nothing


class Reshaped(NamedTuple):
    """What `Reshaping` answers.

    Attributes:
        logits: (n, C).
        features: F, after scaling (n, D).
        transformed: Z (n, D).
    """

    logits: Tensor
    features: Tensor
    transformed: Tensor


class RunningBatchNorm(nn.BatchNorm1d):
    """BatchNorm that normalises a single row by its running statistics instead of failing."""

    def forward(self, input: Tensor) -> Tensor:
        """(n, D) -> (n, D)."""
        if not self.training or len(input) > 1:
            return super().forward(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class Reshaping(nn.Module):
    """The MLP of NMTune and the linear classifier behind it, on features (n, D).

    Attributes:
        mlp: h, or None for a linear probe.
        residual_scale: s (D,), or None without residual.
        linear: The classifier; its weights start at 0 or Kaiming-uniform, its bias at 0.
        feature_scale: Number by which the features are divided first.
    """

    feature_scale: Tensor

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        use_mlp: bool = True,
        hidden_layers: int = 1,
        ratio: float = 4.0,
        norm: str = "batchnorm",
        residual: bool = True,
        residual_init: float = 1.0,
        head_init: str = "zero",
    ) -> None:
        super().__init__()
        hidden = max(1, round(width * ratio))
        layers: list[nn.Module] = []
        for number in range(hidden_layers if use_mlp else 0):
            layers.append(nn.Linear(hidden if number else width, hidden))
            if norm == "batchnorm":
                layers.append(RunningBatchNorm(hidden))
            elif norm == "layernorm":
                layers.append(nn.LayerNorm(hidden))
            layers.append(nn.ReLU())
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, width)) if use_mlp else None
        scaled = use_mlp and residual
        self.residual_scale = nn.Parameter(torch.full((width,), residual_init)) if scaled else None
        self.linear = nn.Linear(width, classes)
        start = nn.init.zeros_ if head_init == "zero" else nn.init.kaiming_uniform_
        start(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, features: Tensor) -> Reshaped:
        """(n, D) -> logits (n, C), F and Z (n, D)."""
        features = features / self.feature_scale
        transformed = features
        if self.mlp is not None:
            transformed = self.mlp(features)
            if self.residual_scale is not None:
                transformed = self.residual_scale * transformed + features
        return Reshaped(self.linear(transformed), features, transformed)


class ReshapedClassifier(PooledClassifier):
    """The encoder of a transformers classifier with `Reshaping` as its head, on mean features."""

    classifier: Reshaping


@dataclass(frozen=True)
class NMTune(Tuned):
    """Reshape features that noisy pre-training has bent, before they are classified.

    Attributes:
        tune: head (frozen encoder, the method proper), full, or an adapter type such as lora.
        alpha: Scaling numerator of LoRA-like adapters; None is twice the rank.
        target_modules: Module names that get adapters; None takes the feed-forward layers for lora
            and peft's choice for other types.
        learning_rate: None is 1e-3 (head), 2e-4 (adapters) or 2e-5 (full).
        lambda_mse: Weight of the distance between original and reshaped features; None is 1 for
            head and 0 otherwise, where the originals are those before training.
        lambda_cov: Weight of the covariances.
        lambda_svd: Weight of the leading singular values.
        mse_reduction: element_mean, or row_sum (larger by the number of features).
        svd_k: Number of leading singular values.
        svd_center: Centre the features before their singular values are taken.
        svd_route: How these are computed: gram (fast) or svdvals (plain).
        cov_route: How the covariances are computed: gram, direct, or auto (the faster one).
        eps: Smallest eigenvalue, and smallest sum of the singular values, that counts.
        use_mlp: tune=head: False leaves the linear classifier alone, a linear probe.
        mlp_hidden_layers: Hidden layers of the MLP.
        mlp_ratio: Width of these over the number of features.
        mlp_norm: batchnorm, layernorm or none.
        mlp_residual: Add the features to what the MLP makes of them.
        residual_init: First scale of the MLP's part in that sum.
        head_init: Start of the classifier: zero, or kaiming (random).
        feature_scale: none, or rms (divide all features by one number, their root mean square).
        small_batch: Steps with too few rows for the terms (at most svd_k): skip the terms, drop
            the step, or error.
        views: Views of a row in a step: 1, or 2, of images two augmented ones through the encoder;
            None takes one of images and texts, and two of features (rows, 2, features).
    """

    tune: str = "head"
    alpha: float | None = 8.0
    lambda_mse: float | None = None
    lambda_cov: float = 0.04
    lambda_svd: float = 0.001
    mse_reduction: str = "element_mean"
    svd_k: int = 5
    svd_center: bool = False
    svd_route: str = "gram"
    cov_route: str = "auto"
    eps: float = 1e-12
    use_mlp: bool = True
    mlp_hidden_layers: int = 1
    mlp_ratio: float = 4.0
    mlp_norm: str = "batchnorm"
    mlp_residual: bool = True
    residual_init: float = 1.0
    head_init: str = "zero"
    feature_scale: str = "none"
    small_batch: str = "skip"
    views: int | None = None

    later: ClassVar[Mapping[str, Any]] = {"views": None}

    def check(self) -> None:
        """Every setting is in range, and every term has something to train."""
        for name, choices in (
            ("mse_reduction", MSE_REDUCTIONS),
            ("svd_route", SVD_ROUTES),
            ("cov_route", COV_ROUTES),
            ("mlp_norm", ("batchnorm", "layernorm", "none")),
            ("head_init", ("zero", "kaiming")),
            ("feature_scale", ("none", "rms")),
            ("small_batch", ("skip", "drop", "error")),
        ):
            require_choice(f"NMTune.{name}", getattr(self, name), choices)
        for name in ("svd_k", "mlp_hidden_layers"):
            value = getattr(self, name)
            require(value >= 1, f"NMTune.{name} must be at least 1, got {value}")
        for name, weight in self.weights.items():
            require_range("NMTune", f"lambda_{name}", weight, 0, 1e9)
        require_range("NMTune", "eps", self.eps, 0, 1, open_low=True)
        require_range("NMTune", "mlp_ratio", self.mlp_ratio, 0, 1e3, open_low=True)
        require_range("NMTune", "residual_init", self.residual_init, -1e6, 1e6)
        require(
            self.views in (None, 1, 2),
            f"NMTune.views must be 1 or 2, or left out, got {self.views}",
        )
        require(
            self.reshapes or self.views != 2,
            f"NMTune.views=2 goes with tune=head, got tune={self.tune}, which trains on one view "
            "of a row; leave views out",
        )
        idle = [
            item.name
            for item in fields(self)
            if item.name in OF_THE_HEAD and getattr(self, item.name) != item.default
        ]
        require(
            self.reshapes or not idle,
            f"NMTune.{', '.join(idle)}: only for tune=head, where the encoder is frozen; got "
            f"tune={self.tune}",
        )
        require(
            self.use_mlp or not self.reshapes or not any(self.weights.values()),
            "NMTune without its MLP (use_mlp=False) has nothing that its terms could train; set "
            "lambda_mse, lambda_cov and lambda_svd to 0, as the preset lp does",
        )

    @property
    def reshapes(self) -> bool:
        """Whether the encoder is frozen and its features are reshaped; else it is trained."""
        return self.tune == "head"

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term by name: mse, cov, svd."""
        mse = float(self.reshapes) if self.lambda_mse is None else self.lambda_mse
        return {"mse": mse, "cov": self.lambda_cov, "svd": self.lambda_svd}

    @classmethod
    def presets(cls) -> dict[str, NMTune]:
        """Default, code, paper, the controls mlp and lp, and the journal's lora and full."""
        none: dict[str, Any] = {"lambda_mse": 0.0, "lambda_cov": 0.0, "lambda_svd": 0.0}
        return {
            "default": cls(),
            "code": cls(),
            "paper": cls(
                lambda_mse=0.01,
                lambda_cov=0.01,
                lambda_svd=0.01,
                svd_k=1,
                mse_reduction="row_sum",
            ),
            "mlp": cls(**none),
            "lp": cls(**none, use_mlp=False, learning_rate=0.01),
            "lora": cls(tune="lora"),
            "full": cls(tune="full"),
        }

    # --- hooks -----------------------------------------------------------------------------------

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Put the MLP behind the frozen encoder, or make trainable what ``tune`` names."""
        if not self.reshapes:
            if self.dropout is not None:
                set_dropout(model, self.dropout)
            names = self.target_modules
            if names is None and self.tune == "lora":
                names = tuple(feed_forward_modules(model))
            return tune_model(
                model, self.tune, rank=self.rank, alpha=self.alpha, target_modules=names
            )
        config: Any = plain_model(model).config
        wrapped = ReshapedClassifier(model, self.head(encoder_width(model), config.num_labels))
        set_trainable(wrapped, is_head(wrapped))
        return wrapped

    def head(self, width: int, classes: int) -> Reshaping:
        """A fresh `Reshaping` for D features and C classes.

        Raises:
            InputError: svd_k is larger than D.
        """
        if self.lambda_svd:
            require(
                self.svd_k <= width,
                f"NMTune.svd_k must be at most the number of features, {width}; got {self.svd_k}",
            )
            if self.svd_k == width:
                warnings.warn(
                    f"NMTune.svd_k={width} is the number of features: the share of all singular "
                    "values is constant, so this term does nothing",
                    UserWarning,
                    stacklevel=2,
                )
        return Reshaping(
            width,
            classes,
            use_mlp=self.use_mlp,
            hidden_layers=self.mlp_hidden_layers,
            ratio=self.mlp_ratio,
            norm=self.mlp_norm,
            residual=self.mlp_residual,
            residual_init=self.residual_init,
            head_init=self.head_init,
        )

    def stages(self, epochs: int) -> list[Stage]:
        """One stage, at the rate of the tuned part; two views keep the encoder in the loop."""
        rate = self.learning_rate or RATES.get(self.tune, RATES["adapter"])
        views = self.views if self.reshapes else 1
        return [Stage("tune", epochs, learning_rate=rate, views=views)]

    def on_stage_start(self, run: Run) -> None:
        """Refuse passes that are all too short for the terms."""
        rows, wanted = run.pass_rows, max(2, self.svd_k + 1)
        weights = self.weights
        require(
            rows is None or rows >= wanted or not (weights["cov"] or weights["svd"]),
            f"NMTune.svd_k={self.svd_k} needs more than {wanted - 1} rows in a pass, and here it "
            f"has at most {rows}, so every step would skip the terms; raise train.batch_size or "
            "train.micro_batch_size, or set a smaller svd_k",
        )

    def on_epoch_start(self, run: Run) -> Columns:
        """At the start: the scale of the features, or column ``initial_features`` (N, D)."""
        if run.epoch > 0:
            return {}
        if not self.reshapes:
            if not self.weights["mse"]:
                return {}
            initial = head_inputs(run)  # (N, D)
            self._doubt_zeros(run, initial)
            return {"initial_features": initial}
        features = run.features()  # (N, D, 2)
        if features is None and self.feature_scale == "rms" and run.encode is not None:
            features = run.encode("mean")
        if features is None:
            return {}
        self._doubt_zeros(run, features[..., 0])
        rms = root_mean_square(features[..., 0])
        run.log(feature_rms=rms)
        if self.feature_scale == "rms":
            head = run.model.get_submodule("classifier")
            head.feature_scale.fill_(scale_of(rms))  # type: ignore[operator]
        elif rms < SMALLEST_RMS and self.lambda_cov:
            run.warn(small_scale(rms))
        return {}

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        """Cross-entropy plus the terms that have a weight; their means go into the history."""
        if self.reshapes:
            answer: Reshaped = model(**batch.inputs)
            loss, parts = self.objective(
                answer.logits,
                answer.transformed,
                answer.features,
                batch.labels,
                views=len(answer.logits) // len(batch.labels),
                rows=batch.rows,
            )
            run.average(len(batch.rows), **self._reshaping(run, answer))
        elif not any(self.weights.values()):
            return super().compute_loss(model, batch, run)
        else:
            with reading(last_linear(run.model)) as read:
                logits = model(**batch.inputs).logits
            features = one_per_row(read[-1], batch.inputs)  # (B, D)
            original = batch.columns.get("initial_features")
            loss, parts = self.objective(logits, features, original, batch.labels, rows=batch.rows)
        if parts.pop("short", 0.0):
            run.count(short_batches=1)
            run.left_out += len(batch.rows) if self.small_batch == "drop" else 0
        run.average(len(batch.rows), **{f"loss_{name}": value for name, value in parts.items()})
        return loss

    def _doubt_zeros(self, run: Run, features: Tensor) -> None:
        """Warn of rows of the first features (N, D) that the distance leaves out."""
        count = without_direction(features) if self.weights["mse"] else 0
        if count:
            run.warn(zero_rows(count, len(features)))

    @staticmethod
    def _reshaping(run: Run, answer: Reshaped) -> dict[str, float]:
        """How far features were reshaped in a step: cosine of Z and F, size of Z, mean |s|."""
        original, transformed = answer.features.detach(), answer.transformed.detach()
        numbers = {
            "feature_cosine": F.cosine_similarity(transformed, original).mean(),
            "reshaped_rms": transformed.square().mean().sqrt(),
        }
        scale = run.model.get_submodule("classifier").residual_scale
        if isinstance(scale, Tensor):
            numbers["residual_scale"] = scale.detach().abs().mean()
        return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))

    def restore_model(self, model: nn.Module) -> nn.Module:
        """Put the saved head behind the encoder of a loaded model."""
        if not self.reshapes:
            return model
        tensors = saved_head(model)
        classes, width = tensors["linear.weight"].shape
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # was said when it was trained
            head = self.head(width, classes)
        head.load_state_dict(tensors)
        return ReshapedClassifier(model, head).eval()

    # --- parts -----------------------------------------------------------------------------------

    def objective(
        self,
        logits: Tensor,
        transformed: Tensor,
        original: Tensor | None,
        labels: Tensor,
        *,
        views: int = 1,
        row_weight: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch and its parts: ce, and each term without its weight.

        With two views the rows of the first come before those of the second: cross-entropy,
        covariances and singular values take all n = 2 B rows; the distance is that of Z of the
        second view to F of the first, as in the released code. A term of weight 0 is not computed.

        Args:
            logits: (n, C).
            transformed: Z (n, D).
            original: F (n, D); needed where lambda_mse is not 0.
            labels: (B,).
            views: 1 or 2.
            row_weight: Factor of each row's cross-entropy (B,), for weighted samples.
            rows: Numbers of the rows (B,), for messages.

        Raises:
            InputError: Too few rows, with small_batch=error.
            FloatingPointError: A part is not finite; names it and the rows.
        """
        loss = cross_entropy(logits, labels.repeat(views))  # (n,)
        if row_weight is not None:
            loss = loss * row_weight.repeat(views)
        total = loss.mean()
        terms: dict[str, Tensor] = {"ce": total}
        weights = self.weights
        if weights["mse"]:
            assert original is not None
            count = len(transformed) // views
            terms["mse"] = feature_consistency(
                transformed[-count:], original[:count], self.mse_reduction
            )
        short = len(transformed) < max(2, self.svd_k + 1) and (weights["cov"] or weights["svd"])
        if short and self.small_batch == "error":
            raise InputError(
                f"NMTune: a step of {len(transformed)} rows is too small for svd_k={self.svd_k}; "
                "use another batch size, or small_batch=skip"
            )
        if weights["cov"] and not short:
            terms["cov"] = covariance_penalty(transformed, self.cov_route)
        if weights["svd"] and not short:
            terms["svd"] = singular_value_penalty(
                transformed, self.svd_k, center=self.svd_center, route=self.svd_route, eps=self.eps
            )
        values = torch.stack([term.detach() for term in terms.values()]).tolist()
        parts = dict(zip(terms, values, strict=True))
        wrong = [name for name, term in terms.items() if not bool(torch.isfinite(term.detach()))]
        if wrong:
            raise FloatingPointError(
                f"NMTune: the {wrong[0]} part of the loss is {parts[wrong[0]]}"
                f"{_in_rows(rows, transformed.detach())}; root mean square of the reshaped "
                f"features: {root_mean_square(transformed.detach()):.3g}"
            )
        for name, term in terms.items():
            if name != "ce":
                total = total + weights[name] * term
        if short:
            parts["short"] = 1.0
            if self.small_batch == "drop":
                total = total * 0.0
        return total, parts


def _in_rows(rows: Tensor | None, transformed: Tensor) -> str:
    """Where a loss is not finite: rows (B,) of the step, and one whose features (n, D) are not.

    >>> _in_rows(torch.tensor([3, 8, 5]), torch.tensor([[1.0], [float("nan")], [1.0]]))
    ' in a step of 3 rows between 3 and 8, of which row 8 has features that are not finite'
    """
    if rows is None:
        return ""
    told = f" in a step of {len(rows)} rows between {int(rows.min())} and {int(rows.max())}"
    finite = torch.isfinite(transformed).all(dim=1).reshape(-1, len(rows)).all(dim=0).cpu()  # (B,)
    if bool(finite.all()):
        return told
    return f"{told}, of which row {int(rows.cpu()[~finite].min())} has features that are not finite"


def zero_rows(count: int, rows: int) -> str:
    """A line on rows that have no direction."""
    return (
        f"{count} of {rows} rows have features that are zero throughout: the distance of reshaped "
        "and original features leaves them out; see whether they were computed at all"
    )


def root_mean_square(values: Tensor) -> float:
    """Root of the mean of the squares, in float64.

    >>> root_mean_square(torch.tensor([3.0, -3.0]))
    3.0
    """
    return float(values.double().square().mean().sqrt())


def scale_of(rms: float) -> float:
    """What features are divided by: their root mean square, or 1 where all of them are 0."""
    return rms if rms > 0 else 1.0


def small_scale(rms: float) -> str:
    """A line on features whose covariances are too small to matter."""
    return (
        f"the features are small (root mean square {rms:.3g}), and the covariance term grows with "
        "the fourth power of their scale: it does next to nothing; use feature_scale=rms"
    )


def feed_forward_modules(model: nn.Module) -> list[str]:
    """Full names of the linear layers in the blocks that are no part of attention.

    Names of modules, not their endings: in BERT ``output.dense`` ends ``attention.output.dense``
    too.

    Raises:
        InputError: There is none.
    """
    inner = plain_model(model)
    blocks = {id(block) for block in encoder_layers(model)}
    names, linears = [], []
    for name, block in inner.named_modules():
        if id(block) not in blocks:
            continue
        attention: list[str] = []
        for path, module in block.named_modules():
            last = path.rpartition(".")[2]
            if "attn" in last.lower() or "attention" in (last + type(module).__name__).lower():
                attention.append(f"{path}.")
            if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
                continue
            linears.append(f"{name}.{path}")
            if path and not any(f"{path}.".startswith(part) for part in attention):
                names.append(f"{name}.{path}")
    if not names:
        raise InputError(
            "NMTune adapts the feed-forward layers of a Transformer, and found none beside "
            f"{', '.join(linears) or 'nothing'}; give target_modules"
        )
    return names


def last_linear(model: nn.Module) -> nn.Linear:
    """The last linear layer of the head that trains; its input are the features.

    Raises:
        InputError: The head has none.
    """
    inner = plain_model(model)
    layers = [
        module
        for name in head_modules(model)
        for module in inner.get_submodule(name).modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    ]
    if not layers:
        raise InputError(f"{type(inner).__name__} has no linear layer in its head")
    return layers[-1]


@contextmanager
def reading(layer: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets the inputs of a layer while the context lasts, with their gradient."""
    read: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        yield read
    finally:
        handle.remove()


def one_per_row(values: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Features (B, D) as they are; of (B, T, D), those of the last real token, as decoders do."""
    if values.ndim == 2:
        return values
    mask = inputs["attention_mask"]
    index = last_token(mask) + values.shape[1] - mask.shape[1]  # a prompt may stand before the text
    return values[torch.arange(len(values), device=values.device), index]


def head_inputs(run: Run) -> Tensor:
    """What the last layer of the head reads of every training row (N, D), without dropout.

    The layer is made to answer with its input, so that the model picks the token itself.
    """
    answer: Callable[..., Tensor] = lambda _, inputs, __: inputs[0]  # noqa: E731
    handle = last_linear(run.model).register_forward_hook(answer)
    try:
        return run.predict(before_batch=lambda rows: None)
    finally:
        handle.remove()
