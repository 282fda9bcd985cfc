"""What all commands share: options, the engine they name, and what is shown to whom."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megacomp import codecs
from megacomp.calibration import Calibration
from megacomp.config import Config, Weights
from megacomp.launch import distributed, engines, kernel_bench, text
from megacomp.launch.engines import Engine
from megacomp.launch.engines.checkpoint import model_digest
from megacomp.launch.errors import LaunchError


def is_main_rank() -> bool:
    """Whether this process is the one that shows and writes results."""
    return distributed.rank() == 0


def results() -> Console:
    """Where results are shown: standard output, of rank 0 only."""
    return Console(quiet=not is_main_rank(), width=_file_width(sys.stdout))


def messages() -> Console:
    """Where everything else is shown: standard error, of rank 0 only."""
    return Console(quiet=not is_main_rank(), width=_file_width(sys.stderr), stderr=True)


def _file_width(stream: TextIO) -> int | None:
    """In a file, lines are as wide as our tables; on a terminal, as wide as the terminal."""
    return None if stream.isatty() else 120


def progress() -> Progress:
    """A progress bar on standard error, shown by rank 0 and on a terminal only."""
    console = messages()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal or console.quiet,
        transient=True,
    )


def requested_ranks(tp: int | None, simulate_tp: int | None) -> int:
    """The tensor-parallel size a command is asked for by --tp or --simulate-tp; 1 where a launcher may know better.

    Raises LaunchError if both are given, and if ranks are to be simulated by more than one process.
    """
    if simulate_tp is None:
        return tp or 1
    if tp is not None:
        raise LaunchError("--tp starts ranks and --simulate-tp takes the part of all of them: give only one")
    launched = distributed.launched_world_size() or 1
    if launched > 1:
        raise LaunchError(f"--simulate-tp is for one process, but the launcher started {launched} ranks")
    return simulate_tp


def codec(spec: str) -> codecs.Codec:
    """The codec of a --codec option: a preset's name, or a JSON object as in a configuration; LaunchError if none."""
    try:
        return kernel_bench.codec_of(spec)
    except ValueError as error:
        raise LaunchError(f"--codec {spec}: {error}") from None


@contextmanager
def build_engine(
    model: Path, name: str, tp: int, dtype: str, section: Config | None = None, simulate_tp: int | None = None
) -> Iterator[Engine]:
    """`engines.build` for a command, with the weights `section` asks for, if any.

    tp: the ranks there are. simulate_tp: those that this one is to simulate, if any.

    Raises CalibrationError, too, if `section` has a calibration of another model or number of ranks.

    What PyTorch tells Megatron's authors does not concern the command's user.
    """
    weights = Weights() if section is None else section.weights
    if section is not None and section.communication.calibration is not None:
        calibration = Calibration.read(section.communication.calibration)
        calibration.check(tp=simulate_tp or tp, model=model_digest(model))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        with engines.build(
            model,
            name,
            tp=simulate_tp or tp,
            dtype=engines.DTYPES[dtype],
            weights=weights.checkpoint,
            order=weights.order,
            simulate=simulate_tp is not None,
        ) as engine:
            yield engine


class EngineName(str, Enum):
    """The choices of --engine."""

    DEEPSPEED = "deepspeed"
    MEGATRON = "megatron"


class DtypeName(str, Enum):
    """The choices of --dtype."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class OrderName(str, Enum):
    """The choices of --order."""

    TP_AWARE = "tp_aware"
    LOCAL = "local"


ModelOption = Annotated[
    Path,
    typer.Option(
        "--model", help="A local Hugging Face model folder (Llama, Mistral, Qwen2), GPTQ checkpoints included."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help='A DeepSpeed JSON, of which the "megacomp" section is used. Without it: uncompressed only.'
    ),
]
TextOption = Annotated[Path | None, typer.Option("--text", help="A UTF-8 text, for the model's own tokenizer.")]
TokensOption = Annotated[
    Path | None, typer.Option("--tokens", help="Tokens instead of a text: .npy, int64, sequences x length.")
]
SequenceLengthOption = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        min=2,
        help=f"Tokens per sequence. Default: the tokens' own; of a text {text.DEFAULT_LENGTH}, "
        "or what the model has positions for.",
    ),
]
EngineOption = Annotated[EngineName, typer.Option("--engine", help="The framework that runs the model.")]
TpOption = Annotated[
    int | None,
    typer.Option(
        "--tp",
        help="Tensor-parallel ranks. Default: those a launcher started, else 1. "
        "More than one without a launcher starts them under the deepspeed launcher.",
    ),
]
SimulateTpOption = Annotated[
    int | None,
    typer.Option(
        "--simulate-tp",
        min=1,
        help="Instead of --tp: this one process takes the part of so many tensor-parallel ranks, with their results.",
    ),
]
SequencesOption = Annotated[int, typer.Option(min=1, help="How many sequences of the text to draw.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Which ones are drawn.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Sequences per forward.")]
DtypeOption = Annotated[DtypeName, typer.Option("--dtype", help="Of weights and activations.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file as well.")]
