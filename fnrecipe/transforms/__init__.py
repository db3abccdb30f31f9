"""Transforms of functions: each takes a function and gives one; they compose with each other and with `torch.func`."""

from fnrecipe.transforms.accumulate import accumulate as accumulate
from fnrecipe.transforms.cuda_graph import cuda_graph as cuda_graph
from fnrecipe.transforms.inductor import inductor as inductor
from fnrecipe.transforms.jit import Backend as Backend
from fnrecipe.transforms.jit import interpreter as interpreter
from fnrecipe.transforms.jit import jit as jit
from fnrecipe.transforms.jit import trace as trace
from fnrecipe.transforms.remat import remat as remat
from fnrecipe.transforms.shard import evaluation as evaluation
from fnrecipe.transforms.shard import gradients as gradients
from fnrecipe.transforms.shard import layer as layer
from fnrecipe.transforms.shard import whole as whole
