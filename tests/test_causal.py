"""Fine-tuning language models on doubtful responses, from a table to answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import noiseproof
from language import CHAT, language_model, tokenizer
from noiseproof.auditing import look_at_responses
from noiseproof.cli import main
from noiseproof.data import Examples
from noiseproof.engine import Engine
from noiseproof.errors import InputError
from noiseproof.experts.mixing import MODES
from noiseproof.finetune import FitResult
from noiseproof.job import Job
from noiseproof.loop import Progress
from noiseproof.method import Method, Run
from noiseproof.methods import METHODS, CleaR, CrossEntropy, LoPE, SmallLoss
from noiseproof.mixture import LossMixture
from noiseproof.prediction import predict_logits
from noiseproof.report import report
from noiseproof.tasks import CausalLM, EncodedDialogues, RowSettings
from noiseproof.tasks.causal import find_answer, same_answer
from noiseproof.tasks.dialogues import Dialogues
from noiseproof.tasks.language import load_language_model
from rows import response_rows
from tiny import last_json, python, same_weights, train_settings

SMALL = LossMixture(min_samples=4, min_gap=0.0)
LORA = CrossEntropy(tune="lora")


def fit(data: Any = None, *, kind: str = "gpt2", chat: bool = False, **settings: Any) -> FitResult:
    quick: dict[str, Any] = {"method": LORA, "train": train_settings(epochs=2)}
    model = language_model(kind, chat=chat)
    rows = response_rows() if data is None else data
    return noiseproof.fit(rows, task="causal-lm", model=model, **(quick | settings))


def task(max_length: int = 64, *, chat: bool = False, start: int | None = None) -> CausalLM:
    return CausalLM(tokenizer(chat=chat), RowSettings(max_length=max_length), start)


def words(encoded: EncodedDialogues, row: int) -> tuple[list[str], list[str]]:
    names = tokenizer().convert_ids_to_tokens
    return names(encoded.prompts[row].tolist()), names(encoded.responses[row].tolist())


# --- encoding ------------------------------------------------------------------------------------


def test_a_prompt_is_framed_and_a_response_ends() -> None:
    """Without an end of text the model never learns to stop; without a frame words run together."""
    settings = RowSettings(template="user : {prompt} assistant : ")
    encoded = CausalLM(tokenizer(), settings).encode(Dialogues(["the boat"], ["harbour"]))
    prompt, response = words(encoded, 0)
    assert prompt == ["user", ":", "the", "boat", "assistant", ":"]
    assert response == ["harbour", "</s>"]


def test_a_chat_is_framed_by_the_tokenizers_template() -> None:
    """An instruction-tuned model knows its own template and no other."""
    turns = [{"role": "user", "content": "the boat"}]
    encoded = task(chat=True).encode(Dialogues([json.dumps(turns)], ["harbour"], chat=True))
    prompt, response = words(encoded, 0)
    assert prompt == ["user", ":", "the", "boat", "</s>", "assistant", ":"]
    assert response == ["harbour", "</s>"]


def test_a_long_row_loses_the_end_of_its_response_and_one_without_any_is_counted() -> None:
    """A row that is cut to its prompt teaches nothing, and the user has to know."""
    rows = Dialogues(["the old boat", "the boat"], ["harbour", "harbour and more"])
    encoded = task(max_length=4).encode(rows)
    assert words(encoded, 0) == (["the", "old", "boat"], ["harbour"])
    assert words(encoded, 1) == (["the", "boat"], ["harbour", "and"])
    with pytest.warns(UserWarning, match="1 of 2 rows have no response token within 3"):
        encoded = task(max_length=3).encode(rows)
    assert not len(encoded.responses[0]) and encoded.counts == {"without_response": 1}
    with pytest.raises(InputError, match="no row has a response token within 2"):
        task(max_length=2).encode(rows)


def test_an_encoder_and_its_decoder_are_cut_each_on_its_own() -> None:
    """The prompt of an encoder-decoder takes no room from the response."""
    encoded = task(max_length=2, start=0).encode(Dialogues(["the old boat"], ["harbour and more"]))
    assert words(encoded, 0) == (["the", "old"], ["harbour", "and"])


# --- from a table to a model ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5"])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_every_architecture_learns_and_loads_without_noiseproof(
    kind: str, tune: str, tmp_path: Path
) -> None:
    """What transformers and peft load must give the loss that was measured."""
    rows = response_rows(wrong=0.0)
    result = fit(
        rows,
        kind=kind,
        test=rows,
        method=CrossEntropy(tune=tune),
        train=train_settings(epochs=6, learning_rate=1e-2),
        out=tmp_path / "run",
    )
    losses = [row["test_loss"] for row in result.history]
    assert losses[-1] < 0.8 * losses[0]
    metrics = result.record.metrics
    assert metrics["test_loss"] == pytest.approx(losses[-1])
    assert metrics["test_perplexity"] == pytest.approx(math.exp(losses[-1]))
    assert result.record.model["trained_parameters"] > 0
    loaded = python(
        str(Path(__file__).parent / "plain_language.py"), str(tmp_path / "run" / "model")
    )
    answer = last_json(loaded.stdout)
    assert not answer["noiseproof"], loaded.stderr
    encoded = result.predictor.task.encode(Dialogues(["the boat"], ["harbour"]))
    ours = result.predictor.outputs(encoded)[0, 0].item()
    assert answer["loss"] == pytest.approx(ours, abs=1e-4)


@pytest.mark.parametrize("tune", ["head", "ia3", "bitfit", "adapter", "prompt_tuning"])
def test_other_tunings_train_and_come_back(tune: str, tmp_path: Path) -> None:
    """A tuning that is listed and does not load is worse than one that is refused."""
    kind = "llama" if tune == "head" else "gpt2"  # GPT-2 has no head of its own
    result = fit(kind=kind, method=CrossEntropy(tune=tune), out=tmp_path / "run")
    first, last = (result.history[place]["loss"] for place in (0, -1))
    assert last < first
    encoded = result.predictor.task.encode(Dialogues(["the boat"], ["harbour"]))
    loaded = noiseproof.load(tmp_path / "run")
    assert torch.equal(loaded.outputs(encoded), result.predictor.outputs(encoded))


def test_a_head_that_is_tied_to_the_embeddings_is_refused() -> None:
    """To train it would be to train what the model reads with."""
    with pytest.raises(InputError, match=r"same weights.*lora"):
        fit(method=CrossEntropy(tune="head"))


@pytest.mark.parametrize("tune", ["adapter", "bitfit"])
def test_adapters_of_ours_are_refused_on_an_encoder_and_its_decoder(tune: str) -> None:
    """They stand in the layers of one stack; peft's do not mind two."""
    with pytest.raises(InputError, match=r"an encoder and a decoder: .*use tune=lora"):
        fit(kind="t5", method=CrossEntropy(tune=tune))


def test_a_merged_adapter_is_a_plain_model(tmp_path: Path) -> None:
    """Whoever serves the model may not have peft."""
    fit(merge=True, out=tmp_path / "run")
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()


def test_what_is_left_behind_names_the_responses(tmp_path: Path) -> None:
    """A list of suspects without prompt and response is of no use."""
    result = fit(clean_label="clean_label", test=response_rows(6, wrong=0.0), out=tmp_path / "run")
    samples, record = result.samples, result.record
    assert {"label", "clean_label", "loss", "clean_prob", "suspicious", "tokens"} <= {*samples}
    assert record.noise["noise_rate"] == 0.2
    wrong = (samples["label"] != samples["clean_label"]).to_numpy()
    assert wrong.mean() == 0.2 and samples["tokens"].eq(2).all()
    assert {"memorization", "clean_fit", "detection_auroc", "test_token_accuracy"} <= {
        *record.metrics
    }
    assert not {"test_accuracy", "recovery"} & {*record.metrics}
    assert not record.confusion and not record.per_class
    suspects = pd.read_csv(tmp_path / "run" / "suspects.csv")
    assert {"prompt", "response", "loss", "clean_prob"} <= {*suspects.columns}


def test_memorisation_is_the_token_accuracy_on_wrong_responses() -> None:
    """The measure of a model that learns the wrong answers by heart."""
    result = fit(
        clean_label="clean_label",
        method=CrossEntropy(),
        train=train_settings(epochs=40, learning_rate=5e-3),
    )
    assert result.record.metrics["memorization"] > 0.9
    assert result.record.metrics["clean_fit"] > 0.9
    early = fit(clean_label="clean_label", train=train_settings(epochs=1)).record.metrics
    assert early["memorization"] < 0.9


def test_text_noise_on_a_response_makes_the_row_wrong_and_on_a_prompt_it_does_not() -> None:
    """The label of such a row is its text."""
    result = fit(response_rows(wrong=0.0), noise="text:0.4", train=train_settings(epochs=1))
    noise, samples = result.record.noise, result.samples
    assert 0 < noise["noise_rate"] <= noise["text_rate"]
    assert (samples["label"] != samples["clean_label"]).mean() == noise["noise_rate"]


def test_the_best_epoch_is_the_one_with_the_lowest_validation_loss() -> None:
    """An accuracy that does not exist would leave the last epoch, silently."""
    train = train_settings(epochs=12, learning_rate=5e-2, select="best")
    result = fit(validation=0.3, method=CrossEntropy(), train=train)
    losses = [row["validation_loss"] for row in result.history]
    assert min(losses) < losses[-1]  # it overfits, so the choice is one
    assert result.record.metrics["validation_loss"] == min(losses)


def test_a_resumed_run_gives_the_same_weights(tmp_path: Path) -> None:
    """A pass over tokens must not depend on what was done before the interruption."""
    method = CleaR(warmup_epochs=1, mixture=SMALL)
    settings: dict[str, Any] = {"method": method, "train": train_settings(epochs=3)}
    whole = fit(out=tmp_path / "whole", **settings)

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.epoch == 2 and progress.step == 2:
            raise Stop

    with pytest.raises(Stop):
        fit(out=tmp_path / "run", report=stop, **settings)
    again = fit(out=tmp_path / "run", resume=True, **settings)
    assert same_weights(whole.predictor.model, again.predictor.model)
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in again.history]


def test_micro_batches_give_the_gradient_of_the_batch() -> None:
    """A mean over tokens instead of rows would depend on the cut."""
    responses = ["boat", "the old boat", "boat and more", "the boat we saw near some new hedge"]
    rows = Dialogues(["the boat"] * 4, responses)

    def gradients(size: int) -> tuple[float, dict[str, torch.Tensor]]:
        model, _ = load_language_model(language_model("gpt2"))
        encoded = task().encode(rows)
        engine = Engine(train_settings(batch_size=4, micro_batch_size=size))
        engine.start_stage(model.eval(), encoded, rate=1e-3)
        labels = torch.zeros(4, dtype=torch.long)
        run = Run(model, labels, 1, lambda before_batch=None: labels, torch.Generator())
        loss = engine.backward(CrossEntropy(), encoded, np.arange(4), run)
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        engine.end_stage()
        return loss, found

    (whole, one), (parts, cut) = gradients(4), gradients(1)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert one.keys() == cut.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)


# --- answers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[FitResult, Path]:
    """A model that has learned to name the topic, with choices and an answer in its test set."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    rows = response_rows(120, wrong=0.0, seed=2)
    test = response_rows(12, wrong=0.0, seed=3)
    names = ["garden", "harbour", "kitchen"]
    test |= {"choices": [names] * 12, "answer": [names.index(name) for name in test["label"]]}
    result = fit(
        rows,
        kind="llama",
        test=test,
        method=CrossEntropy(),
        answer_pattern=r"\w+",
        max_new_tokens=4,
        answer_rows=8,
        train=train_settings(epochs=12, learning_rate=5e-3),
        out=folder,
    )
    return result, folder


@pytest.mark.parametrize("method", [SmallLoss(warmup_epochs=1, mixture=SMALL, tune="lora"),
                                    CleaR(warmup_epochs=1, mixture=SMALL)])  # fmt: skip
def test_swapped_responses_are_found_by_their_loss(
    method: Method, learned: tuple[FitResult, Path]
) -> None:
    """Right form, wrong content: what selection by loss is for."""
    result = noiseproof.fit(
        response_rows(60, wrong=0.0, seed=7),
        task="causal-lm",
        model=str(learned[1] / "model"),
        noise="swap:0.2",
        method=method,
        train=train_settings(epochs=3),
    )
    assert result.record.noise["noise_rate"] == 0.2
    assert result.record.metrics["detection_auroc"] > 0.9


def test_choices_and_generated_answers_are_measured_once_at_the_end(
    learned: tuple[FitResult, Path],
) -> None:
    """Perplexity says little of whether the answers are right."""
    metrics = learned[0].record.metrics
    assert metrics["test_choice_accuracy"] > 0.9
    assert metrics["test_exact_match"] > 0.8 and metrics["test_exact_match_rows"] == 8
    assert not any("choice" in name for name in learned[0].history[-1])


def test_choices_are_compared_in_every_way_a_model_can_answer() -> None:
    """A mode is judged by what the user asks of the model, not by its perplexity alone."""
    test = response_rows(9, wrong=0.0, seed=5)
    names = ["garden", "harbour", "kitchen"]
    test |= {"choices": [names] * 9, "answer": [names.index(name) for name in test["label"]]}
    record = fit(
        response_rows(24, wrong=0.0, seed=6),
        kind="llama",
        test=test,
        method=LoPE(theta_examples=8),
        train=train_settings(epochs=2),
    ).record
    found = {mode: values["test_choice_accuracy"] for mode, values in record.modes.items()}
    assert list(found) == ["none", "mask", "renorm", "compensate"]
    assert found["compensate"] == record.metrics["test_choice_accuracy"]


def test_predict_answers_new_prompts_and_scores_given_responses(
    learned: tuple[FitResult, Path],
) -> None:
    """The order of rows is that of the table, though batches are sorted by length."""
    result, folder = learned
    new = response_rows(9, wrong=0.0, seed=5)
    table = noiseproof.predict(folder, {"text": new["text"]})
    assert [*table.columns] == ["text", "predicted_response"]
    assert (table["predicted_response"] == new["label"]).mean() > 0.7
    alone = [result.predictor.predict([prompt])[0] for prompt in new["text"]]
    assert alone == table["predicted_response"].tolist()
    scored = noiseproof.predict(folder, {"text": new["text"], "label": ["oven"] * 9})
    named = noiseproof.predict(folder, {"text": new["text"], "label": new["label"]})
    assert (scored["response_loss"] > named["response_loss"]).all()
    short = noiseproof.predict(folder, {"text": new["text"]}, max_new_tokens=1)
    assert (short["predicted_response"].str.split().str.len() <= 1).all()
    with pytest.raises(InputError, match="no class probabilities"):
        result.predictor.predict_proba(new["text"])


def test_choices_are_compared_by_the_mean_or_by_the_sum(learned: tuple[FitResult, Path]) -> None:
    """The sum prefers short choices, the mean long ones; a table must say which it shows."""
    result, _ = learned
    made: Any = result.predictor.task
    rows = Dialogues(
        ["the boat"], ["a"], choices=(("harbour", "harbour harbour harbour"),), answers=("0",)
    )
    scores = {}
    for how in ("mean", "sum"):
        changed = made.with_settings(RowSettings(choice_score=how))
        scores[how] = changed._choice_scores(rows, rows.choices, result.predictor.outputs)[0]
    lengths = np.array([2, 4])  # with the end of text
    np.testing.assert_allclose(scores["sum"], scores["mean"] * lengths, rtol=1e-5)


def test_find_answer_takes_the_last_match_and_the_first_group() -> None:
    """Solutions name many numbers; the answer is the last."""
    assert find_answer(r"-?\d+", "3 and 4 make 7") == "7"
    assert find_answer(r"is (\d+)\b", "it is 3, then it is 12") == "12"
    assert find_answer(r"\d", "none") is None


def test_same_answer_compares_numbers_as_numbers() -> None:
    """1,000 and 1000.0 are one answer; a missing one is never right."""
    assert same_answer("1,000", "1000.0") and same_answer("7.", "7") and same_answer(" A b", "a  B")
    assert not same_answer("7", "8") and not same_answer("7", "seven")
    assert not same_answer(None, None) and not same_answer(None, "")


def test_a_prompt_that_fills_the_model_still_gets_an_answer() -> None:
    """Positions beyond the last are an IndexError deep in the model."""
    predictor = fit(max_new_tokens=100, train=train_settings(epochs=1)).predictor
    long = " ".join(["boat"] * 100)
    assert predictor.predict([long, "boat"]) == [predictor.predict([x])[0] for x in (long, "boat")]


def test_generated_text_does_not_depend_on_the_batch() -> None:
    """Left padding without its mask shifts what the model reads."""
    prompts = ["the old boat and some more", "soil", "we saw the new oven today"]
    for kind, tune in (
        ("llama", "lora"),
        ("gpt2", "adapter"),
        ("t5", "lora"),
        ("gpt2", "prompt_tuning"),
    ):
        method, train = CrossEntropy(tune=tune), train_settings(epochs=1)
        predictor = fit(kind=kind, method=method, max_new_tokens=5, train=train).predictor
        assert predictor.predict(prompts) == [predictor.predict([one])[0] for one in prompts]


def test_a_tokenizer_without_a_pad_token_does(tmp_path: Path) -> None:
    """GPT-2 and Llama come without one."""
    data, model = response_rows(), language_model("gpt2", pad=False)
    one = noiseproof.fit(data, task="causal-lm", model=model, method=LORA, train=train_settings())
    other = fit(train=train_settings())
    assert [row["loss"] for row in one.history] == [row["loss"] for row in other.history]


def test_chat_messages_train_and_are_answered(tmp_path: Path) -> None:
    """The way most instruction sets come today."""
    rows = response_rows(wrong=0.0)
    turns = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
        for text, label in zip(rows["text"], rows["label"], strict=True)
    ]
    fit({"messages": turns}, chat=True, text="messages", out=tmp_path / "run")
    new = noiseproof.predict(tmp_path / "run", {"messages": [turn[:1] for turn in turns[:3]]})
    assert [*new.columns] == ["messages", "predicted_response"]
    scored = noiseproof.predict(tmp_path / "run", {"messages": turns[:3]})
    assert scored["response_loss"].notna().all()


def test_a_saved_model_with_experts_generates_in_a_process_of_its_own(tmp_path: Path) -> None:
    """By `predict`, by `generate`, and in a pipeline of transformers, in every mode."""
    out = tmp_path / "run"
    made = fit(kind="llama", method=LoPE(theta_examples=8, noise_rate=0.3), out=out)
    prompts = response_rows(3, seed=5)["text"]
    code = """
import json, sys
import noiseproof
from transformers import pipeline
loaded = noiseproof.load(sys.argv[1])
inside, prompts = loaded.model.get_base_model(), sys.argv[2:]
said = {"predict": loaded.predict(prompts)}
for mode in ("none", "mask", "renorm", "compensate"):
    loaded.model.set_inference_mode(mode)
    pipe = pipeline("text-generation", model=inside, tokenizer=loaded.task.tokenizer)
    asked = [pipe(p, max_new_tokens=4, do_sample=False, return_full_text=False) for p in prompts]
    said[mode] = [answer[0]["generated_text"].split() for answer in asked]
    tokens = loaded.task.tokenizer(prompts[0], return_tensors="pt")
    whole = inside.generate(**tokens, max_new_tokens=4, do_sample=False)
    words = loaded.task.tokenizer.decode(whole[0, tokens["input_ids"].shape[1]:]).split()
    assert words == said[mode][0], (words, said[mode][0])
print(json.dumps(said))
"""
    done = python("-c", code, str(out), *prompts)
    assert done.returncode == 0, done.stderr[-2000:]
    said = last_json(done.stdout)
    assert said["predict"] == made.predictor.predict(prompts)
    assert all(len(words) <= 4 for mode in MODES for words in said[mode])
    rows = response_rows(3, seed=5)
    lost = {m: noiseproof.predict(out, rows, inference_mode=m)["response_loss"] for m in MODES}
    deployed = noiseproof.predict(out, rows)["response_loss"]
    assert deployed.equals(lost["compensate"]) and not deployed.equals(lost["none"])
    with pytest.raises(InputError, match="unknown inference mode 'off'; available: none, mask"):
        noiseproof.predict(out, rows, inference_mode="off")


def test_methods_that_noise_texts_noise_what_is_said_in_a_chat(tmp_path: Path) -> None:
    """The roles stay, and only the response counts as a label."""
    rows = response_rows(wrong=0.0)
    turns = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
        for text, label in zip(rows["text"], rows["label"], strict=True)
    ]
    kept = {"messages": turns}
    noisy = fit(kept, chat=True, text="messages", noise="text:0.5", out=tmp_path / "noisy",
                test=kept, test_noise="text:1")  # fmt: skip
    assert noisy.record.noise["text_rate"] > 0.2
    assert {"corrupted"} == set(noisy.record.ood)
    method = LoPE(theta_examples=8, noise_rate=0.5)
    found = fit(kept, chat=True, text="messages", method=method, out=tmp_path / "lope").record
    assert found.findings["noise"]["corrupted_share"] > 0.2


# --- audit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3])
def test_an_audit_finds_exchanged_responses_and_no_more_than_there_are(
    rate: float, learned: tuple[FitResult, Path]
) -> None:
    """A mixture alone splits right rows where none is wrong, and had called two of three wrong."""
    found = noiseproof.audit(
        response_rows(90, wrong=0.0, seed=7),
        task="causal-lm",
        model=str(learned[1] / "model"),
        noise=f"swap:{rate}",
    )
    summary, table = found.summary, found.table
    assert abs(summary["estimated_rate"] - rate) < 0.05
    assert abs(summary["suspicious"] - 90 * rate) < 5
    assert summary["prompt_gain"] > 1 and summary["planted"] > 20
    assert not {"classes", "agreement"} & {*summary} and found.transition is None
    assert [*table.columns] == [
        "row_id", "prompt", "label", "score", "suspicious", "reasons", "loss", "loss_alone",
        "clean_label",
    ]  # fmt: skip
    if not rate:
        assert found.verdict.startswith("Random errors are seen well")
        return
    assert summary["auroc"] > 0.9 and summary["precision"] > 0.9 and summary["recall"] >= 0.5
    assert (found.suspects["label"] != found.suspects["clean_label"]).mean() > 0.9
    assert found.suspects["reasons"].str.contains("make it likelier|makes it likelier").all()
    assert table["suspicious"].is_monotonic_decreasing


def test_an_audit_by_a_model_that_knows_nothing_says_so() -> None:
    """A list of chance looks like any other."""
    rows = response_rows(90, wrong=0.0, seed=7)
    found = noiseproof.audit(
        rows, task="causal-lm", model=language_model("llama"), noise="swap:0.2"
    )
    assert found.verdict.startswith("Do not trust this list: of 40 responses exchanged on purpose")
    assert "The features" not in found.verdict


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_the_empty_prompt_keeps_its_frame_and_the_response_every_token(kind: str) -> None:
    """Losses of different tokens, or of a model that sees no frame, cannot be compared."""
    settings = RowSettings(template="user : {prompt} assistant : ", max_length=10)
    model, made = load_language_model(language_model(kind))
    task = CausalLM(made, settings, model.config.decoder_start_token_id if kind == "t5" else None)
    rows = Dialogues(["the boat", "the old boat"], ["harbour and more and more", "garden"])
    encoded = task.encode(rows)
    alone = task.encode_alone(rows, encoded)
    names = made.convert_ids_to_tokens
    assert names(alone.prompts[0].tolist())[:4] == ["user", ":", "assistant", ":"]
    for row in range(2):
        assert alone.responses[row].tolist() == encoded.responses[row].tolist()
    looks = look_at_responses(model, task, rows, encoded, train_settings())
    again = predict_logits(model, encoded, train_settings())
    np.testing.assert_allclose(looks.loss, again[:, 0] / again[:, 1], rtol=1e-5)
    assert looks.excess.abs().min() > 0


def test_the_empty_prompt_of_a_chat_keeps_its_turns() -> None:
    """The roles belong to the frame, what is said in them to the prompt."""
    turns = [{"role": "system", "content": "the oven"}, {"role": "user", "content": "the boat"}]
    rows = Dialogues([json.dumps(turns)], ["harbour"], chat=True)
    made = task(chat=True)
    alone = made.encode_alone(rows, made.encode(rows))
    assert words(alone, 0) == (
        ["system", ":", "</s>", "user", ":", "</s>", "assistant", ":"],
        ["harbour", "</s>"],
    )  # fmt: skip


def test_rows_without_room_for_a_response_are_not_judged(
    learned: tuple[FitResult, Path],
) -> None:
    """Both of their losses are 0: such a row would look like one that its prompt does not help."""
    rows = response_rows(60, wrong=0.0, seed=7)
    rows["text"][5] = "the boat " * 40
    with pytest.warns(UserWarning, match="1 of 60 rows have no response token"):
        found = noiseproof.audit(
            rows, task="causal-lm", model=str(learned[1] / "model"), train=train_settings()
        )
    row = found.table.set_index("row_id").loc["5"]
    assert row["score"] == 0 and not row["suspicious"]
    assert row["reasons"] == "not judged: its prompt leaves no room for the response"


def test_prompts_that_stand_twice_with_two_responses_are_told(
    learned: tuple[FitResult, Path],
) -> None:
    """One of them is wrong, whatever a model says."""
    rows = response_rows(30, wrong=0.0, seed=7)
    for name, more in (("text", rows["text"][0]), ("label", "kitchen"), ("clean_label", "")):
        rows[name] = [*rows[name], more]
    found = noiseproof.audit(rows, task="causal-lm", model=str(learned[1] / "model"))
    assert found.summary["conflicts"] == 2
    table = found.table.set_index("row_id")
    assert f"its prompt stands here again with '{rows['label'][0]}'" in table.loc["30", "reasons"]
    assert "its prompt stands here again with 'kitchen'" in table.loc["0", "reasons"]


def test_the_audit_command_writes_responses_that_relabel_takes(
    learned: tuple[FitResult, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a file to a better file, through the list."""
    rows = pd.DataFrame(response_rows(60, wrong=0.1, seed=7)).rename(
        columns={"label": "answer_text"}
    )
    rows.drop(columns="clean_label").to_json(tmp_path / "sft.jsonl", orient="records", lines=True)
    data, out = str(tmp_path / "sft.jsonl"), tmp_path / "suspects.csv"
    asked = ["--task", "causal-lm", "--label", "answer_text"]
    model = ["--model", str(learned[1] / "model")]
    assert main(["audit", data, *asked, *model, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "prompt_gain" in shown and "responses exchanged on purpose" in shown
    listed = pd.read_csv(out)
    wrong = rows["answer_text"] != rows["clean_label"]
    assert sorted(listed["row_id"]) == np.flatnonzero(wrong).tolist()
    listed["label"] = [*rows["clean_label"][listed["row_id"][:-1]], None]
    listed.to_csv(out, index=False)
    better = tmp_path / "better.jsonl"
    assert main(["relabel", data, str(out), *asked, "--out", str(better)]) == 0
    kept = pd.read_json(better, lines=True)
    right = rows["clean_label"].drop(listed["row_id"].iloc[-1])
    assert kept["answer_text"].tolist() == right.tolist()
    matrix = ["--transition-out", str(tmp_path / "matrix.json"), "--overwrite"]
    assert main(["audit", data, *asked, *model, "--out", str(out), *matrix]) == 2
    assert "responses have no classes" in capsys.readouterr().err
    assert (
        main(["relabel", data, str(out), *asked, "--accept", "--out", str(tmp_path / "x.jsonl")])
        == 2
    )
    assert "suggested_label" in capsys.readouterr().err


def test_an_audited_run_adds_what_its_model_says_of_responses(
    learned: tuple[FitResult, Path], tmp_path: Path
) -> None:
    """Its rows, its noise and its base model are taken again."""
    rows = pd.DataFrame(response_rows(60, wrong=0.0, seed=7)).drop(columns="clean_label")
    rows.to_json(tmp_path / "sft.jsonl", orient="records", lines=True)
    data, model = str(tmp_path / "sft.jsonl"), str(learned[1] / "model")
    settings: dict[str, Any] = {"task": "causal-lm", "model": model, "noise": "swap:0.2"}
    train = train_settings(epochs=2)
    run = tmp_path / "run"
    noiseproof.fit(data, method=LORA, train=train, out=run, **settings)
    found = noiseproof.audit(run)
    samples = pd.read_parquet(run / "samples.parquet")
    table = found.table.set_index("row_id").loc[samples["row_id"]]
    assert table["label"].tolist() == samples["label"].tolist()
    alone = noiseproof.audit(data, train=train, **settings).table.set_index("row_id")
    first = alone.loc[samples["row_id"], "score"].to_numpy()
    half = (first + 1 - samples["clean_prob"].to_numpy()) / 2
    assert np.allclose(table["score"].to_numpy(), half)
    assert found.summary["noise_rate"] == 0.2 and found.summary["auroc"] > 0.9
    told = table["reasons"].str.contains(r"the fine-tuned model finds it unlikely \(loss \d")
    assert told.tolist() == (samples["clean_prob"] < 0.5).tolist() and told.any()


def test_a_run_from_a_model_that_knows_nothing_is_audited_by_its_own_model(tmp_path: Path) -> None:
    """Half of the score would be chance, or a vote that every response is right."""
    rows = pd.DataFrame(response_rows(60, wrong=0.0, seed=7)).drop(columns="clean_label")
    rows.to_json(tmp_path / "sft.jsonl", orient="records", lines=True)
    fit(str(tmp_path / "sft.jsonl"), kind="llama", noise="swap:0.2", out=tmp_path / "run")
    found = noiseproof.audit(tmp_path / "run")
    samples = pd.read_parquet(tmp_path / "run" / "samples.parquet")
    table = found.table.set_index("row_id").loc[samples["row_id"]]
    assert found.verdict.startswith("Do not trust this list")
    assert np.allclose(table["score"], 1 - samples["clean_prob"])


# --- what is refused -----------------------------------------------------------------------------


def test_methods_that_need_classes_are_refused_and_the_others_named() -> None:
    """They would stack a vocabulary of logits for every row."""
    listed = {name for name, method in METHODS.items() if "causal-lm" in method.tasks}
    assert {"CrossEntropy", "GCE", "SCE", "SmallLoss", "CleaR"} <= listed
    for name in ("ELR", "TURN", "NMTune", "CoTeaching", "ForwardCorrection"):
        with pytest.raises(InputError, match=r"does not support task 'causal-lm'.*SmallLoss"):
            Job({}, task="causal-lm", model="gpt2", method=METHODS[name]())


@pytest.mark.parametrize("noise", ["symmetric:0.2", "text:0.1+pairflip:0.2"])
def test_noise_on_classes_is_refused_and_swaps_on_classes_too(noise: str) -> None:
    """Silence would report a noise rate that no row has."""
    with pytest.raises(InputError, match="swap:RATE"):
        Job({}, task="causal-lm", model="gpt2", method=LORA, noise=noise)
    with pytest.raises(InputError, match="symmetric"):
        Job({}, noise="swap:0.2")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("template", "no place"),
        ("max_new_tokens", 0),
        ("answer_rows", 0),
        ("choice_score", "median"),
        ("answer_pattern", "("),
        ("model", "minilm"),
    ],
)
def test_a_setting_out_of_range_is_refused(setting: str, value: Any) -> None:
    """One line each, before anything is loaded."""
    settings: dict[str, Any] = {"model": "gpt2"} | {setting: value}
    with pytest.raises(InputError, match=setting if setting != "model" else "language model"):
        noiseproof.fit(response_rows(), task="causal-lm", method=LORA, **settings)


def test_an_encoder_is_refused(tiny_model: Path) -> None:
    """BERT sees the token that it should predict: its loss goes to 0 and means nothing."""
    with pytest.raises(InputError, match="from left to right"):
        noiseproof.fit(response_rows(), task="causal-lm", model=str(tiny_model), method=LORA)


def test_chat_messages_without_a_chat_template_are_refused() -> None:
    """A template of our own would not be the model's."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match="no chat template"):
        fit({"messages": [turns] * 4}, text="messages")


def test_messages_that_a_chat_template_does_not_take_are_one_clear_line() -> None:
    """Templates raise where a role has no place, such as a system message in Gemma's."""
    made = tokenizer(chat=True)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    made.chat_template = refusal + CHAT
    task = CausalLM(made, RowSettings())
    user = {"role": "user", "content": "a"}
    task.encode(Dialogues([json.dumps([user])], ["b"], chat=True))
    system = {"role": "system", "content": "be kind"}
    prompts = [json.dumps(turns) for turns in ([user], [system, user])]
    with pytest.raises(InputError, match=r"messages of row 2 \(system, user\): no system"):
        task.encode(Dialogues(prompts, ["b", "b"], chat=True))


def scored(task: CausalLM, rows: Dialogues) -> tuple[list[Any], list[tuple[int, ...]]]:
    """Scores of the choices of every row, and what a model was shown of prompts and choices."""
    seen: list[tuple[int, ...]] = []

    def outputs(encoded: EncodedDialogues) -> torch.Tensor:
        seen.extend(
            (len(prompt), len(response))
            for prompt, response in zip(encoded.prompts, encoded.responses, strict=True)
        )
        counts = torch.tensor([float(len(response)) for response in encoded.responses])
        return torch.stack([counts, counts, counts], dim=1)  # one nat a token

    assert rows.choices is not None
    return task._choice_scores(rows, rows.choices, outputs), seen  # type: ignore[arg-type]


def test_choices_are_never_cut_and_all_of_a_row_see_the_same_prompt() -> None:
    """Cut choices gain, and one without a token left had a loss of 0: it always won."""
    made = tokenizer()
    long = "the boat is in the harbour " * 10
    rows = Dialogues(
        [long, "the boat"], ["a", "a"],
        choices=(("harbour", "harbour harbour harbour"), ("harbour", "harbour " * 40)),
        answers=("0", "0"),
    )  # fmt: skip
    task = CausalLM(made, RowSettings(max_length=16, choice_score="sum"))
    scores, seen = scored(task, rows)
    few, many = (len(task._response_ids(text, False)) for text in rows.choices[0])  # type: ignore[index]
    assert few < many < 16
    assert scores[0].tolist() == [-few, -many]
    assert seen == [(16 - many, few), (16 - many, many)]
    assert scores[1] is None  # a choice that fits beside no prompt at all
    task = CausalLM(made, RowSettings(max_length=2))
    examples = Examples(["a", "b"], rows, np.zeros(2, int), None, ("response",))
    with pytest.raises(InputError, match="no row has choices that fit into 2 tokens"):
        task.answer_metrics(torch.nn.Identity(), examples, lambda _: torch.Tensor())


def test_an_encoder_sees_of_a_long_prompt_what_it_was_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was trained on beginnings without an end token and asked about ends."""
    folder = language_model("t5")
    model, made = load_language_model(str(folder))
    task = CausalLM(made, RowSettings(max_length=8), model.config.decoder_start_token_id)
    rows = Dialogues(["the boat is in the harbour " * 4], ["a"])
    trained = task.encode(rows).prompts[0].tolist()
    asked: list[list[int]] = []
    monkeypatch.setattr(
        "noiseproof.tasks.causal.generate",
        lambda model, made, prompts, new: asked.extend(prompts) or [""] * len(prompts),
    )
    task.respond(model, rows)
    assert len(trained) == 8 and trained == asked[0]
    whole = made(rows.prompts[0] + "\n")["input_ids"]
    assert trained[:-1] == whole[:7]
    assert trained[-1] == (whole[-1] if whole[-1] == made.eos_token_id else whole[7])


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    """Where the response begins would be a guess."""
    made = tokenizer(chat=True)
    made.chat_template = "{% if add_generation_prompt %}x{% else %}" + CHAT + "{% endif %}"
    turns = json.dumps([{"role": "user", "content": "a"}])
    with pytest.raises(InputError, match="does not continue"):
        CausalLM(made, RowSettings()).encode(Dialogues([turns], ["b"], chat=True))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes one up, or raises something long."""
    import shutil

    shutil.copytree(language_model("gpt2"), tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="tokenizer"):
        noiseproof.fit(response_rows(), task="causal-lm", model=str(tmp_path / "bare"), method=LORA)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"neighbours": 5}, "neighbours is for labels that are classes"),
        ({"noise": "symmetric:0.2"}, "swap:RATE"),
        ({"label": "none"}, "no column 'none'"),
        ({"model": "minilm"}, "needs a language model"),
    ],
)
def test_an_audit_of_responses_refuses_what_is_about_classes(
    settings: dict[str, Any], said: str
) -> None:
    """What is ignored looks as if it had been done."""
    given = {"model": language_model("gpt2")} | settings
    with pytest.raises(InputError, match=said):
        noiseproof.audit(response_rows(), task="causal-lm", **given)


def test_a_report_shows_what_is_measured_of_responses(learned: tuple[FitResult, Path]) -> None:
    """A page without the test loss would say nothing of the model."""
    report(learned[1], out=learned[1].parent / "page.html")
    page = (learned[1].parent / "page.html").read_text(encoding="utf-8")
    for words in ("Perplexity", "Token accuracy", "Choices", "Exact match", "test loss"):
        assert words in page
    assert "Test accuracy" not in page


# --- a real model --------------------------------------------------------------------------------


def test_a_pre_trained_story_model_learns_to_answer(shared: Path, tmp_path: Path) -> None:
    """End to end on the smallest real language model there is."""
    names, things = ("Tom", "Lily", "Ben"), ("ball", "cat", "dog", "boat")
    pairs = [(name, thing) for name in names for thing in things] * 4
    rows = {
        "prompt": [f"{name} wants a {thing}. What does {name} have?" for name, thing in pairs],
        "response": [f"{name} has a {thing}." for name, thing in pairs],
    }
    result = noiseproof.fit(
        rows,
        task="causal-lm",
        text="prompt",
        label="response",
        noise="swap:0.25",
        test=rows,
        model=str(shared / "models" / "stories260K"),
        method=SmallLoss(warmup_epochs=2, tune="lora", mixture=SMALL),
        train=train_settings(epochs=5, learning_rate=5e-3),
        out=tmp_path / "run",
    )
    losses = [row["test_loss"] for row in result.history]
    assert losses[-1] < 0.7 * losses[0]
    assert result.record.metrics["detection_auroc"] > 0.9
    answers = noiseproof.predict(tmp_path / "run", {"prompt": rows["prompt"][:2]}, max_new_tokens=8)
    assert all(isinstance(text, str) and text for text in answers["predicted_response"])
