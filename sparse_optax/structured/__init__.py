"""Whole channels, units and heads, kept or removed together with all that needs them.

- ``channels``: which slices of which leaves are one unit, read from the traced program.
- ``pruning``: transformations that prune such units while the network trains.
"""

from sparse_optax.structured.channels import ChannelGroup as ChannelGroup
from sparse_optax.structured.channels import Channels as Channels
from sparse_optax.structured.channels import channels as channels
from sparse_optax.structured.pruning import GateState as GateState
from sparse_optax.structured.pruning import gate_channels as gate_channels
from sparse_optax.structured.pruning import gradual_channels as gradual_channels
