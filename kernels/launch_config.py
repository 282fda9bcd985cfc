"""How a Triton kernel is launched, in three questions, each a function of its own.

* *May it be?* :func:`launch_problem`: what stands against a kernel on this device, format and hidden size.
* *What would one guess?* :func:`guess`: a configuration from the shape alone; right everywhere, the best nowhere.
* *What was measured?* :func:`measured`: the fastest that tuning found on this GPU for such a message.

:func:`launch_config` asks the third, then the second, and remembers. A configuration decides speed and never bits,
so one from another version of the kernels is at worst slow; :func:`check` refuses those a kernel cannot run.

Nothing here was measured on a GPU yet: the constants of the guess come from what the kernels compile to.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from megacomp.kernels.block_format import BlockFormat, WireLayout
from megacomp.kernels.static_format import StaticFormat
from megacomp.kernels.tiles import Tile, longest_piece, needs_whole_rows

__all__ = [
    "NO_CACHE",
    "OPERATIONS",
    "LaunchConfig",
    "Measurement",
    "cache_file",
    "cache_folder",
    "candidates",
    "check",
    "device_problem",
    "gpu_processors",
    "guess",
    "launch_config",
    "launch_problem",
    "measured",
    "on_device_of",
    "record",
    "slug",
    "using",
]

logger = logging.getLogger("megacomp")

OPERATIONS = ("encode", "decode_sum", "decode_sum_encode")
"""The operations that are tuned; "reduce_norm" goes by the guess."""

TRITON_VERSION = ".".join(triton.__version__.split(".")[:2])
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
"""What the kernels are compiled for in the tests; older GPUs have no bf16."""

LONGEST_ROW = 32768
"""The most values of a row that a program holds whole: 32 for each of the 1024 threads it may have, who have 64
registers each. With 64 values the kernels spill (nvfp4 and int4 of 65536 features, compiled for sm_90)."""

MOST_BLOCKS = 2**31 - 2**20
"""Blocks are numbered in 32 bits, those behind the last in the last program included."""

VECTOR_BYTES = 16
"""The widest access to memory."""

VALUES_PER_THREAD = 64
"""Up to here a thread owns a whole block: extremes, errors and packing then need no shuffles. Compiled for sm_90,
encode to int8 in blocks of 64 takes 12 instructions per value and 80 registers so, and 16 and 55 with two threads
to a block. Unmeasured."""

BLOCKS_PER_PROGRAM, FEWEST_BLOCKS = 128, 32
"""Four warps of threads that own a block; one for messages that would leave SMs idle. With one warp always, the 32
programs that an SM takes at once would be half the warps that it takes; much larger programs end in a tail where
most SMs idle. Even 32 blocks of 8 hold a rotation of 256. Unmeasured."""

MOST_WARPS = 32

NEAREST = 2
"""How many doublings of the size away a measurement still counts. Unmeasured: between 1 MiB and 1 GiB only how
evenly the programs fill the SMs changes."""


@dataclass(frozen=True)
class LaunchConfig:
    """One way to launch a kernel."""

    tile: Tile
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Triton's options. Fused multiply-adds would round differently from the definitions."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


def launch_config(
    operation: str, format: BlockFormat, layout: WireLayout, rows: int, dtype: torch.dtype
) -> LaunchConfig:
    """How to launch ``operation`` on ``rows`` rows, on the current GPU.

    Args:
        operation: one of ``OPERATIONS``, or ``"reduce_norm"``.
        format: the block format; of the wire that is written, for decode_sum_encode.
        layout: of its wire.
        rows: of the message.
        dtype: of the values read or written; float32 for decode_sum_encode.

    Raises:
        ValueError: more blocks than a launch can number, or a configuration of :func:`using` that does not fit.
    """
    if rows * layout.blocks > MOST_BLOCKS:
        raise ValueError(f"{operation} of {rows} rows of {layout.blocks} blocks: at most {MOST_BLOCKS} blocks at once")
    chosen = _chosen_by_hand.get()
    if chosen is not None and chosen[0] == operation:
        check(operation, format, layout, chosen[1])
        return chosen[1]
    return _launch_config(operation, format, layout, _log2(rows * layout.features), dtype, current_gpu())


@functools.lru_cache(maxsize=4096)
def _launch_config(
    operation: str, format: BlockFormat, layout: WireLayout, log2_values: int, dtype: torch.dtype, gpu: int | None
) -> LaunchConfig:
    if gpu is not None:
        found = measured(torch.cuda.get_device_name(gpu), operation, format, layout, log2_values, dtype)
        if found is not None:
            return found
    rows = max(1, 2**log2_values // layout.features)
    return guess(operation, format, layout, rows, dtype, gpu_processors(gpu))


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Within the ``with`` block kernels are launched on the GPU of ``tensor``, whichever is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@contextmanager
def using(operation: str, config: LaunchConfig) -> Iterator[None]:
    """Within the ``with`` block this thread launches ``operation`` so: for tuning and for tests."""
    token = _chosen_by_hand.set((operation, config))
    try:
        yield
    finally:
        _chosen_by_hand.reset(token)


_chosen_by_hand: ContextVar[tuple[str, LaunchConfig] | None] = ContextVar("megacomp_launch_config", default=None)


# May it be?


def launch_problem(
    operation: str, format: BlockFormat | StaticFormat, features: int, device: torch.device
) -> str | None:
    """Why ``operation`` cannot run as a Triton kernel on tensors of ``device``; None if it can.

    Args:
        operation: one of ``OPERATIONS``, or ``"reduce_norm"``.
        format: the block or static format; of the wire that is written, for decode_sum_encode.
        features: values per row.
        device: where the tensors live.
    """
    return device_problem(device) or _row_problem(operation, format, features)


@functools.cache
def device_problem(device: torch.device) -> str | None:
    """Why no Triton kernel can run on tensors of ``device``; None if they can."""
    if _version(triton.__version__) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if triton.knobs.runtime.interpret:
        return None if device.type in ("cpu", "cuda") else f"Triton's interpreter takes no tensors on {device.type}"
    if device.type != "cuda":
        return f"Triton kernels run on CUDA tensors, not on {device.type} (or interpreted, with TRITON_INTERPRET=1)"
    if torch.version.hip is not None:
        return "the Triton kernels were never compiled for AMD GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        needed, found = (".".join(map(str, version)) for version in (OLDEST_CAPABILITY, capability))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}; the kernels need {needed}"
    return None


@functools.lru_cache(maxsize=1024)
def _row_problem(operation: str, format: BlockFormat | StaticFormat, features: int) -> str | None:
    if isinstance(format, StaticFormat):
        if operation != "encode":
            return None
        values, what = triton.next_power_of_2(format.layout(features).piece) * format.pieces, "tables"
    elif not _holds_rows(operation, format):
        return None
    else:
        values = _row_blocks(format, format.layout(features)) * format.block_size
        what = "a row scale" if format.scale.row_relative else "exponents packed across a row"
    if values <= LONGEST_ROW:
        return None
    if operation == "reduce_norm":
        what = "a norm"
    return (
        f"{operation} of {features} features with {what}: a program would hold {values} values, "
        f"and spill registers beyond {LONGEST_ROW}"
    )


def check(operation: str, format: BlockFormat, layout: WireLayout, config: LaunchConfig) -> None:
    """What every kernel relies on, in one place.

    Raises:
        ValueError: ``config`` does not fit the operation and the format, and why.
    """
    tile, warps = config.tile, config.num_warps
    problems = []
    for name, value in (("blocks", tile.blocks), ("piece", tile.piece), ("num_warps", warps)):
        if not _power_of_two(value):
            problems.append(f"{name} {value} is no power of two")
    if warps > MOST_WARPS:
        problems.append(f"num_warps {warps} is more than {MOST_WARPS}")
    if tile.piece > longest_piece(format):
        problems.append(f"piece {tile.piece} is longer than {longest_piece(format)}, a block's codes per packed part")
    if tile.blocks * format.block_size < format.rotation:
        problems.append(f"{tile.blocks} blocks of {format.block_size} are no whole rotation of {format.rotation}")
    per_row = tile.blocks_per_row
    if per_row and not (_power_of_two(per_row) and layout.blocks <= per_row <= tile.blocks):
        problems.append(f"blocks_per_row {per_row} is no power of two from {layout.blocks} to blocks {tile.blocks}")
    if _holds_rows(operation, format):
        if not per_row:
            problems.append("blocks_per_row 0, but the rows are taken whole")
        elif _packs_exponents(format) and (tile.blocks != per_row or tile.blocks < 8):
            problems.append(f"{tile.blocks} blocks, but packed exponents take one row, of at least 8 blocks")
    if problems:
        raise ValueError(f"{operation}: {config} cannot be launched: {'; '.join(problems)}")


# What would one guess?


def guess(
    operation: str, format: BlockFormat, layout: WireLayout, rows: int, dtype: torch.dtype, processors: int
) -> LaunchConfig:
    """A configuration from the shape alone.

    A thread owns a block and reads it 16 bytes at a time, or its part of a block of more than ``VALUES_PER_THREAD``.
    A program has ``BLOCKS_PER_PROGRAM`` blocks, fewer where some of the ``processors`` would be left without a
    program, and whole rows where the operation needs them.
    """
    blocks = BLOCKS_PER_PROGRAM
    while blocks > FEWEST_BLOCKS and rows * layout.blocks < blocks * processors:
        blocks //= 2
    return _config(operation, format, layout, dtype, blocks, max(1, format.block_size // VALUES_PER_THREAD), 1)


def candidates(operation: str, format: BlockFormat, layout: WireLayout, dtype: torch.dtype) -> list[LaunchConfig]:
    """The configurations worth trying on a large message, the guess first.

    Programs of half, as many and twice the guess's warps, with two threads to a block and two blocks to a thread.
    """
    found = [guess(operation, format, layout, MOST_BLOCKS // layout.blocks, dtype, 1)]
    for threads_per_block, blocks_per_thread in ((1, 1), (2, 1), (1, 2)):
        for warps in (4, 2, 8):
            blocks = warps * 32 * blocks_per_thread // threads_per_block
            config = _config(operation, format, layout, dtype, blocks, threads_per_block, blocks_per_thread)
            if config not in found:
                found.append(config)
    return found


def _config(
    operation: str,
    format: BlockFormat,
    layout: WireLayout,
    dtype: torch.dtype,
    blocks: int,
    threads_per_block: int,
    blocks_per_thread: int,
) -> LaunchConfig:
    """Programs of ``blocks`` blocks, or of as many whole rows as come to about that."""
    vector = _vector(operation, dtype)
    piece = min(vector * threads_per_block, longest_piece(format))
    # Threads without 16 bytes of a piece would do what others do.
    threads_per_block = max(1, piece // vector)
    blocks_per_row = 0
    if _holds_rows(operation, format):
        blocks_per_row = _row_blocks(format, layout)
        blocks = blocks_per_row if _packs_exponents(format) else max(blocks, blocks_per_row)
    blocks = max(blocks, format.rotation // format.block_size)
    warps = min(MOST_WARPS, max(1, blocks * threads_per_block // (32 * blocks_per_thread)))
    return LaunchConfig(Tile(blocks, blocks_per_row, piece), warps)


def _vector(operation: str, dtype: torch.dtype) -> int:
    """Values of an access. decode_sum_encode reads and writes wires only, and pieces of 8 are 4 bytes of nibbles."""
    return 8 if operation == "decode_sum_encode" else VECTOR_BYTES // dtype.itemsize


def _holds_rows(operation: str, format: BlockFormat) -> bool:
    return operation == "reduce_norm" or (operation != "decode_sum" and needs_whole_rows(format))


def _packs_exponents(format: BlockFormat) -> bool:
    return format.scale.bits < 8


def _row_blocks(format: BlockFormat, layout: WireLayout) -> int:
    """Blocks of a row in a program that holds it whole."""
    blocks = 1 << (layout.blocks - 1).bit_length()
    return max(8, blocks) if _packs_exponents(format) else blocks


# What was measured?

NO_CACHE = "there is no cache: this user has no home folder, and XDG_CACHE_HOME names no other"

FILE_KIND, FILE_VERSION = "megacomp launch configurations", 1

SHIPPED = Path(__file__).parent / "measured"
"""Measurements that come with the package; a user's own go before them."""


@dataclass(frozen=True)
class Measurement:
    """The fastest configuration found for one kind of message.

    Attributes:
        triton: Triton's version, major and minor; others compile other code.
        operation, format, features, dtype: what was launched, the format as ``format_name``.
        log2_values: of the values in the message, rounded down.
        config: the fastest configuration.
        microseconds: its time, and ``guess_microseconds`` the guess's.
    """

    triton: str
    operation: str
    format: str
    features: int
    dtype: str
    log2_values: int
    config: LaunchConfig
    microseconds: float
    guess_microseconds: float

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What must be equal for a measurement to count."""
        return (self.triton, self.operation, self.format, self.features, self.dtype)


def measurement(
    operation: str,
    format: BlockFormat,
    layout: WireLayout,
    rows: int,
    dtype: torch.dtype,
    config: LaunchConfig,
    microseconds: float,
    guess_microseconds: float,
) -> Measurement:
    """The :class:`Measurement` of such a message under this Triton."""
    key = _key(operation, format, layout, dtype)
    return Measurement(*key, _log2(rows * layout.features), config, microseconds, guess_microseconds)


def measured(
    gpu: str, operation: str, format: BlockFormat, layout: WireLayout, log2_values: int, dtype: torch.dtype
) -> LaunchConfig | None:
    """The fastest configuration measured on GPUs named ``gpu`` for a message of nearly this size, if there is one."""
    key = _key(operation, format, layout, dtype)
    for path in (cache_file(gpu), SHIPPED / f"{slug(gpu)}.json"):
        if path is None:
            continue
        near = [
            found for found in _measurements(path, gpu).get(key, ()) if abs(found.log2_values - log2_values) <= NEAREST
        ]
        if near:
            best = min(near, key=lambda found: (abs(found.log2_values - log2_values), found.log2_values))
            try:
                check(operation, format, layout, best.config)
            except ValueError as error:
                logger.warning("%s: ignored: %s", path, error)
                continue
            return best.config
    return None


def record(gpu: str, measurements: Iterable[Measurement]) -> Path:
    """Adds measurements to the user's file for GPUs named ``gpu``, in place of older ones of the same messages.

    Returns:
        The file, replaced as a whole.

    Raises:
        OSError: it cannot be written, or there is no place for it.
    """
    path = cache_file(gpu)
    if path is None:
        raise FileNotFoundError(NO_CACHE)
    forget()
    kept = {(found.key, found.log2_values): found for group in _measurements(path, gpu).values() for found in group}
    kept |= {(found.key, found.log2_values): found for found in measurements}
    entries = [asdict(found) for _, found in sorted(kept.items(), key=lambda item: item[0])]
    text = json.dumps({"kind": FILE_KIND, "version": FILE_VERSION, "gpu": gpu, "measurements": entries}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    forget()
    return path


def forget() -> None:
    """Forgets what was read and decided, so that the files are read anew."""
    _measurements.cache_clear()
    _launch_config.cache_clear()


def cache_file(gpu: str) -> Path | None:
    """Where a user's measurements on GPUs named ``gpu`` are: ``$XDG_CACHE_HOME/megacomp/kernels/<gpu>.json``.

    None as for :func:`cache_folder`.
    """
    folder = cache_folder("kernels")
    return folder and folder / f"{slug(gpu)}.json"


def cache_folder(name: str) -> Path | None:
    """A folder of measurements of this user: ``$XDG_CACHE_HOME/megacomp/<name>``.

    None, for the reason ``NO_CACHE``, where there is none: as in a container that runs under a bare user id.
    """
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification ignores relative paths.
    if Path(configured).is_absolute():
        return Path(configured) / "megacomp" / name
    try:
        return Path("~/.cache").expanduser() / "megacomp" / name
    except RuntimeError:
        return None


def slug(name: str) -> str:
    """A device's name as a file's: ``"NVIDIA H200"`` -> ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def format_name(format: BlockFormat) -> str:
    """A format's name in the files: everything its kernels are specialised for."""
    element, scale = format.element, format.scale
    parts = [element.name, f"b{format.block_size}", scale.name]
    flags = {
        "fractions": getattr(element, "fraction_bits", 0) > 0,
        "symmetric": getattr(element, "symmetric_range", False),
        "searched": format.search,
        "asymmetric": format.asymmetric,
        f"rotation{format.rotation}": format.rotation > 0,
    }
    return "-".join([*parts, *(name for name, there in flags.items() if there)])


@functools.cache
def _measurements(path: Path, gpu: str) -> dict[tuple[str, str, str, int, str], list[Measurement]]:
    """The measurements in a file by their keys; none, and one warning, if it is not such a file of this GPU."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("%s: ignored: %s", path, error)
        return {}
    groups: dict[tuple[str, str, str, int, str], list[Measurement]] = {}
    try:
        content = json.loads(text)
        header = (content["kind"], content["version"], content["gpu"])
        if header != (FILE_KIND, FILE_VERSION, gpu):
            raise ValueError(f"its header is {header}, not {(FILE_KIND, FILE_VERSION, gpu)}")
        for entry in content["measurements"]:
            found = _parse(entry)
            groups.setdefault(found.key, []).append(found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning("%s: ignored, no launch configurations: %s: %s", path, type(error).__name__, error)
        return {}
    return groups


def _parse(entry: Mapping[str, Any]) -> Measurement:
    config = entry["config"]
    tile = config["tile"]
    numbers = [tile["blocks"], tile["blocks_per_row"], tile["piece"], config["num_warps"]]
    numbers += [entry["features"], entry["log2_values"]]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"no whole numbers: {numbers}")
    parsed = Measurement(**{**entry, "config": LaunchConfig(Tile(**tile), config["num_warps"])})
    if not all(isinstance(part, str) for part in (parsed.triton, parsed.operation, parsed.format, parsed.dtype)):
        raise ValueError(f"no names: {parsed.key}")
    return parsed


def _key(operation: str, format: BlockFormat, layout: WireLayout, dtype: torch.dtype) -> tuple[str, str, str, int, str]:
    name = str(dtype).removeprefix("torch.")
    return (TRITON_VERSION, operation, format_name(format), layout.features, name)


def _log2(value: int) -> int:
    return max(1, value).bit_length() - 1


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def current_gpu() -> int | None:
    """The index of the GPU that a launch goes to; None where kernels do not run on one."""
    return torch.cuda.current_device() if _has_gpu() else None


@functools.cache
def _has_gpu() -> bool:
    return not triton.knobs.runtime.interpret and torch.cuda.is_available()


@functools.cache
def gpu_processors(gpu: int | None) -> int:
    """The GPU's streaming multiprocessors; one where there is no GPU: few, large programs suit the interpreter."""
    return 1 if gpu is None else torch.cuda.get_device_properties(gpu).multi_processor_count
