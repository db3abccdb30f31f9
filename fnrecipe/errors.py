"""The errors that a user can mend; each class has the exit status of the process that it ends.

A message names what was read, where, what was expected, what was found and the nearest valid name. The command line prints
messages of these classes without a traceback; every other exception is a defect of ours, and its traceback is shown.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import attrs

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NON_FINITE = 3
EXIT_AGAIN = 75
"""Ended before its end, with all that was done saved: the same command goes on (`EX_TEMPFAIL` of sysexits.h)."""
SHOWN = 20
"""Problems of one config that are printed; further ones are only counted."""


REDACTED = "***"
"""What is shown and written instead of a secret."""
# Each class of characters leaves out what follows it, or has a bound: the time is linear in the length of a text.
_SECRETS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(://)[^\s/?#:'\"]*:[^\s/?#'\"]*(?=@)",  # user:password@
        r"(://)[^\s/@:'\"]+:(?!\d{1,5}/)[^\s@'\"]{1,200}(?=@)",  # one with a slash in it, which is no port
        r"(https?://)[^\s/?#@'\"]+(?=@)",  # token@
        r"([?&][^\s=&?#'\"]{0,40}(?:token|secret|passw|signature|credential|auth|access)[^\s=&?#'\"]{0,40}=)[^\s&#'\"]+",
        r"([?&](?:[^\s=&?#'\"]{0,40}[_.-])?(?:sig|key|pass|pwd)=)[^\s&#'\"]+",
    )
)


class FnrecipeError(Exception):
    """A run failed for a reason that its user can understand and mend. Its message shows no secret of an address."""

    exit_status = EXIT_FAILED

    def __str__(self) -> str:
        return redacted(super().__str__())


class UsageError(FnrecipeError):
    """The command line, the config, or a file that they name cannot be used as it is."""

    exit_status = EXIT_USAGE


class DataError(FnrecipeError):
    """A record of the data cannot be used; the message names file, line and byte offset."""


class CheckpointError(FnrecipeError):
    """A checkpoint is damaged, cannot be written, or does not match the state that it is restored into."""


class NonFiniteError(FnrecipeError):
    """Too many consecutive steps had a non-finite loss, gradient or update, or the state is not finite."""

    exit_status = EXIT_NON_FINITE


class SpikeError(FnrecipeError):
    """Too many steps had a loss or a gradient norm far above those before them."""

    exit_status = EXIT_NON_FINITE


class MachineError(FnrecipeError):
    """A rank holds or computes other numbers than it must: its memory or its chip is faulty."""


class LostError(FnrecipeError):
    """Another process of the run failed or died, and this one ends because of it."""


@attrs.frozen
class Problem:
    """One thing that is wrong with a config: `path: expected …, found … (source)`."""

    path: str
    expected: str
    found: str
    source: str = ""
    hint: str = ""

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        hint = f"; {self.hint}" if self.hint else ""
        path, found = shortened(self.path, 200), shortened(self.found, 200)
        return one_line(f"{path}: expected {self.expected}, found {found}{source}{hint}")


class ConfigError(UsageError):
    """All problems of a config, one line each; after the first `SHOWN`, how many more there are."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        more = len(problems) - SHOWN
        super().__init__("\n".join([*map(str, problems[:SHOWN]), *([f"  … and {more:,} more"] if more > 0 else [])]))
        self.problems = tuple(problems)


def redacted(text: str) -> str:
    """`text` without the secrets of the addresses in it: passwords, and tokens, before a host; values in a query."""
    for secret in _SECRETS:
        text = secret.sub(rf"\g<1>{REDACTED}", text)
    return text


def one_line(text: str) -> str:
    """`text` with escapes for line ends and other characters that are not printable."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shortened(text: str, limit: int) -> str:
    """`text`; of one longer than `limit`, its beginning and three dots."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def few(names: Sequence[str], limit: int = 10) -> str:
    """The first of the names, and how many there are."""
    more = f", … ({len(names):,} in all)" if len(names) > limit else ""
    return ", ".join(map(one_line, names[:limit])) + more


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The hint for a mistyped `name`: the nearest of the `valid` names, or a list of them if none is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    more = f", … ({len(names)} in all)" if len(names) > 20 else ""
    return f"valid names: {', '.join(names[:20])}{more}" if names else ""
