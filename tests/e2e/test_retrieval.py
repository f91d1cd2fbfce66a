import json
import re

import pytest

from t3d.trajectories import CONTEXT, TrajectoryDataset

pytest.importorskip("bm25s", reason="retrieval needs the extra t3d[retrieval]")


def test_a_run_with_documents_keeps_and_shows_what_it_retrieved(t3d, write_recipe):
    (t3d.folder / "notes.txt").write_text("Mia had 7 apples.")
    (t3d.folder / "q.jsonl").write_text('{"question": "How many did Mia find?", "answer": 7}\n{"question": "Tom?"}\n')
    recipe = write_recipe(t3d.folder)
    asking = ["task.name=prompts", "task.path=q.jsonl", "task.num_train=null", "task.num_eval=null"]
    asking += ["train.max_steps=1", "train.verified_only=false", "eval.grid=[{steps: 1}]", "run_dir=run"]
    refused = t3d("run", recipe, *asking, "task.retrieve=notes.txt")
    assert (refused.code, len(refused.stderr.splitlines())) == (2, 1)
    assert "task.template must contain {context}" in refused.stderr

    done = t3d("run", recipe, *asking, "task.retrieve=notes.txt", 'task.template="{context} {question}"')
    assert done.code == 0, done.stderr
    passage = {"source": "notes.txt", "text": "Mia had 7 apples."}
    for folder in ("run/rollout", "run/eval/student"):
        [answers] = {path.parent for path in (t3d.folder / folder).rglob("*.parquet")}
        kept = {t.question: t.extra.get(CONTEXT) for t in TrajectoryDataset(answers)}
        assert kept == {"How many did Mia find?": [passage], "Tom?": None}
    page = (t3d.folder / "run" / "report.html").read_text()
    assert "Mia had 7 apples." in page
    assert 'id="context"' in page
    shown = t3d("show", "run/rollout", "--number", "2").stdout
    assert re.search(r"retrieved, notes.txt: Mia had\s+7 apples\.", shown)
    changed = t3d("rollout", recipe, *asking, "task.template='{context} {question}'", "task.retrieve=q.jsonl")
    assert changed.code == 2
    assert "task.retrieve" in changed.stderr, json.dumps(changed.stderr)
