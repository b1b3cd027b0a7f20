"""Train, evaluate and run person/background segmentation networks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segtrain.prediction.predictor import Predictor

__all__ = ["Predictor", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `Predictor` on first use, so that the command line starts without numpy."""
    if name == "Predictor":
        from segtrain.prediction.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
