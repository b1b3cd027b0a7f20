"""How the numbers of a frame mean colours. A wrong guess shifts every colour of the clip."""

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

# Numbers of ISO/IEC 23091-2 (H.273), which containers and codecs share.
_UNSPECIFIED = 2
_BT709 = 1
_BT601 = 6
_HDR = frozenset({ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67})
# libswscale has numbers of its own for the matrices.
_MATRICES = {
    _BT709: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    _BT601: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
# What swscale saves by default is chroma at half the width and exact rounding.
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class Colour:
    """Numbers of H.273 for matrix, primaries and transfer of what is written.

    What is written has luma in 16..235, which every player expects, whatever the source has.

    hdr: the source goes beyond a screen's white; it is mapped to standard range when it is read.
    """

    matrix: int
    primaries: int
    transfer: int
    hdr: bool = False


def colour_of(frame: VideoFrame) -> Colour:
    """What a decoded frame says of itself; where it does not name its matrix, what players assume.

    Untagged pictures of 720 lines or more mean BT.709, smaller ones BT.601.
    """
    matrix = frame.colorspace
    if matrix not in _MATRICES:
        large = max(frame.width, frame.height) >= 1280 or min(frame.width, frame.height) >= 720
        matrix = _BT709 if large else _BT601
    if frame.color_trc in _HDR:
        return Colour(_BT709, _BT709, _BT709, hdr=True)
    return Colour(matrix, frame.color_primaries, frame.color_trc)


class Converter:
    """Between the frames of a clip and RGB. One for each direction: it keeps its tables."""

    def __init__(self, colour: Colour) -> None:
        self._colour, self._scaler = colour, VideoReformatter()

    def to_rgb(self, frame: VideoFrame, width: int, height: int) -> VideoFrame:
        """A decoded frame as rgb24 of a given size."""
        untagged, hdr = frame.colorspace == _UNSPECIFIED, self._colour.hdr
        return self._scaler.reformat(
            frame,
            width,
            height,
            "rgb24",
            src_colorspace=_MATRICES[self._colour.matrix] if untagged else None,
            interpolation=_EXACT,
            dst_color_trc=ColorTrc.BT709 if hdr else None,
            dst_color_primaries=ColorPrimaries.BT709 if hdr else None,
        )

    def from_rgb(self, frame: VideoFrame, pixel_format: str) -> VideoFrame:
        """A frame of RGB or RGBA in the pixel format of an encoder."""
        return self._scaler.reformat(
            frame,
            format=pixel_format,
            dst_colorspace=_MATRICES[self._colour.matrix],
            dst_color_range=ColorRange.MPEG,
            interpolation=_EXACT,
        )
