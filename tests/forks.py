"""Real processes for tests that kill them: forked from one interpreter that has all imports done.

As a program it is that interpreter: JSON requests on stdin, one JSON answer a line on stdout. It
never trains itself, so that a fork of it may.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from tiny import environment

INTERRUPTED = 75  # exit code of a child that stopped on SIGINT or SIGTERM


class Forks:
    """Starts children that run ``noiseproof.fit``, and tells how they ended."""

    def __enter__(self) -> Forks:
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self._answer() == "ready"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait(timeout=30)
        self.server.stdout.close()

    def start(self, log: Path, fit: dict[str, Any], **request: Any) -> int:
        """Start a child.

        Args:
            log: File for its output.
            fit: Arguments of ``noiseproof.fit``; method and train as dicts.
            **request: ``env``; ``at``: where it sends itself a signal, see `_trap`; ``signal``.

        Returns:
            Its process number.
        """
        return int(self._ask({"fit": fit, "log": str(log), **request}))

    def wait(self, pid: int) -> int:
        """Wait for a child: its exit code, or minus the number of the signal that ended it."""
        return int(self._ask({"wait": pid}))

    def run(self, log: Path, fit: dict[str, Any], **request: Any) -> int:
        """Start a child and wait for it."""
        return self.wait(self.start(log, fit, **request))

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.server.stdout is not None
        return json.loads(self.server.stdout.readline())


def _trap(at: dict[str, Any], signum: int) -> Any:
    """Send this process a signal at a moment; returns what `fit` takes as ``report``.

    ``{"epoch": 1, "step": 2}`` is after that step, of one stage alone with ``"stage"``; ``{"event":
    "os.rename", "path": "history.csv", "count": 2}`` is just before Python does that to a path of
    that ending for the second time.
    """
    left = int(at.get("count", 1))

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event != at["event"]:
            return
        paths = [str(part) for part in arguments if isinstance(part, str | os.PathLike)]
        if any(path.endswith(at["path"]) for path in paths):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signum)

    def on_step(progress: Any) -> None:
        here = (progress.stage, progress.epoch, progress.step)
        there = (at.get("stage", progress.stage), at["epoch"], at["step"])
        if progress.history is None and here == there:
            os.kill(os.getpid(), signum)

    if "event" in at:
        sys.addaudithook(on_event)
        return None
    return on_step


def _child(request: dict[str, Any]) -> int:
    import noiseproof
    from noiseproof.methods import METHODS

    fit = dict(request["fit"])
    method = METHODS[fit["method"]["name"]].from_dict(fit.pop("method"))
    train = noiseproof.TrainSettings(**fit.pop("train"))
    trap = request.get("at")
    report = _trap(trap, int(request.get("signal", signal.SIGKILL))) if trap else None
    try:
        noiseproof.fit(method=method, train=train, report=report, **fit)
    except noiseproof.Interrupted:
        return INTERRUPTED
    return 0


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    with open(request["log"], "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.environ.update(request.get("env", {}))
        try:
            code = _child(request)
        except BaseException:
            traceback.print_exc(file=log)
        log.flush()
    os._exit(code)


def _serve() -> None:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import pandas  # noqa: F401
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    from sklearn import metrics  # noqa: F401
    from transformers import AutoTokenizer, BertForSequenceClassification  # noqa: F401

    import noiseproof.job  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = _fork(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        _serve()
