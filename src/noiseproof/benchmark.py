"""Run the cells of a grid: each in a process of its own, resumable, on this machine or on Ray.

    OUT/grid.json          title, cost, cells with their labels and folders
    OUT/cells/NAME/        a run each, as `noiseproof fit` leaves it
    OUT/trials/NAME/       runs of the search for settings

The identifier of a cell is computed from its settings alone. A finished cell is skipped, an
unfinished one continued from its checkpoint, a failed one tried again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from noiseproof.errors import InputError, path_of
from noiseproof.finetune import run_job
from noiseproof.grid import Cell, Grid, Search, with_best
from noiseproof.loop import Progress
from noiseproof.peers import run_peer
from noiseproof.record import RunRecord, make_writable, write_atomic


@dataclass
class CellState:
    """Where a cell stands.

    Attributes:
        cell: What it runs.
        folder: Its run.
        state: waiting, running, done or failed.
        started: Clock (s) when it began, in this run of the grid.
        seconds: What it took.
        progress: Stage, epoch and loss in a few words.
        error: One line, when failed.
    """

    cell: Cell
    folder: Path
    state: str = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    progress: str = ""
    error: str = ""


@dataclass
class Board:
    """What a display shows: all cells of the present phase.

    Attributes:
        title: Of the grid.
        phase: ``search`` or ``cells``.
        states: One a cell, in order.
        workers: Cells at a time.
    """

    title: str
    phase: str
    workers: int
    states: list[CellState] = field(default_factory=list)

    def count(self, state: str) -> int:
        """How many cells are in a state."""
        return sum(one.state == state for one in self.states)

    def seconds_left(self) -> float | None:
        """Estimate from the cells of the same method, else from all; None before the first."""
        took: dict[str, list[float]] = {}
        for one in self.states:
            if one.state == "done":
                took.setdefault(one.cell.labels["method"], []).append(one.seconds)
        if not took:
            return None
        means = {name: sum(values) / len(values) for name, values in took.items()}
        mean = sum(means.values()) / len(means)
        left = 0.0
        for one in self.states:
            if one.state in ("waiting", "running"):
                expected = means.get(one.cell.labels["method"], mean)
                spent = time.monotonic() - one.started if one.state == "running" else 0.0
                left += max(expected - spent, 0.0)
        return left / self.workers


Show = Callable[[Board, CellState], None]
"""Called when a cell begins, reports progress, or ends."""


def run_grid(
    grid: Grid,
    out: str | Path,
    *,
    workers: int | None = None,
    ray: str | None = None,
    show: Show | None = None,
) -> list[CellState]:
    """Run what is not finished of a grid; see the top of this file.

    Args:
        grid: Made by `noiseproof.grid.read_grid`.
        out: Folder of the grid; the same folder continues it.
        workers: Cells at a time; they share the processors evenly. None is one.
        ray: Address of a Ray cluster, or auto; the cells run there instead, as many at a time as
            its processors allow. The folder must be one that all its machines see.
        show: Told of every change.

    Returns:
        The cells in the order of the grid; failed ones are among them, with their error.

    Raises:
        InputError: The folder cannot be used, a search had no success, or ``workers`` were given
            with ``ray``.
        KeyboardInterrupt: Running cells have written a checkpoint; the same call continues.
    """
    folder = path_of(out)
    if workers is not None and ray:
        raise InputError(
            f"--workers {workers} is for this machine; with --ray the processors of the cluster "
            "decide, OMP_NUM_THREADS of them a cell: leave --workers out"
        )
    if workers is not None and workers < 1:
        raise InputError(f"--workers must be 1 or more, got {workers}")
    _prepare(folder)
    cells = list(grid.cells)
    runner = _ray_runner(ray) if ray else _Local(workers or 1)
    try:
        if grid.searches:
            trials = {cell.folder(): cell for one in grid.searches.values() for cell in one.trials}
            board = _board(grid, "search", folder / "trials", list(trials.values()),
                           runner.workers)  # fmt: skip
            _run_cells(board, runner, show)
            for place, search in grid.searches.items():
                cells[place] = _settled(folder, cells[place], search)
        board = _board(grid, "cells", folder / "cells", cells, runner.workers)
        _write_summary(folder, grid, cells)
        _run_cells(board, runner, show)
    finally:
        runner.close()
    return board.states


def _prepare(folder: Path) -> None:
    """Make the folder of a grid, or refuse one that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    known = {"grid.json", "cells", "trials"}
    if folder.is_dir() and any(folder.iterdir()) and not known & set(os.listdir(folder)):
        raise InputError(f"{folder} holds files but no grid; choose another --out")
    make_writable(folder)


def _board(grid: Grid, phase: str, folder: Path, cells: Sequence[Cell], workers: int) -> Board:
    board = Board(grid.title, phase, workers)
    for cell in cells:
        state = CellState(cell, _place(folder, cell))
        _look(state)
        board.states.append(state)
    return board


def _place(folder: Path, cell: Cell) -> Path:
    """The folder of a cell; a run that the grid called by another name before is moved there."""
    place = folder / cell.folder()
    if not place.exists():
        for other in folder.glob(f"*_{cell.id()[:8]}"):
            record = _record(other)
            if record is not None and record.id == cell.id():
                other.rename(place)
                break
    return place


def _look(state: CellState) -> None:
    """Take over what the record of a cell says."""
    record = _record(state.folder)
    if record is None:
        return
    if record.status == "done":
        state.state, state.seconds = "done", record.timings.get("total_s", 0.0)
        told = dict(state.cell.labels), dict(state.cell.search or record.search)
        if (record.labels, record.search) != told:  # the grid says other words of the same run now
            record.labels, record.search = told
            record.write(state.folder)
    elif record.status == "failed":
        state.error = record.error or "failed"


def _record(folder: Path) -> RunRecord | None:
    try:
        return RunRecord.read(folder)
    except InputError:
        return None


def _settled(folder: Path, cell: Cell, search: Search) -> Cell:
    """A cell with the settings that its trials found."""
    ended = [_record(folder / "trials" / trial.folder()) for trial in search.trials]
    scores = [_score(record, search.metric) for record in ended]
    seconds = sum(record.timings.get("total_s", 0.0) for record in ended if record)
    return with_best(cell, search, scores, seconds)


def _score(record: RunRecord | None, metric: str) -> float | None:
    if record is None or record.status != "done":
        return None
    value = record.metrics.get(metric)
    return None if value is None else float(value)


def _all_cells(folder: Path, grid: Grid, chosen: Sequence[Cell]) -> list[Cell]:
    """The cells of the file: those that run, and those of other parts that have their settings."""
    if grid.whole is None:
        return list(chosen)
    mine = {cell.id(): settled for cell, settled in zip(grid.cells, chosen, strict=True)}
    found = []
    for place, cell in enumerate(grid.whole.cells):
        search = grid.whole.searches.get(place)
        if cell.id() in mine:
            found.append(mine[cell.id()])
        elif search is None:
            found.append(cell)
        elif all(_record(folder / "trials" / one.folder()) for one in search.trials):
            with suppress(InputError):  # all its trials failed
                found.append(_settled(folder, cell, search))
    return found


def _write_summary(folder: Path, grid: Grid, chosen: Sequence[Cell]) -> None:
    """Write ``grid.json``, which tells reports the cells of this grid and nothing of the past."""
    cells = folder / "cells"
    values = {
        "title": grid.title,
        "description": grid.description,
        "cost": grid.cost,
        "baseline": grid.baseline,
        "file": grid.file,
        "cells": [
            {"folder": f"cells/{_place(cells, one).name}", "id": one.id(), "labels": one.labels}
            for one in _all_cells(folder, grid, chosen)
        ],
    }
    write_atomic(folder / "grid.json", json.dumps(values, indent=1) + "\n")


# --- running cells -------------------------------------------------------------------------------


class _Runner:
    """Where cells run: starts one, and can end all."""

    workers: int

    def start(self, state: CellState, told: Callable[[str], None]) -> Future[None]:
        """Run a cell; ``told`` gets its progress."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop what runs; running cells write a checkpoint first."""
        raise NotImplementedError


def _run_cells(board: Board, runner: _Runner, show: Show | None) -> None:
    """Run what is not done; a failed cell is recorded and the rest goes on."""
    lock = threading.Lock()

    def tell(state: CellState) -> None:
        if show is not None:
            with lock:
                show(board, state)

    def begin(state: CellState) -> Future[None]:
        state.state, state.started, state.error = "running", time.monotonic(), ""
        tell(state)

        def told(words: str) -> None:
            state.progress = words
            tell(state)

        return runner.start(state, told)

    def end(state: CellState, future: Future[None]) -> None:
        error = future.exception()
        _look(state)
        if state.state != "done":
            state.state = "failed"
            state.error = state.error or str(error or "ended without a record")
            _record_failure(state)
        tell(state)

    waiting = iter([state for state in board.states if state.state == "waiting"])
    running: dict[Future[None], CellState] = {}
    while True:
        for state in waiting:
            running[begin(state)] = state
            if len(running) == runner.workers:
                break
        if not running:
            return
        done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
        for future in done:
            end(running.pop(future), future)


def _record_failure(state: CellState) -> None:
    """Leave a record where a cell ended before, or without, writing that it failed."""
    found = _record(state.folder)
    if found is not None and found.status in ("failed", "interrupted"):
        return
    record = RunRecord(state.cell.spec())
    record.labels, record.search = dict(state.cell.labels), dict(state.cell.search)
    record.status, record.error = "failed", " ".join(state.error.split())
    state.folder.mkdir(parents=True, exist_ok=True)
    record.write(state.folder)


def run_cell(cell: Cell, folder: Path, told: Callable[[str], None]) -> None:
    """Run one cell in this process, unless another process finished it meanwhile.

    Raises:
        Interrupted: A signal came; the run can be continued.
        Exception: Whatever the run raised; it stands in the record too.
    """
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(
        folder.with_name(f".{folder.name}.lock")
    ):  # a killed grid may have left a cell that still runs
        found = _record(folder)
        if found is not None and found.status == "done":
            return
        job, peer = cell.made()
        if peer is not None:
            run_peer(job, peer, out=folder, overwrite=found is not None, labels=cell.labels,
                     search=cell.search)  # fmt: skip
            return
        again = found is not None and found.status in ("running", "interrupted")

        def report(progress: Progress) -> None:
            if progress.history is not None or progress.step % 10 == 1:
                told(f"{progress.stage} {progress.epoch + 1}/{progress.epochs}  "
                     f"loss {progress.loss:.3f}")  # fmt: skip

        run_job(
            job,
            out=folder,
            resume=again,
            overwrite=found is not None and not again,
            report=report,
            labels=cell.labels,
            search=cell.search,
        )


# --- on this machine -----------------------------------------------------------------------------


class _Local(_Runner):
    """A fresh process a cell: its memory and its crash are its own."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pool = ThreadPoolExecutor(workers)
        self.processes: set[subprocess.Popen[str]] = set()
        self.lock, self.closed = threading.Lock(), False  # after `close` no process starts
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
            "TOKENIZERS_PARALLELISM": "true" if workers == 1 else "false",
        }

    def start(self, state: CellState, told: Callable[[str], None]) -> Future[None]:
        """Run a cell in a process of its own."""
        return self.pool.submit(self._run, state, told)

    def _run(self, state: CellState, told: Callable[[str], None]) -> None:
        words = [sys.executable, "-m", "noiseproof.benchmark"]
        pipe = subprocess.PIPE
        errors: list[str] = []
        with self.lock:
            if self.closed:
                return
            process = subprocess.Popen(
                words,
                env=self.environment,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                text=True,
                start_new_session=True,  # Ctrl-C comes to the grid, which tells the cells
            )
            self.processes.add(process)
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            listener = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
            listener.start()
            asked = {"cell": dataclasses.asdict(state.cell), "folder": str(state.folder)}
            try:
                process.stdin.write(json.dumps(asked) + "\n")
                process.stdin.flush()  # stays open: when this process dies, the cell sees its end
            except BrokenPipeError:  # the cell was ended first
                with suppress(BrokenPipeError):
                    process.stdin.close()
            for line in process.stdout:
                if line.startswith(SAID):
                    told(line.removeprefix(SAID).strip())
            code = process.wait()
            listener.join()
        self.processes.discard(process)
        if code:
            reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            said = [line.strip() for line in errors if line.strip()]
            raise RuntimeError(f"{reason}{': ' + said[-1] if said else ''}")

    def close(self) -> None:
        """End the cells, softly."""
        with self.lock:
            self.closed = True
            for process in list(self.processes):
                process.send_signal(signal.SIGTERM)
        self.pool.shutdown(wait=True, cancel_futures=True)


SAID = "progress: "


def _main() -> int:
    """A cell as a process: its description comes as a line on standard input."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()

    def told(words: str) -> None:
        print(f"{SAID}{words}", flush=True)

    try:
        run_cell(Cell(**asked["cell"]), Path(asked["folder"]), told)
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _end_with(parent: IO[str]) -> None:
    """End this process when the one that started it is gone, as if it were killed too."""
    while parent.read(1):
        pass
    os._exit(137)


# --- on a cluster --------------------------------------------------------------------------------


def _ray_runner(address: str) -> _Runner:
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install 'noiseproof[ray]'") from error
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=None if address == "local" else address,
            ignore_reinit_error=True,
            log_to_driver=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"--ray {address}: {told}; expected auto, local or the HOST:PORT of a cluster, such as "
            "'ray start --head' starts"
        ) from error
    if threading.current_thread() is threading.main_thread():  # Ray's own handler would just exit
        signal.signal(signal.SIGTERM, before)
    return _Ray(ray)


class _Ray(_Runner):
    """A Ray task a cell; one processor each, or what ``OMP_NUM_THREADS`` says."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        environment = {"OMP_NUM_THREADS": str(threads)}
        self.task = ray.remote(num_cpus=threads, max_retries=0, max_calls=1)(_ray_cell).options(
            runtime_env={"env_vars": environment}
        )
        self.pending: dict[Any, Future[None]] = {}

    def start(self, state: CellState, told: Callable[[str], None]) -> Future[None]:
        """Send a cell to the cluster."""
        folder = str(state.folder.resolve())
        reference = self.task.remote(dataclasses.asdict(state.cell), folder, os.getcwd())
        future: Future[None] = reference.future()
        self.pending[reference] = future
        return future

    def close(self) -> None:
        """Cancel what runs; Ray interrupts the tasks, which write a checkpoint."""
        for reference, future in self.pending.items():
            if not future.done():
                self.ray.cancel(reference)
        for future in self.pending.values():
            future.exception()
        self.ray.shutdown()


def _ray_cell(cell: dict[str, Any], folder: str, place: str) -> None:
    """Run a cell on a machine of the cluster, in the folder where the grid was started."""
    os.chdir(place)
    run_cell(Cell(**cell), Path(folder), lambda words: None)


if __name__ == "__main__":
    sys.exit(_main())
