"""What is built holds one package and nothing else, and works without the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def unpacked(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds what the wheel puts into site-packages."""
    (wheel,) = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("site")
    shutil.unpack_archive(wheel, folder, "zip")
    return folder


def run(unpacked: Path, cwd: Path, *args: str) -> str:
    """What a Python says that sees the unpacked wheel before anything else, started in the directory `cwd`."""
    environment = {"PYTHONPATH": str(unpacked), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


def test_the_wheel_has_one_top_level(unpacked: Path) -> None:
    package, info = sorted(path.name for path in unpacked.iterdir())
    assert package == "fnrecipe"
    assert info.startswith("fnrecipe-")
    assert info.endswith(".dist-info")


def test_the_wheel_holds_all_of_the_package_and_no_link(unpacked: Path) -> None:
    package = unpacked / "fnrecipe"
    commands, recipes = sources(ROOT / "cli"), sources(ROOT / "recipes")
    assert {"main.py", "__main__.py"} <= commands
    assert {"lm/config.py", "lm/data.py", "lm/train.py"} <= recipes
    assert sources(package / "cli") == commands
    assert sources(package / "recipes") == recipes
    assert {path.name for path in (ROOT / "fnrecipe").glob("*.py")} == {path.name for path in package.glob("*.py")}
    assert (package / "py.typed").exists()
    assert not [path for path in unpacked.rglob("*") if path.is_symlink() or path.suffix == ".pyc"]


def test_the_wheel_holds_no_tests(unpacked: Path) -> None:
    assert not [path for path in unpacked.rglob("*") if path.name.startswith(("test", "conftest", "benchmark"))]


def test_the_sdist_holds_package_commands_recipes_and_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        members = {member.name.partition("/")[2]: member for member in file.getmembers()}
    wanted = {"fnrecipe/shell/train.py", "fnrecipe/cli/main.py", "fnrecipe/recipes/lm/train.py", "tests/test_wheel.py"}
    assert wanted | {"pyproject.toml", "README.md", "LICENSE"} <= members.keys()
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]


def test_the_command_line_runs_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    where = run(unpacked, tmp_path, "-c", "import fnrecipe, fnrecipe.cli.main as m; print(fnrecipe.__file__, m.__file__)")
    assert where.split() == [str(unpacked / "fnrecipe" / path) for path in ("__init__.py", "cli/main.py")]
    dumped = run(unpacked, tmp_path, "-m", "fnrecipe.cli", "dump-config", "lm", "--config", "common.seed=77")
    assert "num_layers: 4" in dumped
    assert "seed: 77" in dumped


def test_the_script_of_the_wheel_is_the_command_line(unpacked: Path, tmp_path: Path) -> None:
    (points,) = unpacked.glob("*.dist-info/entry_points.txt")
    module, function = points.read_text().split("fnrecipe = ")[1].strip().split(":")
    code = f"import sys; sys.argv = ['fnrecipe', '--version']; from {module} import {function}; {function}()"
    version = next(unpacked.glob("*.dist-info")).name.removeprefix("fnrecipe-").removesuffix(".dist-info")
    assert run(unpacked, tmp_path, "-c", code).strip().endswith(f"version {version}")


def test_a_recipe_runs_as_a_module_of_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    assert "DIR" in run(unpacked, tmp_path, "-m", "fnrecipe.recipes.lm.train", "--help")
    dumped = run(unpacked, tmp_path, "-m", "fnrecipe.recipes.lm.train", "--dump-config", "--sources")
    assert dumped == run(unpacked, tmp_path, "-m", "fnrecipe.cli", "dump-config", "lm", "--sources")
