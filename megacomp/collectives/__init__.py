"""Collectives whose bytes on the wire are a codec's, over any torch.distributed group.

Inside torch.compile they are operators of ``torch.ops.megacomp`` (operators.py): no graph breaks.
"""

from megacomp.collectives import operators  # noqa: F401 -- registers torch.ops.megacomp
from megacomp.collectives.all_gather import all_gather
from megacomp.collectives.all_reduce import all_reduce
from megacomp.collectives.all_reduce_norm import all_reduce_norm
from megacomp.collectives.deferred import DeferredPartial, materialized
from megacomp.collectives.message import CollectiveError
from megacomp.collectives.reduce_scatter import reduce_scatter
from megacomp.collectives.route import Algorithm, Route, choose_algorithm, choose_chunks
from megacomp.collectives.simulated import simulated_all_reduce
from megacomp.collectives.simulated_ranks import SimulatedGroup, SimulatedRanks
from megacomp.collectives.trace import Trace
from megacomp.collectives.traffic import Collective, Traffic, payload_ratio, wire_bytes

__all__ = [
    "Algorithm",
    "Collective",
    "CollectiveError",
    "DeferredPartial",
    "Route",
    "SimulatedGroup",
    "SimulatedRanks",
    "Trace",
    "Traffic",
    "all_gather",
    "all_reduce",
    "all_reduce_norm",
    "choose_algorithm",
    "choose_chunks",
    "materialized",
    "payload_ratio",
    "reduce_scatter",
    "simulated_all_reduce",
    "wire_bytes",
]
