"""Switching compression on and off: `install`, the `Installation` it returns, `init_inference`; and `observe`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megacomp.agreement import agree
from megacomp.config import SECTION, Config, ConfigError, Weights, load, read
from megacomp.door import Door, Observer
from megacomp.gptq import QuantizedLinear, open_shards
from megacomp.patches import FRAMEWORKS, Framework, ImportWatch, LayerPatch, Patch, quantized_layers
from megacomp.policy import Site
from megacomp.report import FrameworkReport, Report, SiteReport
from megacomp.version import __version__

__all__ = ["Installation", "ScriptInstallation", "init_inference", "install", "observe"]

_log = logging.getLogger("megacomp")


class _Found(NamedTuple):
    """What an installation knows of models that have been built.

    sites, not_covered: as `Door.attach` takes them. quantized: the order of each quantized layer, by name.
    """

    sites: dict[torch.nn.Module, Site]
    not_covered: dict[str, str]
    quantized: dict[str, str]


class _Active:
    """The patches of one configuration, and how many installations hold them in place."""

    def __init__(self, config: Config, observer: Observer | None) -> None:
        self.door = Door(config, observer)
        self.holders = 0
        self.frameworks: dict[str, FrameworkReport] = {}
        self.quantized: dict[str, str] = {}
        self._undo = ExitStack()
        self._weights = ExitStack()

    def check(self) -> None:
        """Raise what forbids patching the frameworks that have been imported, before anything is patched."""
        for framework in FRAMEWORKS:
            if framework.imported:
                framework.check(self.door)

    def apply(self) -> None:
        """Patch the frameworks that have been imported, wait for the others; nothing if that fails."""
        with ExitStack() as undo:
            undo.callback(self.door.close)
            for framework in FRAMEWORKS:
                if framework.imported:
                    self._patch(framework, undo)
                else:
                    self.frameworks[framework.name] = FrameworkReport(framework.name, None, ())
                    watch = ImportWatch(framework.module, partial(self._patch_late, framework))
                    undo.callback(watch.stop)
                    watch.start()
            self._undo = undo.pop_all()

    def undo(self) -> None:
        """Put everything back, the last patch first."""
        self._undo.close()
        self._weights.close()

    def load_weights(self, models: Sequence[torch.nn.Module], undo: ExitStack) -> None:
        """Put the configured GPTQ weights in the place of those of `models`, if any are configured.

        undo: receives what puts the original layers back; `keep` it.
        Raises CheckpointError, and ConfigError if there is nothing to replace; nothing is replaced then.
        """
        weights = self.door.config.weights
        if weights.checkpoint is None:
            return
        for patch in _quantized_layers(weights.checkpoint, weights, models):
            patch.apply()
            undo.callback(patch.undo)

    def keep(self, undo: ExitStack) -> None:
        """Take over what puts original layers back, until `undo`."""
        self._weights.push(undo.pop_all())

    def find(self, models: Sequence[torch.nn.Module]) -> _Found:
        """What there is to `attach` of models that have been built; ConfigError if `Door.check` finds it unfit."""
        known = [(framework, model) for model in models for framework in FRAMEWORKS if framework.imported]
        sites = {layer: site for framework, model in known for layer, site in framework.sites(model).items()}
        self.door.check(
            sites, {ranks[1] for framework, model in known if (ranks := framework.ranks(model)) is not None}
        )
        return _Found(
            sites,
            {name: why for framework, model in known for name, why in framework.not_covered(model).items()},
            {
                name: module.order
                for model in models
                for name, module in model.named_modules()
                if isinstance(module, QuantizedLinear)
            },
        )

    def attach(self, found: _Found) -> None:
        """Name the sites of these models."""
        self.door.attach(found.sites, found.not_covered)
        self.quantized |= found.quantized

    def _patch(self, framework: Framework, undo: ExitStack) -> None:
        patches = framework.patches(self.door)
        for patch in patches:
            patch.apply()
            undo.callback(patch.undo)
        paths = tuple(patch.path for patch in patches)
        self.frameworks[framework.name] = FrameworkReport(framework.name, framework.version, paths)

    def _patch_late(self, framework: Framework) -> None:
        """Patch a framework just imported; what it raises becomes an error of that import."""
        with _registry.lock, ExitStack() as undo:
            framework.check(self.door)
            self._patch(framework, undo)
            self._undo.push(undo.pop_all())


def _models(model: torch.nn.Module | Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    # A ModuleList cannot run: the models are in it.
    if isinstance(model, torch.nn.ModuleList) or not isinstance(model, torch.nn.Module):
        return list(model)
    return [model]


def _quantized_layers(checkpoint: str, weights: Weights, models: Iterable[torch.nn.Module]) -> list[LayerPatch]:
    """What puts the weights in the place of those of `models`, which may be parts of one.

    Models without a layer of a framework stay as they are, such as an embedding beside other parts: ConfigError if
    all of them are such. CheckpointError for weights that cannot be read or do not fit.
    """
    parts: dict[tuple[Framework, tuple[int, int]], list[torch.nn.Module]] = {}
    for model in models:
        for framework in FRAMEWORKS:
            if framework.imported and (ranks := framework.ranks(model)) is not None:
                parts.setdefault((framework, ranks), []).append(model)
                break
    if not parts:
        path = f"{SECTION}.weights.checkpoint"
        raise ConfigError([(path, "the model has no linear layer of Megatron-core or DeepSpeed that it could replace")])
    patches = []
    for (framework, ranks), held in parts.items():
        with open_shards(Path(checkpoint), *ranks, weights.order) as shards:
            patches += quantized_layers(framework, held, shards)
    return patches


class _Registry:
    """What is installed in this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.active: _Active | None = None

    def find(self, config: Config, observer: Observer | None) -> _Active:
        """The patches of `config`, or of `observer`: those in place, or new ones, checked but not applied.

        Raises ConfigError if a different configuration or observer is in place, and what `_Active.check` raises.
        """
        if self.active is None:
            active = _Active(config, observer)
            active.check()
            return active
        if self.active.door.observer is not observer:
            what = "a configuration is installed" if self.active.door.observer is None else "an observer is installed"
            raise ConfigError([(SECTION, f"{what}; uninstall it first, for what is observed is not compressed")])
        self.active.door.require_same(config)
        return self.active

    def hold(self, active: _Active) -> None:
        """Count one more installation; the first applies the patches."""
        if active.holders == 0:
            active.apply()
            self.active = active
        active.holders += 1

    def release(self, active: _Active) -> None:
        """Count one installation less; the last puts everything back."""
        active.holders -= 1
        if active.holders == 0:
            self.active = None
            active.undo()


# Patches are a property of the process, so what is known about them is one as well.
_registry = _Registry()


class Installation:
    """Compression, switched on until `uninstall` or the end of the `with` block.

    Installing the configuration that is in place already gives another Installation of it: compression ends
    when every one of them is uninstalled, in whatever order. They share one report.
    """

    def __init__(self, active: _Active) -> None:
        self._active = active
        self._held = True

    def report(self) -> Report:
        """What was patched, and what every site of this rank has sent so far; also after `uninstall`."""
        active, door = self._active, self._active.door
        return Report(
            version=__version__,
            active=active.holders > 0,
            config=door.config.canonical(),
            digest=door.config.digest(),
            frameworks=tuple(active.frameworks.values()),
            sites={
                name: SiteReport(
                    calls=site.calls,
                    rows=site.rows,
                    bytes_sent=site.bytes_sent,
                    plain_bytes=site.plain_bytes,
                    ratio=site.ratio,
                    declined=dict(site.declined),
                    codec=", ".join(site.codecs) or None,
                    sqnr_db=site.sqnr_db,
                    guard=site.guard,
                )
                for name, site in door.telemetry.sites.items()
            },
            outside=door.telemetry.outside,
            not_covered=dict(door.not_covered),
            quantized=dict(active.quantized),
            tuning={} if door.policy.tunings is None else door.policy.tunings.describe(),
        )

    def uninstall(self) -> None:
        """Put every original object back, unless another Installation still needs the patches; once only."""
        with _registry.lock:
            if self._held:
                self._held = False
                _registry.release(self._active)

    def __enter__(self) -> Installation:
        if not self._held:
            raise RuntimeError("this installation has been uninstalled; install again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.uninstall()


def install(
    config: str | Path | Mapping[str, Any] | Config,
    model: torch.nn.Module | Iterable[torch.nn.Module] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Installation:
    """Compress the reductions of tensor-parallel layers in this process.

    config: a DeepSpeed JSON file, a dict of the same contents, or its "megacomp" section as a Config.
    model: models already built (or their engines), or all parts of one that this process holds; needed to name the
        layers of a DeepSpeed model built before, to check that every rule matches a site, and to replace weights
        (`weights.checkpoint`), which `uninstall` puts back. Megatron's layers, and those that
        deepspeed.init_inference builds later, are found without it.
    group: the ranks that must agree; the default group unless given.

    If torch.distributed is initialised this is a collective call: all ranks of `group` compare their
    configuration. Otherwise the ranks of each tensor-parallel group do when it is first used.

    Megatron-core and DeepSpeed are patched if they have been imported, or else as soon as they are.

    Raises, before anything is changed:
        ConfigError: a bad or missing section, rules that match nothing in `model`, weights to load but no
            `model`, or another configuration is installed.
        CheckpointError: weights that cannot be read or do not fit the model.
        UnsupportedVersionError, MissingSymbolError: a framework in a version that is not supported.
        AgreementError: other ranks differ, or failed; raised on every rank.
    """
    return _install(
        lambda: config if isinstance(config, Config) else load(config)[0], model, group, weights_follow=False
    )


def observe(
    model: torch.nn.Module | Iterable[torch.nn.Module],
    observer: Observer,
    group: dist.ProcessGroup | None = None,
) -> Installation:
    """Show `observer` what the row-parallel layers of `model` reduce, and its sum; nothing is compressed meanwhile.

    model, group: as for `install`; also a collective call. Every rank has its own observer.

    The report counts each message shown as declined, for the reason "observed".

    Raises, before anything is changed, ConfigError if anything else is installed, and what `install` raises.
    """
    return _install(Config, model, group, weights_follow=False, observer=observer)


def _install(
    read_section: Callable[[], Config],
    model: torch.nn.Module | Iterable[torch.nn.Module] | None,
    group: dist.ProcessGroup | None,
    weights_follow: bool,
    observer: Observer | None = None,
) -> Installation:
    """`install` or `observe`; weights_follow: the model is not built yet, and what builds it will load the weights."""
    with _registry.lock, ExitStack() as undo:
        problem: Exception | None = None
        found: _Found | None = None
        try:
            section = read_section()
            active = _registry.find(section, observer)
            if model is not None:
                models = _models(model)
                active.load_weights(models, undo)
                found = active.find(models)
            elif section.weights.checkpoint is not None and not weights_follow:
                why = "weights are loaded into a model: install(..., model=model), or megacomp.init_inference"
                raise ConfigError([(f"{SECTION}.weights.checkpoint", why)])
        except Exception as error:
            problem = error
        if dist.is_available() and dist.is_initialized():
            # A rank that failed says so, or the others would wait for it.
            agree(problem or active.door.statement(), group)
            active.door.trust(group)
        elif problem is not None:
            raise problem
        # Only now: what is in place already is to know nothing of an installation that failed.
        if found is not None:
            active.attach(found)
        _registry.hold(active)
        active.keep(undo)
    return Installation(active)


def init_inference(model: torch.nn.Module, config: str | Path | Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    """deepspeed.init_inference, which also obeys the "megacomp" section of its configuration.

    model, config, kwargs: as deepspeed.init_inference takes them, with the section in `config` or as a keyword;
        `config` is not changed. Without a section this is deepspeed.init_inference and nothing else.

    Returns the engine, with the Installation as `engine.megacomp`; uninstall it to be back at uncompressed
    communication.

    Raises what `install` raises, before the model is touched; ConfigError for rules that match no site of the
    model, once it is built.
    """
    import deepspeed

    if SECTION in kwargs:
        document = {} if config is None else read(config)
        if SECTION in document:
            raise ConfigError([(SECTION, "given twice, in config and as a keyword")])
        config = {**document, SECTION: kwargs.pop(SECTION)}
    if config is None or SECTION not in read(config):
        _log.info("no %r section: init_inference leaves communication uncompressed", SECTION)
        return deepspeed.init_inference(model, str(config) if isinstance(config, Path) else config, **kwargs)
    section, rest = load(config)
    installation = _install(lambda: section, None, None, weights_follow=True)
    try:
        engine = deepspeed.init_inference(model, rest, **kwargs)
        engine.megacomp = installation
        if section.weights.checkpoint is not None:
            engine.megacomp = install(section, model=engine.module)
            installation.uninstall()
    except BaseException:
        installation.uninstall()
        raise
    return engine


class ScriptInstallation:
    """Installs whatever "megacomp" section a script gives to its own deepspeed.init_inference.

    For running a script unmodified, with no configuration but its own: within the `with` block the first call
    with a section becomes `megacomp.init_inference`; from then on that configuration is installed. Leaving
    the block uninstalls it.

    installation: the Installation, or None as long as there was no such call.
    """

    def __init__(self) -> None:
        self.installation: Installation | None = None
        self._patch = Patch("deepspeed.init_inference", self._intercept)
        self._undo = ExitStack()

    def __enter__(self) -> ScriptInstallation:
        deepspeed = next(framework for framework in FRAMEWORKS if framework.name == "deepspeed")
        if deepspeed.imported:
            self._start()
        else:
            watch = ImportWatch(deepspeed.module, self._start)
            self._undo.callback(watch.stop)
            watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()

    def _start(self) -> None:
        self._patch.apply()
        self._undo.callback(self._patch.undo)

    def _intercept(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def intercepted(model: torch.nn.Module, config: Any = None, **kwargs: Any) -> Any:
            if not isinstance(config, str | Mapping) or SECTION not in read(config):
                return original(model, config, **kwargs)
            # The installation patches the same function: this patch makes way for it.
            self._undo.close()
            engine = init_inference(model, config, **kwargs)
            self.installation = engine.megacomp
            self._undo.callback(engine.megacomp.uninstall)
            return engine

        return intercepted
