"""Which pictures of a data set are taken: subsets as the literature uses them."""

import numpy as np
import numpy.typing as npt

from segtrain.config import DataConfig
from segtrain.data.sample import Catalog

Indices = npt.NDArray[np.intp]


def select(catalog: Catalog, config: DataConfig) -> Indices:
    """Indices of the pictures that the configuration asks for, in their order.

    `person_area` is a range for every picture, so it leaves out those without people unless
    `negatives` says how many of them there should be. Which negatives are taken depends on their
    identities alone: a larger share takes more of them and never others.
    """
    wanted = np.ones(len(catalog), dtype=bool)
    negative = is_negative(catalog)
    if config.person_area is not None:
        smallest, largest = config.person_area
        in_range = (catalog.person_share >= smallest) & (catalog.person_share <= largest)
        wanted &= in_range if config.negatives is None else in_range | negative
    if config.max_people is not None:
        wanted &= catalog.num_people <= config.max_people
    if config.crowd == "drop":
        wanted &= ~catalog.has_crowd
    if config.negatives is not None:
        wanted[_too_many(catalog, negative & wanted, config.negatives, wanted)] = False
    return np.flatnonzero(wanted)


def is_negative(catalog: Catalog) -> npt.NDArray[np.bool_]:
    """Which pictures show nobody, N bool."""
    return np.asarray((catalog.num_people == 0) & ~catalog.has_crowd)


def _too_many(
    catalog: Catalog,
    negative: npt.NDArray[np.bool_],
    share: float,
    wanted: npt.NDArray[np.bool_],
) -> Indices:
    """The negatives beyond a share of all pictures that are wanted."""
    num_others = int((wanted & ~negative).sum())
    most = round(num_others * share / (1 - share))
    candidates = np.flatnonzero(negative)
    in_lots = candidates[np.argsort(catalog.identities[candidates], kind="stable")]
    return in_lots[most:]
