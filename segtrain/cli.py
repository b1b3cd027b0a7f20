"""The command line: parse, call one function, print. Heavy imports live inside the commands."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from segtrain import __version__
from segtrain.errors import DataError, UsageError, UserError, says_out_of_memory
from segtrain.stopping import Stopped, listening

app = typer.Typer(
    name="segtrain",
    help="Train, judge and use person/background segmentation networks.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_BUG, _USAGE, _RESOURCE = 1, 2, 5
_CLOSED_PIPE = 128 + 13  # as a shell reports the end by SIGPIPE
_LONGEST_ERROR = 200
# Libraries that write lines about every object of theirs which is not collected at the end.
_TELL_OF_LEAKS = {"onnx", "triton"}

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        help="Checkpoint or run folder. Default: $SEGTRAIN_CHECKPOINT, else the latest run's best."
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"segtrain {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of deltas from the defaults; see configs/.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="unet, tiramisu, ...: segtrain models lists them.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Root in COCO layout or with images/ and masks/; give it again to mix several. "
            "Default: $SEGTRAIN_DATA, else drawn demo people."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Images at once: a number, or auto: what the memory holds.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate after warm-up.")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the crops; short side in validation, pixels.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, tf32, bf16, fp16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    workers: Annotated[str | None, typer.Option(help="Loader processes: a number or auto.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of all runs.  [runs]")] = None,
    name: Annotated[str | None, typer.Option(help="Folder of this run inside it.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="A run folder or last.pt to continue, or auto: the run of --name, else the "
            "latest, if any."
        ),
    ] = None,
    save_every: Annotated[
        str | None, typer.Option(help="Save within epochs, too: 10m, 1h.  [after each epoch]")
    ] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard", help="Write TensorBoard's files, too.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Every random draw follows from it.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, e.g. --set model.base_channels=16."),
    ] = None,
) -> None:
    """Train a network; ends with a run folder that holds its checkpoints, numbers and pictures."""
    from segtrain.config import load_config
    from segtrain.locking import refuse_if_busy
    from segtrain.runs import is_first_process, meant_folder

    flags: dict[str, Any] = {
        "model.name": model,
        "data.root": (data[0] if len(data) == 1 else data) if data else None,
        "data.image_size": image_size,
        "data.workers": workers,
        "optim.lr": lr,
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "train.precision": precision,
        "train.device": device,
        "train.output": output,
        "train.name": name,
        "train.seed": seed,
        "train.save_every": save_every,
        "train.tensorboard": tensorboard,
    }
    asked = load_config(config, flags=flags, sets=set_ or [])
    # Mistakes and a run that is going on show before torch is imported.
    if is_first_process():
        folder = meant_folder(resume, Path(asked.train.output), asked.train.name)
        if folder is not None:
            refuse_if_busy(folder)
    _say_loading()
    from segtrain.training.command import train as train_run

    train_run(config, flags=flags, sets=set_ or [], resume=resume, device_name=asked.train.device)


@app.command("eval")
def evaluate(
    checkpoint: CheckpointOption = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Root in COCO layout or with images/ and masks/; several are joined. "
            "Default: $SEGTRAIN_DATA, else what it was trained on."
        ),
    ] = None,
    split: Annotated[Literal["val", "train"], typer.Option(help="Which images.")] = "val",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another selection, e.g. --set data.person_area=[0.2,0.7]."),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Judge the masks in this folder, of any tool, in place of a network."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="From which probability on is person.")] = 0.5,
    size: Annotated[
        int | None,
        typer.Option(min=32, help="Short side of what the network sees.  [as trained]"),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(help="Side of the tiles it sees, a multiple of 32.  [whole pictures]"),
    ] = None,
    tta: Annotated[
        Literal["none", "flip", "scales"],
        typer.Option(help="Mean over the mirrored picture, too, or also over three scales."),
    ] = "none",
    bn: Annotated[
        Literal["running", "batch", "recalibrate", "all"] | None,
        typer.Option(
            "--bn",
            "--bn-eval",
            help="Statistics of batch norm; all shows what it makes.  [as trained]",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Judge so many images, evenly spread.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier --json file: how much better this one is.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="New folder for a page that shows the mistakes.")
    ] = None,
    label_check: Annotated[
        bool,
        typer.Option(
            "--label-check", help="Also a sheet of annotations that look wrong, for review."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a report or a sheet that exists.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    workers: Annotated[int | None, typer.Option(min=0, help="Loader processes.  [auto]")] = None,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Judge a network, or any tool's masks, on labelled images at their original resolution."""
    from segtrain.evaluation.wishes import Outputs, Wishes, refuse_torchrun
    from segtrain.runs import is_first_process

    wishes = Wishes(
        checkpoint=checkpoint,
        predictions=predictions,
        data=data,
        split=split,
        sets=set_ or [],
        batch_size=batch_size,
        workers="auto" if workers is None else workers,
        device=device,
        threshold=threshold,
        size=size,
        bn=None if bn == "all" else bn,
        tta=tta,
        tile=tile,
        limit=limit,
        compare=compare,
    )
    outputs = Outputs(report=report, label_check=label_check, overwrite=overwrite)
    if bn == "all":
        outputs.refuse_any("--bn all")
        refuse_torchrun("--bn all")
    if is_first_process():
        outputs.refuse_existing()
    _say_loading()
    from segtrain.evaluation import command

    if bn == "all":
        command.compare_batch_norms(wishes, as_json=as_json, tell=_to_stderr)
    else:
        command.evaluate(wishes, outputs, as_json=as_json, tell=_to_stderr)


@app.command()
def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Pictures, videos, folders of pictures, glob patterns in quotes, or - for one "
            "picture on standard input."
        ),
    ],
    checkpoint: CheckpointOption = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the results; for one input also a file (x.png, x.jpg), or - for PNG "
            "on standard output: the cut-out, the background if --background is given, or what "
            "--save says.",
        ),
    ] = Path("predictions"),
    save: Annotated[
        str | None,
        typer.Option(
            help="Any of mask, cutout, background, overlay, panel, probability, with commas.  "
            "[mask,cutout]"
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            help="Put the people on a picture, a colour (#00ff00), blur for theirs, or transparent."
        ),
    ] = None,
    panel: Annotated[
        bool, typer.Option("--panel", help="Also original | new background | mask, side by side.")
    ] = False,
    refine: Annotated[
        bool, typer.Option("--refine", help="Let the edge follow the picture: hair, fingers.")
    ] = False,
    clean: Annotated[
        bool, typer.Option("--clean", help="Drop small pieces and fill small holes.")
    ] = False,
    size: Annotated[
        int | None,
        typer.Option(min=32, help="Short side of what the network sees.  [as trained]"),
    ] = None,
    tile: Annotated[
        str,
        typer.Option(help="Side of the tiles it sees, auto for tiles above a megapixel, or off."),
    ] = "auto",
    tta: Annotated[
        Literal["none", "flip", "scales"],
        typer.Option(help="Mean over the mirrored picture, too, or also over three scales."),
    ] = "none",
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"],
        typer.Option(help="What the network computes in."),
    ] = "fp32",
    device: DeviceOption = "auto",
    jsonl: Annotated[
        Path | None,
        typer.Option(help="A line of JSON for each picture in this file; - for standard output."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results that exist.")
    ] = False,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Refuse larger pictures before decoding them.")
    ] = 100_000_000,
) -> None:
    """Cut people out of pictures: a mask and a cut-out each, at the picture's own size."""
    from segtrain.prediction.jobs import STDOUT, plan_jobs, tile_of, wanted_kinds

    tile_side = tile_of(tile)
    kinds = wanted_kinds(save, background, output, panel=panel)
    jobs = plan_jobs(
        images,
        output,
        kinds,
        background=background or "blur",
        records=jsonl,
        overwrite=overwrite,
    )
    if any(job.is_video for job in jobs) and (save or panel or refine or clean or jsonl):
        raise UsageError(
            "--save, --panel, --refine, --clean and --jsonl are for pictures; do videos apart"
        )
    if checkpoint is None or checkpoint.suffix != ".onnx":
        _say_loading()
    from segtrain.prediction import command
    from segtrain.prediction.network import HowToRun

    wishes = command.Wishes(
        checkpoint=checkpoint,
        how=HowToRun(device=device, precision=precision, size=size, tta=tta, tile=tile_side),
        background=background or "blur",
        refine=refine,
        clean=clean,
        max_pixels=max_pixels,
        records=jsonl,
        overwrite=overwrite,
    )
    problems = command.predict(jobs, wishes, tell=_to_stderr)
    what = f"{len(jobs)} {'files' if any(job.is_video for job in jobs) else 'pictures'}"
    if output != STDOUT:
        done = f"{len(jobs) - len(problems)} of {what} done, results in {output}"
        print(done, file=sys.stderr if jsonl == STDOUT else sys.stdout)
    if problems:
        raise DataError(f"{len(problems)} of {what} could not be used, first: {problems[0]}")


@app.command()
def export(
    checkpoint: CheckpointOption = None,
    format_: Annotated[
        Literal["onnx", "torch", "safetensors"],
        typer.Option("--format", help="ONNX, torch.export's program, or weights and JSON."),
    ] = "onnx",
    output: Annotated[
        Path | None, typer.Option(help="The file.  [in this folder, called after the run]")
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"],
        typer.Option(help="Of the numbers in an ONNX; what a lower one loses is measured."),
    ] = "fp32",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Roots on which that is measured. Default: $SEGTRAIN_DATA, else what it was "
            "trained on."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that exists.")
    ] = False,
) -> None:
    """Write a network for other programs, checked against torch on the spot."""
    from segtrain.export.wishes import Wishes, plan_export

    plan = plan_export(
        Wishes(
            checkpoint=checkpoint,
            format=format_,
            output=output,
            precision=precision,
            data=data,
            overwrite=overwrite,
        )
    )
    _say_loading()
    from segtrain.export.command import export as export_network

    export_network(plan, tell=_to_stderr)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of all runs.")] = Path(
        "runs"
    ),
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two runs side by side: names in OUTPUT, or paths."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Picture of both runs' curves. Default: OUTPUT/compare-A-B.png."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a picture that exists.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """List all runs, newest first; or compare two: configuration, numbers and curves."""
    if compare is not None:
        _compare_runs(*compare, folder, output, overwrite=overwrite, as_json=as_json)
        return
    if output is not None or overwrite:
        raise UsageError(
            "--output and --overwrite are for the picture of --compare A B; name the folder "
            "of all runs plainly: segtrain runs FOLDER"
        )
    from segtrain.overview import listing

    found, latest = listing.read_runs(folder), listing.latest_of(folder)
    if as_json:
        print(json.dumps(listing.as_json(found, latest), indent=2))
    elif not found:
        print(f"there are no runs in {folder} yet; segtrain train makes one")
    else:
        from rich.console import Console

        Console().print(listing.runs_table(found, latest))
        for line in listing.problem_lines(found):
            print(line)


def _compare_runs(
    one: str, other: str, folder: Path, output: Path | None, *, overwrite: bool, as_json: bool
) -> None:
    from rich.console import Console

    from segtrain.overview import comparison
    from segtrain.overview.picture import picture_path, write_picture

    pair = comparison.pair_of(one, other, folder)
    path = picture_path(output, pair, folder, overwrite=overwrite)
    picture = write_picture(path, pair)
    if as_json:
        print(json.dumps(comparison.as_json(pair, picture), indent=2))
        return
    if pair.differences:
        Console().print(comparison.differences_table(pair), "")
    else:
        print("the configurations are the same\n")
    Console().print(comparison.numbers_table(pair), "")
    for line in comparison.cautions(pair):
        print(f"note: {line}")
    print(f"curves: {picture or 'none, for neither has finished an epoch'}")


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
) -> None:
    """List the networks: parameters, multiply-adds, memory for training, pretrained weights."""
    _say_loading()
    from dataclasses import asdict

    from rich.console import Console

    from segtrain.models.overview import cost_of, cost_table, variants
    from segtrain.progress import progress_bar

    networks, costs = list(variants()), []
    with progress_bar(total=len(networks), desc="counting", unit="network") as bar:
        for name, kwargs in networks:
            costs.append(cost_of(name, **kwargs))
            bar.update()
    if as_json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
    else:
        Console().print(cost_table(costs))


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="Data set to read; it stays as it is.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the prepared data set.")],
    short_side: Annotated[
        int, typer.Option(min=32, max=4096, help="Of the pictures written; smaller ones stay.")
    ] = 320,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads.  [all cores]")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A selection, e.g. --set data.person_area=[0.2,0.7]."),
    ] = None,
) -> None:
    """Filter and scale a data set once, for faster training; run again, it goes on."""
    from dataclasses import replace

    from segtrain.config import load_config
    from segtrain.cores import usable_cores

    config = load_config(flags={"data.root": source}, sets=set_ or [])
    from segtrain.data import describe_roots, named_data_roots
    from segtrain.data.prepare import prepare as prepare_folder

    [root], _ = named_data_roots(source) or ([Path(source)], "")
    _to_stderr(f"data: {describe_roots([root])}")
    result = prepare_folder(
        replace(config.data, root=str(root)),
        folder,
        short_side=short_side,
        workers=workers or usable_cores(),
        tell=_to_stderr,
    )
    counts = " and ".join(f"{count} {split}" for split, count in result.num_pictures.items())
    print(
        f"{counts} pictures, {result.num_bytes / 1e6:.0f} MB in {folder}"
        f"{f', {result.num_kept} of them from before' if result.num_kept else ''}"
    )
    print(f"next: segtrain train --data {folder}")
    if result.damaged:
        _to_stderr(f"warning: {len(result.damaged)} pictures left out, first: {result.damaged[0]}")


@app.command()
def doctor(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="Roots in COCO layout or with images/ and masks/. Default: $SEGTRAIN_DATA, else "
            "only the machine is looked at."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="As in train, e.g. --set data.person_area=[0.2,0.7]."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the pictures. Default: runs/doctor-<time>.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace pictures that exist there.")
    ] = False,
    show_augmentations: Annotated[
        bool, typer.Option("--show-augmentations", help="Also what training sees of six pictures.")
    ] = False,
    augment: Annotated[str | None, typer.Option(help="paper, standard, strong or elastic.")] = None,
    learning: Annotated[
        bool, typer.Option("--learning/--no-learning", help="Learn four pictures by heart.")
    ] = True,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Look in a minute for what would make a training fail, and say the repair.

    Exit codes: 0 all is well; 10 warnings; 3 errors in the data; 5 errors of the machine.
    """
    from segtrain.config import load_config
    from segtrain.doctor.outputs import output_folder

    flags = {
        "data.root": (data[0] if len(data) == 1 else data) if data else None,
        "data.augment": augment,
        "train.device": device,
    }
    config = load_config(flags=flags, sets=set_ or [])
    folder = output_folder(output, Path(config.train.output), overwrite=overwrite)
    _say_loading()
    from rich.console import Console

    from segtrain.doctor import report
    from segtrain.doctor.checkup import Wishes, check_up

    diagnosis = check_up(
        Wishes(
            config=config, output=folder, show_augmentations=show_augmentations, learning=learning
        )
    )
    if as_json:
        print(json.dumps(report.as_json(diagnosis), indent=2))
    else:
        Console().print(report.findings_table(diagnosis))
        print(report.summary_line(diagnosis))
    diagnosis.raise_error()
    if diagnosis.exit_code:
        raise typer.Exit(diagnosis.exit_code)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="New folder for the data set.")],
    train_images: Annotated[int, typer.Option(min=1, help="Training images.")] = 512,
    val_images: Annotated[int, typer.Option(min=1, help="Validation images.")] = 96,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other people.")] = 0,
) -> None:
    """Draw people to practise on: a data set in COCO layout."""
    from segtrain.data.demo import draw_demo_people

    draw_demo_people(folder, num_train=train_images, num_val=val_images, seed=seed)
    print(f"{train_images} + {val_images} drawn images in {folder}")


def main() -> None:
    """The console script: runs a command and ends the process with its exit code."""
    code = run(sys.argv[1:])
    # Else Python looks for garbage among all of torch's objects before it ends: 0.4 s.
    if _TELL_OF_LEAKS.isdisjoint(sys.modules):
        gc.freeze()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; every error becomes one line on stderr and its exit code."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"] or ["--help"]
    try:
        with listening():
            code = int(app(arguments, standalone_mode=False) or 0)
            sys.stdout.flush()
            return code
    except Stopped as stopped:
        _to_stderr(str(stopped))
        return stopped.exit_code
    except (BrokenPipeError, SystemExit):
        # Whoever reads our output, such as `head`, has enough: typer makes SystemExit of that, and
        # of nothing else. What is left goes nowhere, or Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except Exception as error:
        if debug:
            raise
        message, code = _explain(error)
        print(f"error: {_one_line(message)}", file=sys.stderr)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    """Message and exit code of whatever ended a command."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        return f"{error.format_message()} See segtrain --help.", _USAGE
    if says_out_of_memory(error):
        return "out of memory; try a smaller --batch-size or smaller pictures", _RESOURCE
    if isinstance(error, OSError):
        return f"{error}; check the space and the permissions there", _RESOURCE
    return f"{type(error).__name__}: {error}; this is a bug, --debug shows where", _BUG


def _one_line(message: str) -> str:
    """At most 200 characters; a long message loses its middle, not the remedy at its end."""
    message = " ".join(message.split())
    room = _LONGEST_ERROR - len("error: ")
    if len(message) <= room:
        return message
    tail = room // 2 - 20
    return f"{message[: room - tail - 3]}...{message[-tail:]}"


def _say_loading() -> None:
    # Importing torch takes seconds; on a terminal, silence would look like hanging.
    if sys.stderr.isatty():
        _to_stderr("loading torch ...")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
