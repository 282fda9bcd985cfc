"""The codec: rows of values to rows of bytes, and the sum of many such wires back to values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from megacomp.kernels import add_norm, sums_in_slices
from megacomp.kernels.backend import check_backend
from megacomp.kernels.dequant_gemm import dequant_gemm
from megacomp.kernels.grouped_weight import GroupedWeight

__all__ = ["DTYPES", "Codec", "canonical_json"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes a codec takes and returns."""


class Codec(ABC):
    """A codec; make one with :func:`megacomp.codecs.get`.

    The wire is row-wise: row ``r`` of the wire holds exactly row ``r`` of the tensor (codes, then what else is needed
    to read them, padded to 8 bytes), so any split of the rows is a slice of the wire. NaN and Inf come out as NaN;
    magnitudes beyond the format's range saturate.

    Inside torch.compile the operations are those of ``torch.ops.megacomp`` (operators.py): no graph breaks.

    Attributes:
        name: ``"mxfp4"``, ``"int4+rotation128"``...
        spec: the specification with every option explicit; JSON-serializable, accepted by ``get``.
        backend: ``"auto"``, ``"reference"``, ``"compiled"`` or ``"triton"``; all give the same bits.
        key: canonical JSON of all that decides its bits, and its backend, from which ``from_key`` makes it again.
        static: whether it needs tables from a calibration.
    """

    name: str
    spec: Mapping[str, object]
    backend: str
    key: str
    static: ClassVar[bool]

    def __str__(self) -> str:
        return self.name

    @property
    def summed(self) -> Codec:
        """The codec of sums of what this one encodes: a block codec makes no difference."""
        return self

    def sender(self, rank: int) -> Codec:
        """What rank ``rank`` of a group encodes its partials by: a block codec is the same on every rank."""
        return self

    @abstractmethod
    def with_backend(self, backend: str) -> Codec:
        """The same codec, computed by ``backend``."""

    @abstractmethod
    def row_bytes(self, features: int) -> int:
        """Bytes of one row of ``features`` values on the wire; a multiple of 8."""

    @abstractmethod
    def _encode(self, x: torch.Tensor, wire: torch.Tensor) -> None:
        """``encode`` of checked tensors."""

    @abstractmethod
    def _decode_sum(self, wires: torch.Tensor, out: torch.Tensor) -> None:
        """``decode_sum`` of checked tensors."""

    def check_message(self, features: int, wires: int, device: torch.device) -> None:
        """Raises what would keep this codec from a message, for a collective to know before it sends any of it.

        Args:
            features: values per row.
            wires: how many are decoded and summed together.
            device: where the tensors live.

        Raises:
            RuntimeError: the one backend that was asked for cannot run on ``device``.
            ValueError: the codec is not calibrated, or for other features or another number of wires.
        """
        check_backend(self.backend, device)

    def bits_per_value(self, features: int) -> float:
        """Bits on the wire per value, scales and padding included."""
        return 8 * self.row_bytes(features) / features

    def encode(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes a tensor.

        Args:
            x: bf16, fp16 or fp32 ``[rows, features]``, any strides; rows may be none.
            out: where to write: uint8 ``[rows, row_bytes]``, last dimension contiguous.

        Returns:
            The wire, uint8 ``[rows, row_bytes(features)]``.

        Raises:
            ValueError: a shape or dtype other than these.
        """
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"encode takes [rows, features] with at least one feature, not {list(x.shape)}")
        self._check_dtype(x.dtype)
        if torch.compiler.is_compiling():
            if out is None:
                return torch.ops.megacomp.encode(x.detach(), self.key)
            torch.ops.megacomp.encode_out(x.detach(), self.key, out)
            return out
        shape = (x.shape[0], self.row_bytes(x.shape[1]))
        if out is None:
            out = torch.empty(shape, dtype=torch.uint8, device=x.device)
        else:
            _check_wire("out", out, shape)
        self._encode(x.detach(), out)
        return out

    def encode_product(self, x: torch.Tensor, weight: GroupedWeight, out: torch.Tensor) -> None:
        """Encodes ``dequant_gemm(x, weight)`` into ``out``: the same bits, by one kernel where there is one.

        Args:
            x: bf16, fp16 or fp32 ``[rows, in_features]``, on the device of the weight.
            weight: see ``megacomp.kernels.dequant_gemm``.
            out: uint8 ``[rows, row_bytes(weight.out_features)]``, last dimension contiguous.

        Raises:
            ValueError: a dtype other than these, or another ``out``.
        """
        self._check_dtype(x.dtype)
        _check_wire("out", out, (x.shape[0], self.row_bytes(weight.out_features)))
        self._encode_product(x.detach(), weight, out)

    def _encode_product(self, x: torch.Tensor, weight: GroupedWeight, wire: torch.Tensor) -> None:
        """``encode_product`` of checked tensors, in its two steps."""
        self._encode(dequant_gemm(x, weight), wire)

    def decode_sum(
        self,
        wires: torch.Tensor,
        features: int,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decodes the wires of all peers and adds them: in float32, in the order given, rounded once.

        Args:
            wires: uint8 ``[peers, rows, row_bytes]``, last dimension contiguous, at least one peer.
            features: values per row.
            dtype: bf16, fp16 or fp32.
            out: where to write: ``dtype`` ``[rows, features]``, any strides.

        Returns:
            ``dtype`` ``[rows, features]``.

        Raises:
            ValueError: a shape or dtype other than these.
        """
        self._check_dtype(dtype)
        _check_peers(wires)
        if out is not None and (tuple(out.shape) != (wires.shape[1], features) or out.dtype is not dtype):
            raise ValueError(f"out must be {dtype} {[wires.shape[1], features]}, not {out.dtype} {list(out.shape)}")
        if torch.compiler.is_compiling():
            if out is None:
                return torch.ops.megacomp.decode_sum(wires, self.key, features, dtype)
            torch.ops.megacomp.decode_sum_out(wires, self.key, out)
            return out
        _check_wire("wires", wires, (*wires.shape[:2], self.row_bytes(features)))
        if out is None:
            out = torch.empty(wires.shape[1], features, dtype=dtype, device=wires.device)
        self._decode_sum(wires, out)
        return out

    def decode_sum_encode(
        self,
        wires: torch.Tensor,
        features: int,
        gather_codec: Codec,
        out: torch.Tensor | None = None,
        *,
        sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decodes the wires of all peers, adds them in float32 in the order given, and encodes the sum.

        The same bits as :meth:`decode_sum` into float32 and then ``gather_codec.encode``.

        Args:
            wires: uint8 ``[peers, rows, row_bytes]``, last dimension contiguous, at least one peer.
            features: values per row.
            gather_codec: the codec of the result. Its own backend encodes; but from one block codec to another this
                codec's does both.
            out: where to write: uint8 ``[rows, gather_codec.row_bytes(features)]``, last dimension contiguous.
            sums: a buffer to use where no kernel does it in one step; see ``megacomp.kernels.decode_sum_encode``.

        Returns:
            The sum's wire, uint8 ``[rows, gather_codec.row_bytes(features)]``.

        Raises:
            ValueError: a shape or dtype other than these.
        """
        _check_peers(wires)
        if torch.compiler.is_compiling():
            if out is None:
                return torch.ops.megacomp.decode_sum_encode(wires, self.key, features, gather_codec.key)
            torch.ops.megacomp.decode_sum_encode_out(wires, self.key, features, gather_codec.key, out)
            return out
        _check_wire("wires", wires, (*wires.shape[:2], self.row_bytes(features)))
        shape = (wires.shape[1], gather_codec.row_bytes(features))
        if out is None:
            out = torch.empty(shape, dtype=torch.uint8, device=wires.device)
        else:
            _check_wire("out", out, shape)
        self._decode_sum_encode(wires, features, gather_codec, out, sums)
        return out

    def _decode_sum_encode(
        self,
        wires: torch.Tensor,
        features: int,
        gather_codec: Codec,
        out: torch.Tensor,
        sums: torch.Tensor | None,
    ) -> None:
        """``decode_sum_encode`` of checked tensors, in its two steps."""
        for part, total in sums_in_slices(self._decode_sum, wires, features, sums):
            gather_codec._encode(total, out[part])

    def reduce_norm(
        self,
        wires: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        new_residual: torch.Tensor,
        normalized: torch.Tensor,
        bias: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> None:
        """new_residual = residual + sum(decode(wires)) + bias; normalized = RMSNorm(new_residual) * weight.

        Arguments as for :func:`megacomp.kernels.reduce_norm`.
        """
        for part, total in sums_in_slices(self._decode_sum, wires, residual.shape[1], sums):
            add_norm(total, residual[part], weight, eps, new_residual[part], normalized[part], bias)

    def decode(
        self,
        wire: torch.Tensor,
        features: int,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decodes one wire, uint8 ``[rows, row_bytes]``; :meth:`decode_sum` of one peer."""
        if wire.dim() != 2:
            raise ValueError(f"decode takes [rows, row_bytes], not {list(wire.shape)}")
        return self.decode_sum(wire.unsqueeze(0), features, dtype, out)

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in DTYPES:
            allowed = ", ".join(str(allowed).removeprefix("torch.") for allowed in DTYPES)
            raise ValueError(f"codec {self.name} takes {allowed}, not {str(dtype).removeprefix('torch.')}")


def _check_peers(wires: torch.Tensor) -> None:
    if wires.dim() != 3 or wires.shape[0] == 0:
        raise ValueError(f"the wires of all peers are [peers, rows, row_bytes], not {list(wires.shape)}")


def _check_wire(what: str, wire: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(wire.shape) != shape or wire.dtype is not torch.uint8:
        raise ValueError(f"{what} must be uint8 {list(shape)}, not {wire.dtype} {list(wire.shape)}")
    if wire.stride(-1) != 1 or any(stride % 8 for stride in wire.stride()[:-1]) or wire.data_ptr() % 8:
        raise ValueError(f"{what} must have contiguous rows that start at multiples of 8 bytes")


def canonical_json(options: Mapping[str, object]) -> str:
    """JSON of options, sorted; by hand, for torch.compile follows this and not the json module."""
    return "{" + ",".join(f'"{name}":{_json(options[name])}' for name in sorted(options)) + "}"


def _json(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
