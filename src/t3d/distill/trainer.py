"""`T3DTrainer`: transformers' Trainer fed with states of trajectories, beside a frozen reference."""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from t3d.blocks import geometry
from t3d.distill.answer_groups import OwnGroups
from t3d.distill.batch import TrainingBatch, collate, with_answers
from t3d.distill.callbacks import Evaluate, LogLast, Rounds
from t3d.distill.config import T3DConfig
from t3d.distill.contexts import own_contexts, turns, with_drafts
from t3d.distill.critic import Critic
from t3d.distill.data import StateDataset
from t3d.distill.logprobs import choose_tokens
from t3d.distill.lora import add_adapter, plain
from t3d.distill.meter import Meter, means, peak_flops
from t3d.distill.objective import Ask, Critical, OnPolicy, total_loss
from t3d.distill.optim import Muon
from t3d.distill.prepare import compile_layers, prepare
from t3d.distill.recompute import checkpoint_layers, recompute_cheap
from t3d.distill.reference import AdapterReference, Reference, copy_of
from t3d.distill.reference_values import ReferenceValues
from t3d.distill.sampler import DrawSampler
from t3d.distill.saving import empty_like, family_of, whole_student
from t3d.distill.sharding import Sharding
from t3d.errors import T3DError
from t3d.log import log
from t3d.models import save_model
from t3d.models.load import load_weights
from t3d.trajectories.fingerprint import check_tokenizer, model_fingerprint

ADAPTER = "adapter"  # folder of the adapter beside the checkpoints


class T3DTrainer(Trainer):
    """Train `model` on trajectories with the objective that `args` names.

    Everything else is `transformers.Trainer`: accumulation, schedules, mixed precision, callbacks, resuming, and
    several processes under `accelerate launch` or `torchrun`.

    Args:
        model: the teacher; it becomes the student.
        args: the settings, a `T3DConfig`.
        train_dataset: a sequence of `Trajectory` (a list, or a `TrajectoryDataset` that reads from the store).
        reference: the frozen reference, where the objective has one; default: a copy of `model` as it is now, or with
            LoRA `model` without its adapter.
        held_out: gives metrics of a model at every `eval_every` steps, see `t3d.distill.held_out.HeldOut`.
        judge: verdicts of a list of answers, for rewards that need them, see `t3d.distill.rewards.Judge`.
        engine: settings of `t3d.engine.make_engine`, for objectives that decode groups of answers.
        answer_prompts: gives the ids of a trajectory's prompt with the reference answer in it, for
            `reference_sees="answer"`, see `t3d.distill.answer_prompts.AnswerPrompts`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: T3DConfig,
        train_dataset,
        reference: nn.Module | None = None,
        processing_class=None,
        held_out: Callable | None = None,
        judge: Callable | None = None,
        engine: dict | None = None,
        answer_prompts: Callable | None = None,
        **kwargs,
    ):
        self.objective = args.method
        self.mask_id = model.config.mask_token_id
        self.held_out = held_out
        self._groups = OwnGroups(self, judge, engine or {}) if self.objective.rl_updates else None
        self._sees_answers = self.objective.reference_sees == "answer"
        if self._sees_answers and answer_prompts is None:
            raise T3DError(
                "train.reference_sees=answer needs prompts that show the reference answer: give T3DTrainer "
                "`answer_prompts`, or set it to prompt"
            )
        check_tokenizer(getattr(train_dataset, "metadata", {}), processing_class)
        shape = geometry(model.config)
        if shape["full"] and self.objective.group_size > 1:
            raise T3DError("train.group_size does not work where every token sees every other, as in this model")
        if shape["anchored"] and self._sees_answers:
            raise T3DError(
                "train.reference_sees=answer needs blocks that are counted from the prompt's first token, and this "
                "model's are counted from the response's"
            )
        vocabulary = len(processing_class) if processing_class is not None else model.config.vocab_size
        states = StateDataset(
            train_dataset,
            args,
            model.config.block_size,
            self.mask_id,
            min(vocabulary, model.config.vocab_size),
            answer_prompts if self._sees_answers else None,
            **shape,
        )
        pad_id = model.config.pad_token_id if model.config.pad_token_id is not None else 0
        self._values: ReferenceValues | None = None
        if self.objective.lasting_reference and args.reference_cache:
            made_by = model_fingerprint(model if reference is None else reference)
            settings = (args.reference_temperature, args.bf16, args.fp16, self.mask_id)
            self._values = ReferenceValues(args.reference_cache, made_by, *settings)
        if args.lora_rank and not hasattr(model, "peft_config"):
            model = add_adapter(model, args)
        if args.compile_layers:
            compile_layers(model, args)
        for network in (model, reference):
            if network is not None:
                prepare(network, args)
        one_row = plain(model).config._attn_implementation in ("block_sdpa", "flex_attention")
        super().__init__(
            model=model,
            args=args,
            train_dataset=states,
            data_collator=partial(
                collate,
                pad_id=pad_id,
                block_size=model.config.block_size,
                full=shape["full"],
                pack_length=args.pack_length or (sys.maxsize if one_row else 0),
            ),
            processing_class=processing_class,
            **kwargs,
        )
        self._weights = plain(model).num_parameters(exclude_embeddings=True)  # before anyone puts them into shards
        self.sharding = Sharding(self.accelerator)
        whole = not self.sharding.sharded
        if args.recompute == "cheap" and not whole:
            raise T3DError(f"train.recompute=cheap does not go with {self.sharding.name}; use gradient_checkpointing")
        alone = whole and not args.compile_layers  # the compiler decides by itself what to compute again
        cheap = args.recompute == "cheap" or (args.recompute == "auto" and args.device.type == "cpu" and alone)
        if cheap and not args.gradient_checkpointing:
            recompute_cheap(plain(model))
        if args.use_muon and (self.sharding.sharded or self.sharding.zero):
            raise T3DError("train.optim: muon needs whole matrices on every GPU; use DDP, or adamw_torch")
        self.model_accepts_loss_kwargs = False  # compute_loss sees to it that micro-batches add up
        self.reference: Reference | None = None
        if self.objective.needs_reference:
            self.reference = self._make_reference(reference)
            self.add_callback(Rounds(self))
        self.critic: Critic | None = None
        if isinstance(self.objective, Critical) and self.objective.needs_critic:
            rate = self.objective.fake_learning_rate or args.learning_rate
            network = self._copy()
            if args.gradient_checkpointing:
                checkpoint_layers(plain(network))
            self.critic = Critic(network, self.sharding, rate, args.max_grad_norm)
        if args.eval_every:
            if held_out is None:
                raise T3DError("train.eval_every needs held-out problems: give T3DTrainer `held_out`")
            self.add_callback(Evaluate())
        self.add_callback(LogLast())
        self.meter = Meter(self.accelerator, self._peak())
        self._decoder: nn.Module | None = None
        self.resumed: str | None = None

    def floating_point_ops(self, inputs) -> float:
        """Of the last micro-batch, `total_flos` of the state adds them up: 2 per weight and token, the reference's and
        the engine's forwards included, a backward pass as two forwards; without embeddings and attention scores."""
        return self.meter.operations(self._weights)

    def _peak(self) -> float | None:
        """FLOP/s of this process's GPU, if it has one that is known."""
        if self.args.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.args.device)
        peak = peak_flops(name)
        if peak is None and self.accelerator.is_main_process:
            log.info("train: mfu is left out: the peak of %r is not in t3d.distill.meter.PEAK", name)
        return peak

    def _make_reference(self, given: nn.Module | None) -> Reference:
        args = self.args
        if given is None and hasattr(self.model, "peft_config"):
            return AdapterReference(self.model, self.sharding, own_adapter=self.objective.round_interval > 0)
        if self._values is not None and self.sharding.sharded:
            raise T3DError(
                "train.reference_cache is for a reference that is whole on every GPU: in shards all must ask it "
                "whenever one must"
            )
        if args.reference_offload and self.sharding.sharded:
            raise T3DError(
                "train.reference_offload is for a reference that is whole on every GPU; here it is sharded, and its "
                "shards can be offloaded by accelerate's own settings"
            )
        if given is not None and args.compile_layers:
            compile_layers(given, args)
        return Reference(self._copy() if given is None else given, self.sharding, args.reference_offload)

    def _copy(self) -> nn.Module:
        """The student as it is now, once more."""
        model = copy_of(self.model)
        if self.args.compile_layers:
            compile_layers(model, self.args)
        return model

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As transformers does, whose own loading passes over weights that files have under other names."""
        model = self.model if model is None else model
        if self.sharding.fsdp or hasattr(model, "peft_config"):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        dtype = next(model.parameters()).dtype
        saved = load_weights(
            family_of(model), resume_from_checkpoint, resume_from_checkpoint, dtype=dtype, device="cpu"
        )
        model.load_state_dict(saved.state_dict())

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        self.resumed = resume_from_checkpoint or None
        if self.critic is not None and self.resumed:
            self.critic.load(Path(self.resumed))
        with self._groups.of(self.resumed) if self._groups is not None else nullcontext():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _own_contexts(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch's prompts with responses that the student decodes now."""
        assert isinstance(self.objective, OnPolicy)  # no other has a share of such steps
        items = batch.item.tolist()
        examples, forwarded = own_contexts(
            self.decoder(), self.train_dataset, items, self.objective, [self.args.seed, self.state.global_step]
        )
        self.meter.forwarded(forwarded)
        return TrainingBatch(**self.data_collator(examples)).to(self.args.device)

    def decoder(self) -> nn.Module:
        """The student as it is now, in a form that the engine can decode with; every process must call it."""
        if not self.sharding.sharded:
            return plain(self.sharding.unwrap(self.model))
        if hasattr(self.sharding.unwrap(self.model_wrapped), "peft_config"):
            raise T3DError(
                f"an adapter on a model sharded by {self.sharding.name} cannot be decoded while it is trained; use "
                "DDP, or leave out train.eval_every and objectives that decode"
            )
        if self._decoder is None:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)
            self._decoder = empty_like(self.sharding.unwrap(self.model_wrapped), self.args.device, dtype)
        own = self._decoder.state_dict()
        with torch.no_grad():
            for name, weight in self.sharding.whole_weights(self.model_wrapped):
                own[name].copy_(weight)
        return self._decoder

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and over how many units of the objective the step's loss is a mean."""
        self.meter.start()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._groups is not None:
            batches = self._groups.batches(batches)
        units = torch.tensor(sum(self._units(batch) for batch in batches), dtype=torch.float64, device=device)
        return batches, self.accelerator.reduce(units, "sum").item()

    def _units(self, inputs: dict) -> float:
        if self.objective.unit == "token":
            return float(inputs["weight"].sum())
        return int(inputs[self.objective.unit].max()) + 1 if len(inputs["select"]) else 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch, units = TrainingBatch(**inputs), self._units(inputs)
        own = turns(self.state.global_step, self.objective.on_policy_share)
        if own:
            batch = self._own_contexts(batch)
        if self._drafts():
            with torch.no_grad():
                drafts = self.forward(model, lambda hidden, weight: choose_tokens(hidden, weight, self.mask_id), batch)
            batch = with_drafts(batch, drafts)

        def student(head, other=batch):
            head = self.meter.watched(head, other, self.mask_id) if self._is_logged() else head
            return self.forward(model, head, other)

        def reference(head, other=batch):
            def ask():
                with torch.no_grad(), self.accelerator.autocast(), self.reference.active(model) as network:
                    return self.forward(network, head, with_answers(other) if self._sees_answers else other)

            return self._values.get(batch, ask) if self._values is not None else ask()

        def critic(head, other=batch):
            with self.accelerator.autocast():
                return self.forward(self.critic.model, head, other)

        if own and self.critic is not None:
            learn = partial(self.objective.critic_loss, batch, critic, self.mask_id)
            self.meter.add("loss/fake", self.critic.update(learn, self.objective.fake_updates), units)
        if len(batch.select):
            ask = Ask(student, reference, self.mask_id, torch.no_grad()(critic) if self.critic is not None else None)
            loss, metrics = total_loss(self.objective, batch, ask)
        else:  # nothing is masked; the other processes wait for this one's gradients and shards all the same
            loss, metrics = self.forward(model, lambda hidden, weight: (hidden @ weight[:1].T).sum() * 0, batch), {}
            if self.sharding.sharded and self.reference is not None:
                reference(lambda hidden, weight: hidden)
        self._check(loss, batch)
        for name, value in metrics.items():  # means over the loss's units, or over positions
            self.meter.add(name, value, units if name.startswith(("loss/", "margin/")) else len(batch.select))
        self.meter.seen(batch.tokens)
        if num_items_in_batch:  # Trainer divides by the accumulation, the backend by the processes: undo both
            parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss * (units * parts / num_items_in_batch)
        return loss

    def forward(self, network: nn.Module, head, batch: TrainingBatch):
        """`head(hidden (m, width), lm_head weight)` of a forward of the student or the reference."""
        inner = plain(self.sharding.unwrap(network))
        module = inner.get_output_embeddings()
        mask = batch.attention_mask(inner.config._attn_implementation)
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:  # else every layer would make one of its own
            half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else module.weight.dtype
            mask = torch.zeros(mask.shape, dtype=half, device=mask.device).masked_fill_(~mask, -torch.inf)
        self.meter.forwarded((1 + 2 * torch.is_grad_enabled()) * batch.tokens)
        result = network(
            input_ids=batch.input_ids,
            attention_mask=mask,
            position_ids=batch.position,
            select=batch.layout.predictors(batch.select, getattr(inner.config, "logits_shift", 0)),
            head=lambda hidden, _: module(hidden, head),
        )
        if self.sharding.zero == 3 and isinstance(result, tuple) and module.weight in set(result):
            raise T3DError(
                f"objective {self.args.objective!r} uses the language-model head outside of the forward, when "
                "ZeRO 3 has it in shards again; use fsdp2 or zero2"
            )
        return result

    def _drafts(self) -> bool:
        """Whether the step shows the student's own choices; every process draws the same."""
        drawn = np.random.default_rng([self.args.seed, self.state.global_step]).random()
        return drawn < self.objective.draft_share

    def _is_logged(self) -> bool:
        """Whether the step being computed is the last before something is logged."""
        step = self.state.global_step + 1
        return self.state.logging_steps and (step % self.state.logging_steps == 0 or step == self.state.max_steps)

    def _check(self, loss: Tensor, batch: TrainingBatch) -> None:
        if not math.isfinite(loss.item()):
            ids = [self.train_dataset.trajectory(item).prompt_id for item in batch.item.tolist() if item >= 0]
            more = f" and {len(ids) - 4} more" if len(ids) > 4 else ""
            where = ", ".join(map(repr, ids[:4])) + more if ids else "the student's own answers"
            raise T3DError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}, on {where}; lower "
                f"train.learning_rate, or continue from the last checkpoint in {self.args.output_dir}"
            )

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs |= self.meter.drain()
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """Metrics of the student on the held-out problems, which the processes share."""
        with self.meter.paused():
            parts = self.held_out(self.decoder(), self.accelerator.process_index, self.accelerator.num_processes)
            metrics = {f"eval_{name}": value for name, value in means(parts).items()}
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        batch_size = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        times = max(self.objective.rl_updates, 1)
        return DrawSampler(len(self.train_dataset), batch_size, args.num_train_epochs, args.max_steps, args.seed, times)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None and self.args.use_muon:
            self.optimizer = Muon(self.model, self.args.learning_rate, self.args.weight_decay)
        return super().create_optimizer(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.reference is not None and self.objective.round_interval:
            self.reference.save(folder)
        if self.critic is not None:
            self.critic.save(folder)
        if self._groups is not None:
            self._groups.save(folder)

    def save_student(self, folder: Path, dtype: torch.dtype, base: Callable[[], nn.Module]) -> None:
        """Write the student as it is as an ordinary HF folder; every process must call it.

        base: loads the model that training began with, for an adapter to be merged into; the adapter itself goes to
        the folder ADAPTER beside the checkpoints.
        """
        adapter = Path(self.args.output_dir) / ADAPTER
        main = self.accelerator.is_main_process
        student = whole_student(self.model_wrapped, self.sharding, main, dtype, base, adapter)
        if student is not None:
            save_model(student, folder, self.processing_class)
