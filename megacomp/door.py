"""The door every patched function comes to: is this message ours, how does it travel, what did it cost?"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from megacomp import collectives
from megacomp.agreement import agree, differences, statement
from megacomp.config import SECTION, ConfigError, load, read
from megacomp.policy import Decline, Policy, Site
from megacomp.telemetry import Telemetry

if TYPE_CHECKING:
    from megacomp.collectives import Collective, Route
    from megacomp.config import Config

__all__ = ["Door"]

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


_COLLECTIVES: Mapping[str, Callable[[torch.Tensor, dist.ProcessGroup, Route], torch.Tensor]] = {
    "all_reduce": collectives.all_reduce,
    "reduce_scatter": collectives.reduce_scatter,
    "all_gather": collectives.all_gather,
}


class Door:
    """Takes the messages of known sites through the compressed collectives, as one configuration has it.

    config: that configuration.
    policy, telemetry: what decides, and what counts.
    sites: the site of each layer known to be at one; layers are not kept alive.
    not_covered: layers of the models attached that reduce where no patch sees them, by name, and why.
    """

    def __init__(self, config: Config) -> None:
        """Raises ConfigError if this machine lacks what the backend of `config` needs."""
        self.config = config
        self.policy = Policy(config)
        self.telemetry = Telemetry()
        self.sites: weakref.WeakKeyDictionary[torch.nn.Module, Site] = weakref.WeakKeyDictionary()
        self.not_covered: dict[str, str] = {}
        self._sqnr_every = config.telemetry.sqnr_every
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

    def attach(self, sites: Mapping[torch.nn.Module, Site], not_covered: Mapping[str, str]) -> None:
        """Learn the sites of a model that is known entirely, and which of its layers reduce unseen and why.

        Raises ConfigError if a rule can match none of the sites. A model without any is legitimate (it is not
        split, or not covered) and only warned of.
        """
        if sites:
            self.policy.check_rules(sites.values())
        else:
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

    def trust(self, group: dist.ProcessGroup | None) -> None:
        """Take it that the ranks of `group` (None: the default group) have compared their configurations."""
        self._agreed_ranks.add(frozenset(dist.get_process_group_ranks(group)))

    def agree(self, group: dist.ProcessGroup) -> None:
        """Compare configurations with the other ranks of `group`, unless that has been done.

        All ranks of the group must come here. Raises AgreementError on each of them if they differ.
        """
        if group in self._agreed_groups:
            return
        ranks = frozenset(dist.get_process_group_ranks(group))
        if len(ranks) > 1 and not any(ranks <= agreed for agreed in self._agreed_ranks):
            agree(statement(self.config), group)
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

        None means that nothing was sent and the original collective is to run; why is counted. `tensor` is
        never changed.

        even: whether every rank is to get (reduce_scatter) or gives (all_gather) equally many rows.

        A message that cannot be compressed raises nothing. AgreementError, on every rank, if this is the
        first message of a group whose ranks have not compared their configurations yet and they differ.
        Errors of the communication itself are passed on, as the original collective would: a rank that fell
        back to it alone would leave the others waiting.
        """
        if not self._open:
            return None
        visit = _visit.get()
        if visit is None:
            self.telemetry.decline(None, Decline.OUTSIDE)
            return None
        site, grad_enabled = visit
        self.agree(group)
        if type(tensor) is not torch.Tensor:
            self.telemetry.decline(site, Decline.SUBCLASS)
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
            self.telemetry.decline(site, outcome)
            return None
        traffic = self._wire_bytes(
            outcome,
            rows,
            features,
            tensor.dtype,
            rank=group.rank(),
            world_size=world_size,
            collective=collective,
        )
        counters = self.telemetry.at(site)
        counters.count(outcome.codec.name, rows, traffic)
        result = _COLLECTIVES[collective](tensor, group, outcome)
        if self._sqnr_every and counters.calls % self._sqnr_every == 0:
            counters.sample(_exact(collective, tensor, group), result)
        return result


def _exact(collective: Collective, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """What the uncompressed collective makes of `tensor`, in fp32."""
    exact = tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if collective == "all_reduce":
        dist.all_reduce(exact, group=group)
        return exact
    rows = exact.shape[0] // group.size() if collective == "reduce_scatter" else exact.shape[0] * group.size()
    result = exact.new_empty(rows, *exact.shape[1:])
    if collective == "reduce_scatter":
        dist.reduce_scatter_tensor(result, exact, group=group)
    else:
        dist.all_gather_into_tensor(result, exact, group=group)
    return result
