"""The program `fnrecipe`, and the same for a recipe that is run as a module."""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

import click

from fnrecipe.cli.data import data
from fnrecipe.cli.dump_config import dump_config
from fnrecipe.cli.graph import graph
from fnrecipe.cli.options import ConfigCommand, config_options, with_changes_option
from fnrecipe.cli.profile import profile
from fnrecipe.cli.tokenizer import tokenizer
from fnrecipe.cli.train import train
from fnrecipe.config import resolve
from fnrecipe.console import Outlet, empty_streams, mend_streams, speak_utf8
from fnrecipe.data.prefetch import left_behind
from fnrecipe.errors import FnrecipeError

if TYPE_CHECKING:
    from fnrecipe.recipe import Recipe


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_COMMANDS = [train, dump_config, data, tokenizer, graph, profile]


class _Commands(click.Group):
    """Commands whose standard output may fail: when nobody reads it any more, they end as Unix tools do, by SIGPIPE."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
        except OSError as error:
            if error.filename is not None or error.errno not in _FULL:
                raise
            raise FnrecipeError(f"cannot write: {error.strerror or error}") from error


@click.group(cls=_Commands, commands=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fnrecipe")
def fnrecipe() -> None:
    """Recipes for training language models: a fold of a pure step over a stream.

    Exit status: 0 done, 1 failed, 2 wrong usage or config, 3 not finite, 129, 130 and 143 stopped by a signal and saved.
    """


def main() -> NoReturn:
    _exit(fnrecipe)


def run_recipe(recipe: Recipe[Any]) -> NoReturn:
    """The command line of a recipe's own module: `python -m my_lm.train DIR --config …`."""

    @click.command(cls=ConfigCommand, help=f"Train the recipe {recipe.name} in DIR, or go on with the run that is there.")
    @click.argument("out", type=click.Path(path_type=Path), metavar="DIR")
    @config_options
    @with_changes_option
    def command(out: Path, files: tuple[Path, ...], pairs: tuple[str, ...], with_changes: bool) -> int:
        from fnrecipe import host, run

        config, _ = resolve(recipe.config, files, pairs)
        return run.train(recipe, config, out, with_changes=with_changes, started=host.process_started())

    _exit(command)


def _exit(command: click.Command) -> NoReturn:
    """Runs a command; errors that a user can mend become one message and an exit status, which no console changes."""
    speak_utf8()
    mend_streams()
    status = _run(command)
    empty_streams()
    if left_behind():  # such a thread may abort the interpreter at its end, where it cannot run any more
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


def _run(command: click.Command) -> int:
    try:
        return int(command.main(standalone_mode=False) or 0)
    except FnrecipeError as error:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        with closing(Outlet(sys.stderr)) as errors:
            for line in str(error).splitlines():
                errors.write(f"{line}\n" if line.startswith(" ") else f"{rank}error: {line}\n")
        return error.exit_status
    except click.ClickException as error:
        with closing(Outlet(sys.stderr)) as errors:
            error.show(cast("IO[str]", errors))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
