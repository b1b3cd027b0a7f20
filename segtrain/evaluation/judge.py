"""`segtrain eval`: the whole way from the command line to the figures."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from segtrain.data import Pictures
from segtrain.data.sample import tolerated
from segtrain.devices import resolve_device
from segtrain.distributed import World, joined
from segtrain.errors import DataError
from segtrain.evaluation.bootstrap import compare
from segtrain.evaluation.counting import Counted, Counting, Onlooker
from segtrain.evaluation.document import read_records
from segtrain.evaluation.judgement import Judgement, judgement_of
from segtrain.evaluation.settling import Settled, settle
from segtrain.evaluation.wishes import Wishes
from segtrain.progress import progress_bar, silenced

MakeOnlookers = Callable[[Pictures], Iterable[Onlooker]]


def judge(
    wishes: Wishes,
    *,
    tell: Callable[[str], object],
    onlookers: MakeOnlookers = lambda pictures: (),
) -> Judgement | None:
    """Judge a network, in float32, or a folder of masks on one split at original resolution.

    Of several processes that torchrun has started each takes a share of the pictures; the result is
    the same to the last bit.

    Args:
        tell: takes a line for the user.
        onlookers: from the pictures that will be judged makes those who are shown each of them.

    Returns:
        None in the processes that are not the first.

    Raises:
        UserError: of any kind.
        Stopped: a signal came.
    """
    # A file that cannot be compared with shows before an hour of judging.
    other = None if wishes.compare is None else read_records(wishes.compare)
    with ExitStack() as stack:
        on_cuda = resolve_device(wishes.device).type == "cuda"
        world = stack.enter_context(joined(on_cuda=on_cuda))
        if not world.is_first:
            stack.enter_context(silenced())
            tell = _nothing
        device = resolve_device(wishes.device, world.local_rank if world.size > 1 else None)
        if device.type == "cuda":
            # Else the threads that pin memory take half a gigabyte of the first GPU each.
            torch.cuda.set_device(device)
        settled = settle(wishes, device=device, world=world, tell=tell)
        mine = _count(settled, world, list(onlookers(settled.pictures)))
        counted = Counted.merged(world.gathered(mine))
        damaged = set().union(*world.gathered(settled.candidate.damaged))
        if len(damaged) > tolerated(len(settled.pictures)):  # no process alone has seen so many
            raise DataError(
                f"{len(damaged)} of {len(settled.pictures)} pictures cannot be used, first: "
                f"{min(damaged)}"
            )
    if not world.is_first:
        return None
    if damaged:
        tell(f"warning: {len(damaged)} pictures left out, first: {min(damaged)}")
    records = counted.totals.records
    return judgement_of(
        counted.totals,
        subject=settled.subject,
        manner=settled.manner,
        exam=replace(settled.exam, num_damaged=len(damaged)),
        image_ids=[settled.pictures.stem(index) for index in records["index"].tolist()],
        mean_mask=counted.mean_mask_records(),
        comparison=None if other is None else compare(other, records),
    )


def _count(settled: Settled, world: World, onlookers: Sequence[Onlooker]) -> Counted:
    total = len(settled.pictures) // world.size
    with (
        Counting(
            settled.pictures,
            threshold=settled.manner.threshold,
            mean_mask=settled.mean_mask,
            onlookers=onlookers,
        ) as counting,
        progress_bar(total=total, desc="evaluating") as bar,
    ):
        for answers in settled.candidate.answers(settled.pictures, world):
            counting.add(answers)
            bar.update(len(answers))
    return counting.counted()


def _nothing(line: str) -> None:
    pass
