"""What a training run is made of: frozen dataclasses, filled from defaults < YAML < flags.

Knows no torch. The resolved configuration is printed, saved as `config.yaml` in the run folder and
carried by the checkpoint, so a run can always be read back.
"""

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from segtrain.errors import UsageError

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
BnEval = Literal["running", "batch", "recalibrate"]
Tta = Literal["none", "flip", "scales"]
Tree = dict[str, Any]


def _off(value: Any) -> Any:
    """YAML takes a bare off for the opposite of true."""
    return "off" if value is False else value


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network. Written flat in YAML: every key but `name` is an argument of its factory."""

    __pydantic_config__ = _STRICT

    name: str = "unet"
    """A row of `segtrain.models.MODELS`."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the factory; checked against its signature when the network is built."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt from, and at which size."""

    __pydantic_config__ = _STRICT

    root: str | tuple[str, ...] | None = None
    """Data sets, in COCO's layout or as images/ and masks/; None takes $SEGTRAIN_DATA, else the
    drawn demo people."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Share of each root in the pictures of an epoch; None lets every picture count the same."""
    image_size: Annotated[int, Field(ge=48, le=4096)] = 224
    """Side of the square training crops and short side of whole images in validation, pixels."""
    augment: Literal["paper", "standard", "strong", "elastic"] = "paper"
    """What is done to training pictures; see `segtrain.data.transforms`."""
    whole: bool = False
    """Train on whole pictures, their short side scaled to `image_size`, instead of on crops. They
    differ in size, so train.batch_size must be 1; accumulation_steps makes larger steps."""
    scale: tuple[float, float] | None = None
    """Before the crop the short side becomes `image_size` times a factor from this range; None
    leaves it to `augment`."""
    person_area: tuple[float, float] | None = None
    """Only pictures of which people cover a share in this range, e.g. [0.2, 0.7]."""
    min_person_area: Annotated[float, Field(ge=0, le=1)] = 0.0
    """A person that covers less of the frame is ignored, as crowds are."""
    max_people: Annotated[int, Field(ge=1)] | None = None
    """Only pictures with at most so many people."""
    largest_only: bool = False
    """Only the largest person of a picture is learnt, the others are ignored."""
    negatives: Annotated[float, Field(ge=0, le=0.99)] | None = None
    """Share of pictures without people, as far as there are any; None takes them as they come."""
    crowd: Literal["ignore", "person", "drop"] = "ignore"
    """What crowd regions are; drop leaves out the pictures that have one."""
    invert_masks: bool = False
    """In folders of masks, white is background."""
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = "auto"
    """Loader processes; 0 loads in the main process. The batches are the same either way."""

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
                f"data.person_area must be two shares with 0 <= a <= b <= 1: {self.person_area}"
            )
        if self.whole and self.augment not in {"paper", "standard"}:
            raise ValueError(
                f"data.whole goes with data.augment paper or standard, not {self.augment}"
            )
        num_roots = len(self.root) if isinstance(self.root, tuple) else 1
        if self.weights is not None and len(self.weights) != num_roots:
            raise ValueError("data.weights must have a number for each root")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised; see `segtrain.training.losses`."""

    __pydantic_config__ = _STRICT

    name: Literal["ce", "ce_dice", "focal", "lovasz", "border_ce"] = "ce"
    """Cross-entropy, alone or plus soft Dice; focal loss; Lovasz hinge; or the U-Net paper's
    cross-entropy that weighs the pixels between two people more."""
    class_weights: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Weights of background and person in the cross-entropy; None counts every pixel the same."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that goes evenly to all classes."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    """How much less a pixel counts that is right already."""
    border_weight: Annotated[float, Field(ge=0)] = 10.0
    """Extra weight where two people touch: w0 of the U-Net paper."""
    border_sigma: Annotated[float, Field(gt=0)] = 5.0
    """How far that reaches, pixels: sigma of the U-Net paper."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """RMSProp as in the Tiramisu paper (arXiv 1611.09326, section 4.1), every constant stated.

    torch's own defaults (alpha 0.99, eps 1e-8) would make the first update ten times `lr`.
    """

    __pydantic_config__ = _STRICT

    name: Literal["rmsprop", "sgd", "adam", "adamw"] = "rmsprop"
    """Which optimizer."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate after warm-up."""
    schedule: Literal["exponential", "inverse_time", "cosine", "poly", "plateau", "constant"] = (
        "exponential"
    )
    """How the learning rate falls; each begins with the warm-up."""
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.995
    """exponential, the paper's small decay: the factor from one epoch to the next."""
    decay_per_step: Annotated[float, Field(ge=0)] = 1e-4
    """inverse_time, Keras's `decay`: the rate is lr / (1 + decay_per_step * steps)."""
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    """cosine and poly: the rate that the last step comes down to."""
    poly_power: Annotated[float, Field(gt=0)] = 0.9
    """poly: exponent of the share of steps that are left."""
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """plateau: factor on the rate when validation stands still."""
    plateau_patience: Annotated[int, Field(ge=1)] = 5
    """plateau: epochs without a better validation IoU before that."""
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
    """L2 penalty, added to the gradient of convolution weights; adamw: share by which `lr` shrinks
    them."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """The gradient is scaled down to this L2 norm where it is longer."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how precisely, where, and into which folder."""

    __pydantic_config__ = _STRICT

    epochs: Annotated[int, Field(ge=1)] = 30
    """Passes over the training images; `stages` come after them."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 4
    """Images that go through the network at once (the Tiramisu paper takes 3 to 5), on each device;
    auto: as many as the memory holds of `effective_batch`."""
    accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """So many batches make one optimizer step; the last step of an epoch may have fewer images."""
    effective_batch: Annotated[int, Field(ge=1)] = 16
    """Where batch_size is auto: images an optimizer step, on each device."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop, or go on to the next stage, after so many epochs without a better validation IoU."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Validate and keep a moving average of the weights, e.g. 0.999."""
    precision: Precision = "auto"
    """auto: bf16 where the device computes it natively, else fp32."""
    compile: Annotated[Literal["off", "blocks", "full"], BeforeValidator(_off)] = "off"
    """torch.compile of each block of the network, or of the whole."""
    cuda_graph: bool = False
    """On a GPU: record forward and backward pass once and replay them, one launch a step. For small
    batches, at which a GPU waits for its host; holds on to the memory of a step."""
    bn_eval: BnEval = "running"
    """Batch norm outside training: running statistics, those of each picture itself (the Tiramisu
    paper's way), or running ones measured anew on training images before every validation."""
    sync_bn: bool = False
    """On several GPUs: batch norm over the pictures of all of them."""
    freeze_encoder_epochs: Annotated[int, Field(ge=0)] = 0
    """For so many epochs an encoder's weights and statistics stay as they are."""
    save_every: Annotated[str, Field(pattern=r"^[0-9]+[smh]$")] | None = None
    """Save within an epoch, too, e.g. 10m or 1h; None saves after each epoch."""
    tensorboard: bool = False
    """Write TensorBoard's files into the run folder, too."""
    device: str = "auto"
    """auto: CUDA where there is one, else the CPU. A device named and absent is an error."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Every draw comes from (seed, epoch, sample index)."""
    output: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Folder of this run inside `output`; None makes one from the model and the time."""

    @property
    def images_a_step(self) -> int:
        """Images of one optimizer step on each device."""
        if self.batch_size == "auto":
            return self.effective_batch
        return self.batch_size * self.accumulation_steps

    @property
    def images_at_once(self) -> int:
        """Images that go through the network together, at most."""
        return self.effective_batch if self.batch_size == "auto" else self.batch_size


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Training that goes on with the best weights so far and a fresh optimizer, e.g. on whole
    pictures at a lower rate. What it does not name stays as in the sections."""

    __pydantic_config__ = _STRICT

    epochs: Annotated[int, Field(ge=1)]
    data: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training run."""

    __pydantic_config__ = _STRICT

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: tuple[Stage, ...] = ()
    """What comes after `train.epochs` epochs, one after the other."""

    def __post_init__(self) -> None:
        if self.data.whole and self.train.batch_size != 1:
            raise ValueError(
                "data.whole needs train.batch_size 1, for pictures differ in size; "
                "train.accumulation_steps makes larger steps"
            )
        if self.data.whole and self.train.cuda_graph:
            raise ValueError("train.cuda_graph needs crops of one size; drop it or data.whole")


_CONFIG = TypeAdapter(Config)

# What a resumed run may change without becoming another experiment.
SAFE_TO_CHANGE = frozenset(
    {
        "data.root",
        "data.workers",
        # Set anew at every step: a diverged run goes on from its last epoch with a lower one.
        "optim.lr",
        "optim.lr_decay",
        "train.epochs",
        "train.patience",
        "train.save_every",
        "train.tensorboard",
        "train.compile",
        "train.cuda_graph",
        "train.device",
        # A scaler that was not saved starts afresh.
        "train.precision",
        # The gradients are the same, bit for bit on a CPU.
        "model.memory_efficient",
        "train.bn_eval",
        "train.output",
        "train.name",
    }
)


# What a stage may say otherwise; None: everything of that section.
_CHANGED_BY_STAGES: dict[str, frozenset[str] | None] = {
    "data": frozenset({"image_size", "augment", "scale", "whole"}),
    "loss": None,
    "optim": None,
    "train": frozenset(
        {
            "batch_size",
            "accumulation_steps",
            "effective_batch",
            "patience",
            "freeze_encoder_epochs",
            "ema_decay",
        }
    ),
}


def config_from_tree(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping as written in YAML.

    Raises:
        UsageError: an unknown key (with the nearest known one) or a value out of range.
    """
    tree = {section: _section(section, values) for section, values in tree.items()}
    if "model" in tree:
        model = dict(tree["model"])
        name = {"name": model.pop("name")} if "name" in model else {}
        tree["model"] = {**name, "kwargs": model}
    try:
        config = _CONFIG.validate_python(tree)
    except ValidationError as error:
        raise UsageError(_first_problem(error)) from None
    stage_configs(config)
    return config


def stage_configs(config: Config) -> list[Config]:
    """What each stage of the training goes by: the configuration itself, then each of its stages.

    Raises:
        UsageError: a stage changes what cannot change within a run, or to a value out of range.
    """
    base = tree_from_config(config)
    base.pop("stages")
    configs = [replace(config, stages=())]
    for number, stage in enumerate(config.stages, 2):
        tree = {name: dict(section) for name, section in base.items()}
        for section, keys in _CHANGED_BY_STAGES.items():
            deltas = getattr(stage, section)
            if fixed := [key for key in deltas if keys is not None and key not in keys]:
                raise UsageError(f"stage {number} cannot set {section}.{fixed[0]}; drop it there")
            tree[section].update(deltas)
        tree["train"]["epochs"] = stage.epochs
        try:
            configs.append(config_from_tree(tree))
        except UsageError as error:
            raise UsageError(f"stage {number}: {error}") from None
    return configs


def tree_from_config(config: Config) -> Tree:
    """The nested mapping of plain types that `config_from_tree` reads back."""
    tree = asdict(config)
    model = tree["model"]
    tree["model"] = {"name": model["name"], **model["kwargs"]}
    plain: Tree = _without_tuples(tree)
    return plain


def load_config(
    yaml_path: Path | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
) -> Config:
    """Resolve defaults < `base` < YAML file < flags and `--set`.

    Args:
        yaml_path: file of deltas from the defaults.
        base: tree that takes the place of the defaults, e.g. of a run that is resumed.
        flags: dotted key → value; None means the flag was not given.
        sets: `section.key=value` strings, the value read as YAML.

    Raises:
        UsageError: the file is unreadable, a key unknown, a value out of range, or the same key is
            set twice.
    """
    tree: Tree = {section: copy.copy(values) for section, values in (base or {}).items()}
    if yaml_path is not None:
        _merge(tree, _flatten(_read_yaml(yaml_path)))
    overrides = {key: value for key, value in (flags or {}).items() if value is not None}
    for assignment in sets:
        key, value = _parse_set(assignment)
        if key in overrides:
            raise UsageError(f"{key} is given twice on the command line; keep one of the two")
        overrides[key] = value
    _merge(tree, overrides)
    return config_from_tree(tree)


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML text that `--config` reads back, a line a section."""
    return yaml.safe_dump(
        tree_from_config(config), sort_keys=False, default_flow_style=None, width=1000
    )


def differing_keys(old: Config, new: Config) -> list[str]:
    """Dotted keys in which two configurations differ, in the order of the dataclasses."""
    before, after = _flatten(tree_from_config(old)), _flatten(tree_from_config(new))
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


def _read_yaml(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UsageError(f"cannot read {path}: {reason}; give --config a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path} is not valid YAML{line}; see configs/ for examples") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold sections such as `train:`; see configs/ for examples")
    return {section: _section(section, values) for section, values in tree.items()}


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tuples(item) for item in value]
    return value


def _section(name: str, values: Any) -> Any:
    known = [f.name for f in fields(Config)]
    if name not in known:
        raise UsageError(f"unknown configuration section {name!r}{_nearest(str(name), known)}")
    if name == "stages":
        if not isinstance(values, list | tuple):
            raise UsageError("stages must be a list of `- epochs: 10` with sections below each")
        return values
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise UsageError(f"configuration section {name!r} must hold `key: value` lines")
    return {str(key): value for key, value in values.items()}


def _flatten(tree: Mapping[str, Any]) -> Tree:
    """Dotted keys; the list of stages is one value."""
    flat: Tree = {}
    for name, part in tree.items():
        if name == "stages":
            flat[name] = part
        else:
            flat.update({f"{name}.{key}": value for key, value in part.items()})
    return flat


def _merge(tree: Tree, overrides: Mapping[str, Any]) -> None:
    """Lay dotted keys over `tree`; another model's arguments go when the model changes."""
    new_name = overrides.get("model.name")
    if new_name is not None and new_name != tree.get("model", {}).get("name", ModelConfig().name):
        tree["model"] = {}
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        if key:
            tree.setdefault(section, {})[key] = value
        else:
            tree[section] = value


def _parse_set(assignment: str) -> tuple[str, Any]:
    key, equals, text = assignment.partition("=")
    if not equals or key.count(".") != 1 or not all(key.split(".")):
        raise UsageError(f"--set {assignment!r} is not section.key=value, e.g. optim.lr=1e-4")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"the value in --set {assignment!r} is not valid YAML") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    dotted = ".".join(location[:2])
    if location[:1] == ["stages"]:
        return _problem_of_stage(problem)
    if problem["type"] == "unexpected_keyword_argument":
        section = next(f for f in fields(Config) if f.name == location[0])
        known = [f.name for f in fields(section.default_factory)]  # type: ignore[arg-type]
        return f"unknown configuration key {dotted!r}{_nearest(location[-1], known)}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{dotted}: {problem['msg'].lower()}, but it is {problem['input']!r}"


def _problem_of_stage(problem: ErrorDetails) -> str:
    _, number, *keys = problem["loc"]
    stage = f"stage {int(number) + 2}"  # counted from 1, and the sections are the first
    if problem["type"] == "unexpected_keyword_argument":
        known = [f.name for f in fields(Stage)]
        return f"{stage}: unknown key {keys[0]!r}{_nearest(str(keys[0]), known)}"
    if problem["type"] == "missing":
        return f"{stage}: {keys[0]} is missing"
    where = f"{stage}: {keys[0]}" if keys else stage
    return f"{where}: {problem['msg'].lower()}, but it is {problem['input']!r}"


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
