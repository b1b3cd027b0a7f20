"""Metadata of an exported network, which allows using the file without its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from segtrain import __version__
from segtrain.types import CLASSES

if TYPE_CHECKING:  # importing the schema takes a tenth of a second
    from segtrain.config.schema import BnEval

FORMAT_VERSION = "1"
INPUT = "image: N H W 3 uint8, RGB, any N, H and W"
OUTPUT = "probs: N H W float32 in 0..1, the probability of person"
PREPROCESSING = (
    "scale the image so that its short side has about short_side pixels; normalization and "
    "padding happen inside"
)

_PREFIX = "segtrain."
_SHORT_SIDES = range(1, 65536)
_BN_EVALS = ("running", "batch", "recalibrate")

ExportPrecision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Metadata of one exported network.

    Attributes:
        model: its name and arguments, as in a configuration.
        short_side: size to which images were scaled in training, in pixels.
        bn_eval: batch-norm statistics.
        precision: of the weights and the computation.
        checkpoint_sha256: of the exported checkpoint file, hexadecimal.
    """

    model: Mapping[str, Any]
    short_side: int
    bn_eval: BnEval
    precision: ExportPrecision
    checkpoint_sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON."""
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

    def to_strings(self) -> dict[str, str]:
        """Convert to strings, with the prefix `segtrain.` for each key; other types become JSON."""
        return {
            _PREFIX + key: value if isinstance(value, str) else json.dumps(value)
            for key, value in self.to_dict().items()
        }

    @staticmethod
    def from_strings(strings: Mapping[str, str]) -> Metadata:
        """Parse the result of `to_strings`.

        Raises:
            ValueError: the format is wrong; the message gives the reason.
        """

        def get(key: str) -> str:
            if _PREFIX + key not in strings:
                raise ValueError(f"no {key} in its metadata; segtrain export did not write it")
            return strings[_PREFIX + key]

        if get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"it has format {get('format_version')!r:.20}, this segtrain reads "
                f"{FORMAT_VERSION}; export the checkpoint again"
            )
        model, classes = json.loads(get("model")), json.loads(get("classes"))
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            raise ValueError("its model has no name")
        if classes != list(CLASSES):
            raise ValueError(f"its classes are not {', '.join(CLASSES)}")
        if not get("short_side").isdecimal() or int(get("short_side")) not in _SHORT_SIDES:
            raise ValueError(f"invalid short_side {get('short_side')!r:.20}")
        bn_eval: Any = get("bn_eval")
        precision: Any = get("precision")
        if bn_eval not in _BN_EVALS or precision not in get_args(ExportPrecision):
            raise ValueError(f"invalid bn_eval {bn_eval!r:.20} or precision {precision!r:.20}")
        return Metadata(
            model=model,
            short_side=int(get("short_side")),
            bn_eval=bn_eval,
            precision=precision,
            checkpoint_sha256=get("checkpoint_sha256"),
        )
