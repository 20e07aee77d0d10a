"""Reports on models with a poisoning expert: inference modes, the router, and what masking does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from noiseproof.report import report
from noiseproof.report.experts import verdict
from reports import write_run

LOPE = {"name": "LoPE", "inference_mode": "compensate"}
LAYER = {"layer": "layer.0.<query>", "poison_weight": 0.4, "poison_weight_std": 0.1,
         "above_even_share": 0.75, "load_variation": 0.31, "update_ratio": 0.05,
         "update_mask": 0.01, "update_compensate": 0.04, "drift_A": 0.2, "drift_poison": 0.15,
         "theta": [0.5, -0.25, 0.0]}  # fmt: skip
MEAN = {name: value for name, value in LAYER.items() if isinstance(value, float)}
EXPERTS = {"poison_weight": 0.4, "even_share": 0.25, "rows": 100, "noise_auroc": 0.5,
           "layers": [LAYER], "mean": MEAN | {"update_compensate": 0.07}}  # fmt: skip
NOISE = {"corrupted_share": 0.05, "loss_corrupted": 1.25, "loss_others": 0.5,
         "embedding_noise": 0.029}  # fmt: skip


def modes(**accuracies: float) -> dict[str, Any]:
    return {
        mode: {"test_accuracy": value, "ood_corrupted_accuracy": value - 0.1}
        for mode, value in accuracies.items()
    }


def written(folder: Path, **fields: Any) -> str:
    write_run(
        folder / "run", method=LOPE, ood={"corrupted": {"rows": 50, "accuracy": 0.6}}, **fields
    )
    return report(folder / "run", folder / "run.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_a_run_shows_every_mode_on_every_set(tmp_path: Path) -> None:
    text = written(tmp_path, modes=modes(mask=0.71, none=0.7, renorm=0.72, compensate=0.733))
    lines = [line for line in section(text, "Inference modes").splitlines() if "|" in line]
    assert lines[0].startswith("| Mode | Meaning | test, accuracy | corrupted, accuracy |")
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "none", "mask", "renorm", "compensate deployed",
    ]  # fmt: skip
    assert lines[-1].endswith("| 73.3 | 63.3 |")
    assert "Poisoning expert" not in text


def test_a_run_with_one_way_to_answer_has_neither_section(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert "Inference modes" not in text and "Poisoning expert" not in text


def test_a_language_model_shows_tokens_and_perplexity(tmp_path: Path) -> None:
    own = {"test_token_accuracy": 0.25, "test_perplexity": 7.125, "test_loss": 1.96}
    part = section(written(tmp_path, modes={"none": own, "mask": own}), "Inference modes")
    assert "test, token accuracy | test, perplexity" in part and "| 25.0 | 7.12 |" in part


def test_language_models_are_compared_by_choices_else_by_tokens(tmp_path: Path) -> None:
    """They have no accuracy of classes, and a comparison without a number is none."""
    for name, data, own in (
        ("a", "quiz", {"test_choice_accuracy": 0.625, "test_token_accuracy": 0.25}),
        ("b", "sums", {"test_token_accuracy": 0.375}),
    ):
        for method, plus in (("CrossEntropy", 0.0), ("LoPE", 0.125)):
            numbers = {key: value + plus for key, value in own.items()}
            modes = {"none": numbers, "mask": dict.fromkeys(own, 0.5)}
            write_run(
                tmp_path / f"{name}{method}",
                method={"name": method},
                labels={"data": data, "methods": method},
                metrics=numbers,
                modes=modes if plus else {},
                data={"rows": 100, "classes": 1},
                history=[],
            )
    text = report(tmp_path, tmp_path / "all.md").read_text(encoding="utf-8")
    overview = section(text, "Overview")
    assert (
        "| CrossEntropy | 50.0 | 62.5 | 37.5 |" in overview
        and "| LoPE | **62.5** | **75.0** | **50.0** |" in overview
    )
    assert "| LoPE | +12.5 (one seed) | 0 | 0 | 0 | 2 |" in overview
    assert "| LoPE | 75.0 | 50.0 |" in section(text, "quiz · no added noise")
    assert "1 classes" not in text  # a response is no class


def test_the_router_is_shown_layer_by_layer_under_its_verdict(tmp_path: Path) -> None:
    part = section(written(tmp_path, findings={"experts": EXPERTS}), "Poisoning expert")
    assert "masking takes from all texts alike" in part and "40.0 % of the weight" in part
    layer, mean = [line for line in part.splitlines() if line.startswith("|")][-2:]
    assert layer.endswith("| 40.0 | 10.0 | 75.0 | 31.0 | 5.0 | 4.0 | 20.0 | 15.0 | 0.50, "
                          "\N{MINUS SIGN}0.25, 0.00 |")  # fmt: skip
    assert mean.startswith("| Mean | 40.0") and "| 5.0 | 7.0 | 20.0 | 15.0 |" in mean
    assert "<query>" not in layer  # a text from outside is text


def test_records_without_a_mean_or_the_later_numbers_are_shown_too(tmp_path: Path) -> None:
    layer = {name: value for name, value in LAYER.items() if name != "update_compensate"}
    part = section(written(tmp_path, findings={"experts": EXPERTS | {"layers": [layer],
                                                                     "mean": None}}),
                   "Poisoning expert")  # fmt: skip
    (last,) = [line for line in part.splitlines() if line.startswith("| layer.0")]
    assert "| 5.0 | \N{EN DASH} | 20.0 |" in last and "| Mean |" not in part


def test_the_losses_of_rows_with_noise_are_told_where_they_are_known(tmp_path: Path) -> None:
    metrics = {"test_accuracy": 0.9, "train_loss_noisy": 2.0, "train_loss_clean": 0.25}
    found = {"experts": EXPERTS, "noise": NOISE}
    part = section(written(tmp_path, findings=found, metrics=metrics), "Poisoning expert")
    assert "hit 5.0 % of the rows; when they were last trained on so, their loss was 1.25" in part
    assert "that of the others 0.50. Noise on embeddings had 2.9 % of their size." in part
    assert "rows with noise in label or text have a mean loss of 2.00, the others 0.25." in part


@pytest.mark.parametrize(
    ("found", "said"),
    [
        # 100 rows: chance is 0.5 -+ 1.96 sqrt(201 / 120000) = 0.5 -+ 0.0802
        ({"noise_auroc": 0.579}, "does not know noise"),
        ({"noise_auroc": 0.421}, "does not know noise"),
        ({"noise_auroc": 0.581}, "rely more on it"),
        ({"noise_auroc": 0.419}, "rely less on it"),
        ({"noise_auroc": 0.9, "poison_weight": 0.26, "layers": [{"poison_weight_std": 0.02}]},
         "sit at the even share"),
        ({"noise_auroc": 0.9, "poison_weight": 0.26, "layers": [{"poison_weight_std": 0.03}]},
         "rely more on it"),
        ({"noise_auroc": 0.9, "poison_weight": 0.28, "layers": [{"poison_weight_std": 0.02}]},
         "rely more on it"),
    ],
)  # fmt: skip
def test_the_verdict_is_computed_from_the_numbers(found: dict[str, Any], said: str) -> None:
    text = verdict(EXPERTS | found)
    assert said in text
    assert ("only rescaling" in text) == ("even share." in text)
    assert ("from all texts alike" in text) == ("not know" in text)


def test_the_weights_on_clean_and_corrupted_texts_are_told_where_they_are_known() -> None:
    told = {"weight_clean": 0.35, "weight_corrupted": 0.375, "raised_share": 0.62}
    said = "has 35.0 % as they are and 37.5 % in a corrupted copy; 62.0 % of the copies rely more"
    assert said in verdict(EXPERTS | told)
    before = verdict(EXPERTS | {"weight_on_corrupted": 0.025, "raised_share": 0.62})
    assert "corrupted copy" not in before and "does not know noise" in before


def test_layers_that_give_keys_too_are_named(tmp_path: Path) -> None:
    found = {"experts": EXPERTS | {"fused": ["c_attn"]}}
    part = section(written(tmp_path, findings=found), "Poisoning expert")
    assert "Experts are beside c_attn as a whole, which gives keys as well." in part


def test_damaged_findings_say_nothing(tmp_path: Path) -> None:
    broken = EXPERTS | {"noise_auroc": None, "layers": []}
    assert "Poisoning expert" not in written(tmp_path, findings={"experts": broken})


def test_a_comparison_shows_the_modes_of_the_methods_that_have_them(tmp_path: Path) -> None:
    for seed, value in enumerate((0.70, 0.72)):
        write_run(tmp_path / f"runs/lope-{seed}", method=LOPE, seed=seed,
                  modes=modes(none=value, mask=value + 0.1),
                  ood={"corrupted": {"rows": 50, "accuracy": 0.6}})  # fmt: skip
        write_run(tmp_path / f"runs/plain-{seed}", seed=seed)
    text = report(tmp_path / "runs", tmp_path / "all.md").read_text(encoding="utf-8")
    part = text.partition("### Inference modes")[2].partition("\n#")[0]
    assert "| Method | none | mask | corrupted: none | corrupted: mask |" in part
    assert "| LoPE | 71.0 ± 1.4 | 81.0 ± 1.4 | 61.0 ± 1.4 | 71.0 ± 1.4 |" in part
    assert "CrossEntropy |" not in part
