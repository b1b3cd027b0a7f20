"""Options of `segtrain predict`."""

from dataclasses import dataclass, field
from pathlib import Path

from segtrain.inference.options import InferenceOptions


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Everything that `segtrain predict` is given except the inputs and the output paths.

    Attributes:
        checkpoint: as in `segtrain.runs.folder.find_checkpoint`.
        inference: how the network runs.
        background: as in `segtrain.prediction.backgrounds.build_background_fn`.
        refine: align the edge with the image.
        clean: remove small components and fill small holes.
        max_pixels: larger images are rejected before they are decoded.
        jsonl: as in `segtrain.prediction.jsonl.open_jsonl`.
        overwrite: replace outputs that exist.
    """

    checkpoint: Path | None = None
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    background: str = "blur"
    refine: bool = False
    clean: bool = False
    max_pixels: int
    jsonl: Path | None = None
    overwrite: bool = False
