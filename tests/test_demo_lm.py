"""The demo model: an ordinary small Llama that reads Python, with outlier features where ranks reduce."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo_lm"
MODEL = DEMO / "model"
REPORT = json.loads((MODEL / "training.json").read_text())


@pytest.fixture(scope="module")
def demo() -> Iterator[SimpleNamespace]:
    """The example's modules, imported as its scripts import them: from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("corpus", "measure", "train")})


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    loaded, info = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), f"not a plain Llama checkpoint: {info}"
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def rows(demo: SimpleNamespace, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """32 rows of 256 tokens spread over the held-out text, int64 [32, 256]."""
    tokens = tokenizer(demo.corpus.held_out_text(), verbose=False)["input_ids"]
    windows = demo.measure.windows(tokens, 256)
    return windows[torch.linspace(0, len(windows) - 1, 32).long()]


# The checkpoint


def test_shape_and_size_are_what_the_example_promises(model: LlamaForCausalLM) -> None:
    config = model.config
    assert (config.hidden_size, config.head_dim, config.num_attention_heads) == (256, 32, 8)
    assert config.num_key_value_heads == 4
    assert 2_000_000 <= model.num_parameters() <= 4_000_000
    assert model.num_parameters() == REPORT["parameters"]
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000
    with safe_open(MODEL / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_it_predicts_held_out_python(demo: SimpleNamespace, model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    """A broken weight, tokenizer or split shows: 2048 would be a blind guess."""
    perplexity = demo.measure.perplexity(model, rows)
    assert 0.6 * REPORT["held_out"]["perplexity"] < perplexity < 1.5 * REPORT["held_out"]["perplexity"]


def test_perplexity_is_the_exponential_of_the_mean_next_token_loss(
    demo: SimpleNamespace, model: LlamaForCausalLM, rows: torch.Tensor
) -> None:
    sample = rows[:3, :64]
    with torch.no_grad():
        log_probabilities = model(input_ids=sample).logits[:, :-1].log_softmax(-1)
    picked = log_probabilities.gather(-1, sample[:, 1:, None])
    assert demo.measure.perplexity(model, sample, batch=2) == pytest.approx(float((-picked.mean()).exp()), rel=1e-4)


# Outlier features


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_row_parallel_output_has_the_outlier_features(
    demo: SimpleNamespace, model: LlamaForCausalLM, rows: torch.Tensor, tp: int
) -> None:
    statistics = demo.measure.site_statistics(model, rows, tp)
    assert len(statistics) == 2 * model.config.num_hidden_layers * tp
    for site in statistics:
        features = REPORT["outlier_features"]
        assert set(site.widest[: len(features)]) == set(features), site
        # A rank's part of a sum varies more than the sum.
        assert site.max_over_median > (6 if tp == 1 else 4), site
        assert site.kurtosis > (30 if tp == 1 else 12), site


def test_statistics_of_a_whole_site_are_those_of_its_layers_output(
    demo: SimpleNamespace, model: LlamaForCausalLM, rows: torch.Tensor
) -> None:
    layer = model.model.layers[2].mlp.down_proj
    outputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, output: outputs.append(output.detach()))
    sites = demo.measure.site_statistics(model, rows[:4], 1)
    whole = next(site for site in sites if site.site.endswith("2.mlp.down_proj"))
    handle.remove()
    ranges = outputs[0].flatten(0, 1).abs().amax(0)
    assert whole.max_over_median == pytest.approx(float(ranges.max() / ranges.median()), rel=1e-4)
    assert whole.widest == ranges.topk(4).indices.tolist()


def test_quality_depends_on_the_outlier_features(
    demo: SimpleNamespace, model: LlamaForCausalLM, rows: torch.Tensor
) -> None:
    features = REPORT["outlier_features"]
    whole = demo.measure.perplexity(model, rows[:8])
    with demo.measure.features_removed(model, features):
        assert demo.measure.perplexity(model, rows[:8]) > 2 * whole
    with demo.measure.features_removed(model, [feature + 1 for feature in features]):
        assert demo.measure.perplexity(model, rows[:8]) < 1.5 * whole
    assert demo.measure.perplexity(model, rows[:8]) == whole


def test_folding_the_gain_leaves_an_ordinary_llama_with_the_same_outputs(
    demo: SimpleNamespace, rows: torch.Tensor
) -> None:
    model = demo.train.build_model(seed=1).eval()
    with torch.no_grad():
        before = model(input_ids=rows[:1, :16]).logits
        demo.train.fold_gain(model)
        assert torch.equal(model(input_ids=rows[:1, :16]).logits, before)
    assert set(model.state_dict()) == set(LlamaForCausalLM(model.config).state_dict())
    norms = model.model.layers[1].mlp.down_proj.weight.norm(dim=1)
    gains = norms[list(demo.train.OUTLIER_FEATURES)] / norms.median()
    torch.testing.assert_close(gains, torch.full_like(gains, demo.train.OUTLIER_GAIN), rtol=0.05, atol=0)


# Tokenizer


def test_tokenizer_names_a_class_every_supported_transformers_has() -> None:
    """transformers 4 refuses the name that transformers 5 saves by default."""
    config = json.loads((MODEL / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    "text",
    ["", " ", "\t\tif x:\r\n", "naïve = '→ 日本語 🐍'\n", "\x00\x7f\u200b", "a  b   c \n\n\n    d", "1234567890e-10"],
)
def test_tokenizer_round_trips_any_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_round_trips_python_sources_exactly(
    demo: SimpleNamespace, tokenizer: PreTrainedTokenizerBase
) -> None:
    for text in demo.corpus.held_out_texts():
        tokens = tokenizer(text, verbose=False)["input_ids"]
        assert tokenizer.decode(tokens) == text
        assert max(tokens) < len(tokenizer) == 2048


# The split


def test_a_files_side_depends_on_its_path_alone(demo: SimpleNamespace, tmp_path: Path) -> None:
    """The sides are written out: moving one would put trained text in the evaluation."""
    for version, body in (("3.10", "x = 1\n"), ("3.13", "y = 2\n")):
        root = tmp_path / version
        for name in ("functools.py", "asyncio/events.py", "abc.py", "json/decoder.py"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(body)
        for excluded in ("test/test_abc.py", "site-packages/six.py", "_sysconfigdata__linux_.py", "json/test/x.py"):
            (root / excluded).parent.mkdir(parents=True, exist_ok=True)
            (root / excluded).write_text("excluded\n")
        assert set(demo.corpus.source_files(root)) == {
            "functools.py", "asyncio/events.py", "abc.py", "json/decoder.py",
        }  # fmt: skip
        held_out = {name for name in demo.corpus.source_files(root) if demo.corpus.is_held_out(name)}
        assert held_out == {"functools.py", "asyncio/events.py"}
        assert demo.corpus.training_texts(root) == [body, body]
        assert demo.corpus.held_out_text(root) == f"{body}\n{body}"


def test_a_library_without_sources_is_a_clear_error(demo: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"without \.py files"):
        demo.corpus.held_out_text(tmp_path)


def test_too_little_text_for_one_row_is_a_clear_error(demo: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="10 tokens do not fill one row of 256"):
        demo.measure.windows(list(range(10)), 256)
