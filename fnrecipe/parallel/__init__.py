"""What ranks hold of tensors that are cut over them, and how they add these up and gather them."""

from fnrecipe.parallel.mesh import Axis as Axis
from fnrecipe.parallel.mesh import Keep as Keep
from fnrecipe.parallel.mesh import Mesh as Mesh
from fnrecipe.parallel.mesh import Part as Part
from fnrecipe.parallel.mesh import extent as extent
from fnrecipe.parallel.mesh import is_part as is_part
from fnrecipe.parallel.mesh import keep_all as keep_all
from fnrecipe.parallel.mesh import owned as owned
