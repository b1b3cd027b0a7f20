"""`segtrain eval --report`: one page with every figure, and a gallery with the worst picture first.

`folder` imports nothing heavy, for it is asked before any work; so what is offered here is imported
only when somebody takes it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segtrain.evaluation.report.gallery import Gallery
    from segtrain.evaluation.report.page import write_report

__all__ = ["Gallery", "write_report"]


def __getattr__(name: str) -> Any:
    if name == "Gallery":
        from segtrain.evaluation.report.gallery import Gallery

        return Gallery
    if name == "write_report":
        from segtrain.evaluation.report.page import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
