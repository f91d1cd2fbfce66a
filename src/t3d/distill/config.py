"""Settings of a distillation run: transformers' `TrainingArguments` plus the method's own."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from t3d.distill.states import ORDERS
from t3d.errors import T3DError, nearest

SPLITS = ("dev", "train", "test")


def _help(text: str, default, **metadata):
    """before: what versions without this key did, where that is not its default."""
    return field(default=default, metadata={"help": text} | metadata)


@dataclass
class T3DConfig(TrainingArguments):
    """How to distil. The defaults are the paper's (arXiv 2602.12262): full fine-tuning at 1e-5, cosine to 10%."""

    objective: str = _help("what the student learns from: see `t3d.distill.objectives`", "t3d")
    alpha: float = _help("weight of DDO's term on the reference's own choices", 0.5)
    beta: float = _help("scale of the log-likelihood margins in DDO", 0.1)
    path_lambda: float = _help("weight of the path-consistency loss", 0.2)
    path_k: int = _help("path levels are tokens committed among the first k, 2k, 3k, ... of their block", 4)
    ddo_unit: str = _help("what one DDO margin is taken over: 'sequence' or 'block'", "sequence")
    ddo_reduction: str = _help("how log-likelihoods combine in a margin: 'mean' or 'sum'", "mean")
    reference_temperature: float = _help("0: fake tokens are the reference's argmax; else a sample at it", 0.0)
    round_interval: int | None = _help(
        "replace the reference by the student every this many optimizer steps; 0: never; default: 10 for t3d and ddo, "
        "0 for the others, whose reference is the teacher",
        None,
    )
    reference_ema: float = _help("a round keeps this share of the reference's weights; 0: it becomes the student", 0.0)
    reference_offload: bool = _help("keep the reference on the CPU and bring each layer for its forward", False)
    reference_cache: str | None = _help(
        "t3d, ddo with round_interval=0: a folder for what the reference says of each micro-batch; runs with the same "
        "states, e.g. with another beta or learning rate, read it there",
        None,
    )
    rollout_rounds: int = _help(
        "1: learn from the teacher's rollouts; K: after each K-th of the steps the student rolls out anew", 1
    )
    mask_exponent: float = _help("mask ratios are drawn from {1, .75, .5, .25} with probability ~ ratio ** this", 8.0)
    mask_per_block: bool = _help("draw the mask ratio for every block instead of once per sequence", False)
    order: str = _help(
        "which tokens stay masked: the last committed ('trajectory'), 'reversed' or 'random'", "trajectory"
    )
    random_ratio: float = _help("share of masked inputs replaced by random tokens (still supervised)", 0.1)
    states_per_sequence: int = _help("noisy states of one trajectory that share its clean copy in a forward", 1)
    certainty_weight: float = _help("dparallel, pseudo_trajectory: weight of the entropy of correct predictions", 2.0)
    certainty_temperature: float = _help("dparallel, pseudo_trajectory: temperature of that entropy", 0.5)
    certainty_mask_ratio: float = _help("dparallel: share of tokens that are masked", 0.5)
    pt_noise: list[float] = field(
        default_factory=lambda: [0.0, 0.8],
        metadata={"help": "pseudo_trajectory: least mask ratio at the start of training, and the most at any time"},
    )
    pt_window: float = _help(
        "pseudo_trajectory: share of a block that is learnt at the start; at the end all of it", 0.5
    )
    tad_near: int = _help("tad: tokens committed in the next this many steps are 'near' and learnt by cross-entropy", 1)
    tad_kl_weight: float = _help("tad: weight of the KL divergence to the teacher on the others", 1.0)
    cdlm_distill: float = _help(
        "consistency: weight of the teacher's distribution at tokens that are next to come", 1.0
    )
    cdlm_consistency: float = _help("consistency: weight of agreement with the student's own later state", 0.5)
    cdlm_denoising: float = _help(
        "consistency: weight of the cross-entropy at random masks; 0: none, and a copy less", 0.0
    )
    mf_anchor: float = _help("mean_field: weight of the cross-entropy to the trajectories; 0: none", 0.5)
    mf_copies: int = _help("mean_field: teacher copies of each block per step; 0: one for every masked position", 0)
    mf_forward: float = _help(
        "mean_field: share of forward KL in the divergence, which a student that is surely wrong learns from",
        0.3,
        before=0.0,
    )
    mf_floor: float = _help("mean_field: least teacher log-probability that counts", -12.0)
    mf_temperature: float = _help("mean_field: 0 fills masks with the student's argmax; else a sample at it", 0.0)
    on_policy_share: float = _help("mean_field: share of steps in contexts that the student itself decodes", 0.5)
    on_policy_steps: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "denoising steps per block of the student's own contexts"}
    )
    on_policy_temperature: float = _help("temperature of the student's own contexts", 0.5)
    soft_divergence: str = _help("soft: 'forward', 'reverse' or 'js' divergence to the reference", "forward")
    soft_state: str = _help(
        "soft: the state at which the reference is asked, 'committed' (the token's own) or 'same' (the student's)",
        "committed",
    )
    soft_top_k: int = _help("soft: compare only the reference's k likeliest tokens; 0: all", 0)
    verified_only: bool = _help("learn only from trajectories that the task's verifier found correct", False)
    easy_share: float = _help(
        "keep this share of the prompts that were never answered wrongly, so that the others count more; 1: all", 1.0
    )
    max_length: int = _help("drop trajectories with more prompt plus response tokens than this; 0: keep all", 0)
    recompute: str = _help(
        "computed again in the backward pass: 'cheap' (all but products and attention), 'nothing', or 'auto', 'cheap' "
        "on a CPU, else 'nothing'; gradient_checkpointing=true computes everything again",
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
    eval_problems: int = _help("how many of them", 64)
    eval_split: str = _help("which: dev, or train or test, of the task; dev is not what `t3d eval` measures", "dev")
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
        from t3d.distill.objectives import OBJECTIVES

        def check(ok: bool, message: str):
            if not ok:
                raise T3DError(f"train.{message}")

        check(
            self.objective in OBJECTIVES,
            f"objective: unknown {self.objective!r}{nearest(self.objective, OBJECTIVES)}; "
            f"known: {', '.join(OBJECTIVES)}",
        )
        check(self.order in ORDERS, f"order is one of {', '.join(ORDERS)}, got {self.order!r}")
        check(
            self.ddo_unit in ("sequence", "block"),
            f"ddo_unit is 'sequence' or 'block', got {self.ddo_unit!r}",
        )
        check(
            self.ddo_reduction in ("mean", "sum"),
            f"ddo_reduction is 'mean' or 'sum', got {self.ddo_reduction!r}",
        )
        check(0 <= self.random_ratio <= 1, f"random_ratio must lie in 0..1, got {self.random_ratio}")
        check(0 <= self.easy_share <= 1, f"easy_share must lie in 0..1, got {self.easy_share}")
        check(0 <= self.on_policy_share <= 1, f"on_policy_share must lie in 0..1, got {self.on_policy_share}")
        kinds = ("forward", "reverse", "js")
        check(self.soft_divergence in kinds, f"soft_divergence is one of {kinds}, got {self.soft_divergence!r}")
        check(
            self.soft_state in ("committed", "same"),
            f"soft_state is 'committed' or 'same', got {self.soft_state!r}",
        )
        check(self.soft_top_k >= 0, f"soft_top_k must not be negative, got {self.soft_top_k}")
        check(self.mf_copies >= 0, f"mf_copies must not be negative, got {self.mf_copies}")
        check(0 <= self.mf_forward <= 1, f"mf_forward must lie in 0..1, got {self.mf_forward}")
        check(self.on_policy_steps, "on_policy_steps must not be empty")
        check(
            0 < self.certainty_mask_ratio < 1,
            f"certainty_mask_ratio must lie between 0 and 1, got {self.certainty_mask_ratio}",
        )
        check(self.certainty_temperature > 0, "certainty_temperature must be above 0")
        check(
            len(self.pt_noise) == 2 and 0 <= self.pt_noise[0] <= self.pt_noise[1] <= 1,
            f"pt_noise is two rising numbers in 0..1, got {self.pt_noise}",
        )
        check(0 < self.pt_window <= 1, f"pt_window must lie in 0..1, above 0, got {self.pt_window}")
        check(self.tad_near >= 1, f"tad_near must be at least 1, got {self.tad_near}")
        for name in ("certainty_weight", "tad_kl_weight", "cdlm_distill", "cdlm_consistency", "cdlm_denoising"):
            check(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        kinds = ("auto", "cheap", "nothing")
        check(self.recompute in kinds, f"recompute is one of {', '.join(kinds)}, got {self.recompute!r}")
        check(self.path_k >= 1, f"path_k must be at least 1, got {self.path_k}")
        check(
            self.states_per_sequence >= 1,
            f"states_per_sequence must be at least 1, got {self.states_per_sequence}",
        )
        if self.round_interval is None:
            self.round_interval = OBJECTIVES[self.objective].round_interval
        check(self.round_interval >= 0, f"round_interval must not be negative, got {self.round_interval}")
        check(self.reference_temperature >= 0, "reference_temperature must not be negative")
        check(0 <= self.reference_ema < 1, f"reference_ema must lie in 0..1, below 1, got {self.reference_ema}")
        check(
            not self.reference_ema or self.round_interval, "reference_ema needs rounds: set round_interval, e.g. to 1"
        )
        check(
            not self.reference_cache or (OBJECTIVES[self.objective].lasting_reference and not self.round_interval),
            "reference_cache needs a reference that stays as it is and is asked of the trajectories alone: objective "
            "t3d or ddo, and round_interval=0",
        )
        check(self.rollout_rounds >= 1, f"rollout_rounds must be at least 1, got {self.rollout_rounds}")
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "eval_every"):
            check(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        check(self.lora_dropout < 1, f"lora_dropout must be below 1, got {self.lora_dropout}")
        check(
            self.lora_rank or not self.lora_4bit, "lora_4bit needs lora_rank: the 4-bit weights themselves are frozen"
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
