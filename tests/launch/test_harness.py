"""Tasks of the Language Model Evaluation Harness over an engine, against plain transformers."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from engines import tiny_models
from lm_eval.api.instance import Instance
from rank_pool import RankPool
from typer.testing import CliRunner

import megacomp
from megacomp import codecs, config
from megacomp.launch import cli, engines, harness, text
from megacomp.launch import eval as eval_command
from megacomp.launch.errors import LaunchError

HIDDEN, VOCAB, POSITIONS, DOCUMENTS, NEW_TOKENS = 64, 96, 128, 12, 4
STOPS = [" w1", " w2"]
LOSSY: dict[str, Any] = {"megacomp": {"backend": "reference", "communication": {"codec": "int3", "min_bytes": 0}}}
EXACT: dict[str, Any] = {"megacomp": {"communication": {"codec": None}}}

Logits = Callable[[list[int]], torch.Tensor]
"""Logits [length, vocab_size] of tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer in model/, data and task definitions in tasks/."""
    folder = tmp_path_factory.mktemp("harness")
    model = tiny_models.save("llama_biased", folder / "model")
    tiny_models.save_tokenizer(folder / "model")
    (folder / "tasks").mkdir()
    generator = np.random.default_rng(0)
    with (folder / "tasks" / "data.jsonl").open("w") as file:
        for index in range(DOCUMENTS):
            words = generator.integers(0, VOCAB, 5 + index).tolist()
            favourite, *_ = following = _greedy(model, words, NEW_TOKENS)
            others = generator.integers(0, VOCAB, (2, 2)).tolist()
            document = {
                "context": _spelt(words),
                "choices": [_spelt([favourite]), _spelt(others[0][:1]), _spelt(others[1])],
                "answer": index % 3 // 2,  # the model's favourite, twice of three times
                "next": _spelt([favourite if index % 4 else (favourite + 1) % VOCAB]),
                "sentence": _cut(_spelt(following)) if index % 3 else "none",
            }
            file.write(json.dumps(document) + "\n")
    (folder / "lossy.json").write_text(json.dumps(LOSSY))
    (folder / "exact.json").write_text(json.dumps(EXACT))
    _define(
        folder,
        "tiny_choice",
        output_type="multiple_choice",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=[_metric("acc"), _metric("acc_norm")],
    )
    _define(
        folder,
        "tiny_next",
        output_type="loglikelihood",
        doc_to_target=" {{next}}",
        metric_list=[_metric("perplexity", "perplexity", False), _metric("acc")],
    )
    _define(
        folder,
        "tiny_sentence",
        output_type="generate_until",
        doc_to_target="{{sentence}}",
        generation_kwargs={"until": STOPS, "max_gen_toks": NEW_TOKENS},
        metric_list=[_metric("exact_match")],
    )
    return folder


def _metric(name: str, aggregation: str = "mean", higher_is_better: bool = True) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


def _define(folder: Path, name: str, **own: Any) -> None:
    """Write a task over the data."""
    tasks = folder / "tasks"
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "data.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{context}}",
        "metadata": {"version": 7},
    }
    (tasks / f"{name}.yaml").write_text(yaml.safe_dump(common | own))


def _spelt(tokens: list[int]) -> str:
    """Tokens as the words of the tokenizer."""
    return " ".join(f"w{token}" for token in tokens)


def _tokens(spelt: str) -> list[int]:
    return [int(word[1:]) for word in spelt.split()]


def _cut(answer: str) -> str:
    return min((answer.partition(stop)[0] for stop in STOPS), key=len)


def _greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    return model.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False)[0, len(tokens) :].tolist()


def _likelihood(logits: Logits, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One sequence alone, in float64, seeing as much of the context as there are positions."""
    inputs = (context + continuation[:-1])[-POSITIONS:]
    log = logits(inputs)[-len(continuation) :].double().log_softmax(-1)
    value = sum(log[position, token].item() for position, token in enumerate(continuation))
    return value, log.argmax(-1).tolist() == continuation


def _of_transformers(folder: Path) -> Logits:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    return torch.no_grad()(lambda tokens: model(torch.tensor([tokens])).logits[0])


def _expected(folder: Path, logits: Logits) -> dict[tuple[str, str], float]:
    """Scores of the tasks of likelihoods."""
    documents = [json.loads(line) for line in (folder / "tasks" / "data.jsonl").open()]
    right, right_by_length, values, greedy = [], [], [], []
    for document in documents:
        context = _tokens(document["context"])
        scored = [_likelihood(logits, context, _tokens(choice))[0] for choice in document["choices"]]
        by_length = [value / len(choice) for value, choice in zip(scored, document["choices"], strict=True)]
        right.append(int(np.argmax(scored)) == document["answer"])
        right_by_length.append(int(np.argmax(by_length)) == document["answer"])
        value, is_greedy = _likelihood(logits, context, _tokens(document["next"]))
        values.append(value)
        greedy.append(is_greedy)
    return {
        ("tiny_choice", "acc"): statistics.fmean(right),
        ("tiny_choice", "acc_norm"): statistics.fmean(right_by_length),
        ("tiny_next", "acc"): statistics.fmean(greedy),
        ("tiny_next", "perplexity"): math.exp(-statistics.fmean(values)),
    }


def _cli(arguments: list[Any]) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def _eval(folder: Path, tasks: str, *arguments: Any) -> list[Any]:
    return [
        *("eval", "--model", folder / "model", "--dtype", "fp32", "--tasks", tasks),
        *("--task-dir", folder / "tasks", *arguments),
    ]


def _compressed_expectation(folder: Path, engine: str) -> dict[tuple[str, str], float]:
    with (
        engines.build(folder / "model", engine, tp=2, dtype=torch.float32) as built,
        megacomp.install(LOSSY, model=built.module),
    ):
        return _expected(folder, lambda tokens: built.logits(torch.tensor([tokens]))[0])


def test_scores_of_two_ranks(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = _eval(
        *(folder, "tiny_choice, tiny_next,tiny_sentence", "--engine", "megatron", "--batch-size", 5),
        *("--config", folder / "lossy.json", "--json", out),
    )
    (code, shown), silent = ranks.run(_cli, arguments)
    assert code == 0, shown
    assert silent == (0, "")
    for word in ("tiny_choice", "acc_norm", "uncompressed", "int3", "kept", "±"):
        assert word in shown
    written = json.loads(out.read_text())
    assert (written["engine"], written["tp"], written["codec"]) == ("megatron", 2, "int3")
    assert written["bits_per_value"] == pytest.approx(codecs.get("int3").bits_per_value(HIDDEN))
    assert written["compressed_messages"] == 1
    assert written["environment"]["backend"] == "gloo"
    scores = {(score["task"], score["metric"]): score for score in written["scores"]}

    expected = _expected(folder, _of_transformers(folder))
    # By the making of the data.
    assert expected["tiny_next", "acc"] == 9 / 12
    expected["tiny_sentence", "exact_match"] = 8 / 12
    compressed = ranks.run(_compressed_expectation, folder, "megatron")[0]
    assert set(scores) == set(expected)
    for name, score in scores.items():
        assert score["baseline_score"] == pytest.approx(expected[name], rel=1e-5)
        assert (score["version"], score["documents"], score["num_fewshot"]) == ("7", DOCUMENTS, 0)
        if name in compressed:
            # Other batches round partials otherwise, and where a code falls the other way that is a quantum.
            assert score["score"] == pytest.approx(compressed[name], rel=1e-2)
    with engines.build(folder / "model", "megatron", tp=2, dtype=torch.float32, simulate=True) as built:
        tasks = harness.load_tasks(["tiny_choice", "tiny_next", "tiny_sentence"], folder / "tasks")
        tokenizer = text.load_tokenizer(folder / "model")
        alone = harness.evaluate_tasks(built, tokenizer, tasks, config.load(LOSSY)[0], batch_size=5)
    assert alone.simulated and [score.to_dict() for score in alone.scores] == written["scores"]

    perplexity, choice = scores["tiny_next", "perplexity"], scores["tiny_choice", "acc"]
    assert perplexity["score"] != pytest.approx(perplexity["baseline_score"], rel=5e-2)
    assert perplexity["kept"] == pytest.approx(perplexity["baseline_score"] / perplexity["score"])
    assert perplexity["baseline_stderr"] is perplexity["change_stderr"] is None
    share = choice["baseline_score"]
    assert choice["baseline_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (DOCUMENTS - 1)))
    assert choice["kept"] == pytest.approx(choice["score"] / share)


def _without_compression(folder: Path) -> tuple[dict[str, Any], str]:
    """Scores of a "compressed" run that is exact, and what comes of requests that differ between ranks."""
    with engines.build(folder / "model", "megatron", tp=2, dtype=torch.float32) as built:
        tokenizer = text.load_tokenizer(folder / "model")
        tasks = harness.load_tasks(["tiny_next"], folder / "tasks", num_fewshot=2)
        scores = harness.evaluate_tasks(built, tokenizer, tasks, config.load(EXACT)[0], limit=7)
        with pytest.raises(LaunchError) as error:
            _model(built, tokenizer).loglikelihood([_request("w1", f" w{dist.get_rank()}")])
    return scores.to_dict(), str(error.value)


def test_both_runs_see_the_same_requests_and_so_do_all_ranks(ranks: RankPool, folder: Path) -> None:
    (first, error), second = ranks.run(_without_compression, folder)
    assert second == (first, error)
    assert error.startswith("the ranks' requests differ")
    assert first["codec"] is first["bits_per_value"] is None and first["compressed_messages"] == 0
    for score in first["scores"]:
        assert (score["documents"], score["num_fewshot"]) == (7, 2)
        assert score["score"] == score["baseline_score"]
    assert {score["metric"]: score["kept"] for score in first["scores"]}["perplexity"] == 1


def _model(engine: engines.Engine, tokenizer: Any) -> harness.EngineModel:
    return harness.EngineModel(engine, tokenizer, batch_size=3)


def _request(*arguments: Any) -> Instance:
    return Instance("loglikelihood", {}, arguments, 0)


def test_requests_of_every_kind(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logits = _of_transformers(folder)
    generator = np.random.default_rng(1)

    def words(count: int) -> list[int]:
        return generator.integers(0, VOCAB, count).tolist()

    tokenizer = text.load_tokenizer(folder / "model")
    with engines.build(folder / "model", "deepspeed", tp=1, dtype=torch.float32) as built:
        model = _model(built, tokenizer)
        shared, favourite = words(9), int(logits([1, 2, 3])[-1].argmax())
        pairs = [(shared, [word]) for word in words(4)]  # one input, several continuations
        pairs += [(words(length), words(1 + length % 5)) for length in (3, 31, 1, 14, 2)]
        pairs += [([1, 2, 3], [favourite]), (words(POSITIONS), words(3)), (words(1), words(POSITIONS))]
        requests = [_request(_spelt(context), " " + _spelt(continuation)) for context, continuation in pairs]
        # A space at the end of the context belongs to the continuation.
        requests.append(_request(_spelt([1, 2, 3]) + " ", _spelt([favourite])))
        pairs.append(([1, 2, 3], [favourite]))
        answers = model.loglikelihood(requests)
        for answer, pair in zip(answers, pairs, strict=True):
            value, greedy = _likelihood(logits, *pair)
            assert answer == (pytest.approx(value, abs=1e-3), greedy)
        assert [greedy for _, greedy in answers].count(True) >= 2
        assert "1 of 13 requests lost their beginning: the model has 128 positions" in caplog.text

        with pytest.raises(LaunchError, match="a continuation has 129 tokens, which must be 1 to the model's 128"):
            model.loglikelihood([_request("w1", " " + _spelt(words(POSITIONS + 1)))])
        with pytest.raises(LaunchError, match="a continuation has 0 tokens"):
            model.loglikelihood([_request("w1", "")])
        for ask, request in (
            (model.loglikelihood, _request("", "w1")),
            (model.loglikelihood_rolling, _request("w1 w2")),
            (model.generate_until, _request("", {"until": ["w"], "max_gen_toks": 2})),
        ):
            with pytest.raises(LaunchError, match="the model's tokenizer has no bos or eos token"):
                ask([request])
        with pytest.raises(LaunchError, match="generates up to 256 tokens, but the model has 128 positions"):
            model.generate_until([_request("w1", {"until": ["w"]})])

        tokenizer.bos_token = "w7"
        for nothing in ("", "  "):
            (value, _greedy), *_ = model.loglikelihood([_request(nothing, "w5 w6")])
            assert value == pytest.approx(_likelihood(logits, [7], [5, 6])[0])
        whole = words(2 * POSITIONS + 40)
        windows = [([7], whole[:128]), (whole[:128][-1:], whole[128:256]), (whole[167:256], whole[256:])]
        assert model.loglikelihood_rolling([_request(_spelt(whole)), _request("w3")]) == [
            pytest.approx(sum(_likelihood(logits, *window)[0] for window in windows)),
            pytest.approx(_likelihood(logits, [7], [3])[0]),
        ]


def test_generation_ends_at_stops(folder: Path) -> None:
    with engines.build(folder / "model", "deepspeed", tp=1, dtype=torch.float32) as built:
        prompt = torch.tensor([[4, 5, 6]])
        tokens = built.generate(prompt, 8).tokens
        assert built.generate(prompt, 8, stop=lambda chosen: len(chosen) == 3).tokens == tokens[:3]
        tokenizer = text.load_tokenizer(folder / "model")
        ask = _model(built, tokenizer).generate_until
        spelt = _spelt(tokens)
        stop = f" w{tokens[4]}"
        settings = {"until": stop, "max_gen_toks": 8}
        assert ask([_request("w4 w5 w6", settings)]) == [spelt.partition(stop)[0]]
        tokenizer.eos_token = f"w{tokens[3]}"
        ended = tokens[: tokens.index(tokens[3])]
        assert _model(built, tokenizer).generate_until([_request("w4 w5 w6", {"max_gen_toks": 8})]) == [_spelt(ended)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "generate_until", "generation_kwargs": {"do_sample": True}}, "task broken samples"),
        ({"unsafe_code": True}, "task broken runs code that the model has written"),
        ({"doc_to_image": ["context"]}, "task broken has more than text"),
        ({"output_type": "guess"}, "task broken cannot be loaded: ValueError: Got invalid output_type 'guess'"),
        ({"test_split": "train"}, "task broken cannot be loaded: KeyError"),
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "task broken cannot be loaded: FileNotFoundError"),
        (
            {"dataset_path": "nobody/nothing", "dataset_kwargs": {}},
            "task broken cannot be loaded: ConnectionError: Couldn't reach 'nobody/nothing' on the Hub",
        ),
    ],
)
def test_tasks_that_cannot_be_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "model").symlink_to(folder / "model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "data.jsonl").symlink_to(folder / "tasks" / "data.jsonl")
    _define(tmp_path, "broken", **{"output_type": "loglikelihood", "doc_to_target": "{{next}}", **changes})
    code, shown = _cli(_eval(tmp_path, "broken"))
    assert code == 2 and message in shown
    assert shown.startswith("error: ") and "Traceback" not in shown


def test_options_that_do_not_go_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (("--tasks", "a", "--text", "f"), "error: not with --tasks: --text"),
        (
            ("--tasks", "a", "--tokens", "f", "--sequence-length", 3),
            "error: not with --tasks: --tokens, --sequence-length",
        ),
        (("--tokens", "f", "--limit", 3, "--num-fewshot", 1), "error: only with --tasks: --limit, --num-fewshot"),
        (("--tasks", ","), "--tasks names no task"),
        (("--tasks", "a", "--task-dir", folder / "none"), "no folder"),
    ):
        code, shown = _cli(["eval", "--model", folder / "model", *arguments])
        assert code == 2 and message in shown
    monkeypatch.setattr(eval_command, "find_spec", lambda name: None)
    code, shown = _cli(_eval(folder, "tiny_next"))
    assert code == 2 and "not installed: pip install 'megacomp[eval]'" in shown


def test_a_name_there_is_no_task_of(folder: Path) -> None:
    papers = "arc_easy,arc_challenge,winogrande,hellaswag,boolq"
    code, shown = _cli(_eval(folder, f"tiny_next,{papers},arc_eesy,qqqqqqqq", "--tp", 2))
    assert code == 2
    assert "there is no task arc_eesy; similar ones are arc_easy" in shown
    assert "there is no task qqqqqqqq; --task-dir DIR adds tasks of your own" in shown
    assert shown.count("there is no task") == 2
