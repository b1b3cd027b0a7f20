"""Which batch size the memory holds: looked for where it is auto, and told where it was too large.

Pictures go through the network in pieces of that size; the steps stay those of the whole batch.
"""

from torch import nn

from segtrain.config import Config
from segtrain.errors import ResourceError
from segtrain.progress import progress_bar
from segtrain.training.losses import build_loss
from segtrain.training.memory import fitting_number, rehearse_step
from segtrain.training.network import unsynchronized
from segtrain.training.setting import Setting


def images_at_once(setting: Setting, config: Config, model: nn.Module) -> int:
    """The batch size that is configured, or what the memory turns out to hold.

    Raises:
        ResourceError: there is no memory for a single picture.
    """
    if config.train.batch_size != "auto":
        return config.train.batch_size
    largest = config.train.effective_batch
    attempts = largest.bit_length()
    with progress_bar(total=attempts, desc="looking for a batch size", unit="attempt") as bar:

        def rehearse(number: int) -> None:
            bar.update()
            _rehearse(setting, config, model, number)

        fits = setting.world.smallest(fitting_number(rehearse, largest))
    if not fits:
        raise ResourceError(
            f"there is no memory for a single picture of {config.data.image_size} pixels; "
            "lower --image-size or choose a smaller --model"
        )
    setting.log.line(f"batch size: {fits} at once, {largest} images a step")
    return fits


def smaller_number(setting: Setting, config: Config, model: nn.Module, tried: int) -> int:
    """How many pictures to go on with at once after `tried` of them did not fit.

    Args:
        config: of the stage that the training is in.

    Raises:
        ResourceError: no number fits, or the user has chosen the one that does not.
    """
    fits = fitting_number(lambda number: _rehearse(setting, config, model, number), tried // 2)
    if not fits:
        raise ResourceError(
            f"out of memory with {tried} pictures at once, and fewer do not fit either; the state "
            "before is saved; lower --image-size or choose a smaller --model in a new run"
        )
    # What a stage says of its batches no option can change; to let it go on is what is left.
    chosen = config.train.batch_size == setting.config.train.batch_size != "auto"
    if not chosen and setting.world.size == 1:
        setting.log.warn(
            f"out of memory with {tried} pictures at once; from here on {fits}, the steps stay "
            f"those of {config.train.images_a_step}"
        )
        return fits
    raise ResourceError(
        f"out of memory with {tried} pictures at once, {fits} fit; the state before is saved; "
        "continue with --resume auto --batch-size auto "
        f"--set train.effective_batch={config.train.images_a_step}"
    )


def _rehearse(setting: Setting, config: Config, model: nn.Module, number: int) -> None:
    with unsynchronized(model):  # the other processes may be in the middle of a step
        rehearse_step(
            model,
            number,
            image_size=config.data.image_size,
            loss_fn=build_loss(config.loss),
            autocast=setting.autocast,
            device=setting.device,
        )
