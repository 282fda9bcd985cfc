"""A partial that is not there yet, so that a collective can have it encoded where it is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from megacomp.codecs import Codec

__all__ = ["DeferredPartial", "materialized"]


class DeferredPartial(torch.Tensor):
    """A tensor that is computed when it is first needed, unless a collective takes it to the wire before.

    Frameworks hand the partial from the layer that computes it to the collective that reduces it: this goes the same
    way. Whatever operation meets it meets the tensor; what takes it apart without an operation (a pointer passed to
    foreign code) needs `materialized`.
    """

    @staticmethod
    def __new__(
        cls,
        like: torch.Tensor,
        shape: Sequence[int],
        compute: Callable[[], torch.Tensor],
        encode: Callable[[Codec, torch.Tensor], None],
    ) -> DeferredPartial:
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(cls, tuple(shape), dtype=like.dtype, device=like.device)

    def __init__(
        self,
        like: torch.Tensor,
        shape: Sequence[int],
        compute: Callable[[], torch.Tensor],
        encode: Callable[[Codec, torch.Tensor], None],
    ) -> None:
        """
        like: of its dtype and device. shape: [..., features].
        compute: gives the tensor, contiguous.
        encode: writes all its rows, encoded by a codec, to a wire: the bits that the codec makes of the tensor.
        """
        self._compute = compute
        self._encode = encode
        self._tensor: torch.Tensor | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """What it stands for; computed once."""
        if self._tensor is None:
            # In the mode of its making: of a tensor of the other kind autograd takes no views.
            with torch.inference_mode(self.is_inference()), torch.no_grad():
                self._tensor = self._compute()
        return self._tensor

    def encode_rows(self, codec: Codec, rows: range, wire: torch.Tensor) -> None:
        """Write `rows` of it as [rows, features], encoded by `codec`, to `wire`.

        The tensor is left out if all rows are wanted at once: to compute it part by part, a GEMM would read its
        weight as many times.
        """
        features = self.shape[-1]
        if self._tensor is None and len(rows) * features == self.numel():
            self._encode(codec, wire)
        else:
            codec.encode(self.tensor.view(-1, features)[rows.start : rows.stop], out=wire)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stubs have that of the default, which is no classmethod
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, materialized, (args, kwargs or {}))
        return func(*args, **kwargs)


def materialized(x: torch.Tensor) -> torch.Tensor:
    """`x`, or the tensor that it stands for."""
    return x.tensor if isinstance(x, DeferredPartial) else x
