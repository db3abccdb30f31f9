"""Checkpoints: the state of a run on disk, complete or not there."""

from fnrecipe.checkpoint.keep import Policy as Policy
from fnrecipe.checkpoint.store import MODEL as MODEL
from fnrecipe.checkpoint.store import Checkpoint as Checkpoint
from fnrecipe.checkpoint.store import committed as committed
from fnrecipe.checkpoint.store import forget_after as forget_after
from fnrecipe.checkpoint.store import later as later
from fnrecipe.checkpoint.store import models as models
from fnrecipe.checkpoint.store import newest as newest
from fnrecipe.checkpoint.store import of_step as of_step
from fnrecipe.checkpoint.store import prune as prune
from fnrecipe.checkpoint.store import restore as restore
from fnrecipe.checkpoint.store import save as save
from fnrecipe.checkpoint.store import step_of as step_of
from fnrecipe.checkpoint.store import tidy as tidy
from fnrecipe.checkpoint.store import write as write
from fnrecipe.checkpoint.tensors import Snapshot as Snapshot
from fnrecipe.checkpoint.tensors import copied as copied
from fnrecipe.checkpoint.tensors import num_bytes as num_bytes
from fnrecipe.checkpoint.tensors import snapshot as snapshot
