"""The diagnosis as a table and as JSON."""

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
    """One row per finding, with the remedy below the message."""
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
    """Number of findings per level, and the paths of the images."""
    names: dict[Level, str] = {
        "error": "errors",
        "warning": "warnings",
        "note": "notes",
        "ok": "ok",
    }
    counts = ", ".join(f"{name}: {diagnosis.counts[level]}" for level, name in names.items())
    images = f"; see {', '.join(diagnosis.images)}" if diagnosis.images else ""
    return counts + images


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """One object of plain types."""
    return {
        "version": __version__,
        "environment": dict(diagnosis.environment),
        "data": dict(diagnosis.data),
        "counts": diagnosis.counts,
        "findings": [vars(finding) for finding in diagnosis.findings],
        "images": diagnosis.images,
        "exit_code": diagnosis.exit_code,
    }


def _message(finding: Finding) -> Text:
    # Text, not markup: a file name may contain [red].
    message = Text(finding.message)
    if finding.remedy:
        message.append(f"\n→ {finding.remedy}", style="italic")
    return message
