"""A report as a self-contained page, as Markdown, and runs as CSV."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from importlib.resources import files

from noiseproof.report.blocks import MISSING, Cell, Facts, Figures, Report, Table, Text
from noiseproof.report.runs import Found, LeftOut, Run, as_number, flat

TEMPLATES = files("noiseproof") / "templates"
NOTE = "<!-- Written by noiseproof report from the records of the runs; do not edit. -->"


def as_html(report: Report) -> str:
    """One page without any other file: style, script and charts are inside.

    Everything that comes from a record is escaped, and the page's own rules let no script run but
    the one that belongs to it.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    texts = {
        name: (TEMPLATES / name).read_text(encoding="utf-8")
        for name in ("report.html", "report.css", "report.js")
    }
    environment = Environment(
        loader=DictLoader({"report.html": texts["report.html"]}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css, js = texts["report.css"].strip(), texts["report.js"].strip()
    return environment.get_template("report.html").render(
        report=report,
        css=Markup(css),
        js=Markup(js),
        policy=(
            f"default-src 'none'; style-src {_digest(css)}; script-src {_digest(js)}; "
            "base-uri 'none'; form-action 'none'"
        ),
        svg=Markup,
        kind=lambda block: type(block).__name__,
        anchor=_anchor,
    )


def as_markdown(report: Report) -> str:
    """Headings and tables; charts are left out."""
    lines = [NOTE, f"# {_escaped(report.title)}", ""]
    if report.verdict:
        lines += [f"**{_escaped(report.verdict)}**", ""]
    if report.subtitle:
        lines += [_escaped(report.subtitle), ""]
    for section in report.sections:
        parts: list[str] = []
        for block in section.blocks:
            folded = block.folded if isinstance(block, Table | Facts) else ""
            if folded:
                parts += [f"<details><summary>{_escaped(folded)}</summary>", ""]
            if isinstance(block, Table):
                parts += _markdown_table(block)
            elif isinstance(block, Facts):
                parts += [f"- {_escaped(name)}: {_escaped(value)}" for name, value in block.items]
                parts.append("")
            elif isinstance(block, Text):
                parts += [_escaped(block.text), ""]
            else:
                assert isinstance(block, Figures)
            parts += ["</details>", ""] if folded else []
        if parts:
            lines += [f"## {_escaped(section.title)}", "", *parts]
    return "\n".join(lines).rstrip() + "\n"


def as_csv(found: Found) -> str:
    """One row per run, the unfinished ones included, all settings at the end of the row."""
    rows = [_flat_run(run) for run in found.runs]
    rows += [_flat_left_out(left) for left in found.left_out]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: name.startswith("spec."))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat_run(run: Run) -> dict[str, object]:
    record = run.record
    row: dict[str, object] = {
        "folder": str(run.folder),
        "id": record.id,
        "status": record.status,
        "error": record.error,
    }
    places = ("grid", "part", "data", "noise", "model", "validation", "method", "peft", "seed")
    row |= {place: run.names.get(place, "") for place in places}
    for name in ("rows", "validation_rows", "test_rows", "classes"):
        row[name] = as_number(record.data.get(name))
    for name in ("injected_rate", "noise_rate"):
        row[name] = as_number(record.noise.get(name))
    row |= {name: as_number(value) for name, value in record.metrics.items()}
    for name, values in record.ood.items():
        row |= {f"ood.{name}.{key}": as_number(value) for key, value in values.items()}
    row |= {name: as_number(value) for name, value in record.timings.items()}
    row["peak_memory_mb"] = as_number(record.peak_memory_mb)
    for name in ("parameters", "trained_parameters"):
        row[name] = as_number(record.model.get(name))
    row["search_trials"] = as_number(record.search.get("trials"))
    row["search_seconds"] = as_number(record.search.get("seconds"))
    return row | {f"spec.{name}": value for name, value in flat(record.spec).items()}


def _flat_left_out(left: LeftOut) -> dict[str, object]:
    row: dict[str, object] = {"folder": str(left.folder)}
    row |= _flat_run(left.run) if left.run else {}
    return row | {"status": left.status, "error": left.reason}


def _markdown_table(table: Table) -> list[str]:
    lines = [f"### {_escaped(table.title)}", ""] if table.title else []
    names = [_escaped(column.name) for column in table.columns]
    lines.append(f"| {' | '.join(names)} |")
    lines.append("|" + "|".join("---:" if c.numeric else "---" for c in table.columns) + "|")
    lines += [f"| {' | '.join(map(_markdown_cell, row))} |" for row in table.rows]
    return [*lines, "", *([_escaped(table.note), ""] if table.note else [])]


def _markdown_cell(cell: Cell) -> str:
    text = f"**{_escaped(cell.text)}**" if cell.best else _escaped(cell.text)
    return f"{text} {_escaped(cell.note)}".strip() or MISSING


def _escaped(text: str) -> str:
    """Text that is read as it stands, in Markdown."""
    plain = " ".join(str(text).split())
    return re.sub(r"([\\`*|\[\]])", r"\\\1", plain.replace("&", "&amp;").replace("<", "&lt;"))


def _digest(text: str) -> str:
    """What a content security policy calls an inline style or script by."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _anchor(title: str, index: int) -> str:
    """A name for a link to a section."""
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return f"s{index}-{words}"[:60].rstrip("-")
