"""Tiny random classifiers of many architectures, with inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3
ENCODERS = ("bert", "roberta", "distilbert", "deberta", "modernbert")
DECODERS = ("gpt2", "llama")
ALL = (*ENCODERS, *DECODERS, "vit")


def config(name: str) -> Any:
    """The config of an architecture: two layers of width 16, three classes."""
    import transformers

    common = {"vocab_size": 40, "num_labels": CLASSES, "pad_token_id": 0}
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    small |= {"hidden_size": 16, "initializer_range": 0.2}
    usual = common | small | {"max_position_embeddings": 40}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    kind, settings = {
        "bert": ("BertConfig", usual),
        "roberta": ("RobertaConfig", usual),
        "distilbert": (
            "DistilBertConfig",
            common
            | {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
            | {"initializer_range": 0.2, "max_position_embeddings": 40},
        ),
        "deberta": (
            "DebertaV2Config",
            usual
            | {"pooler_hidden_size": 16, "relative_attention": True}
            | {"pos_att_type": ["p2c", "c2p"]},
        ),
        "deberta-v3": (
            "DebertaV2Config",
            usual
            | {"pooler_hidden_size": 16, "relative_attention": True, "share_att_key": True}
            | {"pos_att_type": ["p2c", "c2p"], "position_buckets": 40},
        ),
        "modernbert": ("ModernBertConfig", usual | ends | {"cls_token_id": 1, "sep_token_id": 2}),
        "gpt2": (
            "GPT2Config",
            common
            | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
            | {"initializer_range": 0.2}
            | ends,
        ),
        "llama": ("LlamaConfig", usual | ends | {"num_key_value_heads": 2}),
        "vit": ("ViTConfig", small | {"image_size": 8, "patch_size": 4, "num_labels": CLASSES}),
    }[name]
    return getattr(transformers, kind)(**settings)


def classifier(name: str, attention: str | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A random classifier in eval mode, and four rows for it; decoders get them padded left."""
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    more = {} if attention is None else {"attn_implementation": attention}
    if name == "vit":
        model = AutoModelForImageClassification.from_config(config(name), **more)
        return model.eval(), {"pixel_values": torch.randn(4, 3, 8, 8)}
    model = AutoModelForSequenceClassification.from_config(config(name), **more)
    return model.eval(), text_inputs(left=name in DECODERS)


def text_inputs(*, left: bool) -> dict[str, Tensor]:
    """Four rows of 7, 4, 6 and 2 tokens."""
    mask = (torch.arange(7) < torch.tensor([7, 4, 6, 2])[:, None]).long()
    if left:
        mask = mask.flip(1)
    return {"input_ids": torch.randint(3, 40, (4, 7)) * mask, "attention_mask": mask}
