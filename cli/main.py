"""The program `fnrecipe`, and the command line of a recipe that is run as a module."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import signal
import sys
import traceback
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn, cast

import attrs
import click

from fnrecipe.cli.chat import chat
from fnrecipe.cli.checkpoint import checkpoint
from fnrecipe.cli.coordinate_check import coordinate_check
from fnrecipe.cli.data import data
from fnrecipe.cli.dump_config import dump_config, print_config
from fnrecipe.cli.errors import show
from fnrecipe.cli.evaluate import evaluate
from fnrecipe.cli.export import export
from fnrecipe.cli.generate import generate
from fnrecipe.cli.graph import graph
from fnrecipe.cli.launch import Word, leave
from fnrecipe.cli.lr_find import lr_find
from fnrecipe.cli.model import model
from fnrecipe.cli.new import new
from fnrecipe.cli.options import ConfigCommand, FilePath, config_options, nproc_option, sources_option, with_changes_option
from fnrecipe.cli.profile import profile
from fnrecipe.cli.resume import resume
from fnrecipe.cli.tokenizer import tokenizer
from fnrecipe.cli.train import start, train
from fnrecipe.data.prefetch import left_behind
from fnrecipe.errors import EXIT_FAILED, FnrecipeError, LostError, UsageError, redacted
from fnrecipe.runtime.launcher import follow, launched, meeting
from fnrecipe.shell.find_recipe import Found
from fnrecipe.shell.screen.console import Outlet, empty_streams, mend_streams, speak_utf8

if TYPE_CHECKING:
    from fnrecipe.recipe import C, Recipe


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_HELP = {"help_option_names": ["-h", "--help"]}
_COMMANDS = [train, resume, new, dump_config, data, tokenizer, model, evaluate, generate, chat, export, checkpoint]
_COMMANDS += [graph, profile, coordinate_check, lr_find]


class _Commands(click.Group):
    """Commands that end by SIGPIPE, as Unix tools do, when the reader of their standard output is gone."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
            return None
        except OSError as error:
            if error.filename is not None or error.errno not in _FULL:
                raise
            raise FnrecipeError(f"cannot write: {error.strerror or error}") from error


@click.group(cls=_Commands, commands=_COMMANDS, context_settings=_HELP)
@click.version_option(package_name="fnrecipe")
def fnrecipe() -> None:
    """Recipes for training language models: a fold of a pure step over a stream.

    Exit status: 0 done, 1 failed, 2 wrong usage or config, 3 not finite, 75 saved, run it again,
    129 and 130 stopped by a signal and saved.
    """


def main() -> NoReturn:
    _exit(fnrecipe)


def run_recipe(recipe: Recipe[C]) -> NoReturn:
    """The command line of a recipe's own module: `python -m my_lm.train DIR --config …`."""

    @click.command(
        cls=ConfigCommand,
        context_settings=_HELP,
        help=f"Train the recipe {recipe.name} in DIR, or go on with the run that is there.",
    )
    @click.argument("out", required=False, type=FilePath(), metavar="DIR")
    @config_options
    @with_changes_option
    @nproc_option
    @click.option("--dump-config", "dump", is_flag=True, help="Print the whole config as YAML, and train nothing.")
    @sources_option
    def command(
        out: Path | None,
        files: tuple[Path, ...],
        pairs: tuple[str, ...],
        with_changes: bool,
        nproc: int | None,
        dump: bool,
        sources: bool,
    ) -> int:
        if dump:
            print_config(recipe.config, files, pairs, sources)
            return 0
        if sources:
            raise UsageError("--sources: expected --dump-config beside it, found nothing to print")
        if out is None:
            raise UsageError("DIR: expected a directory to train in, found none (--dump-config needs none, --help tells more)")
        here = attrs.evolve(recipe, origin=getattr(sys.modules["__main__"], "__file__", None))
        found = Found(recipe.config, recipe.needs, lambda: here)
        return start(found, out, nproc, files, pairs, with_changes)

    _exit(command)


def _exit(command: click.Command) -> NoReturn:
    """Runs a command and exits; errors that a user can mend become a message and an exit status, whatever the console does."""
    atexit.register(gc.freeze)  # the interpreter's last collection would go through all of torch's objects, for 0.5 s
    speak_utf8()
    follow()
    mend_streams()
    status = _run(command, meeting())
    empty_streams()
    if left_behind():  # a thread that is still in a read may abort the interpreter at exit
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


def _run(command: click.Command, directory: Path | None) -> int:
    """The exit status of a command. Ranks of `--nproc` leave their error, also a defect's traceback, for their launcher."""
    try:
        return int(command.main(standalone_mode=False) or 0)
    except FnrecipeError as error:
        if directory is None:
            show(str(error), _rank())
        else:
            leave(Word(str(error), error.exit_status, lost=isinstance(error, LostError)), directory)
        return error.exit_status
    except click.ClickException as error:
        with closing(Outlet(sys.stderr)) as errors:
            error.show(cast("IO[str]", errors))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except Exception:
        if directory is None:
            raise
        leave(Word(redacted(traceback.format_exc()), is_trace=True), directory)
        return EXIT_FAILED


def _rank() -> int | None:
    """This process's rank; None for a gang of one, or if the environment is contradictory."""
    try:
        here = launched()
    except UsageError:
        return None
    return here.rank if here.size > 1 else None
