"""Validated COCO annotation files, packed into a few numeric arrays.

Annotation files are untrusted input, and pycocotools does not validate: one NaN coordinate ends the
process, and short run lengths give uninitialized memory as the mask. So everything is validated
here, once, before pycocotools reads it. 450 MB of text become some 40 MB of arrays, which worker
processes share. The cache stores them by the content of the file.
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

from segtrain.data.sample import identity_hash, max_bad_samples
from segtrain.errors import DataError
from segtrain.runtime.cache import Arrays, cached_arrays
from segtrain.runtime.progress import progress_bar
from segtrain.runtime.signals import raise_if_stopped

INDEX_VERSION = 1

# pycocotools overflows on distant coordinates. Valid ones are never this far outside an image.
_MAX_COORDINATE = 1e5
# pycocotools stores five points per pixel of an outline, inside and outside the image.
_MAX_OUTLINE = 1e6
# COCO writes coordinates with two decimals. Integer hundredths take half the memory.
_COORDINATE_SCALE = 100

Polygon = npt.NDArray[np.float64]
"""x, y, x, y, ... in pixels."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one array: row i is values[starts[i] : starts[i + 1]]."""

    values: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        return self.values[self.starts[row] : self.starts[row + 1]]

    @staticmethod
    def from_lengths(values: npt.NDArray[Any], lengths: Iterable[int]) -> "Ragged":
        return Ragged(values, _starts(lengths))


@dataclass(frozen=True)
class CocoIndex:
    """The images of a COCO file and their person regions.

    image_ids, heights, widths: one number per image, in the order of the file.
    identities: see `DatasetIndex`.
    names: the bytes of each image's file_name, with forward slashes.
    region_starts: the regions of image i are region_starts[i] to region_starts[i + 1], exclusive.
    crowd: whether each region is a crowd.
    polygon_starts: likewise for the polygons of each region; none if it has run lengths.
    coordinates: x, y, x, y, ... of each polygon, in hundredths (int32) or float64.
    runs: run lengths of each region, column-major; empty if it has polygons.
    skipped: reason → number of skipped annotations.
    digest: SHA-256 of the file.
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
        """Return the file_name of an image."""
        return self.names[image].tobytes().decode("utf-8", "surrogatepass")

    def all_names(self) -> list[str]:
        """Return the file_name of every image."""
        content = self.names.values.tobytes()
        starts = self.names.starts.tolist()
        return [
            content[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise(starts)
        ]

    def regions(self, image: int) -> range:
        """Return the numbers of the regions of an image."""
        return range(self.region_starts[image], self.region_starts[image + 1])

    def polygons(self, region: int) -> list[Polygon]:
        """Return the polygons of a region."""
        return [
            self._to_pixels(self.coordinates[polygon])
            for polygon in range(self.polygon_starts[region], self.polygon_starts[region + 1])
        ]

    def _to_pixels(self, coordinates: npt.NDArray[Any]) -> Polygon:
        if coordinates.dtype == np.float64:
            return coordinates
        return np.asarray(coordinates / _COORDINATE_SCALE, dtype=np.float64)


def read_index(path: Path) -> CocoIndex:
    """Read and validate an annotation file, or load the cached result for the same content.

    Raises:
        DataError: the file is missing or malformed, or more than 1 % of its person annotations are.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"{path} is missing", "is this the root of a COCO dataset?") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    arrays = cached_arrays(f"coco-v{INDEX_VERSION}-{digest}", lambda: _build_arrays(path))
    return _index_from_arrays(arrays, digest)


def _build_arrays(path: Path) -> Arrays:
    with progress_bar(total=1, desc=f"reading {path.name}", unit="file") as bar:
        content = _read_json(path)
        raise_if_stopped()
        bar.update()
    return _parse_file(content, path).to_arrays()


def _index_from_arrays(arrays: Arrays, digest: str) -> CocoIndex:
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
    """A valid annotation: polygons or run lengths."""

    crowd: bool
    polygons: list[Polygon] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)


@dataclass
class _AnnotatedImage:
    image_id: int
    file_name: str
    height: int
    width: int
    regions: list[_Region] = field(default_factory=list)


@dataclass
class _ParsedFile:
    """The images of a file by id, with their regions, and the skipped annotations."""

    images: dict[int, _AnnotatedImage]
    skipped: Counter[str] = field(default_factory=Counter)

    def to_arrays(self) -> Arrays:
        images = list(self.images.values())
        regions = [region for image in images for region in image.regions]
        polygons = [polygon for region in regions for polygon in region.polygons]
        names = [image.file_name.encode("utf-8", "surrogatepass") for image in images]
        runs = array("i")
        for region in regions:
            runs.extend(region.runs)
        packed = {
            "names": Ragged.from_lengths(np.frombuffer(b"".join(names), np.uint8), map(len, names)),
            "coordinates": Ragged.from_lengths(_pack_coordinates(polygons), map(len, polygons)),
            "runs": Ragged.from_lengths(
                np.array(runs, dtype=np.int32), (len(region.runs) for region in regions)
            ),
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


def _identity(image: _AnnotatedImage) -> int:
    name = PurePosixPath(image.file_name).stem
    return identity_hash("coco", name, image.height, image.width)


def _starts(lengths: Iterable[int]) -> npt.NDArray[np.int64]:
    """Compute the start of each row, and the end of the last one."""
    starts = np.concatenate([[0], np.cumsum(np.fromiter(lengths, dtype=np.int64))])
    return starts.astype(np.int64)


def _pack_coordinates(
    polygons: list[Polygon],
) -> npt.NDArray[np.int32] | npt.NDArray[np.float64]:
    """Concatenate all coordinates, as hundredths if these represent exactly the same numbers."""
    coordinates: npt.NDArray[np.float64] = np.concatenate([np.empty(0), *polygons])
    hundredths = np.rint(coordinates * _COORDINATE_SCALE)
    if np.array_equal(hundredths / _COORDINATE_SCALE, coordinates):
        return hundredths.astype(np.int32)
    return coordinates


def _read_json(path: Path) -> dict[str, Any]:
    text = path.read_bytes()
    try:
        try:
            content = from_json(text)
        except ValueError:  # Python's parser accepts lone surrogates and has familiar messages
            content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error})", "download it again") from None
    for key in ("images", "annotations", "categories"):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path} has no list of {key!r}", "use a COCO instances file")
    return content  # type: ignore[no-any-return]


def _parse_file(content: Mapping[str, Any], path: Path) -> _ParsedFile:
    """Validate the images of a COCO file and their person regions, in the order of the file."""
    person_ids = {
        row["id"]
        for row in content["categories"]
        if row.get("name") == "person" and _is_int(row.get("id"))
    }
    if not person_ids:
        raise DataError(f"{path} has no category named 'person'")
    parsed = _ParsedFile(_parse_images(content["images"], path))
    dangling: list[str] = []
    people = [row for row in content["annotations"] if _category(row) in person_ids]
    with progress_bar(total=len(people), desc="reading people", unit="person") as bar:
        for row in people:
            image = parsed.images.get(_image_id(row))
            if image is None:
                dangling.append(str(row.get("id")))
                continue
            region = _parse_region(row, image.height, image.width)
            if isinstance(region, str):
                parsed.skipped[region] += 1
            else:
                image.regions.append(region)
            raise_if_stopped()
            bar.update()
    if dangling:
        raise DataError(
            f"{path}: {len(dangling)} annotations refer to images that are not listed, first ids "
            f"{_first_five(dangling)}",
            "fix the file",
        )
    num_bad = parsed.skipped.total()
    if num_bad > max_bad_samples(len(people)):
        reason, _ = parsed.skipped.most_common(1)[0]
        raise DataError(
            f"{path}: {num_bad} of {len(people)} person annotations are broken, mostly {reason}",
            "download the file again",
        )
    return parsed


def _category(row: Mapping[str, Any]) -> int | None:
    category = row.get("category_id")
    return category if _is_int(category) else None


def _image_id(row: Mapping[str, Any]) -> int:
    image_id = row.get("image_id")
    return image_id if _is_int(image_id) else -(2**70)  # not a valid id of any image


def _parse_images(rows: Iterable[Mapping[str, Any]], path: Path) -> dict[int, _AnnotatedImage]:
    images: dict[int, _AnnotatedImage] = {}
    bad: list[str] = []
    duplicates: list[str] = []
    for row in rows:
        image_id, name = row.get("id"), row.get("file_name")
        height, width = row.get("height"), row.get("width")
        if not (_is_id(image_id) and isinstance(name, str)):
            bad.append(str(image_id))
            continue
        if not (_is_side(height) and _is_side(width)):
            bad.append(str(image_id))
            continue
        if not _is_inside_dataset(name):
            raise DataError(
                f"{path}: file_name {name!r} of image {image_id} is outside the dataset",
                "fix the file",
            )
        if image_id in images:
            duplicates.append(str(image_id))
        images[image_id] = _AnnotatedImage(image_id, str(PurePosixPath(name)), height, width)
    if bad:
        raise DataError(
            f"{path}: {len(bad)} images lack a valid id, file_name, height or width, first ids "
            f"{_first_five(bad)}",
            "fix the file",
        )
    if duplicates:
        raise DataError(
            f"{path}: duplicate image ids, first {_first_five(duplicates)}", "fix the file"
        )
    return images


def _parse_region(row: Mapping[str, Any], height: int, width: int) -> _Region | str:
    """Validate the region of an annotation; returns the reason if it is invalid."""
    crowd = bool(row.get("iscrowd"))
    segmentation = row.get("segmentation")
    if isinstance(segmentation, list):
        parsed = [_parse_polygon(values) for values in segmentation]
        polygons = [polygon for polygon in parsed if polygon is not None]
        if not polygons or len(polygons) < len(parsed):
            return "polygon malformed"
        return _Region(crowd, polygons=polygons)
    if isinstance(segmentation, dict):
        runs = _parse_runs(segmentation, height, width)
        return "run lengths malformed" if runs is None else _Region(crowd, runs=runs)
    return "segmentation missing"


def _parse_polygon(values: Any) -> Polygon | None:
    """Validate a polygon; None if it is not safe for pycocotools."""
    if not isinstance(values, list) or len(values) < 6 or len(values) % 2:
        return None
    if not set(map(type, values)) <= {int, float}:
        return None
    try:
        polygon = np.array(values, dtype=np.float64)
    except OverflowError:  # an integer above the largest float
        return None
    # The comparison also rejects NaN and infinity.
    if not bool((np.abs(polygon) < _MAX_COORDINATE).all()):
        return None
    points = polygon.reshape(-1, 2)
    steps = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
    return polygon if steps.sum() < _MAX_OUTLINE else None


def _parse_runs(segmentation: Mapping[str, Any], height: int, width: int) -> list[int] | None:
    """Validate COCO run lengths, plain or compressed; None unless they cover exactly this image."""
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return None
    if isinstance(counts, str):
        counts = _decompress_runs(counts, max_runs=height * width + 1)
    if not isinstance(counts, list) or not all(_is_int(run) and run >= 0 for run in counts):
        return None
    return counts if sum(counts) == height * width else None


def _decompress_runs(text: str, max_runs: int) -> list[int] | None:
    """Decode COCO's text form of run lengths; None if the text is damaged.

    A character holds 5 bits. From the 4th run on, each run is stored as a difference. pycocotools
    is not used here because it reads past the end of damaged text.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40 or len(counts) > max_runs:
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


def _is_inside_dataset(file_name: str) -> bool:
    path = PurePosixPath(file_name.replace("\\", "/"))
    return bool(file_name) and not path.is_absolute() and ".." not in path.parts


def _is_side(value: Any) -> TypeGuard[int]:
    return _is_int(value) and 0 < value < _MAX_COORDINATE


def _is_id(value: Any) -> TypeGuard[int]:
    return _is_int(value) and abs(value) < 2**63


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _first_five(ids: list[str]) -> str:
    return ", ".join(ids[:5])
