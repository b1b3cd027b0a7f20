"""The kinds of file that are written, and what goes into them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file and what goes into it.

    copied: codecs of sound that it takes and that players expect there. sound: what other sound is
    encoded to; of more than `most_channels`, it is mixed down to two.
    """

    container: str
    codec: str
    options: dict[str, str]
    pixel_format: str
    copied: frozenset[str]
    sound: str
    most_channels: int


KINDS = {
    ".mp4": Kind(
        container="mp4",
        codec="libx264",
        options={"crf": "18"},
        pixel_format="yuv420p",
        copied=frozenset({"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"}),
        sound="aac",
        most_channels=8,
    ),
    # The only one with alpha that is small and that browsers play.
    ".webm": Kind(
        container="webm",
        codec="libvpx-vp9",
        options={"crf": "20", "deadline": "realtime", "cpu-used": "6", "row-mt": "1"},
        pixel_format="yuva420p",
        copied=frozenset({"opus", "vorbis"}),
        sound="libopus",
        most_channels=2,
    ),
}
