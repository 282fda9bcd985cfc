"""The codecs' operations as PyTorch operators, so that torch.compile and CUDA graphs pass through them.

``torch.ops.megacomp.encode``, ``decode_sum``, ``decode_sum_encode``, and each with ``_out``. A codec travels in their
schemas as its ``key``. A :class:`Codec` calls them only while something compiles: called eagerly they would cost tens
of microseconds and gain nothing. Rows may be dynamic; every number of features is compiled for itself, as the
kernels are.
"""

from __future__ import annotations

import torch

from megacomp.codecs.specification import from_key

__all__: list[str] = []


@torch.library.custom_op("megacomp::encode", mutates_args=(), schema="(Tensor x, str codec) -> Tensor")
def encode(x: torch.Tensor, codec: str) -> torch.Tensor:
    """The wire of ``x``."""
    return from_key(codec).encode(x)


@encode.register_fake
def _(x: torch.Tensor, codec: str) -> torch.Tensor:
    rows, features = x.shape
    return x.new_empty((rows, from_key(codec).row_bytes(int(features))), dtype=torch.uint8)


@torch.library.custom_op(
    "megacomp::encode_out", mutates_args=("out",), schema="(Tensor x, str codec, Tensor(a!) out) -> ()"
)
def encode_out(x: torch.Tensor, codec: str, out: torch.Tensor) -> None:
    """The wire of ``x``, into ``out``."""
    from_key(codec).encode(x, out)


@torch.library.custom_op(
    "megacomp::decode_sum",
    mutates_args=(),
    schema="(Tensor wires, str codec, SymInt features, ScalarType dtype) -> Tensor",
)
def decode_sum(wires: torch.Tensor, codec: str, features: int, dtype: torch.dtype) -> torch.Tensor:
    """The sum of what ``wires`` hold."""
    return from_key(codec).decode_sum(wires, features, dtype)


@decode_sum.register_fake
def _(wires: torch.Tensor, codec: str, features: int, dtype: torch.dtype) -> torch.Tensor:
    return wires.new_empty((wires.shape[1], features), dtype=dtype)


@torch.library.custom_op(
    "megacomp::decode_sum_out", mutates_args=("out",), schema="(Tensor wires, str codec, Tensor(a!) out) -> ()"
)
def decode_sum_out(wires: torch.Tensor, codec: str, out: torch.Tensor) -> None:
    """The sum of what ``wires`` hold, into ``out``."""
    from_key(codec).decode_sum(wires, out.shape[1], out.dtype, out)


@torch.library.custom_op(
    "megacomp::decode_sum_encode",
    mutates_args=(),
    schema="(Tensor wires, str codec, SymInt features, str gather_codec) -> Tensor",
)
def decode_sum_encode(wires: torch.Tensor, codec: str, features: int, gather_codec: str) -> torch.Tensor:
    """The wire of the sum of what ``wires`` hold."""
    return from_key(codec).decode_sum_encode(wires, features, from_key(gather_codec))


@decode_sum_encode.register_fake
def _(wires: torch.Tensor, codec: str, features: int, gather_codec: str) -> torch.Tensor:
    return wires.new_empty((wires.shape[1], from_key(gather_codec).row_bytes(int(features))))


@torch.library.custom_op(
    "megacomp::decode_sum_encode_out",
    mutates_args=("out",),
    schema="(Tensor wires, str codec, SymInt features, str gather_codec, Tensor(a!) out) -> ()",
)
def decode_sum_encode_out(wires: torch.Tensor, codec: str, features: int, gather_codec: str, out: torch.Tensor) -> None:
    """The wire of the sum of what ``wires`` hold, into ``out``."""
    from_key(codec).decode_sum_encode(wires, features, from_key(gather_codec), out)


@encode_out.register_fake
@decode_sum_out.register_fake
@decode_sum_encode_out.register_fake
def _(*args: object) -> None:
    """What writes into its last argument makes nothing."""
