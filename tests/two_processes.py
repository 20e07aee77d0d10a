"""What `test_two_processes` runs in each of two processes under ``torchrun``.

The argument is a JSON list of fits; each may say where one of the processes is sent SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import noiseproof
from noiseproof import engine
from noiseproof.methods import METHODS

PREDICT_ROWS = 4  # several prediction batches, so that each process lacks what others predict


def run(fit: dict[str, Any]) -> None:
    """Run one fit, and once more with resume after a signal to one process."""
    rank = int(os.environ["RANK"])
    assert int(os.environ["WORLD_SIZE"]) == 2
    method = METHODS[fit["method"]["name"]].from_dict(fit.pop("method"))
    train = noiseproof.TrainSettings(**fit.pop("train"))
    at = fit.pop("at", None)
    steps = 0

    def spy(self: object, *given: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == at["step"] and rank == at["rank"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *given, **named)

    if at:
        cls = type(method)
        original = cls.compute_loss
        cls.compute_loss = spy  # type: ignore[method-assign, assignment]
        try:
            noiseproof.fit(method=method, train=train, **fit)
        except noiseproof.Interrupted:
            fit["resume"] = True
        finally:
            cls.compute_loss = original  # type: ignore[method-assign]
        assert fit.get("resume"), "the signal to one process did not stop this one"
        torch.distributed.barrier()
    noiseproof.fit(method=method, train=train, **fit)


if __name__ == "__main__":
    torch.set_num_threads(1)
    engine.PREDICT_ROWS = PREDICT_ROWS
    for asked in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(asked)
