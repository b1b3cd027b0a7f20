"""Contact sheets: rows of captioned images with their masks overlaid."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from segtrain.imaging.images import encode_image
from segtrain.runtime.files import write_bytes
from segtrain.types import IGNORE, PERSON, BoolMask, Image, Mask

CELL = 256
"""Longest side of an image on a sheet, in pixels."""
OUTLINE_COLOR = (255, 235, 0)
"""Outline of the person mask."""

_GAP = 8
_CAPTION_HEIGHT, _MIN_CAPTION_WIDTH = 22, 150
_HEADING_HEIGHT = 40
_BACKGROUND_COLOR, _TEXT_COLOR, _NOTE_COLOR = (32, 32, 32), (235, 235, 235), (165, 165, 165)
_PERSON_COLOR = np.array([255, 0, 140], dtype=np.float32)
_TINT_OPACITY = 0.4
_STRIPE_WIDTH = 6


@dataclass(frozen=True)
class Cell:
    """An image with the line of text below it.

    Attributes:
        image: H W 3 uint8, at most CELL a side.
        caption: text at the left.
        note: text at the right, paler.
    """

    image: Image
    caption: str
    note: str = ""


def overlay(image: Image, mask: Mask) -> Image:
    """Resize an image to fit CELL and overlay its mask.

    People are tinted and outlined, and ignored regions are hatched.

    Args:
        image: H W 3 uint8 RGB.
        mask: H W uint8 in {0, 1, 255}.

    Returns:
        h w 3 uint8, at most CELL a side.
    """
    size = fit_size(*mask.shape)
    pixels = resize_antialiased(image, size)
    mask = resize_mask(mask, size)
    person = mask == PERSON
    tint(pixels, person)
    hatch(pixels, mask == IGNORE)
    draw_outline(pixels, person, OUTLINE_COLOR)
    return pixels


def fit_size(height: int, width: int) -> tuple[int, int]:
    """Return height and width after scaling the longer side to CELL."""
    scale = CELL / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_antialiased(image: Image, size: tuple[int, int]) -> Image:
    """Resize H W 3 to `size` (height, width), without aliasing."""
    smaller = max(size) < max(image.shape[:2])
    interpolation = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size[::-1], interpolation=interpolation), dtype=np.uint8)


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Resize H W to `size` (height, width) by nearest neighbor, which adds no new values."""
    nearest = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(nearest, dtype=np.uint8)


def tint(pixels: Image, person: BoolMask) -> None:
    """Blend the person color into H W 3 in place, where `person` (H W) is true."""
    levels = np.arange(256, dtype=np.float32)[:, None]
    table = (1 - _TINT_OPACITY) * levels + _TINT_OPACITY * _PERSON_COLOR
    tinted = cv2.LUT(pixels, table.round().astype(np.uint8)[None])
    np.copyto(pixels, tinted, where=person[..., None])


def hatch(pixels: Image, region: BoolMask) -> None:
    """Draw gray stripes into H W 3 in place, where `region` (H W) is true."""
    rows, columns = np.indices(region.shape)
    stripes = (rows + columns) // _STRIPE_WIDTH % 2 == 0
    pixels[region & stripes] = 128


def draw_outline(
    pixels: Image, region: BoolMask, color: tuple[int, int, int], thickness: int = 1
) -> None:
    """Draw the outlines of `region` (H W) and of its holes into H W 3 in place."""
    outlines, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(pixels, outlines, -1, color, thickness)


def sheet_section(heading: str, cells: Sequence[Cell], columns: int) -> PIL.Image.Image:
    """Draw cells row by row under a heading; each row is as high as its highest image."""
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.image.shape[0] for cell in row) for row in rows]
    width = columns * (CELL + _GAP) + _GAP
    height = _HEADING_HEIGHT + sum(heights) + len(rows) * (_CAPTION_HEIGHT + _GAP)
    sheet = PIL.Image.new("RGB", (width, height), _BACKGROUND_COLOR)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _HEADING_HEIGHT // 2), heading, _TEXT_COLOR, _font(18), anchor="lm")
    bottom = _HEADING_HEIGHT
    for row, row_height in zip(rows, heights, strict=True):
        bottom += row_height
        for column, cell in enumerate(row):
            left = _GAP + column * (CELL + _GAP)
            # Aligned at the bottom, next to the caption.
            sheet.paste(PIL.Image.fromarray(cell.image), (left, bottom - cell.image.shape[0]))
            _write_caption(draw, cell, left, bottom + _CAPTION_HEIGHT // 2 + 1)
        bottom += _CAPTION_HEIGHT + _GAP
    return sheet


def save_contact_sheet(path: Path, sections: Iterable[PIL.Image.Image]) -> None:
    """Stack sections with the same number of columns and save them as a PNG.

    Raises:
        ResourceError: the file cannot be written.
    """
    pixels = np.concatenate([np.asarray(section) for section in sections])
    write_bytes(path, encode_image(pixels, path))


def _write_caption(draw: ImageDraw.ImageDraw, cell: Cell, left: int, middle: int) -> None:
    """Draw the note at the right and the caption at the left.

    Cuts off the start of a caption that is too long.
    """
    font = _font(13)
    width = max(cell.image.shape[1], _MIN_CAPTION_WIDTH)
    room = width - draw.textlength(f"  {cell.note}", font)
    caption = cell.caption
    while draw.textlength(caption, font) > room and len(caption) > 1:
        caption = "…" + caption[2:]
    draw.text((left, middle), caption, _TEXT_COLOR, font, anchor="lm")
    draw.text((left + width, middle), cell.note, _NOTE_COLOR, font, anchor="rm")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu from matplotlib, which has glyphs for most names."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
