"""The application: its subcommands, and what happens to errors."""

from __future__ import annotations

import errno
import os
import sys

import typer

from ..errors import TwofourError
from . import check, compress, demo, explain, finetune, info, measure, permute, prune, sensitivity
from .interrupted import EXIT_CODE, Interrupted
from .options import as_typed

app = typer.Typer(
    name="twofour",
    help="Make neural networks faster with 2:4 structured sparsity: prune -> compress -> measure.\n\n"
    "A MODEL is a folder with a transformers config.json, or a .safetensors file. "
    "Exit code 0: done; 1: the answer is no; 2: wrong use; 130: interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (permute, prune, check, sensitivity, finetune, compress, explain, measure, info, demo):
    app.command(module.NAME)(module.run)


def main() -> None:
    """Runs the command line; a user's mistake is one line on the standard error, without a traceback."""
    try:
        app()
    except TwofourError as error:
        _fail(str(error))
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except SystemExit as end:
        if end.code == EXIT_CODE:  # typer has caught it
            print("interrupted.", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of a pipe has left: nobody is there to be told
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(2)
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")


def _fail(message: str) -> None:
    print(f"error: {' '.join(as_typed(message).split())}", file=sys.stderr)
    sys.exit(2)
