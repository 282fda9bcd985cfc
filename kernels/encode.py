"""encode: a partial ``[rows, features]`` -> its wire ``uint8[rows, row_bytes]``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megacomp.kernels.backend import resolve_backend
from megacomp.kernels.block_format import BlockFormat, WireFields, WireLayout
from megacomp.kernels.compiled import run_compiled
from megacomp.kernels.elements import (
    ROUNDING,
    ROUNDING_BITS,
    IntElement,
    quantize_codes,
    round_to_element,
)
from megacomp.kernels.launch_config import launch_config, on_device_of
from megacomp.kernels.packing import pack, pack_codes, pieces_per_block
from megacomp.kernels.rotation import hadamard, rotate_pieces
from megacomp.kernels.scales import (
    PowerOfTwoScale,
    RealScale,
    exponent_code,
    exponent_reciprocal,
    floor_log2,
    reciprocal_or_zero,
    round_scale,
    safe_reciprocal,
    scale_value,
)
from megacomp.kernels.tiles import clear_bytes, load_pieces, locate, store_bytes

__all__ = ["encode", "encode_definition"]


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
    resolved = resolve_backend(backend, "encode", format, features, rows, x.device)
    if resolved == "triton":
        _encode_triton(format, x, wire)
        return
    fields = format.fields(wire, features)
    format.clear_padding(wire, features)
    missing = format.padded_features(features) - features
    x = torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()
    if resolved == "compiled":
        run_compiled(encode_definition, format, features, x, fields)
    else:
        encode_definition(format, x, fields)


def encode_definition(format: BlockFormat, x: torch.Tensor, fields: WireFields) -> list[torch.Tensor]:
    """The definition of encode, in PyTorch; what every backend equals bit for bit.

    Constants multiply by their reciprocals, as CUDA's division by them does: the same bits on every device.

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
    if element.integer and not scale.power_of_two:
        highest, lowest = values.amax(-1), values.amin(-1)
        amax = torch.maximum(highest, -lowest).abs()
    else:  # signs do not matter, and reducing within a block is what costs most
        amax = values.abs().amax(-1)
        highest, lowest = amax, -amax
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
        limit = format.saturation
        highest, lowest = highest.clamp(-limit, limit), lowest.clamp(-limit, limit)
        row_scale = None
        if fields.minimums is not None:
            bits, minimum_bits = _asymmetric_scale(format, highest, lowest)
            fields.minimums.copy_(minimum_bits)
            minimum = scale.value(minimum_bits)
        else:
            if fields.row_scales is not None:
                row_scale = amax.clamp(max=limit).amax(-1, keepdim=True) * (1 / (scale.max_value * format.full_range))
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


def _block_error(format: BlockFormat, y: torch.Tensor) -> torch.Tensor:
    """Squared rounding error of scaled blocks ``y`` ``[rows, blocks, block]`` -> ``[rows, blocks]``."""
    error = y - format.element.dequantize(format.element.quantize(y))
    steps = torch.round(error * format.error_resolution).clamp(-format.largest_error, format.largest_error)
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
    errors = [_block_error(format, values * inverse.unsqueeze(-1)) for inverse in inverses]
    # A step of the wider scale is twice as long, its square four times.
    return torch.where(errors[1] * 4.0 < errors[0], wider, code)


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
    exact = signed * (1 / format.full_range)
    candidates = [exact]
    if format.search:
        candidates += [exact * factor for factor in format.shrink_factors]
        if isinstance(element, IntElement):
            candidates.append(amax * (1 / element.max_value))
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
    best, least = stored[0], _block_error(format, values * inverses[0].unsqueeze(-1))
    for index in range(1, len(stored)):
        ratio = effective[index] * inverses[0]
        error = _block_error(format, values * inverses[index].unsqueeze(-1)) * (ratio * ratio)
        better = (error < least) & (inverses[index] != 0)
        best, least = torch.where(better, stored[index], best), torch.where(better, error, least)
    return best


def _asymmetric_scale(
    format: BlockFormat, highest: torch.Tensor, lowest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of (scales, minimums), ``[rows, blocks]``."""
    assert isinstance(format.scale, RealScale)
    steps = 2.0**format.element.bits - 1
    # Scaled before subtracting: the span of two large finite values may not be finite.
    return format.scale.round(highest * (1 / steps) - lowest * (1 / steps)), format.scale.round(lowest)


def _store_exponents(scale: PowerOfTwoScale, code: torch.Tensor, fields: tuple[torch.Tensor, ...]) -> None:
    pieces = pieces_per_block(scale.bits)
    missing = -code.shape[-1] % 8
    padded = torch.nn.functional.pad(code, (0, missing)) if missing and pieces > 1 else code
    planes = pack(padded.to(torch.float32).chunk(pieces, dim=-1), scale.bits)
    for field, plane in zip(fields, planes, strict=True):
        field.copy_(plane)


def _encode_triton(format: BlockFormat, x: torch.Tensor, wire: torch.Tensor) -> None:
    rows, features = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    layout = format.layout(features)
    target = dense_wire(wire, layout)
    with on_device_of(x):
        launch = launch_config("encode", format, layout, rows, x.dtype)
        _encode_kernel[(launch.tile.programs(layout, rows),)](
            x, target, rows, x.stride(0), format, layout, launch.tile, **launch.options
        )
    if target is not wire:
        wire.copy_(target)


def dense_wire(wire: torch.Tensor, layout: WireLayout) -> torch.Tensor:
    """``wire``, or a substitute where its rows lie further apart than they are long (no collective has such)."""
    dense = wire.shape[0] == 1 or wire.stride(0) == layout.row_bytes
    return wire if dense else wire.new_empty(wire.shape)


@triton.jit
def _encode_kernel(x, wire, rows, x_stride, format: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr):
    row, index, exists = locate(rows, layout, tile)
    pieces = load_pieces(x, row, index, exists, x_stride, format.block_size, layout, tile)
    encode_tile(pieces, wire, row, index, exists, format, layout, tile)


@triton.jit
def encode_tile(pieces, wire, row, index, exists, format: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr):
    """Twin of ``encode_definition``, for one tile (see tiles.py).

    Args:
        pieces: the tuple of the blocks' values, float32 ``[blocks, length]``, zeros where there is nothing.
        wire: uint8 ``[rows, row_bytes]``, contiguous.
        row, index, exists: the blocks, from ``locate``.
    """
    wire = tl.multiple_of(wire, 8)
    first_row = wire + tl.program_id(0).to(tl.int64) * (tile.rows * layout.row_bytes)
    wire = wire + row * layout.row_bytes
    scale: tl.constexpr = format.scale
    element: tl.constexpr = format.element
    if format.rotation:
        pieces = rotate_pieces(pieces, format.rotation)
    magnitude = tl.abs(pieces[0])
    for piece in tl.static_range(1, len(pieces)):
        magnitude = tl.maximum(magnitude, tl.abs(pieces[piece]), propagate_nan=tl.PropagateNan.ALL)
    # Bits of magnitudes are ordered like the magnitudes, and those of a NaN come last.
    extreme = tl.max(magnitude.to(tl.int32, bitcast=True), 1)
    finite = extreme < 0x7F800000
    amax = tl.where(finite & exists, extreme, 0).to(tl.float32, bitcast=True)

    minimum = amax
    if scale.power_of_two:
        code = _exponent_codes(pieces, amax, format)
        code = tl.where(finite, code, scale.nan_code)
        inverse = exponent_reciprocal(code, scale)
        if scale.bits == 8:
            tl.store(wire + layout.scales[0] + index, code.to(tl.uint8), exists)
        else:
            _store_packed_exponents(first_row, tl.where(exists, code, 0), scale, layout, tile)
    else:
        highest = tl.where(finite, _highest(pieces), 0.0)
        amax = tl.minimum(amax, format.saturation)
        if format.asymmetric:
            lowest = -tl.where(finite, _highest(_negated(pieces)), 0.0)
            bits, minimum_bits = _asymmetric_bits(highest, lowest, format)
            minimum = scale_value(minimum_bits, scale)
            effective = scale_value(bits, scale)
            _store_scales(wire + layout.minimums, minimum_bits, index, exists, scale)
        elif scale.row_relative:
            largest = tl.max(tl.reshape(amax, (tile.rows, tile.blocks_per_row)), 1)
            row_scale = largest * (1 / (scale.max_value * format.full_range))
            row_scale = tl.reshape(
                tl.broadcast_to(row_scale[:, None], (tile.rows, tile.blocks_per_row)), (tile.blocks,)
            )
            tl.store((wire + layout.row_scale).to(tl.pointer_type(tl.float32)), row_scale, exists & (index == 0))
            bits = _scale_bits(pieces, highest, amax, row_scale, format)
            effective = scale_value(bits, scale) * row_scale
        else:
            bits = _scale_bits(pieces, highest, amax, amax, format)
            effective = scale_value(bits, scale)
        inverse = reciprocal_or_zero(effective)
        _store_scales(wire + layout.scales[0], tl.where(finite, bits, scale.nan_bits), index, exists, scale)

    codes = ()
    for piece in tl.static_range(len(pieces)):
        if format.asymmetric:
            steps = (pieces[piece] - minimum[:, None]) * inverse[:, None]
            steps = tl.minimum(tl.maximum(steps, 0.0), 2.0**element.bits - 1)
            codes = codes + ((steps + ROUNDING).to(tl.int32, bitcast=True),)
        else:
            codes = codes + (quantize_codes(pieces[piece] * inverse[:, None], element),)
    zero_code: tl.constexpr = 0 if format.asymmetric else int(element.zero_code)
    _store_codes(wire, codes, zero_code, finite, index, exists, format, layout)
    for gap in tl.static_range(len(layout.padding)):
        clear_bytes(wire, layout.padding[gap][0], layout.padding[gap][1], exists & (index == 0))


@triton.jit
def _highest(pieces):
    """The largest value of each block, ``[blocks]``; anything if there is a NaN."""
    highest = pieces[0]
    for piece in tl.static_range(1, len(pieces)):
        highest = tl.maximum(highest, pieces[piece])
    return tl.max(highest, 1)


@triton.jit
def _negated(pieces):
    negated = ()
    for piece in tl.static_range(len(pieces)):
        negated = negated + (-pieces[piece],)
    return negated


@triton.jit
def _error(pieces, inverse, format: tl.constexpr):
    """Twin of ``_block_error`` of ``pieces * inverse``."""
    element: tl.constexpr = format.element
    total = tl.zeros_like(pieces[0])
    for piece in tl.static_range(len(pieces)):
        y = pieces[piece] * inverse[:, None]
        error = y - round_to_element(y, element)
        error = tl.minimum(tl.abs(error), format.largest_error / format.error_resolution)
        # Both products are exact, so fusing them with the additions rounds no differently.
        steps = tl.fma(error, format.error_resolution, ROUNDING) - ROUNDING
        total = tl.fma(steps, steps, total)
    return tl.sum(total, 1)


@triton.jit
def _exponent_codes(pieces, amax, format: tl.constexpr):
    """Twin of ``_choose_exponent``."""
    scale: tl.constexpr = format.scale
    exponent = (amax.to(tl.int32, bitcast=True) >> 23) - (127 + format.element.max_exponent)
    code = exponent_code(exponent, scale)
    if format.search:
        wider = exponent_code(tl.minimum(exponent + 1, 127 - format.element.max_exponent), scale)
        error = _error(pieces, exponent_reciprocal(code, scale), format)
        wider_error = _error(pieces, exponent_reciprocal(wider, scale), format)
        code = tl.where(wider_error * 4.0 < error, wider, code)
    return code


@triton.jit
def _scale_bits(pieces, highest, amax, row_scale, format: tl.constexpr):
    """Twin of ``_choose_scale``; ``row_scale`` counts only for row-relative scales."""
    element: tl.constexpr = format.element
    # The sign of the extreme: the largest value is the largest magnitude, or a negative one is.
    signed = tl.where(highest >= amax, -amax, amax) if element.integer else amax
    exact = signed * (1 / format.full_range)
    inverse_row_scale = reciprocal_or_zero(row_scale)
    best, first = _candidate(exact, row_scale, inverse_row_scale, format)
    if format.search:
        first_inverse = reciprocal_or_zero(first)
        least = _error(pieces, first_inverse, format)
        for index in tl.static_range(len(format.shrink_factors) + (1 if element.integer else 0)):
            if index < len(format.shrink_factors):
                candidate = exact * format.shrink_factors[index]
            else:
                candidate = amax * (1 / element.max_value)
            bits, effective = _candidate(candidate, row_scale, inverse_row_scale, format)
            inverse = reciprocal_or_zero(effective)
            ratio = effective * first_inverse
            error = _error(pieces, inverse, format) * (ratio * ratio)
            better = (error < least) & (inverse != 0)
            best = tl.where(better, bits, best)
            least = tl.where(better, error, least)
    return best


@triton.jit
def _candidate(wanted, row_scale, inverse_row_scale, format: tl.constexpr):
    """(bits, value) of the scale that stores ``wanted``."""
    scale: tl.constexpr = format.scale
    if format.scale.row_relative:
        bits = round_scale(wanted * inverse_row_scale, scale)
        return bits, scale_value(bits, scale) * row_scale
    else:
        bits = round_scale(wanted, scale)
        return bits, scale_value(bits, scale)


@triton.jit
def _asymmetric_bits(highest, lowest, format: tl.constexpr):
    """Twin of ``_asymmetric_scale``."""
    limit: tl.constexpr = format.saturation
    highest = tl.minimum(tl.maximum(highest, -limit), limit)
    lowest = tl.minimum(tl.maximum(lowest, -limit), limit)
    step: tl.constexpr = 1 / (2.0**format.element.bits - 1)
    scale: tl.constexpr = format.scale
    return round_scale(highest * step - lowest * step, scale), round_scale(lowest, scale)


@triton.jit
def _store_scales(target, bits, index, exists, scale: tl.constexpr):
    if scale.bits == 8:
        tl.store(target + index, bits.to(tl.uint8), exists)
    else:
        tl.store(target.to(tl.pointer_type(tl.int16)) + index, bits.to(tl.int16), exists)


@triton.jit
def _store_packed_exponents(row, code, scale: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr):
    """Twin of ``_store_exponents`` for exponents shorter than a byte: the codes of a whole row, packed in eighths."""
    tl.static_assert(tile.rows == 1)
    length: tl.constexpr = layout.stored_scales // 8
    lane = tl.arange(0, tile.blocks // 8)
    pieces = ()
    for piece in tl.static_range(8):
        place = piece * length + lane
        gathered = tl.gather(code, tl.minimum(place, tile.blocks - 1), 0)
        pieces = pieces + (tl.where(place < layout.blocks, gathered, 0),)
    for plane in tl.static_range(len(scale.planes)):
        packed = pack_codes(pieces, 0, scale.plane_shifts[plane], scale.planes[plane], False)
        for part in tl.static_range(len(packed)):
            target = row + layout.scales[plane] + part * length + lane
            tl.store(target, packed[part].to(tl.uint8), lane < length)


@triton.jit
def _store_codes(
    wire, codes, zero_code: tl.constexpr, finite, index, exists, format: tl.constexpr, layout: tl.constexpr
):
    """Packs and writes the codes, planes of zeros for blocks that are not finite."""
    element: tl.constexpr = format.element
    for plane in tl.static_range(len(format.element.planes)):
        target = wire + layout.planes[plane] + index * (format.block_size * format.element.planes[plane] // 8)
        _store_plane(target, codes, zero_code, finite, exists, element, plane, layout.access_bytes)


@triton.jit
def _store_plane(
    target,
    codes,
    zero_code: tl.constexpr,
    finite,
    exists,
    element: tl.constexpr,
    plane: tl.constexpr,
    access: tl.constexpr,
):
    width: tl.constexpr = element.planes[plane]
    shift: tl.constexpr = element.plane_shifts[plane]
    whole: tl.constexpr = len(element.planes) == 1
    # What bytes of zeros hold, and what the others are too large by: the same in every field of a byte.
    fields: tl.constexpr = ((1 << 8) - 1) // ((1 << width) - 1)
    fill: tl.constexpr = ((zero_code >> shift) & ((1 << width) - 1)) * fields
    surplus: tl.constexpr = ROUNDING_BITS * fields if whole else 0
    packed = pack_codes(codes, ROUNDING_BITS, shift, width, whole)
    store_bytes(target, packed, surplus, finite, fill, exists, access)
