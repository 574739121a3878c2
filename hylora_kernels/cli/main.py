"""`hylora`: a table from verb to function, and what becomes of errors and Ctrl-C."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated

import typer

from hylora_kernels.cli import machine_commands, model_commands

# verb -> the function, and what is kept when it is interrupted
VERBS: dict[str, tuple[Callable, str]] = {
    "compress": (
        model_commands.compress,
        "Finished layers are cached: the same command goes on.",
    ),
    "finetune": (
        model_commands.finetune,
        "The checkpoint is in {out}/training: repeat to go on.",
    ),
    "evaluate": (model_commands.evaluate, "Nothing was written."),
    "generate": (model_commands.generate, "Nothing was written."),
    "analyze": (model_commands.analyze, "Nothing was written."),
    "sweep": (model_commands.sweep, "Finished cells are in {out}: the same command goes on."),
    "demo": (model_commands.demo, "Finished stages are in {out}: the same command goes on."),
    "info": (machine_commands.info, "Nothing was written."),
    "selftest": (machine_commands.selftest, "Nothing was written."),
    "tune": (machine_commands.tune, "What was measured is in the table."),
    "cache": (machine_commands.cache, "What was not deleted is still there."),
}

# What can go wrong outside this program: bad arguments and files, a full disk, a missing package,
# numbers that are no longer finite, or wrong on this machine. Anything else is a bug and shows its
# traceback.
EXPECTED = (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def guarded(function: Callable, kept: str) -> Callable:
    """`function` with a --debug option: an expected error is one red line and exit code 2, Ctrl-C
    says what is kept and is exit code 130."""

    @functools.wraps(function)
    def run(*, debug: bool, **options):
        try:
            function(**options)
        except KeyboardInterrupt:
            typer.secho(f"\ninterrupted. {kept.format(**options)}", fg="yellow", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output has gone, as in `hylora info | head`
            raise
        except EXPECTED as error:
            if debug or os.environ.get("HYLORA_DEBUG", "0") not in ("", "0"):
                raise
            words = " ".join(str(error).split()) or type(error).__name__
            typer.secho(f"error: {words}", fg="red", err=True)
            raise typer.Exit(2) from None

    signature = inspect.signature(function)
    option = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
    )
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
    run.__annotations__ = function.__annotations__ | {"debug": Debug}
    return run


app = typer.Typer(
    name="hylora",
    help="Compress a language model, recover it, measure it honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _verb, (_function, _kept) in VERBS.items():
    app.command(_verb)(guarded(_function, _kept))


def main() -> None:
    app()
