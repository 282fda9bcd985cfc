"""The "megacomp" section of a DeepSpeed inference JSON, validated.

`load` reads a file or a dict and returns the section as a frozen `Config` together with everything else,
which is what DeepSpeed may be given. Every error of a section is reported in one `ConfigError`, by the path
of its key, with the value found and what is allowed.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from megacomp import codecs
from megacomp.collectives import Algorithm, Collective
from megacomp.gptq import Order

__all__ = ["Communication", "Config", "ConfigError", "Guard", "Layers", "Rule", "Telemetry", "Weights", "load", "read"]

SECTION = "megacomp"
_EXAMPLE = '"megacomp": {"communication": {"codec": "mxfp4"}}'

TUNED: Final = "tuned"
"""In the place of a setting: what `megacomp tune` measured."""

DEFAULT_MIN_BYTES = 65536
"""Also where "tuned" finds no measurement."""

Module = Literal["attention", "mlp"]
AlgorithmChoice = Literal["auto", "tuned", Algorithm]
Backend = Literal["auto", "reference", "compiled", "triton"]


class ConfigError(ValueError):
    """A configuration that cannot be used; nothing has been changed.

    errors: (path of the key, what is wrong with it) for each error found, such as
        ("megacomp.communication.rules[1].codec", "unknown preset 'mxfp5' ..."); the path is "" where the
        file as a whole is wrong.
    """

    def __init__(self, errors: Iterable[tuple[str, str]], source: str | None = None) -> None:
        self.errors = tuple(errors)
        self.source = source
        lines = [f"{path}: {message}" if path else message for path, message in self.errors]
        super().__init__("\n".join(f"{source}: {line}" if source else line for line in lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errors, self.source)


@dataclass(frozen=True)
class Layers:
    """A set of layers as a rule writes it: "0,-1", "0-3", "0-3,-1"; negative numbers count from the end.

    spans: (first, last) of each item, both included, as written.
    """

    spans: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Layers:
        """Read the notation of `text`; ValueError where it is not understood or a range is empty."""
        spans = []
        for item in map(str.strip, text.split(",")):
            match = re.fullmatch(r"(-?\d+)(?:\s*-\s*(-?\d+))?", item)
            if match is None:
                raise ValueError(f"{item!r} is neither a layer nor a range of layers")
            first, last = int(match[1]), int(match[2] or match[1])
            if (first < 0) == (last < 0) and first > last:
                raise ValueError(f"the range {item!r} is empty, its lower end comes first")
            spans.append((first, last))
        return cls(tuple(spans))

    def contains(self, layer: int, layer_count: int) -> bool:
        """Whether layer 0 <= `layer` < `layer_count` is selected."""
        return any(_from_start(a, layer_count) <= layer <= _from_start(b, layer_count) for a, b in self.spans)

    def unmatched(self, layer_count: int) -> list[str]:
        """The items that select no layer of a model with `layer_count` layers."""
        return [
            str(first) if first == last else f"{first}-{last}"
            for first, last in self.spans
            if not any(Layers(((first, last),)).contains(layer, layer_count) for layer in range(layer_count))
        ]


def _from_start(layer: int, layer_count: int) -> int:
    return layer + layer_count if layer < 0 else layer


def _error(kind: str, problem: str, **context: Any) -> PydanticCustomError:
    # The message is a template to pydantic: what it says must not be read as one.
    return PydanticCustomError(kind, "{problem}", {"problem": problem, **context})


def _codec(spec: Any) -> Any:
    if spec is None:
        return None
    if not isinstance(spec, str | Mapping):
        raise _error("codec", f"{spec!r} is no codec; allowed: the name of a preset, an object of options, null")
    try:
        codecs.get(spec)
    except codecs.CodecError as error:
        # A name is the key's own value; only options have a path of their own below it.
        raise _error("codec", str(error), key="" if isinstance(spec, str) else error.key) from error
    return copy.deepcopy(spec)


def _layers(text: Any) -> Any:
    if text is None:
        return None
    try:
        if not isinstance(text, str):
            raise ValueError(f"must be a string, not {_shown(text)}")
        Layers.parse(text)
    except ValueError as error:
        form = 'layers and ranges separated by commas, negative ones from the end: "0,-1", "0-3", "0-3,-1"'
        raise _error("layers", f"{error}; allowed: {form}") from error
    return text


def _chunks(value: Any) -> Any:
    if value in ("auto", TUNED) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise _error("pipeline_chunks", f'must be "auto", "tuned" or an integer of at least 1, not {_shown(value)}')


def _min_bytes(value: Any) -> Any:
    if value == TUNED or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise _error("min_bytes", f'must be an integer, at least 0, or "tuned", not {_shown(value)}')


def _collectives(values: Any) -> Any:
    if isinstance(values, list) and (not values or len(values) > len(set(map(repr, values)))):
        allowed = _quoted(get_args(Collective))
        raise _error("collectives", f"must name at least one, each once, not {values!r}; allowed: {allowed}")
    return _tuple(values)


def _tuple(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values


CodecSpec = Annotated[str | dict[str, Any] | None, PlainValidator(_codec)]
ByteCount = Annotated[int, Field(ge=0)]
Threshold = Annotated[int | Literal["tuned"], PlainValidator(_min_bytes)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Rule(_Section):
    """What to do differently at some sites, for some sizes of message.

    A rule matches a message if every condition it states (`layers`, `module`, `min_bytes`, `max_bytes`)
    holds; the first rule that matches decides. What it does not state, `min_bytes` included, is inherited
    from `communication`.
    """

    layers: Annotated[str | None, PlainValidator(_layers)] = None
    """
    The layers it applies to: "0,-1", "0-3", "0-3,-1". Counted from 0 over the entire model, negative ones
    from the end. Not given: every layer.
    """

    module: Module | None = None
    """
    The half of a layer it applies to: "attention" (the output projection) or "mlp" (the down projection).
    Not given: both.
    """

    min_bytes: Threshold | None = None
    """
    The smallest message it applies to, in bytes of the uncompressed tensor on one rank. With "tuned", its own or
    inherited, it applies to every size and leaves exact what is smaller than its codec's measured threshold.
    """

    max_bytes: ByteCount | None = None
    """
    The largest message it applies to, in bytes of the uncompressed tensor on one rank. Not given: no limit.
    """

    codec: CodecSpec = None
    """
    As `communication.codec`; null leaves the messages it matches exact.
    """

    gather_codec: CodecSpec = None
    """
    As `communication.gather_codec`.
    """

    algorithm: AlgorithmChoice = "auto"
    """
    As `communication.algorithm`.
    """


class Communication(_Section):
    """How the reductions of row-parallel layers travel."""

    codec: CodecSpec = "mxfp4"
    """
    How values are written on the wire: the name of a preset, an object such as {"format": "mx", "element":
    "fp4_e2m1", "block_size": 32, "scale": "e8m0"}, or null to leave exact whatever no rule compresses.
    """

    gather_codec: CodecSpec = None
    """
    The codec of the second hop of two-shot, the gather of the reduced rows; null for the same codec.
    """

    algorithm: AlgorithmChoice = "auto"
    """
    "one_shot" (everyone sends everything to everyone, one rounding), "two_shot" (reduce-scatter, then
    all-gather: two roundings, fewer bytes with more than two ranks), "auto", by ranks and rows, or "tuned",
    what `megacomp tune` found the fastest for each size.
    """

    min_bytes: Threshold = DEFAULT_MIN_BYTES
    """
    Messages smaller than this, in bytes of the uncompressed tensor on one rank, stay exact: below some size
    encoding takes longer than it saves. The default leaves the decoding of single tokens exact. "tuned" is the
    size from which on `megacomp tune` found compression faster; without such a measurement, the default.
    """

    collectives: Annotated[tuple[Collective, ...], BeforeValidator(_collectives)] = (
        "all_reduce",
        "reduce_scatter",
    )
    """
    Which collectives to compress. "all_gather" (the input of column-parallel layers under sequence
    parallelism) only on request: it carries activations, not partials.
    """

    pipeline_chunks: Annotated[int | Literal["auto", "tuned"], PlainValidator(_chunks)] = "auto"
    """
    In how many chunks a message is cut, so that one is encoded while another travels; "auto" chooses by size,
    "tuned" is what `megacomp tune` found the fastest.
    """

    tuning: Annotated[str | None, Field(min_length=1)] = None
    """
    The file of `megacomp tune --out` that "tuned" refers to; null for those it keeps in the user's cache.
    """

    rules: Annotated[tuple[Rule, ...], BeforeValidator(_tuple)] = ()
    """
    Exceptions by layer, module and size of message, a list of objects; the first that matches decides.
    """

    calibration: Annotated[str | None, Field(min_length=1)] = None
    """
    The file that `megacomp calibrate` has written for this model and number of ranks; static codecs need it.
    """

    def resolve(self, rule: Rule) -> Rule:
        """`rule` with everything it leaves open filled in from this section."""
        inherited = {
            key: getattr(self, key)
            for key in ("codec", "gather_codec", "algorithm")
            if key not in rule.model_fields_set
        }
        if rule.min_bytes is None:
            inherited["min_bytes"] = self.min_bytes
        return rule.model_copy(update=inherited)

    @property
    def tuned(self) -> bool:
        """Whether anything is left to `megacomp tune`."""
        everywhere: list[Communication | Rule] = [self, *self.rules]
        return self.pipeline_chunks == TUNED or any(TUNED in (at.min_bytes, at.algorithm) for at in everywhere)


class Weights(_Section):
    """GPTQ weights in place of the model's own."""

    checkpoint: Annotated[str | None, Field(min_length=1)] = None
    """
    The folder of a GPTQ checkpoint of the same model, or one that `megacomp convert` has written; null leaves
    the model's weights alone.
    """

    order: Order = "tp_aware"
    """
    "tp_aware" puts the MLP's inner features in the order of the down projection's groups, so that nothing is
    permuted between its layers; "local" leaves features where they are and gathers inside of the GEMM. A
    converted checkpoint has its order already.
    """


class Telemetry(_Section):
    """What is measured while running, beyond the counters that are always kept."""

    sqnr_every: ByteCount = 0
    """
    Every this many compressed calls of a site, compute the exact result too and report the ratio of signal to
    quantization noise in dB; 0 never does. A sampled call costs one more collective, uncompressed, in fp32.
    """


class Guard(_Section):
    """The numerical guard: sites that turn out too noisy on live traffic are no longer compressed."""

    every: Annotated[int, Field(ge=1)] = 100
    """
    Hold every this many compressed calls of a site against the exact result. Such a call costs one more collective,
    uncompressed, in fp32, and waits for the device.
    """

    min_sqnr_db: Annotated[float, Field(allow_inf_nan=False)] = 15.0
    """
    A site whose sampled message has a ratio of signal to quantization noise below this, in dB, goes over to the
    original collective, on all ranks from that message on.
    """


class Config(_Section):
    """The validated "megacomp" section."""

    communication: Communication = Communication()
    """
    How the reductions of row-parallel layers travel.
    """

    weights: Weights = Weights()
    """
    GPTQ weights.
    """

    telemetry: Telemetry = Telemetry()
    """
    What is measured while running.
    """

    guard: Guard | None = None
    """
    The numerical guard; null for none.
    """

    backend: Backend = "auto"
    """
    What computes the codecs: "reference" (PyTorch), "compiled" (torch.compile, on the CPU), "triton" (on GPUs),
    or "auto", the fastest there is. All give the same bits.
    """

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if contradictions := list(_contradictions(self.communication)):
            raise _error("contradictions", "contradictions", errors=contradictions)
        return self

    def canonical(self) -> dict[str, Any]:
        """The section as JSON-able data, equal for sections that mean the same.

        Every field is explicit, but for a gather_codec that is the codec or without effect: null. A codec goes by the
        name of a preset wherever one is equal to it.
        """
        document = self.model_dump(mode="json")
        communication = document["communication"]
        communication["rules"] = [
            self.communication.resolve(rule).model_dump(mode="json") for rule in self.communication.rules
        ]
        for holder in (communication, *communication["rules"]):
            if holder["codec"] is None or holder["algorithm"] == "one_shot":
                holder["gather_codec"] = None  # inherited, perhaps, and without effect
            for key in ("codec", "gather_codec"):
                holder[key] = _canonical_codec(holder[key])
            if holder["gather_codec"] == holder["codec"]:
                holder["gather_codec"] = None
        return document

    def digest(self) -> str:
        """SHA-256 of the canonical section, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.canonical(), sort_keys=True).encode()).hexdigest()


def _canonical_codec(spec: Any) -> Any:
    if spec is None:
        return None
    options = codecs.get(spec).spec
    return next(
        (name for name in (*codecs.presets(), *codecs.presets(static=True)) if codecs.get(name).spec == options),
        options,
    )


def _contradictions(communication: Communication) -> Iterator[tuple[str, str]]:
    """(path, message) of the settings that are each allowed but not together."""
    path = f"{SECTION}.communication"
    yield from _unused_gather_codec(path, communication, communication.model_fields_set)
    yield from _uncalibrated_codecs(path, communication)
    if communication.tuning is not None and not communication.tuned:
        yield f"{path}.tuning", 'has no effect: neither min_bytes, algorithm nor pipeline_chunks is "tuned"'
    for index, rule in enumerate(communication.rules):
        at = f"{path}.rules[{index}]"
        resolved = communication.resolve(rule)
        if not rule.model_fields_set - {"layers", "module"}:
            yield at, "changes nothing; give a codec, gather_codec, algorithm, min_bytes or max_bytes"
        yield from _unused_gather_codec(at, resolved, rule.model_fields_set)
        low, high = resolved.min_bytes, resolved.max_bytes
        if isinstance(low, int) and high is not None and low > high:
            of = "its min_bytes" if rule.min_bytes is not None else "the inherited min_bytes"
            yield f"{at}.max_bytes", f"matches no message: {high} is less than {of}, {low}"


def _uncalibrated_codecs(path: str, communication: Communication) -> Iterator[tuple[str, str]]:
    if communication.calibration is not None:
        return
    holders: dict[str, Communication | Rule] = {path: communication}
    holders |= {f"{path}.rules[{index}]": rule for index, rule in enumerate(communication.rules)}
    for at, holder in holders.items():
        for key in ("codec", "gather_codec"):
            spec = getattr(holder, key)
            if spec is not None and codecs.get(spec).static:
                why = f'{codecs.get(spec)} is a static codec: give the file of its calibration as "calibration"'
                yield f"{at}.{key}", why


def _unused_gather_codec(path: str, at: Communication | Rule, stated: set[str]) -> Iterator[tuple[str, str]]:
    if at.gather_codec is None or "gather_codec" not in stated:
        return
    if at.codec is None:
        yield f"{path}.gather_codec", "has no effect while codec is null"
    elif at.algorithm == "one_shot":
        yield f"{path}.gather_codec", 'has no effect with algorithm "one_shot", which has no second hop'


def read(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed JSON file, or a dict of the same contents, as a fresh dict.

    Raises ConfigError if the file is missing or unreadable, is not JSON (naming line and column), repeats a
    key, or holds something other than an object.
    """
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    name = str(source)
    try:
        document = json.loads(Path(source).read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except FileNotFoundError:
        raise ConfigError([("", "no such configuration file")], name) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError([("", f"not valid JSON: {error.msg} at {where}")], name) from error
    except _RepeatedKey as error:
        raise ConfigError([("", f"the key {error.args[0]!r} occurs twice in the same object")], name) from error
    except (OSError, ValueError) as error:  # bytes that are no UTF-8, numbers of thousands of digits
        raise ConfigError([("", f"cannot be read: {error}")], name) from error
    except RecursionError:
        raise ConfigError([("", "cannot be read: it is nested too deeply")], name) from None
    if not isinstance(document, dict):
        raise ConfigError([("", f"must hold an object, not {_shown(document)}")], name)
    return document


class _RepeatedKey(Exception):
    """Two values for one key: json would keep the last and drop the other silently."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise _RepeatedKey(repeated[0])
    return dict(pairs)


def load(source: str | Path | Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Split a DeepSpeed JSON into our section, validated, and the rest.

    source: the path of a DeepSpeed JSON file, or a dict of the same contents; never changed.
    Returns the Config and a fresh dict without the "megacomp" key, fit for DeepSpeed.

    Raises ConfigError as `read` does, if there is no "megacomp" section, or for anything wrong in it.
    """
    name = None if isinstance(source, Mapping) else str(source)
    document = read(source)
    if SECTION not in document:
        raise ConfigError([("", _missing_section(document))], name)
    section = document.pop(SECTION)
    if not isinstance(section, Mapping):
        raise ConfigError([(SECTION, f"must be an object such as {{{_EXAMPLE}}}, not {_shown(section)}")], name)
    try:
        return Config.model_validate(section), document
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise ConfigError([pair for detail in details for pair in _explain(detail)], name) from None


def _missing_section(document: Mapping[str, Any]) -> str:
    problem = f'there is no "{SECTION}" section'
    if document and document.keys() <= Config.model_fields.keys():
        return f'{problem}; this looks like the section itself, write {{"{SECTION}": {{...}}}} around it'
    near = difflib.get_close_matches(SECTION, document, 1)
    return f"{problem}; did you mean {SECTION!r} by {near[0]!r}?" if near else f"{problem}; add one, such as {_EXAMPLE}"


def _explain(details: ErrorDetails) -> list[tuple[str, str]]:
    """(path, message) pairs of one pydantic error, in the words of this configuration."""
    path, beside = _locate(details["loc"])
    value, context = details["input"], details.get("ctx", {})
    match details["type"]:
        case "contradictions":
            return context["errors"]
        case "codec":
            return [(".".join(filter(None, (path, context.get("key")))), context["problem"])]
        case "extra_forbidden":
            near = difflib.get_close_matches(path.rpartition(".")[2], beside, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            return [(path, f"unknown key; {hint}allowed: {_quoted(beside)}")]
        case "literal_error":
            return [(path, f"must be one of {context['expected']}, not {_shown(value)}")]
        case "greater_than_equal":
            return [(path, f"must be at least {context['ge']}, not {_shown(value)}")]
        case "string_type":
            return [(path, f"must be a string or null, not {_shown(value)}")]
        case "string_too_short":
            return [(path, "must not be empty")]
        case "float_type" | "finite_number":
            return [(path, f"must be a finite number, not {_shown(value)}")]
        case "int_type":
            return [(path, f"must be an integer, not {_shown(value)}")]
        case "model_type":
            return [(path, f"must be an object, not {_shown(value)}")]
        case "tuple_type":
            return [(path, f"must be a list, not {_shown(value)}")]
        case _:
            return [(path, details["msg"])]


_NESTED: Mapping[int | str, type[_Section]] = {
    "communication": Communication,
    "rules": Rule,
    "weights": Weights,
    "telemetry": Telemetry,
    "guard": Guard,
}


def _locate(location: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The path of a key, and the keys allowed beside it."""
    path = SECTION
    model: type[_Section] = Config
    beside: list[str] = []
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
        beside = list(model.model_fields)
        model = _NESTED.get(step, model)
    return path, beside


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(map(repr, words))


def _shown(value: Any) -> str:
    """A value as JSON writes it, shortened."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."
