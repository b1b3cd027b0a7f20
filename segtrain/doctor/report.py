"""The diagnosis for people and for programs."""

from typing import Any

from rich.table import Table
from rich.text import Text

from segtrain import __version__
from segtrain.doctor.findings import Diagnosis, Finding, Level

_STYLES: dict[Level, str] = {
    "ok": "green",
    "note": "cyan",
    "warning": "bold yellow",
    "error": "bold red",
}


def findings_table(diagnosis: Diagnosis) -> Table:
    """A row for each finding, its remedy beneath it."""
    table = Table(title="segtrain doctor", show_lines=False, pad_edge=False)
    table.add_column("level")
    table.add_column("check", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for finding in diagnosis.findings:
        table.add_row(
            Text(finding.level, style=_STYLES[finding.level]),
            Text(finding.check),
            _message(finding),
        )
    return table


def summary_line(diagnosis: Diagnosis) -> str:
    """Counts, and where the pictures are."""
    names: dict[Level, str] = {
        "error": "errors",
        "warning": "warnings",
        "note": "notes",
        "ok": "ok",
    }
    counts = ", ".join(f"{name}: {diagnosis.counts[level]}" for level, name in names.items())
    looked_at = f"; look at {', '.join(diagnosis.pictures)}" if diagnosis.pictures else ""
    return counts + looked_at


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """One object of plain types."""
    return {
        "version": __version__,
        "environment": dict(diagnosis.facts),
        "data": dict(diagnosis.data),
        "counts": diagnosis.counts,
        "findings": [vars(finding) for finding in diagnosis.findings],
        "pictures": diagnosis.pictures,
        "exit_code": diagnosis.exit_code,
    }


def _message(finding: Finding) -> Text:
    # Text, not markup: a file may be called [red].
    message = Text(finding.message)
    if finding.remedy:
        message.append(f"\n→ {finding.remedy}", style="italic")
    return message
