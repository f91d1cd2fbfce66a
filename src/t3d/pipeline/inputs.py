"""What the stages start from, each loaded when first asked for."""

from functools import cached_property

import torch
from transformers import GenerationConfig, PretrainedConfig

from t3d.config import Recipe
from t3d.decoding import DecodingConfig
from t3d.distill.objective import OBJECTIVES, ROLLOUTS
from t3d.embedded import checkpoint
from t3d.engine import Engine
from t3d.engine.intake import faults
from t3d.engine.ray_engine import find_ray
from t3d.errors import T3DError
from t3d.log import log
from t3d.models import FAMILIES, load_model, load_tokenizer
from t3d.models.files import first_line, local_folder
from t3d.models.load import cast, check_mask, mask_of, require_tokenizer
from t3d.tasks import Problem, Task, get_task
from t3d.tasks.base import DROP

NAMED = 5  # of the dropped prompts on the terminal; the log file names all


class Inputs:
    """The teacher, the task and its problems, as the recipe names them."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.dropped = {"training": 0, "evaluation": 0}  # problems left out by `task.bad_prompts=drop`

    @cached_property
    def teacher(self):
        """(model, tokenizer)"""
        return self.load()

    def load(self, dtype: str | None = None, device: str | None = None, quantisation=None, quantize: str | None = None):
        """(model, tokenizer) of the `model` section, its own `quantize` left out; `dtype` and `device` override it."""
        wanted = self.recipe.model
        dtype, device = dtype or wanted.dtype, device or wanted.device
        if wanted.architecture is not None:
            config = new_config(wanted.architecture, self.tokenizer)
            return new_model(config, self.recipe.seed, dtype, device), self.tokenizer
        path = checkpoint(wanted.path)
        model, tokenizer = load_model(path, dtype, device, quantisation=quantisation, quantize=quantize)
        require_tokenizer(tokenizer, path)
        return model, tokenizer

    @cached_property
    def tokenizer(self):
        """The tokenizer alone; that of the embedded task for an architecture without a `path`."""
        wanted = self.recipe.model
        if wanted.architecture is not None and wanted.path is None:
            from t3d.tasks.word_problems import build_tokenizer

            return build_tokenizer()
        path = checkpoint(wanted.path)
        tokenizer = load_tokenizer(path)
        require_tokenizer(tokenizer, path)
        return tokenizer

    @cached_property
    def config(self) -> PretrainedConfig:
        """The teacher's configuration, without its weights. Raises T3DError if no model can be made of it."""
        wanted = self.recipe.model
        if wanted.architecture is not None:
            return new_config(wanted.architecture, self.tokenizer)
        folder = local_folder(checkpoint(wanted.path))
        kind = PretrainedConfig.get_config_dict(str(folder))[0].get("model_type")
        if kind not in FAMILIES:
            raise T3DError(f"model type {kind!r} is not supported (supported: {', '.join(FAMILIES)})")
        try:
            config = FAMILIES[kind].config_class.from_pretrained(str(folder))
            config.check()
        except Exception as error:  # transformers checks the values in many ways
            raise T3DError(f"{folder}/config.json: cannot make a model from it: {first_line(error)}") from error
        if config.mask_token_id is None:
            config.mask_token_id = mask_of(self.tokenizer, config.mask_tokens)
        check_mask(config, wanted.path)
        return config

    @cached_property
    def saved_dtype(self) -> str:
        """Name of the dtype that the teacher's weights are stored in."""
        if self.recipe.model.architecture is not None:
            return "float32"
        settings, _ = PretrainedConfig.get_config_dict(str(checkpoint(self.recipe.model.path)))
        return settings.get("dtype") or settings.get("torch_dtype") or "float32"

    @cached_property
    def task(self) -> Task:
        return get_task(self.recipe.task)

    @cached_property
    def eval_task(self) -> Task:
        return get_task(self.recipe.task, evaluation=True)

    @cached_property
    def train_problems(self) -> list[Problem]:
        found = _some(self.task.problems("train", self.recipe.task.num_train), "training")
        if self.recipe.rollout.source is not None or OBJECTIVES[self.recipe.objective].source != ROLLOUTS:
            return found  # nothing is decoded
        decoding = self.task.guided(self.recipe.rollout.decoding(self.recipe.seed), self.tokenizer)
        return self.usable(found, self.task, [decoding], "training")

    @cached_property
    def train_prompts(self) -> list[list[int]]:
        return [self.task.prompt(problem, self.tokenizer) for problem in self.train_problems]

    @cached_property
    def eval_problems(self) -> list[Problem]:
        found = _some(self.eval_task.problems(self.recipe.eval.split, self.recipe.task.num_eval), "evaluation")
        settings = [self.eval_task.guided(c, self.tokenizer) for c in self.recipe.eval.settings(self.recipe.seed)]
        return self.usable(found, self.eval_task, settings, "evaluation")

    def usable(
        self,
        problems: list[Problem],
        task: Task,
        settings: list[DecodingConfig],
        what: str,
        config: PretrainedConfig | None = None,
    ) -> list[Problem]:
        """The problems; with `task.bad_prompts=drop` those whose prompts a model of this configuration (the teacher's)
        can decode at all of these settings. The log names the others, `dropped` counts them."""
        if self.recipe.task.bad_prompts != DROP:
            return problems
        names = [problem.id for problem in problems]
        prompts = [task.prompt(problem, self.tokenizer) for problem in problems]
        bad = faults(prompts, settings, names, config or self.config, self.tokenizer)
        if not bad:
            return problems
        if len(bad) == len(problems):
            raise T3DError(f"task.bad_prompts: no {what} prompt can be decoded; {bad[names[0]]}")
        self.dropped[what] = len(bad)
        some = ", ".join(map(repr, list(bad)[:NAMED])) + (f" and {len(bad) - NAMED:,} more" if len(bad) > NAMED else "")
        log.warning("%s: %d of %d prompts dropped, which cannot be decoded: %s", what, len(bad), len(problems), some)
        for fault in bad.values():
            log.debug("%s: dropped: %s", what, fault)
        return [problem for problem in problems if problem.id not in bad]

    def release(self) -> None:
        """Forget the teacher, so that its memory is free for training."""
        vars(self).pop("teacher", None)


def check_prompts(recipe: Recipe, model, tokenizer, prompts: list, names: list[str], settings: list) -> None:
    """Raises T3DError if the engine that the recipe asks for cannot decode these prompts at these settings."""
    if recipe.engine.workers:
        find_ray()
    engine = Engine(model, tokenizer, **recipe.engine.local)
    for config in settings:
        engine.stream(prompts, config, names=names)  # checks now; decodes when iterated


def _some(problems: list[Problem], what: str) -> list[Problem]:
    if not problems:
        raise T3DError(f"task: there are no {what} problems")
    if repeated := len(problems) - len({problem.id for problem in problems}):
        raise T3DError(f"task: {repeated} {what} problems share an id with another; ids must differ")
    return problems


def new_config(architecture: dict, tokenizer) -> PretrainedConfig:
    """The configuration of a model that starts from random weights.

    The architecture may name its family as `model_type`. What it leaves out about tokens (vocabulary size, mask, stop
    and padding ids) the tokenizer gives.
    """
    kind = architecture.get("model_type", "sdar")
    if kind not in FAMILIES:
        raise T3DError(f"model.architecture: model_type is one of {', '.join(FAMILIES)}")
    ids = {
        "vocab_size": len(tokenizer),
        "mask_token_id": mask_of(tokenizer, FAMILIES[kind].config_class.mask_tokens),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    values = ids | architecture
    values.pop("model_type", None)
    try:
        config = FAMILIES[kind].config_class(**values)
    except Exception as error:  # transformers checks the values in many ways
        raise T3DError(f"model.architecture: {' '.join(str(error).split())}") from error
    if config.mask_token_id is None:
        raise T3DError("model.architecture: mask_token_id is missing, and the tokenizer has no mask token")
    return config


def new_model(config: PretrainedConfig, seed: int, dtype: str | None, device: str | None):
    """A model with random weights drawn from `seed`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = FAMILIES[config.model_type](config)
    except Exception as error:  # some values fail only when layers are made of them
        raise T3DError(f"model.architecture: {' '.join(str(error).split())}") from error
    stops = [token for token in (config.eos_token_id, config.pad_token_id) if token is not None]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=config.pad_token_id)
    return cast(model, getattr(torch, dtype) if dtype else torch.float32).to(device).eval()
