"""Gradients of wrong and right rows: by hand, and that measuring them disturbs nothing."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.finetune import fit
from noiseproof.gradients import (
    GradientSample,
    draw_sample,
    measure_gates,
    measure_gradients,
    share,
)
from noiseproof.job import Job
from noiseproof.method import Method, Run
from noiseproof.methods import GCE, METHODS, CleaR, CrossEntropy
from noiseproof.mixture import LossMixture
from tiny import Tiny, same_weights, table, train_settings

CLEAR = CleaR(
    warmup_epochs=1,
    gamma=0.8,
    max_clean_loss=None,
    mixture=LossMixture(min_samples=4),
    learning_rate=5e-3,
)


class Bias(nn.Module):
    """Adds a number."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


class Slope(nn.Module):
    """logit of class 1 = encoder * x + head; class 0 has logit 0."""

    base_model_prefix = "encoder"

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, 1, bias=False)
        self.head = Bias()
        nn.init.zeros_(self.encoder.weight)

    def forward(self, x: Tensor) -> SimpleNamespace:
        one = self.head(self.encoder(x))  # (B, 1)
        return SimpleNamespace(logits=torch.cat([torch.zeros_like(one), one], dim=1))


X = torch.tensor([[1.0], [3.0], [2.0], [4.0]])
LABELS = torch.tensor([1, 0, 1, 1])


def slope_run(**columns: Tensor) -> Run:
    return Run(Slope(), LABELS, 2, lambda before_batch=None: torch.zeros(4, 2),
               torch.Generator(), columns=columns)  # fmt: skip


def inputs(rows: np.ndarray) -> dict[str, Tensor]:
    return {"x": X[torch.from_numpy(rows)]}


SAMPLE = GradientSample(wrong=np.array([1]), right=np.array([0, 2, 3]), rate=0.25)


def test_norms_shares_and_angles_of_a_logistic_model_by_hand() -> None:
    """At weight 0 the gradient of a row is (0.5 - label) * x on the encoder, and without x on the
    head: wrong row +1.5 and +0.5; right rows -0.5, -1, -2 and -0.5 each."""
    found = measure_gradients(Method(), slope_run(), inputs, SAMPLE)
    right = (0.5 + 1 + 2) / 3
    assert found == pytest.approx(
        {
            "gradient_encoder_wrong": 1.5,
            "gradient_encoder_right": right,
            "gradient_encoder_share": 0.25 * 1.5 / (0.25 * 1.5 + 0.75 * right),
            "gradient_encoder_mean_share": 0.25 * 1.5 / (0.25 * 1.5 + 0.75 * right),
            "gradient_encoder_cosine": -1.0,
            "gradient_head_wrong": 0.5,
            "gradient_head_right": 0.5,
            "gradient_head_share": 0.25,
            "gradient_head_mean_share": 0.25,
            "gradient_head_cosine": -1.0,
        }
    )


def test_gradients_that_cancel_count_by_row_and_not_in_the_mean() -> None:
    """Symmetric noise pulls in all directions: its mean gradient is small, its rows are not."""
    sample = GradientSample(wrong=np.array([0, 1]), right=np.array([2, 3]), rate=0.5)
    found = measure_gradients(Method(), slope_run(), inputs, sample)
    assert found["gradient_head_share"] == pytest.approx(0.5)
    assert found["gradient_head_mean_share"] == 0.0 and found["gradient_head_cosine"] is None


def test_gates_are_counted_for_right_and_for_wrong_rows_by_layer() -> None:
    """The truth stays with the measure: the method tells the gates of all rows and no more."""

    class Gated(Method):
        def row_gates(self, run: Run) -> Tensor | None:
            return torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])

    run, wrong = slope_run(), np.array([False, True, True, False])
    found = measure_gates(Gated(), run, wrong)
    assert found == {"gates_open_wrong": 0.5, "gates_open_right": 0.5}
    assert run.findings["gates"] == {"wrong": [0.5, 0.5], "right": [1.0, 0.0]}
    assert measure_gates(Method(), slope_run(), wrong) == {}
    assert measure_gates(Gated(), slope_run(), np.zeros(4, dtype=bool)) == {}


def test_the_gates_that_are_counted_are_those_that_trained(tiny_run: Tiny) -> None:
    """Drawn anew they would be others, and their rate that of no step."""
    drawn = torch.full((25, 2), -1.0)
    told: list[Tensor] = []

    @dataclasses.dataclass(frozen=True)
    class Watched(CleaR):
        def _train_gates(self, batch: Any, run: Run, routed: bool) -> Tensor | None:
            gates = super()._train_gates(batch, run, routed)
            if len(batch.rows) < 25 and gates is not None:
                drawn[batch.rows] = gates
            return gates

    def measure(predict_on: Any, run: Run) -> dict[str, Any]:
        gates = method.row_gates(run)
        assert gates is not None
        told.append(gates)
        assert torch.equal(gates, drawn)
        return {}

    method = Watched(**{**vars(CLEAR), "gamma": 0.5})
    tiny_run.fit(method, epochs=3, extra={"measure": measure})
    assert len(told) == 3 and 0 < float(told[-1].mean()) < 1


def test_a_row_that_the_method_leaves_out_has_no_gradient() -> None:
    keep = torch.tensor([True, False, True, False])
    found = measure_gradients(Method(), slope_run(keep=keep), inputs, SAMPLE)
    assert found["gradient_head_share"] == 0.0
    assert found["gradient_head_right"] == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_the_share_weighs_by_the_share_of_wrong_rows() -> None:
    assert share(1.0, 1.0, rate=0.4) == pytest.approx(0.4)
    assert share(0.0, 2.0, rate=0.4) == 0.0 and share(0.0, 0.0, rate=0.4) is None


def test_the_sample_is_fixed_and_half_of_each() -> None:
    wrong = np.arange(40) < 10
    one, two = draw_sample(wrong, 12, seed=3), draw_sample(wrong, 12, seed=3)
    assert one is not None and two is not None
    assert np.array_equal(one.wrong, two.wrong) and np.array_equal(one.right, two.right)
    assert len(one.wrong) == len(one.right) == 6 and one.rate == 0.25
    assert wrong[one.wrong].all() and not wrong[one.right].any()
    few = draw_sample(wrong, 60, seed=3)
    assert few is not None and len(few.wrong) == 10 and len(few.right) == 30
    assert draw_sample(np.zeros(5, dtype=bool), 4, seed=0) is None


# --- in a run ------------------------------------------------------------------------------------


def fitted(tiny_model: Path, method: Method, **changes: Any) -> Any:
    frame = table(24, wrong=0.25)
    settings = train_settings(epochs=changes.pop("epochs", 2))
    return fit(frame, model=str(tiny_model), method=method, clean_label="clean_label",
               train=settings, **changes)  # fmt: skip


@pytest.mark.filterwarnings("ignore:TURN selects on a weak basis")
@pytest.mark.parametrize(
    "method",
    [
        CrossEntropy(),
        CrossEntropy(tune="lora", learning_rate=5e-3),
        CrossEntropy(tune="head"),
        CLEAR,
        CleaR.preset("fast", warmup_epochs=1, mixture=LossMixture(min_samples=4)),
        METHODS["ELR"](),
        METHODS["CoTeaching"](),
        METHODS["TURN"](),
        METHODS["NMTune"](),
    ],
    ids=lambda method: f"{method.name}-{getattr(method, 'tune', getattr(method, 'scoring', ''))}",
)
def test_measuring_changes_no_weight_no_column_and_no_number(
    tiny_model: Path, method: Method
) -> None:
    """Dropout, gates and columns that are written in steps would all show a careless measure."""
    plain, probed = (fitted(tiny_model, method, probe_gradients=count) for count in (0, 8))
    assert same_weights(plain.predictor.model, probed.predictor.model)
    for row, with_more in zip(plain.history, probed.history, strict=True):
        more = set(with_more) - set(row)
        assert more and all(name.startswith(("gradient_", "gates_open_")) for name in more)
        assert {name: with_more[name] for name in row} == row
    assert plain.samples.equals(probed.samples)
    if isinstance(method, CleaR):
        gates = probed.record.findings["gates"]
        assert [len(gates[name]) for name in ("right", "wrong")] == [2, 2]  # layers
        assert "gates" not in plain.record.findings


def test_a_probe_has_gradients_on_its_head_alone(tiny_model: Path) -> None:
    history = fitted(tiny_model, CrossEntropy(tune="head"), probe_gradients=8).history
    assert "gradient_head_share" in history[0] and "gradient_encoder_share" not in history[0]


def test_closed_gates_keep_wrong_rows_out_of_the_adapter_but_not_out_of_the_head(
    tiny_run: Tiny,
) -> None:
    """This is what routing is for, and what it does not do."""
    hard = dataclasses.replace(CLEAR, routing="hard", lambda_consistency=0.0)
    model = hard.prepare_model(copy.deepcopy(tiny_run.model))
    wrong = (tiny_run.labels != tiny_run.clean_labels).numpy()
    columns = {"gate_prob": torch.from_numpy(~wrong).float()}
    run = Run(model, tiny_run.labels, 3, lambda before_batch=None: torch.zeros(25, 3),
              torch.Generator(), epoch=1, columns=columns)  # fmt: skip
    sample = draw_sample(wrong, 8, seed=0)
    assert sample is not None
    found = measure_gradients(hard, run, tiny_run.encoded.inputs, sample)
    assert found["gradient_encoder_wrong"] == 0.0 and found["gradient_encoder_share"] == 0.0
    assert found["gradient_encoder_right"] > 0 and found["gradient_head_wrong"] > 0


def test_the_record_has_the_shares_of_the_last_epoch(tiny_model: Path) -> None:
    result = fitted(tiny_model, GCE(tune="lora"), probe_gradients=8)
    name = "gradient_encoder_share"
    assert result.record.metrics[name] == result.history[-1][name]
    assert result.record.spec["probe_gradients"] == 8


def test_the_truth_must_be_known() -> None:
    for name, value in (("probe_gradients", 4), ("only_clean_rows", True)):
        with pytest.raises(InputError, match=f"{name} needs to know which labels are wrong"):
            Job("train.csv", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 2 rows"):
        Job("train.csv", noise="symmetric:0.2", probe_gradients=1)
