"""What an exported file says of itself, so that it can be used without the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from segtrain import __version__
from segtrain.classes import CLASSES

if TYPE_CHECKING:  # the configuration's checks take a tenth of a second to import
    from segtrain.config import BnEval

FORMAT_VERSION = "1"
INPUT = "image: N H W 3 uint8, RGB, any N, H and W"
OUTPUT = "probs: N H W float32 in 0..1, the probability of person"
PREPROCESSING = (
    "scale the picture so that its short side has about short_side pixels; normalisation and "
    "padding happen inside"
)

_PREFIX = "segtrain."
_SIZES = range(1, 65536)
_BN_EVALS = ("running", "batch", "recalibrate")

ExportPrecision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Of one exported network.

    model: its name and arguments, as in a configuration.
    short_side: to which pictures were scaled in training, pixels.
    bn_eval: the statistics that batch norm goes by.
    precision: of the numbers inside.
    checkpoint_sha256: of the checkpoint file that it was made from, hexadecimal.
    """

    model: Mapping[str, Any]
    short_side: int
    bn_eval: BnEval
    precision: ExportPrecision
    checkpoint_sha256: str

    def as_tree(self) -> dict[str, Any]:
        """In plain types, for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "version": __version__,
            "classes": list(CLASSES),
            "input": INPUT,
            "output": OUTPUT,
            "preprocessing": PREPROCESSING,
            "short_side": self.short_side,
            "bn_eval": self.bn_eval,
            "model": dict(self.model),
            "precision": self.precision,
            "checkpoint_sha256": self.checkpoint_sha256,
        }

    def as_texts(self) -> dict[str, str]:
        """Key → text; the keys begin with `segtrain.`, and what is no text is JSON."""
        return {
            _PREFIX + key: value if isinstance(value, str) else json.dumps(value)
            for key, value in self.as_tree().items()
        }

    @staticmethod
    def from_texts(texts: Mapping[str, str]) -> Metadata:
        """What `as_texts` wrote.

        Raises:
            ValueError: it is not of this format; the message says what is wrong.
        """

        def text(key: str) -> str:
            if _PREFIX + key not in texts:
                raise ValueError(f"it does not say its {key}, so segtrain export did not write it")
            return texts[_PREFIX + key]

        if text("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"it has format {text('format_version')!r:.20}, this segtrain reads "
                f"{FORMAT_VERSION}; export the checkpoint again"
            )
        model, classes = json.loads(text("model")), json.loads(text("classes"))
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            raise ValueError("its model has no name")
        if classes != list(CLASSES):
            raise ValueError(f"its classes are not {', '.join(CLASSES)}")
        if not text("short_side").isdecimal() or int(text("short_side")) not in _SIZES:
            raise ValueError(f"its short_side is {text('short_side')!r:.20}")
        bn_eval: Any = text("bn_eval")
        precision: Any = text("precision")
        if bn_eval not in _BN_EVALS or precision not in get_args(ExportPrecision):
            raise ValueError(f"it has bn_eval {bn_eval!r:.20} and precision {precision!r:.20}")
        return Metadata(
            model=model,
            short_side=int(text("short_side")),
            bn_eval=bn_eval,
            precision=precision,
            checkpoint_sha256=text("checkpoint_sha256"),
        )
