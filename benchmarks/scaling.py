"""How time and memory of a whole job grow with rows, processes and text length, and how near its
arithmetic comes to bare matrix products of the same shapes.

    python benchmarks/scaling.py rows --sizes 1000 10000 100000 1000000 --out scaling.json
    python benchmarks/scaling.py processes --out scaling.json
    python benchmarks/scaling.py length --out scaling.json
    python benchmarks/scaling.py limit --out scaling.json
    python benchmarks/scaling.py table scaling.json --into docs/results/scaling.md

The first four measure one section each and put it into the file beside the others; the last prints
the file as Markdown, or puts it into a page between two marks. Needs Linux, for the memory.

The texts are generated. Every point is `noiseproof.fit` in a process of its own: it reads a CSV,
encodes, trains with CleaR (an epoch of warm-up, then a scoring pass and a routed epoch), predicts
and writes its results, checkpoints included. `rows` and `processes` use an encoder so small that
everything around the arithmetic shows, and keep its dropout; CleaR then has no use for features of
the frozen encoder, which it otherwise keeps for every row. `length` and `limit` use a real encoder.
Time is given twice: CPU time of the process, which other work on the machine disturbs least, and
wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
TOPICS = {
    "garden": ("rose", "soil", "seed", "leaf", "flower", "grass"),
    "harbour": ("boat", "ship", "sea", "storm", "water", "coast"),
    "kitchen": ("bread", "meat", "salt", "knife", "plate", "sugar"),
    "street": ("car", "road", "bridge", "train", "wheel", "corner"),
}
FILLER = (
    *("the", "with", "and", "some", "more", "today", "before", "after", "about", "because"),
    *("people", "could", "would", "small", "large", "never", "always", "between", "without"),
)
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
AROUND = 2  # tokens that a tokenizer puts around a text
CHUNK = 10_000  # rows made at once
EPOCHS = 2
PASSES = {"train": EPOCHS, "checkpoint": EPOCHS}  # a row goes through these so often
PHASES = ("read", "encode", "train", "score", "checkpoint", "predict", "write")
CLOCKS = ("cpu_seconds", "wall_seconds")
SECTIONS = ("rows", "processes", "length", "limit")
BEGIN, END = "<!-- generated: scaling -->", "<!-- end -->"


# --- what is measured ----------------------------------------------------------------------------


def write_texts(path: Path, rows: int, words: int, wrong: float = 0.2, seed: int = 0) -> int:
    """Write a CSV (text, label) of random words; a third of them tell the class.

    Args:
        path: The file.
        rows: Rows below the header; classes are drawn.
        words: Words of every text; each is one token.
        wrong: Share of the labels that are another class than the words say.
        seed: Seed of all draws.

    Returns:
        Bytes of all texts together.
    """
    random = np.random.default_rng(seed)
    classes = list(TOPICS)
    telling = np.array([TOPICS[name] for name in classes])  # (C, words of a class)
    size = 0
    with path.open("w", encoding="utf-8") as out:
        out.write("text,label\n")
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            truth = random.integers(len(classes), size=count)
            moved = random.random(count) < wrong
            given = (truth + moved * random.integers(1, len(classes), count)) % len(classes)
            table = random.choice(np.array(FILLER), (count, words))
            some = max(1, words // 3)
            place = random.integers(telling.shape[1], size=(count, some))
            table[:, :some] = telling[truth[:, None], place]
            texts = [" ".join(cells) for cells in random.permuted(table, axis=1).tolist()]
            size += sum(map(len, texts))
            out.writelines(
                f"{text},{classes[label]}\n" for text, label in zip(texts, given, strict=True)
            )
    return size


def build_encoder(folder: Path) -> None:
    """Save a random two-layer BERT, 32 wide, and a tokenizer that knows the words above."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True)
    words = [*MARKS, *FILLER, *(word for topic in TOPICS.values() for word in topic)]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(str(vocabulary), model_max_length=64)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def memory_mb(name: str) -> float:
    """A line of /proc/self/status in MB: VmHWM (highest), VmRSS (now), RssFile (of it, files)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {name}; this benchmark needs Linux")


class Meter:
    """Wall and CPU seconds and the highest resident memory (MB) of the phases of a job.

    A phase inside another interrupts it: no second counts twice.
    """

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.peak_mb: dict[str, float] = {}
        self.phase = "imports"
        self.since = (time.perf_counter(), time.process_time())

    def enter(self, phase: str) -> str:
        """End the phase that runs, begin this one, and say which it was."""
        now = (time.perf_counter(), time.process_time())
        before = self.phase
        for table, start, end in zip((self.wall, self.cpu), self.since, now, strict=True):
            table[before] = table.get(before, 0.0) + end - start
        self.peak_mb[before] = max(self.peak_mb.get(before, 0.0), memory_mb("VmHWM"))
        with suppress(OSError):  # begins a new peak; where that is not allowed, peaks only rise
            Path("/proc/self/clear_refs").write_text("5")
        self.phase, self.since = phase, (time.perf_counter(), time.process_time())
        return before

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Measure what runs inside as this phase."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def wrap(self, owner: Any, attribute: str, phase: str, but_in: str = "") -> None:
        """Measure calls of ``owner.attribute`` as this phase, unless that other phase runs."""
        original = getattr(owner, attribute)

        def measured(*given: Any, **named: Any) -> Any:
            with self.during(but_in if self.phase == but_in else phase):
                return original(*given, **named)

        setattr(owner, attribute, measured)


def measure_point(args: argparse.Namespace) -> None:
    """Run the job of one point in this process and write what was measured, a file per rank."""
    meter = Meter()
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import pandas  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import AutoModelForSequenceClassification  # noqa: F401

    import noiseproof
    from noiseproof import finetune, loop, models
    from noiseproof.tasks import TextClassification, base

    torch.set_num_threads(args.threads)
    meter.wrap(base, "read_examples", "read")
    meter.wrap(TextClassification, "encode", "encode")
    meter.wrap(finetune, "train", "train")
    meter.wrap(noiseproof.CleaR, "on_epoch_start", "score")
    meter.wrap(loop, "save_checkpoint", "checkpoint")
    meter.wrap(loop._Loop, "_predict", "predict", but_in="score")
    meter.wrap(finetune, "sample_table", "predict")
    meter.wrap(finetune, "write_results", "write")
    meter.enter("rest")
    result = noiseproof.fit(
        args.data,
        model=models.resolve_model(args.model),
        method=noiseproof.CleaR(
            warmup_epochs=1, dropout=None if args.dropout == "own" else noiseproof.CleaR.dropout
        ),
        train=noiseproof.TrainSettings(
            epochs=EPOCHS, batch_size=args.batch_size, device="cpu", precision="fp32"
        ),
        out=args.folder,
    )
    meter.enter("end")
    found = {
        "rows": len(result.samples),
        "batch_size": args.batch_size,
        "processes": result.record.model["processes"],
        "cpu_seconds": {name: meter.cpu.get(name, 0.0) for name in (*PHASES, "rest")},
        "wall_seconds": {name: meter.wall.get(name, 0.0) for name in (*PHASES, "rest")},
        "peak_mb": max(meter.peak_mb.values()),
        "peak_mb_by_phase": meter.peak_mb,
        "of_it_files_at_the_end_mb": memory_mb("RssFile"),
        "suspicious": int(result.samples["suspicious"].sum()),
    }
    Path(f"{args.out}.{os.environ.get('RANK', '0')}").write_text(json.dumps(found))


def point(
    folder: Path,
    data: Path,
    model: str,
    *,
    batch_size: int,
    processes: int = 1,
    dropout: str = "own",
) -> dict[str, Any]:
    """Measure one point in fresh processes: times of the first, the largest peak of all."""
    place = Path(tempfile.mkdtemp(dir=folder))
    words = [str(HERE), "point", "--data", str(data), "--model", model]
    words += ["--folder", str(place / "run")]
    words += ["--batch-size", str(batch_size), "--threads", "1", "--dropout", dropout]
    words += ["--out", str(place / "found")]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = [*launch, *words]
    environment = clean_environment(place)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"failed with {done.returncode}: {shlex.join(words)}")
    seconds = time.perf_counter() - started
    ranks = [json.loads(path.read_text()) for path in sorted(place.glob("found.*"))]
    largest = max(rank["peak_mb"] for rank in ranks)
    found: dict[str, Any] = ranks[0] | {"peak_mb": largest, "process_seconds": seconds}
    print(json.dumps(found), flush=True)
    return found


def clean_environment(place: Path) -> dict[str, str]:
    """An environment with an empty cache, one thread and no network."""
    changes = {
        "HF_DATASETS_CACHE": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    kept = {name: value for name, value in os.environ.items() if name != "NOISEPROOF_CACHE"}
    return kept | changes


def in_child(statement: str) -> None:
    """Run a statement of this module in a process of its own.

    This process must stay small: a new one is born with the memory peak of the one that starts it.
    """
    code = f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\nfrom scaling import *\n"
    subprocess.run([sys.executable, "-c", code + statement], check=True)


def measure_rows(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same job on more and more rows."""
    encoder, points = folder / "encoder", []
    in_child(f"build_encoder(Path({str(encoder)!r}))")
    for rows in args.sizes:
        data = folder / "texts.csv"
        size = write_texts(data, rows, args.words)
        found = point(folder, data, str(encoder), batch_size=args.batch_size)
        points.append(found | {"bytes_per_text": size / rows})
    return {"tokens": args.words + AROUND, "points": points}


def measure_processes(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same job in one process and in several."""
    encoder, data = folder / "encoder", folder / "texts.csv"
    in_child(f"build_encoder(Path({str(encoder)!r}))")
    write_texts(data, args.rows, args.words)
    points = [
        point(folder, data, str(encoder), batch_size=args.batch_size, processes=count)
        for count in args.counts
    ]
    return {"tokens": args.words + AROUND, "points": points}


def measure_length(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same job with a real encoder on longer and longer texts."""
    points, data = [], folder / "texts.csv"
    for tokens in args.tokens:
        write_texts(data, args.rows, tokens - AROUND)
        found = point(folder, data, args.model, batch_size=args.batch_size, dropout="method")
        points.append(found | {"tokens": tokens})
    return {"model": args.model, "points": points}


# --- the arithmetic limit ------------------------------------------------------------------------


Product = tuple[int, int, int, int]  # how many, then (m, k) times (k, n)


def products(
    layers: int, wide: int, inner: int, heads: int, *, rows: int, tokens: int, rank: int
) -> tuple[list[Product], list[Product]]:
    """Shapes of the matrix products of a BERT-like encoder with LoRA on query and value.

    Args:
        layers: Number of layers.
        wide: Width of the layers.
        inner: Width inside the feed-forward parts.
        heads: Attention heads.
        rows: Texts of the batch.
        tokens: Tokens of every text.
        rank: LoRA rank.

    Returns:
        Those of the forward pass, and those that training the adapters needs on top: gradients of
        the activations and of the adapters, none of frozen weights; in the first layer none of
        what the frozen embeddings put in.
    """
    many, each, depth = rows * tokens, rows * heads, wide // heads
    square, attention = (1, many, wide, wide), (each, tokens, tokens, depth)
    forward = [
        *[square] * 4,  # query, key, value, output
        *[(1, many, wide, rank), (1, many, rank, wide)] * 2,
        (each, tokens, depth, tokens),
        attention,
        (1, many, wide, inner),
        (1, many, inner, wide),
    ]
    inside = [
        (1, many, wide, inner),
        (1, many, inner, wide),
        square,  # output
        *[(each, tokens, depth, tokens), attention, attention],  # probabilities, value, query
        *[(1, rank, many, wide), (1, many, wide, rank), (1, wide, many, rank)] * 2,
    ]
    to_input = [attention, *[square] * 3, *[(1, many, rank, wide)] * 2]  # key; query, key, value
    return forward * layers, inside + (inside + to_input) * (layers - 1)


def flops(shapes: list[Product]) -> int:
    """Multiplications and additions of these products."""
    return sum(2 * count * m * k * n for count, m, k, n in shapes)


def runner(shapes: list[Product]) -> Callable[[], None]:
    """A function that computes these products once, each on numbers of its own."""
    import torch

    operands = [
        (torch.randn(b, m, k), torch.randn(b, k, n), torch.empty(b, m, n)) for b, m, k, n in shapes
    ]

    def compute() -> None:
        with torch.no_grad():
            for one, other, out in operands:
                torch.bmm(one, other, out=out)

    return compute


class Laps:
    """CPU and wall seconds of many runs of a few things, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, list[tuple[float, float]]] = {}
        self.since = (0.0, 0.0)

    def start(self) -> None:
        """Begin a lap."""
        self.since = (time.process_time(), time.perf_counter())

    def stop(self, name: str) -> None:
        """End the lap and put it down."""
        now = (time.process_time(), time.perf_counter())
        self.laps.setdefault(name, []).append((now[0] - self.since[0], now[1] - self.since[1]))

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        """Run it as a lap."""
        self.start()
        found = call()
        self.stop(name)
        return found

    def medians(self) -> dict[str, dict[str, float]]:
        """Median CPU and wall seconds and number of laps, by name."""
        return {
            name: {
                "cpu_s": statistics.median(cpu for cpu, _ in laps),
                "wall_s": statistics.median(wall for _, wall in laps),
                "laps": len(laps),
            }
            for name, laps in self.laps.items()
        }


def measure_limit_here(args: argparse.Namespace) -> None:
    """Time steps and scoring passes of a real run, and bare products in between.

    They take turns, so that both see the same machine.
    """
    import torch
    from transformers import AutoConfig

    import noiseproof
    from noiseproof.engine import prediction_batches
    from noiseproof.loop import Progress, train
    from noiseproof.methods import clear
    from noiseproof.models import load_text_classifier, resolve_model
    from noiseproof.tables import read_table
    from noiseproof.tasks import TextClassification

    clear.FROZEN_BYTES = 0  # rows around the adapters would skip the encoder: all take part
    torch.set_num_threads(1)
    table = read_table(args.data)
    names = sorted(set(table["label"]))
    model, tokenizer = load_text_classifier(resolve_model(args.model), names)
    encoded = TextClassification(tokenizer).encode(table["text"].tolist())
    if set(encoded.lengths.tolist()) != {args.tokens}:
        raise SystemExit(f"texts have {set(encoded.lengths.tolist())} tokens, not {args.tokens}")
    config = AutoConfig.from_pretrained(resolve_model(args.model))
    size = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    method = noiseproof.CleaR(warmup_epochs=1)
    scored = len(next(iter(prediction_batches(encoded.lengths))))
    common = {"tokens": args.tokens, "rank": method.rank}
    forward, backward = products(*size, config.num_attention_heads, rows=args.batch, **common)
    scoring, _ = products(*size, config.num_attention_heads, rows=scored, **common)
    step_products, scoring_products = runner(forward + backward), runner(scoring)
    laps = Laps()
    step_products()
    scoring_products()

    def report(progress: Progress) -> None:
        if progress.history is None:
            if progress.step > 1:  # the lap before the first step holds the scoring
                laps.stop("step")
            laps.time("step_products", step_products)
            laps.start()

    original = noiseproof.CleaR._scoring_pass

    def timed(*given: Any) -> Any:
        laps.time("scoring_products", scoring_products)
        logits = laps.time("scoring", lambda: original(*given))
        laps.time("scoring_products", scoring_products)
        return logits

    noiseproof.CleaR._scoring_pass = timed  # type: ignore[method-assign]
    labels = torch.tensor([names.index(label) for label in table["label"]])
    settings = noiseproof.TrainSettings(
        epochs=args.epochs, batch_size=args.batch, device="cpu", precision="fp32"
    )
    train(method, model, encoded, labels, len(names), settings, report=report)
    medians = laps.medians()
    work = {"step_products": flops(forward + backward), "scoring_products": flops(scoring)}
    found = {
        "tokens": args.tokens,
        "batch_size": args.batch,
        "rows": len(labels),
        "scoring_batch": scored,
        "laps": medians,
        "gigaflops": {name: count / 1e9 for name, count in work.items()},
        "limit_gigaflops_per_second": {
            name: count / 1e9 / medians[name]["cpu_s"] for name, count in work.items()
        },
        "step_fraction": medians["step_products"]["cpu_s"] / medians["step"]["cpu_s"],
        "scoring_fraction": (medians["scoring_products"]["cpu_s"] / scored)
        / (medians["scoring"]["cpu_s"] / len(labels)),
    }
    Path(args.out).write_text(json.dumps(found))


def measure_limit(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The share of the time of steps and scoring passes that bare products would take."""
    points, data = [], folder / "texts.csv"
    for tokens in args.tokens:
        write_texts(data, args.rows, tokens - AROUND)
        words = [sys.executable, str(HERE), "limit-point", "--data", str(data)]
        words += ["--model", args.model, "--tokens", str(tokens), "--batch", str(args.batch_size)]
        words += ["--epochs", str(args.epochs), "--out", str(folder / "found.json")]
        subprocess.run(words, env=clean_environment(folder), check=True)
        points.append(json.loads((folder / "found.json").read_text()))
        print(json.dumps(points[-1]), flush=True)
    return {"model": args.model, "points": points}


# --- tables --------------------------------------------------------------------------------------


def per_row(found: dict[str, Any], clock: str) -> dict[str, float]:
    """Microseconds of a row going once through each phase."""
    return {
        name: 1e6 * seconds / found["rows"] / PASSES.get(name, 1)
        for name, seconds in found[clock].items()
    }


def markdown(results: dict[str, Any]) -> str:
    """All sections that there are, as Markdown."""
    makers = {"rows": _rows, "processes": _processes, "length": _length, "limit": _limit}
    parts = []
    for name, make in makers.items():
        if name in results:
            section = results[name]
            title, text = make(section)
            command = section.get("command", "")
            parts.append(f"## {title}\n\n```\n{command}\n```\n\n{text}\n")
    return "\n".join(parts)


def _table(header: list[str], lines: list[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _phases(found: dict[str, Any]) -> list[str]:
    times = per_row(found, "cpu_seconds")
    return [
        *(f"{times[name]:.1f}" for name in PHASES),
        *(f"{sum(found[c].values()) / found['rows'] * 1e6:.0f}" for c in CLOCKS),
    ]


def _rows(section: dict[str, Any]) -> tuple[str, str]:
    lines = [
        [
            f"{found['rows']:,}",
            *_phases(found),
            f"{found['peak_mb']:.0f}",
            f"{found['peak_mb'] - found['peak_mb_by_phase']['imports']:.0f}",
        ]
        for found in section["points"]
    ]
    header = ["rows", *PHASES, "whole job", "whole job, wall", "peak, MB", "above the imports, MB"]
    text = (
        "Microseconds of CPU time of one row in one pass of each phase (training: forward, "
        "backward and step); the whole job is all of them, two epochs and start-up included.\n\n"
    )
    text += _table(header, lines)
    peaks = {found["rows"]: found["peak_mb"] for found in section["points"]}
    if 10_000 in peaks and max(peaks) > 10_000:
        ratio = peaks[max(peaks)] / peaks[10_000]
        text += f"\n\nPeak memory of {max(peaks):,} rows against 10,000: {ratio:.2f}."
    phases = ["imports", "read", "encode", "train", "score", "checkpoint", "predict", "write"]
    lines = [
        [f"{found['rows']:,}", *(f"{found['peak_mb_by_phase'].get(n, 0):.0f}" for n in phases)]
        for found in section["points"]
    ]
    text += "\n\nThe peak inside each phase, MB:\n\n" + _table(["rows", *phases], lines)
    return "Rows", text


def _processes(section: dict[str, Any]) -> tuple[str, str]:
    lines = [
        [
            str(found["processes"]),
            *(f"{found['wall_seconds'][name]:.1f}" for name in ("read", "encode")),
            *(f"{found['wall_seconds'][name]:.1f}" for name in ("score", "train", "write")),
            f"{sum(found['wall_seconds'].values()):.1f}",
            f"{found['cpu_seconds']['train']:.1f}",
            f"{found['peak_mb']:.0f}",
        ]
        for found in section["points"]
    ]
    header = ["processes", "read", "encode", "score", "train", "write", "whole job"]
    header += ["train, CPU of one", "peak of one, MB"]
    rows = section["points"][0]["rows"]
    return "Processes", f"{rows:,} rows; wall seconds.\n\n" + _table(header, lines)


def _length(section: dict[str, Any]) -> tuple[str, str]:
    lines = []
    for found in section["points"]:
        times = per_row(found, "cpu_seconds")
        lines.append(
            [
                str(found["tokens"]),
                *(f"{times[name] / 1000:.2f}" for name in ("encode", "train", "score", "predict")),
                *(f"{times[name] / found['tokens']:.0f}" for name in ("train", "score")),
                f"{found['peak_mb']:.0f}",
            ]
        )
    header = ["tokens", "encode, ms", "train, ms", "score, ms", "predict, ms"]
    header += ["train, µs a token", "score, µs a token", "peak, MB"]
    rows = section["points"][0]["rows"]
    text = f"Encoder {section['model']}, {rows:,} rows; CPU time of a row in one pass.\n\n"
    return "Text length", text + _table(header, lines)


def _limit(section: dict[str, Any]) -> tuple[str, str]:
    lines = []
    for found in section["points"]:
        laps, rate = found["laps"], found["limit_gigaflops_per_second"]
        scored = laps["scoring"]["cpu_s"] / found["rows"] * found["scoring_batch"]
        lines += [
            [
                f"step, {found['batch_size']} x {found['tokens']}",
                f"{laps['step']['cpu_s'] * 1000:.0f}",
                f"{laps['step_products']['cpu_s'] * 1000:.0f}",
                f"{rate['step_products']:.0f}",
                f"{found['step_fraction']:.2f}",
            ],
            [
                f"scoring, {found['scoring_batch']} x {found['tokens']}",
                f"{scored * 1000:.0f}",
                f"{laps['scoring_products']['cpu_s'] * 1000:.0f}",
                f"{rate['scoring_products']:.0f}",
                f"{found['scoring_fraction']:.2f}",
            ],
        ]
    header = ["batch x tokens", "ours, ms", "bare products, ms", "their GFLOP/s", "fraction"]
    text = (
        f"Encoder {section['model']} with CleaR's LoRA, fp32, one thread; median CPU time. Both "
        "sides take turns in one process. No row skips the encoder here, as rows around all "
        "adapters otherwise do. The fraction is the share of our time that the bare matrix "
        "products of the same shapes take.\n\n"
    )
    return "The arithmetic limit", text + _table(header, lines)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN + "\n")
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


# --- commands ------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in SECTIONS:
        command = commands.add_parser(name)
        command.add_argument("--out", required=True, help="JSON file; other sections in it stay")
        command.add_argument("--batch-size", type=int, default=32 if name == "limit" else 128)
        if name in ("rows", "processes"):
            command.add_argument("--words", type=int, default=10)
        if name == "rows":
            sizes = [1000, 10_000, 100_000]
            command.add_argument("--sizes", type=int, nargs="+", default=sizes)
        if name == "processes":
            command.add_argument("--rows", type=int, default=20_000)
            command.add_argument("--counts", type=int, nargs="+", default=[1, 2])
        if name in ("length", "limit"):
            command.add_argument("--model", default="minilm")
            command.add_argument("--rows", type=int, default=256)
            tokens = [8, 32, 128] if name == "length" else [16, 32]
            command.add_argument("--tokens", type=int, nargs="+", default=tokens)
        if name == "limit":
            command.add_argument("--epochs", type=int, default=3)
        if name == "length":
            command.set_defaults(batch_size=32)
    table = commands.add_parser("table")
    table.add_argument("results")
    table.add_argument("--into", help="page with the marks; without it, prints")
    inner = commands.add_parser("point")
    for word in ("data", "model", "folder", "out"):
        inner.add_argument(f"--{word}", required=True)
    inner.add_argument("--batch-size", type=int, required=True)
    inner.add_argument("--threads", type=int, required=True)
    inner.add_argument("--dropout", choices=("own", "method"), required=True)
    inner = commands.add_parser("limit-point")
    for word in ("data", "model", "out"):
        inner.add_argument(f"--{word}", required=True)
    for word in ("tokens", "batch", "epochs"):
        inner.add_argument(f"--{word}", type=int, required=True)
    return parser


def main(words: list[str] | None = None) -> None:
    args = build_parser().parse_args(words)
    if args.command == "point":
        measure_point(args)
    elif args.command == "limit-point":
        measure_limit_here(args)
    elif args.command == "table":
        text = markdown(json.loads(Path(args.results).read_text(encoding="utf-8")))
        if args.into:
            put_into(Path(args.into), text)
        else:
            print(text)
    else:
        measure = {
            "rows": measure_rows,
            "processes": measure_processes,
            "length": measure_length,
            "limit": measure_limit,
        }[args.command]
        with tempfile.TemporaryDirectory() as folder:
            section = measure(args, Path(folder))
        given = sys.argv[1:] if words is None else words
        section["command"] = shlex.join(["python", "benchmarks/scaling.py", *given])
        out = Path(args.out)
        results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        results[args.command] = section
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
