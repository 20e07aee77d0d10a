"""The commands."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from noiseproof import __version__
from noiseproof.cli.showing import (
    PROGRAM,
    Display,
    GridDisplay,
    complain,
    is_main,
    print_numbers,
    print_result,
    show_warning,
)
from noiseproof.cli.words import (
    add_fields,
    as_typed,
    check_configs,
    check_matrix_file,
    method_words,
    new_parser,
    ood_words,
    parse,
    settings_of,
    take_configs,
    test_noise_words,
)
from noiseproof.errors import InputError, path_of, unknown_name

if TYPE_CHECKING:
    from noiseproof.benchmark import CellState
    from noiseproof.grid import Grid
    from noiseproof.study import Asked, Survey
    from noiseproof.tables import Table


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
            warnings.showwarning = show_warning
            COMMANDS[words[0]](words[1:])
    except SystemExit as error:  # argparse, after --help
        return int(error.code or 0)
    except InputError as error:
        return complain(error, 2)
    except FloatingPointError as error:
        return complain(error, 1)
    except KeyboardInterrupt as error:
        again = "; the same command continues" if words[0] in ("bench", "study") else ""
        signum = error.args[0] if error.args else signal.SIGINT  # see `_interrupt`
        return complain(f"interrupted{again}", 128 + signum)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if type(error).__name__ != "Interrupted":
            raise
        again = "--resume continues" if words[0] == "fit" else "--overwrite starts anew"
        code = 128 + error.signum  # type: ignore[attr-defined]
        return complain(f"{error}; the same command with {again}", code)
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


def fit(words: list[str]) -> None:
    """Fine-tune a model on a table with doubtful labels.

    example: noiseproof fit tickets.csv --label intent --method CleaR --out runs/tickets
    """
    from argparse import SUPPRESS

    from noiseproof.cards import field_meanings
    from noiseproof.engine import TrainSettings
    from noiseproof.finetune import run_job
    from noiseproof.job import OPT_IN, Job

    words, configs = take_configs(words)
    start = "--data="  # in a config; on the command line it has no name
    data = next((word[len(start) :] for word, _ in configs[::-1] if word.startswith(start)), None)
    configs = [(word, path) for word, path in configs if not word.startswith(start)]
    words, preset = method_words([word for word, _ in configs] + words)
    words, ood = ood_words(words)
    words, test_noise = test_noise_words(words)
    parser = new_parser("fit", "DATA --out RUN [options]", fit.__doc__)
    meanings, hints = field_meanings(Job), get_type_hints(Job)
    parser.add_argument(
        "data", type=str | None, nargs="?", default=data, metavar="DATA", help=meanings["data"]
    )
    flat = {item.name: item for item in fields(Job) if item.name not in NOT_FLAT}
    for title, names in FIT_GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            hint = str | None if hints[name] is Any or name in REPEATED else hints[name]
            flag: dict[str, Any] = {"nargs": "?", "const": True} if hint is bool else {}
            if name in REPEATED:
                flag["metavar"] = REPEATED[name]
            group.add_argument(
                f"--{name.replace('_', '-')}",
                type=hint,
                default=flat[name].default,
                help=SUPPRESS if name in OPT_IN else meanings[name],
                **flag,
            )
    add = parser.add_argument_group("output").add_argument
    add("--out", type=str, required=True, metavar="FOLDER", help="Folder of the run.")
    add("--resume", action="store_true", help="Continue the run in --out from its last checkpoint.")
    add("--overwrite", action="store_true", help="Replace the run in --out.")
    add("--config", type=str, help="YAML, TOML or JSON file with these settings.")
    add_fields(
        parser, preset, "method", "method",
        f"--method NAME or NAME:PRESET, such as CleaR:fast, and its settings --method.NAME; "
        f"'{PROGRAM} methods {preset.name}' lists them.",
    )  # fmt: skip
    add_fields(parser, TrainSettings(), "train", "the training loop")
    check_configs(parser, configs)
    with as_typed(parser, configs):
        given = parse(parser, words)
        if given.data is None:
            raise InputError(f"DATA is missing; usage: {parser.usage}")
        if given.resume and given.overwrite:
            raise InputError("--resume continues a run, --overwrite replaces it; give one of them")
        job = Job(
            data=given.data,
            method=settings_of(preset, given.method),
            train=settings_of(TrainSettings(), given.train),
            **{name: getattr(given, name) for name in flat}
            | {"test_ood": ood, "test_noise": test_noise},
        )
        if given.resume and not (path_of(given.out) / "record.json").exists():
            complain(f"{given.out} holds no run to resume; a new one starts there", 0)
    with as_typed(parser, configs), Display() as display:
        result = run_job(
            job, out=given.out, resume=given.resume, overwrite=given.overwrite, report=display
        )
    if is_main():
        print_result(result.record, Path(given.out))


NOT_FLAT = ("data", "method", "train")
REPEATED = {"test_ood": "NAME=FILE", "test_noise": "SPEC"}
"""Options that may be given several times; they are taken out before the others are parsed."""
FIT_GROUPS = {
    "data": (
        *("text", "label", "test", "validation", "validation_labels", "clean_label", "row_id"),
        *("label_names", "drop_label", "sample", "split", "task", "test_ood"),
    ),
    "model": ("model", "merge"),
    "noise": ("noise", "noise_seed", "noise_pool", "test_noise"),
    "features": ("features", "standardize"),
    "images": ("image", "image_size", "augment", "on_bad_image", "image_workers"),
    "language models": (
        *("template", "max_new_tokens", "choice_score", "answer_pattern", "answer_rows"),
    ),
    "studies": ("only_clean_rows", "probe_gradients", "measure_distortion"),
}
"""Fields of a job as the help of fit shows them; those of the studies it does not show."""


def predict(words: list[str]) -> None:
    """Label new rows with the model of a run.

    example: noiseproof predict runs/tickets new.csv --out predictions.csv
    """
    parser = new_parser("predict", "RUN DATA --out FILE [options]", predict.__doc__)
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
    parser.add_argument("--inference-mode", type=str | None,
                        help="Of LoPE: none, mask, renorm or compensate.")  # fmt: skip
    parser.add_argument("--split", type=str, default="train", help="Split of a hub data set.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the output file.")
    given = parse(parser, words)
    from noiseproof.prediction import predict as predict_rows
    from noiseproof.tables import check_writable, write_table

    asked = given.as_dict()
    out, overwrite = asked.pop("out"), asked.pop("overwrite")
    check_writable(out, overwrite=overwrite)
    with as_typed(parser):
        table = predict_rows(**asked)
    write_table(table, out, overwrite=overwrite)
    print(f"{len(table)} rows labelled: {out}")


def audit(words: list[str]) -> None:
    """List the rows whose label looks wrong, and say how far to trust the list.

    Nothing is trained. Labels are judged by the features of an encoder; responses by a language
    model, with and without their prompts. Of a finished run it takes the rows and labels again, and
    what its model says of them.

    example: noiseproof audit tickets.csv --label intent --out suspects.csv
    """
    parser = new_parser("audit", "DATA|RUN --out FILE [options]", audit.__doc__)
    add = parser.add_argument
    add("source", type=str, metavar="DATA|RUN", help="Training rows as for fit, or a run's folder.")
    add("--out", type=str, required=True, help="CSV, TSV, JSONL or Parquet file.")
    add("--all", action="store_true", help="Write every row, not the suspicious ones alone.")
    add("--neighbours", type=int, default=20,
        help="How many of the rows most alike a label is compared with.")  # fmt: skip
    add("--seed", type=int, default=0,
        help="Seed of the errors that are planted to test the audit.")  # fmt: skip
    for name, meaning in AUDITED.items():
        add(f"--{name.replace('_', '-')}", type=str | None, help=meaning)
    add("--sample", type=int | None, help="Audit this many rows only.")
    add("--transition-out", type=str | None,
        help="JSON file for the transition matrix, where the true labels are known.")  # fmt: skip
    add("--overwrite", action="store_true", help="Replace the output file.")
    given = parse(parser, words)
    from noiseproof.auditing import audit as audit_rows
    from noiseproof.noise import save_transition
    from noiseproof.tables import check_writable, write_table

    check_writable(given.out, overwrite=given.overwrite)
    matrix_file = given.transition_out
    if matrix_file is not None:
        check_matrix_file(path_of(matrix_file), given.overwrite)
    asked = {name: getattr(given, name) for name in (*AUDITED, "sample")}
    settings = {name: value for name, value in asked.items() if value is not None}
    with as_typed(parser):
        found = audit_rows(given.source, neighbours=given.neighbours, seed=given.seed, **settings)
    if matrix_file is not None:
        if found.transition is None:
            if "classes" not in found.summary:
                raise InputError("--transition-out: responses have no classes; leave it out")
            raise InputError("--transition-out needs the true labels; give --clean-label")
        save_transition(path_of(matrix_file), found.transition)
    table = found.table if given.all else found.suspects
    write_table(table, given.out, overwrite=given.overwrite)
    print_numbers(found.summary)
    print(found.verdict)
    print(f"{len(table)} rows, worst first: {given.out}")


AUDITED = {
    "label": "Column of the labels. (default: label)",
    "text": "Text column, or two of them. (default: text)",
    "clean_label": "Column of the true labels, by which the audit itself is measured.",
    "row_id": "Column that names the rows.",
    "drop_label": "Leave rows with this label out.",
    "task": "Kind of row: text, features, image or causal-lm. (default: text)",
    "features": "Features: an array, or columns. (default: features)",
    "image": "Column of images. (default: image)",
    "on_bad_image": "What is done with images that cannot be read. (default: error)",
    "template": "Text around the {prompt} of a language model; chat has its own.",
    "model": "Encoder whose features are compared, or language model that reads the responses. "
    "(default for texts: minilm)",
    "noise": "Noise to inject first, such as symmetric:0.2, to measure the audit.",
    "split": "Split of a hub data set or of an archive.",
}
"""Fields of a job that an audit takes, in few words."""


def corrupt(words: list[str]) -> None:
    """Make the labels of a table wrong on purpose.

    example: noiseproof corrupt tickets.csv --label intent --noise pairflip:0.4 --out noisy.csv
    """
    from noiseproof.noise import NOISE_MODELS, save_transition
    from noiseproof.tasks import RowSettings

    specs = [f"- {kind.example}: {cleandoc(kind.__doc__ or '').splitlines()[0]}"
             for kind in NOISE_MODELS.values()]  # fmt: skip
    told = "\n".join(["SPEC is one of these, or several joined by +:", "", *specs])
    doc = cleandoc(corrupt.__doc__ or "").replace("\nexample:", f"\n{told}\n\nexample:")
    parser = new_parser("corrupt", "DATA --noise SPEC --out FILE [options]", doc)
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
    for name, told in CORRUPT_ROWS.items():
        setting = f"--{name.replace('_', '-')}"
        kind, default = get_type_hints(RowSettings)[name], getattr(RowSettings, name)
        parser.add_argument(setting, type=kind, default=default, help=told)
    parser.add_argument("--model", type=str | None,
                        help="Encoder for instance-dependent noise; minilm for texts.")  # fmt: skip
    parser.add_argument("--noise-pool", type=str | None, help="Foreign rows for open-set noise.")
    parser.add_argument("--transition-out", type=str | None,
                        help="JSON file for the realised transition matrix.")  # fmt: skip
    parser.add_argument("--split", type=str, default="train", help="Split of a hub data set.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the output files.")
    given = parse(parser, words)
    from noiseproof.corruption import corrupt_table

    _check_like(given)
    matrix_file = given.transition_out
    if matrix_file is not None:
        check_matrix_file(path_of(matrix_file), given.overwrite)
    names = ("label", "seed", "task", "text", "features", "image", *CORRUPT_ROWS, "clean_label",
             "model", "noise_pool", "split", "out")  # fmt: skip
    with as_typed(parser):
        table, corruption = corrupt_table(
            given.data, given.noise, **{name: getattr(given, name) for name in names}
        )
    _write_like(given, table)
    if matrix_file is not None:
        save_transition(path_of(matrix_file), corruption.transition)
    changed = int(corruption.mask.sum())
    texts = ""
    if "text_changed" in corruption.extras:
        texts = f"texts of {int(corruption.extras['text_changed'].sum())} rows corrupted, "
    print(
        f"{texts}{changed} of {len(table)} rows changed "
        f"(realised rate {corruption.noise_rate:.4f}, "
        f"asked {corruption.spec}, seed {corruption.seed}): {given.out}"
    )


CORRUPT_ROWS = {
    "max_length": "Tokens of a text that instance noise looks at.",
    "standardize": "Whether instance noise looks at features brought to one scale.",
    "image_size": "Side of the square images that instance noise looks at.",
    "image_workers": "Processes that decode images for instance noise.",
}
"""How `corrupt` reads rows beside their columns, in few words."""


def relabel(words: list[str]) -> None:
    """Put a reviewed list of suspicious rows into effect.

    REVIEWED is a list that audit or fit wrote, after an edit: another label replaces the one in
    DATA, an empty label drops the row, and rows that are not in the list stay as they are.

    example: noiseproof relabel tickets.csv suspects.csv --label intent --out better.csv
    """
    parser = new_parser("relabel", "DATA REVIEWED --out FILE [options]", relabel.__doc__)
    add = parser.add_argument
    add("data", type=str, metavar="DATA", help="Rows as for fit.")
    add("reviewed", type=str, metavar="REVIEWED", help="List with the columns row_id and label.")
    add("--out", type=str, required=True, help="CSV, TSV, JSONL or Parquet file.")
    add("--label", type=str, default="label", help="Column of the labels in DATA.")
    add("--row-id", type=str | None, help="Column of DATA that names the rows, as given to fit.")
    add("--accept", action="store_true",
        help="Take suggested_label instead: leave in the list what you agree with.")  # fmt: skip
    add("--new-labels", action="store_true", help="Accept labels that DATA does not have.")
    add("--task", type=str, default="text", help="Kind of the rows.")
    add("--image", type=str, default="image", help="Column of images, whose paths are kept valid.")
    add("--split", type=str, default="train", help="Split of a hub data set or of an archive.")
    add("--overwrite", action="store_true", help="Replace the output file.")
    given = parse(parser, words)
    from noiseproof.relabelling import relabel_table

    _check_like(given)
    names = ("label", "row_id", "accept", "new_labels", "task", "image", "split", "out")
    with as_typed(parser):
        table, done = relabel_table(
            given.data, given.reviewed, **{name: getattr(given, name) for name in names}
        )
    _write_like(given, table)
    print(
        f"{done.listed} rows reviewed, {len(done.changed)} labels changed, "
        f"{len(done.dropped)} rows dropped: {given.out} ({len(table)} rows)"
    )


def bench(words: list[str]) -> None:
    """Run a grid of models, data sets, noise, methods and seeds.

    The same command continues a grid that was stopped; finished cells are skipped.

    example: noiseproof bench tickets.toml --out runs/grid --workers 2
    """
    parser = new_parser("bench", "GRID --out FOLDER [options]", bench.__doc__)
    parser.add_argument("grid", type=str, metavar="GRID", help="TOML file of the grid.")
    parser.add_argument("--out", type=str | None, help="Folder of the grid.")
    parser.add_argument(
        "--workers",
        type=int | None,
        help="Cells at a time, by default 1; they share the processors.",
    )
    parser.add_argument("--ray", type=str | None, metavar="ADDRESS",
                        help="Run the cells on Ray: an address, auto, or local; its processors "
                        "say how many at a time.")  # fmt: skip
    parser.add_argument("--only", type=str | None, metavar="PART",
                        help="Parts of the grid to run, with commas between.")  # fmt: skip
    parser.add_argument("--list", action="store_true",
                        help="List the cells and run nothing; exit code 2 if a file of rows is "
                        "missing.")  # fmt: skip
    given = parse(parser, words)
    from noiseproof.grid import missing_files, read_grid

    only = [name.strip() for name in (given.only or "").split(",") if name.strip()]
    grid = read_grid(path_of(given.grid), only)
    if given.list:
        _list_cells(grid)
        if missing := missing_files(grid):
            raise InputError(
                f"missing: {', '.join(missing)}; paths start at the folder the command runs in"
            )
        return
    if given.out is None:
        raise InputError(f"--out is missing; usage: {parser.usage}")
    states = _run_cells(grid, path_of(given.out), given.workers, given.ray)
    print(f"see them with '{PROGRAM} report {given.out} --out report.html'")
    if any(state.state == "failed" for state in states):
        raise SystemExit(1)


def study(words: list[str]) -> None:
    """Test a claim of a paper: a grid of runs, and one page on what they say.

    Without a name it lists the studies. The same command continues a study that was stopped.

    example: noiseproof study peft-under-noise tickets.csv --label intent --out runs/study
    """
    parser = new_parser("study", "[NAME [DATA]] --out FOLDER [options]", study.__doc__)
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
    given = parse(parser, words)
    from noiseproof.study import STUDIES, Asked, Survey, find_study, plan, write_pages

    if given.name is None:
        for name, one in STUDIES.items():
            print(f"{name:20s}{one.summary}")
        return
    chosen, fields_of = find_study(given.name), [item.name for item in fields(Asked)]
    asked = {name: getattr(given, name) for name in fields_of if name != "models"}
    asked |= {name: tuple(asked[name]) for name in ("seeds", "noise", "parts")}
    asked["models"] = tuple(given.model)
    out = path_of(given.out or f"runs/{given.name}")
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
    parser = new_parser("report", "RUN ... --out FILE [options]", report.__doc__)
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN",
                        help="Folders of runs or of grids, searched at any depth.")  # fmt: skip
    parser.add_argument("--out", type=str, required=True, help="HTML, Markdown or CSV file.")
    parser.add_argument("--baseline", type=str | None,
                        help="Method to compare with, by its name in the report.")  # fmt: skip
    parser.add_argument("--title", type=str | None, help="Heading of the report.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the output file.")
    given = parse(parser, words)
    from noiseproof.report import report as write_report

    runs, out = [path_of(run) for run in given.runs], path_of(given.out)
    write_report(runs, out, baseline=given.baseline, title=given.title, overwrite=given.overwrite)
    print(f"report: {out}")


def methods(words: list[str]) -> None:
    """List the methods, or show the card and settings of one, or of one of its presets.

    example: noiseproof methods CleaR
    """
    parser = new_parser("methods", "[NAME]", methods.__doc__)
    parser.add_argument("name", type=str | None, nargs="?", metavar="NAME",
                        help="Method to show, or METHOD:PRESET.")  # fmt: skip
    given = parse(parser, words)
    from rich.console import Console
    from rich.table import Column, Table

    from noiseproof import cards
    from noiseproof.methods import METHODS, method_of

    console = Console()
    if given.name is None:
        table = Table("method", "what it does", "presets", box=None, pad_edge=False)
        for name, method in METHODS.items():
            table.add_row(name, cards.summary(method), ", ".join(method.presets()))
        console.print(table)
        return
    made, preset = method_of(given.name), given.name.partition(":")[2] or "default"
    console.print(cards.card(type(made)), highlight=False, markup=False, soft_wrap=True)
    table = Table(Column("setting", no_wrap=True), preset, "meaning", box=None, pad_edge=False)
    for setting in cards.settings(type(made), preset=made):
        table.add_row(f"--method.{setting.name}", setting.default, setting.meaning)
    console.print()
    console.print(table)
    console.print(f"\ntasks: {', '.join(made.tasks)}", highlight=False)
    console.print(f"presets: {', '.join(made.presets())}", highlight=False, soft_wrap=True)


def demo(words: list[str]) -> None:
    """Plain LoRA against CleaR on customer messages with 40 % wrong labels, in minutes.

    example: noiseproof demo --out runs/demo
    """
    parser = new_parser("demo", "[--out FOLDER]", demo.__doc__)
    parser.add_argument("--out", type=str, default="runs/demo", help="Folder for the two runs.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the runs in --out.")
    given = parse(parser, words)
    from rich.console import Console
    from rich.table import Table

    from noiseproof.demo import COLUMNS, run_demo

    with Display() as display:
        rows = run_demo(path_of(given.out), overwrite=given.overwrite, report=display)
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    suspects = Path(given.out) / "CleaR" / "suspects.csv"
    console.print(f"runs: {given.out} (suspicious rows: {suspects})", markup=False, soft_wrap=True)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    command.__name__: command
    for command in (fit, predict, audit, relabel, corrupt, bench, study, report, methods, demo)
}


def _check_like(given: Any) -> None:
    """The output can be written, and is an archive where DATA is one."""
    from noiseproof.tables import WRITABLE, check_writable

    archive = Path(given.data).suffix.lower() == ".npz"
    suffixes = (".npz",) if archive else WRITABLE
    check_writable(given.out, overwrite=given.overwrite, suffixes=suffixes)


def _write_like(given: Any, table: Table) -> None:
    """Write a changed table as what DATA was, see `_check_like`."""
    from noiseproof.tables import write_archive, write_table

    if Path(given.out).suffix.lower() == ".npz":
        write_archive(table, given.out, overwrite=given.overwrite)
    else:
        write_table(table.frame, given.out, overwrite=given.overwrite)


def _interrupt(signum: int, frame: Any) -> None:
    """Handle a signal as Python handles Ctrl-C, and say which it was."""
    raise KeyboardInterrupt(signum)


def _list_cells(grid: Grid) -> None:
    """Print the cells of a grid and what they will cost."""
    for cell in grid.cells:
        print(cell.title)
    print(f"{len(grid.cells)} cells{f'; {grid.cost}' if grid.cost else ''}")


def _run_cells(
    grid: Grid, out: Path, workers: int | None, ray: str | None = None
) -> list[CellState]:
    """Run a grid with a display; print what failed."""
    from noiseproof.benchmark import run_grid

    signals = (signal.SIGINT, signal.SIGTERM)  # SIGINT is ignored in what a script puts behind &
    before = [signal.signal(one, _interrupt) for one in signals]
    try:
        with GridDisplay() as display:
            states = run_grid(grid, out, workers=workers, ray=ray, show=display)
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)
    failed = [state for state in states if state.state == "failed"]
    for state in failed:
        print(f"FAILED {state.cell.title}: {state.error}")
    print(f"{len(states) - len(failed)} of {len(states)} cells done: {out}")
    return states
