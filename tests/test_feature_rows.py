"""Features as rows: read from any table, standardised by the training rows, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

import noiseproof
from noiseproof import arrays as archive
from noiseproof.cli import main
from noiseproof.errors import InputError
from noiseproof.job import Job
from noiseproof.methods import GCE, TURN, CrossEntropy, NMTune
from noiseproof.record import RunRecord
from noiseproof.tables import array_column, load_table, write_table
from noiseproof.tasks.features import FeatureColumns, Standardize, Vectors
from rows import feature_rows
from tiny import LABELS, train_settings

QUICK: dict[str, Any] = {"task": "features", "train": train_settings(learning_rate=0.1)}


def fit(data: Any = None, **changes: Any) -> Any:
    """A short run of a linear probe."""
    settings = {"method": CrossEntropy()} | QUICK | changes
    return noiseproof.fit(feature_rows() if data is None else data, **settings)


def read(source: Any, features: str = "features", split: str = "train") -> np.ndarray:
    """The features that are found in a table, in order."""
    table = load_table(source, split)
    vectors = FeatureColumns(features).read(table, np.arange(len(table)))
    return np.concatenate([*vectors.blocks()])


def refusal(source: Any, features: str = "features") -> str:
    """The one line on a table that cannot be read."""
    with pytest.raises(InputError) as error:
        read(source, features)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- reading -------------------------------------------------------------------------------------


KINDS = (np.float16, np.float32, np.float64, np.int16, np.int8)


@given(
    arrays.arrays(np.int8, st.tuples(st.integers(1, 5), st.integers(1, 4))),
    st.sampled_from(KINDS),
)
@settings(max_examples=20)
def test_every_kind_of_file_holds_the_same_features(
    tmp_path_factory: pytest.TempPathFactory, whole: np.ndarray, kind: Any
) -> None:
    """A column that is read in another order or type is another feature."""
    folder = tmp_path_factory.mktemp("files")
    table = (whole / 8).astype(kind)
    wanted = table.astype(np.float32)
    names = [f"e{number:02d}" for number in range(table.shape[1])]
    np.savez(folder / "a.npz", features=table)
    np.savez_compressed(folder / "b.npz", features=np.asfortranarray(table))
    write_table(pd.DataFrame({"features": array_column(wanted)}), folder / "lists.parquet")
    write_table(pd.DataFrame({"features": array_column(wanted)}), folder / "lists.jsonl")
    write_table(pd.DataFrame(wanted, columns=names).assign(other="x"), folder / "columns.csv")
    for name in ("a.npz", "b.npz", "lists.parquet", "lists.jsonl"):
        np.testing.assert_array_equal(read(folder / name), wanted, err_msg=name)
    np.testing.assert_array_equal(read(folder / "columns.csv", "e*"), wanted)
    np.testing.assert_array_equal(
        read(folder / "columns.csv", ",".join(names[::-1])), wanted[:, ::-1]
    )
    np.testing.assert_array_equal(read({"features": table}), wanted)


def test_arrays_stay_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive larger than memory could not be opened else; packed or not."""
    monkeypatch.setattr(archive, "SMALL", 10)
    monkeypatch.setattr(archive, "CHUNK", 7)
    table = np.arange(60, dtype=np.float16).reshape(12, 5)
    np.savez(tmp_path / "a.npz", x=table, y=np.arange(12))
    np.savez_compressed(tmp_path / "b.npz", x=np.asfortranarray(table))
    for name in ("a.npz", "b.npz"):
        found = load_table(tmp_path / name).arrays["x"]
        assert isinstance(found, np.memmap) and found.dtype == np.float16
        np.testing.assert_array_equal(found, table)
        vectors = FeatureColumns("x").read(load_table(tmp_path / name), np.arange(12))
        assert isinstance(vectors.take(np.array([3, 1])).table, np.memmap)


def test_one_archive_may_hold_all_splits(tmp_path: Path) -> None:
    """As x_train and x_test, the usual way; labels of one split stay with it."""
    file = tmp_path / "all.npz"
    np.savez(file, x_train=np.ones((3, 2)), x_test=np.zeros((2, 2)), y_train=[0, 1, 1],
             y_test=[1, 0], crowd=[1, 1, 1])  # fmt: skip
    assert list(load_table(file).frame) == ["crowd", "y"]
    assert list(load_table(file, "test").frame) == ["y"]
    assert read(file, "x", "test").tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([[1, 2], [1, 2, 3]], "row 2 of the table has 3 features in column 'features', expected 2"),
        ([[1, 2], None], "row 2 of the table has shape () in column 'features'"),
        ([[1, 2], ["a", "b"]], "row 2 of the table has no list of numbers in column 'features'"),
        ([[1, 2], [1, float("nan")]], "row 2 of the table has nan in feature 2"),
        ([[]], "row 1 of the table has 0 features"),
        (["text"], "row 1 of the table has 'text' in column 'features', expected a number"),
        (np.zeros((2, 3, 2)), "array 'features' of the table has shape (2, 3, 2) and type float64"),
        (np.array([["a"], ["b"]]), "expected numbers (rows, features)"),
        (np.array([[1, 2], [np.inf, 2]]), "row 2 of the table has inf in feature 1"),
        (np.array([[1e300, 0.0]]), "row 1 of the table has inf in feature 1"),
    ],
)
def test_what_is_no_feature_is_told_with_its_row(cells: Any, message: str) -> None:
    """A NaN would spread into every weight within one step."""
    assert message in refusal({"features": cells})


def test_columns_of_numbers_are_checked_one_by_one(tmp_path: Path) -> None:
    """A word in a column of numbers is the usual mistake of a CSV."""
    (tmp_path / "t.csv").write_text("e1,e2,label\n1,2,a\n3,x,b\n4,,a\n")
    assert "row 2 (line 3)" in refusal(tmp_path / "t.csv", "e*")
    assert "has 'x' in column 'e2', expected a number" in refusal(tmp_path / "t.csv", "e1,e2")
    assert "did you mean 'label'" in refusal(tmp_path / "t.csv", "e1,lable")
    assert "has no column 'z*'" in refusal(tmp_path / "t.csv", "z*")
    (tmp_path / "t.csv").write_text("e1,e2\n1,2\n3,\n")
    assert "has nothing in column 'e2'" in refusal(tmp_path / "t.csv", "e*")
    (tmp_path / "t.csv").write_text("e1,e2\n1,2\n3,inf\n")
    assert "has inf in column 'e2'" in refusal(tmp_path / "t.csv", "e*")


def test_an_archive_is_never_unpickled(tmp_path: Path) -> None:
    """An object array can run any code when it is read."""
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    assert "holds Python objects, which are never unpickled" in refusal(tmp_path / "a.npz", "x")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:80])
    assert "as a NumPy archive" in refusal(tmp_path / "b.npz", "x")
    np.savez(tmp_path / "c.npz", x=np.zeros((3, 2)), y=np.zeros(2))
    assert "must have one length, got x (3, 2), y (2,)" in refusal(tmp_path / "c.npz", "x")


# --- the run -------------------------------------------------------------------------------------


def test_features_are_standardised_by_the_training_rows_alone() -> None:
    """Rows that were held out would leak into the scales, and the test rows even more."""
    data = feature_rows(40)
    result = fit(data, validation=0.25, test=feature_rows(10, seed=5))
    encoder = result.predictor.model.get_submodule("encoder")
    assert isinstance(encoder, Standardize)
    rows = result.samples["row_id"].astype(int)
    assert len(rows) == 30
    kept = data["features"][rows].astype(np.float64)
    np.testing.assert_allclose(encoder.mean.numpy(), kept.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(encoder.scale.numpy(), kept.std(axis=0), rtol=1e-4)
    raw = fit(data, standardize=False).predictor.model.get_submodule("encoder")
    assert raw.mean.eq(0).all() and raw.scale.eq(1).all()


def test_a_constant_feature_is_shifted_and_not_scaled() -> None:
    """Divided by a deviation of 0, or of rounding, it would be anything."""
    data = feature_rows()
    data["features"][:, 2] = 1e4 + 1e-9
    result = fit(data)
    encoder = result.predictor.model.get_submodule("encoder")
    assert encoder.scale[2] == 1 and torch.isfinite(encoder.mean).all()


def test_scales_matter_to_a_probe() -> None:
    """Features 10^5 apart in scale cannot be learned with one rate."""
    test = feature_rows(60, seed=9, wrong=0.0)
    accuracy = {
        standardize: fit(
            feature_rows(90), test=test, standardize=standardize, train=train_settings(epochs=6)
        ).record.metrics["test_accuracy"]
        for standardize in (True, False)
    }
    assert accuracy[True] > accuracy[False] + 0.1


def test_whatever_a_method_tunes_is_the_head(tmp_path: Path) -> None:
    """The rate of full fine-tuning would leave a linear head at its start."""
    job = Job(feature_rows(), method=CrossEntropy(), **QUICK)
    assert job.method == CrossEntropy(tune="head") and job.model == "linear"
    assert job.spec()["method"]["tune"] == "head"
    with pytest.raises(InputError, match=r"NMTune\.tune=full adapts an encoder"):
        Job("x.npz", task="features", method=NMTune.preset("full"))
    with pytest.raises(InputError, match=r"CrossEntropy\.tune=lora adapts an encoder"):
        Job(feature_rows(), method=CrossEntropy(tune="lora"), **QUICK)
    with pytest.raises(
        InputError, match=r"CleaR does not support task 'features'.*use one of TURN"
    ):
        Job(feature_rows(), **QUICK)
    with pytest.raises(InputError, match="features have no encoder to load"):
        fit(model="bert-base-uncased")


@pytest.mark.parametrize("method", [CrossEntropy(), NMTune(svd_k=2), TURN(probe_epochs=2)])
def test_a_loaded_model_answers_as_the_trained_one(method: Any, tmp_path: Path) -> None:
    """With its scales: features that are not standardised get other labels."""
    result = fit(method=method, out=tmp_path / "run")
    new = feature_rows(7, seed=3)["features"]
    kept = result.predictor.predict_proba(new)
    loaded = noiseproof.load(tmp_path / "run")
    assert (loaded.predict_proba(new) == kept).all()
    table = noiseproof.predict(tmp_path / "run", {"features": new, "id": list("abcdefg")})
    assert list(table) == ["id", "predicted_label", "confidence"]
    assert table["predicted_label"].tolist() == loaded.predict(new)
    for wrong, message in (
        (new[:, :5], "5 features, the model takes 6"),
        (new[0], "must be one matrix of numbers"),
    ):
        with pytest.raises(InputError, match=message):
            loaded.predict(wrong)
    with pytest.raises(InputError, match="the table has 5 features, the model takes 6"):
        noiseproof.predict(tmp_path / "run", {"features": new[:, :5]})


class Layers(nn.Module):
    """Two layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(features)))


@pytest.mark.parametrize("tune", ["full", "head"])
def test_a_module_of_ones_own_takes_standardised_features(tune: str, tmp_path: Path) -> None:
    """Its first layer is its encoder: what is tuned is what was asked for."""
    net = Layers()
    result = fit(model=net, method=CrossEntropy(tune=tune), out=tmp_path / "run")
    plain = result.predictor.model.plain()
    assert torch.equal(plain[1].first.weight, net.first.weight) == (tune == "head")
    assert not torch.equal(plain[1].second.weight, net.second.weight)
    new = feature_rows(7, seed=3)["features"]
    kept = result.predictor.predict_proba(new)
    with torch.no_grad():
        own = torch.softmax(plain.eval()(torch.from_numpy(new)), dim=1).numpy()
    np.testing.assert_allclose(own, kept, atol=1e-6)
    assert (noiseproof.load(tmp_path / "run", model=Layers()).predict_proba(new) == kept).all()
    with pytest.raises(InputError, match=r"the model was a torch module, <Layers>"):
        noiseproof.load(tmp_path / "run")
    with pytest.raises(InputError, match="do not fit the module Sequential"):
        noiseproof.load(tmp_path / "run", model=nn.Linear(6, 3))


def test_the_saved_model_is_plain_numbers(tmp_path: Path) -> None:
    """As the documentation says it can be used without this library."""
    from safetensors.numpy import load_file

    result = fit(out=tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    new = feature_rows(7, seed=3)["features"]
    scaled = (new - weights["encoder.mean"]) / weights["encoder.scale"]
    logits = scaled @ weights["classifier.weight"].T + weights["classifier.bias"]
    names = [config["id2label"][str(best)] for best in logits.argmax(axis=1)]
    assert names == result.predictor.predict(new)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no model of features"):
        noiseproof.load(tmp_path / "run")


def test_suspects_are_named_by_their_row(tmp_path: Path) -> None:
    """A vector in a CSV would tell a person nothing."""
    fit(method=GCE(), out=tmp_path / "run")
    suspects = pd.read_csv(tmp_path / "run" / "suspects.csv")
    assert list(suspects)[:2] == ["row_id", "label"]


def test_noise_may_follow_the_features_or_replace_them(tmp_path: Path) -> None:
    """Instance-dependent noise and foreign rows need no encoder here."""
    instance = fit(feature_rows(60, wrong=0.0), noise="instance:0.3")
    assert 0.1 < instance.record.noise["injected_rate"] < 0.5
    pool = {"features": np.full((4, 6), 50.0, dtype=np.float32)}
    foreign = fit(feature_rows(60, wrong=0.0), noise="openset:0.2", noise_pool=pool)
    assert foreign.samples["clean_label"].isna().sum() > 3
    with pytest.raises(InputError, match="the pool has 5 features, the rows have 6"):
        fit(noise="openset:0.2", noise_pool={"features": np.zeros((4, 5))})


def test_the_command_line_fits_corrupts_and_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From one archive with both splits, through all three commands."""
    train, test = feature_rows(60, wrong=0.0), feature_rows(12, seed=4)
    np.savez(
        tmp_path / "all.npz",
        x_train=train["features"],
        y_train=train["label"],
        x_test=test["features"],
        y_test=test["clean_label"],
    )
    row = ["--task", "features", "--features", "x", "--label", "y"]
    data, noisy = str(tmp_path / "all.npz"), str(tmp_path / "noisy.npz")
    assert main(["corrupt", data, *row, "--noise", "instance:0.3", "--out", noisy]) == 0
    found = load_table(noisy)
    np.testing.assert_array_equal(found.arrays["x"], train["features"])
    assert found.frame["clean_label"].tolist() == train["label"] != found.frame["y"].tolist()
    quick = ["--method", "GCE", "--train.epochs", "2", "--train.device", "cpu"]
    more = ["--clean-label", "clean_label", "--test", data, "--out", str(tmp_path / "run")]
    assert main(["fit", noisy, *row, *quick, *more]) == 0
    record = RunRecord.read(tmp_path / "run")
    assert record.data["rows"] == 60 and record.data["test_rows"] == 12
    assert record.spec["features"] == "x" and record.spec["task"] == "features"
    assert "memorization" in record.metrics and record.model["class"] == "FeatureClassifier"
    out = str(tmp_path / "p.csv")
    assert main(["predict", str(tmp_path / "run"), data, "--split", "test", "--out", out]) == 0
    assert set(pd.read_csv(out)["predicted_label"]) <= set(LABELS)
    capsys.readouterr()
    assert main(["corrupt", data, *row, "--noise", "symmetric:0.3", "--out", out]) == 2
    assert "unsupported suffix '.csv'; supported: .npz" in capsys.readouterr().err
    assert main(["fit", data, "--task", "features", "--label", "y", "--out", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_rows_of_a_matrix_are_taken_without_a_copy() -> None:
    """A sample of a memory map must not read all of it."""
    table = np.arange(20, dtype=np.float64).reshape(10, 2)
    vectors = Vectors(table).take(np.array([9, 0, 4])).take(np.array([2, 0]))
    assert vectors.table is table and vectors.block(np.arange(2)).tolist() == [[8, 9], [18, 19]]
    assert vectors.block(np.arange(2)).dtype == np.float32
