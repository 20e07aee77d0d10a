"""Tiny language models with a tokenizer of our own words, and rows of prompts with responses."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tiny import FILLER, TOPICS

PAD, START, END, UNKNOWN, TURN = "<pad>", "<s>", "</s>", "<unk>", "<turn>"
SPECIALS = (PAD, START, END, UNKNOWN, TURN)
ROLES = ("system", "user", "assistant")
WORDS = (
    *SPECIALS, *ROLES, *FILLER, *TOPICS, *(word for topic in TOPICS.values() for word in topic),
    "which", "place", "is", "it", ".", "?", ":",
)  # fmt: skip
CHAT = (
    "{% for message in messages %}<turn>{{ message['role'] }} : {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant : {% endif %}"
)


def decoder_rows(
    rows: int = 25, *, wrong: float = 0.2, seed: int = 0, column: str = "text"
) -> dict[str, Any]:
    """Prompts of words of a place, whose name is the response; some responses name another place.

    Args:
        rows: Number of rows.
        wrong: Share of rows whose ``label`` is changed; ``clean_label`` keeps the truth.
        seed: Of words and wrong responses.
        column: Name of the column of prompts.
    """
    random, names = np.random.default_rng(seed), list(TOPICS)
    prompts, clean = [], []
    for row in range(rows):
        name = names[row % len(names)]
        words = random.choice(TOPICS[name], 2).tolist()
        words += random.choice(FILLER, int(random.integers(1, 6))).tolist()
        random.shuffle(words)
        prompts.append(" ".join(words) + " ?")
        clean.append(f"it is the {name} .")
    given = list(clean)
    for row in random.permutation(rows)[: round(wrong * rows)]:
        given[row] = clean[(row + 1) % rows]
    return {column: prompts, "label": given, "clean_label": clean}


def chat_rows(rows: int = 12, *, seed: int = 0) -> list[list[dict[str, str]]]:
    """The same as messages, with a system message before every other one."""
    table = decoder_rows(rows, wrong=0.0, seed=seed)
    chats = []
    for row, (prompt, response) in enumerate(zip(table["text"], table["label"], strict=True)):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        first = [{"role": "system", "content": "which place is it ?"}] if row % 2 else []
        chats.append([*first, *turns])
    return chats


def tokenizer_of_words(*, chat: bool = True, pads: bool = True, starts: bool = True) -> Any:
    """A word-level tokenizer.

    Args:
        chat: With a chat template.
        pads: With a token that pads.
        starts: Puts a start token before every text, as LLaMA's does.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if starts:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, WORDS.index(START))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[TURN],
        model_max_length=64,
        **({"pad_token": PAD} if pads else {}),
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def _sizes() -> dict[str, int]:
    return {
        "vocab_size": len(WORDS),
        "bos_token_id": WORDS.index(START),
        "eos_token_id": WORDS.index(END),
    }


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_sizes(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
                       initializer_range=0.2)  # fmt: skip


def _qwen() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**_sizes(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
                       initializer_range=0.2, tie_word_embeddings=True)  # fmt: skip


def _gpt() -> Any:
    from transformers import GPT2Config

    return GPT2Config(**_sizes(), n_embd=32, n_layer=2, n_head=2, n_positions=64,
                      initializer_range=0.2)  # fmt: skip


def _t5() -> Any:
    from transformers import T5Config

    return T5Config(vocab_size=len(WORDS), d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
                    pad_token_id=WORDS.index(PAD), eos_token_id=WORDS.index(END),
                    decoder_start_token_id=WORDS.index(PAD))  # fmt: skip


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _llama, "qwen": _qwen, "gpt": _gpt, "t5": _t5,
}  # fmt: skip
"""Families of language models."""


@cache
def language_model(family: str = "llama", *, chat: bool = True, pads: bool = True) -> str:
    """Folder of a random language model with its tokenizer, made once."""
    import torch
    import transformers

    folder = Path(tempfile.mkdtemp(prefix=f"noiseproof-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = CONFIGS[family]()
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind).from_config(config)
    model.save_pretrained(str(folder))
    starts = family != "t5"
    tokenizer_of_words(chat=chat, pads=pads, starts=starts).save_pretrained(str(folder))
    return str(folder)
