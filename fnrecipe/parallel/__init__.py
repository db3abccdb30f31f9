"""The mesh of ranks, shards of tensors over it, and collectives along its axes."""

from fnrecipe.parallel.mesh import Axis as Axis
from fnrecipe.parallel.mesh import Dealt as Dealt
from fnrecipe.parallel.mesh import Mesh as Mesh
from fnrecipe.parallel.mesh import Placement as Placement
from fnrecipe.parallel.mesh import Shard as Shard
from fnrecipe.parallel.mesh import global_slice as global_slice
from fnrecipe.parallel.mesh import is_primary as is_primary
from fnrecipe.parallel.mesh import is_shard as is_shard
from fnrecipe.parallel.mesh import outline as outline
from fnrecipe.parallel.mesh import replicated as replicated
