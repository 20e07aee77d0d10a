"""Robust for free: the whole job of CleaR against the plain recipe, A B A B in fresh processes.

    python benchmarks/speed.py --data DATA.csv --test TEST.csv --pairs 4 --out speed.json

Each pair runs the plain recipe (``plain_recipe.py``) and then ``noiseproof fit`` with the same
model, rows, epochs, batch size, rank, learning rate and evaluation, each in a process of its own,
start-up and imports included. Ratios are taken within a pair, because the machine's speed drifts;
the ratio of processor time hardly depends on what else the machine does.
Left to itself each side takes its own precision: the Trainer fp32, noiseproof bf16 where the
machine runs it faster. ``--precision`` gives both the same; what ran stands with every number.
DATA and TEST have the column text and one of labels; those of DATA are corrupted here first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VARIANTS = {
    "reuse": ["--method", "CleaR:fast"],
    "one pass": ["--method", "CleaR", "--method.scoring_passes", "1"],
}


def run(words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Seconds, processor seconds and peak memory (MB) of one process and its children."""
    started = time.perf_counter()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(words)}")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "memory_mb": usage.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--label", default="label")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--noise", default="symmetric:0.4")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precision", choices=["bf16", "fp32"])
    parser.add_argument("--variant", choices=list(VARIANTS), default="reuse")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    from noiseproof import corrupt
    from noiseproof.data import read_examples, stratified_sample
    from noiseproof.models import resolve_model
    from noiseproof.tables import read_table, write_table

    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        table, corruption = corrupt(args.data, args.noise, label=args.label)
        examples = read_examples(table, text="text", label=args.label)
        rows = stratified_sample(examples.labels, args.rows, 0)
        train, test = place / "train.csv", place / "test.csv"
        for path, frame in ((train, table.iloc[rows]), (test, read_table(args.test))):
            write_table(frame[["text", args.label]].rename(columns={args.label: "label"}), path)
        common = {
            "epochs": args.epochs,
            "rank": args.rank,
            "learning_rate": args.learning_rate,
            "batch_size": args.batch_size,
        }
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        for number in range(args.pairs):
            fresh = {
                **environment,
                "NOISEPROOF_CACHE": str(place / f"cache{number}"),
                "HF_DATASETS_CACHE": str(place / f"datasets{number}"),
            }
            plain = [sys.executable, str(HERE / "plain_recipe.py"), str(train), str(test)]
            plain += ["--model", resolve_model("minilm"), "--out", str(place / f"plain{number}")]
            for name, value in common.items():
                plain += [f"--{name.replace('_', '-')}", str(value)]
            ours = [sys.executable, "-m", "noiseproof", "fit", str(train), "--test", str(test)]
            ours += ["--out", str(place / f"ours{number}"), *VARIANTS[args.variant]]
            ours += ["--method.rank", str(args.rank), "--train.epochs", str(args.epochs)]
            ours += ["--train.batch_size", str(args.batch_size)]
            ours += ["--method.learning_rate", str(args.learning_rate)]
            if args.precision:
                plain += ["--precision", args.precision]
                ours += ["--train.precision", args.precision]
            pair = {"plain": run(plain, fresh), "clear": run(ours, fresh)}
            result = json.loads((place / f"plain{number}" / "result.json").read_text())
            record = json.loads((place / f"ours{number}" / "record.json").read_text())
            pair["plain"]["test_accuracy"] = result["test_accuracy"]
            pair["clear"]["test_accuracy"] = record["metrics"]["test_accuracy"]
            pair["plain"]["precision"] = result["precision"]
            pair["clear"]["precision"] = record["model"]["precision"]
            pair["clear"] |= record["timings"]
            pair["time_ratio"] = pair["clear"]["seconds"] / pair["plain"]["seconds"]
            pair["cpu_ratio"] = pair["clear"]["cpu_seconds"] / pair["plain"]["cpu_seconds"]
            pair["memory_ratio"] = pair["clear"]["memory_mb"] / pair["plain"]["memory_mb"]
            pairs.append(pair)
            print(json.dumps(pair), flush=True)
    ratios = [pair["time_ratio"] for pair in pairs]
    summary = {
        "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "variant": args.variant,
        "noise_rate": corruption.noise_rate,
        "precision": {side: pairs[0][side]["precision"] for side in ("plain", "clear")},
        "time_ratio_median": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
        "cpu_ratio_median": statistics.median(pair["cpu_ratio"] for pair in pairs),
        "memory_ratio_median": statistics.median(pair["memory_ratio"] for pair in pairs),
        "pairs": pairs,
    }
    Path(args.out).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(
        f"time ratio {summary['time_ratio_median']:.2f} "
        f"(range {min(ratios):.2f} to {max(ratios):.2f}), "
        f"processor time ratio {summary['cpu_ratio_median']:.2f}, "
        f"memory ratio {summary['memory_ratio_median']:.2f}; "
        f"plain recipe in {summary['precision']['plain']}, CleaR in {summary['precision']['clear']}"
    )


if __name__ == "__main__":
    main()
