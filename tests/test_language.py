"""Language models: which are taken, what trains in them, and how they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import noiseproof
from language import language_model, tokenizer
from noiseproof.errors import InputError
from noiseproof.methods import CrossEntropy
from noiseproof.models import is_head
from noiseproof.tasks.language import load_language_model
from rows import response_rows
from tiny import train_settings


def fit(kind: str, tune: str, **settings: Any) -> noiseproof.FitResult:
    return noiseproof.fit(
        response_rows(),
        task="causal-lm",
        model=language_model(kind),
        method=CrossEntropy(tune=tune),
        train=train_settings(epochs=1),
        **settings,
    )


@pytest.mark.parametrize("tune", ["prompt_tuning", "prefix_tuning"])
def test_learned_prompts_stand_right_before_every_row(tune: str) -> None:
    """Pads between them and a row would shift what the row reads."""
    predictor = fit("llama", tune, max_new_tokens=5).predictor
    prompts = ["the old boat and some more", "soil", "we saw the new oven today"]
    assert predictor.predict(prompts) == [predictor.predict([one])[0] for one in prompts]
    with pytest.raises(noiseproof.InputError, match="expected a list of texts, got a single text"):
        predictor.predict(prompts[0])  # it answered every letter


@pytest.mark.parametrize("tune", ["adapter", "bitfit"])
def test_adapters_of_our_own_answer_and_leave_the_output_layer_alone(
    tune: str, tmp_path: Path
) -> None:
    """It was trained with the rest, and is larger than all adapters together."""
    run = fit("qwen2", tune, max_new_tokens=5, out=tmp_path / "run")
    prompts = ["the old boat", "soil"]
    assert noiseproof.load(tmp_path / "run").predict(prompts) == run.predictor.predict(prompts)
    model = run.predictor.model
    trained = [name for name, part in model.named_parameters() if part.requires_grad]
    assert trained and not any("lm_head" in name or "embed" in name for name in trained)


def test_the_output_layer_of_a_model_with_one_of_its_own_stays_with_adapters() -> None:
    model = fit("llama", "adapter", max_new_tokens=2).predictor.model
    fresh, _ = load_language_model(language_model("llama"))
    for one in (model, fresh):
        assert [name for name, _ in one.named_parameters() if is_head(one)(name)]
    before = fresh.get_output_embeddings().weight  # type: ignore[operator]
    after = model.get_base_model().get_output_embeddings().weight  # type: ignore[operator]
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "t5"])
def test_a_head_that_also_reads_cannot_train_alone(kind: str) -> None:
    with pytest.raises(InputError, match="reads and writes with the same weights"):
        fit(kind, "head")


def test_a_model_that_reads_what_it_should_predict_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A masked language model has an output layer, and would learn to copy."""
    from transformers import AutoConfig, BertForMaskedLM

    BertForMaskedLM(AutoConfig.from_pretrained(str(tiny_model))).save_pretrained(str(tmp_path))
    tokenizer().save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="reads the tokens that it should predict") as caught:
        load_language_model(str(tmp_path))
    assert "\n" not in str(caught.value)
