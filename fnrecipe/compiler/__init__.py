"""The compiler: traces a function of trees of tensors into a graph, rewrites that graph by passes, and runs it."""

from fnrecipe.compiler.cuda_graph import cuda_graph as cuda_graph
from fnrecipe.compiler.inductor import inductor as inductor
from fnrecipe.compiler.trace import Backend as Backend
from fnrecipe.compiler.trace import Run as Run
from fnrecipe.compiler.trace import interpreter as interpreter
from fnrecipe.compiler.trace import trace as trace
