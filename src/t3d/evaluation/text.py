"""How good free text is: BLEU and ROUGE-L against references and against the teacher, Distinct-n, perplexity."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from t3d.errors import T3DError
from t3d.evaluation.compare import reference_row
from t3d.evaluation.rows import EvalRow
from t3d.evaluation.scoring import Scorer
from t3d.trajectories import Trajectory, TrajectoryDataset


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0..100, as sacrebleu computes it by default (13a tokens, exponential smoothing)."""
    _same_length(texts, references)
    return _extra("sacrebleu").corpus_bleu(list(texts), [list(references)]).score


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1, 0..100, as rouge-score computes it without stemming. It sees ASCII letters and digits only."""
    _same_length(texts, references)
    scorer = _extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    scores = [scorer.score(r, t)["rougeL"].fmeasure for t, r in zip(texts, references, strict=True)]
    return 100 * sum(scores) / len(scores)


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n (arXiv 1510.03055): different word n-grams over all n-grams of all texts; 0 where there are none."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def text_quality(
    trajectories: Sequence[Trajectory],
    teacher: Sequence[Trajectory] | None = None,
    scorer: Scorer | None = None,
) -> dict[str, float]:
    """Whatever can be said of some responses, by name.

    Always `distinct_1` and `distinct_2`; `bleu` and `rouge_l` where problems have references; with `teacher` (the same
    problems in full steps) `teacher_same` (share of responses equal to it token by token), `teacher_bleu` and
    `teacher_rouge_l`; with `scorer` the `perplexity` of the responses after their questions, and of the references.
    """
    trajectories = list(trajectories)
    texts = [t.text or "" for t in trajectories]
    found = {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}
    referred = [t for t in trajectories if t.answer]
    if referred:
        pair = [t.text or "" for t in referred], [t.answer for t in referred]
        found |= {"bleu": bleu(*pair), "rouge_l": rouge_l(*pair)}
    if teacher is not None:
        full = {(t.prompt_id, t.sample): t for t in teacher}
        shared = [(t, full[t.prompt_id, t.sample]) for t in trajectories if (t.prompt_id, t.sample) in full]
        if not shared:
            raise T3DError("the teacher answered none of the problems that the other model did")
        pair = [t.text or "" for t, _ in shared], [f.text or "" for _, f in shared]
        same = sum(t.response_ids[: t.length] == f.response_ids[: f.length] for t, f in shared)
        found |= {
            "teacher_same": same / len(shared),
            "teacher_bleu": bleu(*pair),
            "teacher_rouge_l": rouge_l(*pair),
        }
    if scorer is not None:
        found["perplexity"] = scorer.perplexity(texts, [t.question or "" for t in trajectories])
        if referred:
            contexts = [t.question or "" for t in referred]
            found["reference_perplexity"] = scorer.perplexity([t.answer for t in referred], contexts)
    return found


def add_text_quality(rows: list[EvalRow], folder: Path | str, scorer: Scorer | None = None) -> list[EvalRow]:
    """The rows with `text_quality` in their `extra`. `folder` is where `evaluate` put the answers.

    The teacher is the row that `reference_row` names, else the teacher's with the most steps.
    """
    values = [row.to_dict() for row in rows]
    teachers = [v for v in values if v["model"] == "teacher" and not v["knobs"]]
    base = reference_row(values) or max(teachers, key=lambda v: v["steps"], default=None)

    def answers(results: str) -> list[Trajectory]:
        rest = {"prompt_ids": [], "step_map": [], "confidence": [], "extra": {}}  # not needed, and most of the memory
        return [replace(t, **rest) for t in TrajectoryDataset(Path(folder) / results)]

    full = answers(base["results"]) if base is not None and base["model"] == "teacher" else None
    return [replace(row, extra=row.extra | text_quality(answers(row.results), full, scorer)) for row in rows]


def check_libraries() -> None:
    """Raises T3DError if what BLEU and ROUGE-L need is not installed."""
    for module in ("sacrebleu", "rouge_score.rouge_scorer"):
        _extra(module)


def _same_length(texts: Sequence[str], references: Sequence[str]) -> None:
    if len(texts) != len(references) or not texts:
        raise T3DError(f"{len(texts)} texts and {len(references)} references: need as many of each, and at least one")


def _extra(module: str):
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise T3DError(f"{module.partition('.')[0]} is missing: pip install 't3d[text]'") from error
