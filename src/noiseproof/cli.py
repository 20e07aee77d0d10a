"""The command line. The same names as in Python; every error of the user is one line and code 2."""

from __future__ import annotations

import json
import re
import sys
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from noiseproof import __version__
from noiseproof.errors import InputError, unknown_name

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from noiseproof.benchmark import Board, CellState
    from noiseproof.grid import Grid
    from noiseproof.loop import Progress
    from noiseproof.record import RunRecord
    from noiseproof.study import Asked, Survey

PROGRAM = "noiseproof"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when done; 1 when training failed; 2 for a mistake of the user; 128 + signal when
        interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"] and len(words) > 1:
        words = [words[1], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise InputError(unknown_name("command", words[0], COMMANDS))
        with warnings.catch_warnings():
            if not sys.warnoptions:  # what one library tells the programmers of another
                warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = _show_warning
            COMMANDS[words[0]](words[1:])
    except SystemExit as error:  # argparse, after --help
        return int(error.code or 0)
    except InputError as error:
        return _complain(error, 2)
    except FloatingPointError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        again = "; the same command continues" if words[0] in ("bench", "study") else ""
        return _complain(f"interrupted{again}", 130)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if type(error).__name__ != "Interrupted":
            raise
        again = "--resume continues" if words[0] == "fit" else "--overwrite starts anew"
        code = 128 + error.signum  # type: ignore[attr-defined]
        return _complain(f"{error}; the same command with {again}", code)
    return 0


def overview() -> str:
    """The help of the program: commands and what they do."""
    lines = [
        f"{PROGRAM} {__version__}: fine-tune pre-trained models on labels you cannot trust",
        "",
        f"usage: {PROGRAM} COMMAND ... ({PROGRAM} COMMAND --help tells more)",
        "",
    ]
    for name, command in COMMANDS.items():
        first = (command.__doc__ or "").splitlines()[0].rstrip(".")
        lines.append(f"  {name:10s}{first}")
    return "\n".join(lines)


# --- commands ------------------------------------------------------------------------------------


def fit(words: list[str]) -> None:
    """Fine-tune a model on a table with doubtful labels.

    example: noiseproof fit tickets.csv --label intent --method CleaR --out runs/tickets
    """
    from argparse import SUPPRESS

    from noiseproof.cards import field_meanings
    from noiseproof.engine import TrainSettings
    from noiseproof.finetune import run_job
    from noiseproof.job import OPT_IN, Job

    words, configs = _take_configs(words)
    start = "--data="  # in a config; on the command line it has no name
    data = next((word[len(start) :] for word, _ in configs[::-1] if word.startswith(start)), None)
    configs = [(word, path) for word, path in configs if not word.startswith(start)]
    words, preset = _method_words([word for word, _ in configs] + words)
    words, ood = _ood_words(words)
    parser = _parser("fit", "DATA --out RUN [options]", fit.__doc__)
    meanings, hints = field_meanings(Job), get_type_hints(Job)
    parser.add_argument(
        "data", type=str | None, nargs="?", default=data, metavar="DATA", help=meanings["data"]
    )
    flat = [item for item in fields(Job) if item.name not in ("data", "method", "train")]
    for item in flat:
        hint = str | None if hints[item.name] is Any else hints[item.name]
        flag: dict[str, Any] = {"nargs": "?", "const": True} if hint is bool else {}
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=hint,
            default=item.default,
            help=SUPPRESS if item.name in OPT_IN else meanings[item.name],
            **flag,
        )
    parser.add_argument("--out", type=str, required=True, help="Folder of the run.")
    parser.add_argument(
        "--resume", action="store_true", help="Continue the run in --out from its last checkpoint."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace the run in --out.")
    parser.add_argument("--config", type=str, help="YAML, TOML or JSON file with these settings.")
    _add_fields(
        parser, preset, "method", "method",
        f"--method NAME or NAME:PRESET, such as CleaR:fast, and its settings --method.NAME; "
        f"'{PROGRAM} methods {preset.name}' lists them.",
    )  # fmt: skip
    _add_fields(parser, TrainSettings(), "train", "the training loop")
    _check_configs(parser, configs)
    given = _parse(parser, words)
    if given.data is None:
        raise InputError(f"DATA is missing; usage: {parser.usage}")
    if given.resume and given.overwrite:
        raise InputError("--resume continues a run, --overwrite replaces it; give one of them")
    job = Job(
        data=given.data,
        method=_made(preset, given.method),
        train=_made(TrainSettings(), given.train),
        **{item.name: getattr(given, item.name) for item in flat} | {"test_ood": ood},
    )
    with _Display() as display:
        result = run_job(
            job, out=given.out, resume=given.resume, overwrite=given.overwrite, report=display
        )
    if _is_main():
        _print_result(result.record, Path(given.out))


def predict(words: list[str]) -> None:
    """Label new rows with the model of a run.

    example: noiseproof predict runs/tickets new.csv --out predictions.csv
    """
    parser = _parser("predict", "RUN DATA --out FILE [options]", predict.__doc__)
    parser.add_argument("run", type=str, metavar="RUN", help="Folder that fit wrote.")
    parser.add_argument("data", type=str, metavar="DATA",
                        help="Rows with the columns of the training data.")  # fmt: skip
    parser.add_argument("--out", type=str, required=True, help="CSV, TSV, JSONL or Parquet file.")
    parser.add_argument("--text", type=str | None, help="Text column, if it has another name.")
    parser.add_argument("--features", type=str | None,
                        help="Columns of features, if they have other names.")  # fmt: skip
    parser.add_argument("--image", type=str | None,
                        help="Column of images, if it has another name.")  # fmt: skip
    parser.add_argument("--on-bad-image", type=str | None,
                        help="error, or skip (such rows get no label).")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int | None,
                        help="Longest response of a language model.")  # fmt: skip
    parser.add_argument("--split", type=str, default="train", help="Split of a hub data set.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the output file.")
    given = _parse(parser, words)
    from noiseproof.prediction import predict as predict_rows
    from noiseproof.tables import check_writable, write_table

    check_writable(given.out, overwrite=given.overwrite)
    names = ("text", "features", "image", "on_bad_image", "max_new_tokens", "split")
    table = predict_rows(given.run, given.data, **{name: getattr(given, name) for name in names})
    write_table(table, given.out, overwrite=given.overwrite)
    print(f"{len(table)} rows labelled: {given.out}")


def audit(words: list[str]) -> None:
    """List the rows whose label looks wrong, and say how far to trust the list.

    Nothing is trained. Of a finished run it takes the rows and labels again, and what its model
    says of them.

    example: noiseproof audit tickets.csv --label intent --out suspects.csv
    """
    parser = _parser("audit", "DATA|RUN --out FILE [options]", audit.__doc__)
    add = parser.add_argument
    add("source", type=str, metavar="DATA|RUN", help="Training rows as for fit, or a run's folder.")
    add("--out", type=str, required=True, help="CSV, TSV, JSONL or Parquet file.")
    add("--all", action="store_true", help="Write every row, not the suspicious ones alone.")
    add("--neighbours", type=int, default=20, help="Nearest rows that are asked.")
    add("--seed", type=int, default=0, help="Of the errors that are planted as a test.")
    for name, meaning in AUDITED.items():
        add(f"--{name.replace('_', '-')}", type=str | None, help=meaning)
    add("--sample", type=int | None, help="Audit so many rows only.")
    add("--overwrite", action="store_true", help="Replace the output file.")
    given = _parse(parser, words)
    from noiseproof.auditing import audit as audit_rows
    from noiseproof.tables import check_writable, write_table

    check_writable(given.out, overwrite=given.overwrite)
    asked = {name: getattr(given, name) for name in (*AUDITED, "sample")}
    settings = {name: value for name, value in asked.items() if value is not None}
    found = audit_rows(given.source, neighbours=given.neighbours, seed=given.seed, **settings)
    table = found.table if given.all else found.suspects
    write_table(table, given.out, overwrite=given.overwrite)
    _print_numbers(found.summary)
    print(found.verdict)
    print(f"{len(table)} rows, worst first: {given.out}")


AUDITED = {
    "label": "Column of the labels; label unless given.",
    "text": "Text column, or two of them; text unless given.",
    "clean_label": "Column of the true labels, to measure the audit.",
    "row_id": "Column that names the rows.",
    "drop_label": "Leave rows with this label out.",
    "task": "Kind of row: text, features or image.",
    "features": "Features: an array, or columns.",
    "image": "Column of images.",
    "on_bad_image": "error, or skip.",
    "model": "Encoder whose features judge; minilm for texts.",
    "noise": "Noise to inject first, such as symmetric:0.2, to measure the audit.",
    "split": "Split of a hub data set or of an archive.",
}
"""Fields of a job that an audit takes, in few words."""


def corrupt(words: list[str]) -> None:
    """Make the labels of a table wrong on purpose.

    example: noiseproof corrupt tickets.csv --label intent --noise pairflip:0.4 --out noisy.csv
    """
    parser = _parser("corrupt", "DATA --noise SPEC --out FILE [options]", corrupt.__doc__)
    parser.add_argument("data", type=str, metavar="DATA", help="Rows whose labels are right.")
    parser.add_argument("--noise", type=str, required=True, help="Such as symmetric:0.4.")
    parser.add_argument("--out", type=str, required=True, help="CSV, TSV, JSONL or Parquet file.")
    parser.add_argument("--label", type=str, default="label", help="Column of the labels.")
    parser.add_argument("--clean-label", type=str, default="clean_label",
                        help="New column that keeps the right labels; <foreign> where no class "
                        "is right.")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise.")
    parser.add_argument("--task", type=str, default="text", help="Kind of the rows.")
    parser.add_argument("--text", type=str, default="text",
                        help="Text column or columns, for instance and openset noise.")  # fmt: skip
    parser.add_argument("--features", type=str, default="features",
                        help="Columns of features, for instance and openset noise.")  # fmt: skip
    parser.add_argument("--image", type=str, default="image",
                        help="Column of images, for instance and openset noise.")  # fmt: skip
    parser.add_argument("--model", type=str | None,
                        help="Encoder for instance-dependent noise; minilm for texts.")  # fmt: skip
    parser.add_argument("--noise-pool", type=str | None, help="Foreign rows for open-set noise.")
    parser.add_argument("--transition-out", type=str | None,
                        help="JSON file for the realised transition matrix.")  # fmt: skip
    parser.add_argument("--split", type=str, default="train", help="Split of a hub data set.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the output files.")
    given = _parse(parser, words)
    from noiseproof.corruption import corrupt_table
    from noiseproof.noise import save_transition
    from noiseproof.tables import WRITABLE, check_writable, write_archive, write_table

    archive = Path(given.data).suffix.lower() == ".npz"
    suffixes = (".npz",) if archive else WRITABLE
    check_writable(given.out, overwrite=given.overwrite, suffixes=suffixes)
    matrix_file = given.transition_out
    if matrix_file is not None:
        _check_matrix_file(Path(matrix_file).expanduser(), given.overwrite)
    names = ("label", "seed", "task", "text", "features", "image", "clean_label", "model",
             "noise_pool", "split", "out")  # fmt: skip
    table, corruption = corrupt_table(
        given.data, given.noise, **{name: getattr(given, name) for name in names}
    )
    if archive:
        write_archive(table, given.out, overwrite=given.overwrite)
    else:
        write_table(table.frame, given.out, overwrite=given.overwrite)
    if matrix_file is not None:
        save_transition(Path(matrix_file).expanduser(), corruption.transition)
    changed = int(corruption.mask.sum())
    texts = ""
    if "text_changed" in corruption.extras:
        texts = f"texts of {int(corruption.extras['text_changed'].sum())} rows corrupted, "
    print(
        f"{texts}{changed} of {len(table)} rows changed "
        f"(realised rate {corruption.noise_rate:.4f}, "
        f"asked {corruption.spec}, seed {corruption.seed}): {given.out}"
    )


def bench(words: list[str]) -> None:
    """Run a grid of models, data sets, noise, methods and seeds.

    The same command continues a grid that was stopped; finished cells are skipped.

    example: noiseproof bench tickets.toml --out runs/grid --workers 2
    """
    parser = _parser("bench", "GRID --out FOLDER [options]", bench.__doc__)
    parser.add_argument("grid", type=str, metavar="GRID", help="TOML file of the grid.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the grid.")
    parser.add_argument("--workers", type=int, default=1,
                        help="Cells at a time; they share the processors.")  # fmt: skip
    parser.add_argument("--ray", type=str | None, metavar="ADDRESS",
                        help="Run the cells on Ray: an address, auto, or local.")  # fmt: skip
    parser.add_argument("--only", type=str | None, metavar="PART",
                        help="Parts of the grid to run, with commas between.")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="List the cells and run nothing.")
    given = _parse(parser, words)
    from noiseproof.grid import read_grid

    only = [name.strip() for name in (given.only or "").split(",") if name.strip()]
    grid = read_grid(Path(given.grid), only)
    if given.list:
        _list_cells(grid)
        return
    states = _run_cells(grid, Path(given.out), given.workers, given.ray)
    print(f"see them with '{PROGRAM} report {given.out} --out report.html'")
    if any(state.state == "failed" for state in states):
        raise SystemExit(1)


def study(words: list[str]) -> None:
    """Test a claim of a paper: a grid of runs, and one page on what they say.

    Without a name it lists the studies. The same command continues a study that was stopped.

    example: noiseproof study peft-under-noise tickets.csv --label intent --out runs/study
    """
    parser = _parser("study", "[NAME [DATA]] --out FOLDER [options]", study.__doc__)
    add = parser.add_argument
    add("name", type=str | None, nargs="?", metavar="NAME", help="The study.")
    add("data", type=str | None, nargs="?", metavar="DATA",
        help="Training rows, as for fit; by default the messages of the demo.")  # fmt: skip
    add("--out", type=str | None, help="Folder of the study; by default runs/NAME.")
    add("--size", type=str, default="default", help="small, default or full.")
    add("--model", type=str, nargs="+", default=["minilm"],
        help="Pre-trained models; spectrum: also runs.")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[], help="Seeds; by default those of the size.")
    add("--noise", type=str, nargs="+", default=[],
        help="Kinds of noise; the first gets the closer looks.")  # fmt: skip
    add("--parts", type=str, nargs="+", default=[],
        help="What is compared, such as families; by default all.")  # fmt: skip
    add("--text", type=str, default="text", help="Text column, or two of them.")
    add("--label", type=str, default="label", help="Column of the given labels.")
    add("--task", type=str, default="text", help="Kind of row: text, image or features.")
    add("--column", type=str | None, help="Column or array of images or features.")
    add("--preprocess", type=str, default="code", help="spectrum: none, l2, code or column.")
    add("--test", type=str | None, help="Test rows: a file, or a share to split off.")
    add("--clean-label", type=str | None, help="Column of the true labels of noisy data.")
    add("--sample", type=int | None, help="Training rows; by default by the size.")
    add("--epochs", type=int | None, help="Epochs of a run; by default by the size.")
    add("--batch-size", type=int | None, help="Rows per step.")
    add("--device", type=str, default="auto", help="auto or cpu.")
    add("--workers", type=int, default=1, help="Cells at a time; they share the processors.")
    add("--list", action="store_true", help="List the cells and run nothing.")
    add("--pages", action="store_true",
        help="Write the pages from the cells that are done, and run nothing.")  # fmt: skip
    given = _parse(parser, words)
    from noiseproof.study import STUDIES, Asked, Survey, find_study, plan, write_pages

    if given.name is None:
        for name, one in STUDIES.items():
            print(f"{name:20s}{one.summary}")
        return
    chosen, fields_of = find_study(given.name), [item.name for item in fields(Asked)]
    asked = {name: getattr(given, name) for name in fields_of if name != "models"}
    asked |= {name: tuple(asked[name]) for name in ("seeds", "noise", "parts")}
    asked["models"] = tuple(given.model)
    out = Path(given.out or f"runs/{given.name}").expanduser()
    if isinstance(chosen, Survey):
        _survey(chosen, Asked(**asked), out, given)
        return
    states = []
    if not given.pages:
        grid = plan(chosen, Asked(**asked))
        if given.list:
            _list_cells(grid)
            return
        print(f"{len(grid.cells)} cells, {grid.cost}: {out}", file=sys.stderr)
        states = _run_cells(grid, out, given.workers)
    for path in write_pages(chosen, out):
        print(path)
    if any(state.state == "failed" for state in states):
        raise SystemExit(1)


def _survey(chosen: Survey, asked: Asked, out: Path, given: Any) -> None:
    """Measure, unless the pages alone are asked for, and write the pages."""
    if given.list:
        raise InputError(f"{chosen.name} is no grid of cells; leave --list out")
    if not given.pages:
        chosen.measure(asked, out)
    for path in chosen.pages(out):
        print(path)


def report(words: list[str]) -> None:
    """Show runs as a page, as Markdown, or as a table with one row per run.

    example: noiseproof report runs/tickets --out report.html
    """
    parser = _parser("report", "RUN ... --out FILE [options]", report.__doc__)
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN",
                        help="Folders of runs or of grids, searched at any depth.")  # fmt: skip
    parser.add_argument("--out", type=str, required=True, help="HTML, Markdown or CSV file.")
    parser.add_argument("--baseline", type=str | None,
                        help="Method to compare with, by its name in the report.")  # fmt: skip
    parser.add_argument("--title", type=str | None, help="Heading of the report.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the output file.")
    given = _parse(parser, words)
    from noiseproof.report import report as write_report

    out = write_report(given.runs, given.out, baseline=given.baseline, title=given.title,
                       overwrite=given.overwrite)  # fmt: skip
    print(f"report: {out}")


def methods(words: list[str]) -> None:
    """List the methods, or show the card and settings of one.

    example: noiseproof methods CleaR
    """
    parser = _parser("methods", "[NAME]", methods.__doc__)
    parser.add_argument("name", type=str | None, nargs="?", metavar="NAME", help="Method to show.")
    given = _parse(parser, words)
    from rich.console import Console
    from rich.table import Column, Table

    from noiseproof import cards
    from noiseproof.methods import METHODS, find_method

    console = Console()
    if given.name is None:
        table = Table("method", "what it does", "presets", box=None, pad_edge=False)
        for name, method in METHODS.items():
            table.add_row(name, cards.summary(method), ", ".join(method.presets()))
        console.print(table)
        return
    chosen = find_method(given.name)
    console.print(cards.card(chosen), highlight=False, markup=False, soft_wrap=True)
    table = Table(Column("setting", no_wrap=True), "default", "meaning", box=None, pad_edge=False)
    for setting in cards.settings(chosen):
        table.add_row(f"--method.{setting.name}", setting.default, setting.meaning)
    console.print()
    console.print(table)
    console.print(f"\ntasks: {', '.join(chosen.tasks)}", highlight=False)
    console.print(f"presets: {', '.join(chosen.presets())}", highlight=False, soft_wrap=True)


def demo(words: list[str]) -> None:
    """Plain LoRA against CleaR on customer messages with 40 % wrong labels, in minutes.

    example: noiseproof demo --out runs/demo
    """
    parser = _parser("demo", "[--out FOLDER]", demo.__doc__)
    parser.add_argument("--out", type=str, default="runs/demo", help="Folder for the two runs.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the runs in --out.")
    given = _parse(parser, words)
    from rich.console import Console
    from rich.table import Table

    from noiseproof.demo import COLUMNS, run_demo

    with _Display() as display:
        rows = run_demo(Path(given.out), overwrite=given.overwrite, report=display)
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    suspects = Path(given.out) / "CleaR" / "suspects.csv"
    console.print(f"runs: {given.out} (suspicious rows: {suspects})", markup=False, soft_wrap=True)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    command.__name__: command
    for command in (fit, predict, audit, corrupt, bench, study, report, methods, demo)
}


# --- grids ---------------------------------------------------------------------------------------


def _list_cells(grid: Grid) -> None:
    """Print the cells of a grid and what they will cost."""
    for cell in grid.cells:
        print(cell.title)
    print(f"{len(grid.cells)} cells{f'; {grid.cost}' if grid.cost else ''}")


def _run_cells(grid: Grid, out: Path, workers: int, ray: str | None = None) -> list[CellState]:
    """Run a grid with a display; print what failed."""
    import signal

    from noiseproof.benchmark import run_grid

    signals = (signal.SIGINT, signal.SIGTERM)  # SIGINT is ignored in what a script puts behind &
    before = [signal.signal(one, signal.default_int_handler) for one in signals]
    try:
        with _GridDisplay() as display:
            states = run_grid(grid, out, workers=workers, ray=ray, show=display)
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
    failed = [state for state in states if state.state == "failed"]
    for state in failed:
        print(f"FAILED {state.cell.title}: {state.error}")
    print(f"{len(states) - len(failed)} of {len(states)} cells done: {out}")
    return states


# --- parsing -------------------------------------------------------------------------------------


def _parser(name: str, usage: str, doc: str | None) -> ArgumentParser:
    from argparse import RawDescriptionHelpFormatter
    from inspect import cleandoc

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Options with their meaning and default, without Python's types."""

        def __init__(self, prog: str, **settings: Any) -> None:
            settings = {"max_help_position": 32} | settings
            super().__init__(prog, **settings)  # type: ignore[no-untyped-call]

        def _get_default_metavar_for_optional(self, action: Any) -> str:
            """The last word of the name: the whole would take a line of its own."""
            return str(action.dest).rpartition(".")[2].rpartition("_")[2].upper()

        def _get_help_string(self, action: Any) -> str:
            text, value = str(action.help or ""), action.default
            untold = value is None or value is False or value == []
            if untold or not action.option_strings or action.dest == "help":
                return text
            values = value if isinstance(value, list) else [value]
            return f"{text} (default: {' '.join(map(_default, values))})"

    return ArgumentParser(
        prog=f"{PROGRAM} {name}",
        usage=f"{PROGRAM} {name} {usage}",
        description=cleandoc(doc or ""),
        formatter_class=Help,
        exit_on_error=False,
        allow_abbrev=False,
    )


def _add_fields(
    parser: ArgumentParser,
    settings: Any,
    prefix: str,
    title: str | None,
    instead: str | None = None,
) -> None:
    """Options ``--prefix.field`` for a settings object, nested ones with more dots.

    Args:
        parser: Gets the options.
        settings: An object whose values are the defaults.
        prefix: First part of the names.
        title: Of the group in the help; None makes no group.
        instead: What the help says in place of the options.
    """
    from jsonargparse import SUPPRESS

    from noiseproof.cards import field_meanings

    group = parser if title is None else parser.add_argument_group(title, instead)
    meanings, hints = field_meanings(type(settings)), get_type_hints(type(settings))
    for item in fields(settings):
        value, name = getattr(settings, item.name), f"{prefix}.{item.name}"
        if is_dataclass(value):
            nested = None if instead else f"{title}: {item.name}"
            _add_fields(parser, value, name, nested, instead)
            continue
        meaning = SUPPRESS if instead else meanings.get(item.name, "")
        group.add_argument(f"--{name}", type=hints[item.name], default=value, help=meaning)


def _made(settings: Any, given: Any) -> Any:
    """A settings object of the same class with the parsed values."""
    values = {}
    for item in fields(settings):
        old, new = getattr(settings, item.name), getattr(given, item.name)
        values[item.name] = _made(old, new) if is_dataclass(old) else new
    return type(settings)(**values)


def _parse(parser: ArgumentParser, words: list[str]) -> Any:
    """Parse, and turn what jsonargparse says of a mistake into one plain line."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(words)
    except (ArgumentError, TypeError, KeyError) as error:
        raise InputError(_plain(parser, words, " ".join(str(error).split()))) from error


def _plain(parser: ArgumentParser, words: list[str], text: str) -> str:
    """What a message of jsonargparse means: expected, got, what to do."""
    usage = f"usage: {parser.usage}"
    if found := re.search(r"nrecognized arguments?: (\S+)", text):
        word = found[1].partition("=")[0]
        if not word.startswith("--"):
            return f"unexpected argument {found[1]!r}; {usage}"
        return unknown_name("option", word, _options_like(parser, word))
    if found := re.search(r"arguments are required: (.+)", text):
        names = [name.strip() for name in found[1].split(",")]
        shown = {action.dest: _shown(action) for action in parser._actions}
        missing = " and ".join(shown.get(name, name) for name in names)
        return f"{missing} {'is' if len(names) == 1 else 'are'} missing; {usage}"
    found = re.match(r'Parser key "([^"]+)"|argument (\S+): ', text)
    name = (found[1] or found[2]) if found else None
    for action in parser._actions:
        if name not in (action.dest, *action.option_strings):
            continue
        expected = _expected(getattr(action, "_typehint", None) or action.type or str)
        if "expected one argument" in text:
            return f"{_shown(action)} needs a value: {expected}"
        return f"{_shown(action)}: expected {expected}, got {_given(action, words)!r}"
    return f"{text} (see {parser.prog} --help)"


def _expected(hint: Any) -> str:
    """A type in plain words.

    >>> _expected(int | None), _expected(Literal["a", "b"])
    ('a whole number or null', 'one of a, b')
    """
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_expected(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, "null" if hint is types.NoneType else "a JSON list")


def _default(value: object) -> str:
    """A default as one types it, in one line.

    >>> _default(True), _default(0.5)
    ('true', '0.5')
    """
    return json.dumps(value) if isinstance(value, bool) else str(value).replace("\n", "\\n")


def _shown(action: Any) -> str:
    """An option or argument as the user writes it."""
    return str(action.option_strings[-1] if action.option_strings else action.metavar)


def _given(action: Any, words: Sequence[str]) -> str:
    """The value that the words give an option; the last one counts."""
    found = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in action.option_strings:
            found = value if equals else following
    return found


def _options_like(parser: ArgumentParser, word: str) -> list[str]:
    """The options of the group that a name belongs to: ``--method.``, ``--train.`` or neither."""
    from argparse import SUPPRESS

    grouped = word.startswith(("--method.", "--train."))  # the help does not list the method's
    told = [action for action in parser._actions if grouped or action.help != SUPPRESS]
    options = [option for action in told for option in action.option_strings]
    start = word.split(".")[0] + "."
    near = [option for option in options if option.startswith(start)]
    return near or [o for o in options if o[:2] == "--" and "." not in o and "_" not in o]


def _check_matrix_file(path: Path, overwrite: bool) -> None:
    """Refuse a place for the transition matrix that cannot be written or read again."""
    if path.suffix.lower() != ".json":
        raise InputError(f"--transition-out: expected the name of a .json file, got {str(path)!r}")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another --transition-out or give --overwrite")


# --- config files --------------------------------------------------------------------------------


def _take_configs(words: list[str]) -> tuple[list[str], list[tuple[str, Path]]]:
    """Take every ``--config FILE`` out of the words: the rest, and each setting with its file.

    The settings go before the words, which therefore win.
    """
    rest, files = _take(words, "--config", "a file: YAML, TOML or JSON")
    settings: list[tuple[str, Path]] = []
    for file in files:
        path = Path(file).expanduser()
        settings += [(setting, path) for setting in _option_words(_read_config(path))]
    return rest, settings


def _check_configs(parser: ArgumentParser, settings: Sequence[tuple[str, Path]]) -> None:
    """Name the file of a setting that does not exist."""
    options = {option for action in parser._actions for option in action.option_strings}
    no_settings = {"--help", "--config"}
    for word, path in settings:
        option = word.partition("=")[0]
        if option not in options - no_settings and option != "--method":
            near = _options_like(parser, option)
            known = [name[2:] for name in near if name not in no_settings]
            raise InputError(f"config {path}: {unknown_name('setting', option[2:], known)}")


def _read_config(path: Path) -> dict[str, Any]:
    """A YAML, TOML or JSON file of settings; of a ``record.json`` its specification."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            if sys.version_info >= (3, 11):
                import tomllib
            else:
                import tomli as tomllib
            values: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"cannot read config {path}: {error.strerror or error}") from error
    except Exception as error:  # each format has its own, and YAML's values raise more
        kind = {".toml": "TOML", ".json": "JSON"}.get(path.suffix, "YAML")
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"line {mark.line + 1}: {problem}" if mark and problem else str(error)
        raise InputError(f"config {path} is not valid {kind}: {reason}") from error
    values = values.get("spec", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise InputError(
            f"config {path} must hold names and values such as 'label: intent', "
            f"got {type(values).__name__}"
        )
    return values


def _option_words(values: dict[Any, Any], prefix: str = "") -> list[str]:
    """Nested settings as command-line words ``--name=value``."""
    words: list[str] = []
    for key, value in values.items():
        name = str(key)
        if name == "name" and prefix == "method.":
            words.insert(0, f"--method={value}")
        elif name == "test_ood" and isinstance(value, dict) and not prefix:
            words += [f"--test-ood={key}={file}" for key, file in value.items()]
        elif isinstance(value, dict):
            words += _option_words(value, f"{prefix}{name}.")
        elif name in ("resume", "overwrite") and not prefix:
            words += [f"--{name}"] if value else []
        elif name == "text" and isinstance(value, list) and not prefix:
            words.append(f"--text={','.join(map(str, value))}")
        elif value is not None or prefix:  # outside the groups null is every default
            dashed = name if prefix or "." in name else name.replace("_", "-")
            shown = value if isinstance(value, str) else json.dumps(value, default=str)
            words.append(f"--{prefix}{dashed}={shown}")
    return words


def _method_words(words: list[str]) -> tuple[list[str], Any]:
    """Take ``--method NAME[:PRESET]`` out of the words; the rest, and the preset's settings."""
    from noiseproof.methods import CleaR, find_method

    chosen: Any = CleaR()
    rest, given = _take(words, "--method", "a name; noiseproof methods lists them")
    for name in given:
        method, _, preset = name.partition(":")
        chosen = find_method(method).preset(preset or "default")
    return rest, chosen


def _ood_words(words: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """Take every ``--test-ood NAME=FILE`` out of the words; the rest, and the files by name.

    Of two with one name the last counts: what a config says goes first.
    """
    rest, given = _take(words, "--test-ood", "NAME=FILE")
    files: dict[str, str] = {}
    for word in given:
        name, equals, file = word.partition("=")
        if not (name and equals and file):
            raise InputError(f"--test-ood: expected NAME=FILE, got {word!r}")
        files[name] = file
    return rest, files or None


def _take(words: list[str], option: str, what: str) -> tuple[list[str], list[str]]:
    """Take every ``option VALUE`` and ``option=VALUE`` out of the words: the rest, the values."""
    rest: list[str] = []
    values: list[str] = []
    following = iter(words)
    for word in following:
        name, equals, value = word.partition("=")
        if name != option:
            rest.append(word)
            continue
        value = value if equals else next(following, "")
        if not value or value.startswith("-"):
            raise InputError(f"{option} needs {what}")
        values.append(value)
    return rest, values


# --- showing -------------------------------------------------------------------------------------


def _complain(message: object, code: int) -> int:
    if _is_main():
        print(f"{PROGRAM}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Our own warnings are one line for the user; those of libraries stay as Python shows them."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        _complain(f"warning: {message}", 0)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _is_main() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


class _Display:
    """A progress bar and a line per epoch, on standard error."""

    def __enter__(self) -> _Display:
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
            disable=not self.console.is_terminal or not _is_main(),
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
        if progress.history is not None and _is_main():
            shown = {
                name: progress.history[name]
                for name in ("loss", "test_accuracy", "validation_accuracy", "memorization",
                             "clean_share")
                if progress.history.get(name) is not None
            }  # fmt: skip
            numbers = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            self.console.print(f"{label}  rows {progress.history['rows']}  {numbers}",
                               highlight=False)  # fmt: skip


class _GridDisplay:
    """Running cells and the time left, on standard error; a line for every cell that ends."""

    def __enter__(self) -> _GridDisplay:
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


def _print_numbers(numbers: Mapping[str, Any]) -> None:
    """Print what is known by name, a line each."""
    from rich.console import Console
    from rich.table import Table

    table = Table("result", "", box=None, pad_edge=False, show_header=False)
    for name, value in numbers.items():
        if value is not None:
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def _print_result(record: RunRecord, folder: Path) -> None:
    from rich.console import Console

    _print_numbers(record.metrics | {"total_s": f"{record.timings['total_s']:.1f}"})
    console = Console()
    for name, meaning in (
        ("model", "the trained model"),
        ("suspects.csv", "rows whose label looks wrong, worst first"),
        ("samples.parquet", "every training row"),
        ("record.json", "what was asked, done and found"),
    ):
        console.print(f"{folder / name}: {meaning}", highlight=False, markup=False, soft_wrap=True)
