"""Transformer Engine: where the linear layers of its PyTorch modules communicate.

Megatron-core's `transformer_engine` layers (TERowParallelLinear and its neighbours) inherit Transformer Engine's,
which reduce without Megatron's mappings. The cut is the same, one level lower: when a layer runs, the module
`transformer_engine.pytorch.module.linear` looks its collectives up in its own globals, after the product and before
the bias, which therefore is added once and by Transformer Engine as ever, sequence parallel or not. Patching them where
they are defined, in `transformer_engine.pytorch.distributed`, would have no effect: the names are bound at import. The
forward of `Linear` says which layer runs; which site that is, whoever built the model knows (`Megatron.sites`).

Left exact: FP8 gathers (their tensors are quantized already), attention across context-parallel ranks, backward passes.
Not seen at all, and listed by `not_covered`: reductions overlapped with the product (userbuffers), reductions in
symmetric memory, LayerNormMLP and the operations of TEFusedMLP.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from megacomp.patches.framework import Framework, layer_forward
from megacomp.patches.patch import Patch

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from megacomp.door import Door
    from megacomp.gptq import QuantizedLinear
    from megacomp.patches.quantization import ParallelLinear
    from megacomp.policy import Site

__all__ = ["TransformerEngine", "gather_with_handle", "reduce_with_handle"]


class TransformerEngine(Framework):
    """Transformer Engine 1.13 to 2, `Linear` and `LayerNormLinear`.

    Nobody has run this on the GPUs it needs: its own Python code was, 2.4 to 2.20, with products by torch on a CPU. All
    of 2 is taken, for others import it too (accelerate does): a release nobody read must not stop who never uses it.
    """

    name = "transformer-engine"
    # Complete once its compiled part has been loaded; without that part the outer package imports all the same.
    module = "transformer_engine.pytorch"
    supported = ">=1.13,<3"

    @property
    def version(self) -> str:
        """Its version; asked of the installation, for the package itself says it only after this module is imported."""
        return importlib.metadata.version("transformer_engine")

    def patches(self, door: Door) -> list[Patch]:
        """The forwards that say where we are first, then the collectives."""
        linear = "transformer_engine.pytorch.module.linear"
        layernorm_linear = "transformer_engine.pytorch.module.layernorm_linear"
        patches = [
            Patch(f"{linear}.Linear.forward", partial(layer_forward, door)),
            Patch(f"{linear}.allreduce", partial(reduce_with_handle, door, "all_reduce")),
            Patch(f"{linear}.reduce_scatter_along_first_dim", partial(reduce_with_handle, door, "reduce_scatter")),
        ]
        if "all_gather" in door.config.communication.collectives:
            patches += [
                Patch(f"{layernorm_linear}.LayerNormLinear.forward", partial(layer_forward, door)),
                Patch(f"{linear}.gather_along_first_dim", partial(gather_with_handle, door)),
                Patch(f"{layernorm_linear}.gather_along_first_dim", partial(gather_with_handle, door)),
            ]
        return patches

    def sites(self, model: torch.nn.Module) -> dict[torch.nn.Module, Site]:
        """None: its layers are named by the framework that builds a model of them."""
        return {}

    def not_covered(self, model: torch.nn.Module) -> dict[str, str]:
        """Row-parallel layers that reduce by other means, and modules that hold several layers in one."""
        found = {}
        for name, module in model.named_modules():
            kind = type(module).__name__
            if kind in ("LayerNormMLP", "TEFusedMLP"):
                found[name] = f"{kind}: its reduction is one of Transformer Engine's fused operations"
            elif getattr(module, "parallel_mode", None) != "row":
                continue
            elif getattr(module, "ub_overlap_rs_fprop", False):
                found[name] = f"{kind}: its reduction is overlapped with the product (tp_comm_overlap)"
            elif getattr(module, "symmetric_ar_type", None) is not None:
                found[name] = f"{kind}: it reduces in symmetric memory (symmetric_ar_type)"
        return found

    def ranks(self, model: torch.nn.Module) -> None:
        """Unknown here."""
        return None

    def parallel_linears(self, model: torch.nn.Module) -> list[ParallelLinear]:
        """None of them may be replaced."""
        return []

    def elsewhere(self, models: Sequence[torch.nn.Module]) -> tuple[str, ...]:
        """Unknown here."""
        return ()

    def quantized_layer(
        self, layer: torch.nn.Module, linear: QuantizedLinear, bias: torch.Tensor | None
    ) -> torch.nn.Module:
        """Never called, for there are no `parallel_linears`."""
        raise TypeError(f"{type(layer).__name__}: layers of Transformer Engine are not replaced")


def reduce_with_handle(
    door: Door, collective: Literal["all_reduce", "reduce_scatter"], original: Callable[..., Any]
) -> Callable[..., Any]:
    """Covers `allreduce` and `reduce_scatter_along_first_dim` of Transformer Engine, as a module imported them.

    Both answer (tensor, handle), the handle None for a reduction that is done. Those asked to go on by themselves
    (`async_op`, in backward passes) are left to the original.
    """

    def reduce(
        inp: torch.Tensor, tp_group: dist.ProcessGroup | None = None, async_op: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        result = None if async_op or tp_group is None else door(collective, inp, tp_group)
        return original(inp, tp_group, async_op, **kwargs) if result is None else (result, None)

    return reduce


def gather_with_handle(door: Door, original: Callable[..., Any]) -> Callable[..., Any]:
    """Covers `gather_along_first_dim` of Transformer Engine, as a module imported it.

    Left to the original: what goes on by itself (`async_op`), and what Transformer Engine quantizes (`quantizer`).
    """

    def gather(
        inp: torch.Tensor,
        process_group: dist.ProcessGroup | None,
        async_op: bool = False,
        quantizer: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        result = None
        if process_group is not None and quantizer is None and not async_op:
            result = door("all_gather", inp, process_group)
        if result is not None:
            return result, None
        # 1.13 knows no quantizer.
        given = {} if quantizer is None else {"quantizer": quantizer}
        return original(inp, process_group, async_op, **given, **kwargs)

    return gather
