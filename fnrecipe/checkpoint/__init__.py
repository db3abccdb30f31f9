"""Checkpoints: the state of a run on disk, complete or not there."""

from fnrecipe.checkpoint.keep import Policy as Policy
from fnrecipe.checkpoint.places import committed as committed
from fnrecipe.checkpoint.places import later as later
from fnrecipe.checkpoint.places import models as models
from fnrecipe.checkpoint.places import step_of as step_of
from fnrecipe.checkpoint.removal import MODEL as MODEL
from fnrecipe.checkpoint.removal import forget_after as forget_after
from fnrecipe.checkpoint.removal import prune as prune
from fnrecipe.checkpoint.removal import tidy as tidy
from fnrecipe.checkpoint.store import Checkpoint as Checkpoint
from fnrecipe.checkpoint.store import newest as newest
from fnrecipe.checkpoint.store import of_run as of_run
from fnrecipe.checkpoint.store import of_step as of_step
from fnrecipe.checkpoint.store import restore as restore
from fnrecipe.checkpoint.store import save as save
from fnrecipe.checkpoint.store import write as write
from fnrecipe.checkpoint.tensors import Snapshot as Snapshot
from fnrecipe.checkpoint.tensors import copied as copied
from fnrecipe.checkpoint.tensors import num_bytes as num_bytes
from fnrecipe.checkpoint.tensors import snapshot as snapshot
