"""What the command line shows: lines of progress, warnings, results."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noiseproof.benchmark import Board, CellState
    from noiseproof.loop import Progress
    from noiseproof.record import RunRecord


PROGRAM = "noiseproof"


def complain(message: object, code: int) -> int:
    """Say one line on the error stream; give the exit code."""
    if is_main():
        print(f"{PROGRAM}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Our own warnings are one line for the user; those of libraries stay as Python shows them."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        complain(f"warning: {message}", 0)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def is_main() -> bool:
    """Whether this process is the one that talks."""
    import os

    return os.environ.get("RANK", "0") == "0"


class Display:
    """A progress bar and a line per epoch, on standard error."""

    def __enter__(self) -> Display:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal or not is_main(),
        )
        self.task = self.bar.add_task("", total=None, loss=0.0)
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show one step, or one finished epoch."""
        label = f"{progress.stage} {progress.epoch + 1}/{progress.epochs}"
        self.bar.update(
            self.task,
            description=label,
            total=progress.steps,
            completed=progress.step,
            loss=progress.loss,
        )
        if progress.history is not None and is_main():
            shown = {
                name: progress.history[name]
                for name in ("loss", "test_accuracy", "validation_accuracy", "memorization",
                             "clean_share")
                if progress.history.get(name) is not None
            }  # fmt: skip
            numbers = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            self.console.print(f"{label}  rows {progress.history['rows']}  {numbers}",
                               highlight=False)  # fmt: skip


class GridDisplay:
    """Running cells and the time left, on standard error; a line for every cell that ends."""

    def __enter__(self) -> GridDisplay:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True)
        self.live = Live(console=self.console, transient=True, refresh_per_second=4)
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live.is_started:
            self.live.stop()

    def __call__(self, board: Board, state: CellState) -> None:
        """Show the board; one line of its own for a cell that has ended."""
        if state.state in ("done", "failed"):
            mark = state.state if state.state == "done" else f"FAILED ({state.error})"
            done = board.count("done") + board.count("failed")
            self.console.print(
                f"{done}/{len(board.states)}  {_clock(state.seconds)}  {state.cell.title}  {mark}",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
        if self.live.is_started:
            self.live.update(self._board(board))

    def _board(self, board: Board) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        left = board.seconds_left()
        summary = (
            f"{board.title}: {board.phase} {board.count('done')} done, "
            f"{board.count('failed')} failed, {board.count('waiting')} waiting; "
            f"{'time left unknown yet' if left is None else f'about {_clock(left)} left'}"
        )
        table = Table("running", "", "since", box=None, pad_edge=False, show_header=False)
        for one in board.states:
            if one.state == "running":
                since = _clock(time.monotonic() - one.started)
                table.add_row(Text(one.cell.title), Text(one.progress), since)
        return Group(Text(summary), table)


def _clock(seconds: float) -> str:
    """Seconds as 12s, 3m05s or 1h02m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def print_numbers(numbers: Mapping[str, Any]) -> None:
    """Print what is known by name, a line each."""
    from rich.console import Console
    from rich.table import Table

    table = Table("result", "", box=None, pad_edge=False, show_header=False)
    for name, value in numbers.items():
        if value is not None:
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def print_result(record: RunRecord, folder: Path) -> None:
    """The numbers of a run, and where its files are."""
    from rich.console import Console

    print_numbers(record.metrics | {"total_s": f"{record.timings['total_s']:.1f}"})
    console = Console()
    if "test_rows" not in record.data:
        console.print("no test rows: give --test FILE or --test 0.2", highlight=False)
    for name, meaning in (
        ("model", "the trained model"),
        ("suspects.csv", "rows whose label looks wrong, worst first"),
        ("samples.parquet", "every training row"),
        ("record.json", "what was asked, done and found"),
    ):
        console.print(f"{folder / name}: {meaning}", highlight=False, markup=False, soft_wrap=True)
