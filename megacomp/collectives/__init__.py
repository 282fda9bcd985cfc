"""Collectives whose bytes on the wire are a codec's, over any torch.distributed group.

torch.compile runs them as they are, with a graph break: nothing in them is to be traced.
"""

from megacomp.collectives.all_gather import all_gather
from megacomp.collectives.all_reduce import all_reduce
from megacomp.collectives.reduce_scatter import reduce_scatter
from megacomp.collectives.route import Algorithm, Route, choose_algorithm, choose_chunks
from megacomp.collectives.trace import Trace
from megacomp.collectives.traffic import Collective, Traffic, payload_ratio, wire_bytes

__all__ = [
    "Algorithm",
    "Collective",
    "Route",
    "Trace",
    "Traffic",
    "all_gather",
    "all_reduce",
    "choose_algorithm",
    "choose_chunks",
    "payload_ratio",
    "reduce_scatter",
    "wire_bytes",
]
