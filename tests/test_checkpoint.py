"""Checkpoints: what is saved comes back, whole or not at all, and hostile files do no harm."""

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
from segtrain.config import Config, ModelConfig, OptimConfig
from segtrain.errors import CheckpointError, DivergedError, ResourceError
from segtrain.models import build_model

SLIM = {"base_channels": 2, "depth": 1}


def slim_checkpoint(**fields: Any) -> Checkpoint:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "config": Config(model=ModelConfig(kwargs=SLIM), optim=OptimConfig(lr=0.25)),
        "weights": build_model("unet", **SLIM).state_dict(),
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
    """Run `code` in a fresh interpreter that finds the same packages; returns its stdout."""
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


def test_what_is_saved_comes_back(path: Path) -> None:
    saved = slim_checkpoint()
    save_checkpoint(path, saved)
    assert_same(load_checkpoint(path), saved)
    assert list(path.parent.iterdir()) == [path]


LOAD_ELSEWHERE = """
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


def test_a_fresh_process_rebuilds_the_network_from_the_file_alone(path: Path) -> None:
    torch.manual_seed(8)
    model = build_model("unet", **SLIM)
    image = (torch.arange(2 * 3 * 9 * 11) % 256).to(torch.uint8).view(2, 3, 9, 11)
    model(image)  # moves batch norm's buffers away from those of a new network
    save_checkpoint(path, slim_checkpoint(weights=model.state_dict()))
    with torch.inference_mode():
        logits = model.eval()(image).flatten().tolist()

    elsewhere = json.loads(run_python(LOAD_ELSEWHERE, path))
    assert elsewhere["shas"] == {
        key: hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for key, value in model.state_dict().items()
    }
    assert elsewhere["logits"] == pytest.approx(logits, rel=1e-6, abs=1e-6)
    assert elsewhere["lr"] == 0.25
    assert elsewhere["training"] is False


def test_the_file_is_readable_by_plain_torch_without_segtrain(path: Path) -> None:
    saved = slim_checkpoint()
    save_checkpoint(path, saved)
    content = torch.load(path, weights_only=True)
    assert content["format_version"] == 1
    assert content["classes"] == ["background", "person"]
    assert content["config"]["model"] == {"name": "unet", **SLIM}
    torch.testing.assert_close(content["weights"], dict(saved.weights), rtol=0, atol=0)


def test_a_restored_network_does_not_share_memory_with_the_saved_one(path: Path) -> None:
    model = build_model("unet", **SLIM)
    save_checkpoint(path, slim_checkpoint(weights=model.state_dict()))
    restored = restore_model(load_checkpoint(path), path)
    before = model.head.weight.clone()
    with torch.no_grad():
        restored.head.weight.zero_()
    assert torch.equal(model.head.weight, before)
    assert all(not value.is_meta for value in restored.state_dict().values())
    assert all(parameter.requires_grad for parameter in restored.parameters())


def test_views_are_saved_as_their_own_values_only(path: Path) -> None:
    """A row of a large matrix must not carry the matrix along."""
    matrix = torch.arange(4_000_000.0).view(2, -1)
    save_checkpoint(path, slim_checkpoint(training={"row": matrix[1, :4], "t": matrix[:, :2].t()}))
    assert path.stat().st_size < 100_000
    training = load_checkpoint(path).training
    assert training["row"].tolist() == [2_000_000, 2_000_001, 2_000_002, 2_000_003]
    assert training["t"].tolist() == [[0, 2_000_000], [1, 2_000_001]]


@pytest.mark.parametrize("value", [object(), Path("x"), {1, 2}, b"bytes"])
def test_only_plain_types_can_be_saved_and_a_refusal_keeps_the_old_file(
    path: Path, value: object
) -> None:
    save_checkpoint(path, slim_checkpoint())
    before = sha256_of(path)
    with pytest.raises(TypeError, match="does not belong in a checkpoint"):
        save_checkpoint(path, slim_checkpoint(training={"value": value}))
    assert sha256_of(path) == before
    assert list(path.parent.iterdir()) == [path]


# --- Killed while saving ------------------------------------------------------------------------

# One process imports torch once; each round forks a saver and kills it: by turns after a random
# delay, which may hit anything, and in the middle of a save, which delays alone may never hit.
KILLED_WHILE_SAVING = """
import itertools, json, os, random, signal, sys, time
from pathlib import Path
import torch
from segtrain.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from segtrain.config import Config

torch.set_num_threads(1)  # a fork has no thread but its own to wait for
path, rounds = Path(sys.argv[1]), int(sys.argv[2])

def checkpoint(step):
    weights = {"a": torch.full((500_000,), float(step)), "b": torch.full((500_000,), float(-step))}
    return Checkpoint(config=Config(), weights=weights, epoch=0, global_step=step, metrics={})

def others():
    return [other for other in path.parent.iterdir() if other != path]

# Lets it save once or more and stops it when it is saving again.
def stop_in_the_middle(pid, before):
    while True:
        time.sleep(0.0005)
        if path.stat().st_mtime_ns == before or not others():
            continue
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        if others():  # it had not just come to the end
            return
        os.kill(pid, signal.SIGCONT)

save_checkpoint(path, checkpoint(0))
step, delays = 0, random.Random(sys.argv[3])
for number in range(rounds):
    before, aimed = path.stat().st_mtime_ns, number % 2 == 1
    pid = os.fork()
    if pid == 0:
        for later in itertools.count(step + 1):
            save_checkpoint(path, checkpoint(later))
    if aimed:
        stop_in_the_middle(pid, before)
    else:
        time.sleep(delays.uniform(0.0, 0.2))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    stale = others()
    for other in stale:
        other.unlink()
    try:
        loaded = load_checkpoint(path)
        whole = (bool((loaded.weights["a"] == loaded.global_step).all())
                 and bool((loaded.weights["b"] == -loaded.global_step).all()))
        print(json.dumps({"whole": whole, "from": step, "to": loaded.global_step,
                          "aimed": aimed, "stale": len(stale)}))
        step = loaded.global_step
    except Exception as error:
        print(json.dumps({"whole": False, "error": repr(error)}))
        save_checkpoint(path, checkpoint(step))
"""


def kill_while_saving(path: Path, rounds: int) -> None:
    lines = run_python(KILLED_WHILE_SAVING, path, rounds, "delays").splitlines()
    outcomes = [json.loads(line) for line in lines]
    assert len(outcomes) == rounds
    assert [outcome for outcome in outcomes if not outcome["whole"]] == []
    assert all(outcome["to"] >= outcome["from"] for outcome in outcomes)
    # Those savers did save and were hit in the middle of the next time: else nothing was tested.
    aimed = [outcome for outcome in outcomes if outcome["aimed"]]
    assert len(aimed) == rounds // 2
    assert all(outcome["stale"] == 1 and outcome["to"] > outcome["from"] for outcome in aimed)


def test_a_kill_while_saving_leaves_a_whole_file(path: Path) -> None:
    kill_while_saving(path, rounds=12)


@pytest.mark.slow
def test_forty_kills_while_saving_leave_forty_whole_files(path: Path) -> None:
    kill_while_saving(path, rounds=40)


# --- A full disk --------------------------------------------------------------------------------

# The disk fills up in the first tensor, in the last one, or (buffered) only at the end.
DISK_FULL = """
import hashlib, json, resource, sys
from pathlib import Path
import torch
from segtrain.checkpoint import Checkpoint, save_checkpoint
from segtrain.config import Config
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


def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(path: Path) -> None:
    save_checkpoint(path, slim_checkpoint())
    before = sha256_of(path)
    outcomes = [json.loads(line) for line in run_python(DISK_FULL, path).splitlines()]
    assert len(outcomes) == 3
    for kind, message, after, others in outcomes:
        assert (after, others) == (before, [])
        assert kind == "ResourceError"
        assert str(path) in message
        assert "\n" not in message


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="file"):
        save_checkpoint(tmp_path / "file" / "checkpoints" / "last.pt", slim_checkpoint())


# --- Damaged files ------------------------------------------------------------------------------


def assert_refused(path: Path) -> str:
    """Loading `path` ends in one line that names it."""
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
        pytest.param(lambda data: data[:4096] + data[8192:], id="a hole"),
        pytest.param(lambda data: data[:4096] + bytes(4096) + data[8192:], id="a block of zeros"),
    ],
)
def test_a_damaged_file_is_refused(path: Path, damage: Callable[[bytes], bytes]) -> None:
    save_checkpoint(path, slim_checkpoint())
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(path)


def test_a_missing_file_and_a_folder_are_refused(path: Path) -> None:
    assert_refused(path)
    path.mkdir()
    assert_refused(path)


def test_one_flipped_bit_anywhere_is_refused_or_changes_nothing(path: Path) -> None:
    """Some bytes are padding of the zip archive; a flip there may pass, but only there."""
    saved = slim_checkpoint()
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


def test_one_flipped_bit_in_a_tensor_is_always_refused(path: Path) -> None:
    """Torch itself can load such a file; each of 30 flips in a tensor's own bytes is caught."""
    marked = torch.arange(1.0, 4097.0)
    save_checkpoint(path, slim_checkpoint(training={"marked": marked}))
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
    """Change members of the archive; unlike a flip on disk, its own checksums then fit again."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def test_changed_content_is_refused_even_if_the_archive_is_in_order(path: Path) -> None:
    save_checkpoint(path, slim_checkpoint())
    rewrite_archive(path, lambda name, data: data)
    load_checkpoint(path)  # so that it is the change below that is refused

    def flip_first_bit(name: str, data: bytes) -> bytes:
        return bytes([data[0] ^ 1]) + data[1:] if name.endswith("/data/0") else data

    rewrite_archive(path, flip_first_bit)
    assert "sha256" in assert_refused(path)


# --- Files that are something else --------------------------------------------------------------


def good_content() -> dict[str, Any]:
    checkpoint = slim_checkpoint()
    return {
        "format_version": 1,
        "classes": ["background", "person"],
        "weights": dict(checkpoint.weights),
        "epoch": 3,
        "global_step": 17,
        "metrics": {"val/person_iou": 0.75},
        "training": {},
        "config": {"model": {"name": "unet", **SLIM}},
    }


def save_signed(path: Path, content: dict[Any, Any]) -> None:
    """Save with a right checksum, as any forger can: the checksum must not be the only guard."""
    torch.save({**content, "sha256": _digest(content)}, path)


def changed(**changes: Any) -> dict[str, Any]:
    return {**good_content(), **changes}


def map_weights(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    weights = good_content()["weights"]
    return {key: change(v) if v.is_floating_point() else v for key, v in weights.items()}


def test_the_forged_content_below_is_good_where_it_is_not_changed(path: Path) -> None:
    save_signed(path, good_content())
    restore_model(load_checkpoint(path), path)


@pytest.mark.parametrize("content", [{}, {"weights": {}}, [], [1, 2], torch.ones(3), 5, "text"])
def test_another_file_of_torch_is_refused(path: Path, content: object) -> None:
    torch.save(content, path)
    assert_refused(path)


def test_a_bare_state_dict_is_refused(path: Path) -> None:
    torch.save(build_model("unet", **SLIM).state_dict(), path)
    assert_refused(path)


@pytest.mark.parametrize("version", [0, 2, None, "1", torch.ones(3)], ids=str)
def test_another_format_version_is_refused(path: Path, version: object) -> None:
    save_signed(path, changed(format_version=version))
    assert "format" in assert_refused(path)


@pytest.mark.parametrize("key", [key for key in good_content() if key != "classes"])
def test_a_missing_key_is_refused(path: Path, key: str) -> None:
    content = good_content()
    del content[key]
    save_signed(path, content)
    assert_refused(path)


def test_a_missing_checksum_is_refused(path: Path) -> None:
    torch.save(good_content(), path)
    assert "sha256" in assert_refused(path)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"weights": [1]}, id="weights are a list"),
        pytest.param({"weights": None}, id="weights are None"),
        pytest.param({"weights": {}}, id="no weights"),
        pytest.param({"weights": dict.fromkeys(good_content()["weights"], 1)}, id="ints"),
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
        pytest.param({"config": {"model": {"name": "unet"}}}, id="weights of a slimmer model"),
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
    content = changed(**changes)
    try:
        save_signed(path, content)
    except TypeError:  # of a meta tensor there is nothing to sign
        torch.save({**content, "sha256": "0" * 64}, path)
    assert_refused(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", ["weights", "training"])
def test_numbers_that_are_none_are_refused(path: Path, place: str, bad: float) -> None:
    poisoned = torch.zeros(1000)
    poisoned[617] = bad
    save_signed(path, changed(**{place: {"a": [poisoned]}}))
    assert "NaN" in assert_refused(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_numbers_that_are_none_are_found_wherever_they_are(bad: float, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for length in (1, 2, 7, 8, 9, 16, 31, 70):
        good = torch.tensor([largest, -largest, 0.0, 1e-40], dtype=dtype).repeat(length)[:length]
        assert _is_finite(good)
        for i in range(length):
            poisoned = good.clone()
            poisoned[i] = bad
            assert not _is_finite(poisoned), (length, i)
    for shape in ((), (0,), (2, 0)):
        assert _is_finite(torch.zeros(shape, dtype=dtype))
    # Wide enough for several threads.
    poisoned = torch.zeros(3, 100_000, dtype=dtype)
    assert _is_finite(poisoned)
    poisoned[2, 77_777] = bad
    assert not _is_finite(poisoned)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("place", ["weights", "training"])
def test_numbers_that_are_none_never_replace_a_good_file(
    path: Path, place: str, bad: float
) -> None:
    """RMSProp's mean square overflows while the weights are still finite."""
    save_checkpoint(path, slim_checkpoint())
    before = path.read_bytes()

    with pytest.raises(DivergedError, match="--lr"):
        save_checkpoint(path, slim_checkpoint(**{place: {"a": [torch.tensor([0.0, bad])]}}))

    assert path.read_bytes() == before


def test_weights_of_another_network_name_the_model_and_what_does_not_fit(path: Path) -> None:
    config = Config(model=ModelConfig(kwargs={"base_channels": 3, "depth": 1}))
    saved = replace(slim_checkpoint(), config=config)
    save_checkpoint(path, saved)
    message = assert_refused(path)
    assert "unet" in message
    assert "encoders.0.0.weight" in message


# --- Hostile files ------------------------------------------------------------------------------


class RunsACommand:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.flag}'",)


@pytest.mark.parametrize("where", ["alone", "in weights", "legacy"])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path: Path, where: str) -> None:
    path, flag = tmp_path / "last.pt", tmp_path / "it ran"
    bomb = RunsACommand(flag)
    content = bomb if where == "alone" else changed(weights={"a": bomb})
    torch.save(content, path, _use_new_zipfile_serialization=where != "legacy")
    message = assert_refused(path)
    assert not flag.exists()
    # torch's own message explains how to switch the guard off.
    assert "weights_only" not in message
    assert "add_safe_globals" not in message
    # Where nothing guards, the very same file does run.
    torch.load(path, weights_only=False)
    assert flag.exists()


def test_torch_is_only_ever_asked_to_load_safely(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even after a refusal, however many other guards stand before it."""
    asked: list[object] = []
    load = torch.load

    def recording(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", recording)
    save_checkpoint(path, slim_checkpoint())
    load_checkpoint(path)
    torch.save(RunsACommand(path.with_name("it ran")), path)
    assert_refused(path)
    assert asked
    assert set(asked) == {True}


class Liar:
    """Unpickles to a tensor of `size` over a storage of 4 numbers."""

    def __init__(self, size: int, stride: int) -> None:
        four = torch.zeros(4).untyped_storage()
        self.storage = torch.storage.TypedStorage(
            wrap_storage=four, dtype=torch.float32, _internal=True
        )
        self.layout = (0, (size,), (stride,), False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (self.storage, *self.layout)


def deflated_gigabytes(path: Path) -> None:
    """1.2 GB of zeros in 5 MB."""
    torch.save(changed(weights={"a": torch.zeros(4)}), path)
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


# A pickle of 30 bytes that asks for 2 GB; torch's safe unpickler allows the constructor.
HUGE_BYTEARRAY = b"\x80\x02cbuiltins\nbytearray\nJ" + (2**31 - 1).to_bytes(4, "little") + b"\x85R."


def huge_bytearray(path: Path) -> None:
    torch.save(changed(), path)
    rewrite_archive(path, lambda name, data: HUGE_BYTEARRAY if name.endswith(".pkl") else data)


def two_pickles(path: Path, *, bomb_first: bool) -> None:
    """Two members of one name: zipfile may look at the harmless one and torch unpack the other."""
    torch.save(changed(), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, about the name it writes twice
        for name, data in members.items():
            pair = (HUGE_BYTEARRAY, data) if bomb_first else (data, HUGE_BYTEARRAY)
            for content in pair if name.endswith(".pkl") else [data]:
                archive.writestr(name, content)


def expanded() -> dict[str, Any]:
    return changed(weights={"a": torch.zeros(1).expand(10**9)})


def expanded_by_a_forger() -> dict[str, Any]:
    return changed(weights={"a": Liar(10**9, 0)})


def longer_than_its_storage() -> dict[str, Any]:
    return changed(weights={"a": Liar(10**9, 1)})


def doubling_lists() -> dict[str, Any]:
    """Sixty lists that each hold the next one twice: 2^60 items to walk through."""
    laughs: list[Any] = [1]
    for _ in range(60):
        laughs = [laughs, laughs]
    return changed(training={"laughs": laughs})


def circle() -> dict[str, Any]:
    content = changed()
    content["training"]["itself"] = content
    return content


def one_tensor_many_times() -> dict[str, Any]:
    """4 MB on disk, 400 GB to hash."""
    large = torch.zeros(1_000_000)
    return changed(weights={str(i): large for i in range(100_000)})


def unsigned(make: Callable[[], dict[str, Any]]) -> Callable[[Path], None]:
    """Their checksum cannot be had, for the very reason that makes them hostile."""
    return lambda path: torch.save({**make(), "sha256": "0" * 64}, path)


def many_layers(path: Path) -> None:
    save_signed(path, changed(config={"model": {"name": "tiramisu", "bottleneck": 10**9}}))


HOSTILE: dict[str, Callable[[Path], None]] = {
    "deflated gigabytes": deflated_gigabytes,
    "huge bytearray": huge_bytearray,
    "bytearray before a good pickle": partial(two_pickles, bomb_first=True),
    "bytearray behind a good pickle": partial(two_pickles, bomb_first=False),
    "expanded tensor": unsigned(expanded),
    "expanded by a forger": unsigned(expanded_by_a_forger),
    "longer than its storage": unsigned(longer_than_its_storage),
    "doubling lists": unsigned(doubling_lists),
    "circle": unsigned(circle),
    "one tensor many times": unsigned(one_tensor_many_times),
    "many layers": many_layers,
}

# Each file gets a fork of one process that has imported torch already. The limit on CPU seconds
# ends one that would go on for ever; its file then counts as not refused.
LOAD_HOSTILE = """
import json, os, resource, sys
from pathlib import Path
import torch
from segtrain.checkpoint import load_checkpoint, restore_model
from segtrain.errors import CheckpointError

torch.set_num_threads(1)  # a fork has no thread but its own to wait for
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
    """Change one value after signing: each field by itself must break the sum."""
    content = good_content()
    other = {
        "weights": map_weights(lambda v: v + 1),
        "epoch": 4,
        "global_step": 18,
        "metrics": {"val/person_iou": 0.76},
        "training": {"rng": 1},
        "config": {"model": {"name": "unet", **SLIM, "base_channels": 3}},
        "classes": ["person", "background"],
    }
    assert set(other) == set(content) - {"format_version"}
    for key, value in other.items():
        torch.save({**content, key: value, "sha256": _digest(content)}, path)
        assert "sha256" in assert_refused(path), key


def test_the_checksum_tells_structures_apart() -> None:
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
    for (i, one), (j, other) in itertools.combinations(enumerate(digests), 2):
        assert one != other, (i, j)
