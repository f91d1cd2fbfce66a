"""Which keys of a recipe the result of a stage depends on."""

from t3d.config import Recipe

# Keys that change neither the trajectories nor the student nor the rows: prefixes of dotted names.
NEUTRAL = (
    "run_dir",
    "engine.",
    "report.",
    "model.device",
    "task.allow_unsandboxed",
    "rollout.save_every",
    "train.logging_",
    "train.log_",
    "train.save_",
    "train.hub_",
    "train.push_to_hub",
    "train.report_to",
    "train.run_name",
    "train.disable_tqdm",
    "train.dataloader_num_workers",
    "train.dataloader_pin_memory",
    "train.dataloader_prefetch_factor",
    "train.dataloader_persistent_workers",
)
LATER = {  # sections and keys that only later stages read
    "rollout": ("train.", "eval.", "task.num_eval", "task.eval_"),
    "train": ("eval.", "task.num_eval", "task.eval_"),
    "eval": (),
}


def settings(recipe: Recipe, stage: str) -> dict:
    """The dotted keys of a recipe, with their values, on which the result of a stage depends."""
    ignored = NEUTRAL + LATER[stage]
    if recipe.train["objective"] == "sft":
        ignored += ("rollout.",)
    flat = {}
    for name, value in recipe.to_dict().items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return {key: value for key, value in flat.items() if not key.startswith(ignored)}
