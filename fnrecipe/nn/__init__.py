"""Layers of models as pure functions of activations and weights.

Shapes: B rows, T positions, D model width, H heads, G key-value heads, E head width, F feed-forward width, V vocabulary.

Weights may be shards along the tensor axis of a mesh (`fnrecipe.parallel.tensor_parallel`). Then activations between layers
are sharded by position: `entered` gathers all positions before a product with weights that are sharded along their first
dimension, and a product with weights that are sharded along their second scatters them; H, G, F and V are those of the shard.
"""

from fnrecipe.nn.adapted import Adapted as Adapted
from fnrecipe.nn.attention import AttentionMask as AttentionMask
from fnrecipe.nn.attention import AttentionScope as AttentionScope
from fnrecipe.nn.attention import attention as attention
from fnrecipe.nn.attention import attention_mask as attention_mask
from fnrecipe.nn.attention import softcapped_attention as softcapped_attention
from fnrecipe.nn.cache import KeyValueCache as KeyValueCache
from fnrecipe.nn.cache import slot_mask as slot_mask
from fnrecipe.nn.cache import stored as stored
from fnrecipe.nn.documents import document_bounds as document_bounds
from fnrecipe.nn.documents import document_sums as document_sums
from fnrecipe.nn.gated import geglu as geglu
from fnrecipe.nn.gated import swiglu as swiglu
from fnrecipe.nn.linear import Logits as Logits
from fnrecipe.nn.linear import Weight as Weight
from fnrecipe.nn.linear import all_logits as all_logits
from fnrecipe.nn.linear import cross_entropy as cross_entropy
from fnrecipe.nn.linear import embedding as embedding
from fnrecipe.nn.linear import entered as entered
from fnrecipe.nn.linear import linear as linear
from fnrecipe.nn.linear import logits as logits
from fnrecipe.nn.linear import own_positions as own_positions
from fnrecipe.nn.linear_cross_entropy import DeferredLogits as DeferredLogits
from fnrecipe.nn.noise import Noise as Noise
from fnrecipe.nn.noise import dropout as dropout
from fnrecipe.nn.noise import embedding_noise as embedding_noise
from fnrecipe.nn.noise import position_numbers as position_numbers
from fnrecipe.nn.norm import layer_norm as layer_norm
from fnrecipe.nn.norm import rms_norm as rms_norm
from fnrecipe.nn.objective import Objective as Objective
from fnrecipe.nn.objective import Terms as Terms
from fnrecipe.nn.policy import Policy as Policy
from fnrecipe.nn.rotary import llama3_scaled as llama3_scaled
from fnrecipe.nn.rotary import rotary as rotary
from fnrecipe.nn.rotary import rotate as rotate
from fnrecipe.nn.rotary import yarn_scaled as yarn_scaled
