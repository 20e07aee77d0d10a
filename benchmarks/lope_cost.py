"""What the experts of LoPE cost beside plain LoRA with as many active parameters.

    python benchmarks/lope_cost.py --out docs/results/lope-cost.json

Both variants take turns in one process; times are the processor's, which neighbours on the
machine disturb less, on a CPU. ``layers`` is a stack of linear layers alone, ``encoder`` a BERT of
the shape of MiniLM: seconds of a forward and backward pass in training, in the stage adapt, and
the bytes that are kept for the backward pass (weights left out). ``generation`` is greedy and
cached, by a small Llama, with the poisoning expert masked and the others compensated; LoRA is
measured as `peft` runs it and merged into the model, which LoPE cannot be. LoRA's rank is that at
which it has as many active parameters as LoPE: A, all experts and the router.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noiseproof.experts.layers import ExpertLinear, Switch, shape_of
from noiseproof.experts.mixing import Experts
from noiseproof.experts.model import ExpertModel

DROPOUT = 0.05
Numbers = dict[str, float | int | str]


def clock() -> float:
    """Seconds: the processor's own, on a GPU those that pass."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def stack(width: int, depth: int) -> nn.Sequential:
    """Frozen linear layers, one after the other."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).requires_grad_(False)


def with_experts(model: nn.Module, settings: Experts) -> nn.Module:
    """The stack with LoPE's layers, as the stage adapt trains them."""
    switch = Switch("compensate")
    layers = [ExpertLinear(one, settings, switch) for one in model.children()]
    adapted = nn.Sequential(*layers)
    freeze_poison(adapted)
    return adapted


def freeze_poison(model: nn.Module) -> None:
    """Experts that have learned something, the poisoning ones frozen."""
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
        if ".lora_BD" in name:
            parameter.requires_grad_(False)


def with_lora(model: nn.Module, targets: list[str], settings: Experts, **more: Any) -> nn.Module:
    """The model with `peft`'s LoRA of as many active parameters."""
    from peft import LoraConfig, get_peft_model

    rank = equal_rank(next(m for n, m in model.named_modules() if n.endswith(targets[0])), settings)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=DROPOUT, target_modules=targets,
                        **more)  # fmt: skip
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return adapted


def equal_rank(layer: nn.Module, settings: Experts) -> int:
    """The rank at which LoRA has as many active parameters as LoPE beside one layer."""
    wide, out = shape_of(layer)
    active = settings.rank * (wide + settings.count * out) + settings.count * wide
    return round(active / (wide + out))


def kept_bytes(step: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the different tensors that one forward pass keeps for the backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = step()
    loss.backward()
    return sum(kept.values())


def compare_training(
    variants: dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]], rounds: int
) -> Numbers:
    """Median seconds of a step by variant, over rounds in which each takes its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peak: dict[str, int] = {}
    cuda = next(next(iter(variants.values()))[0].parameters()).is_cuda
    for number in range(rounds + 3):
        for name, (model, forward) in variants.items():
            model.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                torch.cuda.synchronize()
            began = clock()
            forward(model).backward()
            if cuda:
                torch.cuda.synchronize()
                peak[name] = torch.cuda.max_memory_allocated() - before
            if number >= 3:  # the first allocate
                seconds[name].append(clock() - began)
    found: Numbers = {f"{name}_s": statistics.median(own) for name, own in seconds.items()}
    found["ratio"] = statistics.median(
        own / other for own, other in zip(seconds["lope"], seconds["lora"], strict=True)
    )
    for name, (model, forward) in variants.items():
        model.zero_grad(set_to_none=True)
        found[f"{name}_kept_mb"] = kept_bytes(lambda f=forward, m=model: f(m), model) / 2**20
        found[f"{name}_active"] = sum(
            p.numel() for n, p in model.named_parameters() if "lora_" in n
        )
    found["memory_ratio"] = float(found["lope_kept_mb"]) / float(found["lora_kept_mb"])
    if peak:
        found |= {f"{name}_peak_mb": size / 2**20 for name, size in peak.items()}
        found["peak_ratio"] = peak["lope"] / peak["lora"]
    return found


def layers(device: str, rounds: int, rows: int, tokens: int) -> Numbers:
    """Twelve linear layers of MiniLM's width."""
    width, settings = 384, Experts(dropout=DROPOUT)
    given = torch.randn(rows, tokens, width, device=device, requires_grad=True)
    lope = with_experts(stack(width, 12), settings)
    lora = with_lora(stack(width, 12), [str(number) for number in range(12)], settings)

    def forward(model: nn.Module) -> Tensor:
        return model(given).square().mean()

    variants = {"lope": (lope, forward), "lora": (lora, forward)}
    return compare_training(
        {name: (model.to(device).train(), run) for name, (model, run) in variants.items()}, rounds
    )


def encoder(device: str, rounds: int, rows: int, tokens: int) -> Numbers:
    """A BERT of the shape of MiniLM with a head, experts beside query and value."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                        intermediate_size=1536, vocab_size=8000, num_labels=6)  # fmt: skip
    settings = Experts(dropout=DROPOUT, targets=("query", "value"))
    lope = ExpertModel(BertForSequenceClassification(config), settings)
    freeze_poison(lope)
    lora = with_lora(BertForSequenceClassification(config), ["query", "value"], settings,
                     task_type="SEQ_CLS")  # fmt: skip
    batch = {
        "input_ids": torch.randint(0, 8000, (rows, tokens), device=device),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long, device=device),
        "labels": torch.randint(0, 6, (rows,), device=device),
    }

    def forward(model: nn.Module) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    variants = {"lope": (lope, forward), "lora": (lora, forward)}
    return compare_training(
        {name: (model.to(device).train(), run) for name, (model, run) in variants.items()}, rounds
    )


def generation(device: str, rounds: int, rows: int, length: int) -> Numbers:
    """Tokens a second of a small Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
                         intermediate_size=1376, vocab_size=4096,
                         max_position_embeddings=512)  # fmt: skip
    settings = Experts(targets=("q_proj", "v_proj"))
    lope = ExpertModel(LlamaForCausalLM(config), settings)
    freeze_poison(lope)
    for layer in lope.layers.values():
        layer.calibrate(torch.tensor([0.3, 0.0, -0.3]))
    lope.set_inference_mode("compensate")
    targets = ["q_proj", "v_proj"]
    lora = with_lora(LlamaForCausalLM(config), targets, settings, task_type="CAUSAL_LM")
    merged = with_lora(LlamaForCausalLM(config), targets, settings, task_type="CAUSAL_LM")
    merged = merged.merge_and_unload()  # type: ignore[operator]
    models: dict[str, Any] = {"lope": lope, "lora": lora, "merged": merged}
    prompt = torch.randint(5, 4000, (rows, 16), device=device)
    asked = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "do_sample": False,
             "max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0}  # fmt: skip
    for model in models.values():
        model.to(device).eval()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            began = clock()
            with torch.no_grad():
                model.generate(**asked)
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(clock() - began)
    pairs = list(zip(*(seconds[name] for name in models), strict=True))
    found: Numbers = {
        f"{name}_tokens_per_s": rows * length / statistics.median(own)
        for name, own in seconds.items()
    }
    found["speed_ratio"] = statistics.median(lora / lope for lope, lora, _ in pairs)
    found["speed_ratio_to_merged"] = statistics.median(merged / lope for lope, _, merged in pairs)
    return found


def main() -> None:
    """Measure, print, and write where ``--out`` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="tokens to generate")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.manual_seed(0)
    size = {"rows": asked.rows, "tokens": asked.tokens, "rounds": asked.rounds}
    found = {
        "device": torch.cuda.get_device_name() if asked.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count() or 1,
        "torch": torch.__version__,
        "layers": size | layers(asked.device, asked.rounds, asked.rows, asked.tokens),
        "encoder": size | encoder(asked.device, asked.rounds, asked.rows, asked.tokens),
        "generation": {"rows": 4, "length": asked.length}
        | generation(asked.device, max(3, asked.rounds // 3), 4, asked.length),
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if asked.out is not None:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
