"""The arrows between the rooms of fnrecipe, read from its imports. A room is a folder, or a file beside the folders."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {ROOT / "fnrecipe": "fnrecipe", ROOT / "cli": "fnrecipe.cli", ROOT / "recipes": "fnrecipe.recipes"}
ARROWS = {
    **dict.fromkeys(("errors", "tree", "random", "ops"), ""),
    **dict.fromkeys(("config", "data"), "errors"),
    "loss": "tree",
    "parallel": "ops tree",
    "contract": "config errors loss parallel tree",
    "compiler": "errors ops tree",
    "nn": "ops parallel random tree",
    "optim": "errors loss ops parallel random tree",
    "transforms": "compiler loss ops optim parallel random tree",
    "models": "config data errors loss nn parallel random transforms tree",
    "generation": "compiler errors models nn random transforms tree",
    "components": "config data errors models optim",
    "presets": "components config errors generation models nn optim parallel tree",
    "streams": "config data errors",
    "step": "compiler errors loss optim parallel random transforms tree",
    "fold": "data step",
    "observe": "data step",
    "recipe": "config contract data loss models observe optim parallel tree",
    "build": "compiler config contract data errors loss optim parallel random recipe step transforms tree",
    "runtime": "compiler config data errors ops parallel",
    "checkpoint": "data errors parallel runtime tree",
    "interop": "checkpoint compiler config data errors generation models nn parallel presets random runtime streams transforms "
    "tree",
    "evaluations": "compiler config data errors generation loss models presets random recipe transforms tree",
    "recipes": "components config data errors evaluations interop loss models optim parallel presets random recipe streams "
    "tree",
    "shell": "build checkpoint compiler config contract data errors evaluations fold generation interop loss models observe "
    "optim parallel random recipe recipes runtime step streams transforms tree",
    "inspect": "build checkpoint compiler components config data errors fold models nn parallel random recipe runtime shell "
    "step tree",
    "cli": "checkpoint compiler config data errors generation inspect interop recipe runtime shell",
}
"""Which rooms each room imports from; all of them stand above it."""
SHELL = {
    **dict.fromkeys(("recording", "find_recipe", "observers"), ""),
    "screen": "recording",
    "directory": "find_recipe",
    "session": "directory screen",
    **dict.fromkeys(("products", "sample"), "directory session"),
    **dict.fromkeys(("evaluate", "streams"), "recording session"),
    "saving": "directory recording session",
    "start": "directory saving session",
    "trained": "directory evaluate find_recipe session",
    "guards": "directory recording saving session",
    "publish": "guards recording session",
    "evaluators": "evaluate saving session streams",
    "prepare": "directory screen session trained",
    "end": "evaluate sample screen session trained",
    "train": "directory end evaluate evaluators guards observers prepare products publish recording saving screen session "
    "start streams",
}
"""The same for the rooms within the shell."""
TABLES = {"fnrecipe": ARROWS, "fnrecipe.shell": SHELL}
"""The rooms of a package that has rooms."""
PURE = {
    room
    for room in ARROWS
    if room
    not in (
        "config",
        "data",
        "streams",
        "evaluations",
        "runtime",
        "checkpoint",
        "interop",
        "shell",
        "inspect",
        "recipes",
        "cli",
    )
}
IMPURE = {"os", "io", "pathlib", "time", "datetime", "json", "random", "logging", "subprocess", "signal", "socket", "shutil"}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
MAX_LINES = 400


@attrs.frozen
class Import:
    """A module, or a name in one, that a module imports; `eager` if the import runs when the module is imported."""

    name: str
    eager: bool = True


def imports(tree: ast.AST, package: str, eager: bool = True) -> Iterator[Import]:
    """All imports below `tree` with absolute names, but those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (Import(f"{module}.{alias.name}", eager) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            yield from imports(ast.Module(node.orelse, []), package, eager)
        else:
            yield from imports(node, package, eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def find_modules() -> dict[str, Path]:
    """Every module of fnrecipe by its name."""
    modules = {}
    for folder, package in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            names = [package, *(part for part in parts if part != "__init__")]
            if path.resolve().is_relative_to(folder):
                modules[".".join(names)] = path
    return modules


MODULES = find_modules()


@cache
def parse(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


@cache
def imported(name: str) -> frozenset[Import]:
    """What the module `name` imports: modules of fnrecipe by their whole names, others by their top-level names."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    return frozenset(Import(module_of(found.name), found.eager) for found in imports(parse(name), package))


def module_of(name: str) -> str:
    if name.partition(".")[0] != "fnrecipe":
        return name.partition(".")[0]
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:size]) for size in range(1, len(parts))}


def loaded_by(name: str) -> set[str]:
    """The modules that are loaded when `name` is imported, by their whole or top-level names."""
    loaded, waiting = set(), {name}
    while waiting:
        module = waiting.pop()
        loaded.add(module)
        if module in MODULES:
            eager = {found.name for found in imported(module) if found.eager}
            waiting |= (eager | parents(module)) - loaded
    return loaded


def within(name: str, *parts: str) -> bool:
    """Whether `name` is one of the modules fnrecipe.`parts` or in one of these packages."""
    return any(f"{name}.".startswith(f"fnrecipe.{part}.") for part in parts)


def select(*parts: str) -> list[str]:
    return [name for name in MODULES if within(name, *parts)]


def room(name: str, package: str) -> str:
    """The room of a module in a package; empty for the package itself, and for what is not in it."""
    return name.removeprefix(f"{package}.").split(".")[0] if name.startswith(f"{package}.") else ""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os.path as p, sys", {Import("os.path"), Import("sys")}),
        ("from fnrecipe import tree, nn", {Import("fnrecipe.tree"), Import("fnrecipe.nn")}),
        ("from .b import c", {Import("fnrecipe.a.b.c")}),
        ("from . import b", {Import("fnrecipe.a.b")}),
        ("from ..b import c", {Import("fnrecipe.b.c")}),
        ("def f():\n    import os", {Import("os", eager=False)}),
        ("class A:\n    def f(self):\n        from os import path", {Import("os.path", eager=False)}),
        ("try:\n    import os\nexcept ImportError:\n    import sys", {Import("os"), Import("sys")}),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import os", {Import("os")}),
        ("if __name__ == '__main__':\n    import os", set()),
    ],
)
def test_imports_are_read_from_the_source(source: str, expected: set[Import]) -> None:
    assert set(imports(ast.parse(source), "fnrecipe.a")) == expected


@pytest.mark.parametrize("package", TABLES)
def test_every_room_is_in_the_table_and_imports_from_those_that_it_names_and_no_others(package: str) -> None:
    found: dict[str, set[str]] = {}
    for name in MODULES:
        if mine := room(name, package):
            others = {room(other.name, package) for other in imported(name) if other.name in MODULES}
            found[mine] = found.get(mine, set()) | others - {mine, ""}
    assert found == {name: set(others.split()) for name, others in TABLES[package].items()}


@pytest.mark.parametrize("arrows", TABLES.values(), ids=TABLES)
def test_all_arrows_point_upwards(arrows: dict[str, str]) -> None:
    rooms = list(arrows)
    assert not [(name, other) for name in rooms for other in arrows[name].split() if rooms.index(other) >= rooms.index(name)]


def test_imports_are_followed() -> None:
    assert "torch" in loaded_by("fnrecipe.shell.train")
    assert "fnrecipe.config.sections.data" in loaded_by("fnrecipe.recipes.lm.data")


def test_the_map_in_the_readme_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^fnrecipe/([\w./ ]+?)  ", readme, re.MULTILINE)
    rooms = [word.removesuffix(".py").rstrip("/") for words in named for word in words.split()]
    assert sorted(rooms) == sorted(set(ARROWS) - {"cli", "recipes"})
    within_shell = " ".join(re.findall(r"^  ((?:\w+/ )+) ", readme, re.MULTILINE)).replace("/", "").split()
    assert sorted(within_shell) == sorted(name for name in SHELL if (ROOT / "fnrecipe/shell" / name).is_dir())
    assert all((ROOT / folder).is_dir() for folder in re.findall(r"^(\w+)/  ", readme, re.MULTILINE))


LIGHT = [*select("config", "errors", "cli", "data", "components", "streams"), "fnrecipe.recipes.lm.config"]
LIGHT += [f"fnrecipe.recipes.{name}.{part}" for name in ("sft", "preference") for part in ("config", "data")]
LIGHT += [name for name in select("models") if name.endswith(".config")]
LIGHT += ["fnrecipe.shell.directory.recorded_recipe"]
LIGHT += [f"fnrecipe.models.{name}" for name in ("hugging_face", "hugging_face_keys", "parameters", "rope")]


@pytest.mark.parametrize("name", LIGHT)
def test_config_command_line_and_data_load_no_torch(name: str) -> None:
    assert "torch" not in loaded_by(name)


@pytest.mark.parametrize("name", select("data", "config", "errors"))
def test_data_and_config_never_import_torch(name: str) -> None:
    assert "torch" not in {found.name for found in imported(name)}


@pytest.mark.parametrize(
    "name",
    [
        "fnrecipe.data",
        "fnrecipe.data.survey",
        "fnrecipe.streams",
        *(f"fnrecipe.recipes.{name}.data" for name in ("lm", "sft", "preference")),
    ],
)
def test_what_only_some_data_needs_is_imported_when_it_is_needed(name: str) -> None:
    optional = {"fsspec", "jinja2", "pyarrow", "sentencepiece", "tiktoken", "tokenizers", "torch"}
    code = f"import sys, {name}; print(*sorted({optional} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", select("data"))
def test_only_its_own_module_imports_a_library_that_only_some_data_needs(name: str) -> None:
    users = {
        "fsspec": {"fnrecipe.data.remote"},
        "jinja2": {"fnrecipe.data.chat_sandbox"},
        "pyarrow": {"fnrecipe.data.formats.parquet"},
        "sentencepiece": {"fnrecipe.data.sentencepiece_file"},
        "tiktoken": {"fnrecipe.data.tiktoken_file"},
        "tokenizers": {"fnrecipe.data.huggingface"},
        "multiprocessing": {"fnrecipe.data.processes"},
    }
    found = {other.name for other in imported(name)}
    assert {library for library in users if library in found} == {library for library in users if name in users[library]}


@pytest.mark.parametrize("name", select(*PURE))
def test_pure_modules_import_no_effects(name: str) -> None:
    assert not [found.name for found in imported(name) if found.name in IMPURE]


@pytest.mark.parametrize("name", select(*PURE))
def test_pure_modules_read_write_and_print_nothing(name: str) -> None:
    calls = {ast.unparse(node.func) for node in ast.walk(parse(name)) if isinstance(node, ast.Call)}
    assert not calls & {"open", "print", "input", "torch.save", "torch.load", "torch.manual_seed", "torch.seed"}


@pytest.mark.parametrize("name", select("recipes"))
def test_recipes_import_themselves_relatively_and_fnrecipe_by_name(name: str) -> None:
    nodes = [node for node in parse(name).body if not isinstance(node, ast.If)]
    body = ast.Module(nodes, [])
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    absolute = [n for node in ast.walk(body) if isinstance(node, ast.ImportFrom) and not node.level for n in [node.module]]
    absolute += [alias.name for node in ast.walk(body) if isinstance(node, ast.Import) for alias in node.names]
    allowed = sys.stdlib_module_names | {"fnrecipe", "torch", "numpy", "attrs"}
    assert {str(module).partition(".")[0] for module in absolute} <= allowed
    assert not [module for module in absolute if within(str(module), "cli", "recipes")]
    relative = [node for node in ast.walk(body) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level < package.count(".") for node in relative)


@pytest.mark.parametrize("name", select("recipes"))
def test_only_the_main_guard_of_a_recipe_imports_the_command_line(name: str) -> None:
    guards = [node for node in parse(name).body if isinstance(node, ast.If)]
    assert all(ast.unparse(node.test) == "__name__ == '__main__'" for node in guards)
    found = {found.name for node in guards for found in imports(ast.Module(node.body, []), "")}
    assert found <= {"fnrecipe.cli.main.run_recipe"}


def test_no_two_modules_import_each_other() -> None:
    graph = {name: {found.name for found in imported(name)} & MODULES.keys() - {name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", MODULES)
def test_nothing_runs_what_it_reads(name: str) -> None:
    nodes = list(ast.walk(parse(name)))
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert not calls & {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}
    unsafe = {found.name for found in imported(name)} & UNSAFE
    assert unsafe == ({"pickle"} if name == "fnrecipe.interop.dcp_pickles" else set())  # a table of names, and no code
    assert not [node for node in nodes if isinstance(node, ast.keyword) and node.arg == "shell"]


OPEN_BYTES = {"os.open", "gzip.open", "_zstd().open"}


def without_encoding(tree: ast.AST) -> list[str]:
    """The calls that open a file as text, and leave its encoding to the locale."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            name = ast.unparse(node.func).rpartition(".")[2]
            words = {arg.value for arg in [*node.args, *(k.value for k in node.keywords)] if isinstance(arg, ast.Constant)}
            binary = any(isinstance(word, str) and re.fullmatch("[rwax+]*b[rwax+]*", word) for word in words)
            text = any(keyword.arg in ("text", "universal_newlines") for keyword in node.keywords)
            opens = name in ("open", "fdopen") and ast.unparse(node.func) not in OPEN_BYTES
            if (opens and not binary) or name in ("read_text", "write_text") or text:
                found.append(f"line {node.lineno}")
    return found


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("open(path)", 1),
        ("path.open('a')", 1),
        ("path.open('a', buffering=1)", 1),
        ("open(path, 'rb')", 0),
        ("open(path, mode='wb')", 0),
        ("path.open('ab', buffering=0)", 0),
        ("open(path, 'w', encoding='utf-8')", 0),
        ("path.read_text()", 1),
        ("path.write_text(text, encoding='utf-8')", 0),
        ("subprocess.run(command, text=True)", 1),
        ("subprocess.run(command, encoding='utf-8')", 0),
        ("os.open(path, os.O_RDONLY)", 0),
    ],
)
def test_files_that_are_opened_as_the_locale_says_are_found(source: str, count: int) -> None:
    assert len(without_encoding(ast.parse(source))) == count


@pytest.mark.parametrize("name", MODULES)
def test_text_is_read_and_written_as_utf8_whatever_the_locale(name: str) -> None:
    assert without_encoding(parse(name)) == []


def whole_environments(tree: ast.AST) -> list[str]:
    """The places that use the environment other than by one name: `os.environ["RANK"]` and `os.environ.get("RANK")` do."""
    by_name = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in ("get", "setdefault"))
    }
    environments = [node for node in ast.walk(tree) if ast_name(node) in ("os.environ", "os.environb", "environ")]
    return [f"line {node.lineno}" for node in environments if id(node) not in by_name]  # type: ignore[attr-defined]


def ast_name(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("os.environ['A']", 0),
        ("os.environ.get('A')", 0),
        ("print(os.environ)", 1),
        ("dict(**os.environ)", 1),
        ("environ.items()", 1),
    ],
)
def test_uses_of_the_whole_environment_are_found(source: str, count: int) -> None:
    assert len(whole_environments(ast.parse(source))) == count


@pytest.mark.parametrize("name", MODULES)
def test_nothing_reads_the_whole_environment(name: str) -> None:
    assert whole_environments(parse(name)) == []


@pytest.mark.parametrize("name", MODULES)
def test_every_file_can_be_read_in_one_sitting(name: str) -> None:
    source = MODULES[name].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES
    assert name.endswith("__main__") or ast.get_docstring(parse(name))
