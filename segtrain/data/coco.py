"""People in COCO layout: `train2017/ val2017/ annotations/instances_train2017.json ...`.

The annotation file comes from strangers and pycocotools trusts what it is given: one NaN coordinate
ends the process, short run lengths give uninitialised memory as mask. So everything is checked
here, once, before pycocotools sees it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from segtrain.classes import BACKGROUND, IGNORE, PERSON
from segtrain.data.sample import Sample, tolerated
from segtrain.errors import DataError
from segtrain.images import read_image

# pycocotools overflows on far coordinates; nothing sane lies this far outside a picture.
_FAR = 1e5
# It also keeps five points for each pixel of an outline, in or out of the picture.
_LONGEST_OUTLINE = 1e6

Polygon = list[float]
RunLengths = npt.NDArray[np.int64]
Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Image:
    """One picture and the regions in it that matter for people."""

    image_id: int
    file_name: str
    height: int
    width: int
    polygons: list[Polygon]
    people_runs: list[RunLengths]
    crowd_polygons: list[Polygon]
    crowd_runs: list[RunLengths]


def is_coco(root: Path) -> bool:
    """Whether `root` has COCO's layout."""
    return any((root / "annotations").glob("instances_*2017.json"))


class CocoPeople:
    """Person masks of one split; pictures without people are kept as negatives.

    Several people are one union, crowd regions become ignore except where a person is drawn.

    Args:
        root: folder in COCO layout. Nothing outside it is ever opened.
        split: "train" or "val".

    Raises:
        DataError: no such split, a malformed annotation file, or more than 1 % of its person
            annotations or pictures unusable. Fewer are left out and counted in `skipped`.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.root = root
        self.image_dir = root / f"{split}2017"
        self.skipped: Counter[str] = Counter()
        path = root / "annotations" / f"instances_{split}2017.json"
        content = _read_json(path)
        self._images = self._existing(_index(content, path, self.skipped))
        if not self._images:
            raise DataError(f"{path} lists no picture that exists in {self.image_dir}")
        self.sizes = np.array([(i.height, i.width) for i in self._images], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        entry = self._images[index]
        path = self.image_dir / entry.file_name
        # COCO's annotations mean the stored pixels, whatever EXIF says.
        image = read_image(path, upright=False)
        if image.shape[:2] != (entry.height, entry.width):
            raise DataError(
                f"{path} is {image.shape[1]}x{image.shape[0]}, its annotation says "
                f"{entry.width}x{entry.height}; restore the original picture"
            )
        return Sample(image=image, mask=_draw(entry), image_id=str(entry.image_id))

    def _existing(self, images: list[_Image]) -> list[_Image]:
        """Leave out the pictures that are not there; many missing ones are an error."""
        if not self.image_dir.is_dir():
            raise DataError(f"{self.image_dir} is missing; put the pictures of the split there")
        # Names may hold sub-folders, so each folder is listed once instead of asking file by file.
        folders = {PurePosixPath(image.file_name).parent for image in images}
        present = {
            str(folder / name) for folder in folders for name in _names(self.image_dir / folder)
        }
        missing = [i.file_name for i in images if str(PurePosixPath(i.file_name)) not in present]
        if len(missing) > tolerated(len(images)):
            raise DataError(
                f"{len(missing)} of {len(images)} pictures are missing in {self.image_dir}, first "
                f"{_first(missing)}; download them again"
            )
        if missing:
            self.skipped["picture missing"] = len(missing)
        return [i for i in images if str(PurePosixPath(i.file_name)) in present]


def _names(folder: Path) -> list[str]:
    """Names in a folder; none where there is no such folder or no disk could hold its name."""
    try:
        return [path.name for path in folder.iterdir()]
    except (OSError, ValueError):
        return []


def _draw(entry: _Image) -> Mask:
    """H W uint8 in {0, 1, 255}."""
    height, width = entry.height, entry.width
    mask = np.full((height, width), BACKGROUND, dtype=np.uint8)
    mask[_region(entry.crowd_polygons, entry.crowd_runs, height, width)] = IGNORE
    mask[_region(entry.polygons, entry.people_runs, height, width)] = PERSON
    return mask


def _region(
    polygons: list[Polygon], run_lengths: list[RunLengths], height: int, width: int
) -> npt.NDArray[np.bool_]:
    """Union of polygons and run lengths, H W bool."""
    region = np.zeros((height, width), dtype=bool)
    if polygons:
        from pycocotools import mask as coco_mask

        region |= coco_mask.decode(
            coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        ).astype(bool)
    for runs in run_lengths:
        values = np.arange(len(runs)) % 2 == 1
        # COCO's run lengths go down the columns.
        region |= np.repeat(values, runs).reshape(width, height).T
    return region


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing; is this the root of a COCO data set?") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); download it again") from None
    for key in ("images", "annotations", "categories"):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path} has no list of {key!r}; it is no COCO instances file")
    return content  # type: ignore[no-any-return]


def _index(content: Mapping[str, Any], path: Path, skipped: Counter[str]) -> list[_Image]:
    """The checked pictures of a COCO file with their person regions, in the file's order."""
    person_ids = {
        row["id"]
        for row in content["categories"]
        if row.get("name") == "person" and _is_int(row.get("id"))
    }
    if not person_ids:
        raise DataError(f"{path} has no category named 'person'")
    images = _index_images(content["images"], path)
    dangling: list[str] = []
    num_people = num_bad = 0
    for row in content["annotations"]:
        category = row.get("category_id")
        if not _is_int(category) or category not in person_ids:
            continue
        num_people += 1
        image_id = row.get("image_id")
        if not _is_int(image_id) or image_id not in images:
            dangling.append(str(row.get("id")))
            continue
        problem = _add_region(images[image_id], row)
        if problem:
            skipped[problem] += 1
            num_bad += 1
    if dangling:
        raise DataError(
            f"{path}: {len(dangling)} annotations belong to no listed picture, first ids "
            f"{_first(dangling)}; mend the file"
        )
    if num_bad > tolerated(num_people):
        reason, _ = skipped.most_common(1)[0]
        raise DataError(
            f"{path}: {num_bad} of {num_people} person annotations are broken, mostly {reason}; "
            "download the file again"
        )
    return list(images.values())


def _index_images(rows: Iterable[Mapping[str, Any]], path: Path) -> dict[int, _Image]:
    images: dict[int, _Image] = {}
    bad: list[str] = []
    twice: list[str] = []
    for row in rows:
        image_id, name = row.get("id"), row.get("file_name")
        height, width = row.get("height"), row.get("width")
        if not (_is_int(image_id) and isinstance(name, str)):
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
        images[image_id] = _Image(image_id, name, height, width, [], [], [], [])
    if bad:
        raise DataError(
            f"{path}: {len(bad)} images lack a usable id, file_name, height or width, first ids "
            f"{_first(bad)}; mend the file"
        )
    if twice:
        raise DataError(f"{path}: image ids appear twice, first {_first(twice)}; mend the file")
    return images


def _add_region(image: _Image, row: Mapping[str, Any]) -> str | None:
    """Check one annotation and add its region to its picture; or say what is wrong with it."""
    crowd = bool(row.get("iscrowd"))
    segmentation = row.get("segmentation")
    if isinstance(segmentation, list):
        if not segmentation or not all(_is_polygon(polygon) for polygon in segmentation):
            return "polygon malformed"
        (image.crowd_polygons if crowd else image.polygons).extend(segmentation)
        return None
    if isinstance(segmentation, dict):
        runs = _run_lengths(segmentation, image.height, image.width)
        if runs is None:
            return "run lengths malformed"
        (image.crowd_runs if crowd else image.people_runs).append(runs)
        return None
    return "segmentation missing"


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    for value in polygon:
        # Not below _FAR are NaN and infinity either.
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _FAR:
            return False
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    steps = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
    return bool(steps.sum() < _LONGEST_OUTLINE)


def _run_lengths(segmentation: Mapping[str, Any], height: int, width: int) -> RunLengths | None:
    """COCO's run lengths, plain or compressed, if they cover exactly this picture."""
    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return None
    if isinstance(counts, str):
        counts = _decompress(counts, most=height * width + 1)
    if not isinstance(counts, list) or not all(_is_int(run) and run >= 0 for run in counts):
        return None
    if sum(counts) != height * width:
        return None
    return np.array(counts, dtype=np.int64)


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


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _first(names: list[str]) -> str:
    return ", ".join(names[:5])
