"""Trajectories for other programs: the files load with `datasets`, in the formats that TRL documents."""

import json
import math
from dataclasses import asdict, replace

import pytest

from t3d.errors import T3DError
from t3d.tasks.tokenizer import word_tokenizer
from t3d.trajectories import TrajectoryDataset, TrajectoryWriter
from t3d.trajectories.export import export_trajectories
from t3d.trajectories.fingerprint import tokenizer_fingerprint
from tests.trajectory_examples import make_trajectory

TOKENIZER = word_tokenizer(["system", "Be brief.", "How many legs?", "And two?", "4", "<think>"])
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many legs?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And two?"},
]
ASKED = "<|im_start|>user\nHow many legs?<|im_end|>\n<|im_start|>assistant\n"


def answer(n: int, prompt: str = ASKED, **fields):
    ids = TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
    t = make_trajectory(f"p{n}", prompt=len(ids), **fields)
    return replace(t, prompt_ids=ids, text="Eight legs.", correct=[True, False, None][n % 3])


@pytest.fixture
def stored(tmp_path):
    def store(*trajectories, metadata=None):
        with TrajectoryWriter(tmp_path / "rollout", metadata or {}) as writer:
            for trajectory in trajectories:
                writer.write(trajectory)
        return TrajectoryDataset(tmp_path / "rollout")

    return store


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return lambda path: datasets.load_dataset("json", data_files=str(path), split="train")


def test_all_that_is_known(stored, loaded, tmp_path):
    unknown = [math.nan] * len(answer(2).confidence)
    revised = [1] + [0] * (len(answer(1).response_ids) - 1)
    dataset = stored(
        answer(0, extra={}), answer(1, revisions=revised, answer=None), answer(2, confidence=unknown, extra={"a": [1]})
    )
    assert export_trajectories(dataset, tmp_path / "new" / "all.jsonl", "jsonl") == 3
    rows = list(loaded(tmp_path / "new" / "all.jsonl"))
    for row, t in zip(rows, dataset, strict=True):
        counts = {f"nfe_{kind}": count for kind, count in asdict(t.nfe).items()}
        known = asdict(t) | counts | {"revisions": t.revisions or [0] * len(t.response_ids)}
        known |= {"extra": json.dumps(t.extra) if t.extra else None}
        known.pop("nfe"), known.pop("logprobs")
        assert row.pop("confidence") == [None if math.isnan(c) else pytest.approx(c, abs=1e-6) for c in t.confidence]
        known.pop("confidence")
        assert row == known
    assert [row["correct"] for row in rows] == [True, False, None]


def test_prompts_and_completions(stored, loaded, tmp_path):
    dataset = stored(*map(answer, range(4)), metadata={"tokenizer_fingerprint": tokenizer_fingerprint(TOKENIZER)})
    out = tmp_path / "trl.jsonl"
    assert export_trajectories(dataset, out, "prompt-completion", TOKENIZER) == 4
    assert list(loaded(out)) == [{"prompt": ASKED, "completion": "Eight legs."}] * 4
    assert export_trajectories(dataset, out, "prompt-completion", TOKENIZER, only_correct=True) == 2


def test_messages(stored, loaded, tmp_path):
    form = TOKENIZER.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    dataset = stored(
        answer(0),
        answer(1, ASKED + "<think>\n"),
        answer(2, form, extra={"messages": CHAT}),
        answer(3, form + "<think>\n", extra={"messages": CHAT}),
    )
    out = tmp_path / "trl.jsonl"
    export_trajectories(dataset, out, "messages", TOKENIZER)
    asked = [{"role": "user", "content": "How many legs?"}]
    reply, thought = ({"role": "assistant", "content": text} for text in ("Eight legs.", "<think>\nEight legs."))
    expected = [[*asked, reply], [*asked, thought], [*CHAT, reply], [*CHAT, thought]]
    assert list(loaded(out)) == [{"messages": messages} for messages in expected]


def test_without_a_chat_template_the_prompt_is_the_message(stored, tmp_path):
    plain = word_tokenizer(["How many legs?"])
    plain.chat_template = None
    prompt = plain("How many legs?")["input_ids"]
    dataset = stored(replace(make_trajectory(prompt=len(prompt)), prompt_ids=prompt, text=None))
    export_trajectories(dataset, tmp_path / "out.jsonl", "messages", plain)
    (user, reply) = json.loads((tmp_path / "out.jsonl").read_text())["messages"]
    assert user == {"role": "user", "content": "How many legs?"}
    (t,) = dataset
    assert reply["content"] == plain.decode([*t.response_ids[: t.length]], skip_special_tokens=True)


def test_what_cannot_be_exported_leaves_the_file_as_it_was(stored, tmp_path):
    dataset = stored(answer(1), answer(2, "How many legs?"), metadata={"tokenizer_fingerprint": "another"})
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    for arguments, message in (
        (("json",), r"unknown format 'json' \(did you mean 'jsonl'\?\); known: jsonl, prompt-completion, messages"),
        (("messages",), "needs the tokenizer; add --tokenizer CHECKPOINT"),
        (("messages", TOKENIZER), "made with another tokenizer"),
        (("jsonl", None, True), "none of the 2 trajectories was found correct"),
    ):
        with pytest.raises(T3DError, match=message):
            export_trajectories(dataset, out, *arguments)
    dataset.metadata.clear()
    with pytest.raises(T3DError, match=r"trajectory 'p2' is no user's message.*--format prompt-completion"):
        export_trajectories(dataset, out, "messages", TOKENIZER)
    with pytest.raises(T3DError, match=r"cannot write .*in\.jsonl: File exists"):
        export_trajectories(dataset, out / "in.jsonl", "jsonl")
    assert out.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"rollout", "out.jsonl"}
