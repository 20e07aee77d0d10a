"""Settings, schedule, batches and the passes over rows."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from noiseproof import engine as engine_module
from noiseproof.engine import (
    BUCKET_BATCHES,
    PREDICT_COST,
    PREDICT_ROWS,
    Engine,
    TrainSettings,
    check_tracker,
    derive_seed,
    prediction_batches,
    rate_factor,
    training_batches,
)
from noiseproof.errors import InputError
from noiseproof.method import Run
from noiseproof.methods import CrossEntropy
from noiseproof.models import set_trainable, training_mode
from tiny import LABELS, Tiny, same_weights, table, tiny, train_settings, weights

# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"epochs": 0}, "train.epochs must be at least 1, got 0"),
        ({"epochs": 10_001}, "train.epochs must be at most 10000"),
        ({"batch_size": 0}, "train.batch_size must be at least 1"),
        ({"max_length": 0}, "train.max_length must be at least 1"),
        ({"micro_batch_size": 0}, r"train.micro_batch_size must lie in \[1, 32\], got 0"),
        ({"micro_batch_size": 33}, r"train.micro_batch_size must lie in \[1, 32\], got 33"),
        ({"learning_rate": 0.0}, r"train.learning_rate must lie in \(0, 10\], got 0.0"),
        ({"learning_rate": math.nan}, "train.learning_rate .* got nan"),
        ({"learning_rate": -1e-3}, "train.learning_rate"),
        ({"weight_decay": -0.1}, "train.weight_decay"),
        ({"weight_decay": math.inf}, "train.weight_decay"),
        ({"warmup_share": 1.0}, r"train.warmup_share must lie in \[0, 1\), got 1.0"),
        ({"warmup_share": -0.1}, "train.warmup_share"),
        ({"max_grad_norm": -1.0}, "train.max_grad_norm"),
        ({"seed": -1}, "train.seed must lie in"),
        ({"seed": 2**32}, "train.seed must lie in"),
        ({"init_seed": -1}, "train.init_seed"),
        ({"order_seed": 2**32}, "train.order_seed"),
        ({"schedule": "linaer"}, "train.schedule must be one of linear, cosine, constant"),
        ({"precision": "fp8"}, "train.precision must be one of auto, fp32, bf16, fp16"),
        ({"device": "tpu"}, "train.device must be one of auto, cpu; got 'tpu'"),
        ({"evaluate": "never"}, "train.evaluate must be one of epoch, end"),
        ({"select": "first"}, "train.select must be one of last, best"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    """What is not refused here fails hours later, or trains something nobody asked for."""
    with pytest.raises(InputError, match=named):
        TrainSettings(**settings)


def test_the_ends_of_every_range_are_allowed() -> None:
    low = TrainSettings(
        epochs=1,
        batch_size=1,
        micro_batch_size=1,
        weight_decay=0,
        warmup_share=0,
        max_grad_norm=0,
        max_length=1,
        seed=0,
        init_seed=0,
        order_seed=0,
        learning_rate=1e-12,
    )
    high = TrainSettings(epochs=10_000, micro_batch_size=32, learning_rate=10, seed=2**32 - 1)
    assert low.epochs == 1 and high.seed == 2**32 - 1
    assert json.loads(json.dumps(dataclasses.asdict(low)))["micro_batch_size"] == 1


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_training() -> None:
    """accelerate only warns, and a night of training is not tracked."""
    check_tracker("none")
    with pytest.raises(InputError, match="unknown tracker 'tensorbord'; available: none, "):
        check_tracker("tensorbord")
    with pytest.raises(InputError, match="tracker 'clearml' is not installed"):
        check_tracker("clearml")


# --- seeds and rates -----------------------------------------------------------------------------


def test_seeds_of_different_purposes_are_unrelated() -> None:
    """Dropout that follows the same numbers as the batch order is not independent of it."""
    words = [("order", 0, 0), ("order", 0, 1), ("order", 1, 0), ("dropout", 0, 0), ("order", 1, 1)]
    seeds = {derive_seed(seed, *some) for seed in (0, 1, 2**32 - 1) for some in words}
    assert len(seeds) == 15
    assert derive_seed(3, "order", 1) == derive_seed(3, "order", 1)
    for seed in seeds:
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("schedule", "progress", "share"),
    [
        ("linear", 0.0, 0.0),
        ("linear", 0.1, 0.5),
        ("linear", 0.2, 1.0),
        ("linear", 0.6, 0.5),
        ("linear", 1.0, 0.0),
        ("cosine", 0.1, 0.5),
        ("cosine", 0.2, 1.0),
        ("cosine", 0.6, 0.5),
        ("cosine", 0.4, 0.5 + 0.5 * math.sqrt(0.5)),
        ("cosine", 1.0, 0.0),
        ("constant", 0.1, 0.5),
        ("constant", 0.2, 1.0),
        ("constant", 1.0, 1.0),
    ],
)
def test_the_rate_rises_to_its_peak_and_falls_as_the_schedule_says(
    schedule: str, progress: float, share: float
) -> None:
    """A schedule that is off by its warm-up never reaches its end."""
    settings = TrainSettings(schedule=schedule, warmup_share=0.2)
    assert rate_factor(settings, progress) == pytest.approx(share, abs=1e-12)
    assert rate_factor(TrainSettings(schedule=schedule, warmup_share=0), 0.0) == 1.0


# --- batches -------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=300),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_training_batches_hold_each_chosen_row_once_and_are_full_but_for_one(
    lengths: list[int], size: int, seed: int, data: st.DataObject
) -> None:
    """A row that is left out or taken twice changes the objective, and nothing shows it."""
    everything = np.arange(len(lengths))
    rows = everything[data.draw(st.integers(0, len(lengths) - 1)) :]
    batches = training_batches(rows, np.array(lengths), size, seed)
    assert sorted(np.concatenate(batches).tolist()) == rows.tolist()
    sizes = sorted(len(batch) for batch in batches)
    assert sizes[1:] == [size] * (len(batches) - 1) and 1 <= sizes[0] <= size


def test_training_batches_are_sorted_by_length_inside_a_bucket_and_shuffled_across() -> None:
    """Unsorted batches pay for padding; sorted epochs train on short texts first."""
    random = np.random.default_rng(0)
    lengths, size = random.integers(1, 1000, 4 * 8 * BUCKET_BATCHES), 8
    batches = training_batches(np.arange(len(lengths)), lengths, size, seed=1)
    assert all((np.diff(lengths[batch]) >= 0).all() for batch in batches)
    means = np.array([lengths[batch].mean() for batch in batches])
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 40  # of 1000; unsorted batches of 8 span about 780
    order = np.corrcoef(np.arange(len(means)), means)[0, 1]
    assert abs(order) < 0.3  # their order says nothing about the length
    other = training_batches(np.arange(len(lengths)), lengths, size, seed=2)
    assert {tuple(batch) for batch in batches} != {tuple(batch) for batch in other}
    again = training_batches(np.arange(len(lengths)), lengths, size, seed=1)
    assert all((one == two).all() for one, two in zip(batches, again, strict=True))


@given(lengths=st.lists(st.integers(0, 2 * PREDICT_COST), min_size=1, max_size=400))
def test_prediction_batches_hold_each_row_once_longest_first_within_their_cost(
    lengths: list[int],
) -> None:
    """The longest batch comes first so that memory runs out at once or never."""
    array = np.array(lengths)
    batches = list(prediction_batches(array))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert (np.diff(array[np.concatenate(batches)]) <= 0).all()
    for batch in batches:
        cost = len(batch) * array[batch].max()
        assert len(batch) <= PREDICT_ROWS and (cost <= PREDICT_COST or len(batch) == 1)


# --- prediction ----------------------------------------------------------------------------------


def ready(tiny_run: Tiny, tune: str = "full") -> tuple[Engine, nn.Module]:
    """An engine in a stage of a fresh model."""
    model = CrossEntropy(tune=tune).prepare_model(copy.deepcopy(tiny_run.model))
    engine = Engine(train_settings())
    engine.start_stage(model, tiny_run.encoded, 1e-3)
    return engine, model


def one_by_one(model: nn.Module, tiny_run: Tiny) -> Tensor:
    model.eval()
    with torch.no_grad():
        rows = [tiny_run.encoded.inputs(np.array([row])) for row in range(len(tiny_run.encoded))]
        return torch.cat([model(**inputs).logits for inputs in rows])


@pytest.mark.parametrize("tune", ["full", "head"])
def test_predictions_come_in_the_order_of_the_rows(
    tune: str, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are sorted by length: rows that are not put back get the losses of others."""
    monkeypatch.setattr(engine_module, "PREDICT_ROWS", 4)
    engine, model = ready(tiny_run, tune)
    assert engine.cached == (tune == "head")
    logits = engine.predict(tiny_run.encoded)
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    torch.testing.assert_close(logits, one_by_one(model, tiny_run), rtol=1e-4, atol=1e-5)
    assert len(set(tiny_run.encoded.lengths.tolist())) > 3  # the order did matter


def test_a_prediction_names_the_rows_of_each_batch_before_it(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CleaR sets the gates of these rows; those of other rows would be used silently."""
    monkeypatch.setattr(engine_module, "PREDICT_ROWS", 4)
    engine, model = ready(tiny_run)
    named: list[Tensor] = []
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    engine.predict(tiny_run.encoded, named.append)
    assert [len(rows) for rows in named] == sizes
    assert sorted(torch.cat(named).tolist()) == list(range(25))


def test_a_prediction_leaves_modes_gradients_and_random_numbers_as_they_were(
    tiny_run: Tiny,
) -> None:
    """A scoring pass that switches dropout off for the epoch, or shifts the random stream, makes a
    method with scoring differ from one without by more than its idea.
    """
    engine, model = ready(tiny_run)
    training_mode(model)
    model.get_submodule("bert.encoder.layer.0").eval()  # a flag that somebody set on purpose
    flags = {name: module.training for name, module in model.named_modules()}
    state, before = torch.get_rng_state(), weights(model)
    logits = engine.predict(tiny_run.encoded)
    assert torch.equal(engine.predict(tiny_run.encoded), logits)  # dropout is off
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert set(flags.values()) == {True, False}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    assert not logits.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_when_a_prediction_fails(tiny_run: Tiny) -> None:
    engine, model = ready(tiny_run)
    training_mode(model)

    def fail(rows: Tensor) -> None:
        raise RuntimeError("gate")

    with pytest.raises(RuntimeError, match="gate"):
        engine.predict(tiny_run.encoded, fail)
    assert model.training


# --- cached features -----------------------------------------------------------------------------


def uncached(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine_module, "feature_position", lambda model, inputs: None)


def test_training_a_head_on_cached_features_is_training_it_on_the_encoder(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of the wrong token, or with dropout in them, train another head that still learns.

    Texts of one length, so that the batches are the same with and without the cache.
    """
    run = tiny(tiny_model, table(25, wrong=0.2, length=6))
    calls: list[int] = []
    for layer in run.model.get_submodule("bert.encoder.layer"):
        layer.register_forward_hook(lambda *_: calls.append(1))
    method = CrossEntropy(tune="head")
    with monkeypatch.context() as patch:
        uncached(patch)
        slow = run.fit(method)
        slow_calls = len(calls)
    calls.clear()
    fast = run.fit(method)
    assert 0 < len(calls) < slow_calls / 3
    assert slow.model.classifier.weight.std() > 0
    start = run.model.classifier.weight
    assert not torch.allclose(fast.model.classifier.weight, start, atol=1e-3)
    for name, value in weights(slow.model).items():
        torch.testing.assert_close(weights(fast.model)[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert fast.history[-1]["loss"] == pytest.approx(slow.history[-1]["loss"], abs=1e-5)
    assert same_weights(fast.model.bert, run.model.bert)


def test_no_features_are_cached_that_do_not_reproduce_the_logits(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that reads the maximum over all tokens cannot be trained on one vector."""
    model = copy.deepcopy(tiny_run.model)

    def max_pooling(**inputs: Tensor) -> Any:
        hidden = model.bert(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        pooled = hidden.masked_fill(mask == 0, -1e4).amax(1)
        return dataclasses.make_dataclass("Output", ["logits"])(model.classifier(pooled))

    monkeypatch.setattr(model, "forward", max_pooling)
    set_trainable(model, lambda name: name.startswith("classifier"))
    engine = Engine(train_settings())
    engine.start_stage(model, tiny_run.encoded, 1e-3)
    assert not engine.cached and engine.view(tiny_run.encoded) is tiny_run.encoded
    torch.testing.assert_close(engine.predict(tiny_run.encoded), one_by_one(model, tiny_run))


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_nothing_is_cached_while_the_encoder_trains(tune: str, tiny_run: Tiny) -> None:
    """Stale features would train the head for an encoder that is long gone."""
    engine, _ = ready(tiny_run, tune)
    assert not engine.cached and engine.view(tiny_run.encoded) is tiny_run.encoded


def test_other_rows_get_features_of_their_own_and_the_end_of_a_stage_drops_them(
    tiny_run: Tiny,
) -> None:
    """A cache that is keyed by nothing answers for the test set with the training set."""
    engine, model = ready(tiny_run, "head")
    other = tiny_run.task.encode(table(7, seed=5)["text"].tolist())
    assert engine.view(other) is not engine.view(tiny_run.encoded)
    assert engine.view(other) is engine.view(other)
    assert engine.predict(other).shape == (7, len(LABELS))
    wanted = one_by_one(model, dataclasses.replace(tiny_run, encoded=other))
    torch.testing.assert_close(engine.predict(other), wanted, rtol=1e-4, atol=1e-5)
    engine.end_stage()
    assert not engine.cached and engine.view(other) is other


# --- the optimizer -------------------------------------------------------------------------------


def test_weight_decay_falls_on_matrices_only(tiny_run: Tiny) -> None:
    """Decayed biases and norms shrink what they should scale."""
    model = copy.deepcopy(tiny_run.model)
    engine = Engine(train_settings(weight_decay=0.5))
    optimizer = engine.start_stage(model, tiny_run.encoded, 3e-3)
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.5 if parameter.ndim >= 2 else 0.0), name
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}


def test_the_loss_of_a_step_is_the_mean_over_its_rows_however_they_are_cut(tiny_run: Tiny) -> None:
    """The history would show another loss for each micro-batch size."""
    losses = [
        tiny_run.fit(CrossEntropy(dropout=0.0), epochs=1, micro_batch_size=size).history[0]["loss"]
        for size in (None, 3, 1)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "limit", "fused"),
    [("fp32", 128, True), ("bf16", 128, False), ("bf16", 1, True)],
)
def test_short_texts_train_without_the_fused_attention_in_bf16(
    precision: str, limit: int, fused: bool, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused attention multiplies head by head in its backward pass; predictions keep it."""
    seen: dict[bool, set[bool]] = {True: set(), False: set()}
    engine = Engine(train_settings())
    monkeypatch.setattr(engine_module, "SHORT_TEXT", limit)
    engine.precision = precision
    engine.net = copy.deepcopy(tiny_run.model)
    forward = engine.net.forward

    def watched(**inputs: Any) -> Any:
        seen[torch.is_grad_enabled()].add(torch.backends.cuda.flash_sdp_enabled())
        return forward(**inputs)

    engine.net.forward = watched  # type: ignore[method-assign]
    run = Run(engine.net, tiny_run.labels, len(LABELS), lambda _=None: Tensor(), torch.Generator())
    engine.backward(CrossEntropy(), tiny_run.encoded, np.arange(8), run)
    engine.predict(tiny_run.encoded)
    assert seen == {True: {fused}, False: {True}}
    assert torch.backends.cuda.flash_sdp_enabled()
