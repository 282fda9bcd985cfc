"""Installing and uninstalling, on a framework made up for it: what is in place when, and what errors leave behind."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

import megacomp
from megacomp.config import load
from megacomp.door import Door
from megacomp.gptq import QuantizedLinear
from megacomp.patches import Framework, MissingSymbolError, Patch, UnsupportedVersionError
from megacomp.patches.quantization import ParallelLinear
from megacomp.policy import Site

MXFP4 = {"megacomp": {"communication": {"codec": "mxfp4"}}}
INT8 = {"megacomp": {"communication": {"codec": "int8"}}}


def reduce(x: torch.Tensor) -> torch.Tensor:
    return x


def scatter(x: torch.Tensor) -> torch.Tensor:
    return x


class Toy(Framework):
    """A framework of two functions, whose models have a site for every linear."""

    name: ClassVar[str] = "toy"
    module: ClassVar[str] = "toy_framework"
    supported: ClassVar[str] = ">=1,<2"

    def __init__(self, symbols: tuple[str, ...] = ("reduce", "scatter")) -> None:
        self.symbols = symbols

    def patches(self, door: Door) -> list[Patch]:
        return [Patch(f"toy_framework.{symbol}", self.wrap) for symbol in self.symbols]

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: original(x)

    def sites(self, model: torch.nn.Module) -> Mapping[torch.nn.Module, Site]:
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        return {linear: Site(f"layers.{i}.mlp", "mlp", i, len(linears)) for i, linear in enumerate(linears)}

    def not_covered(self, model: torch.nn.Module) -> dict[str, str]:
        return {name: "a bypass" for name, module in model.named_modules() if isinstance(module, torch.nn.Bilinear)}

    def ranks(self, model: torch.nn.Module) -> None:
        return None

    def parallel_linears(self, model: torch.nn.Module) -> list[ParallelLinear]:
        return []

    def elsewhere(self, models: Sequence[torch.nn.Module]) -> tuple[str, ...]:
        return ()

    def quantized_layer(
        self, layer: torch.nn.Module, linear: QuantizedLinear, bias: torch.Tensor | None
    ) -> torch.nn.Module:
        raise NotImplementedError


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The framework, imported."""
    module = ModuleType("toy_framework")
    module.__version__, module.reduce, module.scatter = "1.4", reduce, scatter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_framework", module)
    monkeypatch.setattr("megacomp.installation.FRAMEWORKS", (Toy(),))
    return module


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    finders = list(sys.meta_path)
    yield
    assert sys.meta_path == finders
    other = megacomp.install({"megacomp": {"communication": {"codec": "nvfp4"}}})
    other.uninstall()


def patched(toy: ModuleType) -> bool:
    replaced = {toy.reduce is not reduce, toy.scatter is not scatter}
    assert len(replaced) == 1, "half patched"
    return replaced.pop()


def test_installed_until_uninstalled(toy: ModuleType) -> None:
    installation = megacomp.install(MXFP4)
    assert patched(toy) and installation.report().active
    installation.uninstall()
    assert not patched(toy) and not installation.report().active
    toy.reduce = somebody_elses = lambda x: x  # type: ignore[attr-defined]
    installation.uninstall()
    assert toy.reduce is somebody_elses


def test_a_with_block_uninstalls_also_on_errors(toy: ModuleType) -> None:
    with pytest.raises(KeyError), megacomp.install(MXFP4) as installation:
        assert patched(toy)
        raise KeyError
    assert not patched(toy)
    with pytest.raises(RuntimeError, match="uninstalled"), installation:
        pass


def test_installing_the_same_again_holds_it_in_place(toy: ModuleType) -> None:
    outer = megacomp.install(MXFP4)
    replacement = toy.reduce
    spelt_otherwise = {"megacomp": {"communication": {"codec": {"format": "mx", "element": "fp4_e2m1"}}}}
    with megacomp.install(spelt_otherwise) as inner:
        assert toy.reduce is replacement
    inner.uninstall()
    assert patched(toy)
    outer.uninstall()
    assert not patched(toy)


def test_installations_may_end_in_any_order(toy: ModuleType) -> None:
    first, second = megacomp.install(MXFP4), megacomp.install(MXFP4)
    first.uninstall()
    first.uninstall()
    assert patched(toy) and second.report().active
    second.uninstall()
    assert not patched(toy)


def test_another_configuration_is_refused_while_one_is_installed(toy: ModuleType) -> None:
    with megacomp.install(MXFP4):
        replacement = toy.reduce
        with pytest.raises(megacomp.ConfigError) as caught:
            megacomp.install(INT8)
        assert toy.reduce is replacement
    assert 'megacomp.communication.codec: "mxfp4" installed; "int8" given' in str(caught.value)
    with megacomp.install(INT8):
        assert patched(toy)


def test_configurations_come_as_file_dict_or_object(toy: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"dtype": "bf16", "megacomp": {"communication": {"codec": "mxfp4"}}}')
    for source in (str(file), file, MXFP4, load(MXFP4)[0]):
        with megacomp.install(source) as installation:
            assert installation.report().config["communication"]["codec"] == "mxfp4"


@pytest.mark.parametrize("config", [{"megacomp": "auto"}, {"dtype": "bf16"}, {"megacomp": {"codec": 4}}, "none.json"])
def test_a_bad_configuration_changes_nothing(toy: ModuleType, config: Any) -> None:
    with pytest.raises(megacomp.ConfigError):
        megacomp.install(config)
    assert not patched(toy)


@pytest.mark.parametrize("version", ["0.9", "2.0", "2.1.dev3"])
def test_unsupported_versions_name_the_supported_ones(toy: ModuleType, version: str) -> None:
    toy.__version__ = version  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedVersionError) as caught:
        megacomp.install(MXFP4)
    assert f"toy {version} is not supported; megacomp works with toy >=1,<2" in str(caught.value)
    assert not patched(toy)


def test_a_missing_symbol_is_found_before_anything_is_patched(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megacomp.installation.FRAMEWORKS", (Toy(("reduce", "scatter", "gather")),))
    with pytest.raises(MissingSymbolError, match=r"toy_framework\.gather does not exist.*found 1\.4"):
        megacomp.install(MXFP4)
    assert not patched(toy)


def test_a_failure_half_way_is_rolled_back(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_the_second_time(self: Toy, original: Callable[..., Any]) -> Callable[..., Any]:
        calls.append(toy.reduce is reduce)
        if len(calls) == 2:
            raise RuntimeError("no more memory")
        return lambda x: original(x)

    monkeypatch.setattr(Toy, "wrap", fail_the_second_time)
    with pytest.raises(RuntimeError, match="no more memory"):
        megacomp.install(MXFP4)
    assert calls == [True, False]
    assert not patched(toy)


def test_sites_and_bypasses_of_models_are_reported(toy: ModuleType) -> None:
    models = [torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), torch.nn.Bilinear(2, 2, 2)]
    with megacomp.install(MXFP4, model=iter(models)) as installation:
        report = installation.report()
    assert list(report.sites) == ["layers.0.mlp", "layers.1.mlp"]
    assert report.not_covered == {"": "a bypass"}


def test_rules_that_match_nothing_in_the_model_change_nothing(toy: ModuleType) -> None:
    rules = [{"layers": "0,7", "codec": None}, {"module": "attention", "codec": None}]
    config = {"megacomp": {"communication": {"rules": rules}}}
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(megacomp.ConfigError) as caught:
        megacomp.install(config, model=model)
    assert [path for path, _ in caught.value.errors] == [
        "megacomp.communication.rules[0].layers",
        "megacomp.communication.rules[1].module",
    ]
    assert not patched(toy)
    with megacomp.install(config):
        assert patched(toy)


def test_an_installation_that_other_ranks_refuse_leaves_the_one_in_place_as_it_is(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagree(*_: Any) -> None:
        raise megacomp.AgreementError("rank 1 differs")

    models = [torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Bilinear(2, 2, 2)]
    quantized = QuantizedLinear.__new__(QuantizedLinear)
    torch.nn.Module.__init__(quantized)
    quantized.order = "tp_aware"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with megacomp.install(MXFP4) as installation:
            before = installation.report()
            with monkeypatch.context() as meanwhile:
                meanwhile.setattr("megacomp.installation.agree", disagree)
                with pytest.raises(megacomp.AgreementError):
                    megacomp.install(MXFP4, model=[*models, torch.nn.Sequential(quantized)])
            assert installation.report() == before
            megacomp.install(MXFP4, model=models).uninstall()
            assert installation.report().not_covered == {"": "a bypass"}
    finally:
        dist.destroy_process_group()


def test_a_framework_not_imported_yet_is_patched_when_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_framework.py").write_text(
        "__version__ = '1.0'\ndef reduce(x): return x\ndef scatter(x): return x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("megacomp.installation.FRAMEWORKS", (Toy(),))
    installation = megacomp.install(MXFP4)
    (before,) = installation.report().frameworks
    assert (before.version, before.patches) == (None, ())
    try:
        import toy_framework

        (after,) = installation.report().frameworks
        assert (after.version, after.patches) == ("1.0", ("toy_framework.reduce", "toy_framework.scatter"))
        replaced = toy_framework.reduce
        installation.uninstall()
        assert toy_framework.reduce is not replaced
        assert toy_framework.reduce is replaced.__wrapped__
    finally:
        installation.uninstall()
        sys.modules.pop("toy_framework", None)


def test_an_unsupported_version_imported_later_fails_that_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_framework.py").write_text("__version__ = '3.0'\ndef reduce(x): return x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("megacomp.installation.FRAMEWORKS", (Toy(),))
    with megacomp.install(MXFP4) as installation:
        for _ in range(2):
            with pytest.raises(UnsupportedVersionError, match=r"toy 3\.0"):
                import toy_framework  # noqa: F401
            assert "toy_framework" not in sys.modules
        (framework,) = installation.report().frameworks
        assert (framework.version, framework.patches) == (None, ())


SCRIPT = """
import sys
import megacomp

installation = megacomp.install({"megacomp": {}})
assert not any(name.split(".")[0] in ("megatron", "deepspeed") for name in sys.modules)
IMPORTS
names = NAMES
replaced = [eval(name) for name in names]
assert all(hasattr(function, "__wrapped__") for function in replaced), replaced
installation.uninstall()
assert [eval(name) for name in names] == [function.__wrapped__ for function in replaced]
"""


@pytest.mark.parametrize(
    ("imports", "names"),
    [
        (
            "from megatron.core.models.gpt import GPTModel\nfrom megatron.core.tensor_parallel import layers, mappings",
            ["mappings._reduce", "mappings._reduce_scatter_along_first_dim", "layers.RowParallelLinear.forward"],
        ),
        (
            "import deepspeed\nfrom deepspeed.module_inject import layers",
            ["deepspeed.init_inference", "layers.LinearAllreduce.forward", "layers.RowParallel.forward"],
        ),
    ],
)
def test_the_real_frameworks_are_patched_when_a_script_imports_them(imports: str, names: list[str]) -> None:
    if importlib.util.find_spec(imports.split()[1].partition(".")[0]) is None:
        pytest.skip("not installed")
    script = SCRIPT.replace("IMPORTS", imports).replace("NAMES", repr(names))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
