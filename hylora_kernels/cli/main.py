"""`hylora`: the table from verb to function, and the handling of errors and Ctrl-C."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

import functools
import gc
import importlib.metadata
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hylora_kernels.cli import (
    adapter_commands,
    compress_commands,
    evaluate_command,
    export_commands,
    machine_commands,
    model_commands,
    plan_command,
)
from hylora_kernels.cli.config import use_config, write_config
from hylora_kernels.cli.errors import EXPECTED, one_line
from hylora_kernels.cli.options import with_parameters
from hylora_kernels.cli.output import (
    check_output_files,
    ended_together,
    first_process_prints,
    is_first_process,
    report_on_stdout,
)

# Verb, its group in front if it has one -> (its function, the sentence that Ctrl-C prints: what is
# kept, and how to continue)
VERBS: dict[str, tuple[Callable[..., None], str]] = {
    "compress": (
        compress_commands.compress,
        "Finished layers are cached: repeat the command to continue.",
    ),
    "quantize": (
        compress_commands.quantize,
        "Finished matrices are cached; what --adapt has trained is in {out}/training: repeat the"
        " command to continue.",
    ),
    "finetune": (
        model_commands.finetune,
        "The checkpoint is in {out}/training: repeat the command to continue.",
    ),
    "evaluate": (evaluate_command.evaluate, "Nothing was written."),
    "generate": (model_commands.generate, "Nothing was written."),
    "analyze": (model_commands.analyze, "Nothing was written."),
    "export": (export_commands.export, "Nothing was written: {out} is as it was."),
    "plan": (plan_command.plan, "Nothing was written."),
    "sweep": (
        model_commands.sweep,
        "Finished cells are in {out}: repeat the command to continue.",
    ),
    "demo": (
        model_commands.demo,
        "Finished stages are in {out}: repeat the command to continue.",
    ),
    "adapter export": (adapter_commands.export_adapter, "What is in {out} is complete."),
    "adapter import": (adapter_commands.import_adapter, "Nothing was written."),
    "info": (machine_commands.info, "Nothing was written."),
    "selftest": (machine_commands.selftest, "Nothing was written."),
    "tune": (machine_commands.tune, "The configurations measured so far are in the table."),
    "cache": (machine_commands.cache, "Files not yet deleted are still there."),
}

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=use_config,
        help="Options from this YAML file, as a run writes them beside its results (run.yaml). The "
        "command line wins.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def guarded(command: Callable[..., None], kept: str) -> Callable[..., None]:
    """`command` with the options --config and --debug, its output files checked before its work.

    Exit code 2 and one red line for an expected error, exit code 130 and `kept` for Ctrl-C. With
    --json - stdout gets the report alone; what is else printed goes to stderr.
    """
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command).parameters.values()
    ]

    @functools.wraps(command)
    def run(context: typer.Context, *, config: Path | None, debug: bool, **given: Any) -> None:
        with ended_together(str(context.info_name)) as is_told:
            try:
                check_output_files(given)
                with (
                    report_on_stdout(given.get("json_path")),
                    first_process_prints(context.info_name),
                ):
                    command(**given)
                if is_first_process():
                    write_config(context, given)
            except KeyboardInterrupt:
                if is_first_process():
                    say(f"\ninterrupted. {kept.format(**given)}", "yellow")
                raise typer.Exit(130) from None
            except BrokenPipeError:  # the reader of stdout has ended, as in `hylora info | head`
                raise
            except EXPECTED as error:
                if debug or os.environ.get("HYLORA_DEBUG", "0") not in ("", "0"):
                    raise
                if not is_told(error):
                    say(f"error: {one_line(error, context.command.params)}", "red")
                raise typer.Exit(2) from None

    context = inspect.Parameter(
        "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, default, kind in (("config", None, Config), ("debug", False, Debug))
    ]
    return with_parameters(run, [context, *own, *added])


def say(text: str, color: str) -> None:
    """A line to stderr, coloured on a terminal unless NO_COLOR is set (https://no-color.org)."""
    typer.secho(text, fg=None if os.environ.get("NO_COLOR") else color, err=True)


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hylora {importlib.metadata.version('hylora-kernels')}")
        raise typer.Exit


app = typer.Typer(
    name="hylora",
    help="Compress a language model, recover its quality, and measure the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=print_version),
    ] = False,
) -> None:
    """Options before the command."""


GROUPS = {"adapter": typer.Typer(help="A model's adapters as files of PEFT.", no_args_is_help=True)}
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name)
for _verb, (_function, _kept) in VERBS.items():
    _name, _, _command = _verb.rpartition(" ")
    GROUPS.get(_name, app).command(_command)(guarded(_function, _kept))


def main() -> None:
    """The entry point of the command `hylora`."""
    # transformers makes objects by the hundred thousand while it is imported, and all of them stay:
    # looking through them as often as Python does takes 0.8 of 4 seconds.
    gc.set_threshold(100_000)
    app()
