"""Configuration: precedence, strictness, and one-line errors."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from segtrain.config.resolve import config_from_dict, differing_keys, dump_yaml, load_config
from segtrain.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from segtrain.errors import UsageError
from segtrain.models import build_model

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def write_file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_default_optimizer_is_rmsprop_as_in_the_tiramisu_paper() -> None:
    optim = load_config().optim

    assert (optim.lr, optim.lr_decay, optim.alpha, optim.eps) == (1e-3, 0.995, 0.9, 1e-7)


def test_yaml_overrides_defaults_and_the_command_line_overrides_yaml(tmp_path: Path) -> None:
    path = write_file(tmp_path / "c.yaml", "train: {epochs: 3, batch_size: 5}\noptim: {lr: 0.01}\n")

    config = load_config(path, flags={"train.epochs": 7, "optim.lr": None}, sets=["optim.eps=1e-3"])

    assert (config.train.epochs, config.train.batch_size) == (7, 5)
    # YAML 1.1 reads 1e-3 as text; it must still become a number.
    assert (config.optim.lr, config.optim.eps) == (0.01, 0.001)


def test_base_replaces_the_defaults() -> None:
    config = load_config(base={"train": {"epochs": 9}}, sets=["train.seed=4"])

    assert (config.train.epochs, config.train.seed) == (9, 4)


def test_another_model_drops_the_arguments_of_the_model_in_the_file(tmp_path: Path) -> None:
    path = write_file(tmp_path / "c.yaml", "model: {name: unet, base_channels: 16}\n")

    other = load_config(path, flags={"model.name": "tiramisu"}, sets=["model.drop_rate=0.1"])
    same = load_config(path, flags={"model.name": "unet"})

    assert other.model == ModelConfig(name="tiramisu", kwargs={"drop_rate": 0.1})
    assert same.model == ModelConfig(name="unet", kwargs={"base_channels": 16})


def test_another_model_drops_the_arguments_of_the_default_model(tmp_path: Path) -> None:
    path = write_file(tmp_path / "c.yaml", "model: {base_channels: 16}\n")

    assert load_config(path, flags={"model.name": "tiramisu"}).model.kwargs == {}


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["optim.lrr=1"], "did you mean 'lr'"),
        (["optimm.lr=1"], "did you mean 'optim'"),
        (["lr=1"], "section.key=value"),
        (["optim.lr"], "section.key=value"),
        (["optim.lr=[1"], "not valid YAML"),
        (["optim.lr=-1"], "optim.lr"),
        (["optim.lr=.nan"], "optim.lr"),
        (["optim.lr_decay=1.5"], "optim.lr_decay"),
        (["data.image_size=8"], "data.image_size"),
        (["data.scale=[2, 1]"], "data.scale"),
        (["data.scale=[1]"], "data.scale"),
        (["data.workers=many"], "data.workers"),
        (["train.precision=fp8"], "train.precision"),
        (["train.epochs=0"], "train.epochs"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_key(sets: list[str], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        load_config(sets=sets)

    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_given_as_flag_and_as_set_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"optim\.lr is given twice"):
        load_config(flags={"optim.lr": 0.1}, sets=["optim.lr=0.1"])


@pytest.mark.parametrize(
    "text", ["a: [", "- 1", "3", "train: 3", "train: {epochs: x}", "\0", "no: {}"]
)
def test_a_bad_yaml_file_is_a_usage_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError):
        load_config(write_file(tmp_path / "c.yaml", text))


def test_a_missing_yaml_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nope\.yaml"):
        load_config(tmp_path / "nope.yaml")


def test_an_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(write_file(tmp_path / "c.yaml", "train:\n")) == Config()


@given(
    lr=st.floats(1e-9, 10),
    epochs=st.integers(1, 10**6),
    kwargs=st.dictionaries(
        st.sampled_from(["base_channels", "depth", "up"]),
        st.one_of(st.integers(), st.text(max_size=5), st.booleans(), st.lists(st.integers())),
    ),
    name=st.one_of(st.none(), st.text(max_size=8)),
)
def test_a_dumped_configuration_reads_back_equal(
    lr: float, epochs: int, kwargs: dict[str, object], name: str | None
) -> None:
    config = Config(
        model=ModelConfig(name="unet", kwargs=kwargs),
        data=DataConfig(scale=(1.0, 2.0)),
        optim=OptimConfig(lr=lr),
        train=TrainConfig(epochs=epochs, name=name),
    )

    assert config_from_dict(yaml.safe_load(dump_yaml(config))) == config


def test_differing_keys_are_dotted() -> None:
    old = load_config(sets=["model.base_channels=8"])
    new = load_config(sets=["model.base_channels=16", "optim.lr=0.1"])

    assert differing_keys(old, new) == ["model.base_channels", "optim.lr"]
    assert differing_keys(old, old) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_in_configs_loads_and_builds_its_network(path: Path) -> None:
    config = load_config(path)

    build_model(config.model.name, **config.model.kwargs)


def test_configs_are_found() -> None:
    assert len(CONFIGS) >= 3
