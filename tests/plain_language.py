"""The loss of a saved language model by transformers and peft alone; run in a process of its own.

Prints JSON: the summed loss of the response "harbour" to "the boat", and whether noiseproof was
imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer


def main(folder: str) -> None:
    """Load, compute, print."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    several = AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto: Any = AutoModelForSeq2SeqLM if several else AutoModelForCausalLM
    place = Path(folder, "adapter_config.json")
    if place.exists():
        from peft import PeftModel

        base = json.loads(place.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = PeftModel.from_pretrained(auto.from_pretrained(base), folder).eval()
    else:
        model = auto.from_pretrained(folder).eval()
    prompt = tokenizer("the boat\n")["input_ids"]
    response = [*tokenizer("harbour")["input_ids"], tokenizer.eos_token_id]
    if several:
        loss = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([response])).loss
    else:
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = model(input_ids=torch.tensor([prompt + response]), labels=labels).loss
    print(
        json.dumps({"loss": loss.item() * len(response), "noiseproof": "noiseproof" in sys.modules})
    )


if __name__ == "__main__":
    main(sys.argv[1])
