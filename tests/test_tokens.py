"""Losses of responses: equal to a slow loop over tokens, whatever the batch and the padding are."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from decoders import CONFIGS, decoder_rows, language_model
from noiseproof.losses import cross_entropy, generalized_cross_entropy, label_smoothing
from noiseproof.method import Batch, losses_of
from noiseproof.tasks import RowSettings
from noiseproof.tasks.causal import CausalLM, EncodedDialogues
from noiseproof.tokens import (
    IGNORED,
    TARGETS,
    at_targets,
    losses_of_statistics,
    row_means,
    token_losses,
    token_statistics,
)

LOSSES = {
    "cross_entropy": cross_entropy,
    "label_smoothing": partial(label_smoothing, smoothing=0.2),
    "gce": partial(generalized_cross_entropy, q=0.7),
}


def loaded(family: str, **settings: Any) -> tuple[CausalLM, nn.Module, EncodedDialogues]:
    """A tiny model in eval mode and twelve encoded rows."""
    row_settings = RowSettings(**settings)
    source = decoder_rows(12)
    task, model = CausalLM.load(language_model(family), None, row_settings)  # type: ignore[arg-type]
    return task, model.eval(), task.encode(task.inputs_of(source["text"], source["label"]))


def slowly(model: nn.Module, encoded: EncodedDialogues, row: int, loss: Any) -> float:
    """The mean loss of a row's response tokens: one row, one token at a time, no padding."""
    prompt, response = encoded.prompts[row].tolist(), encoded.responses[row].tolist()
    values = []
    for place, token in enumerate(response):
        before = response[:place]
        if encoded.start is None:
            inputs = {"input_ids": torch.tensor([prompt + before])}
        else:
            inputs = {
                "input_ids": torch.tensor([prompt]),
                "decoder_input_ids": torch.tensor([[encoded.start, *before]]),
            }
        logits = model(**inputs).logits[:, -1]
        values.append(float(loss(logits, torch.tensor([token]))))
    return sum(values) / len(values)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", LOSSES)
@torch.no_grad()
def test_the_loss_of_a_row_is_that_of_a_loop_over_its_tokens(family: str, name: str) -> None:
    """A shift by one, a pad that counts, or a prompt that is learned would all train."""
    _, model, encoded = loaded(family)
    rows = np.array([3, 0, 7])
    batch = Batch(encoded.inputs(rows), torch.zeros(3, dtype=torch.long), torch.from_numpy(rows))
    got = losses_of(model, batch, LOSSES[name])
    wanted = [slowly(model, encoded, int(row), LOSSES[name]) for row in rows]
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_a_row_has_the_same_loss_alone_and_beside_longer_ones(family: str) -> None:
    """Padding and the cut of the output layer must change nothing."""
    _, model, encoded = loaded(family)
    together = token_statistics(model, encoded.inputs(np.arange(12)))
    alone = torch.cat([token_statistics(model, encoded.inputs(np.array([n]))) for n in range(12)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert len(set(encoded.lengths.tolist())) > 2


@torch.no_grad()
def test_statistics_are_the_sum_the_number_and_the_hits() -> None:
    """Perplexity and accuracy over tokens need sums; a mean of means weighs short rows more."""
    _, model, encoded = loaded("llama")
    inputs = encoded.inputs(np.arange(4))
    statistics, found = token_statistics(model, inputs), at_targets(model, inputs)
    for row in range(4):
        mine = found.rows == row
        loss = cross_entropy(found.logits[mine], found.targets[mine])
        hits = found.logits[mine].argmax(dim=1) == found.targets[mine]
        wanted = torch.stack([loss.sum(), mine.sum().float(), hits.sum().float()])
        torch.testing.assert_close(statistics[row], wanted)
    losses = token_losses(model, inputs, cross_entropy)
    torch.testing.assert_close(losses_of_statistics(statistics), losses)


def test_rows_without_a_token_have_the_loss_zero_and_no_gradient() -> None:
    """A mean over nothing is not a number, and would stop the run."""
    _, model, encoded = loaded("llama")
    encoded.responses[1] = encoded.responses[1][:0]  # type: ignore[index]
    losses = token_losses(model, encoded.inputs(np.arange(3)), cross_entropy)
    assert losses[1] == 0 and bool((losses[[0, 2]] > 0).all())
    alone = token_losses(model, encoded.inputs(np.array([1])), cross_entropy)
    alone.sum().backward()  # type: ignore[no-untyped-call]
    assert alone.tolist() == [0.0]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(not gradient.any() for gradient in gradients)


def test_targets_are_the_tokens_of_the_response_alone() -> None:
    """What a position predicts: of a decoder the token after it."""
    _, _, encoded = loaded("llama")
    inputs = encoded.inputs(np.array([0, 5]))
    for place, row in enumerate((0, 5)):
        targets, ids = inputs[TARGETS][place], inputs["input_ids"][place]
        asked = targets != IGNORED
        assert targets[asked].tolist() == encoded.responses[row].tolist()
        start = len(encoded.prompts[row])
        assert ids[:start].tolist() == encoded.prompts[row].tolist()
        assert asked.nonzero()[0].item() == start - 1
        assert bool((inputs["attention_mask"][place].bool() | ~asked).all())


def test_only_the_positions_of_responses_reach_the_vocabulary() -> None:
    """Logits of prompts are most of the memory of a large vocabulary."""
    _, model, encoded = loaded("llama")
    sizes: list[int] = []
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    head.register_forward_hook(lambda _m, _a, output: sizes.append(output.shape[1]))
    inputs = encoded.inputs(np.array([2]))
    at_targets(model, inputs)
    assert sizes == [len(encoded.responses[2])]


def test_row_means_ignore_where_values_stand() -> None:
    values, rows = torch.tensor([1.0, 5.0, 3.0, 7.0]), torch.tensor([2, 0, 2, 0])
    means: Tensor = row_means(values, rows, 3)
    assert means.tolist() == [6.0, 0.0, 2.0]
