"""Checkpoints as they are published, from rollout to export: SDAR-4B-Chat's own tokenizer and config.json with small
random weights in its layout, and the small models of other families, whose files are laid out as the published ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from t3d.models import load_model, stop_ids
from t3d.trajectories import TrajectoryDataset
from tests.models.helpers import logits

SMALL_ONES = Path(__file__).parents[1] / "models" / "published"
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SMALL |= {"intermediate_size": 32, "max_window_layers": 2}
EXPERTS = {
    "model_type": "sdar_moe",
    "architectures": ["SDARMoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
EXPERTS |= {"moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
FAMILIES = {"sdar": ({}, Qwen3Config, Qwen3ForCausalLM), "sdar_moe": (EXPERTS, Qwen3MoeConfig, Qwen3MoeForCausalLM)}


def published(source, folder, family):
    """Weights by transformers' own Qwen3 classes, in shards; the rest as the hub has it, without tokenizer.json."""
    more, config, model = FAMILIES[family]
    values = json.loads((source / "config.json").read_text()) | SMALL | more
    names = {"model_type", "architectures", "auto_map", "attn_implementation", "torch_dtype", "transformers_version"}
    torch.manual_seed(0)
    made = model(config(**{k: v for k, v in values.items() if k not in names})).to(torch.bfloat16)
    made.save_pretrained(folder, max_shard_size="5MB")
    for name in ("generation_config.json", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)
        (folder / name).chmod(0o644)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(("family", "rank"), [("sdar", 2), ("sdar_moe", 0)], ids=["sdar-lora", "sdar_moe-full"])
def test_load_rollout_train_save_reload(t3d, shared_data, write_recipe, family, rank):
    if rank:
        pytest.importorskip("peft", reason="needs t3d[lora]")
    published(shared_data / "sdar-4b-chat", t3d.folder / "chat", family)
    assert len(list((t3d.folder / "chat").glob("model-*.safetensors"))) > 1
    teacher, tokenizer = load_model(t3d.folder / "chat", device="cpu")
    assert stop_ids(teacher) == (151645, 151643)
    assert (teacher.config.mask_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id) == (151669, 151669, 151643)
    assert (teacher.dtype, teacher.config._attn_implementation) == (torch.bfloat16, "sdpa")
    task = {"name": "gsm8k", "path": str(shared_data / "gsm8k" / "train.jsonl.gz"), "num_train": 8, "num_eval": 2}
    task["eval_path"] = str(shared_data / "gsm8k" / "test.jsonl")
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 2, "bf16": True, "round_interval": 1}
    if rank:
        training["lora_rank"] = rank
    recipe = write_recipe(
        t3d.folder,
        model={"path": "chat"},
        task=task,
        rollout={"max_tokens": 4},
        train=training,
        eval={"grid": [{"steps": 1}], "max_tokens": 4},
    )
    done = t3d("run", recipe)
    assert done.code == 0, done.stderr
    run = t3d.folder / "runs" / "recipe"
    found = list(TrajectoryDataset(run / "rollout"))
    assert len(found) == 8
    start = tokenizer.decode(found[0].prompt_ids)
    assert start.startswith("<|im_start|>user\n")
    assert start.endswith("<|im_end|>\n<|im_start|>assistant\n")
    student, same = load_model(run / "student", device="cpu")
    assert student.dtype == torch.bfloat16
    assert stop_ids(student) == (151645, 151643)
    assert same.get_vocab() == tokenizer.get_vocab()
    moved = [n for n, w in student.state_dict().items() if not torch.equal(w, teacher.state_dict()[n])]
    assert len(moved) >= (4 * 2 if rank else len(student.state_dict()) / 2)  # at least the projections of attention
    for name in ("vocab.json", "merges.txt", "chat_template.jinja"):
        assert (run / "student" / name).read_bytes() == (t3d.folder / "chat" / name).read_bytes()
    config = json.loads((run / "student" / "config.json").read_text())
    assert (config["model_type"], config["rope_theta"]) == (family, 1000000)
    assert "auto_map" not in config  # its code is not in the folder
    done = t3d("export", "runs/recipe/student", "out", "--max-shard-size", "5MB", "--for", "lmdeploy")
    assert done.code == 0, done.stderr
    assert "logits differ by at most 0," in done.stdout
    if rank:  # the adapter alone, merged by export, is the student too
        adapter = "runs/recipe/train/adapter"
        done = t3d("export", adapter, "merged", "--merge-lora", "--dtype", "bfloat16")
        assert done.code == 0, done.stderr
        again, _ = load_model(t3d.folder / "merged", device="cpu")
        torch.testing.assert_close(logits(again), logits(student), atol=0.05, rtol=0.05)
    again, _ = load_model(t3d.folder / "out", device="cpu")
    assert torch.equal(logits(again), logits(student))


@pytest.mark.parametrize(
    "folder", [path for path in sorted(SMALL_ONES.iterdir()) if path.is_dir()], ids=lambda p: p.name
)
def test_every_family_from_rollout_to_export(t3d, write_recipe, folder):
    teacher, tokenizer = load_model(folder, device="cpu")
    full = teacher.config.attention == "full"
    rows = [{"question": f"w{i} w{i + 1}", "answer": str(i)} for i in range(6)]
    rows[0]["question"] += tokenizer.convert_ids_to_tokens(teacher.config.mask_token_id)  # in no config.json of some
    (t3d.folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"name": "prompts", "path": "asked.jsonl", "eval_path": "asked.jsonl", "template": "{question}"}
    objective = "mean_field" if full else "t3d"
    recipe = write_recipe(
        t3d.folder,
        model={"path": str(folder)},
        task=asked | {"num_train": 4, "num_eval": 2, "bad_prompts": "drop"},
        rollout={"max_tokens": 40},
        train={"objective": objective, "max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 2},
        eval={"grid": [{"steps": 4}], "max_tokens": 12, "oracle": not full},
    )
    done = t3d("run", recipe)
    assert done.code == 0, done.stderr
    assert "training: 1 of 4 prompts dropped" in done.stderr
    run = t3d.folder / "runs" / "recipe"
    assert {len(t.response_ids) for t in TrajectoryDataset(run / "rollout")} <= {32, 40, *range(57, 65)}
    assert [row["steps"] for row in json.loads((run / "summary.json").read_text())["rows"]] == [4, 4]
    student, _ = load_model(run / "student", device="cpu")
    weights = dict(student.named_parameters())
    assert any(not torch.equal(w, weights[n]) for n, w in teacher.named_parameters())
    for name, buffer in teacher.named_buffers():  # the router's bias is one, and is saved
        assert torch.equal(buffer, dict(student.named_buffers())[name])
    assert (student.config.mask_token_id, stop_ids(student)) == (teacher.config.mask_token_id, stop_ids(teacher))
    done = t3d("export", "runs/recipe/student", "out")
    assert "logits differ by at most 0," in done.stdout, done.stderr
    if folder.name not in ("a2d_bd3lm", "llada"):  # the other commands ask what these two differ in
        return
    answers = [t3d("generate", name, "w1 w2", "--max-tokens", "20") for name in ("out", "runs/recipe/student")]
    assert answers[0].stdout == answers[1].stdout
    assert "tokens per forward" in answers[0].stderr
    done = t3d("export", "out", "for-sglang", "--for", "sglang")
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert "sglang cannot serve it: it knows sdar and sdar_moe" in done.stderr
    for command in (["plan", recipe], ["show", "runs/recipe/rollout"]):
        done = t3d(*command)
        assert (done.code, done.stderr) == (0, "")
    done = t3d("calibrate", recipe, "--strategy", "low_confidence_dynamic", "--tpf", "1", "--split", "train")
    assert done.code == 0, done.stderr
    if full:
        done = t3d("eval", recipe, "eval.oracle=true")
        assert (done.code, done.stderr.count("\n")) == (2, 1)
        assert "eval.oracle needs blocks that see only earlier ones" in done.stderr
