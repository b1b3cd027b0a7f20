"""Pictures to look at: what the data shows says more than any number of it."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segtrain.classes import IGNORE, PERSON
from segtrain.config import DataConfig
from segtrain.data import Pictures
from segtrain.data.loading import TrainImages
from segtrain.data.sample import Sample
from segtrain.data.selection import is_negative
from segtrain.data.transforms import train_transform
from segtrain.doctor.inspection import Split
from segtrain.errors import DataError
from segtrain.files import write_bytes
from segtrain.images import Pixels, encode_image

PICTURES_A_SPLIT = 24
NUM_AUGMENTED, NUM_DRAWS = 6, 7

_COLUMNS = 6
_CELL = 256
_GAP = 8
_CAPTION, _NARROWEST_CAPTION = 22, 150
_HEADING = 40
_PAPER, _INK, _FAINT = (32, 32, 32), (235, 235, 235), (165, 165, 165)
_PERSON_COLOUR = np.array([255, 0, 140], dtype=np.float32)
_OUTLINE_COLOUR = (255, 235, 0)
_TINT = 0.4
_STRIPE = 6


@dataclass(frozen=True)
class Cell:
    """A picture, H W 3 uint8, of at most _CELL a side, and the line beneath it."""

    picture: Pixels
    caption: str
    share: str = ""


def write_contact_sheet(path: Path, splits: Sequence[Split]) -> None:
    """Up to 24 pictures of each split with their masks laid over, as one PNG.

    Raises:
        ResourceError: it cannot be written.
    """
    blocks = []
    for split in splits:
        cells = list(_cells(split))
        total, shown = len(split.pictures), len(cells)
        heading = f"{split.name}: {shown} of {total} pictures (pink: person, hatched: ignored)"
        blocks.append(_block(heading, cells, _COLUMNS))
    _write_png(path, blocks)


def write_augmentations(path: Path, pictures: Pictures, config: DataConfig) -> None:
    """A row for each of six pictures: as it is, and as training will see it seven times.

    Raises:
        ResourceError: it cannot be written.
    """
    images = TrainImages(pictures, train_transform(config), seed=0)
    cells = []
    chosen = _with_people(pictures, NUM_AUGMENTED + 2)
    if len(chosen) > NUM_AUGMENTED:
        # Without the extremes: of a speck or a picture full of people there is little to see.
        chosen = chosen[1 : NUM_AUGMENTED + 1]
    for index in chosen:
        original = _sample_or_none(pictures, index)
        if original is None:
            continue
        cells.append(Cell(laid_over(original), original.image_id, _share(original)))
        for epoch in range(NUM_DRAWS):
            drawn = images[epoch, index]
            if isinstance(drawn, Sample):
                cells.append(Cell(laid_over(drawn), f"epoch {epoch + 1}", _share(drawn)))
    heading = (
        f"augmentation {config.augment}, {config.image_size} pixels: first the picture as it is, "
        "then what training sees of it"
    )
    _write_png(path, [_block(heading, cells, NUM_DRAWS + 1)])


def write_person_area(path: Path, splits: Sequence[Split]) -> None:
    """Histogram of the share of the frame that people cover, as a PNG.

    Raises:
        ResourceError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, 100, 21)
    shares, weights, labels = [], [], []
    for split in splits:
        catalog = split.pictures.catalog
        shown = 100 * catalog.person_share[~is_negative(catalog)]
        shares.append(shown)
        weights.append(np.full(len(shown), 100 / max(len(shown), 1)))
        negatives = len(catalog) - len(shown)
        labels.append(f"{split.name}: {len(shown)} with people, {negatives} without")
    axes.hist(shares, bins=edges.tolist(), weights=weights, label=labels)
    axes.set(
        title="How much of the frame people cover",
        xlabel="share of the frame, %",
        ylabel="pictures with people, %",
        xlim=(0, 100),
        xticks=range(0, 101, 10),
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(splits))
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    write_bytes(path, png.getvalue())


def laid_over(sample: Sample, side: int = _CELL) -> Pixels:
    """The picture scaled into a square of `side` with its mask upon it: h w 3 uint8.

    People are tinted and outlined, what is ignored is hatched.
    """
    height, width = sample.mask.shape
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture = cv2.resize(sample.image, size, interpolation=interpolation).astype(np.float32)
    mask = cv2.resize(sample.mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
    person = mask == PERSON
    picture[person] = (1 - _TINT) * picture[person] + _TINT * _PERSON_COLOUR
    rows, columns = np.indices(mask.shape)
    stripes = (rows + columns) // _STRIPE % 2 == 0
    picture[(mask == IGNORE) & stripes] = 128
    pixels = np.ascontiguousarray(picture.round().astype(np.uint8))
    outlines, _ = cv2.findContours(person.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(pixels, outlines, -1, _OUTLINE_COLOUR, 1)
    return pixels


def _cells(split: Split) -> Iterator[Cell]:
    for index in _chosen(split.pictures):
        sample = _sample_or_none(split.pictures, index)
        if sample is not None:
            yield Cell(laid_over(sample), sample.image_id, _share(sample))


def _chosen(pictures: Pictures) -> list[int]:
    """Half of them evenly over all, half with people evenly over what these cover."""
    half = PICTURES_A_SPLIT // 2
    with_people = _with_people(pictures, half)
    others = np.setdiff1d(np.arange(len(pictures)), with_people)
    return sorted({*with_people, *_evenly(others, PICTURES_A_SPLIT - len(with_people))})


def _with_people(pictures: Pictures, number: int) -> list[int]:
    """Indices over the range of shares, smallest person first."""
    share = pictures.catalog.person_share
    by_share = np.argsort(share, kind="stable")
    return _evenly(by_share[share[by_share] > 0], number)


def _evenly(indices: "np.typing.NDArray[np.intp]", number: int) -> list[int]:
    places = np.linspace(0, len(indices) - 1, min(number, len(indices))).round().astype(int)
    return indices[places].tolist()  # type: ignore[no-any-return]


def _sample_or_none(pictures: Pictures, index: int) -> Sample | None:
    try:
        return pictures.sample(index, _CELL)
    except DataError:
        return None  # the check of damaged pictures names it


def _share(sample: Sample) -> str:
    share = float((sample.mask == PERSON).mean())
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def _block(heading: str, cells: Sequence[Cell], columns: int) -> Image.Image:
    """Cells row by row under a heading, each row as high as its highest picture."""
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.picture.shape[0] for cell in row) for row in rows]
    width = columns * (_CELL + _GAP) + _GAP
    height = _HEADING + sum(heights) + len(rows) * (_CAPTION + _GAP)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _HEADING // 2), heading, _INK, _font(18), anchor="lm")
    bottom = _HEADING
    for row, row_height in zip(rows, heights, strict=True):
        bottom += row_height
        for column, cell in enumerate(row):
            left = _GAP + column * (_CELL + _GAP)
            # Close to its caption.
            sheet.paste(Image.fromarray(cell.picture), (left, bottom - cell.picture.shape[0]))
            _write_caption(draw, cell, left, bottom + _CAPTION // 2 + 1)
        bottom += _CAPTION + _GAP
    return sheet


def _write_caption(draw: ImageDraw.ImageDraw, cell: Cell, left: int, middle: int) -> None:
    """The share at the right; the id at the left, its beginning cut off where it is too long."""
    font = _font(13)
    width = max(cell.picture.shape[1], _NARROWEST_CAPTION)
    room = width - draw.textlength(f"  {cell.share}", font)
    caption = cell.caption
    while draw.textlength(caption, font) > room and len(caption) > 1:
        caption = "…" + caption[2:]
    draw.text((left, middle), caption, _INK, font, anchor="lm")
    draw.text((left + width, middle), cell.share, _FAINT, font, anchor="rm")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings: it has the letters of most names."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _write_png(path: Path, blocks: Iterable[Image.Image]) -> None:
    """One block below the other."""
    pixels = np.concatenate([np.asarray(block) for block in blocks])
    write_bytes(path, encode_image(pixels, path))
