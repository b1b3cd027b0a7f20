"""Checkpoints: round trips, kills and full disks while saving, damaged and hostile files."""

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from segtrain.checkpoint import (
    Checkpoint,
    _digest,
    _is_finite,
    load_checkpoint,
    restore_model,
    save_checkpoint,
)
from segtrain.config.schema import Config, ModelConfig, OptimConfig
from segtrain.errors import CheckpointError, DivergedError, ResourceError
from segtrain.models import build_model

SMALL_UNET = {"base_channels": 2, "depth": 1}


def small_checkpoint(**fields: Any) -> Checkpoint:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "config": Config(model=ModelConfig(kwargs=SMALL_UNET), optim=OptimConfig(lr=0.25)),
        "weights": build_model("unet", **SMALL_UNET).state_dict(),
        "epoch": 3,
        "global_step": 17,
        "metrics": {"val/person_iou": 0.75},
        "training": {"rng": torch.get_rng_state(), "best": None, "moments": [torch.ones(2, 3)]},
    }
    return Checkpoint(**{**values, **fields})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.pt"


def run_python(code: str, *arguments: object) -> str:
    """Run `code` in a new interpreter with the same packages and return its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_same(loaded: Checkpoint, saved: Checkpoint) -> None:
    assert loaded.config == saved.config
    assert (loaded.epoch, loaded.global_step) == (saved.epoch, saved.global_step)
    assert loaded.metrics == saved.metrics
    torch.testing.assert_close(loaded.weights, dict(saved.weights), rtol=0, atol=0)
    torch.testing.assert_close(loaded.training, saved.training, rtol=0, atol=0)


# --- Round trip ---------------------------------------------------------------------------------


def test_a_saved_checkpoint_loads_equal(path: Path) -> None:
    saved = small_checkpoint()
    save_checkpoint(path, saved)
    assert_same(load_checkpoint(path), saved)
    assert list(path.parent.iterdir()) == [path]


LOAD_IN_NEW_PROCESS = """
import hashlib, json, sys
from pathlib import Path
import torch
from segtrain.checkpoint import load_checkpoint, restore_model
path = Path(sys.argv[1])
checkpoint = load_checkpoint(path)
model = restore_model(checkpoint, path)
image = (torch.arange(2 * 3 * 9 * 11) % 256).to(torch.uint8).view(2, 3, 9, 11)
with torch.inference_mode():
    logits = model(image)
shas = {key: hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for key, value in model.state_dict().items()}
print(json.dumps({"shas": shas, "logits": logits.flatten().tolist(),
                  "lr": checkpoint.config.optim.lr, "training": model.training}))
"""


def test_a_new_process_rebuilds_the_network_from_the_file_alone(path: Path) -> None:
    torch.manual_seed(8)
    model = build_model("unet", **SMALL_UNET)
    image = (torch.arange(2 * 3 * 9 * 11) % 256).to(torch.uint8).view(2, 3, 9, 11)
    model(image)  # changes the batch-norm buffers from their initial values
    save_checkpoint(path, small_checkpoint(weights=model.state_dict()))
    with torch.inference_mode():
        logits = model.eval()(image).flatten().tolist()

    loaded = json.loads(run_python(LOAD_IN_NEW_PROCESS, path))
    assert loaded["shas"] == {
        key: hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for key, value in model.state_dict().items()
    }
    assert loaded["logits"] == pytest.approx(logits, rel=1e-6, abs=1e-6)
    assert loaded["lr"] == 0.25
    assert loaded["training"] is False


def test_the_file_is_readable_by_plain_torch_without_segtrain(path: Path) -> None:
    saved = small_checkpoint()
    save_checkpoint(path, saved)
    content = torch.load(path, weights_only=True)
    assert content["format_version"] == 2
    assert content["classes"] == ["background", "person"]
    assert content["config"]["model"] == {"name": "unet", **SMALL_UNET}
    torch.testing.assert_close(content["weights"], dict(saved.weights), rtol=0, atol=0)


def test_a_restored_network_does_not_share_memory_with_the_saved_one(path: Path) -> None:
    model = build_model("unet", **SMALL_UNET)
    save_checkpoint(path, small_checkpoint(weights=model.state_dict()))
    restored = restore_model(load_checkpoint(path), path)
    before = model.head.weight.clone()
    with torch.no_grad():
        restored.head.weight.zero_()
    assert torch.equal(model.head.weight, before)
    assert all(not value.is_meta for value in restored.state_dict().values())
    assert all(parameter.requires_grad for parameter in restored.parameters())


def test_views_are_saved_without_their_base(path: Path) -> None:
    """Saving a row of a large matrix must not save the matrix."""
    matrix = torch.arange(4_000_000.0).view(2, -1)
    save_checkpoint(path, small_checkpoint(training={"row": matrix[1, :4], "t": matrix[:, :2].t()}))
    assert path.stat().st_size < 100_000
    training = load_checkpoint(path).training
    assert training["row"].tolist() == [2_000_000, 2_000_001, 2_000_002, 2_000_003]
    assert training["t"].tolist() == [[0, 2_000_000], [1, 2_000_001]]


@pytest.mark.parametrize("value", [object(), Path("x"), {1, 2}, b"bytes"])
def test_other_than_plain_types_are_refused_and_the_old_file_is_kept(
    path: Path, value: object
) -> None:
    save_checkpoint(path, small_checkpoint())
    before = sha256_of(path)
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        save_checkpoint(path, small_checkpoint(training={"value": value}))
    assert sha256_of(path) == before
    assert list(path.parent.iterdir()) == [path]


# --- Killed while saving ------------------------------------------------------------------------

# One process imports torch once. Each round forks a saver and kills it, alternately after a random
# delay and in the middle of a save, which random delays may never hit.
KILLED_WHILE_SAVING = """
import itertools, json, os, random, signal, sys, time
from pathlib import Path
import torch
from segtrain.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from segtrain.config.schema import Config

torch.set_num_threads(1)  # a fork would wait for threads that only its parent has
path, rounds = Path(sys.argv[1]), int(sys.argv[2])

def checkpoint(step):
    weights = {"a": torch.full((500_000,), float(step)), "b": torch.full((500_000,), float(-step))}
    return Checkpoint(config=Config(), weights=weights, epoch=0, global_step=step, metrics={})

def others():
    return [other for other in path.parent.iterdir() if other != path]

# Waits for at least one save and stops the process during a later one.
def stop_in_the_middle(pid, before):
    while True:
        time.sleep(0.0005)
        if path.stat().st_mtime_ns == before or not others():
            continue
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        if others():  # it had not just finished
            return
        os.kill(pid, signal.SIGCONT)

save_checkpoint(path, checkpoint(0))
step, rng = 0, random.Random(sys.argv[3])
for number in range(rounds):
    before, in_save = path.stat().st_mtime_ns, number % 2 == 1
    pid = os.fork()
    if pid == 0:
        for later in itertools.count(step + 1):
            save_checkpoint(path, checkpoint(later))
    if in_save:
        stop_in_the_middle(pid, before)
    else:
        time.sleep(rng.uniform(0.0, 0.2))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    temp_files = others()
    for other in temp_files:
        other.unlink()
    try:
        loaded = load_checkpoint(path)
        valid = (bool((loaded.weights["a"] == loaded.global_step).all())
                 and bool((loaded.weights["b"] == -loaded.global_step).all()))
        print(json.dumps({"valid": valid, "from": step, "to": loaded.global_step,
                          "in_save": in_save, "num_temp_files": len(temp_files)}))
        step = loaded.global_step
    except Exception as error:
        print(json.dumps({"valid": False, "error": repr(error)}))
        save_checkpoint(path, checkpoint(step))
"""


def kill_while_saving(path: Path, rounds: int) -> None:
    lines = run_python(KILLED_WHILE_SAVING, path, rounds, "delays").splitlines()
    outcomes = [json.loads(line) for line in lines]
    assert len(outcomes) == rounds
    assert [outcome for outcome in outcomes if not outcome["valid"]] == []
    assert all(outcome["to"] >= outcome["from"] for outcome in outcomes)
    # These processes saved once and were killed during a later save, or nothing is tested.
    in_save = [outcome for outcome in outcomes if outcome["in_save"]]
    assert len(in_save) == rounds // 2
    for outcome in in_save:
        assert outcome["num_temp_files"] == 1
        assert outcome["to"] > outcome["from"]


def test_a_kill_while_saving_leaves_a_valid_file(path: Path) -> None:
    kill_while_saving(path, rounds=12)


@pytest.mark.slow
def test_forty_kills_while_saving_leave_valid_files(path: Path) -> None:
    kill_while_saving(path, rounds=40)


# --- A full disk --------------------------------------------------------------------------------

# The disk is full in the first tensor, in the last one, or only at the end because of buffering.
DISK_FULL = """
import hashlib, json, resource, sys
from pathlib import Path
import torch
from segtrain.checkpoint import Checkpoint, save_checkpoint
from segtrain.config.schema import Config
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for num_values in (1_000_000, 7_000, 6_200):
    weights = {str(i): torch.zeros(num_values) for i in range(4)}
    try:
        save_checkpoint(path, Checkpoint(config=Config(), weights=weights, epoch=0, global_step=0,
                                         metrics={}))
        outcome = ["saved", ""]
    except Exception as error:
        outcome = [type(error).__name__, str(error)]
    others = [other.name for other in path.parent.iterdir() if other != path]
    print(json.dumps([*outcome, hashlib.sha256(path.read_bytes()).hexdigest(), others]))
"""


def test_a_full_disk_keeps_only_the_old_file(path: Path) -> None:
    save_checkpoint(path, small_checkpoint())
    before = sha256_of(path)
    outcomes = [json.loads(line) for line in run_python(DISK_FULL, path).splitlines()]
    assert len(outcomes) == 3
    for kind, message, after, others in outcomes:
        assert (after, others) == (before, [])
        assert kind == "ResourceError"
        assert str(path) in message
        assert "\n" not in message


def test_a_folder_that_cannot_be_created_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="file"):
        save_checkpoint(tmp_path / "file" / "checkpoints" / "last.pt", small_checkpoint())


# --- Damaged files ------------------------------------------------------------------------------


def assert_refused(path: Path) -> str:
    """Assert that loading fails with one line that names `path`, and return it."""
    with pytest.raises(CheckpointError) as caught:
        restore_model(load_checkpoint(path), path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:1], id="one byte"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: data[:-1], id="last byte missing"),
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
        pytest.param(lambda data: b"not a checkpoint\n" * 100, id="text"),
        pytest.param(lambda data: data[len(data) // 2 :], id="second half"),
        pytest.param(lambda data: data[:4096] + data[8192:], id="missing block"),
        pytest.param(lambda data: data[:4096] + bytes(4096) + data[8192:], id="zeroed block"),
    ],
)
def test_a_damaged_file_is_refused(path: Path, damage: Callable[[bytes], bytes]) -> None:
    save_checkpoint(path, small_checkpoint())
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(path)


def test_a_missing_file_and_a_folder_are_refused(path: Path) -> None:
    assert_refused(path)
    path.mkdir()
    assert_refused(path)


def test_a_flipped_bit_is_refused_or_changes_nothing(path: Path) -> None:
    """Only a flip in the padding of the zip archive may pass."""
    saved = small_checkpoint()
    save_checkpoint(path, saved)
    good = path.read_bytes()
    refused = 0
    for bit in random.Random(9).sample(range(8 * len(good)), 60):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:
            assert_same(loaded, saved)
    assert refused > 0


def test_a_flipped_bit_in_a_tensor_is_always_refused(path: Path) -> None:
    """torch loads such a file; each of 30 flips in the bytes of a tensor must be detected."""
    marked = torch.arange(1.0, 4097.0)
    save_checkpoint(path, small_checkpoint(training={"marked": marked}))
    good = path.read_bytes()
    start = good.index(marked.numpy().tobytes())
    for bit in random.Random(10).sample(range(8 * 4 * 4096), 30):
        damaged = bytearray(good)
        damaged[start + bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        assert_refused(path)


def rewrite_archive(
    path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """Change members of the archive and update its own checksums."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def test_changed_content_is_refused_even_in_a_valid_archive(path: Path) -> None:
    save_checkpoint(path, small_checkpoint())
    rewrite_archive(path, lambda name, data: data)
    load_checkpoint(path)  # the rewritten archive alone is accepted

    def flip_first_bit(name: str, data: bytes) -> bytes:
        return bytes([data[0] ^ 1]) + data[1:] if name.endswith("/data/0") else data

    rewrite_archive(path, flip_first_bit)
    assert "sha256" in assert_refused(path)


# --- Other files --------------------------------------------------------------------------------


def valid_content() -> dict[str, Any]:
    checkpoint = small_checkpoint()
    return {
        "format_version": 2,
        "classes": ["background", "person"],
        "weights": dict(checkpoint.weights),
        "epoch": 3,
        "global_step": 17,
        "metrics": {"val/person_iou": 0.75},
        "training": {},
        "data": {},
        "config": {"model": {"name": "unet", **SMALL_UNET}},
    }


def save_signed(path: Path, content: dict[Any, Any]) -> None:
    """Save with a valid checksum, as an attacker can: it must not be the only protection."""
    torch.save({**content, "sha256": _digest(content)}, path)


def changed_content(**changes: Any) -> dict[str, Any]:
    return {**valid_content(), **changes}


def map_weights(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    weights = valid_content()["weights"]
    return {key: change(v) if v.is_floating_point() else v for key, v in weights.items()}


def test_valid_content_is_accepted_content(path: Path) -> None:
    save_signed(path, valid_content())
    restore_model(load_checkpoint(path), path)


@pytest.mark.parametrize("content", [{}, {"weights": {}}, [], [1, 2], torch.ones(3), 5, "text"])
def test_other_files_of_torch_are_refused(path: Path, content: object) -> None:
    torch.save(content, path)
    assert_refused(path)


def test_a_bare_state_dict_is_refused(path: Path) -> None:
    torch.save(build_model("unet", **SMALL_UNET).state_dict(), path)
    assert_refused(path)


@pytest.mark.parametrize("version", [0, 1, 3, None, "2", torch.ones(3)], ids=str)
def test_another_format_version_is_refused(path: Path, version: object) -> None:
    save_signed(path, changed_content(format_version=version))
    message = assert_refused(path)
    assert "checkpoint format" in message
    assert message.endswith("; use the segtrain version that wrote it or train again")


@pytest.mark.parametrize("key", [key for key in valid_content() if key != "classes"])
def test_a_missing_key_is_refused(path: Path, key: str) -> None:
    content = valid_content()
    del content[key]
    save_signed(path, content)
    assert_refused(path)


def test_a_missing_checksum_is_refused(path: Path) -> None:
    torch.save(valid_content(), path)
    assert "sha256" in assert_refused(path)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"weights": [1]}, id="weights are a list"),
        pytest.param({"weights": None}, id="weights are None"),
        pytest.param({"weights": {}}, id="no weights"),
        pytest.param({"weights": dict.fromkeys(valid_content()["weights"], 1)}, id="ints"),
        pytest.param({"weights": map_weights(Tensor.double)}, id="float64 weights"),
        pytest.param({"weights": map_weights(Tensor.half)}, id="float16 weights"),
        pytest.param({"weights": map_weights(Tensor.long)}, id="integer weights"),
        pytest.param({"weights": map_weights(Tensor.cfloat)}, id="complex weights"),
        pytest.param({"weights": map_weights(lambda v: v[:1])}, id="short weights"),
        pytest.param({"weights": {"a": torch.ones(3, device="meta")}}, id="meta tensor"),
        pytest.param({"config": None}, id="no config"),
        pytest.param({"config": {"model": {"name": "vnet"}}}, id="unknown model"),
        pytest.param({"config": {"model": {"name": "unet", "wide": 1}}}, id="unknown argument"),
        pytest.param({"config": {"model": {"name": "unet", "num_classes": 2}}}, id="num_classes"),
        pytest.param({"config": {"model": {"name": "unet"}}}, id="weights of a smaller model"),
        pytest.param({"config": {"model": {"name": "tiramisu"}}}, id="weights of another model"),
        pytest.param({"config": {"model": {"base_channels": 10**12}}}, id="a very wide model"),
        pytest.param({"config": {"model": {"base_channels": 10**30}}}, id="a wider model"),
        pytest.param({"epoch": "three"}, id="epoch is text"),
        pytest.param({"global_step": None}, id="no global_step"),
        pytest.param({"metrics": 5}, id="metrics are a number"),
        pytest.param({"training": [1]}, id="training is a list"),
    ],
)
def test_a_forged_checkpoint_is_refused(path: Path, changes: dict[str, Any]) -> None:
    content = changed_content(**changes)
    try:
        save_signed(path, content)
    except TypeError:  # a meta tensor has no bytes to sign
        torch.save({**content, "sha256": "0" * 64}, path)
    assert_refused(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", ["weights", "training"])
def test_nan_and_infinity_are_refused(path: Path, place: str, bad: float) -> None:
    bad_tensor = torch.zeros(1000)
    bad_tensor[617] = bad
    save_signed(path, changed_content(**{place: {"a": [bad_tensor]}}))
    assert "NaN" in assert_refused(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_are_found_at_every_position(bad: float, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for length in (1, 2, 7, 8, 9, 16, 31, 70):
        good = torch.tensor([largest, -largest, 0.0, 1e-40], dtype=dtype).repeat(length)[:length]
        assert _is_finite(good)
        for i in range(length):
            bad_tensor = good.clone()
            bad_tensor[i] = bad
            assert not _is_finite(bad_tensor), (length, i)
    for shape in ((), (0,), (2, 0)):
        assert _is_finite(torch.zeros(shape, dtype=dtype))
    # Large enough for several threads.
    bad_tensor = torch.zeros(3, 100_000, dtype=dtype)
    assert _is_finite(bad_tensor)
    bad_tensor[2, 77_777] = bad
    assert not _is_finite(bad_tensor)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("place", ["weights", "training"])
def test_nan_and_infinity_never_replace_a_valid_file(path: Path, place: str, bad: float) -> None:
    """RMSProp's mean square overflows while the weights are still finite."""
    save_checkpoint(path, small_checkpoint())
    before = path.read_bytes()

    with pytest.raises(DivergedError, match="--lr"):
        save_checkpoint(path, small_checkpoint(**{place: {"a": [torch.tensor([0.0, bad])]}}))

    assert path.read_bytes() == before


def test_the_error_for_weights_of_another_network_names_model_and_key(path: Path) -> None:
    config = Config(model=ModelConfig(kwargs={"base_channels": 3, "depth": 1}))
    saved = replace(small_checkpoint(), config=config)
    save_checkpoint(path, saved)
    message = assert_refused(path)
    assert "unet" in message
    assert "encoders.0.0.weight" in message


# --- Hostile files ------------------------------------------------------------------------------


class CommandOnUnpickling:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.flag}'",)


@pytest.mark.parametrize("where", ["alone", "in weights", "legacy"])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path: Path, where: str) -> None:
    path, flag = tmp_path / "last.pt", tmp_path / "executed"
    bomb = CommandOnUnpickling(flag)
    content = bomb if where == "alone" else changed_content(weights={"a": bomb})
    torch.save(content, path, _use_new_zipfile_serialization=where != "legacy")
    message = assert_refused(path)
    assert not flag.exists()
    # torch's own message explains how to disable the protection.
    assert "weights_only" not in message
    assert "add_safe_globals" not in message
    # Without protection the same file does run code.
    torch.load(path, weights_only=False)
    assert flag.exists()


def test_torch_load_is_always_called_with_weights_only(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a refusal, and independent of the other checks."""
    weights_only: list[object] = []
    load = torch.load

    def recording_load(*args: Any, **kwargs: Any) -> Any:
        weights_only.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", recording_load)
    save_checkpoint(path, small_checkpoint())
    load_checkpoint(path)
    torch.save(CommandOnUnpickling(path.with_name("executed")), path)
    assert_refused(path)
    assert weights_only
    assert set(weights_only) == {True}


class FalseShape:
    """Unpickles to a tensor of `size` over a storage of 4 numbers."""

    def __init__(self, size: int, stride: int) -> None:
        four = torch.zeros(4).untyped_storage()
        self.storage = torch.storage.TypedStorage(
            wrap_storage=four, dtype=torch.float32, _internal=True
        )
        self.layout = (0, (size,), (stride,), False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (self.storage, *self.layout)


def zip_bomb(path: Path) -> None:
    """1.2 GB of zeros, compressed to 5 MB."""
    torch.save(changed_content(weights={"a": torch.zeros(4)}), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            if name.endswith("/data/0"):
                with archive.open(name, "w") as member:
                    for _ in range(75):
                        member.write(bytes(2**24))
            else:
                archive.writestr(name, data)


# A pickle of 30 bytes that allocates 2 GB; torch's safe unpickler allows the constructor.
HUGE_BYTEARRAY = b"\x80\x02cbuiltins\nbytearray\nJ" + (2**31 - 1).to_bytes(4, "little") + b"\x85R."


def huge_bytearray(path: Path) -> None:
    torch.save(changed_content(), path)
    rewrite_archive(path, lambda name, data: HUGE_BYTEARRAY if name.endswith(".pkl") else data)


def two_pickles(path: Path, *, bomb_first: bool) -> None:
    """Two members with one name: zipfile may read the harmless one and torch the other."""
    torch.save(changed_content(), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about the duplicate name
        for name, data in members.items():
            pair = (HUGE_BYTEARRAY, data) if bomb_first else (data, HUGE_BYTEARRAY)
            for content in pair if name.endswith(".pkl") else [data]:
                archive.writestr(name, content)


def expanded_tensor() -> dict[str, Any]:
    return changed_content(weights={"a": torch.zeros(1).expand(10**9)})


def forged_stride() -> dict[str, Any]:
    return changed_content(weights={"a": FalseShape(10**9, 0)})


def longer_than_its_storage() -> dict[str, Any]:
    return changed_content(weights={"a": FalseShape(10**9, 1)})


def doubling_lists() -> dict[str, Any]:
    """Sixty nested lists that each contain the next one twice: 2^60 items to traverse."""
    nested: list[Any] = [1]
    for _ in range(60):
        nested = [nested, nested]
    return changed_content(training={"nested": nested})


def cycle() -> dict[str, Any]:
    content = changed_content()
    content["training"]["itself"] = content
    return content


def one_tensor_many_times() -> dict[str, Any]:
    """4 MB on disk, 400 GB to hash."""
    large = torch.zeros(1_000_000)
    return changed_content(weights={str(i): large for i in range(100_000)})


def unsigned(make: Callable[[], dict[str, Any]]) -> Callable[[Path], None]:
    """Save without a valid checksum, which these contents make impossible to compute."""
    return lambda path: torch.save({**make(), "sha256": "0" * 64}, path)


def many_layers(path: Path) -> None:
    save_signed(path, changed_content(config={"model": {"name": "tiramisu", "bottleneck": 10**9}}))


HOSTILE: dict[str, Callable[[Path], None]] = {
    "zip bomb": zip_bomb,
    "huge bytearray": huge_bytearray,
    "bytearray before a good pickle": partial(two_pickles, bomb_first=True),
    "bytearray behind a good pickle": partial(two_pickles, bomb_first=False),
    "expanded tensor": unsigned(expanded_tensor),
    "forged stride": unsigned(forged_stride),
    "longer than its storage": unsigned(longer_than_its_storage),
    "doubling lists": unsigned(doubling_lists),
    "cycle": unsigned(cycle),
    "one tensor many times": unsigned(one_tensor_many_times),
    "many layers": many_layers,
}

# Each file is loaded in a fork of one process that has imported torch. The limit on CPU time
# ends an endless load; its file then counts as not refused.
LOAD_HOSTILE = """
import json, os, resource, sys
from pathlib import Path
import torch
from segtrain.checkpoint import load_checkpoint, restore_model
from segtrain.errors import CheckpointError

torch.set_num_threads(1)  # a fork would wait for threads that only its parent has
for path in map(Path, sys.argv[1:]):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
        try:
            restore_model(load_checkpoint(path), path)
            outcome = "loaded"
        except CheckpointError as error:
            outcome = "refused: " + str(error)
        except BaseException as error:
            outcome = "raised " + repr(error)[:300]
        os.write(write_end, outcome.encode())
        os._exit(0)
    os.close(write_end)
    _, status, usage = os.wait4(pid, 0)
    with os.fdopen(read_end) as reader:
        outcome = reader.read() or f"killed, status {status}"
    print(json.dumps({"outcome": outcome, "megabytes": usage.ru_maxrss / 1024}))
"""


@pytest.fixture(scope="module")
def hostile_outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hostile")
    for name, write in HOSTILE.items():
        write(folder / f"{name}.pt")
    lines = run_python(LOAD_HOSTILE, *(folder / f"{name}.pt" for name in HOSTILE)).splitlines()
    return dict(zip(HOSTILE, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bomb_is_refused_within_a_gigabyte(
    hostile_outcomes: dict[str, dict[str, Any]], name: str
) -> None:
    outcome = hostile_outcomes[name]
    assert outcome["outcome"].startswith("refused: ")
    assert f"{name}.pt" in outcome["outcome"]
    assert outcome["megabytes"] < 1000


def test_every_content_field_is_covered_by_the_checksum(path: Path) -> None:
    """Changing any one field after signing must invalidate the checksum."""
    content = valid_content()
    changes = {
        "weights": map_weights(lambda v: v + 1),
        "epoch": 4,
        "global_step": 18,
        "metrics": {"val/person_iou": 0.76},
        "training": {"rng": 1},
        "data": {"train": "other"},
        "config": {"model": {"name": "unet", **SMALL_UNET, "base_channels": 3}},
        "classes": ["person", "background"],
    }
    assert set(changes) == set(content) - {"format_version"}
    for key, value in changes.items():
        torch.save({**content, key: value, "sha256": _digest(content)}, path)
        assert "sha256" in assert_refused(path), key


def test_the_checksum_depends_on_the_structure() -> None:
    contents: list[Any] = [
        [1, 2],
        [12],
        [[1], 2],
        [1, [2]],
        ["1", 2],
        {"a": 1},
        {"a": {}},
        {"a": [1]},
        torch.tensor([1, 2]),
        torch.tensor([[1, 2]]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1, 2], dtype=torch.int32),
    ]
    digests = [_digest(content) for content in contents]
    for (i, first), (j, second) in itertools.combinations(enumerate(digests), 2):
        assert first != second, (i, j)
