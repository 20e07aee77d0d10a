"""Language models on prompts with responses: encoding, answers, runs from beginning to end."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import noiseproof
from decoders import CONFIGS, chat_rows, decoder_rows, language_model, tokenizer_of_words
from noiseproof.cli import main
from noiseproof.engine import TrainSettings
from noiseproof.errors import InputError
from noiseproof.job import Job
from noiseproof.methods import METHODS, CleaR, CrossEntropy, SmallLoss
from noiseproof.mixture import LossMixture
from noiseproof.prediction import Predictor, predict_logits
from noiseproof.tasks import RowSettings
from noiseproof.tasks.causal import CausalLM, find_answer, same_answer
from noiseproof.tasks.dialogues import Dialogues
from noiseproof.tasks.language import generate, load_language_model
from tiny import last_json, python, same_weights, train_settings

LORA = CrossEntropy(tune="lora")
SMALL = LossMixture(min_samples=4, min_gap=0.0)


def fit(data: Any = None, family: str = "llama", **settings: Any) -> noiseproof.FitResult:
    """A run of seconds on tiny rows."""
    given = {"method": LORA, "train": train_settings(epochs=2), "task": "causal-lm"} | settings
    rows = decoder_rows() if data is None else data
    return noiseproof.fit(rows, model=language_model(family), **given)


def task_of(family: str = "llama", **settings: Any) -> tuple[CausalLM, torch.nn.Module]:
    """A tiny model in eval mode with its task."""
    row_settings = RowSettings(**settings)
    task, model = CausalLM.load(language_model(family), None, row_settings)  # type: ignore[arg-type]
    return task, model.eval()


# --- encoding ------------------------------------------------------------------------------------


def test_a_row_is_its_prompt_in_the_template_then_the_response_and_the_end() -> None:
    task, _ = task_of(template="which place : {prompt}")
    encoded = task.encode(task.inputs_of(["rose ?"], ["garden ."]))
    words = task.tokenizer.convert_ids_to_tokens
    assert words(encoded.prompts[0].tolist()) == ["<s>", "which", "place", ":", "rose", "?"]
    assert words(encoded.responses[0].tolist()) == ["garden", ".", "</s>"]


def test_messages_are_written_in_the_template_of_the_tokenizer() -> None:
    task, _ = task_of()
    turns = chat_rows(2)[1]
    encoded = task.encode(task.inputs_of([turns[:-1]], [turns[-1]["content"]]))
    prompt, response = task.tokenizer.batch_decode([encoded.prompts[0], encoded.responses[0]])
    assert prompt.split()[:3] == ["<turn>", "system", ":"] and prompt.split()[-1] == ":"
    assert response == turns[-1]["content"] + " </s>"
    whole = task.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert [*encoded.prompts[0], *encoded.responses[0]] == list(whole)


def test_long_rows_lose_the_end_of_their_response_and_say_so() -> None:
    task, model = task_of(max_length=5)
    rows = task.inputs_of(["rose ?", "rose soil leaf ?"], ["garden . garden .", "garden ."])
    with pytest.warns(UserWarning, match="1 of 2 rows have no response token within 5 tokens"):
        encoded = task.encode(rows)
    assert [len(response) for response in encoded.responses] == [2, 0]
    assert predict_logits(model, encoded, train_settings())[:, 1].tolist() == [2, 0]
    with pytest.raises(InputError, match="no row has a response token within 5 tokens"):
        task.encode(rows.take(np.array([1])))


# --- answering -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_prompts_are_answered_together_as_each_alone(family: str) -> None:
    """Padding on the left must not change what is written."""
    task, model = task_of(family, max_new_tokens=8)
    prompts = decoder_rows(9)["text"]
    together = task.respond(model, task.inputs_of(prompts))
    alone = [task.respond(model, task.inputs_of([prompt]))[0] for prompt in prompts]
    assert together == alone and len(set(together)) > 1


def test_learned_prompts_stand_right_before_the_rows_when_answering() -> None:
    """Pads between them and a row would shift what the row reads."""
    predictor = fit(method=CrossEntropy(tune="prompt_tuning"), max_new_tokens=6).predictor
    prompts = decoder_rows(9, seed=3)["text"]
    assert predictor.predict(prompts) == [predictor.predict([one])[0] for one in prompts]


def test_a_response_ends_where_the_positions_of_the_model_do() -> None:
    model, tokenizer = load_language_model(language_model("gpt"))
    tokenizer.model_max_length = 12
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    prompts = [[5, 6, 7], [5] * 10, [5] * 12]
    with pytest.warns(UserWarning, match="1 prompts fill all 12 positions"):
        answers = generate(model, tokenizer, prompts, 20)
    lengths = [len(tokenizer(text)["input_ids"]) - 1 for text in answers]  # without a start token
    assert lengths == [9, 2, 0]


@pytest.mark.parametrize(("how", "best"), [("mean", 1), ("sum", 0)])
def test_choices_compare_by_the_mean_or_the_sum_of_their_tokens(how: str, best: int) -> None:
    """The short one has the higher sum, the long one the higher mean."""
    task, model = task_of(choice_score=how)
    rows = Dialogues(["rose ?"], None, choices=(("rose", "rose rose rose rose"),), answers=("0",))
    sums = [-2.0, -3.0]  # log-likelihoods of 2 and 5 tokens, the end included

    def outputs_of(encoded: Any) -> torch.Tensor:
        assert encoded.lengths.tolist() == [6, 9]
        return torch.tensor([[-sums[0], 2, 0], [-sums[1], 5, 0]])

    examples = noiseproof.read_examples({"text": ["a", "b"], "label": ["x", "y"]}, text="text",
                                        label="label")  # fmt: skip
    examples = examples.__class__(["0"], rows, np.array([0]), None, ("response",))
    found = task.answer_metrics(model, examples, outputs_of)
    assert found == {"choice_accuracy": float(best == 0)}


@torch.no_grad()
def test_choices_are_scored_by_the_model_as_a_loop_would() -> None:
    task, model = task_of(choice_score="sum")
    choices = ("garden .", "it is the harbour .")
    rows = Dialogues(["rose ?"], None, choices=(choices,), answers=("0",))
    scores = task._choice_scores(
        rows, (choices,), lambda rows: predict_logits(model, rows, train_settings())
    )[0]
    prompt = task.tokenizer("rose ?\n")["input_ids"]
    for choice, score in zip(choices, scores, strict=True):
        ids = task.tokenizer(choice, add_special_tokens=False)["input_ids"] + [2]
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(dim=1)
        places = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(ids))
        assert float(logits[places, torch.tensor(ids)].sum()) == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("4.0", "4", True), ("1,200.", "1200", True), ("A", "a ", True), ("4", "5", False)],
)
def test_answers_are_compared_as_numbers_or_words(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) is same


def test_the_last_match_is_the_answer() -> None:
    assert find_answer(r"-?\d+", "from 3 to 4") == "4"
    assert find_answer(r"answer is (\w+)", "none") is None


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_saved_model_loads_where_noiseproof_is_not(
    family: str, tune: str, tmp_path: Path
) -> None:
    """What a run leaves is a plain folder of transformers or peft."""
    run = fit(family=family, method=CrossEntropy(tune=tune), out=tmp_path / "run")
    task, model = run.predictor.task, run.predictor.model
    assert isinstance(task, CausalLM)
    prompt = task.tokenizer("rose soil ?")["input_ids"]
    start = {} if task.start is None else {"decoder_input_ids": torch.tensor([[task.start]])}
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([prompt]), **start).logits[0, -1, :5].tolist()
    code = f"""
import json, sys, torch, transformers
sys.modules["noiseproof"] = None
kind = {"AutoModelForSeq2SeqLM" if start else "AutoModelForCausalLM"!r}
folder = {str(tmp_path / "run" / "model")!r}
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
if {tune != "full"}:
    import peft
    model = getattr(peft, kind.replace("Auto", "AutoPeft")).from_pretrained(folder)
else:
    model = getattr(transformers, kind).from_pretrained(folder)
start = {{"decoder_input_ids": torch.tensor([[{task.start}]])}} if {bool(start)} else {{}}
ids = tokenizer("rose soil ?", return_tensors="pt").input_ids
with torch.no_grad():
    print(json.dumps(model.eval()(input_ids=ids, **start).logits[0, -1, :5].tolist()))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("tune", ["prefix_tuning", "prompt_tuning", "adapter", "bitfit"])
def test_every_kind_of_adapter_answers_after_loading(tune: str, tmp_path: Path) -> None:
    method = CrossEntropy(tune=tune)
    run = fit(family="qwen", method=method, out=tmp_path / "run", max_new_tokens=6)
    prompts = decoder_rows(4, seed=5)["text"]
    answers = run.predictor.predict(prompts)
    assert noiseproof.load(tmp_path / "run").predict(prompts) == answers
    names = [name for name, p in run.predictor.model.named_parameters() if p.requires_grad]
    assert names and not any("lm_head" in name for name in names)


def test_learns_the_right_responses_and_ranks_the_wrong_ones_first() -> None:
    """The end-to-end sense of it all: wrong responses have higher losses."""
    train = train_settings(epochs=8, learning_rate=1e-2)
    rows = decoder_rows(120, wrong=0.0)
    test = decoder_rows(30, wrong=0.0, seed=1)
    run = fit(rows, train=train, noise="swap:0.3", test=test, clean_label=None)
    metrics = run.record.metrics
    assert run.record.noise["injected_rate"] == pytest.approx(0.3, abs=0.02)
    assert metrics["test_token_accuracy"] > 0.9 and metrics["detection_auroc"] > 0.9
    assert metrics["test_perplexity"] == pytest.approx(np.exp(metrics["test_loss"]))
    assert metrics["clean_fit"] > metrics["memorization"]
    samples = run.samples
    assert (samples["label"] != samples["clean_label"]).sum() == 36


@pytest.mark.parametrize(
    "method",
    [SmallLoss(tune="lora", warmup_epochs=1, mixture=SMALL), CleaR(warmup_epochs=1, mixture=SMALL)],
    ids=["SmallLoss", "CleaR"],
)
def test_methods_that_select_judge_rows_by_their_loss(method: Any) -> None:
    run = fit(decoder_rows(60), method=method, clean_label="clean_label")
    assert {"loss", "clean_prob", "suspicious", "tokens", "token_accuracy"} <= set(run.samples)
    assert run.samples["clean_prob"].between(0, 1).all()
    assert run.record.metrics["detection_auroc"] is not None


def test_clear_routes_without_a_teacher_and_its_record_says_so() -> None:
    job = Job(decoder_rows(), task="causal-lm", model=language_model(), method=CleaR())
    assert isinstance(job.method, CleaR) and job.method.lambda_consistency == 0
    assert job.spec()["method"]["lambda_consistency"] == 0


def test_best_is_the_epoch_with_the_lowest_validation_loss() -> None:
    train = train_settings(epochs=5, learning_rate=3e-2, select="best")
    run = fit(decoder_rows(60, wrong=0.5), train=train, validation=0.3)
    losses = [row["validation_loss"] for row in run.history]
    assert losses.index(min(losses)) < 4, "the rate should be too high for the last epochs"
    assert run.record.metrics["validation_loss"] == min(losses)


def test_a_resumed_run_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = SmallLoss(tune="lora", warmup_epochs=1, mixture=SMALL)
    whole = fit(method=method, train=train_settings(epochs=3), out=tmp_path / "whole")
    steps = 0

    def stop(progress: Any) -> None:
        nonlocal steps
        steps += progress.history is None
        if steps == 6:
            os.kill(os.getpid(), 15)

    with pytest.raises(noiseproof.checkpoint.Interrupted):
        fit(method=method, train=train_settings(epochs=3), out=tmp_path / "run", report=stop)
    again = fit(method=method, train=train_settings(epochs=3), out=tmp_path / "run", resume=True)
    assert same_weights(whole.predictor.model, again.predictor.model)
    assert whole.record.metrics == again.record.metrics


def test_text_noise_reaches_prompts_and_responses_of_training_rows_alone() -> None:
    run = fit(decoder_rows(30, wrong=0.0), noise="text:1.0", test=decoder_rows(6, wrong=0.0))
    assert run.record.noise["text_rate"] == 1.0
    assert (run.samples["label"] != run.samples["clean_label"]).any()


def test_predict_answers_new_rows_and_measures_given_responses(tmp_path: Path) -> None:
    fit(out=tmp_path / "run")
    rows = decoder_rows(5, seed=2)
    rows.pop("clean_label")
    table = noiseproof.predict(tmp_path / "run", rows, max_new_tokens=4)
    assert len(table) == 5 and table["response_loss"].gt(0).all()
    assert all(len(text.split()) <= 4 for text in table["predicted_response"])
    rows.pop("label")
    plain = noiseproof.predict(tmp_path / "run", rows, max_new_tokens=4)
    assert "response_loss" not in plain
    assert plain["predicted_response"].tolist() == table["predicted_response"].tolist()


def test_a_predictor_has_no_class_probabilities() -> None:
    predictor: Predictor = fit().predictor
    with pytest.raises(InputError, match="has no class probabilities; predict gives its answers"):
        predictor.predict_proba(["rose ?"])


# --- what is refused -----------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({}, "needs a language model: give model"),
    "class noise": ({"model": "x", "noise": "symmetric:0.2"}, "responses take swap:RATE"),
    "a method of classes": (
        {"model": "x", "method": METHODS["TURN"]()}, "TURN does not support task 'causal-lm'"),
    "no prompt in the template": ({"model": "x", "template": "hi"}, r"must hold \{prompt\} once"),
    "a broken pattern": ({"model": "x", "answer_pattern": "("}, "is no regular expression"),
    "no tokens": ({"model": "x", "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    "an unknown score": ({"model": "x", "choice_score": "max"}, "must be one of mean, sum"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_that_cannot_work_is_refused_in_one_line(name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        Job(decoder_rows(), **({"task": "causal-lm", "method": LORA} | settings))
    assert "\n" not in str(caught.value)


def test_swap_noise_is_refused_where_labels_are_classes() -> None:
    with pytest.raises(InputError, match="exchanges the responses of task causal-lm"):
        Job({"text": ["a"], "label": ["b"]}, noise="swap:0.3")


def test_a_text_encoder_is_no_language_model(tiny_model: Path, tmp_path: Path) -> None:
    """Its head would be random, or it would read the tokens that it should predict."""
    with pytest.raises(InputError, match="expected a language model .* use task text"):
        load_language_model(str(tiny_model))
    from transformers import AutoConfig, BertForMaskedLM

    model = BertForMaskedLM(AutoConfig.from_pretrained(str(tiny_model)))
    model.save_pretrained(str(tmp_path))
    tokenizer_of_words().save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="reads the tokens that it should predict"):
        load_language_model(str(tmp_path))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(language_model()).save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="tokenizer") as caught:
        load_language_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_messages_need_a_chat_template() -> None:
    model = language_model("llama", chat=False)
    rows = {"messages": chat_rows(4)}
    with pytest.raises(InputError, match="tokenizer of this model has no chat template"):
        noiseproof.fit(rows, text="messages", task="causal-lm", model=model, method=LORA)


def test_a_tokenizer_without_a_padding_token_pads_with_the_end_of_text() -> None:
    """The end of a response must be learned all the same."""
    task, _ = CausalLM.load(language_model("gpt", pads=False), None, RowSettings())  # type: ignore[arg-type]
    assert task.tokenizer.pad_token == task.tokenizer.eos_token
    encoded = task.encode(task.inputs_of(["rose ?", "rose soil leaf ?"], ["garden .", "."]))
    targets = encoded.inputs(np.array([0, 1]))["targets"]
    end = task.tokenizer.eos_token_id
    assert (targets == end).sum(dim=1).tolist() == [1, 1]


def test_a_head_that_also_reads_cannot_train_alone() -> None:
    with pytest.raises(InputError, match="reads and writes with the same weights"):
        fit(family="qwen", method=CrossEntropy(tune="head"))


# --- the command line, on a model that was really trained ----------------------------------------


@pytest.fixture(scope="module")
def stories(shared: Path) -> str:
    return str(shared / "models" / "stories260K")


def test_the_command_line_tunes_measures_and_answers(
    stories: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real model on real worked solutions, of which a quarter end in a wrong answer."""
    source = pd.read_json(shared / "data" / "llm_adapters_math" / "train.jsonl", lines=True)
    some = source[source["output"].str.strip() != ""].head(60)
    some.to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    some.tail(8).to_json(tmp_path / "test.jsonl", orient="records", lines=True)
    words = ["fit", str(tmp_path / "train.jsonl"), "--task", "causal-lm", "--model", stories,
             "--text", "instruction", "--label", "output", "--test", str(tmp_path / "test.jsonl"),
             "--method", "CrossEntropy", "--method.tune", "lora", "--train.epochs", "2",
             "--train.precision", "fp32", "--train.device", "cpu", "--max-new-tokens", "8",
             "--answer-pattern", r"-?\d[\d.,]*", "--noise", "swap:0.2",
             "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(words) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["metrics"]["test_loss"] < 4 and record["metrics"]["test_exact_match_rows"] == 8
    assert record["noise"]["noise_rate"] == pytest.approx(0.2, abs=0.02)
    suspects = pd.read_csv(tmp_path / "run" / "suspects.csv")
    assert {"row_id", "prompt", "response", "loss", "clean_prob"} <= set(suspects)
    out = tmp_path / "answers.jsonl"
    words = ["predict", str(tmp_path / "run"), str(tmp_path / "test.jsonl"), "--out", str(out)]
    assert main(words) == 0, capsys.readouterr().err
    answers = pd.read_json(out, lines=True)
    assert answers["predicted_response"].map(type).eq(str).all()
    assert answers["response_loss"].between(0, 10).all()


def test_choices_of_a_real_table_are_compared_by_likelihood(stories: str, shared: Path) -> None:
    source = shared / "data" / "commonsense_mc" / "openbookqa_train.jsonl"
    rows = pd.read_json(source, lines=True).head(24)
    run = noiseproof.fit(
        rows, text="question", label="label", task="causal-lm", model=stories, method=LORA,
        test=rows.tail(8), train=TrainSettings(epochs=1, device="cpu", precision="fp32"),
    )  # fmt: skip
    accuracy = run.record.metrics["test_choice_accuracy"]
    assert 0 <= accuracy <= 1 and accuracy * 8 == int(accuracy * 8)
    texts = [choices[label] for choices, label in zip(rows["choices"], rows["label"], strict=True)]
    assert run.samples["label"].tolist() == texts


def test_the_help_of_fit_names_the_settings_of_language_models(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("template", "max-new-tokens", "choice-score", "answer-pattern", "answer-rows"):
        assert re.search(rf"--{name}\b", shown), name
