"""Generate what the documentation takes from the code.

Writes docs/methods.md and docs/cli.md whole, and the parts of README.md, docs/noise.md and
docs/benchmark.md between ``<!-- generated: NAME -->`` and ``<!-- end -->``. With --check nothing is
written: the exit code is 1 if a file on disk differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from noiseproof import cards, cli  # noqa: E402
from noiseproof.engine import TrainSettings  # noqa: E402
from noiseproof.method import Method  # noqa: E402
from noiseproof.methods import METHODS  # noqa: E402
from noiseproof.methods.baselines import Tuned  # noqa: E402
from noiseproof.mixture import LossMixture  # noqa: E402
from noiseproof.noise import NOISE_MODELS, Mixture, NoiseModel  # noqa: E402
from noiseproof.tuning import ADAPTER_RATE, RATES  # noqa: E402

NOTE = (
    "<!-- Written by docs/build.py from the code. Change the docstrings there, not this file. -->"
)
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
VALUES = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}


def main(words: list[str]) -> int:
    """Write all generated text, or check it."""
    parser = argparse.ArgumentParser(description="Build the generated documentation.")
    parser.add_argument("--check", action="store_true", help="exit 1 if a file differs")
    check = parser.parse_args(words).check
    stale = []
    for path, text in pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.relative_to(ROOT))
        if not check:
            path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"{name} is out of date; run docs/build.py" if check else f"wrote {name}")
    return int(check and bool(stale))


def pages() -> dict[Path, str]:
    """All generated files, as they should be."""
    whole = {ROOT / "docs/methods.md": methods_page(), ROOT / "docs/cli.md": cli_page()}
    parts = {
        "methods": methods_table,
        "noises": noise_table,
        "formulas": noise_formulas,
        "grids": grids_table,
    }
    for path in (ROOT / "README.md", ROOT / "docs/noise.md", ROOT / "docs/benchmark.md"):
        text = path.read_text(encoding="utf-8")
        whole[path] = PART.sub(lambda found: found[1] + parts[found[2]]() + found[3], text)
    return whole


# --- methods -------------------------------------------------------------------------------------


def methods_page() -> str:
    """Cards, settings and presets of all methods."""
    shared = {item.name: item.default for item in cards.settings(Tuned)}
    shared |= {item.name: item.default for item in cards.settings(LossMixture, "mixture.")}
    rates = ", ".join(f"{name} {rate:g}" for name, rate in RATES.items())
    rates += f", others {ADAPTER_RATE:g}"
    lines = [
        NOTE,
        "# Methods",
        "",
        "`noiseproof methods NAME` prints the same. A setting is given as `--method.NAME VALUE` on",
        "the command line and as a keyword in Python; a preset as `--method CleaR:fast` and as",
        '`CleaR.preset("fast")`. Which method to take: [how to choose](how-to-choose.md).',
        "",
        methods_table("#"),
    ]
    for name, method in METHODS.items():
        found = cards.settings(method)
        own = [
            item
            for item in found
            if shared.get(item.name) != item.default
            or not (issubclass(method, Tuned) or item.name.startswith("mixture."))
        ]
        lines += [f"## {name}", "", card(cards.card(method)), ""]
        lines += [f"Runs on the tasks {', '.join(f'`{task}`' for task in method.tasks)}.", ""]
        lines += settings_table(own) if own else ["No settings of its own."]
        more = []
        if issubclass(method, Tuned):
            more.append("[what is tuned](#what-is-tuned)")
        if len(own) < len(found) and any(item.name.startswith("mixture.") for item in found):
            more.append("[the loss mixture](#the-loss-mixture)")
        if more:
            lines += ["", f"Further settings: {', '.join(more)}."]
        presets = presets_table(method)
        lines += ["", *presets, ""] if presets else [""]
    lines += [
        "## What is tuned",
        "",
        "Every method but CleaR and LoPE, which have adapters always, has these settings.",
        f"Learning rates where none is given: {rates}; NMTune has its own.",
        "",
        *settings_table(cards.settings(Tuned)),
        "",
        "## The loss mixture",
        "",
        "Two Gaussians on the losses of the training rows, as `--method.mixture.NAME`.",
        "",
        *settings_table(cards.settings(LossMixture)),
        "",
    ]
    return "\n".join(lines)


def methods_table(page: str = "docs/methods.md#") -> str:
    """One line per method, linked to its card."""
    lines = ["| method | what it does |", "|---|---|"]
    for name, method in METHODS.items():
        lines.append(f"| [{name}]({page}{name.lower()}) | {marked(cards.summary(method))} |")
    return "\n".join(lines) + "\n"


def card(text: str) -> str:
    """A method card as markdown: its title, then one list item per entry."""
    title, _, rest = text.partition("\n")
    entries = re.split(r"\n(?=[A-Z]\w+: )", rest.strip())
    items = [re.sub(r"^(\w+): ", r"- **\1**: ", " ".join(entry.split())) for entry in entries]
    return "\n".join([marked(title), "", *(marked(item) for item in items)])


def settings_table(settings: list[cards.Setting]) -> list[str]:
    """Name, type, default and meaning of settings."""
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for item in settings:
        kind = cell(re.sub(r"Literal\[(.*)\]", r"\1", item.type).replace("'", ""))
        lines.append(
            f"| `{item.name}` | {kind} | `{item.default}` | {cell(marked(item.meaning))} |"
        )
    return lines


def presets_table(method: type[Method]) -> list[str]:
    """What each preset changes; nothing for a method with its default alone."""
    presets = method.presets()
    if len(presets) == 1:
        return []
    lines = ["| preset | differs from the default in |", "|---|---|"]
    default = flat(presets["default"])
    for name, preset in presets.items():
        changed = [
            f"`{key}={value}`" for key, value in flat(preset).items() if value != default[key]
        ]
        lines.append(f"| `{name}` | {', '.join(changed) or 'nothing'} |")
    return lines


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """All settings of an object, nested ones with dots."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{prefix}{item.name}.")
        else:
            values[prefix + item.name] = value
    return values


# --- noise ---------------------------------------------------------------------------------------


def noise_models() -> list[tuple[str, type[NoiseModel]]]:
    """Every noise model with its heading."""
    return [(kind.__name__, kind) for kind in (*NOISE_MODELS.values(), Mixture)]


def noise_table() -> str:
    """One line per noise model with a spec that parses."""
    lines = ["| noise | such as | what it does |", "|---|---|---|"]
    for name, kind in noise_models():
        first = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
        meaning = first.partition(": ")[2] or first
        meaning = meaning[0].upper() + meaning[1:]
        lines.append(f"| {name} | `{kind.example}` | {cell(marked(meaning))} |")
    return "\n".join(lines) + "\n"


def noise_formulas() -> str:
    """Source, formula and realised rate of every noise model."""
    sections = []
    for name, kind in noise_models():
        title, _, rest = inspect.cleandoc(kind.__doc__ or "").partition("\n")
        rest = re.sub(r"\n    +", " ", rest.strip())
        entries = re.split(r"\n(?=[A-Z][a-z ]+: )", rest)
        items = [re.sub(r"^([A-Z][a-z ]+): ", r"- **\1**: ", " ".join(e.split())) for e in entries]
        sections += [f"### {name}", "", marked(title), "", *map(marked, items), ""]
        sections += [f"Such as `{kind.example}`.", ""]
    return "\n".join(sections)


# --- grids ---------------------------------------------------------------------------------------


def grids_table() -> str:
    """One line per grid of this project: what its first comment and its cost say."""
    lines = ["| file | what it shows | estimated cost |", "|---|---|---|"]
    for path in sorted(ROOT.glob("benchmarks/*.toml")):
        text = path.read_text(encoding="utf-8")
        comment = text.partition("#     noiseproof bench")[0]
        shows = " ".join(re.findall(r"^# (.*)$", comment, re.MULTILINE)).removesuffix(".")
        lines.append(f"| `{path.name}` | {cell(shows)} | {cell(tomllib.loads(text)['cost'])} |")
    return "\n".join(lines) + "\n"


# --- command line --------------------------------------------------------------------------------


class _Captured(Exception):
    """Carries the parser out of a command."""


def parser_of(name: str) -> Any:
    """The parser that a command makes."""

    def capture(parser: Any, words: list[str]) -> Any:
        raise _Captured(parser)

    parse, cli.commands.parse = cli.commands.parse, capture
    try:
        cli.COMMANDS[name]([])
    except _Captured as captured:
        return captured.args[0]
    finally:
        cli.commands.parse = parse
    raise AssertionError(f"command {name} parses nothing")


def cli_page() -> str:
    """Every command with its options."""
    lines = [
        NOTE,
        "# Command line",
        "",
        "`noiseproof COMMAND --help` says the same. A mistake in the command or the data is one",
        "line on standard error and exit code 2. Nothing is overwritten without `--overwrite`.",
        "",
    ]
    for name in cli.COMMANDS:
        parser = parser_of(name)
        description, _, example = inspect.cleandoc(parser.description).partition("\nexample: ")
        lines += [f"## {name}", "", description.strip(), "", "```text", f"usage: {parser.usage}"]
        lines += [f"example: {example}", "```", ""]
        actions = [action for action in parser._actions if action.dest != "help"]
        actions = [action for action in actions if action.help != argparse.SUPPRESS]
        training = [action for action in actions if action.dest.startswith("train.")]
        lines += options(name, [action for action in actions if action not in training])
        if training:
            lines += [
                "`--method NAME` or `--method NAME:PRESET` chooses the method, CleaR without it.",
                "Its settings are `--method.NAME VALUE`; [methods](methods.md) lists them.",
                "",
                inspect.cleandoc(TrainSettings.__doc__ or "").splitlines()[0],
                "",
                *options(name, training),
            ]
    return "\n".join(lines)


def options(name: str, actions: list[Any]) -> list[str]:
    """The table of some options of a command."""
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    for action in actions:
        word = action.option_strings[0] if action.option_strings else action.dest.upper()
        default = f"`{shown(action.default)}`"
        if not action.option_strings or action.required:
            default = "required"
            if action.nargs == "?":
                fits = name == "fit" and action.dest == "data"
                default = "or in --config" if fits else "may be left out"
        elif action.nargs == 0:
            default = ""
        meaning = cell(marked(action.help))
        lines.append(f"| `{word}` | {value_of(action)} | {default} | {meaning} |")
    return [*lines, ""]


def value_of(action: Any) -> str:
    """What may stand behind an option, in words."""
    if action.nargs == 0:
        return ""
    kind = getattr(action, "_typehint", action.type)
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    return VALUES[name.removesuffix(" | None")]


def shown(value: Any) -> str:
    """A default as one types it."""
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return " ".join(map(shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value).replace("\n", "\\n")


# --- text ----------------------------------------------------------------------------------------


def marked(text: str) -> str:
    """Docstring text as markdown: single backticks for double ones, no stray tags."""
    parts = text.replace("``", "`").split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
