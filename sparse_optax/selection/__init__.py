"""Exact k-th largest and top-k masks over a pytree: no sort, any k, any sharding.

Everything in sparse training reduces to "the k largest scores of a tree". Here the
threshold is bracketed (from a sample, or from a guess), a few thresholds at a time
are counted in one pass over the leaves, and the bracket narrows until it is exact.
About four such passes find it; nothing is sorted, concatenated or stored.

**The order.** Scores rank from high to low: NaN of either sign first (all equal),
then +inf, finite values, -inf; +0 and -0 are equal, subnormals are not zero. Equal
scores rank by leaf, in the order in which JAX flattens the tree, then by row-major
index within the leaf. The k first are the selection, so that it is unique, and bit
for bit the same on one device and on any mesh.

**Score functions** must be element-wise: they are applied to samples, to rows and
to shards of the leaves, inside of the loop. They should be functions at module
level, since each new function object is compiled anew.

**On a mesh** (Auto or Explicit axes) each device counts its own part, and one small
all-reduce a round adds the counts; masks have the sharding of their leaves. Edges that
are known: inside ``shard_map`` give ``axis_name``, or each shard selects alone; a
program for several devices cannot go through ``jax.export``; and the persistent
compilation cache finds it again only with the option
``jax_remove_custom_partitioning_ptr_from_cache_key`` of JAX. Under ``vmap`` on several
devices plain sums do the counting, which is slower on CPU. A program that gets no array
from outside, such as a jitted ``init`` of which only shapes are read, shows no mesh to
the partitioner: there leaves are gathered first, with the same result.
"""

from sparse_optax.selection.rows import top_of_rows as top_of_rows
from sparse_optax.selection.topk import Selection as Selection
from sparse_optax.selection.topk import kth_largest as kth_largest
from sparse_optax.selection.topk import select as select
from sparse_optax.selection.topk import top_k_mask as top_k_mask
