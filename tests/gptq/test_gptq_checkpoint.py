"""GPTQ checkpoints of every layout read exactly; those that are damaged refused by the name of the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_models as models
import torch
from safetensors.torch import load_file, save_file

from megacomp.gptq import CheckpointError, open_shards
from megacomp.gptq.checkpoint import GPTQCheckpoint, read_quantization
from megacomp.gptq.tensor_files import TensorFiles
from megacomp.kernels.grouped_weight import dequantize

NAME = "model.layers.0.self_attn.o_proj"


def _write(folder: Path, one: models.Linear, layout: str, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    models.write(folder, {NAME: one}, layout, models.settings(layout, bits=one.bits, **config), {})
    return folder


def _dense(folder: Path, name: str = NAME, ranks: int = 1) -> torch.Tensor:
    """The weight [in, out] put together from what every rank holds of a linear that keeps its order."""
    parts = []
    for rank in range(ranks):
        with open_shards(folder, rank, ranks, "local") as shards:
            shard = shards.read(name)
        rows = dequantize(shard.weight)
        index = shard.weight.input_index
        part = torch.full((shard.in_features, shard.out_features), torch.nan)
        if index is None:
            part = rows
        else:
            part.index_fill_(0, index.long(), 0.0).index_add_(0, index.long(), rows)
        parts.append(part)
    return torch.cat(parts, 0 if name.endswith(("o_proj", "down_proj")) else 1)


@pytest.mark.parametrize("layout", models.FORMATS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_layout_is_read_exactly(tmp_path: Path, layout: str, bits: int, group_size: int, symmetric: bool) -> None:
    one = models.linear(256, 48, bits=bits, group_size=group_size, symmetric=symmetric)
    folder = _write(tmp_path / "m", one, layout, group_size=group_size, symmetric=symmetric)
    with GPTQCheckpoint(folder) as checkpoint:
        checkpoint.check({NAME: (48, 256)})
        assert checkpoint.shape(NAME) == (48, 256)
    for ranks in (1, 2, 4):
        assert torch.equal(_dense(folder, ranks=ranks), one.dense())


@pytest.mark.parametrize("layout", models.FORMATS)
@pytest.mark.parametrize("order", ["tp_aware", "local"])
@pytest.mark.parametrize("features", [128, 96], ids=["equal groups", "unequal groups"])
def test_the_default_device_of_torch_plays_no_part(tmp_path: Path, layout: str, order: Any, features: int) -> None:
    parent = "model.layers.0.mlp"
    linears = {f"{parent}.{role}": models.linear(64, features, seed=1) for role in ("gate_proj", "up_proj")}
    linears[f"{parent}.down_proj"] = models.linear(features, 64, ordered=features == 128, seed=2)
    models.write(tmp_path, linears, layout, models.settings(layout, group_size=32), {})

    def read() -> list[torch.Tensor]:
        with open_shards(tmp_path, 1, 2, order) as shards:
            shards.check({name: (one.codes.shape[1], one.codes.shape[0]) for name, one in linears.items()})
            weights = [shards.read(name).weight for name in linears]
        return [tensor for weight in weights for tensor in vars(weight).values() if isinstance(tensor, torch.Tensor)]

    expected = read()
    with torch.device("meta"):
        found = read()
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_zero_points_of_zero_borrow_in_the_first_format(tmp_path: Path) -> None:
    one = models.linear(64, 16)
    one.zeros[:] = 0
    one.zeros[:, 3] = 15
    folder = _write(tmp_path / "m", one, "gptq")
    stored = load_file(folder / "model.safetensors")[f"{NAME}.qzeros"]
    # Not all nibbles are 15: the one above a zero point of 0 has lent.
    assert set((stored & 0xF).flatten().tolist()) == {15} and set(((stored >> 4) & 0xF).flatten().tolist()) == {14}
    assert torch.equal(_dense(folder), one.dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    made = models.linear(64, 16)
    one = models.Linear(made.codes, made.scales.to(dtype), made.zeros, made.g_idx, made.bits)
    folder = _write(tmp_path / "m", one, "pack-quantized")
    with open_shards(folder, 0, 1) as shards:
        assert shards.read(NAME).weight.scales.dtype == dtype
    assert torch.equal(_dense(folder), one.dense())


def test_groups_in_order_without_g_idx_and_byte_zero_points(tmp_path: Path) -> None:
    one = models.linear(128, 16, ordered=False)
    folder = _write(tmp_path / "m", one, "pack-quantized")
    tensors = load_file(folder / "model.safetensors")
    for g_idx in (None, torch.full((128,), -1, dtype=torch.int32)):
        config = models.settings("pack-quantized")
        config["config_groups"]["group_0"]["weights"]["actorder"] = "weight"
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
        tensors[f"{NAME}.weight_zero_point"] = (one.zeros.t() - 8).to(torch.int8).contiguous()
        tensors.pop(f"{NAME}.weight_g_idx", None)
        if g_idx is not None:
            tensors[f"{NAME}.weight_g_idx"] = g_idx
        save_file(tensors, folder / "model.safetensors")
        assert torch.equal(_dense(folder), one.dense())
        with open_shards(folder, 0, 1) as shards:
            assert shards.read(NAME).weight.input_index is None


def test_files_and_configuration_wherever_tools_put_them(tmp_path: Path) -> None:
    one = models.linear(64, 16)
    folder = _write(tmp_path / "m", one, "gptq")
    (folder / "config.json").rename(folder / "moved")
    written = json.loads((folder / "moved").read_text())["quantization_config"]
    del written["quant_method"]  # as early AutoGPTQ
    (folder / "quantize_config.json").write_text(json.dumps(written))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    assert torch.equal(_dense(folder), one.dense())
    tensors = load_file(folder / "gptq_model-4bit-32g.safetensors")
    (folder / "gptq_model-4bit-32g.safetensors").unlink()
    index = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        index[name] = f"gptq_model-4bit-32g-{number}.safetensors"
        save_file({name: tensor}, folder / index[name])
    (folder / "gptq_model-4bit-32g.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(_dense(folder), one.dense())


def test_settings_of_single_modules(tmp_path: Path) -> None:
    wide = models.linear(64, 16, bits=8, group_size=64, seed=1)
    one = models.linear(64, 16, seed=2)
    other = "model.layers.1.self_attn.o_proj"
    dynamic = {"-:.*k_proj": {}, r"+:.*layers\.1\..*": {"bits": 8, "group_size": 64}}
    models.write(tmp_path, {NAME: one, other: wide}, "gptq", models.settings("gptq", dynamic=dynamic), {})
    assert torch.equal(_dense(tmp_path), one.dense()) and torch.equal(_dense(tmp_path, other), wide.dense())

    groups = models.settings("pack-quantized")
    eight = models.settings("pack-quantized", bits=8, group_size=64)["config_groups"]["group_0"]
    groups["config_groups"]["group_1"] = {**eight, "targets": [r"re:.*layers\.1\..*"]}
    models.write(tmp_path, {NAME: one, other: wide}, "pack-quantized", groups, {})
    assert torch.equal(_dense(tmp_path), one.dense()) and torch.equal(_dense(tmp_path, other), wide.dense())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'; supported are 'gptq' and"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported are"),
        ({"is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ({"bits": 3}, "bits is 3; supported are 4 and 8"),
        ({"group_size": 12}, "group_size is 12; supported are multiples of 8, and -1"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ({"quant_method": "compressed-tensors"}, "config_groups: no group of weights"),
    ],
)
def test_settings_that_are_not_supported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {**models.settings("gptq"), **changes}}))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_quantization(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"type": "float"}, "config_groups.group_0.weights: type 'float' with strategy 'group' is not supported"),
        ({"strategy": "tensor"}, "strategy 'tensor' is not supported"),
        ({"num_bits": 2}, "config_groups.group_0.weights.num_bits is 2"),
    ],
)
def test_compressed_tensors_that_are_not_supported(tmp_path: Path, weights: dict[str, Any], message: str) -> None:
    config = models.settings("pack-quantized")
    config["config_groups"]["group_0"]["weights"] |= weights
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(CheckpointError, match=message):
        read_quantization(tmp_path)


def test_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_quantization(tmp_path) is None
    with pytest.raises(CheckpointError, match="is not quantized"):
        GPTQCheckpoint(tmp_path)


Damage = Callable[[dict[str, torch.Tensor]], Any]

DAMAGES: list[tuple[str, Damage, str]] = [
    ("gptq", lambda t: t.pop(f"{NAME}.scales"), f"lack {NAME}.scales"),
    ("gptq", lambda t: t.pop(f"{NAME}.g_idx"), f"lack {NAME}.g_idx"),
    ("gptq", lambda t: t.pop(f"{NAME}.qweight"), "nothing is quantized"),
    ("gptq", lambda t: t[f"{NAME}.g_idx"].__setitem__(5, 4), f"{NAME}.g_idx names group 4; there are 4, 0 to 3"),
    ("gptq", lambda t: t[f"{NAME}.g_idx"].__setitem__(5, -1), f"{NAME}.g_idx names group -1"),
    ("gptq", lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"][:-1].clone()}), f"{NAME}.qweight has shape"),
    ("gptq_v2", lambda t: t.update({f"{NAME}.qzeros": t[f"{NAME}.qzeros"].long()}), f"{NAME}.qzeros has dtype I64"),
    ("gptq_v2", lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"][:2].clone()}), f"{NAME}.scales has shape"),
    ("pack-quantized", lambda t: t.pop(f"{NAME}.weight_zero_point"), f"lack {NAME}.weight_zero_point"),
    ("pack-quantized", lambda t: t.pop(f"{NAME}.weight_scale"), f"lack {NAME}.weight_scale"),
    ("pack-quantized", lambda t: t[f"{NAME}.weight_shape"].fill_(7), rf"{NAME}.weight_shape says \[7, 7\]"),
    ("pack-quantized", lambda t: t[f"{NAME}.weight_g_idx"].fill_(9), f"{NAME}.weight_g_idx names group 9"),
]


@pytest.mark.parametrize(("layout", "damage", "message"), DAMAGES)
def test_damaged_checkpoints_name_the_tensor(tmp_path: Path, layout: str, damage: Damage, message: str) -> None:
    folder = _write(tmp_path / "m", models.linear(128, 16), layout)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message), GPTQCheckpoint(folder) as checkpoint:
        checkpoint.check({NAME: (16, 128)})


def test_a_linear_that_is_neither_quantized_nor_dense(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m", models.linear(128, 16), "gptq")
    with GPTQCheckpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=r"lack model\.x\.qweight"):
        checkpoint.check({"model.x": (16, 128)})


def test_a_truncated_file_names_the_tensor_it_ends_in(tmp_path: Path) -> None:
    folder = _write(tmp_path / "m", models.linear(128, 16), "gptq")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors ends within {NAME}\.\w+: it has [\d,]+ bytes of"):
        GPTQCheckpoint(folder)


def test_linears_that_no_rank_could_split(tmp_path: Path) -> None:
    models.write(tmp_path, {"lm_head": models.linear(64, 16)}, "gptq", models.settings("gptq"), {})
    with pytest.raises(CheckpointError, match="lm_head is quantized, which is supported for q_proj"):
        open_shards(tmp_path, 0, 1)
    folder = _write(tmp_path / "m", models.linear(64, 16), "gptq")
    with open_shards(folder, 0, 3) as shards, pytest.raises(CheckpointError, match=f"{NAME}: 3 ranks cannot take"):
        shards.read(NAME)


def test_a_bias_of_zeros_is_none(tmp_path: Path) -> None:
    made = models.linear(64, 16)
    for bias, found in ((torch.zeros(16), False), (torch.ones(16), True)):
        one = models.Linear(made.codes, made.scales, made.zeros, made.g_idx, made.bits, bias)
        with open_shards(_write(tmp_path / "m", one, "gptq"), 0, 2) as shards:
            assert (shards.read(NAME).bias is not None) is found


def test_a_rank_reads_no_more_than_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {}
    read = TensorFiles.read

    def counting(self: TensorFiles, name: str, *part: slice) -> torch.Tensor:
        tensor = read(self, name, *part)
        values[name] = values.get(name, 0) + tensor.numel()
        return tensor

    monkeypatch.setattr(TensorFiles, "read", counting)
    query = NAME.replace("o_proj", "q_proj")
    for layout, kind in (("gptq", "qweight"), ("pack-quantized", "weight_packed")):
        linears = {NAME: models.linear(256, 64), query: models.linear(256, 64)}
        models.write(tmp_path, linears, layout, models.settings(layout), {})
        for rank in range(4):
            values.clear()
            with open_shards(tmp_path, rank, 4) as shards:
                shards.read(NAME), shards.read(query)
            assert values[f"{NAME}.{kind}"] == values[f"{query}.{kind}"] == 256 * 64 // 8 // 4


DATA = ("gptq-v1-bytellama-h256-g32-sym", "ct-bytellama-h256-g32-asym")


@pytest.mark.parametrize("name", DATA)
def test_checkpoints_of_third_party_tools_dequantize_exactly(data_dir: Path, name: str) -> None:
    reference = load_file(data_dir / name / "reference.safetensors")
    weights = {key.removesuffix(".weight"): value for key, value in reference.items() if key.endswith("_proj.weight")}
    assert len(weights) == 7
    for linear, weight in weights.items():
        for ranks in (1, 2, 4):
            assert torch.equal(_dense(data_dir / name, linear, ranks), weight.t()), linear
