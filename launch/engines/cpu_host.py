"""All that Megatron-core and DeepSpeed need in order to run on a host without a GPU.

Each stand-in is a context manager and undone at its end. On a host with a GPU none of them is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megacomp.launch.engines._scoped import attribute


def no_current_cuda_device() -> str:
    """The stand-in for `torch.cuda.current_device`: a name every `device=` argument takes."""
    return "cpu"


@contextmanager
def megatron_without_cuda() -> Iterator[None]:
    """Megatron-core on CPU tensors, while a model is built and for as long as it runs.

    Megatron asks `torch.cuda.current_device()` where it allocates (KV cache, gathered activations, attention
    scores, rotary frequencies). The model must also be built with `use_cpu_initialization`, without fused
    kernels, be given its causal mask (the default one is made on "cuda"), and run with the inference RNG
    tracker, whose fork does not touch CUDA's generators.
    """
    with attribute(torch.cuda, "current_device", no_current_cuda_device):
        yield


@contextmanager
def deepspeed_on_cpu() -> Iterator[None]:
    """DeepSpeed imported to run on the CPU: it settles on its accelerator once, while it is imported.

    An accelerator the user has chosen (DS_ACCELERATOR) stays chosen.
    """
    if "DS_ACCELERATOR" in os.environ:
        yield
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        del os.environ["DS_ACCELERATOR"]


@contextmanager
def deepspeed_without_shared_memory() -> Iterator[None]:
    """DeepSpeed's communication set up on CPU without its own shared-memory all_reduce.

    That op is compiled at first use, crashes under torchrun unless LOCAL_SIZE is set, keeps the world size of
    its first use for the life of the process and takes no group. Without it DeepSpeed reduces over gloo, the
    transport the compressed collectives travel on as well: the two compare like with like.
    """
    import deepspeed.ops

    with attribute(deepspeed.ops, "__compatible_ops__", {"deepspeed_shm_comm": False}):
        yield
