"""The command line, through `main` with real files, and in a few cases as a real process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import noiseproof
from noiseproof import cards, finetune
from noiseproof.cli import COMMANDS, main
from noiseproof.cli.commands import FIT_GROUPS, NOT_FLAT
from noiseproof.cli.words import METAVARS
from noiseproof.errors import InputError
from noiseproof.job import Job
from noiseproof.methods import METHODS, CleaR
from noiseproof.noise import NOISE_MODELS, estimate_transition_from_labels, load_transition
from noiseproof.record import RunRecord, spec_id
from noiseproof.tables import read_table, write_table
from tiny import LABELS, build_model, environment, python, table

QUICK = shlex.split(
    "--method CrossEntropy --train.epochs 1 --train.batch_size 8 --train.learning_rate 2e-3 "
    "--train.device cpu --train.precision fp32"
)


@dataclass(frozen=True)
class Answer:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


def call(*words: object) -> Answer:
    """Run a command in this process; nothing but an exit code may come out of it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Answer(code, out.getvalue(), err.getvalue())


def works(*words: object) -> Answer:
    """Run a command that must succeed."""
    answer = call(*words)
    assert answer.code == 0, answer.err
    return answer


def complaint(*words: object) -> str:
    """Run a command with a mistake in it; give the one line that it leaves."""
    answer = call(*words)
    assert answer.code == 2, answer
    assert not answer.out
    assert answer.err.startswith("noiseproof: ")
    assert answer.err.endswith("\n") and answer.err.count("\n") == 1
    return answer.err.strip()


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below the folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Place:
    """A folder of the user: tables, a model, and runs."""

    folder: Path
    model: Path

    def fit(self, out: str, *words: object, data: str = "train.csv", quick: bool = True) -> Path:
        """Fit, quickly, and give the run's folder."""
        run = self.folder / out
        options = (*QUICK, *words) if quick else words
        works("fit", self.folder / data, "--model", self.model, "--out", run, *options)
        assert RunRecord.read(run).status == "done"
        return run


@pytest.fixture(scope="session")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    train = table(24, wrong=0.25)
    test = table(9, seed=5)
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        write_table(train, folder / f"train.{suffix}")
    write_table(test, folder / "test.csv")
    write_table(test.assign(text=test["text"][::-1].to_numpy()), folder / "validation.csv")
    new = pd.DataFrame(
        {
            "id": ["007", "NA", "", "4"],
            "text": ["rose near soil", "boat, sail", 'the "oven"', "naïve ☕ שלום"],
            "note": ["", "null", "1.50", "two\nlines"],
        }
    )
    write_table(new, folder / "new.csv")
    return Place(folder, tiny_model)


@pytest.fixture(scope="session")
def done(place: Place) -> Path:
    """A finished run of CleaR; do not change it."""
    return place.fit(
        "runs/done", "--test", place.folder / "test.csv", "--clean-label", "clean_label",
        "--method", "CleaR:fast", "--method.warmup_epochs", 1, "--method.mixture.scope",
        "per_class", "--train.epochs", 2,
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that `fit` would run; none is run."""
    jobs: list[Job] = []

    def run_job(job: Job, **_: Any) -> None:
        jobs.append(job)
        raise InputError("not run")

    monkeypatch.setattr(finetune, "run_job", run_job)
    return jobs


# --- fit -----------------------------------------------------------------------------------------


def test_a_warning_of_ours_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where in our code it comes from is nothing to the user; of a library it is all they have."""

    def command(words: list[str]) -> None:
        place = Path(finetune.__file__)
        warnings.warn_explicit("weak features", UserWarning, str(place), 1)
        warnings.warn_explicit("old name", UserWarning, "/elsewhere/library.py", 7)

    monkeypatch.setitem(COMMANDS, "methods", command)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["methods"]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith("noiseproof: warning: weak features\n")
    assert "library.py:7: UserWarning: old name" in errors


def test_fit_leaves_a_run_and_prints_what_came_out(done: Path, place: Place) -> None:
    record = RunRecord.read(done)
    assert record.metrics["test_accuracy"] == pytest.approx(
        (
            noiseproof.predict(done, str(place.folder / "test.csv"))["predicted_label"]
            == read_table(place.folder / "test.csv")["label"]
        ).mean()
    )
    assert {path.name for path in done.iterdir()} == {
        "history.csv", "model", "record.json", "samples.parquet", "suspects.csv",
    }  # fmt: skip
    answer = works(
        "fit", place.folder / "train.csv", "--model", place.model, "--out", done.parent / "shown",
        "--test", place.folder / "test.csv", *QUICK,
    )  # fmt: skip
    shown = RunRecord.read(done.parent / "shown").metrics["test_accuracy"]
    assert re.search(rf"test_accuracy +{shown:.4f}", answer.out)
    assert f"{done.parent / 'shown' / 'suspects.csv'}: " in answer.out
    assert "train 1/1  rows 24  loss " in answer.err


def test_every_table_format_gives_the_same_run(place: Place) -> None:
    runs = [
        place.fit(f"runs/{suffix}", data=f"train.{suffix}")
        for suffix in ("csv", "tsv", "jsonl", "parquet")
    ]
    first, *others = [pd.read_parquet(run / "samples.parquet") for run in runs]
    assert len({RunRecord.read(run).data["fingerprint"] for run in runs}) == 1
    for other in others:
        pd.testing.assert_frame_equal(first, other)


def test_a_validation_share_is_split_off_and_its_labels_count_as_noisy(place: Place) -> None:
    run = place.fit(
        "runs/share", "--validation", 0.25, "--train.select", "best",
        "--test", place.folder / "test.csv",
    )  # fmt: skip
    data = RunRecord.read(run).data
    assert (data["rows"], data["validation_rows"], data["test_rows"]) == (18, 6, 9)
    assert data["validation"] == "noisy"
    history = pd.read_csv(run / "history.csv")
    assert {"validation_accuracy", "test_accuracy"} <= set(history.columns)


def test_a_validation_file_is_trusted_when_the_user_says_so(place: Place) -> None:
    run = place.fit(
        "runs/file", "--validation", place.folder / "validation.csv",
        "--validation-labels", "clean",
    )  # fmt: skip
    data = RunRecord.read(run).data
    assert (data["rows"], data["validation_rows"], data["validation"]) == (24, 9, "clean")
    assert "validation_accuracy" in RunRecord.read(run).metrics


def test_two_text_columns_are_both_read_in_training_and_in_prediction(place: Place) -> None:
    run = place.fit("runs/pair", "--text", "text,context")
    rows = read_table(place.folder / "test.csv")
    other = rows.assign(context="rose soil leaf bloom")
    one, two = (noiseproof.predict(run, frame)["confidence"] for frame in (rows, other))
    assert (one - two).abs().max() > 1e-6
    predictor = noiseproof.load(run)
    with pytest.raises(InputError, match=r"trained on the text columns 'text,context'.*, got one$"):
        predictor.predict(["the boat"])
    with pytest.raises(InputError, match="expected a list of second texts, got a single text"):
        predictor.predict_proba(["the boat"], "the harbour")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("Where is my parcel?",), r"expected a list of texts, got a single text; write \[text\]"),
        (([],), "expected at least one row to label, got an empty list"),
        ((["a"], ["b"]), "trained on the text columns 'text'; give as many of them, got two"),
        ((["a", None],), "row 2 of the texts is of type NoneType, expected text; leave it out"),
        (({"text": ["a"]},), "got dict; noiseproof.predict labels the rows of a table"),
        ((pd.DataFrame({"text": ["a"]}),), "got DataFrame; noiseproof.predict labels the rows"),
        ((3,), "expected a list of texts, got int"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(done: Path, given: tuple[Any, ...], said: str) -> None:
    """Every letter of a text, every column name of a table would get a label of its own."""
    predictor = noiseproof.load(done)
    for ask in (predictor.predict, predictor.predict_proba):
        with pytest.raises(InputError, match=said):
            ask(*given)


def test_noise_is_injected_and_the_labels_of_the_file_become_the_truth(place: Place) -> None:
    run = place.fit("runs/noise", "--noise", "symmetric:0.5", "--noise-seed", 3)
    record, samples = RunRecord.read(run), pd.read_parquet(run / "samples.parquet")
    wrong = samples["label"] != samples["clean_label"]
    assert (
        samples["clean_label"].tolist() == read_table(place.folder / "train.csv")["label"].tolist()
    )
    assert 0 < wrong.mean() < 1
    assert record.noise["injected_rate"] == record.noise["noise_rate"] == wrong.mean()
    assert (record.noise["spec"], record.noise["seed"]) == ("symmetric:0.5", 3)


def test_a_sample_keeps_the_shares_of_the_classes(place: Place) -> None:
    run = place.fit("runs/sample", "--sample", 12, "--label", "clean_label")
    samples = pd.read_parquet(run / "samples.parquet")
    assert samples["label"].value_counts().to_dict() == dict.fromkeys(LABELS, 4)


def test_rows_with_the_label_to_drop_are_left_out(place: Place) -> None:
    rows = read_table(place.folder / "train.csv")
    rows.loc[[2, 5], "label"] = "-1"
    write_table(rows, place.folder / "abstained.csv")
    run = place.fit("runs/drop", "--drop-label", "-1", data="abstained.csv")
    data, samples = RunRecord.read(run).data, pd.read_parquet(run / "samples.parquet")
    assert (data["rows"], data["dropped"], data["label_names"]) == (22, 2, list(LABELS))
    assert {"2", "5"}.isdisjoint(samples["row_id"])


def test_label_numbers_get_the_names_of_a_file(place: Place) -> None:
    rows = read_table(place.folder / "train.csv")
    given = rows["label"]
    write_table(rows.assign(label=given.map(LABELS.index)), place.folder / "numbers.csv")
    (place.folder / "names.txt").write_text("\n".join(LABELS) + "\n")
    run = place.fit("runs/names", "--label-names", place.folder / "names.txt", data="numbers.csv")
    assert RunRecord.read(run).data["label_names"] == list(LABELS)
    assert pd.read_parquet(run / "samples.parquet")["label"].tolist() == given.tolist()


def test_a_merged_model_needs_transformers_alone(place: Place) -> None:
    from transformers import pipeline

    run = place.fit("runs/merge", "--merge", "--method.tune", "lora")
    assert not (run / "model" / "adapter_config.json").exists()
    texts = read_table(place.folder / "test.csv")["text"].tolist()
    answers = pipeline("text-classification", model=str(run / "model"), device="cpu")(texts)
    assert [answer["label"] for answer in answers] == noiseproof.load(run).predict(texts)


def test_texts_longer_than_the_positions_of_the_model_are_cut(place: Place, tmp_path: Path) -> None:
    """Many tokenizers do not tell the limit; the position table would be read past its end."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    rows = table(12, length=90)
    write_table(rows, place.folder / "long.csv")
    for kind in ("bert", "roberta"):
        folder = build_model(tmp_path / kind)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        if kind == "roberta":  # its first position is padding_idx + 1
            config = RobertaConfig(
                vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
                num_attention_heads=2, intermediate_size=32, max_position_embeddings=40,
                pad_token_id=5,
            )  # fmt: skip
            RobertaForSequenceClassification(config).save_pretrained(str(folder))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["model_max_length"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        assert AutoTokenizer.from_pretrained(str(folder)).model_max_length > 1e9
        limited = Place(place.folder, folder)
        run = limited.fit(f"runs/long-{kind}", "--train.max_length", 512, data="long.csv")
        predictor = noiseproof.load(run)
        lengths = predictor.task.encode(rows["text"].tolist(), None).lengths
        assert set(lengths) == {64 if kind == "bert" else 34}
        assert len(predictor.predict(rows["text"].tolist())) == 12


def test_a_preset_is_changed_by_nested_settings(asked: list[Job]) -> None:
    call(
        "fit", "t.csv", "--out", "r", "--method", "CleaR:paper", "--method.mixture.scope",
        "per_class", "--method.gamma=0.7", "--train.epochs", 8,
    )  # fmt: skip
    paper = CleaR.preset("paper")
    mixture = {**vars(paper.mixture), "scope": "per_class"}
    assert asked[0].method == CleaR.preset(
        "paper", gamma=0.7, mixture=type(paper.mixture)(**mixture)
    )
    assert asked[0].method != CleaR(gamma=0.7, mixture=type(paper.mixture)(**mixture))
    assert asked[0].train.epochs == 8


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_every_method_can_be_given_back(
    name: str, asked: list[Job], tmp_path: Path
) -> None:
    """The record of a run, as a config, must ask for the same run."""
    config = tmp_path / "record.json"
    for method in METHODS[name].presets().values():
        job = Job("t.csv", label="x", method=method, drop_label="-1", sample=7, validation="0.2")
        config.write_text(json.dumps({"spec": job.spec(), "id": "of then"}))
        call("fit", "--config", config, "--out", "r")
        assert asked.pop() == job


SETTINGS = {
    "data": "t.csv",
    "label": "intent",
    "noise_seed": 3,
    "merge": True,
    "text": ["title", "body"],
    "method": {"name": "CleaR:fast", "warmup_epochs": 2, "mixture": {"scope": "per_class"}},
    "train": {"epochs": 5, "learning_rate": 1e-3},
}
AS_TOML = """
data = "t.csv"
label = "intent"
noise_seed = 3
merge = true
text = ["title", "body"]
[method]
name = "CleaR:fast"
warmup_epochs = 2
mixture = {scope = "per_class"}
[train]
epochs = 5
learning_rate = 1e-3
"""


def test_settings_come_from_yaml_toml_or_json_and_the_command_line_wins(
    asked: list[Job], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / "c.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "c.toml").write_text(AS_TOML)
    words = shlex.split(
        "fit t.csv --label intent --noise-seed 3 --merge --text title,body --method CleaR:fast "
        "--method.warmup_epochs 2 --method.mixture.scope per_class --train.epochs 5 "
        "--train.learning_rate 1e-3 --out r"
    )
    call(*words)
    for suffix in ("yaml", "toml", "json"):
        call("fit", "--config", tmp_path / f"c.{suffix}", "--out", "r")
    assert len(asked) == 4
    assert len({spec_id(job.spec()) for job in asked}) == 1
    call("fit", "u.csv", f"--config={tmp_path / 'c.yaml'}", "--out=r", "--train.epochs", 9)
    assert (asked[-1].data, asked[-1].train.epochs, asked[-1].label) == ("u.csv", 9, "intent")


def test_of_two_configs_the_later_wins(asked: list[Job], tmp_path: Path) -> None:
    for name, epochs in (("one", 7), ("two", 8)):
        text = f"data: {name}.csv\ntrain:\n  epochs: {epochs}\n"
        (tmp_path / f"{name}.yaml").write_text(text + f"  seed: {epochs}\n" * (name == "one"))
    call("fit", "--config", tmp_path / "one.yaml", "--config", tmp_path / "two.yaml", "--out", "r")
    assert (asked[0].data, asked[0].train.epochs, asked[0].train.seed) == ("two.csv", 8, 7)


def test_the_record_of_a_run_is_a_config_that_repeats_it(done: Path) -> None:
    again = done.parent / "again"
    works("fit", "--config", done / "record.json", "--out", again)
    one, two = RunRecord.read(done), RunRecord.read(again)
    assert one.id == two.id and one.metrics == two.metrics
    pd.testing.assert_frame_equal(*(pd.read_parquet(r / "samples.parquet") for r in (done, again)))


def test_overwrite_replaces_the_run_and_leaves_other_files(place: Place) -> None:
    run = place.fit("runs/replaced")
    old = RunRecord.read(run)
    (run / "notes.txt").write_text("mine")
    before = contents(run)
    words = ["fit", place.folder / "train.csv", "--model", place.model, "--out", run, *QUICK]
    assert "exists; choose another --out, --resume it, or give --overwrite" in complaint(*words)
    assert contents(run) == before
    works(*words, "--train.seed", 1, "--overwrite")
    new = RunRecord.read(run)
    assert new.id != old.id and new.status == "done"
    assert (run / "notes.txt").read_text() == "mine"


def test_a_run_that_ctrl_c_stopped_is_resumed_by_the_same_command(place: Place) -> None:
    run = place.folder / "runs" / "stopped"
    words = ["fit", place.folder / "train.csv", "--model", place.model, "--out", run, *QUICK]
    words = [str(word) for word in [*words, "--train.epochs", 20, "--method.tune", "lora"]]
    with subprocess.Popen(
        [sys.executable, "-m", "noiseproof", *words], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        seen = [next(process.stderr)]
        while "train 2/20" not in seen[-1]:
            seen.append(next(process.stderr))
        process.send_signal(signal.SIGINT)
        *_, last = process.stderr.readlines()
    assert process.returncode == 130
    assert last == "noiseproof: interrupted by SIGINT; the same command with --resume continues\n"
    assert not any("Warning" in line for line in seen)  # of libraries, for programmers
    assert RunRecord.read(run).status == "interrupted"

    changed = complaint(*words, "--train.seed", 7, "--resume")
    assert "settings differ in --train.seed (0 then, 7 now)" in changed
    predict = ("predict", run, place.folder / "test.csv", "--out", place.folder / "no.csv")
    assert "is interrupted; finish it with --resume" in complaint(*predict)
    assert RunRecord.read(run).status == "interrupted"

    answer = works(*words, "--resume")
    assert "train 1/20" not in answer.err  # it went on, it did not begin again
    assert RunRecord.read(run).status == "done"
    assert pd.read_csv(run / "history.csv")["epoch"].tolist() == list(range(20))
    assert "is finished; nothing is left to resume" in complaint(*words, "--resume")


# --- predict -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_predict_keeps_the_table_and_adds_label_and_confidence(
    suffix: str, done: Path, place: Place, tmp_path: Path
) -> None:
    out = tmp_path / f"predictions.{suffix}"
    answer = works("predict", done, place.folder / "new.csv", "--out", out)
    assert answer.out == f"4 rows labelled: {out}\n" and not answer.err
    old, new = read_table(place.folder / "new.csv"), read_table(out)
    assert list(new.columns) == [*old.columns, "predicted_label", "confidence"]
    assert new[list(old.columns)].to_numpy().tolist() == old.to_numpy().tolist()
    wanted = noiseproof.predict(done, str(place.folder / "new.csv"))
    assert new["predicted_label"].tolist() == wanted["predicted_label"].tolist()
    assert set(wanted["predicted_label"]) <= set(LABELS)
    confidence = new["confidence"].astype(float)
    assert np.allclose(confidence, wanted["confidence"], rtol=1e-6)
    assert confidence.between(1 / 3, 1).all()


def test_predict_reads_the_text_from_another_column(
    done: Path, place: Place, tmp_path: Path
) -> None:
    rows = read_table(place.folder / "new.csv")
    write_table(rows.rename(columns={"text": "message"}), tmp_path / "renamed.csv")
    works(
        "predict", done, tmp_path / "renamed.csv", "--text", "message", "--out", tmp_path / "p.csv"
    )
    labels = read_table(tmp_path / "p.csv")["predicted_label"].tolist()
    assert labels == noiseproof.load(done).predict(rows["text"].tolist())


# --- corrupt -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean_file(place: Place) -> Path:
    path = place.folder / "clean.csv"
    write_table(table(300)[["text", "context", "label"]], path)
    return path


def test_corrupt_changes_labels_at_the_rate_and_keeps_the_right_ones(
    clean_file: Path, tmp_path: Path
) -> None:
    out, matrix = tmp_path / "noisy.tsv", tmp_path / "matrix.json"
    answer = works(
        "corrupt", clean_file, "--noise", "symmetric:0.4", "--out", out, "--seed", 3,
        "--transition-out", matrix, "--clean-label", "truth",
    )  # fmt: skip
    old, new = read_table(clean_file), read_table(out)
    assert list(new.columns) == ["text", "context", "label", "truth"]
    assert new["truth"].tolist() == old["label"].tolist()
    assert new["text"].tolist() == old["text"].tolist()
    changed = int((new["label"] != new["truth"]).sum())
    assert 0.3 < changed / 300 < 0.5  # 3.5 standard deviations
    assert f"{changed} of 300 rows changed (realised rate {changed / 300:.4f}" in answer.out
    numbers = [[LABELS.index(name) for name in new[column]] for column in ("truth", "label")]
    wanted = estimate_transition_from_labels(*map(np.array, numbers), 3)
    assert np.allclose(load_transition(matrix), wanted)
    again = tmp_path / "again.tsv"
    works("corrupt", clean_file, "--noise", "symmetric:0.4", "--out", again, "--seed", 3,
          "--clean-label", "truth")  # fmt: skip
    assert again.read_bytes() == out.read_bytes()


def test_corrupt_reads_rows_as_it_is_told(clean_file: Path, place: Place, tmp_path: Path) -> None:
    """What Python's corrupt takes could not be said on the command line."""
    words = ["corrupt", clean_file, "--noise", "instance:0.4", "--model", place.model]
    for length in (64, 3):
        works(*words, "--max-length", length, "--out", tmp_path / f"{length}.csv")
    whole, short = (read_table(tmp_path / f"{length}.csv") for length in (64, 3))
    assert whole["label"].tolist() != short["label"].tolist()
    by_python, _ = noiseproof.corrupt(
        str(clean_file), "instance:0.4", model=str(place.model), max_length=3
    )
    assert short["label"].tolist() == by_python["label"].tolist()
    line = complaint(*words, "--image-workers", -3, "--out", tmp_path / "no.csv")
    assert "--image-workers must lie in [0, 64], got -3" in line


def test_corrupted_labels_go_straight_into_fit(clean_file: Path, place: Place) -> None:
    noisy = place.folder / "noisy.parquet"
    works("corrupt", clean_file, "--noise", "pairflip:0.3", "--out", noisy)
    run = place.fit(
        "runs/noisy", "--clean-label", "clean_label", "--sample", 60, data="noisy.parquet"
    )
    samples = pd.read_parquet(run / "samples.parquet")
    rate = (samples["label"] != samples["clean_label"]).mean()
    assert RunRecord.read(run).noise["noise_rate"] == rate > 0


def test_labels_without_texts_can_be_corrupted(clean_file: Path, tmp_path: Path) -> None:
    write_table(read_table(clean_file)[["label"]], tmp_path / "labels.csv")
    command = ("corrupt", tmp_path / "labels.csv", "--noise", "symmetric:0.4", "--out")
    works(*command, tmp_path / "noisy.csv")
    works("corrupt", clean_file, *command[2:], tmp_path / "with_texts.csv")
    alone, beside = (read_table(tmp_path / f"{n}.csv")["label"] for n in ("noisy", "with_texts"))
    assert alone.tolist() == beside.tolist()


def test_open_set_noise_takes_texts_from_the_pool(clean_file: Path, tmp_path: Path) -> None:
    pool = [f"foreign {number}" for number in range(20)]
    write_table(pd.DataFrame({"text": pool}), tmp_path / "pool.csv")
    out = tmp_path / "open.csv"
    works("corrupt", clean_file, "--noise", "openset:0.2", "--noise-pool", tmp_path / "pool.csv",
          "--out", out)  # fmt: skip
    old, new = read_table(clean_file), read_table(out)
    foreign = new["text"].isin(pool)
    assert 0.1 < foreign.mean() < 0.3
    assert (new["text"] == old["text"]).tolist() == (~foreign).tolist()
    assert new["label"].tolist() == old["label"].tolist()


def test_instance_noise_reads_the_texts_with_the_model(
    clean_file: Path, place: Place, tmp_path: Path
) -> None:
    for column in ("text", "context"):
        works("corrupt", clean_file, "--noise", "instance:0.4", "--model", place.model,
              "--text", column, "--out", tmp_path / f"{column}.csv")  # fmt: skip
    one, two = (read_table(tmp_path / f"{column}.csv")["label"] for column in ("text", "context"))
    right = read_table(clean_file)["label"]
    assert 0.3 < (one != right).mean() < 0.5
    assert (one != two).any()  # other features, other confusions


# --- methods, help, version ----------------------------------------------------------------------


def test_the_list_names_every_method_with_its_presets() -> None:
    lines = works("methods").out
    assert [name for name in METHODS if not re.search(rf"^{name} ", lines, re.MULTILINE)] == []
    assert "default, gentle, plain," in lines


@pytest.mark.parametrize("name", METHODS)
def test_the_page_of_a_method_has_its_card_and_all_settings(name: str, asked: list[Job]) -> None:
    page = works("methods", name).out
    assert page.startswith(cards.card(METHODS[name]) + "\n")
    assert page.rstrip().splitlines()[-1].startswith("presets: default")
    options = re.findall(r"^--method\.(\S+)", page, re.MULTILINE)
    values = dataclasses.asdict(METHODS[name]())
    mixture = values.pop("mixture", {})
    wanted = [*values, *(f"mixture.{setting}" for setting in mixture)]
    assert sorted(options) == sorted(wanted)
    for option in options:  # and `fit` knows each of them
        message = complaint("fit", "t", "--out", "r", "--method", name, f"--method.{option}")
        assert message.startswith(f"noiseproof: --method.{option} needs a value: ")


def test_a_preset_is_shown_with_its_values() -> None:
    """A preset is named as for fit; its settings are why one looks."""
    page = works("methods", "CleaR:paper").out
    shown = dict(re.findall(r"^--method\.(\S+) +(\S+)", page, re.MULTILINE))
    names = ("rank", "scoring_passes", "mixture.guard", "dropout")
    assert [shown[name] for name in names] == ["8", "5", "off", "None"]
    assert page != works("methods", "CleaR").out == works("methods", "CleaR:default").out
    assert "unknown preset 'quick' of CleaR; available: default" in complaint(
        "methods", "CleaR:quick"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_is_short_and_its_example_is_valid(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    answer = works(command, "--help")
    assert not answer.err
    assert answer.out == works("help", command).out
    lines = answer.out.splitlines()
    assert lines[0].startswith(f"usage: noiseproof {command} ")
    assert len(lines) < {"fit": 130, "corrupt": 45}.get(command, 40)
    assert max(map(len, lines)) <= 125
    example = next(line for line in lines if line.startswith("example: noiseproof "))
    words = shlex.split(example.removeprefix("example: noiseproof "))
    assert words[0] == command
    if command == "methods":
        works(*words)
    elif command != "demo":  # all but the files exists
        assert re.search("tickets(.csv|.toml)? (does not exist|is not a run)", complaint(*words))


@pytest.mark.parametrize("name", [name for name, shown in METAVARS.items() if "{" in shown])
def test_the_choices_that_the_help_shows_are_those_that_are_taken(name: str, place: Place) -> None:
    option = f"--train.{name}"
    if f"{option} " not in works("fit", "--help").out:
        option = f"--{name.replace('_', '-')}"
    file = place.folder / "train.csv"
    refused = complaint("fit", file, "--validation", file, "--out", place.folder / "none",
                        option, "other")  # fmt: skip
    taken = re.split("[;,] got ", refused.partition(" must be ")[2])[0].removeprefix("one of ")
    assert sorted(re.split(", | or ", taken)) == sorted(METAVARS[name][1:-1].split(",")), refused


def test_the_help_of_fit_shows_every_setting_of_a_job_in_a_group() -> None:
    grouped = [name for names in FIT_GROUPS.values() for name in names]
    flat = [item.name for item in dataclasses.fields(Job) if item.name not in NOT_FLAT]
    assert sorted(grouped) == sorted(flat)
    shown = works("fit", "--help").out
    groups = ["data", "model", "noise", "features", "images", "language models", "output"]
    places = [shown.index(f"\n{title}:\n") for title in groups]
    assert places == sorted(places) and "studies:" not in shown
    for metavar in ("--on-bad-image {error,skip}", "--validation-labels {clean,noisy}",
                    "--label-names FILE", "--noise SPEC", "--text COLUMN"):  # fmt: skip
        assert metavar in shown


def test_the_help_of_corrupt_lists_every_kind_of_noise() -> None:
    shown = works("corrupt", "--help").out
    assert [kind.example for kind in NOISE_MODELS.values() if kind.example not in shown] == []


def test_what_fit_did_not_do_is_said_in_a_line(place: Place) -> None:
    """Neither a run that was to be resumed and is new, nor one without test rows, is silent."""
    run = place.folder / "runs" / "new"
    words = ("fit", place.folder / "train.csv", "--model", place.model, "--out", run, *QUICK)
    answer = works(*words, "--resume")
    assert f"{run} holds no run to resume; a new one starts there" in answer.err
    assert "no test rows: give --test FILE or --test 0.2" in answer.out
    assert "no test rows" not in works(*words, "--test", "0.2", "--overwrite").out


def test_an_audit_writes_how_true_labels_became_given_ones(place: Place, tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.json"
    works("audit", place.folder / "train.csv", "--model", place.model, "--clean-label",
          "clean_label", "--out", tmp_path / "s.csv", "--transition-out", matrix)  # fmt: skip
    train = read_table(place.folder / "train.csv")
    true, given = ([LABELS.index(name) for name in train[c]] for c in ("clean_label", "label"))
    expected = estimate_transition_from_labels(true, given, len(LABELS))
    np.testing.assert_allclose(load_transition(matrix), expected)


def test_defaults_are_told_as_one_types_them() -> None:
    """Not as Python writes them, and a new line does not break the table of the page."""
    lines = " ".join(works("fit", "--help").out.split())
    assert "of the training rows. (default: true)" in lines
    assert "(default: {prompt}\\n)" in lines
    assert "spectrum: also runs. (default: minilm)" in " ".join(
        works("study", "--help").out.split()
    )


def test_options_that_only_studies_use_are_not_offered(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('lable = "intent"\n', encoding="utf-8")
    for given in (("--lable", "x"), ("--config", str(config))):
        told = complaint("fit", "t.csv", "--out", "r", *given)
        assert "label" in told and "only-clean-rows" not in told and "probe-gradients" not in told
    assert told.endswith("see noiseproof fit --help")


def test_the_version_and_the_commands_are_told() -> None:
    assert works("--version").out == f"noiseproof {noiseproof.__version__}\n"
    overview = works("--help").out
    assert [name for name in COMMANDS if f"\n  {name} " not in overview] == []
    assert call() == Answer(2, overview, "")


def test_the_program_runs_as_a_process_and_says_a_mistake_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "r"
    done = python(
        "-m", "noiseproof", "fit", f"{tmp_path}/none.csv", "--train.epochs", "x", f"--out={out}"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "noiseproof: --train.epochs: expected a whole number, got 'x'\n"
    assert list(tmp_path.iterdir()) == []


# --- mistakes ------------------------------------------------------------------------------------


def test_what_is_refused_leaves_no_folder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the run was removed, those that were made around it were not."""
    monkeypatch.chdir(tmp_path)
    Path("gap.csv").write_text("text,label\na,x\nb,\nc,y\n")
    Path("kept").mkdir()
    for out in ("new/deep/run", "kept/run"):
        assert main(["fit", "gap.csv", f"--out={out}"]) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["gap.csv", "kept"]


FILES: dict[str, str | bytes] = {
    "taken.csv": "mine\n1\n",
    "empty.csv": "",
    "header.csv": "text,label\n",
    "gap.csv": "text,label\na,x\nb,\nc,y\n",
    "single.csv": "text,label\na,x\nb,x\n",
    "own.csv": "text,label\na,x\nb,y\nc,z\n",
    "unseen.csv": "text,label\nrose,garden\nboat,harbor\n",
    "number.jsonl": '{"text": "a", "label": "x"}\n\n{"text": 5, "label": "y"}\n',
    "twice.csv": "text,label,label\na,x,y\n",
    "latin.csv": "text,label\na,x\ncafé,y\n".encode("latin-1"),
    "data.xlsx": "x",
    "predicted.csv": "text,predicted_label\na,x\n",
    "broken.yaml": "label: x\ntrain: [1",
    "broken.json": '{"label": ',
    "broken.toml": "label = ",
    "list.yaml": "- 1\n",
    "nothing.yaml": "",
    "unknown.yaml": "lable: intent\n",
    "nested.toml": "[train]\nepoch = 3\n",
    "mixture.json": '{"method": {"name": "CleaR", "mixture": {"scop": "global"}}}',
    "flat.yaml": "train: 5\n",
    "typed.yaml": "train:\n  epochs: many\n",
    "method.yaml": "method: Clear\n",
    "dated.yaml": "test: 2024-01-01\n1: 2\n",
    "names.txt": "garden\nharbour\n",
    "matrix.json": "[[0.9, 0.2], [0.5, 0.5]]",
}
FIT = "fit train.csv --out out --model MODEL"
CORRUPT = "corrupt train.csv --out out.csv --clean-label truth"

# Name of the case, command, expected message. MODEL, DONE: a model and a finished run.
READING = [
    ("missing file", f"{FIT} --test trian.csv", r"trian\.csv does not exist; .*'train\.csv'"),
    ("missing data", "fit trian.csv --out out", r"trian\.csv does not exist; did you mean 'train"),
    ("missing column", f"{FIT} --label lable", r"no column 'lable' \(label\); .* 'label'\?; col"),
    ("missing text", f"{FIT} --text txet", r"no column 'txet' \(text\); did you mean 'text'"),
    ("empty file", "fit empty.csv --out out", r"empty\.csv is empty; expected a table"),
    ("header only", "fit header.csv --out out", r"header \(text, label\) but no rows"),
    ("no label", "fit gap.csv --out out", r"row 2 \(line 3\) of gap\.csv has no label .*fill"),
    ("one class", "fit single.csv --out out", r"only one class .*'x'.*; expected at least 2"),
    (
        "unseen test label",
        f"{FIT} --test unseen.csv",
        r"'harbor' of row 2 \(line 3\) of unseen\.csv was never seen in training; did you mean "
        r"'harbour'\?; known: garden, harbour, kitchen; correct it, or leave "
        r"such rows out with --drop-label$",
    ),
    (
        "no label in a test row",
        f"{FIT} --test gap.csv",
        r"row 2 .* no label .*; fill or remove them, or .* with --drop-label ''$",
    ),
    (
        "no room for words",
        f"{FIT} --train.max_length 2",
        r"train\.max_length must be more than 2, the tokens .* around a text, got 2$",
    ),
    ("nan label", "fit nan.parquet --out out", r"row 2 of nan\.parquet has no label in col"),
    ("no text", "fit number.jsonl --out out", r"row 2 \(line 3\) .* type int .* expected text"),
    ("column twice", "fit twice.csv --out out", r"several columns named 'label' .*; rename"),
    ("wrong encoding", "fit latin.csv --out out", r"not UTF-8: byte 0xe9 .* \(line 3\); .*iconv"),
    ("data suffix", "fit data.xlsx --out out", r"unsupported suffix '\.xlsx'; supported: \.csv"),
    ("text is label", f"{FIT} --text label", r"'label' of train\.csv cannot be both text and"),
    ("three texts", f"{FIT} --text text,label,context", r"must name one column or two diff"),
    (
        "no model in a folder",
        "fit train.csv --out out --model folder/none",
        r"cannot load model 'folder/none': the folder does not exist \(give a local folder",
    ),
    (
        "near minilm",
        "fit train.csv --out out --model minilmm",
        r"cannot load model 'minilmm'; did you mean 'minilm'\?",
    ),
    ("sample 1", f"{FIT} --sample 1", r"--sample 1 leaves a single row; expected at least 2 rows"),
    ("rows of their own", "fit own.csv --out out", r"each of the 3 rows has a class of its own in"),
    (
        "no model folder",
        "fit train.csv --out out --model ./none",
        r"model './none': the folder does not exist \(.*config\.json",
    ),
    (
        "folder without config",
        "fit train.csv --out out --model hollow",
        r"model 'hollow': .*minilm",
    ),
    ("sample 0", f"{FIT} --sample 0", r"must lie in 1 to 24 \(the rows\), got 0"),
    ("sample above rows", f"{FIT} --sample 25", r"must lie in 1 to 24 \(the rows\), got 25"),
    (
        "label outside names",
        f"{FIT} --label-names names.txt",
        r"'kitchen' of row \d+ .* not in --label-names",
    ),
    ("no such id column", f"{FIT} --row-id idx", r"no column 'idx' \(row id\)"),
    (
        "matrix of other classes",
        f"{FIT} --noise transition:[[0.9,0.1],[0.2,0.8]]",
        r"the matrix is 2 x 2, the labels have 3 classes",
    ),
]
SETTING = [
    ("below a file", "fit train.csv --out taken.csv/x", r"cannot write to taken\.csv/x: Not a dir"),
    ("existing out", "fit train.csv --out folder", r"folder exists; choose another --out, --res"),
    ("out is a file", "fit train.csv --out taken.csv", r"taken\.csv exists; choose another --out"),
    (
        "out is a file, overwrite",
        "fit train.csv --out taken.csv --overwrite",
        r"taken\.csv is a file; choose another --out",
    ),
    (
        "out is no run, overwrite",
        "fit train.csv --out folder --overwrite",
        r"folder holds files but no run; --overwrite replaces runs only",
    ),
    ("no home", "fit train.csv --out ~no-such-user/x", r"'~no-such-user/x' is not a path: Could n"),
    ("out is nothing", "fit train.csv --out ''", r"expected the name of a file or folder, got ''"),
    ("noise is nothing", f"{FIT} --noise ''", r"--noise must not be empty; none injects nothing"),
    (
        "pool alone",
        f"{FIT} --noise-pool test.csv",
        r"--noise-pool is for .*, or leave --noise-pool",
    ),
    (
        "true is given",
        f"{FIT} --clean-label label",
        r"--clean-label label is the column of the giv",
    ),
    ("huge batch", f"{FIT} --train.batch_size 99999999", r"--train\.batch_size must be at most 10"),
    ("0 epochs", f"{FIT} --train.epochs 0", r"train\.epochs must be at least 1, got 0"),
    ("-1 epochs", f"{FIT} --train.epochs -1", r"train\.epochs must be at least 1, got -1"),
    (
        "endless",
        f"{FIT} --train.epochs 1000000000",
        r"epochs must be at most 10000, got 1000000000",
    ),
    ("1e9 epochs", f"{FIT} --train.epochs 1e9", r"--train\.epochs: expected a whole .*, got '1e9'"),
    ("batch 0", f"{FIT} --train.batch_size 0", r"train\.batch_size must be at least 1, got 0"),
    ("micro batch", f"{FIT} --train.micro_batch_size 64", r"must lie in \[1, 32\], got 64"),
    ("rate 0", f"{FIT} --train.learning_rate 0", r"learning_rate must lie in \(0, 10\], got 0"),
    ("rate -1", f"{FIT} --train.learning_rate=-1", r"learning_rate must lie in \(0, 10\], got -1"),
    (
        "rate nan",
        f"{FIT} --train.learning_rate nan",
        r"_rate: expected a number or null, got 'nan'",
    ),
    ("length 0", f"{FIT} --train.max_length 0", r"train\.max_length must be at least 1, got 0"),
    ("validation 1.5", f"{FIT} --validation 1.5", r"a share between 0 and 1, got 1\.5"),
    ("validation 0", f"{FIT} --validation 0", r"a share between 0 and 1, got 0"),
    ("seed -1", f"{FIT} --train.seed -1", r"train\.seed must lie in \[0, 2\^32\), got -1"),
    ("noise seed", f"{FIT} --noise-seed -1", r"--noise-seed must lie in \[0, 2\^32\), got -1"),
    ("no rate", f"{FIT} --noise symmetric", r"the rate is missing; for example symmetric:0\.4"),
    ("rate no number", f"{FIT} --noise symmetric:x", r"must be a number, got 'x'; for example"),
    ("rate above 1", f"{FIT} --noise symmetric:1.5", r"must lie in \[0, 1\], got 1\.5; for exam"),
    ("unknown noise", f"{FIT} --noise symetric:0.4", r"'symetric'; did you mean 'symmetric'"),
    ("noise setting", f"{FIT} --noise pairflip:0.4,stepp=1", r"'stepp', known: step, pairs"),
    ("noise end", f"{FIT} --noise symmetric:0.4+", r"must be a number, got '0\.4\+'"),
    ("noise file", f"{FIT} --noise transition:none.json", r"none\.json: cannot be read \(No such"),
    ("noise matrix", f"{FIT} --noise transition:matrix.json", r"row 1 of the matrix must sum to 1"),
    ("no pool", f"{FIT} --noise openset:0.3", r"and needs --noise-pool, a file"),
    ("method", f"{FIT} --method Clear", r"method 'Clear'; did you mean 'CleaR'\? available: Cl"),
    ("no method", f"{FIT} --method", r"--method needs a name; noiseproof methods lists them"),
    ("preset", f"{FIT} --method CleaR:fats", r"preset 'fats' of CleaR; available: default, gentle"),
    (
        "option",
        f"{FIT} --lable x",
        r"--lable'; did you mean '--label' .*\? see noiseproof fit --help$",
    ),
    ("cut option", f"{FIT} --train.epoch 3", r"option '--train\.epoch'; did you mean '--train\.ep"),
    (
        "method option",
        f"{FIT} --method.gama=1",
        r"'--method\.gama'; did you mean '--method\.gamma'",
    ),
    ("other's option", f"{FIT} --method.q 1 --method CleaR", r"unknown option '--method\.q'"),
    ("mixture", f"{FIT} --method.mixture.scop x", r"did you mean '--method\.mixture\.scope'"),
    ("command", "fti train.csv", r"unknown command 'fti'; did you mean 'fit'\? available: fit, "),
    (
        "literal choice",
        f"{FIT} --method.mixture.scope all",
        r"--method\.mixture\.scope: expected one of global, per_class, got 'all'$",
    ),
    ("choice", f"{FIT} --method.routing all", r"routing must be one of bernoulli, .*; got 'all'"),
    ("train choice", f"{FIT} --train.schedule no", r"one of linear, cosine, constant; got 'no'"),
    ("tracker", f"{FIT} --train.tracker wandbb", r"wandbb"),
    ("whole number", f"{FIT} --train.epochs 2.5", r"epochs: expected a whole number, got '2\.5'$"),
    ("number", f"{FIT} --method.gamma x", r"--method\.gamma: expected a number, got 'x'$"),
    ("number or null", f"{FIT} --sample=x", r"--sample: expected a whole number or null, got 'x'$"),
    ("boolean", f"{FIT} --merge maybe", r"--merge: expected true or false, got 'maybe'$"),
    ("list", f"{FIT} --method.target_modules q", r"expected a JSON list or null, got 'q'$"),
    ("no value", f"{FIT} --train.epochs", r"--train\.epochs needs a value: a whole number$"),
    (
        "few epochs",
        f"{FIT} --train.epochs 3",
        r"noiseproof: --train\.epochs 3 leaves no epoch after the warm-up of CleaR; give more than "
        r"3, or --method\.warmup_epochs 2$",
    ),
    ("best of none", f"{FIT} --train.select best", r"select best needs .*; give --validation, or"),
    ("unsaid", f"{FIT} --validation test.csv", r"whether .*--validation-labels must be clean"),
    ("trusted share", f"{FIT} --validation 0.2 --validation-labels clean", r"share .* are noisy"),
    ("two tables", f"{FIT} test.csv", r"unexpected argument 'test\.csv'; usage: noiseproof fit D"),
    ("short option", f"{FIT} -e", r"unexpected argument '-e'; usage: noiseproof fit DATA --out"),
    ("no table", "fit --out out", r"DATA is missing; usage: noiseproof fit DATA --out RUN"),
    ("no out", "fit train.csv", r"--out is missing; usage: noiseproof fit DATA --out RUN"),
    ("both", f"{FIT} --resume --overwrite", r"--resume continues a run, --overwrite replaces it"),
    ("no config", f"{FIT} --config none.yaml", r"cannot read config none\.yaml: No such file"),
    ("no config name", f"{FIT} --config", r"--config needs a file: YAML, TOML or JSON"),
    ("config folder", f"{FIT} --config folder", r"cannot read config folder: Is a directory"),
    ("bad yaml", f"{FIT} --config broken.yaml", r"broken\.yaml is not valid YAML: line 2: "),
    ("bad json", f"{FIT} --config broken.json", r"broken\.json is not valid JSON: .* line 1"),
    ("bad toml", f"{FIT} --config broken.toml", r"broken\.toml is not valid TOML: "),
    ("list config", f"{FIT} --config list.yaml", r"list\.yaml must hold names and .*, got list"),
    ("no settings", f"{FIT} --config nothing.yaml", r"nothing\.yaml must hold names and values"),
    ("config key", f"{FIT} --config unknown.yaml", r"unknown\.yaml: .*'lable'; did you .*'label'"),
    ("nested key", f"{FIT} --config nested.toml", r"nested\.toml: unknown setting 'train\.epoch'"),
    ("deep key", f"{FIT} --config mixture.json", r"mixture\.json: .*'method\.mixture\.scop'; did"),
    ("flat key", f"{FIT} --config flat.yaml", r"flat\.yaml: unknown setting 'train'"),
    ("odd key", f"{FIT} --config dated.yaml", r"dated\.yaml: unknown setting '1'"),
    (
        "config type",
        f"{FIT} --config typed.yaml",
        r"config typed\.yaml: train\.epochs: expected a whole .*'many'$",
    ),
    (
        "config and word",
        f"{FIT} --config typed.yaml --train.epochs -4",
        r"noiseproof: --train\.epochs must be at least 1, got -4",
    ),
    ("group left out", f"{FIT} --seed 3", r"option '--seed'; did you mean --train\.seed\?$"),
    (
        "two groups",
        f"{FIT} --learning-rate 3",
        r"did you mean --method\.learning_rate or --train\.learning_rate\?$",
    ),
    ("of the method", f"{FIT} --method.gamma 7", r"--method\.gamma must lie in \(0, 1\], got 7"),
    ("no adapter", f"{FIT} --method.peft lorra", r"unknown tuning 'lorra'; did you mean 'lora'"),
    ("config method", f"{FIT} --config method.yaml", r"method 'Clear'; did you mean 'CleaR'"),
]
OTHER = [
    ("no run", "predict none test.csv --out o.csv", r"none is not a run: record\.json is missing"),
    ("no run folder", "predict MODEL test.csv --out o.csv", r"is not a run: .*fit --out"),
    ("existing output", "predict DONE test.csv --out taken.csv", r"taken\.csv exists; choose ano"),
    ("output folder", "predict DONE test.csv --out folder", r"unsupported suffix ''; supported"),
    ("output suffix", "predict DONE test.csv --out o.xlsx", r"suffix '\.xlsx'; supported: \.csv"),
    (
        "not its rows",
        "predict DONE test.csv --out o.csv --features a,b",
        r"--features is nothing that rows of task 'text' have; leave it out",
    ),
    (
        "not its model",
        "predict DONE test.csv --out o.csv --max-new-tokens 9",
        r"--max-new-tokens is nothing that rows",
    ),
    (
        "no splits",
        "predict DONE test.csv --out o.csv --split tset",
        r"--split tset: test\.csv is a file of rows, which has no splits; leave --split out",
    ),
    ("far output", "predict DONE test.csv --out no/o.csv", r"the folder no does not exist"),
    ("new rows", "predict DONE tst.csv --out o.csv", r"tst\.csv does not exist; .*'test\.csv'"),
    ("column there", "predict DONE predicted.csv --out o.csv", r"'predicted_label' already; ren"),
    ("other text", "predict DONE test.csv --text txet --out o.csv", r"no column 'txet' .*'text'"),
    ("no new rows", "predict DONE", r"DATA and --out are missing; usage: noiseproof predict RUN"),
    ("nothing to do", f"{CORRUPT} --noise none", r"'none': nothing to do; give for example sym"),
    ("noise missing", CORRUPT, r"--noise is missing; usage: noiseproof corrupt DATA --noise SPEC"),
    ("bad noise", f"{CORRUPT} --noise symmetric:2", r"must lie in \[0, 1\], got 2"),
    ("bad seed", f"{CORRUPT} --noise symmetric:.4 --seed -1", r"seed must lie in .*, got -1"),
    ("label", f"{CORRUPT} --noise symmetric:.4 --label lable", r"no column 'lable' .*'label'"),
    ("clean there", f"{CORRUPT} --noise symmetric:.4 --clean-label context", r"'context' already"),
    ("same column", f"{CORRUPT} --noise symmetric:.4 --clean-label label", r"'label' already"),
    ("pool", f"{CORRUPT} --noise openset:.4", r"inputs; give --noise-pool, a file of"),
    ("pair", f"{CORRUPT} --noise pairflip:.4,pairs=0>9", r"no class 9; classes: 0=garden, 1=ha"),
    (
        "no truth",
        "audit train.csv --model MODEL --out o.csv --transition-out m.json",
        r"--transition-out needs the true labels; give --clean-label$",
    ),
    (
        "audited label",
        "audit train.csv --model MODEL --out o.csv --clean-label label",
        r"--clean-label label is the column of the given labels too; name .*, or leave "
        r"--clean-label out$",
    ),
    (
        "neighbours",
        "audit train.csv --out o.csv --neighbours 0",
        r": --neighbours must be at least",
    ),
    (
        "matrix there",
        f"{CORRUPT} --noise symmetric:.4 --transition-out matrix.json",
        r"matrix\.json exists; choose another --transition-out or give --overwrite",
    ),
    (
        "far matrix",
        f"{CORRUPT} --noise symmetric:.4 --transition-out no/m.json",
        r"cannot write no/m\.json: the folder no does not exist",
    ),
    (
        "matrix suffix",
        f"{CORRUPT} --noise symmetric:.4 --transition-out m.txt",
        r"--transition-out: expected the name of a \.json file, got 'm\.txt'",
    ),
    ("table there", "corrupt train.csv --noise symmetric:.4 --out taken.csv", r"taken\.csv exists"),
    ("no method", "methods Clear", r"method 'Clear'; did you mean 'CleaR'\? available: CleaR, "),
    ("two methods", "methods CleaR ELR", r"unexpected argument 'ELR'; usage: noiseproof methods"),
    ("methods option", "methods --all", r"unknown option '--all'; available: --help$"),
    ("demo", "demo 3", r"unexpected argument '3'; usage: noiseproof demo \[--out FOLDER\]"),
]


@pytest.fixture
def mistaken(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, bytes | None]:
    """A folder full of bad files as working directory; what is in it."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in ("train.csv", "test.csv"):
        shutil.copy(place.folder / name, tmp_path)
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": [1.0, float("nan"), 0.0]})
    frame.to_parquet(tmp_path / "nan.parquet")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return contents(tmp_path)


def refused(command: str, place: Place, done: Path | None, message: str) -> None:
    """The command leaves the one line that is expected."""
    words = command.replace("MODEL", str(place.model)).replace("DONE", str(done))
    line = complaint(*shlex.split(words))
    assert re.search(message, line), line
    assert "jsonargparse" not in line and "typing." not in line and "<class" not in line


@pytest.mark.parametrize(
    ("command", "message"), [pytest.param(*case[1:], id=case[0]) for case in SETTING]
)
def test_a_setting_that_is_wrong_is_told_before_anything_is_written(
    command: str, message: str, place: Place, mistaken: dict[str, bytes | None]
) -> None:
    refused(command, place, None, message)
    assert contents(Path()) == mistaken


@pytest.mark.parametrize(
    ("command", "message"), [pytest.param(*case[1:], id=case[0]) for case in OTHER]
)
def test_other_commands_tell_a_mistake_and_write_nothing(
    command: str, message: str, place: Place, done: Path, mistaken: dict[str, bytes | None]
) -> None:
    refused(command, place, done, message)
    assert contents(Path()) == mistaken


@pytest.mark.parametrize(
    ("command", "message"), [pytest.param(*case[1:], id=case[0]) for case in READING]
)
def test_data_or_a_model_that_cannot_be_used_are_told_with_their_row(
    command: str, message: str, place: Place, mistaken: dict[str, bytes | None]
) -> None:
    refused(command, place, None, message)
    left = contents(Path())
    assert left.pop("out", None) is None  # at most an empty folder: it stops no second attempt
    assert left == mistaken


def test_after_a_mistake_the_corrected_command_works(
    place: Place, mistaken: dict[str, bytes | None]
) -> None:
    """A failed attempt must not occupy its --out."""
    command = [*shlex.split(FIT.replace("MODEL", str(place.model))), *QUICK]
    complaint(*command, "--test", "unseen.csv")
    works(*command, "--test", "test.csv")
    assert RunRecord.read(Path("out")).status == "done"


def test_data_that_cannot_be_used_do_not_cost_the_old_run(place: Place, tmp_path: Path) -> None:
    """With --overwrite a typing mistake would delete a finished run."""
    run = place.fit("runs/kept")
    before = contents(run)
    complaint("fit", tmp_path / "none.csv", "--model", place.model, "--out", run, "--overwrite")
    assert contents(run) == before


def test_a_folder_without_permission_is_refused(place: Place, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o555)
    words = ("fit", place.folder / "train.csv", "--out", tmp_path / "run")
    assert "cannot write to" in complaint(*words)
    tmp_path.chmod(0o755)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_name_without_network_fails_at_once(done: Path, place: Place) -> None:
    """A client that retries would let the user wait for minutes."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    start = time.perf_counter()
    line = complaint(
        "fit", place.folder / "train.csv", "--model", "someone/no-such-model",
        "--out", place.folder / "runs" / "hub",
    )  # fmt: skip
    assert time.perf_counter() - start < 5
    assert "cannot load model 'someone/no-such-model': " in line


@pytest.mark.parametrize("nothing", ["null", "None"])
def test_a_setting_can_be_taken_back_with_null(asked: list[Job], nothing: str) -> None:
    """The help speaks of None, as Python does."""
    words = ("fit", "t.csv", "--out", "r", "--train.learning_rate", "0.1", "--sample", "5")
    call(*words, "--train.learning_rate", nothing, f"--sample={nothing}", "--drop-label", "None")
    assert (asked[0].train.learning_rate, asked[0].sample) == (None, None)
    assert asked[0].drop_label == "None"  # a text may be this word
