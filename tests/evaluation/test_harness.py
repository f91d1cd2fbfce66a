import json
import os
import subprocess
import sys

import pytest
import torch

from t3d import DecodingConfig, Engine, T3DError
from t3d.models import save_model
from t3d.tasks.word_problems import build_tokenizer, problem
from tests.conftest import make_model

pytest.importorskip("lm_eval", reason="needs t3d[lm-eval]")

TASK = """
task: local_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tokenizer = build_tokenizer()
    folder = tmp_path_factory.mktemp("harness") / "model"
    save_model(make_model(vocab_size=len(tokenizer) + 1, eos_token_id=tokenizer.eos_token_id), folder, tokenizer)
    return folder


@pytest.fixture
def tasks(tmp_path):
    problems = [problem(0, "test", i) for i in range(5)]
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems))
    (tmp_path / "local_words.yaml").write_text(TASK.format(data=data))
    return tmp_path


def test_a_local_task_gets_the_engines_answers(checkpoint, tasks, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    import t3d.evaluation.harness as harness

    results = lm_eval.simple_evaluate(
        model="t3d",
        model_args={"pretrained": str(checkpoint), "steps": 2, "device": "cpu"},
        tasks=["local_words"],
        task_manager=TaskManager(include_path=str(tasks)),
        log_samples=True,
        bootstrap_iters=0,
    )
    model = harness.T3DHarness(str(checkpoint), device="cpu")
    config = DecodingConfig(steps=2, max_tokens=12)
    samples = results["samples"]["local_words"]
    assert len(samples) == 5
    for sample in samples:
        plain = Engine(model.model, model.tokenizer).generate([sample["arguments"][0][0]], config)[0]
        assert sample["resps"][0][0] == plain.text.split(".")[0]
    assert "exact_match,none" in results["results"]["local_words"]


def test_arguments_and_requests(checkpoint):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from t3d.evaluation.harness import T3DHarness

    assert get_model("t3d") is T3DHarness
    assert get_model("dummy")  # the harness's own are still there
    model = T3DHarness.create_from_arg_string(
        f"pretrained={checkpoint},strategy=low_confidence_dynamic,threshold=0.5", {"batch_size": 2, "device": "cpu"}
    )
    assert model.engine.max_batch_size == 2
    if not torch.cuda.is_available():  # what the harness's command line says where nothing was asked
        assert T3DHarness(str(checkpoint), device="cuda:0").model.device.type == "cpu"
    assert model.decoding.threshold == 0.5
    greedy = model._config({"until": ["x"], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0})
    assert (greedy.max_tokens, greedy.stop, greedy.temperature) == (7, ("x",), 0)
    sampled = model._config({"until": [], "max_gen_toks": 7, "do_sample": True, "temperature": 0.8, "top_k": 5})
    assert (sampled.temperature, sampled.top_k, sampled.threshold) == (0.8, 5, 0.5)
    with pytest.raises(T3DError, match="did you mean 'strategy'"):
        T3DHarness(str(checkpoint), strategi="x")
    with pytest.raises(T3DError, match="output_type generate_until"):
        model.loglikelihood([Instance("loglikelihood", {}, ("a", "b"), 0)])
    chat = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert chat.endswith("assistant\n")
    assert model.chat_template(True) == model.tokenizer.chat_template
    assert model.chat_template(False) is None


def test_the_command_line(checkpoint, tasks):
    command = [sys.executable, "-m", "t3d.evaluation.harness", "--model", "t3d", "--tasks", "local_words"]
    command += ["--include_path", str(tasks), "--model_args", f"pretrained={checkpoint},steps=1"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tasks / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "local_words" in done.stdout
    assert "exact_match" in done.stdout


def test_without_the_library_it_is_one_line():
    script = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from t3d import T3DError\n"
        "try: import t3d.evaluation.harness\n"
        "except T3DError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("lm-evaluation-harness does not import (")
    assert done.stdout.endswith("): pip install 't3d[lm-eval]'\n")
