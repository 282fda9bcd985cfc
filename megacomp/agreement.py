"""Ranks that compress differently would exchange garbage or wait forever: make sure that they agree first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from megacomp.version import __version__

if TYPE_CHECKING:
    from megacomp.config import Config

__all__ = ["AgreementError", "agree", "differences", "statement"]

Holder = TypeVar("Holder")


class AgreementError(RuntimeError):
    """The ranks of a group cannot compress together; raised on each of them, before anything is changed."""


def statement(config: Config) -> dict[str, str]:
    """What a rank goes by: the package's version and every setting, by path, as JSON text."""
    return {"version of megacomp": __version__, **dict(_settings("megacomp", config.canonical()))}


def _settings(path: str, value: Any) -> Iterator[tuple[str, str]]:
    # A codec is one setting, however it is spelt.
    if isinstance(value, Mapping) and not path.endswith("codec"):
        for key, inner in value.items():
            yield from _settings(f"{path}.{key}", inner)
    elif isinstance(value, list) and path.endswith("rules"):
        for index, inner in enumerate(value):
            yield from _settings(f"{path}[{index}]", inner)
    else:
        yield path, json.dumps(value, sort_keys=True)


def agree(mine: Mapping[str, str] | Exception, group: dist.ProcessGroup | None) -> None:
    """Compare what the ranks of `group` (None: the default group) go by; all of them must call this.

    mine: a `statement`, or the exception that kept this rank from making one.

    Raises that exception on this rank, and AgreementError on every other. Raises AgreementError on every rank
    if statements differ, naming each setting that does, its values, and the ranks that hold them; and on those
    that cannot reach the others within the group's timeout.
    """
    told: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(told, f"{type(mine).__name__}: {mine}" if isinstance(mine, Exception) else mine, group)
    except RuntimeError as error:
        if isinstance(mine, Exception):
            raise mine from error
        ranks = _ranks(dist.get_process_group_ranks(group))
        raise AgreementError(
            f"rank {dist.get_rank()} cannot compare its configuration of megacomp with those {ranks}: {error}"
        ) from error
    if isinstance(mine, Exception):
        raise mine
    said = dict(zip(dist.get_process_group_ranks(group), told, strict=True))
    failures = [f"rank {rank}: {error}" for rank, error in said.items() if isinstance(error, str)]
    if failures:
        raise AgreementError("megacomp could not be installed on every rank\n" + "\n".join(failures))
    if disagreements := differences(said, _ranks):
        raise AgreementError("the ranks disagree on the configuration of megacomp\n" + "\n".join(disagreements))


def differences(said: Mapping[Holder, Mapping[str, str]], name: Callable[[list[Holder]], str]) -> list[str]:
    """One line for each setting on which statements differ: "megacomp.backend: "auto" on rank 0; ..."

    said: the statement of each holder. name: a phrase for some of the holders, "on rank 0".
    """
    lines = []
    for setting in dict.fromkeys(setting for statement in said.values() for setting in statement):
        holders: dict[str, list[Holder]] = {}
        for holder, settings in said.items():
            holders.setdefault(settings.get(setting, "absent"), []).append(holder)
        if len(holders) > 1:
            lines.append(f"{setting}: " + "; ".join(f"{value} {name(who)}" for value, who in holders.items()))
    return lines


def _ranks(ranks: list[int]) -> str:
    return f"on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
