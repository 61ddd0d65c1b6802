"""The device mesh, the one table from parameter paths to mesh axes, and what shards of a sequence exchange."""

from sympow_jax.sharding.exchange import from_zigzag as from_zigzag
from sympow_jax.sharding.exchange import gather as gather
from sympow_jax.sharding.exchange import gather_time as gather_time
from sympow_jax.sharding.exchange import halo as halo
from sympow_jax.sharding.exchange import states_before as states_before
from sympow_jax.sharding.exchange import to_zigzag as to_zigzag
from sympow_jax.sharding.exchange import zigzag_index as zigzag_index
from sympow_jax.sharding.mesh import AXES as AXES
from sympow_jax.sharding.mesh import BATCH as BATCH
from sympow_jax.sharding.mesh import axis_size as axis_size
from sympow_jax.sharding.mesh import constrain as constrain
from sympow_jax.sharding.mesh import infer_sizes as infer_sizes
from sympow_jax.sharding.mesh import is_sharded as is_sharded
from sympow_jax.sharding.mesh import make_mesh as make_mesh
from sympow_jax.sharding.mesh import over_shards as over_shards
from sympow_jax.sharding.mesh import use_mesh as use_mesh
from sympow_jax.sharding.peers import HEARTBEAT_SECONDS as HEARTBEAT_SECONDS
from sympow_jax.sharding.peers import watch as watch
from sympow_jax.sharding.processes import join_processes as join_processes
from sympow_jax.sharding.table import batch_sharding as batch_sharding
from sympow_jax.sharding.table import tree_shardings as tree_shardings
from sympow_jax.sharding.table import tree_specs as tree_specs
