"""COCO's annotation files, checked and packed into a few arrays of numbers.

The file comes from strangers and pycocotools trusts what it is given: one NaN coordinate ends the
process, short run lengths give uninitialised memory as mask. So everything is checked here, once,
before pycocotools sees it. What is kept of 450 MB of text are some 40 MB of arrays, which worker
processes share; the cache holds them by the content of the file.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from segtrain.data.cache import Arrays, cached_arrays
from segtrain.data.sample import identity, tolerated
from segtrain.errors import DataError
from segtrain.progress import progress_bar

INDEX_VERSION = 1

# pycocotools overflows on far coordinates; nothing sane lies this far outside a picture.
_FAR = 1e5
# It also keeps five points for each pixel of an outline, in or out of the picture.
_LONGEST_OUTLINE = 1e6
# COCO writes coordinates with two decimals: as whole hundredths they take half the room.
_HUNDREDTHS = 100

Polygon = npt.NDArray[np.float64]
RunLengths = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one array: row i is values[starts[i] : starts[i + 1]]."""

    values: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        return self.values[self.starts[row] : self.starts[row + 1]]

    @staticmethod
    def of(values: npt.NDArray[Any], lengths: Iterable[int]) -> "Ragged":
        starts = np.concatenate([[0], np.cumsum(np.fromiter(lengths, dtype=np.int64))])
        return Ragged(values, starts.astype(np.int64))


@dataclass(frozen=True)
class CocoIndex:
    """The pictures of a COCO file and the regions of people in them.

    image_ids, heights, widths: a number a picture, in the file's order.
    identities: as in Catalog.
    names: the bytes of each picture's file_name, with plain slashes.
    region_starts: the regions of picture i are those from region_starts[i] to region_starts[i + 1].
    crowd: for each region whether it is one.
    polygon_starts: the polygons of region r, likewise; none where it is given as run lengths.
    coordinates: x, y, x, y, ... of each polygon, hundredths (int32) or float64.
    runs: each region's run lengths down the columns; empty where it is given as polygons.
    skipped: reason → how many annotations were left out.
    digest: the sha256 of the file.
    """

    image_ids: npt.NDArray[np.int64]
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    identities: npt.NDArray[np.uint64]
    names: Ragged
    region_starts: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    polygon_starts: npt.NDArray[np.int64]
    coordinates: Ragged
    runs: Ragged
    skipped: Counter[str]
    digest: str

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, image: int) -> str:
        """The picture's file_name."""
        return self.names[image].tobytes().decode("utf-8", "surrogatepass")

    def all_names(self) -> list[str]:
        """The file_name of every picture."""
        content = self.names.values.tobytes()
        starts = self.names.starts.tolist()
        return [
            content[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise(starts)
        ]

    def regions(self, image: int) -> range:
        """Numbers of the picture's regions."""
        return range(self.region_starts[image], self.region_starts[image + 1])

    def polygons(self, region: int) -> list[Polygon]:
        """x, y, x, y, ... in pixels of each polygon of a region."""
        return [
            self._pixels(self.coordinates[polygon])
            for polygon in range(self.polygon_starts[region], self.polygon_starts[region + 1])
        ]

    def _pixels(self, coordinates: npt.NDArray[Any]) -> Polygon:
        if coordinates.dtype == np.float64:
            return coordinates
        return np.asarray(coordinates / _HUNDREDTHS, dtype=np.float64)


def read_index(path: Path) -> CocoIndex:
    """Read and check an annotation file, or take what the cache holds of the same content.

    Raises:
        DataError: the file is missing or malformed, or more than 1 % of its person annotations are.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; is this the root of a COCO data set?") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    kept = cached_arrays(f"coco-v{INDEX_VERSION}-{digest}", lambda: _arrays_of(path))
    return _index_of(kept, digest)


def _arrays_of(path: Path) -> Arrays:
    with progress_bar(total=1, desc=f"reading {path.name}", unit="file") as bar:
        content = _read_json(path)
        bar.update()
    builder = _Builder()
    _collect(content, path, builder)
    return builder.arrays()


def _index_of(arrays: Arrays, digest: str) -> CocoIndex:
    a: Mapping[str, npt.NDArray[Any]] = arrays
    return CocoIndex(
        image_ids=a["image_ids"],
        heights=a["heights"],
        widths=a["widths"],
        identities=a["identities"],
        names=Ragged(a["names"], a["name_starts"]),
        region_starts=a["region_starts"],
        crowd=a["crowd"],
        polygon_starts=a["polygon_starts"],
        coordinates=Ragged(a["coordinates"], a["coordinate_starts"]),
        runs=Ragged(a["runs"], a["run_starts"]),
        skipped=Counter(json.loads(bytes(a["skipped"]))),
        digest=digest,
    )


@dataclass
class _Region:
    """A checked annotation: polygons or run lengths."""

    crowd: bool
    polygons: list[Polygon] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)


@dataclass
class _Image:
    image_id: int
    file_name: str
    height: int
    width: int
    regions: list[_Region] = field(default_factory=list)


@dataclass
class _Builder:
    """Collects pictures and their regions, and packs them."""

    images: dict[int, _Image] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def arrays(self) -> Arrays:
        images = list(self.images.values())
        regions = [region for image in images for region in image.regions]
        polygons = [polygon for region in regions for polygon in region.polygons]
        names = [image.file_name.encode("utf-8", "surrogatepass") for image in images]
        runs = array("i")
        for region in regions:
            runs.extend(region.runs)
        packed = {
            "names": Ragged.of(np.frombuffer(b"".join(names), np.uint8), map(len, names)),
            "coordinates": Ragged.of(_compact(polygons), map(len, polygons)),
            "runs": Ragged.of(np.array(runs, dtype=np.int32), (len(r.runs) for r in regions)),
        }
        return {
            "image_ids": np.array([image.image_id for image in images], dtype=np.int64),
            "heights": np.array([image.height for image in images], dtype=np.int32),
            "widths": np.array([image.width for image in images], dtype=np.int32),
            "identities": np.array([_identity(image) for image in images], dtype=np.uint64),
            "crowd": np.array([region.crowd for region in regions], dtype=bool),
            "region_starts": _starts(len(image.regions) for image in images),
            "polygon_starts": _starts(len(region.polygons) for region in regions),
            **{name: ragged.values for name, ragged in packed.items()},
            **{f"{name.removesuffix('s')}_starts": r.starts for name, r in packed.items()},
            "skipped": np.frombuffer(json.dumps(self.skipped).encode(), np.uint8),
        }


def _identity(image: _Image) -> int:
    return identity("coco", PurePosixPath(image.file_name).stem, image.height, image.width)


def _starts(lengths: Iterable[int]) -> npt.NDArray[np.int64]:
    return Ragged.of(np.empty(0), lengths).starts


def _compact(polygons: list[Polygon]) -> npt.NDArray[np.int32] | npt.NDArray[np.float64]:
    """All coordinates in a row: hundredths where they say the very same numbers."""
    coordinates: npt.NDArray[np.float64] = np.concatenate([np.empty(0), *polygons])
    hundredths = np.rint(coordinates * _HUNDREDTHS)
    if np.array_equal(hundredths / _HUNDREDTHS, coordinates):
        return hundredths.astype(np.int32)
    return coordinates


def _read_json(path: Path) -> dict[str, Any]:
    text = path.read_bytes()
    try:
        try:
            content = from_json(text)
        except ValueError:  # Python's reader takes half characters, and its message is known
            content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); download it again") from None
    for key in ("images", "annotations", "categories"):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path} has no list of {key!r}; it is no COCO instances file")
    return content  # type: ignore[no-any-return]


def _collect(content: Mapping[str, Any], path: Path, builder: _Builder) -> None:
    """The checked pictures of a COCO file with their person regions, in the file's order."""
    person_ids = {
        row["id"]
        for row in content["categories"]
        if row.get("name") == "person" and _is_int(row.get("id"))
    }
    if not person_ids:
        raise DataError(f"{path} has no category named 'person'")
    builder.images = _index_images(content["images"], path)
    dangling: list[str] = []
    people = [row for row in content["annotations"] if _category(row) in person_ids]
    with progress_bar(total=len(people), desc="reading people", unit="person") as bar:
        for row in people:
            image = builder.images.get(_image_id(row))
            if image is None:
                dangling.append(str(row.get("id")))
                continue
            region = _region(row, image.height, image.width)
            if isinstance(region, str):
                builder.skipped[region] += 1
            else:
                image.regions.append(region)
            bar.update()
    if dangling:
        raise DataError(
            f"{path}: {len(dangling)} annotations belong to no listed picture, first ids "
            f"{_first(dangling)}; mend the file"
        )
    num_bad = builder.skipped.total()
    if num_bad > tolerated(len(people)):
        reason, _ = builder.skipped.most_common(1)[0]
        raise DataError(
            f"{path}: {num_bad} of {len(people)} person annotations are broken, mostly {reason}; "
            "download the file again"
        )


def _category(row: Mapping[str, Any]) -> int | None:
    category = row.get("category_id")
    return category if _is_int(category) else None


def _image_id(row: Mapping[str, Any]) -> int:
    image_id = row.get("image_id")
    return image_id if _is_int(image_id) else -(2**70)  # no picture can have that


def _index_images(rows: Iterable[Mapping[str, Any]], path: Path) -> dict[int, _Image]:
    images: dict[int, _Image] = {}
    bad: list[str] = []
    twice: list[str] = []
    for row in rows:
        image_id, name = row.get("id"), row.get("file_name")
        height, width = row.get("height"), row.get("width")
        if not (_is_id(image_id) and isinstance(name, str)):
            bad.append(str(image_id))
            continue
        if not (_is_side(height) and _is_side(width)):
            bad.append(str(image_id))
            continue
        if not _stays_inside(name):
            raise DataError(
                f"{path}: file_name {name!r} of image {image_id} leaves the data set; mend the file"
            )
        if image_id in images:
            twice.append(str(image_id))
        images[image_id] = _Image(image_id, str(PurePosixPath(name)), height, width)
    if bad:
        raise DataError(
            f"{path}: {len(bad)} images lack a usable id, file_name, height or width, first ids "
            f"{_first(bad)}; mend the file"
        )
    if twice:
        raise DataError(f"{path}: image ids appear twice, first {_first(twice)}; mend the file")
    return images


def _region(row: Mapping[str, Any], height: int, width: int) -> _Region | str:
    """The checked region of one annotation, or what is wrong with it."""
    crowd = bool(row.get("iscrowd"))
    segmentation = row.get("segmentation")
    if isinstance(segmentation, list):
        polygons = [_polygon(values) for values in segmentation]
        checked = [polygon for polygon in polygons if polygon is not None]
        if not checked or len(checked) < len(polygons):
            return "polygon malformed"
        return _Region(crowd, polygons=checked)
    if isinstance(segmentation, dict):
        runs = _run_lengths(segmentation, height, width)
        return "run lengths malformed" if runs is None else _Region(crowd, runs=runs)
    return "segmentation missing"


def _polygon(values: Any) -> Polygon | None:
    """x, y, x, y, ... if pycocotools can be trusted with it."""
    if not isinstance(values, list) or len(values) < 6 or len(values) % 2:
        return None
    if not set(map(type, values)) <= {int, float}:
        return None
    try:
        polygon = np.array(values, dtype=np.float64)
    except OverflowError:  # a whole number beyond all floats
        return None
    # Not below _FAR are NaN and infinity either.
    if not bool((np.abs(polygon) < _FAR).all()):
        return None
    points = polygon.reshape(-1, 2)
    steps = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
    return polygon if steps.sum() < _LONGEST_OUTLINE else None


def _run_lengths(segmentation: Mapping[str, Any], height: int, width: int) -> list[int] | None:
    """COCO's run lengths, plain or compressed, if they cover exactly this picture."""
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return None
    if isinstance(counts, str):
        counts = _decompress(counts, most=height * width + 1)
    if not isinstance(counts, list) or not all(_is_int(run) and run >= 0 for run in counts):
        return None
    return counts if sum(counts) == height * width else None


def _decompress(text: str, most: int) -> list[int] | None:
    """COCO's text form of run lengths: 5 bits a character, each run from the 4th on a difference.

    Read here, not by pycocotools, because that one reads past the end of damaged text. None if the
    text is damaged.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40 or len(counts) > most:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts if shift == 0 else None


def _stays_inside(file_name: str) -> bool:
    path = PurePosixPath(file_name.replace("\\", "/"))
    return bool(file_name) and not path.is_absolute() and ".." not in path.parts


def _is_side(value: Any) -> TypeGuard[int]:
    return _is_int(value) and 0 < value < _FAR


def _is_id(value: Any) -> TypeGuard[int]:
    return _is_int(value) and abs(value) < 2**63


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _first(names: list[str]) -> str:
    return ", ".join(names[:5])
