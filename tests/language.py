"""Tiny language models of several architectures, with a tokenizer of our own words."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tiny import FILLER, LABELS, LETTERS, TOPICS

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "system", ":", "?", ".")
CHAT = (
    "{% for turn in messages %}{{ turn['role'] }} : {{ turn['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def vocabulary() -> list[str]:
    """All tokens in order."""
    words = [*WORDS, *FILLER, *LABELS, *(word for topic in TOPICS.values() for word in topic)]
    return [*words, *LETTERS]


def tokenizer(*, chat: bool = False, pad: bool = True) -> Any:
    """A tokenizer that cuts at white space; one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(dict.fromkeys(vocabulary()))}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if pad:
        special["pad_token"] = "<pad>"
    made = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special)
    if chat:
        made.chat_template = CHAT
    return made


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                       initializer_range=0.1,
                       tie_word_embeddings=False, **_tokens())  # fmt: skip


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                       initializer_range=0.2,
                       tie_word_embeddings=True, **_tokens())  # fmt: skip


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2, **_tokens()
    )


def _t5() -> Any:
    from transformers import T5Config

    return T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                    decoder_start_token_id=0, **_tokens())  # fmt: skip


def _tokens() -> dict[str, Any]:
    size = len(dict.fromkeys(vocabulary()))
    return {"vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _llama, "qwen2": _qwen2, "gpt2": _gpt2, "t5": _t5,
}  # fmt: skip


@cache
def language_model(kind: str = "llama", *, chat: bool = False, pad: bool = True) -> str:
    """Folder of a random language model with its tokenizer, made once."""
    import torch
    import transformers

    folder = Path(tempfile.mkdtemp(prefix=f"noiseproof-{kind}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = CONFIGS[kind]()
    auto = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(config)
    model.save_pretrained(str(folder))
    tokenizer(chat=chat, pad=pad).save_pretrained(str(folder))
    return str(folder)
