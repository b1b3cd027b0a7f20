"""One HTML file with everything in it but the pictures, which lie beside it."""

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from segtrain import __version__
from segtrain.evaluation.judgement import Judgement
from segtrain.evaluation.report import layers, plots, tables, words
from segtrain.evaluation.report.cards import picture_columns
from segtrain.evaluation.report.folder import PAGE, remove_stale
from segtrain.files import write_bytes

_PACKAGE = "segtrain.evaluation.report"
_SCRIPTS = ("theme.js", "gallery.js", "viewer.js")


def write_report(folder: Path, judgement: Judgement) -> Path:
    """Write the page, and remove what an earlier report left of other pictures.

    Args:
        folder: where a `Gallery` has written the files of the pictures.

    Returns:
        The page, `index.html`; the same judgement gives the same bytes.

    Raises:
        ResourceError: it cannot be written.
    """
    remove_stale(folder, set(judgement.totals.records["index"].tolist()))
    path = folder / PAGE
    # A name of a file may be no text at all: what UTF-8 cannot say becomes a question mark.
    write_bytes(path, render(judgement).encode("utf-8", errors="replace"))
    return path


def render(judgement: Judgement) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader(_PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": words.percent,
        "with_sign": words.with_sign,
        "span": words.span,
        "count": words.count,
    }
    return environment.get_template("index.html").render(_content(judgement))


def _content(judgement: Judgement) -> dict[str, Any]:
    comparison = judgement.comparison
    scripts = [_own_file(name) for name in _SCRIPTS]
    return {
        "version": __version__,
        "style": _own_file("style.css"),
        "scripts": scripts,
        "script_hashes": [_hash(script) for script in scripts],
        "colours": layers,
        "title": words.title(judgement),
        "judgement": judgement,
        "warnings": list(words.warnings(judgement)),
        "bars": list(tables.headline_bars(judgement)),
        "verdict": words.verdict(comparison) if comparison else "",
        "cautions": list(words.cautions(comparison)) if comparison else [],
        "comparison_rows": list(tables.comparison_rows(comparison)) if comparison else [],
        "trivial_names": tables.trivial_names(judgement),
        "figure_rows": list(tables.figure_rows(judgement)),
        "empty_rule": words.EMPTY_RULE,
        "slice_figures": [(name, tables.figure_name(name)) for name in tables.SLICE_FIGURES],
        "slice_groups": tables.slice_groups(judgement),
        "canvas": plots,
        "plots": list(plots.plots_of(judgement)),
        "is_hard": plots.is_hard(judgement),
        "provenance": list(words.provenance(judgement)),
        "pictures": picture_columns(judgement),
    }


def _own_file(name: str) -> str:
    """A style sheet or a script of ours; it goes into the page as it is."""
    file = resources.files(_PACKAGE) / "templates" / name
    return file.read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """By which the page's policy knows a script as its own, and no other."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
