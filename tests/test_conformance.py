"""What every method must do, whatever its idea is; one row in `CASES` makes a method take part.

Minimal settings let warm-up, selection and routing all happen within three epochs.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import noiseproof
from conftest import FitCache
from noiseproof.engine import Engine, derive_seed
from noiseproof.errors import InputError
from noiseproof.losses import cross_entropy, forward_correction, marginal_cross_entropy
from noiseproof.method import Batch, Method, Run
from noiseproof.methods import (
    ELR,
    GCE,
    METHODS,
    SCE,
    TURN,
    Bootstrapping,
    CleaR,
    CoTeaching,
    CrossEntropy,
    ForwardCorrection,
    LabelSmoothing,
    LoPE,
    NMTune,
    SmallLoss,
    baselines,
)
from noiseproof.methods.baselines import PairOutput, Tuned
from noiseproof.mixture import LossMixture
from tiny import LABELS, Answers, Tiny, as_batch, same_weights, train_settings, weights

SMALL = LossMixture(min_samples=4, min_gap=0.0)  # 25 rows are enough for a mixture
BY_CLASS = dataclasses.replace(SMALL, scope="per_class")

ROUTED: dict[str, Any] = {"warmup_epochs": 1, "gamma": 0.8, "max_clean_loss": None}

CASES: dict[str, Method] = {
    "CleaR": CleaR(**ROUTED, scoring_passes=2, mixture=SMALL),
    "CleaR(adapter)": CleaR(**ROUTED, peft="adapter", mixture=SMALL),
    "CleaR(bitfit)": CleaR(**ROUTED, peft="bitfit", mixture=SMALL),
    "CleaR(prompt)": CleaR(**ROUTED, peft="prompt", num_virtual_tokens=3, mixture=SMALL),
    "CleaR(prefix)": CleaR(**ROUTED, peft="prefix", num_virtual_tokens=3, mixture=SMALL),
    "CleaR(reuse)": CleaR(**ROUTED, scoring="reuse", loss_ema=0.5, mixture=SMALL),
    "TURN": TURN(probe_epochs=2, probe_batch_size=24, mixture=BY_CLASS, precondition="off"),
    "NMTune": NMTune(),
    "LoPE": LoPE(noise_rate=0.3),
    "CrossEntropy": CrossEntropy(),
    "LabelSmoothing": LabelSmoothing(),
    "GCE": GCE(),
    "SCE": SCE(),
    "Bootstrapping": Bootstrapping(),
    "ForwardCorrection": ForwardCorrection(warmup_epochs=1),
    "ELR": ELR(),
    "CoTeaching": CoTeaching(warmup_epochs=1, ramp_epochs=1, mixture=SMALL),
    "SmallLoss": SmallLoss(warmup_epochs=1, mixture=SMALL),
}

NOT_A_MEAN_OVER_ROWS = {
    "CoTeaching": "picks rows within the micro-batch, so the cut decides which rows it picks",
    "NMTune": "covariances, singular values and BatchNorm are those of a micro-batch",
}

IDENTITY = tuple(tuple(float(i == j) for j in range(3)) for i in range(3))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def method(case: str) -> Method:
    return CASES[case]


def without_dropout(method: Method) -> Method:
    return dataclasses.replace(method, dropout=0.0)  # type: ignore[call-arg]


def all_finite(values: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values.values())


def test_every_registered_method_has_its_row_in_the_table_of_cases() -> None:
    """A method that is missing here would be conformant by absence."""
    tested = {type(method).__name__ for method in CASES.values()}
    assert tested == set(METHODS), "give every method in METHODS minimal settings in CASES"
    assert {name: method.name for name, method in METHODS.items()} == {n: n for n in METHODS}


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_needs_no_settings(name: str) -> None:
    """`noiseproof fit --method NAME` would fail for a method with a required field.

    A probe has a length of its own: its epochs cost next to nothing.
    """
    method = METHODS[name]()
    assert method == METHODS[name].presets()["default"]
    stages = method.stages(epochs=6)
    assert sum(stage.epochs for stage in stages if stage.name != "probe") == 6


@pytest.mark.parametrize("name", METHODS)
def test_a_method_cannot_be_changed_after_it_was_made(name: str) -> None:
    """Settings that change during a run make its record a lie."""
    method = METHODS[name]()
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, getattr(method, field.name))
    assert method == METHODS[name]() and hash(method) == hash(METHODS[name]())


@pytest.mark.parametrize("name", METHODS)
def test_settings_survive_a_round_trip_through_json(name: str) -> None:
    """`predict` and `resume` rebuild the method from record.json; a list for a tuple or a dict for
    the mixture would be another method, or a crash long after training.
    """
    cls = METHODS[name]
    changed = {
        "mixture": LossMixture(scope="per_class", transform="log", min_gap=0.25),
        "target_modules": ("query", "value"),
        "transition": ((0.75, 0.25), (0.5, 0.5)),
        "learning_rate": 1e-3,
    }
    fields = {field.name for field in dataclasses.fields(cls)}
    settings = {key: value for key, value in changed.items() if key in fields}
    for method in [cls(**settings), *cls.presets().values()]:
        values = json.loads(json.dumps(method.to_dict(), allow_nan=False))
        assert values["name"] == name
        assert METHODS[name].from_dict(values) == method
        assert hash(METHODS[name].from_dict(values)) == hash(method)


# --- seeds ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    case: str, method: Method, tiny_run: Tiny, tiny_fits: FitCache
) -> None:
    """A hook that draws from the global random stream makes every comparison a coin toss."""
    torch.manual_seed(123)  # the state around a run must not matter
    torch.rand(5)
    again, other = tiny_run.fit(method), tiny_run.fit(method, seed=1)
    first = tiny_fits(method)
    assert same_weights(first.model, again.model)
    assert first.history == again.history
    assert not same_weights(first.model, other.model)


def test_initialisation_and_order_have_seeds_of_their_own(tiny_run: Tiny) -> None:
    """Seeds that are tied together hide how much of a difference is the draw of the head."""
    method = CrossEntropy(tune="lora")
    base = tiny_run.fit(method, seed=5)
    both = tiny_run.fit(method, seed=5, init_seed=5, order_seed=5)
    assert same_weights(base.model, both.model)
    for changed in ({"init_seed": 6}, {"order_seed": 6}):
        assert not same_weights(base.model, tiny_run.fit(method, seed=5, **changed).model)


# --- what trains ---------------------------------------------------------------------------------


def prepared(method: Method, tiny_run: Tiny) -> torch.nn.Module:
    """The model as the loop prepares it under seed 0, before any step."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(0, "init"))
        return method.prepare_model(copy.deepcopy(tiny_run.model))


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize(
    ("case", "tune", "trained"),
    [
        (case, tune, trained)
        for case, method in CASES.items()
        for tune, trained in (
            ("full", ("",)),
            ("head", ("classifier.",)),
            ("lora", (".lora_A.", ".lora_B.", ".classifier.modules_to_save.")),
        )
        if isinstance(method, Tuned) or tune == getattr(method, "peft", "")
    ],
)
def test_only_the_part_that_is_tuned_changes(
    case: str, tune: str, trained: tuple[str, ...], tiny_run: Tiny
) -> None:
    """An encoder that quietly moves makes a head or an adapter of a method something else."""
    method = CASES[case]
    if isinstance(method, Tuned):
        method = dataclasses.replace(method, tune=tune)
    before = parameters(prepared(method, tiny_run))
    outcome = tiny_run.fit(method, epochs=2)
    after = parameters(outcome.run.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if any(part in name for part in trained)}
    assert outcome.trainable == sum(before[name].numel() for name in changed)


@pytest.mark.parametrize(
    "case", [case for case, method in CASES.items() if hasattr(method, "tune")]
)
def test_a_frozen_encoder_is_not_left_in_train_mode(
    case: str, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dropout would disturb the features on which the head is trained."""
    method = dataclasses.replace(CASES[case], tune="head")  # type: ignore[call-arg]
    cls, modes = type(method), []
    original = cls.compute_loss

    def spy(self: Method, model: torch.nn.Module, batch: Batch, run: Run) -> Tensor:
        for name, module in run.model.named_modules():
            if isinstance(module, torch.nn.Dropout):
                modes.append((".bert." in f".{name}.", module.training))
        return original(self, model, batch, run)

    monkeypatch.setattr(cls, "compute_loss", spy)
    tiny_run.fit(method, epochs=2)
    head = {(False, True)} if method.name != "NMTune" else set()  # whose head has no dropout
    assert set(modes) == {(True, False), *head}  # encoder: eval; dropout of the head: train


# --- what a method may see -----------------------------------------------------------------------


def test_a_batch_has_no_place_for_true_labels() -> None:
    """A field more, and a method could train on the answers."""
    assert [field.name for field in dataclasses.fields(Batch)] == [
        "inputs",
        "labels",
        "rows",
        "columns",
    ]
    assert not [field.name for field in dataclasses.fields(Run) if "clean" in field.name]


@dataclasses.dataclass
class Jobs:
    """Two runs of one method that differ in the true labels alone."""

    folder: Path
    one: Any
    other: Any
    test: pd.DataFrame


@pytest.fixture(scope="module")
def jobs(
    tiny_model: Path, tiny_table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Jobs]:
    made: dict[str, Jobs] = {}

    def run(case: str) -> Jobs:
        if case not in made:
            folder = tmp_path_factory.mktemp("jobs") / "run"
            settings: dict[str, Any] = {
                "method": CASES[case],
                "model": str(tiny_model),
                "text": "text,context",
                "clean_label": "clean_label",
                "train": train_settings(max_length=16),
            }
            shifted = [LABELS[(LABELS.index(x) + 1) % 3] for x in tiny_table["clean_label"]]
            other = tiny_table.assign(clean_label=shifted)
            test = tiny_table.drop(columns=["label", "clean_label"])
            made[case] = Jobs(
                folder,
                noiseproof.fit(tiny_table, out=folder, **settings),
                noiseproof.fit(other, **settings),
                test,
            )
        return made[case]

    return run


def test_the_result_does_not_depend_on_the_true_labels(
    case: str, jobs: Callable[[str], Jobs]
) -> None:
    """A method, or a pass made only to measure, that reads or disturbs anything by way of the true
    labels would look good exactly where the truth is known.
    """
    pair = jobs(case)
    assert same_weights(pair.one.predictor.model, pair.other.predictor.model)
    columns = [name for name in pair.one.samples.columns if name != "clean_label"]
    pd.testing.assert_frame_equal(pair.one.samples[columns], pair.other.samples[columns])
    assert pair.one.record.noise["noise_rate"] == 0.2  # the truth was read, and it did differ
    assert pair.other.record.noise["noise_rate"] > 0.5


def test_a_saved_model_answers_as_the_trained_one(case: str, jobs: Callable[[str], Jobs]) -> None:
    """A head that is not saved is drawn anew on loading: plausible labels, chance accuracy."""
    pair = jobs(case)
    texts, pairs = pair.test["text"].tolist(), pair.test["context"].tolist()
    kept = pair.one.predictor.predict_proba(texts, pairs, train_settings())
    loaded = noiseproof.load(pair.folder).predict_proba(texts, pairs, train_settings())
    assert (kept == loaded).all()
    assert len({tuple(row) for row in kept.round(6).tolist()}) > 1  # it does not answer by rote


def test_both_texts_of_a_row_are_read(case: str, jobs: Callable[[str], Jobs]) -> None:
    """Dropping the second text silently leaves a model that cannot know the relation."""
    predictor = jobs(case).one.predictor
    first = ["we saw the boat"] * 2
    one, other = predictor.predict_proba(first, ["old soil", "salt oven"], train_settings())
    assert abs(one - other).max() > 1e-6


@pytest.mark.parametrize("eval_gate", ["sample", "mean", "expected"])
def test_gates_that_stay_at_test_time_come_back_with_the_loaded_model(
    eval_gate: str, tiny_model: Path, tiny_table: pd.DataFrame, tmp_path: Path
) -> None:
    """They are no part of the weights, and their draws must not depend on a seed that is not
    loaded: the model would answer otherwise than it was measured.
    """
    method = CleaR(**ROUTED | {"gamma": 0.5}, scoring_passes=1, eval_gate=eval_gate)
    result = noiseproof.fit(
        tiny_table,
        method=method,
        model=str(tiny_model),
        train=train_settings(epochs=2, seed=3, learning_rate=2e-2),
        out=tmp_path / "run",
    )
    texts = tiny_table["text"].tolist()
    kept = result.predictor.predict_proba(texts, settings=train_settings())
    loaded = noiseproof.load(tmp_path / "run").predict_proba(texts, settings=train_settings())
    assert (kept == loaded).all()


# --- columns -------------------------------------------------------------------------------------


def test_columns_have_one_finite_value_per_row(
    case: str, method: Method, tiny_run: Tiny, tiny_fits: FitCache
) -> None:
    """A column of another length is joined to the wrong rows; NaN spreads into every weight."""
    columns = tiny_fits(method).run.columns
    assert all(len(column) == len(tiny_run.labels) for column in columns.values())
    assert all_finite(columns)
    assert all(not column.requires_grad for column in columns.values())
    assert set(method.writes) <= set(columns) | {"train_logits", "recorded"}


def hook_columns(
    method: Method, model: torch.nn.Module, logits: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """The columns of the second epoch of a model that answers with these logits."""

    def predict(before_batch: Callable[[Tensor], None] | None = None) -> Tensor:
        if before_batch is not None:
            before_batch(torch.arange(len(labels)))
        return logits.clone()

    run = Run(model, labels, 3, predict, torch.Generator().manual_seed(0), epochs=3)
    if method.name == "CleaR" and "reuse" in method.to_dict()["scoring"]:
        run.columns = {"train_logits": logits.clone(), "recorded": torch.ones(len(labels))}
    for run.epoch in (0, 1):
        run.columns |= method.on_epoch_start(run)
    return run.columns


def test_a_lone_row_that_cannot_be_scored_does_not_stop_the_run(
    case: str, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out of the mixture; more of them mean that training is lost."""
    original = Engine.predict

    def broken(self: Engine, encoded: Any, *given: Any, **named: Any) -> Tensor:
        logits = original(self, encoded, *given, **named)
        if encoded is tiny_run.encoded and len(logits) == len(tiny_run.labels):
            logits[3] = float("nan")
        return logits

    monkeypatch.setattr(Engine, "predict", broken)
    outcome = tiny_run.fit(CASES[case], epochs=3)
    assert all_finite(outcome.run.columns) and all_finite(weights(outcome.model))


@pytest.mark.parametrize("case", [c for c, m in CASES.items() if c != "CleaR(reuse)"])
def test_columns_follow_their_rows_when_the_rows_are_permuted(case: str, tiny_run: Tiny) -> None:
    """A hook that mixes up rows scores one row with the loss of another."""
    method = CASES[case]
    if isinstance(method, TURN):  # draws by row number
        method = dataclasses.replace(method, draw="top")
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (60,), generator=generator)
    logits = torch.randn(60, 3, generator=generator)
    logits[torch.arange(60), torch.where(torch.arange(60) % 4 == 0, (labels + 1) % 3, labels)] += 3
    order = torch.randperm(60, generator=generator)
    model = method.prepare_model(copy.deepcopy(tiny_run.model))
    straight = hook_columns(method, model, logits, labels)
    permuted = hook_columns(method, model, logits[order], labels[order])
    assert straight.keys() == permuted.keys()
    for name, column in straight.items():
        torch.testing.assert_close(permuted[name], column[order], rtol=1e-4, atol=1e-5)
    if "clean_prob" in straight:  # the hook told the wrong rows from the right ones
        assert 0.1 < float(straight["clean_prob"].mean()) < 0.9


# --- awkward data --------------------------------------------------------------------------------


def test_a_last_batch_of_one_row_trains(
    case: str, method: Method, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variance, a rank or a squeezed dimension of one row turns into NaN or a crash at the end
    of an epoch, for one batch size in a hundred.
    """
    cls, sizes = type(method), set()
    original = cls.compute_loss

    def spy(self: Method, model: torch.nn.Module, batch: Batch, run: Run) -> Tensor:
        sizes.add((run.stage, run.epoch, len(batch.rows)))
        loss = original(self, model, batch, run)
        assert loss.shape == ()
        return loss

    monkeypatch.setattr(cls, "compute_loss", spy)
    outcome = tiny_run.fit(method, batch_size=24)
    epochs = {(row["stage"], row["epoch"]) for row in outcome.history}
    assert {(stage, epoch) for stage, epoch, _ in sizes} == epochs and len(epochs) >= 3
    assert 1 in {size for _, _, size in sizes}
    assert all_finite(weights(outcome.model)) and all_finite(outcome.run.columns)
    for row in outcome.history:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))


def test_a_class_without_a_training_row_does_no_harm(
    case: str, method: Method, tiny_run: Tiny
) -> None:
    """Rare classes vanish from small samples; per-class statistics then divide by zero."""
    labels = torch.where(tiny_run.labels == 1, 2, tiny_run.labels)
    with pytest.warns(UserWarning, match="no training row has the label"):
        outcome = tiny_run.fit(method, labels=labels)
    assert all_finite(weights(outcome.model)) and all_finite(outcome.run.columns)
    assert outcome.run.predict().shape == (25, 3)


@pytest.mark.parametrize("case", [c for c in CASES if c not in NOT_A_MEAN_OVER_ROWS])
@pytest.mark.filterwarnings("ignore:the poisoning expert learned nothing")  # no step is taken
def test_eight_times_one_row_is_one_time_eight_rows(
    case: str, tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulation that weighs a short micro-batch like a full one trains another objective.

    Gradients are compared, with the steps left out: Adam would blow rounding up to its full rate.
    """
    method = without_dropout(CASES[case])
    if isinstance(method, LoPE):
        method = dataclasses.replace(method, lora_dropout=0.0)

    def gradients(micro: int | None) -> list[dict[int, Tensor]]:
        steps: list[dict[int, Tensor]] = []

        def record(self: torch.optim.Optimizer, closure: None = None) -> None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            steps.append(
                {i: p.grad.clone() for i, p in enumerate(parameters) if p.grad is not None}
            )

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", record)
            tiny_run.fit(method, micro_batch_size=micro, max_grad_norm=0)
        return steps

    for whole, single, uneven in zip(gradients(None), gradients(1), gradients(3), strict=True):
        assert whole.keys() == single.keys() == uneven.keys()
        assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-3
        for name, gradient in whole.items():
            for cut in (single, uneven):  # three, three and two rows
                torch.testing.assert_close(cut[name], gradient, rtol=1e-3, atol=2e-6)


# --- neutral settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neutral", "simpler"),
    [
        pytest.param(
            SmallLoss(warmup_epochs=1, clean_share=1.0), CrossEntropy(), id="SmallLoss keeps all"
        ),
        pytest.param(
            TURN(probe_epochs=0, cleanse=False, probe_init="keep"),
            CrossEntropy(),
            id="TURN without probe and selection",
        ),
        pytest.param(ELR(weight=0.0), CrossEntropy(), id="ELR without weight"),
        pytest.param(LabelSmoothing(smoothing=0.0), CrossEntropy(), id="no smoothing"),
        pytest.param(
            CleaR.preset("plain", warmup_epochs=1, rank=4),
            CrossEntropy(tune="lora", rank=4),
            id="CleaR with all gates open",
        ),
        pytest.param(
            CleaR.preset("plain", warmup_epochs=1, scoring="reuse", rank=4),
            CrossEntropy(tune="lora", rank=4),
            id="CleaR that would reuse scores nobody reads",
        ),
    ],
)
def test_a_neutral_setting_is_the_simpler_method_bit_for_bit(
    neutral: Method, simpler: Method, tiny_run: Tiny, tiny_fits: FitCache
) -> None:
    """Dropout is on: a scoring pass that draws one random number, or leaves one module in the
    wrong mode, shifts every later step and shows here.
    """
    assert same_weights(tiny_fits(neutral).model, tiny_fits(simpler).model)


def loss_and_gradient(method: Method, columns: dict[str, Tensor] | None = None) -> tuple[Any, Any]:
    """Loss and gradient of a method on six rows with known logits, in its third epoch."""
    logits = 2 * torch.randn(6, 3, generator=torch.Generator().manual_seed(5))
    model, labels = Answers(logits), [0, 1, 2, 0, 1, 2]
    run = Run(
        model, torch.tensor(labels), 3, lambda before_batch=None: logits, torch.Generator(), epoch=2
    )
    run.columns = {**(columns or {}), **method.on_epoch_start(run)}
    loss = method.compute_loss(model, as_batch(labels, **run.columns), run)
    loss.backward()
    return loss.detach(), model.logits.grad


@pytest.mark.parametrize(
    ("neutral", "tolerance"),
    [
        (CrossEntropy(), 0.0),
        (LabelSmoothing(smoothing=0.0), 1e-6),
        (GCE(q=1e-6), 1e-4),
        (SCE(ce_weight=1.0, reverse_weight=0.0), 1e-6),
        (Bootstrapping(beta=1.0), 1e-6),
        (Bootstrapping(beta=1.0, hard=False), 1e-6),
        (ForwardCorrection(transition=IDENTITY), 2e-5),
        (ELR(weight=0.0), 1e-6),
        (SmallLoss(clean_share=1.0), 0.0),
    ],
    ids=repr,
)
def test_the_loss_of_a_neutral_setting_is_cross_entropy(neutral: Method, tolerance: float) -> None:
    """A factor or a sign that is wrong everywhere shows where the answer is known."""
    loss, gradient = loss_and_gradient(neutral)
    wanted, wanted_gradient = loss_and_gradient(CrossEntropy())
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "method",
    [
        LabelSmoothing(),
        GCE(),
        SCE(),
        Bootstrapping(),
        ForwardCorrection(transition=((0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8))),
        ELR(),
    ],
    ids=lambda method: method.name,
)
def test_the_loss_at_its_defaults_is_not_cross_entropy(method: Method) -> None:
    """A hook that fell back to its base class would pass every neutral test."""
    _, gradient = loss_and_gradient(method)
    _, plain = loss_and_gradient(CrossEntropy())
    assert float((gradient - plain).abs().max()) > 1e-3


def test_forward_correction_reads_the_matrix_from_true_to_given_class() -> None:
    """Transposed, a matrix of pair flips corrects in the wrong direction, and still trains."""
    matrix = ((0.7, 0.3, 0.0), (0.0, 0.6, 0.4), (0.1, 0.0, 0.9))  # row = true class
    loss, _ = loss_and_gradient(ForwardCorrection(transition=matrix))
    logits = 2 * torch.randn(6, 3, generator=torch.Generator().manual_seed(5))
    given = torch.softmax(logits, dim=1) @ torch.tensor(matrix)  # (B, C) of given labels
    wanted = -given[torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])].log().mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)


def test_forward_correction_takes_no_anchor_that_cannot_be_scored() -> None:
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [float("nan"), 0.0], [0.0, 3.0]])
    run = Run(Answers(logits), torch.tensor([0, 0, 0, 1]), 2, lambda: logits, torch.Generator())
    run.epoch = 2
    likelihood = ForwardCorrection(percentile=100).on_epoch_start(run)["likelihood"]
    torch.testing.assert_close(likelihood[0, 0], torch.softmax(logits[0], 0)[0])
    assert bool(torch.isfinite(likelihood).all())


@pytest.mark.parametrize("rows", [((0.9, 0.1), (1.0,)), ((0.9, 0.1), ("a", "b"))])
def test_rows_of_forward_correction_that_are_no_matrix_are_refused(rows: Any) -> None:
    run = Run(Answers(torch.zeros(2, 2)), torch.tensor([0, 1]), 2, None, torch.Generator())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"ForwardCorrection.transition"):
        ForwardCorrection(transition=rows).on_epoch_start(run)


def test_forward_correction_is_the_pure_function_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arithmetic that is written twice drifts apart; only one of them has hand-computed tests."""
    matrix = ((0.7, 0.2, 0.1), (0.1, 0.6, 0.3), (0.1, 0.1, 0.8))
    asked: list[Tensor] = []

    def counted(logits: Tensor, likelihood: Tensor) -> Tensor:
        asked.append(forward_correction(logits, torch.arange(6) % 3, torch.tensor(matrix)))
        return marginal_cross_entropy(logits, likelihood)

    monkeypatch.setattr(baselines, "marginal_cross_entropy", counted)
    loss, _ = loss_and_gradient(ForwardCorrection(transition=matrix))
    assert len(asked) == 1 and torch.equal(loss, asked[0].detach().mean())


class TwoAnswers(torch.nn.Module):
    """Two networks, each its own parameter of logits."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Parameter(first), torch.nn.Parameter(second)

    def forward(self, **_: Tensor) -> PairOutput:
        return PairOutput((self.first + self.second) / 2, self.first, self.second)


@pytest.mark.parametrize(("noise_rate", "rows_trained"), [(0.0, 4), (0.5, 2)])
def test_co_teaching_trains_each_network_on_the_easy_rows_of_the_other(
    noise_rate: float, rows_trained: int
) -> None:
    """Networks that filter for themselves confirm their own mistakes; without noise all rows
    train, which is cross-entropy for both.
    """
    easy_for_first = torch.tensor([[4.0, 0.0], [4.0, 0.0], [-4.0, 0.0], [-4.0, 0.0]])
    model = TwoAnswers(easy_for_first, easy_for_first.flip(0).clone())
    method = CoTeaching(noise_rate=noise_rate, warmup_epochs=1, ramp_epochs=1)
    labels = [0, 0, 0, 0]
    run = Run(
        model,
        torch.tensor(labels),
        2,
        lambda before_batch=None: torch.zeros(4, 2),
        torch.Generator(),
        epoch=1,
    )
    loss = method.compute_loss(model, as_batch(labels), run)
    loss.backward()
    assert model.first.grad is not None and model.second.grad is not None
    first_rows = model.first.grad.abs().sum(1).nonzero().flatten().tolist()
    second_rows = model.second.grad.abs().sum(1).nonzero().flatten().tolist()
    assert len(first_rows) == len(second_rows) == rows_trained
    if noise_rate:
        assert first_rows == [2, 3] and second_rows == [0, 1]  # what the other finds easy
    else:
        mean = (cross_entropy(model.first, torch.tensor(labels)).mean()) / 2
        mean += cross_entropy(model.second, torch.tensor(labels)).mean() / 2
        torch.testing.assert_close(loss, mean)
