import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch

from t3d import T3DError
from t3d.blocks import block_causal_mask
from t3d.evaluation import EvalRow, read_summary
from t3d.evaluation.scoring import Scorer, block_log_likelihood, causal_log_likelihood, load_scorer
from t3d.evaluation.text import add_text_quality, bleu, check_libraries, distinct, rouge_l, text_quality
from t3d.models import save_model
from t3d.tasks import Problem, TaskConfig, get_task
from t3d.tasks.word_problems import build_tokenizer
from tests.conftest import make_model
from tests.example_run import example_run
from tests.trajectory_examples import make_trajectory


@pytest.mark.parametrize("seed", [None, 3])
def test_likelihoods_of_all_responses_sum_to_one(seed):
    """Over two blocks of two, the first shared with the prompt: 1 + 1 generated tokens and the block's rest."""
    model = make_model(block_size=2, vocab_size=6)  # 5 words and the mask
    with torch.inference_mode():
        total = sum(
            math.exp(sum(block_log_likelihood(model, [4], list(ids), seed)))
            for ids in itertools.product(range(5), repeat=3)
        )
    assert total == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("family", ["sdar", "a2d-qwen3", "Fast_dLLM_Qwen"])
def test_left_to_right_likelihood_is_the_decoders(family):
    """Token by token, from the states that a decoder would see; of `a2d` blocks begin at the response."""
    block = 4
    model = make_model(block_size=block, family=family)
    begin = 2 if family == "a2d-qwen3" else 0  # of the first token, behind whose 6 a block begins
    torch.manual_seed(0)
    tokens = torch.randint(0, 63, (13,)).tolist()
    context, ids = tokens[:6], tokens[6:]
    with torch.inference_mode():
        found = block_log_likelihood(model, context, ids)
        for i, expected in enumerate(ids):
            seen = tokens[: 6 + i]
            state = seen + [63] * (-(begin + len(seen)) % block or block)
            mask = block_causal_mask(begin + len(state), block)[None, None, begin:, begin:]
            logits = model(input_ids=torch.tensor([state]), attention_mask=mask).logits
            logits = logits[0, len(seen)].float()
            logits[63] = -torch.inf
            assert found[i] == pytest.approx(logits.log_softmax(-1)[expected].item(), abs=1e-4)


def test_causal_likelihood_against_the_models_own_loss():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    ids = torch.randint(0, 50, (1, 9))
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
        found = causal_log_likelihood(model, ids[0, :1].tolist(), ids[0, 1:].tolist())
        assert -sum(found) / 8 == pytest.approx(loss, abs=1e-5)
        assert causal_log_likelihood(model, [], ids[0].tolist()) == pytest.approx(found)
        assert causal_log_likelihood(model, ids[0, :5].tolist(), ids[0, 5:].tolist()) == pytest.approx(found[4:])


def test_a_prompt_that_begins_with_the_first_token_gets_no_second_one():
    from types import SimpleNamespace

    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    scorer = Scorer(
        LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).eval(), SimpleNamespace(bos_token_id=7)
    )
    assert scorer.log_likelihood([7, 3], [4, 5]) == scorer.log_likelihood([3], [4, 5])
    assert scorer.log_likelihood([7, 7, 3], [4, 5]) != scorer.log_likelihood([3], [4, 5])
    assert len(scorer.log_likelihood([7], [4, 5])) == len(scorer.log_likelihood([], [4, 5])) == 2


def test_scorer_from_a_folder(tmp_path):
    tokenizer = build_tokenizer()
    model = make_model(vocab_size=len(tokenizer) + 1)
    save_model(model, tmp_path / "model", tokenizer)
    scorer = load_scorer(str(tmp_path / "model"), device="cpu")
    texts, contexts = ["First, they have 3 apples.", "They"], ["How many apples?", ""]
    perplexity = scorer.perplexity(texts, contexts)
    ids = [tokenizer.encode(t) for t in texts]
    nats = [scorer.log_likelihood(tokenizer.encode(c), i) for c, i in zip(contexts, ids, strict=True)]
    assert [len(n) for n in nats] == [len(i) for i in ids]
    assert perplexity == pytest.approx(math.exp(-sum(map(sum, nats)) / sum(map(len, nats))))
    random = replace(scorer, orders=2).perplexity(texts, contexts)
    assert random == replace(scorer, orders=2).perplexity(texts, contexts) != perplexity
    assert math.isnan(scorer.perplexity([""]))
    with pytest.raises(T3DError, match="does not fit the scorer's context of 512"):
        scorer.log_likelihood([], [5] * 600)
    with pytest.raises(T3DError, match="cannot load the scorer"):
        load_scorer(str(tmp_path / "nothing"))


def test_a_scorer_of_full_attention_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    save_model(make_model(vocab_size=len(tokenizer) + 1, family="llada"), tmp_path / "model", tokenizer)
    with pytest.raises(T3DError, match="the scorer needs blocks that see only earlier ones"):
        load_scorer(str(tmp_path / "model"), device="cpu")


def test_distinct_by_hand():
    assert distinct(["a b a b", "a"], 1) == 2 / 5
    assert distinct(["a b a b", "a"], 2) == 2 / 3
    assert distinct(["a"], 2) == 0


def test_bleu_and_rouge_are_the_libraries():
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs t3d[text]")
    pytest.importorskip("rouge_score", reason="needs t3d[text]")
    texts, references = ["the cat sat on the mat", "a dog"], ["the cat is on the mat", "a dog barks"]
    assert bleu(texts, references) == sacrebleu.corpus_bleu(texts, [references]).score
    assert bleu(references, references) == pytest.approx(100)
    # longest common subsequences by hand: 5 of 6 and 6 words; 2 of 2 and 3
    assert rouge_l(texts, references) == pytest.approx(100 * (5 / 6 + 2 * 2 / 5) / 2)
    with pytest.raises(T3DError, match="1 texts and 0 references"):
        bleu(["a"], [])


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(T3DError, match=r"sacrebleu is missing: pip install 't3d\[text\]'"):
        bleu(["a"], ["a"])
    with pytest.raises(T3DError, match="sacrebleu is missing"):
        check_libraries()


def test_text_quality_of_responses():
    pytest.importorskip("sacrebleu", reason="needs t3d[text]")
    pytest.importorskip("rouge_score", reason="needs t3d[text]")
    ours = [make_trajectory(f"{i}", text=f"word {i} and more words", answer=f"word {i}") for i in range(4)]
    teacher = [*ours[:3], replace(ours[3], response_ids=ours[3].response_ids[::-1])]
    found = text_quality(ours, teacher)
    assert found["teacher_same"] == 0.75
    assert found["teacher_bleu"] == pytest.approx(100)
    assert found["rouge_l"] == pytest.approx(100 * 2 * 2 / (5 + 2))
    assert found["distinct_1"] == (4 + 4) / 20
    assert "perplexity" not in found
    assert set(text_quality([replace(t, answer=None) for t in ours])) == {"distinct_1", "distinct_2"}
    with pytest.raises(T3DError, match="answered none"):
        text_quality(ours, [make_trajectory("x")])


def test_rows_get_text_quality(tmp_path):
    pytest.importorskip("sacrebleu", reason="needs t3d[text]")
    pytest.importorskip("rouge_score", reason="needs t3d[text]")
    run = example_run(tmp_path / "run", count=5)
    rows = [EvalRow(**row) for row in read_summary(run / "summary.json")["rows"]]
    better = add_text_quality(rows, run / "eval")
    assert better[0].extra["teacher_same"] == 1
    assert better[5].extra["teacher_bleu"] < 100
    assert [replace(row, extra={}) for row in better] == rows


@pytest.fixture
def wikitext(tmp_path):
    words = " ".join(f"w{i}" for i in range(100))
    path = tmp_path / "wiki.train.tokens"
    path.write_text(f" \n = Title = \n \n {words} \n \n too short \n \n {words} end \n \n = = {words} = = \n")
    return path


def test_continuations_of_plain_text(wikitext, tmp_path):
    task = get_task(TaskConfig(name="continuation", path=str(wikitext)))
    problems = task.problems("test")
    assert [len((p.question + " " + p.answer).split()) for p in problems] == [100, 101]
    assert problems[0].question.split() == [f"w{i}" for i in range(32)]
    assert task.verify("anything", problems[0]) is None
    lines = tmp_path / "ptb.txt"
    lines.write_text("\n".join(" ".join(["word"] * n) for n in (65, 10, 70)) + "\n")
    assert len(get_task(TaskConfig(name="continuation", path=str(lines))).problems("test")) == 2
    for path, message in (
        (None, "needs a plain text file"),
        (tmp_path / "no", "cannot read"),
        (tmp_path / "b", "UTF-8"),
    ):
        (tmp_path / "b").write_bytes(b"\xff\xfe\xff")
        with pytest.raises(T3DError, match=message):
            get_task(TaskConfig(name="continuation", path=path and str(path))).problems("test")


def test_summaries_and_dialogue(tmp_path):
    path = tmp_path / "sum.jsonl"
    path.write_text('{"article": "A long story.", "highlights": "Short."}\n{"dialogue": "Hi!", "summary": "Hello."}\n')
    task = get_task(TaskConfig(name="text", path=str(path), template="Sum up: {question}"))
    problems = task.problems("test")
    assert [(p.question, p.answer) for p in problems] == [("A long story.", "Short."), ("Hi!", "Hello.")]
    assert task.prompt_text(problems[0]) == "Sum up: A long story."
    assert task.judge("x ", Problem("1", "q")).extracted == "x"
