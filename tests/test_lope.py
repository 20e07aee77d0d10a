"""LoPE: what trains in which stage, which rows are corrupted, and what is left of it at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import noiseproof
from language import language_model
from noiseproof.checkpoint import Interrupted
from noiseproof.cli import main
from noiseproof.cli.words import _of_record
from noiseproof.engine import Engine
from noiseproof.errors import InputError
from noiseproof.experts.mixing import MODES
from noiseproof.experts.model import ExpertModel
from noiseproof.job import CORRUPTED, Job
from noiseproof.loop import Outcome
from noiseproof.method import Batch, Method, Run
from noiseproof.methods import LoPE, lope
from noiseproof.methods.lope import ADAPT, GROUPS, POISON, digest, group_of
from noiseproof.noise import parse_noise
from noiseproof.preparation import OOD, Prepared
from noiseproof.record import spec_id
from noiseproof.report.experts import verdict
from noiseproof.saving import ADAPTERS_CONFIG, ADAPTERS_FILE
from rows import response_rows
from tiny import FILLER, TOPICS, Tiny, last_json, python, table, train_settings

NOISY: dict[str, Any] = {"noise_rate": 0.3, "theta_examples": 20}
"""Settings with which some of 25 rows are corrupted."""
TWO = NOISY | {"poison_epochs": 2}
"""The same with two epochs of the stage poison."""


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
            noisy = run.stage in method.noise_stages
            labels = batch.columns["noisy_label"] if noisy else batch.labels
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
    outcome = tiny_run.fit(LoPE(**TWO), epochs=4, weight_decay=0.1)
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
    with pytest.raises(RuntimeError, match=r"lora_BD\.weight was frozen in this stage of LoPE"):
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
    with pytest.raises(InputError, match=r"two stages of at least one epoch.*epoch_budget"):
        LoPE(**settings).stages(epochs)


def test_a_new_head_must_train_with_the_poisoning_expert(tiny_run: Tiny) -> None:
    """Against random logits the stage poison has no signal."""
    with pytest.raises(InputError, match="put head into it"):
        tiny_run.fit(LoPE(**NOISY, train_poison=("A", "BD")), epochs=2)


def test_a_seal_covers_every_value_of_an_expert_and_a_sample_of_the_frozen_model() -> None:
    tensor = torch.zeros(2048, 4)
    names = ("q.lora_BD.weight", "q.base_layer.weight")
    before = [digest(name, tensor) for name in names]
    tensor[1500] = 1
    assert [digest(name, tensor) == old for name, old in zip(names, before, strict=True)] == [
        False,
        True,
    ]


@pytest.mark.parametrize("mode", MODES)
def test_interim_epochs_are_measured_as_the_model_will_answer(
    mode: str, spy: Spy, tiny_run: Tiny
) -> None:
    """Similarities are not known before the end; until then mask stands for compensate."""
    outcome = tiny_run.fit(LoPE(**NOISY, inference_mode=mode), epochs=2)
    assert spy.modes[ADAPT] == ("none", "mask" if mode == "compensate" else mode)
    assert experts(outcome).mode == mode


@pytest.mark.parametrize("mode", MODES)
def test_the_poisoning_expert_counts_in_the_second_stage_as_told(
    mode: str, spy: Spy, tiny_run: Tiny
) -> None:
    """In training as ``adapt_forward`` says; measured in between it is left out."""
    outcome = tiny_run.fit(LoPE(**NOISY, adapt_forward=mode), epochs=2)
    assert spy.modes == {POISON: ("none", "none"), ADAPT: (mode, "mask")}
    assert experts(outcome).mode == "compensate"
    assert all(np.isfinite(row["loss"]) for row in outcome.history)


def test_rows_learn_to_do_without_the_poisoning_expert(tiny_run: Tiny) -> None:
    """With every row left out it is mask; with none the published stage; between, neither."""
    losses = [
        [row["loss"] for row in tiny_run.fit(LoPE(**NOISY, **settings), epochs=3).history]
        for settings in (
            {"poison_dropout": 1.0},
            {"adapt_forward": "mask"},
            {"poison_dropout": 0.5},
            {"poison_dropout": 0.0},
        )
    ]
    assert losses[0] == losses[1]
    assert len({tuple(row) for row in losses}) == 3
    assert {row[0] for row in losses} == {losses[0][0]}, "the stage poison is the same"


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


def test_a_head_drawn_anew_is_neither_the_trained_nor_the_first_one(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It depends on the seed of the run alone, and other draws do not notice."""
    heads: dict[tuple[str, int], Tensor] = {}
    original = LoPE.compute_loss

    def compute_loss(method: LoPE, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        if run.epoch == run.step == 0:
            weight = run.model.get_parameter("model.classifier.weight").detach().clone()
            heads[method.head_policy, len(heads)] = weight
        return original(method, model, batch, run)

    monkeypatch.setattr(LoPE, "compute_loss", compute_loss)
    for policy in ("reinit", "reinit", "carry"):
        tiny_run.fit(LoPE(**(NOISY | {"head_policy": policy})), epochs=2)
    first, drawn, _, again, _, carried = heads.values()
    assert not torch.equal(drawn, first) and not torch.equal(drawn, carried)
    assert torch.equal(drawn, again) and 0.5 < drawn.std() / first.std() < 2


def test_a_language_model_has_no_head_to_draw_anew() -> None:
    with pytest.raises(InputError, match="with task causal-lm there is no new one"):
        LoPE(head_policy="reinit").for_tokens()


def test_responses_do_without_the_expert_half_of_the_time_unless_told() -> None:
    """Published rows all have it, and so have runs from before there was a choice."""
    assert LoPE().for_tokens().poison_dropout == 0.5
    assert LoPE(poison_dropout=0.2).for_tokens().poison_dropout == 0.2
    assert not LoPE(adapt_forward="mask").for_tokens().poison_dropout
    for name in ("paper", "sft", "hydralora"):
        method = LoPE.preset(name).for_tokens()
        assert method.responses and not method.poison_dropout
        assert method.for_tokens() == method


def test_records_of_responses_from_before_are_read_as_what_they_were() -> None:
    """No row went without the expert, and the identifiers stay; classes are as they were too."""
    new = LoPE().for_tokens().to_dict()
    assert new.pop("poison_dropout") == 0.5
    read = LoPE.from_dict(new).for_tokens()
    assert not read.poison_dropout and read.to_dict() == new
    assert LoPE(poison_dropout=0.0).for_tokens().to_dict() == new
    for words in (new, LoPE().to_dict()):
        method = _of_record({"method": words})["method"]
        assert method["poison_dropout"] is None and method["more_modes"] is False
    again = LoPE.from_dict(LoPE().to_dict())
    assert again == LoPE() and not again.poison_dropout
    assert "poison_dropout" not in LoPE().to_dict()
    assert LoPE.preset("paper").to_dict()["poison_dropout"] == 0.0


def test_published_records_keep_their_identifiers() -> None:
    records = Path(__file__).parents[1] / "docs/results/records"
    specs = [
        json.loads(path.read_bytes())["spec"] for path in records.glob("*/cells/*/record.json")
    ]
    mine = [spec for spec in specs if spec["method"]["name"] == "LoPE"]
    assert len(mine) > 50
    for spec in mine:
        method = LoPE.from_dict(spec["method"])
        method = method.for_tokens() if method.responses else method
        assert spec_id(spec | {"method": method.to_dict()}) == spec_id(spec)


def test_what_the_task_says_cannot_be_said_from_outside(tiny_run: Tiny) -> None:
    """Classes would be taken for responses, and no label would be flipped."""
    with pytest.raises(InputError, match=r"LoPE.responses=True does not fit a Bert.*leave it out"):
        tiny_run.fit(LoPE(**NOISY, responses=True), epochs=2)


def test_responses_need_operations_to_be_corrupted() -> None:
    with pytest.raises(InputError, match=r"target_noise_rate=0\.3 corrupts responses by noise_ops"):
        LoPE(noise_ops=(), target_noise_rate=0.3).for_tokens()
    assert LoPE.preset("hydralora-neftune").for_tokens().target_noise_rate == 0


@pytest.mark.parametrize(
    ("settings", "silent"),
    [
        ({"noise_ops": (), "emb_noise_mode": "off"}, True),
        ({"noise_ops": ()}, False),
        ({"noise_rate": 0.0, "target_noise_rate": 0.3, "emb_noise_mode": "off"}, False),
        ({"noise_rate": 0.0, "target_noise_rate": 0.0, "emb_noise_mode": "off"}, True),
    ],
    ids=str,
)
def test_a_stage_poison_without_noise_is_warned_of_with_responses_too(
    settings: dict[str, Any], silent: bool
) -> None:
    """Where no label is a class, a rate of labels is no noise."""
    method = LoPE(**settings).for_tokens()
    assert (not method._adds_noise) == silent
    transform = method.stages(2)[0].transform
    assert silent == (transform is None and not method._shakes)


def test_a_response_has_a_draw_of_its_own_where_it_has_a_rate() -> None:
    """Without one it suffers with its prompt; with one, whether its prompt does or not."""
    texts = ("one two three four", "five six seven eight")

    def hits(**settings: Any) -> np.ndarray:
        transform = LoPE(noise_rate=0.4, **settings).for_tokens().stages(2)[0].transform
        assert transform is not None
        rows = [transform(texts, row, 0, 0) for row in range(2000)]
        return np.array([[one != two for one, two in zip(row, texts, strict=True)] for row in rows])

    together = hits()
    assert (together[:, 0] != together[:, 1]).mean() < 0.03  # a shuffle may give one text again
    apart = hits(target_noise_rate=0.2)
    np.testing.assert_array_equal(apart[:, 0], together.any(axis=1))  # prompts do not notice
    for part, rate in ((apart[:, 1], 0.2), (apart.all(axis=1), 0.08)):
        assert abs(part.sum() - rate * 2000) < 4 * (2000 * rate * (1 - rate)) ** 0.5
    assert not hits(target_noise_rate=0.0)[:, 1].any()


def test_the_history_shows_the_router_and_the_noise_while_they_train(tiny_run: Tiny) -> None:
    """A router that gives the expert everything, or nothing, is seen before the end."""
    outcome = tiny_run.fit(LoPE(**TWO, lora_dropout=0.0, dropout=0.0), epochs=4)
    history = outcome.history
    poison, adapt = history[:2], history[2:]
    for row in history:
        assert 0 < row["poison_weight"] < 1
    assert poison[0]["poison_weight"] != adapt[-1]["poison_weight"]
    found = outcome.run.findings["noise"]
    for name in ("loss_corrupted", "loss_others", "embedding_noise"):
        assert poison[1][name] == pytest.approx(found[name], rel=1e-5)
        assert not any(name in row and np.isfinite(row[name]) for row in adapt)
    experts(outcome).switch.poison = seen = []
    rows = np.arange(25)
    inputs = tiny_run.encoded.inputs(rows)
    with experts(outcome).watching(25) as watch, torch.no_grad():
        watch.begin(rows.tolist())
        experts(outcome)(**inputs)
    wanted = [row["poison_weight"] for row in watch.table()]
    assert torch.stack(seen).tolist() == pytest.approx(wanted, rel=1e-5)


def test_nothing_hangs_on_the_embeddings_when_training_is_over(
    tiny_run: Tiny, run_of: Callable[..., Path]
) -> None:
    for model in (experts(tiny_run.fit(LoPE(**NOISY), epochs=2)),
                  noiseproof.load(run_of("plain")).model):  # fmt: skip
        assert not model.model.get_input_embeddings()._forward_hooks


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


CORRUPTING = """
import json
from noiseproof.methods import LoPE
transform = LoPE(noise_rate=0.9).stages(2)[0].transform
rows = [transform(("one two three four", "five six"), row, 0, 3) for row in reversed(range(40))]
print(json.dumps(rows[::-1]))
"""


@pytest.mark.parametrize("salt", ["0", "1"])
def test_another_process_corrupts_rows_alike_in_any_order(salt: str) -> None:
    """Python salts the hashes of words in every process; workers must agree all the same."""
    transform = LoPE(noise_rate=0.9).stages(2)[0].transform
    assert transform is not None
    given = ("one two three four", "five six")
    wanted = [list(transform(given, row, 0, 3)) for row in range(40)]
    done = python("-c", CORRUPTING, PYTHONHASHSEED=salt)
    assert done.returncode == 0, done.stderr[-3000:]
    assert last_json(done.stdout) == wanted
    hit = [row != list(given) for row in wanted]
    assert 20 < sum(hit) < 40  # the others are what they were


def test_what_is_measured_is_never_corrupted(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither texts nor embeddings, in noisy stages too; until the router is asked at the end."""
    test = tiny_run.task.encode(table(12, seed=1)["text"].tolist())
    read: list[tuple[int, ...]] = []
    shaken: list[bool] = []
    over = False
    compute, finalize = Engine.compute, LoPE.finalize_model

    def spy(engine: Engine, encoded: Any, compute_rows: Any, *given: Any) -> Tensor:
        def rows(inputs: dict[str, Tensor]) -> Tensor:
            if not over:
                mask = inputs["attention_mask"].bool()
                read.extend(tuple(ids[real].tolist()) for ids, real in
                            zip(inputs["input_ids"], mask, strict=True))  # fmt: skip
                shaken.append(engine.net.training)
            values: Tensor = compute_rows(inputs)
            return values

        return compute(engine, encoded, rows, *given)

    def finalize_model(method: LoPE, run: Run) -> nn.Module:
        nonlocal over
        over = True
        return finalize(method, run)

    def measure(predict_on: Any, run: Run) -> dict[str, float]:
        return {"sum": float(predict_on(test).sum() + run.predict().sum())}

    monkeypatch.setattr(Engine, "compute", spy)
    monkeypatch.setattr(LoPE, "finalize_model", finalize_model)
    method = LoPE(**NOISY | {"noise_rate": 0.9}, noise_stages=(POISON, ADAPT))
    tiny_run.fit(method, epochs=3, extra={"measure": measure}, **{"evaluate": "epoch"})

    def given(encoded: Any) -> list[tuple[int, ...]]:
        rows = [encoded.inputs(np.array([row])) for row in range(len(encoded))]
        return [
            tuple(row["input_ids"][0][row["attention_mask"][0].bool()].tolist()) for row in rows
        ]

    wanted = given(test) + given(tiny_run.encoded)
    assert sorted(read) == sorted(wanted * 3) and not any(shaken)


def test_the_noise_of_the_method_is_not_the_noise_of_the_data() -> None:
    """Equal draws would corrupt the same rows twice, and leave the others alone twice."""
    noise = parse_noise("text:0.3")
    assert noise is not None
    texts = [("one two three four",)] * 400
    found = noise.apply(np.zeros(400, dtype=np.int64), 2, 0, texts=texts)
    hit = found.extras["text_changed"].tolist()
    assert 60 < sum(hit) < 180 and hit != changed(LoPE(noise_rate=0.3), 400)


def test_the_first_stage_trains_on_corrupted_rows_and_the_second_on_those_given(
    spy: Spy, tiny_run: Tiny
) -> None:
    """Texts and labels, both; and what is predicted in between is of the rows as given."""
    outcome = tiny_run.fit(LoPE(**TWO), epochs=4)
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
    tiny_run.fit(LoPE(**TWO, noise_resample="epoch"), epochs=4)
    assert spy.texts[POISON, 0] != spy.texts[POISON, 1]
    assert spy.labels[POISON, 0] != spy.labels[POISON, 1]
    assert spy.texts[ADAPT, 0] == spy.texts[ADAPT, 1]


def test_only_the_labels_or_only_the_texts_can_be_corrupted(spy: Spy, tiny_run: Tiny) -> None:
    labels = dict(enumerate(tiny_run.labels.tolist()))
    tiny_run.fit(LoPE(**NOISY, target_noise_rate=0.0), epochs=2)
    assert spy.labels[POISON, 0] == labels
    assert spy.texts[POISON, 0] != spy.texts[ADAPT, 0]
    outcome = tiny_run.fit(LoPE(noise_ops=(), noise_rate=0.0, target_noise_rate=0.4), epochs=2)
    assert spy.texts[POISON, 0] == spy.texts[ADAPT, 0]
    wrong = sum(label != labels[row] for row, label in spy.labels[POISON, 0].items())
    assert abs(wrong - 10) < 4 * 6**0.5
    hit = outcome.run.columns["corrupted"].nonzero().flatten().tolist()
    assert len(hit) == wrong  # whatever was drawn is another class


@pytest.mark.parametrize("stages", [(), (ADAPT,), (POISON, ADAPT)])
def test_the_noisy_stages_can_be_chosen(
    stages: tuple[str, ...], spy: Spy, tiny_run: Tiny, recwarn: pytest.WarningsRecorder
) -> None:
    tiny_run.fit(LoPE(**NOISY, noise_stages=stages), epochs=2)
    labels = dict(enumerate(tiny_run.labels.tolist()))
    noisy = tuple(stage for stage in (POISON, ADAPT) if spy.labels[stage, 0] != labels)
    assert noisy == stages
    warned = [str(warning.message) for warning in recwarn]
    silent = any("the stage poison adds no noise" in text for text in warned)
    assert silent == (POISON not in stages)


@pytest.mark.parametrize("mode", ["absolute", "relative", "neftune"])
def test_embeddings_shake_in_the_first_stage_and_never_after(
    mode: str, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training only: what is predicted, measured and calibrated is not disturbed."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    original = lope.embedding_noise

    def noise(embeddings: Tensor, mask: Tensor, draws: Any, kind: str, alpha: float) -> Tensor:
        made = original(embeddings, mask, draws, kind, alpha)
        calls.append((kind, mask, made))
        return made

    monkeypatch.setattr(lope, "embedding_noise", noise)
    outcome = tiny_run.fit(LoPE(**TWO, emb_noise_mode=mode), epochs=4)
    assert len(calls) == 2 * 4  # epochs and steps of the stage poison
    for kind, mask, made in calls:
        assert kind == mode and bool(made[mask.bool()].any()) and not made[~mask.bool()].any()
    assert experts(outcome).noise is None
    share = outcome.run.findings["noise"]["embedding_noise"]
    assert share == pytest.approx(float(outcome.run.columns["embedding_noise"].mean()))
    assert bool((outcome.run.columns["embedding_noise"] > 0).all())  # of every row
    if mode == "relative":
        assert share == pytest.approx(0.05 / 3**0.5, rel=0.05)


def test_an_encoder_and_its_decoder_are_both_shaken_and_not_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T5 from end to end: its two stacks read through modules of their own."""
    made: list[tuple[Tensor, Tensor]] = []
    original = lope.embedding_noise

    def noise(embeddings: Tensor, mask: Tensor, draws: Any, kind: str, alpha: float) -> Tensor:
        found = original(embeddings, mask, draws, kind, alpha)
        made.append((mask, found))
        return found

    monkeypatch.setattr(lope, "embedding_noise", noise)
    result = noiseproof.fit(
        response_rows(),
        task="causal-lm",
        model=language_model("t5"),
        method=LoPE(**NOISY, emb_noise_mode="absolute"),
        train=train_settings(epochs=2),
        max_new_tokens=3,
    )
    assert len(made) == 2 * 4  # two stacks in every step of the stage poison
    for (asked, first), (said, second) in zip(made[::2], made[1::2], strict=True):
        assert asked.shape != said.shape or not torch.equal(asked, said)
        for mask, found in ((asked, first), (said, second)):
            assert bool(found[mask].any()) and not found[~mask].any()
        assert not torch.equal(first[:, 0], second[:, 0])
    rows = result.record.findings["experts"]["layers"]
    assert len(rows) == 12 and not any("theta_first" in row for row in rows)
    assert result.predictor.predict(["the old boat"])


def test_a_projection_that_gives_keys_too_is_named_in_the_findings() -> None:
    rows, model = response_rows(9), language_model("gpt2")
    found = noiseproof.fit(
        rows, task="causal-lm", model=model, method=LoPE(**NOISY), train=train_settings(epochs=2)
    ).record.findings
    assert found["experts"]["fused"] == ["c_attn"]


def test_a_share_of_the_rows_can_be_shaken(tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    shaken: list[Tensor] = []
    original = LoPE._shaker

    def shaker(*given: Any) -> Callable[[Tensor, Tensor], Tensor]:
        shake = original(*given)

        def spy(*given: Tensor) -> Tensor:
            made = shake(*given)
            shaken.append(made.flatten(1).any(dim=1))
            return made

        return spy

    monkeypatch.setattr(LoPE, "_shaker", shaker)
    tiny_run.fit(LoPE(**NOISY | {"poison_epochs": 4}, emb_noise_prob=0.5), epochs=5)
    rows = torch.cat(shaken)
    assert len(rows) == 100 and abs(int(rows.sum()) - 50) < 4 * 5
    shaken.clear()
    tiny_run.fit(LoPE(**NOISY, emb_noise_mode="off"), epochs=2)
    assert not shaken


# --- the end -------------------------------------------------------------------------------------


def test_similarities_are_measured_on_rows_as_given_without_dropout(tiny_run: Tiny) -> None:
    """Done again they come out the same; of fewer rows they are others."""
    outcome = tiny_run.fit(LoPE(**NOISY), epochs=2)
    model = experts(outcome)
    first = {name: layer.lora_theta.clone() for name, layer in model.layers.items()}
    assert all(bool(layer.lora_calibrated) for layer in model.layers.values())
    LoPE(**NOISY).finalize_model(outcome.run)
    for name, layer in model.layers.items():
        assert torch.equal(layer.lora_theta, first[name]) and bool(first[name].any())
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
        assert len(row["theta_first"]) == len(row["load"]) == 3  # BERT answers from [CLS]
    for name, value in found["mean"].items():
        assert value == pytest.approx(np.mean([row[name] for row in found["layers"]]))
    assert found["even_share"] == 0.25 and found["rows"] == 25 and "fused" not in found
    assert found["poison_weight"] == pytest.approx(
        np.mean([row["poison_weight"] for row in found["layers"]])
    )
    assert 0 <= found["noise_auroc"] <= 1 and 0 <= found["raised_share"] <= 1


def test_a_router_that_looks_at_nothing_is_found_out(tiny_run: Tiny) -> None:
    """All weights 1 / N: neither clean nor corrupted texts stand out, and the report says so."""
    outcome = tiny_run.fit(LoPE(**NOISY), epochs=2)
    model = experts(outcome)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.lora_gate.weight.zero_()
    LoPE(**NOISY).finalize_model(outcome.run)
    found = outcome.run.findings["experts"]
    assert found["poison_weight"] == found["even_share"] == 0.25
    assert (found["noise_auroc"], found["raised_share"]) == (0.5, 0)
    assert found["mean"]["above_even_share"] == 0
    assert found["mean"]["load_variation"] == pytest.approx(0, abs=1e-9)
    assert found["mean"]["entropy"] == pytest.approx(np.log(4))
    assert "So masking is only rescaling" in verdict(found)


def test_a_router_that_knows_noise_is_found_out_too(tiny_run: Tiny) -> None:
    """It gives the poison what is not a word of the vocabulary, such as damaged words are."""
    outcome = tiny_run.fit(LoPE(**NOISY), epochs=2)
    model = experts(outcome)
    table_of = model.model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    tokens = tiny_run.task.tokenizer.convert_ids_to_tokens(range(len(table_of)))
    known = {*FILLER, *(word for words in TOPICS.values() for word in words)}
    damaged = torch.tensor([token not in known for token in tokens]).float()
    direction = torch.linalg.lstsq(table_of - table_of.mean(dim=0), damaged - 0.5).solution
    with torch.no_grad():
        for layer in model.layers.values():
            layer.lora_gate.weight.zero_()
        next(iter(model.layers.values())).lora_gate.weight[3] = 3 * direction
    LoPE(**NOISY).finalize_model(outcome.run)
    found = outcome.run.findings["experts"]
    assert found["noise_auroc"] > 0.8 and found["raised_share"] > 0.7
    assert found["weight_difference"] > 0
    difference = found["weight_corrupted"] - found["weight_clean"]
    assert found["weight_difference"] == pytest.approx(difference)
    assert found["weight_clean"] == pytest.approx(found["poison_weight"], abs=0.01)
    assert "Corrupted texts rely more on it" in verdict(found)


def test_a_row_is_compared_with_its_own_corrupted_copy(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With noise that changes nothing, every pair must be equal to the last bit."""
    monkeypatch.setattr(lope.TextNoise, "apply", lambda noise, texts, random: texts)
    found = tiny_run.fit(LoPE(noise_rate=0.3), epochs=2).run.findings["experts"]
    assert (found["weight_difference"], found["raised_share"]) == (0, 0)
    assert found["rows"] == 25 and found["noise_auroc"] == 0.5


def test_a_poisoning_expert_that_learned_nothing_is_warned_of(tiny_run: Tiny) -> None:
    method = LoPE(**NOISY, train_poison=("A", "head"))
    with pytest.warns(UserWarning, match="the poisoning expert learned nothing in the stage"):
        outcome = tiny_run.fit(method, epochs=2)
    assert all(row["theta"] == [0, 0, 0] for row in outcome.run.findings["experts"]["layers"])


def test_the_size_of_an_update_is_that_of_the_calibrated_layer(tiny_run: Tiny) -> None:
    """Before it is calibrated, compensate would be mask."""
    outcome = tiny_run.fit(LoPE(**NOISY, compensate_k=1), epochs=4)
    model = experts(outcome).eval()
    model.set_inference_mode("none")
    rows = np.arange(25)
    with model.watching(25) as watch, torch.no_grad():
        watch.begin(rows.tolist())
        model(**tiny_run.encoded.inputs(rows))
    found = outcome.run.findings["experts"]["layers"]
    for row, wanted in zip(found, watch.table(), strict=True):
        for name in ("ratio", "mask", "renorm", "compensate"):
            assert row[f"update_{name}"] == pytest.approx(wanted[f"update_{name}"], rel=1e-5)
        assert row["update_mask"] < row["update_renorm"] / 1.1
    more = [row["update_compensate"] / row["update_mask"] for row in found]
    assert max(abs(one - 1) for one in more) > 1e-4  # far more than the tolerance above


def test_the_losses_of_corrupted_rows_are_told_apart(
    spy: Spy, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last epoch of the stage poison, as its steps saw them."""
    seen: dict[tuple[str, int], dict[int, float]] = {}
    original = lope.losses_of

    def losses_of(model: nn.Module, batch: Batch) -> Tensor:
        losses = original(model, batch)
        rows = zip(batch.rows.tolist(), losses.tolist(), strict=True)
        seen.setdefault((now.stage, now.epoch), {}).update(rows)
        return losses

    begin = LoPE.on_epoch_start

    def on_epoch_start(method: LoPE, run: Run) -> Any:
        nonlocal now
        now = run
        return begin(method, run)

    now: Run
    monkeypatch.setattr(lope, "losses_of", losses_of)
    monkeypatch.setattr(LoPE, "on_epoch_start", on_epoch_start)
    outcome = tiny_run.fit(LoPE(**TWO), epochs=4)
    hit = set(outcome.run.columns["corrupted"].nonzero().flatten().tolist())
    last, found = seen[POISON, 1], outcome.run.findings["noise"]
    assert len(last) == 25 and 0 < len(hit) < 25 and found["corrupted_share"] == len(hit) / 25
    for name, rows in (("corrupted", hit), ("others", set(last) - hit)):
        wanted = np.mean([last[row] for row in rows])
        assert found[f"loss_{name}"] == pytest.approx(wanted, rel=1e-5)


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
    assert model.mode == "none" and not method.modes(model)
    assert not outcome.run.findings
    assert not any("lora_BD" in name for name in model.trained)
    assert [row["stage"] for row in outcome.history] == [ADAPT, ADAPT]


# --- jobs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs below are, with their tables."""
    made: Path = tmp_path_factory.mktemp("lope")
    table(25, wrong=0.2).to_csv(made / "train.csv", index=False)
    table(12, seed=1).to_csv(made / "test.csv", index=False)
    return made


def job(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data": str(folder / "train.csv"),
        "test": str(folder / "test.csv"),
        "clean_label": "clean_label",
        "model": str(model),
        "method": LoPE(**NOISY),
        "train": train_settings(),
    } | changes


@pytest.fixture(scope="module")
def run_of(folder: Path, tiny_model: Path) -> Callable[..., Path]:
    """Folder of a run by name, made once."""

    def run(name: str, **changes: Any) -> Path:
        out = folder / name
        if not out.exists():
            noiseproof.fit(**job(folder, tiny_model, **changes), out=str(out))
        return out

    return run


LOADING = """
import json, sys
import noiseproof
from noiseproof.experts.mixing import MODES
from tiny import table, train_settings
predictor = noiseproof.load(sys.argv[1])
found = {"mode": predictor.model.mode}
for mode in MODES:
    predictor.model.set_inference_mode(mode)
    texts = table(12, seed=1)["text"].tolist()
    found[mode] = predictor.predict_proba(texts, settings=train_settings()).tolist()
print(json.dumps(found))
"""


def test_a_fresh_process_answers_as_the_run_did_in_four_modes(
    folder: Path, tiny_model: Path
) -> None:
    """Experts, router, head and similarities all come back; the mode is the one deployed."""
    result = noiseproof.fit(**job(folder, tiny_model), out=str(folder / "fresh"))
    done = python("-c", LOADING, str(folder / "fresh"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = last_json(done.stdout)
    assert found.pop("mode") == "compensate"
    model, texts = result.predictor.model, table(12, seed=1)["text"].tolist()
    assert isinstance(model, ExpertModel)
    for mode in MODES:
        model.set_inference_mode(mode)
        wanted = result.predictor.predict_proba(texts, settings=train_settings())
        np.testing.assert_array_equal(np.array(found[mode]), np.asarray(wanted, dtype=float))
    assert len({str(answers) for answers in found.values()}) == 4


def test_the_record_holds_every_mode_and_what_the_router_does(run_of: Callable[..., Path]) -> None:
    record = json.loads((run_of("plain") / "record.json").read_bytes())
    assert list(record["modes"]) == ["none", "mask", "renorm", "compensate"]
    deployed = record["modes"]["compensate"]
    assert deployed["test_accuracy"] == record["metrics"]["test_accuracy"]
    assert set(record["findings"]) == {"experts", "noise"}


def test_compensation_is_measured_in_all_its_forms_where_asked(run_of: Callable[..., Path]) -> None:
    """One training; the deployed form is the last that is set."""
    out = run_of("forms", method=LoPE(**NOISY, more_modes=True, compensate_sign=-1))
    modes = json.loads((out / "record.json").read_bytes())["modes"]
    forms = ["sum to one", "mass kept", "sign -1", "sign 0", "calibrated", "online",
             "0 of 3", "1 of 3", "2 of 3"]  # fmt: skip
    assert list(modes) == ["none", "mask", "renorm", *(f"compensate, {one}" for one in forms),
                           "compensate"]  # fmt: skip
    assert modes["compensate, sign -1"] == modes["compensate"] == modes["compensate, calibrated"]
    assert modes["compensate, online"] != modes["compensate"]
    loaded = noiseproof.load(out)
    assert loaded.model.settings.sign == -1
    texts = table(12, seed=1)["text"].tolist()
    answers = []
    for changes in ({}, {"sign": 1}, {"beta": 3.0}, {"sign": -1, "beta": LoPE().beta}):
        loaded.model.set_inference_mode("compensate", **changes)
        answers.append(loaded.predict_proba(texts, settings=train_settings()))
    np.testing.assert_array_equal(answers[0], answers[3])
    assert len({str(answer) for answer in answers}) == 3
    with pytest.raises(InputError, match="no setting 'betta'; it has online, sign, most"):
        loaded.model.set_inference_mode("compensate", betta=1)


def test_what_is_typed_as_a_number_is_one(folder: Path, tiny_model: Path) -> None:
    """A text in its place would be refused, on the command line and from the record of a run."""
    data = (folder / "train.csv", "--test", folder / "test.csv", "--model", tiny_model)
    quick = ("--train.epochs", 2, "--train.device", "cpu", "--train.precision", "fp32")
    one, two = folder / "typed", folder / "read"
    words = ("fit", *data, "--method", "LoPE", "--method.beta", "2.0", *quick, "--out", one)
    for line in (words, ("fit", "--config", one / "record.json", "--out", two)):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main([str(word) for word in line]) == 0
    records = [json.loads((out / "record.json").read_bytes()) for out in (one, two)]
    assert [record["spec"]["method"]["beta"] for record in records] == [2.0, 2.0]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert noiseproof.load(two).model.settings.beta == 2.0


def test_a_smaller_file_without_the_poison_answers_the_same(run_of: Callable[..., Path]) -> None:
    whole = run_of("plain")
    small = run_of("small", method=LoPE(**NOISY, save_poison=False))
    texts = table(12, seed=1)["text"].tolist()
    one, two = (noiseproof.load(out) for out in (whole, small))
    np.testing.assert_array_equal(
        *(loaded.predict_proba(texts, settings=train_settings()) for loaded in (one, two))
    )
    sizes = [(out / "model" / ADAPTERS_FILE).stat().st_size for out in (whole, small)]
    assert sizes[1] < sizes[0]
    with pytest.raises(InputError, match="poisoning experts were not saved"):
        two.model.set_inference_mode("none")


@pytest.mark.parametrize("step", [(POISON, 0, 2), (ADAPT, 0, 2), (ADAPT, 1, 1)], ids=str)
def test_a_run_that_is_interrupted_in_any_stage_comes_to_the_same_result(
    step: tuple[str, int, int],
    folder: Path,
    run_of: Callable[..., Path],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The noise of rows and embeddings is drawn again, and what is frozen is frozen again."""
    out = folder / "-".join(map(str, step))
    fit_in_two_parts(job(folder, tiny_model) | {"out": str(out)}, step, monkeypatch)
    assert_same_run(out, run_of("plain"))


@pytest.mark.parametrize("kind", ["half precision", "responses"])
def test_half_precision_and_responses_are_gone_on_with_in_the_second_stage(
    kind: str, folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the rows with responses go without the expert: the same ones again."""
    given = job(folder, tiny_model)
    if kind == "responses":
        given = {
            "data": response_rows(),
            "test": response_rows(9, seed=5),
            "task": "causal-lm",
            "model": language_model("llama"),
            "method": LoPE(**NOISY),
            "train": train_settings(),
        }
    else:
        monkeypatch.setattr("noiseproof.engine.choose_precision", lambda *asked: "bf16")
        given["train"] = train_settings(precision="bf16")
    one, two = folder / f"{kind} whole", folder / f"{kind} in two"
    noiseproof.fit(**given, out=str(one))
    fit_in_two_parts(given | {"out": str(two)}, (ADAPT, 1, 1), monkeypatch)
    assert_same_run(two, one)
    record = json.loads((one / "record.json").read_bytes())
    assert len({json.dumps(values) for values in record["modes"].values()}) > 1
    tensors = load_file(str(one / "model" / ADAPTERS_FILE))
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if "_B" in name)


def fit_in_two_parts(
    given: dict[str, Any], step: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fit, be interrupted in a step of a stage and epoch, and go on."""
    original = LoPE.compute_loss

    def compute_loss(method: LoPE, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        if (run.stage, run.epoch, run.step) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(method, model, batch, run)

    with monkeypatch.context() as patch:
        patch.setattr(LoPE, "compute_loss", compute_loss)
        with pytest.raises(Interrupted):
            noiseproof.fit(**given)
    noiseproof.fit(**given, resume=True)


def assert_same_run(one: Path, two: Path) -> None:
    """Two runs left the same behind, bit for bit."""
    for name in ("model/" + ADAPTERS_FILE, "history.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    tables = [pd.read_parquet(path / "samples.parquet") for path in (one, two)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    records = [json.loads((path / "record.json").read_bytes()) for path in (one, two)]
    for key in ("metrics", "modes", "findings"):
        assert records[0][key] == records[1][key]


def test_the_best_epoch_is_one_of_the_second_stage(tiny_run: Tiny) -> None:
    """Weights of the first stage have normal experts that never learned anything."""

    def measure(predict_on: Any, run: Run) -> dict[str, float]:
        return {"validation_accuracy": 0.9 if run.stage == POISON else 0.5 - 0.1 * run.epoch}

    outcome = tiny_run.fit(
        LoPE(**NOISY, poison_epochs=2),
        extra={"measure": measure},
        **{"epochs": 4, "select": "best", "evaluate": "epoch"},
    )
    assert outcome.best_epoch == 2 and outcome.history[2]["stage"] == ADAPT


def test_a_model_whose_pooler_is_new_comes_back_with_it(folder: Path, tiny_model: Path) -> None:
    """The checkpoint lacks it, so it trains with the head and is saved with the experts."""
    from transformers import AutoTokenizer, BertForMaskedLM

    bare = folder / "bare"
    BertForMaskedLM.from_pretrained(str(tiny_model)).save_pretrained(str(bare))
    AutoTokenizer.from_pretrained(str(tiny_model)).save_pretrained(str(bare))
    out = folder / "pooled"
    result = noiseproof.fit(**job(folder, bare, method=LoPE(**NOISY)), out=str(out))
    texts = table(12, seed=1)["text"].tolist()
    one, two = (
        loaded.predict_proba(texts, settings=train_settings())
        for loaded in (result.predictor, noiseproof.load(out))
    )
    np.testing.assert_array_equal(one, two)
    assert any("pooler" in name for name in load_file(str(out / "model" / ADAPTERS_FILE)))


def test_a_base_that_is_gone_is_told_with_the_file_that_names_it(
    folder: Path, tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, folder / "moving")
    out = folder / "moved"
    noiseproof.fit(**job(folder, folder / "moving", train=train_settings(epochs=2)), out=str(out))
    (folder / "moving").rename(folder / "elsewhere")
    with pytest.raises(InputError, match=r"is gone.*model/adapters\.json as base_model_name"):
        noiseproof.load(out)
    about = json.loads((out / "model" / ADAPTERS_CONFIG).read_bytes())
    about["base_model_name_or_path"] = str(folder / "elsewhere")
    (out / "model" / ADAPTERS_CONFIG).write_text(json.dumps(about), encoding="utf-8")
    noiseproof.load(out)


def test_what_it_trains_cannot_be_merged(folder: Path, tiny_model: Path) -> None:
    with pytest.raises(InputError, match="LoPE trains depends on the token and cannot be merged"):
        Job(**job(folder, tiny_model, merge=True))


def test_rows_of_numbers_and_images_are_refused(folder: Path) -> None:
    for task in ("features", "image"):
        with pytest.raises(InputError, match="LoPE"):
            Job({}, task=task, method=LoPE(), model=None)


# --- test rows with corrupted texts --------------------------------------------------------------


def test_the_test_set_is_measured_once_more_with_corrupted_texts(
    folder: Path, run_of: Callable[..., Path]
) -> None:
    """As a set of its own: the clean one and the model stay bit for bit what they were."""
    plain, noisy = run_of("plain"), run_of("noisy", test_noise="text:1.0,unit=char")
    one, two = (json.loads((run / "record.json").read_bytes()) for run in (plain, noisy))
    for key, value in one["metrics"].items():
        assert two["metrics"][key] == value
    assert (plain / "model" / ADAPTERS_FILE).read_bytes() == (
        noisy / "model" / ADAPTERS_FILE
    ).read_bytes()
    found = two["ood"]["corrupted"]
    assert found["rows"] == 12 and found != one["ood"].get("corrupted")
    assert any("corrupted" in name for name in two["modes"]["compensate"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_noise": "symmetric:0.3"}, "test_noise must be text noise such as text:0.3"),
        ({"test_noise": "text:0.3", "test": None}, "test_noise corrupts the test rows; give test"),
        (
            {"test_noise": "text:0.3", "test_ood": {"corrupted": "test.csv"}},
            "test_noise makes a set named 'corrupted'; give the one in test_ood another name",
        ),
        ({"test_noise": ["text:0.3", "symmetric:0.3"]}, "such as text:0.3, got 'symmetric:0.3'"),
        ({"test_noise": []}, "such as text:0.3, got an empty list"),
        (
            {
                "test_noise": ["text:0.3", "text:0.1"],
                "test_ood": {"corrupted-text-0.1": "test.csv"},
            },
            "test_noise makes a set named 'corrupted-text-0.1'; give the one",
        ),
    ],
    ids=str,
)
def test_noise_that_cannot_fall_on_test_texts_is_refused(
    changes: dict[str, Any], message: str, folder: Path, tiny_model: Path
) -> None:
    with pytest.raises(InputError, match=message):
        Job(**job(folder, tiny_model, **changes))


def test_corrupted_test_texts_hang_on_the_seed_of_noise_alone(
    folder: Path, tiny_model: Path
) -> None:
    """And the identifier of a run without them is what it was before there were any."""

    def made(test_noise: str | None, **changes: Any) -> tuple[Prepared, Any]:
        train = train_settings(seed=changes.pop("seed", 0))
        work = Prepared(
            Job(**job(folder, tiny_model, test_noise=test_noise, train=train, **changes))
        )
        bad = work.sets.get(f"{OOD}{CORRUPTED}")
        return work, bad and [tuple(row) for row in bad.inputs.as_texts()]

    plain, nothing = made(None)
    work, bad = made("text:0.5")
    assert nothing is None and "test_noise" not in plain.job.spec()
    assert work.job.spec() == plain.job.spec() | {"test_noise": "text:0.5"}
    for one, two in ((work.sets["test"], plain.sets["test"]), (work.data, plain.data)):
        assert [*map(tuple, one.inputs.as_texts())] == [*map(tuple, two.inputs.as_texts())]
    clean = [tuple(row) for row in plain.sets["test"].inputs.as_texts()]
    hit = [one != two for one, two in zip(clean, bad, strict=True)]
    assert 0 < sum(hit) < 12
    assert (work.sets[f"{OOD}{CORRUPTED}"].labels == work.sets["test"].labels).all()
    assert made("text:0.5", noise_seed=3, seed=1)[1] == made("text:0.5", noise_seed=3)[1] != bad
    _, more = made("text:0.5", noise="text:0.5")
    assert more == bad  # whatever falls on the training rows


def test_several_noises_make_a_set_each_and_a_list_of_one_is_that_one(
    folder: Path, tiny_model: Path
) -> None:
    """A name for two rates would mix them; another identifier would hide the runs from before."""

    def made(test_noise: Any) -> Job:
        return Job(**job(folder, tiny_model, test_noise=test_noise))

    alone, both = made("text:0.5"), made(["text:0.05,unit=char", parse_noise("text:0.5")])
    assert made(["text:0.5"]).spec() == made(("text:0.5", "text:0.5")).spec() == alone.spec()
    assert both.spec()["test_noise"] == ["text:0.05,unit=char", "text:0.5"]
    assert Job(**job(folder, tiny_model, test_noise=both.spec()["test_noise"])) == both
    sets, single = Prepared(both).sets, Prepared(alone).sets
    assert [*sets] == ["test", "ood_corrupted-text-0.05-unit-char", "ood_corrupted-text-0.5"]
    texts = [tuple(map(tuple, rows.inputs.as_texts())) for rows in sets.values()]
    assert len({*texts}) == 3
    assert texts[2] == tuple(map(tuple, single[f"{OOD}{CORRUPTED}"].inputs.as_texts()))


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout_mode": "none"}, "LoPE.dropout_mode must be one of shared, per_expert"),
        ({"gate_input": "h"}, "LoPE.gate_input must be one of x, Ax; got 'h'"),
        ({"gate_init": "zeros"}, "LoPE.gate_init must be one of kaiming, normal"),
        ({"epoch_budget": "half"}, "LoPE.epoch_budget must be one of total, per_stage"),
        ({"head_policy": "new"}, "LoPE.head_policy must be one of auto, carry, restore, reinit"),
        (
            {"head_policy": "restore", "train_adapt": ("B",)},
            "needs a head that trains again: put head into train_adapt",
        ),
        ({"noise_unit": "line"}, "LoPE.noise_unit must be one of sample, word, char"),
        ({"noise_charset": "utf8"}, "LoPE.noise_charset must be one of ascii, keyboard"),
        ({"noise_resample": "step"}, "LoPE.noise_resample must be one of static, epoch"),
        ({"emb_noise_mode": "gauss"}, "LoPE.emb_noise_mode must be one of absolute, relative"),
        ({"poison_dropout": 1.5}, "LoPE.poison_dropout must lie in .0, 1."),
        ({"poison_dropout": 0.5, "adapt_forward": "mask"}, "needs adapt_forward=none"),
        (
            {"save_poison": False, "inference_mode": "none"},
            "save_poison=False leaves out what inference_mode=none answers with",
        ),
        ({"adapt_forward": "all"}, "LoPE.adapt_forward must be one of none, mask, renorm"),
        ({"inference_mode": "all"}, "LoPE.inference_mode must be one of none, mask, renorm"),
        ({"theta_mode": "token"}, "LoPE.theta_mode must be one of calibrate, online"),
        ({"compensate_order": "size"}, "LoPE.compensate_order must be one of theta, index, got"),
        ({"rank": 0}, "LoPE.rank must be at least 1, got 0"),
        ({"num_experts": 0}, "LoPE.num_experts must be at least 1"),
        ({"theta_examples": 0}, "LoPE.theta_examples must be at least 1"),
        ({"num_poison_experts": 3}, "LoPE.num_poison_experts must be 0, 1 or 2, got 3"),
        ({"num_poison_experts": 0}, "has nothing to mask.*use the preset hydralora"),
        ({"alpha": 0}, "LoPE.alpha"),
        ({"lora_dropout": 1.0}, "LoPE.lora_dropout"),
        ({"dropout": 1.0}, "LoPE.dropout"),
        ({"balance_weight": -1.0}, "LoPE.balance_weight"),
        ({"learning_rate": 0.0}, "LoPE.learning_rate"),
        ({"noise_rate": 1.0}, "LoPE.noise_rate"),
        ({"target_noise_rate": 1.0}, "LoPE.target_noise_rate"),
        ({"emb_noise_alpha": -0.1}, "LoPE.emb_noise_alpha"),
        ({"emb_noise_prob": 1.5}, "LoPE.emb_noise_prob"),
        ({"noise_seed": -1}, "LoPE.noise_seed must lie in"),
        ({"poison_epochs": 0}, "LoPE.poison_epochs must be at least 1"),
        (
            {"poison_epochs": 2, "epoch_budget": "per_stage"},
            "LoPE.poison_epochs=2 shares out .* with epoch_budget=per_stage each stage has all",
        ),
        ({"compensate_k": 4}, r"LoPE.compensate_k must lie in \[0, 3\], got 4"),
        ({"compensate_sign": 2}, "LoPE.compensate_sign must be -1, 0 or 1"),
        ({"beta": "one"}, "LoPE.beta must be sum_to_one, keep_mass or a number above 0, got 'one'"),
        ({"beta": 0.0}, "LoPE.beta must be sum_to_one, keep_mass or a number above 0, got 0.0"),
        ({"beta": float("nan")}, "LoPE.beta must be sum_to_one"),
        ({"train_poison": ()}, "LoPE.train_poison must name some of A, B, BD, gate, head"),
        ({"train_adapt": ("C",)}, "LoPE.train_adapt must name some of A, B, BD, gate, head"),
        ({"noise_stages": ("train",)}, "LoPE.noise_stages must name some of poison, adapt"),
        ({"noise_ops": ("swap",)}, "LoPE.noise_ops must name some of shuffle, insert, delete"),
        ({"char_strength": 0.0}, "strength"),
        ({"shuffle_window": 1}, "window"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoPE(**settings)


def test_presets_are_what_the_papers_describe() -> None:
    presets = LoPE.presets()
    assert presets["default"] == LoPE()
    paper = presets["paper"]
    assert (paper.rank, paper.num_experts, paper.num_poison_experts) == (4, 3, 1)
    assert (paper.noise_rate, paper.emb_noise_alpha) == (0.05, 0.05)
    assert paper.emb_noise_mode == "absolute"
    assert (paper.learning_rate, paper.epoch_budget) == (2e-4, "per_stage")
    assert (paper.beta, presets["sft"]) == ("sum_to_one", paper)
    assert paper.train_poison == ("A", "BD", "head") and paper.inference_mode == "compensate"
    for name in ("hydralora", "hydralora-noise", "hydralora-neftune"):
        assert [stage.name for stage in presets[name].stages(1)] == [ADAPT]
    transforms = {name: method.stages(4)[0].transform for name, method in presets.items()}
    silent = {name for name, transform in transforms.items() if transform is None}
    assert silent == {"hydralora", "hydralora-neftune", "no-noise"}


def test_every_group_of_parameters_has_a_name() -> None:
    names = ("lora_A", "lora_B0", "lora_BD", "lora_gate", "classifier")
    assert tuple(group_of(f"model.layer.{name}.weight") for name in names) == GROUPS
