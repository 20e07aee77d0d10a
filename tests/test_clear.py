"""CleaR: an exact bypass, gates at their rates, and an objective equal to a slow version."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import noiseproof
from families import ALL, CLASSES, classifier
from noiseproof.engine import Engine
from noiseproof.errors import InputError
from noiseproof.method import Batch, Run, Stage
from noiseproof.methods.baselines import CrossEntropy
from noiseproof.methods.clear import SALT_SCORE, SALT_TRAIN, CleaR
from noiseproof.methods.clear_gates import (
    SALT_EVAL,
    Routing,
    gate_table,
    gated_parameters,
    open_gates,
    route,
    row_keys,
    row_wise_targets,
)
from noiseproof.mixture import LossMixture
from noiseproof.models import count_parameters, encoder_layers, is_head, plain_model
from noiseproof.tuning import tune_model
from tiny import (
    LABELS,
    Answers,
    Tiny,
    numbers,
    same_weights,
    table,
    tiny,
    train_settings,
    weights,
)

LAYERS = 2  # of the tiny BERT


def with_updates(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Give every LoRA update a size: B starts at zero, and then gates change nothing."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model


GATED: dict[str, Any] = {"gamma": 0.8, "max_clean_loss": None}  # drawn, and from the warm-up on


def routed(tiny_run: Tiny, **settings: Any) -> nn.Module:
    """The tiny BERT in eval mode, with gated LoRA whose updates are not zero."""
    model = CleaR(**settings).prepare_model(copy.deepcopy(tiny_run.model))
    return with_updates(model).eval()


def gated(model: nn.Module, inputs: dict[str, Tensor], gate: Tensor | None) -> Tensor:
    """Logits of one call with these gates."""
    model.noiseproof_routing.set(gate)  # type: ignore[union-attr, operator]
    logits: Tensor = model(**inputs).logits
    return logits


def trimmed(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row without its padding, as a batch."""
    real = inputs["attention_mask"][row].bool()
    return {name: values[row : row + 1, real] for name, values in inputs.items()}


def lora_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and "lora_" in name
    }


def run_of(model: nn.Module, rows: int, epoch: int = 0, seed: int = 0, **columns: Tensor) -> Run:
    """A run that stands at the start of an epoch; nothing can be predicted."""
    labels = torch.arange(rows) % CLASSES

    def predict(before_batch: Any = None) -> Tensor:
        raise AssertionError("this test predicts nothing")

    run = Run(model, labels, CLASSES, predict, torch.Generator(), seed=seed, epoch=epoch, epochs=6)
    run.columns = dict(columns)
    if "clean_prob" in columns:  # routing has begun
        run.columns["gate_prob"] = columns["clean_prob"]
    return run


def bare(layers: int, **settings: Any) -> nn.Module:
    """A model that is nothing but its gates."""
    model = nn.Linear(1, 1)
    model.noiseproof_routing = Routing(layers, **settings)  # type: ignore[assignment]
    return model


def batch_of(run: Run, rows: Tensor) -> Batch:
    columns = {name: column[rows] for name, column in run.columns.items()}
    return Batch({}, run.labels[rows], rows, columns)


def train_gates(method: CleaR, run: Run, rows: Tensor, routed: bool = True) -> Tensor:
    gate = method._train_gates(batch_of(run, rows), run, routed)
    assert gate is not None
    return gate


def at_epoch(tiny_run: Tiny, model: nn.Module, epoch: int, seed: int = 0) -> Run:
    """A run on the tiny rows whose `predict` is the engine's."""
    engine = Engine(train_settings())
    engine.net = model

    def predict(before_batch: Any = None) -> Tensor:
        return engine.predict(tiny_run.encoded, before_batch)

    def encode(position: str, before_batch: Any = None) -> Tensor:
        return engine.encode(model, tiny_run.encoded, position, before_batch)

    source = torch.Generator()
    run = Run(model, tiny_run.labels, CLASSES, predict, source, seed=seed, epoch=epoch, epochs=6)
    run.encode = encode
    return run


def routed_step(
    tiny_run: Tiny, clean: Tensor, known: bool, **settings: Any
) -> tuple[Tensor, dict[str, Tensor], Run]:
    """Loss and gradients of one routed step on eight rows at these clean probabilities."""
    torch.manual_seed(0)
    method = CleaR(gamma=1.0, lambda_consistency=0.0, **settings)
    model = with_updates(method.prepare_model(copy.deepcopy(tiny_run.model))).train()
    run = at_epoch(tiny_run, model, epoch=3)
    if not known:
        run.encode = None
    run.columns["gate_prob"] = torch.zeros(len(run.labels))
    run.columns["gate_prob"][:8] = clean
    rows = np.arange(8)
    batch = dataclasses.replace(
        batch_of(run, torch.from_numpy(rows)), inputs=tiny_run.encoded.inputs(rows)
    )
    loss = method.compute_loss(model, batch, run)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found, run


# --- the bypass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_closed_gates_are_the_frozen_encoder_bit_for_bit(name: str) -> None:
    """Else rows judged wrong would still write into, or read from, the adapters."""
    model, inputs = classifier(name)
    wanted = model(**inputs).logits
    adapted = with_updates(CleaR(rank=2).prepare_model(model)).eval()
    assert torch.equal(gated(adapted, inputs, torch.zeros(4, LAYERS)), wanted)
    assert not torch.allclose(gated(adapted, inputs, None), wanted)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_closed_gates_close_under_every_attention_back_end(attention: str) -> None:
    """A fused attention that skips submodule hooks would ignore the gates without a word."""
    model, inputs = classifier("bert", attention)
    wanted = model(**inputs).logits
    adapted = with_updates(CleaR(rank=2).prepare_model(model)).eval()
    assert torch.equal(gated(adapted, inputs, torch.zeros(4, LAYERS)), wanted)


@pytest.mark.parametrize("name", ALL)
def test_open_gates_are_the_ordinary_peft_forward(name: str) -> None:
    """Else the saved adapter would not be the model that was trained."""
    inner, inputs = classifier(name)
    plain = copy.deepcopy(inner)
    model = with_updates(CleaR(rank=4).prepare_model(inner)).eval()
    targets = row_wise_targets(plain)
    plain = tune_model(plain, "lora", rank=4, target_modules=targets).eval()
    plain.load_state_dict(model.state_dict())
    wanted = plain(**inputs).logits
    assert torch.equal(gated(model, inputs, torch.ones(4, LAYERS)), wanted)
    assert torch.equal(gated(model, inputs, None), wanted)


def test_gates_are_neither_parameters_nor_buffers(tiny_run: Tiny) -> None:
    """A gate among the parameters would get gradients, optimizer state and a fixed batch size."""
    plain = tune_model(copy.deepcopy(tiny_run.model), "lora", rank=8)
    assert routed(tiny_run).state_dict().keys() == plain.state_dict().keys()


def test_a_closed_layer_gets_exactly_no_gradient_and_an_open_one_gets_some(tiny_run: Tiny) -> None:
    """Else wrong labels would leak into the adapters that the gate is to protect."""
    model = routed(tiny_run)
    inputs = tiny_run.encoded.inputs(np.arange(6))
    for closed in range(LAYERS):
        gate = torch.ones(6, LAYERS)
        gate[:, closed] = 0
        model.zero_grad()
        F.cross_entropy(gated(model, inputs, gate), tiny_run.labels[:6]).backward()
        gradients = lora_gradients(model)
        assert len(gradients) == LAYERS * 2 * 2  # query and value, A and B
        for name, gradient in gradients.items():
            if f"layer.{closed}." in name:
                assert torch.count_nonzero(gradient) == 0, name
            else:
                assert torch.count_nonzero(gradient) > 0, name


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_mixed_batch_equals_its_rows_one_by_one(name: str) -> None:
    """Gates must follow their own row, whatever the padding (BERT right, Llama left)."""
    model, inputs = classifier(name)
    adapted = with_updates(CleaR(rank=2).prepare_model(model)).eval()
    gate = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    together = gated(adapted, inputs, gate)
    for row in range(4):
        alone = gated(adapted, trimmed(inputs, row), gate[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, gated(adapted, inputs, gate.flip(0)), atol=1e-4)


def test_the_gradient_of_a_mixed_batch_is_the_sum_over_its_rows(tiny_run: Tiny) -> None:
    """A gate that is broadcast over the wrong dimension shows here and not in the logits."""
    model = routed(tiny_run)
    inputs = tiny_run.encoded.inputs(np.arange(4))
    labels, gate = tiny_run.labels[:4], torch.tensor([[0.0, 1], [1, 0], [1, 1], [0, 0]])
    F.cross_entropy(gated(model, inputs, gate), labels, reduction="sum").backward()
    together = lora_gradients(model)
    model.zero_grad()
    for row in range(4):
        logits = gated(model, trimmed(inputs, row), gate[row : row + 1])
        F.cross_entropy(logits, labels[row : row + 1]).backward()  # gradients add up
    alone = lora_gradients(model)
    for name in together:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-5)


def test_gates_hold_inside_gradient_checkpointing(tiny_run: Tiny) -> None:
    """Layers run a second time in the backward pass; a gate cleared by then would be open."""
    gate = torch.tensor([[0.0, 1], [1, 0], [1, 1], [0, 0]])
    inputs = tiny_run.encoded.inputs(np.arange(4))
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = routed(tiny_run, dropout=0.0).train()
        if checkpointing:
            inner = plain_model(model)
            newer = getattr(inner, "activation_checkpointing_enable", None)
            (newer or inner.gradient_checkpointing_enable)({"use_reentrant": False})
        calls: list[int] = []
        projection = encoder_layers(model)[0].attention.self.query.lora_B["default"]
        projection.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        F.cross_entropy(gated(model, inputs, gate), tiny_run.labels[:4]).backward()
        assert len(calls) == 1 + checkpointing
        found.append(lora_gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_a_training_step_without_gates_is_an_error(tiny_run: Tiny) -> None:
    """Else a forgotten `set` would train with the gates of the batch before."""
    model = routed(tiny_run).train()
    with pytest.raises(RuntimeError, match="no gates were set"):
        model(**tiny_run.encoded.inputs(np.arange(2)))
    model.eval()
    gated(model, tiny_run.encoded.inputs(np.arange(2)), torch.zeros(2, LAYERS))
    model(**tiny_run.encoded.inputs(np.arange(3)))  # the old gate of two rows is not used again


@pytest.mark.parametrize("peft", ["lora", "adapter"])
def test_a_copy_of_a_gated_model_answers_by_itself(peft: str, tiny_run: Tiny) -> None:
    """With its own weights and its own gates, not with those of the model it was copied from."""
    model = routed(tiny_run, peft=peft, adapter_init="linear")
    inputs = tiny_run.encoded.inputs(np.arange(3))
    wanted = model(**inputs).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs).logits, wanted)
    closed = gated(copied, inputs, torch.zeros(3, LAYERS))
    assert not torch.allclose(closed, wanted)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not bool(copied(**inputs).logits.any())
    assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize("clean", [[0, 1] * 4, [0] * 8, [1] * 8, [0] + [1] * 7])
def test_closed_rows_may_take_known_features(tiny_run: Tiny, clean: list[float]) -> None:
    """The shortcut for rows with closed gates changes neither the loss nor any gradient."""
    short, gradients, run = routed_step(tiny_run, torch.tensor(clean), known=True)
    whole, wanted, _ = routed_step(tiny_run, torch.tensor(clean), known=False)
    assert (run.model.noiseproof_routing.frozen is not None) == (set(clean) == {0, 1})
    torch.testing.assert_close(short, whole)
    assert gradients.keys() == wanted.keys()  # Adam moves on a gradient of 0, not on None
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_closed_rows_take_known_features_in_bf16_as_well(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the fp32 encoder, logits in bf16 look as if the head read something else."""
    found: list[int] = []

    class Watching(CleaR):
        def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
            loss = super().compute_loss(model, batch, run)
            known = run.model.noiseproof_routing.frozen
            found.append(0 if known is None else len(known))
            return loss

    monkeypatch.setattr("noiseproof.engine.choose_precision", lambda *asked: "bf16")
    tiny_run.fit(Watching(warmup_epochs=1, **GATED), epochs=2, precision="bf16")
    assert found[-1] == len(tiny_run.labels)


def test_dropout_in_the_encoder_forbids_known_features(tiny_run: Tiny) -> None:
    """With dropout the frozen backbone answers differently in every step."""
    half = torch.tensor([0.0, 1.0] * 4)
    _, _, run = routed_step(tiny_run, half, known=True, dropout=0.1)
    assert run.model.noiseproof_routing.frozen is None
    _, _, run = routed_step(tiny_run, half, known=True, dropout=0.1, dropout_after_warmup=False)
    assert len(run.model.noiseproof_routing.frozen) == len(run.labels)


def test_dropout_that_ends_with_the_warm_up_forbids_known_features_until_then(
    tiny_run: Tiny,
) -> None:
    method = CleaR(gamma=0.5, gate_unit="network", dropout=0.1, dropout_after_warmup=False)
    model = method.prepare_model(copy.deepcopy(tiny_run.model)).train()
    rows = np.arange(8)
    for epoch in (0, 3):
        run = at_epoch(tiny_run, model, epoch=epoch)
        run.columns["gate_prob"] = torch.ones(len(run.labels))
        run.columns["target_logits"] = torch.zeros(len(run.labels), run.num_classes)
        batch = batch_of(run, torch.from_numpy(rows))
        method.compute_loss(
            model, dataclasses.replace(batch, inputs=tiny_run.encoded.inputs(rows)), run
        )
        assert (model.noiseproof_routing.frozen is not None) == (epoch == 3)


def test_a_wrapped_model_is_called_whole(tiny_run: Tiny) -> None:
    """Several processes exchange gradients in the wrapper's call; skipping it would hang them."""
    method = CleaR(gamma=1.0, lambda_consistency=0.0)
    model = with_updates(method.prepare_model(copy.deepcopy(tiny_run.model))).train()
    run = at_epoch(tiny_run, model, epoch=3)
    run.columns["gate_prob"] = (torch.arange(len(run.labels)) % 2).float()
    calls = []

    class Wrapper(nn.Module):
        def forward(self, **inputs: Tensor) -> Any:
            calls.append(len(inputs["input_ids"]))
            return model(**inputs)

    rows = np.arange(4)
    batch = dataclasses.replace(
        batch_of(run, torch.from_numpy(rows)), inputs=tiny_run.encoded.inputs(rows)
    )
    method.compute_loss(Wrapper(), batch, run)
    assert calls == [4]


# --- gates ---------------------------------------------------------------------------------------


def test_gates_open_at_the_rate_gamma_times_clean_probability() -> None:
    """Four standard errors over 24,000 gates a group; a wrong rate is a wrong method."""
    method, groups, each, layers = CleaR(gamma=0.8), [0.0, 0.1, 0.5, 0.9, 1.0], 4000, 6
    clean = torch.tensor(groups).repeat_interleave(each)
    run = run_of(bare(layers), len(clean), epoch=3, clean_prob=clean)
    gate = train_gates(method, run, torch.arange(len(clean)))
    assert set(gate.unique().tolist()) == {0.0, 1.0}
    for place, probability in enumerate(groups):
        rate = 0.8 * probability
        error = (rate * (1 - rate) / (each * layers)) ** 0.5
        mean = gate[place * each : (place + 1) * each].mean().item()
        assert abs(mean - rate) <= 4 * error
    warm = train_gates(method, run, torch.arange(len(clean)), routed=False)
    assert abs(warm.mean().item() - 0.8) <= 4 * (0.16 / warm.numel()) ** 0.5


def test_rate_one_is_always_open_and_rate_zero_never() -> None:
    """One gate in 2^24 on the wrong side breaks the neutral settings."""
    smallest, largest = torch.tensor([[0.0]]), torch.tensor([[1 - 2**-24]])
    for uniform in (smallest, largest):
        assert open_gates(uniform, torch.tensor([1.0])).item() == 1
        assert open_gates(uniform, torch.tensor([0.0])).item() == 0
    uniforms = torch.from_numpy(gate_table(50_000, 4, 1, 2, 3))
    assert uniforms.min() >= 0 and uniforms.max() < 1


def test_gates_of_different_layers_are_uncorrelated() -> None:
    """One draw for all layers is another method (gate_unit=network)."""
    rows = 20_000
    run = run_of(bare(5), rows, epoch=3, clean_prob=torch.full((rows,), 0.6))
    gate = train_gates(CleaR(), run, torch.arange(rows)).numpy()
    correlation = np.corrcoef(gate.T) - np.eye(5)
    assert np.abs(correlation).max() < 4 / rows**0.5


def test_both_modules_of_a_layer_get_the_same_gate(tiny_run: Tiny) -> None:
    """Query and value of a row must open together, else no row ever runs the whole adapter."""
    model = routed(tiny_run)
    seen: dict[tuple[int, str], Tensor] = {}
    for number, block in enumerate(encoder_layers(model)):
        for part in ("query", "value"):
            adapted = getattr(block.attention.self, part)

            def hook(module: Any, args: Any, output: Tensor, key: Any = (number, part)) -> None:
                frozen = F.linear(args[0], module.base_layer.weight, module.base_layer.bias)
                seen[key] = (output - frozen).flatten(1).abs().amax(dim=1) > 1e-4

            adapted.register_forward_hook(hook)  # runs after the gate's hook
    gate = torch.tensor([[0.0, 1], [1, 0], [1, 1], [0, 0]])
    gated(model, tiny_run.encoded.inputs(np.arange(4)), gate)
    for number in range(LAYERS):
        for part in ("query", "value"):
            assert torch.equal(seen[number, part], gate[:, number].bool())


def test_a_gate_for_every_module_opens_them_one_by_one(tiny_run: Tiny) -> None:
    """Four LoRA modules in two layers: four columns; with all equal it is one gate a layer."""
    model = routed(tiny_run, gate_unit="module")
    inputs = tiny_run.encoded.inputs(np.arange(4))
    assert model.noiseproof_routing.units == 4  # type: ignore[union-attr]
    by_layer = routed(tiny_run)
    by_layer.load_state_dict(model.state_dict())
    gate = torch.tensor([[0.0, 1], [1, 0], [1, 1], [0, 0]])
    wide = gate.repeat_interleave(2, dim=1)  # query and value of a layer stand together
    assert torch.equal(gated(model, inputs, wide), gated(by_layer, inputs, gate))
    alone = gated(model, inputs, torch.eye(4))
    assert len({tuple(row.tolist()) for row in alone}) == 4


def test_gates_depend_on_seed_epoch_and_row_alone() -> None:
    """Another batch order or worker count must not change a run; another epoch or seed must."""
    method, rows = CleaR(), 64
    clean = torch.rand(rows)

    def draw(order: Tensor, epoch: int = 3, seed: int = 5) -> Tensor:
        run = run_of(bare(4), rows, epoch=epoch, seed=seed, clean_prob=clean)
        return train_gates(method, run, order)

    order = torch.randperm(rows)
    straight = draw(torch.arange(rows))
    assert torch.equal(draw(order), straight[order])
    assert torch.equal(torch.cat([draw(order[:10]), draw(order[10:])]), straight[order])
    assert not torch.equal(draw(torch.arange(rows), epoch=4), straight)
    assert not torch.equal(draw(torch.arange(rows), seed=6), straight)
    scoring = gate_table(rows, 4, 5, SALT_SCORE, 3)
    assert not np.array_equal(scoring, gate_table(rows, 4, 5, SALT_TRAIN, 3))


def test_gates_leave_the_global_random_states_alone(tiny_run: Tiny) -> None:
    """Else switching CleaR on would change the dropout of the same run."""
    model = routed(tiny_run, eval_gate="mean")
    run = at_epoch(tiny_run, model, epoch=3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run.columns = CleaR(**GATED).on_epoch_start(run)
    train_gates(CleaR(**GATED), run, torch.arange(len(run.labels)))
    run.predict()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_the_share_of_rows_that_meet_no_module_follows_the_formula() -> None:
    """(1 - gamma p)^L: the number by which the paper's protection is reckoned."""
    gamma, layers, rows = 0.7, 3, 40_000
    for probability in (0.1, 0.5, 1.0):
        run = run_of(bare(layers), rows, epoch=3, clean_prob=torch.full((rows,), probability))
        gate = train_gates(CleaR(gamma=gamma), run, torch.arange(rows))
        expected = (1 - gamma * probability) ** layers
        found = (gate.sum(dim=1) == 0).float().mean().item()
        assert abs(found - expected) <= 4 * (expected * (1 - expected) / rows) ** 0.5


def test_hard_routing_opens_exactly_the_rows_above_the_threshold() -> None:
    """An ablation that quietly stays random compares nothing."""
    clean = torch.tensor([0.2, 0.7, 0.71, 0.9])
    run = run_of(bare(3), 4, epoch=3, clean_prob=clean)
    gate = train_gates(CleaR(routing="hard", threshold=0.7), run, torch.arange(4))
    assert torch.equal(gate, (clean > 0.7).float()[:, None].expand(-1, 3))
    warm = train_gates(CleaR(routing="hard", gamma=0.8), run, torch.arange(4), routed=False)
    assert torch.equal(warm, train_gates(CleaR(**GATED), run, torch.arange(4), routed=False))


def test_a_share_of_a_class_that_looks_wrong_as_a_whole_is_routed_anyway() -> None:
    """A small class whose rows are hard would never reach the adapters."""
    labels = torch.tensor([0] * 40 + [1] * 40 + [2] * 10)
    logits = torch.zeros(90, CLASSES)
    logits[torch.arange(90), labels] = torch.where(labels == 2, -4.0, 6.0)
    logits[80:, 2] += torch.linspace(0, 0.5, 10)  # the last rows of the class fit best
    run = run_of(bare(3), 90, epoch=3)
    run.labels, run.predict = labels, lambda before_batch=None: logits
    method = CleaR(min_class_fraction=0.3)
    run.columns = method.on_epoch_start(run)
    assert (run.columns["clean_prob"][labels == 2] < 0.5).all()  # the verdict on rows stays
    trusted = run.columns["gate_prob"]
    assert torch.equal(trusted[:80], run.columns["clean_prob"][:80])
    assert (trusted[80:] == 1).tolist() == [False] * 7 + [True] * 3
    gate = train_gates(CleaR(routing="hard", min_class_fraction=0.3), run, torch.arange(90))
    assert gate[:, 0].tolist() == [1.0] * 80 + [0.0] * 7 + [1.0] * 3
    assert "gate_prob" not in CleaR(cap_doubt=False).on_epoch_start(run)


def test_doubts_are_scaled_to_what_the_model_contradicts() -> None:
    """A mixture splits right labels as well: it doubts what is hard, the model says what is wrong.

    Half of the rows have high losses, a fifth of these are predicted otherwise than labelled.
    """
    labels = torch.arange(90) % CLASSES
    logits = torch.zeros(90, CLASSES)
    logits[torch.arange(90), labels] = 6.0
    logits[45:] = 0.0
    logits[torch.arange(45, 90), labels[45:]] = 0.1
    logits[45:54] = logits[45:54].roll(1, dims=1)
    run = run_of(bare(3), 90, epoch=3)
    run.labels, run.predict = labels, lambda before_batch=None: logits
    plain = CleaR(cap_doubt=False).on_epoch_start(run)
    assert (plain["clean_prob"][45:] < 0.05).all()
    run.columns = CleaR().on_epoch_start(run)
    assert torch.equal(run.columns["clean_prob"], plain["clean_prob"])  # the verdict stays
    doubt = 0.1 / float((1 - plain["clean_prob"]).mean())
    assert 0.15 < doubt < 0.25
    assert run.logged["contradicted"] == pytest.approx(0.1)
    assert run.logged["doubt"] == pytest.approx(doubt)
    gates = 1 - (1 - plain["clean_prob"]) * doubt
    torch.testing.assert_close(run.columns["gate_prob"], gates)
    soft = train_gates(CleaR(routing="soft"), run, torch.arange(90))
    torch.testing.assert_close(soft[:, 0], (1 - 0.2 * doubt) * gates)
    warm = train_gates(CleaR(routing="soft"), run, torch.arange(90), routed=False)
    torch.testing.assert_close(warm, torch.full((90, 3), 0.8))


def test_doubts_that_the_model_shares_are_those_of_the_published_form_bit_for_bit() -> None:
    """With as many rows contradicted as doubted, gates, targets and weights are what they were."""
    labels = torch.arange(90) % CLASSES
    logits = torch.zeros(90, CLASSES)
    logits[torch.arange(90), labels] = torch.linspace(2, 6, 90)
    logits[:40] = logits[:40].roll(1, dims=1)
    run = run_of(bare(3), 90, epoch=3)
    run.labels, run.predict = labels, lambda before_batch=None: logits
    columns = CleaR().on_epoch_start(run)
    assert run.logged["doubt"] == 1 and 50 / 90 <= run.logged["clean_prob_mean"] < 1
    plain = CleaR(cap_doubt=False).on_epoch_start(run)
    assert torch.equal(columns["gate_prob"], plain["clean_prob"])
    gates = []
    for method, found in ((CleaR(), columns), (CleaR(cap_doubt=False), plain)):
        run.columns = found
        gates.append(train_gates(method, run, torch.arange(90)))
    assert torch.equal(*gates)


def test_routing_waits_until_right_rows_are_known_better_than_by_a_guess() -> None:
    """A mixture on the losses of a model that has learned nothing splits the rows at random."""
    rows = 60
    settled: dict[str, Any] = {"lambda_consistency": 0.0, "spare": False}
    run = run_of(bare(3), rows, epoch=3)
    spread = torch.linspace(0, 0.2, rows)

    def knows(share: float) -> CleaR:
        """Two thirds of the rows at this share of log(C), the others far above it."""
        loss = torch.full((rows,), share * math.log(CLASSES)) + spread
        loss[::3] += 5
        right = torch.expm1(loss).reciprocal().log() + math.log(CLASSES - 1)
        logits = torch.zeros(rows, CLASSES)
        logits[torch.arange(rows), run.labels] = right
        run.predict = lambda before_batch=None: logits
        return CleaR.preset("gentle", **settled)

    columns = knows(0.8).on_epoch_start(run)
    assert set(columns) == {"loss", "clean_prob"} and run.logged["routed"] == 0
    assert not run.warned
    run.columns.update(columns)
    method = knows(0.8)
    assert not method._routed(run)  # so gates, loss and dropout are those of the warm-up
    CleaR(**settled).on_epoch_start(run)
    assert run.logged["routed"] == 1 and CleaR()._routed(run)  # the published form begins at once
    columns = knows(0.4).on_epoch_start(run)
    assert torch.equal(columns["gate_prob"], columns["clean_prob"]) and run.logged["routed"] == 1
    run.columns.update(columns)
    assert "gate_prob" in knows(0.8).on_epoch_start(run)  # what has begun goes on


@pytest.mark.parametrize("mixture", [LossMixture(), LossMixture(transform="log")])
def test_losses_of_a_guess_begin_no_routing_whatever_the_mixture_makes_of_them(
    mixture: LossMixture,
) -> None:
    """All alike: the mixture has nothing to split and trusts every row, on whatever scale."""
    run = run_of(bare(3), 60, epoch=3)
    noise = 0.01 * torch.randn(60, CLASSES, generator=torch.Generator().manual_seed(0))
    run.predict = lambda before_batch=None: noise
    method = CleaR(mixture=mixture, max_clean_loss=0.75)
    assert "gate_prob" not in method.on_epoch_start(run)


def test_a_ramp_begins_where_routing_does() -> None:
    """It was over before routing began where that had waited."""
    run = run_of(bare(3), 60, epoch=4)
    run.predict = lambda before_batch=None: 4 * F.one_hot(run.labels, CLASSES).float()
    method = CleaR(consistency_ramp=2)
    run.columns = method.on_epoch_start(run)
    ramp = [method._ramp(run)]
    run.epoch = 5
    run.columns |= method.on_epoch_start(run)
    assert [*ramp, method._ramp(run)] == [0.5, 1.0]


def test_a_run_that_never_routes_says_so(tiny_run: Tiny) -> None:
    with pytest.warns(UserWarning, match="never began to route"):
        outcome = tiny_run.fit(CleaR(warmup_epochs=1, max_clean_loss=0.01), epochs=3)
    assert [row.get("routed") for row in outcome.history] == [None, 0, 0]
    assert "warning" in outcome.history[-1]


def test_rows_of_which_a_high_loss_proves_nothing_have_gates_as_open_as_the_average() -> None:
    """Hard rows that are predicted right, and all rows of a class that is never predicted yet.

    To a mixture both look wrong; without noise they would not be learned, and the class never.
    """
    labels = torch.arange(90) % CLASSES
    logits = torch.zeros(90, CLASSES)
    sure = torch.where(labels == 2, 1.0, 9.0)
    logits[torch.arange(90), labels.clamp(max=1)] = sure  # never the last class
    logits[:12] = logits[:12].clamp(max=1.0)
    logits[:12] = logits[:12].roll(1, dims=1)  # wrong labels among all classes
    hard = torch.arange(60, 70)[labels[60:70] < 2]
    logits[hard] = 0.0
    logits[hard, labels[hard]] = 0.1
    run = run_of(bare(3), 90, epoch=3)
    run.labels, run.predict = labels, lambda before_batch=None: logits
    plain = CleaR(cap_doubt=False).on_epoch_start(run)
    unknown = labels == 2
    assert (plain["clean_prob"][hard] < 0.5).all()
    assert (plain["clean_prob"][unknown][5:] < 0.5).all()
    spared = CleaR(spare=True, cap_doubt=False).on_epoch_start(run)
    average = float(plain["clean_prob"][~unknown].mean())
    assert 0.6 < average < 0.95
    for rows in (hard, unknown):
        assert (spared["gate_prob"][rows] >= average - 1e-6).all()
    others = ~unknown
    others[hard] = False
    assert torch.equal(spared["gate_prob"][others], plain["clean_prob"][others])
    assert torch.equal(spared["clean_prob"], plain["clean_prob"])  # the verdict stays
    assert run.logged["known_share"] == pytest.approx(2 / 3)
    assert run.logged["gates_least"] == pytest.approx(average)


def test_soft_routing_scales_by_gamma_times_clean_probability() -> None:
    """Soft gates are numbers, not draws."""
    clean = torch.tensor([0.0, 0.25, 1.0])
    run = run_of(bare(2), 3, epoch=3, clean_prob=clean)
    method = CleaR(routing="soft", gamma=0.8)
    wanted = (0.8 * clean)[:, None].expand(-1, 2)
    torch.testing.assert_close(train_gates(method, run, torch.arange(3)), wanted)
    warm = train_gates(method, run, torch.arange(3), routed=False)
    torch.testing.assert_close(warm, torch.full((3, 2), 0.8))


def test_random_routing_ignores_the_clean_probability() -> None:
    """The control of the routing ablation must not see what it is the control for."""
    rows = torch.arange(200)
    method = CleaR(routing="random", gamma=0.8)
    gates = [
        train_gates(method, run_of(bare(4), 200, epoch=3, clean_prob=clean), rows)
        for clean in (torch.zeros(200), torch.rand(200), torch.ones(200))
    ]
    assert torch.equal(gates[0], gates[1]) and torch.equal(gates[0], gates[2])
    assert abs(gates[0].mean().item() - 0.8) < 0.06


def test_a_gate_for_the_whole_network_is_one_for_all_layers(tiny_run: Tiny) -> None:
    """gate_unit=network: a row passes all adapters or none, in training, scoring and test."""
    run = run_of(bare(6), 500, epoch=3, clean_prob=torch.full((500,), 0.6))
    gate = train_gates(CleaR(gate_unit="network"), run, torch.arange(500))
    assert (gate == gate[:, :1]).all() and 0.3 < gate.mean() < 0.7
    model = routed(tiny_run, gate_unit="network", eval_gate="sample", gamma=0.5)
    model(**tiny_run.encoded.inputs(np.arange(25)))
    at_test = model.noiseproof_routing.gate  # type: ignore[union-attr]
    assert (at_test == at_test[:, :1]).all() and 0 < at_test.mean() < 1


def test_a_free_gate_per_batch_is_shared_by_the_rows_and_new_in_every_step() -> None:
    """free_gate=batch belongs to draws that ignore the label, never to routed ones."""
    method = CleaR(free_gate="batch", gamma=0.5)
    run = run_of(bare(12), 40, epoch=0, clean_prob=torch.full((40,), 0.5))
    first = train_gates(method, run, torch.arange(10), routed=False)
    assert (first == first[0]).all() and 0 < first.mean() < 1
    run.step = 1
    assert not torch.equal(train_gates(method, run, torch.arange(10), routed=False), first)
    run.epoch = 3
    follows = train_gates(method, run, torch.arange(40))
    assert not (follows == follows[0]).all()


# --- gates at test -------------------------------------------------------------------------------


def predictions(tiny_run: Tiny, model: nn.Module) -> Tensor:
    return at_epoch(tiny_run, model, epoch=0).predict()


@pytest.mark.parametrize("mode", ["all_on", "expected", "sample", "mean"])
def test_two_evaluations_of_the_same_rows_agree(tiny_run: Tiny, mode: str) -> None:
    """Test accuracy must not depend on when it is measured, or on the rows beside a row."""
    model = routed(tiny_run, eval_gate=mode, gamma=0.5)
    first = predictions(tiny_run, model)
    gated(model, tiny_run.encoded.inputs(np.arange(5)), torch.zeros(5, LAYERS))
    assert torch.equal(predictions(tiny_run, model), first)
    for row in (0, 7, 24):
        alone = model(**tiny_run.encoded.inputs(np.array([row]))).logits
        torch.testing.assert_close(alone[0], first[row], rtol=1e-4, atol=1e-4)
    is_open = torch.allclose(first, predictions(tiny_run, routed_twin(tiny_run, model)), atol=1e-4)
    assert is_open == (mode == "all_on")


def routed_twin(tiny_run: Tiny, model: nn.Module) -> nn.Module:
    """The same weights as an ordinary peft model, without gates."""
    plain = tune_model(copy.deepcopy(tiny_run.model), "lora", rank=8).eval()
    plain.load_state_dict(model.state_dict())
    return plain


def test_expected_gates_scale_every_update_by_gamma(tiny_run: Tiny) -> None:
    """Closed form: LoRA with gamma times the scaling."""
    model = routed(tiny_run, eval_gate="expected", gamma=0.3)
    plain = routed_twin(tiny_run, model)
    for module in plain.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 0.3
    inputs = tiny_run.encoded.inputs(np.arange(6))
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)


def test_mean_gates_average_the_logits_of_their_samples(tiny_run: Tiny) -> None:
    """eval_passes forward passes, each with its own gates per row, averaged as logits."""
    model = routed(tiny_run, eval_gate="mean", eval_passes=3, gamma=0.5)
    inputs = tiny_run.encoded.inputs(np.arange(6))
    found = model(**inputs).logits
    gates = [model.noiseproof_routing.eval_gates(inputs, number) for number in range(3)]
    assert not torch.equal(gates[0], gates[1])
    wanted = torch.stack([gated(model, inputs, gate) for gate in gates]).mean(dim=0)
    torch.testing.assert_close(found, wanted)
    sample = routed(tiny_run, eval_gate="sample", gamma=0.5)
    sample.load_state_dict(model.state_dict())
    torch.testing.assert_close(sample(**inputs).logits, gated(model, inputs, gates[0]))


@pytest.mark.parametrize("peft", ["lora", "loha", "adapter"])
def test_a_gated_model_is_called_as_any_model_is(peft: str, tiny_run: Tiny) -> None:
    """With arguments that bear no name, and without a mask: then every token is a real one."""
    model = routed(tiny_run, peft=peft, eval_gate="sample", gamma=0.5, adapter_init="linear")
    ids = torch.randint(5, 30, (6, 5))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
        for given, named in (((), {"input_ids": ids}), ((ids,), {}), ((ids, mask), {}),
                             ((ids,), {"attention_mask": mask})):  # fmt: skip
            assert torch.equal(model(*given, **named).logits, wanted)
        with pytest.raises(TypeError, match="input_ids"):
            model(ids, input_ids=ids)
    keys = row_keys({"input_ids": ids})
    assert keys == row_keys({"input_ids": ids, "attention_mask": mask})
    padded = F.pad(mask, (0, 2))
    assert keys == row_keys({"input_ids": F.pad(ids, (0, 2)), "attention_mask": padded})


def test_sampled_gates_at_test_open_at_rate_gamma() -> None:
    """Keys that collide, or a rate that is not gamma, would skew every accuracy."""
    routing = Routing(4, gamma=0.7, eval_gate="sample")
    ids = torch.randint(1, 10_000, (3000, 6))
    gate = routing.eval_gates({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 0)
    assert gate is not None
    assert abs(gate.mean().item() - 0.7) <= 4 * (0.21 / gate.numel()) ** 0.5
    pixels = routing.eval_gates({"pixel_values": torch.randn(500, 3, 2, 2)}, 0)
    assert pixels is not None and 0.6 < pixels.mean() < 0.8
    assert SALT_EVAL not in (SALT_TRAIN, SALT_SCORE)


def test_a_batch_has_gates_of_its_own_at_test() -> None:
    """One draw for ever would leave the same adapters out of every answer."""
    routing = Routing(4, gamma=0.5, eval_gate="sample", free="batch")
    found = []
    for _ in range(300):
        ids = torch.randint(1, 10_000, (3, 6))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        gate = routing.eval_gates(given, 0)
        assert gate is not None and torch.equal(gate, gate[:1].expand_as(gate))
        turned = {name: values.flip(0) for name, values in given.items()}
        assert torch.equal(gate, routing.eval_gates(turned, 0))
        found.append(gate[0])
    rates = torch.stack(found).mean(dim=0)
    assert (rates - 0.5).abs().max() < 4 * (0.25 / 300) ** 0.5


# --- scoring -------------------------------------------------------------------------------------


def test_scoring_averages_gated_passes_in_row_order(tiny_run: Tiny) -> None:
    """Scores that belong to other rows look plausible and select noise."""
    model = routed(tiny_run)
    method, seed, epoch = CleaR(scoring_passes=3, **GATED), 4, 5
    run = at_epoch(tiny_run, model, epoch, seed)
    columns = method.on_epoch_start(run)
    rows = len(run.labels)
    wanted = torch.zeros(rows, CLASSES)
    for number in range(3):
        uniform = gate_table(rows, LAYERS, seed, SALT_SCORE + 16 * number, epoch)
        gate = open_gates(torch.from_numpy(uniform), torch.full((rows,), 0.8))
        for row in range(rows):
            inputs = tiny_run.encoded.inputs(np.array([row]))
            with torch.no_grad():
                wanted[row] += gated(model, inputs, gate[row : row + 1])[0] / 3
    torch.testing.assert_close(columns["target_logits"], wanted, rtol=1e-4, atol=1e-4)
    losses = F.cross_entropy(wanted, run.labels, reduction="none")
    torch.testing.assert_close(columns["loss"], losses, rtol=1e-4, atol=1e-4)
    assert set(columns) == {"loss", "clean_prob", "gate_prob", "doubt", "target_logits"}


def test_scoring_restores_every_training_flag(tiny_run: Tiny) -> None:
    """The released code scores in eval mode and never goes back: training without dropout."""
    model = routed(tiny_run).train()
    encoder_layers(model)[1].eval()  # flags that no single call would restore
    flags = [module.training for module in model.modules()]
    CleaR().on_epoch_start(at_epoch(tiny_run, model, epoch=3))
    assert [module.training for module in model.modules()] == flags


def test_the_warm_up_scores_nothing(tiny_run: Tiny) -> None:
    """A scoring pass in the warm-up costs time and is thrown away."""
    model = routed(tiny_run)
    for epoch in range(3):
        assert CleaR().on_epoch_start(run_of(model, 25, epoch)) == {}
    plain = CleaR.preset("plain")
    assert plain.on_epoch_start(run_of(model, 25, epoch=4)) == {}


def test_without_consistency_no_teacher_is_kept(tiny_run: Tiny) -> None:
    """N x C numbers that nobody reads."""
    run = at_epoch(tiny_run, routed(tiny_run), epoch=3)
    columns = CleaR(lambda_consistency=0, cap_doubt=False).on_epoch_start(run)
    assert set(columns) == {"loss", "clean_prob"}


def test_a_weight_by_clean_probability_is_scored_for_without_routing(tiny_run: Tiny) -> None:
    """routing=none with ce_weight=clean_prob once trained without any weight, in silence."""
    method = CleaR(routing="none", lambda_consistency=0, ce_weight="clean_prob")
    run = at_epoch(tiny_run, routed(tiny_run), epoch=3)
    assert "clean_prob" in method.on_epoch_start(run)


def test_the_smoothed_loss_follows_its_recursion() -> None:
    """l <- (1 - a) new + a old, the first one unsmoothed; written out as a sum."""
    method = CleaR(loss_ema=0.7, routing="none", warmup_epochs=1)
    model, rows = bare(2), 30
    run = run_of(model, rows)
    raw = []
    for epoch in range(1, 5):
        logits = torch.randn(rows, CLASSES)
        raw.append(F.cross_entropy(logits, run.labels, reduction="none"))
        run.predict = lambda before_batch=None, logits=logits: logits
        run.epoch = epoch
        run.columns |= method.on_epoch_start(run)
    wanted = 0.7**3 * raw[0] + 0.3 * (0.7**2 * raw[1] + 0.7 * raw[2] + raw[3])
    torch.testing.assert_close(run.columns["loss"], wanted)


def test_reuse_scores_the_rows_that_no_step_recorded(tiny_run: Tiny) -> None:
    """Rows without logits would otherwise count as all-zero logits: loss log C, half clean."""
    model, method = routed(tiny_run), CleaR(scoring="reuse", **GATED)
    run = at_epoch(tiny_run, model, epoch=0)
    run.columns = method.on_epoch_start(run)
    assert not run.columns["recorded"].any()
    seen = torch.arange(0, 25, 2)
    recorded = torch.randn(len(seen), CLASSES)
    run.write("train_logits", batch_of(run, seen), recorded)
    run.write("recorded", batch_of(run, seen), torch.ones(len(seen)))
    run.epoch = 3
    scored = method.on_epoch_start(run)["target_logits"]
    assert torch.equal(scored[seen], recorded)
    missed = torch.arange(1, 25, 2)
    one_pass = CleaR(**GATED).on_epoch_start(at_epoch(tiny_run, model, epoch=3))
    torch.testing.assert_close(scored[missed], one_pass["target_logits"][missed])


def test_reuse_reads_the_logits_of_the_last_training_epoch(tiny_run: Tiny) -> None:
    """No extra pass: all rows were trained on, so none is predicted for the scores."""
    passes: list[int] = []
    original = Engine.predict

    def counted(self: Engine, encoded: Any, before_batch: Any = None, rows: Any = None) -> Tensor:
        passes.append(before_batch is not None)
        return original(self, encoded, before_batch, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "predict", counted)
        outcome = tiny_run.fit(CleaR(scoring="reuse", warmup_epochs=1), epochs=3)
        assert not passes
        tiny_run.fit(CleaR(scoring_passes=2, warmup_epochs=1, gamma=0.8), epochs=3)
        assert sum(passes) == 2 * 2
        passes.clear()
        tiny_run.fit(CleaR(scoring_passes=2, warmup_epochs=1, gamma=1.0), epochs=3)
        assert sum(passes) == 2  # with all gates open a second pass would be the first again
    assert outcome.run.columns["recorded"].all()
    assert outcome.run.columns["train_logits"].abs().sum(dim=1).min() > 0


# --- the objective -------------------------------------------------------------------------------


def slow_loss(method: CleaR, logits: Tensor, batch: Batch, ramp: float) -> float:
    """The objective of one batch with Python numbers, row by row."""
    total = 0.0
    for row, label in enumerate(batch.labels.tolist()):
        scores = logits[row].double()
        clean = float(batch.columns["gate_prob"][row])
        loss = -float(scores.log_softmax(0)[label])
        if method.ce_weight == "clean_prob":
            loss *= clean
        heat = method.temperature
        teacher = (batch.columns["target_logits"][row].double() / heat).softmax(0)
        agreement = -float((teacher * (scores / heat).log_softmax(0)).sum())
        if method.temperature_squared:
            agreement *= heat**2
        if method.consistency_weight == "noisy_prob":
            agreement *= 1 - clean
        if "doubt" in batch.columns:
            agreement *= float(batch.columns["doubt"][row])
        total += loss + method.lambda_consistency * ramp * agreement
    return total / len(batch.labels)


@pytest.mark.parametrize(
    ("settings", "epoch", "ramp"),
    [
        ({}, 3, 1.0),
        ({"lambda_consistency": 0.3}, 5, 1.0),
        ({"temperature": 0.5, "temperature_squared": False}, 3, 1.0),
        ({"temperature": 0.5}, 3, 1.0),
        ({"ce_weight": "clean_prob"}, 3, 1.0),
        ({"consistency_weight": "noisy_prob"}, 3, 1.0),
        ({"ce_weight": "clean_prob", "consistency_weight": "noisy_prob"}, 4, 1.0),
        ({"consistency_ramp": 4}, 3, 0.25),
        ({"consistency_ramp": 4}, 5, 0.75),
        ({"consistency_ramp": 4}, 9, 1.0),
    ],
)
def test_the_loss_equals_a_slow_version_of_itself(
    settings: dict[str, Any], epoch: int, ramp: float
) -> None:
    """Weights, temperature and ramp, each alone and together; none of them is renormalised."""
    method, rows = CleaR(**settings), 7
    model = Answers(torch.randn(rows, CLASSES) * 2)
    model.noiseproof_routing = Routing(2)  # type: ignore[assignment]
    run = run_of(
        model, rows, epoch, clean_prob=torch.rand(rows), target_logits=torch.randn(rows, CLASSES)
    )
    run.columns["gate_prob"] = torch.rand(rows)  # what gates follow weighs, not the verdict
    run.columns["routed_since"] = torch.full((rows,), 3.0)
    if epoch > 3:
        run.columns["doubt"] = torch.full((rows,), 0.3)
    batch = batch_of(run, torch.arange(rows))
    found = method.compute_loss(model, batch, run)
    assert found.item() == pytest.approx(
        slow_loss(method, model.logits.detach(), batch, ramp), rel=1e-5
    )


def test_the_warm_up_loss_is_plain_cross_entropy() -> None:
    """Columns of an earlier life must not reach the warm-up."""
    model = Answers(torch.randn(5, CLASSES))
    model.noiseproof_routing = Routing(2)  # type: ignore[assignment]
    run = run_of(model, 5, 2, clean_prob=torch.rand(5), target_logits=torch.randn(5, CLASSES))
    found = CleaR(ce_weight="clean_prob").compute_loss(model, batch_of(run, torch.arange(5)), run)
    torch.testing.assert_close(found, F.cross_entropy(model.logits, run.labels))


def test_the_consistency_gradient_stops_at_the_teacher() -> None:
    """(softmax(z) - target) per row, and nothing where student and teacher agree."""
    teacher = torch.randn(4, CLASSES)
    model = Answers(teacher + 3.0)  # a constant changes no probability
    model.noiseproof_routing = Routing(2)  # type: ignore[assignment]
    run = run_of(model, 4, 3, clean_prob=torch.zeros(4), target_logits=teacher)
    method = CleaR(ce_weight="clean_prob")  # cross-entropy has weight zero
    method.compute_loss(model, batch_of(run, torch.arange(4)), run).backward()
    assert model.logits.grad is not None
    assert model.logits.grad.abs().max() < 1e-6


def test_targets_stay_frozen_during_an_epoch(tiny_run: Tiny) -> None:
    """A teacher that follows the student within the epoch teaches nothing."""
    seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    class Watching(CleaR):
        def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
            if "clean_prob" in batch.columns:
                columns = batch.columns
                seen.append(
                    (run.epoch, batch.rows, columns["clean_prob"], columns["target_logits"])
                )
            return super().compute_loss(model, batch, run)

        def on_epoch_start(self, run: Run) -> dict[str, Tensor]:
            columns = super().on_epoch_start(run)
            if columns:
                started[run.epoch] = {name: value.clone() for name, value in columns.items()}
            return columns

    started: dict[int, dict[str, Tensor]] = {}
    tiny_run.fit(Watching(warmup_epochs=1, max_clean_loss=None), epochs=3)
    assert set(started) == {1, 2} and len(seen) == 8
    for epoch, rows, clean, target in seen:
        assert torch.equal(clean, started[epoch]["clean_prob"][rows])
        assert torch.equal(target, started[epoch]["target_logits"][rows])
    assert not torch.equal(started[1]["target_logits"], started[2]["target_logits"])


# --- neutral settings ----------------------------------------------------------------------------


def test_without_routing_and_consistency_clear_is_plain_lora_step_for_step(tiny_run: Tiny) -> None:
    """The baseline of every table must be the same code, the same draws, the same weights."""
    plain = tiny_run.fit(CrossEntropy(tune="lora", rank=4), epochs=3)
    clear = tiny_run.fit(CleaR.preset("plain", rank=4, warmup_epochs=1), epochs=3)
    assert [row["loss"] for row in clear.history] == [row["loss"] for row in plain.history]
    assert same_weights(clear.model, plain.model)


def test_the_warm_up_of_open_gates_is_plain_lora(tiny_run: Tiny) -> None:
    """gamma = 1: all gates open until routing begins, and something else afterwards."""
    plain = tiny_run.fit(CrossEntropy(tune="lora"), epochs=3)
    method = CleaR(warmup_epochs=2, dropout=None, gamma=1.0)
    clear = tiny_run.fit(method, epochs=3)
    losses = [[row["loss"] for row in outcome.history] for outcome in (plain, clear)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]


@pytest.mark.parametrize("keeps", [True, False])
def test_dropout_after_the_warm_up_can_be_turned_off(tiny_run: Tiny, keeps: bool) -> None:
    """preset code reproduces the released code's leak, all others keep dropout on."""
    flags: dict[int, set[bool]] = {}

    class Watching(CleaR):
        def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
            loss = super().compute_loss(model, batch, run)
            flags.setdefault(run.epoch, set()).add(run.model.training)
            return loss

    method = Watching(dropout_after_warmup=keeps, warmup_epochs=1, max_clean_loss=None)
    tiny_run.fit(method, epochs=3)
    assert flags == {0: {True}, 1: {keeps}, 2: {keeps}}


# --- settings ------------------------------------------------------------------------------------


COUNTS = {  # specs/clear.md, section 2.8: BERT-base without its head
    "lora": ({"rank": 4}, 147_456),  # 12 layers x 2 modules x (4 x 768 + 768 x 4)
    "adapter": ({}, 608_640),
    "bitfit": ({}, 102_144),
    "prompt": ({}, 184_320),
    "prefix": ({}, 2 * 184_320),
}


@pytest.mark.parametrize("peft_family", COUNTS)
def test_a_bert_base_trains_as_many_parameters_as_published(peft_family: str) -> None:
    """More means that something adapts which should not."""
    from transformers import BertConfig, BertForSequenceClassification

    settings, wanted = COUNTS[peft_family]
    base = BertForSequenceClassification(BertConfig(vocab_size=60))
    adapted = CleaR(peft=peft_family, **settings).prepare_model(base)
    head = is_head(adapted)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert count_parameters(p for name, p in trained.items() if not head(name)) == wanted
    assert count_parameters(p for name, p in trained.items() if head(name)) == 2 * 768 + 2


def test_presets_keep_the_values_of_the_specification() -> None:
    """Origins: specs/clear.md, section 5; what differs is measured by us."""
    mixture = LossMixture(monotone=False, guard="off")
    published = CleaR(mixture=mixture, cap_doubt=False, dropout=None)
    assert CleaR() == CleaR.preset("default")
    assert (CleaR().gamma, CleaR().warmup_epochs, CleaR().scoring_passes) == (0.8, 3, 1)
    assert (CleaR().spare, CleaR().max_clean_loss) == (False, None)
    assert CleaR().consistency_weight == CleaR().ce_weight == "none"
    assert (CleaR().temperature, CleaR().temperature_squared) == (1.0, True)
    assert (CleaR().lambda_consistency, CleaR().loss_ema, CleaR().eval_gate) == (1.0, 0, "all_on")
    assert (CleaR().routing, CleaR().free_gate) == ("bernoulli", "sample")
    code = dataclasses.replace(published, rank=4, dropout_after_warmup=False, eval_gate="sample")
    assert CleaR.presets() == {
        "default": CleaR(),
        "plain": CleaR(routing="none", cap_doubt=False, lambda_consistency=0.0, dropout=None),
        "gentle": CleaR(
            gamma=1.0,
            spare=True,
            cap_doubt=False,
            max_clean_loss=0.75,
            consistency_weight="noisy_prob",
        ),
        "paper": dataclasses.replace(published, scoring_passes=5),
        "fast": CleaR(scoring="reuse", loss_ema=0.5),
        "code": dataclasses.replace(
            code, gamma=0.85, scoring_passes=2, free_gate="batch", alpha=1.0
        ),
        "code-adapter": dataclasses.replace(
            code,
            peft="adapter",
            gamma=0.7,
            loss_ema=0.9,
            temperature=0.5,
            temperature_squared=False,
            bottleneck_size=16,
            adapter_init="linear",
        ),
        "code-bitfit": dataclasses.replace(code, peft="bitfit", gamma=0.9, train_pooler=True),
        "code-prompt": dataclasses.replace(
            code,
            peft="prompt",
            gamma=0.85,
            free_gate="batch",
            num_virtual_tokens=20,
            prompt_depth="deep",
            train_pooler=True,
        ),
    }
    for method in CleaR.presets().values():
        assert CleaR.from_dict(method.to_dict()) == method


def test_records_from_before_a_setting_are_read_as_what_they_were() -> None:
    """A run that routed after the warm-up in any case must not be taken for one that waits."""
    values = CleaR(max_clean_loss=None, spare=False, cap_doubt=False).to_dict()
    assert not {"max_clean_loss", "min_class_fraction", "spare", "cap_doubt"} & values.keys()
    found = CleaR.from_dict(values)
    assert (found.max_clean_loss, found.spare, found.cap_doubt) == (None, False, False)
    assert CleaR.from_dict(CleaR().to_dict()).cap_doubt
    gentle = CleaR.preset("gentle")
    assert gentle.to_dict()["spare"] and gentle.to_dict()["max_clean_loss"] == 0.75
    assert CleaR.from_dict(gentle.to_dict()) == gentle


@pytest.mark.filterwarnings("ignore:CleaR never began to route")  # a tiny random encoder
@pytest.mark.parametrize("preset", CleaR.presets())
def test_every_preset_runs(tiny_run: Tiny, preset: str) -> None:
    """A preset that names settings which do not work together is worse than none."""
    outcome = tiny_run.fit(CleaR.preset(preset, warmup_epochs=1), epochs=2)
    assert np.isfinite([row["loss"] for row in outcome.history]).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peft", "full"),
        ("gamma", 0.0),
        ("gamma", 1.1),
        ("gamma", float("nan")),
        ("warmup_epochs", 0),
        ("routing", "bernouli"),
        ("threshold", 0.0),
        ("threshold", 1.0),
        ("gate_unit", "head"),
        ("free_gate", "epoch"),
        ("scoring", "pass"),
        ("scoring_passes", 0),
        ("loss_ema", 1.0),
        ("loss_ema", -0.1),
        ("lambda_consistency", -1.0),
        ("temperature", 0.0),
        ("consistency_ramp", -1),
        ("ce_weight", "p"),
        ("consistency_weight", "p"),
        ("eval_gate", "on"),
        ("eval_passes", 0),
        ("learning_rate", 0.0),
        ("rank", 0),
        ("alpha", 0.0),
        ("lora_dropout", 1.0),
        ("bottleneck_size", 0),
        ("num_virtual_tokens", 0),
        ("adapter_init", "one"),
        ("prompt_depth", "middle"),
        ("dropout", 1.0),
    ],
)
def test_a_bad_setting_names_itself(name: str, value: Any) -> None:
    """A setting out of range must not wait for a NaN to be noticed."""
    with pytest.raises(InputError, match=rf"CleaR\.{name} "):
        CleaR(**{name: value})


def test_a_run_that_ends_in_the_warm_up_is_refused() -> None:
    """Routing would never start, and the result would be called CleaR."""
    for epochs in (1, 3):
        with pytest.raises(InputError, match=rf"train\.epochs={epochs} leaves no .*more than 3"):
            CleaR(warmup_epochs=3).stages(epochs)
    assert CleaR(warmup_epochs=3).stages(4) == [Stage("train", 4, learning_rate=2e-3)]
    with pytest.raises(InputError, match=r"train\.epochs=1 leaves no epoch"):
        CleaR(warmup_epochs=None).stages(1)
    assert CleaR.preset("plain").stages(1)[0].epochs == 1  # it never routes


@pytest.mark.parametrize(("epochs", "warmup"), [(2, 1), (3, 1), (6, 3), (10, 5), (20, 10)])
def test_the_warm_up_may_be_half_of_the_epochs(epochs: int, warmup: int) -> None:
    """Within the 3 to 10 of 20 that the paper sweeps; short runs still route."""
    method = CleaR(warmup_epochs=None)
    assert method.warmup(epochs) == warmup and method.stages(epochs)[0].epochs == epochs


def test_lora_that_no_gate_can_reach_is_refused(tiny_run: Tiny) -> None:
    """An adapter outside the numbered layers would train on every row."""
    for modules in (["query", "pooler.dense"], ["query", "word_embeddings"]):
        with pytest.raises(InputError, match="outside the numbered layers"):
            CleaR(target_modules=tuple(modules)).prepare_model(copy.deepcopy(tiny_run.model))
    with pytest.raises(InputError, match="found no adapter to gate"):
        route(copy.deepcopy(tiny_run.model), Routing(LAYERS))
    with pytest.raises(InputError, match=r"tune='lora'.*target_modules"):
        CleaR(target_modules=("nothing_like_it",)).prepare_model(copy.deepcopy(tiny_run.model))


def test_a_merged_adapter_is_refused(tiny_run: Tiny) -> None:
    """Its update sits in the frozen weights, where no gate reaches it."""
    merged = tune_model(copy.deepcopy(tiny_run.model), "lora", rank=2)
    merged.merge_adapter()  # type: ignore[operator]
    with pytest.raises(InputError, match="a merged adapter has no bypass"):
        route(merged, Routing())


# --- whole runs ----------------------------------------------------------------------------------


def noisy_rows(rows: int = 90, rate: float = 0.4) -> pd.DataFrame:
    """Learnable rows with symmetric noise."""
    frame = table(rows, seed=2)
    clean = numbers(frame["clean_label"]).numpy()
    noise = noiseproof.parse_noise(f"symmetric:{rate}")
    assert noise is not None
    given = noise.apply(clean, CLASSES, seed=1).labels
    return frame.assign(label=[LABELS[label] for label in given])


@pytest.fixture(scope="module")
def noisy(tiny_model: Path) -> Tiny:
    """An encoder that knows the words, as pre-trained ones do, and rows with wrong labels."""
    school = tiny(tiny_model, table(120, seed=9))
    taught = school.fit(CrossEntropy(dropout=0.0), epochs=4, learning_rate=3e-3).model
    taught.classifier.reset_parameters()  # type: ignore[union-attr, operator]
    return dataclasses.replace(tiny(tiny_model, noisy_rows()), model=taught)


@pytest.mark.parametrize("scoring", ["passes", "reuse"])
def test_the_clean_probability_finds_the_wrong_labels(noisy: Tiny, scoring: str) -> None:
    """The point of it all: two warm-up and two routed epochs, 40 % symmetric noise."""
    method = CleaR(warmup_epochs=2, scoring=scoring, scoring_passes=3)
    outcome = noisy.fit(method, epochs=4, learning_rate=5e-3)
    wrong = (noisy.labels != noisy.clean_labels).numpy()
    assert 0.3 < wrong.mean() < 0.5
    columns = outcome.run.columns
    assert roc_auc_score(wrong, columns["loss"].numpy()) > 0.8
    assert roc_auc_score(~wrong, columns["clean_prob"].numpy()) > 0.8
    row = outcome.history[-1]
    assert (
        0.4 < row["selected"] < 0.8
        and row["selected"] == (columns["clean_prob"] > 0.5).float().mean()
    )


def test_the_deployed_model_is_an_ordinary_peft_model(tiny_run: Tiny, tmp_path: Path) -> None:
    """No hook, no patched forward, nothing of ours: plain peft saves and loads it."""
    outcome = tiny_run.fit(CleaR(warmup_epochs=1, scoring_passes=1), epochs=2)
    model = outcome.model
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    assert "forward" not in vars(model) and not hasattr(model, "noiseproof_routing")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.save_pretrained(str(tmp_path))  # type: ignore[operator]
    again = peft.PeftModel.from_pretrained(copy.deepcopy(tiny_run.model), str(tmp_path)).eval()
    inputs = tiny_run.encoded.inputs(np.arange(5))
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("mode", ["expected", "sample", "mean"])
def test_gates_at_test_survive_saving_and_loading(
    tiny_model: Path, tmp_path: Path, mode: str
) -> None:
    """A loaded model that forgot its gates is another model than the one that was measured."""
    rows = table(24, wrong=0.2)
    result = noiseproof.fit(
        rows,
        model=str(tiny_model),
        method=CleaR(warmup_epochs=1, scoring_passes=1, eval_gate=mode, gamma=0.5),
        train=train_settings(epochs=2, seed=3, learning_rate=2e-2),
        out=tmp_path / "run",
    )
    texts = rows["text"].tolist()
    wanted = result.predictor.predict_proba(texts)
    loaded = noiseproof.load(tmp_path / "run")
    assert np.array_equal(loaded.predict_proba(texts), wanted)
    loaded.model.noiseproof_routing.eval_gate = "all_on"  # type: ignore[union-attr]
    assert not np.allclose(loaded.predict_proba(texts), wanted, atol=1e-4)


def test_only_adapters_and_head_train_and_the_rest_stays(tiny_run: Tiny) -> None:
    """A backbone that moves takes the bypass away: closed gates lead into a changed encoder."""
    before = weights(tiny_run.model)
    outcome = tiny_run.fit(CleaR(warmup_epochs=1, scoring_passes=1), epochs=2)
    inner = outcome.model.get_base_model()  # type: ignore[operator]
    frozen = {name: value for name, value in weights(inner).items() if "lora_" not in name}
    for name, value in frozen.items():
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        if "modules_to_save" not in name:
            assert torch.equal(value, before[plain]), name
    moved = [name for name in frozen if "modules_to_save" in name]
    assert any(not torch.equal(frozen[n], before["classifier." + n.split(".")[-1]]) for n in moved)


@pytest.mark.parametrize("peft", ["lora", "adapter", "bitfit", "prompt", "prefix"])
def test_gates_work_in_bf16_as_well(peft: str, tiny_run: Tiny) -> None:
    """Mixed precision wraps the forward; the wrapper must not lose the gates."""
    try:
        outcome = tiny_run.fit(CleaR(peft=peft, warmup_epochs=1), epochs=2, precision="bf16")
    except InputError as error:
        pytest.skip(str(error))
    assert "forward" not in vars(outcome.model)
    assert np.isfinite([row["loss"] for row in outcome.history]).all()


@pytest.mark.parametrize("peft", ["lora", "adapter", "bitfit", "prompt", "prefix"])
def test_the_optimizer_holds_adapter_and_head_and_no_more(
    peft: str, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate or a frozen tensor among its parameters would decay, or take memory."""
    held: list[set[int]] = []
    start = Engine.start_stage

    def watched(self: Engine, *given: Any, **named: Any) -> Any:
        optimizer = start(self, *given, **named)
        held.append({id(part) for group in optimizer.param_groups for part in group["params"]})
        return optimizer

    monkeypatch.setattr(Engine, "start_stage", watched)
    method = CleaR(peft=peft, warmup_epochs=1, train_outer_biases=False, eval_gate="expected")
    model = tiny_run.fit(method, epochs=2).model  # gates stay in place
    head = is_head(model)
    wanted = {id(part) for part in gated_parameters(model)}
    wanted |= {id(part) for name, part in model.named_parameters()
               if head(name) and "original_module" not in name}  # fmt: skip
    assert held == [wanted]


def test_a_row_without_finite_logits_has_a_uniform_target(tiny_run: Tiny) -> None:
    """Its own logits would make the consistency term, and with it every weight, NaN."""
    logits = torch.randn(25, CLASSES)
    logits[7, 1] = math.nan
    run = run_of(bare(LAYERS), 25, epoch=3)
    run.predict = lambda before_batch=None: logits.clone()  # type: ignore[assignment]
    columns = CleaR(gamma=1.0).on_epoch_start(run)
    assert not bool(columns["target_logits"][7].any())
    assert torch.equal(columns["target_logits"][:7], logits[:7])
    assert all(bool(torch.isfinite(column).all()) for column in columns.values())


def test_settings_are_frozen() -> None:
    """A method that changes itself makes the record a lie."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        CleaR().gamma = 0.5  # type: ignore[misc]


@pytest.fixture(autouse=True)
def _no_leftover_accelerator() -> Iterator[None]:
    """Engines of one test must not decide the precision of the next."""
    yield
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=False)
