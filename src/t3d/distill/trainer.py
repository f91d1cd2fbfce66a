"""`T3DTrainer`: transformers' Trainer fed with states of trajectories, beside a frozen reference."""

import copy
import math
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from t3d.decoding import DecodingConfig
from t3d.distill.config import T3DConfig
from t3d.distill.data import StateDataset, TrainingBatch, collate
from t3d.distill.objectives import OBJECTIVES
from t3d.distill.optim import Muon
from t3d.distill.recompute import recompute_cheap
from t3d.distill.sampler import DrawSampler
from t3d.engine import Engine
from t3d.errors import T3DError

REFERENCE_FILE = "reference.safetensors"


class T3DTrainer(Trainer):
    """Train `model` on trajectories with the objective that `args` names.

    train_dataset: a sequence of `Trajectory` (a list, or a `TrajectoryDataset` that reads from the store).
    reference: the frozen reference, where the objective has one; default: a copy of `model` as it is now.
    Everything else is `transformers.Trainer`: accumulation, schedules, mixed precision, callbacks, resuming.
    """

    def __init__(self, model, args: T3DConfig, train_dataset, reference=None, processing_class=None, **kwargs):
        self.objective = OBJECTIVES[args.objective]
        self.mask_id = model.config.mask_token_id
        vocabulary = len(processing_class) if processing_class is not None else model.config.vocab_size
        states = StateDataset(
            train_dataset,
            args,
            model.config.block_size,
            self.mask_id,
            min(vocabulary, model.config.vocab_size),
        )
        pad_id = model.config.pad_token_id if model.config.pad_token_id is not None else 0
        for network in (model, reference):
            if network is not None and args.device.type == "cpu" and network.config._attn_implementation == "sdpa":
                network.set_attn_implementation("block_sdpa")
        cheap = args.recompute == "cheap" or (args.recompute == "auto" and args.device.type == "cpu")
        if cheap and not args.gradient_checkpointing:
            recompute_cheap(model)
        one_row = model.config._attn_implementation in ("block_sdpa", "flex_attention")
        super().__init__(
            model=model,
            args=args,
            train_dataset=states,
            data_collator=partial(
                collate,
                pad_id=pad_id,
                block_size=model.config.block_size,
                pack_length=args.pack_length or (sys.maxsize if one_row else 0),
            ),
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the micro-batch; Trainer averages those
        self.reference = None
        if self.objective.needs_reference:
            self.reference = (reference if reference is not None else copy.deepcopy(model)).requires_grad_(False).eval()
            self.reference.to(self.args.device)
            if args.round_interval:
                self.add_callback(_RefreshReference(self))
        self._logged: dict[str, list[float]] = defaultdict(list)

    def _own_contexts(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch's prompts with responses that the student decodes now, in few steps (for on-policy objectives)."""
        rng = np.random.default_rng([self.args.seed, self.state.global_step, self.args.process_index])
        given = [self.train_dataset.trajectory(item) for item in batch.item.tolist()]
        prompts = [trajectory.prompt_ids for trajectory in given]
        decoding = DecodingConfig(
            steps=min(int(rng.choice(self.args.on_policy_steps)), batch.block_size),
            temperature=self.args.on_policy_temperature,
            max_tokens=max(len(trajectory.response_ids) for trajectory in given),
        )
        seeds = [int(seed) for seed in rng.integers(0, 2**62, len(prompts))]
        trajectories = Engine(self.model, max_batch_size=len(prompts)).generate(prompts, decoding, seeds=seeds)
        examples = [self.train_dataset.states(trajectory, rng) for trajectory in trajectories]
        return TrainingBatch(**self.data_collator(examples)).to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = TrainingBatch(**inputs)
        if self.objective.on_policy and turns(self.state.global_step, self.args.on_policy_share):
            batch = self._own_contexts(batch)
        implementation = self.model.config._attn_implementation

        def forward(network, head, batch=batch):
            mask = batch.layout.attention_mask(implementation)
            return network(
                input_ids=batch.input_ids,
                attention_mask=mask,
                position_ids=batch.position,
                select=batch.select,
                head=head,
            )

        def reference(head, *other):
            with torch.no_grad(), self.compute_loss_context_manager():
                return forward(self.reference, head, *other)

        loss, metrics = self.objective.loss(batch, partial(forward, model), reference, self.args, self.mask_id)
        if not math.isfinite(loss.item()):
            raise T3DError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}; lower train.learning_rate, "
                f"or continue from the last checkpoint in {self.args.output_dir}"
            )
        for name, value in metrics.items():
            self._logged[name].append(value.item())
        return loss

    def log(self, logs, *args, **kwargs):
        logs |= {name: sum(values) / len(values) for name, values in self._logged.items()}
        self._logged.clear()
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        batch_size = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        return DrawSampler(len(self.train_dataset), batch_size, args.num_train_epochs, args.max_steps, args.seed)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None and self.args.use_muon:
            self.optimizer = Muon(self.model, self.args.learning_rate, self.args.weight_decay)
        return super().create_optimizer(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.reference is not None and self.args.round_interval and self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            save_file(_owned(self.reference), folder / REFERENCE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = Path(resume_from_checkpoint) / REFERENCE_FILE
        if self.reference is not None and saved.exists():
            self.reference.load_state_dict(load_file(saved), strict=False)


def turns(step: int, share: float) -> bool:
    """Whether `step` (0, 1, ...) belongs to the share of steps that is spread evenly over all."""
    return math.floor((step + 1) * share) > math.floor(step * share)


class _RefreshReference(TrainerCallback):
    """A round ends every `round_interval` optimizer steps: the reference becomes the student."""

    def __init__(self, trainer: T3DTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.round_interval == 0:
            self.trainer.reference.load_state_dict(self.trainer.model.state_dict())


def _owned(model) -> dict[str, torch.Tensor]:
    """A model's weights without tied doubles, contiguous, as safetensors wants them."""
    seen, weights = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.contiguous()
    return weights
