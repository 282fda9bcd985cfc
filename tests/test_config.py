"""The "megacomp" section: what is accepted, what it means, and what is said about what is not."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest

from megacomp import kernels
from megacomp.config import Backend, Config, ConfigError, Layers, load, read

DESIGN_EXAMPLE = {
    "dtype": "bf16",
    "tensor_parallel": {"tp_size": 2},
    "megacomp": {
        "communication": {
            "codec": "mxfp4",
            "gather_codec": None,
            "algorithm": "auto",
            "min_bytes": 65536,
            "collectives": ["all_reduce", "reduce_scatter"],
            "pipeline_chunks": "auto",
            "rules": [{"layers": "0,-1", "codec": "int8"}, {"module": "attention", "codec": None}],
            "calibration": None,
        },
        "weights": {"checkpoint": None, "order": "tp_aware"},
        "backend": "auto",
    },
}


def communication(**settings: Any) -> Config:
    return load({"megacomp": {"communication": settings}})[0]


def errors(section: Any) -> dict[str, str]:
    """Path -> message of what is wrong with a section."""
    with pytest.raises(ConfigError) as caught:
        load({"megacomp": section})
    return dict(caught.value.errors)


def test_the_documented_example_splits_into_section_and_rest(tmp_path: Path) -> None:
    before = copy.deepcopy(DESIGN_EXAMPLE)
    config, rest = load(DESIGN_EXAMPLE)
    assert rest == {"dtype": "bf16", "tensor_parallel": {"tp_size": 2}}
    assert config.communication.rules[0].layers == "0,-1"
    assert config.communication.rules[1].codec is None
    rest["tensor_parallel"]["tp_size"] = 8
    assert before == DESIGN_EXAMPLE

    file = tmp_path / "ds.json"
    file.write_text(json.dumps(DESIGN_EXAMPLE))
    assert load(file)[0] == load(str(file))[0] == config


def test_an_empty_section_means_the_documented_defaults() -> None:
    config, _ = load({"megacomp": {}})
    spelt_out = copy.deepcopy(DESIGN_EXAMPLE)
    spelt_out["megacomp"]["communication"]["rules"] = []  # type: ignore[index]
    assert config.canonical() == load(spelt_out)[0].canonical()
    assert config.telemetry.sqnr_every == 0


@pytest.mark.parametrize(
    "codec", ["int4", {"preset": "int4", "rotation": 128}, {"format": "mx", "block_size": 16}, None]
)
def test_codecs_may_be_presets_options_or_null(codec: Any) -> None:
    assert communication(codec=codec).communication.codec == codec


@pytest.mark.parametrize("name", kernels.BACKENDS)
def test_every_backend_of_the_kernels_can_be_configured(name: str) -> None:
    assert load({"megacomp": {"backend": name}})[0].backend == name
    assert get_args(Backend) == kernels.BACKENDS


def test_there_is_a_guard_only_if_there_is_one_in_the_section() -> None:
    assert load({"megacomp": {}})[0].guard is None
    short, explicit = ({"megacomp": {"guard": guard}} for guard in ({}, {"every": 100, "min_sqnr_db": 15}))
    assert load(short)[0].canonical() == load(explicit)[0].canonical()
    assert load(short)[0].canonical()["guard"] == {"every": 100, "min_sqnr_db": 15.0}


def test_sections_that_mean_the_same_have_one_digest() -> None:
    short = communication(codec="mxfp4", rules=[{"layers": "0", "codec": "int8"}])
    explicit = communication(
        codec={"format": "mx", "element": "fp4_e2m1", "block_size": 32, "scale": "e8m0"},
        min_bytes=65536,
        rules=[{"layers": "0", "codec": {"preset": "int8"}, "algorithm": "auto", "min_bytes": 65536}],
    )
    assert short.canonical() == explicit.canonical()
    assert short.digest() == explicit.digest()
    assert short.digest() != communication(codec="mxfp4", rules=[{"layers": "1", "codec": "int8"}]).digest()


def test_a_gather_codec_that_is_the_codec_says_nothing() -> None:
    same = {"format": "mx", "element": "fp4_e2m1", "block_size": 32, "scale": "e8m0"}
    plain = communication(codec="mxfp4", rules=[{"module": "mlp", "codec": "int8"}])
    for gather_codec in ("mxfp4", same):
        explicit = communication(
            codec="mxfp4",
            gather_codec=gather_codec,
            rules=[{"module": "mlp", "codec": "int8", "gather_codec": {"preset": "int8"}}],
        )
        assert explicit.canonical() == plain.canonical() and explicit.digest() == plain.digest()
    # What a rule inherits is another codec than its own.
    inherited = communication(codec="mxfp4", gather_codec="mxfp4", rules=[{"module": "mlp", "codec": "int8"}])
    assert inherited.canonical()["communication"]["rules"][0]["gather_codec"] == "mxfp4"
    assert inherited.digest() != plain.digest()


@pytest.mark.parametrize(
    "document",
    [
        DESIGN_EXAMPLE,
        {
            "megacomp": {
                "communication": {
                    "codec": "mxfp4",
                    "gather_codec": "int8",
                    "rules": [{"module": "mlp", "codec": "int8"}],
                }
            }
        },
    ],
    ids=["design", "rule of the inherited gather codec"],
)
def test_canonical_sections_are_json_and_load_again(document: dict[str, Any]) -> None:
    config, _ = load(document)
    again, _ = load({"megacomp": json.loads(json.dumps(config.canonical()))})
    assert again.canonical() == config.canonical()


def test_rules_inherit_what_they_leave_open() -> None:
    config = communication(codec="mxfp4", gather_codec="int8", min_bytes=100, rules=[{"codec": None}, {"min_bytes": 5}])
    exact, small = (config.communication.resolve(rule) for rule in config.communication.rules)
    assert (exact.codec, exact.gather_codec, exact.min_bytes) == (None, "int8", 100)
    assert (small.codec, small.gather_codec, small.min_bytes) == ("mxfp4", "int8", 5)


@pytest.mark.parametrize(
    ("section", "path", "words"),
    [
        ("auto", "megacomp", ['"auto"', "object"]),
        (None, "megacomp", ["null", "object"]),
        ({"comunication": {}}, "megacomp.comunication", ["unknown key", "did you mean 'communication'", "'weights'"]),
        ({"communication": []}, "megacomp.communication", ["object", "[]"]),
        ({"communication": {"codecs": "int8"}}, "megacomp.communication.codecs", ["did you mean 'codec'"]),
        ({"communication": {"codec": "mxfp44"}}, "megacomp.communication.codec", ["'mxfp44'", "'mxfp4'", "int8"]),
        ({"communication": {"codec": 4}}, "megacomp.communication.codec", ["4", "preset"]),
        (
            {"communication": {"codec": {"format": "mx", "element": "fp4_e9m9"}}},
            "megacomp.communication.codec.element",
            ["fp4_e9m9", "fp4_e2m1"],
        ),
        (
            {"communication": {"gather_codec": {"preset": "int8", "block_size": 48}}},
            "megacomp.communication.gather_codec.block_size",
            ["48", "32", "64"],
        ),
        (
            {"communication": {"codec": {"format": "int", "symmetric": False, "scale": "e4m3"}}},
            "megacomp.communication.codec.scale",
            ["bf16"],
        ),
        ({"communication": {"algorithm": "ring"}}, "megacomp.communication.algorithm", ['"ring"', "'two_shot'"]),
        ({"communication": {"min_bytes": "64k"}}, "megacomp.communication.min_bytes", ["integer", '"64k"']),
        ({"communication": {"min_bytes": 1.5}}, "megacomp.communication.min_bytes", ["integer", "1.5"]),
        ({"communication": {"min_bytes": True}}, "megacomp.communication.min_bytes", ["integer", "true"]),
        ({"communication": {"min_bytes": -1}}, "megacomp.communication.min_bytes", ["at least 0", "-1"]),
        ({"communication": {"min_bytes": "auto"}}, "megacomp.communication.min_bytes", ['"tuned"', '"auto"']),
        ({"communication": {"rules": [{"min_bytes": "64k"}]}}, "megacomp.communication.rules[0].min_bytes", ["64k"]),
        ({"communication": {"tuning": "tuning.json"}}, "megacomp.communication.tuning", ["no effect", '"tuned"']),
        ({"communication": {"calibration": 3}}, "megacomp.communication.calibration", ["3", "string"]),
        ({"communication": {"codec": "static4"}}, "megacomp.communication.codec", ["static4", "calibration"]),
        (
            {"communication": {"rules": [{"layers": "0", "gather_codec": "static4_paper"}]}},
            "megacomp.communication.rules[0].gather_codec",
            ["static4_paper", "calibration"],
        ),
        ({"communication": {"pipeline_chunks": 0}}, "megacomp.communication.pipeline_chunks", ["at least 1", "0"]),
        ({"communication": {"pipeline_chunks": True}}, "megacomp.communication.pipeline_chunks", ["true"]),
        (
            {"communication": {"collectives": []}},
            "megacomp.communication.collectives",
            ["at least one", "'all_gather'"],
        ),
        (
            {"communication": {"collectives": ["all_reduce", "all_reduce"]}},
            "megacomp.communication.collectives",
            ["each once"],
        ),
        (
            {"communication": {"collectives": ["broadcast"]}},
            "megacomp.communication.collectives[0]",
            ['"broadcast"', "'reduce_scatter'"],
        ),
        ({"communication": {"collectives": "all_reduce"}}, "megacomp.communication.collectives", ["list"]),
        ({"communication": {"rules": {}}}, "megacomp.communication.rules", ["list", "{}"]),
        ({"communication": {"rules": [3]}}, "megacomp.communication.rules[0]", ["object", "3"]),
        (
            {"communication": {"rules": [{"codec": None}, {"codec": "int9"}]}},
            "megacomp.communication.rules[1].codec",
            ["'int9'", "int8"],
        ),
        (
            {"communication": {"rules": [{"modul": "mlp", "codec": None}]}},
            "megacomp.communication.rules[0].modul",
            ["did you mean 'module'"],
        ),
        (
            {"communication": {"rules": [{"module": "ffn", "codec": None}]}},
            "megacomp.communication.rules[0].module",
            ['"ffn"', "'attention'", "'mlp'"],
        ),
        (
            {"communication": {"rules": [{"layers": "first", "codec": None}]}},
            "megacomp.communication.rules[0].layers",
            ["'first'", '"0,-1"'],
        ),
        (
            {"communication": {"rules": [{"layers": 3, "codec": None}]}},
            "megacomp.communication.rules[0].layers",
            ["string", "3"],
        ),
        (
            {"communication": {"rules": [{"layers": "3-1", "codec": None}]}},
            "megacomp.communication.rules[0].layers",
            ["'3-1'", "empty"],
        ),
        ({"communication": {"rules": [{"module": "mlp"}]}}, "megacomp.communication.rules[0]", ["changes nothing"]),
        (
            {"communication": {"rules": [{"max_bytes": 4096}]}},
            "megacomp.communication.rules[0].max_bytes",
            ["4096", "inherited", "65536"],
        ),
        (
            {"communication": {"rules": [{"min_bytes": 9, "max_bytes": 8}]}},
            "megacomp.communication.rules[0].max_bytes",
            ["8", "9"],
        ),
        (
            {"communication": {"algorithm": "one_shot", "gather_codec": "int8"}},
            "megacomp.communication.gather_codec",
            ["one_shot"],
        ),
        (
            {"communication": {"rules": [{"codec": None, "gather_codec": "int8"}]}},
            "megacomp.communication.rules[0].gather_codec",
            ["null"],
        ),
        ({"weights": {"checkpoint": 7}}, "megacomp.weights.checkpoint", ["must be a string or null", "7"]),
        ({"weights": {"checkpoint": ""}}, "megacomp.weights.checkpoint", ["must not be empty"]),
        ({"weights": {"order": "naive"}}, "megacomp.weights.order", ['"naive"', "'tp_aware'"]),
        ({"telemetry": {"sqnr_every": "often"}}, "megacomp.telemetry.sqnr_every", ["integer", '"often"']),
        ({"guard": True}, "megacomp.guard", ["object", "true"]),
        ({"guard": {"every": 0}}, "megacomp.guard.every", ["at least 1", "0"]),
        ({"guard": {"min_sqnr": 15}}, "megacomp.guard.min_sqnr", ["did you mean 'min_sqnr_db'"]),
        ({"guard": {"min_sqnr_db": "15"}}, "megacomp.guard.min_sqnr_db", ["finite number", '"15"']),
        ({"guard": {"min_sqnr_db": float("inf")}}, "megacomp.guard.min_sqnr_db", ["finite number", "Infinity"]),
        ({"backend": "cuda"}, "megacomp.backend", ['"cuda"', "'compiled'"]),
    ],
)
def test_bad_input_names_the_key_the_value_and_what_is_allowed(section: Any, path: str, words: list[str]) -> None:
    found = errors(section)
    assert list(found) == [path]
    for word in words:
        assert word in found[path]


def test_all_errors_are_reported_together() -> None:
    found = errors({"communication": {"codec": "int9", "algorithm": "ring", "rules": [{"layer": "0"}]}, "backends": 1})
    assert set(found) == {
        "megacomp.communication.codec",
        "megacomp.communication.algorithm",
        "megacomp.communication.rules[0].layer",
        "megacomp.backends",
    }


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"dtype": "bf16"}, ['no "megacomp" section', '"megacomp": {']),
        ({"megcomp": {}}, ["did you mean 'megacomp' by 'megcomp'"]),
        ({"communication": {"codec": "int8"}}, ["looks like the section itself"]),
    ],
)
def test_a_missing_section_says_how_to_add_it(document: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(document)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such configuration file"]),
        ('{"megacomp": {},\n "dtype": }', ["not valid JSON", "line 2, column 11"]),
        ('{"megacomp": {"backend": "auto", "backend": "reference"}}', ["'backend'", "twice"]),
        ("[1]", ["must hold an object"]),
        ("\udce9", ["cannot be read"]),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str | None, words: list[str]) -> None:
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        read(file)
    for word in [str(file), *words]:
        assert word in str(caught.value)


def test_errors_of_a_file_name_it_and_survive_pickling(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"megacomp": {"backend": "gpu"}}')
    with pytest.raises(ConfigError) as caught:
        load(file)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert str(copied) == str(caught.value)
    assert str(copied).startswith(f"{file}: megacomp.backend: ")
    assert copied.errors == caught.value.errors


@pytest.mark.parametrize(
    ("text", "count", "selected"),
    [
        ("0", 4, {0}),
        ("-1", 4, {3}),
        ("0,-1", 4, {0, 3}),
        ("0-2", 4, {0, 1, 2}),
        ("0-3,-1", 6, {0, 1, 2, 3, 5}),
        (" 1 - 2 , 0", 4, {0, 1, 2}),
        ("-2--1", 4, {2, 3}),
        ("1--2", 5, {1, 2, 3}),
        ("0-100", 3, {0, 1, 2}),
        ("7", 4, set()),
        ("-7", 4, set()),
        ("3--3", 4, set()),
    ],
)
def test_layers_select(text: str, count: int, selected: set[int]) -> None:
    layers = Layers.parse(text)
    assert {layer for layer in range(count) if layers.contains(layer, count)} == selected


def test_layers_that_select_nothing_are_listed() -> None:
    assert Layers.parse("0,9,-9,2-3,7-8").unmatched(4) == ["9", "-9", "7-8"]
