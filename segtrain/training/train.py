"""`segtrain train`, from the resolved configuration to the final report."""

import logging
from collections.abc import Callable
from contextlib import ExitStack

from rich.console import Console

from segtrain.config.schema import Config
from segtrain.runtime.devices import resolve_device
from segtrain.runtime.distributed import distributed_context
from segtrain.runtime.logs import no_log, run_log
from segtrain.runtime.progress import no_progress_bars
from segtrain.training.fit import FitResult, fit
from segtrain.training.reporting import summary_table
from segtrain.training.setup import TrainContext, open_run

log = logging.getLogger(__name__)


def train(config: Config, *, resume: str | None, resolve: Callable[..., Config]) -> None:
    """Train a network and report the result.

    Args:
        resume: a checkpoint, a run folder, "auto" or None.
        resolve: `resolve(base=tree)` applies the command line to the configuration of a resumed
            run.

    Raises:
        UserError: any kind of it.
        Stopped: a signal was received.
    """
    on_cuda = resolve_device(config.train.device).type == "cuda"
    with ExitStack() as stack:
        world = stack.enter_context(distributed_context(on_cuda=on_cuda))
        if not world.is_main:
            stack.enter_context(no_progress_bars())
            stack.enter_context(no_log())
        logged = stack.enter_context(run_log())
        ctx = stack.enter_context(
            open_run(config, resume=resume, resolve=resolve, world=world, run_log=logged)
        )
        result = fit(ctx)
        if world.is_main:
            _report(ctx, result, num_warnings=logged.num_warnings)


def _report(ctx: TrainContext, result: FitResult, *, num_warnings: int) -> None:
    if result.history:
        Console().print(summary_table(result.history, num_warnings=num_warnings))
    log.info(
        f"best person IoU {result.best_iou:.4f} in epoch {result.best_epoch} of "
        f"{result.num_epochs}; look at {ctx.run.curves} and {ctx.run.path / 'samples'}"
    )
    log.info(f"next: segtrain eval --checkpoint {ctx.run.path}")
