"""What becomes of a function of trees of tensors: a graph, passes over it, and what runs it."""

from fnrecipe.compiler.cuda_graph import cuda_graph as cuda_graph
from fnrecipe.compiler.inductor import inductor as inductor
from fnrecipe.compiler.trace import Backend as Backend
from fnrecipe.compiler.trace import interpreter as interpreter
from fnrecipe.compiler.trace import trace as trace
