"""Models with a poisoning expert: how they answer in each inference mode, what the router does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from noiseproof.report.blocks import Block, Cell, Column, Table, Text, percent, quantity
from noiseproof.report.measures import ACCURACIES, Measure, first_of
from noiseproof.report.runs import Run, as_number

SHOWN = (
    ("accuracy", "accuracy", True),
    ("macro_f1", "macro F1", True),
    ("choice_accuracy", "choices", True),
    ("exact_match", "exact match", True),
    ("token_accuracy", "token accuracy", True),
    ("perplexity", "perplexity", False),
)
MEANINGS = {
    "none": "the poisoning expert takes part",
    "mask": "its share is set to 0",
    "renorm": "its share goes to the others",
    "compensate": "the others count by how alike they are to it",
}
ROUTER = (
    ("Weight of poison", "poison_weight", "Mean weight of the poisoning expert over tokens."),
    ("sd", "poison_weight_std", "Standard deviation of that weight over tokens."),
    ("Above even", "above_even_share", "Tokens on which it has more than its even share."),
    ("Load spread", "load_variation", "Deviation of the normal experts' shares, by their mean."),
    ("Update", "update_ratio", "Norm of what all experts add, by that of the frozen layer."),
    ("Deployed", "", "The same in the mode that is deployed."),
    ("A moved", "drift_A", "Change of the shared A in the stage adapt, by its norm."),
    ("Poison moved", "drift_poison", "Change of what the poisoning expert does, as A moved."),
)
SAME = 0.1  # a weight within a tenth of the even share counts as even


def modes_table(run: Run) -> list[Block]:
    """What each set gives in each mode; nothing of a model with one way to answer."""
    modes = {mode: own for mode, own in run.record.modes.items() if isinstance(own, Mapping)}
    sets = _sets(run)
    shown = [
        (name, title, key, what, share)
        for name, title in sets.items()
        for key, what, share in SHOWN
        if any(as_number(own.get(f"{name}_{key}")) is not None for own in modes.values())
    ]
    if not shown:
        return []
    deployed = str(run.setting("method.inference_mode", ""))
    rows = []
    for mode, own in sorted(modes.items(), key=lambda item: _order(item[0])):
        values = [as_number(own.get(f"{name}_{key}")) for name, _, key, _, _ in shown]
        cells = [
            Cell(percent(value) if share else quantity(value, 2), value=value)
            for value, (*_, share) in zip(values, shown, strict=True)
        ]
        note = "deployed" if mode == deployed else ""
        rows.append([Cell(mode, note), Cell(MEANINGS.get(mode, "")), *cells])
    columns = [Column("Mode", numeric=False), Column("Meaning", numeric=False)]
    columns += [Column(f"{title}, {what}") for _, title, _, what, _ in shown]
    note = "Percent, but for perplexity. One training; only the inference differs."
    return [Table(columns, rows, note, fixed=True)]


def mode_measures(runs: Sequence[Run]) -> list[Measure]:
    """What a comparison shows: accuracy of every set in every mode that one of the runs has.

    Of a language model that of choices, or of response tokens where there are none.
    """
    measures = []
    for name, title in {key: value for run in runs for key, value in _sets(run).items()}.items():
        for mode in MEANINGS:
            measure = Measure(
                mode if name == "test" else f"{title}: {mode}",
                f"Accuracy on the set {title!r} where {MEANINGS[mode]}.",
                first_of([_value(mode, f"{name}_{kind}") for kind in ACCURACIES]),
                better=1,
            )
            if any(measure.of(run) is not None for run in runs):
                measures.append(measure)
    return measures


def router_blocks(run: Run) -> list[Block]:
    """Whether the router knows noise, in a sentence; then layer by layer what it does."""
    found = run.record.findings.get("experts")
    if not isinstance(found, Mapping):
        return []
    blocks: list[Block] = []
    said = verdict(found)
    if said:
        blocks.append(Text(said))
    told = losses_told(run)
    if told:
        blocks.append(Text(told))
    fused = found.get("fused")
    if isinstance(fused, list):
        names = " and ".join(map(str, fused))
        blocks.append(Text(f"Experts are beside {names} as a whole, which gives keys as well."))
    layers = [row for row in found.get("layers", ()) if isinstance(row, Mapping)]
    if layers:
        mean = found.get("mean")
        shown = [*layers, {**mean, "layer": "Mean"}] if isinstance(mean, Mapping) else layers
        deployed = f"update_{run.setting('method.inference_mode', '')}"
        columns = [Column("Layer", numeric=False)]
        columns += [Column(title, meaning) for title, _, meaning in ROUTER]
        columns += [Column("Similarity", "Mean cosine of a normal expert's output and the "
                           "poisoning one's.", numeric=False)]  # fmt: skip
        blocks.append(
            Table(
                columns,
                [_layer(row, deployed) for row in shown],
                "Percent, but for similarity (by expert, -1 to 1); over the tokens of the training "
                "rows that calibrate.",
                "Layer by layer",
                fixed=True,
            )
        )
    return blocks


def losses_told(run: Run) -> str:
    """How the losses of rows with noise differ, made on purpose and of the data; may be empty."""
    said = []
    noise = run.record.findings.get("noise")
    noise = noise if isinstance(noise, Mapping) else {}
    share, hit, others, shaken = (
        as_number(noise.get(name))
        for name in ("corrupted_share", "loss_corrupted", "loss_others", "embedding_noise")
    )
    if share is not None and hit is not None and others is not None:
        said.append(
            f"The noise made on purpose hit {percent(share)} % of the rows; when they were last "
            f"trained on so, their loss was {quantity(hit, 2)}, that of the others "
            f"{quantity(others, 2)}."
        )
    if shaken:
        said.append(f"Noise on embeddings had {percent(shaken)} % of their size.")
    noisy, clean = (run.metric(f"train_loss_{name}") for name in ("noisy", "clean"))
    if noisy is not None and clean is not None:
        said.append(
            "Under the final model, training rows with noise in label or text have a mean loss of "
            f"{quantity(noisy, 2)}, the others {quantity(clean, 2)}."
        )
    return " ".join(said)


def verdict(found: Mapping[str, Any]) -> str:
    """What masking does, from the numbers in ``findings["experts"]``; empty where they are missing.

    Whether the router tells corrupted texts is asked against chance: for n clean and n corrupted
    rows the AUROC of a score without any knowledge has the variance (2n + 1) / (12 n^2) (Mann and
    Whitney, 1947). Weights within a tenth of the even share, in mean and deviation, count as even
    (ours).

    >>> verdict({"noise_auroc": 0.5, "rows": 200, "poison_weight": 0.4, "even_share": 0.25})[-35:]
    'masking takes from all texts alike.'
    """
    auroc, rows = as_number(found.get("noise_auroc")), as_number(found.get("rows"))
    weight, even = as_number(found.get("poison_weight")), as_number(found.get("even_share"))
    if auroc is None or not rows or weight is None or even is None:
        return ""
    chance = 1.96 * ((2 * rows + 1) / (12 * rows**2)) ** 0.5
    told = (
        f"The poisoning expert has {percent(weight)} % of the weight (even share: "
        f"{percent(even)} %); as a mark of corrupted texts its weight has an AUROC of "
        f"{percent(auroc)} (chance: {percent(0.5 - chance)} to {percent(0.5 + chance)}, "
        f"{quantity(rows)} rows)."
    )
    clean, corrupted, raised = (
        as_number(found.get(name)) for name in ("weight_clean", "weight_corrupted", "raised_share")
    )
    if clean is not None and corrupted is not None and raised is not None:
        told += (
            f" On these rows it has {percent(clean)} % as they are and {percent(corrupted)} % in a "
            f"corrupted copy; {percent(raised)} % of the copies rely more on it."
        )
    spreads = [as_number(row.get("poison_weight_std")) for row in found.get("layers", ())]
    spread = fmean(known) if (known := [one for one in spreads if one is not None]) else None
    flat = spread is not None and max(abs(weight - even), spread) < SAME * even
    if flat:
        return f"{told} The weights sit at the even share. So masking is only rescaling the update."
    if abs(auroc - 0.5) <= chance:
        return f"{told} The router does not know noise: masking takes from all texts alike."
    if auroc > 0.5:
        return f"{told} Corrupted texts rely more on it, so masking takes more from them."
    return f"{told} Corrupted texts rely less on it, so masking takes more from clean ones."


def _sets(run: Run) -> dict[str, str]:
    """Prefix of a set's measures -> what a column calls it."""
    return {"test": "test"} | {f"ood_{name}": name for name in run.record.ood}


def _value(mode: str, name: str) -> Callable[[Run], float | None]:
    def of(run: Run) -> float | None:
        own = run.record.modes.get(mode)
        return as_number(own.get(name)) if isinstance(own, Mapping) else None

    return of


def _order(mode: str) -> int:
    names = list(MEANINGS)
    return names.index(mode) if mode in names else len(names)


def _layer(row: Mapping[str, Any], deployed: str) -> Sequence[Cell]:
    values = [as_number(row.get(name or deployed)) for _, name, _ in ROUTER]
    cells = [Cell(percent(value), value=value) for value in values]
    theta = [as_number(value) for value in row.get("theta", ())]
    shown = ", ".join(quantity(value, 2) for value in theta)
    return [Cell(str(row.get("layer", ""))), *cells, Cell(shown)]
