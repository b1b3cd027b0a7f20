"""Color spaces of video frames. A wrong guess shifts every color of the video."""

from dataclasses import dataclass

from av.video.frame import VideoFrame
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

# Codes of ISO/IEC 23091-2 (H.273), which containers and codecs share.
_UNSPECIFIED = 2
_BT709 = 1
_BT601 = 6
_HDR = frozenset({ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67})
# libswscale has its own codes for the matrices.
_MATRICES = {
    _BT709: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    _BT601: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
# By default, swscale interpolates chroma at half the width and rounds inexactly.
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class ColorSpace:
    """H.273 codes of the output: matrix, primaries and transfer function.

    The output has luma in 16..235, which every player expects, whatever the range of the source.

    Attributes:
        matrix, primaries, transfer: H.273 codes.
        hdr: the source is HDR; the reader maps it to standard dynamic range.
    """

    matrix: int
    primaries: int
    transfer: int
    hdr: bool = False


def color_space_of(frame: VideoFrame) -> ColorSpace:
    """Return the color space of a decoded frame; without a matrix tag, the one players assume.

    Untagged frames with at least 720 lines or 1280 columns are BT.709, smaller ones BT.601.
    """
    matrix = frame.colorspace
    if matrix not in _MATRICES:
        is_hd = max(frame.width, frame.height) >= 1280 or min(frame.width, frame.height) >= 720
        matrix = _BT709 if is_hd else _BT601
    if frame.color_trc in _HDR:
        return ColorSpace(_BT709, _BT709, _BT709, hdr=True)
    return ColorSpace(matrix, frame.color_primaries, frame.color_trc)


class ColorConverter:
    """Converts frames to and from RGB. Use one per direction: it caches its tables."""

    def __init__(self, color: ColorSpace) -> None:
        self._color, self._reformatter = color, VideoReformatter()

    def to_rgb(self, frame: VideoFrame, width: int, height: int) -> VideoFrame:
        """Convert a decoded frame to rgb24 of a given size."""
        is_untagged, hdr = frame.colorspace == _UNSPECIFIED, self._color.hdr
        return self._reformatter.reformat(
            frame,
            width,
            height,
            "rgb24",
            src_colorspace=_MATRICES[self._color.matrix] if is_untagged else None,
            interpolation=_EXACT,
            dst_color_trc=ColorTrc.BT709 if hdr else None,
            dst_color_primaries=ColorPrimaries.BT709 if hdr else None,
        )

    def from_rgb(self, frame: VideoFrame, pixel_format: str) -> VideoFrame:
        """Convert an RGB or RGBA frame to the pixel format of an encoder."""
        return self._reformatter.reformat(
            frame,
            format=pixel_format,
            dst_colorspace=_MATRICES[self._color.matrix],
            dst_color_range=ColorRange.MPEG,
            interpolation=_EXACT,
        )
