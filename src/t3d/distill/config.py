"""Settings of a distillation run: transformers' `TrainingArguments` plus the method's own."""

from dataclasses import dataclass, field, fields, make_dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from t3d.components import check_name, check_values, load_all, merged, owners, setting
from t3d.distill import objectives
from t3d.distill.objective import OBJECTIVES, Objective
from t3d.errors import T3DError

load_all(objectives.__name__, "t3d.objectives")

SPLITS = ("dev", "train", "test")


@dataclass
class General(TrainingArguments):
    """What every objective takes."""

    objective: str = setting("t3d", "what the student learns from, and how: docs/method.md")
    rollout_rounds: int = setting(
        1, "1: learn from the teacher's rollouts; K: the student makes new rollouts after each K-th of the steps", low=1
    )
    verified_only: bool = setting(False, "learn only from trajectories that the task's verifier found correct")
    easy_share: float = setting(
        1.0,
        "keep this share of the prompts that were never answered wrongly, so that the others count more; 1: all",
        low=0,
        high=1,
    )
    max_length: int = setting(0, "drop trajectories with more prompt plus response tokens than this; 0: keep all")
    recompute: str = setting(
        "auto",
        "what is computed again in the backward pass: 'cheap' (all but products and attention), 'nothing', or 'auto', "
        "'cheap' on a CPU, else 'nothing'; gradient_checkpointing=true computes everything again",
        choices=("auto", "cheap", "nothing"),
    )
    pack_length: int = setting(
        0,
        "pack several trajectories into rows of this many tokens; 0: a micro-batch into one row where attention costs "
        "only what is seen (block_sdpa, flex_attention), else into rows as long as its longest trajectory",
    )
    drop_truncated: bool = setting(False, "drop trajectories that did not stop by themselves")
    attention: str = setting(
        "auto",
        "'flex_attention' (its backward pass needs a GPU), 'block_sdpa' (needs a CPU), 'sdpa' or 'eager'; 'auto': the "
        "first on a GPU, the second on a CPU",
        choices=("auto", "flex_attention", "block_sdpa", "sdpa", "eager"),
    )
    lora_rank: int = setting(0, "train adapters of this rank (LoRA, needs t3d[lora]); 0: all weights", low=0)
    lora_alpha: float = setting(0.0, "the adapters' output is scaled by this / rank; 0: twice the rank", low=0)
    lora_dropout: float = setting(0.0, "dropout before the adapters", low=0, below=1)
    lora_targets: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "names of the layers with adapters, e.g. [q_proj, v_proj]; 'all-linear': all but the head"},
    )
    lora_4bit: bool = setting(False, "hold the frozen weights in 4 bits (QLoRA, needs t3d[qlora] and a GPU)")
    eval_every: int = setting(0, "decode held-out problems every this many optimizer steps; 0: never", low=0)
    eval_problems: int = setting(64, "number of these problems", low=1)
    eval_split: str = setting(
        "dev", "split of these problems: dev, train or test; `t3d eval` measures test", choices=SPLITS
    )
    eval_block_steps: list[int] = field(
        default_factory=lambda: [2, 1], metadata={"help": "denoising steps per block of these evaluations"}
    )
    keep_best: bool = setting(True, "with eval_every: the student is the most accurate checkpoint, not the last")

    # TrainingArguments' own, with other defaults
    learning_rate: float = setting(1e-5, "peak learning rate")
    lr_scheduler_type: str = setting("cosine_with_min_lr", "learning-rate schedule")
    lr_scheduler_kwargs: dict | str | None = setting(None, "arguments of the schedule; default for a cosine: to 10%")
    optim: str = setting(
        "adamw_torch", "optimizer: any of transformers', or 'muon' (matrices by Muon, the rest by AdamW)"
    )
    logging_steps: float = setting(10, "log every this many optimizer steps")
    save_steps: float = setting(100, "save a checkpoint every this many optimizer steps")
    save_total_limit: int | None = setting(2, "checkpoints to keep")
    remove_unused_columns: bool = setting(False, "kept off: a batch is made of trajectories, not of columns")
    ddp_find_unused_parameters: bool | None = setting(False, "kept off: every weight has a gradient")

    def __post_init__(self):
        def check(ok: bool, message: str):
            if not ok:
                raise T3DError(f"train.{message}")

        check_name("train.objective", self.objective, OBJECTIVES)
        check_values(self, "train.{}")
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
        check(
            self.lora_rank or not self.lora_4bit, "lora_4bit needs lora_rank: the 4-bit weights themselves are frozen"
        )
        check(
            not (self.lora_rank and method.needs_critic),
            f"lora_rank: {self.objective} trains a whole copy beside the student; leave it out, or set fake_updates=0",
        )
        check(self.lora_targets, "lora_targets must not be empty")
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
