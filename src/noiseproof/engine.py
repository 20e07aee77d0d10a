"""What the loop runs on: device, precision and processes (by accelerate), batches, passes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.adapters import idle_parameters
from noiseproof.encoding import Encoded, EncodedFeatures
from noiseproof.errors import InputError, check_types
from noiseproof.features import Allocate, fingerprint, kept
from noiseproof.frozen import HeadOnly, encode_batch, feature_position
from noiseproof.method import Batch, BeforeBatch, Method, Run, require, require_range
from noiseproof.models import evaluation_mode, has_weights, row_statistics, trains_only_head
from noiseproof.precision import PRECISIONS, choose_precision

BUCKET_BATCHES = 50  # batches that are sorted by length together; order across them stays random
SHORT_TEXT = 32  # tokens up to which plain products are used for attention in bf16 on the CPU
PREDICT_ROWS = 128  # rows of a prediction batch at most ...
PREDICT_COST = 8192  # ... and rows x longest row at most, unless one row is longer

MAX_BYTES = 2**31  # of features that are given to a hook where nothing is cached

MOST = {"epochs": 10_000, "batch_size": 1_000_000, "max_length": 1_000_000}
"""Beyond which a setting is a mistake."""
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class TrainSettings:
    """How to run the loop; the same for every method.

    Attributes:
        epochs: Passes over the training rows, all stages together; those of a probe come on top.
        batch_size: Rows per optimizer step, over all processes.
        micro_batch_size: Rows per forward pass; smaller than batch_size accumulates gradients.
        learning_rate: Peak rate; None takes the method's own.
        weight_decay: AdamW's decay, on matrices only.
        schedule: linear, cosine or constant, driven by the share of the stage that is done.
        warmup_share: Share of a stage in which the rate rises linearly to its peak.
        max_grad_norm: Gradients are clipped to this norm; 0 leaves them.
        precision: auto (bf16 where it is faster on this machine), fp32, bf16 or fp16.
        device: auto or cpu.
        max_length: Longer texts are cut to this many tokens.
        seed: Seed of the run; init_seed and order_seed follow it unless they are set.
        init_seed: Seed of new weights (head, adapters).
        order_seed: Seed of the batch order and of dropout.
        evaluate: epoch (test and validation sets after every epoch) or end (last epoch only).
        select: last, or best (weights of the epoch with the best validation accuracy).
        tracker: none, or a tracker of accelerate: tensorboard, wandb, mlflow, ...
    """

    epochs: int = 6
    batch_size: int = 32
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.01
    schedule: str = "linear"
    warmup_share: float = 0.06
    max_grad_norm: float = 1.0
    precision: str = "auto"
    device: str = "auto"
    max_length: int = 256
    seed: int = 0
    init_seed: int | None = None
    order_seed: int | None = None
    evaluate: str = "epoch"
    select: str = "last"
    tracker: str = "none"

    def __post_init__(self) -> None:
        """Check every setting where it stands.

        Raises:
            InputError: A setting is out of its range.
        """
        check_types(self, "train.")
        for name, most in MOST.items():
            value = getattr(self, name)
            require(value >= 1, f"train.{name} must be at least 1, got {value}")
            require(value <= most, f"train.{name} must be at most {most}, got {value}")
        micro = self.micro_batch_size
        require(
            micro is None or 1 <= micro <= self.batch_size,
            f"train.micro_batch_size must lie in [1, {self.batch_size}], got {micro}",
        )
        if self.learning_rate is not None:
            require_range("train", "learning_rate", self.learning_rate, 0, 10, open_low=True)
        require_range("train", "weight_decay", self.weight_decay, 0, 10)
        require_range("train", "warmup_share", self.warmup_share, 0, 1, open_high=True)
        require_range("train", "max_grad_norm", self.max_grad_norm, 0, 1e9)
        for name in ("seed", "init_seed", "order_seed"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < 2**32,
                f"train.{name} must lie in [0, 2^32), got {value}",
            )
        for name, choices in (
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("device", ("auto", "cpu")),
            ("evaluate", ("epoch", "end")),
            ("select", ("last", "best")),
        ):
            value = getattr(self, name)
            require(
                value in choices, f"train.{name} must be one of {', '.join(choices)}; got {value!r}"
            )


def derive_seed(seed: int, *words: str | int) -> int:
    """A seed for one purpose: the same words, the same seed; other words, an unrelated one."""
    numbers = [zlib.crc32(word.encode()) if isinstance(word, str) else word for word in words]
    state = np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def rate_factor(settings: TrainSettings, progress: float) -> float:
    """Share of the peak learning rate after ``progress`` in [0, 1] of a stage."""
    rise = settings.warmup_share
    if progress < rise:
        return progress / rise
    rest = (progress - rise) / (1 - rise)
    if settings.schedule == "linear":
        return 1 - rest
    if settings.schedule == "cosine":
        return 0.5 * (1 + float(np.cos(np.pi * rest)))
    return 1.0


def training_batches(
    rows: np.ndarray, lengths: np.ndarray, size: int, seed: int
) -> list[np.ndarray]:
    """Shuffle rows and cut them into batches of similar length.

    Rows are shuffled, sorted by length within buckets of `BUCKET_BATCHES` batches, cut, and the
    batches shuffled: every row once, only the last batch of the last bucket may be short.
    """
    random = np.random.default_rng(seed)
    shuffled = random.permutation(rows)
    batches: list[np.ndarray] = []
    for start in range(0, len(shuffled), size * BUCKET_BATCHES):
        bucket = shuffled[start : start + size * BUCKET_BATCHES]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[first : first + size] for first in range(0, len(bucket), size)]
    return [batches[place] for place in random.permutation(len(batches))]


def repeated(rows: np.ndarray, passes: float, seed: int) -> np.ndarray:
    """Rows of an epoch that passes over them so many times; a rest of a pass is drawn anew.

    >>> repeated(np.array([3, 5]), 2.5, seed=0).tolist()[:4]
    [3, 5, 3, 5]
    """
    whole, rest = divmod(round(len(rows) * passes), len(rows))
    more = np.random.default_rng(seed).permutation(rows)[:rest]
    return np.concatenate([*[rows] * whole, more])


def prediction_batches(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Cut all rows into batches of similar length and bounded cost, longest first."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        size = max(1, min(PREDICT_ROWS, PREDICT_COST // longest))
        yield order[start : start + size]
        start += size


class Engine:
    """Device, processes and precision of one run, and the passes over rows that need them."""

    def __init__(self, settings: TrainSettings, tracking_folder: str | None = None) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState, PartialState

        PartialState(cpu=settings.device == "cpu")
        device = PartialState().device.type
        self.precision = choose_precision(settings.precision, device)
        mixed = "no" if self.precision == "fp32" else self.precision
        if AcceleratorState._shared_state:  # an earlier run of this process chose its precision
            AcceleratorState._reset_state(reset_partial_state=False)
        tracker = None if settings.tracker == "none" else settings.tracker
        self.accelerator = Accelerator(
            mixed_precision=mixed,
            cpu=settings.device == "cpu",
            log_with=tracker,
            project_dir=tracking_folder,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.settings = settings
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.processes: int = self.accelerator.num_processes
        self.main: bool = self.accelerator.is_main_process
        self.net: nn.Module = nn.Identity()
        self._views = 1
        self._position: str | None = None
        self._features: dict[int, tuple[Encoded, EncodedFeatures]] = {}

    # --- a stage ---------------------------------------------------------------------------------

    def start_stage(
        self,
        model: nn.Module,
        encoded: Encoded,
        rate: float,
        settings: TrainSettings | None = None,
        views: int = 1,
    ) -> torch.optim.Optimizer:
        """Wrap the model for this stage; a frozen encoder is replaced by its cached output.

        Args:
            model: What is trained.
            encoded: The training rows.
            rate: Peak learning rate.
            settings: Those of the stage; None goes on with those before.
            views: Of every row in a step; with more than one nothing is cached.
        """
        self.settings = settings or self.settings
        self._features.clear()
        self._position = None
        self._views = views
        self.net = model
        if views == 1 and encoded.one_output and trains_only_head(model) and has_weights(model):
            some = next(iter(prediction_batches(encoded.lengths)))[:4]
            self._position = feature_position(model, self._to_device(encoded.inputs(some)))
            if self._position is not None:
                self._cache(model, encoded)
                self.net = HeadOnly(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim >= 2]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=rate,
            weight_decay=self.settings.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        prepared: tuple[nn.Module, torch.optim.Optimizer]
        prepared = self.accelerator.prepare(self.net, optimizer)
        self.net = prepared[0]
        return prepared[1]

    def end_stage(self) -> None:
        """Undo the wrapping of `start_stage`, so that the next stage can wrap the model again."""
        model = self.accelerator.unwrap_model(self.net, keep_fp32_wrapper=False)
        model.__dict__.pop("_is_accelerate_prepared", None)  # else prepare leaves it in fp32
        self.accelerator.free_memory()
        self.net = nn.Identity()
        self._position = None
        self._features.clear()

    @property
    def cached(self) -> bool:
        """Whether this stage trains on cached features."""
        return self._position is not None

    def view(self, encoded: Encoded) -> Encoded:
        """The rows as this stage's network takes them: encoded inputs or cached features."""
        if self._position is None:
            return encoded
        if id(encoded) not in self._features:
            model = self.accelerator.unwrap_model(self.net).inner
            self._cache(model, encoded)
        return self._features[id(encoded)][1]

    def features(self, encoded: Encoded) -> Tensor | None:
        """Cached features of the rows (N, D, 1 or 2); None in a stage without a cache.

        Where the rows are features already there is nothing to cache; they are given unless they
        are very many.
        """
        view = self.view(encoded)
        if isinstance(view, EncodedFeatures):
            return view.features
        model = self.accelerator.unwrap_model(self.net)
        if not encoded.one_output or not trains_only_head(model) or has_weights(model):
            return None
        width = next(iter(encoded.inputs(np.arange(1)).values())).shape[1]
        few = 4 * len(encoded) * width <= MAX_BYTES
        return self.encode(model, encoded, "first") if few else None

    def _cache(self, model: nn.Module, encoded: Encoded) -> None:
        position = self._position
        assert position is not None
        features = self.frozen(model, encoded, position)
        self._features[id(encoded)] = (encoded, EncodedFeatures(features))

    # --- passes ----------------------------------------------------------------------------------

    def predict(
        self,
        encoded: Encoded,
        before_batch: BeforeBatch | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Outputs of all rows in row order, eval mode, fp32 (N, K) on the CPU, in every process.

        They are what the rows keep, see `Encoded.outputs`: the logits (N, C) of classes. With row
        numbers (M,) those of these rows alone (M, K).
        """
        view = self.view(encoded)

        def outputs(inputs: dict[str, Tensor]) -> Tensor:
            return view.outputs(self.net, inputs)

        with evaluation_mode(self.net):
            return self.compute(view, outputs, before_batch, rows)

    def encode(
        self,
        model: nn.Module,
        encoded: Encoded,
        position: str,
        before_batch: BeforeBatch | None = None,
        allocate: Allocate = torch.zeros,
    ) -> Tensor:
        """What the head reads of all rows, in row order, eval mode (N, D, 1 or 2), on the CPU.

        In fp32 whatever the precision of the run: the encoder is called without autocast.
        """
        with evaluation_mode(model):
            return self.compute(
                encoded,
                lambda inputs: encode_batch(model, inputs, position),
                before_batch,
                None,
                allocate,
            )

    def frozen(self, model: nn.Module, encoded: Encoded, position: str) -> Tensor:
        """The same of an encoder as it was loaded, kept on disk where rows and weights have names.

        All precisions share a table, as do all heads, seeds, methods and the audit.
        """
        named = encoded.key and self.processes == 1 and has_weights(model)
        weights = fingerprint(model, idle_parameters(model)) if named else ""
        if not weights:
            return self.encode(model, encoded, position)
        return kept(
            " ".join(["2", encoded.key, position, self.device.type, weights]),
            len(encoded),
            lambda allocate: self.encode(model, encoded, position, None, allocate),
        )

    def compute(
        self,
        encoded: Encoded,
        compute: Callable[[dict[str, Tensor]], Tensor],
        before_batch: BeforeBatch | None = None,
        rows: Tensor | None = None,
        allocate: Allocate = torch.zeros,
    ) -> Tensor:
        """Compute a row-wise tensor over all rows, or these; batches are dealt to the processes.

        Args:
            encoded: The rows.
            compute: Inputs of a batch -> (B, ...).
            before_batch: Called before every batch.
            rows: Row numbers (M,); None takes all.
            allocate: Makes the tensor that the batches are written into.
        """
        chosen = np.arange(len(encoded)) if rows is None else rows.numpy()
        gathered: Tensor | None = None
        for number, places in enumerate(prediction_batches(encoded.lengths[chosen])):
            if number % self.processes != self.rank and gathered is not None:
                continue
            batch = chosen[places]
            if before_batch is not None:
                before_batch(torch.from_numpy(batch))
            values = compute(self._to_device(encoded.inputs(batch))).float().cpu()
            if gathered is None:
                gathered = allocate((len(chosen), *values.shape[1:]))
            if number % self.processes == self.rank:
                gathered[torch.from_numpy(places.copy())] = values
        assert gathered is not None
        return self.sum_over_processes(gathered)

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """Element-wise sum over all processes; the tensor itself when there is one."""
        if self.processes == 1:
            return tensor
        summed: Tensor = self.accelerator.reduce(tensor.to(self.device), reduction="sum")
        return summed.cpu()

    def _to_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    # --- one step --------------------------------------------------------------------------------

    def backward(self, method: Method, encoded: Encoded, rows: np.ndarray, run: Run) -> float:
        """Loss and gradients of one optimizer step, in micro-batches and over processes.

        A micro-batch counts by its share of the step's rows, so that the gradient is that of the
        mean over the rows however they are cut.

        Returns:
            The mean loss over the step's rows, over all processes.
        """
        view = self.view(encoded)
        order = self.settings.order_seed
        order = self.settings.seed if order is None else order
        seed = derive_seed(order, "augment", run.stage, run.epoch)
        own = rows[self.rank :: self.processes]
        spare = len(own) == 0  # a short last batch: take part in the exchange, with weight zero
        own = rows[:1] if spare else own
        size = self.settings.micro_batch_size or self.settings.batch_size
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        total, run.left_out = 0.0, 0
        sums = dict(run.sums)
        for place, part in enumerate(parts):
            index = torch.from_numpy(part.copy())
            batch = Batch(
                inputs=self._to_device(self._all_views(view, part, seed)),
                labels=run.labels[index].to(self.device),
                rows=index,
                columns=self._to_device({n: column[index] for n, column in run.columns.items()}),
            )
            last = place == len(parts) - 1
            exchange = nullcontext() if last else self.accelerator.no_sync(self.net)
            with exchange, self._attention(batch.inputs):  # backward may run layers again
                with row_statistics(self.net, len(part) * self._views):
                    loss = method.compute_loss(self.net, batch, run)
                weight = 0.0 if spare else len(part) * self.processes / len(rows)
                self.accelerator.backward(loss if weight == 1 else loss * weight)
            total += float(loss.detach()) * weight / self.processes
        if spare:  # that row is another process's
            run.left_out, run.sums = 0, sums
        both = torch.tensor([total, run.left_out], dtype=torch.float64)
        both = self.sum_over_processes(both)
        run.left_out = int(both[1])
        return float(both[0])

    def _attention(self, inputs: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Attention by plain products where the fused kernel is slower.

        In bf16 on the CPU its backward pass multiplies head by head: a step of MiniLM with LoRA
        takes 0.6 times as long without it at 14 tokens, 0.8 times at 32 (benchmarks/attention.py).
        Longer texts would gain less, and take more memory.
        """
        ids = inputs.get("input_ids")
        short = ids is not None and ids.shape[1] <= SHORT_TEXT
        if not short or self.device.type != "cpu" or self.precision != "bf16":
            return nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH)

    def _all_views(self, encoded: Encoded, rows: np.ndarray, seed: int) -> dict[str, Tensor]:
        """Inputs of a step: all rows in the first view, then all in the second (V B, ...)."""
        views = [encoded.training_inputs(rows, seed, view) for view in range(self._views)]
        if len(views) == 1:
            return views[0]
        return {name: torch.cat([view[name] for view in views]) for name in views[0]}

    def merge_writes(self, run: Run, names: tuple[str, ...], own_rows: Tensor) -> None:
        """Give every process the rows that the others wrote since the last merge."""
        if self.processes == 1:
            return
        owners = self.sum_over_processes(own_rows.float())
        for name in names:
            column = run.columns.get(name)
            if column is None:
                continue
            shape = (-1, *[1] * (column.ndim - 1))
            mine = torch.where(own_rows.view(shape), column, torch.zeros_like(column))
            merged = self.sum_over_processes(mine)
            column.copy_(torch.where((owners > 0).view(shape), merged, column))

    def merge_sums(self, sums: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
        """Sums and numbers of rows by name, over all processes; each may have names of its own."""
        if self.processes == 1:
            return sums
        text = torch.tensor([list(json.dumps(sums).encode())], dtype=torch.uint8)
        padded = self.accelerator.pad_across_processes(text.to(self.device), dim=1)
        merged: dict[str, tuple[float, int]] = {}
        for own in self.accelerator.gather(padded).cpu():
            for name, (total, rows) in json.loads(bytes(own.tolist()).rstrip(b"\0")).items():
                before = merged.get(name, (0.0, 0))
                merged[name] = (before[0] + total, before[1] + rows)
        return merged

    def any_process(self, flag: int) -> int:
        """The largest flag of all processes."""
        if self.processes == 1:
            return flag
        gathered: Tensor = self.accelerator.gather(torch.tensor([flag], device=self.device))
        return int(gathered.max())

    def random_states(self) -> Tensor:
        """State of the default random generator of every process (P, bytes)."""
        state: Tensor = torch.get_rng_state()[None]
        if self.processes > 1:
            state = self.accelerator.gather(state.to(self.device)).cpu()
        return state

    def track(self, values: dict[str, Any], step: int) -> None:
        """Send numbers to the tracker, where there is one."""
        if self.settings.tracker != "none":
            self.accelerator.log(values, step=step)


def check_tracker(name: str) -> None:
    """Refuse a tracker that is unknown or not installed."""
    if name == "none":
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [str(kind) for kind in LOGGER_TYPE_TO_CLASS]
    if name not in known:
        raise InputError(f"unknown tracker {name!r}; available: none, {', '.join(known)}")
    if name not in [str(kind) for kind in get_available_trackers()]:
        raise InputError(f"tracker {name!r} is not installed: pip install {name}")
