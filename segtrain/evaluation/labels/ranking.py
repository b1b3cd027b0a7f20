"""The suspicions of all pictures, and close-ups of the strongest."""

import heapq
import threading
from dataclasses import dataclass

from segtrain.evaluation.labels.close_up import CloseUp, close_up
from segtrain.evaluation.labels.suspicion import KINDS, Suspicion
from segtrain.evaluation.picture import Probs

PICTURES_A_KIND = 24


@dataclass(frozen=True)
class Ranked:
    """A suspicion about the picture `index` of the data set."""

    index: int
    suspicion: Suspicion

    @property
    def key(self) -> tuple[float, int]:
        """The higher, the stronger; of two with equal scores, the earlier picture."""
        return self.suspicion.score, -self.index


class Ranking:
    """Takes suspicions in any order, also from several threads, and does not mind the order.

    A record stays of each; a close-up, of at most 64 KiB, of the `PICTURES_A_KIND` strongest of
    each kind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranked: dict[str, list[Ranked]] = {kind: [] for kind in KINDS}
        # Of each kind a heap with the weakest on top. No two keys are the same.
        self._shown: dict[str, list[tuple[tuple[float, int], CloseUp]]] = {k: [] for k in KINDS}

    def add(self, index: int, suspicion: Suspicion, probs: Probs) -> None:
        """
        Args:
            index: of the picture; there is at most one suspicion of a kind about each.
            probs: H W float32 in 0..1; it is not kept.
        """
        ranked = Ranked(index, suspicion)
        with self._lock:
            self._ranked[suspicion.kind].append(ranked)
            shown = self._shown[suspicion.kind]
            if len(shown) < PICTURES_A_KIND:
                heapq.heappush(shown, (ranked.key, close_up(probs, suspicion.box)))
            elif ranked.key > shown[0][0]:
                heapq.heapreplace(shown, (ranked.key, close_up(probs, suspicion.box)))

    def ranked(self, kind: str) -> list[Ranked]:
        """All of a kind, the strongest first."""
        return sorted(self._ranked[kind], key=lambda ranked: ranked.key, reverse=True)

    def shown(self, kind: str) -> list[tuple[Ranked, CloseUp]]:
        """The strongest of a kind, the very strongest first."""
        close_ups = dict(self._shown[kind])
        return [(r, close_ups[r.key]) for r in self.ranked(kind)[: len(close_ups)]]
