"""Exact k-th largest and top-k masks over a pytree: no sort, any k, any sharding.

The search brackets the threshold (from a sample or a guess), counts a few candidate
thresholds in one pass over the leaves, and narrows the bracket until it is exact, in
about four passes. Nothing is sorted, concatenated or stored.

**The order.** Scores rank from high to low: NaN of either sign first (all equal), then
+inf, finite values, -inf; +0 and -0 are equal, subnormals are not zero. Equal scores
rank by leaf, in JAX's order, then by row-major index. The selection is the first k; it
is unique and bitwise the same on one device and on any mesh.

**Score functions** must be element-wise: they are applied to samples, rows and shards
of the leaves. Define them at module level: each new function object is compiled again.

**On a mesh** (Auto or Explicit axes) each device counts its part, and one small
all-reduce per round adds the counts; masks have the sharding of their leaves. Limits:
within ``shard_map`` give ``axis_name``, or each shard selects on its own; a program for
several devices cannot be exported with ``jax.export``; the persistent compilation cache
needs JAX's option ``jax_remove_custom_partitioning_ptr_from_cache_key``; under ``vmap``
on several devices plain sums count, which is slower on CPU; a program without array
arguments, such as a jitted ``init`` of which only shapes are read, shows the
partitioner no mesh, and leaves are gathered first, with the same result.

- ``topk``: ``top_k_mask``, ``kth_largest``, ``select``, ``follow``, ``top_of_rows``.
- ``problem``, ``plan``: what was asked for: arguments, leaves, cells and pools.
- ``keys``: scores as integers of the same order.
- ``cut``, ``bracket``: the search for the threshold and for ties at it.
- ``follow``: the same search from where the last one ended.
- ``passes``, ``tally``: one counting pass over the leaves; integer statistics.
- ``leaf``: what a pass computes on one leaf, whichever it is.
- ``compilation``: what keeps programs over many leaves quick to compile.
- ``mesh``: the same on every device of a mesh, and under ``vmap``.
- ``uint64``: counts past 2^32 as pairs of uint32.
"""

from sparse_optax.selection.follow import Near as Near
from sparse_optax.selection.topk import Selection as Selection
from sparse_optax.selection.topk import follow as follow
from sparse_optax.selection.topk import kth_largest as kth_largest
from sparse_optax.selection.topk import nowhere as nowhere
from sparse_optax.selection.topk import select as select
from sparse_optax.selection.topk import top_k_mask as top_k_mask
from sparse_optax.selection.topk import top_of_rows as top_of_rows
