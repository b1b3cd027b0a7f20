"""Render the report as one HTML file; only the images are separate files."""

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from segtrain import __version__
from segtrain.evaluation.report import format as fmt
from segtrain.evaluation.report import gallery, plots, tables
from segtrain.evaluation.report.paths import PAGE, remove_stale
from segtrain.evaluation.result import EvalResult
from segtrain.runtime.files import write_bytes

_PACKAGE = "segtrain.evaluation.report"
_SCRIPTS = ("theme.js", "gallery.js", "viewer.js")


def write_report(folder: Path, result: EvalResult) -> Path:
    """Write the page, and remove the image files of an earlier report.

    Args:
        folder: to which a `Gallery` has written the files of the images.

    Returns:
        The page, `index.html`; equal results give the same bytes.

    Raises:
        ResourceError: it cannot be written.
    """
    remove_stale(folder, set(result.totals.records["index"].tolist()))
    path = folder / PAGE
    # File names may not be valid text: characters that UTF-8 cannot encode become question marks.
    write_bytes(path, render(result).encode("utf-8", errors="replace"))
    return path


def render(result: EvalResult) -> str:
    """The HTML of the page."""
    environment = Environment(
        loader=PackageLoader(_PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": fmt.percent,
        "percent_sign": fmt.percent_sign,
        "low_to_high": fmt.low_to_high,
        "count": fmt.count,
    }
    return environment.get_template("index.html").render(_template_variables(result))


def _template_variables(result: EvalResult) -> dict[str, Any]:
    comparison = result.comparison
    scripts = [_read_template(name) for name in _SCRIPTS]
    return {
        "version": __version__,
        "style": _read_template("style.css"),
        "scripts": scripts,
        "script_hashes": [_csp_hash(script) for script in scripts],
        "colors": gallery.LEGEND_COLORS,
        "title": fmt.title(result),
        "result": result,
        "warnings": list(fmt.warnings(result)),
        "bars": list(tables.headline_bars(result)),
        "verdict": fmt.verdict(comparison) if comparison else "",
        "cautions": list(fmt.cautions(comparison)) if comparison else [],
        "comparison_rows": list(tables.comparison_rows(comparison)) if comparison else [],
        "baseline_names": tables.baseline_names(result),
        "metric_rows": list(tables.metric_rows(result)),
        "empty_rule": fmt.EMPTY_RULE,
        "slice_metrics": [(name, tables.metric_name(name)) for name in tables.SLICE_METRICS],
        "slice_groups": tables.slice_groups(result),
        "canvas": plots,
        "plots": list(plots.build_plots(result)),
        "is_binary": plots.is_binary(result),
        "provenance": list(fmt.provenance(result)),
        "images": gallery.image_columns(result),
    }


def _read_template(name: str) -> str:
    """A style sheet or script, which is embedded unescaped."""
    file = resources.files(_PACKAGE) / "templates" / name
    return file.read_text(encoding="utf-8")


def _csp_hash(script: str) -> str:
    """The hash by which the page's content security policy allows a script."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
