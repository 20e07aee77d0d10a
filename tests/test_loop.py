"""The loop: stages, schedule, hooks, selection, errors, signals."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import noiseproof
from conftest import FitCache
from noiseproof import checkpoint
from noiseproof.checkpoint import Interrupted, Stopwatch, load_checkpoint
from noiseproof.engine import rate_factor
from noiseproof.errors import InputError
from noiseproof.loop import DEFAULT_RATE, Outcome, Progress
from noiseproof.losses import cross_entropy
from noiseproof.method import Batch, Columns, Method, Run, Stage
from noiseproof.methods import ELR, CleaR, CoTeaching, CrossEntropy
from tiny import Tiny, same_weights, table, tiny, train_settings, weights

Steps = list[dict[str, Any]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """What every optimizer step saw: its rate, the norm of its gradient, the object."""
    seen: Steps = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *given: Any, **named: Any) -> Any:
        gradients = [
            parameter.grad
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = torch.linalg.vector_norm(torch.stack([x.norm() for x in gradients]))
        rates = {group["lr"] for group in self.param_groups}
        assert len(rates) == 1
        seen.append({"rate": rates.pop(), "norm": float(norm), "optimizer": self})
        return original(self, *given, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


@dataclass(frozen=True)
class Shrinking(Method):
    """All rows in the first epoch, 9 in the second, 17 in the third, all in the fourth."""

    def on_epoch_start(self, run: Run) -> Columns:
        share = (None, 9, 17, None)[run.epoch]
        return {} if share is None else {"keep": torch.arange(len(run.labels)) < share}


@dataclass(frozen=True)
class TwoStages(Method):
    """A head first, all of the model then."""

    def stages(self, epochs: int) -> list[Stage]:
        head = Stage("probe", 2, lambda name: name.startswith("classifier"), learning_rate=1e-2)
        return [head, Stage("tune", epochs - 2)]


# --- schedule and steps --------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_schedule_ends_at_its_end_although_the_epochs_shrink(
    schedule: str, tiny_run: Tiny, steps: Steps
) -> None:
    """Counted in steps of full epochs, the rate of a method that drops rows never comes down."""
    outcome = tiny_run.fit(
        Shrinking(), epochs=4, schedule=schedule, warmup_share=0.1, learning_rate=1e-3
    )
    assert [row["rows"] for row in outcome.history] == [25, 9, 17, 25]
    assert [row["steps"] for row in outcome.history] == [4, 2, 3, 4]
    settings = train_settings(schedule=schedule, warmup_share=0.1)
    wanted = [
        1e-3 * rate_factor(settings, (epoch + (step + 0.5) / count) / 4)
        for epoch, count in enumerate([4, 2, 3, 4])
        for step in range(count)
    ]
    rates = [step["rate"] for step in steps]
    assert rates == pytest.approx(wanted)
    assert max(rates) <= 1e-3
    assert rates[-1] == 1e-3 if schedule == "constant" else rates[-1] < 1e-4
    assert [row["learning_rate"] for row in outcome.history] == [rates[i] for i in (3, 5, 8, 12)]


def test_the_rate_rises_over_the_warm_up_share_of_the_stage(tiny_run: Tiny, steps: Steps) -> None:
    tiny_run.fit(CrossEntropy(), epochs=2, warmup_share=0.5, learning_rate=1e-3)
    rates = [step["rate"] for step in steps]
    up = [0.125e-3, 0.375e-3, 0.625e-3, 0.875e-3]
    assert rates == pytest.approx([*up, *reversed(up)])


def test_every_step_trains_even_if_there_is_only_one(tiny_run: Tiny, steps: Steps) -> None:
    """At the start of a warm-up the rate is 0: a run of one step saved the model as it came."""
    outcome = tiny_run.fit(CrossEntropy(), epochs=1, batch_size=25, learning_rate=1e-3)
    assert [step["rate"] for step in steps] == pytest.approx([1e-3 * 0.5 / 0.94])  # linear
    assert not same_weights(outcome.model, tiny_run.model)
    steps.clear()
    tiny_run.fit(CrossEntropy(), epochs=40, batch_size=25, schedule="cosine")
    assert min(step["rate"] for step in steps) > 0 and len(steps) == 40


def test_gradients_are_clipped_to_their_norm_or_left_alone(tiny_run: Tiny, steps: Steps) -> None:
    """One wild batch early on can undo the pre-training."""
    free = tiny_run.fit(CrossEntropy(), epochs=1, max_grad_norm=0)
    norms = [step["norm"] for step in steps]
    limit = min(norms) / 2
    steps.clear()
    clipped = tiny_run.fit(CrossEntropy(), epochs=1, max_grad_norm=limit)
    assert [step["norm"] for step in steps] == pytest.approx([limit] * 4, rel=1e-3)
    assert not same_weights(free.model, clipped.model)


def test_every_stage_has_its_own_optimizer_schedule_rate_and_trained_part(
    tiny_run: Tiny, steps: Steps
) -> None:
    """Moments of the probe would drive the first steps of fine-tuning; a rate that goes on falling
    would leave nothing for it.
    """
    outcome = tiny_run.fit(TwoStages(), epochs=3, learning_rate=None, warmup_share=0.0)
    assert [(row["stage"], row["epoch"]) for row in outcome.history] == [
        ("probe", 0),
        ("probe", 1),
        ("tune", 0),
    ]
    assert len(steps) == 12
    first, last = 15 / 16, 1 / 16  # of 8 steps, in the middle of the step
    assert steps[0]["rate"] == pytest.approx(1e-2 * first)
    assert steps[7]["rate"] == pytest.approx(1e-2 * last)
    assert steps[8]["rate"] == pytest.approx(DEFAULT_RATE * 7 / 8)  # of 4 steps
    assert steps[0]["optimizer"] is steps[7]["optimizer"] is not steps[8]["optimizer"]
    counts = {float(state["step"]) for state in steps[8]["optimizer"].state.values()}
    assert counts == {4.0}
    assert outcome.trainable == sum(p.numel() for p in tiny_run.model.parameters())


def test_the_encoder_stands_still_in_the_stage_of_the_head(tiny_run: Tiny) -> None:
    @dataclass(frozen=True)
    class Probe(Method):
        def stages(self, epochs: int) -> list[Stage]:
            return [Stage("probe", epochs, lambda name: name.startswith("classifier"))]

    outcome = tiny_run.fit(Probe())
    assert same_weights(outcome.model.bert, tiny_run.model.bert)
    assert not same_weights(outcome.model.classifier, tiny_run.model.classifier)


def test_the_rate_of_the_user_goes_before_the_rate_of_the_stage(
    tiny_run: Tiny, steps: Steps
) -> None:
    tiny_run.fit(TwoStages(), epochs=3, learning_rate=7e-3, warmup_share=0.0)
    assert steps[0]["rate"] == pytest.approx(7e-3 * 15 / 16)
    assert steps[8]["rate"] == pytest.approx(7e-3 * 7 / 8)


def test_a_stage_may_have_settings_of_its_own(tiny_run: Tiny, steps: Steps) -> None:
    """A rate that fits the encoder leaves a head where it started; so the stage's goes first."""

    @dataclass(frozen=True)
    class Own(Method):
        def stages(self, epochs: int) -> list[Stage]:
            own = {"batch_size": 5, "learning_rate": 1e-2, "schedule": "constant"}
            own |= {"warmup_share": 0.0, "weight_decay": 0.5}
            head = Stage("probe", 1, trains="head", settings=own)
            return [head, Stage("tune", epochs)]

    asked = {"learning_rate": 7e-3, "warmup_share": 0.0, "micro_batch_size": 7}
    outcome = tiny_run.fit(Own(), epochs=1, **asked)
    assert [row["steps"] for row in outcome.history] == [5, 4]
    assert [step["rate"] for step in steps[:5]] == [1e-2] * 5
    assert steps[5]["rate"] == pytest.approx(7e-3 * 7 / 8)
    decays = {step["optimizer"].param_groups[0]["weight_decay"] for step in steps[:5]}
    assert decays == {0.5} and steps[5]["optimizer"].param_groups[0]["weight_decay"] == 0.01


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_stage_of_the_head_trains_what_is_trainable_in_it(tune: str, tiny_run: Tiny) -> None:
    """peft keeps the head as it came beside the one that trains."""

    @dataclass(frozen=True)
    class Head(CrossEntropy):
        def stages(self, epochs: int) -> list[Stage]:
            return [Stage("probe", epochs, trains="head")]

    before = weights(Head(tune=tune).prepare_model(copy.deepcopy(tiny_run.model)))
    outcome = tiny_run.fit(Head(tune=tune), epochs=1)
    changed = {
        name for name, value in weights(outcome.model).items()
        if not torch.equal(value, before[name])
    } - {name for name in before if "lora_A" in name}  # fmt: skip
    inner = ".modules_to_save.default" if tune == "lora" else ""
    start = "base_model.model." if tune == "lora" else ""
    assert changed == {f"{start}classifier{inner}.{part}" for part in ("weight", "bias")}


def test_classes_without_rows_are_said_before_training(tiny_run: Tiny) -> None:
    with pytest.warns(UserWarning, match="no training row has the label 'kitchen'; the model"):
        outcome = tiny_run.fit(CrossEntropy(), epochs=2, labels=tiny_run.labels % 2)
    assert ["warning" in row for row in outcome.history] == [True, False]


@pytest.mark.parametrize(
    ("batch_size", "epochs", "said"),
    [
        (16, 4, "9 rows are kept, fewer than the batch size, 16; lower it"),
        (4, 4, "9 rows are kept, 9 steps in the epochs left (3); train longer"),
    ],
)
def test_a_selection_too_small_to_train_on_is_said_once(
    batch_size: int, epochs: int, said: str, tiny_run: Tiny
) -> None:
    with pytest.warns(UserWarning, match="rows are kept") as caught:
        outcome = tiny_run.fit(Shrinking(), epochs=epochs, batch_size=batch_size)
    assert next(str(one.message) for one in caught if "kept" in str(one.message)).startswith(said)
    told = [row.get("warning", "") for row in outcome.history]
    assert [said in one for one in told] == [False, True, False, False]


def test_what_a_hook_warns_of_is_issued_and_written_down(tiny_run: Tiny) -> None:
    @dataclass(frozen=True)
    class Doubtful(Method):
        def on_epoch_start(self, run: Run) -> Columns:
            if run.epoch == 1:
                run.warn("this will not help")
            return {}

    with pytest.warns(UserWarning, match="^this will not help$") as caught:
        outcome = tiny_run.fit(Doubtful())
    assert len(caught) == 1
    assert [row.get("warning") for row in outcome.history] == [None, "this will not help", None]


def test_every_stage_trains_in_bf16(tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that a stage had wrapped once was not wrapped again: later stages ran in fp32."""
    seen: list[bool] = []

    class Twice(CrossEntropy):
        def prepare_model(self, model: torch.nn.Module) -> torch.nn.Module:
            model.get_input_embeddings().register_forward_hook(
                lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
            )
            return super().prepare_model(model)

        def stages(self, epochs: int) -> list[Stage]:
            return [Stage("first", 1), Stage("second", 1)]

    monkeypatch.setattr("noiseproof.engine.choose_precision", lambda *asked: "bf16")
    tiny_run.fit(Twice(), epochs=2, precision="bf16")
    assert seen and all(seen)


def test_a_stage_in_which_nothing_trains_is_refused(tiny_run: Tiny) -> None:
    @dataclass(frozen=True)
    class Nothing(Method):
        def stages(self, epochs: int) -> list[Stage]:
            return [Stage("tune", epochs, lambda name: False)]

    with pytest.raises(InputError, match="no parameter is left to train"):
        tiny_run.fit(Nothing())


# --- hooks ---------------------------------------------------------------------------------------


def test_predictions_are_in_row_order_fresh_and_nobody_elses(tiny_run: Tiny) -> None:
    """Logits that are cached beyond a step, or handed out twice, make an epoch select on the past
    or on what another hook did to them.
    """
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Looks(Method):
        def on_epoch_start(self, run: Run) -> Columns:
            logits = run.predict()
            assert torch.equal(run.predict(), logits)
            seen.append(logits.clone())
            logits.zero_()
            assert torch.equal(run.predict(), seen[-1])
            assert torch.equal(run.predict(before_batch=lambda rows: None), seen[-1])
            return {}

    outcome = tiny_run.fit(Looks(), epochs=2)
    assert not torch.equal(seen[0], seen[1])
    start = tiny_run.model.eval()
    with torch.no_grad():
        rows = [start(**tiny_run.encoded.inputs(np.array([row]))).logits for row in range(25)]
    torch.testing.assert_close(seen[0], torch.cat(rows), rtol=1e-4, atol=1e-5)
    assert outcome.run.predict().shape == (25, 3)


def test_a_scoring_pass_does_not_disturb_training(tiny_run: Tiny, tiny_fits: FitCache) -> None:
    """Dropout is on: one number more from the random stream and every later mask is another."""

    @dataclass(frozen=True)
    class Scores(CrossEntropy):
        def on_epoch_start(self, run: Run) -> Columns:
            torch.rand(3)
            torch.rand(2, generator=run.generator)
            run.predict()
            run.predict(before_batch=lambda rows: None)
            return {"loss": cross_entropy(run.predict(), run.labels)}

    def measure(predict_on: Any, run: Run) -> Mapping[str, Any]:
        torch.rand(4)
        return {"mean": float(predict_on(tiny_run.encoded).mean())}

    plain = tiny_fits(CrossEntropy())
    assert same_weights(plain.model, tiny_run.fit(Scores()).model)
    assert same_weights(plain.model, tiny_run.fit(CrossEntropy(), extra={"measure": measure}).model)


def test_hooks_draw_from_a_generator_of_their_own_that_is_fresh_in_every_epoch(
    tiny_run: Tiny,
) -> None:
    """A generator that is not seeded per epoch cannot be resumed."""
    draws: list[float] = []

    @dataclass(frozen=True)
    class Draws(Method):
        def on_epoch_start(self, run: Run) -> Columns:
            draws.append(float(torch.rand((), generator=run.generator)))
            return {}

    for seed in (0, 0, 1):
        tiny_run.fit(Draws(), epochs=2, seed=seed)
    assert draws[:2] == draws[2:4] and len(set(draws)) == 4


def test_columns_are_joined_to_the_rows_of_the_batch(tiny_run: Tiny) -> None:
    """Off by one row here, and every weight and target belongs to another text."""
    seen: list[int] = []

    @dataclass(frozen=True)
    class Joined(Method):
        def on_epoch_start(self, run: Run) -> Columns:
            rows = torch.arange(len(run.labels))
            return {"row": rows, "soft": torch.stack([rows, -rows], dim=1).float()}

        def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
            assert torch.equal(batch.columns["row"], batch.rows)
            assert torch.equal(batch.columns["soft"][:, 1], -batch.rows.float())
            assert torch.equal(batch.labels, tiny_run.labels[batch.rows])
            for row, ids in zip(batch.rows.tolist(), batch.inputs["input_ids"], strict=True):
                alone = tiny_run.encoded.inputs(np.array([row]))["input_ids"][0]
                assert torch.equal(ids[: len(alone)], alone)
            seen.extend(batch.rows.tolist())
            return super().compute_loss(model, batch, run)

    tiny_run.fit(Joined(), epochs=2)
    assert sorted(seen[:25]) == sorted(seen[25:]) == list(range(25))
    assert seen[:25] != seen[25:]


def test_keep_holds_for_one_epoch_only(tiny_run: Tiny) -> None:
    """A mask that outlives its epoch silently goes on training on the old selection."""
    trained: list[list[int]] = [[], [], [], []]

    @dataclass(frozen=True)
    class Recorded(Shrinking):
        def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
            trained[run.epoch] += batch.rows.tolist()
            return super().compute_loss(model, batch, run)

    outcome = tiny_run.fit(Recorded(), epochs=4)
    assert [sorted(rows) for rows in trained] == [list(range(n)) for n in (25, 9, 17, 25)]
    assert "keep" not in outcome.run.columns


def test_the_history_says_what_was_trained_and_what_the_hooks_logged(tiny_run: Tiny) -> None:
    @dataclass(frozen=True)
    class Logs(Shrinking):
        def on_epoch_start(self, run: Run) -> Columns:
            run.log(**{f"seen_{run.epoch}": run.epoch})
            return super().on_epoch_start(run)

        def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
            return super().compute_loss(model, batch, run) * 0 + len(batch.rows)

    history = tiny_run.fit(Logs(), epochs=3).history
    assert [row["loss"] for row in history] == pytest.approx(
        [(3 * 64 + 1) / 25, (64 + 1) / 9, (2 * 64 + 1) / 17]
    )  # a mean over rows, not over batches
    assert "seen_1" in history[1] and "seen_0" not in history[1]


# --- errors --------------------------------------------------------------------------------------


def returning(columns: Callable[[int], Columns]) -> Method:
    @dataclass(frozen=True)
    class Wrong(Method):
        def on_epoch_start(self, run: Run) -> Columns:
            return columns(run.epoch)

    return Wrong()


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (
            {"keep": torch.ones(24, dtype=torch.bool)},
            ValueError,
            "column 'keep' of Wrong has 24 rows, the training set has 25",
        ),
        (
            {"target": torch.zeros(50, 3)},
            ValueError,
            "column 'target' of Wrong has 50 rows, the training set has 25",
        ),
        (
            {"clean_prob": torch.full((25,), math.nan)},
            FloatingPointError,
            "column 'clean_prob' of Wrong has values that are not finite",
        ),
        (
            {"loss": torch.tensor([math.inf] + [0.0] * 24)},
            FloatingPointError,
            "column 'loss' of Wrong has values that are not finite",
        ),
        ({"keep": torch.ones(25)}, TypeError, "column 'keep' of Wrong must be bool"),
        (
            {"keep": torch.zeros(25, dtype=torch.bool)},
            InputError,
            "stage 'train' of Wrong kept no row in epoch 1; loosen its selection or lengthen",
        ),
    ],
)
def test_a_column_that_is_wrong_is_named(
    columns: Columns, error: type[Exception], message: str, tiny_run: Tiny
) -> None:
    """Without the check a broadcast, a NaN or an empty epoch goes through to the result."""
    method = returning(lambda epoch: columns if epoch == 1 else {})
    with pytest.raises(error, match=message):
        tiny_run.fit(method, epochs=2)


def test_a_column_that_becomes_infinite_while_it_is_written_is_named(tiny_run: Tiny) -> None:
    @dataclass(frozen=True)
    class Writes(ELR):
        def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
            loss = super().compute_loss(model, batch, run)
            run.write("target", batch, torch.full((len(batch.rows), 3), math.inf))
            return loss

    with pytest.raises(FloatingPointError, match="column 'target' of Writes has values"):
        tiny_run.fit(Writes(), epochs=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(
    value: float, tiny_run: Tiny
) -> None:
    """Adam spreads one NaN over all weights, and the run goes on for hours."""

    @dataclass(frozen=True)
    class Explodes(TwoStages):
        def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
            loss = super().compute_loss(model, batch, run)
            here = (run.stage, run.epoch, run.step) == ("tune", 0, 2)
            return loss + value if here else loss

    message = f"loss {value} of Explodes in stage 'tune', epoch 0, step 2; lower the learning rate"
    with pytest.raises(FloatingPointError, match=message):
        tiny_run.fit(Explodes(), epochs=3)


# --- measuring -----------------------------------------------------------------------------------


@dataclass
class Curve:
    """A measure with a given validation curve; keeps the weights that it saw."""

    values: list[float]
    seen: ClassVar[str] = "validation_accuracy"

    def __post_init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def __call__(self, predict_on: Any, run: Run) -> dict[str, Any]:
        self.weights.append(weights(run.model))
        return {self.seen: self.values[len(self.weights) - 1]}


@pytest.mark.parametrize(
    ("values", "best"), [([0.5, 0.9, 0.7], 1), ([0.9, 0.9, 0.9], 0), ([0.1, 0.2, 0.3], 2)]
)
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_select_best_takes_the_weights_of_the_best_epoch(
    values: list[float], best: int, tune: str, tiny_run: Tiny
) -> None:
    """Reporting the best accuracy with the last weights is a number nobody can reproduce."""
    curve = Curve(values)
    outcome = tiny_run.fit(CrossEntropy(tune=tune), select="best", extra={"measure": curve})
    assert outcome.best_epoch == best
    found = weights(outcome.model)
    assert all(torch.equal(found[name], value) for name, value in curve.weights[best].items())
    last = tiny_run.fit(CrossEntropy(tune=tune), extra={"measure": Curve(values)})
    assert last.best_epoch is None
    found = weights(last.model)
    assert all(torch.equal(found[name], value) for name, value in curve.weights[2].items())


def test_after_select_best_the_rows_are_predicted_by_the_best_weights(
    tiny_model: Path, tiny_run: Tiny
) -> None:
    """samples.parquet would hold the suspicions of a model that was thrown away."""

    class Measured(Curve):
        def __call__(self, predict_on: Any, run: Run) -> dict[str, Any]:
            self.logits = [*getattr(self, "logits", []), run.predict()]  # as the job does
            return super().__call__(predict_on, run)

    curve = Measured([0.9, 0.1, 0.1])
    outcome = tiny_run.fit(CrossEntropy(), select="best", extra={"measure": curve})
    logits = outcome.run.predict()
    torch.testing.assert_close(logits, curve.logits[0])
    assert not torch.allclose(logits, curve.logits[2], atol=1e-3)


@pytest.mark.parametrize(("evaluate", "epochs"), [("epoch", [0, 1, 2]), ("end", [2])])
def test_measuring_happens_after_every_epoch_or_at_the_end_alone(
    evaluate: str, epochs: list[int], tiny_run: Tiny
) -> None:
    extra = {"measure": lambda predict_on, run: {"test_accuracy": run.epoch}}
    history = tiny_run.fit(CrossEntropy(), evaluate=evaluate, extra=extra).history
    assert [row["epoch"] for row in history if "test_accuracy" in row] == epochs


def test_progress_is_reported_after_every_step_and_every_epoch(tiny_run: Tiny) -> None:
    seen: list[Progress] = []
    outcome = tiny_run.fit(Shrinking(), epochs=2, extra={"report": seen.append})
    done = [(p.epoch, p.step, p.steps) for p in seen if p.history is None]
    assert done == [(0, 1, 4), (0, 2, 4), (0, 3, 4), (0, 4, 4), (1, 1, 2), (1, 2, 2)]
    assert [p.history for p in seen if p.history is not None] == outcome.history


def test_the_test_numbers_of_co_teaching_are_those_of_the_model_that_is_deployed(
    tiny_model: Path, tiny_table: pd.DataFrame
) -> None:
    """Two networks measured together, one of them saved: the record would promise too much."""
    rows = table(40, seed=9)
    result = noiseproof.fit(
        tiny_table, test=rows, model=str(tiny_model), method=CoTeaching(), train=train_settings()
    )
    found = result.predictor.predict_proba(rows["text"].tolist(), settings=train_settings())
    labels = [result.predictor.label_names.index(label) for label in rows["label"]]
    nll = -np.log(found[np.arange(40), labels]).mean()
    assert result.record.metrics["test_nll"] == pytest.approx(nll, rel=1e-4)


@pytest.mark.parametrize("select", ["last", "best"])
def test_the_rows_of_co_teaching_are_judged_by_the_model_that_is_deployed(
    select: str, tiny_model: Path, tiny_table: pd.DataFrame
) -> None:
    """Else memorisation and suspicions are those of two networks, of which one is thrown away."""
    rows = tiny_table.reset_index(drop=True)
    settings = train_settings(select=select)
    result = noiseproof.fit(
        rows,
        test=table(40, seed=9),
        validation=table(20, seed=8),
        validation_labels="clean",
        clean_label="clean_label",
        model=str(tiny_model),
        method=CoTeaching(),
        train=settings,
    )
    found = result.predictor.predict_proba(rows["text"].tolist(), settings=train_settings())
    names = result.predictor.label_names
    given, clean = (rows[name].map(names.index).to_numpy() for name in ("label", "clean_label"))
    own = found[np.arange(len(rows)), given]
    np.testing.assert_allclose(result.samples["loss"], -np.log(own), rtol=1e-3)
    wanted = (found.argmax(axis=1) == given)[given != clean].mean()
    assert result.record.metrics["memorization"] == pytest.approx(wanted)


# --- interruption, inside this process -----------------------------------------------------------


@dataclass(frozen=True)
class DrawsInSteps(TwoStages):
    """Draws in its loss, writes a column, logs: all that a resumed epoch must know."""

    writes: ClassVar[tuple[str, ...]] = ("seen",)

    def on_epoch_start(self, run: Run) -> Columns:
        run.log(first=float(torch.rand((), generator=run.generator)))
        return {"seen": torch.zeros(len(run.labels)), "keep": torch.arange(len(run.labels)) < 20}

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        noise = torch.rand(len(batch.rows), generator=run.generator)
        run.write("seen", batch, noise)
        run.log(last=float(noise[-1]))
        loss = cross_entropy(model(**batch.inputs).logits, batch.labels)
        return (loss * noise).mean()


def interrupted(
    run: Tiny, method: Method, folder: Path, stop: tuple[str, int, int], **settings: Any
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Fit with a signal after one step, then resume; the outcome and the reported history."""

    def report(progress: Progress) -> None:
        if progress.history is None and (progress.stage, progress.epoch, progress.step) == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def measure(predict_on: Any, run: Run) -> dict[str, Any]:
        return {"mean": float(run.predict().mean()), "validation_accuracy": -float(run.epoch)}

    extra: dict[str, Any] = {"checkpoints": folder, "measure": measure}
    with pytest.raises(Interrupted, match="SIGTERM"):
        run.fit(method, extra=extra | {"report": report}, **settings)
    loaded = load_checkpoint(folder)
    assert loaded is not None and loaded[1]["step"] == stop[2]
    outcome = run.fit(method, extra=extra | {"resume": True}, **settings)
    return outcome, outcome.history


@pytest.mark.parametrize("select", ["last", "best"])
@pytest.mark.parametrize(
    "stop",
    [("probe", 0, 1), ("probe", 0, 3), ("probe", 1, 2), ("tune", 0, 1), ("tune", 1, 2)],
    ids=str,
)
def test_a_run_that_is_stopped_after_any_step_resumes_to_the_same_result(
    stop: tuple[str, int, int], select: str, tiny_run: Tiny, tmp_path: Path
) -> None:
    """Stages, cached features, draws of hooks, columns written half, logs, the best weights: each
    of them, forgotten in a checkpoint, gives another model without a word.
    """

    def measure(predict_on: Any, run: Run) -> dict[str, Any]:
        return {"mean": float(run.predict().mean()), "validation_accuracy": -float(run.epoch)}

    settings = {"epochs": 4, "select": select}
    whole = tiny_run.fit(DrawsInSteps(), extra={"measure": measure}, **settings)
    outcome, history = interrupted(tiny_run, DrawsInSteps(), tmp_path, stop, **settings)
    assert same_weights(whole.model, outcome.model)
    assert json.dumps(history) == json.dumps(whole.history)
    assert list(outcome.run.columns) == list(whole.run.columns)
    for name, column in whole.run.columns.items():
        assert torch.equal(outcome.run.columns[name], column), name
    assert torch.equal(outcome.run.predict(), whole.run.predict())
    assert outcome.best_epoch == whole.best_epoch


def test_a_resumed_run_counts_the_seconds_of_all_its_legs(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`total_s` of a run that was interrupted every hour was that of its last leg."""
    clock = iter(range(0, 10**9, 10))
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: next(clock))
    legs = []
    for stop in (("train", 0, 2), ("train", 1, 1), None):
        watch = Stopwatch()
        monkeypatch.setattr(watch, "_started", (watch._started[0] - 1000, 0.0))  # reading files

        def report(progress: Progress, stop: Any = stop) -> None:
            if (progress.stage, progress.epoch, progress.step) == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        extra = {"checkpoints": tmp_path, "report": report, "resume": bool(legs), "watch": watch}
        if stop is None:
            outcome = tiny_run.fit(CrossEntropy(), extra=extra)
        else:
            with pytest.raises(Interrupted):
                tiny_run.fit(CrossEntropy(), extra=extra)
        loaded = load_checkpoint(tmp_path)
        assert loaded is not None
        legs.append(watch.seconds()["total_s"])
        assert 0 < legs[-1] - loaded[1]["legs"]["total_s"] <= 50
    assert 1000 < legs[0] < legs[1] - 1000 < legs[2] - 2000
    assert watch.seconds()["cpu_s"] > 0
    assert outcome.seconds["train_s"] == loaded[1]["seconds"]["train_s"] > 0


def test_sampled_gates_at_test_time_are_the_same_after_a_resumed_epoch(
    tiny_run: Tiny, tmp_path: Path
) -> None:
    """State that a hook leaves in the model at the start of an epoch is not in a checkpoint."""
    method = CleaR(warmup_epochs=1, gamma=0.5, max_clean_loss=None, eval_gate="sample")
    measure = {"measure": lambda predict_on, run: {"mean": float(run.predict().mean())}}
    whole = tiny_run.fit(method, seed=5, extra=measure)
    stop = ("train", 2, 2)

    def report(progress: Progress) -> None:
        if (progress.stage, progress.epoch, progress.step) == stop and not progress.history:
            os.kill(os.getpid(), signal.SIGINT)

    extra = measure | {"checkpoints": tmp_path}
    with pytest.raises(Interrupted):
        tiny_run.fit(method, seed=5, extra=extra | {"report": report})
    resumed = tiny_run.fit(method, seed=5, extra=extra | {"resume": True})
    assert resumed.history == whole.history


@pytest.mark.parametrize("stop", [None, 0, 1])
def test_the_stage_after_that_of_the_head_is_scored_from_its_features(
    stop: int | None, tiny_model: Path, tiny_table: pd.DataFrame, tmp_path: Path
) -> None:
    """The weights are the same, so a pass of the whole network would be wasted. A run that is
    resumed between the stages computes the features again: logits of the whole network differ in
    the last bit, and it would score its rows otherwise.
    """
    run = tiny(tiny_model, tiny_table)
    calls: list[int] = []
    run.model.get_submodule("bert.encoder.layer.0").register_forward_hook(
        lambda *_: calls.append(1)
    )
    counted: list[tuple[str, int]] = []
    scores: list[Tensor] = []

    @dataclass(frozen=True)
    class Scores(TwoStages):
        def on_epoch_start(self, run: Run) -> Columns:
            before = len(calls)
            scores.append(run.predict())
            counted.append((run.stage, len(calls) - before))
            return {}

    def measure(predict_on: Any, run: Run) -> dict[str, float]:
        if not signals and stop == run.epoch and run.stage == "probe":
            signals.append(stop)
            os.kill(os.getpid(), signal.SIGTERM)
        return {"mean": float(run.predict().mean())}

    signals: list[int] = []
    extra: dict[str, Any] = {"measure": measure, "checkpoints": tmp_path}
    if stop is not None:
        with pytest.raises(Interrupted):
            run.fit(Scores(), epochs=4, extra=extra)
    outcome = run.fit(Scores(), epochs=4, extra=extra | {"resume": True})
    before = len(calls)
    outcome.run.predict()
    assert counted == [("probe", 0), ("probe", 0), ("tune", 0), ("tune", 0)]
    assert len(calls) == before  # the last epoch was measured with the whole network
    if stop is not None:
        plain = tiny(tiny_model, tiny_table)
        wanted, resumed = len(scores), scores[2]
        plain.fit(Scores(), epochs=4)
        assert torch.equal(scores[wanted + 2], resumed)


def test_resuming_where_nothing_was_saved_is_starting(tiny_run: Tiny, tmp_path: Path) -> None:
    extra = {"checkpoints": tmp_path / "none", "resume": True}
    outcome = tiny_run.fit(CrossEntropy(), extra=extra)
    assert len(outcome.history) == 3
    again = tiny_run.fit(CrossEntropy(), extra=extra)  # the run was over
    assert again.history == outcome.history and same_weights(again.model, outcome.model)


def test_a_run_learns_what_there_is_to_learn(tiny_model: Path) -> None:
    """All invariants hold for a loop that trains nothing as well."""
    run = tiny(tiny_model, table(60))
    outcome = run.fit(CrossEntropy(dropout=0.0), epochs=12, learning_rate=3e-3)
    accuracy = (outcome.run.predict().argmax(1) == run.labels).float().mean()
    assert accuracy > 0.95
    assert outcome.history[-1]["loss"] < outcome.history[0]["loss"] / 3
