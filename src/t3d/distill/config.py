"""Settings of a distillation run: transformers' `TrainingArguments` plus the method's own."""

from dataclasses import dataclass, field, fields, make_dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from t3d.components import check_name, check_value, load_all, merged, owners
from t3d.distill import objectives
from t3d.distill.objective import OBJECTIVES, Objective
from t3d.errors import T3DError

load_all(objectives.__name__, "t3d.objectives")

SPLITS = ("dev", "train", "test")


def _help(text: str, default):
    return field(default=default, metadata={"help": text})


@dataclass
class General(TrainingArguments):
    """What every objective takes."""

    objective: str = _help("what the student learns from, and how: docs/method.md", "t3d")
    rollout_rounds: int = _help(
        "1: learn from the teacher's rollouts; K: the student makes new rollouts after each K-th of the steps", 1
    )
    verified_only: bool = _help("learn only from trajectories that the task's verifier found correct", False)
    easy_share: float = _help(
        "keep this share of the prompts that were never answered wrongly, so that the others count more; 1: all", 1.0
    )
    max_length: int = _help("drop trajectories with more prompt plus response tokens than this; 0: keep all", 0)
    recompute: str = _help(
        "what is computed again in the backward pass: 'cheap' (all but products and attention), 'nothing', or 'auto', "
        "'cheap' on a CPU, else 'nothing'; gradient_checkpointing=true computes everything again",
        "auto",
    )
    pack_length: int = _help(
        "pack several trajectories into rows of this many tokens; 0: a micro-batch into one row where attention costs "
        "only what is seen (block_sdpa, flex_attention), else into rows as long as its longest trajectory",
        0,
    )
    drop_truncated: bool = _help("drop trajectories that did not stop by themselves", False)
    attention: str = _help(
        "'flex_attention' (its backward pass needs a GPU), 'block_sdpa' (needs a CPU), 'sdpa' or 'eager'; 'auto': the "
        "first on a GPU, the second on a CPU",
        "auto",
    )
    lora_rank: int = _help("train adapters of this rank (LoRA, needs t3d[lora]); 0: all weights", 0)
    lora_alpha: float = _help("the adapters' output is scaled by this / rank; 0: twice the rank", 0.0)
    lora_dropout: float = _help("dropout before the adapters", 0.0)
    lora_targets: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "names of the layers with adapters, e.g. [q_proj, v_proj]; 'all-linear': all but the head"},
    )
    lora_4bit: bool = _help("hold the frozen weights in 4 bits (QLoRA, needs t3d[qlora] and a GPU)", False)
    eval_every: int = _help("decode held-out problems every this many optimizer steps; 0: never", 0)
    eval_problems: int = _help("number of these problems", 64)
    eval_split: str = _help("split of these problems: dev, train or test; `t3d eval` measures test", "dev")
    eval_block_steps: list[int] = field(
        default_factory=lambda: [2, 1], metadata={"help": "denoising steps per block of these evaluations"}
    )
    keep_best: bool = _help("with eval_every: the student is the most accurate checkpoint, not the last", True)

    # TrainingArguments' own, with other defaults
    learning_rate: float = _help("peak learning rate", 1e-5)
    lr_scheduler_type: str = _help("learning-rate schedule", "cosine_with_min_lr")
    lr_scheduler_kwargs: dict | str | None = _help("arguments of the schedule; default for a cosine: to 10%", None)
    optim: str = _help(
        "optimizer: any of transformers', or 'muon' (matrices by Muon, the rest by AdamW)", "adamw_torch"
    )
    logging_steps: float = _help("log every this many optimizer steps", 10)
    save_steps: float = _help("save a checkpoint every this many optimizer steps", 100)
    save_total_limit: int | None = _help("checkpoints to keep", 2)
    remove_unused_columns: bool = _help("kept off: a batch is made of trajectories, not of columns", False)
    ddp_find_unused_parameters: bool | None = _help("kept off: every weight has a gradient", False)

    def __post_init__(self):
        def check(ok: bool, message: str):
            if not ok:
                raise T3DError(f"train.{message}")

        check_name("train.objective", self.objective, OBJECTIVES)
        for name, f in OWNED.items():
            for value in every(getattr(self, name)):
                check_value(f"train.{name}", value, f.metadata)
        try:
            method = self.method
        except T3DError as error:
            raise T3DError(f"train.{error}") from error
        rounds = method.round_interval
        check(not self.reference_ema or rounds, "reference_ema needs rounds: set round_interval, e.g. to 1")
        check(
            not self.reference_cache or (method.lasting_reference and not rounds and not method.draft_share),
            "reference_cache needs a reference that stays as it is and is asked of the trajectories alone: objective "
            "t3d or ddo, round_interval=0 and draft_share=0",
        )
        check(0 <= self.easy_share <= 1, f"easy_share must lie in 0..1, got {self.easy_share}")
        kinds = ("auto", "cheap", "nothing")
        check(self.recompute in kinds, f"recompute is one of {', '.join(kinds)}, got {self.recompute!r}")
        check(self.rollout_rounds >= 1, f"rollout_rounds must be at least 1, got {self.rollout_rounds}")
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "eval_every"):
            check(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        check(self.lora_dropout < 1, f"lora_dropout must be below 1, got {self.lora_dropout}")
        check(
            self.lora_rank or not self.lora_4bit, "lora_4bit needs lora_rank: the 4-bit weights themselves are frozen"
        )
        check(
            not (self.lora_rank and method.needs_critic),
            f"lora_rank: {self.objective} trains a whole copy beside the student; leave it out, or set fake_updates=0",
        )
        kinds = ("auto", "flex_attention", "block_sdpa", "sdpa", "eager")
        check(self.attention in kinds, f"attention is one of {', '.join(kinds)}, got {self.attention!r}")
        check(self.lora_targets, "lora_targets must not be empty")
        check(self.eval_problems >= 1, f"eval_problems must be at least 1, got {self.eval_problems}")
        check(self.eval_split in SPLITS, f"eval_split is one of {', '.join(SPLITS)}, got {self.eval_split!r}")
        check(
            self.eval_block_steps and min(self.eval_block_steps) >= 1,
            f"eval_block_steps are numbers of at least 1, got {self.eval_block_steps}",
        )
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        self.use_muon = self.optim == "muon"
        if self.use_muon:
            self.optim = "adamw_torch"  # what transformers checks; T3DTrainer.create_optimizer builds Muon
        given = (self.torch_compile_backend, self.torch_compile_mode)
        self.compile_layers = bool(self.torch_compile or any(given))
        self.compile_options = dict(zip(("backend", "mode"), (given[0] or "inductor", given[1]), strict=True))
        # T3DTrainer compiles the layers; Trainer would compile the whole forward, which is another in every step
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        if self.eval_every:
            self.metric_for_best_model, self.greater_is_better = "accuracy", True
        super().__post_init__()

    @property
    def method(self) -> Objective:
        """The objective with its own settings. Raises T3DError if they do not go together."""
        owner = OBJECTIVES[self.objective]
        given = {f.name: getattr(self, f.name) for f in fields(owner)}
        return owner(**{name: value for name, value in given.items() if value is not None})

    @classmethod
    def owners(cls, name: str) -> list[str]:
        """The objectives whose setting `name` is; empty for one that all take."""
        found = owners(OBJECTIVES.values(), name)
        return found if len(found) < len(OBJECTIVES) else []


def every(value) -> tuple:
    """The values that a setting's bounds are for."""
    return tuple(value) if isinstance(value, tuple | list) else () if value is None else (value,)


def defaults(name: str) -> dict[str, object]:
    """Each objective's default of a setting, for those that have it."""
    return {o.name: f.default for o in OBJECTIVES.values() for f in fields(o) if f.name == name}


def _field(name: str, f: Any) -> tuple[str, Any, Any]:
    """The field of `T3DConfig` for an objective's setting; None is the objective's own default, where they differ."""
    own = defaults(name)
    if len(set(own.values())) == 1:
        return name, f.type, field(default=f.default, metadata=f.metadata)
    by_value = groupby(sorted((str(value), name) for name, value in own.items()), key=lambda pair: pair[0])
    told = "; ".join(f"{value} for {', '.join(name for _, name in group)}" for value, group in by_value)
    about = f.metadata | {"help": f"{f.metadata['help']}; default: {told}"}
    return name, f.type | None, field(default=None, metadata=about)


OWNED = merged(OBJECTIVES.values(), defaults_may_differ=True)  # the settings that objectives bring along

if TYPE_CHECKING:  # which cannot know what objectives bring along

    class T3DConfig(General):
        def __init__(self, output_dir: str | None = None, **settings: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    T3DConfig = make_dataclass(
        "T3DConfig",
        [_field(name, f) for name, f in OWNED.items()],
        bases=(General,),
        namespace={
            "__doc__": "How to distil: `TrainingArguments`, what every objective takes, and the settings of each. The "
            "defaults are the paper's (arXiv 2602.12262): full fine-tuning at 1e-5, cosine to 10%.",
            "__module__": __name__,
        },
    )
