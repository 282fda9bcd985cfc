"""encode: a partial ``[rows, features]`` -> its wire ``uint8[rows, row_bytes]``."""

from __future__ import annotations

import torch

from megacomp.kernels.backend import resolve_backend
from megacomp.kernels.block_format import BlockFormat, WireFields
from megacomp.kernels.compiled import run_compiled
from megacomp.kernels.elements import FloatElement, IntElement
from megacomp.kernels.packing import pack, pieces_per_block
from megacomp.kernels.rotation import hadamard
from megacomp.kernels.scales import PowerOfTwoScale, RealScale, floor_log2, safe_reciprocal

__all__ = ["encode", "encode_definition"]

SHRINK_FACTORS = (0.95, 0.9, 0.85, 0.8)
"""Clipping candidates of the scale search, relative to the scale that clips nothing."""

LARGEST_MAGNITUDE = 2.0**127
"""Where blocks with a floating-point scale saturate (asymmetric ones at half of it)."""

_ERROR_RESOLUTION = 128
_LARGEST_ERROR = 362
"""Search errors are counted in whole 1/128 of the element's coarsest step and capped at 362 of them (2.8 steps):
128 squares of 362 stay below 2**24, so a block's sum is exact in float32 in whatever order it is formed."""


def encode(format: BlockFormat, x: torch.Tensor, wire: torch.Tensor, backend: str) -> None:
    """wire = encode(x).

    Args:
        format: the block format.
        x: bf16, fp16 or fp32 ``[rows, features]``, any strides.
        wire: uint8 ``[rows, format.row_bytes(features)]``, rows contiguous, written whole.
        backend: one of ``megacomp.kernels.backend.BACKENDS``.
    """
    rows, features = x.shape
    if rows == 0:
        return
    fields = format.fields(wire, features)
    format.clear_padding(wire, features)
    missing = format.padded_features(features) - features
    x = torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()
    if resolve_backend(backend, x.device, rows) == "compiled":
        run_compiled(encode_definition, format, features, x, fields)
    else:
        encode_definition(format, x, fields)


def encode_definition(format: BlockFormat, x: torch.Tensor, fields: WireFields) -> list[torch.Tensor]:
    """The definition of encode, in PyTorch; what every backend equals bit for bit.

    1. Rotate, if the format does. 2. Take each block's extremes; a block with a NaN or Inf gets a NaN scale and the
    codes of zeros. 3. Choose the scale and store it. 4. Multiply by its reciprocal, round, pack, store.

    Args:
        format: the block format.
        x: bf16, fp16 or fp32 ``[rows, padded_features]``, contiguous.
        fields: the views of the wire, written.

    Returns:
        The per-block intermediates; of no interest to a caller, but as outputs of a compiled graph they are
        computed once per block and not again for every value.
    """
    rows, element, scale = x.shape[0], format.element, format.scale
    values = x.to(torch.float32)
    if format.rotation:
        values = hadamard(values, format.rotation)
    values = values.view(rows, -1, format.block_size)
    highest, lowest = values.amax(-1), values.amin(-1)
    amax = torch.maximum(highest, -lowest).abs()
    finite = amax < torch.inf
    amax, highest, lowest = (torch.where(finite, extreme, 0.0) for extreme in (amax, highest, lowest))
    values = torch.where(values.abs() < torch.inf, values, 0.0)

    per_block: list[torch.Tensor] = []
    minimum = None
    if isinstance(scale, PowerOfTwoScale):
        code = _choose_exponent(format, values, amax, per_block)
        code = torch.where(finite, code, scale.nan_code)
        inverse = scale.reciprocal(code)
        _store_exponents(scale, code, fields.scales)
    else:
        # What a rounded-up scale decodes to must stay finite, and so must an asymmetric block's span.
        limit = LARGEST_MAGNITUDE / 2 if format.asymmetric else LARGEST_MAGNITUDE
        highest, lowest = highest.clamp(-limit, limit), lowest.clamp(-limit, limit)
        row_scale = None
        if fields.minimums is not None:
            bits, minimum_bits = _asymmetric_scale(format, highest, lowest)
            fields.minimums.copy_(minimum_bits)
            minimum = scale.value(minimum_bits)
        else:
            if fields.row_scales is not None:
                row_scale = amax.clamp(max=limit).amax(-1, keepdim=True) / (scale.max_value * _full_range(element))
                fields.row_scales.copy_(row_scale)
            bits = _choose_scale(format, values, highest, lowest, row_scale, per_block)
        inverse = safe_reciprocal(scale.value(bits) if row_scale is None else scale.value(bits) * row_scale)
        fields.scales[0].copy_(torch.where(finite, bits, scale.nan_bits))

    codes = []
    for piece in values.chunk(pieces_per_block(element.bits), dim=-1):
        if minimum is None:
            codes.append(element.quantize(piece * inverse.unsqueeze(-1)))
        else:
            steps = torch.round((piece - minimum.unsqueeze(-1)) * inverse.unsqueeze(-1))
            codes.append(steps.clamp(0.0, 2.0**element.bits - 1))
    for field, plane in zip(fields.planes, pack(codes, element.bits), strict=True):
        field.copy_(plane.view(rows, -1))
    return [inverse, *per_block]


def _block_error(element: FloatElement | IntElement, y: torch.Tensor) -> torch.Tensor:
    """Squared rounding error of scaled blocks ``y`` ``[rows, blocks, block]`` -> ``[rows, blocks]``."""
    error = y - element.dequantize(element.quantize(y))
    steps = torch.round(error * (_ERROR_RESOLUTION / element.top_step)).clamp(-_LARGEST_ERROR, _LARGEST_ERROR)
    return (steps * steps).sum(-1)


def _choose_exponent(
    format: BlockFormat, values: torch.Tensor, amax: torch.Tensor, per_block: list[torch.Tensor]
) -> torch.Tensor:
    """int32 exponent codes ``[rows, blocks]``.

    floor(log2(amax)) - emax (OCP MX v1.0, section 6.3), or with ``search`` one more where that errs less.
    """
    scale = format.scale
    assert isinstance(scale, PowerOfTwoScale)
    exponent = floor_log2(amax) - format.element.max_exponent
    code = scale.code_of_exponent(exponent)
    if not format.search:
        return code
    # Beyond float32's own range the wider scale would decode to Inf.
    wider = scale.code_of_exponent((exponent + 1).clamp(max=127 - format.element.max_exponent))
    inverses = [scale.reciprocal(candidate) for candidate in (code, wider)]
    per_block += inverses
    errors = [_block_error(format.element, values * inverse.unsqueeze(-1)) for inverse in inverses]
    # A step of the wider scale is twice as long, its square four times.
    return torch.where(errors[1] * 4.0 < errors[0], wider, code)


def _full_range(element: FloatElement | IntElement) -> float:
    """The magnitude to which a block's extreme is scaled: integers reach their lowest value (signed max)."""
    return element.zero_code if isinstance(element, IntElement) else element.max_value


def _choose_scale(
    format: BlockFormat,
    values: torch.Tensor,
    highest: torch.Tensor,
    lowest: torch.Tensor,
    row_scale: torch.Tensor | None,
    per_block: list[torch.Tensor],
) -> torch.Tensor:
    """The bits of the block scales ``[rows, blocks]`` (of multiples of ``row_scale``, if any).

    The scale that brings the extreme to the end of the element's range; for integers with the extreme's sign
    reversed, so that it lands on the lowest value, which has no positive twin. With ``search``, the least squared
    error of that one, its shrunken versions and, for integers, the scale of the symmetric range; the first wins
    ties.
    """
    scale, element = format.scale, format.element
    assert isinstance(scale, RealScale)
    amax = torch.maximum(highest, -lowest)
    signed = torch.where(highest >= -lowest, -highest, -lowest) if isinstance(element, IntElement) else amax
    exact = signed / _full_range(element)
    candidates = [exact]
    if format.search:
        candidates += [exact * factor for factor in SHRINK_FACTORS]
        if isinstance(element, IntElement):
            candidates.append(amax / element.max_value)
    if row_scale is not None:
        inverse_row_scale = safe_reciprocal(row_scale)
        candidates = [candidate * inverse_row_scale for candidate in candidates]
    stored = [scale.round(candidate) for candidate in candidates]
    if not format.search:
        return stored[0]

    effective = [scale.value(bits) for bits in stored]
    if row_scale is not None:
        effective = [multiple * row_scale for multiple in effective]
    inverses = [safe_reciprocal(candidate) for candidate in effective]
    per_block += inverses
    best, least = stored[0], _block_error(element, values * inverses[0].unsqueeze(-1))
    for index in range(1, len(stored)):
        ratio = effective[index] * inverses[0]
        error = _block_error(element, values * inverses[index].unsqueeze(-1)) * (ratio * ratio)
        better = (error < least) & (inverses[index] != 0)
        best, least = torch.where(better, stored[index], best), torch.where(better, error, least)
    return best


def _asymmetric_scale(
    format: BlockFormat, highest: torch.Tensor, lowest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of (scales, minimums), ``[rows, blocks]``."""
    assert isinstance(format.scale, RealScale)
    steps = 2.0**format.element.bits - 1
    # Divided before subtracting: the span of two large finite values may not be finite.
    return format.scale.round(highest / steps - lowest / steps), format.scale.round(lowest)


def _store_exponents(scale: PowerOfTwoScale, code: torch.Tensor, fields: tuple[torch.Tensor, ...]) -> None:
    pieces = pieces_per_block(scale.bits)
    missing = -code.shape[-1] % 8
    padded = torch.nn.functional.pad(code, (0, missing)) if missing and pieces > 1 else code
    planes = pack(padded.to(torch.float32).chunk(pieces, dim=-1), scale.bits)
    for field, plane in zip(fields, planes, strict=True):
        field.copy_(plane)
