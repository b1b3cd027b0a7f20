"""The `segtrain` command. Each subcommand has its own module and imports torch only when run."""

import gc
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from segtrain import __version__
from segtrain.cli.console import print_err
from segtrain.cli.data import demo, prepare
from segtrain.cli.doctor import doctor
from segtrain.cli.evaluate import evaluate
from segtrain.cli.export import export
from segtrain.cli.models import models
from segtrain.cli.predict import predict
from segtrain.cli.runs import runs
from segtrain.cli.train import train
from segtrain.errors import UserError, is_memory_error
from segtrain.runtime.logs import console_log
from segtrain.runtime.signals import Stopped, handle_signals

_BUG, _USAGE, _RESOURCE = 1, 2, 5
_CLOSED_PIPE = 128 + 13  # the code that a shell reports for SIGPIPE
_MAX_ERROR_LENGTH = 200
# These libraries print a line for each of their objects that is not collected at exit.
_LEAK_REPORTERS = {"onnx", "triton"}


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        return _without_flag_types(super().get_params(ctx))


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> Any:
        *params, help_option = _without_flag_types(super().get_params(ctx))
        help_option.rich_help_panel = "Help"  # its default panel would come first
        return [*params, help_option]


def _without_flag_types(params: Any) -> Any:
    """Remove the `<bool>` that typer shows behind flags, which take no value."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


app = typer.Typer(
    name="segtrain",
    help="Train, evaluate and run person/background segmentation networks.",
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _show_version(show: bool) -> None:
    if show:
        print(f"segtrain {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error; works in any position."),
    ] = False,
) -> None:
    pass


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "export": export,
    "runs": runs,
    "models": models,
    "prepare": prepare,
    "doctor": doctor,
    "demo": demo,
}
for _name, _function in _COMMANDS.items():
    app.command(_name, cls=_Command)(_function)


def main() -> None:
    """The console script: run a command and exit with its code."""
    code = run(sys.argv[1:])
    # Skips the garbage collection of torch's objects at exit, which takes 0.4 s.
    if _LEAK_REPORTERS.isdisjoint(sys.modules):
        gc.freeze()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command line; every error becomes one line on stderr and an exit code."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"] or ["--help"]
    try:
        with handle_signals(), console_log():
            code = int(app(arguments, standalone_mode=False) or 0)
            sys.stdout.flush()
            return code
    except Stopped as stopped:
        print_err(str(stopped))
        return stopped.exit_code
    except (BrokenPipeError, SystemExit) as error:
        # typer raises SystemExit after shell completion, and in place of BrokenPipeError.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            return int(error.code or 0)
        # The reader of stdout, such as `head`, is gone. Discard the rest, or Python would print a
        # traceback at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except Exception as error:
        if debug:
            raise
        message, code = _explain(error)
        print_err(f"error: {_one_line(message)}")
        return code


def _explain(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code of an error."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        return f"{error.format_message()} See segtrain --help.", _USAGE
    if is_memory_error(error):
        return "out of memory; try a smaller --batch-size or smaller images", _RESOURCE
    if isinstance(error, OSError):
        return f"{error}; check the free space and the permissions", _RESOURCE
    return f"{type(error).__name__}: {error}; this is a bug, --debug shows the traceback", _BUG


def _one_line(message: str) -> str:
    """Shorten to 200 characters; a long message loses its middle, not the hint at its end."""
    message = " ".join(message.split())
    room = _MAX_ERROR_LENGTH - len("error: ")
    if len(message) <= room:
        return message
    tail = room // 2 - 20
    return f"{message[: room - tail - 3]}...{message[-tail:]}"
