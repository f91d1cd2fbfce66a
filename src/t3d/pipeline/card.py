"""What RUN/student says of itself: README.md from the run, and the decode settings that evaluation found best."""

import json
from pathlib import Path

import yaml

from t3d.config import SECTIONS, Recipe, keys
from t3d.disk import write_whole
from t3d.evaluation.results import markdown
from t3d.evaluation.rows import percent, setting
from t3d.evaluation.summary import read_summary
from t3d.models.files import read_json
from t3d.models.load import plain_config
from t3d.models.recommended import recommend
from t3d.models.serving import BASES
from t3d.pipeline.folder import RunFolder
from t3d.pipeline.sources import source
from t3d.pipeline.versions import versions


def describe_student(run: RunFolder, recipe: Recipe) -> None:
    """Write RUN/student/README.md, and what RUN/summary.json says is best into generation_config.json.

    The weights stay as they are, and so does what was computed with them.
    """
    folder, rows, best = run / "student", [], None
    if (run / "summary.json").exists():
        rows = read_summary(run / "summary.json")["rows"]
        best = best_row(rows)
    if best is not None:
        sampling = {"temperature": best["temperature"], "top_k": recipe.eval.top_k, "top_p": recipe.eval.top_p}
        decode = {"block_size": best["block_size"], "steps": best["steps"], "strategy": best["strategy"]}
        recommend(folder, decode | sampling | best["knobs"] | best["flight_settings"] | best["other"])
    write_whole(folder / "README.md", card(run, recipe, rows, best))


def best_row(rows: list[dict], model: str = "student") -> dict | None:
    """The fastest row of a model (tokens per forward) that is not worse than its most accurate one.

    Not worse: its accuracy is inside that one's 95% interval. None where nothing was found correct.
    """
    judged = [row for row in rows if row["model"] == model and row["accuracy"] is not None]
    top = max(judged, key=lambda row: (row["accuracy"], row["tpf"]), default=None)
    if top is None or not top["accuracy"]:
        return None
    floor = top["ci95"][0]
    return max((row for row in judged if row["accuracy"] >= floor), key=lambda row: (row["tpf"], row["accuracy"]))


def card(run: RunFolder, recipe: Recipe, rows: list[dict], best: dict | None) -> str:
    """The model card, Markdown with the front matter that hubs read."""
    config = read_json(run / "student" / "config.json")
    teacher = recipe.model.path or ("random weights" if recipe.model.architecture else "the embedded teacher of t3d")
    family = plain_config(run / "student")
    kind = f"block-diffusion language model, blocks of {family.window} tokens"
    if family.attention == "full":
        kind = "masked-diffusion language model of full attention"
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    front += [f"- {tag}" for tag in ("block-diffusion", config["model_type"], "t3d")]
    if recipe.model.path and not Path(recipe.model.path).exists():
        front.append(f"base_model: {recipe.model.path}")
    parts = [
        "\n".join([*front, "---"]),
        f"# {run.path.name}",
        f"A {kind} (`{config['architectures'][0]}`), "
        f"made of {teacher} with [T3D](https://arxiv.org/abs/2602.12262), objective `{recipe.objective}`.",
        "## How to decode",
        _decode(best, family),
        "## Results",
        _results(rows, recipe),
        "## Data",
        _data(run, recipe),
        "## Recipe",
        _training(run),
        f"```yaml\n{_yaml(recipe)}```",
        "## Versions",
        ", ".join(f"{name} {value}" for name, value in versions().items() if value is not None),
    ]
    return "\n\n".join(parts) + "\n"


def _decode(best: dict | None, family) -> str:
    command = '```\nt3d generate . "How many legs have three spiders?"\n```'
    if best is None and family.decoding:
        settings = ", ".join(f"{name} {value}" for name, value in family.decoding.items())
        return f"{command}\n\nThis decodes as models of type `{family.model_type}` are published: {settings}."
    if best is None:
        return f"{command}\n\nThis takes as many steps as a block has tokens; `--steps` takes fewer."
    text = (
        f"{command}\n\n`generation_config.json` (`block_diffusion`) recommends **{setting(best)}**, which this takes: "
        f"{percent(best['accuracy'])}% correct at {best['tpf']:.2f} tokens per forward. It is the fastest of the "
        "settings below that is not worse than the most accurate one, by that one's 95% interval."
    )
    if family.model_type not in BASES:
        return text
    other = "For SGLang and LMDeploy: `t3d export . OUT --for sglang` (or `lmdeploy`) writes what they need."
    return f"{text}\n\n{other}"


def _results(rows: list[dict], recipe: Recipe) -> str:
    if not rows:
        return "Not evaluated yet (`t3d eval`)."
    count = max(row["num_problems"] for row in rows)
    head = f"{count} problems of `{recipe.task.name}` ({recipe.eval.split}), at most {recipe.eval.max_tokens} tokens."
    return f"{head} TokPS: nominal tokens per step; TPF: tokens per forward.\n\n{markdown(rows).rstrip()}"


def _data(run: RunFolder, recipe: Recipe) -> str:
    data = recipe.task.path or recipe.task.dataset
    task = f"`{recipe.task.name}`" + (f" ({data})" if data else "")
    return source(recipe).describe(run / "rollout", recipe, task)


def _training(run: RunFolder) -> str:
    states = sorted((run / "train").glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    if not states:
        return "The recipe, as `t3d run` takes it:"
    state = json.loads(states[-1].read_text())
    return f"{state['global_step']:,} optimizer steps, {state['epoch']:.2f} epochs. The recipe, as `t3d run` takes it:"


def _yaml(recipe: Recipe) -> str:
    """The recipe without what is as by default."""
    found = {}
    for name, value in recipe.to_dict().items():
        if name in SECTIONS:
            value = {k: v for k, v in value.items() if v != keys(name)[k].default}
        if value not in ({}, None):
            found[name] = value
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=110)
