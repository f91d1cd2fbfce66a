"""Trajectories as JSON lines: all that is known of them, or what TRL's trainers take."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from t3d.chat_template import render
from t3d.disk import writing_whole
from t3d.errors import T3DError, nearest
from t3d.trajectories.dataset import TrajectoryDataset
from t3d.trajectories.fingerprint import tokenizer_fingerprint
from t3d.trajectories.record import MESSAGES, Trajectory

_MARK = "what the user says"  # any text that no chat template has or changes


def export_trajectories(
    dataset: TrajectoryDataset, out: Path, format: str, tokenizer=None, only_correct: bool = False
) -> int:
    """Write the trajectories, one on a line, in one of `FORMATS`; returns how many.

    Reads and writes one after the other. The file gets its name when all is written.
    tokenizer: that made them; all formats but `jsonl` need it. only_correct: leave out all that no verifier found so.

    Raises:
        T3DError: an unknown format, nothing to write, another tokenizer, or a prompt that is no chat for `messages`.
    """
    if format not in FORMATS:
        raise T3DError(f"unknown format {format!r}{nearest(format, FORMATS)}; known: {', '.join(FORMATS)}")
    if only_correct:
        count = len(dataset)
        dataset = dataset.select([correct is True for correct in dataset.column("correct")])
        if not len(dataset):
            raise T3DError(f"none of the {count:,} trajectories was found correct; leave out --only-correct")
    if format != "jsonl":
        _check(dataset, tokenizer)
    row = FORMATS[format](tokenizer)
    with writing_whole(Path(out)) as file:
        for trajectory in tqdm(dataset, desc="export", unit="seq", disable=None):
            file.write(json.dumps(row(trajectory), ensure_ascii=False, allow_nan=False) + "\n")
    return len(dataset)


def _check(dataset: TrajectoryDataset, tokenizer) -> None:
    made_with = dataset.metadata.get("tokenizer_fingerprint")
    if tokenizer is None:
        raise T3DError("the text of prompts needs the tokenizer; add --tokenizer CHECKPOINT")
    if made_with not in (None, tokenizer_fingerprint(tokenizer)):
        raise T3DError("the trajectories were made with another tokenizer; name its checkpoint with --tokenizer")


def _everything(_) -> Callable[[Trajectory], dict]:
    """The columns of the Parquet files, each of one type in all rows, so that `datasets` reads them."""

    def row(t: Trajectory) -> dict:
        values = dict(vars(t))  # not asdict(), which copies every token
        del values["logprobs"]
        values |= {f"nfe_{kind}": count for kind, count in vars(values.pop("nfe")).items()}
        values["confidence"] = [None if math.isnan(c) else c for c in np.round(t.confidence, 6).tolist()]
        values["revisions"] = t.revisions or [0] * len(t.response_ids)
        values["extra"] = json.dumps(t.extra, ensure_ascii=False) if t.extra else None
        return values

    return row


def _prompt_completion(tokenizer) -> Callable[[Trajectory], dict]:
    """TRL's standard prompt-completion: the prompt as the model saw it, chat template and all."""
    return lambda t: {"prompt": _prompt(t, tokenizer), "completion": _text(t, tokenizer)}


def _messages(tokenizer) -> Callable[[Trajectory], dict]:
    """TRL's conversational language modelling: the chat, the response its last message.

    Where the trajectory does not keep the chat, it is one message, found in the prompt inside the chat template.
    """

    def rendered(messages: list[dict]) -> str:
        if not getattr(tokenizer, "chat_template", None):
            return messages[-1]["content"]
        return render(tokenizer, messages, add_generation_prompt=True)

    before, _, after = rendered([{"role": "user", "content": _MARK}]).partition(_MARK)

    def row(t: Trajectory) -> dict:
        prompt, messages = _prompt(t, tokenizer), t.extra.get(MESSAGES)
        if messages is None:
            end = prompt.rfind(after) if after else len(prompt)
            if not prompt.startswith(before) or end < len(before):
                raise T3DError(
                    f"the prompt of trajectory {t.prompt_id!r} is no user's message in the tokenizer's chat template; "
                    "--format prompt-completion has it as text"
                )
            messages = [{"role": "user", "content": prompt[len(before) : end]}]
            begun = prompt[end + len(after) :]
        else:
            begun = prompt.removeprefix(rendered(messages))
            begun = "" if begun == prompt else begun
        return {"messages": [*messages, {"role": "assistant", "content": begun + _text(t, tokenizer)}]}

    return row


def _prompt(t: Trajectory, tokenizer) -> str:
    return tokenizer.decode(t.prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _text(t: Trajectory, tokenizer) -> str:
    if t.text is not None:
        return t.text
    return tokenizer.decode(t.response_ids[: t.length], skip_special_tokens=True, clean_up_tokenization_spaces=False)


FORMATS = {"jsonl": _everything, "prompt-completion": _prompt_completion, "messages": _messages}
