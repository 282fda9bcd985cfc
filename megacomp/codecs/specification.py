"""From a preset's name or a JSON specification to a codec, with errors that name the option at fault."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megacomp.codecs.block import BlockCodec
from megacomp.codecs.codec import Codec
from megacomp.codecs.static import StaticCodec, calibrated
from megacomp.kernels import BACKENDS, ELEMENTS, SCALES, BlockFormat, IntElement, PowerOfTwoScale, StaticFormat

__all__ = ["CodecError", "from_key", "get", "presets"]

BLOCK_SIZES = {"mx": (8, 16, 32, 64, 128), "int": (16, 32, 64, 128)}
ROTATIONS = (None, 32, 64, 128, 256)

DEFAULTS: dict[str, dict[str, Any]] = {
    "mx": {
        "element": "fp4_e2m1",
        "block_size": 32,
        "scale": "e8m0",
        "scale_rounding": "floor",
        "scale_search": False,
        "rotation": None,
    },
    "int": {
        "bits": 4,
        "block_size": 32,
        "scale": "e4m3",
        "symmetric": True,
        "scale_search": False,
        "rotation": None,
    },
    "static": {
        "bits": 4,
        "outlier_features": 0.0125,
        "range": "search",
        "symmetric": False,
        "row_scale": True,
    },
}
"""The options of each format and their defaults."""

PRESETS: dict[str, dict[str, Any]] = {
    # OCP Microscaling Formats (MX) v1.0, table 1: blocks of 32, E8M0, the specification's own conversion.
    "mxfp4": {"format": "mx", "element": "fp4_e2m1"},
    "mxfp6_e2m3": {"format": "mx", "element": "fp6_e2m3"},
    "mxfp6_e3m2": {"format": "mx", "element": "fp6_e3m2"},
    "mxfp8_e4m3": {"format": "mx", "element": "fp8_e4m3"},
    "mxfp8_e5m2": {"format": "mx", "element": "fp8_e5m2"},
    "mxint8": {"format": "mx", "element": "int8"},
    # The best FP3 and FP5 of arXiv 2411.09510 belong to no standard; there the better of two exponents wins.
    "mxfp3_e2m0": {"format": "mx", "element": "fp3_e2m0", "scale_rounding": "best"},
    "mxfp5_e2m2": {"format": "mx", "element": "fp5_e2m2", "scale_rounding": "best"},
    "nvfp4": {"format": "mx", "element": "fp4_e2m1", "block_size": 16, "scale": "e4m3"},
    # Few bits: E4M3 scales found by search. Many bits: the scale's own rounding would show, so bf16, and no search,
    # since clipping gains nothing.
    "int8": {"format": "int", "bits": 8, "block_size": 64, "scale": "bf16"},
    "int6": {"format": "int", "bits": 6, "block_size": 32, "scale": "bf16"},
    "int5": {"format": "int", "bits": 5, "scale_search": True},
    "int4": {"format": "int", "bits": 4, "scale_search": True},
    "int3": {"format": "int", "bits": 3, "scale_search": True},
    "int2": {"format": "int", "bits": 2, "scale_search": True},
    # A scale for every row costs 16 bits of it and gains 2 to 4 dB, for which one outlier feature in 80, not 64,
    # makes room: 4.156 bits at hidden 4096.
    "static4": {"format": "static", "bits": 4},
    # arXiv 2411.07942 as published.
    "static4_paper": {
        "format": "static",
        "bits": 4,
        "outlier_features": 1 / 64,
        "range": "minmax_ema",
        "symmetric": True,
        "row_scale": False,
    },
}
"""The presets, by the names of the standards where there is one."""


class CodecError(ValueError):
    """A codec specification is wrong.

    Attributes:
        key: the option at fault, or "" for the specification as a whole.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def presets(*, static: bool = False) -> tuple[str, ...]:
    """The names of the presets that need no calibration, or of those that do."""
    return tuple(name for name, options in PRESETS.items() if (options["format"] == "static") == static)


def get(spec: str | Mapping[str, Any] | Codec, *, backend: str = "auto") -> Codec:
    """Makes a codec.

    Args:
        spec: a preset's name (``"mxfp4"``); a preset with options changed
            (``{"preset": "int4", "rotation": 128}``); or a format with its options:

            * ``{"format": "mx", "element": "fp4_e2m1", "block_size": 32, "scale": "e8m0",
              "scale_rounding": "floor" | "best", "scale_search": false, "rotation": null}``: elements ``fp3_e2m0``
              to ``fp8_e5m2`` and ``int2`` to ``int8``, blocks of 8 to 128, scales ``e8m0``, ``e5m0``, ``e4m3``,
              ``bf16``, ``fp16``;
            * ``{"format": "int", "bits": 4, "block_size": 32, "scale": "e4m3" | "bf16" | "fp16",
              "symmetric": true, "scale_search": false, "rotation": null}``: 2 to 8 bits, blocks of 16 to 128;
            * ``{"format": "static", "bits": 4, "outlier_features": 0.0125, "range": "search" | "minmax_ema",
              "symmetric": false, "row_scale": true}``: 2 to 8 bits with scales from a calibration; so many features,
              or such a share of them, in BF16; not calibrated yet (see :class:`StaticCodec`).

            ``rotation`` is the size of a Hadamard rotation, 32 to 256. A codec is returned with ``backend`` set.
        backend: ``"auto"``, ``"reference"``, ``"compiled"`` or ``"triton"``.

    Raises:
        CodecError: an unknown preset, option or value, or a combination that does not exist.
    """
    _check_choice("backend", backend, BACKENDS)
    if isinstance(spec, Codec):
        return spec.with_backend(backend)
    # torch.compile follows the making of a codec, but into no cache.
    if isinstance(spec, str) and not torch.compiler.is_compiling():
        return _named(spec, backend)
    return _make(_expand(spec), backend)


@functools.lru_cache(maxsize=256)
def _named(preset: str, backend: str) -> Codec:
    """Made once: a tenth of a millisecond, where a message may be called for by its codec's name every time."""
    return _make(_expand(preset), backend)


def _make(options: dict[str, Any], backend: str) -> Codec:
    options = _complete(options)
    if options["format"] == "static":
        return StaticCodec(_name(options), options, _static_format(options), backend)
    return BlockCodec(_name(options), options, _block_format(options), backend)


def from_key(key: str) -> Codec:
    """The codec whose ``key`` this is; a calibrated one must still be in use in this process.

    Raises:
        CodecError: as ``get``; ValueError: no JSON of such an object; KeyError: a calibrated codec that is gone.
    """
    return calibrated(key) if '"tables":' in key else _from_key(key)


@functools.lru_cache(maxsize=1024)
def _from_key(key: str) -> Codec:
    read = json.loads(key)
    return get(read["spec"], backend=read["backend"])


def _expand(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    """A specification with ``format``, its preset, if any, looked up."""
    if isinstance(spec, str):
        return dict(_preset(spec))
    if not isinstance(spec, Mapping):
        raise CodecError("", f"a codec is a preset's name or an object, not {spec!r}")
    options = dict(spec)
    if "preset" not in options:
        return options
    if "format" in options:
        raise CodecError("format", '"preset" and "format" exclude each other')
    return {**_preset(options.pop("preset")), **options}


def _preset(name: object) -> dict[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        raise CodecError("preset", f"unknown preset {name!r}{_hint(name, PRESETS)}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def _complete(options: dict[str, Any]) -> dict[str, Any]:
    """Every option of the format explicit and valid by itself."""
    if "format" not in options:
        raise CodecError("format", f'missing: give "preset" or "format" ({_listed(DEFAULTS)})')
    name = options["format"]
    _check_choice("format", name, DEFAULTS)
    defaults = DEFAULTS[name]
    for key in options:
        if key != "format" and key not in defaults:
            allowed = ", ".join(defaults)
            raise CodecError(
                key, f'unknown option {key!r} of format "{name}"{_hint(key, defaults)}; options: {allowed}'
            )
    complete = {
        "format": name,
        **defaults,
        **{key: value for key, value in options.items() if key != "format"},
    }
    if name == "static":
        _check_static(complete)
        return complete
    if name == "mx":
        _check_choice("element", complete["element"], ELEMENTS)
        _check_choice("scale", complete["scale"], SCALES)
        _check_choice("scale_rounding", complete["scale_rounding"], ("floor", "best"))
    else:
        _check_choice("bits", complete["bits"], range(2, 9))
        real = [scale for scale, kind in SCALES.items() if not isinstance(kind, PowerOfTwoScale)]
        _check_choice("scale", complete["scale"], real)
        _check_choice("symmetric", complete["symmetric"], (True, False))
    _check_choice("block_size", complete["block_size"], BLOCK_SIZES[name])
    _check_choice("scale_search", complete["scale_search"], (True, False))
    _check_choice("rotation", complete["rotation"], ROTATIONS)
    return complete


def _check_static(options: dict[str, Any]) -> None:
    _check_choice("bits", options["bits"], range(2, 9))
    _check_choice("range", options["range"], ("search", "minmax_ema"))
    _check_choice("symmetric", options["symmetric"], (True, False))
    _check_choice("row_scale", options["row_scale"], (True, False))
    outliers = options["outlier_features"]
    if isinstance(outliers, bool) or not isinstance(outliers, int | float) or not outliers >= 0:
        raise CodecError("outlier_features", f"{outliers!r} is not allowed; allowed: a count, or a share below 1")
    if isinstance(outliers, float) and outliers >= 1:
        raise CodecError("outlier_features", f"{outliers!r} is no share of the features; allowed: 0.0 up to below 1.0")
    if options["row_scale"] and options["range"] == "minmax_ema":
        raise CodecError("row_scale", 'the ranges of "minmax_ema" know no row scales; use "range": "search"')
    if not options["row_scale"] and not outliers:
        raise CodecError("outlier_features", "without row scales only an outlier feature could tell NaN: keep one")


def _static_format(options: dict[str, Any]) -> StaticFormat:
    return StaticFormat(
        options["bits"],
        options["outlier_features"],
        row_scale=options["row_scale"],
        asymmetric=not options["symmetric"],
    )


def _block_format(options: dict[str, Any]) -> BlockFormat:
    """The format of complete options; combinations that do not exist are refused here."""
    scale = SCALES[options["scale"]]
    rotation = options["rotation"] or 0
    if options["format"] == "int":
        if not options["symmetric"]:
            if options["scale"] == "e4m3":
                raise CodecError("scale", 'asymmetric blocks need a "bf16" or "fp16" scale: a minimum goes with it')
            if options["scale_search"]:
                raise CodecError("scale_search", "there is no scale search for asymmetric blocks")
        return BlockFormat(
            IntElement(options["bits"]),
            options["block_size"],
            scale,
            search=options["scale_search"],
            asymmetric=not options["symmetric"],
            rotation=rotation,
        )
    element = ELEMENTS[options["element"]]
    if isinstance(scale, PowerOfTwoScale):
        if options["scale_search"]:
            raise CodecError("scale_search", f'scale "{scale.name}" has "scale_rounding": "best" instead')
        return BlockFormat(
            element, options["block_size"], scale, options["scale_rounding"] == "best", rotation=rotation
        )
    if isinstance(element, IntElement):
        raise CodecError(
            "scale",
            f'integer elements of format "mx" need "e8m0" or "e5m0"; for "{scale.name}" use format "int"',
        )
    if options["scale_rounding"] != "floor":
        raise CodecError("scale_rounding", f'only "e8m0" and "e5m0" scales have one, not "{scale.name}"')
    return BlockFormat(element, options["block_size"], scale, options["scale_search"], rotation=rotation)


def _name(options: dict[str, Any]) -> str:
    """A preset's name, plus ``+rotationN``; for other specifications the options that matter, joined by hyphens."""
    if options["format"] == "static":
        return _static_name(options)
    suffix = f"+rotation{options['rotation']}" if options["rotation"] else ""
    unrotated = {**options, "rotation": None}
    for name, preset in _COMPLETE_PRESETS.items():
        if preset == unrotated:
            return name + suffix
    kind = options["element"] if options["format"] == "mx" else f"int{options['bits']}"
    parts = [options["format"]] if options["format"] == "mx" else []
    parts += [kind, f"b{options['block_size']}", options["scale"]]
    parts += ["best"] if options.get("scale_rounding") == "best" else []
    parts += ["searched"] if options["scale_search"] else []
    parts += ["asymmetric"] if options.get("symmetric") is False else []
    return "-".join(parts) + suffix


def _static_name(options: dict[str, Any]) -> str:
    for name, preset in _COMPLETE_PRESETS.items():
        if preset == options:
            return name
    parts = [f"static{options['bits']}", f"o{options['outlier_features']:g}", options["range"]]
    parts += ["symmetric"] if options["symmetric"] else []
    parts += ["row"] if options["row_scale"] else []
    return "-".join(parts)


def _check_choice(key: str, value: object, allowed: Sequence[Any] | Mapping[Any, Any] | range) -> None:
    # Type and value: True is no block size although it equals 1.
    if any(type(value) is type(choice) and value == choice for choice in allowed):
        return
    raise CodecError(key, f"{value!r} is not allowed{_hint(value, allowed)}; allowed: {_listed(allowed)}")


def _listed(choices: Sequence[Any] | Mapping[Any, Any] | range) -> str:
    return ", ".join("null" if choice is None else str(choice) for choice in choices)


def _hint(value: object, choices: Sequence[Any] | Mapping[Any, Any] | range) -> str:
    names = [choice for choice in choices if isinstance(choice, str)]
    close = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""


_COMPLETE_PRESETS = {name: _complete(dict(preset)) for name, preset in PRESETS.items()}
