"""A grid on real processes: skipping, failing, killing, searching, and a cluster."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import noiseproof
from noiseproof import benchmark, cli
from noiseproof.benchmark import Board, CellState, _Local, _Runner, run_cell, run_grid
from noiseproof.errors import InputError
from noiseproof.grid import Cell, parse_grid, read_grid
from noiseproof.peers import run_peer
from noiseproof.record import RunRecord
from tiny import environment, python, table


@pytest.fixture(scope="module")
def values(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A grid of two cells that take a second each once their process stands."""
    folder = tmp_path_factory.mktemp("bench")
    table(40, wrong=0.2).to_csv(folder / "train.csv", index=False)
    table(12, seed=1).to_csv(folder / "test.csv", index=False)
    return {
        "title": "Tiny",
        "cost": "seconds",
        "baseline": "plain",
        "models": [str(tiny_model)],
        "noise": ["symmetric:0.3"],
        "train": {"epochs": 3, "batch_size": 8, "device": "cpu", "precision": "fp32"},
        "data": {"rows": {"data": str(folder / "train.csv"), "test": str(folder / "test.csv")}},
        "methods": {
            "plain": {"name": "CrossEntropy", "tune": "lora"},
            "CleaR": {"name": "CleaR", "warmup_epochs": 1, "mixture": {"min_samples": 4}},
        },
    }


@pytest.fixture(autouse=True)
def _cells_import_this_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])


@pytest.fixture(scope="module")
def whole(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a grid that ran through."""
    out = tmp_path_factory.mktemp("whole") / "grid"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        states = run_grid(parse_grid(values), out, workers=2)
    assert [state.state for state in states] == ["done", "done"], [s.error for s in states]
    return out


def records(out: Path) -> dict[str, RunRecord]:
    return {path.parent.name: RunRecord.read(path.parent)
            for path in sorted(out.glob("cells/*/record.json"))}  # fmt: skip


def assert_same_results(out: Path, reference: Path) -> None:
    """Bit for bit, but for clocks."""
    found, wanted = records(out), records(reference)
    assert found.keys() == wanted.keys()
    for name, record in wanted.items():
        assert found[name].status == record.status == "done"
        assert found[name].metrics == record.metrics
        assert (found[name].id, found[name].labels) == (record.id, record.labels)
        one, two = out / "cells" / name, reference / "cells" / name
        assert (one / "history.csv").read_bytes() == (two / "history.csv").read_bytes()
        samples = [pd.read_parquet(place / "samples.parquet") for place in (one, two)]
        pd.testing.assert_frame_equal(*samples, check_exact=True)


# --- cells ---------------------------------------------------------------------------------------


def test_a_cell_is_a_run_with_the_names_of_its_grid(whole: Path, values: dict[str, Any]) -> None:
    grid = parse_grid(values)
    found = records(whole)
    assert list(found) == sorted(cell.folder() for cell in grid.cells)
    for cell in grid.cells:
        record = found[cell.folder()]
        assert record.id == cell.id()
        assert record.labels == cell.labels
        assert record.search == {}
        assert record.seeds == {"noise": 0, "init": 0, "order": 0}
    summary = json.loads((whole / "grid.json").read_text(encoding="utf-8"))
    assert (summary["title"], summary["baseline"], summary["cost"]) == ("Tiny", "plain", "seconds")
    assert {one["folder"] for one in summary["cells"]} == {f"cells/{name}" for name in found}


def test_cells_see_the_same_rows_and_the_same_noise(whole: Path) -> None:
    """Else the difference of two methods would hold the difference of two draws."""
    one, two = records(whole).values()
    assert one.data["fingerprint"] == two.data["fingerprint"]
    assert one.noise == two.noise


def test_a_finished_cell_is_not_touched_again(whole: Path, values: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.glob("cells/*/*") if path.is_file()}
    shown: list[CellState] = []
    states = run_grid(parse_grid(values), whole, show=lambda board, state: shown.append(state))
    assert [state.state for state in states] == ["done", "done"]
    assert not shown
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_renamed_method_keeps_its_runs(
    whole: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    """A name is for the reader; running again for it would waste hours."""
    out = tmp_path / "grid"
    shutil.copytree(whole, out)
    methods = {"LoRA": values["methods"]["plain"], "CleaR": values["methods"]["CleaR"]}
    states = run_grid(parse_grid(values | {"methods": methods, "baseline": "LoRA"}), out)
    assert [state.state for state in states] == ["done", "done"]
    assert [RunRecord.read(state.folder).labels["method"] for state in states] == ["LoRA", "CleaR"]
    assert len(list(out.glob("cells/*/record.json"))) == 2


def test_a_part_that_runs_alone_leaves_the_others_in_the_report(
    whole: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    """Finished cells of the other parts went from later reports."""
    out = tmp_path / "grid"
    shutil.copytree(whole, out)
    parts = [{"name": "one", "methods": ["plain"]}, {"name": "two", "methods": ["CleaR"]}]
    (state,) = run_grid(parse_grid(values | {"part": parts}, ["two"]), out)
    assert (state.state, state.cell.labels["part"]) == ("done", "two")
    summary = json.loads((out / "grid.json").read_text(encoding="utf-8"))
    assert [one["labels"]["part"] for one in summary["cells"]] == ["one", "two"]
    assert {one["folder"] for one in summary["cells"]} == {f"cells/{name}" for name in records(out)}


def test_cells_of_another_part_have_the_settings_that_their_search_found(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are other runs than the file says; before the search nobody knows which."""

    def pretend(self: _Local, state: CellState, told: Callable[[str], None]) -> Future[None]:
        record = RunRecord(state.cell.spec(), status="done", labels=state.cell.labels,
                           search=state.cell.search)  # fmt: skip
        rate = record.spec["method"]["learning_rate"]
        record.metrics = {"validation_accuracy": rate}  # the highest wins
        state.folder.mkdir(parents=True)
        record.write(state.folder)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    monkeypatch.setattr(_Local, "start", pretend)
    space = {"learning_rate": [1e-3, 2e-3]}
    changed = values | {
        "part": [{"name": "one", "methods": ["plain"]}, {"name": "two", "methods": ["CleaR"]}],
        "tune": {"trials": 2, "space": {"plain": space, "CleaR": space}},
    }
    names = []
    for part in ("one", "two"):
        run_grid(parse_grid(changed, [part]), tmp_path)
        summary = json.loads((tmp_path / "grid.json").read_text(encoding="utf-8"))
        names.append([one["folder"] for one in summary["cells"]])
    assert [len(found) for found in names] == [1, 2]
    assert names[1][:1] == names[0]
    assert {f"cells/{name}" for name in records(tmp_path)} == set(names[1])


def test_other_settings_are_other_cells(whole: Path, values: dict[str, Any]) -> None:
    """A number that was made with other settings must not stand in their place."""
    cell = parse_grid(values | {"train": {"epochs": 2}}).cells[0]
    assert not (whole / "cells" / cell.folder()).exists()


def test_a_cell_that_fails_is_recorded_and_the_rest_goes_on(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """A night's grid must not end at a typo in one of its files; then it is tried again."""
    train = tmp_path / "late.csv"
    data = {"missing": {"data": str(train)}, **values["data"]}
    grid = parse_grid(values | {"data": data, "methods": {"plain": {"name": "CrossEntropy"}}})
    out, shown = tmp_path / "grid", []
    states = run_grid(grid, out, show=lambda board, state: shown.append((state.state, board)))
    assert [state.state for state in states] == ["failed", "done"]
    assert "late.csv" in states[0].error
    record = RunRecord.read(states[0].folder)
    assert (record.status, record.id) == ("failed", grid.cells[0].id())
    assert record.labels == grid.cells[0].labels
    assert "late.csv" in str(record.error)
    assert [name for name, _ in shown if name != "running"] == ["failed", "done"]
    assert shown[-1][1].count("done") == 1
    table(20).to_csv(train, index=False)
    assert [state.state for state in run_grid(grid, out)] == ["done", "done"]


def test_a_cell_that_is_killed_is_recorded(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel kills what takes too much memory; it leaves no record of its own."""
    lethal = tmp_path / "sitecustomize.py"
    lethal.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    state = run_grid(parse_grid(values | {"methods": {"a": {"name": "GCE"}}, "baseline": None}),
                     tmp_path / "grid")[0]  # fmt: skip
    assert state.state == "failed"
    assert state.error == "killed by signal 9"
    assert RunRecord.read(state.folder).error == "killed by signal 9"


def test_a_peer_is_a_cell_like_any_other(values: dict[str, Any], tmp_path: Path) -> None:
    methods = {"plain": {"name": "CrossEntropy"}, "Trainer (peer)": {"name": "TrainerLoRA"}}
    states = run_grid(parse_grid(values | {"methods": methods}), tmp_path / "grid", workers=2)
    assert [state.state for state in states] == ["done", "done"], [s.error for s in states]
    ours, peer = (RunRecord.read(state.folder) for state in states)
    assert peer.data == ours.data
    assert peer.noise == ours.noise
    assert peer.metrics.keys() >= ours.metrics.keys()
    assert peer.labels["method"] == "Trainer (peer)"


class _Nowhere(_Runner):
    """Runs nothing, on seven processors."""

    workers = 7

    def start(self, state: CellState, told: Callable[[str], None]) -> Future[None]:
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def close(self) -> None:
        pass


def test_the_time_left_counts_the_processors_of_the_cluster(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a cluster of a hundred would be told to take a hundred times as long."""
    monkeypatch.setattr(benchmark, "_ray_runner", lambda address: _Nowhere())
    shown: list[int] = []
    run_grid(parse_grid(values), tmp_path / "grid", ray="auto",
             show=lambda board, state: shown.append(board.workers))  # fmt: skip
    assert set(shown) == {7}


def test_a_cell_that_starts_as_the_grid_ends_is_ended_too(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else Ctrl-C would wait for the whole of it."""
    started: list[subprocess.Popen[str]] = []
    ending = threading.Thread(target=lambda: runner.close())
    popen = subprocess.Popen

    def slow(words: list[str], **given: Any) -> subprocess.Popen[str]:
        ending.start()
        time.sleep(0.3)  # the grid ends before it knows the process
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **given))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", slow)
    runner = _Local(1)
    state = CellState(parse_grid(values).cells[0], tmp_path / "cell")
    future = runner.start(state, lambda words: None)
    try:
        with pytest.raises(RuntimeError, match="killed by signal 15"):
            future.result(timeout=20)
        ending.join(timeout=20)
        assert not ending.is_alive()
    finally:
        for process in started:
            process.kill()


def test_processes_waiting_for_one_cell_run_it_once(values: dict[str, Any], tmp_path: Path) -> None:
    """A grid that was killed may have left a cell behind that is still at work."""
    cell = parse_grid(values | {"methods": {"plain": {"name": "CrossEntropy"}}}).cells[0]
    asked = json.dumps({"cell": dataclasses.asdict(cell), "folder": str(tmp_path / "cells" / "x")})
    words = [sys.executable, "-m", "noiseproof.benchmark"]
    pipe, said = subprocess.PIPE, []
    with ExitStack() as stack:
        both = [
            stack.enter_context(subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True))
            for _ in range(2)
        ]
        for process in both:
            assert process.stdin is not None
            process.stdin.write(asked + "\n")
            process.stdin.flush()
        for process in both:
            assert process.stdout is not None
            said.append(process.stdout.read())
            assert process.wait(timeout=240) == 0
    assert sorted(bool(text) for text in said) == [False, True]
    assert RunRecord.read(tmp_path / "cells" / "x").status == "done"


def test_the_time_left_follows_the_method() -> None:
    """Estimates from another method would be off by a factor."""

    def state(method: str, what: str, seconds: float = 0.0) -> CellState:
        cell = Cell({"method": method, "seed": "0"}, {}, method)
        return CellState(cell, Path(), what, started=time.monotonic(), seconds=seconds)

    board = Board("x", "cells", 2)
    board.states = [state("a", "waiting")]
    assert board.seconds_left() is None
    board.states += [state("a", "done", 10), state("b", "done", 30), state("b", "running")]
    assert board.seconds_left() == pytest.approx((10 + 30) / 2, abs=0.5)
    board.states += [state("c", "waiting")]  # not yet seen: the mean of the methods
    assert board.seconds_left() == pytest.approx((10 + 30 + 20) / 2, abs=0.5)


# --- interruption --------------------------------------------------------------------------------


def grid_file(values: dict[str, Any], path: Path) -> Path:
    """The grid as TOML; its values are JSON, which TOML's inline tables nearly are."""

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f'"{k}" = {shown(v)}' for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(shown, value)) + "]"
        return json.dumps(value)

    lines = [f"{name} = {shown(value)}" for name, value in values.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def children(pid: int) -> list[int]:
    """Processes that a process has started; Linux only."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in path.read_text().split()]
    return found


def bench(file: Path, out: Path, *words: str) -> list[str]:
    """The command that runs a grid."""
    return [sys.executable, "-m", "noiseproof", "bench", str(file), "--out", str(out), *words]


def wait_for_an_epoch(process: subprocess.Popen[Any], out: Path, seen: set[Path]) -> None:
    """Wait until a cell has written a checkpoint that was not there before."""
    deadline = time.monotonic() + 480  # of a busy machine
    while not set(out.glob("cells/*/checkpoints/*.safetensors")) - seen:
        assert process.poll() is None, "ended before it was to be stopped"
        assert time.monotonic() < deadline, "no cell comes on"
        time.sleep(0.02)


def interrupt(words: list[str], out: Path, signum: int = signal.SIGINT) -> list[int]:
    """A signal to a grid of one cell that has come on; the processes of its cells."""
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        wait_for_an_epoch(process, out, set())
        cells = children(process.pid)
        process.send_signal(signum)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 128 + signum
    assert "interrupted; the same command continues" in errors
    (record,) = records(out).values()
    assert record.status == "interrupted"
    return cells


def kill(words: list[str], out: Path, pause: float = 0.0) -> int:
    """Run a grid, kill it a while after it has come on, and give its exit code."""
    seen = set(out.glob("cells/*/checkpoints/*.safetensors"))
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        wait_for_an_epoch(process, out, seen)
        time.sleep(pause)
        cells = children(process.pid)
        process.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in cells):  # or their last words were progress
        assert time.monotonic() < deadline, "a cell outlives its grid"
        time.sleep(0.02)
    return process.returncode


def test_a_grid_that_is_killed_comes_to_the_same_result(
    values: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """SIGKILL leaves nobody to tidy up: neither a cell at work nor half a record may do harm."""
    out = tmp_path / "grid"
    words = bench(grid_file(values, tmp_path / "grid.toml"), out, "--workers", "2")
    assert kill(words, out) == -signal.SIGKILL
    finished = subprocess.run(words, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "2 of 2 cells done" in finished.stdout
    assert_same_results(out, whole)


@pytest.mark.slow
def test_a_grid_that_is_killed_five_times_comes_to_the_same_result(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """Every kill comes after new work, at any place of an epoch, and before the last cell."""
    more = values | {"seeds": [0, 1, 2], "train": values["train"] | {"epochs": 20}}
    states = run_grid(parse_grid(more), tmp_path / "whole", workers=2)
    assert [state.state for state in states] == ["done"] * 6, [s.error for s in states]
    out, draw = tmp_path / "grid", random.Random(3)
    words = bench(grid_file(more, tmp_path / "grid.toml"), out, "--workers", "2")
    codes = [kill(words, out, draw.uniform(0.0, 0.3)) for _ in range(5)]
    assert codes == [-signal.SIGKILL] * 5
    assert [record.status for record in records(out).values()] != ["done"] * 6
    finished = subprocess.run(words, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "6 of 6 cells done" in finished.stdout
    assert_same_results(out, tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_grid_leaves_no_process_and_goes_on(
    values: dict[str, Any], tmp_path: Path, signum: int
) -> None:
    """Cells write a checkpoint and end; the program says how to go on, its exit code what came."""
    file = grid_file(values | {"train": values["train"] | {"epochs": 60}}, tmp_path / "grid.toml")
    out = tmp_path / "grid"
    cells = interrupt(bench(file, out), out, signum)
    assert cells or not Path("/proc").is_dir()
    assert not [pid for pid in cells if Path(f"/proc/{pid}").exists()]


# --- search --------------------------------------------------------------------------------------


def test_a_search_gives_the_cells_their_settings(values: dict[str, Any], tmp_path: Path) -> None:
    """The same number of trials each, on noisy rows; the record says what was found."""
    space = {"learning_rate": [1e-5, 2e-2]}
    tune = {"trials": 2, "share": 0.25, "space": {"plain": space}}
    methods = {"plain": {"name": "CrossEntropy", "tune": "lora"}}
    changed = values | {"methods": methods, "tune": tune, "noise": ["none"]}
    (state,) = run_grid(parse_grid(changed), tmp_path / "grid", workers=2)
    assert state.state == "done", state.error
    trials = [RunRecord.read(path.parent)
              for path in sorted((tmp_path / "grid").glob("trials/*/record.json"))]  # fmt: skip
    assert [trial.data["validation"] for trial in trials] == ["noisy", "noisy"]
    assert all("test_rows" not in trial.data for trial in trials)
    record = RunRecord.read(state.folder)
    rates = {trial.metrics["validation_accuracy"]: trial.spec["method"]["learning_rate"]
             for trial in trials}  # fmt: skip
    assert record.spec["method"]["learning_rate"] == rates[max(rates)]
    assert record.search["trials"] == 2
    assert record.search["best"] == {"learning_rate": rates[max(rates)]}
    assert record.search["score"] == max(rates)
    spent = [trial.timings["total_s"] for trial in trials]
    assert record.search["seconds"] == pytest.approx(sum(spent))
    assert (record.data["rows"], record.data["validation"]) == (40, "none")
    before = dataclasses.replace(record, search=record.search | {"trials": 1})
    before.write(state.folder)  # as a smaller search that found the same would have left it
    run_grid(parse_grid(changed), tmp_path / "grid")
    assert RunRecord.read(state.folder) == record


# --- places --------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_refused(
    values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files but no grid"):
        run_grid(parse_grid(values), tmp_path)
    with pytest.raises(InputError, match="is a file"):
        run_grid(parse_grid(values), tmp_path / "notes.txt")
    with pytest.raises(InputError, match="workers must be 1 or more, got 0"):
        run_grid(parse_grid(values), tmp_path / "grid", workers=0)
    with pytest.raises(InputError, match="--workers 2 is for this machine; with --ray"):
        run_grid(parse_grid(values), tmp_path / "grid", workers=2, ray="auto")
    assert not (tmp_path / "grid").exists()
    with pytest.raises(InputError, match=r"cannot read the grid \S+: Is a directory$"):
        read_grid(tmp_path)


def test_the_command_lists_runs_and_reports_failures(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code tells a script whether all cells are there."""
    data = {"missing": {"data": str(tmp_path / "no.csv")}}
    file = grid_file(values | {"data": data}, tmp_path / "grid.toml")
    assert cli.main(["bench", str(file), "--list"]) == 2
    listed = capsys.readouterr()
    assert "symmetric:0.3 plain seed 0" in listed.out
    assert "2 cells; seconds" in listed.out
    (error,) = listed.err.splitlines()
    assert f"missing: {tmp_path / 'no.csv'}; paths start" in error
    assert cli.main(["bench", str(grid_file(values, tmp_path / "whole.toml")), "--list"]) == 0
    assert not capsys.readouterr().err
    assert cli.main(["bench", str(file), "--out", str(tmp_path / "grid")]) == 1
    assert capsys.readouterr().out.count("FAILED") == 2
    assert cli.main(["bench", str(tmp_path / "no.toml"), "--out", "x"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_cells_run_on_a_ray_cluster(values: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """A cluster gives the results of this machine, bit for bit."""
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    file = grid_file(values, tmp_path / "grid.toml")
    out = tmp_path / "grid"
    done = python(
        "-m", "noiseproof", "bench", str(file), "--out", str(out), "--ray", "local",
        timeout=300, RAY_USAGE_STATS_ENABLED="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_results(out, whole)


def test_an_address_that_is_none_is_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    """A typing mistake ended in a traceback of Ray."""
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    with pytest.raises(InputError, match=r"--ray foo: .*; expected auto, local or the HOST:PORT"):
        run_grid(parse_grid(values), tmp_path / "grid", ray="foo")


def test_an_interrupted_grid_on_a_ray_cluster_goes_on(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal here is a cancelled task there, which must write its checkpoint all the same."""
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    methods = {"plain": values["methods"]["plain"]}
    longer = values | {"methods": methods, "train": values["train"] | {"epochs": 60}}
    out = tmp_path / "grid"
    words = bench(grid_file(longer, tmp_path / "grid.toml"), out, "--ray", "local")
    interrupt(words, out, signal.SIGTERM)
    assert list(out.glob("cells/*/checkpoints/*.safetensors"))
    finished = subprocess.run(words, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    run_grid(parse_grid(longer), tmp_path / "whole")
    assert_same_results(out, tmp_path / "whole")


def test_grids_can_be_run_from_python_by_public_names() -> None:
    """What the command line does had no names of its own."""
    assert (noiseproof.read_grid, noiseproof.run_grid) == (read_grid, run_grid)
    assert noiseproof.run_peer is run_peer


def test_run_cell_skips_what_another_process_finished(
    whole: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    """On a cluster two machines may be given the same cell."""
    cell = parse_grid(values).cells[0]
    folder = whole / "cells" / cell.folder()
    before = (folder / "record.json").stat().st_mtime_ns
    run_cell(cell, folder, lambda words: None)
    assert (folder / "record.json").stat().st_mtime_ns == before
