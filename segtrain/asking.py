"""How a network is asked about a picture, whoever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from segtrain.tiles import check_side

if TYPE_CHECKING:  # the configuration's checks take a tenth of a second to import
    from segtrain.config import Tta

_SCALES = (0.75, 1.0, 1.25)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How the network is asked.

    short_side: of the picture that the network sees, pixels.
    tta: test-time augmentation, the mean over several views of the picture. "flip" takes the
        picture and its mirror image, "scales" 0.75, 1 and 1.25 of the short side, each with its
        mirror image.
    tile: side of the square tiles in which the scaled picture is seen, pixels; None for whole,
        "auto" as `segtrain.tiles.automatic_side` says.

    Raises:
        UsageError: tiles cannot have this side.
    """

    short_side: int
    tta: Tta = "none"
    tile: int | Literal["auto"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tile, int):
            check_side(self.tile)

    @property
    def short_sides(self) -> list[int]:
        """Of each view, ascending; mirror images not counted."""
        factors = _SCALES if self.tta == "scales" else (1.0,)
        return [round(factor * self.short_side) for factor in factors]

    @property
    def num_views(self) -> int:
        """How often the network is asked about a picture."""
        return len(self.short_sides) * (1 if self.tta == "none" else 2)

    @property
    def loaded_short_side(self) -> int:
        """To which a picture is scaled before any view is made: as large as a view needs."""
        return self.short_sides[-1]
