"""The `tunekit` command: each command is a function in a file of its group; this file puts them together.

What takes longer to import is imported inside the functions, so that `tunekit --help` and its like answer at
once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tunekit.cli.comparing import compare
from tunekit.cli.configs import check, cp, explain, ls, show
from tunekit.cli.drawing import bench, generate
from tunekit.cli.encoding import encode
from tunekit.cli.machine import doctor
from tunekit.cli.plans import plan
from tunekit.cli.queue import queue
from tunekit.cli.runs import prune_folders, report, run, verify_files
from tunekit.cli.sweeps import sweep
from tunekit.errors import TunekitError

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for _command in (
    ls,
    show,
    explain,
    check,
    run,
    encode,
    sweep,
    plan,
    generate,
    bench,
    report,
    compare,
    verify_files,
    prune_folders,
    doctor,
    cp,
):
    app.command(_command.__name__.replace("_", "-"))(_command)
app.add_typer(queue, name="queue")


def main() -> None:
    """Runs the command; a TunekitError becomes one message and its exit code."""
    from tunekit.quiet import DEBUG, quiet_libraries, report_error, steady_streams

    arguments = sys.argv[1:]
    if "--debug" in arguments:  # wherever it stands
        arguments.remove("--debug")
        os.environ[DEBUG] = "1"
    quiet_libraries()
    steady_streams()
    try:
        app(arguments, prog_name="tunekit")
    except TunekitError as error:
        if os.environ.get(DEBUG):
            raise
        report_error(error)
        sys.exit(error.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        import tunekit

        print(f"tunekit {tunekit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks (of any command)")] = False,
) -> None:
    """From a handful of pictures to a small, fast, verified diffusion model, with one YAML."""
    # main() has read --debug already.
