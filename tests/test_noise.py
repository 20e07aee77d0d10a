"""Noise models: realised rates, conventions, text round trips, errors."""

from __future__ import annotations

import doctest
import json
import math
import re
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noiseproof.errors import InputError
from noiseproof.noise import (
    NOISE_MODELS,
    Annotators,
    Corruption,
    InstanceDependent,
    Mixture,
    NoiseModel,
    OpenSet,
    PairFlip,
    Swap,
    Symmetric,
    Transition,
    contract,
    estimate_transition_from_labels,
    load_transition,
    matrices,
    models,
    parse_noise,
    save_transition,
    spec,
)

MATRIX = ((0.7, 0.2, 0.1, 0.0), (0.0, 1.0, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25), (0.5, 0, 0, 0.5))
N, C = 8000, 4
LABELS = np.random.default_rng(1).integers(C, size=N)
FEATURES = np.random.default_rng(2).normal(size=(N, 8)) * 3 + 1

WITH_RATE = [
    Symmetric(0.3),
    Symmetric(0.3, redraw=True),
    PairFlip(0.3),
    PairFlip(0.3, step=-1),
    PairFlip(0.3, pairs=((0, 1), (3, 2))),
    InstanceDependent(0.3),
    OpenSet(0.3),
    Annotators(0.3),
    Annotators(0.3, workers=3, spread=0.0, votes=3),
]
EVERY = [*WITH_RATE, Transition(MATRIX), Mixture((PairFlip(0.2), OpenSet(0.1)))]
by_spec = pytest.mark.parametrize("model", EVERY, ids=lambda model: model.spec[:40])


def corrupt(
    model: NoiseModel, labels: npt.ArrayLike = LABELS, num_classes: int = C, seed: int = 0
) -> Corruption:
    count = len(np.asarray(labels))
    features = np.resize(FEATURES, (count, 8)) if model.needs_features else None
    pool = 5000 if model.needs_pool else None
    return model.apply(labels, num_classes, seed, features=features, pool_size=pool)


def with_rate(model: NoiseModel, rate: float) -> NoiseModel:
    return type(model)(**{**vars(model), "rate": rate})


def assert_near(observed: float, expected: float, count: int) -> None:
    """Within four binomial standard errors; certain events exactly."""
    bound = 4 * math.sqrt(max(expected * (1 - expected), 0) / count) + 1e-12
    assert abs(observed - expected) <= bound, (observed, expected, bound)


def assert_transition(model: NoiseModel, expected: npt.ArrayLike) -> None:
    observed, counts = corrupt(model).transition, np.bincount(LABELS)
    for (row, column), value in np.ndenumerate(np.asarray(expected)):
        assert_near(observed[row, column], value, counts[row])


# ------------------------------------------------------------------ realised transitions and rates


def test_symmetric_noise_goes_to_the_other_classes_at_the_full_rate():
    assert_transition(Symmetric(0.3), np.full((C, C), 0.1) + np.eye(C) * 0.6)
    assert_near(corrupt(Symmetric(0.3)).noise_rate, 0.3, N)


def test_symmetric_redraw_includes_the_true_class_and_so_changes_fewer_labels():
    assert_transition(Symmetric(0.3, redraw=True), np.full((C, C), 0.075) + np.eye(C) * 0.7)
    assert_near(corrupt(Symmetric(0.3, redraw=True)).noise_rate, 0.3 * (1 - 1 / C), N)


@pytest.mark.parametrize(("redraw", "expected"), [(False, 0.4), (True, 0.4 * (1 - 1 / 6))])
def test_both_symmetric_conventions_hold_in_expectation_over_many_seeds(redraw, expected):
    labels = np.arange(600) % 6
    rates = [Symmetric(0.4, redraw).apply(labels, 6, seed).noise_rate for seed in range(50)]
    assert_near(float(np.mean(rates)), expected, 600 * 50)


@pytest.mark.parametrize("step", [1, -1, 2])
def test_pair_flips_go_to_the_class_at_the_given_step(step):
    assert_transition(PairFlip(0.3, step), np.eye(C) * 0.7 + np.roll(np.eye(C), step, axis=1) * 0.3)


def test_named_pairs_flip_and_the_other_classes_stay():
    expected = np.eye(C)
    expected[0, :2], expected[3, 2:] = (0.7, 0.3), (0.3, 0.7)
    assert_transition(PairFlip(0.3, pairs=((0, 1), (3, 2))), expected)


def test_a_transition_matrix_is_realised_cell_by_cell():
    assert_transition(Transition(MATRIX), MATRIX)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.4, 0.6, 0.95])
def test_instance_dependent_noise_realises_the_requested_rate(rate):
    """Truncating q to [0, 1] alone would turn 0.05 into 0.10."""
    assert_near(corrupt(InstanceDependent(rate)).noise_rate, rate, N)


def test_instance_dependent_flip_rates_vary_by_std_and_stay_in_range():
    rates = InstanceDependent(0.4)._flip_rates(20000, np.random.default_rng(0))
    assert abs(rates.mean() - 0.4) < 0.004
    assert abs(rates.std() - 0.1) < 0.004
    low = InstanceDependent(0.02)._flip_rates(2000, np.random.default_rng(0))
    assert low.min() >= 0
    assert low.max() <= 0.04
    assert set(InstanceDependent(0.4, std=0)._flip_rates(9, np.random.default_rng(0))) == {0.4}


def test_open_set_noise_keeps_labels_and_names_a_pool_row_for_each_hit_row():
    result = corrupt(OpenSet(0.3))
    replacement = result.extras["replacement"]
    assert_near(result.noise_rate, 0.3, N)
    assert np.array_equal(result.labels, LABELS)
    assert np.array_equal(result.transition, np.eye(C))
    assert np.array_equal(result.mask, replacement >= 0)
    assert len(set(replacement[result.mask])) == result.mask.sum()


@pytest.mark.parametrize("pool", [1, 7, 100])
def test_a_small_pool_is_used_up_evenly_before_rows_repeat(pool):
    replacement = OpenSet(1.0).apply([0] * 100, 2, 0, pool_size=pool).extras["replacement"]
    counts = np.bincount(replacement, minlength=pool)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("spread", [0.0, 0.5, 0.95])
def test_annotators_with_one_vote_realise_the_requested_rate(spread):
    for seed in range(3):
        assert_near(corrupt(Annotators(0.3, spread=spread), seed=seed).noise_rate, 0.3, N)


def test_annotators_of_no_spread_confuse_every_class_equally_often():
    observed = np.diag(corrupt(Annotators(0.3, spread=0.0)).transition)
    for value, count in zip(observed, np.bincount(LABELS), strict=True):
        assert_near(value, 0.7, count)


def test_spread_sets_how_unequal_the_annotators_are():
    def rates(spread: float) -> npt.NDArray[np.float64]:
        result = corrupt(Annotators(0.3, workers=8, spread=spread))
        worker = result.extras["annotator"]
        return np.bincount(worker, weights=result.mask) / np.bincount(worker)

    assert rates(0.0).std() < 0.03
    assert rates(0.5).std() > 0.15


def test_the_variance_of_worker_error_rates_follows_the_spread():
    errors = Annotators(0.3, workers=20000, spread=0.4)._error_rates(np.random.default_rng(0))
    assert errors.mean() == pytest.approx(0.3)
    assert errors.var() == pytest.approx(0.4 * 0.3 * 0.7, rel=0.05)


def test_different_annotators_prefer_different_wrong_classes():
    result = corrupt(Annotators(0.5, workers=2, spread=0.0))
    tables = [
        estimate_transition_from_labels(LABELS[who], result.labels[who], C)
        for who in (result.extras["annotator"] == 0, result.extras["annotator"] == 1)
    ]
    assert np.abs(tables[0] - tables[1]).max() > 0.1


def test_the_majority_of_different_annotators_wins():
    result = corrupt(Annotators(0.3, workers=6, votes=5))
    voters, votes = result.extras["voters"], result.extras["votes"]
    assert voters.shape == votes.shape == (N, 5)
    assert np.array_equal(result.extras["annotator"], voters[:, 0])
    assert all(len(set(row)) == 5 for row in voters.tolist())
    assert set(np.bincount(voters.ravel()) // 500) == {13}  # about 5/6 of the rows each
    counts = (votes[:, :, None] == np.arange(C)).sum(axis=1)  # (N, C)
    assert np.array_equal(counts[np.arange(N), result.labels], counts.max(axis=1))
    assert result.noise_rate < 0.25


def test_tied_votes_fall_at_random():
    """Taking the first of tied votes would make the second voter meaningless."""
    result = corrupt(Annotators(0.5, workers=2, spread=0.0, votes=2))
    votes = result.extras["votes"]
    tied = votes[:, 0] != votes[:, 1]
    assert_near((result.labels == votes[:, 0])[tied].mean(), 0.5, tied.sum())


def test_a_mixture_counts_changed_labels_and_replaced_inputs_once():
    result = corrupt(Mixture((PairFlip(0.2), OpenSet(0.1))))
    replaced = result.extras["replacement"] >= 0
    assert_near(result.noise_rate, 1 - 0.8 * 0.9, N)
    assert np.array_equal(result.mask, replaced | (result.labels != LABELS))
    assert_near((replaced & (result.labels != LABELS)).mean(), 0.02, N)  # parts are independent


def test_a_mixture_works_from_left_to_right():
    result = Mixture((PairFlip(1.0), PairFlip(1.0, pairs=((1, 0),)))).apply([0, 1, 2], 3, seed=0)
    assert result.labels.tolist() == [0, 2, 0]
    assert result.mask.tolist() == [False, True, True]


def test_a_mixture_needs_what_its_parts_need():
    assert not Mixture((Symmetric(0.1), PairFlip(0.1))).needs_features
    mixture = Mixture((InstanceDependent(0.1), OpenSet(0.1)))
    assert mixture.needs_features
    assert mixture.needs_pool
    with pytest.raises(InputError, match="needs features"):
        mixture.apply([0, 1], 2, 0, pool_size=3)


# ------------------------------------------------------------------ limits


@pytest.mark.parametrize("model", WITH_RATE, ids=lambda model: model.spec)
def test_rate_zero_changes_nothing(model):
    result = corrupt(with_rate(model, 0.0))
    assert np.array_equal(result.labels, LABELS)
    assert not result.mask.any()
    assert result.noise_rate == 0.0
    assert np.array_equal(result.transition, np.eye(C))


@pytest.mark.parametrize("model", WITH_RATE, ids=lambda model: model.spec)
def test_rate_one_hits_every_row_it_can(model):
    result = corrupt(with_rate(model, 1.0))
    if model == Symmetric(0.3, redraw=True):
        assert_near(result.noise_rate, 1 - 1 / C, N)
    elif getattr(model, "pairs", ()):
        assert np.array_equal(result.mask, np.isin(LABELS, (0, 3)))
    else:
        assert result.mask.all()


@pytest.mark.parametrize("model", WITH_RATE, ids=lambda model: model.spec)
def test_two_classes_leave_one_wrong_class(model):
    if getattr(model, "pairs", ()):
        model = PairFlip(0.3, pairs=((0, 1),))
    result = corrupt(model, LABELS % 2, num_classes=2)
    changed = result.labels != LABELS % 2
    assert np.array_equal(result.labels[changed], 1 - LABELS[changed] % 2)
    assert set(result.labels) == {0, 1}


@by_spec
def test_a_class_without_rows_has_an_identity_row(model):
    result = corrupt(model, np.where(LABELS == 2, 0, LABELS))
    assert np.array_equal(result.transition[2], np.eye(C)[2])
    assert np.allclose(result.transition.sum(axis=1), 1)


@by_spec
def test_one_row_is_enough(model):
    assert corrupt(model, [1]).labels.shape == (1,)


# ------------------------------------------------------------------ seeds and purity


@by_spec
def test_the_same_seed_gives_the_same_corruption_and_another_seed_another(model):
    first, again, other = corrupt(model, seed=5), corrupt(model, seed=5), corrupt(model, seed=6)
    assert np.array_equal(first.labels, again.labels)
    assert first.extras.keys() == again.extras.keys()
    assert all(np.array_equal(first.extras[key], again.extras[key]) for key in first.extras)
    assert not np.array_equal(first.mask, other.mask)
    assert (first.seed, first.spec) == (5, model.spec)


@by_spec
def test_the_global_random_state_and_the_arguments_stay_untouched(model):
    labels, features = LABELS[:200].copy(), FEATURES[:200].copy()
    labels.flags.writeable = features.flags.writeable = False
    before = np.random.get_state()[1].copy()
    result = model.apply(labels, C, 0, features=features, pool_size=50)
    assert np.array_equal(np.random.get_state()[1], before)
    assert not np.shares_memory(result.labels, labels)
    assert result.labels.flags.writeable
    assert np.array_equal(labels, LABELS[:200])
    assert np.array_equal(features, FEATURES[:200])


@pytest.mark.parametrize("kind", [Symmetric, PairFlip, OpenSet])
def test_rows_hit_at_a_low_rate_are_also_hit_at_a_high_one(kind):
    low, high = corrupt(kind(0.2)).mask, corrupt(kind(0.4)).mask
    assert not (low & ~high).any()


def test_results_have_the_promised_types():
    result = corrupt(Annotators(0.3), LABELS.astype(np.uint8))
    assert (result.labels.dtype, result.mask.dtype) == (np.int64, np.bool_)
    assert (result.transition.dtype, result.extras["annotator"].dtype) == (np.float64, np.int64)
    assert type(result.noise_rate) is float


def test_models_are_frozen_hashable_values():
    assert len({Symmetric(0.4), Symmetric(0.4), Transition(MATRIX), Transition(MATRIX)}) == 2
    with pytest.raises(FrozenInstanceError):
        Symmetric(0.4).rate = 0.5  # type: ignore[misc]


# ------------------------------------------------------------------ dependence on features


def test_rows_with_equal_features_of_one_class_flip_to_the_same_class():
    """With wide features the softmax is nearly one-hot, so errors form clusters."""
    group = np.arange(N) % 10
    features = np.random.default_rng(3).normal(size=(10, 400))[group]
    result = InstanceDependent(0.5).apply(LABELS, C, 0, features=features)
    shares = []
    for g in range(10):
        for label in range(C):
            wrong = result.labels[(group == g) & (label == LABELS) & result.mask]
            shares.append(np.bincount(wrong, minlength=C).max() / len(wrong))
    assert np.mean(shares) > 0.95
    symmetric = corrupt(Symmetric(0.5)).transition
    assert symmetric[~np.eye(C, dtype=bool)].max() < 0.25


def test_the_wrong_class_follows_the_features_and_not_the_row_number():
    shuffled = np.random.default_rng(0).permutation(N)
    wide = np.random.default_rng(3).normal(size=(N, 400))  # a softmax that is nearly one-hot
    first = InstanceDependent(1.0).apply(LABELS, C, 0, features=wide).labels
    moved = InstanceDependent(1.0).apply(LABELS, C, 0, features=wide[shuffled]).labels
    both = InstanceDependent(1.0).apply(LABELS[shuffled], C, 0, features=wide[shuffled]).labels
    assert (moved == first).mean() < 0.5
    assert (both == first[shuffled]).mean() > 0.9


def test_the_wrong_class_is_drawn_from_the_softmax_of_a_linear_score():
    """One column of -1 and 1: the scores are -w and w, so the log odds change their sign."""
    sign = np.tile([-1.0, 1.0], 30000)
    result = InstanceDependent(1.0).apply(np.zeros(60000, int), 3, 0, features=sign[:, None])
    odds = []
    for side in (-1, 1):
        _, first, second = np.bincount(result.labels[sign == side], minlength=3)
        odds.append(math.log(first / second))
    assert abs(odds[0]) > 0.2
    assert odds[0] == pytest.approx(-odds[1], abs=0.1)


def test_instance_noise_ignores_the_scale_of_a_column_and_constant_columns():
    scaled = FEATURES * np.array([1, 1e6, 1e-6, 3, 1, 1, 1, 1]) + 5
    constant = np.hstack([FEATURES, np.full((N, 1), 0.1)])
    plain = corrupt(InstanceDependent(0.4)).labels
    assert (InstanceDependent(0.4).apply(LABELS, C, 0, features=scaled).labels == plain).all()
    assert_near(InstanceDependent(0.4).apply(LABELS, C, 0, features=constant).noise_rate, 0.4, N)
    same = InstanceDependent(0.4).apply(LABELS, C, 0, features=np.ones((N, 3), np.float16))
    assert_near(same.noise_rate, 0.4, N)


# ------------------------------------------------------------------ text


@by_spec
def test_every_model_is_read_back_from_its_text(model):
    assert parse_noise(model.spec) == model


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("symmetric:0.4", Symmetric(0.4)),
        ("symmetric-redraw:0.4", Symmetric(0.4, redraw=True)),
        ("symmetric:0.4,redraw=true", Symmetric(0.4, redraw=True)),
        ("pair-flip:0.4", PairFlip(0.4)),
        ("pair_flip:0.4", PairFlip(0.4)),
        ("open-set:0.4", OpenSet(0.4)),
        ("idn:0.4", InstanceDependent(0.4)),
        ("pairflip:0.4,pairs=cat>dog;2>0", PairFlip(0.4, pairs=(("cat", "dog"), (2, 0)))),
        ("Symmetric: 1", Symmetric(1.0)),
        ("pairflip:0.4", PairFlip(0.4)),
        ("pairflip:0.4,step=-1", PairFlip(0.4, step=-1)),
        ("asymmetric:0.4", PairFlip(0.4)),
        ("pairflip:0.4,pairs=0>1;2>3", PairFlip(0.4, pairs=((0, 1), (2, 3)))),
        ("instance:0.4", InstanceDependent(0.4)),
        ("instance:0.4, std=0.2", InstanceDependent(0.4, std=0.2)),
        ("openset:.2", OpenSet(0.2)),
        ("annotators:0.3,workers=10", Annotators(0.3)),
        ("annotators:0.3,votes=3,spread=0", Annotators(0.3, votes=3, spread=0.0)),
        ("transition:[[0.9,0.1],[0,1]]", Transition(((0.9, 0.1), (0.0, 1.0)))),
        ("pairflip:0.2+openset:0.1", Mixture((PairFlip(0.2), OpenSet(0.1)))),
        (
            "transition:[[1,0],[0,1]]+symmetric:1e-05",
            Mixture((Transition(((1, 0), (0, 1))), Symmetric(1e-05))),
        ),
    ],
)
def test_text_names_a_model(text, model):
    assert parse_noise(text) == model
    assert parse_noise(model.spec) == model


@pytest.mark.parametrize("text", ["none", "None", "", "  "])
def test_no_noise_is_none(text):
    assert parse_noise(text) is None


def test_specs_are_canonical():
    assert Symmetric(1).spec == "symmetric:1.0"
    assert Symmetric(np.float64(0.25)).spec == "symmetric:0.25"
    assert Annotators(0.3, workers=np.int64(5)).spec == "annotators:0.3,workers=5"
    assert PairFlip(0.4, pairs=((0, 1), (2, 3))).spec == "pairflip:0.4,pairs=0>1;2>3"
    assert Mixture((PairFlip(0.2), OpenSet(0.1))).spec == "pairflip:0.2+openset:0.1"


def test_every_model_is_listed_with_a_card_and_a_valid_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_transition("matrix.json", MATRIX)
    for name, kind in NOISE_MODELS.items():
        assert kind.name == name
        assert isinstance(parse_noise(kind.example), kind)
        for heading in ("Source:", "Formula:", "Realised rate:"):
            assert heading in (kind.__doc__ or "")


# ------------------------------------------------------------------ transition files


def test_a_saved_transition_is_loaded_unchanged(tmp_path):
    matrix = np.random.default_rng(0).dirichlet(np.ones(5), size=5)
    save_transition(tmp_path / "t.json", matrix)
    assert np.array_equal(load_transition(tmp_path / "t.json"), matrix)


@pytest.mark.parametrize("suffix", ["json", "csv", "npy"])
def test_a_transition_is_read_from_each_kind_of_file(tmp_path, suffix):
    path = tmp_path / f"a+b, c=d.{suffix}"
    if suffix == "json":
        save_transition(path, MATRIX)
    elif suffix == "csv":
        np.savetxt(path, MATRIX, delimiter=",")
    else:
        np.save(path, np.array(MATRIX))
    model = parse_noise(f"transition:{path}")
    assert model == Transition(MATRIX, source=str(path))
    assert model is not None
    assert parse_noise(model.spec) == model


def test_the_realised_transition_of_one_draw_is_noise_for_the_next(tmp_path):
    first = corrupt(Symmetric(0.3))
    save_transition(tmp_path / "t.json", first.transition)
    second = corrupt(Transition(load_transition(tmp_path / "t.json")), seed=1)
    assert np.abs(first.transition - second.transition).max() < 0.05


def test_the_transition_is_estimated_by_counting():
    observed = estimate_transition_from_labels([0, 0, 0, 0, 2], [0, 1, 1, 2, 2], 4)
    expected = [[0.25, 0.5, 0.25, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert observed.tolist() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "", r"t.txt: a transition matrix is a .json, .csv or .npy file"),
        ("gone.json", None, r"gone.json: cannot be read \(No such file or directory\)"),
        ("gone.csv", None, r"gone.csv: cannot be read \("),
        ("t.json", "[[1,", r"t.json: is not a matrix of numbers \("),
        ("t.json", '{"a": 1}', r"t.json: is not a matrix of numbers with rows of one length"),
        ("t.json", "[[1, 0], [1]]", r"is not a matrix of numbers with rows of one length"),
        ("t.json", "[[1, 0, 0], [0, 1, 0]]", r"must be C x C with C >= 2, got shape \(2, 3\)"),
        ("t.json", "[[1]]", r"must be C x C with C >= 2, got shape \(1, 1\)"),
        ("t.csv", "a,b\n1,0\n", r"t.csv: is not a matrix of numbers \("),
        ("t.csv", "0.9,0.1\n0.5,0.6\n", r"t.csv: row 2 of the matrix must sum to 1, got 1.1"),
        (
            "t.csv",
            "1,0\n1.2,-0.2\n",
            r"t.csv: row 2, column 2 of the matrix must be at least 0, got -0.2",
        ),
        (
            "t.csv",
            "1,0\nnan,1\n",
            r"t.csv: row 2, column 1 of the matrix must be at least 0, got nan",
        ),
        ("t.npy", "no numpy file", r"t.npy: is not a matrix of numbers \("),
        ("t.npy", "", r"t.npy: is not a matrix of numbers \("),
    ],
)
def test_a_bad_transition_file_is_named_with_its_fault(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_transition(path)
    with pytest.raises(InputError, match=f"noise 'transition:.*{message}.*; for example"):
        parse_noise(f"transition:{path}")


def test_no_pickle_is_loaded(tmp_path):
    np.save(tmp_path / "t.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="is not a matrix of numbers"):
        load_transition(tmp_path / "t.npy")


def test_a_bad_matrix_is_not_saved(tmp_path):
    with pytest.raises(InputError, match=r"row 1 of the matrix must sum to 1, got 0\.5"):
        save_transition(tmp_path / "t.json", [[0.5, 0], [0, 1]])
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ error messages

NAMES = (
    "symmetric, pairflip, transition, instance, openset, text, swap, annotators, symmetric-redraw, "
    "asymmetric, none"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "symetric:0.4",
            "unknown noise model 'symetric'; did you mean 'symmetric' or 'asymmetric'"
            f" or 'symmetric-redraw'? available: {NAMES}",
        ),
        ("xyz", f"unknown noise model 'xyz'; available: {NAMES}"),
        ("symmetric:0.1+xyz:0.2", f"unknown noise model 'xyz'; available: {NAMES}"),
        (
            "symmetric:lots",
            "noise 'symmetric:lots': rate of Symmetric must be a number, got 'lots'; "
            "for example symmetric:0.4",
        ),
        (
            "symmetric:40",
            "noise 'symmetric:40': rate of Symmetric must lie in [0, 1], got 40; "
            "for example symmetric:0.4",
        ),
        (
            "openset:nan",
            "noise 'openset:nan': rate of OpenSet must lie in [0, 1], got nan; "
            "for example openset:0.2",
        ),
        ("symmetric", "noise 'symmetric': the rate is missing; for example symmetric:0.4"),
        (
            "pairflip:step=1",
            "noise 'pairflip:step=1': the rate is missing; for example pairflip:0.4,step=-1",
        ),
        (
            "symmetric:0.4,redraw=1",
            "noise 'symmetric:0.4,redraw=1': redraw must be true or false, got '1'; "
            "for example symmetric:0.4",
        ),
        (
            "annotators:0.3,worker=4",
            "noise 'annotators:0.3,worker=4': unknown setting 'worker', known: workers, spread, "
            "votes; for example annotators:0.3,workers=10",
        ),
        (
            "instance:0.3,std=1,std=0",
            "noise 'instance:0.3,std=1,std=0': setting 'std' is given twice; "
            "for example instance:0.4",
        ),
        (
            "pairflip:0.3,step=0.5",
            "noise 'pairflip:0.3,step=0.5': step of PairFlip must be a whole number, got 0.5; "
            "for example pairflip:0.4,step=-1",
        ),
        (
            "pairflip:0.3,pairs=0>1>2",
            "noise 'pairflip:0.3,pairs=0>1>2': pairs of PairFlip must look like 0>1;2>3, cat>dog "
            "or ((0, 1), (2, 3)), got [['0', '1', '2']]; for example pairflip:0.4,step=-1",
        ),
        (
            "transition:",
            "noise 'transition:': the matrix file is missing; for example transition:matrix.json",
        ),
        (
            "transition:[[1,0]",
            "noise 'transition:[[1,0]': the matrix is not valid JSON; "
            "for example transition:matrix.json",
        ),
        (
            "transition:[[1,0],[0,0.5]]",
            "noise 'transition:[[1,0],[0,0.5]]': Transition: row 2 of the matrix must sum to "
            "1, got 0.5; "
            "for example transition:matrix.json",
        ),
        (
            "openset:0.1+openset:0.2",
            "noise 'openset:0.1+openset:0.2': 'openset' may occur only once",
        ),
    ],
)
def test_unreadable_text_gets_one_clear_line(text, message):
    with pytest.raises(InputError) as caught:
        parse_noise(text)
    assert str(caught.value) == message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Symmetric(1.5), "rate of Symmetric must lie in [0, 1], got 1.5"),
        (lambda: Symmetric(-0.1), "rate of Symmetric must lie in [0, 1], got -0.1"),
        (lambda: Symmetric(True), "rate of Symmetric must be a number, got True"),
        (lambda: InstanceDependent(0.4, 2), "std of InstanceDependent must lie in [0, 1], got 2"),
        (lambda: PairFlip(0.4, 0), "step of PairFlip must not be 0; 1 flips to the next class"),
        (lambda: PairFlip(0.4, 2, ((0, 1),)), "PairFlip takes step or pairs, not both"),
        (
            lambda: PairFlip(0.4, pairs=((0, 1), (0, 2))),
            "pairs of PairFlip name a source class twice: 0>1;0>2",
        ),
        (
            lambda: PairFlip(0.4, pairs=((1, 1),)),
            "pairs of PairFlip must join two different classes, got 1>1",
        ),
        (
            lambda: Annotators(0.3, workers=0),
            "workers of Annotators must lie in [1, 100000], got 0",
        ),
        (
            lambda: Annotators(0.3, workers=10**9),
            "workers of Annotators must lie in [1, 100000], got 1000000000",
        ),
        (
            lambda: Annotators(0.3, workers=5000, votes=2000),
            "votes of Annotators must lie in [1, 1000], got 2000",
        ),
        (
            lambda: PairFlip(0.4, step=10**7),
            "step of PairFlip must lie in [-1000000, 1000000], got 10000000",
        ),
        (lambda: Annotators(0.3, spread=1), "spread of Annotators must be below 1, got 1.0"),
        (lambda: Annotators(0.3, votes=11), "votes of Annotators must lie in [1, 10], got 11"),
        (
            lambda: Mixture((Symmetric(0.1),)),
            "Mixture needs at least two noise models, none of them a Mixture",
        ),
        (
            lambda: Mixture(("symmetric:0.1", Symmetric(0.1))),
            "Mixture needs at least two noise models, none of them a Mixture",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_value_and_range(build, message):
    with pytest.raises(InputError) as caught:
        build()
    assert str(caught.value) == message


NAN_FEATURES = np.array([[0.0], [np.nan]])


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Symmetric(0.1), ([], 2, 0), "labels must have shape (N,) with N >= 1, got (0,)"),
        (Symmetric(0.1), ([[0]], 2, 0), "labels must have shape (N,) with N >= 1, got (1, 1)"),
        (Symmetric(0.1), ([0.0], 2, 0), "labels must be integers, got float64"),
        (Symmetric(0.1), ([0, 2], 2, 0), "labels must lie in [0, 2), got 2 in row 1"),
        (Symmetric(0.1), ([-1, 0], 2, 0), "labels must lie in [0, 2), got -1 in row 0"),
        (Symmetric(0.1), ([0], 1, 0), "num_classes must be an integer of at least 2, got 1"),
        (Symmetric(0.1), ([0], 2, -1), "seed must be an integer of at least 0, got -1"),
        (Symmetric(0.1), ([0], 2, 0.5), "seed must be an integer of at least 0, got 0.5"),
        (
            InstanceDependent(0.1),
            ([0], 2, 0),
            "'instance:0.1' needs features (N, D), such as embeddings",
        ),
        (
            InstanceDependent(0.1),
            ([0, 1], 2, 0, np.ones((3, 2))),
            "features must be numbers of shape (2, D), got float64 (3, 2)",
        ),
        (
            InstanceDependent(0.1),
            ([0, 1], 2, 0, np.array([["a"], ["b"]])),
            "features must be numbers of shape (2, D), got <U1 (2, 1)",
        ),
        (
            InstanceDependent(0.1),
            ([0, 1], 2, 0, NAN_FEATURES),
            "features must be finite, row 1 is not",
        ),
        (
            OpenSet(0.1),
            ([0], 2, 0),
            "'openset:0.1' needs pool_size, the number of foreign rows to take inputs from "
            "(at least 1), got None",
        ),
        (
            PairFlip(0.1, 4),
            ([0], 2, 0),
            "'pairflip:0.1,step=4': step 4 maps 2 classes to themselves",
        ),
        (
            PairFlip(0.1, pairs=((0, 5),)),
            ([0], 3, 0),
            "'pairflip:0.1,pairs=0>5': 0>5 is outside of 3 classes",
        ),
        (
            Transition(MATRIX, "t.csv"),
            ([0], 3, 0),
            "t.csv: the matrix is 4 x 4, the labels have 3 classes",
        ),
    ],
)
def test_wrong_data_is_named_when_a_model_is_applied(model, arguments, message):
    *plain, features = arguments if len(arguments) == 4 else (*arguments, None)
    with pytest.raises(InputError) as caught:
        model.apply(*plain, features=features)
    assert str(caught.value) == message


def test_label_lists_of_two_lengths_have_no_transition():
    with pytest.raises(InputError, match="2 clean labels do not pair with 1 given labels"):
        estimate_transition_from_labels([0, 1], [0], 2)


# ------------------------------------------------------------------ properties

rates = st.floats(0, 1, allow_subnormal=False)


@st.composite
def cases(draw: st.DrawFn) -> tuple[NoiseModel, int, list[int], int]:
    num_classes = draw(st.integers(2, 6))
    labels = draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=40))
    pair = st.permutations(range(num_classes)).map(lambda order: (order[0], order[1]))
    weights = st.lists(st.integers(1, 9), min_size=num_classes, max_size=num_classes)
    rows = st.lists(weights, min_size=num_classes, max_size=num_classes)
    workers = draw(st.integers(1, 5))
    one = st.one_of(
        st.builds(Symmetric, rates, st.booleans()),
        st.builds(PairFlip, rates, st.sampled_from([1, -1])),
        st.builds(lambda rate, pair: PairFlip(rate, pairs=(pair,)), rates, pair),
        rows.map(lambda r: Transition(np.array(r) / np.sum(r, axis=1, keepdims=True))),
        st.builds(InstanceDependent, rates, st.floats(0, 1, allow_subnormal=False)),
        st.builds(OpenSet, rates),
        st.builds(Annotators, rates, st.just(workers), st.floats(0, 0.99), st.integers(1, workers)),
    )
    model: NoiseModel = draw(one)
    if draw(st.booleans()):
        other = draw(one.filter(lambda m: not isinstance(m, OpenSet | Annotators)))
        model = Mixture((model, other))
    return model, num_classes, labels, draw(st.integers(0, 2**40))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_corruption_keeps_its_promises(case):
    model, num_classes, labels, seed = case
    features = np.arange(len(labels) * 3, dtype=np.float32).reshape(-1, 3) % 7
    result = model.apply(labels, num_classes, seed, features=features, pool_size=11)
    replaced = result.extras.get("replacement", np.full(len(labels), -1)) >= 0
    assert result.labels.shape == result.mask.shape == (len(labels),)
    assert result.labels.min() >= 0
    assert result.labels.max() < num_classes
    assert np.array_equal(result.mask, (result.labels != labels) | replaced)
    assert result.noise_rate == result.mask.mean()
    assert np.allclose(result.transition.sum(axis=1), 1)
    assert (result.transition >= 0).all()
    assert all(len(extra) == len(labels) for extra in result.extras.values())
    assert parse_noise(result.spec) == model


def test_the_examples_in_the_docstrings_hold():
    assert all(not doctest.testmod(one).failed for one in (contract, matrices, models, spec))


def test_saved_transitions_are_plain_json(tmp_path: Path):
    save_transition(tmp_path / "t.json", [[0.5, 0.5], [0, 1]])
    assert json.loads((tmp_path / "t.json").read_text()) == [[0.5, 0.5], [0.0, 1.0]]


# --- responses -----------------------------------------------------------------------------------


def swapped(rate, responses, seed=0):
    """A corruption of rows whose label is a text; there is one class."""
    texts = [(response,) for response in responses]
    return Swap(rate).apply(np.zeros(len(texts), dtype=int), 1, seed, texts=texts)


def test_swapped_responses_are_those_of_other_rows():
    """Invented words would be found by their form; the content has to be wrong."""
    given = [f"answer {row}" for row in range(40)]
    found = swapped(0.3, given)
    new, hit = found.extras["responses"], found.mask
    assert hit.sum() == 12 and found.noise_rate == 0.3
    assert sorted(new[hit]) == sorted(np.array(given)[hit])
    assert all((new == given) != hit)
    assert found.transition.tolist() == [[1.0]]


def test_swaps_at_a_higher_rate_hit_the_same_rows_and_more():
    """A sweep over rates compares like with like."""
    given = [f"answer {row}" for row in range(40)]
    hits = [swapped(rate, given).mask for rate in (0.1, 0.3, 0.8)]
    assert all((less <= more).all() for less, more in pairwise(hits))
    assert (swapped(0.3, given, seed=1).mask != hits[1]).any()


def test_a_swap_for_an_equal_response_is_no_error_of_the_row():
    """With few different answers many rows would count as wrong and be right."""
    found = swapped(1.0, ["yes"] * 30 + ["no"] * 10)
    new = found.extras["responses"]
    assert (new[:30] == "no").all() and (new[30:] == "yes").all()
    assert swapped(1.0, ["yes"] * 5).noise_rate == 0
    assert swapped(0.0, ["yes", "no"]).noise_rate == 0


def test_a_swap_stands_alone_and_needs_responses():
    """Text noise after a swap would change what the record calls the truth."""
    with pytest.raises(InputError, match="stands alone"):
        parse_noise("swap:0.2+text:0.1")
    with pytest.raises(InputError, match="needs texts"):
        Swap(0.2).apply([0, 0], 1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none:0.4", "noise 'none:0.4': none takes no rate and stands alone"),
        ("symmetric:0.2+none", "noise 'none': none takes no rate and stands alone"),
        ("symmetric:0,4", "noise 'symmetric:0,4': '0,4' is no number; write 0.4; for example"),
        ("symmetric:40%", "the rate is a share of the rows, got 40%; write 0.4; for example"),
    ],
)
def test_what_others_write_for_a_rate_is_answered_with_what_to_write(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_noise(text)


def test_what_is_no_noise_is_refused_and_a_model_is_given_back():
    with pytest.raises(InputError, match=r"must be a text such as symmetric:0\.4, .*, got 0\.4"):
        parse_noise(0.4)
    assert parse_noise(PairFlip(0.4)) == PairFlip(0.4)


def test_pairs_may_be_named_by_their_classes():
    names = ("bird", "cat", "dog")
    by_name = parse_noise("pairflip:1,pairs=cat>dog + symmetric:0").for_classes(names)
    assert by_name == parse_noise("pairflip:1,pairs=1>2+symmetric:0")
    assert by_name.apply([0, 1, 2], 3, seed=0).labels.tolist() == [0, 2, 2]
    message = re.escape("there is no class cow; classes: 0=bird, 1=cat, 2=dog")
    with pytest.raises(InputError, match=message):
        parse_noise("pairflip:1,pairs=cat>cow").for_classes(names)
    with pytest.raises(InputError, match="there is no class 3; classes: 0=bird"):
        parse_noise("pairflip:1,pairs=0>3").for_classes(names)
    with pytest.raises(InputError, match="for_classes numbers them"):
        parse_noise("pairflip:1,pairs=cat>dog").apply([0, 1, 2], 3, seed=0)
