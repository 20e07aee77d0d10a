"""Peers: the same rows and noise as our methods, a record of the same shape, their own training."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

from noiseproof.checkpoint import Interrupted
from noiseproof.errors import InputError
from noiseproof.finetune import run_job
from noiseproof.job import Job
from noiseproof.methods.baselines import CrossEntropy
from noiseproof.peers import (
    PEERS,
    CleanlabProbe,
    CleanlabPrune,
    Fitted,
    Peer,
    Trainer,
    TrainerLabelSmoothing,
    TrainerLoRA,
    Work,
    contract,
    find_peer,
    run_peer,
)
from noiseproof.peers.trainer import _Rows
from noiseproof.prediction import load
from noiseproof.preparation import Prepared
from noiseproof.record import RunRecord
from tiny import table, train_settings

ROWS = 60
QUICK: tuple[Peer, ...] = tuple(peer() for peer in PEERS.values())
NETWORKS = (Trainer(), TrainerLabelSmoothing(), TrainerLoRA(), CleanlabPrune())
MakeJob = Callable[..., Job]


def job_maker(model: Path) -> MakeJob:
    """Makes jobs with noise and test rows; what is given goes on top."""

    def make(**changes: Any) -> Job:
        train = train_settings(**({"learning_rate": None, "epochs": 2} | changes.pop("train", {})))
        values: dict[str, Any] = {
            "data": table(ROWS, seed=3).drop(columns="clean_label"),
            "test": table(18, seed=4),
            "noise": "symmetric:0.3",
            "model": str(model),
            "method": CrossEntropy(),
        }
        return Job(train=train, **(values | changes))

    return make


@pytest.fixture
def job(tiny_model: Path) -> MakeJob:
    return job_maker(tiny_model)


def without_clock(record: RunRecord) -> dict[str, Any]:
    """A record without what differs between two equal runs."""
    values = dataclasses.asdict(record)
    del values["timings"], values["peak_memory_mb"]
    return values


def key_tree(values: Any) -> Any:
    """The keys of nested dicts."""
    return {key: key_tree(value) for key, value in values.items()} if type(values) is dict else None


# --- the same job --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    folder = tmp_path_factory.mktemp("ours") / "run"
    return run_job(job_maker(tiny_model)(), out=folder).record, folder


@pytest.mark.parametrize("peer", QUICK, ids=lambda peer: peer.name)
def test_a_peer_has_the_rows_the_noise_and_the_record_of_our_methods(
    peer: Peer, job: MakeJob, ours: tuple[RunRecord, Path], tmp_path: Path
) -> None:
    """Else the table compares data sets, and the report shows holes."""
    own, own_folder = ours
    record = run_peer(job(), peer, out=tmp_path / "run", labels={"method": peer.name})
    assert record == RunRecord.read(tmp_path / "run") and record.status == "done"
    for name in ("data", "noise", "seeds"):
        assert getattr(record, name) == getattr(own, name)
    assert record.noise["noise_rate"] > 0.1
    assert record.spec == own.spec | {"method": peer.to_dict()} and record.id != own.id
    assert record.labels == {"method": peer.name}
    found, wanted = (key_tree(dataclasses.asdict(one)) for one in (record, own))
    for values in (found, wanted):
        del values["spec"], values["labels"]
    del wanted["timings"]["stage_train_s"]  # a peer has no stages of ours
    assert set(found.pop("versions")) - set(wanted.pop("versions")) == set(peer.needs)
    assert found == wanted
    history, own_history = (pd.read_csv(f / "history.csv") for f in (tmp_path / "run", own_folder))
    shared = [name for name in history if not name.startswith("selection_")]  # of those who select
    assert shared == list(own_history)
    assert len(history) == (1 if peer.name == "CleanlabProbe" else 2)
    assert record.metrics["test_accuracy"] == history["test_accuracy"].iloc[-1]
    samples, own_samples = (
        pd.read_parquet(f / "samples.parquet") for f in (tmp_path / "run", own_folder)
    )
    assert set(samples) - {"keep"} == set(own_samples)
    for name in ("row_id", "label", "clean_label"):
        assert samples[name].tolist() == own_samples[name].tolist()
    assert record.metrics["suspicious"] == samples["suspicious"].sum()
    suspects = pd.read_csv(tmp_path / "run/suspects.csv")
    assert len(suspects) == record.metrics["suspicious"]
    files = {path.name for path in (tmp_path / "run").iterdir()}
    network = peer.name != "CleanlabProbe"
    assert files == {path.name for path in own_folder.iterdir()} - (set() if network else {"model"})
    timings = record.timings
    assert sum(timings[name] for name in ("train_s", "score_s", "eval_s")) <= timings["total_s"]
    assert timings["train_s"] > 0 and timings["eval_s"] > 0
    json.dumps(peer.to_dict())


@pytest.mark.parametrize(
    "peer", [Trainer(), CleanlabProbe(), CleanlabPrune()], ids=lambda p: p.name
)
def test_a_seed_makes_a_run_and_another_seed_another(
    peer: Peer, job: MakeJob, tmp_path: Path
) -> None:
    """Without the first no cell can be repeated; without the second five seeds are one."""
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # what the caller drew before is no part of the run
        np.random.seed(number)
        changes = job(noise_seed=1, train={"order_seed": seed})
        runs.append(run_peer(changes, peer, out=tmp_path / str(number)))
    assert without_clock(runs[0]) == without_clock(runs[1])
    tables = [pd.read_parquet(tmp_path / str(number) / "samples.parquet") for number in range(3)]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert tables[0]["label"].tolist() == tables[2]["label"].tolist()
    assert tables[0]["clean_prob"].tolist() != tables[2]["clean_prob"].tolist()


def test_the_initial_weights_follow_their_own_seed(job: MakeJob, tmp_path: Path) -> None:
    runs = [
        run_peer(job(noise_seed=1, train={"init_seed": seed}), TrainerLoRA(), out=tmp_path / name)
        for name, seed in (("a", 5), ("b", 6))
    ]
    assert runs[0].metrics["test_nll"] != runs[1].metrics["test_nll"]


def test_a_peer_leaves_our_runs_and_the_random_state_as_they_were(
    job: MakeJob, tmp_path: Path
) -> None:
    """A grid runs both in one process; the libraries seed everything and keep global state."""
    before = run_job(job(), out=tmp_path / "before").record
    torch.manual_seed(3)
    np.random.seed(3)
    wanted = torch.rand(()).item(), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    run_peer(job(), CleanlabPrune(), out=tmp_path / "peer")
    assert (torch.rand(()).item(), np.random.rand()) == wanted
    after = run_job(job(), out=tmp_path / "after").record
    assert without_clock(before) == without_clock(after)


def test_the_truth_is_measured_with_and_never_trained_with(job: MakeJob, tmp_path: Path) -> None:
    """The same given labels with and without the true ones: the same model, fewer metrics."""
    noisy = table(ROWS, wrong=0.3, seed=3)
    changes: dict[str, Any] = {"noise": "none", "data": noisy}
    for peer in (TrainerLoRA(), CleanlabProbe()):
        with_truth = run_peer(
            job(clean_label="clean_label", **changes), peer, out=tmp_path / f"{peer.name}-known"
        )
        without = run_peer(job(**changes), peer, out=tmp_path / f"{peer.name}-unknown")
        assert with_truth.metrics["test_nll"] == without.metrics["test_nll"]
        assert with_truth.metrics["suspicious"] == without.metrics["suspicious"]
        lost = {*("memorization", "clean_fit", "recovery"), "detection_auroc", "detection_ap"}
        lost |= {"detection_precision", "detection_recall", "detection_auroc_by_class"}
        lost |= {"clean_prob_ece", "clean_prob_purity", "clean_prob_recall"}
        lost |= {"train_loss_noisy", "train_loss_clean"}
        assert set(with_truth.metrics) - set(without.metrics) == lost and not without.curves


def test_what_a_peer_is_given_holds_no_true_labels(job: MakeJob, tmp_path: Path) -> None:
    seen: list[Work] = []

    @dataclasses.dataclass(frozen=True)
    class Spy(Peer):
        def fit(self, work: Work) -> Fitted:
            seen.append(work)
            raise ValueError("seen")

    prepared = Prepared(job())
    with pytest.raises(ValueError, match="seen"):
        run_peer(job(), Spy(), out=tmp_path / "run")
    clean = prepared.data.clean_labels
    assert clean is not None and (clean != prepared.data.labels).any()
    assert seen[0].labels.tolist() == prepared.data.labels.tolist()
    for item in dataclasses.fields(Work):
        value = getattr(seen[0], item.name)
        assert not (isinstance(value, np.ndarray) and np.array_equal(value, clean))


# --- how they train ------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", NETWORKS, ids=lambda peer: peer.name)
def test_the_saved_model_is_the_measured_one(peer: Peer, job: MakeJob, tmp_path: Path) -> None:
    record = run_peer(job(), peer, out=tmp_path / "run")
    test = table(18, seed=4)
    predicted = load(tmp_path / "run").predict(test["text"].tolist())
    hit = np.array(predicted) == test["label"].to_numpy()
    assert record.metrics["test_accuracy"] == pytest.approx(hit.mean())


def test_the_trainer_learns_and_lora_trains_adapters_alone(job: MakeJob, tmp_path: Path) -> None:
    longer = job(noise="none", train={"epochs": 20, "learning_rate": 2e-3})
    full = run_peer(longer, Trainer(), out=tmp_path / "full")
    lora = run_peer(longer, TrainerLoRA(rank=2), out=tmp_path / "lora")
    assert full.metrics["test_accuracy"] > 0.9
    assert full.model["trained_parameters"] == full.model["parameters"]
    adapters = 2 * 2 * (2 * 32 + 32 * 2)  # layers x (query, value) x (A + B), width 32
    assert lora.model["trained_parameters"] == adapters + 32 * 3 + 3


def test_the_trainer_gets_the_tokens_that_our_methods_get(job: MakeJob) -> None:
    """Pairs of texts included: padded by the library, the batch is the one of our loop."""
    import transformers

    prepared = Prepared(job(text="text,context"))
    rows = np.array([7, 2, 30])
    collate = transformers.DataCollatorWithPadding(prepared.task.tokenizer)
    chosen = _Rows(prepared.encoded, prepared.data.labels, rows)
    batch = collate([chosen[place] for place in range(len(chosen))])
    assert batch.pop("labels").tolist() == prepared.data.labels[rows].tolist()
    wanted = prepared.encoded.inputs(rows)
    assert set(batch) == set(wanted) >= {"input_ids", "token_type_ids", "attention_mask"}
    for name, values in wanted.items():
        assert torch.equal(batch[name], values), name


def test_settings_of_job_and_peer_reach_the_library(job: MakeJob, tmp_path: Path) -> None:
    """An ignored setting would be a row of the table that says what was not run."""
    nll = {
        name: run_peer(job(train=train), peer, out=tmp_path / name).metrics["test_nll"]
        for name, peer, train in (
            ("plain", Trainer(), {}),
            ("smooth", TrainerLabelSmoothing(), {}),
            ("unsmooth", TrainerLabelSmoothing(smoothing=0.0), {}),
            ("rate", Trainer(learning_rate=1e-3), {}),
            ("job-rate", Trainer(), {"learning_rate": 1e-3}),
            ("micro", Trainer(), {"micro_batch_size": 4}),
            ("batch", Trainer(), {"batch_size": 4}),
        )
    }
    assert nll["smooth"] != nll["plain"] == nll["unsmooth"]
    assert nll["plain"] != nll["rate"] == nll["job-rate"]
    assert nll["plain"] == pytest.approx(nll["micro"], abs=0.02)  # other dropout masks
    assert nll["plain"] != nll["batch"]
    steps = {n: pd.read_csv(tmp_path / n / "history.csv")["steps"].tolist() for n in nll}
    assert steps["plain"] == steps["micro"] == [8, 8] and steps["batch"] == [15, 15]


def test_evaluating_at_the_end_alone_changes_no_result(job: MakeJob, tmp_path: Path) -> None:
    """Measuring must not disturb training: dropout and order are drawn from one state."""
    every = run_peer(job(), TrainerLoRA(), out=tmp_path / "every")
    end = run_peer(job(train={"evaluate": "end"}), TrainerLoRA(), out=tmp_path / "end")
    assert every.metrics["test_nll"] == end.metrics["test_nll"]
    history = pd.read_csv(tmp_path / "end/history.csv")
    assert history["test_accuracy"].isna().tolist() == [True, False]


def test_a_peer_is_quiet_and_writes_into_its_folder_alone(
    job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for peer in (TrainerLoRA(), CleanlabProbe()):
        run_peer(job(), peer, out=tmp_path / peer.name)
    assert not list((tmp_path / "work").iterdir())
    assert capfd.readouterr() == ("", "")


# --- cleanlab ------------------------------------------------------------------------------------


@pytest.fixture
def separable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen features that tell the class, and no network behind them."""

    def features(model: Any, encoded: Any, settings: Any) -> np.ndarray:
        random = np.random.default_rng(0)
        classes = np.arange(len(encoded)) % 3  # the classes of the table take turns
        return np.eye(3)[classes] * 3 + random.normal(size=(len(encoded), 3)) * 0.3

    monkeypatch.setattr("noiseproof.peers.contract.frozen_features", features)


@pytest.mark.usefixtures("separable")
@pytest.mark.parametrize("peer", [CleanlabProbe(), CleanlabPrune()], ids=lambda peer: peer.name)
def test_cleanlab_finds_planted_wrong_labels(peer: Peer, job: MakeJob, tmp_path: Path) -> None:
    record = run_peer(job(train={"epochs": 1}), peer, out=tmp_path / "run")
    assert record.metrics["detection_auroc"] > 0.9
    assert record.metrics["detection_precision"] > 0.9
    assert record.metrics["detection_recall"] > 0.9
    if peer.name == "CleanlabProbe":
        assert record.metrics["test_accuracy"] == 1
        assert record.metrics["memorization"] == 0 and record.metrics["clean_fit"] == 1
    samples = pd.read_parquet(tmp_path / "run/samples.parquet")
    assert samples["suspicious"].tolist() == (~samples["keep"]).tolist()
    assert ((samples["clean_prob"] >= 0) & (samples["clean_prob"] <= 1)).all()
    np.testing.assert_allclose(samples["loss"], -np.log(samples["clean_prob"]), atol=1e-5)


@pytest.mark.usefixtures("separable")
def test_the_issues_are_those_that_cleanlab_names(job: MakeJob, tmp_path: Path) -> None:
    """Against the library itself, called by hand."""
    from cleanlab.classification import CleanLearning
    from sklearn.linear_model import LogisticRegression

    record = run_peer(job(train={"epochs": 1}), CleanlabProbe(), out=tmp_path / "run")
    prepared = Prepared(job())
    features = contract.frozen_features(None, prepared.encoded, None)
    learner = CleanLearning(LogisticRegression(max_iter=1000), seed=0)
    learner.find_label_issues_kwargs = {"n_jobs": 1}
    issues = learner.find_label_issues(features, prepared.data.labels)
    samples = pd.read_parquet(tmp_path / "run/samples.parquet")
    assert samples["suspicious"].tolist() == issues["is_label_issue"].tolist()
    np.testing.assert_allclose(samples["clean_prob"], issues["label_quality"], rtol=1e-6)
    assert record.metrics["suspicious"] == issues["is_label_issue"].sum() > 0


@pytest.mark.usefixtures("separable")
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_pruned_rows_do_not_train(
    tune: str, job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read off the rows that the Trainer asks for."""
    asked: list[int] = []

    def spied(self: Any, place: int) -> dict[str, Any]:
        asked.append(int(self.rows[place]))
        return original(self, place)

    original = _Rows.__getitem__
    monkeypatch.setattr(_Rows, "__getitem__", spied)
    run_peer(job(), CleanlabPrune(tune=tune), out=tmp_path / "run")
    samples = pd.read_parquet(tmp_path / "run/samples.parquet")
    kept = np.flatnonzero(~samples["suspicious"])
    assert 0 < len(kept) < ROWS
    assert sorted(asked) == sorted([*kept, *kept])  # two epochs
    history = pd.read_csv(tmp_path / "run/history.csv")
    assert history["rows"].tolist() == [len(kept)] * 2


def test_a_class_without_rows_gets_no_probability(job: MakeJob, tmp_path: Path) -> None:
    """Class names from a file may name more classes than the labels use; cleanlab wants 0..K-1."""
    names = tmp_path / "names.json"
    names.write_text('["garden", "nowhere", "harbour", "kitchen"]')
    changes: dict[str, Any] = {"noise": "none", "data": table(ROWS, wrong=0.2, seed=3)}
    for peer in (CleanlabProbe(), CleanlabPrune()):
        record = run_peer(job(label_names=str(names), **changes), peer, out=tmp_path / peer.name)
        assert record.data["classes"] == 4 and np.isfinite(record.metrics["test_nll"])


def test_without_cleanlab_the_message_says_how_to_install_it(
    job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cleanlab"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(InputError, match=r"CleanlabProbe needs cleanlab.*noiseproof\[peers\]"):
        run_peer(job(), CleanlabProbe(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Trainer().check_installed()


# --- what goes wrong -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Broken(Peer):
    """A peer whose library fails, or is interrupted, half-way."""

    interrupted: bool = False
    needs: ClassVar[tuple[str, ...]] = ()

    def fit(self, work: Work) -> Fitted:
        if self.interrupted:
            signal.raise_signal(signal.SIGTERM)
            work.check_stop()
        work.scratch.mkdir()
        raise RuntimeError("the library\n  gave up")


def test_a_failing_peer_is_recorded_and_raised(job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gave up"):
        run_peer(job(), Broken(), out=tmp_path / "run")
    record = RunRecord.read(tmp_path / "run")
    assert record.status == "failed" and record.error == "the library gave up"
    assert record.data["rows"] == ROWS and record.timings["total_s"] > 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["record.json"]


def test_a_signal_is_recorded_and_raised(job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_peer(job(), Broken(interrupted=True), out=tmp_path / "run")
    assert RunRecord.read(tmp_path / "run").status == "interrupted"


def test_a_signal_stops_the_trainer_after_its_step(
    job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(self: Any, place: int) -> dict[str, Any]:
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(_Rows, "__getitem__", original)
        return original(self, place)

    original = _Rows.__getitem__
    monkeypatch.setattr(_Rows, "__getitem__", signalled)
    with pytest.raises(Interrupted):
        run_peer(job(train={"epochs": 50}), Trainer(), out=tmp_path / "run")
    assert RunRecord.read(tmp_path / "run").status == "interrupted"


def test_nothing_is_overwritten_unasked(job: MakeJob, tmp_path: Path) -> None:
    first = run_peer(job(), CleanlabProbe(), out=tmp_path / "run")
    with pytest.raises(InputError, match="overwrite"):
        run_peer(job(), Trainer(), out=tmp_path / "run")
    assert RunRecord.read(tmp_path / "run") == first
    second = run_peer(job(), CleanlabProbe(folds=3), out=tmp_path / "run", overwrite=True)
    assert RunRecord.read(tmp_path / "run") == second != first


def test_a_micro_batch_must_divide_the_batch(job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="micro_batch_size that divides"):
        run_peer(job(train={"micro_batch_size": 3}), Trainer(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_that_are_refused_leave_no_folder(job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'absent'"):
        run_peer(dataclasses.replace(job(), label="absent"), Trainer(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_peers_refuse_several_processes(
    job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        run_peer(job(), Trainer(), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trainer(learning_rate=0), r"Trainer\.learning_rate"),
        (lambda: TrainerLabelSmoothing(smoothing=1), r"TrainerLabelSmoothing\.smoothing"),
        (lambda: TrainerLoRA(rank=0), r"TrainerLoRA\.rank"),
        (lambda: TrainerLoRA(alpha=0), r"TrainerLoRA\.alpha"),
        (lambda: CleanlabProbe(folds=1), r"CleanlabProbe\.folds"),
        (lambda: CleanlabProbe(max_iter=0), r"CleanlabProbe\.max_iter"),
        (lambda: CleanlabPrune(tune="head"), "lora or full"),
        (lambda: CleanlabPrune(learning_rate=-1), "learning_rate"),
    ],
)
def test_settings_are_checked_where_they_stand(make: Callable[[], Peer], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_an_unknown_peer_gets_the_nearest_name() -> None:
    assert find_peer("TrainerLoRA") is TrainerLoRA
    with pytest.raises(InputError, match="did you mean 'TrainerLoRA'"):
        find_peer("TrainerLora")


@pytest.mark.parametrize("peer", [TrainerLoRA(), Trainer()], ids=lambda peer: peer.name)
def test_the_best_epoch_by_validation_is_deployed(
    peer: Peer, job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for our methods; the weights, the metrics and the saved model are all of that epoch."""
    changes = {"epochs": 5, "learning_rate": 2e-3}
    last = run_peer(job(validation=0.2, train=changes), peer, out=tmp_path / "last")
    scores = [0.3, 0.5, 0.5, 0.4, 0.1]  # the second epoch is the best, the third as good
    measured = contract.set_metrics

    def told(prepared: Any, logits: Any) -> dict[str, float]:
        return measured(prepared, logits) | {"validation_accuracy": scores.pop(0)}

    monkeypatch.setattr(contract, "set_metrics", told)
    changes["select"] = "best"
    best = run_peer(job(validation=0.2, train=changes), peer, out=tmp_path / "best")
    history = [pd.read_csv(tmp_path / name / "history.csv") for name in ("last", "best")]
    assert history[0]["loss"].tolist() == history[1]["loss"].tolist()
    assert best.metrics["validation_accuracy"] == 0.5
    for name in ("test_accuracy", "test_macro_f1", "memorization", "clean_fit"):
        wanted = history[1][name][1]
        assert best.metrics[name] == pytest.approx(wanted), name
    assert best.metrics["test_nll"] != last.metrics["test_nll"]
    test = table(18, seed=4)
    predicted = load(tmp_path / "best").predict(test["text"].tolist())
    hit = np.array(predicted) == test["label"].to_numpy()
    assert best.metrics["test_accuracy"] == pytest.approx(hit.mean())
    samples = pd.read_parquet(tmp_path / "best/samples.parquet")
    wrong = samples["label"] != samples["clean_label"]
    memorized = (samples["suggested_label"] == samples["label"])[wrong].mean()
    assert best.metrics["memorization"] == pytest.approx(memorized)


def test_validation_rows_are_measured(job: MakeJob, tmp_path: Path) -> None:
    record = run_peer(job(validation=0.2), TrainerLoRA(), out=tmp_path / "run")
    assert record.data["validation_rows"] == 12
    history = pd.read_csv(tmp_path / "run/history.csv")
    assert record.metrics["validation_accuracy"] == history["validation_accuracy"].iloc[-1]


def test_the_documentation_names_every_peer_and_setting() -> None:
    """The page says whose every setting is; one that it does not name is nobody's."""
    page = (Path(__file__).resolve().parents[1] / "docs/peers.md").read_text(encoding="utf-8")
    sections = {part.split("\n")[0]: part for part in page.split("\n## ")}
    for name, peer in PEERS.items():
        for item in dataclasses.fields(peer):
            assert f"`{item.name}`" in sections[name], (name, item.name)
