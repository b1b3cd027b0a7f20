"""What flows out of every data set, and what is known of it beforehand."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

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


@dataclass(frozen=True, kw_only=True)
class LabelRules:
    """How annotations become a mask.

    crowd: what a crowd region is; "drop" leaves its picture out, elsewhere it is then ignored.
    largest_only: only the largest person of a picture is one, the others are ignored.
    min_person_area: a person that covers less of the frame than this share is ignored.
    invert_masks: in folders of masks, white is background.
    """

    crowd: Literal["ignore", "person", "drop"] = "ignore"
    largest_only: bool = False
    min_person_area: float = 0.0
    invert_masks: bool = False


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """What is known of N pictures without decoding them; arrays of N rows.

    sizes: N 2 int32, height and width of the sample at its original resolution.
    person_share: float32 in 0..1, share of the frame that is person in the mask.
    num_people: int32, annotated people, also those that the rules ignore.
    has_crowd: bool, whether there is a crowd region.
    identities: uint64, the same for the same picture of the same data set, whatever its split.
    """

    sizes: npt.NDArray[np.int32]
    person_share: npt.NDArray[np.float32]
    num_people: npt.NDArray[np.int32]
    has_crowd: npt.NDArray[np.bool_]
    identities: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, indices: npt.NDArray[np.intp]) -> "Catalog":
        """The rows at `indices`, in that order."""
        return Catalog(**{f.name: getattr(self, f.name)[indices] for f in fields(self)})

    @staticmethod
    def joined(catalogs: "Sequence[Catalog]") -> "Catalog":
        """All rows, one catalog after the other."""
        return Catalog(
            **{
                f.name: np.concatenate([getattr(catalog, f.name) for catalog in catalogs])
                for f in fields(Catalog)
            }
        )


class Source(Protocol):
    """A data set of pictures and masks."""

    @property
    def catalog(self) -> Catalog: ...

    @property
    def skipped(self) -> Counter[str]:
        """What was left out when the data set was opened: reason → how often."""
        ...

    @property
    def notes(self) -> list[str]:
        """Sentences about what was found that the user should know."""
        ...

    def __len__(self) -> int: ...

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        """One picture and its mask.

        Args:
            short_side: both are scaled as `segtrain.images.scaled_size` says, which is far cheaper
                than scaling the result; None gives the original resolution.

        Raises:
            DataError: this one picture is damaged.
        """
        ...

    def picture_path(self, index: int) -> Path:
        """The file of the picture, for messages."""
        ...

    def stem(self, index: int) -> str:
        """The picture's name in its split, with plain slashes and without suffix."""
        ...


def identity(*parts: str | int) -> int:
    """64 bits that stand for a picture; collisions are a few in a billion billion pairs."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big")


def manifest_hash(identities: Iterable[int], rules: LabelRules) -> str:
    """16 hex digits: the same for the same pictures, in whatever order, under the same rules."""
    digest = hashlib.sha256(repr(rules).encode())
    digest.update(np.sort(np.asarray(identities, dtype=">u8")).tobytes())
    return digest.hexdigest()[:16]
