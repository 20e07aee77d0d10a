"""Linear layers with experts: weights in closed form, exact start, no trace of padding, and back."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from families import CLASSES, classifier, config, text_inputs
from noiseproof.errors import InputError
from noiseproof.experts import (
    EXPERTS_FILE,
    MODES,
    ExpertLinear,
    ExpertModel,
    Experts,
    Switch,
    embedding_noise,
    expert_weights,
    restored_experts,
    rms_of_tokens,
    similarities,
)
from noiseproof.models import ADAPTERS_CONFIG

LOGITS = torch.tensor([0.2, 0.3, 0.1, 0.4]).log()  # w, the last one of the poisoning expert
THETA = torch.tensor([0.5, 0.0, -0.5])
CAUSAL = ("gpt2", "llama", "qwen2")


def language_model(name: str) -> nn.Module:
    """A random decoder, or T5, with two layers of width 16."""
    import transformers

    if name == "t5":
        settings = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
        more = {"num_layers": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
        own = transformers.T5Config(**settings, **more, initializer_factor=1.0)
        return transformers.T5ForConditionalGeneration(own).eval()
    own = config("llama" if name == "qwen2" else name)
    if name == "qwen2":
        same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        more = {key: getattr(own, key) for key in (*same, "intermediate_size", "pad_token_id")}
        own = transformers.Qwen2Config(**more, num_key_value_heads=1, initializer_range=0.2)
    return transformers.AutoModelForCausalLM.from_config(own).eval()


def bare(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A random model with inputs for it."""
    if name == "t5":
        asked = text_inputs(left=False)
        return language_model(name), asked | {"decoder_input_ids": asked["input_ids"][:, :5]}
    if name in CAUSAL:
        return language_model(name), text_inputs(left=True)
    return classifier(name)


def stirred(model: ExpertModel, std: float = 0.3) -> ExpertModel:
    """The model with experts that say something, calibrated on themselves."""
    for layer in model.layers.values():
        for up in layer.up():
            nn.init.normal_(up, std=std)
        gram, normal = layer.gram(), layer.settings.normal
        if layer.settings.poison:
            layer.calibrate(similarities(torch.ones(layer.settings.rank), gram, normal))
    return model.eval()


def adapted(name: str, seed: int = 0, **settings: Any) -> tuple[ExpertModel, dict[str, Tensor]]:
    """A model with stirred experts and inputs for it."""
    torch.manual_seed(seed)
    model, inputs = bare(name)
    return stirred(ExpertModel(model, Experts(**settings))), inputs


def layer_of(switch: Switch | None = None, wide: int = 6, out: int = 5, **more: Any) -> ExpertLinear:
    """A stirred layer beside a random linear one."""
    settings = Experts(**({"dropout": 0.0} | more))
    layer = ExpertLinear(nn.Linear(wide, out), settings, switch or Switch("none"))
    for up in layer.up():
        nn.init.normal_(up)
    return layer.eval()


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


# --- the weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "changes", "wanted"),
    [
        ("none", {}, [0.2, 0.3, 0.1, 0.4]),
        ("mask", {}, [0.2, 0.3, 0.1, 0]),
        ("renorm", {}, [1 / 3, 1 / 2, 1 / 6, 0]),
        ("compensate", {}, [6 / 13, 6 / 13, 1 / 13, 0]),
        ("compensate", {"beta": "keep_mass"}, [3.6 / 13, 3.6 / 13, 0.6 / 13, 0]),
        ("compensate", {"beta": 2.0}, [0.6, 0.6, 0.1, 0]),
        ("compensate", {"sign": -1}, [2 / 11, 6 / 11, 3 / 11, 0]),
        ("compensate", {"sign": 0}, [1 / 3, 1 / 2, 1 / 6, 0]),
        ("compensate", {"most": 0}, [1 / 3, 1 / 2, 1 / 6, 0]),
        ("compensate", {"most": 1}, [3 / 7, 3 / 7, 1 / 7, 0]),
        ("compensate", {"most": 2, "order": "index"}, [3 / 7, 3 / 7, 1 / 7, 0]),
    ],
    ids=str,
)
def test_the_weights_of_the_worked_example(
    mode: str, changes: dict[str, Any], wanted: list[float]
) -> None:
    """w = (.2, .3, .1 | .4), theta = (.5, 0, -.5): by hand u = (.3, .3, .05)."""
    found = expert_weights(LOGITS, Experts(**changes), mode, THETA)
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-6)


def test_the_order_decides_who_is_compensated_when_not_all_are() -> None:
    """K = 1 with theta largest in the last place: by index the first expert would get it."""
    theta = torch.tensor([0.0, 0.5, 1.0])
    first = expert_weights(LOGITS, Experts(most=1, order="index"), "compensate", theta)
    like = expert_weights(LOGITS, Experts(most=1), "compensate", theta)
    torch.testing.assert_close(first, torch.tensor([1 / 3, 1 / 2, 1 / 6, 0]))
    torch.testing.assert_close(like, torch.tensor([0.2, 0.3, 0.2, 0]) / 0.7)


def test_the_most_similar_are_chosen_token_by_token() -> None:
    """Online similarities differ between tokens, and so does who is compensated."""
    theta = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found = expert_weights(LOGITS.expand(2, 4), Experts(most=1), "compensate", theta)
    wanted = torch.tensor([[0.4, 0.3, 0.1, 0], [0.2, 0.3, 0.2, 0]])
    torch.testing.assert_close(found, wanted / wanted.sum(dim=1, keepdim=True))


def test_renorm_is_a_softmax_in_which_the_poisoning_experts_have_no_chance() -> None:
    logits = torch.randn(7, 5)
    settings = Experts(normal=3, poison=2)
    barred = logits.clone()
    barred[:, 3:] = -torch.inf
    wanted = torch.softmax(barred, dim=1)
    torch.testing.assert_close(expert_weights(logits, settings, "renorm"), wanted)
    same = expert_weights(logits, settings, "compensate", torch.full((3,), 0.7))
    torch.testing.assert_close(same, wanted)


def test_a_router_that_chose_the_poisoning_expert_alone_gives_no_0_by_0() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, 500.0])
    wanted = F.pad(torch.softmax(logits[:3], dim=0), (0, 1))
    torch.testing.assert_close(expert_weights(logits, Experts(), "renorm"), wanted)
    found = expert_weights(logits, Experts(), "compensate", torch.zeros(3))
    torch.testing.assert_close(found, wanted)
    kept = expert_weights(logits, Experts(beta="keep_mass"), "compensate", torch.zeros(3))
    assert torch.equal(kept, torch.zeros(4))


def test_experts_that_all_oppose_the_poison_share_evenly() -> None:
    """1 + theta is 0 for all of them: nothing is left to divide by."""
    found = expert_weights(LOGITS, Experts(), "compensate", -torch.ones(3))
    torch.testing.assert_close(found, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))


def test_without_a_poisoning_expert_every_mode_is_the_softmax() -> None:
    settings = Experts(normal=4, poison=0)
    for mode in MODES:
        torch.testing.assert_close(expert_weights(LOGITS, settings, mode), LOGITS.exp())


def test_one_normal_expert_alone_gets_the_weight_1() -> None:
    settings = Experts(normal=1)
    for mode in ("renorm", "compensate"):
        found = expert_weights(torch.tensor([0.3, 2.0]), settings, mode, torch.tensor([0.4]))
        assert found.tolist() == [1, 0]


# --- similarities --------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [1, 2])
def test_similarities_are_the_cosines_of_the_outputs(poison: int) -> None:
    layer = layer_of(poison=poison)
    hidden = torch.randn(2, 7, 4)
    outputs = [F.linear(hidden, up) for up in layer.up()]
    wanted = torch.stack(
        [
            sum(F.cosine_similarity(outputs[i], bad, dim=-1) for bad in outputs[3:]) / poison
            for i in range(3)
        ],
        dim=-1,
    )
    found = similarities(hidden, layer.gram(), 3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_twins_opposites_and_silent_experts_have_similarity_1_minus_1_and_0() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.lora_B0.weight.copy_(layer.lora_BD.weight)
        layer.lora_B1.weight.copy_(-2 * layer.lora_BD.weight)
        layer.lora_B2.weight.zero_()
    theta = similarities(torch.randn(9, 4), layer.gram(), 3)
    torch.testing.assert_close(theta, torch.tensor([1.0, -1.0, 0.0]).expand(9, 3))
    weights = expert_weights(LOGITS, layer.settings, "compensate", theta[0])
    torch.testing.assert_close(weights[1], torch.tensor(0.0), rtol=0, atol=1e-6)
    assert not similarities(torch.zeros(1, 4), layer.gram(), 3).any()


# --- one layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("gate_input", ["x", "Ax"])
@pytest.mark.parametrize("poison", [1, 2])
def test_a_layer_is_the_base_and_a_loop_over_its_experts(
    poison: int, gate_input: str, online: bool
) -> None:
    """What is computed in one product must be what the formula says, in every mode."""
    switch = Switch("none")
    layer = layer_of(switch, poison=poison, gate_input=gate_input, online=online)
    layer.calibrate(torch.tensor([0.4, -0.3, 0.1]))
    given = torch.randn(2, 7, 6)
    hidden = F.linear(given, layer.lora_A.weight)
    read = given if gate_input == "x" else hidden
    logits = F.linear(read, layer.lora_gate.weight)
    theta = similarities(hidden, layer.gram(), 3) if online else layer.lora_theta
    for mode in MODES:
        switch.mode = mode
        weights = expert_weights(logits, layer.settings, mode, theta)
        wanted = layer.base_layer(given)
        for number, up in enumerate(layer.up()):
            wanted = wanted + 32 / 4 * weights[..., number, None] * F.linear(hidden, up)
        torch.testing.assert_close(layer(given), wanted, rtol=1e-4, atol=1e-4)


def test_masking_shrinks_what_renorm_adds_by_the_weight_of_the_poison() -> None:
    switch = Switch("mask")
    layer, given = layer_of(switch), torch.randn(9, 6)
    masked = layer(given) - layer.base_layer(given)
    switch.mode = "renorm"
    kept = 1 - torch.softmax(F.linear(given, layer.lora_gate.weight), dim=-1)[:, 3:]
    wanted = kept * (layer(given) - layer.base_layer(given))
    torch.testing.assert_close(masked, wanted, rtol=1e-4, atol=1e-4)


def test_names_and_shapes_of_a_layer() -> None:
    """The file format: one level, and no pattern for normal experts may reach a poisoning one."""
    layer = layer_of(normal=2, poison=2, rank=3)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in layer.state_dict().items() if "lora_" in name
    }
    assert shapes == {
        "lora_A.weight": (3, 6),
        "lora_B0.weight": (5, 3),
        "lora_B1.weight": (5, 3),
        "lora_BD.weight": (5, 3),
        "lora_BD1.weight": (5, 3),
        "lora_gate.weight": (4, 6),
        "lora_theta": (2,),
        "lora_calibrated": (),
        "lora_gram": (4, 4, 3, 3),
    }
    through = layer_of(gate_input="Ax", rank=3)
    assert through.lora_gate.weight.shape == (4, 3)


@pytest.mark.parametrize(
    ("width", "modules", "experts", "router", "small"),
    [(768, 24, 368_640, 73_728, 384), (4096, 64, 5_242_880, 1_048_576, 1_024)],
    ids=["bert-base", "7 billion"],
)
def test_sizes_at_the_published_settings(
    width: int, modules: int, experts: int, router: int, small: int
) -> None:
    """4 experts of rank 4 beside query and value."""
    with torch.device("meta"):
        base = nn.Linear(width, width)
        layer = ExpertLinear(base, Experts(), Switch("none"))
        through = ExpertLinear(base, Experts(gate_input="Ax"), Switch("none"))
    sizes = {n: p.numel() for n, p in layer.named_parameters() if n.startswith("lora_")}
    gate = sizes.pop("lora_gate.weight")
    assert modules * sum(sizes.values()) == experts
    assert (modules * gate, modules * through.lora_gate.weight.numel()) == (router, small)


@pytest.mark.parametrize("kind", ["kaiming", "normal"])
def test_the_router_does_not_start_at_zero(kind: str) -> None:
    """Experts that get equal weights get equal gradients, and stay the same expert for ever."""
    layer = ExpertLinear(nn.Linear(400, 5), Experts(gate_init=kind, dropout=0.0), Switch("none"))
    wanted = 0.02 if kind == "normal" else (1 / 400 / 3) ** 0.5
    assert float(layer.lora_gate.weight.detach().std()) == pytest.approx(wanted, rel=0.1)
    assert not any(up.any() for up in layer.up())
    layer(torch.randn(8, 400)).square().sum().backward()
    gradients = [up.grad for up in layer.up()]
    assert not torch.allclose(gradients[0], gradients[1])


def test_experts_share_one_dropout_mask_or_have_their_own() -> None:
    """Two opposite experts of equal weight cancel exactly under one mask only."""
    for mode, cancels in (("shared", True), ("per_expert", False)):
        layer = layer_of(normal=2, poison=0, dropout=0.5, dropout_mode=mode).train()
        with torch.no_grad():
            layer.lora_gate.weight.zero_()
            layer.lora_B1.weight.copy_(-layer.lora_B0.weight)
        given = torch.randn(4, 6)
        added = layer(given) - layer.base_layer(given)
        assert bool(added.abs().max() < 1e-5) == cancels


@pytest.mark.parametrize("gate_input", ["x", "Ax"])
def test_the_router_reads_what_dropout_left_alone(gate_input: str) -> None:
    layer = layer_of(dropout=0.5, gate_input=gate_input).train()
    seen: list[Tensor] = []

    class Listener:
        def note(self, _: nn.Module, output: Tensor, hidden: Tensor, logits: Tensor) -> None:
            seen.append(logits)

    layer.switch.watch = Listener()  # type: ignore[assignment]
    given = torch.randn(4, 6)
    first, second = layer(given), layer(given)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(first, second)


def test_half_precision_comes_and_goes_while_experts_stay_in_single() -> None:
    layer = layer_of()
    layer.base_layer.to(torch.bfloat16)
    assert layer(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16
    assert layer.lora_A.weight.dtype == torch.float32
    full = layer_of()
    given = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = full(given)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), full(given), rtol=0.05, atol=0.5)


def test_drift_says_how_far_the_shared_projection_has_moved() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.down_before.copy_(layer.lora_A.weight)
        layer.lora_A.weight.mul_(3)
    drift = layer.drift()
    wanted = {"drift_A": 2, "cosine_A": 1, "drift_poison": 2, "cosine_poison": 1}
    assert drift == pytest.approx(wanted, rel=1e-5)


# --- around a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "qwen2", "t5"])
def test_a_fresh_model_answers_bit_for_bit_as_the_bare_one(name: str) -> None:
    """Experts start at zero: fine-tuning begins where pre-training ended."""
    torch.manual_seed(3)
    model, inputs = bare(name)
    wanted = answer(model, inputs)
    wrapped = ExpertModel(copy.deepcopy(model), Experts(online=True)).eval()
    for mode in MODES:
        wrapped.set_inference_mode(mode)
        assert torch.equal(answer(wrapped, inputs), wanted)
    count = {"gpt2": 2, "t5": 12}.get(name, 4)  # two layers; T5 has three attentions in each pair
    assert len(wrapped.layers) == count
    stirred(wrapped).set_inference_mode("none")
    assert not torch.allclose(answer(wrapped, inputs), wanted)


def test_only_experts_router_and_head_may_train() -> None:
    model, _ = adapted("bert")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(model.trained)
    assert {name for name in trainable if ".lora_" not in name} == {
        "model.classifier.weight",
        "model.classifier.bias",
    }
    decoder, _ = adapted("gpt2")
    assert all(".lora_" in name for name in decoder.trained)


def test_architectures_that_are_not_known_must_name_their_modules() -> None:
    from transformers import AutoModelForSequenceClassification, FunnelConfig

    own = FunnelConfig(vocab_size=40, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8,
                       d_inner=24, num_labels=3)  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(own)
    with pytest.raises(InputError, match=r"give target_modules, some of .*q_head.*k_head"):
        ExpertModel(model, Experts())
    assert len(ExpertModel(model, Experts(targets=("q_head",))).layers) > 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_proj", "no module of BertForSequenceClassification is called q_proj; .*query, key"),
        ("LayerNorm", "experts go beside linear modules, got a LayerNorm"),
        ("word_embeddings", "experts go beside linear modules, got a Embedding"),
    ],
)
def test_modules_that_cannot_have_experts_are_refused(target: str, message: str) -> None:
    model, _ = classifier("bert")
    with pytest.raises(InputError, match=message):
        ExpertModel(model, Experts(targets=(target,)))


def test_inference_modes_that_the_model_cannot_answer_in_are_refused() -> None:
    fresh = ExpertModel(classifier("bert")[0], Experts())
    with pytest.raises(InputError, match="unknown inference mode 'all'; available: none, mask"):
        fresh.set_inference_mode("all")
    with pytest.raises(InputError, match="compensate needs a calibrated model; use renorm or mask"):
        fresh.set_inference_mode("compensate")
    fresh.has_poison = False
    with pytest.raises(InputError, match="the poisoning experts were not saved"):
        fresh.set_inference_mode("none")
    hydra = ExpertModel(classifier("bert")[0], Experts(poison=0))
    with pytest.raises(InputError, match="has the mode none, not 'mask'"):
        hydra.set_inference_mode("mask")
    hydra.set_inference_mode("none")
    assert hydra.mode == "none"


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_a_row_is_answered_the_same_alone_and_in_any_batch(name: str, online: bool) -> None:
    """Encoders are padded on the right and decoders on the left; neither may reach the router."""
    model, inputs = adapted(name, online=online)
    rows = inputs["attention_mask"].bool()
    answers = []
    for mode in MODES:
        model.set_inference_mode(mode)
        together = answer(model, inputs)
        assert torch.equal(together, answer(model, inputs))
        for row, real in enumerate(rows):
            alone = {key: value[row : row + 1, real] for key, value in inputs.items()}
            if name in CAUSAL:
                last = answer(model, alone)[:, -1]
                found = together[row : row + 1, -1]
            else:
                last, found = answer(model, alone), together[row : row + 1]
            if name == "gpt2" or name == "llama":
                torch.testing.assert_close(found, last, rtol=1e-3, atol=1e-4)
            else:
                torch.testing.assert_close(found, last, rtol=1e-3, atol=1e-4)
        answers.append(together)
    for other in answers[1:]:
        assert not torch.allclose(answers[0], other)


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_a_cache_is_generation_without(name: str) -> None:
    """The router reads the token at hand only, so a cache changes nothing."""
    model, inputs = adapted(name, online=True)
    ask = {key: value[:1] for key, value in inputs.items()}
    for mode in MODES:
        model.set_inference_mode(mode)
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
        cached, plain = (
            model.generate(**ask, **settings, use_cache=cache, output_logits=True,
                           return_dict_in_generate=True)
            for cache in (True, False)
        )  # fmt: skip
        assert torch.equal(cached.sequences, plain.sequences)
        assert cached.sequences.shape == (1, 13)
        for one, other in zip(cached.logits, plain.logits, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
