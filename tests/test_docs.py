"""The documentation is true: its commands and examples run, its links and tables are right."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from language import language_model
from noiseproof import cli, load
from noiseproof.methods import METHODS
from noiseproof.report import report
from rows import feature_rows, image_model, image_rows, response_rows
from test_layers import FLOORS
from tiny import environment, table

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VIT = "google/vit-base-patch16-224-in21k"
SHELL = ("console", "bash", "sh", "shell")


@dataclass(frozen=True)
class Block:
    """A fenced block, with the comment in the line above it."""

    mark: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(mark, language, text) for mark, language, text in found]


def commands(block: Block) -> list[str]:
    """The commands of a block that runs; lines without a prompt are output."""
    if block.language not in SHELL or block.mark.startswith("not run:"):
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    typed = [line.removeprefix("$ ") for line in lines if re.match(r"\$ |noiseproof ", line)]
    other = [line for line in typed if not line.startswith("noiseproof ")]
    assert not other, f"mark the block <!-- not run: reason -->: {other}"
    return typed


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the examples speak of; the default encoder is the tiny model."""
    for name, rows, seed in (("tickets", 36, 0), ("test", 9, 1), ("new", 4, 2)):
        frame = table(rows, wrong=0.2 if name == "tickets" else 0.0, seed=seed)
        frame["intent"] = frame["label"]
        columns = ["text"] if name == "new" else ["text", "intent"]
        frame[columns].to_csv(tmp_path / f"{name}.csv", index=False)
    shouted = pd.read_csv(tmp_path / "test.csv")
    shouted["text"] = shouted["text"].str.upper()
    shouted.to_csv(tmp_path / "shouted.csv", index=False)
    photos = image_rows(12, wrong=0.0)
    for row, (picture, label) in enumerate(zip(photos["image"], photos["label"], strict=True)):
        place = tmp_path / "photos" / "train" / label
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{row:03d}.png")
    train, test = feature_rows(30), feature_rows(9, seed=1)
    np.savez(
        tmp_path / "features.npz",
        x_train=train["features"],
        y_train=train["label"],
        x_test=test["features"],
        y_test=test["clean_label"],
    )
    for name, rows in (("sft", response_rows(24)), ("sft-test", response_rows(6, seed=1))):
        frame = pd.DataFrame({"prompt": rows["text"], "response": rows["label"]})
        frame.to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
    frame[["prompt"]].to_json(tmp_path / "prompts.jsonl", orient="records", lines=True)
    monkeypatch.setattr(
        "noiseproof.tasks.language.resolve_model", lambda name: language_model("qwen2")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "noiseproof.models.resolve_model",
        lambda name: {"minilm": str(tiny_model), VIT: image_model()}.get(name, name),
    )
    return tmp_path


def as_file(block: Block, request: pytest.FixtureRequest, patch: pytest.MonkeyPatch) -> None:
    """Run a block that is a whole file: a method is registered, the functions of a test run."""
    path = Path(block.mark.removeprefix("file: "))
    name = path.stem if path.parts[0] == "tests" else ".".join(path.with_suffix("").parts[1:])
    module = ModuleType(name, block.text.split('"""')[1])
    patch.setitem(sys.modules, name, module)
    exec(compile(block.text, str(path), "exec"), module.__dict__)
    for value in list(vars(module).values()):
        if getattr(value, "__module__", "") != name:
            continue
        if path.parts[0] == "src" and inspect.isclass(value):
            patch.setitem(METHODS, value.__name__, value)
        if path.parts[0] == "tests" and getattr(value, "__name__", "").startswith("test_"):
            needs = inspect.signature(value).parameters
            value(**{need: request.getfixturevalue(need) for need in needs})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_example_runs(
    page: Path,
    workplace: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the order of the page, in one folder: a later block may use what an earlier one made."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        for command in commands(block):
            code = cli.main(shlex.split(command, comments=True)[1:])
            assert code == 0, f"{command}: {capsys.readouterr().err}"
        if block.mark.startswith("file: "):
            as_file(block, request, monkeypatch)
        elif block.language == "python" and block.mark == "":
            exec(compile(block.text, name_of(page), "exec"), names)
    alone = [block.text for block in blocks(page) if block.mark == "without noiseproof"]
    if alone:
        said = run_without_noiseproof(alone, workplace)
        folders = [re.findall(r'"(runs/\w+)/model"', text)[0] for text in alone]
        texts = [re.findall(r'tokenizer\("(.*?)"', text)[0] for text in alone]
        runs = zip(folders, texts, strict=True)
        assert said == [load(folder).predict([text])[0] for folder, text in runs]


def run_without_noiseproof(texts: list[str], folder: Path) -> list[str]:
    """What the blocks print in one process in which ``import noiseproof`` fails."""
    program = 'import sys\nsys.modules["noiseproof"] = None\n' + "\n".join(texts)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_block_has_a_language_and_a_known_mark() -> None:
    """A misspelt mark would silently run what must not run, or run nothing at all."""
    known = r"not run: .+|without noiseproof|file: (src|tests)/\S+\.py|"
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(blocks(page))
        for block in blocks(page):
            assert block.language and re.fullmatch(known, block.mark), (page, block)


def test_the_runner_reads_prompts_continued_lines_and_marks() -> None:
    typed = "$ noiseproof demo \\\n    --out x\nsome output\n$ noiseproof methods  # a comment\n"
    assert [line.split() for line in commands(Block("", "console", typed))] == [
        ["noiseproof", "demo", "--out", "x"],
        ["noiseproof", "methods", "#", "a", "comment"],
    ]
    assert commands(Block("not run: minutes", "console", typed)) == []
    with pytest.raises(AssertionError, match="not run"):
        commands(Block("", "console", "$ make demo\n"))


# --- generated text ------------------------------------------------------------------------------


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date(
    build: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main(["--check"]) == 0, f"{capsys.readouterr().out}(make docs)"


RESULTS = {  # page -> folder of its records, where that has another name
    "trec6-whole": "foundation",
    "trec6-whole-fp32": "foundation-fp32",
    "trec6-2000": "trec",
    "turn-text": "turn",
    "turn-network": "images",
    "lope-classification": "lope",
}
STUDIES = {"noisy-pretraining", "noisy-pretraining-cifar10"}  # whose records are too many to keep
REPORTED = [
    page
    for page in sorted((ROOT / "docs/results").glob("*.md"))
    if page.read_text(encoding="utf-8").startswith("<!-- Written by noiseproof report ")
    and page.stem not in STUDIES
]


@pytest.mark.parametrize("page", REPORTED, ids=lambda page: page.stem)
def test_a_page_of_results_is_what_its_records_say(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that no record holds any more, or one typed by hand, is no result."""
    monkeypatch.chdir(ROOT)
    records = Path("docs/results/records", RESULTS.get(page.stem, page.stem))
    title = None
    if not (records / "grid.json").exists():  # of a script; what a grid calls itself is given
        title = page.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
    made = report(records, tmp_path / page.name, title=title)
    assert made.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_all_kept_records_have_a_page() -> None:
    """Records that no page reports are work that nobody sees."""
    kept = {folder.name for folder in (ROOT / "docs/results/records").iterdir()}
    assert {RESULTS.get(page.stem, page.stem) for page in REPORTED} == kept


def test_every_grid_of_this_project_is_in_the_documentation() -> None:
    """A grid that nobody can find is not run again."""
    page = (ROOT / "docs/benchmark.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\S+\.toml)` \| .+ \| .+ \|$", page, re.MULTILINE)
    assert listed == sorted(path.name for path in ROOT.glob("benchmarks/*.toml"))


def test_check_answers_1_and_writes_nothing(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("old", encoding="utf-8")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "pages", lambda: {page: "new"})
    assert build.main(["--check"]) == 1 and page.read_text(encoding="utf-8") == "old"
    assert build.main([]) == 0 and page.read_text(encoding="utf-8") == "new"
    assert build.main(["--check"]) == 0


def test_the_page_of_commands_keeps_descriptions_and_defaults_whole(build: ModuleType) -> None:
    """A description of two paragraphs is no example, and an option that is not told has no row."""
    page = build.cli_page()
    examples = re.findall(r"^example: (.*)$", page, re.MULTILINE)
    assert all(example.startswith("noiseproof ") for example in examples)
    assert "SUPPRESS" not in page and "`[" not in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(row.endswith("|") for row in rows)


def test_the_readme_excepts_the_methods_that_do_not_run_on_a_kind_of_rows() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for task, rows in (("features", "run on features"), ("image", "run on images")):
        missing = [name for name, method in METHODS.items() if task not in method.tasks]
        assert f"All methods but {' and '.join(missing)} {rows}" in text
    untuned = [name for name, method in METHODS.items() if not hasattr(method(), "tune")]
    assert f"all but {' and '.join(untuned)} run as full fine-tuning" in text


def test_every_method_has_a_section_and_a_row_in_the_readme() -> None:
    methods = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\w+)\]\(docs/methods\.md#", readme, re.MULTILINE) == list(METHODS)
    assert re.findall(r"^## (\w+)$", methods, re.MULTILINE) == list(METHODS)


# --- links and tables ----------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        place, _, anchor = target.partition("#")
        path = (page.parent / place).resolve() if place else page
        assert path.exists(), f"{target} is missing"
        assert not anchor or anchor in anchors(path), f"{target}: no such heading"


def test_the_readme_lists_every_source_file_in_about_five_words() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w/]+\.py)` \| (.+) \|$", readme, re.MULTILINE))
    package = ROOT / "src/noiseproof"
    assert set(rows) == {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert {name: text for name, text in rows.items() if not 3 <= len(text.split()) <= 8} == {}


def test_every_test_that_a_page_of_results_names_exists() -> None:
    named = {
        found
        for page in (ROOT / "docs/results").glob("*.md")
        for found in re.findall(r"`(tests/\w+\.py)::(\w+)`", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_readme_names_the_torch_of_the_lock() -> None:
    pin = re.compile(r"\btorch==[\d.]+\d")
    lock = pin.findall((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    named = pin.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert named and set(named) <= set(lock)


def test_the_floors_are_those_that_the_tests_enforce() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (`.+`) \|$", page, re.MULTILINE)
    told = {int(floor): set(re.findall(r"`(\w+)`", names)) for floor, names in rows}
    package = ROOT / "src/noiseproof"
    there = {path.stem for path in package.iterdir()} - {"__init__", "__pycache__", "py"}
    assert told == {floor: set(rooms) & there for floor, rooms in FLOORS.items()}


def test_architecture_names_every_key_that_a_run_leaves_behind(workplace: Path) -> None:
    words = (
        "fit tickets.csv --label intent --test test.csv --validation 0.2 --noise symmetric:0.3 "
        "--method CrossEntropy --train.epochs 1 --train.device cpu --out run"
    )
    assert cli.main(words.split()) == 0
    record = json.loads((workplace / "run/record.json").read_text(encoding="utf-8"))
    history = pd.read_csv(workplace / "run/history.csv")
    samples = pd.read_parquet(workplace / "run/samples.parquet")
    parts = ("seeds", "data", "noise", "model", "timings", "metrics")
    keys = [*record, *history, *samples, *(key for part in parts for key in record[part])]
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert [key for key in keys if f"`{key}`" not in page] == []
    left = {path.name for path in (workplace / "run").iterdir()}
    assert [name for name in left if not re.search(rf"`{re.escape(name)}/?`", page)] == []
