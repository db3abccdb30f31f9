"""`fnrecipe graph`: a table whose sums are those of a closed form, and the code if it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.helpers import Ended, assert_usage_error, fnrecipe, fnrecipe_here
from tests.helpers import pairs

Graph = Callable[..., Ended]
PARAMETERS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) + 264 * 32


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Graph:
    """The graph of a tiny model with more arguments, in this process; its data need not exist."""

    def graph(*args: str | Path) -> Ended:
        return fnrecipe_here(monkeypatch, capsys, "graph", "lm", *args, "--config", *pairs(Path("none.jsonl")))

    return graph


def cells(ended: Ended, operation: str) -> list[str]:
    (line,) = [line for line in ended.out.splitlines() if line[2:].startswith(f"{operation} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_table_counts_what_the_step_computes(graph: Graph) -> None:
    ended = graph()
    assert (ended.status, ended.err) == (0, "")
    positions = 8 * 32
    products, attention = 6 * PARAMETERS * positions, 14 * 2 * 32 * 32 * positions
    share = products / (products + attention)
    # forward and twice backward: 7 products in 2 layers and the head, in 2 leaves
    assert cells(ended, "aten.mm")[1:4] == [str(3 * (2 * 7 + 1) * 2), f"{products / 1e6:.1f} M", f"{share:.1%}"]
    assert cells(ended, "all")[2] == f"{(products + attention) / 1e6:.1f} M"
    assert "a step of lm on cpu: 8 rows of 32 positions in 2 microbatches\n" in ended.out
    full = products + 12 * 2 * 32 * 32 * positions
    assert f"model: {full / 1e6:.1f} MFLOP, {full / (products + attention):.1%} of the graph's; " in ended.out
    assert f"; {(full - 6 * 2 * 32 * 32 * positions) / 1e6:.1f} MFLOP with attention halved" in ended.out


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_beside_an_adapter_no_product_is_computed_for_the_gradient_of_the_base(graph: Graph, name: str) -> None:
    ended = graph("--config", f"model.adapter.name={name}", "model.adapter.rank=4")
    assert (ended.status, ended.err) == (0, "")
    sides = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]  # in and out of the weights of a layer
    base = PARAMETERS
    of_a, of_b = (4 * 2 * sum(pair[end] for pair in sides) for end in (0, 1))
    first, first_a = 32 * 32 + 2 * 16 * 32, 4 * 3 * 32  # nothing is trained before query, key and value of the first layer
    forward, backward = base + of_a + of_b, (base - first) + (2 * of_b + 2 * of_a - first_a)
    merged = 4 * 2 * sum(into * out for into, out in sides) * 2 if name == "dora" else 0  # b a of each weight, in 2 leaves
    products = 2 * (forward + backward) * 8 * 32 + 2 * merged
    assert cells(ended, "aten.mm")[2] == f"{products / 1e6:.1f} M"
    attention = 12 * 2 * 32 * 32
    told = (4 * base + 6 * (of_a + of_b) + attention) * 8 * 32
    assert f"model: {told / 1e6:.1f} MFLOP, " in ended.out


def test_the_code_is_written_where_it_is_asked_for(graph: Graph, tmp_path: Path) -> None:
    out = tmp_path / "new/place"
    ended = graph("--out", out)
    assert ended.out.splitlines()[-1].startswith(f"{out / 'step.py'}: ")
    assert "class Step(torch.nn.Module):" in (out / "step.py").read_text()
    assert [path.name for path in out.iterdir()] == ["step.py"]


def test_a_file_in_the_way_is_told_and_kept(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ended = graph("--out", tmp_path / "file")
    assert (ended.status, ended.err) == (2, f"error: {tmp_path / 'file'}: expected a directory to write to, found a file\n")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("args", [["lmm"], ["lm", "--config", "a=1"]])
def test_wrong_usage_is_told(tmp_path: Path, args: list[str]) -> None:
    assert_usage_error(fnrecipe("graph", *args, cwd=tmp_path))


def test_groups_of_parameters_are_told_with_what_is_done_to_them(graph: Graph) -> None:
    groups = "optimizer.groups=[{params: ['@norms'], weight_decay: 0.5}, {params: [layers.0.*], lr_scale: 0.25}]"
    ended = graph("--config", groups, "optimizer.config.weight_decay=0.2")
    layer = (PARAMETERS - 264 * 32) // 2
    assert cells(ended, "@norms") == [
        *("@norms", "adamw", "x 1", "0.5", "layers.*.attention_norm, layers.*.ffn_norm, norm"),
        *("5", f"{5 * 32}"),
    ]
    assert cells(ended, "layers.0.*")[1:4] == ["adamw", "x 0.25", "0.2, of matrices"]
    assert cells(ended, "layers.0.*")[-2:] == ["7", f"{layer:,}"]
    assert cells(ended, "others")[-2:] == ["8", f"{layer + 264 * 32:,}"]
