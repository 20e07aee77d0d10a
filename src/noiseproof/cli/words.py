"""From the words of a command line to settings: options, config files, what was meant."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from noiseproof.cli.showing import PROGRAM
from noiseproof.errors import InputError, in_words, path_of, unknown_name

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

NO_SETTINGS = {"--help", "--config"}  # options that a config cannot give


_COLUMNS = ("text", "label", "clean_label", "row_id", "image")
METAVARS = {
    **dict.fromkeys(_COLUMNS, "COLUMN"),
    **dict.fromkeys(("test", "validation"), "FILE|SHARE"),
    **dict.fromkeys(("label_names", "noise_pool", "config", "transition_out"), "FILE"),
    "noise": "SPEC",
    "features": "COLUMNS",
    "answer_pattern": "REGEX",
    "validation_labels": "{clean,noisy}",
    "on_bad_image": "{error,skip}",
    "choice_score": "{mean,sum}",
    "task": "KIND",
    "schedule": "{linear,cosine,constant}",
    "precision": "{auto,fp32,bf16,fp16}",
    "device": "{auto,cpu}",
    "evaluate": "{epoch,end}",
    "select": "{last,best}",
}
"""What the help shows as the value of an option, by the name of its setting."""


def new_parser(name: str, usage: str, doc: str | None) -> ArgumentParser:
    """A parser of one command; its help is the docstring of the command."""
    from argparse import RawDescriptionHelpFormatter
    from inspect import cleandoc

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Options with their meaning and default, without Python's types."""

        def __init__(self, prog: str, **settings: Any) -> None:
            settings = {"max_help_position": 32} | settings
            super().__init__(prog, **settings)  # type: ignore[no-untyped-call]

        def _get_default_metavar_for_optional(self, action: Any) -> str:
            """What to give, or the last word of the name: the whole would take a line."""
            name = str(action.dest).rpartition(".")[2]
            return METAVARS.get(name) or name.rpartition("_")[2].upper()

        def _get_help_string(self, action: Any) -> str:
            text, value = str(action.help or ""), action.default
            untold = value is None or value is False or value == []
            if untold or not action.option_strings or action.dest == "help":
                return text
            values = value if isinstance(value, list) else [value]
            return f"{text} (default: {' '.join(map(_default, values))})"

    return ArgumentParser(
        prog=f"{PROGRAM} {name}",
        usage=f"{PROGRAM} {name} {usage}",
        description=cleandoc(doc or ""),
        formatter_class=Help,
        exit_on_error=False,
        allow_abbrev=False,
    )


def add_fields(
    parser: ArgumentParser,
    settings: Any,
    prefix: str,
    title: str | None,
    instead: str | None = None,
) -> None:
    """Options ``--prefix.field`` for a settings object, nested ones with more dots.

    Args:
        parser: Gets the options.
        settings: An object whose values are the defaults.
        prefix: First part of the names.
        title: Of the group in the help; None makes no group.
        instead: What the help says in place of the options.
    """
    from jsonargparse import SUPPRESS

    from noiseproof.cards import field_meanings

    group = parser if title is None else parser.add_argument_group(title, instead)
    meanings, hints = field_meanings(type(settings)), get_type_hints(type(settings))
    for item in fields(settings):
        value, name = getattr(settings, item.name), f"{prefix}.{item.name}"
        if is_dataclass(value):
            nested = None if instead else f"{title}: {item.name}"
            add_fields(parser, value, name, nested, instead)
            continue
        meaning = SUPPRESS if instead else meanings.get(item.name, "")
        group.add_argument(f"--{name}", type=hints[item.name], default=value, help=meaning)


def settings_of(settings: Any, given: Any) -> Any:
    """A settings object of the same class with the parsed values."""
    values = {}
    for item in fields(settings):
        old, new = getattr(settings, item.name), getattr(given, item.name)
        values[item.name] = settings_of(old, new) if is_dataclass(old) else new
    return type(settings)(**values)


def parse(parser: ArgumentParser, words: list[str]) -> Any:
    """Parse, and turn what jsonargparse says of a mistake into one plain line."""
    from jsonargparse import ArgumentError

    words = _nulls(parser, words)
    try:
        return parser.parse_args(words)
    except (ArgumentError, TypeError, KeyError) as error:
        raise InputError(_plain(parser, words, " ".join(str(error).split()))) from error


def _nulls(parser: ArgumentParser, words: list[str]) -> list[str]:
    """The words with null for None, as Python writes it, where it cannot be a text."""
    options = {
        option
        for action in parser._actions
        if types.NoneType in (parts := get_args(getattr(action, "_typehint", None)))
        and str not in parts
        for option in action.option_strings
    }
    found: list[str] = []
    for word in words:
        name, _, value = word.partition("=")
        if value == "None" and name in options:
            word = f"{name}=null"
        elif word == "None" and found and found[-1] in options:
            word = "null"
        found.append(word)
    return found


def _plain(parser: ArgumentParser, words: list[str], text: str) -> str:
    """What a message of jsonargparse means: expected, got, what to do."""
    usage = f"usage: {parser.usage}"
    if found := re.search(r"nrecognized arguments?: (\S+)", text):
        word = found[1].partition("=")[0]
        if not word.startswith("--"):
            return f"unexpected argument {found[1]!r}; {usage}"
        return _unknown(parser, word, "option")
    if found := re.search(r"arguments are required: (.+)", text):
        names = [name.strip() for name in found[1].split(",")]
        shown = {action.dest: _shown(action) for action in parser._actions}
        missing = " and ".join(shown.get(name, name) for name in names)
        return f"{missing} {'is' if len(names) == 1 else 'are'} missing; {usage}"
    found = re.match(r'Parser key "([^"]+)"|argument (\S+): ', text)
    name = (found[1] or found[2]) if found else None
    for action in parser._actions:
        if name not in (action.dest, *action.option_strings):
            continue
        expected = in_words(
            getattr(action, "_typehint", None) or action.type or str, "null", "a JSON list"
        )
        if "expected one argument" in text:
            return f"{_shown(action)} needs a value: {expected}"
        return f"{_shown(action)}: expected {expected}, got {_given(action, words)!r}"
    return f"{text} (see {parser.prog} --help)"


def _default(value: object) -> str:
    """A default as one types it, in one line.

    >>> _default(True), _default(0.5)
    ('true', '0.5')
    """
    return json.dumps(value) if isinstance(value, bool) else str(value).replace("\n", "\\n")


def _shown(action: Any) -> str:
    """An option or argument as the user writes it."""
    return str(action.option_strings[-1] if action.option_strings else action.metavar)


def _given(action: Any, words: Sequence[str]) -> str:
    """The value that the words give an option; the last one counts."""
    found = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in action.option_strings:
            found = value if equals else following
    return found


def _options_like(parser: ArgumentParser, word: str) -> list[str]:
    """The options of the group that a name belongs to: ``--method.``, ``--train.`` or neither."""
    from argparse import SUPPRESS

    grouped = word.startswith(("--method.", "--train."))  # the help does not list the method's
    told = [action for action in parser._actions if grouped or action.help != SUPPRESS]
    options = [option for action in told for option in action.option_strings]
    start = word.split(".")[0] + "."
    near = [option for option in options if option.startswith(start)]
    return near or [o for o in options if o[:2] == "--" and "." not in o and "_" not in o]


def _unknown(parser: ArgumentParser, option: str, kind: str) -> str:
    """One line on an unknown option, or setting of a config, which are written without dashes.

    A name without its group may mean a setting of a group: --seed is --train.seed.
    """
    cut = 2 if kind == "setting" else 0
    field = option.lstrip("-").replace("-", "_")
    options = [name for action in parser._actions for name in action.option_strings]
    inside = [name[cut:] for name in options if name.endswith(f".{field}")]
    if inside:
        return f"unknown {kind} {option[cut:]!r}; did you mean {' or '.join(inside)}?"
    left_out = NO_SETTINGS if kind == "setting" else ()
    near = [name[cut:] for name in _options_like(parser, option) if name not in left_out]
    return unknown_name(kind, option[cut:], near, f"{parser.prog} --help")


def check_matrix_file(path: Path, overwrite: bool) -> None:
    """Refuse a place for the transition matrix that cannot be written or read again."""
    if path.suffix.lower() != ".json":
        raise InputError(f"--transition-out: expected the name of a .json file, got {str(path)!r}")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another --transition-out or give --overwrite")


def take_configs(words: list[str]) -> tuple[list[str], list[tuple[str, Path]]]:
    """Take every ``--config FILE`` out of the words: the rest, and each setting with its file.

    The settings go before the words, which win: what is typed as well is not read from a file.
    """
    rest, files = _take(words, "--config", "a file: YAML, TOML or JSON")
    settings: list[tuple[str, Path]] = []
    for file in files:
        path = path_of(file)
        settings += [(setting, path) for setting in _option_words(_read_config(path))]
    typed = {word.partition("=")[0] for word in rest} - {"--test-ood"}  # of which each counts
    return rest, [item for item in settings if item[0].partition("=")[0] not in typed]


def check_configs(parser: ArgumentParser, settings: Sequence[tuple[str, Path]]) -> None:
    """Name the file of a setting that does not exist."""
    options = {option for action in parser._actions for option in action.option_strings}
    for word, path in settings:
        option = word.partition("=")[0]
        if option not in options - NO_SETTINGS and option != "--method":
            raise InputError(f"config {path}: {_unknown(parser, option, 'setting')}")


@contextmanager
def as_typed(parser: ArgumentParser, configs: Sequence[tuple[str, Path]] = ()) -> Iterator[None]:
    """Name settings in a message by their options, and the config file that the first came from.

    Python names a setting ``train.epochs``, ``CleaR.gamma`` or ``noise_pool``.
    """
    try:
        yield
    except InputError as error:
        raise InputError(_as_typed(str(error), parser, configs)) from error


_NAMED = re.compile(
    r"(?<!\w)'[^']*'|"  # what is quoted came from the user
    r"(?<![\w./-])(?P<name>[A-Za-z]\w*(?:\.\w+)*)(?P<value>=(?:'[^']*'|[^\s;,)]*[^\s;,).:]))?"
)
_SURELY = re.compile("[._]")  # no word of a sentence looks like this
_BEFORE = ("give ", "leave ")
_AFTER = (" must ", " is nothing ", " works ", " would ", ": ", " '")


def _as_typed(message: str, parser: ArgumentParser, configs: Sequence[tuple[str, Path]]) -> str:
    options = {option for action in parser._actions for option in action.option_strings}
    first = [word for word in re.findall(r"^--[\w.-]+", message) if word in options]

    def typed(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"] or ""
        option = _option_of(name, options) if name else None
        starts = not found.start() and message.startswith(_AFTER, found.end())
        told = message[: found.start()].endswith(_BEFORE)
        if option is None or not (value or starts or told or _SURELY.search(name)):
            return found[0]
        if not found.start():
            first.append(option)
        return f"{option}{value.replace('=', ' ', 1)}"

    message = _NAMED.sub(typed, message)
    files = [path for word, path in configs if word.partition("=")[0] in first]
    return f"config {files[-1]}: {message.removeprefix('--')}" if files else message


def _option_of(name: str, options: set[str]) -> str | None:
    """The option that a setting has, whose name may lack its group where one group has it."""
    field = name.rpartition(".")[2]
    grouped = [f"--{group}.{field}" for group in ("method", "train")]
    for spelled in (f"--{name}", f"--{name.replace('_', '-')}"):
        if spelled in options:
            return spelled
    if "." in name:
        return grouped[0] if grouped[0] in options else None
    found = [option for option in grouped if option in options]
    return found[0] if len(found) == 1 else None


def _read_config(path: Path) -> dict[str, Any]:
    """A YAML, TOML or JSON file of settings; of a ``record.json`` its specification."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            if sys.version_info >= (3, 11):
                import tomllib
            else:
                import tomli as tomllib
            values: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"cannot read config {path}: {error.strerror or error}") from error
    except Exception as error:  # each format has its own, and YAML's values raise more
        kind = {".toml": "TOML", ".json": "JSON"}.get(path.suffix, "YAML")
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"line {mark.line + 1}: {problem}" if mark and problem else str(error)
        raise InputError(f"config {path} is not valid {kind}: {reason}") from error
    if isinstance(values, dict) and isinstance(values.get("spec"), dict):
        values = _of_record(values["spec"])
    if not isinstance(values, dict):
        raise InputError(
            f"config {path} must hold names and values such as 'label: intent', "
            f"got {type(values).__name__}"
        )
    return values


def _of_record(spec: dict[str, Any]) -> dict[str, Any]:
    """A specification with what it leaves out because it was so before there was a setting."""
    from noiseproof.methods import METHODS

    method: Any = spec.get("method")
    if not isinstance(method, dict) or method.get("name") not in METHODS:
        return spec
    return spec | {"method": {**METHODS[method["name"]].later, **method}}


def _option_words(values: dict[Any, Any], prefix: str = "") -> list[str]:
    """Nested settings as command-line words ``--name=value``."""
    words: list[str] = []
    for key, value in values.items():
        name = str(key)
        if name == "name" and prefix == "method.":
            words.insert(0, f"--method={value}")
        elif name == "test_ood" and isinstance(value, dict) and not prefix:
            words += [f"--test-ood={key}={file}" for key, file in value.items()]
        elif name == "test_noise" and isinstance(value, list) and not prefix:
            words += [f"--test-noise={spec}" for spec in value]
        elif isinstance(value, dict):
            words += _option_words(value, f"{prefix}{name}.")
        elif name in ("resume", "overwrite") and not prefix:
            words += [f"--{name}"] if value else []
        elif name == "text" and isinstance(value, list) and not prefix:
            words.append(f"--text={','.join(map(str, value))}")
        elif value is not None or prefix:  # outside the groups null is every default
            dashed = name if prefix or "." in name else name.replace("_", "-")
            shown = value if isinstance(value, str) else json.dumps(value, default=str)
            words.append(f"--{prefix}{dashed}={shown}")
    return words


def method_words(words: list[str]) -> tuple[list[str], Any]:
    """Take ``--method NAME[:PRESET]`` out of the words; the rest, and the preset's settings."""
    from noiseproof.methods import CleaR, method_of

    chosen: Any = CleaR()
    rest, given = _take(words, "--method", "a name; noiseproof methods lists them")
    for name in given:
        chosen = method_of(name)
    return rest, chosen


def ood_words(words: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """Take every ``--test-ood NAME=FILE`` out of the words; the rest, and the files by name.

    Of two with one name the last counts: what a config says goes first.
    """
    rest, given = _take(words, "--test-ood", "NAME=FILE")
    files: dict[str, str] = {}
    for word in given:
        name, equals, file = word.partition("=")
        if not (name and equals and file):
            raise InputError(f"--test-ood: expected NAME=FILE, got {word!r}")
        files[name] = file
    return rest, files or None


def test_noise_words(words: list[str]) -> tuple[list[str], tuple[str, ...] | None]:
    """Take every ``--test-noise SPEC`` out of the words; the rest, and the noise of each."""
    rest, given = _take(words, "--test-noise", "SPEC, text noise such as text:0.3")
    return rest, tuple(given) or None


def _take(words: list[str], option: str, what: str) -> tuple[list[str], list[str]]:
    """Take every ``option VALUE`` and ``option=VALUE`` out of the words: the rest, the values."""
    rest: list[str] = []
    values: list[str] = []
    following = iter(words)
    for word in following:
        name, equals, value = word.partition("=")
        if name != option:
            rest.append(word)
            continue
        value = value if equals else next(following, "")
        if not value or value.startswith("-"):
            raise InputError(f"{option} needs {what}")
        values.append(value)
    return rest, values
