"""Who can be judged: a network, or masks that another tool wrote. Both give the same answers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from segtrain.asking import Asking
from segtrain.config import BnEval
from segtrain.cores import usable_cores
from segtrain.data import Pictures
from segtrain.data.loading import eval_batches
from segtrain.data.sample import tolerated
from segtrain.data.workers import worker_errors
from segtrain.devices import autocast_for
from segtrain.distributed import World
from segtrain.errors import DataError
from segtrain.evaluation.evaluate import answered_batches
from segtrain.evaluation.mask_folder import MaskFolder
from segtrain.evaluation.picture import Probs
from segtrain.images import Pixels


@dataclass(frozen=True)
class Answer:
    """What was said of a picture, and the truth.

    index: the picture's place among all.
    probs: H W float32 in 0..1, probability of person.
    mask: H W uint8 in {0, 1, 255}.
    """

    index: int
    probs: Probs
    mask: Pixels


class Candidate(Protocol):
    """Answers for every picture that can be read; of several processes each for its share."""

    @property
    def damaged(self) -> set[str]:
        """A message for each picture that could not be read."""
        ...

    def answers(self, pictures: Pictures, world: World) -> Iterator[list[Answer]]:
        """A few pictures at a time.

        Raises:
            UserError: of any kind.
        """
        ...


@dataclass(kw_only=True)
class NetworkCandidate:
    """A network, asked in float32.

    model: in place on its device.
    loading: what `segtrain.data.loading.eval_batches` takes besides.
    """

    model: nn.Module
    asking: Asking
    bn: BnEval
    batch_size: int
    loading: dict[str, Any]
    damaged: set[str] = field(default_factory=set)

    def answers(self, pictures: Pictures, world: World) -> Iterator[list[Answer]]:
        """As `Candidate.answers`."""
        device = next(self.model.parameters()).device
        batches = eval_batches(
            pictures,
            image_size=self.asking.loaded_short_side,
            # By its own statistics a picture is judged alone.
            batch_size=1 if self.bn == "batch" else self.batch_size,
            rank=world.rank,
            world_size=world.size,
            **self.loading,
        )
        with worker_errors(batches.watched):
            for batch, probs in answered_batches(
                self.model,
                batches,
                asking=self.asking,
                device=device,
                autocast=autocast_for("fp32", device),
                bn_eval=self.bn,
            ):
                masks = batch["mask"].cpu().numpy()
                yield list(map(Answer, batch["index"], probs.cpu().numpy(), masks))
        self.damaged = batches.damaged


@dataclass(kw_only=True)
class MasksCandidate:
    """Masks in a folder."""

    folder: MaskFolder
    damaged: set[str] = field(default_factory=set)

    def answers(self, pictures: Pictures, world: World) -> Iterator[list[Answer]]:
        """As `Candidate.answers`.

        Raises:
            DataError: a mask is missing, damaged or of another size than its picture.
        """
        stems = [pictures.stem(index) for index in range(len(pictures))]
        self._refuse_missing(stems)
        classes, workers = self.folder.holds_classes(stems), usable_cores()

        def answer(index: int) -> Answer | str:
            try:
                mask = pictures.sample(index).mask
            except DataError as error:
                return str(error)
            size = (mask.shape[0], mask.shape[1])
            return Answer(index, self.folder.probs(stems[index], size, classes=classes), mask)

        with ThreadPoolExecutor(workers) as pool:
            mine = range(len(pictures))[world.rank :: world.size]
            for start in range(0, len(mine), 4 * workers):
                found = list(pool.map(answer, mine[start : start + 4 * workers]))
                self.damaged.update(one for one in found if isinstance(one, str))
                if len(self.damaged) > tolerated(len(pictures)):
                    raise DataError(
                        f"{len(self.damaged)} of {len(pictures)} pictures cannot be used, first: "
                        f"{min(self.damaged)}"
                    )
                yield [one for one in found if isinstance(one, Answer)]

    def _refuse_missing(self, stems: list[str]) -> None:
        missing = self.folder.missing(stems)
        if missing:
            raise DataError(
                f"{self.folder.folder} has no mask for {len(missing)} of {len(stems)} pictures, "
                f"first {', '.join(missing[:3])}; masks go by the pictures' names"
            )
