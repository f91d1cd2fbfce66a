"""Rollouts of the authors' release: what the engine decodes, written as their sampler writes it, comes back."""

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.embedded import EMBEDDED
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.models import load_model
from t3d.tasks import TaskConfig, get_task
from t3d.tasks.word_problems import build_tokenizer
from t3d.trajectories import TrajectoryDataset, validate
from t3d.trajectories.upstream import import_rollouts

TOKENIZER = build_tokenizer()
STOPS = (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)


@cache
def decoded(steps=2):
    """(question, prompt, trajectory) of questions to the embedded teacher, some answers cut at the token limit."""
    model, tokenizer = load_model(EMBEDDED, device="cpu")
    questions = [problem.question for problem in get_task(TaskConfig(name="word_problems")).problems("test", 16)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    config = DecodingConfig(steps=steps, stop_ids=STOPS, max_tokens=40, temperature=1.0)
    return list(zip(questions, prompts, Engine(model, tokenizer).generate(prompts, config), strict=True))


def record(question, prompt, trajectory) -> dict:
    """As sdar_sample.py keeps it: text with special tokens, the global step of every token that was kept, from 1."""
    t, tail, step, map_ = trajectory, len(trajectory.prompt_ids) % trajectory.block_size, 0, []
    at = -tail
    while at < len(t.response_ids):
        block = t.step_map[max(at, 0) : at + t.block_size]
        map_ += [step + 1 + s for s in block]
        step += max(block) + 1
        at += t.block_size
    kept = t.response_ids[: t.length]
    return {
        "question": question,
        "ground_truth_answer": "7",
        "prompt": prompt,
        "full_output": [TOKENIZER.decode(kept)],
        "step_map": [map_[: t.length]],
        "extracted_output": ["7"],
        "response_length": [t.length],
        "correctness": [True],
    }


def lines_up(trajectory) -> bool:
    """Whether the text is tokenised as it was decoded: only then can anybody import it."""
    kept = trajectory.response_ids[: trajectory.length]
    return TOKENIZER(TOKENIZER.decode(kept), add_special_tokens=False)["input_ids"] == kept


@pytest.mark.parametrize("form", ["array", "lines", "renamed", "unwrapped", "question"])
def test_what_lines_up_comes_back(tmp_path, form):
    found = [one for one in decoded() if lines_up(one[2])]
    assert len(found) > 5
    records = [record(*one) for one in found]
    for r in records:
        if form == "renamed":
            r["answer"] = r.pop("full_output")
        if form == "unwrapped":
            r["full_output"], r["step_map"] = r["full_output"][0], r["step_map"][0]
        if form == "question":
            del r["prompt"]
    text = "\n".join(map(json.dumps, records)) if form == "lines" else json.dumps(records)
    (tmp_path / "r.json").write_text(text)
    done = import_rollouts(tmp_path / "r.json", tmp_path / "out", TOKENIZER, STOPS, template="{question}")
    assert (done.kept, done.dropped.total()) == (len(found), 0)
    for ours, (question, _, t) in zip(TrajectoryDataset(tmp_path / "out"), found, strict=True):
        assert (ours.prompt_ids, ours.length, ours.finish_reason) == (t.prompt_ids, t.length, t.finish_reason)
        n = t.length
        assert ours.response_ids[:n] == t.response_ids[:n]
        assert ours.step_map[:n] == t.step_map[:n] or n < len(t.response_ids)
        whole = (n // 4 - 1) * 4
        assert ours.step_map[: max(whole, 0)] == t.step_map[: max(whole, 0)]
        assert len(ours.response_ids) == len(t.response_ids)
        assert (ours.question, ours.answer, ours.correct) == (question, "7", True)
        assert all(step == max(ours.step_map[n - 1 :]) for step in ours.step_map[n:])  # what was not kept stays masked


def change(**values):
    return lambda r: r | values


DAMAGE = {
    "another number of tokens": lambda r: r | {"full_output": [r["full_output"][0] + " apples apples"]},
    "never unmasked": lambda r: r | {"step_map": [[0, *r["step_map"][0][1:]]]},
    "do not follow blocks": lambda r: r | {"step_map": [r["step_map"][0][::-1]]},
    "more steps in a block": lambda r: r | {"step_map": [[*r["step_map"][0][:-1], r["step_map"][0][-1] + 9]]},
    "not made of integers": lambda r: r | {"step_map": [["1", *r["step_map"][0][1:]]]},
    "without step_map": change(step_map=[""]),
    "without full_output": change(full_output=None),
    "without text": change(full_output=[7]),
    "without prompt and question": change(prompt=None, question=" "),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_what_does_not_line_up_is_dropped_and_said(tmp_path, reason):
    found = [one for one in decoded() if lines_up(one[2]) and one[2].length > 8]
    found = [one for one in found if (len(one[2].prompt_ids) + one[2].length) % 4 != 1]  # the last block has several
    good, bad = record(*found[0]), DAMAGE[reason](record(*found[1]))
    (tmp_path / "r.json").write_text(json.dumps([good, bad]))
    done = import_rollouts(tmp_path / "r.json", tmp_path / "out", TOKENIZER, STOPS)
    assert done.kept == done.dropped.total() == 1
    assert reason in next(iter(done.dropped))
    (tmp_path / "bad.json").write_text(json.dumps([bad]))
    with pytest.raises(T3DError, match=reason):
        import_rollouts(tmp_path / "bad.json", tmp_path / "none", TOKENIZER, STOPS)
    assert not (tmp_path / "none").exists()


def test_the_wrong_block_size_or_prompt_is_noticed(tmp_path):
    """Blocks are counted from the prompt's first token: steps follow them only if prompt and block size are right."""
    records = [record(*one) for one in decoded(steps=4) if lines_up(one[2]) and one[2].length > 12]
    (tmp_path / "r.json").write_text(json.dumps(records))
    with pytest.raises(T3DError, match="steps"):
        import_rollouts(tmp_path / "r.json", tmp_path / "out", TOKENIZER, STOPS, block_size=3)
    (tmp_path / "r.json").write_text(json.dumps([r | {"prompt": r["prompt"] + "\n"} for r in records]))
    with pytest.raises(T3DError, match="steps"):
        import_rollouts(tmp_path / "r.json", tmp_path / "out", TOKENIZER, STOPS)


def test_several_responses_and_their_verdicts(tmp_path):
    one, two = [record(*found) for found in decoded() if lines_up(found[2])][:2]
    both = one | {key: one[key] + two[key] for key in ("full_output", "step_map")}
    both |= {"prompt": two["prompt"], "correctness": [[True, False], [True, True]]}
    both["full_output"][0], both["step_map"][0] = two["full_output"][0], two["step_map"][0]
    (tmp_path / "r.json").write_text(json.dumps([both]))
    import_rollouts(tmp_path / "r.json", tmp_path / "out", TOKENIZER, STOPS)
    assert [(t.sample, t.correct) for t in TrajectoryDataset(tmp_path / "out")] == [(0, False), (1, True)]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"question": "a"', "\x00\xff"])
def test_a_file_of_no_records(tmp_path, text):
    (tmp_path / "r.json").write_text(text, encoding="latin-1")
    with pytest.raises(T3DError) as error:
        import_rollouts(tmp_path / "r.json", tmp_path / "out", TOKENIZER, STOPS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), block_size=st.integers(1, 8), prompt=st.integers(1, 10), length=st.integers(1, 20))
def test_any_step_map_comes_back(tmp_path_factory, data, block_size, prompt, length):
    """Digits are tokens of their own, so that any number of tokens can be written as text."""
    tail, at, steps, global_steps, clock = prompt % block_size, 0, [], [], 0
    while at < length:
        size = min(block_size - (tail if at == 0 else 0), length - at)
        block = data.draw(st.lists(st.integers(0, block_size - 1), min_size=size, max_size=size))
        block = [step - min(block) for step in block]
        steps += block
        global_steps += [clock + 1 + step for step in block]
        clock += max(block) + 1
        at += size
    folder = tmp_path_factory.mktemp("any")
    row = {"question": "?", "prompt": "1" * prompt, "full_output": ["7" * length], "step_map": [global_steps]}
    (folder / "r.json").write_text(json.dumps([row]))
    assert import_rollouts(folder / "r.json", folder / "out", TOKENIZER, STOPS, block_size).kept == 1
    (t,) = TrajectoryDataset(folder / "out")
    assert (len(t.prompt_ids), t.length, t.step_map[:length]) == (prompt, length, steps)
    assert (t.finish_reason, t.nfe.denoise) == ("length", clock)
    assert validate(t) is t
