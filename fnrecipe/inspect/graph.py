"""The train step of a recipe as a graph to look at: traced by shapes alone, without parameters and data."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from fnrecipe import tree
from fnrecipe.build import init_train_state, plain_step
from fnrecipe.compiler import trace
from fnrecipe.compiler.alias import base_allocation
from fnrecipe.compiler.regions import graph_of
from fnrecipe.recipe import C, Recipe
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import make_mesh

_HEADER = '''"""The train step of the recipe {name}, as it was traced: a record, which nothing reads."""

import torch
from torch import device, inf, nan

import fnrecipe.transforms  # torch.ops.fnrecipe


'''


def trace_step(recipe: Recipe[C], config: C, device: torch.device) -> GraphModule:
    """The train step of one process as a run traces it, its inputs called by their paths: `state_params_embedding`.

    Raises:
        UsageError: if the config needs several processes.
    """
    mesh = make_mesh(config.gang, Gang(), device, recipe.rules(config))
    shapes = init_train_state(recipe, config, mesh, torch.device("meta"))
    with FakeTensorMode() as fake:
        state = tree.map(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device), shapes)
        example = tree.from_numpy(recipe.example(config, config.dataset.batch_size))
        batch = tree.map(lambda tensor: fake.from_tensor(tensor).to(device), example)
    graph, _ = trace(plain_step(recipe, config, mesh, device), (state, batch), donate=1)
    paths = [*(f"state.{path}" for path in tree.paths(state)), *(f"batch.{path}" for path in tree.paths(batch))]
    _name_inputs(graph, [re.sub(r"\W", "_", path) for path in paths])
    return GraphModule(graph, graph.graph, "Step")


def _name_inputs(graph: GraphModule, names: Sequence[str | None]) -> None:
    """Calls the inputs so; those of regions like the inputs of the graph that they are in its calls, or that they look into."""
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), names, strict=True):
        if name is not None:
            node._rename(name)
            node.target = node.name
    calls = [(region, node.args[2:]) for node in graph.graph.nodes if (region := graph_of(graph, node))]
    for region in dict.fromkeys(region for region, _ in calls):
        operands = zip(*(given for called, given in calls if called is region), strict=True)
        _name_inputs(region, [_common([base_allocation(value)[0] for value in values]) for values in operands])
        region.recompile()


def _common(inputs: Sequence[Node]) -> str | None:
    """What inputs have in common in their names, with `i` where these differ; None if one is no input."""
    words = [node.name.split("_") for node in inputs]
    if any(node.op != "placeholder" for node in inputs) or len({*map(len, words)}) > 1:
        return None
    return "_".join(found[0] if len({*found}) == 1 else "i" for found in zip(*words, strict=True))


def source(recipe: Recipe[C], graph: GraphModule) -> str:
    """The graph as Python: a module class `Step` with type and shape of each value, such as "f32[264, 256]".

    Each region is a module class within it.
    """
    code = re.sub(r" *# No stacktrace found for following nodes\n", "", graph.print_readable(print_output=False))
    code = re.sub(r'(self|"), (\w+: ")', r"\1,\n            \2", code)  # an argument a line
    regions = "|".join({name.rpartition(".")[2] for name, _ in graph.named_modules() if name})
    code = re.sub(rf"(\w+) = self\.({regions})\b", r"\1 = self.\2()", code) if regions else code
    return _HEADER.format(name=recipe.name) + code
