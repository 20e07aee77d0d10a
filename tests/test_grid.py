"""A grid file and its cells: the product, the names, the search, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from noiseproof.errors import InputError
from noiseproof.grid import (
    AS_METHOD,
    Cell,
    Grid,
    Search,
    draw,
    method_of,
    missing_files,
    parse_grid,
    read_grid,
    typed,
    with_best,
)
from noiseproof.methods import METHODS, CleaR, CrossEntropy
from noiseproof.mixture import LossMixture
from noiseproof.record import spec_id

VALUES: dict[str, Any] = {
    "title": "Two methods",
    "baseline": "plain",
    "noise": ["none", "symmetric:0.4"],
    "seeds": [0, 1],
    "job": {"sample": 100},
    "train": {"epochs": 4},
    "data": {"trec": {"data": "train.csv", "test": "test.csv"}},
    "methods": {
        "plain": {"name": "CrossEntropy", "tune": "lora"},
        "CleaR": {"name": "CleaR:fast", "rank": 4},
    },
}
TUNE = {
    "trials": 3,
    "space": {
        "plain": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        "CleaR": {"learning_rate": [1e-3, 2e-3, 4e-3], "rank": [2, 4]},
    },
}


def values(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(VALUES) | changes


# --- the product ---------------------------------------------------------------------------------


def test_the_cells_are_the_product_with_seeds_outermost() -> None:
    """A grid that is stopped half-way has every method and noise at its first seeds."""
    grid = parse_grid(values())
    names = [(c.labels["seed"], c.labels["noise"], c.labels["method"]) for c in grid.cells]
    assert names == [
        (seed, noise, method)
        for seed in ("0", "1")
        for noise in ("none", "symmetric:0.4")
        for method in ("plain", "CleaR")
    ]
    job, peer = grid.cells[3].made()
    assert peer is None
    assert job.method == CleaR.preset("fast", rank=4)
    assert (job.noise, job.sample, job.train.epochs, job.train.seed) == ("symmetric:0.4", 100, 4, 0)
    assert (grid.title, grid.baseline) == ("Two methods", "plain")


def test_parts_are_products_of_their_own() -> None:
    """What a part does not say is as at the top."""
    parts = [
        {"name": "few", "methods": ["plain"], "seeds": [5], "train": {"batch_size": 8}},
        {"name": "pairs", "noise": ["pairflip:0.2"], "job": {"sample": 50}},
    ]
    grid = parse_grid(values(part=parts))
    assert [c.labels["part"] for c in grid.cells] == ["few"] * 2 + ["pairs"] * 4
    few, pairs = grid.cells[0].made()[0], grid.cells[-1].made()[0]
    assert (few.train.batch_size, few.train.epochs, few.train.seed, few.sample) == (8, 4, 5, 100)
    assert (pairs.noise, pairs.sample, pairs.train.seed) == ("pairflip:0.2", 50, 1)
    assert [c.labels["part"] for c in parse_grid(values(part=parts), ["few"]).cells] == ["few"] * 2
    twice = parse_grid(values(part=[{"seeds": [0]}, {}]))
    assert len(twice.cells) == 8  # parts may overlap
    unnamed = parse_grid(values(part=[parts[0], {"noise": ["pairflip:0.2"]}]), ["2"])
    assert len(unnamed.cells) == 4
    assert all("part" not in cell.labels for cell in unnamed.cells)


def test_the_peft_axis_sets_the_adapter_of_a_method() -> None:
    grid = parse_grid(values(peft=["lora", "ia3"], methods={"plain": {"name": "CrossEntropy"}}))
    assert [cell.made()[0].method for cell in grid.cells[:2]] == [
        CrossEntropy(tune="lora"),
        CrossEntropy(tune="ia3"),
    ]
    left = parse_grid(values(peft=[AS_METHOD], methods={"plain": {"name": "CrossEntropy"}}))
    assert "peft" not in left.cells[0].labels
    with pytest.raises(InputError, match="does not fit Trainer"):
        parse_grid(values(peft=["lora"], methods={"plain": {"name": "Trainer"}}))


def test_validation_says_what_its_labels_are_worth() -> None:
    """Choosing the epoch on clean rows is another experiment than choosing it on noisy ones."""
    data = {"trec": {"data": "train.csv", "validation": "valid.csv"}}
    grid = parse_grid(values(data=data, validation=["none", "noisy:0.1", "clean"], noise=["none"]))
    jobs = [cell.made()[0] for cell in grid.cells if cell.labels["method"] == "plain"][:3]
    assert [job.validation_kind for job in jobs] == ["none", "noisy", "clean"]
    assert [job.train.select for job in jobs] == ["last", "best", "best"]
    assert [job.validation for job in jobs] == [None, "0.1", "valid.csv"]
    with pytest.raises(InputError, match=r"needs a file: give 'validation' in \[data.trec\]"):
        parse_grid(values(validation=["clean"]))
    with pytest.raises(InputError, match="must be none, clean, noisy or noisy:SHARE"):
        parse_grid(values(validation=["dirty:0.1"]))


def test_the_identifier_is_that_of_the_run() -> None:
    """Else a finished cell would not be recognised; it does not depend on the names in the grid."""
    cell = parse_grid(values()).cells[0]
    assert cell.id() == spec_id(cell.made()[0].spec())
    renamed = dataclasses.replace(cell, labels=cell.labels | {"method": "other"})
    assert renamed.id() == cell.id()
    assert Cell(**json.loads(json.dumps(dataclasses.asdict(cell)))).id() == cell.id()
    folders = {cell.folder() for cell in parse_grid(values()).cells}
    assert len(folders) == 8
    assert all(name[-8:] in {c.id()[:8] for c in parse_grid(values()).cells} for name in folders)


# --- settings ------------------------------------------------------------------------------------


def test_settings_have_the_types_of_their_fields() -> None:
    """TOML has integers where a field is a number, and no null."""
    method, _ = method_of("CleaR", {"gamma": 1, "dropout": "null", "mixture": {"scope": "global"}})
    assert method == CleaR(gamma=1.0, dropout=None, mixture=LossMixture(scope="global"))
    assert isinstance(typed(CrossEntropy(), {"learning_rate": 1}, "x").learning_rate, float)
    assert method_of("CleaR", {"target_modules": ["query"]})[0] == CleaR(target_modules=("query",))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_stand_in_a_grid(name: str) -> None:
    assert method_of(name, {})[0] == METHODS[name]()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {"a": {"name": "Clear"}}}, "unknown method 'Clear'; did you mean 'CleaR'"),
        ({"methods": {"a": {"name": "GCE", "Q": 1}}}, "unknown setting of GCE 'Q'; did you mean"),
        ({"methods": {"a": {"name": "GCE", "q": "high"}}}, "GCE.q: expected float, got 'high'"),
        ({"methods": {"a": {"name": "CleaR:quick"}}}, "unknown preset 'quick' of CleaR"),
        ({"methods": {"a": {"name": "Trainer:x"}}}, "the peer Trainer has no presets"),
        ({"methods": {"a": {"tune": "lora"}}}, "[methods.a] needs a name"),
        ({"methods": {}}, "give at least one [methods.NAME] table"),
        ({"train": {"epoch": 3}}, "unknown setting of train 'epoch'; did you mean 'epochs'"),
        ({"train": {"epochs": "many"}}, "train.epochs: expected int, got 'many'"),
        ({"job": {"sampel": 3}}, "unknown setting of job 'sampel'; did you mean 'sample'"),
        ({"noise": ["symmetrical:0.4"]}, "symmetric"),
        ({"noise": "none"}, "noise must be a list of one or more values, got 'none'"),
        ({"seeds": []}, "seeds must be a list of one or more values, got []"),
        ({"seed": [0]}, "unknown setting 'seed'; did you mean 'seeds'"),
        ({"seed": [0]}, "part, tune, models, noise, peft, val"),  # no name twice
        ({"baseline": "Plain"}, "unknown baseline 'Plain'; did you mean 'plain'"),
        ({"part": [{"methods": ["Plain"]}]}, "unknown methods 'Plain'; did you mean 'plain'"),
        ({"part": [{"sed": [1]}]}, "unknown setting of a part 'sed'; did you mean 'seeds'"),
        ({"part": {"seeds": [1]}}, "part must be [[part]] tables"),
        ({"part": [{"seeds": [0]}, {"seeds": [0], "name": "b"}]}, "are the same run"),
        ({"tune": {"space": {}}}, "give [tune.space.plain]"),
        ({"tune": TUNE | {"trials": 0}}, "tune.trials must be 1 or more, got 0"),
        ({"tune": TUNE | {"rounds": 3}}, "unknown setting of [tune] 'rounds'"),
        ({"methods": {"GCE": "GCE"}}, "methods.GCE must be a table of settings, got 'GCE'; write "),
        ({"data": {"trec": "train.csv"}}, "data.trec must be a table of settings, got 'train.csv'"),
        ({"part": ["few"]}, "part must be [[part]] tables, got 'few' among them"),
        ({"part": [{"train": 3}]}, "part.train must be a table of settings, got 3"),
        ({"seeds": ["a"]}, "each value of seeds must be a whole number, got 'a'"),
        ({"seeds": [1.5]}, "each value of seeds must be a whole number, got 1.5"),
        ({"noise": [["none"]]}, "each value of noise must be text, got list"),
        ({"baseline": ["plain"]}, "baseline must be text, got list"),
        ({"tune": TUNE | {"trials": "8"}}, "tune.trials must be a whole number, got '8'"),
        ({"tune": TUNE | {"seed": "first"}}, "tune.seed must be a whole number, got 'first'"),
        ({"tune": TUNE | {"seed": -1}}, "tune.seed must lie in [0, 2^32), got -1"),
        ({"tune": TUNE | {"share": "a tenth"}}, "tune.share must be a number, got 'a tenth'"),
        ({"tune": TUNE | {"share": 1.0}}, "tune.share must lie between 0 and 1, got 1.0"),
        ({"tune": TUNE | {"space": 3}}, "tune.space must be a table of settings, got 3"),
        ({"tune": TUNE | {"metric": "memorization"}}, "tune.metric must be validation_accuracy, "),
        ({"tune": TUNE | {"metric": "test_accuracy"}}, "held out; got 'test_accuracy'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        parse_grid(values(**({"baseline": None} | changes if "methods" in changes else changes)))
    assert said in str(error.value)


def test_a_file_that_is_no_grid_is_named(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    with pytest.raises(InputError, match=r"the grid .*grid\.toml does not exist"):
        read_grid(path)
    path.write_text("title = ", encoding="utf-8")
    with pytest.raises(InputError, match=r"grid\.toml is not valid TOML"):
        read_grid(path)
    path.write_text('title = "x"', encoding="utf-8")
    with pytest.raises(InputError, match=r"grid .*grid\.toml: give at least one \[data"):
        read_grid(path)


def test_the_grid_of_the_documentation_is_valid() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "benchmark.md"
    blocks = re.findall(r"^```toml\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 3
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    grid = parse_grid(tomllib.loads("\n".join(blocks)))
    assert {len(search.trials) for search in grid.searches.values()} == {8}
    assert grid.cells[-1].made()[0].train.epochs == 10  # of the part


def test_the_grids_of_this_project_are_valid() -> None:
    """A grid that names a setting that no longer exists cannot be run again."""
    files = sorted(Path(__file__).resolve().parents[1].glob("benchmarks/*.toml"))
    assert files
    for path in files:
        grid = read_grid(path)
        assert grid.cost
        assert grid.title


def test_the_smoke_grid_needs_nothing_but_this_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make bench` on a fresh clone ended with all cells failed; it has every part of a grid."""
    root = Path(__file__).resolve().parents[1]
    monkeypatch.chdir(root)
    grid = read_grid(root / "benchmarks" / "smoke.toml")
    assert not missing_files(grid)
    assert set(grid.searches) == set(range(len(grid.cells)))
    for cell in grid.cells:
        assert Path(cell.job["data"]).resolve().is_relative_to(root)
        assert cell.made()[0].validation_kind == "noisy"
    assert {cell.made()[1] is None for cell in grid.cells} == {True, False}  # a peer is among them


def test_missing_files_of_rows_are_named_once(tmp_path: Path) -> None:
    """A name on the hub and a share to split off are no files."""
    (tmp_path / "train.csv").write_text("text,label\n")
    data = {
        "files": {"data": str(tmp_path / "train.csv"), "test": str(tmp_path / "no.csv")},
        "hub": {"data": "someone/rows", "test": "0.2", "test_ood": {"late": "late.csv"}},
    }
    assert missing_files(parse_grid(values(data=data))) == [str(tmp_path / "no.csv"), "late.csv"]


# --- search --------------------------------------------------------------------------------------


def searched() -> tuple[Grid, Search]:
    grid = parse_grid(values(tune=TUNE))
    return grid, grid.searches[3]  # CleaR at symmetric:0.4, seed 0


def test_every_method_gets_the_same_number_of_trials() -> None:
    """An extra trial for our own method would be a head start."""
    grid, _ = searched()
    assert {len(search.trials) for search in grid.searches.values()} == {3}
    assert set(grid.searches) == set(range(8))


def test_fewer_settings_than_trials_are_told() -> None:
    """Else a comparison with equal numbers of trials would be none, without a word."""
    space = TUNE["space"] | {"plain": {"learning_rate": [1e-3, 2e-3]}}
    with pytest.warns(UserWarning, match=r"\[tune.space.plain\] holds 2 settings, .* not 3"):
        grid = parse_grid(values(tune=TUNE | {"space": space}))
    assert [len(grid.searches[place].trials) for place in (0, 1)] == [2, 3]


def test_trials_see_neither_test_rows_nor_clean_labels() -> None:
    data = {"trec": {"data": "train.csv", "test": "test.csv", "clean_label": "truth"}}
    grid = parse_grid(values(data=data, tune=TUNE))
    for search in grid.searches.values():
        for cell in search.trials:
            job, _ = cell.made()
            assert (job.test, job.clean_label, job.validation) == (None, None, "0.1")
            assert job.validation_kind == "noisy"
            assert (job.train.seed, job.train.select) == (1000, "last")


def test_trials_do_without_what_looks_at_test_rows_or_true_labels() -> None:
    """A grid of a study could not be searched: its settings ask for the test rows again."""
    job = {"test_noise": "text:0.3", "measure_distortion": True, "probe_gradients": 8}
    job |= {"only_clean_rows": True}
    grid = parse_grid(values(tune=TUNE, noise=["symmetric:0.4"], job=job))
    for search in grid.searches.values():
        for cell in search.trials:
            made, _ = cell.made()
            assert (made.test_noise, made.measure_distortion) == (None, False)
            assert (made.probe_gradients, made.only_clean_rows) == (0, False)


@pytest.mark.parametrize("share", ["0.25", 0.25])
def test_no_search_on_rows_that_are_split_off_for_the_test(share: str | float) -> None:
    """The trials would train on later test rows; every seed splits off others."""
    data = {"trec": {"data": "train.csv", "test": share}}
    assert len(parse_grid(values(data=data)).cells) == 8
    with pytest.raises(InputError, match=r"cannot go with test = '?0.25'? of trec: .* give a file"):
        parse_grid(values(data=data, tune=TUNE))


def test_a_search_of_language_models_goes_by_the_tokens_of_held_out_rows() -> None:
    """They have no accuracy of classes; the mistake came out after all trials had run."""
    space = {"plain": {"learning_rate": [1e-3, 2e-3]}}
    changes = {
        "job": {"task": "causal-lm", "model": "small", "sample": 100},
        "methods": {"plain": VALUES["methods"]["plain"]},
        "noise": ["none"],
        "models": ["small"],
    }
    grid = parse_grid(values(tune={"trials": 2, "space": space}, **changes))
    assert {one.metric for one in grid.searches.values()} == {"validation_token_accuracy"}
    with pytest.raises(InputError, match="metric must be validation_token_accuracy, of the"):
        parse_grid(values(tune={"space": space, "metric": "validation_loss"}, **changes))


def test_the_seeds_of_a_cell_share_its_search() -> None:
    """Searching per seed would cost as much again and report another method for every seed."""
    grid = parse_grid(values(tune=TUNE))
    by_seed = [grid.searches[place].trials for place in (1, 5)]
    assert [cell.folder() for cell in by_seed[0]] == [cell.folder() for cell in by_seed[1]]


def test_the_best_trial_gives_the_settings() -> None:
    grid, search = searched()
    best = with_best(grid.cells[3], search, [0.5, None, 0.7], 12.5)
    assert best.settings == {"rank": 4} | search.trials[2].settings
    assert best.search["best"] == {
        name: search.trials[2].settings[name] for name in ("learning_rate", "rank")
    }
    assert (best.search["trials"], best.search["failed"], best.search["score"]) == (3, 1, 0.7)
    assert best.search["seconds"] == 12.5
    first = with_best(grid.cells[3], search, [0.7, 0.7, 0.7], 12.5)
    assert first.search["best"] == {
        name: search.trials[0].settings[name] for name in ("learning_rate", "rank")
    }
    with pytest.raises(InputError, match="no trial of its search succeeded"):
        with_best(grid.cells[3], search, [None, None, None], 12.5)


def test_draws_are_reproducible_and_inside_their_range() -> None:
    space = {"rate": {"low": 1e-4, "high": 1e-2, "log": True}, "share": {"low": 0, "high": 1}}
    drawn = draw(space, 50, 3)
    assert drawn == draw(space, 50, 3) != draw(space, 50, 4)
    assert all(1e-4 <= one["rate"] <= 1e-2 and 0 <= one["share"] <= 1 for one in drawn)
    below = sum(one["rate"] < 1e-3 for one in drawn)
    assert 10 < below < 40  # half of a log-uniform range
    assert len(draw({"rank": [2, 4]}, 9, 0)) == 2  # no choice is tried twice
    assert math.isclose(draw({"x": [0.123456789]}, 1, 0)[0]["x"], 0.1235)


@pytest.mark.parametrize(
    "space",
    [
        {"rate": {"low": 1, "high": 1}},
        {"rate": {"low": 1, "high": math.inf}},
        {"rate": {"low": 0, "high": 1, "log": True}},
        {"rate": {"low": 1}},
        {"rate": {"low": 1, "high": 2, "base": 2}},
        {"rate": []},
        {"rate": 3},
    ],
)
def test_a_range_that_is_none_is_refused(space: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="rate"):
        draw(space, 3, 0)


def test_a_home_that_does_not_exist_is_one_clear_line() -> None:
    """The command line says so; calls from Python once ended in a RuntimeError."""
    from noiseproof.benchmark import run_grid
    from noiseproof.report import report

    grid = parse_grid(values())
    for call in (
        lambda: read_grid("~nobody-of-this-name/grid.toml"),
        lambda: run_grid(grid, "~nobody-of-this-name/runs"),
        lambda: report("~nobody-of-this-name/runs", "report.md"),
        lambda: report("runs", "~nobody-of-this-name/report.md"),
    ):
        with pytest.raises(InputError, match=r"'~nobody-of-this-name/.*' is not a path"):
            call()
