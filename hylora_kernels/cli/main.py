"""`hylora`: the table from verb to function, and the handling of errors and Ctrl-C."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hylora_kernels.cli import machine_commands, model_commands
from hylora_kernels.cli.options import with_parameters

# verb -> (its function, the sentence that Ctrl-C prints: what is kept, and how to continue)
VERBS: dict[str, tuple[Callable[..., None], str]] = {
    "compress": (
        model_commands.compress,
        "Finished layers are cached: repeat the command to continue.",
    ),
    "finetune": (
        model_commands.finetune,
        "The checkpoint is in {out}/training: repeat the command to continue.",
    ),
    "evaluate": (model_commands.evaluate, "Nothing was written."),
    "generate": (model_commands.generate, "Nothing was written."),
    "analyze": (model_commands.analyze, "Nothing was written."),
    "sweep": (
        model_commands.sweep,
        "Finished cells are in {out}: repeat the command to continue.",
    ),
    "demo": (
        model_commands.demo,
        "Finished stages are in {out}: repeat the command to continue.",
    ),
    "info": (machine_commands.info, "Nothing was written."),
    "selftest": (machine_commands.selftest, "Nothing was written."),
    "tune": (machine_commands.tune, "The configurations measured so far are in the table."),
    "cache": (machine_commands.cache, "Files not yet deleted are still there."),
}

# Errors with a cause outside this program: bad arguments and files, a full disk, a missing package,
# numbers that are not finite, or a machine that computes wrongly. They are printed in one line. Any
# other error is a bug and shows its traceback.
EXPECTED = (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def guarded(command: Callable[..., None], kept: str) -> Callable[..., None]:
    """`command` with a --debug option.

    Exit code 2 and one red line for an expected error, exit code 130 and `kept` for Ctrl-C.
    """

    @functools.wraps(command)
    def run(*, debug: bool, **given: Any) -> None:
        try:
            command(**given)
        except KeyboardInterrupt:
            typer.secho(f"\ninterrupted. {kept.format(**given)}", fg="yellow", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of stdout has ended, as in `hylora info | head`
            raise
        except EXPECTED as error:
            if debug or os.environ.get("HYLORA_DEBUG", "0") not in ("", "0"):
                raise
            words = " ".join(str(error).split()) or type(error).__name__
            typer.secho(f"error: {words}", fg="red", err=True)
            raise typer.Exit(2) from None

    option = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
    )
    return with_parameters(run, [*inspect.signature(command).parameters.values(), option])


app = typer.Typer(
    name="hylora",
    help="Compress a language model, recover its quality, and measure the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _verb, (_function, _kept) in VERBS.items():
    app.command(_verb)(guarded(_function, _kept))


def main() -> None:
    """The entry point of the command `hylora`."""
    app()
