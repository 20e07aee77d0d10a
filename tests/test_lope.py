"""LoPE: what trains in which stage, which rows are corrupted, and what is left of it at the end."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import noiseproof
from noiseproof.checkpoint import Interrupted
from noiseproof.engine import Engine
from noiseproof.errors import InputError
from noiseproof.experts import EXPERTS_FILE, MODES, ExpertModel
from noiseproof.job import Job
from noiseproof.loop import Outcome
from noiseproof.method import Batch, Method, Run
from noiseproof.methods import LoPE
from noiseproof.methods.lope import ADAPT, GROUPS, POISON, group_of
from tiny import LABELS, SOURCE, Tiny, last_json, python, same_weights, table, train_settings

NOISY: dict[str, Any] = {"noise_rate": 0.3, "theta_examples": 20}
"""Settings with which some of 25 rows are corrupted."""


def experts(outcome: Outcome) -> ExpertModel:
    assert isinstance(outcome.model, ExpertModel)
    return outcome.model


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def groups_of(names: set[str]) -> set[str]:
    """Groups of parameters; those of the encoder are called so."""
    return {
        "encoder" if ".lora_" not in n and "classifier" not in n else group_of(n) for n in names
    }


class Spy:
    """Looks at the model when stages begin and in every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.starts: dict[str, dict[str, Tensor]] = {}
        self.trainable: dict[str, set[str]] = {}
        self.optimised: dict[str, set[str]] = {}
        self.labels: dict[tuple[str, int], dict[int, int]] = {}
        self.texts: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {}
        self.modes: dict[str, tuple[str, str]] = {}
        self.gradients: dict[str, set[str]] = {}
        spy = self
        start, loss, backward = LoPE.on_stage_start, LoPE.compute_loss, Engine.backward
        begin = Engine.start_stage

        def on_stage_start(method: LoPE, run: Run) -> None:
            start(method, run)
            spy.starts[run.stage] = values(run.model)
            trainable = {n for n, p in run.model.named_parameters() if p.requires_grad}
            spy.trainable[run.stage] = trainable
            inner = run.model
            assert isinstance(inner, ExpertModel)
            spy.modes[run.stage] = (inner.switch.training_mode, inner.mode)

        def compute_loss(method: LoPE, model: nn.Module, batch: Batch, run: Run) -> Tensor:
            labels = batch.columns.get("noisy_label", batch.labels)
            ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
            for place, row in enumerate(batch.rows.tolist()):
                key = (run.stage, run.epoch)
                spy.labels.setdefault(key, {})[row] = int(labels[place])
                tokens = tuple(ids[place][mask[place]].tolist())
                spy.texts.setdefault(key, {})[row] = tokens
            return loss(method, model, batch, run)

        def start_stage(engine: Engine, model: nn.Module, *given: Any) -> Any:
            optimizer = begin(engine, model, *given)
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            named = {n for n, p in model.named_parameters() if id(p) in held}
            spy.optimised[str(len(spy.optimised))] = named
            return optimizer

        def back(engine: Engine, method: Method, *given: Any) -> float:
            found: float = backward(engine, method, *given)
            run = given[-1]
            with_gradient = {n for n, p in run.model.named_parameters() if p.grad is not None}
            spy.gradients.setdefault(run.stage, set()).update(with_gradient)
            return found

        monkeypatch.setattr(LoPE, "on_stage_start", on_stage_start)
        monkeypatch.setattr(LoPE, "compute_loss", compute_loss)
        monkeypatch.setattr(Engine, "start_stage", start_stage)
        monkeypatch.setattr(Engine, "backward", back)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


# --- stages --------------------------------------------------------------------------------------


def test_each_stage_trains_its_own_experts_and_leaves_the_rest_bit_for_bit(
    spy: Spy, tiny_run: Tiny
) -> None:
    """A poisoning expert that moves in the second stage learns the data; normal ones that move in
    the first learn the noise.
    """
    outcome = tiny_run.fit(LoPE(**NOISY), epochs=4, weight_decay=0.1)
    wanted = {POISON: {"A", "BD", "head"}, ADAPT: {"A", "B", "gate", "head"}}
    assert {stage: groups_of(names) for stage, names in spy.trainable.items()} == wanted
    assert list(spy.optimised.values()) == [spy.trainable[POISON], spy.trainable[ADAPT]]
    assert spy.gradients == spy.trainable
    assert [row["stage"] for row in outcome.history] == [POISON, POISON, ADAPT, ADAPT]

    begin, middle, end = spy.starts[POISON], spy.starts[ADAPT], values(outcome.model)
    first = {name for name in begin if not torch.equal(begin[name], middle[name])}
    second = {name for name in begin if not torch.equal(middle[name], end[name])}
    assert first == spy.trainable[POISON]
    assert second | {n for n in spy.trainable[ADAPT] if "classifier" in n} == spy.trainable[ADAPT]
    total = sum(end[name].numel() for name in first | second)
    assert outcome.trainable == total


def test_normal_experts_become_different_experts(tiny_run: Tiny) -> None:
    model = experts(tiny_run.fit(LoPE(**NOISY), epochs=4))
    for layer in model.layers.values():
        one, two, three = (up.detach() for up in layer.up()[:3])
        assert not torch.allclose(one, two, atol=1e-4) and not torch.allclose(two, three, atol=1e-4)
        assert bool(layer.up()[3].any())


def test_what_trains_can_be_chosen(spy: Spy, tiny_run: Tiny) -> None:
    method = LoPE(**NOISY, train_poison=("BD", "gate", "head"), train_adapt=("B",))
    tiny_run.fit(method, epochs=2)
    wanted = {POISON: {"BD", "gate", "head"}, ADAPT: {"B"}}
    assert {stage: groups_of(names) for stage, names in spy.trainable.items()} == wanted


def test_a_frozen_tensor_that_changes_is_noticed_by_name(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LoPE.compute_loss

    def compute_loss(method: LoPE, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        if run.stage == ADAPT:
            layer = next(iter(run.model.layers.values()))  # type: ignore[union-attr, operator]
            layer.lora_BD.weight.data.add_(1e-3)
        return original(method, model, batch, run)

    monkeypatch.setattr(LoPE, "compute_loss", compute_loss)
    with pytest.raises(RuntimeError, match="lora_BD.weight was frozen in this stage of LoPE"):
        tiny_run.fit(LoPE(**NOISY), epochs=2)


@pytest.mark.parametrize(
    ("settings", "epochs", "wanted"),
    [
        ({}, 5, [(POISON, 1), (ADAPT, 4)]),
        ({"epoch_budget": "per_stage"}, 2, [(POISON, 2), (ADAPT, 2)]),
        ({"poison_epochs": 2}, 6, [(POISON, 2), (ADAPT, 4)]),
        ({"poison_epochs": 1, "epoch_budget": "per_stage"}, 3, [(POISON, 3), (ADAPT, 3)]),
        ({"num_poison_experts": 0, "inference_mode": "none"}, 3, [(ADAPT, 3)]),
    ],
    ids=str,
)
def test_epochs_are_shared_out_among_the_stages(
    settings: dict[str, Any], epochs: int, wanted: list[tuple[str, int]]
) -> None:
    stages = LoPE(**settings).stages(epochs)
    assert [(stage.name, stage.epochs) for stage in stages] == wanted
    assert [stage.selectable for stage in stages] == [stage.name == ADAPT for stage in stages]
    assert all(stage.learning_rate == 2e-3 for stage in stages)


@pytest.mark.parametrize(("settings", "epochs"), [({}, 1), ({"poison_epochs": 3}, 3)])
def test_too_few_epochs_are_refused_before_anything_runs(
    settings: dict[str, Any], epochs: int
) -> None:
    with pytest.raises(InputError, match="two stages of at least one epoch.*epoch_budget"):
        LoPE(**settings).stages(epochs)


@pytest.mark.parametrize("mode", MODES)
def test_the_poisoning_expert_counts_in_the_second_stage_as_told(
    mode: str, spy: Spy, tiny_run: Tiny
) -> None:
    """In training as ``adapt_forward`` says; measured in between it is left out."""
    outcome = tiny_run.fit(LoPE(**NOISY, adapt_forward=mode), epochs=2)
    assert spy.modes == {POISON: ("none", "none"), ADAPT: (mode, "renorm")}
    assert experts(outcome).mode == "compensate"
    assert all(np.isfinite(row["loss"]) for row in outcome.history)


@pytest.mark.parametrize(
    ("settings", "restored"),
    [
        ({"head_policy": "restore", "target_noise_rate": 0.0}, True),
        ({"head_policy": "carry"}, False),
        ({"head_policy": "auto"}, True),
        ({"head_policy": "auto", "target_noise_rate": 0.0}, False),
        ({"head_policy": "auto", "noise_stages": ()}, False),
        ({"head_policy": "auto", "train_adapt": ("A", "B", "gate")}, False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:the stage poison adds no noise")
def test_the_head_starts_anew_where_flipped_labels_taught_it(
    settings: dict[str, Any], restored: bool, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = []
    original = LoPE.compute_loss

    def compute_loss(method: LoPE, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        if run.epoch == run.step == 0:
            heads.append(run.model.get_parameter("model.classifier.weight").detach().clone())
        return original(method, model, batch, run)

    monkeypatch.setattr(LoPE, "compute_loss", compute_loss)
    tiny_run.fit(LoPE(**(NOISY | settings)), epochs=2)
    assert torch.equal(*heads) == restored


def test_the_balance_term_is_the_variation_of_the_loads(tiny_run: Tiny) -> None:
    """Squared coefficient of variation of normal experts' loads, averaged over layers."""
    plain, more = LoPE(**NOISY), LoPE(**NOISY, balance_weight=0.5)
    outcome = tiny_run.fit(plain, epochs=2)
    model = experts(outcome).eval()
    rows = torch.arange(4)
    inputs = tiny_run.encoded.inputs(np.arange(4))
    batch = Batch(inputs, tiny_run.labels[:4], rows)
    run = dataclasses.replace(outcome.run, stage=ADAPT, step=1)
    bare, with_term = (m.compute_loss(model, batch, run).detach() for m in (plain, more))
    loads = []
    hooks = [
        layer.register_forward_hook(
            lambda layer, given, _: loads.append(
                torch.softmax(layer.lora_gate(given[0])[..., :3], dim=-1)[
                    inputs["attention_mask"].bool()
                ].mean(dim=0)
            )
        )
        for layer in model.layers.values()
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    stacked = torch.stack(loads)
    spread = (stacked.std(dim=1, correction=0) / stacked.mean(dim=1)).square().mean().detach()
    torch.testing.assert_close(with_term - bare, 0.5 * spread, rtol=1e-3, atol=1e-6)
    assert float(spread) > 0 and model.switch.loads is None


# --- which rows are corrupted --------------------------------------------------------------------


def changed(
    method: LoPE, rows: int = 4000, epoch: int = 0, seed: int = 0, text: str = "one two three four"
) -> list[bool]:
    """Which rows the first stage changes."""
    transform = method.stages(4)[0].transform
    assert transform is not None
    return [transform((text,), row, epoch, seed) != (text,) for row in range(rows)]


def test_as_many_rows_are_corrupted_as_the_rate_says() -> None:
    for rate in (0.05, 0.3):
        hits = sum(changed(LoPE(noise_rate=rate)))
        assert abs(hits - rate * 4000) < 4 * (4000 * rate * (1 - rate)) ** 0.5


def test_each_operation_gets_a_third() -> None:
    """Lengths tell them apart: inserting adds characters, deleting takes some, shuffling none."""
    transform = LoPE(noise_rate=0.99).stages(2)[0].transform
    assert transform is not None
    text = "one two three four five six seven"
    found = [transform((text,), row, 0, 0)[0] for row in range(3000)]
    hits = [other for other in found if other != text]
    kinds = np.bincount([1 + (len(other) > len(text)) - (len(other) < len(text)) for other in hits])
    rest = 4 * (len(hits) * 2 / 9) ** 0.5
    assert len(kinds) == 3 and all(abs(count - len(hits) / 3) < rest for count in kinds)


def test_a_row_is_corrupted_by_its_number_and_the_seed_alone() -> None:
    method = LoPE(noise_rate=0.3)
    assert changed(method, 200) == changed(method, 400)[:200]
    assert changed(method, 400) != changed(method, 400, seed=1)
    assert changed(method, 400) != changed(method, 400, epoch=1)
    own = LoPE(noise_rate=0.3, noise_seed=1)
    assert changed(own, 400) == changed(own, 400, seed=5) == changed(method, 400, seed=1)


def test_the_noise_of_the_method_is_not_the_noise_of_the_data() -> None:
    """Equal draws would corrupt the same rows twice, and leave the others alone twice."""
    from noiseproof.noise import parse_noise

    noise = parse_noise("text:0.3")
    assert noise is not None
    texts = np.full((400, 1), "one two three four", dtype=object)
    found = noise.apply(np.zeros(400, dtype=np.int64), 2, 0, texts=texts)
    assert found.mask.tolist() != changed(LoPE(noise_rate=0.3), 400)


def test_the_first_stage_trains_on_corrupted_rows_and_the_second_on_those_given(
    spy: Spy, tiny_run: Tiny
) -> None:
    """Texts and labels, both; and what is predicted in between is of the rows as given."""
    outcome = tiny_run.fit(LoPE(**NOISY), epochs=4)
    given = {
        row: tuple(values["input_ids"][0][values["attention_mask"][0].bool()].tolist())
        for row, values in ((r, tiny_run.encoded.inputs(np.array([r]))) for r in range(25))
    }
    labels = dict(enumerate(tiny_run.labels.tolist()))
    for epoch in (0, 1):
        assert spy.texts[ADAPT, epoch] == given and spy.labels[ADAPT, epoch] == labels
    texts, flipped = spy.texts[POISON, 0], spy.labels[POISON, 0]
    assert (texts, flipped) == (spy.texts[POISON, 1], spy.labels[POISON, 1])  # drawn once
    hit = {row for row in given if texts[row] != given[row] or flipped[row] != labels[row]}
    assert 0 < len(hit) < 25 and any(flipped[row] != labels[row] for row in hit)
    assert outcome.history[0]["corrupted_share"] == len(hit) / 25
    assert outcome.run.columns["corrupted"].nonzero().flatten().tolist() == sorted(hit)


def test_noise_can_be_drawn_anew_in_every_epoch(spy: Spy, tiny_run: Tiny) -> None:
    tiny_run.fit(LoPE(**NOISY, noise_resample="epoch"), epochs=4)
    assert spy.texts[POISON, 0] != spy.texts[POISON, 1]
    assert spy.labels[POISON, 0] != spy.labels[POISON, 1]
    assert spy.texts[ADAPT, 0] == spy.texts[ADAPT, 1]


def test_only_the_labels_or_only_the_texts_can_be_corrupted(spy: Spy, tiny_run: Tiny) -> None:
    labels = dict(enumerate(tiny_run.labels.tolist()))
    tiny_run.fit(LoPE(**NOISY, target_noise_rate=0.0), epochs=2)
    assert spy.labels[POISON, 0] == labels
    texts = spy.texts[POISON, 0]
    tiny_run.fit(LoPE(noise_ops=(), noise_rate=0.0, target_noise_rate=0.5), epochs=2)
    assert spy.texts[POISON, 0] == spy.texts[ADAPT, 0] != texts
    wrong = sum(label != labels[row] for row, label in spy.labels[POISON, 0].items())
    assert wrong == 12  # as in all label noise here, a share of the rows to the row


@pytest.mark.parametrize("stages", [(), (ADAPT,), (POISON, ADAPT)])
def test_the_noisy_stages_can_be_chosen(
    stages: tuple[str, ...], spy: Spy, tiny_run: Tiny, recwarn: pytest.WarningsRecorder
) -> None:
    tiny_run.fit(LoPE(**NOISY, noise_stages=stages), epochs=2)
    labels = dict(enumerate(tiny_run.labels.tolist()))
    noisy = tuple(stage for stage in (POISON, ADAPT) if spy.labels[stage, 0] != labels)
    assert noisy == stages
    warned = [str(warning.message) for warning in recwarn]
    assert any("the stage poison adds no noise" in text for text in warned) == (
        POISON not in stages
    )


@pytest.mark.parametrize("mode", ["absolute", "relative", "neftune"])
def test_embeddings_shake_in_the_first_stage_and_never_after(
    mode: str, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training only: what is predicted, measured and calibrated is not disturbed."""
    from noiseproof.methods import lope

    calls: list[tuple[str, Tensor, Tensor]] = []
    original = lope.embedding_noise

    def noise(embeddings: Tensor, mask: Tensor, draws: Any, kind: str, alpha: float) -> Tensor:
        made = original(embeddings, mask, draws, kind, alpha)
        calls.append((kind, mask, made))
        return made

    monkeypatch.setattr(lope, "embedding_noise", noise)
    outcome = tiny_run.fit(LoPE(**NOISY, emb_noise_mode=mode), epochs=4)
    assert len(calls) == 2 * 4  # epochs and steps of the stage poison
    for kind, mask, made in calls:
        assert kind == mode and bool(made[mask.bool()].any()) and not made[~mask.bool()].any()
    assert experts(outcome).noise is None
    shares = [row.get("embedding_noise") for row in outcome.history]
    assert shares[2:] == [None, None] and all(share and share > 0 for share in shares[:2])
    if mode == "relative":
        assert shares[0] == pytest.approx(0.05 / 3**0.5, rel=0.05)


def test_a_share_of_the_rows_can_be_shaken(tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    shaken: list[Tensor] = []
    original = LoPE._shake

    def shake(*given: Any) -> Tensor:
        made = original(*given)
        shaken.append(made.flatten(1).any(dim=1))
        return made

    monkeypatch.setattr(LoPE, "_shake", shake)
    tiny_run.fit(LoPE(**NOISY, emb_noise_prob=0.5), epochs=8)
    rows = torch.cat(shaken)
    assert len(rows) == 100 and abs(int(rows.sum()) - 50) < 4 * 5
    shaken.clear()
    tiny_run.fit(LoPE(**NOISY, emb_noise_mode="off"), epochs=2)
    assert not shaken


# --- the end -------------------------------------------------------------------------------------


def test_similarities_are_measured_on_rows_as_given_without_dropout(tiny_run: Tiny) -> None:
    """Done again they come out the same, and in batches of another size."""
    outcome = tiny_run.fit(LoPE(**NOISY), epochs=2)
    model = experts(outcome)
    first = {name: layer.lora_theta.clone() for name, layer in model.layers.items()}
    assert all(bool(layer.lora_calibrated) for layer in model.layers.values())
    LoPE(**NOISY).finalize_model(outcome.run)
    for name, layer in model.layers.items():
        assert torch.equal(layer.lora_theta, first[name]) and bool(first[name].any())
    smaller = experts(tiny_run.fit(LoPE(**NOISY), epochs=2, eval_batch_size=3))
    for name, layer in smaller.layers.items():
        torch.testing.assert_close(layer.lora_theta, first[name], rtol=1e-4, atol=1e-6)
    few = LoPE(**NOISY | {"theta_examples": 2})
    less = experts(tiny_run.fit(few, epochs=2))
    assert any(not torch.allclose(layer.lora_theta, first[n]) for n, layer in less.layers.items())


def test_the_findings_describe_the_router_layer_by_layer(tiny_run: Tiny) -> None:
    outcome = tiny_run.fit(LoPE(**NOISY), epochs=4)
    found = outcome.run.findings["experts"]
    json.dumps(found, allow_nan=False)
    model = experts(outcome)
    assert [row["layer"] for row in found["layers"]] == list(model.layers)
    for row, layer in zip(found["layers"], model.layers.values(), strict=True):
        assert row["theta"] == pytest.approx(layer.lora_theta.tolist(), rel=1e-5)
        assert row["drift_A"] > 0 and -1 <= row["cosine_A"] <= 1
    assert found["even_share"] == 0.25 and found["rows"] == 25
    assert found["poison_weight"] == pytest.approx(
        np.mean([row["poison_weight"] for row in found["layers"]])
    )
    assert 0 <= found["noise_auroc"] <= 1 and 0 <= found["raised_share"] <= 1


def test_online_similarities_and_a_partial_compensation_run_to_the_end(tiny_run: Tiny) -> None:
    method = LoPE(**NOISY, theta_mode="online", compensate_k=1, beta="keep_mass", gate_input="Ax")
    outcome = tiny_run.fit(method, epochs=2)
    model = experts(outcome)
    found = {}
    for mode, switch in method.modes(model).items():
        switch()
        found[mode] = model.mode
    assert found == {mode: mode for mode in MODES} and list(found)[-1] == "compensate"


def test_without_a_poisoning_expert_it_is_hydralora(tiny_run: Tiny) -> None:
    method = LoPE.preset("hydralora")
    outcome = tiny_run.fit(method, epochs=2)
    model = experts(outcome)
    assert (
        model.mode == "none" and not method.modes(model) and "experts" not in outcome.run.findings
    )
    assert not any("lora_BD" in name for name in model.trained)
    assert [row["stage"] for row in outcome.history] == [ADAPT, ADAPT]
