"""`import fnrecipe` gives everything, and imports nothing before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fnrecipe
from tests.test_architecture import ARROWS, ROOT

NAMES = dir(fnrecipe)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_else() -> None:
    code = "import sys, fnrecipe; print(*(n for n in sys.modules if n.partition('.')[0] in ('torch', 'numpy', 'fnrecipe')))"
    assert run(code) == "fnrecipe\n"


def test_a_light_room_is_reached_without_torch() -> None:
    code = "import sys, fnrecipe; fnrecipe.data.pipe, fnrecipe.config.resolve; print('torch' in sys.modules)"
    assert run(code) == "False\n"


@pytest.mark.parametrize("order", ["", "[::-1]"])
def test_every_name_that_it_shows_resolves_whatever_comes_first(order: str) -> None:
    code = f"import fnrecipe\nfor name in dir(fnrecipe){order}: print(name, getattr(fnrecipe, name) is not None)"
    assert sorted(run(code).splitlines()) == [f"{name} True" for name in NAMES]


def test_values_stay_what_they_are_when_their_modules_are_imported() -> None:
    from fnrecipe.recipe import Recipe
    from fnrecipe.shell import train
    from fnrecipe.shell.trained import load

    assert (fnrecipe.Recipe, fnrecipe.load, fnrecipe.train) == (Recipe, load.load, train.train)
    assert fnrecipe.__version__ == version("fnrecipe")


def test_what_type_checkers_see_is_what_is_there() -> None:
    (seen,) = [node for node in ast.parse(Path(str(fnrecipe.__file__)).read_text()).body if isinstance(node, ast.If)]
    imports = [node for node in seen.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in imports for alias in node.names}
    assert sorted([*homes, "__version__"]) == NAMES
    assert {name: home for name, home in homes.items() if home != "fnrecipe"} == fnrecipe._VALUES  # type: ignore[attr-defined]
    assert set(ARROWS) - {"cli"} == {name for name, home in homes.items() if home == "fnrecipe"}


@pytest.mark.parametrize("name", ["nonsense", "cli", "_hidden"])
def test_no_other_name_is_there(name: str) -> None:
    assert run(f"import fnrecipe; print(hasattr(fnrecipe, {name!r}))") == "False\n"
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'fnrecipe'"):
        from fnrecipe import nonsense  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.slow
def test_type_checkers_know_the_types_and_refuse_what_is_not_there(tmp_path: Path) -> None:
    code = "import fnrecipe\nr, c, p = fnrecipe.load('x')\nreveal_type(r)\nreveal_type(fnrecipe.data.pipe)\nfnrecipe.nonsense\n"
    (tmp_path / "user.py").write_text(code)
    command = [sys.executable, "-m", "mypy", str(tmp_path / "user.py")]  # by this project's options: its cache serves both
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert 'Revealed type is "fnrecipe.recipe.Recipe[Any]"' in done.stdout
    assert 'Module has no attribute "nonsense"' in done.stdout
    assert done.stdout.count("error:") == 1
