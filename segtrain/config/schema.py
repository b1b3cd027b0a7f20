"""Schema of the configuration of a training run: frozen dataclasses with their defaults.

This module does not import torch. The resolved configuration is printed, saved as `config.yaml` in
the run folder and stored in the checkpoint, so that a run can always be read back.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
BnEval = Literal["running", "batch", "recalibrate"]
Tta = Literal["none", "flip", "scales"]


def _off(value: Any) -> Any:
    """Undo YAML, which reads a bare `off` as False."""
    return "off" if value is False else value


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Flat in YAML: every key except `name` is an argument of its factory."""

    __pydantic_config__ = _STRICT

    name: str = "unet"
    """A key of `segtrain.models.MODELS`."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the factory, checked against its signature when the network is built."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and validation images, and their size."""

    __pydantic_config__ = _STRICT

    root: str | tuple[str, ...] | None = None
    """One or more data sets, in COCO layout or with images/ and masks/. None: $SEGTRAIN_DATA, else
    the drawn demo people."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Fraction of an epoch's images from each root. None: every image counts the same."""
    image_size: Annotated[int, Field(ge=48, le=4096)] = 224
    """Side of the square training crops, and short side of images in validation, in pixels."""
    augment: Literal["paper", "standard", "strong", "elastic"] = "paper"
    """Augmentation of training images; see `segtrain.data.transforms`."""
    whole: bool = False
    """Train on whole images with a short side of `image_size` instead of on crops. Their sizes
    differ, so train.batch_size must be 1; accumulation_steps makes larger steps."""
    scale: tuple[float, float] | None = None
    """Range of the random scale before the crop, relative to a short side of `image_size`. None:
    the range of `augment`."""
    person_area: tuple[float, float] | None = None
    """Only images whose fraction of person pixels is in this range, e.g. [0.2, 0.7]."""
    min_person_area: Annotated[float, Field(ge=0, le=1)] = 0.0
    """People who cover a smaller fraction of the image are ignored, like crowds."""
    max_people: Annotated[int, Field(ge=1)] | None = None
    """Only images with at most this many people."""
    largest_only: bool = False
    """Keep only the largest person of each image as person; the others are ignored."""
    negatives: Annotated[float, Field(ge=0, le=0.99)] | None = None
    """Fraction of images without people, as far as there are enough. None: as in the data."""
    crowd: Literal["ignore", "person", "drop"] = "ignore"
    """Meaning of crowd regions; drop leaves out images that contain one."""
    invert_masks: bool = False
    """In mask folders, white is background."""
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = "auto"
    """Loader processes; 0 loads in the main process. The batches do not depend on it."""

    def __post_init__(self) -> None:
        if self.scale is not None and not 0.25 <= self.scale[0] <= self.scale[1] <= 8:
            raise ValueError(
                f"data.scale must be two factors with 0.25 <= a <= b <= 8: {self.scale}"
            )
        if (
            self.person_area is not None
            and not 0 <= self.person_area[0] <= self.person_area[1] <= 1
        ):
            raise ValueError(
                f"data.person_area must be two fractions with 0 <= a <= b <= 1: {self.person_area}"
            )
        if self.whole and self.augment not in {"paper", "standard"}:
            raise ValueError(f"data.whole needs data.augment paper or standard, not {self.augment}")
        num_roots = len(self.root) if isinstance(self.root, tuple) else 1
        if self.weights is not None and len(self.weights) != num_roots:
            raise ValueError("data.weights must have one number per root")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss; see `segtrain.training.losses`."""

    __pydantic_config__ = _STRICT

    name: Literal["ce", "ce_dice", "focal", "lovasz", "border_ce"] = "ce"
    """Cross-entropy, cross-entropy plus soft Dice, focal loss, Lovasz hinge, or the cross-entropy
    of the U-Net paper, which weights the pixels between two people more."""
    class_weights: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Weights of background and person in the cross-entropy. None: equal weights."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the target that is spread evenly over all classes."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    """focal: exponent that lowers the weight of pixels that are already right."""
    border_weight: Annotated[float, Field(ge=0)] = 10.0
    """border_ce: extra weight where two people touch; w0 in the U-Net paper."""
    border_sigma: Annotated[float, Field(gt=0)] = 5.0
    """border_ce: reach of that weight in pixels; sigma in the U-Net paper."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer: by default RMSProp as in the Tiramisu paper (arXiv 1611.09326, section 4.1).

    Every constant is explicit: torch's defaults (alpha 0.99, eps 1e-8) would make the first update
    ten times `lr`.
    """

    __pydantic_config__ = _STRICT

    name: Literal["rmsprop", "sgd", "adam", "adamw"] = "rmsprop"
    """The algorithm."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate after warm-up."""
    schedule: Literal["exponential", "inverse_time", "cosine", "poly", "plateau", "constant"] = (
        "exponential"
    )
    """Learning rate schedule; each starts with the warm-up."""
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.995
    """exponential, the small decay of the paper: factor per epoch."""
    decay_per_step: Annotated[float, Field(ge=0)] = 1e-4
    """inverse_time, `decay` in Keras: the rate is lr / (1 + decay_per_step * steps)."""
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    """cosine, poly: the rate at the last step."""
    poly_power: Annotated[float, Field(gt=0)] = 0.9
    """poly: exponent of the fraction of steps left."""
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """plateau: factor on the rate when the validation IoU stops improving."""
    plateau_patience: Annotated[int, Field(ge=1)] = 5
    """plateau: epochs without a better validation IoU before the rate is reduced."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Optimizer steps over which the learning rate grows linearly from near 0."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """rmsprop: smoothing constant of the squared gradient (rho in Keras and Lasagne)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """adam, adamw: smoothing constants of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-7
    """rmsprop, adam, adamw: added to the root of the smoothed squared gradient."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """sgd: on the gradient; rmsprop: on the scaled gradient."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """L2 penalty, added to the gradient of convolution weights. adamw: decoupled; each step shrinks
    them by `lr` times this fraction."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Maximum L2 norm of the gradient; None does not clip."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Duration, batch size, precision, device, and run folder."""

    __pydantic_config__ = _STRICT

    epochs: Annotated[int, Field(ge=1)] = 30
    """Passes over the training images, before the `stages`."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 4
    """Images per forward and backward pass on each device (3 to 5 in the Tiramisu paper). auto: as
    many of `effective_batch` as fit into memory."""
    accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Batches per optimizer step. The last step of an epoch may have fewer images."""
    effective_batch: Annotated[int, Field(ge=1)] = 16
    """With batch_size auto: images per optimizer step on each device."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Epochs without a better validation IoU before the run stops or the next stage starts."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, e.g. 0.999; validation and best.pt use it."""
    precision: Precision = "auto"
    """auto: bf16 if the device computes it natively, else fp32."""
    compile: Annotated[Literal["off", "blocks", "full"], BeforeValidator(_off)] = "off"
    """Apply torch.compile to each block of the network, or to the whole network."""
    cuda_graph: bool = False
    """On a GPU: record forward and backward pass once and replay them with one launch per step. For
    small batches, at which the GPU waits for its host; keeps the memory of a step allocated."""
    bn_eval: BnEval = "running"
    """Batch-norm statistics outside training: running ones; those of each image itself, as in the
    Tiramisu paper; or running ones measured again on training images before every validation."""
    sync_bn: bool = False
    """With several GPUs: compute batch norm over the images of all of them."""
    freeze_encoder_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs in which the weights and statistics of the encoder stay fixed."""
    save_every: Annotated[str, Field(pattern=r"^[0-9]+[smh]$")] | None = None
    """Also save within an epoch, e.g. every 10m or 1h. None: only after each epoch."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""
    device: str = "auto"
    """auto: CUDA if available, else the CPU. A named device that does not exist is an error."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Every random draw depends only on (seed, epoch, sample index)."""
    output: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Folder of this run inside `output`. None: a name from the model and the time."""

    @property
    def effective_batch_size(self) -> int:
        """Images per optimizer step on each device."""
        if self.batch_size == "auto":
            return self.effective_batch
        return self.batch_size * self.accumulation_steps

    @property
    def micro_batch_size(self) -> int:
        """Maximum number of images per forward and backward pass."""
        return self.effective_batch if self.batch_size == "auto" else self.batch_size


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A further stage of training: from the best weights so far with a fresh optimizer, e.g. on
    whole images at a lower rate. Keys that it does not set keep the values of the sections."""

    __pydantic_config__ = _STRICT

    epochs: Annotated[int, Field(ge=1)]
    data: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a training run."""

    __pydantic_config__ = _STRICT

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: tuple[Stage, ...] = ()
    """Stages that follow the `train.epochs` epochs, in order."""

    def __post_init__(self) -> None:
        if self.data.whole and self.train.batch_size != 1:
            raise ValueError(
                "data.whole needs train.batch_size 1, because image sizes differ; "
                "train.accumulation_steps makes larger steps"
            )
        if self.data.whole and self.train.cuda_graph:
            raise ValueError("train.cuda_graph needs crops of one size; drop it or data.whole")


# Keys that a resumed run may change without becoming another experiment.
SAFE_TO_CHANGE = frozenset(
    {
        "data.root",
        "data.workers",
        # Set at every step: a diverged run continues from its last epoch with a lower one.
        "optim.lr",
        "optim.lr_decay",
        "train.epochs",
        "train.patience",
        "train.save_every",
        "train.tensorboard",
        "train.compile",
        "train.cuda_graph",
        "train.device",
        # A scaler that was not saved starts fresh.
        "train.precision",
        # Does not change the gradients: on a CPU they are bit-identical.
        "model.memory_efficient",
        "train.bn_eval",
        "train.output",
        "train.name",
    }
)
