"""Time and extra memory of the loss mixture on many losses.

python benchmarks/mixture.py --rows 10000000 --out mixture.json
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch

from noiseproof.mixture import LossMixture, fit_loss_mixture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--scope", choices=("global", "per_class"), default="global")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    random = torch.Generator().manual_seed(0)
    noisy = torch.rand(args.rows, generator=random) < 0.4
    losses = torch.empty(args.rows).exponential_(4.0, generator=random)
    losses += noisy * (2 + 0.5 * torch.randn(args.rows, generator=random)).clamp_min(0)
    labels = torch.randint(args.classes, (args.rows,), generator=random)
    settings = LossMixture(scope=args.scope)
    fit_loss_mixture(losses[:1000], labels[:1000] % 2, settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    fit_loss_mixture(losses, labels, settings)
    found = {
        "rows": args.rows,
        "scope": args.scope,
        "seconds": time.perf_counter() - started,
        "extra_peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
