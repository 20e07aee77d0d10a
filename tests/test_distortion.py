"""How far encoders move: closed forms, and one run that measures beside training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from noiseproof.distortion import (
    Look,
    distortion,
    linear_cka,
    look_at,
    neighbour_accuracy,
    relative_distance,
    ridge_accuracy,
)
from noiseproof.errors import InputError
from noiseproof.finetune import fit
from noiseproof.job import Job
from noiseproof.methods import METHODS, CrossEntropy
from noiseproof.selection import held_out_scores
from rows import image_model, image_rows
from tiny import Tiny, table, train_settings


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- closed forms --------------------------------------------------------------------------------


def test_cka_is_1_for_turned_features_0_for_orthogonal_ones_and_none_for_constants() -> None:
    features = random(30, 4)
    turned, _ = torch.linalg.qr(random(4, 4, seed=1))
    assert linear_cka(features, 3 * features @ turned + 7) == pytest.approx(1.0)
    one = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    two = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert linear_cka(one, two) == pytest.approx(0.0)
    assert linear_cka(one, torch.ones(4, 3)) is None


def test_cka_of_one_feature_is_the_squared_correlation() -> None:
    one, two = random(50, 1), random(50, 1, seed=1)
    squared = float(np.corrcoef(one[:, 0], two[:, 0])[0, 1] ** 2)
    assert linear_cka(one, two) == pytest.approx(squared)


def test_the_probe_is_the_ridge_classifier_of_the_held_out_scores() -> None:
    """Two folds of it, one trained and one scored: the same predictions as with all at once."""
    torch.manual_seed(0)
    labels = torch.arange(80) % 4
    features = random(80, 6) + 1.5 * torch.nn.functional.one_hot(labels, 6)
    features = (features - features.mean(0)) / features.std(0, correction=0)
    found = held_out_scores(features, labels, 4, folds=2).argmax(1)
    fold = (torch.arange(80) // 4) % 2 == 0
    one = ridge_accuracy(features[~fold], labels[~fold], features[fold], labels[fold], 4)
    wanted = float((found[fold] == labels[fold]).double().mean())
    assert one == pytest.approx(wanted, abs=2 / 40)  # scaled on 40 rows here, on all 80 there
    assert one > 0.5


def test_neighbours_vote_by_direction_and_not_by_length() -> None:
    rows = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0], [1.0, 9.0]])
    labels = torch.tensor([0, 0, 1, 1])
    queries = torch.tensor([[100.0, 20.0], [0.01, 0.2]])
    assert neighbour_accuracy(rows, labels, queries, torch.tensor([0, 1]), 2, k=2) == 1.0
    assert neighbour_accuracy(rows, labels, queries, torch.tensor([1, 1]), 2, k=2) == 0.5
    assert neighbour_accuracy(rows, labels, queries, torch.tensor([0, 0]), 2, k=99) == 1.0  # a tie


def test_the_distance_is_over_all_weights_and_none_of_different_ones() -> None:
    before = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert relative_distance(before, {"a": torch.tensor([3.0]), "b": torch.tensor([1.0])}) == 0.6
    assert relative_distance(before, before) == 0.0
    assert relative_distance(before, {"a": torch.tensor([3.0])}) is None


def test_rows_without_a_true_class_do_not_vote() -> None:
    features, held_out = random(20, 3), random(10, 3, seed=1)
    labels = np.arange(20) % 2
    some = distortion(*[Look(features, held_out, {})] * 2, labels, np.arange(10) % 2, 2)
    more = Look(torch.cat([features, 100 + random(5, 3)]), held_out, {})
    foreign = np.concatenate([labels, np.full(5, -1)])
    assert distortion(more, more, foreign, np.arange(10) % 2, 2) == some
    assert some["distortion_probe"] == some["distortion_probe_before"]


# --- in a run ------------------------------------------------------------------------------------


def test_looking_changes_nothing(tiny_run: Tiny) -> None:
    model = copy.deepcopy(tiny_run.model).train()
    next(model.modules()).eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    found = look_at(model, tiny_run.encoded, tiny_run.encoded, train_settings())
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert [module.training for module in model.modules()] == modes
    assert found.train.shape == (25, 32) and torch.equal(found.train, found.held_out)


def fitted(tiny_model: Path, method: Any, **changes: Any) -> Any:
    return fit(table(24, wrong=0.25), model=str(tiny_model), method=method, test=table(12, seed=3),
               clean_label="clean_label", train=train_settings(epochs=2), **changes)  # fmt: skip


def test_a_probe_leaves_the_encoder_and_fine_tuning_moves_it(tiny_model: Path) -> None:
    probe = fitted(tiny_model, CrossEntropy(tune="head"), measure_distortion=True).record.metrics
    assert probe["distortion_cka"] == pytest.approx(1.0)
    assert probe["distortion_parameters"] == 0.0
    assert probe["distortion_probe"] == probe["distortion_probe_before"]
    full = fitted(tiny_model, CrossEntropy(), measure_distortion=True).record.metrics
    assert full["distortion_cka"] < 0.9999 and full["distortion_parameters"] > 0.001
    for name in ("distortion_probe_before", "distortion_knn_before"):
        assert full[name] == probe[name]


@pytest.mark.filterwarnings("ignore:TURN selects on a weak basis")
@pytest.mark.parametrize("name", ["CrossEntropy", "TURN"])
def test_measuring_changes_no_weight_and_no_number(tiny_model: Path, name: str) -> None:
    plain, measured = (fitted(tiny_model, METHODS[name](), measure_distortion=on)
                       for on in (False, True))  # fmt: skip
    assert plain.history == measured.history and plain.samples.equals(measured.samples)
    more = set(measured.record.metrics) - set(plain.record.metrics)
    assert more == {"distortion_probe", "distortion_probe_before", "distortion_knn",
                    "distortion_knn_before", "distortion_cka", "distortion_parameters"}  # fmt: skip
    assert "measure_distortion" not in plain.record.spec
    assert measured.record.spec["measure_distortion"] is True
    assert set(measured.record.curves) == {"roc", "pr", "losses"}


def test_adapters_are_seen_in_the_features(tiny_model: Path) -> None:
    found = fitted(tiny_model, CrossEntropy(tune="lora"), measure_distortion=True).record.metrics
    assert found["distortion_cka"] < 0.99999 and found["distortion_parameters"] is None


def test_image_encoders_are_measured_alike() -> None:
    found = fit(image_rows(), task="image", model=image_model(), method=CrossEntropy(),
                test=image_rows(12, wrong=0.0, seed=1), clean_label="clean_label",
                measure_distortion=True, train=train_settings(epochs=1)).record.metrics  # fmt: skip
    assert found["distortion_cka"] < 0.99999 and found["distortion_parameters"] > 0
    assert 0 <= found["distortion_knn"] <= 1


def test_what_cannot_be_measured_is_refused() -> None:
    asked: dict[str, Any] = {"noise": "symmetric:0.2", "measure_distortion": True}
    with pytest.raises(InputError, match="give test"):
        Job("train.csv", **asked)
    with pytest.raises(InputError, match="needs to know which labels are wrong"):
        Job("train.csv", test="test.csv", measure_distortion=True)
    with pytest.raises(InputError, match="got task 'features'"):
        Job("train.csv", test="test.csv", task="features", method=CrossEntropy(), **asked)
    with pytest.raises(InputError, match="cannot see prompt"):
        Job("train.csv", test="test.csv", method=CrossEntropy(tune="prompt"), **asked)
