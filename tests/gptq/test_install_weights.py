"""weights.checkpoint: GPTQ weights installed into models already built, and taken out again."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import quantized_models as models
import torch
import torch.distributed as dist
import transformers
from models import deepspeed_on_cpu, megatron_gpt, megatron_logits, tokens
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from static_cases import tables

import megacomp
from megacomp import codecs
from megacomp.calibration import Calibration, SiteTables
from megacomp.codecs import StaticCodec
from megacomp.gptq import CheckpointError, QuantizedLinear
from megacomp.gptq.shards import LinearShard
from megacomp.kernels.grouped_weight import GroupedWeight
from megacomp.launch import engines
from megacomp.launch.calibration import write
from megacomp.launch.errors import LaunchError
from megacomp.patches.quantization import _joined_bias
from megacomp.report import Report

ENGINES = ("deepspeed", "megatron")
LAYERS = 2
TOKENS = torch.randint(90, (2, 24), generator=torch.Generator().manual_seed(7))


def _model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ "own": a dense model; "quantized": a checkpoint of other weights for it; "dense": their dense equivalent."""
    folder = tmp_path_factory.mktemp("weights")
    _model(1).save_pretrained(folder / "own")
    shutil.copytree(folder / "own", folder / "dense")
    models.quantize_model(folder / "dense", folder / "quantized", "gptq", group_size=16)
    return folder


def _section(folder: Path, codec: str | None = None, **weights: Any) -> dict[str, Any]:
    communication = {"codec": codec, "min_bytes": 0} if codec else {"codec": None}
    section = {"weights": {"checkpoint": str(folder), **weights}, "communication": communication}
    return {"megacomp": {**section, "backend": "reference"}}


def _linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that may be replaced, by name."""
    ends = ("_proj", "linear_qkv", "linear_fc1", "linear_fc2")
    return {name: module for name, module in model.named_modules() if name.endswith(ends)}


def _installed(folders: Path, engine: str, config: dict[str, Any]) -> dict[str, Any]:
    with engines.build(folders / "own", engine, tp=dist.get_world_size(), dtype=torch.float32) as built:
        before, exact = _linears(built.module), built.logits(TOKENS)
        with megacomp.install(config, model=built.module) as installation:
            with megacomp.install(config, model=built.module):  # again: nothing left to replace
                pass
            quantized = built.logits(TOKENS)
            report: Report = installation.report()
        after = _linears(built.module)
        return {
            "quantized": quantized,
            "identical": all(after[name] is module for name, module in before.items()),
            "same_afterwards": torch.equal(built.logits(TOKENS), exact),
            "report": report,
            "text": str(report),
        }


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_weights_of_a_model_are_replaced_and_put_back(ranks: RankPool, folders: Path, engine: str, tp: int) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(folders / "dense", dtype=torch.float32)
    with torch.no_grad():
        expected = dense(TOKENS).logits
    for got in ranks.run(_installed, folders, engine, _section(folders / "quantized"), world_size=tp):
        torch.testing.assert_close(got["quantized"], expected, atol=1e-3, rtol=1e-4)
        assert got["identical"] and got["same_afterwards"]
        orders = list(got["report"].quantized.values())
        down = {name: order for name, order in got["report"].quantized.items() if "down_proj" in name or "fc2" in name}
        assert set(down.values()) == {"tp_aware"} and len(down) == LAYERS and "local" in orders
        assert "GPTQ layers: " in got["text"]


@pytest.mark.parametrize("engine", ENGINES)
def test_quantized_layers_reduce_at_the_same_sites_compressed(ranks: RankPool, folders: Path, engine: str) -> None:
    config = _section(folders / "quantized", codec="int8", order="local")
    first, second = ranks.run(_installed, folders, engine, config)
    (exact, _) = ranks.run(_installed, folders, engine, _section(folders / "quantized", order="local"))
    assert torch.equal(first["quantized"], second["quantized"])
    assert not torch.equal(first["quantized"], exact["quantized"])
    noise = (first["quantized"] - exact["quantized"]).norm() / exact["quantized"].norm()
    assert noise < 0.03
    sites = first["report"].sites
    assert {name: site.calls for name, site in sites.items()} == {
        f"layers.{layer}.{module}": 1 for layer in range(LAYERS) for module in ("attention", "mlp")
    }
    assert set(first["report"].quantized.values()) == {"local"}


def _calibration(features: int, file: Path) -> dict[str, Any]:
    """The communication of a section with a made-up calibration for two ranks, written to `file`."""
    codec = codecs.get("static4")
    assert isinstance(codec, StaticCodec)
    sites = {
        f"layers.{layer}.{module}": SiteTables(tables(codec.format, features, 2), tables(codec.format, features))
        for layer in range(LAYERS)
        for module in ("attention", "mlp")
    }
    write(Calibration(2, features, "", {codec.name: dict(codec.spec)}, {codec.name: sites}), file)
    return {"codec": "static4", "calibration": str(file), "min_bytes": 0}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_calibration_is_held_against_what_quantized_layers_give_out(
    ranks: RankPool, folders: Path, tmp_path: Path, engine: str
) -> None:
    config = _section(folders / "quantized")
    config["megacomp"]["communication"] = _calibration(64, tmp_path / "calibration.safetensors")
    for got in ranks.run(_installed, folders, engine, config):
        assert {site.calls for site in got["report"].sites.values()} == {1}
    config["megacomp"]["communication"] = _calibration(1024, tmp_path / "other.safetensors")
    for got in ranks.run(_refused, folders, engine, config):
        assert got["said"].startswith("ConfigError: ") and "made for hidden size 1024, not 64" in got["said"]
        assert got["identical"] and got["same"] and not got["quantized"]


def _refused(folders: Path, engine: str, config: dict[str, Any]) -> dict[str, Any]:
    with engines.build(folders / "own", engine, tp=dist.get_world_size(), dtype=torch.float32) as built:
        before, exact = _linears(built.module), built.logits(TOKENS)
        try:
            megacomp.install(config, model=built.module)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        else:
            said = "installed"
        return {
            "said": said,
            "identical": all(module is before[name] for name, module in _linears(built.module).items()),
            "same": torch.equal(built.logits(TOKENS), exact),
            "quantized": any(isinstance(module, QuantizedLinear) for module in built.module.modules()),
        }


DOWN = f"model.layers.{LAYERS - 1}.mlp.down_proj"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("damage", ["truncated", "shape", "g_idx", "missing", "format", "model"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    ranks: RankPool, folders: Path, tmp_path: Path, engine: str, damage: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(folders / "quantized", folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
        expected = "ends within "
    elif damage == "format":
        config = (folder / "config.json").read_text().replace('"quant_method": "gptq"', '"quant_method": "exl2"')
        (folder / "config.json").write_text(config)
        expected = "quant_method is 'exl2'"
    else:
        if damage == "shape":
            tensors[f"{DOWN}.scales"] = tensors[f"{DOWN}.scales"][:, :-8].contiguous()
            expected = f"{DOWN}.scales has shape"
        elif damage == "g_idx":
            tensors[f"{DOWN}.g_idx"][3] = 99
            expected = f"{DOWN}.g_idx names group 99"
        elif damage == "missing":
            del tensors[f"{DOWN}.qzeros"]
            expected = f"lack {DOWN}.qzeros"
        else:
            extra = {
                name.replace("layers.0", "layers.7"): tensor for name, tensor in tensors.items() if "layers.0" in name
            }
            tensors |= {name: tensor.clone() for name, tensor in extra.items()}
            expected = "is quantized, but the model has no such layer"
        save_file(tensors, path)
    for got in ranks.run(_refused, folders, engine, _section(folder)):
        assert got["said"].startswith("CheckpointError: ") and expected in got["said"]
        assert got["identical"] and got["same"] and not got["quantized"]


def _refused_on_one(folders: Path, engine: str, good: str, bad: str) -> dict[str, Any]:
    # The same path on every rank, but another folder behind it on the last: a host with a damaged disk.
    own = Path(good).with_name(f"rank-{dist.get_rank()}")
    own.mkdir()
    (own / "weights").symlink_to(good if dist.get_rank() == 0 else bad)
    before = Path.cwd()
    os.chdir(own)
    try:
        return _refused(folders, engine, _section(Path("weights")))
    finally:
        os.chdir(before)


def test_one_rank_that_cannot_load_stops_all(ranks: RankPool, folders: Path, tmp_path: Path) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    shutil.copytree(folders / "quantized", good)
    shutil.copytree(folders / "quantized", bad)
    (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:-10])
    first, second = ranks.run(_refused_on_one, folders, "deepspeed", str(good), str(bad))
    assert first["said"].startswith("AgreementError") and "rank 1: CheckpointError" in first["said"]
    assert second["said"].startswith("CheckpointError")
    assert all(got["identical"] and got["same"] and not got["quantized"] for got in (first, second))


def _by_init_inference(folders: Path) -> dict[str, Any]:
    import deepspeed

    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "own", dtype=torch.float32).eval()
    parallel = {"tp_size": dist.get_world_size(), "tp_grain_size": 1}
    config = {"dtype": "fp32", "tensor_parallel": parallel, **_section(folders / "quantized")}
    with deepspeed_on_cpu(), torch.no_grad():
        original = deepspeed.init_inference
        engine = megacomp.init_inference(model, config)
        logits = engine(TOKENS).logits
        quantized = engine.megacomp.report().quantized
        engine.megacomp.uninstall()
        held = any(isinstance(module, QuantizedLinear) for module in engine.modules())
        return {
            "logits": logits,
            "quantized": len(quantized),
            "restored": deepspeed.init_inference is original and not held,
        }


def test_init_inference_loads_them(ranks: RankPool, folders: Path) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(folders / "dense", dtype=torch.float32)
    with torch.no_grad():
        expected = dense(TOKENS).logits
    for got in ranks.run(_by_init_inference, folders):
        torch.testing.assert_close(got["logits"], expected, atol=1e-3, rtol=1e-4)
        assert got["quantized"] == 7 * LAYERS and got["restored"]


def test_there_must_be_a_model_and_layers_to_replace(folders: Path) -> None:
    with pytest.raises(megacomp.ConfigError, match=r"megacomp\.weights\.checkpoint: weights are loaded into a model"):
        megacomp.install(_section(folders / "quantized"))
    with pytest.raises(megacomp.ConfigError, match="the model has no linear layer of Megatron-core or DeepSpeed"):
        megacomp.install(_section(folders / "quantized"), model=torch.nn.Linear(2, 2))


def test_other_weights_than_the_model_holds(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "quantized", tmp_path / "other")
    with engines.build(folders / "quantized", "megatron", tp=1, dtype=torch.float32) as built:
        with megacomp.install(_section(folders / "quantized"), model=built.module):
            pass
        with pytest.raises(CheckpointError, match=r"holds weights of .*quantized already, not of .*other"):
            megacomp.install(_section(tmp_path / "other"), model=built.module)


def test_megatron_before_its_layers_could_be_overridden(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    with engines.build(folders / "own", "megatron", tp=1, dtype=torch.float32) as built:
        monkeypatch.delattr(RowParallelLinear, "_forward_impl")
        with pytest.raises(megacomp.UnsupportedVersionError, match=r"need megatron-core 0\.14 or later"):
            megacomp.install(_section(folders / "quantized"), model=built.module)


def _sequence_parallel(folder: Path) -> dict[str, Any]:
    logits, calls = [], {}
    for sequence_parallel in (False, True):
        with torch.no_grad(), megatron_gpt(sequence_parallel=sequence_parallel) as model:
            config = _section(folder)
            with megacomp.install(config, model=model):
                logits.append(megatron_logits(model, tokens()))
            config["megacomp"]["communication"] = {"codec": "int8", "min_bytes": 0}
            with megacomp.install(config, model=model) as installation:
                logits.append(megatron_logits(model, tokens()))
            calls[sequence_parallel] = {name: site.calls for name, site in installation.report().sites.items()}
    return {"logits": logits, "calls": calls}


def test_sequence_parallelism(ranks: RankPool, tmp_path: Path) -> None:
    for got in ranks.run(_sequence_parallel, models.save_for_megatron(tmp_path)):
        plain, compressed, plain_sp, compressed_sp = got["logits"]
        torch.testing.assert_close(plain_sp, plain, atol=1e-4, rtol=0)
        for exact, lossy in ((plain, compressed), (plain_sp, compressed_sp)):
            assert 0 < (lossy - exact).norm() < 0.03 * exact.norm()
        assert set(got["calls"][True].values()) == set(got["calls"][False].values()) == {1}


def _stages(folder: Path, strays: dict[str, Path]) -> dict[str, Any]:
    """The whole model, the same in two parts, its last two layers alone; and what is said of those with `strays`."""
    with torch.no_grad(), megatron_gpt() as model:
        layers = list(model.decoder.layers)
        parts = {"whole": [model], "chunks": [layers[0], torch.nn.Sequential(*layers[1:])], "stage": layers[1:]}
        parts["stage"].append(model.embedding)  # has no layer
        logits, held = {}, {}
        for name, given in parts.items():
            with megacomp.install(_section(folder), model=given):
                logits[name] = megatron_logits(model, tokens())
                held[name] = [sum(isinstance(m, QuantizedLinear) for m in layer.modules()) for layer in layers]
        said = {}
        for name, other in strays.items():
            with pytest.raises(CheckpointError) as error:
                megacomp.install(_section(other), model=parts["stage"])
            said[name] = str(error.value)
        return {"logits": logits, "held": held, "said": said}


def test_parts_of_a_model_take_their_layers_and_no_less(ranks: RankPool, tmp_path: Path) -> None:
    folder, strays = models.save_for_megatron(tmp_path), {}
    # In a layer that is here, and in one that is nowhere; a missing one is missed where it belongs.
    for name in ("layers.1.mlp.more.up_proj", "layers.3.mlp.up_proj"):
        strays[name] = tmp_path / name
        shutil.copytree(folder, strays[name])
        tensors = load_file(folder / "model.safetensors")
        found = {key: tensor for key, tensor in tensors.items() if ".layers.1.mlp.up_proj." in key}
        tensors |= {key.replace("layers.1.mlp.up_proj", name): tensor.clone() for key, tensor in found.items()}
        save_file(tensors, strays[name] / "model.safetensors")
    (got,) = ranks.run(_stages, folder, strays, world_size=1)
    assert torch.equal(got["logits"]["chunks"], got["logits"]["whole"])
    assert not torch.equal(got["logits"]["stage"], got["logits"]["whole"])
    assert got["held"] == {"whole": [4, 4, 4], "chunks": [4, 4, 4], "stage": [0, 4, 4]}
    for name, said in got["said"].items():
        assert said.endswith(f"model.{name} is quantized, but the model has no such layer")


def test_linears_that_megatron_cannot_fuse(folders: Path, tmp_path: Path) -> None:
    # GPTQ gives q, k and v one order, for they read the same input; a checkpoint may say otherwise.
    shutil.copytree(folders / "quantized", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    key = "model.layers.0.self_attn.k_proj.g_idx"
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    message = r"q_proj, .*k_proj, .*v_proj cannot be one layer \(decoder\.layers\.0\.self_attention\.linear_qkv\)"
    with pytest.raises(LaunchError, match=message):
        engines.build(tmp_path / "m", "megatron", tp=1, dtype=torch.float32)
    with engines.build(tmp_path / "m", "deepspeed", tp=1, dtype=torch.float32) as built:
        assert built.logits(TOKENS).isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_default_device_of_torch_plays_no_part(folders: Path, engine: str) -> None:
    with engines.build(folders / "own", engine, tp=1, dtype=torch.float32) as built:
        with torch.device("meta"):
            installation = megacomp.install(_section(folders / "quantized"), model=built.module)
        with installation:
            assert {buffer.device.type for buffer in built.module.buffers()} == {"cpu"}
            found = built.logits(TOKENS)
    with engines.build(folders / "quantized", engine, tp=1, dtype=torch.float32) as built:
        assert torch.equal(found, built.logits(TOKENS))


def test_a_bias_of_linears_that_have_none_in_part() -> None:
    none, some = (
        LinearShard(GroupedWeight(torch.zeros(2, 4), torch.zeros(1, 4), None, 4), bias, 16, 4, "local")
        for bias in (None, torch.arange(4).half())
    )
    with torch.device("meta"):
        joined = _joined_bias([none, some], 2, torch.bfloat16)
    assert joined.dtype == torch.bfloat16 and joined.tolist() == [0, 0, 0, 1, 0, 0, 2, 3]


def test_a_bias_the_model_has_no_place_for(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "quantized", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for value, message in ((0.0, None), (1.0, "o_proj.bias is not zero, but the model has no bias there")):
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.full((64,), value)
        save_file(tensors, tmp_path / "m" / "model.safetensors")
        for engine in ENGINES:
            with nullcontext() if message is None else pytest.raises(LaunchError, match=message):
                engines.build(tmp_path / "m", engine, tp=1, dtype=torch.float32).close()
