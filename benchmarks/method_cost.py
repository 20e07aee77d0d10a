"""What one method costs beside another: whole runs, A B A B, each in a fresh process.

    python benchmarks/method_cost.py --data DATA.csv --test TEST.csv --rows 1000 --epochs 4 \\
        --one "--method CrossEntropy --method.tune full" --two "--method TURN" --out cost.json
    python benchmarks/method_cost.py --data DATA.csv --test TEST.csv --probe --out probe.json

``--one`` and ``--two`` are words for ``noiseproof fit``. Start-up, encoding, evaluation after every
epoch and saving are included. Ratios are taken within a pair, because the machine's speed drifts;
the ratio of processor time hardly depends on what else the machine does.
``--probe`` times TURN's probe instead: the pass that encodes the rows, once, and an epoch of the
probe on what it left in the cache, in processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from speed import run

import noiseproof
from noiseproof.methods import TURN


def time_pairs(args: argparse.Namespace, place: Path) -> dict[str, object]:
    """Both methods in turns: the numbers of every run, and ratios of two over one."""
    pairs = []
    for number in range(args.pairs):
        pair = {}
        for name in ("one", "two"):
            out = place / f"{name}{number}"
            words = [sys.executable, "-m", "noiseproof", "fit", args.data, "--test", args.test]
            words += ["--out", str(out), "--sample", str(args.rows), "--noise", args.noise]
            words += ["--train.epochs", str(args.epochs), *shlex.split(getattr(args, name))]
            fresh = {"NOISEPROOF_CACHE": str(place / f"cache{name}{number}")}
            pair[name] = run(words, {**os.environ, **fresh})
            record = json.loads((out / "record.json").read_text(encoding="utf-8"))
            pair[name]["test_accuracy"] = record["metrics"]["test_accuracy"]
        pairs.append(pair)
        print(json.dumps(pair), flush=True)

    def ratio(what: str) -> float:
        return statistics.median(pair["two"][what] / pair["one"][what] for pair in pairs)

    return {
        "time_ratio": ratio("seconds"),
        "cpu_ratio": ratio("cpu_seconds"),
        "memory_ratio": ratio("memory_mb"),
        "pairs": pairs,
    }


def time_probe(args: argparse.Namespace, place: Path) -> dict[str, object]:
    """Processor seconds of encoding the rows once, and of an epoch of the probe on the cache."""
    os.environ["NOISEPROOF_CACHE"] = str(place / "cache")

    def fit(epochs: int) -> float:
        result = noiseproof.fit(
            args.data,
            method=TURN(tune_epochs=0, probe_epochs=epochs, precondition="off"),
            sample=args.rows,
            noise=args.noise,
            train=noiseproof.TrainSettings(evaluate="end"),
        )
        return float(result.record.timings["cpu_s"])

    fit(1)  # imports, and whatever else only the first run pays
    os.environ["NOISEPROOF_CACHE"] = str(place / "empty")
    cold, warm, long = fit(1), fit(1), fit(1 + args.epochs)
    epoch = (long - warm) / args.epochs
    return {"encode_s": cold - warm, "epoch_s": epoch, "encode_over_epoch": (cold - warm) / epoch}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--noise", default="symmetric:0.4")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--one", default="--method CrossEntropy --method.tune full")
    parser.add_argument("--two", default="--method TURN")
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = (time_probe if args.probe else time_pairs)(args, Path(folder))
    found = {"command": shlex.join(["python", "benchmarks/method_cost.py", *sys.argv[1:]])} | found
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in found.items() if name != "pairs"}))


if __name__ == "__main__":
    main()
