"""Run a grid of fine-tunings, one process a cell, and write its table.

    python benchmarks/run.py benchmarks/foundation.toml --out runs/foundation --workers 2
    python benchmarks/run.py benchmarks/foundation.toml --out runs/foundation --table TABLE.md

A cell is `noiseproof fit`; its folder is ``OUT/<data>/<noise>/<method>/<seed>``. Finished cells are
skipped and unfinished ones resumed, so the same command continues after any interruption. The table
is made from the records alone and can be asked for at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib


def cells(grid: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination that the grid asks for, in the order of the file, seeds outermost."""
    found = []
    for table in grid["tables"]:
        data = grid["data"][table["data"]]
        for seed in table["seeds"]:
            for noise in table["noise"]:
                for method in table["methods"]:
                    settings = {**grid["methods"][method]}
                    found.append(
                        {
                            "table": table["name"],
                            "data": table["data"],
                            "noise": noise,
                            "method": method,
                            "seed": seed,
                            "name": settings.pop("name"),
                            "settings": settings,
                            "fit": {**data, **table.get("fit", {})},
                            "train": {**grid["train"], **table.get("train", {})},
                        }
                    )
    return found


def folder_of(out: Path, cell: dict[str, Any]) -> Path:
    """Where a cell's run lies."""
    parts = (cell["table"], cell["noise"], cell["method"], f"seed-{cell['seed']}")
    return out.joinpath(*(re.sub(r"[^\w.]+", "-", part) for part in parts))


def record_of(folder: Path) -> dict[str, Any] | None:
    """The record of a finished cell."""
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if record["status"] == "done" else None


def run_cell(out: Path, cell: dict[str, Any], threads: int) -> str:
    """Run one cell unless it is finished."""
    folder = folder_of(out, cell)
    if record_of(folder):
        return f"done before: {folder}"
    fit = dict(cell["fit"])
    words = [sys.executable, "-m", "noiseproof", "fit", fit.pop("data"), "--out", str(folder)]
    words += ["--resume", "--noise", cell["noise"], "--method", cell["name"]]
    for name, value in fit.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in cell["settings"].items():
        words += [f"--method.{name}", str(value)]
    for name, value in {**cell["train"], "seed": cell["seed"]}.items():
        words += [f"--train.{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"FAILED ({done.returncode}): {folder}: {done.stderr.strip().splitlines()[-1:]}"
    return f"done: {folder}"


def table(out: Path, grid: dict[str, Any]) -> str:
    """The tables as Markdown: mean over seeds, and the spread where there are several."""
    lines: list[str] = []
    for wanted in grid["tables"]:
        lines += [f"### {wanted['title']}", ""]
        lines += [
            "| noise | method | seeds | last epoch | best epoch | memorised | clean fit "
            "| detection AUROC | minutes |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        own = cells({**grid, "tables": [wanted]})
        for noise in wanted["noise"]:
            for method in wanted["methods"]:
                chosen = [c for c in own if c["noise"] == noise and c["method"] == method]
                records = [record_of(folder_of(out, cell)) for cell in chosen]
                finished = [record for record in records if record]
                lines.append(_row(noise, method, finished, len(chosen)))
        lines.append("")
    return "\n".join(lines)


def _row(noise: str, method: str, records: list[dict[str, Any]], asked: int) -> str:
    if not records:
        return f"| {noise} | {method} | 0 of {asked} | | | | | | |"

    def shown(name: str, factor: float = 100) -> str:
        values = [r["metrics"].get(name) for r in records]
        real = [factor * value for value in values if value is not None]
        if not real:
            return "-"
        spread = f" ± {statistics.stdev(real):.1f}" if len(real) > 1 else ""
        return f"{statistics.mean(real):.1f}{spread}"

    names = ("test_accuracy", "test_accuracy_best", "memorization", "clean_fit")
    minutes = statistics.mean(record["timings"]["total_s"] for record in records) / 60
    cells_ = " | ".join(shown(name) for name in names)
    auroc = shown("detection_auroc")
    return (
        f"| {noise} | {method} | {len(records)} of {asked} | {cells_} | {auroc} | {minutes:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid")
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", help="name of one table of the grid")
    parser.add_argument("--table", help="write the tables to this file and run nothing")
    args = parser.parse_args()
    grid = tomllib.loads(Path(args.grid).read_text(encoding="utf-8"))
    if args.only:
        grid["tables"] = [one for one in grid["tables"] if one["name"] == args.only]
    out = Path(args.out)
    if args.table:
        Path(args.table).write_text(table(out, grid), encoding="utf-8")
        return
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    with ThreadPoolExecutor(args.workers) as pool:
        for line in pool.map(lambda cell: run_cell(out, cell, threads), cells(grid)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
