"""`segtrain runs`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from segtrain.cli.options import OUTPUT, JsonOption, OverwriteOption, option
from segtrain.errors import UsageError


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
        option(panel=OUTPUT, help="Plot of both runs' curves.", default="OUTPUT/compare-A-B.png"),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """List all runs, newest first; or compare configuration, metrics and curves of two."""
    if compare is not None:
        _compare_runs(*compare, folder, output, overwrite=overwrite, as_json=as_json)
        return
    if output is not None or overwrite:
        raise UsageError(
            "--output and --overwrite are for the plot of --compare A B",
            "give the folder of all runs as an argument: segtrain runs FOLDER",
        )
    from segtrain.runs import listing

    all_runs, latest = listing.read_runs(folder), listing.latest_run_dir(folder)
    if as_json:
        print(json.dumps(listing.as_json(all_runs, latest), indent=2))
    elif not all_runs:
        print(f"no runs in {folder} yet; segtrain train creates one")
    else:
        from rich.console import Console

        Console().print(listing.runs_table(all_runs, latest))
        for line in listing.problem_lines(all_runs):
            print(line)


def _compare_runs(
    first: str, second: str, folder: Path, output: Path | None, *, overwrite: bool, as_json: bool
) -> None:
    from rich.console import Console

    from segtrain.runs import comparison
    from segtrain.runs.plot import resolve_plot_path, write_plot

    pair = comparison.read_run_pair(first, second, folder)
    path = resolve_plot_path(output, pair, folder, overwrite=overwrite)
    plot = write_plot(path, pair)
    if as_json:
        print(json.dumps(comparison.as_json(pair, plot), indent=2))
        return
    if pair.differences:
        Console().print(comparison.differences_table(pair), "")
    else:
        print("the configurations are the same\n")
    Console().print(comparison.metrics_table(pair), "")
    for line in comparison.cautions(pair):
        print(f"note: {line}")
    print(f"curves: {plot or 'none, because neither run has finished an epoch'}")
