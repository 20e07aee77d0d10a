"""The audit: planted errors are found, bounds hold, a run adds its own look, bad input is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import noiseproof
from noiseproof.auditing import confidently_wrong, corrected, look, planted_errors, verdict
from noiseproof.cli import main
from noiseproof.errors import InputError
from noiseproof.evidence import held_out_probabilities, neighbour_labels, neighbour_probabilities
from noiseproof.metrics import detection
from noiseproof.noise import parse_noise
from noiseproof.tables import read_table


def blobs(rows: int, classes: int, width: int = 8, spread: float = 1.0) -> tuple[Any, Any]:
    """Features around one centre per class, and their true classes."""
    random = torch.Generator().manual_seed(3)
    labels = torch.arange(rows) % classes
    centres = 3 * torch.randn(classes, width, generator=random)
    return centres[labels] + spread * torch.randn(rows, width, generator=random), labels


def flipped(labels: torch.Tensor, rate: float, classes: int) -> tuple[torch.Tensor, np.ndarray]:
    noise = parse_noise(f"symmetric:{rate}")
    assert noise is not None
    found = noise.apply(labels.numpy(), classes, 0)
    return torch.from_numpy(found.labels), found.mask


def test_held_out_probabilities_do_not_know_the_own_label() -> None:
    """Changing the label of one row leaves what is said of it nearly as it was."""
    features, labels = blobs(300, 3)
    before = held_out_probabilities(features, labels, 3)
    assert torch.allclose(before.sum(dim=1), torch.ones(300, dtype=torch.float64))
    changed = labels.clone()
    changed[0] = 1
    after = held_out_probabilities(features, changed, 3)
    assert before[0].argmax() == after[0].argmax() == labels[0] != 1
    with pytest.raises(InputError, match="expected at least 10, got 6"):
        held_out_probabilities(features[:6], labels[:6], 3)


def test_neighbours_are_those_of_a_loop_and_never_the_row_itself() -> None:
    features, labels = blobs(70, 4, spread=3.0)
    found, near = neighbour_labels(features, torch.arange(70), neighbours=5)
    columns = (features - features.mean(0)) / features.std(0, correction=0)
    for row in (0, 13, 69):
        cosine = torch.nn.functional.cosine_similarity(columns[row : row + 1], columns)
        order = [other for other in cosine.argsort(descending=True).tolist() if other != row]
        assert found[row].tolist() == order[:5]
        assert torch.allclose(near[row], cosine[order[:5]], atol=1e-5)
    votes = neighbour_probabilities(labels, labels[found], near, 4)
    assert torch.allclose(votes.sum(dim=1), torch.ones(70, dtype=torch.float64))


def test_few_rows_are_searched_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noiseproof.evidence.MOST_SEARCHED", 40)
    features, _ = blobs(200, 2)
    found, _ = neighbour_labels(features, torch.arange(200), neighbours=3)
    assert len(found.unique()) <= 40
    assert not bool((found == torch.arange(200)[:, None]).any())


def test_flipped_labels_are_found_and_the_bounds_hold_the_truth() -> None:
    features, labels = blobs(1200, 4, spread=2.5)
    given, wrong = flipped(labels, 0.3, 4)
    found = look(features, given, 4)
    auroc = detection(found.loss.numpy(), wrong)["auroc"]
    assert auroc is not None and auroc > 0.9
    planted, least, most = planted_errors(features, given, 4, noise_rate=0.3)
    assert 40 <= planted <= 90
    assert least is not None and most is not None
    assert least < auroc < most + 0.03
    doubted, share = confidently_wrong(found.probabilities, given)
    assert wrong[doubted.numpy()].mean() > 0.8
    assert abs(share - wrong.mean()) < 0.1


def test_useless_features_are_called_so() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(600, 8, generator=random)
    labels = torch.arange(600) % 3
    planted, least, most = planted_errors(features, labels, 3)
    assert least is not None and abs(least - 0.5) < 0.12
    for low, high, agreement, said in (
        (least, most, 0.2, "Do not trust this list"),
        (0.97, 0.98, 0.2, f"Random errors are seen well: {planted} labels"),
        (0.72, 0.97, 0.2, "A help, not a judge"),
        (0.60, 1.00, 0.03, "Do not trust this list"),  # the features say nothing of the labels
        (None, None, 0.2, "Whether errors can be seen could not be tested"),
    ):
        bounds = {"planted_auroc": low, "planted_auroc_most": high}
        assert verdict({"planted": planted, "agreement": agreement, **bounds}).startswith(said)


@pytest.mark.parametrize(("rate", "classes"), [(0.0, 5), (0.3, 5), (0.2, 2), (0.4, 2)])
def test_the_correction_inverts_what_wrong_labels_do(rate: float, classes: int) -> None:
    """Draw losses with a known AUROC, flip, and compare with counting all pairs."""
    random = np.random.default_rng(0)
    wrong = random.random(40_000) < rate
    planted = random.random(40_000) < 0.2
    becomes_right = wrong & planted & (random.random(40_000) < 1 / (classes - 1))
    now_wrong = (wrong | planted) & ~becomes_right
    loss = random.normal(size=40_000) + 1.5 * now_wrong
    measured = detection(loss, planted)["auroc"]
    truth = detection(loss, now_wrong)["auroc"]
    found = corrected(measured, rate, classes)
    assert found is not None and truth is not None
    assert abs(found - truth) < 0.02
    assert corrected(None, rate, classes) is None
    assert corrected(0.6, 0.9, 2) is None


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    features, labels = blobs(400, 4, spread=2.0)
    names = np.array(["ash", "birch", "cedar", "elm"])
    given, _ = flipped(labels, 0.2, 4)
    table = pd.DataFrame(features.numpy(), columns=[f"e{n}" for n in range(8)])
    table.insert(0, "id", [f"r{n}" for n in range(400)])
    table["label"], table["right"] = names[given.numpy()], names[labels.numpy()]
    table.to_csv(tmp_path / "vectors.csv", index=False)
    return tmp_path / "vectors.csv"


def test_an_audit_of_features_from_python(vectors: Path) -> None:
    found = noiseproof.audit(
        str(vectors), task="features", features="e*", row_id="id", clean_label="right"
    )
    assert len(found.table) == 400 and 0 < len(found.suspects) == found.summary["suspicious"]
    assert found.table["suspicious"].is_monotonic_decreasing  # suspects first
    assert found.summary["auroc"] > 0.9 and found.summary["precision"] > 0.7
    suspects = found.suspects
    assert suspects["score"].is_monotonic_decreasing and (suspects["score"] > 0.5).all()
    assert (suspects["label"].astype(str) != suspects["suggested_label"].astype(str)).all()
    wrong = suspects["label"].astype(str) != suspects["clean_label"].astype(str)
    assert wrong.mean() == pytest.approx(found.summary["precision"])
    assert suspects["reasons"].str.contains("nearest rows are").any()
    blind = noiseproof.audit(str(vectors), task="features", features="e*", row_id="id")
    assert "clean_label" not in blind.table and "auroc" not in blind.summary
    pd.testing.assert_frame_equal(blind.table, found.table.drop(columns="clean_label"))


def test_the_command_writes_suspects_or_all(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["audit", str(vectors), "--task", "features", "--features", "e*", "--row-id", "id"]
    out = tmp_path / "suspects.csv"
    assert main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "planted_auroc" in shown and "flipped on purpose" in shown
    written = read_table(out)
    assert 0 < len(written) < 400 and f"{len(written)} rows, worst first" in shown
    assert main([*words, "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*words, "--out", str(out), "--overwrite", "--all"]) == 0
    assert len(read_table(out)) == 400


def test_texts_that_stand_twice_with_two_labels_are_told(tiny_model: Path) -> None:
    texts = ["the old boat", "near the oven"] * 12 + ["the old boat"]
    labels = ["harbour", "kitchen"] * 12 + ["kitchen"]
    found = noiseproof.audit({"text": texts, "label": labels}, model=str(tiny_model))
    assert found.summary["conflicts"] == 13
    last = found.table[found.table["row_id"] == "24"].iloc[0]
    assert "stands here again as harbour" in last["reasons"]


def test_a_run_adds_what_its_model_says(
    tiny_model: Path, tiny_table: pd.DataFrame, tmp_path: Path
) -> None:
    tiny_table.to_csv(tmp_path / "t.csv", index=False)
    settings: dict[str, Any] = {"model": str(tiny_model), "noise": "symmetric:0.3"}
    train = noiseproof.TrainSettings(epochs=1, seed=4)
    run = tmp_path / "run"
    noiseproof.fit(str(tmp_path / "t.csv"), method="CrossEntropy", out=run, train=train, **settings)
    found = noiseproof.audit(run)
    samples = read_table(run / "samples.parquet")
    table = found.table.set_index("row_id").loc[samples["row_id"]]
    assert table["label"].astype(str).tolist() == samples["label"].astype(str).tolist()
    assert "noise_rate" in found.summary  # the run's own noise, injected again
    alone = noiseproof.audit(str(tmp_path / "t.csv"), **settings, noise_seed=4)
    first = alone.table.set_index("row_id").loc[samples["row_id"]]["score"]
    half = (first.to_numpy() + 1 - samples["clean_prob"].to_numpy()) / 2
    assert np.allclose(table["score"].to_numpy(), half)
    tiny_table.iloc[:20].to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match="have changed since"):
        noiseproof.audit(run)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"neighbours": 0}, "neighbours must be at least 1, got 0"),
        ({"seed": -1}, "seed must lie in"),
        ({"lable": "x"}, "audit: .*lable"),
        ({"label": "none"}, "no column 'none'"),
    ],
)
def test_bad_input_is_one_line(vectors: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        noiseproof.audit(str(vectors), **({"task": "features", "features": "e*"} | settings))


def test_settings_of_a_run_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(InputError, match="is a run, which has its own label; leave this out"):
        noiseproof.audit(tmp_path, label="x")
