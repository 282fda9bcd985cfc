"""Any JSON for a section: a configuration that can be used, or a ConfigError that names a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import VALUES, damaged, edited, fuzz
from hypothesis import given
from hypothesis import strategies as st

from megacomp import collectives
from megacomp.collectives import Route
from megacomp.config import Config, ConfigError, load
from megacomp.policy import Decline, Policy, Site

SECTION: dict[str, Any] = {
    "communication": {
        "codec": {"preset": "int4", "rotation": 128},
        "gather_codec": {"format": "mx", "element": "fp8_e4m3", "block_size": 32, "scale": "e8m0"},
        "algorithm": "tuned",
        "min_bytes": "tuned",
        "collectives": ["all_reduce", "reduce_scatter"],
        "pipeline_chunks": 4,
        "tuning": "no-such-file.json",
        "rules": [
            {"layers": "0-3,-1", "module": "mlp", "codec": {"format": "int", "bits": 8}, "min_bytes": 1024},
            {"codec": {"format": "static", "outlier_features": 0.1}, "max_bytes": 1048576},
        ],
        "calibration": "no-such-file.safetensors",
    },
    "weights": {"checkpoint": "no-such-folder", "order": "local"},
    "telemetry": {"sqnr_every": 10},
    "guard": {"every": 100, "min_sqnr_db": 15},
    "backend": "reference",
}
"""Names files that are not there, so nothing of it can be followed; what is read of it is everything there is."""

VALID: dict[str, Any] = {
    **SECTION,
    "communication": {
        "codec": SECTION["communication"]["codec"],
        "gather_codec": SECTION["communication"]["gather_codec"],
        "algorithm": "two_shot",
        "min_bytes": 256,
        "collectives": ["all_reduce", "all_gather"],
        "pipeline_chunks": 4,
        "rules": [
            {"layers": "0-3,-1", "module": "mlp", "codec": {"format": "int", "bits": 8}, "min_bytes": 1024},
            {"codec": {"preset": "mxfp4"}, "gather_codec": None, "algorithm": "one_shot", "max_bytes": 1048576},
        ],
    },
}
"""Every kind of setting that asks for no file."""

WORDS = st.sampled_from(
    [
        "auto",
        "tuned",
        "one_shot",
        "two_shot",
        "mxfp4",
        "int8",
        "static4",
        "reference",
        "all_gather",
        "0,-1",
        "9-3",
        None,
    ]
)
OPTIONS = st.dictionaries(
    st.sampled_from(
        ["format", "preset", "element", "bits", "block_size", "scale", "symmetric", "rotation", "row_scale"]
    )
    | st.sampled_from(["outlier_features", "range", "scale_search", "scale_rounding"]),
    st.sampled_from(["mx", "int", "static", "int4", "fp4_e2m1", "e4m3", "bf16", "best", 4, 32, 128, True, False, None])
    | VALUES,
    max_size=4,
)
FITTING = st.sampled_from(
    [
        *(
            None,
            0,
            1,
            3,
            64,
            4096,
            10**30,
            "mlp",
            "attention",
            "0,-1",
            "2-",
            "all",
            "int4",
            "nvfp4",
            "auto",
            "two_shot",
        ),
        *(
            {"preset": "int5", "rotation": 32},
            {"format": "mx", "element": "fp4_e2m1", "block_size": 8, "scale": "bf16"},
        ),
        *([], ["reduce_scatter"], [{"codec": None}], [{"layers": "1", "codec": "int8"}, {"max_bytes": 2**16}]),
    ]
)
"""What some place of a section may well hold."""


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def loaded(source: Any) -> Config | None:
    """The configuration, or None for one that was refused as it should be."""
    try:
        return load(source)[0]
    except ConfigError as error:
        _check(error, source)
        return None


def _check(error: ConfigError, source: Any) -> None:
    assert error.errors
    for path, message in error.errors:
        assert message and (path.startswith("megacomp") or (path == "" and not isinstance(source, dict)))
    str(error).encode()


def use(config: Config) -> bool:
    """Whatever is accepted can be compared, written down and followed; whether no file it names was in the way."""
    again = load({"megacomp": json.loads(json.dumps(config.canonical()))})[0]
    assert again.digest() == config.digest()
    try:
        policy = Policy(config)
    except ConfigError as error:
        _check(error, {})
        return False
    for layer, rows in ((0, 1), (3, 64), (None, 4096)):
        site = Site(f"layers.{layer}.mlp", "mlp", layer, None if layer is None else 4)
        outcome = policy.decide(site, "all_reduce", rows, 128, torch.bfloat16, 2)
        assert isinstance(outcome, Route | Decline)
        if isinstance(outcome, Route):
            traffic = collectives.wire_bytes(
                outcome, rows, 128, torch.bfloat16, rank=0, world_size=2, collective="all_reduce"
            )
            assert traffic.sent > 0
    return True


@pytest.mark.parametrize(("original", "followed"), [(SECTION, False), (VALID, True)], ids=["files missing", "valid"])
@fuzz
@given(data=st.data())
def test_a_section_with_parts_of_it_changed(original: dict[str, Any], followed: bool, data: st.DataObject) -> None:
    config = loaded({"megacomp": original})
    assert config is not None and use(config) is followed
    if (config := loaded({"megacomp": data.draw(edited(original, VALUES | WORDS | OPTIONS | FITTING))})) is not None:
        use(config)


@fuzz
@given(OPTIONS, WORDS | VALUES)
def test_codecs_of_any_options(options: dict[str, Any], other: Any) -> None:
    for codec in (options, other):
        calibration = {"calibration": "no-such-file"} if "static" in str(codec) else {}
        communication = {"codec": codec, "min_bytes": 0, **calibration}
        if (config := loaded({"megacomp": {"communication": communication, "backend": "reference"}})) is not None:
            use(config)


@fuzz
@given(VALUES)
def test_anything_at_all(section: Any) -> None:
    if (config := loaded({"megacomp": section})) is not None:
        use(config)


@fuzz
@given(damaged(json.dumps({"dtype": "bf16", "megacomp": {"communication": {"codec": "int8"}}}).encode()))
def test_a_damaged_file(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text)
    if (config := loaded(path)) is not None:
        use(config)


DEEP = 100_000


@pytest.mark.parametrize(
    "text",
    [
        "[" * DEEP,
        '{"megacomp":' * DEEP,
        '{"megacomp": ' + "[" * DEEP + "]" * DEEP + "}",
        '{"megacomp": {"communication": {"min_bytes": ' + "9" * 5000 + "}}}",
        '{"megacomp": {"communication": {"rules": [{"layers": "' + "9" * 5000 + '"}]}}}',
        '{"megacomp": {"communication": {"codec": {"format": "static", "outlier_features": NaN}}}}',
        '{"megacomp": {"\\ud800": 1}}',
        "",
        "\x00",
    ],
    ids=lambda text: text[:24],
)
def test_texts_that_are_hard_to_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert loaded(path) is None
