"""What GPUs and links can do: every constant of the model in planning.py, each with its source.

Peaks are those of the vendors' data sheets, without sparsity. The share of a peak that is reached is one for all
GPUs: whoever knows theirs better gives `megacomp plan` their own numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Wiring = Literal["nvlink", "pcie", "network"]

COMPUTE_SHARE = 0.7
"""Of the bf16 peak in a GEMM of many tokens. Assumed: the best shapes reach 0.80 on an H100 SXM, 0.81 on an A100 PCIe,
0.87 on an A100 SXM (matmul measurements of github.com/stas00/ml-engineering, compute/accelerator); a rank's shards
are not the best shapes."""

MEMORY_SHARE = 0.85
"""Of the memory bandwidth in a kernel that streams. An H100's copies reach 2,903 of 3,350 GB/s, 0.867
(github.com/aigatech/vpbenchmarking)."""

ISSUE_SHARE = 0.5
"""Of the instructions a GPU can issue. Assumed, for what codecs execute is mostly integer arithmetic, which NVIDIA's
GPUs issue at half rate (docs/performance.md)."""

KERNEL_S = 5e-6
"""A kernel more on the stream: assumed, a few microseconds from one kernel's last block to the next one's first."""

ACTIVATION_PASSES = 10
"""How often an unfused Llama layer moves its activations [tokens, hidden] through memory beside its GEMMs, counted: two
norms read and write them (4), two residual additions read two and write one (6)."""

MLP_PASSES = 3
"""The same for [tokens, intermediate / ranks]: silu(gate) * up reads two and writes one."""


@dataclass(frozen=True)
class Gpu:
    """A GPU and the wire between several of them in one host.

    tflops: 10^12 dense bf16 operations per second.
    memory_gbs, memory_gb: bandwidth in 10^9 bytes per second; size in 10^9 bytes, None if unknown.
    issue: 10^12 thread instructions per second: multiprocessors x 128 lanes x boost clock.
    link: a key of LINKS.
    """

    name: str
    tflops: float
    memory_gbs: float
    memory_gb: float | None
    issue: float
    link: str


@dataclass(frozen=True)
class Link:
    """A way between GPUs, or between hosts.

    gbs: 10^9 bytes per second that a GPU (between hosts: a host) sends while it receives as many, as collectives
        reach it.
    wiring: whose latencies it has, see PROTOCOLS.
    hop_us: microseconds of each step in place of those of PROTOCOLS; None for theirs.
    gbs_beyond, within: `gbs` where a group is larger than `within` GPUs; None if that changes nothing.
    """

    name: str
    gbs: float
    wiring: Wiring
    hop_us: float | None = None
    gbs_beyond: float | None = None
    within: int | None = None

    def gbs_for(self, ranks: int) -> float:
        """`gbs` in a group of `ranks` GPUs of one host."""
        if self.gbs_beyond is not None and self.within is not None and ranks > self.within:
            return self.gbs_beyond
        return self.gbs


GPUS: dict[str, Gpu] = {
    # NVIDIA L4 data sheet: 242 TFLOPS bf16 with sparsity, 300 GB/s, 24 GB, PCIe Gen4 x16; 58 SMs to 2.04 GHz.
    # A card of 72 W does not hold its boost clock in GEMMs: expect computing to take longer than predicted.
    "l4-pcie": Gpu("NVIDIA L4", 121, 300, 24, 15.1, "pcie4"),
    # NVIDIA L40S data sheet: 362 TFLOPS, 864 GB/s, 48 GB, PCIe Gen4 x16; 142 SMs to 2.52 GHz.
    "l40s-pcie": Gpu("NVIDIA L40S", 362, 864, 48, 45.8, "pcie4"),
    # NVIDIA A100 data sheet (80 GB): 312 TFLOPS; PCIe 1,935 GB/s, SXM 2,039 GB/s and NVLink 600 GB/s both ways
    # together; 108 SMs to 1.41 GHz.
    "a100-pcie": Gpu("NVIDIA A100 PCIe 80 GB", 312, 1935, 80, 19.5, "pcie4"),
    "a100-nvlink": Gpu("NVIDIA A100 SXM 80 GB", 312, 2039, 80, 19.5, "nvlink3"),
    # NVIDIA H100 data sheet (SXM): 1,979 TFLOPS with sparsity, 3.35 TB/s, 80 GB, NVLink 900 GB/s; 132 SMs to 1.98 GHz.
    "h100-nvlink": Gpu("NVIDIA H100 SXM", 989, 3350, 80, 33.5, "nvlink4"),
    # NVIDIA H200 data sheet: computes as an H100; 4.8 TB/s, 141 GB.
    "h200-nvlink": Gpu("NVIDIA H200 SXM", 989, 4800, 141, 33.5, "nvlink4"),
}

LINKS: dict[str, Link] = {
    # NCCL counts 12 GB/s for PCIe Gen3 x16 (src/graph/topo.h, PCI_BW), so 24 for Gen4, 75 % of the 32 of the standard;
    # and 10 between the sockets of Intel's Skylake and Cascade Lake (SKL_QPI_BW; 22 for later ones, SRP_QPI_BW).
    # Assumed: four GPUs to a socket, and sockets of the slower kind.
    "pcie4": Link("PCIe Gen4 x16, four GPUs to a socket", 24, "pcie", gbs_beyond=10, within=4),
    # 300 GB/s each way by the data sheet; NCCL takes 235 (src/graph/tuning.cc, compCap80), 78 %.
    "nvlink3": Link("NVLink 3", 235, "nvlink"),
    # 450 GB/s each way; all_reduce on 8 x H200 without SHARP measured 367.6, 82 %
    # (github.com/stas00/ml-engineering, network/benchmarks/results/all-reduce-8xH200.md).
    "nvlink4": Link("NVLink 4", 368, "nvlink"),
    # One port to a host. TCP through the kernel: 94 % of the bits are payload in frames of 1500 bytes, of which sockets
    # carry all at 10 Gbit/s and less, and (assumed) three quarters above; a step of 30 us is assumed.
    "ethernet-1g": Link("1 Gbit/s Ethernet", 0.117, "network", hop_us=30),
    "ethernet-10g": Link("10 Gbit/s Ethernet", 1.17, "network", hop_us=30),
    "ethernet-25g": Link("25 Gbit/s Ethernet", 2.2, "network", hop_us=30),
    "ethernet-100g": Link("100 Gbit/s Ethernet", 8.8, "network", hop_us=30),
    # One port to a host, RDMA. NCCL counts 12 GB/s for 100 Gbit/s (src/graph/topo.h, NET_BW), 96 %.
    "infiniband-200g": Link("200 Gbit/s InfiniBand (HDR)", 24, "network"),
    "infiniband-400g": Link("400 Gbit/s InfiniBand (NDR)", 48, "network"),
    # A port for each of a host's eight GPUs, as in DGX H100 (its data sheet).
    "infiniband-8x400g": Link("8 x 400 Gbit/s InfiniBand (NDR)", 384, "network"),
}

INSTRUCTIONS_ENCODE, INSTRUCTIONS_ENCODE_ROW_SCALE = 15.5, 23.0
"""Instructions per value: mxfp4, and formats with a scale per row (nvfp4). These and the next from
benchmarks/results/compile.json, read from sm_80 and sm_90 code; int8 needs 10."""
INSTRUCTIONS_SEARCH, INSTRUCTIONS_ROTATION = 67.0, 10.5
"""Beyond that, for a scale search (int4: 83), and for a rotation, when encoding and once when decoding."""
INSTRUCTIONS_DECODE = 6.5
"""To decode and add one peer's value."""
INSTRUCTIONS_ENCODE_STATIC, INSTRUCTIONS_DECODE_STATIC = 40.5, 10.5
"""The same of static4; static4_paper needs 36 and 8."""


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's: microseconds of a collective, and of each of its steps; the share of the bandwidth it uses."""

    base_us: float
    hop_us: dict[Wiring, float]
    reduce_share: float
    gather_share: float


PROTOCOLS: tuple[Protocol, ...] = (
    # What NCCL itself chooses by: src/graph/tuning.cc, rows "Ring" of baseLat and hwLat. LL sends a flag with every
    # word, LL128 one with every 120 bytes, over NVLink only; Simple synchronizes.
    Protocol(3.6, {"nvlink": 0.47, "pcie": 1.0, "network": 2.7}, 1 / 4, 1 / 3),
    Protocol(10.0, {"nvlink": 1.9}, 0.92, 0.92),
    Protocol(8.4, {"nvlink": 3.4, "pcie": 5.7, "network": 9.6}, 1, 1),
)
