"""Attention and position operations: pure functions on arrays."""

from sympow_jax.ops import gates as gates
from sympow_jax.ops import positions as positions
from sympow_jax.ops.linear_attention.diagnostics import power_condition as power_condition
from sympow_jax.ops.linear_attention.diagnostics import taylor_condition as taylor_condition
from sympow_jax.ops.position_bias import PositionBias as PositionBias
from sympow_jax.ops.power_attention.api import PowerState as PowerState
from sympow_jax.ops.power_attention.api import power_attention as power_attention
from sympow_jax.ops.power_attention.api import power_attention_with_state as power_attention_with_state
from sympow_jax.ops.power_attention.api import power_initial_state as power_initial_state
from sympow_jax.ops.power_attention.api import power_state as power_state
from sympow_jax.ops.power_attention.api import power_step as power_step
from sympow_jax.ops.softmax_attention import cache as cache
from sympow_jax.ops.softmax_attention import softmax_attention as softmax_attention
from sympow_jax.ops.softmax_attention import softmax_attention_at as softmax_attention_at
from sympow_jax.ops.taylor_attention.api import TaylorState as TaylorState
from sympow_jax.ops.taylor_attention.api import taylor_attention as taylor_attention
from sympow_jax.ops.taylor_attention.api import taylor_attention_with_state as taylor_attention_with_state
from sympow_jax.ops.taylor_attention.api import taylor_initial_state as taylor_initial_state
from sympow_jax.ops.taylor_attention.api import taylor_state as taylor_state
from sympow_jax.ops.taylor_attention.api import taylor_step as taylor_step
