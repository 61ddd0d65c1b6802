"""Attention and position operations: pure functions on arrays."""

from sympow_jax.ops import gates as gates
from sympow_jax.ops import positions as positions
from sympow_jax.ops.linear_attention.api import empty_state as empty_state
from sympow_jax.ops.linear_attention.api import linear_attention as linear_attention
from sympow_jax.ops.linear_attention.api import linear_attention_with_state as linear_attention_with_state
from sympow_jax.ops.linear_attention.api import linear_step as linear_step
from sympow_jax.ops.linear_attention.api import state_of as state_of
from sympow_jax.ops.linear_attention.diagnostics import power_condition as power_condition
from sympow_jax.ops.linear_attention.diagnostics import taylor_condition as taylor_condition
from sympow_jax.ops.linear_attention.inputs import LinearState as LinearState
from sympow_jax.ops.linear_attention.kernels import Kernel as Kernel
from sympow_jax.ops.linear_attention.kernels import PowerKernel as PowerKernel
from sympow_jax.ops.linear_attention.kernels import TaylorKernel as TaylorKernel
from sympow_jax.ops.linear_attention.kernels import state_decay as state_decay
from sympow_jax.ops.linear_attention.ring import linear_attention_ring as linear_attention_ring
from sympow_jax.ops.positions.position_bias import PositionBias as PositionBias
from sympow_jax.ops.power_attention.api import power_attention as power_attention
from sympow_jax.ops.power_attention.api import power_attention_with_state as power_attention_with_state
from sympow_jax.ops.power_attention.api import power_step as power_step
from sympow_jax.ops.softmax_attention import cache as cache
from sympow_jax.ops.softmax_attention import softmax_attention as softmax_attention
from sympow_jax.ops.softmax_attention import softmax_attention_at as softmax_attention_at
from sympow_jax.ops.softmax_attention import softmax_attention_ring as softmax_attention_ring
from sympow_jax.ops.taylor_attention.api import taylor_attention as taylor_attention
from sympow_jax.ops.taylor_attention.api import taylor_attention_with_state as taylor_attention_with_state
from sympow_jax.ops.taylor_attention.api import taylor_step as taylor_step

PowerState = TaylorState = LinearState  # what each kernel calls its state
