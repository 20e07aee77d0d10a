"""Losses of rows from the losses of their tokens, against the slow way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from language import language_model
from noiseproof.losses import cross_entropy, generalized_cross_entropy
from noiseproof.method import Batch, losses_of
from noiseproof.tasks import EncodedDialogues
from noiseproof.tokens import (
    IGNORED,
    TARGETS,
    losses_of_statistics,
    row_means,
    token_losses,
    token_statistics,
)


def rows_of_tokens(start: int | None = None) -> EncodedDialogues:
    """Four rows of unequal length, the last without a response token."""
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6]]
    responses = [[20, 21, 2], [22, 2], [23, 24, 25, 26, 2], []]
    arrays = [[np.array(row, dtype=np.int64) for row in part] for part in (prompts, responses)]
    return EncodedDialogues(*arrays, start, 0)


def model_of(kind: str) -> nn.Module:
    auto: Any = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model: nn.Module = auto.from_pretrained(language_model(kind))
    return model.eval()


def slow_losses(model: nn.Module, encoded: EncodedDialogues, row: int) -> list[Tensor]:
    """The loss of every response token of one row, which is alone and not padded."""
    prompt, response = encoded.prompts[row].tolist(), encoded.responses[row].tolist()
    if not response:
        return []
    if encoded.start is not None:
        logits = model(
            input_ids=torch.tensor([prompt]),
            decoder_input_ids=torch.tensor([[encoded.start, *response[:-1]]]),
        ).logits[0]
    else:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return [-logits[place].log_softmax(0)[token] for place, token in enumerate(response)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5"])
def test_a_rows_loss_is_the_mean_over_its_response_tokens_however_it_is_batched(kind: str) -> None:
    """A pad or a prompt token that counts, or a shift by one, trains something else."""
    model, encoded = model_of(kind), rows_of_tokens(0 if kind == "t5" else None)
    slow = [slow_losses(model, encoded, row) for row in range(4)]
    wanted = torch.stack([torch.stack(row).mean() if row else torch.zeros(()) for row in slow])
    assert wanted[3] == 0 and (wanted[:3] > 0).all()
    for batch in ([0, 1, 2, 3], [3, 2], [1], [2, 0, 1]):
        inputs = encoded.inputs(np.array(batch))
        got = token_losses(model, inputs, cross_entropy)
        torch.testing.assert_close(got, wanted[batch], rtol=1e-5, atol=1e-5)
        kept = token_statistics(model, inputs)
        torch.testing.assert_close(losses_of_statistics(kept), got, rtol=1e-5, atol=1e-5)
        assert kept[:, 1].tolist() == [len(slow[row]) for row in batch]


def test_the_loss_is_that_of_transformers_where_rows_count_by_their_tokens() -> None:
    """Our boundary and the usual -100 must mean the same."""
    model, encoded = model_of("llama"), rows_of_tokens()
    ids, labels = torch.zeros(3, 10, dtype=torch.long), torch.full((3, 10), -100)
    for row in range(3):
        first, second = encoded.prompts[row], encoded.responses[row]
        whole = torch.from_numpy(np.concatenate([first, second]))
        ids[row, : len(whole)] = whole
        labels[row, len(first) : len(whole)] = torch.from_numpy(second)
    wanted = model(input_ids=ids, labels=labels).loss
    kept = token_statistics(model, encoded.inputs(np.arange(3)))
    torch.testing.assert_close(kept[:, 0].sum() / kept[:, 1].sum(), wanted)


def test_targets_cover_the_response_and_nothing_else() -> None:
    """A prompt token among the targets would teach the model to write prompts."""
    inputs = rows_of_tokens().inputs(np.array([0, 1, 3]))
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 20, 21], [8, 22, 0, 0, 0], [5, 0, 0, 0, 0]]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [5, 2, 1]
    i = IGNORED
    assert inputs[TARGETS].tolist() == [[i, i, 20, 21, 2], [22, 2, i, i, i], [i] * 5]
    inputs = rows_of_tokens(start=3).inputs(np.array([0, 1]))
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert inputs["decoder_input_ids"].tolist() == [[3, 20, 21], [3, 22, 0]]
    assert inputs[TARGETS].tolist() == [[20, 21, 2], [22, 2, i]]


class Positions(nn.Module):
    """Gives logits of as many positions as it is asked for, and remembers how many."""

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **_: Tensor) -> Any:
        logits = torch.arange(input_ids.numel() * 4.0).view(*input_ids.shape, 4)
        self.asked = logits_to_keep
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_only_positions_from_the_first_response_on_reach_the_output_layer() -> None:
    """The logits of long prompts are most of the memory of a step."""
    model, ids = Positions(), torch.zeros(2, 6, dtype=torch.long)
    targets = torch.full((2, 6), IGNORED)
    targets[0, 4], targets[1, 5] = 1, 3
    losses = token_losses(
        model, {"input_ids": ids, TARGETS: targets}, lambda logits, _: logits[:, 0]
    )
    assert model.asked == 2
    assert losses.tolist() == [16.0, 44.0]  # positions 4 of row 0 and 5 of row 1


def test_a_batch_without_any_response_token_has_loss_zero_and_zero_gradients() -> None:
    """An empty mean is NaN, and one NaN is the end of all weights."""
    model = model_of("llama").train()
    loss = token_losses(model, rows_of_tokens().inputs(np.array([3])), cross_entropy).mean()
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_row_means_of_unequal_rows() -> None:
    """A short response counts as much as a long one."""
    values, rows = torch.tensor([1.0, 3.0, 8.0]), torch.tensor([1, 1, 2])
    assert row_means(values, rows, 4).tolist() == [0.0, 2.0, 8.0, 0.0]


def test_losses_of_takes_the_loss_of_a_token_or_of_a_class() -> None:
    """One line of a method serves both kinds of rows."""
    model, encoded = model_of("gpt2"), rows_of_tokens()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return generalized_cross_entropy(logits, labels, q=0.7)

    labels = torch.zeros(4, dtype=torch.long)
    batch = Batch(encoded.inputs(np.arange(4)), labels, torch.arange(4))
    slow = [slow_losses(model, encoded, row) for row in range(3)]
    wanted = [((1 - (-torch.stack(row)).exp() ** 0.7) / 0.7).mean() for row in slow]
    got = losses_of(model, batch, loss)
    torch.testing.assert_close(got[:3], torch.stack(wanted), rtol=1e-5, atol=1e-5)
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    plain = Batch({}, torch.tensor([0, 0]), torch.arange(2))
    answers: Any = lambda: SimpleNamespace(logits=logits)  # noqa: E731
    assert torch.equal(losses_of(answers, plain, loss), loss(logits, plain.labels))
