"""Adapters that peft lacks: exact bypass, exact size, the right places, and back from disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import noiseproof
from families import ALL, classifier
from noiseproof.adapters import AdaptedModel, Adapter, calls_in_layers, restored
from noiseproof.adapters.parts import BiasShift, Bottleneck, inserted, without
from noiseproof.errors import InputError
from noiseproof.methods.baselines import CrossEntropy
from noiseproof.methods.clear import CleaR
from noiseproof.models import encoder_layers, encoder_of
from noiseproof.saving import ADAPTERS_CONFIG, ADAPTERS_FILE, load_saved_model, save_model
from noiseproof.tuning import tune_model
from tiny import Tiny, same_weights, table, train_settings, trained_values, weights

KINDS = {
    "adapter": Adapter("adapter", 3),
    "bitfit": Adapter("bitfit"),
    "prompt": Adapter("prompt", 3),
    "shallow": Adapter("prompt", 3, depth="shallow"),
    "prefix": Adapter("prefix", 3),
}
REFUSED = {
    ("deberta", "prompt"): "cannot reach the attention",
    ("deberta", "shallow"): "cannot reach the attention",
    ("deberta", "prefix"): "cannot reach the attention",
    **{
        (name, kind): "is for encoders"
        for name in ("gpt2", "llama")
        for kind in ("prompt", "shallow", "prefix")
    },
    ("modernbert", "bitfit"): "has no biases in its layers",
    ("llama", "bitfit"): "has no biases in its layers",
}
WORKING = [(name, kind) for name in ALL for kind in KINDS if (name, kind) not in REFUSED]


def adapted(
    name: str, kind: str, seed: int = 0
) -> tuple[AdaptedModel, nn.Module, dict[str, Tensor]]:
    """A model with an adapter that changes something, the bare model, and inputs."""
    torch.manual_seed(seed)
    bare, inputs = classifier(name)
    model = AdaptedModel(copy.deepcopy(bare), KINDS[kind]).eval()
    for parameter in model.parts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, bare, inputs


def called(model: AdaptedModel, inputs: dict[str, Tensor], gate: Tensor | None) -> Tensor:
    model.gates.gate = gate
    logits: Tensor = model(**inputs).logits
    return logits


def units(model: AdaptedModel) -> int:
    return 1 + max(part.unit for part in model.gated_parts)


# --- the bypass ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), WORKING)
def test_closed_gates_are_the_frozen_encoder_and_open_ones_the_adapter(
    name: str, kind: str
) -> None:
    """Bit for bit: a row that leaks into an adapter is memorised by it."""
    model, bare, inputs = adapted(name, kind)
    frozen = bare(**inputs).logits
    free = called(model, inputs, None)
    assert torch.equal(called(model, inputs, torch.zeros(4, units(model))), frozen)
    assert torch.equal(called(model, inputs, torch.ones(4, units(model))), free)
    assert not torch.allclose(free, frozen, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(called(model, inputs, None), frozen)


@pytest.mark.parametrize(("name", "kind"), [case for case in WORKING if case[0] != "gpt2"])
def test_a_mixed_batch_equals_its_rows_one_by_one(name: str, kind: str) -> None:
    """Padding on both sides, soft gates too: no row may see the gate of another.

    GPT-2 counts positions from the padding, with or without an adapter.
    """
    model, _, inputs = adapted(name, kind)
    gate = torch.tensor([[1.0, 0], [0.3, 1], [1, 1], [0, 0]])[:, : units(model)]
    together = called(model, inputs, gate)
    for row in range(4):
        alone = {part: values[row : row + 1] for part, values in inputs.items()}
        if "attention_mask" in inputs:
            real = inputs["attention_mask"][row].bool()
            alone = {part: values[:, real] for part, values in alone.items()}
        single = called(model, alone, gate[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_closed_row_sends_exactly_no_gradient(name: str, kind: str) -> None:
    """And the gradient of a mixed batch is the sum over its rows."""
    model, _, inputs = adapted(name, kind)
    count = units(model)

    def gradients(rows: list[int], gate: Tensor) -> list[Tensor]:
        model.zero_grad()
        part = {key: values[rows] for key, values in inputs.items()}
        called(model, part, gate).pow(2).sum().backward()
        return [p.grad.clone() for p in model.parts.parameters() if p.grad is not None]

    gate = torch.ones(4, count)
    gate[1], gate[3] = 0.0, 0.0
    mixed = gradients([0, 1, 2, 3], gate)
    opened = gradients([0, 2], torch.ones(2, count))
    assert any(bool(value.abs().max() > 1e-4) for value in mixed)
    for one, two in zip(mixed, opened, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    if count > 1:
        gate = torch.ones(4, count)
        gate[:, 0] = 0.0
        model.zero_grad()
        called(model, inputs, gate).pow(2).sum().backward()
        moved = set()
        for part in model.gated_parts:
            found = [p.grad for p in part.parameters() if p.grad is not None]
            if part.layer == 0:
                assert all(not bool(value.any()) for value in found)
            elif any(bool(value.abs().max() > 1e-5) for value in found):
                moved.add(part)
        assert moved  # all but the bias of the key, which shifts all scores of a query alike


@pytest.mark.parametrize("kind", KINDS)
def test_gates_hold_inside_gradient_checkpointing(tiny_run: Tiny, kind: str) -> None:
    """Layers run again in the backward pass, after the next batch may have set its gates."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = AdaptedModel(copy.deepcopy(tiny_run.model), KINDS[kind]).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            inner: Any = model.get_base_model()
            newer = getattr(inner, "activation_checkpointing_enable", None)
            (newer or inner.gradient_checkpointing_enable)({"use_reentrant": False})
        inputs = tiny_run.encoded.inputs(np.arange(4))
        gate = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])[:, : units(model)]
        called(model, inputs, gate).pow(2).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for one, two in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_what_cannot_be_adapted_is_refused_with_what_can(name: str, kind: str) -> None:
    """Never a silent no-op."""
    torch.manual_seed(0)
    with pytest.raises(InputError, match=REFUSED[name, kind]) as refusal:
        AdaptedModel(classifier(name)[0], KINDS[kind])
    assert "use adapter, lora or" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_model_has_adapters_of_its_own(kind: str) -> None:
    """CoTeaching trains a copy: hooks that reach the original would train one network twice."""
    model, bare, inputs = adapted("bert", kind)
    before = called(model, inputs, None)
    other = copy.deepcopy(model)
    other.gates.gate = torch.zeros(4, units(model))
    for parameter in other.parts.parameters():
        nn.init.normal_(parameter, std=2.0)
    assert torch.equal(called(model, inputs, None), before)
    assert torch.equal(other(**inputs).logits, bare(**inputs).logits)
    other.gates.gate = None
    assert not torch.allclose(other(**inputs).logits, before, atol=1e-3)


# --- each family against a slow version ----------------------------------------------------------


def test_a_bottleneck_adds_its_function_of_the_output() -> None:
    """W_up GELU(W_down h + b) + b, and nothing at its start."""
    model, bare, inputs = adapted("bert", "adapter")
    part = next(part for part in model.gated_parts if isinstance(part, Bottleneck))
    hidden = torch.randn(2, 5, 16)
    update = F.linear(
        F.gelu(F.linear(hidden, part.down.weight, part.down.bias)), part.up.weight, part.up.bias
    )
    got = part.hook(nn.Identity(), (), hidden)
    assert got is not None
    torch.testing.assert_close(got, hidden + update)
    fresh = AdaptedModel(copy.deepcopy(bare), KINDS["adapter"]).eval()
    assert torch.equal(fresh(**inputs).logits, bare(**inputs).logits)
    linear = AdaptedModel(copy.deepcopy(bare), Adapter("adapter", 3, start="linear")).eval()
    assert not torch.allclose(linear(**inputs).logits, bare(**inputs).logits)


PLACES = {
    "bert": ["attention.output.dense", "output.dense"],
    "roberta": ["attention.output.dense", "output.dense"],
    "distilbert": ["attention.out_lin", "ffn.lin2"],
    "deberta": ["attention.output.dense", "output.dense"],
    "modernbert": ["attn.Wo", "mlp.Wo"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
}


@pytest.mark.parametrize("name", PLACES)
def test_bottlenecks_stand_behind_attention_and_feed_forward(name: str) -> None:
    """Found by asking; the names are only looked at here."""
    torch.manual_seed(0)
    model = AdaptedModel(classifier(name)[0], KINDS["adapter"])
    wanted = [f"{layer}_{place.replace('.', '_')}" for layer in (0, 1) for place in PLACES[name]]
    assert list(model.parts) == wanted


def test_bottlenecks_may_be_put_elsewhere_by_name() -> None:
    """And a wrong name answers with the right ones."""
    torch.manual_seed(0)
    bare, _ = classifier("bert")
    one = AdaptedModel(copy.deepcopy(bare), Adapter("adapter", 3, targets=("output.dense",)))
    assert list(one.parts) == ["0_output_dense", "1_output_dense"]
    with pytest.raises(InputError, match=r"no module 'ffn'.*attention\.output\.dense"):
        AdaptedModel(bare, Adapter("adapter", 3, targets=("ffn",)))


def test_a_bias_shift_moves_the_bias() -> None:
    """b_eff = b0 + a (b - b0); merging leaves predictions as they are, and no hooks."""
    model, bare, inputs = adapted("bert", "bitfit")
    wanted = called(model, inputs, None)
    moved = copy.deepcopy(bare)
    shifts = {key: part.shift for key, part in model.parts.items() if isinstance(part, BiasShift)}
    assert len(shifts) == 16
    for layer, block in enumerate(encoder_layers(moved)):
        for name, module in block.named_modules():
            if (key := f"{layer}_{name.replace('.', '_')}") in shifts:
                module.bias.data += shifts[key]  # type: ignore[operator, union-attr]
    torch.testing.assert_close(moved(**inputs).logits, wanted)
    merged = model.merge_and_unload()
    assert not any(module._forward_hooks for module in merged.modules())
    torch.testing.assert_close(merged(**inputs).logits, wanted)
    with pytest.raises(InputError, match="adapter cannot be merged"):
        adapted("bert", "adapter")[0].merge_and_unload()


def test_biases_that_serve_all_rows_at_once_stay_frozen() -> None:
    """DeBERTa-v3 sends its positions through query and key: no gate of one row can reach them."""
    from transformers import AutoModelForSequenceClassification

    from families import config

    torch.manual_seed(0)
    settings = config("deberta")
    settings.share_att_key = True
    bare = AutoModelForSequenceClassification.from_config(settings).eval()
    shared = {c.name for calls in calls_in_layers(bare) for c in calls if not c.by_row}
    assert shared == {"attention.self.query_proj", "attention.self.key_proj"}
    parts = list(AdaptedModel(copy.deepcopy(bare), KINDS["bitfit"]).parts)
    assert not any("query_proj" in part or "key_proj" in part for part in parts)
    assert any("value_proj" in part for part in parts)
    routed = CleaR(rank=2).prepare_model(copy.deepcopy(bare))
    lora = {name for name, _ in routed.named_parameters() if "lora_A" in name}
    assert lora and all("value_proj" in name for name in lora)
    with pytest.raises(InputError, match="cannot gate"):
        CleaR(rank=2, target_modules=("query_proj",)).prepare_model(bare)


def literally(model: nn.Module, vectors: list[Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Deep prompts of a BERT as they are defined: put in, run the layer, take out."""
    _, encoder = encoder_of(model)
    hidden = encoder.embeddings(input_ids=inputs["input_ids"])  # type: ignore[operator, union-attr]
    mask = inputs["attention_mask"].bool()
    count = len(vectors[0])
    wide = torch.cat([mask[:, :1], mask.new_ones(len(mask), count), mask[:, 1:]], dim=1)
    for block, vector in zip(encoder_layers(model), vectors, strict=True):
        output = block(
            inserted(hidden, vector), wide[:, None, None, :].expand(-1, 1, wide.shape[1], -1)
        )
        hidden = without(output if torch.is_tensor(output) else output[0], count)
    pooled = encoder.pooler(hidden)  # type: ignore[operator, union-attr]
    logits: Tensor = model.classifier(pooled)  # type: ignore[operator]
    return logits


def test_deep_prompts_equal_vectors_put_into_every_layer() -> None:
    """We offer keys and values of the vectors instead of sending them through the layer."""
    model, bare, inputs = adapted("bert", "prompt")
    vectors = [part.vectors for part in model.gated_parts]  # type: ignore[union-attr]
    torch.testing.assert_close(
        called(model, inputs, None), literally(bare, vectors, inputs), rtol=1e-4, atol=1e-5
    )


def test_a_shallow_prompt_equals_tokens_without_a_position() -> None:
    """Put in before the first layer, kept in all, taken out behind the last."""
    model, bare, inputs = adapted("bert", "shallow")
    (part,) = model.gated_parts
    _, encoder = encoder_of(bare)
    vectors: Tensor = part.vectors  # type: ignore[assignment]
    hidden = inserted(encoder.embeddings(input_ids=inputs["input_ids"]), vectors)  # type: ignore[operator, union-attr]
    mask = inputs["attention_mask"].bool()
    wide = torch.cat([mask[:, :1], mask.new_ones(len(mask), 3), mask[:, 1:]], dim=1)
    for block in encoder_layers(bare):
        output = block(hidden, wide[:, None, None, :].expand(-1, 1, wide.shape[1], -1))
        hidden = output if torch.is_tensor(output) else output[0]
    pooled = encoder.pooler(without(hidden, 3))  # type: ignore[operator, union-attr]
    torch.testing.assert_close(
        called(model, inputs, None),
        bare.classifier(pooled),
        rtol=1e-4,
        atol=1e-5,  # type: ignore[operator]
    )


def test_a_soft_gate_scales_the_attention_that_a_prefix_gets() -> None:
    """log a on its scores: its share of the softmax is a w / (a w + rest)."""
    model, _, _ = adapted("bert", "prefix")
    part: Any = model.gated_parts[0]
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    model.gates.gate = torch.full((1, 2), 0.25)
    wide, _, bias = part.extend(query, key, value, None)
    share = torch.softmax(query @ wide.transpose(2, 3) + bias, dim=-1)[..., :3].sum(-1)
    scores = (query @ wide.transpose(2, 3)).exp()
    wanted = 0.25 * scores[..., :3].sum(-1)
    torch.testing.assert_close(share, wanted / (wanted + scores[..., 3:].sum(-1)))


# --- what trains, what is kept -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_and_head_train_and_the_encoder_stays(tiny_run: Tiny, kind: str) -> None:
    """A backbone that moves is no bypass."""
    before = weights(tiny_run.model)
    family = KINDS[kind].family
    depth = KINDS[kind].depth
    method = CleaR(
        warmup_epochs=1,
        peft=family,
        prompt_depth=depth,
        train_outer_biases=False,
        gamma=0.8,
        max_clean_loss=None,
    )
    outcome = tiny_run.fit(method, epochs=2)
    model = outcome.model
    inner = model.get_base_model() if isinstance(model, AdaptedModel) else model
    moved = {name for name, value in weights(inner).items() if not value.equal(before[name])}
    head = {"classifier.weight", "classifier.bias"}
    if family == "bitfit":  # merged into the model
        assert moved - head and all(name.endswith("bias") for name in moved - head)
    else:
        assert moved == head
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert outcome.trainable == trained


def test_pooler_and_outer_biases_train_when_asked(tiny_run: Tiny) -> None:
    """Decisions 22 and 23: neither has a gate."""

    def trained(**settings: Any) -> set[str]:
        model = AdaptedModel(copy.deepcopy(tiny_run.model), Adapter(**settings))
        return {name.removeprefix("model.") for name in model.trained if "parts." not in name}

    head = {"classifier.weight", "classifier.bias"}
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    outer = {"bert.embeddings.LayerNorm.bias"}
    assert trained(family="adapter") == head
    assert trained(family="adapter", pooler=True) == head | pooler
    assert trained(family="bitfit") == head | outer
    assert trained(family="bitfit", outer_biases=False) == head
    assert trained(family="bitfit", pooler=True) == head | outer | pooler
    lora = CleaR(train_pooler=True).prepare_model(copy.deepcopy(tiny_run.model))
    assert any("pooler.modules_to_save" in n for n, p in lora.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["adapter", "bitfit", "prompt", "prefix"])
def test_a_baseline_gets_the_same_adapter_as_clear_without_routing(
    tiny_run: Tiny, family: str
) -> None:
    """`CleaR:plain` is plain tuning, step for step and bit for bit."""
    plain = tiny_run.fit(CleaR.preset("plain", peft=family, warmup_epochs=1, bottleneck_size=8))
    usual = tiny_run.fit(CrossEntropy(tune=family, rank=8))
    model = usual.model
    if family == "bitfit":
        assert isinstance(model, AdaptedModel)
        model = model.merge_and_unload()
    for one, two in zip(trained_values(plain.model), trained_values(model), strict=False):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_comes_back_from_disk(
    tiny_model: Path, tiny_run: Tiny, tmp_path: Path, kind: str
) -> None:
    """Adapter, head and settings; the encoder is not written a second time."""
    torch.manual_seed(0)
    model = AdaptedModel(copy.deepcopy(tiny_run.model), KINDS[kind]).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    inputs = tiny_run.encoded.inputs(np.arange(5))
    wanted = called(model, inputs, None)
    save_model(model, tiny_run.task.tokenizer, tmp_path)
    assert (tmp_path / ADAPTERS_FILE).stat().st_size < 40_000
    assert not list(tmp_path.glob("*model*.safetensors"))
    torch.manual_seed(1)
    again = restored(load_saved_model(tmp_path)[0], tmp_path)
    assert isinstance(again, AdaptedModel) and again.adapter == KINDS[kind]
    assert torch.equal(called(again, inputs, None), wanted)
    assert "noiseproof" not in (tmp_path / "config.json").read_text()


def test_an_adapter_of_another_encoder_is_refused(tiny_run: Tiny, tmp_path: Path) -> None:
    """Weights of other shapes must not be put in silently."""
    model = AdaptedModel(copy.deepcopy(tiny_run.model), Adapter("adapter", 3))
    save_model(model, tiny_run.task.tokenizer, tmp_path)
    about = json.loads((tmp_path / ADAPTERS_CONFIG).read_text())
    (tmp_path / ADAPTERS_CONFIG).write_text(json.dumps(about | {"size": 4}))
    with pytest.raises(InputError, match="does not fit the encoder"):
        restored(load_saved_model(tmp_path)[0], tmp_path)


def test_a_plain_model_is_restored_as_it_is(tiny_run: Tiny, tmp_path: Path) -> None:
    """Nothing of ours lies in its folder."""
    assert restored(tiny_run.model, tmp_path) is tiny_run.model


# --- CleaR on them -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["adapter", "bitfit", "prompt", "prefix"])
@pytest.mark.parametrize("mode", ["all_on", "sample"])
def test_a_run_of_every_family_is_loaded_as_it_was(
    tiny_model: Path, tmp_path: Path, family: str, mode: str
) -> None:
    """Two warm-up and two routed epochs through the real job, then from the folder."""
    rows = table(32, wrong=0.3)
    result = noiseproof.fit(
        rows,
        model=str(tiny_model),
        method=CleaR(peft=family, warmup_epochs=2, eval_gate=mode, gamma=0.6, max_clean_loss=None),
        train=train_settings(epochs=4, learning_rate=2e-2),
        out=tmp_path / "run",
    )
    texts = rows["text"].tolist()
    wanted = result.predictor.predict_proba(texts)
    loaded = noiseproof.load(tmp_path / "run")
    np.testing.assert_allclose(loaded.predict_proba(texts), wanted, rtol=1e-5, atol=1e-6)
    plain = family == "bitfit" and mode == "all_on"
    assert (tmp_path / "run" / "model" / "model.safetensors").exists() == plain


@pytest.mark.parametrize("family", ["adapter", "bitfit", "prompt", "prefix"])
def test_closed_rows_may_take_known_features_in_every_family(tiny_run: Tiny, family: str) -> None:
    """The frozen encoder is all that a closed row sees, whatever the adapter."""

    def fitted(known: bool) -> nn.Module:
        method = CleaR(
            peft=family,
            warmup_epochs=1,
            routing="hard",
            lambda_consistency=0.0,
            max_clean_loss=None,
            train_outer_biases=False,
        )
        if not known:
            object.__setattr__(method, "_bypass", lambda *_: False)
        return tiny_run.fit(method, epochs=3).model

    inputs = tiny_run.encoded.inputs(np.arange(12))
    one, two = (fitted(known).eval()(**inputs).logits for known in (True, False))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


PEFT_GATED = ("lora", "loha", "lokr", "vera", "randlora", "fourierft", "ia3", "oft", "ln_tuning")


@pytest.mark.filterwarnings("ignore")  # of peft's, about families that nobody maintains
@pytest.mark.parametrize("family", PEFT_GATED)
def test_kinds_of_peft_are_gated_exactly_or_refused(tiny_run: Tiny, family: str) -> None:
    """Tried on a tiny input when the gates are put in."""
    bare = copy.deepcopy(tiny_run.model).eval()
    inputs = tiny_run.encoded.inputs(np.arange(4))
    method = CleaR(peft=family, rank=2)
    if family in ("ia3", "oft", "ln_tuning"):
        with pytest.raises(InputError, match="CleaR cannot gate"):
            method.prepare_model(copy.deepcopy(bare))
        return
    model = method.prepare_model(copy.deepcopy(bare)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            nn.init.normal_(parameter, std=0.5)
    _, encoder = encoder_of(model)
    routing: Any = model.noiseproof_routing
    routing.gate = torch.zeros(4, 2)
    frozen = encoder_of(bare)[1](**inputs).last_hidden_state
    assert torch.equal(encoder(**inputs).last_hidden_state, frozen)
    routing.gate = torch.tensor([[1.0, 1.0], [0, 0], [1, 1], [0, 0]])
    mixed = encoder(**inputs).last_hidden_state
    routing.gate = None
    free = encoder(**inputs).last_hidden_state
    torch.testing.assert_close(mixed[[1, 3]], frozen[[1, 3]])
    torch.testing.assert_close(mixed[[0, 2]], free[[0, 2]])
    assert not torch.allclose(free, frozen, atol=1e-3)


def test_dora_is_gated_like_lora(tiny_run: Tiny) -> None:
    """Its magnitude is part of the update, which is chosen or left out as a whole."""
    from noiseproof.methods.clear_gates import Routing, route

    dora = tune_model(copy.deepcopy(tiny_run.model), "lora", rank=2, settings={"use_dora": True})
    route(dora, Routing())
    assert same_weights(tiny_run.model, copy.deepcopy(tiny_run.model))
    assert dora.noiseproof_routing.units == 2  # type: ignore[union-attr]


def test_the_trial_leaves_weights_and_random_numbers_alone(tiny_run: Tiny) -> None:
    """Asking a model must not change it."""
    before = weights(tiny_run.model)
    state = torch.get_rng_state()
    calls_in_layers(tiny_run.model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.equal(before[name]) for name, value in weights(tiny_run.model).items())
