"""Video formats: the suffixes that are read, and the containers and codecs that are written."""

from dataclasses import dataclass

from segtrain.prediction.backgrounds import TRANSPARENT

VIDEO_SUFFIXES = frozenset(
    {
        *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".flv", ".wmv"),
        *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".ogv", ".mxf"),
    }
)


@dataclass(frozen=True, kw_only=True)
class VideoFormat:
    """An output format.

    Attributes:
        container: libav's name of the file format.
        codec: video encoder.
        options: of the video encoder.
        pixel_format: of the encoded frames.
        copied_audio_codecs: copied without encoding: the container supports them, and players
            expect them in it.
        audio_codec: encoder for all other audio.
        max_channels: audio with more channels is mixed down to stereo.
    """

    container: str
    codec: str
    options: dict[str, str]
    pixel_format: str
    copied_audio_codecs: frozenset[str]
    audio_codec: str
    max_channels: int


VIDEO_FORMATS = {
    ".mp4": VideoFormat(
        container="mp4",
        codec="libx264",
        options={"crf": "18"},
        pixel_format="yuv420p",
        copied_audio_codecs=frozenset({"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"}),
        audio_codec="aac",
        max_channels=8,
    ),
    # The only format with alpha that produces small files and that browsers play.
    ".webm": VideoFormat(
        container="webm",
        codec="libvpx-vp9",
        options={"crf": "20", "deadline": "realtime", "cpu-used": "6", "row-mt": "1"},
        pixel_format="yuva420p",
        copied_audio_codecs=frozenset({"opus", "vorbis"}),
        audio_codec="libopus",
        max_channels=2,
    ),
}


def video_output_suffix(background: str) -> str:
    """Return the suffix that is appended to the stem of the video; only .webm has alpha."""
    return "_cutout.webm" if background == TRANSPARENT else "_background.mp4"
