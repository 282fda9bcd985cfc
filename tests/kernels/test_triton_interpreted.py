"""Every Triton kernel equals its definition bit for bit, run by Triton's interpreter."""

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    KINDS,
    MX_ELEMENTS,
    SPECS,
    hard_values,
    pair,
    same_bits,
    tiles,
)

from megacomp import codecs
from megacomp.kernels import ELEMENTS
from megacomp.kernels.launch_config import LaunchConfig, using

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    # The interpreter computes with numpy, which warns of the overflows that the inputs are made for.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

GEOMETRY_SPECS = (
    "mxfp4",
    "nvfp4",
    "int8",
    {"preset": "int5", "scale_search": False, "rotation": 128},
    {"format": "mx", "element": "fp3_e1m1", "block_size": 8, "scale": "e5m0"},
    {"format": "int", "bits": 6, "block_size": 64, "scale": "fp16", "symmetric": False, "rotation": 256},
)


def assert_encodes(spec, x):
    """The wire of ``x``, the same from kernel and definition."""
    definition, kernel = pair(spec)
    expected = definition.encode(x)
    dirty = torch.full_like(expected, 0xA5)
    assert torch.equal(kernel.encode(x, out=dirty), expected)
    return expected


def assert_decodes(spec, wires, features, dtype):
    definition, kernel = pair(spec)
    dirty = torch.full((wires.shape[1], features), -7.0, dtype=dtype)
    total = kernel.decode_sum(wires, features, dtype, out=dirty)
    assert same_bits(total, definition.decode_sum(wires, features, dtype))


def assert_passes_on(spec, wires, features, gather_spec):
    (definition, kernel), (gather_codec, _) = pair(spec), pair(gather_spec)
    expected = gather_codec.encode(definition.decode_sum(wires, features, torch.float32))
    dirty = torch.full_like(expected, 0xA5)
    assert torch.equal(kernel.decode_sum_encode(wires, features, gather_codec, out=dirty), expected)


def wires_of(spec, peers, rows, features, dtype, seed=0):
    codec, _ = pair(spec)
    return torch.stack([codec.encode(hard_values(rows, features, dtype, seed + 5 * peer)) for peer in range(peers)])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_format_on_every_kind_of_row(spec):
    rows, features = KINDS + 1, 325  # a short last block whatever the block, and several programs
    wire = assert_encodes(spec, hard_values(rows, features, torch.bfloat16))
    wires = torch.stack([wire[:5], wire[4:9], wire[8:]])  # every kind with others
    assert_decodes(spec, wires, features, torch.bfloat16)
    assert_passes_on(spec, wires, features, spec)


@settings(max_examples=24)
@given(
    spec=st.sampled_from(SPECS),
    dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from(DTYPES),
    peers=st.integers(1, 5),
    rows=st.integers(1, 9),
    features=st.one_of(st.sampled_from([1, 7, 8, 31, 32, 33, 96, 128, 200, 256]), st.integers(1, 400)),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_dtype(spec, dtype, out_dtype, peers, rows, features, seed):
    assert_encodes(spec, hard_values(rows, features, dtype, seed))
    assert_decodes(spec, wires_of(spec, peers, rows, features, dtype, seed), features, out_dtype)


@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "int8", {"preset": "int4", "rotation": 128}], ids=str)
@pytest.mark.parametrize(
    ("features", "dtype"), [(4096, torch.bfloat16), (2568, torch.float16), (2880, torch.float32)], ids=str
)
def test_hidden_sizes_of_models(spec, features, dtype):
    wire = assert_encodes(spec, hard_values(2, features, dtype, seed=1))
    assert_decodes(spec, torch.stack([wire, wire.flip(0)]), features, dtype)


@pytest.mark.parametrize("spec", GEOMETRY_SPECS, ids=str)
def test_tiles_of_every_kind(spec):
    rows, features = 3, 72
    format = codecs.get(spec).format
    x = hard_values(rows, features, torch.bfloat16, seed=1)
    for tile in tiles("encode", format, features):
        with using("encode", LaunchConfig(tile, num_warps=4)):
            wire = assert_encodes(spec, x)
    wires = torch.stack([wire, wire.flip(0)])
    for tile in tiles("decode_sum", format, features):
        with using("decode_sum", LaunchConfig(tile, num_warps=4)):
            assert_decodes(spec, wires, features, torch.bfloat16)
    for tile in tiles("decode_sum_encode", format, features):
        with using("decode_sum_encode", LaunchConfig(tile, num_warps=4)):
            assert_passes_on(spec, wires, features, spec)


@settings(max_examples=25)
@given(
    spec=st.sampled_from(SPECS),
    gather_spec=st.sampled_from(SPECS),
    peers=st.integers(1, 4),
    rows=st.integers(1, 7),
    features=st.one_of(st.sampled_from([1, 96, 128, 256, 384]), st.integers(1, 300)),
    seed=st.integers(0, 2**16),
)
def test_decode_sum_encode_between_any_two_formats(spec, gather_spec, peers, rows, features, seed):
    wires = wires_of(spec, peers, rows, features, torch.bfloat16, seed)
    assert_passes_on(spec, wires, features, gather_spec)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [("mxfp4", torch.bfloat16), ("int5", torch.float32), ({"preset": "int8", "rotation": 64}, torch.float16)],
    ids=str,
)
def test_tensors_of_any_strides(spec, dtype):
    rows, features = 6, 104
    definition, kernel = pair(spec)
    x = hard_values(rows, features, dtype)
    wire = definition.encode(x)
    size = wire.shape[1]

    every_other_row = torch.full((2 * rows, features), 9.0, dtype=dtype)[::2]
    columns_of_many = torch.full((rows, 3 * features), 9.0, dtype=dtype)[:, features : 2 * features]
    column_major = torch.empty(features, rows, dtype=dtype).t()
    every_other_column = torch.empty(rows, 2 * features, dtype=dtype)[:, ::2]
    overlapping = x[:1].expand(rows, features)
    for view in (every_other_row, columns_of_many, column_major, every_other_column):
        view.copy_(x)
        assert torch.equal(kernel.encode(view), wire)
    assert torch.equal(kernel.encode(overlapping), definition.encode(x[:1]).expand(rows, size))

    message = torch.full((3, rows + 4, size), 0xA5, dtype=torch.uint8)
    kernel.encode(x, out=message[1, 2 : 2 + rows])
    assert torch.equal(message[1, 2 : 2 + rows], wire)
    message[1, 2 : 2 + rows] = 0xA5
    assert (message == 0xA5).all()
    rows_apart = torch.full((rows, size + 16), 0xA5, dtype=torch.uint8)
    kernel.encode(x, out=rows_apart[:, 8 : 8 + size])
    assert torch.equal(rows_apart[:, 8 : 8 + size], wire)
    assert (rows_apart[:, :8] == 0xA5).all() and (rows_apart[:, 8 + size :] == 0xA5).all()

    wires = torch.stack([wire, wire.flip(0)])
    expected = definition.decode_sum(wires, features, dtype)
    scattered = torch.full((4, rows + 3, size + 8), 0xA5, dtype=torch.uint8)
    for source in (scattered[1:3, 2 : 2 + rows, :size], scattered[::2, :rows, 8:]):
        source.copy_(wires)
        assert same_bits(kernel.decode_sum(source, features, dtype), expected)
        assert same_bits(kernel.decode_sum(source[:, 3:4], features, dtype), expected[3:4])
    peers_apart = torch.empty(2, rows + 3, size, dtype=torch.uint8)[:, :rows]
    peers_apart.copy_(wires)
    assert same_bits(kernel.decode_sum(peers_apart, features, dtype), expected)
    assert same_bits(
        kernel.decode_sum(wires[:1].expand(3, rows, size), features, dtype),
        definition.decode_sum(wires[:1].repeat(3, 1, 1), features, dtype),
    )
    for view in (every_other_row, columns_of_many, column_major, every_other_column):
        assert same_bits(kernel.decode_sum(wires, features, dtype, out=view), expected)


@pytest.mark.parametrize("spec", ["mxfp4", "int8", {"preset": "int4", "rotation": 128}], ids=str)
def test_peers_are_added_in_order(spec):
    definition, _ = pair(spec)
    small, large = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    large = large * 2.0**25
    wires = torch.stack([definition.encode(partial) for partial in (small, large, small, -large)])
    sums = [definition.decode_sum(order, 256, torch.float32) for order in (wires, wires.flip(0))]
    assert not same_bits(*sums)  # the order can be told
    assert_decodes(spec, wires, 256, torch.float32)


def test_writes_nothing_but_its_output():
    features = 104
    definition, kernel = pair("int4")
    x = hard_values(6, features, torch.bfloat16)
    wires = definition.encode(x)[None]
    surroundings = torch.full((10, features + 8), 9.0, dtype=torch.bfloat16)
    kernel.decode_sum(wires, features, torch.bfloat16, out=surroundings[2:8, 4 : 4 + features])
    assert same_bits(surroundings[2:8, 4 : 4 + features], definition.decode_sum(wires, features, torch.bfloat16))
    surroundings[2:8, 4 : 4 + features] = 9.0
    assert (surroundings == 9.0).all()


@pytest.mark.parametrize("element", MX_ELEMENTS)
@pytest.mark.parametrize("scale", ["e8m0", "bf16"])
def test_elements_round_alike_between_all_codes(element, scale):
    """Every code, the middle between every two, and its neighbours; the extreme of each block makes its scale 1."""
    values = ELEMENTS[element].dequantize(torch.arange(2.0 ** ELEMENTS[element].bits)).unique()
    values = values[values.isfinite() & (values.abs() <= ELEMENTS[element].max_value)]
    middles = (values[1:] + values[:-1]) / 2
    above, below = (middles.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))
    every = torch.cat([values, -values, middles, -middles, above, below, torch.tensor([-0.0])])
    blocks = torch.zeros(-(-len(every) // 7), 8)
    blocks[:, 1:] = torch.nn.functional.pad(every, (0, blocks[:, 1:].numel() - len(every))).view(-1, 7)
    if scale == "bf16" and element.startswith("int"):
        bits = ELEMENTS[element].bits
        blocks = torch.cat([blocks, blocks], 1) * 2.0 ** (bits - 2)
        blocks[:, 0] = -(2.0 ** (bits - 1))
        spec = {"format": "int", "bits": bits, "block_size": 16, "scale": scale}
    else:
        blocks[:, 0] = ELEMENTS[element].max_value
        spec = {"format": "mx", "element": element, "block_size": 8, "scale": scale}
    x = blocks.view(1, -1)
    wire = assert_encodes(spec, x)
    assert_decodes(spec, wire[None], x.shape[1], torch.float32)
    # The test itself: every value of the element was there to be decoded.
    decoded = codecs.get(spec, backend="reference").decode(wire, x.shape[1], torch.float32)
    scale = 2.0 ** (bits - 2) if spec["format"] == "int" else 1.0
    assert torch.isin(torch.cat([values, -values]) * scale, decoded).all()


@pytest.mark.parametrize(
    "spec",
    [
        {"format": "mx", "element": "fp4_e2m1", "block_size": 8, "scale": "e8m0"},
        {"format": "mx", "element": "fp4_e2m1", "block_size": 8, "scale": "e5m0"},
        {"format": "mx", "element": "fp4_e2m1", "block_size": 8, "scale": "e4m3"},
        {"format": "mx", "element": "fp4_e2m1", "block_size": 8, "scale": "bf16"},
        {"format": "mx", "element": "fp4_e2m1", "block_size": 8, "scale": "fp16"},
        {"format": "int", "bits": 3, "block_size": 16, "scale": "e4m3"},
        {"format": "int", "bits": 3, "block_size": 16, "scale": "bf16"},
        {"format": "int", "bits": 3, "block_size": 16, "scale": "fp16", "symmetric": False},
    ],
    ids=str,
)
def test_scales_of_all_magnitudes(spec):
    """Blocks whose scales are of every exponent and, in bf16 and e4m3, as often as not half-way between two."""
    generator = torch.Generator().manual_seed(0)
    codec = codecs.get(spec)
    blocks, size = 600, codec.format.block_size
    x = torch.randn(2, blocks, size, generator=generator).clamp(-1, 1)
    x[:, :, 0] = torch.where(torch.rand(2, blocks, generator=generator) < 0.5, 1.0, -1.0)
    steps = 1 + torch.randint(512, (2, blocks, 1), generator=generator) / 512
    # The first row within float32 as a whole, the second within the range of an e4m3 scale.
    exponents = torch.stack([torch.arange(blocks) % 277 - 149, torch.arange(blocks) % 24 - 24])[..., None]
    x = x * codec.format.full_range * steps * 2.0 ** exponents.clamp(max=100) * 2.0 ** (exponents - 100).clamp(min=0)
    x = x.view(2, -1).clamp(-3e38, 3e38)
    wire = assert_encodes(spec, x)
    assert_decodes(spec, torch.stack([wire, wire.flip(0)]), x.shape[1], torch.float32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_scales_of_any_bits_are_read_alike(spec):
    """Decoding is exact whatever scales another encoder would have chosen, NaN among them."""
    features, rows = 2048, 2
    codec, _ = pair(spec)
    wire = codec.encode(torch.randn(rows, features, generator=torch.Generator().manual_seed(0)))
    fields = codec.format.fields(wire, features)
    generator = torch.Generator().manual_seed(1)
    for field in (*fields.scales, *([] if fields.minimums is None else [fields.minimums])):
        whole = field.view(torch.uint8) if field.dtype is torch.uint8 else field
        low, high = (0, 256) if whole.dtype is torch.uint8 else (-(2**15), 2**15)
        whole.copy_(torch.randint(low, high, whole.shape, generator=generator).to(whole.dtype))
    assert_decodes(spec, wire[None], features, torch.float32)
