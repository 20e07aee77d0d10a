"""Pictures of CIFAR-10 as archives that ``--task image`` reads: arrays ``image`` and ``label``.

    python benchmarks/pictures.py ../shared/data/cifar10 --out runs/cifar10
    noiseproof study noisy-pretraining runs/cifar10/train.npz --test runs/cifar10/test.npz \\
        --task image --out runs/noisy-pretraining-cifar10

The folder holds ``cifar10_jpeg.npz``, see ``images.py``.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from images import images
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--test-rows", type=int, default=5_000)
    parser.add_argument("--out", type=Path, required=True, help="a folder for both archives")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, rows in (("train", args.rows), ("test", args.test_rows)):
        with np.load(args.cifar10 / "cifar10_jpeg.npz") as archive:
            labels = archive[f"y_{split}"]
        chosen = random.permutation(len(labels))[:rows]
        files = images(args.cifar10, split, chosen)
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
        np.savez(args.out / f"{split}.npz", image=pixels, label=labels[chosen])
        print(f"{args.out / split}.npz: {pixels.shape}")


if __name__ == "__main__":
    main()
