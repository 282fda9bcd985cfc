"""megacomp.init_inference, and scripts that call DeepSpeed's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYERS, deepspeed_on_cpu, deepspeed_settings, llama, tokens
from rank_pool import RankPool

import megacomp
from megacomp.installation import ScriptInstallation

pytest.importorskip("deepspeed")

SECTION = {"communication": {"codec": "int8", "min_bytes": 0}, "backend": "reference"}


def _engine_of(section: dict[str, Any] | None, as_file: str | None) -> dict[str, Any]:
    import deepspeed

    with deepspeed_on_cpu(), torch.no_grad():
        original = deepspeed.init_inference
        exact = original(llama(), deepspeed_settings())(tokens()).logits
        settings: Any = deepspeed_settings(**(section or {}))
        given = repr(settings)
        if as_file is not None:
            Path(as_file).write_text(json.dumps(settings))
        engine = megacomp.init_inference(llama(), as_file or settings)
        result = engine(tokens()).logits
        installation = getattr(engine, "megacomp", None)
        calls = {} if installation is None else {n: s.calls for n, s in installation.report().sites.items()}
        if installation is not None:
            installation.uninstall()
        again = engine(tokens()).logits
    return {
        "changed": not torch.equal(exact, result),
        "same_afterwards": torch.equal(exact, again),
        "settings_untouched": repr(settings) == given,
        "restored": deepspeed.init_inference is original,
        "calls": calls,
    }


@pytest.mark.parametrize("as_file", [False, True])
def test_a_whole_deepspeed_configuration_works_unchanged(ranks: RankPool, tmp_path: Path, as_file: bool) -> None:
    first, _ = ranks.run(_engine_of, SECTION, str(tmp_path / "ds.json") if as_file else None)
    assert first["changed"] and first["same_afterwards"]
    assert first["settings_untouched"] and first["restored"]
    assert first["calls"] == {f"layers.{i}.{module}": 1 for i in range(LAYERS) for module in ("attention", "mlp")}


def test_without_a_section_it_is_deepspeeds_own(ranks: RankPool) -> None:
    first, _ = ranks.run(_engine_of, None, None)
    assert not first["changed"] and first["restored"] and first["calls"] == {}


def _keyword() -> list[Any]:
    with deepspeed_on_cpu(), torch.no_grad():
        settings = deepspeed_settings()
        engine = megacomp.init_inference(llama(), **settings, megacomp=SECTION)
        engine(tokens())
        engine.megacomp.uninstall()
        try:
            megacomp.init_inference(llama(), {**settings, "megacomp": SECTION}, megacomp=SECTION)
        except megacomp.ConfigError as error:
            return [engine.megacomp.report().calls, str(error)]
    return []


def test_the_section_may_be_a_keyword_like_every_other_setting(ranks: RankPool) -> None:
    first, _ = ranks.run(_keyword)
    assert first == [2 * LAYERS, "megacomp: given twice, in config and as a keyword"]


def _errors_of(section: Any) -> dict[str, Any]:
    import deepspeed

    with deepspeed_on_cpu():
        original = deepspeed.init_inference
        settings = {**deepspeed_settings(), "megacomp": section}
        try:
            megacomp.init_inference(llama(), settings)
        except megacomp.ConfigError as error:
            return {"error": str(error), "restored": deepspeed.init_inference is original}
    return {}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("auto", "megacomp: must be an object"),
        ({"communication": {"codec": "int9"}}, "megacomp.communication.codec"),
        (
            {"communication": {"rules": [{"layers": "0,9", "codec": None}]}},
            f"megacomp.communication.rules[0].layers: '9' matches no layer; the model has {LAYERS} layers",
        ),
    ],
)
def test_bad_sections_leave_nothing_installed(ranks: RankPool, section: Any, words: str) -> None:
    for outcome in ranks.run(_errors_of, section):
        assert words in outcome["error"]
        assert outcome["restored"]


def _section_of_the_script(installed: Any) -> str | None:
    """An unmodified script whose own settings differ from what was installed."""
    import deepspeed

    with deepspeed_on_cpu(), megacomp.install({"megacomp": installed}):
        try:
            deepspeed.init_inference(llama(), deepspeed_settings(**SECTION))
        except megacomp.ConfigError as error:
            return str(error)
    return None


def test_a_script_with_another_section_than_installed_is_refused(ranks: RankPool) -> None:
    assert ranks.run(_section_of_the_script, SECTION) == [None, None]
    for error in ranks.run(_section_of_the_script, {**SECTION, "backend": "auto"}):
        assert 'megacomp.backend: "auto" installed; "reference" given' in error


def _script() -> dict[str, Any]:
    """A script as `megacomp run` executes it: it knows DeepSpeed only."""
    import deepspeed

    with deepspeed_on_cpu(), torch.no_grad():
        original = deepspeed.init_inference
        with ScriptInstallation() as script:
            plain = deepspeed.init_inference(llama(), deepspeed_settings())
            exact = plain(tokens()).logits
            before = script.installation
            engine = deepspeed.init_inference(llama(), config=deepspeed_settings(**SECTION))
            compressed = engine(tokens()).logits
            second = deepspeed.init_inference(llama(), config=deepspeed_settings(**SECTION))
            same = torch.equal(compressed, second(tokens()).logits)
            calls = script.installation.report().calls
        return {
            "before": before,
            "changed": not torch.equal(exact, compressed),
            "same": same,
            "calls": calls,
            "restored": deepspeed.init_inference is original,
            "exact_afterwards": torch.equal(exact, engine(tokens()).logits),
        }


def test_a_scripts_own_section_is_installed_when_it_is_met(ranks: RankPool) -> None:
    first, _ = ranks.run(_script)
    assert first == {
        "before": None,
        "changed": True,
        "same": True,
        "calls": 2 * 2 * LAYERS,
        "restored": True,
        "exact_afterwards": True,
    }
