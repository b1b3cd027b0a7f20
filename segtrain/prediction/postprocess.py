"""From an image and its probabilities to the output files."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.imaging.images import encode_image
from segtrain.inference.probability import ProbsLike
from segtrain.prediction.backgrounds import BackgroundFn
from segtrain.prediction.jobs import Job
from segtrain.prediction.outputs import OUTPUTS, Composite, Result
from segtrain.prediction.refine import refine_probs
from segtrain.prediction.small_components import remove_small_components
from segtrain.runtime.files import write_bytes
from segtrain.types import Image


@dataclass(frozen=True, kw_only=True)
class Postprocess:
    """Make and write the outputs of one image.

    Attributes:
        make_background: returns the new background.
        refine: align the edge with the image.
        clean: remove small components and fill small holes.
        describe: return the statistics that `--jsonl` writes.
    """

    make_background: BackgroundFn
    refine: bool = False
    clean: bool = False
    describe: bool = False

    def __call__(self, job: Job, image: Image, probs: ProbsLike) -> dict[str, Any]:
        """Write the outputs of a job.

        Returns:
            `person_fraction`, 0 to 1; with `describe`, all of
            `segtrain.prediction.describe.describe`.

        Raises:
            DataError: the image is too long or wide for one of the formats.
            ResourceError: an output cannot be written.
        """
        result = make_result(image, probs, refine=self.refine, clean=self.clean)
        _write_outputs(job, Composite(result, self.make_background))
        if self.describe:
            # Imported on demand, because it imports pycocotools.
            from segtrain.prediction.describe import describe

            return describe(result)
        return {"person_fraction": float(np.count_nonzero(result.mask) / result.mask.size)}


def make_result(image: Image, probs: ProbsLike, *, refine: bool, clean: bool) -> Result:
    """Refine and clean the probabilities. Component areas are final only after refining."""
    result = Result(image, probs)
    if refine:
        result = Result(image, refine_probs(image, result.probability))
    if clean:
        result = Result(image, remove_small_components(result.probability))
    return result


def _write_outputs(job: Job, composite: Composite) -> None:
    # Encode everything before writing anything: the outputs are written completely or not at all.
    encoded = []
    for kind, path in job.outputs.items():
        name = Path("stdout.png") if path is None else path
        encoded.append((path, encode_image(OUTPUTS[kind].make(composite), name)))
    for path, content in encoded:
        if path is None:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        else:
            write_bytes(path, content)
