"""What a run did, layer by layer: exact counts, scalars for loggers, a text table.

``summary`` reads parameters and optimizer state between two steps and changes neither.
One compiled call counts on the devices that hold the weights.

- ``summaries``: ``summary``: counts of a run, layer by layer.
- ``eligibility``: which leaves are made sparse, and why.
- ``metrics``: ``metrics``: counts as scalars on the device, inside a step.
- ``records``: ``Layer`` and ``Summary``; as scalars and as a table.
- ``ensembles``: ``same_masks``: whether the members of an ensemble hold one mask.
"""

from sparse_optax.report.eligibility import Eligibility as Eligibility
from sparse_optax.report.eligibility import eligibility as eligibility
from sparse_optax.report.ensembles import same_masks as same_masks
from sparse_optax.report.metrics import metrics as metrics
from sparse_optax.report.records import Layer as Layer
from sparse_optax.report.records import Summary as Summary
from sparse_optax.report.records import scalars as scalars
from sparse_optax.report.records import table as table
from sparse_optax.report.summaries import explore as explore
from sparse_optax.report.summaries import summary as summary
