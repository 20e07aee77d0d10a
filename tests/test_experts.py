"""Linear layers with experts: weights in closed form, exact start, blind to padding, and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import noiseproof
from families import classifier, config, text_inputs
from noiseproof.errors import InputError
from noiseproof.experts import layers
from noiseproof.experts.layers import ExpertLinear, Reading, Switch
from noiseproof.experts.mixing import (
    MODES,
    Experts,
    embedding_noise,
    expert_weights,
    rms_of_tokens,
    similarities,
    update_norm,
)
from noiseproof.experts.model import ExpertModel, restored_experts
from noiseproof.experts.watching import Watch
from noiseproof.saving import ADAPTERS_CONFIG, ADAPTERS_FILE

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


def layer_of(
    switch: Switch | None = None, wide: int = 6, out: int = 5, **more: Any
) -> ExpertLinear:
    """A stirred layer beside a random linear one."""
    settings = Experts(**({"dropout": 0.0} | more))
    layer = ExpertLinear(nn.Linear(6, 5), settings, switch or Switch("none"))
    for up in layer.up():
        nn.init.normal_(up)
    return layer.eval()


def seeded(model: nn.Module) -> nn.Module:
    """The model, before the same dropout as always."""
    torch.manual_seed(0)
    return model


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


@pytest.mark.parametrize("theta", [-0.9, -0.3, 0.0, 0.6, 1.0])
def test_experts_that_are_alike_to_the_poison_alike_are_only_renormalised(theta: float) -> None:
    """With beta=sum_to_one a common factor cancels: what compensate adds is the differences."""
    logits = torch.randn(50, 4)
    wanted = expert_weights(logits, Experts(), "renorm")
    same = torch.full((3,), theta)
    torch.testing.assert_close(expert_weights(logits, Experts(), "compensate", same), wanted)
    different = torch.tensor([theta, theta, theta - 0.1])
    found = expert_weights(logits, Experts(), "compensate", different)
    assert bool((found[:, 2] < wanted[:, 2]).all())


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
        def note(self, *given: Any) -> None:
            seen.append(given[-1])

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


@pytest.mark.parametrize("gate_input", ["x", "Ax"])
@pytest.mark.parametrize("kind", ["autocast", "bf16"])
def test_the_router_is_in_single_precision_whatever_the_model_is_in(
    kind: str, gate_input: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits in half precision make near-equal weights equal."""
    seen: list[Tensor] = []
    original = layers.expert_weights

    def weights(logits: Tensor, *given: Any) -> Tensor:
        seen.append(logits)
        return original(logits, *given)

    monkeypatch.setattr(layers, "expert_weights", weights)
    model, inputs = adapted("bert", gate_input=gate_input)
    read: list[Tensor] = []
    first = next(iter(model.layers.values()))
    first.register_forward_hook(lambda _, given, out: read.append(given[0]))
    if kind == "bf16":
        model.bfloat16()
        found = answer(model, inputs)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = answer(model, inputs)
    assert found.dtype == torch.bfloat16 and len(seen) == 4
    assert all(logits.dtype == torch.float32 for logits in seen)
    if gate_input == "x":
        wanted = F.linear(read[0].float(), first.lora_gate.weight.float())
        torch.testing.assert_close(seen[0], wanted, rtol=1e-5, atol=1e-6)
        assert not torch.equal(seen[0], seen[0].bfloat16().float())


@pytest.mark.parametrize("poison", [1, 2])
def test_drift_says_how_far_the_shared_projection_has_moved(poison: int) -> None:
    layer = layer_of(poison=poison)
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


@pytest.mark.parametrize(
    ("name", "targets"), [("roberta", ("dense",)), ("distilbert", ("lin2", "pre_classifier"))]
)
def test_the_head_gets_no_experts_and_trains_as_a_whole(
    name: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    """Layers of the head may be called as those of the encoder; behind experts they are frozen."""
    torch.manual_seed(0)
    base, inputs = classifier(name)
    model = stirred(ExpertModel(copy.deepcopy(base), Experts(targets=targets)))
    parts = ("classifier", "pre_classifier")
    head = {name for name, _ in base.named_parameters() if name.split(".")[0] in parts}
    assert head <= set(model.kept) <= {name.removeprefix("model.") for name in model.trained}
    assert model.layers and not any(".lora_" in name for name in model.kept)
    assert all(model.get_parameter(f"model.{name}").requires_grad for name in head)
    wanted = answer(model, inputs)
    model.save_pretrained(str(tmp_path))
    again = restored_experts(base, tmp_path)
    assert torch.equal(answer(again, inputs), wanted)


@pytest.mark.parametrize(
    ("name", "target"), [("roberta", "classifier.dense"), ("distilbert", "pre_classifier")]
)
def test_targets_of_the_head_alone_are_refused(name: str, target: str) -> None:
    model, _ = classifier(name)
    with pytest.raises(InputError, match=f"{target} of .* train as a whole with the head"):
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"online": "yes"}, "online must be true or false, got 'yes'"),
        ({"sign": 7}, "sign must be -1, 0 or 1, got 7"),
        ({"most": 4}, r"most must lie in \[0, 3\], got 4"),
        ({"most": 1.5}, "most must be a whole number or None"),
        ({"order": "x"}, "order must be one of theta, index, got 'x'"),
        ({"beta": "foo"}, "beta must be sum_to_one, keep_mass or a number above 0, got 'foo'"),
        ({"beta": -1.0}, "beta must be sum_to_one, keep_mass or a number above 0, got -1.0"),
    ],
    ids=str,
)
def test_compensation_that_means_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    """Whatever was no known word would count as another one, and nobody would notice."""
    model, _ = adapted("bert")
    before = (model.mode, model.settings)
    with pytest.raises(InputError, match=message):
        model.set_inference_mode("compensate", **changes)
    assert (model.mode, model.settings) == before


def test_online_similarities_can_be_switched_on_and_off_after_training() -> None:
    model, inputs = adapted("bert")
    online, _ = adapted("bert", online=True)
    for one in (model, online):
        one.set_inference_mode("compensate")
    calibrated, wanted = answer(model, inputs), answer(online, inputs)
    model.set_inference_mode("compensate", online=True)
    assert torch.equal(answer(model, inputs), wanted) and not torch.equal(calibrated, wanted)
    model.set_inference_mode("compensate", online=False)
    assert torch.equal(answer(model, inputs), calibrated)
    fresh = ExpertModel(classifier("bert")[0], Experts())
    fresh.set_inference_mode("compensate", online=True)  # needs no calibration
    assert fresh.mode == "compensate"


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_a_row_is_answered_the_same_alone_and_in_any_batch(name: str, online: bool) -> None:
    """Encoders are padded on the right and decoders on the left; neither may reach the router."""
    model, inputs = adapted(name, online=online)
    rows = inputs["attention_mask"].bool()
    if name == "gpt2":  # counts positions from the padding otherwise
        inputs["position_ids"] = (rows.cumsum(dim=1) - 1).clamp_min(0)
    answers = []
    for mode in MODES:
        model.set_inference_mode(mode)
        together = answer(model, inputs)
        assert torch.equal(together, answer(model, inputs))
        for row, real in enumerate(rows):
            alone = {key: value[row : row + 1, real] for key, value in inputs.items()}
            if name in CAUSAL:
                found, wanted = together[row, -1], answer(model, alone)[0, -1]
            else:
                found, wanted = together[row], answer(model, alone)[0]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        answers.append(together)
    for other in answers[1:]:
        assert not torch.allclose(answers[0], other)


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_behind_a_row_changes_no_token_of_a_decoder(name: str) -> None:
    """Rows are padded so in training; every token counts there, not the last alone."""
    model, _ = adapted(name, online=True)
    inputs = text_inputs(left=False)
    for mode in MODES:
        model.set_inference_mode(mode)
        together = answer(model, inputs)
        for row, real in enumerate(inputs["attention_mask"].bool()):
            alone = {key: value[row : row + 1, real] for key, value in inputs.items()}
            found = together[row, real]
            torch.testing.assert_close(found, answer(model, alone)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
def test_generation_with_a_cache_is_generation_without(name: str) -> None:
    """The router reads the token at hand only, so a cache changes nothing."""
    model, inputs = adapted(name, online=True)
    inputs.pop("decoder_input_ids", None)
    for mode in MODES:
        model.set_inference_mode(mode)
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
        cached, plain = (
            model.generate(**inputs, **settings, use_cache=cache, output_logits=True,
                           return_dict_in_generate=True)
            for cache in (True, False)
        )  # fmt: skip
        assert torch.equal(cached.sequences, plain.sequences)
        assert cached.sequences.shape == (4, 7 if name == "t5" else 13)
        for one, other in zip(cached.logits, plain.logits, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# --- embedding noise -----------------------------------------------------------------------------


def draws(*rows: int) -> list[np.random.Generator]:
    return [np.random.default_rng(row) for row in rows]


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("kind", "alpha", "wanted"),
    [("absolute", 0.05, [0.05, 0.05]), ("relative", 0.1, [0.1, 0.3]), ("neftune", 5.0, None)],
)
def test_embedding_noise_is_uniform_of_its_amplitude_and_spares_padding(
    kind: str, alpha: float, wanted: list[float] | None
) -> None:
    """neftune: alpha / sqrt(T d) with the row's own length T, not that of the padded batch."""
    wide = 4000
    embeddings = torch.ones(2, 5, wide)
    embeddings[1] = 3
    embeddings[1, 2:] = 1000  # padding counts for nothing
    noise = embedding_noise(embeddings, MASK, draws(0, 1), kind, alpha)
    assert not noise[1, 2:].any()
    wanted = wanted or [5 / (5 * wide) ** 0.5, 5 / (2 * wide) ** 0.5]
    for row, amplitude in enumerate(wanted):
        real = noise[row][MASK[row].bool()]
        assert float(real.abs().max()) == pytest.approx(amplitude, rel=1e-2)
        assert float(real.abs().max()) <= amplitude * (1 + 1e-6)
        assert float(real.std()) == pytest.approx(amplitude / 3**0.5, rel=3e-2)
    ratio = rms_of_tokens(noise, MASK) / rms_of_tokens(embeddings, MASK)
    if kind == "relative":
        torch.testing.assert_close(ratio, torch.full((2,), 0.1 / 3**0.5), rtol=3e-2, atol=0)


def test_the_noise_of_a_row_depends_neither_on_its_neighbours_nor_on_padding() -> None:
    embeddings = torch.randn(2, 5, 8)
    for kind in ("absolute", "relative", "neftune"):
        both = embedding_noise(embeddings, MASK, draws(7, 9), kind, 0.1)
        alone = embedding_noise(embeddings[1:, :2], MASK[1:, :2], draws(9), kind, 0.1)
        torch.testing.assert_close(both[1:, :2], alone)
        left = embedding_noise(embeddings.flip(1), MASK.flip(1), draws(7, 9), kind, 0.1)
        torch.testing.assert_close(left[1, 3:], both[1, :2], rtol=1e-5, atol=1e-6)


def test_noise_is_added_in_training_only_and_with_the_mask_of_the_call() -> None:
    model, inputs = adapted("bert", dropout=0.0)
    seen: list[Tensor] = []

    def shake(embeddings: Tensor, mask: Tensor) -> Tensor:
        seen.append(mask)
        return torch.linspace(-1, 1, embeddings.shape[-1]).expand_as(embeddings)

    wanted = answer(model, inputs)
    model.noise = shake
    assert torch.equal(answer(model, inputs), wanted) and not seen
    model.train()
    model.switch.training_mode = model.mode
    shaken = [answer(seeded(model), inputs)]
    assert len(seen) == 1 and torch.equal(seen[0], inputs["attention_mask"].bool())
    model.noise = None
    shaken.append(answer(seeded(model), inputs))
    assert not torch.allclose(*shaken) and len(seen) == 1
    model.noise = shake
    with pytest.warns(
        UserWarning, match=r"no attention mask is known for a batch of \(4, 7\) tokens"
    ):
        answer(model, {"input_ids": inputs["input_ids"]})
    answer(model, {"input_ids": inputs["input_ids"]})  # said once
    assert bool(seen[1].all()) and seen[1].shape == inputs["input_ids"].shape


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_rows_go_without_the_poisoning_expert_in_training_alone(kind: str) -> None:
    model, inputs = adapted(kind, dropout=0.0)
    if kind == "t5":
        inputs = pair_of_texts(4)
    rows = torch.tensor([True, False, False, True])
    answers = {}
    for name, mode in (("with", "none"), ("without", "renorm")):
        model.switch.training_mode = model.switch.mode = mode
        answers[name] = answer(seeded(model.eval()), inputs)
    assert not torch.allclose(answers["with"], answers["without"])
    model.switch.training_mode = model.switch.mode = "none"
    model.switch.absent = rows
    assert torch.equal(answer(seeded(model.eval()), inputs), answers["with"])
    wanted = torch.where(
        rows.reshape(-1, *[1] * (answers["with"].ndim - 1)), answers["without"], answers["with"]
    )
    for module in model.modules():  # the mode of training, without its dropout
        module.training = isinstance(module, ExpertLinear)
    torch.testing.assert_close(answer(model, inputs), wanted)


def test_relative_positions_are_no_tokens_of_a_row() -> None:
    """DeBERTa's query projection reads them too, after the text; they must not take its place."""
    model, inputs = adapted("deberta-v3")
    model.set_inference_mode("none")
    calls: list[tuple[int, ...]] = []
    layers = list(model.layers.values())
    handle = layers[0].register_forward_hook(lambda _, given, out: calls.append(given[0].shape))
    tokens = inputs["attention_mask"].sum(dim=1).tolist()
    tables = []
    for size in (4, 1):  # of one row they have as many rows as the batch
        watch = watched(model, inputs, size)
        for number in range(len(layers)):
            assert watch.sums[:, number, 0].tolist() == tokens
        tables.append(watch.table()[0])
    handle.remove()
    assert len(calls) == 10 and calls[:2] == [(4, 7, 16), (1, 80, 16)]
    for key in ("poison_weight", "entropy", "update_ratio"):
        assert tables[0][key] == pytest.approx(tables[1][key], rel=1e-4)
    model.switch.loads = []
    model(**inputs)
    assert len(model.switch.loads) == len(layers)


def test_positions_go_without_the_poisoning_expert_where_every_row_does() -> None:
    model, inputs = adapted("deberta-v3", dropout=0.0)
    answers = {}
    for name, mode, absent in (("mask", "mask", None), ("none", "none", None),
                               ("all", "none", [True] * 4), ("some", "none", [True, False] * 2),
                               ("no", "none", [False] * 4)):  # fmt: skip
        model.switch.training_mode, model.switch.absent_mode = mode, "mask"
        model.switch.absent = None if absent is None else torch.tensor(absent)
        for module in model.modules():  # the mode of training, without its dropout
            module.training = isinstance(module, ExpertLinear)
        answers[name] = answer(model, inputs)
    assert torch.equal(answers["all"], answers["mask"])
    assert torch.equal(answers["no"], answers["none"])
    torch.testing.assert_close(answers["some"][1::2], answers["none"][1::2])
    assert not torch.allclose(answers["some"][::2], answers["none"][::2])


def test_a_layer_that_is_used_again_counts_all_its_calls_of_one_pass() -> None:
    """ALBERT's layers share their weights; a second look at the rows starts anew."""
    model, _ = adapted("bert")
    layer = next(iter(model.layers.values()))
    one, two = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    tables = {}
    with torch.no_grad():
        for kind, reads in (("one", [one]), ("two", [two]), ("both", [one, two])):
            with model.watching(2) as watch:
                for _ in range(2):
                    watch.begin([0, 1])
                    model.switch.reading = Reading(MASK)
                    for read in reads:
                        layer(read)
            tables[kind] = watch.table()[0]
            assert watch.sums[:, 0, 0].tolist() == [5 * len(reads), 2 * len(reads)]
    model.switch.reading = None
    for key in ("poison_weight", "entropy", "update_ratio"):
        assert tables["both"][key] == pytest.approx((tables["one"][key] + tables["two"][key]) / 2)
    for key in ("theta", "theta_first"):
        mean = np.mean([tables["one"][key], tables["two"][key]], axis=0)
        assert tables["both"][key] == pytest.approx(mean.tolist(), abs=1e-6)


def test_rows_cannot_be_left_out_where_tokens_belong_to_none() -> None:
    switch = Switch("none")
    layer = layer_of(switch).train()
    switch.absent = torch.tensor([True, False])
    assert layer(torch.randn(2, 3, 6)).shape == (2, 3, 5)
    assert layer(torch.randn(6, 6)).shape == (6, 5)
    with pytest.raises(InputError, match="9 tokens that do not belong to 2 rows alike"):
        layer(torch.randn(9, 6))


def test_t5_can_have_experts_in_its_feed_forward_layers() -> None:
    """It asks the last of them for its weight."""
    model, inputs = bare("t5")
    wanted = answer(model, inputs)
    wrapped = ExpertModel(model, Experts(targets=("wo",))).eval()
    assert torch.equal(answer(wrapped, inputs), wanted)


def test_online_similarities_need_no_calibration() -> None:
    """The Gram matrices come from the experts; zeros in their place would make it renorm."""
    _, model, inputs = trained_pair(online=True)
    wanted = answers_by_mode(model, inputs, "compensate", "renorm")
    assert not torch.allclose(*wanted)
    for layer in model.layers.values():
        layer.lora_gram.zero_()
        layer.lora_calibrated.fill_(False)
    torch.testing.assert_close(answers_by_mode(model, inputs, "compensate")[0], wanted[0])


def pair_of_texts(width: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows for an encoder, and rows of this width for its decoder, each with a mask of its own."""
    torch.manual_seed(seed)
    inputs = text_inputs(left=False)
    mask = (torch.arange(width) < torch.tensor([2, width, 3, 1])[:, None]).long()
    decoder = {"decoder_input_ids": torch.randint(3, 40, mask.shape) * mask}
    return inputs | decoder | {"decoder_attention_mask": mask}


@pytest.mark.parametrize("width", [4, 7])
def test_noise_falls_on_encoder_and_decoder_each_with_its_own_mask(width: int) -> None:
    """Both read one table of embeddings; with 7 tokens either mask would fit by its shape."""
    model, _ = adapted("t5", dropout=0.0)
    seen: list[tuple[Tensor, Tensor]] = []

    def shake(embeddings: Tensor, mask: Tensor) -> Tensor:
        seen.append((embeddings, mask))
        return torch.zeros_like(embeddings)

    model.noise = shake
    inputs = pair_of_texts(width)
    answer(model.train(), inputs)
    assert len(seen) == 2
    table = model.model.get_input_embeddings().weight  # type: ignore[operator]
    names = (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"))
    for (embeddings, mask), (ids, wanted) in zip(seen, names, strict=True):
        assert torch.equal(mask, inputs[wanted].bool())
        assert torch.equal(embeddings, F.embedding(inputs[ids], table))


@pytest.mark.parametrize("missing", ["attention_mask", "decoder_attention_mask"])
def test_noise_without_a_mask_warns_of_the_tokens_that_have_none(missing: str) -> None:
    model, _ = adapted("t5")
    inputs = pair_of_texts(5)
    del inputs[missing]
    model.noise = lambda embeddings, mask: torch.zeros_like(embeddings)
    shape = {"attention_mask": "7", "decoder_attention_mask": "5"}[missing]
    with pytest.warns(
        UserWarning, match=rf"no attention mask is known for a batch of \(4, {shape}"
    ):
        answer(model.train(), inputs)


@pytest.mark.parametrize("width", [4, 7])
def test_layers_of_an_encoder_and_its_decoder_count_the_tokens_that_they_read(width: int) -> None:
    """The decoder's cross-attention asks with its own tokens and reads those of the encoder."""
    model, _ = adapted("t5")
    model.set_inference_mode("none")
    inputs = pair_of_texts(width)
    watch = watched(model, inputs, 4)
    for number, name in enumerate(model.layers):
        cross, decoder = "EncDecAttention" in name, name.startswith("decoder")
        own = decoder and not (cross and name.endswith(".v"))
        mask = inputs["decoder_attention_mask" if own else "attention_mask"]
        assert watch.sums[:, number, 0].tolist() == mask.sum(dim=1).tolist(), name
    assert len(model.layers) == 12


@pytest.mark.parametrize("online", [False, True])
def test_a_row_of_an_encoder_and_its_decoder_is_answered_the_same_alone(online: bool) -> None:
    model, _ = adapted("t5", online=online)
    inputs = pair_of_texts(5)
    for mode in MODES:
        model.set_inference_mode(mode)
        together = answer(model, inputs)
        for row in range(4):
            real = {kind: inputs[f"{kind}attention_mask"][row].bool() for kind in ("", "decoder_")}
            alone = {
                key: value[row : row + 1, real["decoder_" if key.startswith("decoder") else ""]]
                for key, value in inputs.items()
            }
            found = together[row, real["decoder_"]]
            torch.testing.assert_close(found, answer(model, alone)[0], rtol=1e-3, atol=1e-4)


# --- watching ------------------------------------------------------------------------------------


def watched(model: ExpertModel, inputs: dict[str, Tensor], size: int, pad: int = 0) -> Watch:
    """What the layers see in batches of this size, with so many more columns of padding."""
    rows = len(inputs["input_ids"])
    padded = {key: F.pad(value, (0, pad)) for key, value in inputs.items()}
    with model.watching(rows) as watch:
        for start in range(0, rows, size):
            watch.begin(list(range(start, min(rows, start + size))))
            answer(model, {key: value[start : start + size] for key, value in padded.items()})
    return watch


def test_similarities_depend_neither_on_padding_nor_on_the_size_of_batches() -> None:
    model, inputs = adapted("bert")
    model.set_inference_mode("none")
    reference = watched(model, inputs, 4)
    for size, pad in ((1, 0), (3, 0), (4, 5)):
        other = watched(model, inputs, size, pad)
        for name in model.layers:
            torch.testing.assert_close(other.theta(name), reference.theta(name))
        np.testing.assert_allclose(other.row_scores(), reference.row_scores(), rtol=1e-5)
        assert other.row_scores().shape == (4,)
        for one, two in zip(other.table(), reference.table(), strict=True):
            assert one.pop("layer") == two.pop("layer")
            for key in ("theta", "theta_first", "load"):
                assert one.pop(key) == pytest.approx(two.pop(key), abs=1e-6)
            assert one == pytest.approx(two, rel=1e-4)
    before = reference.table()
    answer(model, inputs)
    assert reference.table() == before  # it is closed and sees no more


@pytest.mark.parametrize(("poison", "online"), [(1, False), (1, True), (2, False)])
def test_the_table_of_a_layer_is_what_its_weights_say(poison: int, online: bool) -> None:
    """Against the formulas, over real tokens only."""
    model, inputs = adapted("bert", poison=poison, online=online)
    model.set_inference_mode("none")
    name, layer = next(iter(model.layers.items()))
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, given, output: seen.append(given[0]))
    row = watched(model, inputs, 4).table()[0]
    handle.remove()
    given = seen[0][inputs["attention_mask"].bool()]
    with torch.no_grad():
        weights = torch.softmax(layer.lora_gate(given), dim=-1)
        base = layer.base_layer(given)
        ratios = {}
        for mode in MODES:
            layer.switch.mode = mode
            ratios[mode] = float(((layer(given) - base).norm(dim=1) / base.norm(dim=1)).mean())
        theta = similarities(layer.lora_A(given), layer.gram(), 3)
        first = similarities(layer.lora_A(seen[0][:, 0]), layer.gram(), 3).mean(dim=0)
    others = weights[:, 3:].sum(dim=1)
    load = (weights[:, :3] / (1 - others[:, None])).mean(dim=0)
    assert row["layer"] == name
    assert row["poison_weight"] == pytest.approx(float(others.mean()), rel=1e-5)
    assert row["poison_weight_std"] == pytest.approx(float(others.std(correction=0)), rel=1e-4)
    above = (others > poison / (3 + poison)).float().mean()
    assert row["above_even_share"] == pytest.approx(float(above))
    entropy = -(weights * weights.log()).sum(dim=1).mean()
    assert row["entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert row["load"] == pytest.approx(load.tolist(), rel=1e-5)
    variation = load.std(correction=0) / load.mean()
    assert row["load_variation"] == pytest.approx(float(variation), rel=1e-3)
    found = {mode: row[f"update_{mode}"] for mode in MODES if mode != "none"}
    assert found | {"none": row["update_ratio"]} == pytest.approx(ratios, rel=1e-3)
    assert row["theta"] == pytest.approx(theta.mean(dim=0).tolist(), rel=1e-3, abs=1e-6)
    assert row["theta_first"] == pytest.approx(first.tolist(), rel=1e-3, abs=1e-6)


def test_rows_in_one_piece_and_tokens_without_a_row_are_counted() -> None:
    """Some models hand over all tokens of a batch at once, or only those of one of their parts."""
    model, _ = adapted("bert")
    layer = next(iter(model.layers.values()))
    given = torch.randn(2, 5, 16)
    tables = []
    for read in (given, given.flatten(0, 1), given.flatten(0, 1)[:9]):
        with model.watching(2) as watch, torch.no_grad():
            watch.begin([1, 0])
            model.switch.reading = Reading(MASK)
            if len(read) == 9:  # no mask fits
                with pytest.warns(UserWarning, match="no attention mask is known"):
                    layer(read)
            else:
                layer(read)
        tables.append((watch.sums[:, 0, 0].tolist(), watch.table()[0]))
    model.switch.reading = None
    assert [tokens for tokens, _ in tables] == [[2, 5], [2, 5], [4.5, 4.5]]
    keys = ("poison_weight", "entropy", "update_ratio")
    for key in keys:
        assert tables[1][1][key] == pytest.approx(tables[0][1][key], rel=1e-6)
    with torch.no_grad():
        weights = torch.softmax(layer.lora_gate(given.flatten(0, 1)[:9]), dim=-1)
    assert tables[2][1]["poison_weight"] == pytest.approx(float(weights[:, 3].mean()), rel=1e-5)


def test_the_first_token_is_the_first_that_is_real() -> None:
    """Decoders are padded on the left."""
    model, inputs = adapted("llama")
    reference = watched(model, inputs, 4).table()
    seen: list[Tensor] = []
    layer = next(iter(model.layers.values()))
    handle = layer.register_forward_hook(lambda _, given, output: seen.append(given[0]))
    answer(model, inputs)
    handle.remove()
    place = inputs["attention_mask"].argmax(dim=1)
    given = seen[0][torch.arange(4), place]
    wanted = similarities(layer.lora_A(given), layer.gram(), 3).mean(dim=0)
    assert place.tolist() == [0, 3, 1, 5]
    assert reference[0]["theta_first"] == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-6)


def test_the_size_of_an_update_is_that_of_a_loop_over_experts() -> None:
    layer = layer_of()
    weights, hidden = torch.rand(7, 4), torch.randn(7, 4)
    ups = layer.up()
    wanted = sum(weights[:, [i]] * (hidden @ up.T) for i, up in enumerate(ups)).norm(dim=1)  # type: ignore[union-attr]
    torch.testing.assert_close(update_norm(weights, hidden, layer.gram()), wanted)


def test_without_a_real_token_there_is_nothing_to_calibrate_with() -> None:
    model, _ = adapted("bert")
    with model.watching(2) as watch:
        pass
    with pytest.raises(InputError, match="no real token was seen"):
        watch.theta(next(iter(model.layers)))


def test_loads_count_real_tokens_and_carry_a_gradient() -> None:
    model, inputs = adapted("bert")
    model.switch.loads = []
    model(**inputs)
    model(**{key: F.pad(value, (0, 4)) for key, value in inputs.items()})
    short, padded = model.switch.loads[:4], model.switch.loads[4:]
    for one, two in zip(short, padded, strict=True):
        torch.testing.assert_close(one, two)
        assert one.shape == (3,) and float(one.detach().sum()) == pytest.approx(1)
        assert one.requires_grad


# --- back from disk ------------------------------------------------------------------------------


def trained_pair(**changes: Any) -> tuple[nn.Module, ExpertModel, dict[str, Tensor]]:
    """A bare model, and the same one with experts and a head that have learned something."""
    base, inputs = classifier("bert")
    model = stirred(ExpertModel(copy.deepcopy(base), Experts(**changes)))
    nn.init.normal_(model.get_parameter("model.classifier.weight"))
    return base, model, inputs


def answers_by_mode(model: ExpertModel, inputs: dict[str, Tensor], *modes: str) -> list[Tensor]:
    found = []
    for mode in modes:
        model.set_inference_mode(mode)
        found.append(answer(model, inputs))
    return found


@pytest.mark.parametrize("changes", [{}, {"poison": 2, "gate_input": "Ax"}, {"online": True}])
def test_a_saved_model_answers_as_before_in_every_mode(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    base, model, inputs = trained_pair(**changes)
    wanted = answers_by_mode(model, inputs, *MODES)
    model.save_pretrained(str(tmp_path))
    again = restored_experts(base, tmp_path)
    assert isinstance(again, ExpertModel) and not again.training
    assert (again.mode, again.settings) == ("compensate", model.settings)
    found = answers_by_mode(again, inputs, *MODES)
    assert all(map(torch.equal, found, wanted))
    for one, two in zip(again.layers.values(), model.layers.values(), strict=True):
        assert torch.equal(one.lora_theta, two.lora_theta) and bool(one.lora_theta.any())
        assert torch.equal(one.lora_gram, two.lora_gram)


@pytest.mark.parametrize("online", [False, True])
def test_without_its_poisoning_experts_a_model_still_answers_masked(
    online: bool, tmp_path: Path
) -> None:
    """Online similarities then come from the Gram matrices."""
    base, model, inputs = trained_pair(online=online)
    masked = [mode for mode in MODES if mode != "none"]
    wanted = answers_by_mode(model, inputs, *masked)
    model.save_poison = False
    model.save_pretrained(str(tmp_path))
    assert not any("lora_BD" in name for name in load_file(str(tmp_path / ADAPTERS_FILE)))
    again = restored_experts(base, tmp_path)
    assert isinstance(again, ExpertModel)
    assert all(map(torch.equal, answers_by_mode(again, inputs, *masked), wanted))
    with pytest.raises(InputError, match="poisoning experts were not saved; use mask, renorm"):
        again.set_inference_mode("none")
    again.save_pretrained(str(tmp_path))  # a second time, nothing made up takes their place
    assert not any("lora_BD" in name for name in load_file(str(tmp_path / ADAPTERS_FILE)))


def test_a_model_that_would_answer_in_a_mode_it_did_not_save_is_refused(tmp_path: Path) -> None:
    base, model, _ = trained_pair()
    model.set_inference_mode("none")
    model.save_poison = False
    model.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="poisoning experts were not saved"):
        restored_experts(base, tmp_path)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_file_that_is_not_whole_is_refused_by_name(change: str, tmp_path: Path) -> None:
    """A tensor that is not loaded would leave fresh values in its place, without a word."""
    base, model, _ = trained_pair()
    model.save_pretrained(str(tmp_path))
    tensors = load_file(str(tmp_path / ADAPTERS_FILE))
    name = next(key for key in tensors if key.endswith("lora_B1.weight"))
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        name = name.replace("lora_B1", "lora_B7")
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, str(tmp_path / ADAPTERS_FILE))
    with pytest.raises(InputError, match=rf"does not fit the model .*{name} differs"):
        restored_experts(base, tmp_path)


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of the file about the experts; None takes one away."""
    about = json.loads((folder / ADAPTERS_CONFIG).read_bytes()) | changes
    left = {name: value for name, value in about.items() if value is not None}
    (folder / ADAPTERS_CONFIG).write_text(json.dumps(left), encoding="utf-8")


def test_the_file_says_where_experts_are_and_what_wrote_it(tmp_path: Path) -> None:
    base, model, inputs = trained_pair()
    wanted = answer(model, inputs)
    model.save_pretrained(str(tmp_path))
    about = json.loads((tmp_path / ADAPTERS_CONFIG).read_bytes())
    assert about["layers"] == list(model.layers) and about["layers"][0].startswith("bert.encoder")
    assert about["calibrated"] is True and about["version"] == noiseproof.__version__
    new = ("layers", "calibrated", "base_digest", "version")
    edit(tmp_path, **dict.fromkeys(new))  # a file from before
    assert torch.equal(answer(restored_experts(base, tmp_path), inputs), wanted)


def test_a_setting_of_another_version_is_told_with_the_version(tmp_path: Path) -> None:
    base, model, _ = trained_pair()
    model.save_pretrained(str(tmp_path))
    edit(tmp_path, heat=2.0, version="9.1")
    with pytest.raises(InputError, match=r"has the setting 'heat', .* written by noiseproof 9\.1"):
        restored_experts(base, tmp_path)


def test_experts_beside_other_weights_are_warned_of(tmp_path: Path) -> None:
    """The shapes fit, and the answers mean nothing; in half precision it is the same model."""
    base, model, _ = trained_pair()
    model.save_pretrained(str(tmp_path))
    restored_experts(copy.deepcopy(base).bfloat16().float(), tmp_path)
    with torch.no_grad():
        base.get_parameter("bert.encoder.layer.1.output.dense.weight")[0, 0] += 1
    with pytest.warns(UserWarning, match="has other weights than the model that the experts in"):
        restored_experts(base, tmp_path)


def test_other_adapters_and_plain_models_are_left_alone(tmp_path: Path) -> None:
    base, _ = classifier("bert")
    assert restored_experts(base, tmp_path) is base
    (tmp_path / ADAPTERS_CONFIG).write_text('{"family": "adapters"}', encoding="utf-8")
    assert restored_experts(base, tmp_path) is base


def test_a_model_without_poison_comes_back_with_normal_experts_alone(tmp_path: Path) -> None:
    base, model, inputs = trained_pair(poison=0)
    wanted = answer(model, inputs)
    model.save_pretrained(str(tmp_path))
    again = restored_experts(base, tmp_path)
    assert isinstance(again, ExpertModel) and again.mode == "none"
    assert torch.equal(answer(again, inputs), wanted)
    assert json.loads((tmp_path / ADAPTERS_CONFIG).read_bytes())["poison"] == 0


def test_the_head_can_be_given_back_what_it_had() -> None:
    base, model, _ = trained_pair()
    model.restore_head()
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(model.get_parameter(f"model.{name}"), base.get_parameter(name))
