"""The machine: versions, GPUs, disks, shared memory. Imports nothing that needs OpenCV."""

import csv
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from segtrain.cores import usable_cores
from segtrain.doctor.findings import Verdict

# What is written where; whatever else is written needs its folder, only the cache is a comfort.
RUNS, PICTURES, CACHE = "runs", "these pictures", "the cache"

_GB, _MB = 1e9, 1e6
_ENOUGH_DISK, _LEAST_DISK = 2 * _GB, 200 * _MB
_ENOUGH_MEMORY = 4 * _GB
_ENOUGH_GPU_MEMORY = 2 * _GB
_SHARED_MEMORY = Path("/dev/shm")
_PACKAGES = ("torchvision", "albumentations", "numpy", "Pillow")
_NVIDIA_SMI_SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that torch can use; memory in bytes."""

    name: str
    memory: int
    free: int
    capability: str
    bf16: bool
    problem: str = ""
    """What went wrong when it was given something to add up."""


@dataclass(frozen=True, kw_only=True)
class DriverGpu:
    """A GPU that the driver knows of, whatever torch does."""

    name: str
    driver: str


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that training writes into."""

    path: str
    use: str
    free: int
    problem: str = ""
    """Why nothing can be written there."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is; sizes in bytes, None where the system does not tell."""

    versions: dict[str, str]
    cuda_of_torch: str | None
    torch_problem: str
    """What torch says about CUDA that it cannot use."""
    device_problem: str
    """Why the device that was asked for is not there."""
    gpus: list[Gpu]
    driver_gpus: list[DriverGpu]
    cores: int
    memory: int | None
    memory_free: int | None
    folders: list[Folder]
    shared_memory_free: int | None
    shared_memory_needed: int

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def look_at_machine(
    *, device_problem: str, folders: dict[str, Path], shared_memory_needed: int
) -> Machine:
    """Ask the system, torch and the driver.

    Args:
        device_problem: why the device that was asked for is not there, or "".
        folders: what is written → the folder, which need not exist yet.
        shared_memory_needed: bytes that loader processes fill with batches.
    """
    problem = _cuda_problem()
    shared = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None
    memory, memory_free = _memory()
    return Machine(
        versions=_versions(),
        cuda_of_torch=torch.version.cuda or torch.version.hip,
        torch_problem=problem,
        device_problem=device_problem,
        gpus=[] if problem else [_gpu(index) for index in range(torch.cuda.device_count())],
        driver_gpus=driver_gpus(),
        cores=usable_cores(),
        memory=memory,
        memory_free=memory_free,
        folders=[_folder(use, path) for use, path in folders.items()],
        shared_memory_free=shared,
        shared_memory_needed=shared_memory_needed,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _cuda_problem() -> str:
    """Why torch cannot use any GPU; empty where it can."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    return " ".join(str(caught[0].message).split()) if caught else "it sees no GPU"


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    problem, free = "", 0
    try:
        # The first kernel tells whether this torch was built for this GPU at all.
        torch.ones(8, device=f"cuda:{index}").sum().item()
        free = torch.cuda.mem_get_info(index)[0]
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Gpu(
        name=properties.name,
        memory=properties.total_memory,
        free=free,
        capability=f"{properties.major}.{properties.minor}",
        bf16=bf16,
        problem=problem,
    )


def driver_gpus() -> list[DriverGpu]:
    """What NVIDIA's own tool lists, whether or not torch can use it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []  # the tool is there without a driver or a GPU
    rows = [row for row in csv.reader(done.stdout.splitlines()) if len(row) == 2]
    return [DriverGpu(name=name.strip(), driver=driver.strip()) for name, driver in rows]


def _memory() -> tuple[int | None, int | None]:
    """Total and available; a container's limit counts where it is lower."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        total, free = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None, None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, or "max"
        return total, free
    return min(total, limit), min(free, max(0, limit - used))


def _folder(use: str, path: Path) -> Folder:
    there = next(
        parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists()
    )
    problem = ""
    try:
        # Asking for permission is not enough: the whole file system may be read-only.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        problem = error.strerror or str(error)
    return Folder(path=str(path), use=use, free=shutil.disk_usage(there).free, problem=problem)


def check_versions(machine: Machine) -> Iterator[Verdict]:
    names = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    cuda = f"CUDA {machine.cuda_of_torch}" if machine.cuda_of_torch else "no CUDA"
    yield "ok", f"{names}; torch is built with {cuda}", ""
    if missing := [name for name, number in machine.versions.items() if number == "missing"]:
        yield "error", f"{', '.join(missing)} is not installed", f"pip install {' '.join(missing)}"


def check_gpus(machine: Machine) -> Iterator[Verdict]:
    """Above all: a GPU that is there and would not be used."""
    for index, gpu in enumerate(machine.gpus):
        yield from _check_gpu(index, gpu, machine.driver_gpus)
    if machine.gpus:
        return
    names = ", ".join(gpu.name for gpu in machine.driver_gpus)
    if not names:
        yield "note", "no GPU: training runs on the processor, many times slower", ""
    elif machine.cuda_of_torch is None:
        yield (
            "warning",
            f"{names} would stay unused: torch {machine.versions['torch']} is built without CUDA",
            "reinstall torch and torchvision with CUDA as pytorch.org says for your driver",
        )
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        yield (
            "warning",
            f"{names} would stay unused: $CUDA_VISIBLE_DEVICES hides it",
            "unset CUDA_VISIBLE_DEVICES",
        )
    else:
        yield (
            "warning",
            f"{names} would stay unused: {machine.torch_problem}",
            f"driver {machine.driver_gpus[0].driver} may be too old for CUDA "
            f"{machine.cuda_of_torch}: update it, or install a torch for an older CUDA",
        )


def _check_gpu(index: int, gpu: Gpu, driver_gpus: list[DriverGpu]) -> Iterator[Verdict]:
    if gpu.problem:
        yield (
            "error",
            f"cuda:{index} {gpu.name} (compute capability {gpu.capability}) does not work: "
            f"{gpu.problem}",
            "install a torch that is built for it, see pytorch.org, or restart the machine",
        )
        return
    driver = f", driver {driver_gpus[0].driver}" if driver_gpus else ""
    precision = "bf16" if gpu.bf16 else "no bf16: fp32, or --precision fp16"
    yield (
        "ok",
        f"cuda:{index} {gpu.name}, {gpu.memory / _GB:.1f} GB ({gpu.free / _GB:.1f} free), compute "
        f"capability {gpu.capability}, {precision}{driver}",
        "",
    )
    if gpu.free < _ENOUGH_GPU_MEMORY:
        yield (
            "warning",
            f"only {gpu.free / _GB:.1f} GB are free on cuda:{index}",
            "see with nvidia-smi who takes the rest, or use a smaller --batch-size",
        )


def check_device(machine: Machine) -> Iterator[Verdict]:
    """A device that was named; others are never taken in its place."""
    if machine.device_problem:
        message, _, remedy = machine.device_problem.partition("; ")
        yield "error", message, remedy


def check_memory(machine: Machine) -> Iterator[Verdict]:
    if machine.memory is None or machine.memory_free is None:
        yield "ok", f"{machine.cores} cores", ""
        return
    yield (
        "warning" if machine.memory_free < _ENOUGH_MEMORY else "ok",
        f"{machine.cores} cores, {machine.memory / _GB:.1f} GB of memory "
        f"({machine.memory_free / _GB:.1f} free)",
        "use a small --batch-size and few --workers"
        if machine.memory_free < _ENOUGH_MEMORY
        else "",
    )


def check_disk(machine: Machine) -> Iterator[Verdict]:
    for folder in machine.folders:
        text = f"{folder.free / _GB:.1f} GB free for {folder.use} in {folder.path}"
        if folder.free < _LEAST_DISK:
            yield "error", text, "free at least 2 GB there or choose another folder"
        elif folder.free < _ENOUGH_DISK:
            yield "warning", text, "free at least 2 GB there before a long training"
        else:
            yield "ok", text, ""


def check_writing(machine: Machine) -> Iterator[Verdict]:
    for folder in machine.folders:
        if not folder.problem:
            continue
        text = f"nothing can be written for {folder.use} in {folder.path}: {folder.problem}"
        if folder.use == CACHE:
            yield "warning", f"{text}; every start will be slow", "set $SEGTRAIN_CACHE"
        else:
            yield "error", text, "choose another --output, or mend the permissions"


def check_shared_memory(machine: Machine) -> Iterator[Verdict]:
    """Where it is full, a batch of a loader process gets lost without a word."""
    if machine.shared_memory_free is None:
        return
    free, needed = machine.shared_memory_free, machine.shared_memory_needed
    text = (
        f"{free / _MB:.0f} MB free in {_SHARED_MEMORY}, the loader may need {needed / _MB:.0f} MB"
    )
    if free < needed:
        yield "warning", text, "use --workers 0, or docker run --shm-size=8g"
    else:
        yield "ok", text, ""


# A new check is one function and one row.
ENVIRONMENT_CHECKS: dict[str, Callable[[Machine], Iterable[Verdict]]] = {
    "versions": check_versions,
    "gpu": check_gpus,
    "device": check_device,
    "memory": check_memory,
    "disk": check_disk,
    "writing": check_writing,
    "shared-memory": check_shared_memory,
}
