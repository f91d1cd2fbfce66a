"""Rollout files of the authors' release and of dLLM-RL, as trajectories.

They keep text and a step map; token ids are gone. So the text is tokenised again, and a response is taken only where
everything that can be compared lines up: as many tokens as steps, every block's steps after those of the block before,
no more of them than a block has tokens. What does not is counted and left out. (Other token ids of the same number and
the same block structure cannot be told apart; for text that the same tokenizer decoded, none are known.)
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from t3d.chat_template import render
from t3d.errors import T3DError
from t3d.tasks.records import read_records
from t3d.trajectories.fingerprint import tokenizer_fingerprint
from t3d.trajectories.record import NFE, Trajectory
from t3d.trajectories.store import TrajectoryWriter

TEMPLATE = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclass
class Imported:
    """What became of a file's responses."""

    kept: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> how many
    first: dict[str, str] = field(default_factory=dict)  # reason -> where the first one is

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)


class _Unusable(Exception):
    """A response that does not line up; its message is the reason."""


def import_rollouts(
    path: str | Path,
    folder: str | Path,
    tokenizer,
    stop_ids: tuple[int, ...],
    block_size: int = 4,
    template: str = TEMPLATE,
    metadata: dict | None = None,
) -> Imported:
    """Write what lines up in the rollout file `path` to a folder of trajectories.

    A record has `prompt` (as decoded, chat form included) or `question` (which then goes through `template` and the
    chat template), `full_output` (or `answer`, as rename_key.py calls it) and `step_map`, both a list with an entry for
    every response, and, after grading, `correctness`. Confidences and forwards are not recorded there; the latter are
    counted from the steps.
    stop_ids: a response that ends in one has stopped, any other was cut.

    Raises:
        T3DError: the file is not one of records, or nothing in it lines up.
    """
    found, name = Imported(), Path(path).stem
    about = {"kind": "import", "source": Path(path).name, "block_size": block_size, "stop_ids": list(stop_ids)}
    about["tokenizer_fingerprint"] = tokenizer_fingerprint(tokenizer)
    writer = None
    try:
        for number, (where, record) in enumerate(read_records(path)):
            for sample, parts in enumerate(_responses(record, where, found)):
                place = f"{where}, response {sample + 1}"
                try:
                    trajectory = _trajectory(record, *parts, tokenizer, stop_ids, block_size, template)
                except _Unusable as reason:
                    found.drop(str(reason), place)
                    continue
                if writer is None:  # so that a file with nothing in it leaves no folder
                    writer = TrajectoryWriter(folder, about | (metadata or {}))
                trajectory.prompt_id, trajectory.sample = f"{name}/{number:06d}", sample
                writer.write(trajectory)
                found.kept += 1
    finally:
        if writer is not None:
            writer.close()
    if not found.kept:
        raise T3DError(f"{path}: no response lines up with its step map ({describe(found)})")
    return found


def describe(found: Imported) -> str:
    """Why responses were left out, the most frequent reason first."""
    reasons = [f"{count} {reason} (first: {found.first[reason]})" for reason, count in found.dropped.most_common()]
    return "; ".join(reasons) or "none dropped"


def _responses(record: dict, where: str, found: Imported) -> Iterator[tuple[Any, Any, bool | None]]:
    """(text, step map, verdict) of each response of a record."""
    texts = record.get("full_output", record.get("answer"))
    texts = [texts] if isinstance(texts, str) else texts
    steps = record.get("step_map")
    if not isinstance(texts, list) or not texts:
        return found.drop("without full_output", where)
    if not isinstance(steps, list):
        return found.drop("without step_map", where)
    if steps and all(isinstance(step, int) for step in steps):
        steps = [steps]  # one response's, unwrapped
    verdicts = record.get("correctness")
    for i, text in enumerate(texts):
        verdict = verdicts[i] if isinstance(verdicts, list) and i < len(verdicts) else None
        if isinstance(verdict, list):  # code: of each test
            verdict = all(verdict) if verdict else None
        yield text, steps[i] if i < len(steps) else None, verdict if isinstance(verdict, bool) else None
    return None


def _trajectory(record, text, steps, verdict, tokenizer, stop_ids, block_size, template) -> Trajectory:
    def check(ok: bool, reason: str):
        if not ok:
            raise _Unusable(reason)

    check(isinstance(text, str) and bool(text), "without text")
    texts = (text, *(record.get(name) for name in ("prompt", "question", "ground_truth_answer")))
    whole = not any(
        "\ud800" <= character <= "\udfff" for value in texts if isinstance(value, str) for character in value
    )
    check(whole, "with half of a character")
    check(isinstance(steps, list) and bool(steps), "without step_map")
    check(all(type(step) is int for step in steps), "with a step map that is not made of integers")
    check(min(steps) > 0, "with tokens that were never unmasked")
    prompt = _prompt(record, tokenizer, template)
    response = tokenizer(text, add_special_tokens=False)["input_ids"]
    check(len(response) == len(steps), "with another number of tokens than of steps")
    tail = len(prompt) % block_size
    blocks, at = [], -tail
    while at < len(response):
        blocks.append(steps[max(at, 0) : at + block_size])
        at += block_size
    check(
        all(max(a) < min(b) for a, b in pairwise(blocks)),
        f"whose steps do not follow blocks of {block_size}",
    )
    check(all(max(b) - min(b) < block_size for b in blocks), f"with more steps in a block than its {block_size} tokens")
    local = [step - min(block) for block in blocks for step in block]
    length, stopped = len(response), response[-1] in stop_ids
    missing = -(len(prompt) + length) % block_size
    # What came after the last token was not kept. It is filled with stop tokens that were committed last, so that
    # states show a mask there; it does not count, and nobody learns from it.
    filler = stop_ids[0] if stop_ids else tokenizer.eos_token_id
    check(not missing or filler is not None, "without a stop token to fill the last block")
    last = min(max(local[-len(blocks[-1]) :]) + 1, block_size - 1)
    return Trajectory(
        prompt_ids=prompt,
        response_ids=response + [filler] * missing,
        step_map=local + [last] * missing,
        confidence=[float("nan")] * (length + missing),
        length=length,
        finish_reason="stop" if stopped else "length",
        nfe=NFE(denoise=sum(max(block) - min(block) + 1 for block in blocks)),
        block_size=block_size,
        text=tokenizer.decode(response, skip_special_tokens=True),
        question=record["question"] if isinstance(record.get("question"), str) else None,
        answer=record["ground_truth_answer"] if isinstance(record.get("ground_truth_answer"), str) else None,
        correct=verdict,
    )


def _prompt(record: dict, tokenizer, template: str) -> list[int]:
    text = record.get("prompt")
    if not isinstance(text, str) or not text:
        if not isinstance(record.get("question"), str) or not record["question"].strip():
            raise _Unusable("without prompt and question")
        chat = [{"role": "user", "content": template.format(question=record["question"])}]
        text = render(tokenizer, chat, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
