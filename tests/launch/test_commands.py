"""The commands in one process: what they print and write, and how they refuse."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import tiny_models
from safetensors.torch import load_file
from typer.testing import CliRunner

from megacomp import codecs
from megacomp.launch import bench, cli, command, files
from megacomp.launch import eval as eval_command

pytestmark = pytest.mark.usefixtures("no_launcher")

CONFIG = {"megacomp": {"backend": "reference", "communication": {"codec": "int8", "min_bytes": 0}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, tokens, a text and a configuration."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama_biased", folder)
    tiny_models.save_tokenizer(folder)
    generator = np.random.default_rng(0)
    np.save(folder / "tokens.npy", generator.integers(0, 96, (3, 16)))
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in generator.integers(0, 96, 100)))
    (folder / "ds.json").write_text(json.dumps(CONFIG))
    return folder


def _call(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def _eval(folder: Path, *arguments: Any) -> Any:
    return _call("eval", "--model", folder, "--dtype", "fp32", *arguments)


def test_eval_writes_the_row_of_the_report(folder: Path, tmp_path: Path) -> None:
    out, logits = tmp_path / "out.json", tmp_path / "logits.safetensors"
    result = _eval(
        *(folder, "--tokens", folder / "tokens.npy", "--config", folder / "ds.json"),
        *("--json", out, "--logits-out", logits, "--max-sequences", 2, "--sequence-length", 12),
    )
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output
    written = json.loads(out.read_text())
    row = {
        *("engine", "tp", "codec", "bits_per_value", "ratio", "wire_bytes_per_token", "perplexity"),
        *("baseline_perplexity", "top1_agreement", "kl", "ttft_ms", "baseline_ttft_ms", "environment"),
    }
    assert row <= set(written)
    assert (written["engine"], written["tp"], written["sequences"], written["length"]) == ("deepspeed", 1, 2, 12)
    assert written["environment"]["torch"] == torch.__version__
    assert written["environment"]["backend"] == "gloo"
    assert load_file(logits)["logits"].shape == (2, 12, 96)


def test_eval_of_a_text_is_that_of_its_tokens(folder: Path, tmp_path: Path) -> None:
    words = (folder / "text.txt").read_text().split()
    tokens = np.array([int(word[1:]) for word in words])[: 100 // 16 * 16].reshape(-1, 16)
    np.save(tmp_path / "same.npy", tokens)
    results = []
    for source in (("--text", folder / "text.txt"), ("--tokens", tmp_path / "same.npy")):
        out = tmp_path / "out.json"
        result = _eval(folder, *source, "--sequence-length", 16, "--json", out, "--engine", "megatron")
        assert result.exit_code == 0, result.output
        results.append(json.loads(out.read_text()))
    assert results[0]["baseline_perplexity"] == results[1]["baseline_perplexity"]
    assert results[0]["sequences"] == 6 and results[0]["perplexity"] is None


def test_generate_continues_as_transformers_does(folder: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[5, 17, 3, 80]])
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 4:].tolist()
    np.save(tmp_path / "prompt.npy", prompt.numpy())
    for source in (("--prompt", "w5 w17 w3 w80"), ("--tokens", tmp_path / "prompt.npy")):
        out = tmp_path / "out.json"
        result = _call(
            *("generate", "--model", folder, "--dtype", "fp32", "--max-new-tokens", 6, *source),
            *("--config", folder / "ds.json", "--json", out),
        )
        assert result.exit_code == 0, result.output
        written = json.loads(out.read_text())
        assert written["tokens"] == expected
        assert written["ttft_ms"] > 0 and written["tokens_per_s"] > 0
        assert "6 tokens, first after" in result.output


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_simulated_ranks(folder: Path, tmp_path: Path, engine: str) -> None:
    simulate, config = ("--simulate-tp", 4, "--engine", engine), ("--config", folder / "ds.json")
    result = _eval(folder, *simulate, *config, "--tokens", folder / "tokens.npy", "--json", tmp_path / "eval.json")
    assert result.exit_code == 0, result.output
    assert f"{engine}, simulated TP 4" in result.output and "time to first token" not in result.output
    written = json.loads((tmp_path / "eval.json").read_text())
    assert (written["tp"], written["simulated"], written["codec"], written["ttft_ms"]) == (4, True, "int8", None)
    # Two layers, each with two sites, where a rank sends its message to three others.
    assert written["wire_bytes_per_token"] == 3 * 4 * codecs.get("int8").row_bytes(64)
    assert 0 < abs(written["perplexity"] / written["baseline_perplexity"] - 1) < 0.01

    generate = ("generate", "--model", folder, "--dtype", "fp32", "--max-new-tokens", 4, "--prompt", "w5 w17")
    texts = []
    for options in (simulate, ("--engine", engine)):
        result = _call(*generate, *options, "--json", tmp_path / "generate.json")
        assert result.exit_code == 0, result.output
        written = json.loads((tmp_path / "generate.json").read_text())
        texts.append(written["text"])
        simulated = options is simulate
        assert (written["tp"], written["simulated"]) == ((4, True) if simulated else (1, False))
        assert (written["ttft_ms"] is None) == (written["tokens_per_s"] is None) == simulated
        assert ("first after" in result.output) != simulated
    assert texts[0] == texts[1]


def test_simulated_ranks_are_for_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = _eval(folder, "--tokens", folder / "tokens.npy", "--simulate-tp", 2)
    assert result.exit_code == 2 and "for one process, but the launcher started 2 ranks" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval", "give either --text FILE or --tokens FILE.npy"),
        ("eval --tokens {}/tokens.npy --text {}/text.txt", "give either --text FILE or"),
        ("eval --tokens {}/none.npy", "no file"),
        ("eval --tokens {}/text.txt", "text.txt is not a .npy array"),
        ("eval --tokens {}/flat.npy", "must hold whole numbers [sequences, length], not float64 [4]"),
        ("eval --tokens {}/short.npy", "has shape [4, 1]: it needs a sequence of at least 2 tokens"),
        ("eval --tokens {}/big.npy", "tokens from 0 to 96, but the model's vocabulary is 0 to 95"),
        ("eval --tokens {}/tokens.npy --sequence-length 17", "--sequence-length 17, but"),
        ("eval --text {}/text.txt --sequence-length 129", "129 tokens, but the model has positions for 128"),
        ("eval --tokens {}/long.npy", "129 tokens, but the model has positions for 128"),
        ("generate --prompt w1 --max-new-tokens 129", "take 129 positions, but the model has 128"),
        ("eval --tokens {}/tokens.npy --json {}", "is a folder; give the name of a file"),
        ("eval --tokens {}/tokens.npy --logits-out {}/no/file", "there is no folder"),
        ("eval --tokens {}/tokens.npy --config {}/bad.json", "megacomp.communication.codec: unknown preset"),
        ("eval --tokens {}/tokens.npy --config {}/none.json", "none.json"),
        ("eval --tokens {}/tokens.npy --tp 3", "tensor-parallel size 3 does not divide num_attention_heads 8"),
        ("eval --tokens {}/tokens.npy --tp 0", "at least 1, not 0"),
        ("eval --tokens {}/tokens.npy --simulate-tp 3", "tensor-parallel size 3 does not divide"),
        ("eval --tokens {}/tokens.npy --simulate-tp 2 --tp 2", "give only one"),
        ("generate --prompt w1 --simulate-tp 2 --tp 2", "give only one"),
        ("eval --text {}/empty.txt", "empty.txt is empty: it gives 0 tokens, at least 2 are needed"),
        ("eval --text {}/binary.txt", "binary.txt is not UTF-8 text"),
        ("generate", "give either --prompt TEXT or --tokens FILE.npy"),
        ("generate --tokens {}/tokens.npy", "holds 3 sequences; generate continues one"),
        ("generate --prompt=", "the prompt is empty"),
    ],
)
def test_requests_that_cannot_be_served(folder: Path, tmp_path: Path, arguments: str, message: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    np.save(tmp_path / "flat.npy", np.zeros(4))
    np.save(tmp_path / "short.npy", np.zeros((4, 1), dtype=int))
    np.save(tmp_path / "long.npy", np.zeros((4, 129), dtype=int))
    np.save(tmp_path / "big.npy", np.array([[0, 96]]))
    (tmp_path / "bad.json").write_text('{"megacomp": {"communication": {"codec": "mxfp5"}}}')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    name, *rest = arguments.replace("{}", str(tmp_path)).split()
    result = _call(name, "--model", tmp_path, *rest)
    assert result.exit_code == 2
    assert message in result.output
    assert "error: " in result.output and "Traceback" not in result.output


def test_a_folder_without_a_tokenizer_or_a_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    result = _eval(tmp_path, "--text", folder / "text.txt")
    assert result.exit_code == 2 and "holds no weights" in result.output
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    for arguments in (("eval", "--text", folder / "text.txt"), ("generate", "--prompt", "x")):
        result = _call(arguments[0], "--model", tmp_path, *arguments[1:])
        assert result.exit_code == 2
        assert "holds no tokenizer" in result.output and "use --tokens FILE.npy" in result.output


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_one(name: str) -> None:
    result = _call(name, "--help")
    assert result.exit_code == 0 and f"Usage: megacomp {name} " in result.output


LISTING = """
import sys
from typer.testing import CliRunner
from megacomp.launch.cli import COMMANDS, app
for arguments in (["--help"], ["--version"], ["evaluate"]):
    result = CliRunner().invoke(app, arguments)
    assert arguments != ["--help"] or all(f" {name} " in result.output for name in COMMANDS), result.output
assert not {"torch", "numpy"} & set(sys.modules), "listing commands imports them"
"""


def test_commands_are_listed_without_being_imported() -> None:
    subprocess.run([sys.executable, "-c", LISTING], check=True)


def test_unknown_options_and_choices_are_usage_errors(folder: Path) -> None:
    assert _eval(folder, "--tokens", folder / "tokens.npy", "--engine", "vllm").exit_code == 2
    assert _call("evaluate").exit_code == 2
    for codec, problem in (("mxfp5", "unknown preset"), ("{", "error: ")):
        result = _call("bench", "collective", "--codec", codec)
        assert result.exit_code == 2 and problem in result.output
    for chunks in ("some", "²"):  # a digit, and no number
        result = _call("bench", "collective", "--pipeline-chunks", chunks)
        assert result.exit_code == 2 and "pipeline_chunks must be" in result.output


def test_bench_collective(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    # As the deepspeed launcher starts it, with its own argument first.
    result = CliRunner().invoke(
        bench.app,
        ["--local_rank=0", "collective", "--tp", "1", "--mib", "1", "--repeats", "1", "--json", str(out)],
    )
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["message"]["bytes"] == 2**20
    assert written["plain"]["median_ms"] > 0 and set(written["stages"]) == {"encode_ms", "wire_ms", "decode_ms"}
    assert written["environment"]["backend"] == "gloo"


def test_other_errors_keep_their_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(eval_command, "evaluate", broken)
    result = _eval(folder, "--tokens", folder / "tokens.npy")
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)


def test_only_rank_0_shows_results(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        command.results().print(f"rank {rank}")
    assert capsys.readouterr().out == "rank 0\n"


SCRIPT = """
import json, sys
import neighbour
assert __name__ == "__main__" and sys.modules["__main__"].neighbour is neighbour
print(json.dumps({"argv": sys.argv, "path": sys.path[0], "installed": neighbour.installed()}))
sys.exit(next(int(argument) for argument in sys.argv if argument.isdigit()))
"""

NEIGHBOUR = """
from megacomp import installation
def installed():
    return installation._registry.active is not None
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    return tmp_path


def _said(result: Any) -> dict[str, Any]:
    return json.loads(next(line for line in result.output.splitlines() if line.startswith("{")))


@pytest.mark.parametrize("code", [0, 5])
def test_run_is_python_with_compression(scripts: Path, code: int) -> None:
    argv, path, main = sys.argv, list(sys.path), sys.modules["__main__"]
    result = _call(
        *("run", "--config", scripts / "ds.json", "--json", scripts / "report.json"),
        *(scripts / "script.py", code, "--config", "own", "--help"),
    )
    assert result.exit_code == code
    assert _said(result) == {
        "argv": [str(scripts / "script.py"), str(code), "--config", "own", "--help"],
        "path": str(scripts),
        "installed": True,
    }
    assert "megacomp" in result.stderr
    assert json.loads((scripts / "report.json").read_text())["config"]["communication"]["codec"] is not None
    assert (sys.argv, sys.path, sys.modules["__main__"]) == (argv, path, main)


def test_run_of_a_module_started_by_the_deepspeed_launcher(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scripts)
    report = scripts / "report.json"
    report.write_text("of an earlier run")
    result = CliRunner().invoke(cli.app, ["--local_rank=1", "run", "--json", str(report), "-m", "script", "0"])
    assert result.exit_code == 0, result.output
    # The launcher's argument stands before the script's own, as it does without megacomp.
    assert _said(result) == {
        "argv": [str(scripts / "script.py"), "--local_rank=1", "0"],
        "path": str(scripts),
        "installed": False,
    }
    assert "nothing was compressed: no --config, and no section from the script" in result.stderr
    assert json.loads(report.read_text()) is None


def test_json_files_are_json(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    files.write_json(path, {"a": [math.inf, (1.5, -math.inf)], "b": {"c": math.nan, "d": "x", "e": 3, "f": True}})
    strict = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert strict == {"a": [None, [1.5, None]], "b": {"c": None, "d": "x", "e": 3, "f": True}}


def test_run_refuses_before_the_script_starts(scripts: Path) -> None:
    (scripts / "bad.json").write_text('{"megacomp": "auto"}')
    (scripts / "weights.json").write_text(json.dumps({"megacomp": {"weights": {"checkpoint": str(scripts)}}}))
    for arguments, message in (
        (("--config", scripts / "bad.json", scripts / "script.py"), "megacomp"),
        ((scripts / "none.py",), "no file"),
        (("--config", scripts / "weights.json", scripts / "script.py"), "megacomp.weights.checkpoint"),
    ):
        result = _call("run", *arguments)
        assert result.exit_code == 2 and message in result.output and "argv" not in result.output
