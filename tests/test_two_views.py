"""Two views of a row: drawn of an image, held by a table, refused where there is one."""

from __future__ import annotations

import dataclasses
import io
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import noiseproof
from noiseproof.checkpoint import Interrupted
from noiseproof.cli import main
from noiseproof.engine import Engine, derive_seed
from noiseproof.errors import InputError
from noiseproof.estimators import NMTuneClassifier
from noiseproof.frozen import mean_pooled
from noiseproof.job import Job
from noiseproof.loop import Progress
from noiseproof.method import Batch, Run
from noiseproof.methods import CrossEntropy, NMTune
from noiseproof.models import load_image_processor
from noiseproof.preparation import Prepared
from noiseproof.record import RunRecord, spec_id
from noiseproof.tasks.augmentation import augmented, parse_changes
from noiseproof.tasks.features import FeatureColumns, Vectors
from noiseproof.tasks.images import ImageClassification
from rows import IMAGE_CONFIGS, feature_rows, image_model, image_rows
from tiny import Tiny, same_weights, train_settings, weights

TERMS: dict[str, Any] = {"lambda_cov": 0.0, "lambda_svd": 0.0}  # the others are means over rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An own, empty cache for every test."""
    monkeypatch.setenv("NOISEPROOF_CACHE", str(tmp_path / "cache"))


def images(method: Any, **changes: Any) -> Any:
    """A short run on the tiny ViT."""
    settings: dict[str, Any] = {"task": "image", "model": image_model(), "method": method}
    settings["train"] = train_settings(**({"epochs": 1} | changes.pop("train", {})))
    return noiseproof.fit(image_rows(), **(settings | changes))


def two_views(rows: int = 25, *, distance: float = 0.1, seed: int = 0) -> dict[str, Any]:
    """Features (N, 2, D), the second view so far from the first."""
    data = feature_rows(rows, seed=seed)
    first = data["features"]
    random = np.random.default_rng([seed, 7])
    second = first + distance * first.std(axis=0) * random.normal(size=first.shape)
    return data | {"features": np.stack([first, second], axis=1).astype(np.float32)}


def features(data: Any, method: Any, **changes: Any) -> Any:
    """A short run on features."""
    settings: dict[str, Any] = {"task": "features", "method": method, "train": train_settings()}
    return noiseproof.fit(data, **(settings | changes))


# --- images --------------------------------------------------------------------------------------


def test_each_view_is_drawn_by_itself_whatever_the_batch() -> None:
    """The first view is what a single one is; a resumed run has other batches before it."""
    task = ImageClassification(load_image_processor(image_model()), augment="crop+flip+rand")
    encoded = task.encode(image_rows()["image"])
    rows = np.arange(25)
    first, second = (encoded.training_inputs(rows, 7, view)["pixel_values"] for view in range(2))
    assert torch.equal(first, encoded.training_inputs(rows, 7)["pixel_values"])
    differs = (first != second).flatten(1).any(dim=1)
    assert differs.float().mean() > 0.7
    part = encoded.training_inputs(np.array([9, 3]), 7, 1)["pixel_values"]
    assert torch.equal(part, second[[9, 3]])
    picture, changes = image_rows()["image"][0], parse_changes("crop")
    draws = {augmented(picture, changes, seed, 0, view).tobytes()
             for seed in range(3) for view in range(3)}  # fmt: skip
    assert len(draws) > 4


def test_the_loop_minimises_the_loss_of_the_rows_of_both_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of a run against the formula: F of both views, h on all 2 B rows at once."""
    method = NMTune(views=2, svd_k=2, head_init="kaiming")
    seen: list[tuple[float, Batch, dict[str, Tensor], Any]] = []
    original = NMTune.compute_loss

    def spy(self: NMTune, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        before = weights(run.model)
        loss = original(self, model, batch, run)
        seen.append((float(loss.detach()), batch, before, run.model))
        return loss

    monkeypatch.setattr(NMTune, "compute_loss", spy)
    job = Job(image_rows(), task="image", model=image_model(), method=method,
              train=train_settings(epochs=1))  # fmt: skip
    images(method)
    encoded = Prepared(job).encoded
    seed = derive_seed(0, "augment", "tune", 0)
    whole = [step for step in seen if len(step[1].labels) == 8]
    assert len(whole) == 3 and len(seen) == 4  # one row is left over
    loss, batch, before, model = whole[0]
    rows = batch.rows.numpy()
    assert len(batch.inputs["pixel_values"]) == 2 * len(rows)
    views = [encoded.training_inputs(rows, seed, view) for view in range(2)]
    model.load_state_dict(before)
    model.classifier.train()
    with torch.no_grad():
        old = torch.cat([mean_pooled(model, view) for view in views])  # (2 B, D)
        answer = model.classifier(old)
        wanted, parts = method.objective(
            answer.logits, answer.transformed, old, batch.labels, views=2
        )
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert parts["mse"] > 0 and set(parts) == {"ce", "mse", "cov", "svd"}


def test_the_encoder_stays_in_the_loop_and_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached features would be those of images that nothing was done to."""
    calls, modes = [], set()
    encode, original = Engine.encode, NMTune.compute_loss

    def counted(self: Engine, *arguments: Any) -> Tensor:
        calls.append(arguments[2])
        return encode(self, *arguments)

    def spy(self: NMTune, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        modes.add((run.model.training, run.model.vit.training))
        return original(self, model, batch, run)

    monkeypatch.setattr(Engine, "encode", counted)
    monkeypatch.setattr(NMTune, "compute_loss", spy)
    start = weights(Prepared(Job(image_rows(), task="image", model=image_model(),
                                 method=NMTune(), train=train_settings())).model)  # fmt: skip
    result = images(NMTune(views=2, svd_k=2), train={"epochs": 2})
    assert not calls and modes == {(True, False)}
    after = weights(result.predictor.model)
    kept = [name for name in after if name.startswith("vit.")]
    assert kept and all(torch.equal(after[name], start[name]) for name in kept)
    assert result.record.model["trained_parameters"] == sum(
        parameter.numel() for parameter in result.predictor.model.classifier.parameters()
    )
    calls.clear()
    images(NMTune(svd_k=2))
    assert calls == ["mean"]


@pytest.mark.parametrize("name", IMAGE_CONFIGS)
def test_two_views_go_through_every_architecture(name: str, tmp_path: Path) -> None:
    """And the deployed model is loaded as any other; a last batch has one row, two with views."""
    method = NMTune(views=2, svd_k=2, feature_scale="rms")
    result = images(method, model=image_model(name), out=tmp_path / "run", train={"epochs": 2})
    assert all(np.isfinite(row["loss"]) for row in result.history)
    assert "short_batches" in result.history[0]  # 2 rows do not have more than 2 values
    new = image_rows(6, seed=4)["image"]
    kept = result.predictor.predict_proba(new)
    assert (noiseproof.load(tmp_path / "run").predict_proba(new) == kept).all()


def test_a_run_on_two_views_goes_on_as_it_began(tmp_path: Path) -> None:
    """Bit for bit: both views hang on seed, epoch and row alone."""
    settings: dict[str, Any] = {"augment": "crop+flip+rand", "train": {"epochs": 2}}
    method = NMTune(views=2, svd_k=2)
    whole = images(method, out=tmp_path / "whole", **settings)

    def stop(progress: Progress) -> None:
        if progress.epoch == 1 and progress.step == 2 and progress.history is None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        images(method, out=tmp_path / "run", report=stop, **settings)
    resumed = images(method, out=tmp_path / "run", resume=True, **settings)
    assert same_weights(whole.predictor.model, resumed.predictor.model)
    assert whole.history == resumed.history


def test_a_micro_batch_holds_both_views_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut by the 2 B rows, the second view of a row would meet the first of another."""
    sizes = []
    original = NMTune.objective

    def spy(self: NMTune, logits: Tensor, *rest: Any, **more: Any) -> Any:
        sizes.append((len(logits), len(rest[-1]), more["views"]))
        return original(self, logits, *rest, **more)

    monkeypatch.setattr(NMTune, "objective", spy)
    images(NMTune(views=2, svd_k=2), train={"micro_batch_size": 3})
    assert set(sizes) == {(6, 3, 2), (4, 2, 2), (2, 1, 2)}


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "layernorm"])
def test_two_equal_views_train_as_one(norm: str) -> None:
    """Without BatchNorm cross-entropy and distance are means over rows."""
    method = NMTune(**TERMS, mlp_norm=norm, head_init="kaiming")
    two = features(two_views(distance=0.0), method)
    one = features(feature_rows(), method)
    for row, other in zip(two.history, one.history, strict=True):
        for name in ("loss", "loss_ce", "loss_mse"):
            assert row[name] == pytest.approx(other[name], rel=1e-4)
    pairs = zip(weights(two.predictor.model).values(), weights(one.predictor.model).values(),
                strict=True)  # fmt: skip
    for value, wanted in pairs:
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5)


def test_a_table_of_two_views_gives_both_unless_one_is_asked_for() -> None:
    data = two_views()
    one = {**data, "features": data["features"][:, 0]}
    plain = features(one, NMTune(svd_k=2))
    asked = features(data, NMTune(svd_k=2, views=1))
    assert same_weights(plain.predictor.model, asked.predictor.model)
    assert plain.history == asked.history
    auto, both = (features(data, NMTune(svd_k=2, views=views)) for views in (None, 2))
    assert same_weights(auto.predictor.model, both.predictor.model)
    assert not same_weights(auto.predictor.model, plain.predictor.model)
    other = features(data, CrossEntropy())  # a method that asks for one view reads the first
    assert same_weights(other.predictor.model, features(one, CrossEntropy()).predictor.model)


def test_a_network_of_ones_own_takes_both_views() -> None:
    """Its encoder is frozen and has weights: with one view it would be cached."""
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    result = features(two_views(), NMTune(svd_k=2), model=net)
    assert np.isfinite(result.history[-1]["loss_mse"]) and result.history[-1]["loss_mse"] > 0


def test_both_views_are_read_checked_and_told_apart(tmp_path: Path) -> None:
    """From an archive too; test rows may have one view or two, and the first counts."""
    data = two_views(30)
    np.savez(tmp_path / "two.npz", features=data["features"], label=data["label"])
    np.savez(tmp_path / "one.npz", features=data["features"][:, 0], label=data["label"])
    method = NMTune(svd_k=2)
    runs = [features(tmp_path / "two.npz", method, test=tmp_path / f"{name}.npz")
            for name in ("two", "one")]  # fmt: skip
    assert runs[0].record.metrics["test_accuracy"] == runs[1].record.metrics["test_accuracy"]
    assert runs[0].record.data["fingerprint"] == runs[1].record.data["fingerprint"]
    other = data["features"].copy()
    other[3, 1, 2] += 1
    changed = features(data | {"features": other}, method, train=train_settings(epochs=1))
    assert changed.record.data["fingerprint"] != runs[0].record.data["fingerprint"]
    other[3, 1, 2] = np.nan
    with pytest.raises(InputError, match=r"row 4 of .* has nan in feature 3 of view 2"):
        features(data | {"features": other}, method)
    with pytest.raises(InputError, match=r"shape \(30, 3, 6\).*or \(rows, 2, features\) with two"):
        features(data | {"features": np.zeros((30, 3, 6))}, method)


def test_foreign_rows_come_with_as_many_views(tmp_path: Path) -> None:
    rows, pool = Vectors(two_views(5)["features"]), Vectors(two_views(3, seed=4)["features"])
    mixed = rows.replaced(np.array([4, 1]), pool, np.array([2, 0]))
    places = np.array([1, 0, 4])
    for view in range(2):
        wanted = np.stack([pool.block(np.array([0]), view)[0], rows.block(np.array([0]), view)[0],
                           pool.block(np.array([2]), view)[0]])  # fmt: skip
        np.testing.assert_array_equal(mixed.block(places, view), wanted)
    single = Vectors(feature_rows(3)["features"])
    with pytest.raises(InputError, match="the pool has 1 views a row, the rows have 2"):
        rows.replaced(np.array([0]), single, np.array([0]))
    np.savez(tmp_path / "two.npz", features=two_views(20)["features"], label=["a", "b"] * 10)
    np.savez(tmp_path / "one.npz", features=feature_rows(4)["features"])
    with pytest.raises(InputError, match="give a noise_pool of the same shape"):
        noiseproof.corrupt(tmp_path / "two.npz", "openset:0.3", task="features",
                           noise_pool=tmp_path / "one.npz")  # fmt: skip


def test_a_memory_map_of_two_views_is_not_copied(tmp_path: Path) -> None:
    table = two_views(12)["features"]
    np.save(tmp_path / "t.npy", table)
    mapped = np.load(tmp_path / "t.npy", mmap_mode="r")
    vectors = Vectors(mapped).take(np.array([3, 1]))
    assert vectors.table is mapped and (vectors.width, vectors.views) == (6, 2)
    np.testing.assert_array_equal(vectors.block(np.arange(2), 1), table[[3, 1], 1])
    assert FeatureColumns("features").kind == "features"


# --- the classifier of scikit-learn ---------------------------------------------------------------


def test_the_classifier_trains_on_two_views_as_the_method_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same views, first weights and steps: the same network, up to rounding."""
    data = two_views()
    data["features"] /= np.abs(data["features"]).max(axis=(0, 1))
    shared = {"learning_rate": 1e-3, "epochs": 4, "batch_size": 25, "weight_decay": 0.0}
    same = {"svd_k": 2, "mlp_norm": "layernorm", "head_init": "kaiming"}
    loop = train_settings(schedule="cosine", warmup_share=0.0, max_grad_norm=0, **shared)
    result = features(data, NMTune(**same), standardize=False, train=loop)
    seed_torch = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda _: seed_torch(derive_seed(0, "init")))
    first, second = data["features"][:, 0], data["features"][:, 1]
    fitted = NMTuneClassifier(**same, **shared).fit(first, data["label"], X_view2=second)
    wanted = weights(result.predictor.model.classifier)
    for name, value in weights(fitted.module_).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-2, atol=2e-4, msg=name)
    for row, mine in zip(result.history, fitted.loss_history_, strict=True):
        for name, value in mine.items():
            assert value == pytest.approx(row[f"loss_{name}"], rel=1e-2, abs=1e-4)


def test_two_equal_views_of_the_classifier_are_one() -> None:
    rows, labels = np.random.default_rng(0).normal(size=(25, 6)), feature_rows()["label"]
    settings: dict[str, Any] = TERMS | {"mlp_norm": "none", "epochs": 5, "random_state": 0}
    one = NMTuneClassifier(**settings).fit(rows, labels)
    two = NMTuneClassifier(**settings).fit(rows, labels, X_view2=rows)
    np.testing.assert_allclose(two.predict_proba(rows), one.predict_proba(rows), rtol=1e-3)
    for row, other in zip(two.loss_history_, one.loss_history_, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    other = NMTuneClassifier(**settings).fit(rows, labels, X_view2=rows[::-1].copy())
    assert other.loss_history_[0]["mse"] > 10 * one.loss_history_[0]["mse"] > 0


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (np.zeros((9, 6)), r"another view, \(25, 6\); got \(9, 6\)"),
        (np.zeros((25, 5)), "5 features"),
        (np.full((25, 6), np.nan), "NaN"),
        (np.zeros((25, 2, 6)), "dim 3"),
    ],
    ids=["rows", "width", "nan", "shape"],
)
def test_a_second_view_that_does_not_fit_is_refused(second: np.ndarray, message: str) -> None:
    data = feature_rows()
    with pytest.raises(ValueError, match=message):
        NMTuneClassifier(epochs=1).fit(data["features"], data["label"], X_view2=second)


# --- what has one view ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": NMTune(views=2)}, "got rows of task 'text'; leave views out"),
        (
            {"method": NMTune(views=2), "task": "features", "data": feature_rows()},
            "got features (25, 6); leave views out",
        ),
        (
            {"method": NMTune(views=2), "task": "image", "augment": "none"},
            "augment=none changes nothing: both views would be equal; use augment=crop+flip",
        ),
    ],
    ids=["text", "features", "image"],
)
def test_rows_without_a_second_view_are_told(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """What was expected, what came, and what to do, in one line, and no run is left behind."""
    asked: dict[str, Any] = {"train": train_settings()} | settings
    data = asked.pop("data", image_rows() if asked.get("task") == "image" else {"text": ["a"]})
    if asked.get("task") == "image":
        asked["model"] = image_model()
    with pytest.raises(InputError) as refusal:
        noiseproof.fit(data, out=tmp_path / "run", **asked)
    assert not (tmp_path / "run").exists()
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert "views=2" in str(refusal.value)


def test_the_loop_refuses_two_views_of_texts(tiny_run: Tiny) -> None:
    with pytest.raises(InputError, match="got rows of one view; leave views out"):
        tiny_run.fit(NMTune(views=2))
    assert same_weights(tiny_run.fit(NMTune(views=1)).model, tiny_run.fit(NMTune()).model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 3}, r"NMTune\.views must be 1 or 2, or left out, got 3"),
        ({"views": 0}, r"NMTune\.views must be 1 or 2, or left out, got 0"),
        ({"views": 2, "tune": "lora"}, r"NMTune\.views=2 goes with tune=head, got tune=lora"),
        ({"views": 2, "tune": "full"}, r"NMTune\.views=2 goes with tune=head, got tune=full"),
    ],
    ids=str,
)
def test_a_number_of_views_that_makes_no_sense_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        NMTune(**settings)
    assert NMTune(tune="lora", views=1).stages(3)[0].views == 1


# --- records -------------------------------------------------------------------------------------


def test_identifiers_of_runs_from_before_there_were_views_stay_as_they_are() -> None:
    """A grid that was half done would start anew, and no earlier run could be resumed."""
    job = Job("tickets.csv", label="intent", method=NMTune())
    assert "views" not in job.spec()["method"] and spec_id(job.spec()) == "54790f9da34b3699"
    two = dataclasses.replace(job, task="image", model="x", method=NMTune(views=2))
    assert two.spec()["method"]["views"] == 2
    assert NMTune.from_dict(two.spec()["method"]) == NMTune(views=2)
    assert NMTune.from_dict(job.spec()["method"]) == NMTune()


# --- the command line, on pictures ---------------------------------------------------------------


def test_the_command_line_trains_on_two_views_of_photos(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder per class, a ViT, `--method.views 2`; and the same on texts is one line."""
    archive = np.load(shared / "data" / "cifar10" / "cifar10_jpeg.npz")
    labels = np.load(shared / "data" / "cifar10" / "cifar10n_labels.npz")["clean_label"]
    places, packed = archive["train_offsets"], archive["train_jpeg"]
    for label in range(3):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
        for row in np.flatnonzero(labels == label)[:16].tolist():
            picture = Image.open(io.BytesIO(packed[places[row] : places[row + 1]].tobytes()))
            picture.save(tmp_path / "photos" / str(label) / f"{row}.png")
    words = ["fit", str(tmp_path / "photos"), "--task", "image", "--model", image_model(),
             "--method", "NMTune", "--method.views", "2", "--method.svd_k", "2", "--test", "0.25",
             "--train.epochs", "2", "--train.device", "cpu"]  # fmt: skip
    run = tmp_path / "run"
    assert main([*words, "--out", str(run)]) == 0
    record = RunRecord.read(run)
    assert record.spec["method"]["views"] == 2 and record.status == "done"
    assert 0 <= record.metrics["test_accuracy"] <= 1
    out = tmp_path / "p.csv"
    assert main(["predict", str(run), str(tmp_path / "photos"), "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 49
    capsys.readouterr()
    (tmp_path / "t.csv").write_text("text,label\na,x\nb,y\n")
    refused = ["fit", str(tmp_path / "t.csv"), "--method", "NMTune", "--method.views", "2"]
    assert main([*refused, "--out", str(tmp_path / "no")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--method.views 2 needs images, or features of the" in error
