"""The search: allocations against brute force, measurements against the evaluation, and the command."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import tiny_models
from rank_pool import RankPool
from typer.testing import CliRunner

from megacomp import codecs
from megacomp.config import Config, load
from megacomp.launch import cli, engines, files, search_report
from megacomp.launch.allocation import Frontier, close_in, communication, written
from megacomp.launch.evaluation import evaluate
from megacomp.launch.searching import Budget, Measured, Search, ladder, search
from megacomp.launch.trials import Trial, Trials
from megacomp.policy import Decline, Policy, Site

pytestmark = pytest.mark.usefixtures("no_launcher")

HIDDEN, LAYERS, VOCAB = 64, 2, 96
SPECS: tuple[Any, ...] = ({"preset": "int3", "rotation": 64}, "mxfp4", "static4", "int8")
REFERENCE = {"backend": "reference", "communication": {"min_bytes": 0}}


# Allocation


def _brute_force(sizes: list[int], costs: list[list[float]], limit: float) -> int | None:
    totals = (
        sum(sizes[candidate] for candidate in choice)
        for choice in itertools.product(range(len(sizes)), repeat=len(costs))
        if sum(row[candidate] for row, candidate in zip(costs, choice, strict=True)) <= limit
    )
    return min(totals, default=None)


@pytest.mark.parametrize("seed", range(6))
def test_the_frontier_is_that_of_every_possible_choice(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = [int(size) for size in random.choice(np.arange(10, 60), 4) * random.choice([1, 8])]
    costs = [[float(cost) for cost in random.lognormal(0, 2, 4)] for _ in range(5)]
    costs[1][2] = math.inf
    costs[3][0] = math.nan
    frontier = Frontier.of(sizes, costs)
    assert (np.diff(frontier.sizes) > 0).all() and (np.diff(frontier.costs) < 0).all()
    for point in range(len(frontier)):
        choice = frontier.choice(point)
        assert sum(sizes[candidate] for candidate in choice) == frontier.sizes[point]
        chosen = sum(row[candidate] for row, candidate in zip(costs, choice, strict=True))
        assert chosen == pytest.approx(frontier.costs[point])
    for limit in (*frontier.costs * 1.0001, *random.uniform(frontier.costs[-1], frontier.costs[0], 10)):
        assert frontier.sizes[frontier.within(limit)] == _brute_force(sizes, costs, limit)
    assert frontier.within(0.0) == len(frontier) - 1


def test_a_site_without_a_choice() -> None:
    with pytest.raises(ValueError, match="site 1 has no candidate"):
        Frontier.of([1, 2], [[0.0, 1.0], [math.inf, math.nan]])
    assert Frontier.of([7], [[2.0], [0.5]]).sizes.tolist() == [14]


@pytest.mark.parametrize("limit", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("power", [0.7, 1.0, 1.6])
def test_tries_close_in_on_the_smallest_good_point(limit: float, power: float) -> None:
    random = np.random.default_rng(0)
    frontier = Frontier.of([104, 136, 176, 264, 512], [[*random.lognormal(0, 1, 4), 0.0] for _ in range(20)])
    tries: list[int] = []

    def load_of(point: int) -> float:
        tries.append(point)
        return (frontier.costs[point] / 3) ** power  # good from a cost of 3 on

    close_in(frontier, load_of, limit, go_on=lambda: True)
    assert min(point for point in tries if frontier.costs[point] <= 3) == frontier.within(3.0)
    assert len(set(tries)) == len(tries) < 25 < len(frontier)
    tries.clear()
    close_in(frontier, load_of, limit, finest=100, go_on=lambda: True)
    good = [point for point in tries if frontier.costs[point] <= 3]
    assert frontier.sizes[min(good)] - frontier.sizes[frontier.within(3.0)] < 100
    tries.clear()
    close_in(frontier, lambda point: tries.append(point) or math.inf, 50.0, go_on=lambda: len(tries) < 3)
    assert len(tries) == 3 and tries == sorted(tries)


def _site(layer: int, module: Any, layers: int) -> Site:
    return Site(f"layers.{layer}.{module}", module, layer, layers)


@pytest.mark.parametrize("seed", range(8))
def test_a_configuration_says_the_allocation(seed: int) -> None:
    random = np.random.default_rng(seed)
    layers, modules = 11, ("attention", "mlp") if seed % 4 else ("mlp",)
    sites = [_site(layer, module, layers) for layer in range(layers) for module in modules]
    options = [codecs.get({"preset": "int4", "rotation": 64}), codecs.get("mxfp4"), codecs.get("int8"), None]
    weights = random.dirichlet([0.4] * 4)
    allocation = {site: options[random.choice(4, p=weights)] for site in sites}
    if seed == 7:
        allocation = {site: options[site.layer % 3] if site.layer else options[0] for site in sites}
    said = communication(allocation)
    policy = Policy(load({"megacomp": {"communication": {**json.loads(json.dumps(said)), "min_bytes": 0}}})[0])
    for site, codec in allocation.items():
        outcome = policy.decide(site, "all_reduce", 4, 64, torch.bfloat16, 2)
        assert (outcome is Decline.EXACT) if codec is None else (not isinstance(outcome, Decline))
        assert codec is None or (outcome.codec.spec == codec.spec and outcome.gather_codec is None)  # type: ignore[union-attr]
    if seed == 7:
        assert [rule.get("module") for rule in said["rules"]] == [None] * len(said["rules"])


def test_rules_are_short() -> None:
    int8, mxfp4 = codecs.get("int8"), codecs.get("mxfp4")
    sites = [_site(layer, module, 8) for layer in range(8) for module in ("attention", "mlp")]
    allocation = {site: int8 if site.module == "mlp" and site.layer in (0, 3, 5, 6, 7) else mxfp4 for site in sites}
    rules = [{"layers": "0,3,5-7", "module": "mlp", "codec": "int8"}]
    assert communication(allocation) == {"codec": "mxfp4", "rules": rules}
    halves = {site: None if site.module == "mlp" and site.layer != 0 else int8 for site in sites}
    halves |= {site: mxfp4 for site in sites if site.module == "attention"}
    assert communication(halves) == {
        "codec": "mxfp4",
        "rules": [
            {"layers": "0", "module": "mlp", "codec": "int8"},
            {"layers": "1-7", "module": "mlp", "codec": None},
        ],
    }
    assert communication(dict.fromkeys(sites)) == {"codec": None}


def test_codecs_are_written_by_their_presets() -> None:
    specs = ("nvfp4", "static4_paper", {"preset": "int5", "rotation": 128}, {"preset": "static4", "bits": 3})
    for spec in specs:
        assert written(codecs.get(spec)) == spec
    odd = codecs.get({"format": "int", "bits": 7, "block_size": 16, "symmetric": False, "scale": "fp16"})
    for codec in (odd, *ladder(256), *ladder(48), *ladder(64)):
        assert codecs.get(written(codec)).spec == codec.spec


def test_budgets() -> None:
    measured = Measured("int8", 8.25, 10.1, 0.01, 0.001, 0.004, 0.004, None)
    assert Budget(perplexity=0.013).load(measured) == pytest.approx(math.log(1.012) / math.log(1.013))
    assert Budget(perplexity=0.0119).load(measured) > 1 > Budget(perplexity=0.0121).load(measured)
    assert Budget(kl=0.008).load(measured) == 0.5
    assert Budget(0.013, 0.001).load(measured) == 4
    for spoilt in ({"increase": math.inf}, {"increase": math.nan, "stderr": None}, {"kl": math.nan}):
        for budget in (Budget(0.5), Budget(kl=0.5), Budget(0.5, 0.5)):
            assert budget.load(replace(measured, **spoilt)) == math.inf
    for limits in ({}, {"perplexity": 0.0}, {"kl": math.nan}, {"perplexity": 0.1, "kl": -1.0}):
        with pytest.raises(ValueError, match="a budget is"):
            Budget(**limits)


# Measuring


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama_biased", folder)
    np.save(folder / "tokens.npy", _tokens().numpy())
    (folder / "ds.json").write_text(json.dumps({"dtype": "fp32", "megacomp": REFERENCE}))
    return folder


def _tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (10, 16), generator=torch.Generator().manual_seed(1))


def _build(folder: Path, simulate: int | None = 2) -> engines.Engine:
    tp = simulate or dist.get_world_size()
    return engines.build(folder, "megatron", tp=tp, dtype=torch.float32, simulate=simulate is not None)


def _search(engine: engines.Engine, out: Path, budget: Budget, specs: Any = SPECS, **options: Any) -> Search:
    choices = [codecs.get(spec) for spec in specs]
    base = Config.model_validate(REFERENCE)
    return search(engine, _tokens(), choices, budget, "digest", out, base=base, batch_size=2, **options)


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, Path]:
    out = tmp_path_factory.mktemp("search") / "mix.json"
    with _build(folder) as engine:
        return _search(engine, out, Budget(kl=0.02)), out


def _evaluated(folder: Path, communication: dict[str, Any]) -> Any:
    with _build(folder) as engine:
        config = {"megacomp": {"backend": "reference", "communication": {"min_bytes": 0, **communication}}}
        return evaluate(engine, _tokens()[5:], config, batch_size=2)


def test_measurements_are_those_of_the_evaluation(folder: Path, found: tuple[Search, Path]) -> None:
    result, out = found
    assert (result.sequences, result.sites_sequences, result.calibration_sequences) == (5, 5, 5)
    calibration = str(out.with_name("mix.calibration.safetensors"))
    rule = {"layers": "1", "module": "mlp", "codec": "static4"}
    alone = _evaluated(folder, {"codec": None, "rules": [rule], "calibration": calibration})
    assert result.divergences["layers.1.mlp"]["static4"] == pytest.approx(alone.kl, rel=1e-6)
    single = next(single for single in result.singles if single.name == "int3+rotation64")
    everywhere = _evaluated(folder, {"codec": SPECS[0]})
    assert single.perplexity == pytest.approx(everywhere.perplexity, rel=1e-6)
    assert (single.bits, single.kl) == (everywhere.bits_per_value, pytest.approx(everywhere.kl, rel=1e-6))
    assert result.baseline_perplexity == pytest.approx(everywhere.baseline_perplexity, rel=1e-6)
    assert single.sqnr_db is not None and 10 < single.sqnr_db < 30


def test_the_mix_is_the_best_there_is(folder: Path, found: tuple[Search, Path]) -> None:
    result, _ = found
    bits = {name: codecs.get(spec).bits_per_value(HIDDEN) for name, spec in zip(_names(), SPECS, strict=True)}
    sites = list(result.divergences)
    assert sites == [f"layers.{layer}.{module}" for layer in range(LAYERS) for module in ("attention", "mlp")]
    # Within the first limit no other choice takes fewer bits, as the sites' own divergences add up.
    first = result.mixes[0]
    options = [*bits.items(), ("exact", 16.0)]
    within = [
        sum(bits for _, bits in choice) / len(sites)
        for choice in itertools.product(options, repeat=len(sites))
        if sum(result.divergences[site].get(name, 0.0) for site, (name, _) in zip(sites, choice, strict=True)) <= 0.02
    ]
    assert first.bits == min(within) and first.expected_kl <= 0.02
    best, single = result.best, result.best_single
    assert best is not None and single is not None
    assert best.kl <= 0.02 and best.bits < single.bits
    tried = [*result.singles, *result.mixes]
    assert best.bits == min(measured.bits for measured in tried if measured.kl <= 0.02)
    assert {bits.get(name, 16.0) for name in result.allocation.values()} <= {*bits.values(), 16.0}
    assert best.bits == sum(bits.get(name, 16.0) for name in result.allocation.values()) / len(sites)


def _names() -> list[str]:
    return [str(codecs.get(spec)) for spec in SPECS]


def test_the_section_is_the_mix(folder: Path, found: tuple[Search, Path]) -> None:
    result, _ = found
    config = load({"megacomp": json.loads(json.dumps(result.section))})[0]
    assert (config.backend, config.communication.min_bytes) == ("reference", 0)
    with _build(folder) as engine:
        measured = evaluate(engine, _tokens()[5:], config, batch_size=2)
    assert result.best is not None
    assert measured.perplexity == pytest.approx(result.best.perplexity, rel=1e-6)
    if "exact" not in result.allocation.values():
        assert measured.bits_per_value == result.best.bits


def test_a_divergence_that_is_no_number_stays_none(folder: Path, tmp_path: Path) -> None:
    known = {"loss": [4.5, 4.5], "kl": [0.01, math.nan], "sqnr_db": []}
    file = tmp_path / "trials.json"
    file.write_text(json.dumps({"identity": "these", "exact": [4.5, 4.5], "trials": {"int8": known}}))
    trial = Trial("int8", Config.model_validate(REFERENCE))
    with _build(folder) as engine:
        trials = Trials(engine, _tokens(), file, "these")
    assert (trials.sequences(trial), trials.kl(trial, 1)) == (2, 0.01)
    assert math.isnan(trials.kl(trial, 2)) and math.isnan(trials.change(trial).kl)


class _Interrupted(Exception):
    pass


class _Counter:
    """Notes progress, and interrupts the sites' after some."""

    def __init__(self, limit: float = math.inf) -> None:
        self.seen: list[str] = []
        self._limit = limit

    def __call__(self, what: str, done: int, total: int) -> None:
        assert 0 < done <= total
        self.seen.append(what)
        if self.seen.count("sites") > self._limit:
            raise _Interrupted


def test_nothing_runs_twice(folder: Path, found: tuple[Search, Path], tmp_path: Path) -> None:
    out = tmp_path / "mix.json"
    sites = 3 * (1 + 4 * len(SPECS))
    counters = [_Counter(2), _Counter(20), _Counter(), _Counter(), _Counter()]
    with _build(folder) as engine:
        for counter in counters[:2]:
            with pytest.raises(_Interrupted):
                _search(engine, out, Budget(kl=0.02), progress=counter)
        result = _search(engine, out, Budget(kl=0.02), progress=counters[2])
        assert _same(result) == _same(found[0])
        # What is kept of the sites is whole batches.
        assert {*counters[0].seen} == {"calibration", "sites"}
        assert {*counters[1].seen} == {"sites"} and "calibration" not in counters[2].seen
        assert counters[2].seen.count("sites") == sites - (1 + 4 * len(SPECS))
        again = _search(engine, out, Budget(kl=0.01), progress=counters[3])
        assert {what.split()[0] for what in counters[3].seen} <= {"mix"} and again.best is not None
        more = _search(engine, out, Budget(kl=0.02), [*SPECS, "int6"], progress=counters[4])
        assert counters[4].seen.count("sites") == 3 * (1 + 4) and "calibration" not in counters[4].seen
    assert more.divergences["layers.0.mlp"].items() > result.divergences["layers.0.mlp"].items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mix.calibration.safetensors", "mix.measurements.json"]


def _same(result: Search) -> dict[str, Any]:
    """Everything but where it was written and by how many processes."""
    section = {**result.section, "communication": {**result.section["communication"], "calibration": None}}
    return {**result.to_dict(), "section": section, "simulated": None}


def test_a_time_limit_leaves_one_batch_and_the_full_runs(folder: Path, tmp_path: Path) -> None:
    with _build(folder) as engine:
        result = _search(engine, tmp_path / "mix.json", Budget(kl=1e-9), SPECS[:2], time_limit=0.0)
        assert (result.sites_sequences, result.sequences) == (2, 10)
        # Nothing is within such a budget, which mixes are tried for nevertheless.
        assert result.best is None and len(result.mixes) >= 1
        assert set(result.allocation.values()) == {"exact"} and result.section["communication"]["codec"] is None
        late = _search(engine, tmp_path / "mix.json", Budget(kl=1.0), SPECS[:2], time_limit=0.0)
        assert late.best is late.best_single and not late.mixes
        assert late.sites_sequences == 4  # it went on from where it was


def _on_ranks(folder: Path, out: Path, simulate: int | None = None) -> Search:
    with _build(folder, simulate) as engine:
        return _search(engine, out, Budget(kl=0.02), ("mxfp4", "static4"))


def test_real_ranks_find_the_same(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    results = ranks.run(_on_ranks, folder, tmp_path / "mix.json")
    assert results[0] == results[1] and not results[0].simulated
    (tmp_path / "simulated").mkdir()
    expected = _on_ranks(folder, tmp_path / "simulated" / "mix.json", simulate=2)
    assert _same(results[0]) == _same(expected) and expected.simulated


def test_requests_that_make_no_sense(folder: Path, tmp_path: Path) -> None:
    with _build(folder) as engine:
        choices = [codecs.get("static4")]
        with pytest.raises(ValueError, match="1 sequence: a search takes two sequences"):
            search(engine, _tokens()[:1], choices, Budget(0.01), "digest", tmp_path / "mix.json")
        with pytest.raises(ValueError, match=r"2 sequences: .* another one for the calibration"):
            search(engine, _tokens()[:2], choices, Budget(0.01), "digest", tmp_path / "mix.json")


# The command


def _call(folder: Path, *arguments: Any) -> Any:
    given = ["search", "--model", folder, "--dtype", "fp32", "--engine", "megatron", *arguments]
    return CliRunner().invoke(cli.app, [str(argument) for argument in given])


def test_the_command_writes_a_configuration_and_a_report(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, report, figures = tmp_path / "ds.json", tmp_path / "report", tmp_path / "figures.json"
    result = _call(
        *(folder, "--tokens", folder / "tokens.npy", "--config", folder / "ds.json", "--simulate-tp", 2),
        *("--codec", "int3", "--codec", '{"preset": "static4", "bits": 5}', "--max-kl", 0.02),
        *("--max-perplexity-increase", "900%", "--batch-size", 5, "--sequences", 8),
        *("--out", out, "--report", report, "--json", figures),
    )
    assert result.exit_code == 0, result.output
    written_section, rest = load(out)
    assert rest == {"dtype": "fp32"} and written_section.communication.min_bytes == 0
    row = json.loads(figures.read_text())
    assert (row["sequences"], row["calibration_sequences"], row["tp"], row["simulated"]) == (4, 4, 2, True)
    assert row["budget"] == {"perplexity": 9.0, "kl": 0.02} and row["environment"]["backend"] == "gloo"
    assert f"{row['best']['bits']:.3f} bits per value, stays within perplexity +900 % and KL" in result.output
    page = (report / "report.md").read_text()
    for text in ("| int3 |", "static5", "pareto.png", "sites.png", '"megacomp"', "| layers.1 |"):
        assert text in page
    for name in ("pareto.png", "sites.png"):
        assert (report / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in report.iterdir()) == ["pareto.png", "report.md", "sites.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give a budget: --max-perplexity-increase 1%"),
        ("--max-perplexity-increase 1", "--max-perplexity-increase 1: give a share above 0, such as 1% or 0.01"),
        ("--max-perplexity-increase 0%", "give a share above 0"),
        ("--max-perplexity-increase some", "give a share above 0"),
        ("--max-kl nan", "--max-kl nan: give nats per token, above 0"),
        ("--max-kl 1 --codec mxfp5", "--codec mxfp5: unknown preset"),
        ("--max-kl 1 --codec {", "--codec {: "),
        ("--max-kl 1", "one rank reduces nothing"),
        ("--max-kl 1 --simulate-tp 1", "one rank reduces nothing"),
        ("--max-kl 1 --simulate-tp 3", "does not divide"),
        ("--max-kl 1 --simulate-tp 2 --sequences 2", "2 sequences: a search takes"),
        ("--max-kl 1 --report {}/no/report", "there is no folder"),
        ("--max-kl 1 --report {}/config.json", "is a file; give the name of a folder"),
        ("--max-kl 1 --json {}", "is a folder; give the name of a file"),
    ],
)
def test_requests_that_cannot_be_served(folder: Path, tmp_path: Path, arguments: str, message: str) -> None:
    pytest.importorskip("matplotlib")
    given = arguments.replace("{}", str(folder)).split()
    result = _call(folder, "--tokens", folder / "tokens.npy", "--out", tmp_path / "ds.json", *given)
    assert result.exit_code == 2 and message in result.output, result.output
    assert "Traceback" not in result.output and not list(tmp_path.iterdir())


def test_only_a_report_needs_matplotlib(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    base = (folder, "--tokens", folder / "tokens.npy", "--out", tmp_path / "ds.json", "--simulate-tp", 2)
    options = ("--max-kl", 1, "--codec", "int8", "--config", folder / "ds.json")
    refused = _call(*base, *options, "--report", tmp_path / "report")
    assert refused.exit_code == 2 and "pip install 'megacomp[plot]'" in refused.output
    served = _call(*base, *options)
    assert served.exit_code == 0, served.output


def test_what_a_report_says(found: tuple[Search, Path]) -> None:
    result, _ = found
    assert result.best is not None
    assert "fewer than the best single codec" in search_report.verdict(result)
    alone = replace(result, best_single=None)
    assert "No single codec does" in search_report.verdict(alone)
    single = replace(result, best=result.singles[1], best_single=result.singles[1])
    assert "No mix that was tried takes fewer" in search_report.verdict(single)
    assert len(search_report.compared(single)) == len(SPECS) and len(search_report.compared(result)) == len(SPECS) + 1
    assert "every site is left exact" in search_report.verdict(replace(result, best=None))
    assert json.loads(json.dumps(result.to_dict()))["singles"][0] == asdict(result.singles[0])
