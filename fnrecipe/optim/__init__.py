"""Updates as pure transforms of gradients; `chain` composes them."""

from fnrecipe.optim.adamw import adamw as adamw
from fnrecipe.optim.adamw import add_decayed_weights as add_decayed_weights
from fnrecipe.optim.adamw import scale_by_adam as scale_by_adam
from fnrecipe.optim.adamw import scale_by_learning_rate as scale_by_learning_rate
from fnrecipe.optim.clip import clip_by_global_norm as clip_by_global_norm
from fnrecipe.optim.schedule import Schedule as Schedule
from fnrecipe.optim.transform import Mean as Mean
from fnrecipe.optim.transform import Report as Report
from fnrecipe.optim.transform import Transform as Transform
from fnrecipe.optim.transform import apply as apply
from fnrecipe.optim.transform import apply_updates as apply_updates
from fnrecipe.optim.transform import chain as chain
from fnrecipe.optim.transform import mean as mean
from fnrecipe.optim.transform import stateless as stateless
