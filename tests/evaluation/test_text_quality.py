"""benchmarks/text_quality.py on the embedded toy, beside a causal model with random weights and the toy's words."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from t3d.tasks.word_problems import build_tokenizer

pytest.importorskip("sacrebleu", reason="needs t3d[text]")
pytest.importorskip("rouge_score", reason="needs t3d[text]")
spec = importlib.util.spec_from_file_location(
    "text_quality", Path(__file__).parents[2] / "benchmarks" / "text_quality.py"
)
text_quality = importlib.util.module_from_spec(spec)
spec.loader.exec_module(text_quality)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("original"), build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_toys_rows(original, tmp_path, capsys):
    file = tmp_path / "found.json"
    text_quality.main(
        ["embedded", "--original", original, "--judge", "embedded", "--problems", "12", "--max-tokens", "96",
         "--dtype", "bfloat16", "--json", str(file)]
    )  # fmt: skip
    result = json.loads(file.read_text())
    assert result["on"].endswith("bfloat16")
    rows = result["rows"]
    noise, four, two, one, threshold, solutions = rows.values()
    assert list(rows)[1:5] == [f"embedded, {how}" for how in ("4 steps", "2 steps", "1 steps", "threshold .9")]
    assert four["accuracy"] > one["accuracy"] >= noise["accuracy"] == 0
    assert noise["perplexity"] > one["perplexity"] > four["perplexity"]
    assert four["bleu"] > noise["bleu"]
    assert four["rouge_l"] > noise["rouge_l"]
    assert [solutions[name] for name in ("accuracy", "bleu", "rouge_l")] == pytest.approx([1, 100, 100])
    assert "tokens" not in solutions
    assert all(row["tokens_per_second"] > 0 for row in (noise, four, two, one, threshold))
    printed = capsys.readouterr().out
    assert f"| embedded, 2 steps | {two['accuracy']:.1%} | {two['perplexity']:.2f} |" in printed


def test_transformers_answers_end_at_the_stop_token(original):
    """Alone or beside a longer prompt, whose padding must not count."""
    scorer = text_quality.load_causal(original, "cpu")
    prompts = [[5, 6, 7], list(range(5, 25))]
    whole = text_quality.generate(scorer, prompts, 12, 2)
    assert whole == [text_quality.generate(scorer, [prompt], 12, 1)[0] for prompt in prompts]
    stop = whole[0][4]
    scorer.model.generation_config.eos_token_id = [stop]
    cut = text_quality.generate(scorer, prompts, 12, 2)
    assert cut[0] == whole[0][: whole[0].index(stop) + 1]


def test_a_mistake_is_one_line(original, capsys):
    for given, said in (
        (["--original", "embedded"], "--original needs the autoregressive one"),
        (["--original", original, "--dtype", "fp16"], "unknown dtype"),
    ):
        with pytest.raises(SystemExit):
            text_quality.main(["embedded", *given])
        assert said in capsys.readouterr().err.splitlines()[-1]
