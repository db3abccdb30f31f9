"""`fnrecipe checkpoint list|verify|show|diff|prune|copy|convert`: what is in checkpoints, and which of them stay where."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fnrecipe.cli.errors import show_warnings
from fnrecipe.cli.options import FilePath, Place
from fnrecipe.cli.tables import print_table, shortened
from fnrecipe.cli.units import si
from fnrecipe.errors import CheckpointError, UsageError, one_line, redacted
from fnrecipe.errors import shortened as cut

if TYPE_CHECKING:
    from fnrecipe.checkpoint import Checkpoint
    from fnrecipe.checkpoint.tensors import Saved

step_option = click.option("--step", default=None, type=click.IntRange(min=0), help="Of this step; the newest by default.")
steps_option = click.option("--step", "steps", multiple=True, type=click.IntRange(min=0), help="This one alone; repeatable.")


@click.group(short_help="Look at checkpoints, and keep them in order.")
def checkpoint() -> None:
    """Look at the checkpoints of a run, compare, copy and remove them.

    RUN is the directory of a run, or one that holds checkpoints; a CHECKPOINT may also be named by its own directory, such as
    runs/first/checkpoints/step_00000100.
    """


@checkpoint.command("list", short_help="Print which there are.")
@click.argument("run", type=FilePath())
def list_(run: Path) -> int:
    """Print the checkpoints of RUN: step, time, size, number of files, why its config keeps it, and whether each is whole.

    For the last all but the bytes of tensors is read; `fnrecipe checkpoint verify` reads these, too.
    """
    from rich.markup import escape
    from rich.table import Table

    from fnrecipe.shell.saving.listing import listed, root_of
    from fnrecipe.shell.saving.pruning import reasons

    root = root_of(run)
    found = listed(root, every_byte=False)
    kept = reasons(root.parent, [each.step for each in found if not each.problem])
    table = Table("step", "written", "size", "files", "kept as", "state")
    for each in found:
        written = datetime.fromtimestamp(each.written).strftime("%Y-%m-%d %H:%M:%S")
        whole = "its model alone" if each.directory.name.startswith("model") else "whole"
        state = escape(f"cannot be loaded: {each.problem}") if each.problem else whole
        table.add_row(f"{each.step:,}", written, si(each.size, "B"), str(each.files), kept.get(each.step, ""), state)
    print_table(table)
    return 0


@checkpoint.command(short_help="Read every byte.")
@click.argument("path", metavar="RUN|CHECKPOINT", type=FilePath())
@steps_option
def verify(path: Path, steps: tuple[int, ...]) -> int:
    """Read every byte of the checkpoints of a run, or of one of them, as loading does. Exit status 1: one cannot be loaded."""
    from fnrecipe.shell.saving.listing import listed

    found = listed(path, every_byte=True, steps=steps)
    for each in found:
        whole = f"whole, {si(each.size, 'B')}"
        click.echo(f"{each.directory}: {each.problem or whole}")
    return int(any(each.problem for each in found))


@checkpoint.command(short_help="Print what one holds.")
@click.argument("path", metavar="RUN|CHECKPOINT", type=FilePath())
@step_option
def show(path: Path, step: int | None) -> int:
    """Print step, cursor and tensors of a checkpoint: dtype, shape, bytes, and how each is cut over the ranks' files."""
    from rich.markup import escape
    from rich.table import Table

    from fnrecipe.shell.saving.listing import checkpoint_at

    show_warnings()
    found = checkpoint_at(path, step)
    sizes = {name: _bytes(saved) for name, saved in found.tensors.items()}
    table = Table("tensor", "dtype", "shape", "cut", "size")
    for name, saved in found.tensors.items():
        shape = str(list(saved.shape))
        table.add_row(escape(one_line(name)), saved.dtype, escape(shape), _cut(saved), si(sizes[name], "B"))
    files = {file for saved in found.tensors.values() for file in saved.slices}
    plural, totals = "s" * (len(files) != 1), dict[str, int]()
    for name, size in sizes.items():
        totals[name.partition(".")[0]] = totals.get(name.partition(".")[0], 0) + size
    click.echo(f"{found.directory}: step {found.step:,}, {len(sizes):,} tensors in {len(files)} file{plural}, verified")
    click.echo(f"size: {si(sum(sizes.values()), 'B')}: " + ", ".join(f"{key} {si(size, 'B')}" for key, size in totals.items()))
    click.echo(f"cursor: {cut(json.dumps(found.cursor), 200)}")
    click.echo(f"facts of its data: {len(found.files):,}")
    print_table(table)
    return 0


@checkpoint.command(short_help="Compare two.")
@click.argument("one", metavar="A", type=FilePath())
@click.argument("other", metavar="B", type=FilePath())
@step_option
def diff(one: Path, other: Path, step: int | None) -> int:
    """Name the tensors by which A and B differ, and by how much; each is a run, whose newest is taken, or a checkpoint.

    How they are cut over files does not matter. Elements are compared bit by bit, by value where the dtypes differ. Exit
    status: 0 alike, 1 different, 2 one cannot be read.

    \b
    fnrecipe checkpoint diff runs/a runs/b --step 100
    fnrecipe checkpoint diff runs/a/checkpoints/step_00000100 runs/a
    """
    from rich.markup import escape
    from rich.table import Table

    from fnrecipe.checkpoint.compare import differences
    from fnrecipe.shell.saving.listing import checkpoint_at

    show_warnings()
    try:
        ours, theirs = checkpoint_at(one, step), checkpoint_at(other, step)
        found = list(differences(ours, theirs))
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    table = Table("tensor", "A", "B", "differ", "largest |a - b|", "relative")
    for each in found:
        entries = [_entry(each.ours), _entry(each.theirs)]
        compared = each.ours is not None and each.theirs is not None and list(each.ours.shape) == list(each.theirs.shape)
        size = math.prod(each.ours.shape) if each.ours is not None else 0
        numbers = (f"{each.count:,} of {size:,}", f"{each.largest:.3g}", f"{each.relative:.3g}") if compared else ("", "", "")
        table.add_row(escape(one_line(each.path)), *map(escape, entries), *numbers)
    click.echo(f"A: {ours.directory}\nB: {theirs.directory}")
    if found:
        print_table(table)
    beside = list(_beside(ours, theirs))
    for line in beside:
        click.echo(line)
    names = ours.tensors.keys() | theirs.tensors.keys()
    click.echo(f"{len(found):,} of {len(names):,} tensors differ" if found else f"{len(names):,} tensors are alike")
    return int(bool(found or beside))


@checkpoint.command(short_help="Remove what is not to be kept.")
@click.argument("run", type=FilePath())
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="In place of regime.keep_last_n_checkpoints.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="N", help="In place of regime.keep_checkpoint_every_n_steps.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
def prune(run: Path, keep_last: int | None, keep_every: int | None, dry_run: bool) -> int:
    """Remove the checkpoints of RUN that its config does not keep (regime.keep_...), while nobody trains there.

    Every byte of the newest is read before; it is always kept. Newer ones that are damaged count for nothing.

    \b
    fnrecipe checkpoint prune runs/first --keep-last 1 --keep-every 1000 --dry-run
    """
    from fnrecipe.shell.saving.listing import listed
    from fnrecipe.shell.saving.pruning import prune as remove

    show_warnings()
    sizes = {each.step: each.size for each in listed(run, every_byte=False)}
    found = remove(run, last=keep_last, every_n_steps=keep_every, dry_run=dry_run)
    for step in found.plan.removed:
        click.echo(f"step {step:,}: {'would be ' * dry_run}removed, {si(sizes[step], 'B')}")
    kept = [f"{step:,}" for step in found.plan.whole]
    click.echo(f"kept: {', '.join(kept)}; every byte of {found.verified:,} verified")
    if found.plan.model_only:
        models = [f"{step:,}" for step in found.plan.model_only]
        click.echo(f"kept as models alone: {', '.join(models)}")
    return 0


@checkpoint.command(short_help="Copy to another directory.")
@click.argument("path", metavar="RUN|CHECKPOINT", type=Place())
@click.argument("out", metavar="DIR", type=Place())
@click.option("--step", "steps", multiple=True, type=click.IntRange(min=0), help="This one; repeatable; the newest by default.")
@click.option("--link", is_flag=True, help="By hard links, which take no space; on the same file system.")
def copy(path: Path | str, out: Path | str, steps: tuple[int, ...], link: bool) -> int:
    """Copy a checkpoint, with config and records of its run, to the directory DIR of a run, which is made.

    It is there once every byte has been read back. `fnrecipe resume DIR` goes on from it, beside the first run. One of the
    two may be the address of a remote directory, as s3://bucket/first.

    \b
    fnrecipe checkpoint copy runs/first /mnt/disk/first
    fnrecipe checkpoint copy runs/first runs/branch --step 500 --link
    fnrecipe checkpoint copy s3://bucket/first runs/first
    """
    show_warnings()
    for place in _copied(path, out, steps, link):
        click.echo(f"{redacted(str(place))}: {'linked' if link else 'copied'} and read back")
    return 0


def _copied(path: Path | str, out: Path | str, steps: tuple[int, ...], link: bool) -> Sequence[Path | str]:
    from fnrecipe.shell.saving import remote_copies
    from fnrecipe.shell.saving.local_copies import copy as write

    if isinstance(path, Path) and isinstance(out, Path):
        return write(path, out, steps, link=link)
    if link:
        raise UsageError("--link: expected two directories of this machine, found an address")
    if isinstance(path, Path):
        return remote_copies.copy_to(path, str(out), steps)
    if isinstance(out, Path):
        return remote_copies.copy_from(path, out, steps)
    raise UsageError(f"{out}: expected a directory of this machine, since the run is at an address, found another address")


@checkpoint.command(short_help="To torch's distributed format, and back.")
@click.argument("path", metavar="SOURCE", type=FilePath())
@click.argument("out", metavar="DIR", type=FilePath())
@step_option
def convert(path: Path, out: Path, step: int | None) -> int:
    """Write a checkpoint as a distributed one of torch (DCP) to DIR; or such a one, if SOURCE is one, to the run in DIR.

    A distributed checkpoint describes itself in pickles. Nothing that they name is run; what has more than tensors is refused.

    \b
    fnrecipe checkpoint convert runs/first first-dcp
    fnrecipe checkpoint convert first-dcp runs/again
    """
    show_warnings()
    from fnrecipe.interop import dcp
    from fnrecipe.shell.directory import layout, lock
    from fnrecipe.shell.saving.listing import checkpoint_at

    if not (path / dcp.METADATA).exists():
        found = checkpoint_at(path, step)
        dcp.write(found, out)
        click.echo(f"{out}: {len(found.tensors):,} tensors of step {found.step:,}, from {found.directory}")
        return 0
    if step is not None:
        raise UsageError(f"--step: expected a run or a checkpoint, found a distributed one: {path}")
    with lock.claimed(out):
        click.echo(f"{dcp.convert_back(path, out / layout.CHECKPOINTS)}: from {path}")
    return 0


def _beside(ours: Checkpoint, theirs: Checkpoint) -> Iterator[str]:
    """A line for each thing but tensors in which checkpoints differ."""
    if ours.step != theirs.step:
        yield f"step: {ours.step:,} in A, {theirs.step:,} in B"
    if ours.cursor != theirs.cursor:
        yield "the cursors of their streams differ"
    facts = [name for name in {**ours.files, **theirs.files} if ours.files.get(name) != theirs.files.get(name)]
    for name, more in shortened([(one_line(name), 1) for name in facts], sum, limit=5):
        yield f"data: {name} differ" if more > 1 else f"data: {name} differs"


def _entry(saved: Saved | None) -> str:
    return "none" if saved is None else str(saved)


def _bytes(saved: Saved) -> int:
    import torch

    itemsize: int = getattr(torch, saved.dtype).itemsize
    return math.prod(saved.shape) * itemsize


def _cut(saved: Saved) -> str:
    """`rows of 4 files`: along which dimensions, and over how many files."""
    if len(saved.slices) == 1:
        return f"whole in {next(iter(saved.slices)).removesuffix('.safetensors')}"
    cuts = [len({tuple(ranges[dim]) for ranges in saved.slices.values()}) for dim in range(len(saved.shape))]
    return " and ".join(f"dim {dim} in {count}" for dim, count in enumerate(cuts) if count > 1)
