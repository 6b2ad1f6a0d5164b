"""What a run did, layer by layer: exact counts, a dict for loggers, a table for people.

``summary`` reads parameters and, where there is one, the optimizer state, between two
steps; it changes neither. Counts are taken on the devices that hold the weights, in
one compiled call, and come back as Python integers.
"""

from sparse_optax.report.records import Layer as Layer
from sparse_optax.report.records import Summary as Summary
from sparse_optax.report.records import scalars as scalars
from sparse_optax.report.records import table as table
from sparse_optax.report.summaries import explore as explore
from sparse_optax.report.summaries import summary as summary
