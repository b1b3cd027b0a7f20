"""From a picture and its probabilities to the files asked for."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.files import write_bytes
from segtrain.images import Pixels, encode_image
from segtrain.prediction.backgrounds import MakeBackground
from segtrain.prediction.cleaning import clean as cleaned
from segtrain.prediction.jobs import Job
from segtrain.prediction.outputs import OUTPUTS, Composition, Result
from segtrain.prediction.probability import Probability
from segtrain.prediction.refine import refine as refined


@dataclass(frozen=True, kw_only=True)
class Finishing:
    """What is done with what the network says.

    refine: let the edge follow the picture. clean: drop small pieces and fill small holes.
    describe: find the facts that --jsonl writes.
    """

    make_background: MakeBackground
    refine: bool = False
    clean: bool = False
    describe: bool = False

    def __call__(self, job: Job, image: Pixels, probability: Probability) -> dict[str, Any]:
        """Write the outputs of a job.

        Returns:
            `person_share`, 0 to 1, and whatever else describes the result.

        Raises:
            DataError: the picture is too long or wide for one of the formats.
            ResourceError: an output cannot be written.
        """
        result = improved(
            Result(image=image, answer=probability), refine=self.refine, clean=self.clean
        )
        _write(job, Composition(result, self.make_background))
        if self.describe:
            # Imported only where it is wanted, for it brings pycocotools.
            from segtrain.prediction.description import describe

            return describe(result)
        return {"person_share": float(np.count_nonzero(result.mask) / result.mask.size)}


def improved(result: Result, *, refine: bool, clean: bool) -> Result:
    """Refined first: what is small is only known when the edge is where it belongs."""
    if refine:
        result = Result(image=result.image, answer=refined(result.image, result.probability))
    if clean:
        result = Result(image=result.image, answer=cleaned(result.probability))
    return result


def _write(job: Job, composition: Composition) -> None:
    # Everything is encoded before anything is written: a picture is done whole or not at all.
    encoded = []
    for kind, path in job.outputs.items():
        as_what = Path("stdout.png") if path is None else path
        encoded.append((path, encode_image(OUTPUTS[kind].make(composition), as_what)))
    for path, content in encoded:
        if path is None:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        else:
            write_bytes(path, content)
