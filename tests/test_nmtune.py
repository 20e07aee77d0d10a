"""NMTune: a head that reshapes frozen features, its controls, and what is saved of it."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import noiseproof
from families import CLASSES, DECODERS, classifier, text_inputs
from noiseproof.checkpoint import Interrupted
from noiseproof.engine import Engine
from noiseproof.errors import InputError
from noiseproof.frozen import mean_pooled
from noiseproof.loop import Progress
from noiseproof.losses import cross_entropy
from noiseproof.method import Batch, Method, Run
from noiseproof.methods import CrossEntropy, NMTune
from noiseproof.methods.nmtune import (
    Reshaped,
    ReshapedClassifier,
    Reshaping,
    RunningBatchNorm,
    feed_forward_modules,
    head_inputs,
    last_linear,
    one_per_row,
    reading,
    root_mean_square,
)
from noiseproof.models import encoder_of
from noiseproof.regularizers import (
    covariance_penalty,
    feature_consistency,
    singular_value_penalty,
)
from noiseproof.saving import HEAD_FILE
from tiny import Tiny, as_batch, same_weights, train_settings, weights

NONE: dict[str, Any] = {"lambda_mse": 0.0, "lambda_cov": 0.0, "lambda_svd": 0.0}
LINEAR: dict[str, Any] = {**NONE, "use_mlp": False}


@dataclass(frozen=True)
class Plain(NMTune):
    """The same model with cross-entropy alone, by the base class of all methods."""

    def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        return Method.compute_loss(self, model, batch, run)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(width: int = 6, **settings: Any) -> Reshaping:
    return NMTune(**({"head_init": "kaiming"} | settings)).head(width, 3)


# --- controls ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [NONE, LINEAR], ids=["mlp", "lp"])
def test_without_weights_it_is_the_control_bit_for_bit(
    settings: dict[str, Any], tiny_run: Tiny
) -> None:
    """Else the difference between a method and its control is not the terms alone."""
    control = tiny_run.fit(Plain(**settings))
    assert same_weights(tiny_run.fit(NMTune(**settings)).model, control.model)
    assert [row["loss"] for row in control.history] == sorted(
        (row["loss"] for row in control.history), reverse=True
    )


def test_the_controls_are_presets() -> None:
    assert NMTune.preset("mlp") == NMTune(**NONE)
    assert NMTune.preset("lp", learning_rate=None) == NMTune(**LINEAR)
    assert NMTune.preset("code") == NMTune()
    paper = NMTune.preset("paper")
    assert paper.weights == {"mse": 0.01, "cov": 0.01, "svd": 0.01}
    assert (paper.svd_k, paper.mse_reduction) == (1, "row_sum")
    assert NMTune().weights == {"mse": 1.0, "cov": 0.04, "svd": 0.001}
    for tune in ("lora", "full"):
        assert NMTune.preset(tune).weights == {"mse": 0.0, "cov": 0.04, "svd": 0.001}


def test_full_fine_tuning_without_weights_is_cross_entropy(tiny_run: Tiny) -> None:
    plain = tiny_run.fit(CrossEntropy(), epochs=2)
    assert same_weights(tiny_run.fit(NMTune(tune="full", **NONE), epochs=2).model, plain.model)
    terms = tiny_run.fit(NMTune(tune="full"), epochs=2)
    assert not same_weights(terms.model, plain.model)


@pytest.mark.parametrize("name", ["lambda_mse", "lambda_cov", "lambda_svd"])
def test_each_term_changes_what_is_learned(name: str, tiny_run: Tiny) -> None:
    control = tiny_run.fit(NMTune(**NONE), epochs=2)
    one = tiny_run.fit(NMTune(**(NONE | {name: 1.0})), epochs=2)
    assert not same_weights(one.model, control.model)
    logged = {key for key in one.history[0] if key.startswith("loss_")}
    assert logged == {"loss_ce", name.replace("lambda", "loss")}


# --- the network ---------------------------------------------------------------------------------


def test_the_reshaped_features_are_the_residual_form() -> None:
    module, features = head(), draw(5, 6)
    assert module.mlp is not None and module.residual_scale is not None
    assert [type(layer) for layer in module.mlp] == [
        nn.Linear,
        RunningBatchNorm,
        nn.ReLU,
        nn.Linear,
    ]
    assert [tuple(p.shape) for p in (module.mlp[0].weight, module.mlp[3].weight)] == [
        (24, 6),
        (6, 24),
    ]
    assert bool((module.residual_scale == 1).all()) and bool((module.linear.bias == 0).all())
    assert bool((NMTune().head(6, 3).linear.weight == 0).all())
    assert 0.1 < float(module.linear.weight.detach().std()) < 1
    with torch.no_grad():
        module.residual_scale.fill_(0.5)
        module.eval()
        answer = module(features)
        torch.testing.assert_close(answer.transformed, 0.5 * module.mlp(features) + features)
        torch.testing.assert_close(answer.logits, module.linear(answer.transformed))
    assert torch.equal(answer.features, features)


def test_without_a_residual_scale_the_features_start_as_they_are() -> None:
    features = draw(5, 6)
    assert torch.equal(head(residual_init=0.0)(features).transformed, features)
    assert torch.equal(head(**LINEAR)(features).transformed, features)
    assert not torch.equal(head(mlp_residual=False)(features).transformed, features)


@pytest.mark.parametrize("norm", ["batchnorm", "layernorm", "none"])
def test_depth_and_norm_of_the_network_are_settings(norm: str) -> None:
    module = head(mlp_norm=norm, mlp_hidden_layers=2, mlp_ratio=2.0)
    assert module.mlp is not None
    found = [type(layer).__name__ for layer in module.mlp]
    middle = {"batchnorm": ["RunningBatchNorm"], "layernorm": ["LayerNorm"], "none": []}[norm]
    assert found == [*["Linear", *middle, "ReLU"] * 2, "Linear"]
    assert module(draw(5, 6)).transformed.shape == (5, 6)


def test_a_single_row_is_normalised_by_the_running_statistics() -> None:
    """BatchNorm raises for one row, once in an epoch for one number of rows in a hundred."""
    norm, plain = RunningBatchNorm(4), nn.BatchNorm1d(4)
    rows = draw(6, 4)
    assert torch.equal(norm(rows), plain(rows))
    before = weights(norm)
    plain.eval()
    assert torch.equal(norm(rows[:1]), plain(rows[:1]))
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_the_encoder_is_as_it_was_and_its_output_is_computed_once(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, cached, calls = [], [], []
    original = NMTune.compute_loss

    def spy(self: NMTune, model: nn.Module, batch: Batch, run: Run) -> Tensor:
        modes.append((run.model.training, encoder_of(run.model)[1].training))
        cached.append(list(batch.inputs))
        return original(self, model, batch, run)

    encode = Engine.encode

    def counted(self: Engine, *arguments: Any) -> Tensor:
        calls.append(arguments[2])
        return encode(self, *arguments)

    monkeypatch.setattr(NMTune, "compute_loss", spy)
    monkeypatch.setattr(Engine, "encode", counted)
    outcome = tiny_run.fit(NMTune())
    assert set(modes) == {(True, False)}
    assert cached[0] == ["features"] and all(names == ["features"] for names in cached)
    assert calls in ([], ["mean"])  # none when an earlier run left them
    assert same_weights(encoder_of(outcome.model)[1], encoder_of(tiny_run.model)[1])
    assert outcome.trainable == sum(p.numel() for p in outcome.model.classifier.parameters())
    assert outcome.history[-1]["loss_ce"] < outcome.history[0]["loss_ce"]


def test_features_from_the_cache_are_those_of_the_encoder(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row, and they are the head's input."""
    found: list[Tensor] = []
    original = NMTune.on_epoch_start

    def spy(self: NMTune, run: Run) -> dict[str, Tensor]:
        features = run.features()
        assert features is not None
        found.append(features[..., 0].clone())
        return original(self, run)

    monkeypatch.setattr(NMTune, "on_epoch_start", spy)
    model = tiny_run.fit(NMTune(), epochs=1).model.eval()
    rows = torch.arange(len(tiny_run.labels)).numpy()
    with torch.no_grad():
        answer = model(**tiny_run.encoded.inputs(rows))
    torch.testing.assert_close(found[0], answer.features, rtol=1e-4, atol=1e-5)


# --- the loss ------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_its_parts() -> None:
    method = NMTune(lambda_mse=2.0, lambda_cov=3.0, lambda_svd=5.0, svd_k=2)
    logits, new, old = draw(7, 3), draw(7, 6, seed=1), draw(7, 6, seed=2)
    labels = torch.arange(7) % 3
    loss, parts = method.objective(logits, new, old, labels)
    ce, mse = cross_entropy(logits, labels).mean(), feature_consistency(new, old)
    cov, svd = covariance_penalty(new), singular_value_penalty(new, 2)
    torch.testing.assert_close(loss, ce + 2 * mse + 3 * cov + 5 * svd)
    wanted = {"ce": ce, "mse": mse, "cov": cov, "svd": svd}
    assert parts == {name: pytest.approx(value.item()) for name, value in wanted.items()}


def test_two_views_are_compared_across_and_counted_together() -> None:
    method = NMTune(svd_k=1)
    logits, new, old = draw(8, 3), draw(8, 6, seed=1), draw(8, 6, seed=2)
    labels = torch.tensor([0, 1, 2, 0])
    _, parts = method.objective(logits, new, old, labels, views=2)
    assert parts["mse"] == pytest.approx(feature_consistency(new[4:], old[:4]).item())
    assert parts["cov"] == pytest.approx(covariance_penalty(new).item())
    assert parts["ce"] == pytest.approx(cross_entropy(logits, labels.repeat(2)).mean().item())


def test_two_equal_views_are_one_view_for_what_is_a_mean_over_rows() -> None:
    method, module, features = NMTune(), head(mlp_norm="none"), draw(8, 6)
    labels = torch.arange(8) % 3
    one, two = module(features), module(features.repeat(2, 1))
    _, single = method.objective(one.logits, one.transformed, one.features, labels)
    _, double = method.objective(two.logits, two.transformed, two.features, labels, views=2)
    for name in ("ce", "mse"):
        assert double[name] == pytest.approx(single[name], rel=1e-5)


def test_row_weights_multiply_cross_entropy_alone() -> None:
    logits, rows = draw(8, 3), draw(8, 6)
    labels, factor = torch.arange(8) % 3, torch.arange(8.0)
    _, plain = NMTune().objective(logits, rows, rows + 1, labels)
    _, weighed = NMTune().objective(logits, rows, rows + 1, labels, row_weight=factor)
    wanted = (cross_entropy(logits, labels) * factor).mean().item()
    assert weighed.pop("ce") == pytest.approx(wanted) != plain.pop("ce")
    assert weighed == plain


@pytest.mark.parametrize(("small_batch", "factor"), [("skip", 1.0), ("drop", 0.0)])
def test_a_step_with_too_few_rows_skips_the_terms(small_batch: str, factor: float) -> None:
    """With no more rows than svd_k the share is constant, and two terms would be noise."""
    logits, rows, labels = draw(5, 3), draw(5, 6), torch.arange(5) % 3
    method = NMTune(lambda_mse=0.0, small_batch=small_batch)
    loss, parts = method.objective(logits, rows, rows, labels)
    assert parts.pop("short") == 1 and set(parts) == {"ce"}
    torch.testing.assert_close(loss, factor * cross_entropy(logits, labels).mean())
    with pytest.raises(InputError, match="5 rows is too small for svd_k=5"):
        dataclasses.replace(method, small_batch="error").objective(logits, rows, rows, labels)
    _, parts = NMTune(**NONE, small_batch="error").objective(logits, rows, rows, labels)
    assert set(parts) == {"ce"}  # nothing is asked of the rows


def test_short_steps_are_counted(tiny_run: Tiny) -> None:
    """25 rows in steps of 8 leave one over."""
    history = tiny_run.fit(NMTune(), epochs=2).history
    assert [row["short_batches"] for row in history] == [1, 1]
    assert all(math.isfinite(row[f"loss_{name}"]) for row in history for name in ("cov", "svd"))


def test_short_steps_of_all_processes_count(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of one process alone would be half of it, or none."""

    def merged(self: Engine, sums: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
        return {name: (2 * total, 2 * rows) for name, (total, rows) in sums.items()}

    alone = tiny_run.fit(NMTune(), epochs=1).history[0]
    monkeypatch.setattr(Engine, "merge_sums", merged)  # another process with the same rows
    both = tiny_run.fit(NMTune(), epochs=1).history[0]
    assert (alone["short_batches"], both["short_batches"]) == (1, 2)
    assert both["loss_ce"] == alone["loss_ce"]


@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("seed", [2, 4])  # the short step comes late, and first
def test_the_parts_in_the_history_are_means_over_rows(
    micro: int | None, seed: int, tiny_run: Tiny
) -> None:
    """However the rows are cut, and although the last one alone has no covariances."""
    method = NMTune(svd_k=2)
    seen: list[tuple[int, dict[str, float]]] = []
    original = NMTune.objective

    def spy(self: NMTune, logits: Tensor, *given: Any, **named: Any) -> Any:
        found = original(self, logits, *given, **named)
        seen.append((len(logits), dict(found[1])))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NMTune, "objective", spy)
        fitted = tiny_run.fit(method, epochs=1, micro_batch_size=micro, seed=seed)
    row = fitted.history[0]
    assert row["short_batches"] == 1
    for name in ("ce", "mse", "cov", "svd"):
        parts = [(rows, found[name]) for rows, found in seen if name in found]
        wanted = sum(rows * part for rows, part in parts) / sum(rows for rows, _ in parts)
        assert row[f"loss_{name}"] == pytest.approx(wanted), name


@pytest.mark.parametrize(
    ("settings", "rows"),
    [({"batch_size": 4}, 4), ({"batch_size": 16, "micro_batch_size": 5}, 5)],
)
def test_passes_that_are_always_too_small_for_the_terms_are_refused(
    settings: dict[str, int], rows: int, tiny_run: Tiny
) -> None:
    """Else the terms would be skipped in every step, and nothing but a counter would say so."""
    with pytest.raises(InputError, match=f"svd_k=5 .* more than 5 rows .* at most {rows}"):
        tiny_run.fit(NMTune(), **settings)
    assert tiny_run.fit(NMTune(svd_k=2), epochs=1, **settings).history
    assert tiny_run.fit(NMTune(lambda_cov=0.0, lambda_svd=0.0), epochs=1, **settings).history


@pytest.mark.parametrize("micro", [None, 4])
def test_a_step_that_is_dropped_moves_nothing(micro: int | None, tiny_run: Tiny) -> None:
    """Adam has moments and would go on without a gradient."""
    seen: list[tuple[int, Tensor]] = []

    @dataclass(frozen=True)
    class Watched(NMTune):
        def compute_loss(self, model: nn.Module, batch: Batch, run: Run) -> Tensor:
            weight = run.model.get_submodule("classifier").linear.weight  # type: ignore[union-attr]
            seen.append((len(batch.rows), weight.detach().clone()))  # type: ignore[operator]
            return super().compute_loss(model, batch, run)

    method = Watched(small_batch="drop", svd_k=2)
    fitted = tiny_run.fit(method, epochs=2, seed=2, micro_batch_size=micro)
    last = fitted.model.get_submodule("classifier").linear.weight.detach()  # type: ignore[union-attr]
    after = [*(weight for _, weight in seen[1:]), last]
    moved = [(rows, not torch.equal(*pair)) for (rows, _), *pair in _steps(seen, after)]
    assert (1, False) in moved and (1, True) not in moved
    assert sum(change for _, change in moved) == 6  # of the steps with 8 rows


def _steps(
    seen: list[tuple[int, Tensor]], after: list[Tensor]
) -> list[tuple[tuple[int, Tensor], Tensor, Tensor]]:
    return [(one, one[1], then) for one, then in zip(seen, after, strict=True)]


def test_a_part_that_is_not_finite_is_named() -> None:
    rows = draw(8, 6)
    labels = torch.arange(8) % 3
    large = 1e12 * rows
    with pytest.raises(FloatingPointError, match="the cov part of the loss is inf; root"):
        NMTune().objective(draw(8, 3), large, rows, labels)
    numbers = torch.arange(20, 28)
    with pytest.raises(FloatingPointError, match="is inf in a step of 8 rows between 20 and 27; r"):
        NMTune().objective(draw(8, 3), large, rows, labels, rows=numbers)
    broken = rows.clone()
    broken[5, 1] = math.nan
    with pytest.raises(FloatingPointError, match="20 and 27, of which row 25 has features that"):
        NMTune().objective(draw(8, 3), broken, rows, labels, rows=numbers)


def test_a_step_of_the_method_that_is_not_finite_names_its_rows(
    tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the rows nobody finds the text whose features overflow."""
    monkeypatch.setattr("noiseproof.methods.nmtune.covariance_penalty",
                        lambda features, route: features.sum() * math.inf)  # fmt: skip
    for tune in ("head", "full"):
        with pytest.raises(FloatingPointError, match=r"the cov part .* in a step of 8 rows betw"):
            tiny_run.fit(NMTune(tune=tune), epochs=1)


# --- the scale of features -----------------------------------------------------------------------


def test_features_are_divided_by_their_root_mean_square(tiny_run: Tiny, tmp_path: Path) -> None:
    outcome = tiny_run.fit(NMTune(feature_scale="rms"), epochs=1)
    table = outcome.run.features()
    assert table is None  # the stage is over
    rows = torch.arange(len(tiny_run.labels)).numpy()
    with torch.no_grad():
        features = mean_pooled(tiny_run.model.eval(), tiny_run.encoded.inputs(rows))
    rms = root_mean_square(features)
    assert outcome.model.classifier.feature_scale.item() == pytest.approx(rms, rel=1e-4)
    assert outcome.history[0]["feature_rms"] == pytest.approx(rms, rel=1e-4)
    outcome.model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        answer = outcome.model.eval()(**tiny_run.encoded.inputs(rows))
    assert root_mean_square(answer.features) == pytest.approx(1, rel=1e-4)


def test_small_features_are_warned_of() -> None:
    run = Run(nn.Identity(), torch.zeros(4), 2, lambda _=None: draw(4, 2), torch.Generator())
    run.features = lambda: 0.02 * torch.ones(4, 6, 2)
    NMTune().on_epoch_start(run)
    assert "root mean square 0.02" in run.warned[0] and run.logged["feature_rms"] < 0.1
    run.warned = []
    NMTune(lambda_cov=0.0).on_epoch_start(run)
    assert not run.warned


@pytest.mark.parametrize("tune", ["head", "lora"])
def test_rows_of_zeros_are_warned_of_once(tune: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left out of the distance, and were perhaps never computed."""
    features = draw(4, 6)
    features[1] = 0.0
    run = Run(nn.Identity(), torch.zeros(4), 2, lambda _=None: draw(4, 2), torch.Generator())
    run.features = lambda: features[..., None].expand(4, 6, 2)
    monkeypatch.setattr("noiseproof.methods.nmtune.head_inputs", lambda run: features)
    NMTune(tune=tune, lambda_mse=1.0).on_epoch_start(run)
    run.epoch = 1
    NMTune(tune=tune, lambda_mse=1.0).on_epoch_start(run)
    assert [line[:41] for line in run.warned] == ["1 of 4 rows have features that are zero t"]
    run.epoch, run.warned = 0, []
    NMTune(tune=tune, lambda_mse=0.0).on_epoch_start(run)
    assert not run.warned


# --- adapters and full fine-tuning ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("bert", ["intermediate.dense", "output.dense"]),
        ("roberta", ["intermediate.dense", "output.dense"]),
        ("distilbert", ["ffn.lin1", "ffn.lin2"]),
        ("deberta", ["intermediate.dense", "output.dense"]),
        ("modernbert", ["mlp.Wi", "mlp.Wo"]),
        ("gpt2", ["mlp.c_fc", "mlp.c_proj"]),
        ("llama", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("vit", ["mlp.fc1", "mlp.fc2"]),
    ],
)
def test_adapters_sit_on_feed_forward_layers_alone(name: str, wanted: list[str]) -> None:
    """`output.dense` by its ending would take the output of attention as well."""
    model, _ = classifier(name)
    found = feed_forward_modules(model)
    layers = {path.removesuffix(f".{end}") for path in found for end in wanted}
    layers = {path for path in layers if path not in found}
    assert len(found) == 2 * len(wanted) and len(layers) == 2
    assert all(not any(part in path for part in ("attention", "attn")) for path in found)
    adapted = NMTune(tune="lora").prepare_model(model)
    carriers = {n.partition(".lora_A")[0] for n, _ in adapted.named_parameters() if "lora_A" in n}
    assert carriers == {f"base_model.model.{path}" for path in found}


def test_a_network_without_feed_forward_layers_is_refused() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(4, 4)

    model = BertForSequenceClassification(BertConfig(hidden_size=8, num_attention_heads=2))
    model.bert.encoder.layer = nn.ModuleList([Bare(), Bare()])
    with pytest.raises(InputError, match="found none beside"):
        feed_forward_modules(model)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_the_features_are_what_the_last_layer_reads(name: str) -> None:
    """The token that a decoder answers from is its last real one."""
    for left in (False, True):
        model, _ = classifier(name)
        inputs = text_inputs(left=left)
        layer = last_linear(model)
        with torch.no_grad(), reading(layer) as read:
            logits = model(**inputs).logits
            features = one_per_row(read[-1], inputs)
            torch.testing.assert_close(layer(features), logits, rtol=1e-4, atol=1e-5)

            def predict(before_batch: Any = None, m: Any = model, i: Any = inputs) -> Tensor:
                return m(**i).logits

            run = Run(model, torch.zeros(4), CLASSES, predict, torch.Generator())
            torch.testing.assert_close(head_inputs(run), features)
        assert not layer._forward_hooks and not layer._forward_pre_hooks
        assert name in DECODERS or features.shape == (4, 16)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_distance_to_the_first_features_is_there_when_asked_for(
    tune: str, tiny_run: Tiny
) -> None:
    plain = tiny_run.fit(NMTune(tune=tune), epochs=1)
    assert "initial_features" not in plain.run.columns and "loss_mse" not in plain.history[0]
    asked = tiny_run.fit(NMTune(tune=tune, lambda_mse=1.0), epochs=2)
    found = asked.run.columns["initial_features"]
    rows = torch.arange(len(tiny_run.labels)).numpy()
    with torch.no_grad():
        model = copy.deepcopy(tiny_run.model).eval()
        wanted = model.bert(**tiny_run.encoded.inputs(rows)).pooler_output
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert 0 < asked.history[0]["loss_mse"] < 0.1
    assert {"loss_cov", "loss_svd"} <= set(asked.history[0])


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"svd_k": 0}, r"NMTune\.svd_k must be at least 1"),
        ({"lambda_cov": -1.0}, r"NMTune\.lambda_cov must lie in"),
        ({"mse_reduction": "sum"}, r"NMTune\.mse_reduction must be one of element_mean, row_sum"),
        ({"use_mlp": False}, "nothing that its terms could train"),
        (
            {"tune": "lora", "feature_scale": "rms"},
            "feature_scale: only for tune=head",
        ),
        (
            {"tune": "full", "use_mlp": False, "mlp_ratio": 2.0},
            "use_mlp, mlp_ratio: only for",
        ),
        ({"mlp_ratio": 0.0}, r"NMTune\.mlp_ratio must lie in"),
        ({"tune": "head", "rank": 0}, r"NMTune\.rank"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NMTune(**settings)


def test_more_leading_values_than_features_are_refused_and_as_many_are_warned_of() -> None:
    with pytest.raises(InputError, match="at most the number of features, 4; got 5"):
        head(4)
    with pytest.warns(UserWarning, match="does nothing"):
        head(5)
    head(4, lambda_svd=0.0)


@pytest.mark.parametrize(("tune", "rate"), [("head", 1e-3), ("full", 2e-5), ("ia3", 2e-4)])
def test_each_part_has_its_own_rate(tune: str, rate: float) -> None:
    (stage,) = NMTune(tune=tune).stages(3)
    assert (stage.name, stage.epochs, stage.learning_rate) == ("tune", 3, rate)
    assert NMTune(tune=tune, learning_rate=0.5).stages(3)[0].learning_rate == 0.5


# --- saving and resuming -------------------------------------------------------------------------


def test_a_resumed_run_has_the_same_statistics(tiny_run: Tiny, tmp_path: Path) -> None:
    """BatchNorm's running statistics are no parameters; lost, the model would answer nonsense."""
    method = NMTune(feature_scale="rms")

    def report(progress: Progress) -> None:
        if (progress.epoch, progress.step, progress.history) == (1, 2, None):
            os.kill(os.getpid(), signal.SIGTERM)

    whole = tiny_run.fit(method, epochs=2)
    extra: dict[str, Any] = {"checkpoints": tmp_path}
    with pytest.raises(Interrupted):
        tiny_run.fit(method, epochs=2, extra=extra | {"report": report})
    again = tiny_run.fit(method, epochs=2, extra=extra | {"resume": True})
    assert same_weights(again.model, whole.model)
    assert again.history == whole.history


@pytest.fixture(scope="module")
def saved(
    tiny_model: Path, tiny_table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("nmtune") / "run"
    method = NMTune(feature_scale="rms", mlp_hidden_layers=2)
    settings = train_settings(epochs=2)
    return folder, noiseproof.fit(
        tiny_table, method=method, model=str(tiny_model), train=settings, out=folder
    )


def test_a_saved_head_comes_back_whole(saved: tuple[Path, Any], tiny_table: pd.DataFrame) -> None:
    folder, result = saved
    loaded = noiseproof.load(folder)
    assert isinstance(loaded.model, ReshapedClassifier)
    assert same_weights(loaded.model, result.predictor.model)
    texts = tiny_table["text"].tolist()
    kept = result.predictor.predict_proba(texts, settings=train_settings())
    assert (kept == loaded.predict_proba(texts, settings=train_settings())).all()


@pytest.mark.parametrize("preset", ["lora", "full"])
def test_a_model_without_reshaping_is_saved_as_usual(
    preset: str, tiny_model: Path, tiny_table: pd.DataFrame, tmp_path: Path
) -> None:
    """The terms act in training alone: what is left is a classifier like any other."""
    result = noiseproof.fit(
        tiny_table, method=NMTune.preset(preset), model=str(tiny_model),
        train=train_settings(epochs=1), out=tmp_path / "run",
    )  # fmt: skip
    loaded = noiseproof.load(tmp_path / "run")
    assert not isinstance(loaded.model, ReshapedClassifier)
    texts = tiny_table["text"].tolist()
    kept = result.predictor.predict_proba(texts, settings=train_settings())
    again = loaded.predict_proba(texts, settings=train_settings())
    np.testing.assert_allclose(again, kept, rtol=1e-6, atol=1e-7)


def test_transformers_loads_the_encoder_and_the_rest_is_a_few_lines(
    saved: tuple[Path, Any], tiny_table: pd.DataFrame
) -> None:
    """What a user without this package has to do."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder, result = saved
    place = str(folder / "model")
    encoder, tokenizer = AutoModel.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    texts = tiny_table["text"].tolist()
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    head = Reshaping(32, 3, hidden_layers=2).eval()
    head.load_state_dict(load_file(f"{place}/{HEAD_FILE}"))
    with torch.no_grad():
        hidden, mask = encoder(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        answer: Reshaped = head((hidden * mask).sum(1) / mask.sum(1))
    wanted = torch.from_numpy(result.predictor.predict_proba(texts, settings=train_settings()))
    torch.testing.assert_close(answer.logits.softmax(1), wanted, rtol=1e-3, atol=1e-5)
    assert AutoConfig.from_pretrained(place).id2label == dict(
        enumerate(result.predictor.label_names)
    )


def test_the_record_and_the_history_tell_what_was_done(saved: tuple[Path, Any]) -> None:
    _, result = saved
    head = result.predictor.model.classifier
    assert result.record.model["trained_parameters"] == sum(p.numel() for p in head.parameters())
    assert {"loss_ce", "loss_mse", "loss_cov", "loss_svd"} <= set(result.history[0])
    for row in result.history:
        assert 0 < row["feature_cosine"] <= 1 and row["reshaped_rms"] > 0
        assert row["residual_scale"] == pytest.approx(1, abs=0.1)  # from 1 at first


def test_a_batch_of_the_method_is_one_of_the_network() -> None:
    """The hook adds nothing to the objective."""
    module, features = head(**{"svd_k": 2}), draw(8, 6)
    method, labels = NMTune(svd_k=2), [0, 1, 2, 0, 1, 2, 0, 1]
    whole = nn.ModuleDict({"classifier": module})
    run = Run(whole, torch.tensor(labels), 3, lambda _=None: draw(8, 3), torch.Generator())
    batch = dataclasses.replace(as_batch(labels), inputs={"features": features})
    loss = method.compute_loss(module, batch, run)
    answer = module(features)
    wanted, parts = method.objective(
        answer.logits, answer.transformed, answer.features, batch.labels
    )
    torch.testing.assert_close(loss, wanted)
    logged = {name: total / rows for name, (total, rows) in run.sums.items()}
    cosine = torch.cosine_similarity(answer.transformed, answer.features).mean().item()
    rms = answer.transformed.square().mean().sqrt().item()
    assert logged == {
        **{f"loss_{name}": pytest.approx(part) for name, part in parts.items()},
        "feature_cosine": pytest.approx(cosine),
        "reshaped_rms": pytest.approx(rms),
        "residual_scale": pytest.approx(module.residual_scale.abs().mean().item()),
    }
