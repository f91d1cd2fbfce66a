"""The user's own data through the commands."""

import json

from t3d.trajectories import TrajectoryDataset


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_a_rollout_on_chats(t3d, write_recipe):
    turns = chat("How many apples had Mia?", "4", "How many pears?", "Mia had 4 pears: \\boxed{4}")
    records = [{"messages": [{"role": "system", "content": "How many?"}, *turns]}, {"messages": turns[2:]}]
    records += [{"prompt": turns[:1], "completion": turns[1:2]}, {"prompt": "How many plums?", "answer": 3}]
    (t3d.folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {"name": "prompts", "path": "chats.jsonl", "num_train": None, "num_eval": None}
    done = t3d("rollout", write_recipe(t3d.folder, task=task))
    assert done.code == 0, done.stderr
    found = list(TrajectoryDataset(t3d.folder / "runs" / "recipe" / "rollout"))
    assert [(t.question, t.answer, t.correct) for t in found] == [
        ("System: How many?\n\nUser: How many apples had Mia?\n\nAssistant: 4\n\nUser: How many pears?", "4", False),
        ("How many pears?", "4", False),
        ("How many apples had Mia?", None, None),
        ("How many plums?", "3", False),
    ]
    done = t3d("train", write_recipe(t3d.folder, task=task, train={"objective": "sft"}, run_dir="sft"))
    assert done.code == 2
    assert not (t3d.folder / "sft").exists()
    assert done.stderr.splitlines()[-1].endswith("has no ground-truth responses for chats:4; train on rollouts")


def test_trajectories_for_trl(finished, t3d, tiny):
    run, _ = finished
    known = list(TrajectoryDataset(run / "rollout"))
    for source, extra in ((run, []), (run / "rollout", ["--format", "messages"])):
        done = t3d("export-trajectories", str(source), "out.jsonl", *extra)
        assert (done.code, done.stdout) == (0, f"out.jsonl: {len(known)} trajectories\n"), done.stderr
        rows = [json.loads(line) for line in (t3d.folder / "out.jsonl").read_text().splitlines()]
        if extra:
            assert [row["messages"] for row in rows] == [chat(t.question, t.text) for t in known]
        else:
            assert [(row["response_ids"], row["step_map"]) for row in rows] == [
                (t.response_ids, t.step_map) for t in known
            ]
    answers = next((run / "eval" / "student").iterdir())
    with_tokenizer = ("--tokenizer", str(tiny))
    done = t3d("export-trajectories", str(answers), "out.jsonl", "--format", "prompt-completion", *with_tokenizer)
    assert done.code == 0, done.stderr
    for arguments, said in (
        (("export-trajectories", str(answers), "out.jsonl", "--format", "messages"), "add --tokenizer CHECKPOINT"),
        (("export-trajectories", "nowhere", "out.jsonl"), "no trajectories in nowhere"),
        (("export", str(run / "rollout"), "out"), "holds trajectories; `t3d export-trajectories` writes them"),
    ):
        done = t3d(*arguments)
        assert done.code == 2
        assert said in done.stderr
