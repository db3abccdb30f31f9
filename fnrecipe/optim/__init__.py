"""Updates as pure transforms of gradients; `chain` composes them."""

from fnrecipe.optim.adamw import adamw as adamw
from fnrecipe.optim.adamw import add_decayed_weights as add_decayed_weights
from fnrecipe.optim.adamw import scale_by_adam as scale_by_adam
from fnrecipe.optim.adamw import scale_by_learning_rate as scale_by_learning_rate
from fnrecipe.optim.clip import clip_by_global_norm as clip_by_global_norm
from fnrecipe.optim.partition import Mask as Mask
from fnrecipe.optim.partition import masked as masked
from fnrecipe.optim.partition import partition as partition
from fnrecipe.optim.schedule import Schedule as Schedule
from fnrecipe.optim.schedule import cosine_annealing as cosine_annealing
from fnrecipe.optim.schedule import wsd as wsd
from fnrecipe.optim.transform import MeanGradient as MeanGradient
from fnrecipe.optim.transform import Report as Report
from fnrecipe.optim.transform import Transform as Transform
from fnrecipe.optim.transform import apply_updates as apply_updates
from fnrecipe.optim.transform import chain as chain
from fnrecipe.optim.transform import guarded_update as guarded_update
from fnrecipe.optim.transform import init_parts as init_parts
from fnrecipe.optim.transform import mean_gradient as mean_gradient
from fnrecipe.optim.transform import stateless as stateless
from fnrecipe.optim.transform import update_parts as update_parts
