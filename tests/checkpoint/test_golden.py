"""A checkpoint that fnrecipe 0.1.0 wrote on two ranks is read by every later version, and without fnrecipe."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fnrecipe import checkpoint, tree
from fnrecipe.checkpoint.damage import problem
from fnrecipe.errors import CheckpointError
from tests.checkpoints import save_cut, silent
from tests.helpers import assert_same_bits

GOLDEN = Path(__file__).with_name("golden")
CURSOR = {"0": [1, {"file": 2, "record": 30}], "1": None}
FACTS = {"tokenizer": "bytes", "texts: ü/a.jsonl": "7 bytes, 0123456789abcdef"}
Read = Callable[[Path], tuple[dict[str, Any], dict[str, np.ndarray]]]


def golden() -> dict[str, Any]:
    """The state in it."""
    numbers = torch.arange(128.0).view(16, 8) / 8
    params = {"weight": numbers, "half": -numbers.bfloat16(), "norm": torch.tensor([1.0, -0.0, torch.inf])}
    rest = {"key": torch.tensor([2**63 - 1, -(2**63)]), "flags": torch.tensor([True, False]), "empty": torch.zeros(0, 3)}
    return {"params": params, "optimizer": {"count": torch.tensor(3)}, **rest, "step": torch.tensor(3)}


@pytest.fixture(scope="module")
def read() -> Read:
    """The function `read` of the documents."""
    (source,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/checkpoints.md").read_text(), re.DOTALL)
    assert len(source.splitlines()) <= 60
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(node) for node in nodes} == {"import hashlib", "import json", "import pathlib", "import numpy as np"}
    names: dict[str, Any] = {}
    exec(compile(source, "docs/checkpoints.md", "exec"), names)  # noqa: S102 the document is ours
    found: Read = names["read"]
    return found


def test_the_golden_checkpoint_is_read() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*")) < 100_000
    found = checkpoint.newest(GOLDEN, silent)
    assert found is not None
    assert (found.step, found.cursor, found.files) == (3, CURSOR, FACTS)
    assert len(found.tensors["params.weight"].slices) == 2
    assert_same_bits(checkpoint.restore(found, tree.map(torch.zeros_like, golden())), golden())


def test_a_format_that_is_not_known_is_told_in_a_line(tmp_path: Path) -> None:
    place = Path(shutil.copytree(GOLDEN, tmp_path / "root")) / "step_00000003"
    document = json.loads((place / "state.json").read_text())
    sums = (place / "SHA256SUMS").read_text().splitlines()
    (place / "state.json").write_text(json.dumps({**document, "format": 4, "more": []}))
    digest = hashlib.sha256((place / "state.json").read_bytes()).hexdigest()
    (place / "SHA256SUMS").write_text("\n".join([*sums[:-1], f"{digest}  state.json\n"]))
    advice = "read it with the fnrecipe that wrote it, whose version the run.json of its run has"
    line = f"expected checkpoint format 3, found 4; {advice}"
    assert problem(place, 3, every_byte=True) == line
    with pytest.raises(CheckpointError, match=line):
        checkpoint.newest(tmp_path / "root", silent)


def same(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert found[path].dtype == wide.numpy().dtype
        assert found[path].tobytes() == wide.numpy().tobytes(), path


def test_the_reader_of_the_documents_reads_it(read: Read) -> None:
    state, tensors = read(GOLDEN / "step_00000003")
    assert (state["step"], state["cursor"], state["files"]) == (3, CURSOR, FACTS)
    same(tensors, tree.paths(golden()))


@pytest.mark.parametrize("parts", [1, 3])
def test_the_reader_of_the_documents_reads_any_cut_and_finds_damage(read: Read, tmp_path: Path, parts: int) -> None:
    expected = {"x": torch.randn(7, 3, 2), "y": torch.randn(5).half(), "n": torch.tensor(1.5, dtype=torch.float64)}
    place = save_cut(tmp_path, 1, expected, parts)
    same(read(place)[1], expected)
    path = place / "state_0000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="damaged"):
        read(place)
