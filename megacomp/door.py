"""The door every patched function comes to: is this message ours, how does it travel, what did it cost?

Or, while there is an observer: what is in it?
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist

from megacomp import collectives
from megacomp.agreement import agree, differences, statement
from megacomp.collectives import CollectiveError, DeferredPartial, SimulatedGroup, materialized
from megacomp.collectives.links import all_gather_single, reduce_scatter_single
from megacomp.collectives.message import as_matrix, cause_of, mark_failed, refuse_failed
from megacomp.config import SECTION, ConfigError, load, read
from megacomp.guard import Guard
from megacomp.policy import Decline, Policy, Site
from megacomp.telemetry import Telemetry

if TYPE_CHECKING:
    from megacomp.collectives import Collective, Route
    from megacomp.config import Config

__all__ = ["Door", "Observer", "at_site"]

_log = logging.getLogger("megacomp")

T = TypeVar("T")


class _Visit(NamedTuple):
    """The layer whose forward is running."""

    site: Site
    # Frameworks call their collectives from the forward of an autograd function, which runs with gradients
    # switched off: whether they are wanted is known only outside of it.
    grad_enabled: bool


# A context variable, not an attribute: threads and coroutines serving different requests are in different
# layers at the same time.
_visit: ContextVar[_Visit | None] = ContextVar("megacomp_visit", default=None)


@dataclass
class _Stream:
    """The messages of one site within one group, whose ranks all hold the same of them.

    compressed: how many were compressed. switched_off: whether the numerical guard lets no more of them be.
    """

    compressed: int = 0
    switched_off: bool = False


_COLLECTIVES: Mapping[str, Callable[[torch.Tensor, dist.ProcessGroup, Route], torch.Tensor]] = {
    "all_reduce": collectives.all_reduce,
    "reduce_scatter": collectives.reduce_scatter,
    "all_gather": collectives.all_gather,
}


def at_site() -> bool:
    """Whether the layer that calls this is at a site, so that its partial comes to a door."""
    return _visit.get() is not None


class Observer(Protocol):
    """Sees the partials of known sites that a codec could take: floating-point, of inference, not empty.

    Tensors are the model's own or belong to the door: to be read before the call returns, and never written to.
    """

    def partial(self, site: Site, rank: int, world_size: int, x: torch.Tensor) -> None:
        """Rank `rank` of `world_size` brings `x` [rows, features], bf16, fp16 or fp32, to a reduction at `site`.

        Called for each rank whose partial this process holds: its own, or, of simulated ranks, all of them in their
        order.
        """

    def total(self, site: Site, x: torch.Tensor) -> None:
        """All ranks' partials of that message, added in float32: `x` [rows, features].

        Called in every process, after the partials of the message. Of a reduce-scatter, too, it is the sum of the
        whole partials and not this rank's share of it.
        """


class Door:
    """Takes the messages of known sites through the compressed collectives, as one configuration has it.

    config: that configuration.
    policy, telemetry: what decides, and what counts.
    sites: the site of each layer known to be at one; layers are not kept alive.
    not_covered: layers of the models attached that reduce where no patch sees them, by name, and why.
    observer: if there is one, nothing is compressed, and it sees what might have been.
    """

    def __init__(self, config: Config, observer: Observer | None = None) -> None:
        """Raises ConfigError if this machine lacks what the backend of `config` needs."""
        self.config = config
        self.observer = observer
        self.policy = Policy(config)
        self.telemetry = Telemetry()
        self.sites: weakref.WeakKeyDictionary[torch.nn.Module, Site] = weakref.WeakKeyDictionary()
        self.not_covered: dict[str, str] = {}
        self._sqnr_every = config.telemetry.sqnr_every
        self._guard = Guard(config.guard)
        # Not by site alone: one site may reduce over several groups, and not every rank is in all of them.
        self._streams: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, _Stream]] = weakref.WeakKeyDictionary()
        # A tenth of the time, and prompts of a service come in a bounded variety of lengths.
        self._wire_bytes = lru_cache(maxsize=4096)(collectives.wire_bytes)
        self._agreed_groups: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
        self._agreed_ranks: set[frozenset[int]] = set()
        self._open = True

    def close(self) -> None:
        """From now on every message goes to the original collective."""
        self._open = False

    def learn(self, sites: Mapping[torch.nn.Module, Site]) -> None:
        """Remember which layers are which sites."""
        self.sites.update(sites)
        for site in sites.values():
            self.telemetry.at(site)

    def check(self, sites: Mapping[torch.nn.Module, Site], ranks: Collection[int]) -> None:
        """Raise ConfigError if a rule can match none of the sites of a model, or the calibration is for others.

        sites: of a model that is known entirely; none are legitimate. ranks: the sizes of its tensor-parallel groups.
        """
        if sites:
            self.policy.check_rules(sites.values())
            features = {features for layer in sites if (features := _out_features(layer)) is not None}
            self.policy.check_calibration(list(sites.values()), features, ranks)

    def attach(self, sites: Mapping[torch.nn.Module, Site], not_covered: Mapping[str, str]) -> None:
        """Learn the sites of a model that passed `check`, and which of its layers reduce unseen and why.

        A model without sites is legitimate (it is not split, or not covered) and only warned of.
        """
        if not sites:
            _log.warning("the model has no row-parallel layer that megacomp covers: nothing will be compressed")
        for name, why in not_covered.items():
            _log.info("not covered: %s, %s", name, why)
        self.learn(sites)
        self.not_covered.update(not_covered)

    def require_same(self, config: Config) -> None:
        """Raise ConfigError, naming the settings that differ, unless `config` means what is installed."""
        said = {"installed": statement(self.config), "given": statement(config)}
        if lines := differences(said, lambda who: " and ".join(who)):
            raise ConfigError(
                [(SECTION, "another configuration is installed; uninstall it first\n" + "\n".join(lines))]
            )

    def without_section(self, config: Any) -> Any:
        """`config`, as a script gives it to DeepSpeed, without our section.

        Raises ConfigError if there is a section and it is bad, or differs from what is installed.
        """
        if not isinstance(config, str | Mapping) or SECTION not in read(config):
            return config
        section, rest = load(config)
        self.require_same(section)
        return rest

    def statement(self) -> dict[str, str]:
        """What this rank goes by, and all ranks must: the configuration, and the measurements it refers to."""
        said = statement(self.config)
        if self.observer is not None:
            said["observer"] = type(self.observer).__name__
        if self.policy.calibration is not None:
            # By its contents: where the file lies is each rank's own affair.
            said["megacomp.communication.calibration"] = self.policy.calibration.digest
        if self.policy.tunings is not None:
            said |= self.policy.tunings.statement()
        return said

    def trust(self, group: dist.ProcessGroup | None) -> None:
        """Take it that the ranks of `group` (None: the default group) have compared their configurations."""
        self._agreed_ranks.add(frozenset(dist.get_process_group_ranks(group)))

    def agree(self, group: dist.ProcessGroup) -> None:
        """Compare configurations with the other ranks of `group`, unless that has been done.

        All ranks of the group must come here. Raises AgreementError on each of them if they differ, and
        CollectiveError if a message of it has failed on this rank before.
        """
        refuse_failed(group)
        if group in self._agreed_groups:
            return
        ranks = frozenset(dist.get_process_group_ranks(group))
        if len(ranks) > 1 and not any(ranks <= agreed for agreed in self._agreed_ranks):
            agree(self.statement(), group)
        self._agreed_groups.add(group)

    # Compiled models break their graph here instead of tracing through decisions and counters, which would be
    # recompiled for every site and every call.
    @torch.compiler.disable(recursive=False)
    def inside(self, layer: torch.nn.Module, forward: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`forward(layer, *args, **kwargs)`, whose messages are those of the site of `layer`, if any."""
        site = self.sites.get(layer)
        token = _visit.set(None if site is None else _Visit(site, torch.is_grad_enabled()))
        try:
            return forward(layer, *args, **kwargs)
        finally:
            _visit.reset(token)

    @torch.compiler.disable
    def __call__(
        self, collective: Collective, tensor: torch.Tensor, group: dist.ProcessGroup, even: bool = True
    ) -> torch.Tensor | None:
        """The result of `collective` on `tensor` [..., features] over `group`, compressed; or None: not ours.

        None means that the original collective is to run on every rank of the group; why is counted. Nothing was
        sent then, but for what an observer or the numerical guard is shown. `tensor` is never changed; if it is a
        DeferredPartial, the original collective is to be given it `materialized`.

        even: whether every rank is to get (reduce_scatter) or gives (all_gather) equally many rows.

        A message that cannot be compressed raises nothing. AgreementError, on every rank, if this is the
        first message of a group whose ranks have not compared their configurations yet and they differ.
        CollectiveError, which names site and rank, for what fails on the way, as where a peer is gone or memory runs
        out: a rank that fell back to the original collective alone would leave the others waiting. From then on
        every message of the group fails, for what its peers have sent might be taken for what they send next.
        """
        if not self._open:
            return None
        visit = _visit.get()
        if visit is None:
            self._decline(None, Decline.OUTSIDE, group)
            return None
        site, grad_enabled = visit
        self.agree(group)
        try:
            return self._take(site, grad_enabled, collective, tensor, group, even)
        except BaseException as error:
            if isinstance(group, SimulatedGroup):
                raise  # they share this process, and nobody waits
            failure = f"{collective} at {site.name} failed on rank {dist.get_rank()}: {cause_of(error)}"
            mark_failed(group, failure)
            if isinstance(error, Exception):
                raise CollectiveError(failure) from error
            raise

    def _take(
        self,
        site: Site,
        grad_enabled: bool,
        collective: Collective,
        tensor: torch.Tensor,
        group: dist.ProcessGroup,
        even: bool,
    ) -> torch.Tensor | None:
        """The result of a message of `site`, or None if it is not compressed."""
        if type(tensor) not in (torch.Tensor, DeferredPartial):
            self._decline(site, Decline.SUBCLASS, group)
            return None
        if self.observer is not None:
            self._observe(self.observer, site, grad_enabled, collective, materialized(tensor), group)
            return None
        world_size = group.size()
        features = tensor.shape[-1] if tensor.dim() else 1
        rows = tensor.numel() // features if features else 0
        if collective == "reduce_scatter" and even:
            even = tensor.dim() > 0 and tensor.shape[0] % world_size == 0
        outcome = self.policy.decide(
            site, collective, rows, features, tensor.dtype, world_size, even=even, grad_enabled=grad_enabled
        )
        if isinstance(outcome, Decline):
            self._decline(site, outcome, group)
            return None
        stream = self._stream(site, group)
        if stream.switched_off:
            self._decline(site, Decline.GUARD, group)
            return None
        stream.compressed += 1
        # Nothing that a CUDA graph captures is sampled: the host cannot wait for it, and every replay would repeat it.
        capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
        sampled = not capturing and _due(self._sqnr_every, stream)
        guarded = not capturing and _due(self._guard.every, stream)
        if sampled or guarded:
            # Needed as it is besides: what is encoded is that.
            tensor = materialized(tensor)
        result = _COLLECTIVES[collective](tensor, group, outcome)
        counters = self.telemetry.at(site)
        if sampled or guarded:
            exact = _exact(collective, tensor, group)
        if guarded and (verdict := self._guard.judge(exact, result, group)) is not None:
            if _is_counted(group):
                counters.guard = counters.guard.with_sample(*verdict)
            if verdict.too_noisy is not None:
                stream.switched_off = True
                self._guard.warn(site.name, group, verdict.too_noisy)
                self._decline(site, Decline.GUARD, group)
                return None
        if not _is_counted(group):
            return result
        traffic = self._wire_bytes(
            outcome,
            rows,
            features,
            tensor.dtype,
            rank=group.rank(),
            world_size=world_size,
            collective=collective,
        )
        counters.count(outcome.codec.name, rows, traffic)
        if sampled:
            counters.sample(exact, result)
        return result

    def _stream(self, site: Site, group: dist.ProcessGroup) -> _Stream:
        streams = self._streams.get(group)
        if streams is None:
            streams = self._streams[group] = {}
        stream = streams.get(site.name)
        if stream is None:
            stream = streams[site.name] = _Stream()
        return stream

    def _observe(
        self,
        observer: Observer,
        site: Site,
        grad_enabled: bool,
        collective: Collective,
        tensor: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        """Show the observer this rank's partial and the sum of all ranks', if `tensor` is one that it is to see."""
        reason = self.policy.unfit(tensor.nbytes, tensor.dtype, group.size(), grad_enabled) or Decline.OBSERVED
        self._decline(site, reason, group)
        if reason is not Decline.OBSERVED or collective == "all_gather":
            return
        partial = as_matrix(tensor.detach())
        observer.partial(site, group.rank(), group.size(), partial)
        total = _exact("all_reduce", partial, group)
        if _is_counted(group):
            observer.total(site, total)

    def _decline(self, site: Site | None, reason: Decline, group: dist.ProcessGroup) -> None:
        if _is_counted(group):
            self.telemetry.decline(site, reason)


def _out_features(layer: torch.nn.Module) -> int | None:
    """How many features a linear layer gives out on this rank; None if that cannot be told."""
    # A quantized layer's weight is packed, in another layout.
    if isinstance(features := getattr(layer, "out_features", None), int):
        return features
    weight = getattr(layer, "weight", None)
    return weight.shape[0] if isinstance(weight, torch.Tensor) else None


def _due(every: int, stream: _Stream) -> bool:
    """Whether the message just compressed is one in `every`; 0: none is."""
    return every > 0 and stream.compressed % every == 0


def _is_counted(group: dist.ProcessGroup) -> bool:
    """Whether what this rank of `group` does is counted: of simulated ranks, who share a door, rank 0 is."""
    return not isinstance(group, SimulatedGroup) or group.rank() == 0


def _exact(collective: Collective, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """What the uncompressed collective makes of `tensor`, in fp32."""
    exact = tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if collective == "all_reduce":
        dist.all_reduce(exact, group=group)
        return exact
    rows = exact.shape[0] // group.size() if collective == "reduce_scatter" else exact.shape[0] * group.size()
    result = exact.new_empty(rows, *exact.shape[1:])
    if collective == "reduce_scatter":
        reduce_scatter_single(result, exact, group=group)
    else:
        all_gather_single(result, exact, group=group)
    return result
