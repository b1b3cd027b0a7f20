"""What flows out of every data set."""

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


def tolerated(total: int) -> int:
    """How many broken annotations or pictures are left out and counted before it is an error.

    A few in a hundred thousand are life, more than one in a hundred is a mistake.
    """
    return max(1, total // 100)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture with its truth.

    image: H W 3 uint8 RGB. mask: H W uint8 in {0 background, 1 person, 255 ignore}.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    image_id: str


class Source(Protocol):
    """A data set of pictures and masks at their original resolution."""

    sizes: npt.NDArray[np.int32]
    """N 2: height and width of each picture, known without decoding it."""
    skipped: Counter[str]
    """What was left out when the data set was opened: reason → how often."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError when this one picture is damaged."""
        ...
