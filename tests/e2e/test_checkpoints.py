"""Checkpoints through the command line: converted, trained, exported, and what a student says of itself."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml

from t3d.config import load_recipe
from t3d.models import load_model
from t3d.models.recommended import recommend, recommended
from t3d.pipeline.card import describe_student
from t3d.pipeline.folder import RunFolder
from t3d.trajectories import TrajectoryDataset
from t3d.trajectories.fingerprint import model_fingerprint
from tests.conftest import make_model
from tests.e2e.test_bad_input import refused
from tests.models.test_convert import autoregressive


@pytest.mark.parametrize(
    ("kind", "options", "made"),
    [
        ("qwen3", (), "sdar, blocks of {}, mask"),
        ("llama", ("--shift",), "block_llama, blocks of {}, logits shifted, mask"),
    ],
    ids=["qwen3", "llama-shift"],
)
def test_from_autoregressive_to_block_diffusion_to_a_student(t3d, write_recipe, kind, options, made):
    autoregressive(t3d.folder / "ar", kind)
    done = t3d("convert", "ar", "bd", "--block-size", "4", *options)
    assert done.code == 0, done.stderr
    assert done.stdout.startswith(f"bd: {made.format(4)} token")
    recipe = write_recipe(t3d.folder, model={"path": "bd"}, train={"objective": "sft", "max_steps": 2})
    done = t3d("run", recipe)
    assert done.code == 0, done.stderr
    student, tokenizer = load_model(t3d.folder / "runs/recipe/student", device="cpu")
    assert student.config.mask_token_id == tokenizer.mask_token_id
    done = t3d("convert", "runs/recipe/student", "b8", "--block-size", "8")
    assert done.stdout.startswith(f"b8: {made.format(8)} token"), done
    refused(t3d("run", recipe, "model.path=ar", "--force"), "t3d convert")


def test_a_mixture_of_experts_goes_through_a_run(t3d, write_recipe, tiny):
    _, tokenizer = load_model(tiny, device="cpu")
    architecture = {
        "model_type": "sdar_moe", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "max_position_embeddings": 512, "block_size": 4,
    }  # fmt: skip
    model = {"path": str(tiny), "architecture": architecture}
    recipe = write_recipe(t3d.folder, model=model, train={"max_steps": 2}, eval={"grid": [{"steps": 2}]})
    done = t3d("run", recipe, "task.num_train=8", "task.num_eval=2")
    assert done.code == 0, done.stderr
    config = json.loads((t3d.folder / "runs/recipe/student/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("sdar_moe", ["SDARMoeForCausalLM"])
    assert (load_model(t3d.folder / "runs/recipe/student", device="cpu")[1].get_vocab()) == tokenizer.get_vocab()
    refused(t3d("run", recipe, "model.architecture.model_type=other", "--force"), "sdar_moe")


def test_a_student_says_how_it_was_made(tmp_path, finished):
    run, _ = finished
    text = (run / "student" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert {"block-diffusion", "sdar", "t3d"} <= set(front["tags"])
    rows = json.loads((run / "summary.json").read_text())["rows"]
    for row in rows:
        assert f"| {row['model']} | {row['steps']} step" in text
    for words in ("objective `t3d`", "40 trajectories", "8 optimizer steps", "learning_rate: 0.001", "torch 2"):
        assert words in text
    again = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(run.parent.parent / "recipe.yaml")
    assert json.loads((run / "student" / "generation_config.json").read_text())["eos_token_id"] == [1, 0]


def test_the_best_setting_is_recommended(tmp_path, finished):
    source = finished[0]
    run = shutil.copytree(source, tmp_path / "run")
    recipe = load_recipe(source.parent.parent / "recipe.yaml")
    before = model_fingerprint(load_model(run / "student", device="cpu")[0])
    summary = json.loads((run / "summary.json").read_text())

    def recommend_with(**accuracy) -> dict:
        for row in summary["rows"]:
            if row["model"] == "student":
                value = accuracy[f"steps{row['steps']}"]
                row["accuracy"], row["ci95"] = value, [max(value - 0.1, 0), min(value + 0.1, 1)]
        (run / "summary.json").write_text(json.dumps(summary))
        with RunFolder(run) as folder:
            describe_student(folder, recipe)
        return recommended(load_model(run / "student", device="cpu")[0])

    assert recommend_with(steps4=0.0, steps1=0.0) == {}
    assert recommend_with(steps4=0.8, steps1=0.75)["steps"] == 1  # not worse, and faster
    assert "recommends **1 step**" in (run / "student" / "README.md").read_text()
    best = recommend_with(steps4=0.8, steps1=0.65)
    assert best == {
        "block_size": 4, "steps": 4, "strategy": "low_confidence_static", "temperature": 0.0, "top_k": 0, "top_p": 1.0,
    }  # fmt: skip
    generation = json.loads((run / "student" / "generation_config.json").read_text())
    assert (generation["do_sample"], generation["eos_token_id"]) == (False, [1, 0])
    assert model_fingerprint(load_model(run / "student", device="cpu")[0]) == before


def test_generate_decodes_as_the_checkpoint_recommends(t3d, tiny):
    assert t3d("export", str(tiny), "m").code == 0
    ask = ("generate", "m", "How many apples?", "--max-tokens", "12")
    plain, one = t3d(*ask), t3d(*ask, "--steps", "1")
    recommend(t3d.folder / "m", {"steps": 1, "strategy": "low_confidence_static", "temperature": 0.0})
    assert t3d(*ask).stdout == one.stdout != plain.stdout
    assert t3d(*ask, "--steps", "4").stdout == plain.stdout


@pytest.mark.parametrize("engine", ["sglang", "lmdeploy"])
def test_export_for_another_engine(t3d, tmp_path, engine):
    from t3d.models import save_model
    from t3d.tasks.word_problems import build_tokenizer

    model = make_model(vocab_size=151936, hidden=8, heads=1, kv_heads=1, layers=1)
    model.config.mask_token_id = 151669
    save_model(model, tmp_path / "m", build_tokenizer())
    recommend(tmp_path / "m", {"steps": 4, "strategy": "low_confidence_dynamic", "threshold": 0.8})
    done = t3d("export", "m", "out", "--for", engine, "--dtype", "bfloat16")
    assert done.code == 0, done.stderr
    assert "bfloat16; loaded again, logits differ by at most" in done.stdout
    if engine == "sglang":
        assert yaml.safe_load((tmp_path / "out/sglang.yaml").read_text()) == {"threshold": 0.8, "block_size": 4}
        assert "--dllm-algorithm LowConfidence --dllm-algorithm-config out/sglang.yaml" in done.stdout
    else:
        options = json.loads((tmp_path / "out/lmdeploy.json").read_text())
        assert options == {
            "dllm_block_length": 4,
            "dllm_unmasking_strategy": "low_confidence_dynamic",
            "dllm_confidence_threshold": 0.8,
        }
        assert "--dllm-unmasking-strategy low_confidence_dynamic --dllm-confidence-threshold 0.8" in done.stdout
    # what these engines do to learn about a checkpoint whose type their transformers does not know
    code = (
        "from transformers import AutoConfig; c = AutoConfig.from_pretrained('out', trust_remote_code=True); "
        "print(c.model_type, c.block_size, c.mask_token_id, c.rope_parameters['rope_theta'], c.architectures[0])"
    )
    read = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path / "hf")},
    )
    assert read.stdout.split() == ["sdar", "4", "151669", "10000.0", "SDARForCausalLM"], read.stderr
    recommend(tmp_path / "m", {"steps": 2, "strategy": "low_confidence_static"})
    done = t3d("export", "m", "other", "--for", engine)
    if engine == "sglang":
        refused(done, "SGLang cannot decode with low_confidence_static in 2 of 4 steps")
        assert not (tmp_path / "other").exists()
    else:
        assert done.code == 0
        assert json.loads((tmp_path / "other/lmdeploy.json").read_text())["dllm_denoising_steps"] == 2


def test_what_cannot_be_exported(t3d, tiny):
    for arguments, said in (
        (("nowhere", "out"), "no such checkpoint folder"),
        ((str(tiny), "out", "--dtype", "int9"), "unknown dtype"),
        ((str(tiny), "out", "--for", "vllm"), "known: sglang, lmdeploy"),
        ((str(tiny), "out", "--for", "sglang"), "151669"),
        ((str(tiny), "out", "--merge-lora"), "not a LoRA adapter"),
        ((str(tiny), str(tiny)), "choose another folder"),
    ):
        refused(t3d("export", *arguments), said)
        assert not (t3d.folder / "out").exists()
    (t3d.folder / "adapter").mkdir()
    (t3d.folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    refused(t3d("export", "adapter", "out"), "add --merge-lora")


def test_import_and_train_on_it(t3d, tiny, write_recipe):
    from tests.trajectories.test_upstream import decoded, lines_up, record

    records = [record(*one) for one in decoded() if lines_up(one[2])]
    (t3d.folder / "rollouts.json").write_text(json.dumps([*records, records[0] | {"step_map": []}]))
    done = t3d("import", "rollouts.json", "out", "--tokenizer", str(tiny))
    assert done.code == 0, done.stderr
    assert f"out: {len(records)} trajectories, 1 responses dropped: 1 without step_map" in done.stdout
    assert t3d("show", "out", "--tokenizer", str(tiny)).code == 0
    recipe = write_recipe(t3d.folder, rollout={"source": "out"}, train={"max_steps": 2})
    done = t3d("train", recipe)
    assert done.code == 0, done.stderr
    done = t3d("rollout", recipe)
    assert (done.code, "rollout: complete, skipped" in done.stderr) == (0, True), done.stderr
    rolled = list(TrajectoryDataset(t3d.folder / "runs/recipe/rollout"))
    assert [t.response_ids for t in rolled] == [t.response_ids for t in TrajectoryDataset(t3d.folder / "out")]
    refused(t3d("rollout", recipe, "rollout.source=nowhere", "--force"), "nowhere")
    (t3d.folder / "broken.json").write_text("[{")
    refused(t3d("import", "broken.json", "none", "--tokenizer", str(tiny)), "broken.json")
    refused(t3d("import", "rollouts.json", "none", "--tokenizer", "nowhere"), "no such checkpoint folder")
