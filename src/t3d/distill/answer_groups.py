"""Groups of answers that the student decodes to one prompt each, as examples with advantages."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from t3d.decoding import DecodingConfig
from t3d.decoding.sampling import derive_seed
from t3d.distill.batch import COLUMNS, TrainingBatch
from t3d.distill.contexts import own_answers
from t3d.distill.data import StateDataset
from t3d.distill.objective import Reinforced
from t3d.distill.rewards import advantages, worth
from t3d.engine import make_engine
from t3d.errors import T3DError
from t3d.trajectories import Trajectory


def own_groups(
    engine, dataset: StateDataset, items: list[int], objective: Reinforced, judge: Callable | None, base: list[int]
) -> tuple[list[dict], list[tuple[Trajectory, float, float]], int]:
    """Answers that the engine's model decodes now, `rl_group` to each prompt of the dataset's `items`.

    judge: verdicts of a list of answers, see `t3d.distill.rewards.Judge`. base: numbers that seed what is random.
    Returns the examples of the groups whose rewards differ, with a column `advantage`; every answer with its reward and
    advantage; and the tokens that went through the model. Without such a group there is one example that supervises
    nothing.
    """
    each = [item for item in items for _ in range(objective.rl_group)]
    seeds = [derive_seed(*base, item, number) for item in items for number in range(objective.rl_group)]
    answers, forwarded = own_answers(engine, dataset, each, seeds, decoding(objective, dataset.block_size))
    given = [dataset.trajectory(item) for item in each]
    if judge is not None:
        verdicts = judge(answers)
        answers = [replace(answer, correct=correct) for answer, correct in zip(answers, verdicts, strict=True)]
    rewards = [  # the teacher's answer in full steps takes a forward for every token
        worth(objective.rl_reward, answer, objective.rl_cost, len(t.response_ids))
        for answer, t in zip(answers, given, strict=True)
    ]
    gains = advantages(rewards, objective.rl_group)
    examples = [_example(dataset, answers[i], gains[i], seeds[i]) for i in np.flatnonzero(gains)]
    if not examples:
        one = _example(dataset, answers[0], 0.0, seeds[0])
        examples = [{name: x[:0] if name in _FLAT else x for name, x in one.items()}]
    return examples, list(zip(answers, rewards, gains.tolist(), strict=True)), forwarded


_FLAT = (*COLUMNS, "select", "supervised_copy", "supervised_block")


def decoding(objective: Reinforced, block_size: int) -> DecodingConfig:
    """How the answers are decoded: in few steps, or with a threshold."""
    settings = {"steps": min(objective.rl_steps, block_size), "temperature": objective.rl_temperature}
    if objective.rl_threshold:
        settings |= {"strategy": "low_confidence_dynamic", "threshold": objective.rl_threshold}
    return DecodingConfig(**settings)


def _example(dataset: StateDataset, answer: Trajectory, advantage: float, seed: int) -> dict:
    example = dataset.states(answer, np.random.default_rng(seed))
    return example | {"advantage": np.full(len(example["select"]), advantage)}


class OwnGroups:
    """The batches that a trainer learns from instead of its dataset's: groups of answers to the same prompts.

    They are decoded every `rl_updates` optimizer steps. A checkpoint in between holds those in use, so that a run that
    goes on from it ends as if it had not been stopped.
    """

    def __init__(self, trainer, judge: Callable | None, engine: dict):
        self.trainer, self.objective, self.judge, self.options = trainer, trainer.objective, judge, engine
        if self.objective.rl_reward == "accuracy" and judge is None:
            raise T3DError(
                f"objective {self.objective.name!r} needs verdicts: give T3DTrainer `judge`, or another train.rl_reward"
            )

    @contextmanager
    def of(self, checkpoint: str | None):
        """Inside, a training from this checkpoint, or from the beginning."""
        self._checkpoint, self._engine, self._batches = checkpoint, None, None
        try:
            yield
        finally:
            if self._engine is not None:
                self._engine.close()

    def batches(self, given: list[dict]) -> list[dict]:
        """The micro-batches of a step, for the prompts of those given. Every process must call it."""
        trainer = self.trainer
        if not self._under_way():
            decoder = trainer.decoder()
            if self._engine is None:
                self._engine = make_engine(decoder, trainer.processing_class, **self.options)
            self._batches = [self._batch(batch["item"].tolist()) for batch in given]
        elif self._batches is None:
            path = Path(self._checkpoint) / self._file
            if not path.exists():
                raise T3DError(
                    f"{self._checkpoint} lacks the answers in use, {path.name}; continue with as many processes and "
                    "the train.rl_updates that it was saved with"
                )
            self._batches = torch.load(path, map_location=trainer.args.device)
        return self._batches

    def save(self, folder: Path) -> None:
        """Write the batches that this process goes on with, if any."""
        if self._under_way():
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self._batches, folder / self._file)

    def _under_way(self) -> bool:
        """Whether the next step is not the first to learn from its answers."""
        return self.trainer.state.global_step % self.objective.rl_updates > 0

    @property
    def _file(self) -> str:
        return f"answers-{self.trainer.accelerator.process_index:05d}.pt"

    def _batch(self, items: list[int]) -> dict:
        """Groups of answers to the prompts of these items, each with its policy's log-probabilities."""
        trainer = self.trainer
        base = [trainer.args.seed, trainer.state.global_step]
        dataset = trainer.train_dataset
        examples, found, forwarded = own_groups(self._engine, dataset, items, self.objective, self.judge, base)
        trainer.meter.forwarded(forwarded)
        trainer.meter.answered(found)
        fields = trainer.data_collator(examples)
        batch = TrainingBatch(**fields).to(trainer.args.device)
        model = trainer.model_wrapped
        model.eval()  # as it was decoded, without dropout
        with torch.no_grad(), trainer.accelerator.autocast():
            old = trainer.forward(
                trainer.sharding.callable(model), self.objective.policy(batch, trainer.mask_id), batch
            )
        model.train()
        return {name: getattr(batch, name) for name in fields} | {"old_logp": old}
