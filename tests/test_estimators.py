"""The classifiers for scikit-learn: its own checks, the same loss as the method, large tables."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from noiseproof import NMTuneClassifier, RobustProbeClassifier, estimators
from noiseproof.engine import derive_seed
from noiseproof.errors import InputError
from noiseproof.losses import generalized_cross_entropy
from noiseproof.method import Run
from noiseproof.methods import NMTune
from noiseproof.precision import choose_precision
from tiny import Tiny

BOTH = (NMTuneClassifier, RobustProbeClassifier)
NONE: dict[str, Any] = {"lambda_mse": 0.0, "lambda_cov": 0.0, "lambda_svd": 0.0}


def blobs(rows: int = 120, width: int = 8, classes: int = 3, seed: int = 0) -> tuple[Any, Any]:
    """Separable rows and the names of their classes."""
    random = np.random.default_rng(seed)
    names = np.array(["ash", "beech", "cedar", "dogwood"])[:classes]
    labels = np.arange(rows) % classes
    centres = 2 * np.random.default_rng(99).normal(size=(classes, width))
    return centres[labels] + random.normal(size=(rows, width)), names[labels]


def quick(kind: type[Any] = NMTuneClassifier, **settings: Any) -> Any:
    return kind(**({"epochs": 5, "random_state": 0} | settings))


@pytest.mark.skipif(choose_precision("auto", "cpu") != "bf16", reason="no fast bf16 here")
def test_bf16_rounds_the_products_of_training_alone() -> None:
    rows, names = blobs()
    single, half = quick().fit(rows, names), quick(precision="auto").fit(rows, names)
    assert half.module_.linear.weight.dtype == torch.float32
    difference = np.abs(single.predict_proba(rows) - half.predict_proba(rows))
    assert 0 < difference.max() < 0.05
    assert single.transform(rows).dtype == half.transform(rows).dtype == np.float32


@pytest.mark.parametrize("precision", ["fp16", "half", None])
def test_a_precision_that_is_not_offered_is_refused(precision: Any) -> None:
    with pytest.raises(InputError, match="precision must be fp32, bf16 or auto"):
        quick(precision=precision).fit(*blobs())


# --- scikit-learn's own checks -------------------------------------------------------------------

REPEATED = "a weight multiplies the loss of a row; steps are cut otherwise with the row twice"
EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": REPEATED,
    "check_sample_weight_equivalence_on_sparse_data": "sparse features are refused",
}


@pytest.mark.filterwarnings("ignore:svd_k=")
@parametrize_with_checks(
    [NMTuneClassifier(), RobustProbeClassifier()], expected_failed_checks=lambda _: EXPECTED
)
def test_scikit_learn_finds_nothing_wrong(estimator: Any, check: Any) -> None:
    check(estimator)


# --- use -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_it_learns_and_names_the_classes(kind: type[Any]) -> None:
    rows, labels = blobs()
    fitted = kind(random_state=0).fit(rows, labels)
    assert fitted.classes_.tolist() == ["ash", "beech", "cedar"] and fitted.n_features_in_ == 8
    fresh, truth = blobs(seed=1)
    assert fitted.score(fresh, truth) > 0.9
    assert set(fitted.predict(fresh)) == {"ash", "beech", "cedar"}
    chances = fitted.predict_proba(fresh)
    assert chances.shape == (120, 3)
    np.testing.assert_allclose(chances.sum(axis=1), 1)
    logits = fitted.decision_function(fresh).astype(np.float64)
    np.testing.assert_allclose(torch.softmax(torch.from_numpy(logits), 1).numpy(), chances)


@pytest.mark.parametrize("kind", BOTH)
def test_the_probe_and_the_network_hold_against_wrong_labels_as_far_as_they_say(
    kind: type[Any],
) -> None:
    rows, labels = blobs(300)
    wrong = labels.copy()
    wrong[::4] = np.roll(labels, 1)[::4]  # a quarter
    fresh, truth = blobs(300, seed=1)
    assert kind(random_state=0).fit(rows, wrong).score(fresh, truth) > 0.8


@pytest.mark.parametrize("kind", BOTH)
def test_the_same_seed_gives_the_same_answers_and_another_seed_others(kind: type[Any]) -> None:
    rows, labels = blobs()
    torch.manual_seed(7)  # the global state does not matter ...
    one = quick(kind).fit(rows, labels).predict_proba(rows)
    before = torch.get_rng_state()
    two = quick(kind, random_state=np.random.RandomState(0)).fit(rows, labels).predict_proba(rows)
    assert torch.equal(before, torch.get_rng_state())  # ... and is left alone
    assert (one == two).all()
    small = quick(kind, batch_size=32, random_state=1).fit(rows, labels).predict_proba(rows)
    assert not (small == quick(kind, batch_size=32).fit(rows, labels).predict_proba(rows)).all()


@pytest.mark.parametrize("kind", BOTH)
def test_it_survives_cloning_and_pickling(kind: type[Any]) -> None:
    rows, labels = blobs()
    fitted = quick(kind).fit(rows, labels)
    again = pickle.loads(pickle.dumps(fitted))
    assert (again.predict_proba(rows) == fitted.predict_proba(rows)).all()
    copy = clone(fitted)
    with pytest.raises(NotFittedError):
        copy.predict(rows)
    assert (copy.fit(rows, labels).predict_proba(rows) == fitted.predict_proba(rows)).all()


def test_it_works_in_a_pipeline_and_a_grid_search() -> None:
    rows, labels = blobs(90)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), quick(learning_rate=1e-2)),
        {"nmtuneclassifier__lambda_cov": [0.0, 0.04], "nmtuneclassifier__svd_k": [1, 2]},
        cv=2,
    ).fit(rows, labels)
    assert search.best_score_ > 0.9
    # reshaped features for another classifier
    pipeline = make_pipeline(quick(svd_k=2), quick(RobustProbeClassifier))
    assert cross_val_score(pipeline, rows, labels, cv=2).mean() > 0.8


def test_the_reshaped_features_are_those_that_the_linear_layer_reads() -> None:
    rows, labels = blobs(300)  # more than one pass
    fitted = quick().fit(rows, labels)
    reshaped = fitted.transform(rows)
    assert reshaped.dtype == np.float32 and reshaped.shape == rows.shape
    linear = fitted.module_.linear
    logits = reshaped @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
    np.testing.assert_allclose(fitted.decision_function(rows), logits, rtol=1e-4, atol=1e-5)
    untouched = quick(residual_init=0.0, epochs=1, learning_rate=1e-9).fit(rows, labels)
    np.testing.assert_allclose(untouched.transform(rows), rows, rtol=1e-4, atol=1e-5)
    assert fitted.get_feature_names_out()[0] == "nmtuneclassifier0"


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_a_memory_map_is_read_in_batches(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = blobs(120)
    rows = rows.astype(kind)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    largest = []
    original = estimators._tensor

    def spy(block: np.ndarray) -> torch.Tensor:
        largest.append(len(block))
        return original(block)

    fitted = quick(batch_size=16)
    with monkeypatch.context() as patch:
        patch.setattr(estimators, "_tensor", spy)
        read = fitted._read(mapped, labels, None, None).views[0]
        fitted.fit(mapped, labels)
    assert np.shares_memory(read, mapped)  # the checks make no copy
    assert max(largest) == 16
    plain = quick(batch_size=16).fit(rows, labels)
    assert (fitted.predict_proba(mapped) == plain.predict_proba(rows)).all()


def test_wide_and_narrow_numbers_give_the_same_answers() -> None:
    rows, labels = blobs()
    rows = rows.astype(np.float32)
    for kind in BOTH:
        narrow = quick(kind).fit(rows, labels).predict_proba(rows)
        wide = quick(kind).fit(rows.astype(np.float64), labels).predict_proba(rows)
        assert (narrow == wide).all()


# --- the method's loss ---------------------------------------------------------------------------


def test_presets_are_those_of_the_method() -> None:
    assert NMTuneClassifier.from_preset("code").get_params() == NMTuneClassifier().get_params()
    paper = NMTuneClassifier.from_preset("paper", epochs=3)
    assert (paper.lambda_mse, paper.lambda_cov, paper.lambda_svd) == (0.01, 0.01, 0.01)
    assert (paper.svd_k, paper.mse_reduction, paper.epochs) == (1, "row_sum", 3)
    assert NMTuneClassifier.from_preset("mlp").lambda_mse == 0
    probe = NMTuneClassifier.from_preset("lp")
    assert (probe.use_mlp, probe.learning_rate, probe.lambda_cov) == (False, 0.01, 0)
    with pytest.raises(InputError, match=r"available: default, code, paper, mlp, lp$"):
        NMTuneClassifier.from_preset("lora")
    for preset in ("code", "paper", "mlp", "lp"):
        method = NMTuneClassifier.from_preset(preset)._method()
        assert method.weights == NMTune.preset(preset).weights


@pytest.mark.parametrize("preset", ["code", "paper", "mlp", "lp"])
def test_it_trains_as_the_method_does(
    preset: str, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same features, first weights and steps: the same network, up to rounding."""
    tables: list[torch.Tensor] = []
    original = NMTune.on_epoch_start

    def spy(self: NMTune, run: Run) -> dict[str, torch.Tensor]:
        features = run.features()
        assert features is not None
        tables.append(features[..., 0].clone())
        return original(self, run)

    monkeypatch.setattr(NMTune, "on_epoch_start", spy)
    shared = {"learning_rate": 1e-3, "epochs": 4, "batch_size": 25, "weight_decay": 0.0}
    # not BatchNorm: the bias before it has a gradient of rounding errors, which Adam makes large
    same = {"feature_scale": "rms", "mlp_norm": "layernorm", "head_init": "kaiming"}
    outcome = tiny_run.fit(
        NMTune.preset(preset, **same),
        schedule="cosine",
        warmup_share=0.0,
        max_grad_norm=0,
        **shared,
    )
    labels = tiny_run.labels.numpy()
    estimator = NMTuneClassifier.from_preset(preset, **same, **shared)
    seed_torch = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda _: seed_torch(derive_seed(0, "init")))
    estimator.fit(tables[0].numpy(), labels)
    wanted = outcome.model.classifier.state_dict()
    for name, value in estimator.module_.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-2, atol=2e-4, msg=name)
    for row, mine in zip(outcome.history, estimator.loss_history_, strict=True):
        for name, value in mine.items():
            assert value == pytest.approx(row[f"loss_{name}"], rel=1e-2, abs=1e-4)


def test_zero_weights_are_the_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms of weight 0 are not even computed."""
    rows, labels = blobs()
    with monkeypatch.context() as patch:
        for name in ("feature_consistency", "covariance_penalty", "singular_value_penalty"):
            patch.setattr(f"noiseproof.methods.nmtune.{name}", None)
        control = quick(**NONE).fit(rows, labels)
    full = quick().fit(rows, labels)
    assert set(control.loss_history_[0]) == {"ce"}
    assert set(full.loss_history_[0]) == {"ce", "mse", "cov", "svd"}
    assert not (control.predict_proba(rows) == full.predict_proba(rows)).all()


def test_two_views_train_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = blobs(64)
    sizes: list[tuple[int, int, int]] = []
    original = NMTune.objective

    def spy(self: NMTune, logits: Any, new: Any, old: Any, given: Any, **more: Any) -> Any:
        sizes.append((len(logits), len(given), more["views"]))
        return original(self, logits, new, old, given, **more)

    monkeypatch.setattr(NMTune, "objective", spy)
    other = rows + 0.1 * np.random.default_rng(3).normal(size=rows.shape)
    fitted = quick(batch_size=32, learning_rate=1e-2).fit(rows, labels, X_view2=other)
    assert set(sizes) == {(64, 32, 2)}
    assert fitted.score(rows, labels) > 0.8
    with pytest.raises(ValueError, match="another view"):
        quick().fit(rows, labels, X_view2=other[:5])


def test_rows_of_weight_zero_are_as_if_they_were_not_there() -> None:
    rows, labels = blobs(80)
    weight = (np.arange(80) % 5 != 0).astype(float)
    kept = weight > 0
    for kind in BOTH:
        weighed = quick(kind, batch_size=16).fit(rows, labels, sample_weight=weight)
        left_out = quick(kind, batch_size=16).fit(rows[kept], labels[kept])
        assert (weighed.predict_proba(rows) == left_out.predict_proba(rows)).all()
        heavy = quick(kind).fit(rows, labels, sample_weight=weight * np.arange(80))
        assert not (heavy.predict_proba(rows) == weighed.predict_proba(rows)).all()


@pytest.mark.parametrize("kind", BOTH)
def test_a_weight_below_zero_is_refused(kind: type[Any]) -> None:
    """It would push the row's own label away, step by step."""
    rows, labels = blobs()
    weight = np.ones(len(rows))
    weight[3] = -1
    with pytest.raises(ValueError, match="at least 0, got -1 in row 3"):
        quick(kind).fit(rows, labels, sample_weight=weight)


@pytest.mark.parametrize("kind", BOTH)
def test_a_rate_of_none_is_refused_in_a_line(kind: type[Any]) -> None:
    with pytest.raises(ValueError, match="learning_rate must be a number, got None"):
        quick(kind, learning_rate=None).fit(*blobs())


def test_the_probe_minimises_the_generalised_cross_entropy() -> None:
    rows, labels = blobs()
    start = (1 - (1 / 3) ** 0.7) / 0.7  # equal chances
    first = quick(RobustProbeClassifier, epochs=1, learning_rate=1e-9).fit(rows, labels)
    assert first.loss_history_[0]["loss"] == pytest.approx(start)
    fitted = quick(RobustProbeClassifier).fit(rows, labels)
    logits = torch.from_numpy(fitted.decision_function(rows))
    numbers = torch.from_numpy(np.searchsorted(fitted.classes_, labels))
    end = generalized_cross_entropy(logits, numbers, 0.7).mean().item()
    assert end <= fitted.loss_history_[-1]["loss"] < fitted.loss_history_[0]["loss"]
    assert fitted.loss_history_[0]["loss"] <= start + 1e-6  # one step an epoch, the first from 0
    entropy = quick(RobustProbeClassifier, ce_epochs=5).fit(rows, labels)
    assert entropy.loss_history_[0]["loss"] != fitted.loss_history_[0]["loss"]
    with pytest.raises(ValueError, match="ce_epochs must be at most epochs=5, got 6"):
        quick(RobustProbeClassifier, ce_epochs=6).fit(rows, labels)


# --- awkward data --------------------------------------------------------------------------------


def test_a_last_step_of_one_row_trains() -> None:
    rows, labels = blobs(33)
    fitted = quick(batch_size=16).fit(rows, labels)
    assert np.isfinite(fitted.predict_proba(rows)).all()
    assert [row["short_rows"] for row in fitted.loss_history_] == [1] * 5


def test_a_step_that_is_dropped_moves_nothing() -> None:
    """The only step of every epoch has one row too few."""
    rows, labels = blobs(5)
    settings: dict[str, Any] = {"small_batch": "drop", "mlp_norm": "none"}
    fitted = quick(batch_size=16, **settings).fit(rows, labels)
    assert [row["short_rows"] for row in fitted.loss_history_] == [5] * 5
    start = quick(batch_size=16, **settings, epochs=1).fit(rows, labels)
    np.testing.assert_array_equal(fitted.transform(rows), start.transform(rows))
    assert not fitted.decision_function(rows).any()  # the head starts from 0


def test_the_scale_of_the_features_is_theirs_to_say() -> None:
    rows, labels = blobs()
    scaled = quick(feature_scale="rms").fit(1000 * rows, labels)
    assert scaled.feature_scale_ == pytest.approx(1000 * np.sqrt(np.mean(rows**2)))
    same = quick(feature_scale="rms").fit(rows, labels)
    np.testing.assert_allclose(
        scaled.predict_proba(1000 * rows), same.predict_proba(rows), rtol=1e-3, atol=1e-4
    )
    with pytest.warns(UserWarning, match="feature_scale=rms"):
        quick().fit(0.001 * rows, labels)


def test_few_features_leave_the_leading_values_out() -> None:
    rows, labels = blobs(width=4)
    with pytest.warns(UserWarning, match="svd_k=5 leading singular values of 4 features"):
        fitted = quick().fit(rows, labels)
    assert "svd" not in fitted.loss_history_[0]


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (quick(svd_k=0), r"NMTune\.svd_k must be at least 1"),
        (quick(mlp_norm="group"), r"NMTune\.mlp_norm must be one of"),
        (quick(batch_size=5), "batch_size=5 is too small for svd_k=5"),
        (quick(epochs=0), r"epochs must be at least 1"),
        (quick(RobustProbeClassifier, q=0.0), r"RobustProbeClassifier\.q must lie in \(0, 1\]"),
        (quick(RobustProbeClassifier, warmup_epochs=-1), "warmup_epochs must be at least 0"),
    ],
    ids=repr,
)
def test_settings_are_checked_when_fitting(estimator: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimator.fit(*blobs(40))


def test_rows_of_zeros_are_warned_of_and_left_out_of_the_distance(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """A service that failed on some texts may have sent zeros for them."""
    rows, labels = blobs(30)
    rows[[2, 5]] = 0.0
    with pytest.warns(UserWarning, match="^2 of 30 rows have features that are zero") as told:
        quick().fit(rows, labels)
    assert len(told) == 1
    quick(**NONE).fit(rows, labels)  # no distance, nothing to leave out
    weight = np.ones(30)
    weight[[2, 5]] = 0
    quick().fit(rows, labels, sample_weight=weight)
    assert not recwarn


def test_a_loss_that_is_not_finite_names_the_rows() -> None:
    """Numbers that are finite may be too large for the products of them."""
    rows, labels = blobs(30)
    rows[4] *= 1e20
    with pytest.raises(FloatingPointError, match=r"30 rows between 0 and 29"):
        quick(batch_size=30).fit(rows, labels)


@pytest.mark.parametrize("kind", BOTH)
def test_data_are_checked_when_fitting(kind: type[Any]) -> None:
    rows, labels = blobs(30)
    with pytest.raises(ValueError, match="only one class"):
        quick(kind).fit(rows, ["ash"] * 30)
    bad = rows.copy()
    bad[3, 2] = np.nan
    bad[7, 0] = np.inf
    place = "must be finite, got NaN in row 3, column 2; .* there are 2"
    fitted = quick(kind).fit(rows, labels)
    for call in (lambda: quick(kind).fit(bad, labels), lambda: fitted.predict(bad.tolist())):
        with pytest.raises(InputError, match=f"^X {place}"):
            call()
    if kind is NMTuneClassifier:
        with pytest.raises(InputError, match=f"^X_view2 {place}"):
            quick(kind).fit(rows, labels, X_view2=bad)
    with pytest.raises(ValueError, match="y contains NaN"):
        quick(kind).fit(rows, np.where(np.arange(30) == 3, np.nan, 0.0))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        quick(kind).fit(rows, labels[:9])
    with pytest.raises(ValueError, match="8 features"):
        quick(kind).fit(rows, labels).predict(rows[:, :5])
