"""What torch's fused attention costs in a training step of bf16 on the CPU, by the length of texts.

    OMP_NUM_THREADS=1 python benchmarks/attention.py --out attention.json

MiniLM with LoRA and without dropout, 32 texts a step, forward and backward: with the fused kernel
and with plain products, one after the other, in processor time. The engine takes plain products up
to `noiseproof.engine.SHORT_TEXT` tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForSequenceClassification

from noiseproof.methods import CleaR
from noiseproof.models import resolve_model

ROWS, CLASSES = 32, 6


def seconds(model: torch.nn.Module, length: int, plain: bool) -> float:
    """Processor seconds of one step."""
    ids = torch.randint(1000, 20000, (ROWS, length))
    labels = torch.arange(ROWS) % CLASSES
    began = time.process_time()
    attention = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
    with attention, torch.autocast("cpu", dtype=torch.bfloat16):
        model.noiseproof_routing.set(None)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[14, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    folder = resolve_model("minilm")
    bare = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    model = CleaR().prepare_model(bare).train()
    found = []
    for length in args.lengths:
        rounds = [
            [seconds(model, length, plain) for plain in (False, True)]
            for _ in range(args.rounds + 1)
        ][1:]
        fused, plain = (statistics.median(values) for values in zip(*rounds, strict=True))
        found.append({"tokens": length, "fused_s": fused, "plain_s": plain, "ratio": plain / fused})
        print(found[-1], flush=True)
    args.out.write_text(json.dumps({"rows": ROWS, "lengths": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
