"""Fine-tune a network of one's own on images with the labels of a crowd.

    python benchmarks/images.py CIFAR10 SQUEEZENET --rows 1000 --labels worse_label \\
        --methods CrossEntropy TURN:lp_ft TURN TURN:robust_probe --out runs/images
    noiseproof report runs/images --out images.html

CIFAR10 is a folder with ``cifar10_jpeg.npz`` (``train_jpeg``, ``train_offsets``, ``y_test``, ...)
and ``cifar10n_labels.npz``; SQUEEZENET one with the weights of SqueezeNet v1.0 (Iandola et al.,
2016, arXiv:1602.07360) as ``model.safetensors``, under the names of the layers of the paper.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import noiseproof
from noiseproof.finetune import run_job
from noiseproof.job import Job
from noiseproof.record import RunRecord

MEANS = (104.0, 117.0, 123.0)  # of blue, green, red, from 0 to 255
FIRES = {  # name -> channels in, squeezed, expanded twice
    "fire2": (96, 16, 64), "fire3": (128, 16, 64), "fire4": (128, 32, 128),
    "fire5": (256, 32, 128), "fire6": (256, 48, 192), "fire7": (384, 48, 192),
    "fire8": (384, 64, 256), "fire9": (512, 64, 256),
}  # fmt: skip
POOL_BEFORE = ("fire2", "fire5", "fire9")


class Fire(nn.Module):
    """Few channels, then many: 1 x 1 and 3 x 3 side by side."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        maps = F.relu(self.squeeze(maps))
        return F.relu(torch.cat([self.expand1x1(maps), self.expand3x3(maps)], dim=1))


class SqueezeNet(nn.Module):
    """SqueezeNet v1.0 up to its last Fire module, a mean over positions, a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2)
        for name, sizes in FIRES.items():
            self.add_module(name, Fire(*sizes))
        self.head = nn.Linear(512, classes)
        self.register_buffer("means", torch.tensor(MEANS)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """RGB from 0 to 1 (B, 3, H, W) -> logits (B, C)."""
        maps = F.relu(self.conv1(255 * pixels.flip(1) - self.means))
        for name in FIRES:
            if name in POOL_BEFORE:
                maps = F.max_pool2d(maps, 3, 2, ceil_mode=True)
            maps = self.get_submodule(name)(maps)
        features = maps.mean((2, 3))  # up to some hundreds: too large for a head as they are
        return self.head(F.layer_norm(features, features.shape[1:]))


def pretrained(folder: Path, classes: int) -> SqueezeNet:
    """The network with its weights from ImageNet and a fresh head."""
    net = SqueezeNet(classes)
    tensors = load_file(str(folder / "model.safetensors"))
    missing, unexpected = net.load_state_dict(tensors, strict=False)
    assert set(missing) == {"head.weight", "head.bias"}
    assert {name.split(".")[0] for name in unexpected} == {"conv10"}
    return net


def images(folder: Path, split: str, rows: np.ndarray) -> list[bytes]:
    """Files of these rows, as bytes."""
    with np.load(folder / "cifar10_jpeg.npz") as archive:
        whole, offsets = archive[f"{split}_jpeg"], archive[f"{split}_offsets"]
    return [whole[offsets[row] : offsets[row + 1]].tobytes() for row in rows]


def is_done(folder: Path) -> bool:
    """Whether a run has ended there; one that failed or was interrupted is gone on with."""
    return (folder / "record.json").exists() and RunRecord.read(folder).status == "done"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("squeezenet", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--labels", default="worse_label")
    parser.add_argument("--methods", nargs="+", default=["CrossEntropy"])
    parser.add_argument("--tune", default="full")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for the runs; the same command goes on")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    train = random.permutation(50_000)[: args.rows]
    test = random.permutation(10_000)[: args.test_rows]
    with np.load(args.cifar10 / "cifar10n_labels.npz") as labels:
        given, clean = labels[args.labels][train], labels["clean_label"][train]
    with np.load(args.cifar10 / "cifar10_jpeg.npz") as archive:
        truth = archive["y_test"][test]
    data: dict[str, Any] = {
        "image": images(args.cifar10, "train", train),
        "label": given.tolist(),
        "clean_label": clean.tolist(),
    }
    settings = {"epochs": args.epochs, "learning_rate": args.learning_rate, "seed": args.seed}
    for method in args.methods:
        out = args.out and args.out / f"{args.labels}_{method.replace(':', '-')}_{args.seed}"
        if out and is_done(out):
            print(f"{method}: there is a finished run in {out}")
            continue
        name, _, preset = method.partition(":")
        job = Job(
            data,
            task="image",
            model=pretrained(args.squeezenet, 10),
            image_size=args.image_size,
            clean_label="clean_label",
            test={"image": images(args.cifar10, "test", test), "clean_label": truth.tolist()},
            method=noiseproof.METHODS[name].preset(preset or "default", tune=args.tune),
            train=noiseproof.TrainSettings(**settings),
        )
        named = {"data": args.labels.removesuffix("_label"), "method": method, "seed": args.seed}
        told = {key: str(value) for key, value in named.items()}
        result = run_job(job, out=out, resume=out is not None, labels=told)
        for row in result.history:
            print({name: round(v, 4) for name, v in row.items() if isinstance(v, float)})
        for metric, value in result.record.metrics.items():
            print(f"{method}: {metric:22s} {value}")
        print({name: round(value, 1) for name, value in result.record.timings.items()}, flush=True)


if __name__ == "__main__":
    main()
