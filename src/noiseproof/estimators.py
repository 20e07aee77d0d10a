"""NMTune and TURN's probe as scikit-learn classifiers, on features that are there already.

They need a table of features (N, D) and labels: of an encoder, or of a service that gives away
nothing but embeddings. Network and loss of `NMTuneClassifier` are those of the method NMTune.
Features are read in mini-batches, so a NumPy memory map may be larger than memory; whatever their
type is, the network computes in fp32.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from noiseproof.engine import TrainSettings, rate_factor
from noiseproof.errors import InputError
from noiseproof.losses import cross_entropy, generalized_cross_entropy
from noiseproof.method import require, require_range
from noiseproof.methods.nmtune import (
    RATES,
    SMALLEST_RMS,
    NMTune,
    Reshaped,
    Reshaping,
    scale_of,
    small_scale,
    zero_rows,
)
from noiseproof.precision import choose_precision
from noiseproof.regularizers import without_direction

KEPT_TYPES = (np.float64, np.float32, np.float16)  # others are converted, as a whole, to float64
PASS_ROWS = 256  # rows of a pass without gradient, always as many: a row's answer has no neighbours

BatchLoss = Callable[[nn.Module, "Batch", int], tuple[Tensor, dict[str, float]]]
"""Module, rows and number of the epoch -> loss, and its parts by name."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one step.

    Attributes:
        features: (n, D); two views of B rows are n = 2 B, the first view first.
        labels: Class numbers (B,).
        weight: Weight of each row (B,), or None.
        rows: Numbers of the rows (B,), on the CPU.
    """

    features: Tensor
    labels: Tensor
    weight: Tensor | None
    rows: Tensor


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows that are trained on, read when they are needed.

    Attributes:
        views: One or two tables (N, D).
        labels: Class numbers (N,).
        weight: (N,) fp32, or None.
        used: Numbers of the rows whose weight is not 0.
        device: Where batches go.
    """

    views: tuple[np.ndarray, ...]
    labels: np.ndarray
    weight: np.ndarray | None
    used: np.ndarray
    device: str

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers (B,)."""
        tables = [_tensor(view[rows]) for view in self.views]
        weight = None if self.weight is None else _tensor(self.weight[rows]).to(self.device)
        return Batch(
            torch.cat(tables).to(self.device),
            torch.from_numpy(self.labels[rows]).to(self.device),
            weight,
            torch.from_numpy(rows),
        )


class _FeatureClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """What both classifiers share: reading the data, the training loop, predictions."""

    classes_: np.ndarray
    n_features_in_: int
    module_: nn.Module
    loss_history_: list[dict[str, float]]

    def decision_function(self, X: Any) -> np.ndarray:  # noqa: N803
        """Logits (N, C); with two classes their difference (N,), as scikit-learn has it."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Softmax of the logits (N, C), columns in the order of ``classes_``."""
        return torch.softmax(torch.from_numpy(self._logits(X)).double(), dim=1).numpy()

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The most probable class of each row (N,)."""
        best = self._logits(X).argmax(axis=1)
        return np.asarray(self.classes_[best])

    # --- parts -----------------------------------------------------------------------------------

    def _logits(self, table: Any) -> np.ndarray:
        raise NotImplementedError

    def _read(self, table: Any, labels: Any, second: Any, weight: Any) -> Rows:
        """Check the training data and number the classes."""
        table, labels = _validated(self, "X", table, labels)
        check_classification_targets(labels)
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        views: tuple[np.ndarray, ...] = (table,)
        if second is not None:
            second = _validated(self, "X_view2", second, reset=False)
            if second.shape != table.shape:
                raise InputError(
                    f"X_view2 must hold the rows of X in another view, {table.shape}; "
                    f"got {second.shape}"
                )
            views = (table, second)
        used = np.arange(len(table))
        if weight is not None:
            weight = _check_sample_weight(weight, table, dtype=np.float32)
            below = np.flatnonzero(weight < 0)
            if len(below):
                raise InputError(
                    f"sample_weight must be at least 0, got {weight[below[0]]:g} in row {below[0]}"
                )
            used = np.flatnonzero(weight)
        if len(np.unique(numbers[used])) < 2:
            kind = "only one class" if len(used) else "no class"
            raise InputError(
                f"{type(self).__name__} needs at least 2 classes, the data contains {kind} "
                "(rows of weight 0 left out)"
            )
        return Rows(views, numbers.astype(np.int64), weight, used, str(self.device))

    def _train(
        self, rows: Rows, loss: BatchLoss, groups: list[dict[str, Any]], settings: TrainSettings
    ) -> None:
        """AdamW on ``module_``, the rate driven by the share of all steps that is done.

        Args:
            rows: What to train on.
            loss: Of a batch.
            groups: Parameters for the optimizer, with their decay.
            settings: Epochs, rows of a step, peak rate, schedule and seed.
        """
        module, size = self.module_, settings.batch_size
        assert settings.learning_rate is not None
        fused = torch.device(rows.device).type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)
        random = np.random.default_rng(settings.seed)
        starts = range(0, len(rows.used), size)
        self.loss_history_ = []
        module.train()
        for epoch in range(settings.epochs):
            order = random.permutation(rows.used)
            sums: dict[str, float] = {}
            counts: dict[str, int] = {}
            for step, start in enumerate(starts):
                progress = (epoch + (step + 0.5) / len(starts)) / settings.epochs
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * rate_factor(settings, progress)
                numbers = np.sort(order[start : start + size])  # a memory map is read forwards
                value, parts = loss(module, rows.batch(numbers), epoch)
                if value.requires_grad:
                    value.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                for name, part in parts.items():
                    sums[name] = sums.get(name, 0.0) + part * len(numbers)
                    counts[name] = counts.get(name, 0) + len(numbers)
            means = {name: value / counts[name] for name, value in sums.items() if name != "short"}
            short = {"short_rows": float(counts["short"])} if "short" in counts else {}
            self.loss_history_.append(means | short)
        module.eval()

    def _collected(self, table: Any, answer: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Answers for all rows (N, ...), fp32, from passes over `PASS_ROWS`, filled up with zeros.

        With other numbers of rows a product of matrices is rounded otherwise, and a row's answer
        would depend on its neighbours.
        """
        check_is_fitted(self)
        table = _validated(self, "X", table, reset=False)
        found = []
        with torch.no_grad():
            for start in range(0, len(table), PASS_ROWS):
                block = _tensor(table[start : start + PASS_ROWS])
                filled = torch.zeros(PASS_ROWS, block.shape[1])
                filled[: len(block)] = block
                answers = answer(filled.to(str(self.device))).float().cpu()
                found.append(answers[: len(block)])
        return torch.cat(found).numpy()


class NMTuneClassifier(
    ClassNamePrefixFeaturesOutMixin,  # type: ignore[misc]
    TransformerMixin,  # type: ignore[misc]
    _FeatureClassifier,
):
    """NMTune on a table of features: a small network reshapes them, a linear layer classifies.

    For features of an encoder that was pre-trained on noisy labels and cannot be changed. See the
    card of the method NMTune for the idea, the source of every setting and what to expect.

    Rows of ``sample_weight`` 0 are left out; other weights multiply the cross-entropy of a row, not
    the terms on the whole batch, so that a weight of 2 is not the same as having a row twice.

    Args:
        lambda_mse: Weight of the distance between original and reshaped features.
        lambda_cov: Weight of the covariances.
        lambda_svd: Weight of the leading singular values.
        mse_reduction: element_mean, or row_sum (larger by the number of features).
        svd_k: Number of leading singular values; with as few features or fewer this term is
            constant and left out.
        svd_center: Centre the features before their singular values are taken.
        svd_route: gram (fast) or svdvals (plain).
        cov_route: gram, direct, or auto (the faster one).
        eps: Smallest eigenvalue, and smallest sum of the singular values, that counts.
        use_mlp: False leaves the linear classifier alone, a linear probe.
        mlp_hidden_layers: Hidden layers of the network.
        mlp_ratio: Width of these over the number of features.
        mlp_norm: batchnorm, layernorm or none.
        mlp_residual: Add the features to what the network makes of them.
        residual_init: First scale of the network's part in that sum.
        head_init: Start of the linear layer: zero, or kaiming (random).
        feature_scale: none, or rms (divide all features by one number, their root mean square).
        small_batch: Steps with at most svd_k rows: skip the terms, drop the step, or error.
        learning_rate: Peak rate; falls to 0 as a cosine.
        epochs: Passes over the rows.
        batch_size: Rows of a step; two views of each count once.
        weight_decay: AdamW's decay, on all parameters, as in the released code.
        device: Where to compute, as torch names it.
        precision: fp32, or bf16 for the products of training where this machine is faster with it
            (auto) or in any case (bf16); terms and answers are fp32 always.
        random_state: Seed of the first weights and of the order of the rows.

    Attributes:
        classes_: Labels in the order of the columns of ``predict_proba``.
        n_features_in_: D.
        module_: The trained `Reshaping`.
        loss_history_: Means over each epoch of the loss's parts, terms without their weights.
        feature_scale_: What the features are divided by.
    """

    feature_scale_: float

    def __init__(
        self,
        *,
        lambda_mse: float = 1.0,
        lambda_cov: float = 0.04,
        lambda_svd: float = 0.001,
        mse_reduction: str = "element_mean",
        svd_k: int = 5,
        svd_center: bool = False,
        svd_route: str = "gram",
        cov_route: str = "auto",
        eps: float = 1e-12,
        use_mlp: bool = True,
        mlp_hidden_layers: int = 1,
        mlp_ratio: float = 4.0,
        mlp_norm: str = "batchnorm",
        mlp_residual: bool = True,
        residual_init: float = 1.0,
        head_init: str = "zero",
        feature_scale: str = "none",
        small_batch: str = "skip",
        learning_rate: float = 1e-3,
        epochs: int = 30,
        batch_size: int = 64,
        weight_decay: float = 1e-4,
        device: str = "cpu",
        precision: str = "fp32",
        random_state: Any = None,
    ) -> None:
        self.lambda_mse = lambda_mse
        self.lambda_cov = lambda_cov
        self.lambda_svd = lambda_svd
        self.mse_reduction = mse_reduction
        self.svd_k = svd_k
        self.svd_center = svd_center
        self.svd_route = svd_route
        self.cov_route = cov_route
        self.eps = eps
        self.use_mlp = use_mlp
        self.mlp_hidden_layers = mlp_hidden_layers
        self.mlp_ratio = mlp_ratio
        self.mlp_norm = mlp_norm
        self.mlp_residual = mlp_residual
        self.residual_init = residual_init
        self.head_init = head_init
        self.feature_scale = feature_scale
        self.small_batch = small_batch
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.device = device
        self.precision = precision
        self.random_state = random_state

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> NMTuneClassifier:
        """Settings by name, with changes on top.

        Args:
            name: code (the defaults, which are the released code's), paper, mlp (no terms), or lp
                (linear probe); mlp and lp are the controls.
            **changes: Further settings.

        Raises:
            InputError: Unknown name.

        >>> NMTuneClassifier.from_preset("paper", epochs=5).svd_k
        1
        """
        presets = {key: preset for key, preset in NMTune.presets().items() if preset.reshapes}
        if name not in presets:
            raise InputError(
                f"unknown preset {name!r} of {cls.__name__}; available: {', '.join(presets)}"
            )
        preset = presets[name]
        own = cls().get_params()
        settings = {key: value for key, value in preset.to_dict().items() if key in own}
        settings |= {f"lambda_{key}": weight for key, weight in preset.weights.items()}
        settings["learning_rate"] = preset.learning_rate or RATES["head"]
        return cls(**(settings | changes))

    def fit(
        self,
        X: Any,  # noqa: N803
        y: Any,
        X_view2: Any = None,  # noqa: N803
        sample_weight: Any = None,
    ) -> NMTuneClassifier:
        """Train on features (N, D) and their labels (N,).

        Args:
            X: Features; arrays of float64, float32 or float16 and memory maps are not copied.
            y: Labels of any kind, two classes or more.
            X_view2: The same rows in a second, differently augmented view (N, D).
            sample_weight: Factor of each row's cross-entropy (N,).

        Raises:
            ValueError: A setting is out of range, or the data are not as said.
        """
        method = self._method()
        settings = _train_settings(self)
        rows = self._read(X, y, X_view2, sample_weight)
        views, width = len(rows.views), self.n_features_in_
        if method.lambda_svd and method.svd_k >= width:
            warnings.warn(
                f"svd_k={method.svd_k} leading singular values of {width} features have a constant "
                "share: this term is left out; set a smaller svd_k, or lambda_svd=0",
                UserWarning,
                stacklevel=2,
            )
            method = dataclasses.replace(method, lambda_svd=0.0)
        require(
            settings.batch_size * views > method.svd_k or not (self.lambda_cov or self.lambda_svd),
            f"batch_size={settings.batch_size} is too small for svd_k={method.svd_k}: every step "
            "would skip the terms",
        )
        rms, zeros = _scale_and_zeros(rows.views[0], rows.used)
        if zeros and method.weights["mse"]:
            warnings.warn(zero_rows(zeros, len(rows.used)), UserWarning, stacklevel=2)
        self.feature_scale_ = scale_of(rms) if method.feature_scale == "rms" else 1.0
        if method.feature_scale == "none" and method.lambda_cov and 0 < rms < SMALLEST_RMS:
            warnings.warn(small_scale(rms), UserWarning, stacklevel=2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            module = method.head(width, len(self.classes_))
        module.feature_scale.fill_(self.feature_scale_)
        self.module_ = module.to(str(self.device))
        kind = torch.device(str(self.device)).type
        require(
            self.precision in ("fp32", "bf16", "auto"),
            f"precision must be fp32, bf16 or auto, got {self.precision!r}",
        )
        half = choose_precision(self.precision, kind) == "bf16"

        def loss(module: nn.Module, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, float]]:
            with torch.autocast(kind, torch.bfloat16, enabled=half):
                answer: Reshaped = module(batch.features)
            value, parts = method.objective(
                answer.logits.float(),
                answer.transformed.float(),
                answer.features.float(),
                batch.labels,
                views=views,
                row_weight=batch.weight,
                rows=batch.rows,
            )
            dropped = "short" in parts and method.small_batch == "drop"
            return value.detach() if dropped else value, parts

        groups = [{"params": list(module.parameters()), "weight_decay": self.weight_decay}]
        self._train(rows, loss, groups, settings)
        return self

    def transform(self, X: Any) -> np.ndarray:  # noqa: N803
        """Reshaped features Z (N, D), fp32."""
        return self._collected(X, lambda block: self._network(block).transformed)

    def __sklearn_tags__(self) -> Any:
        """The output of `transform` is always fp32."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags

    @property
    def _n_features_out(self) -> int:
        return self.n_features_in_

    def _logits(self, table: Any) -> np.ndarray:
        return self._collected(table, lambda block: self._network(block).logits)

    def _network(self, block: Tensor) -> Reshaped:
        module: Reshaping = self.module_  # type: ignore[assignment]
        found: Reshaped = module(block)
        return found

    def _method(self) -> NMTune:
        """The method with these settings, which checks them."""
        names = {item.name for item in dataclasses.fields(NMTune)} - {"learning_rate"}
        own = {name: value for name, value in self.get_params().items() if name in names}
        return NMTune(tune="head", **own)


class RobustProbeClassifier(_FeatureClassifier):
    """TURN's probe on a table of features: a linear layer, trained with generalised cross-entropy.

    Rows whose label the probe disbelieves get small gradients, so wrong labels pull less. Source
    and meaning of the settings: cards of the methods TURN and GCE.

    Args:
        q: Exponent of the loss (1 - p^q) / q: near 0 it is cross-entropy, 1 is the most robust and
            the slowest.
        ce_epochs: First epochs with cross-entropy, for many classes.
        learning_rate: Peak rate; falls to 0 as a cosine.
        epochs: Passes over the rows.
        batch_size: Rows of a step.
        warmup_epochs: Epochs in which the rate rises, at most half of them.
        weight_decay: AdamW's decay, on the matrix alone.
        device: Where to compute, as torch names it.
        random_state: Seed of the order of the rows; the layer starts from 0.

    Attributes:
        classes_: Labels in the order of the columns of ``predict_proba``.
        n_features_in_: D.
        module_: The trained linear layer.
        loss_history_: Mean loss of each epoch.
    """

    def __init__(
        self,
        *,
        q: float = 0.7,
        ce_epochs: int = 0,
        learning_rate: float = 3e-2,
        epochs: int = 20,
        batch_size: int = 128,
        warmup_epochs: int = 1,
        weight_decay: float = 1e-4,
        device: str = "cpu",
        random_state: Any = None,
    ) -> None:
        self.q = q
        self.ce_epochs = ce_epochs
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.warmup_epochs = warmup_epochs
        self.weight_decay = weight_decay
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> RobustProbeClassifier:  # noqa: N803
        """Train on features (N, D) and their labels (N,).

        Args:
            X: Features; arrays of float64, float32 or float16 and memory maps are not copied.
            y: Labels of any kind, two classes or more.
            sample_weight: Factor of each row's loss (N,).

        Raises:
            ValueError: A setting is out of range, or the data are not as said.
        """
        name = type(self).__name__
        require_range(name, "q", self.q, 0, 1, open_low=True)
        for setting in ("ce_epochs", "warmup_epochs"):
            value = getattr(self, setting)
            require(value >= 0, f"{name}.{setting} must be at least 0, got {value}")
        require(
            self.ce_epochs <= self.epochs,
            f"{name}.ce_epochs must be at most epochs={self.epochs}, got {self.ce_epochs}",
        )
        settings = _train_settings(self)
        rise = min(0.5, self.warmup_epochs / settings.epochs)
        settings = dataclasses.replace(settings, warmup_share=rise)
        rows = self._read(X, y, None, sample_weight)
        with torch.random.fork_rng(devices=[]):  # torch draws a start of its own
            module = nn.Linear(self.n_features_in_, len(self.classes_))
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        self.module_ = module.to(str(self.device))

        def loss(module: nn.Module, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, float]]:
            logits = module(batch.features)
            if epoch < self.ce_epochs:
                each = cross_entropy(logits, batch.labels)  # (B,)
            else:
                each = generalized_cross_entropy(logits, batch.labels, self.q)
            mean = (each if batch.weight is None else each * batch.weight).mean()
            value = float(mean.detach())
            if not np.isfinite(value):
                raise FloatingPointError(f"{name}: the loss is {value}; lower the learning rate")
            return mean, {"loss": value}

        groups = [
            {"params": [module.weight], "weight_decay": self.weight_decay},
            {"params": [module.bias], "weight_decay": 0.0},
        ]
        self._train(rows, loss, groups, settings)
        return self

    def _logits(self, table: Any) -> np.ndarray:
        return self._collected(table, lambda block: self.module_(block))


def _train_settings(estimator: Any) -> TrainSettings:
    """What both classifiers are asked for, checked; the seed is drawn here."""
    name = type(estimator).__name__
    require(estimator.learning_rate is not None, f"{name}.learning_rate must be a number, got None")
    seed = check_random_state(estimator.random_state).randint(2**31 - 1)
    return TrainSettings(
        epochs=estimator.epochs,
        batch_size=estimator.batch_size,
        learning_rate=estimator.learning_rate,
        weight_decay=estimator.weight_decay,
        schedule="cosine",
        warmup_share=0.0,
        seed=int(seed),
    )


def _validated(estimator: Any, name: str, table: Any, *labels: Any, reset: bool = True) -> Any:
    """Features (N, D) and labels as scikit-learn checks them, and the place of a NaN or inf."""
    try:
        return validate_data(estimator, table, *labels, dtype=KEPT_TYPES, reset=reset)
    except ValueError as error:
        if not any(word in str(error) for word in ("NaN", "infinity")):
            raise
        values = np.asarray(table)
        values = values if values.dtype.kind == "f" else values.astype(float)
        bad = ~np.isfinite(values)  # (N, D)
        if not bad.any():  # the labels are meant
            raise
        row, column = np.argwhere(bad)[0]
        told = "NaN" if np.isnan(values[row, column]) else values[row, column]
        raise InputError(
            f"{name} must be finite, got {told} in row {row}, column {column}; fill or leave out "
            f"such rows, of which there are {int(bad.any(axis=1).sum())}"
        ) from error


def _scale_and_zeros(table: np.ndarray, used: np.ndarray) -> tuple[float, int]:
    """Root mean square of the rows that are trained on, and how many of them have no direction."""
    total, zeros = 0.0, 0
    for start in range(0, len(used), 4096):  # a memory map may be larger than memory
        block = table[used[start : start + 4096]]
        total += float(np.square(block, dtype=np.float64).sum())
        zeros += without_direction(torch.from_numpy(block))
    return float(np.sqrt(total / (len(used) * table.shape[1]))), zeros


def _tensor(block: np.ndarray) -> Tensor:
    """A copy in fp32."""
    return torch.from_numpy(np.array(block, dtype=np.float32))
