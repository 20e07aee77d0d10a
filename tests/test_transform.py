"""Stages that train on other texts than were given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from noiseproof.method import Columns, Method, Run, Stage
from tiny import Tiny, same_weights


@dataclass(frozen=True)
class Changing(Method):
    """Plain fine-tuning in which every ``every``-th row reads otherwise."""

    every: int = 2

    def stages(self, epochs: int) -> list[Stage]:
        def transform(texts: tuple[str, ...], row: int, epoch: int, seed: int) -> tuple[str, ...]:
            return ("old bread",) if self.every and row % self.every == 0 else texts

        return [Stage("train", epochs, transform=transform)]

    def on_epoch_start(self, run: Run) -> Columns:
        assert run.changed is not None
        return {"changed": run.changed.clone(), "score": run.predict()}


def test_a_transform_that_changes_nothing_is_plain_fine_tuning(tiny_run: Tiny):
    """Encoding the rows anew must not disturb training: equal bit for bit, dropout included."""
    outcome = tiny_run.fit(Changing(every=0))
    assert same_weights(outcome.model, tiny_run.fit(Method()).model)
    assert not outcome.run.columns["changed"].any()


def test_changed_rows_train_and_given_rows_are_predicted(tiny_run: Tiny):
    outcome = tiny_run.fit(Changing())
    assert not same_weights(outcome.model, tiny_run.fit(Method()).model)
    assert torch.equal(outcome.run.columns["changed"], torch.arange(25) % 2 == 0)
    assert len(set(outcome.run.predict()[::2].max(dim=1).values.tolist())) > 2
