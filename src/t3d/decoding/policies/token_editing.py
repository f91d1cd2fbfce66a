from dataclasses import dataclass
from typing import ClassVar

import torch

from t3d.components import setting
from t3d.decoding.policy import FILLED, Decision, Memory, Policy, at_least_one, register


@register("token_editing")
@dataclass(frozen=True)
class TokenEditing(Policy):
    """Commits early and corrects: joint thresholds (LLaDA2.1's token editing, SGLang's JointThreshold).

    Masks above `draft_threshold` are committed. A filled token is replaced by the likeliest one where that is another
    and its probability is above `edit_threshold`. A full block is edited until nothing changes, for at most
    `edit_steps` steps. For models trained to correct themselves.
    """

    needs = frozenset({FILLED})
    most_revisions = 2**15 - 1  # `edit_steps` ends them
    memory: ClassVar = {"edits": Memory(dtype=torch.int64)}
    draft_threshold: float = setting(
        0.5,
        "commit above this confidence (token_editing)",
        low=0,
        high=1,
        slow=1.0,
        fast=0.0,
        values=(0.9, 0.8, 0.7, 0.6, 0.5),
    )
    edit_threshold: float = setting(0.0, "replace a token by one with more probability than this", low=0, high=1)
    edit_steps: int = setting(16, "most steps of editing after a block is full", low=0)

    def decide(self, view, knobs, memory):
        commit = at_least_one(view.masked & (view.confidence > knobs.draft_threshold), view)
        full = ~view.masked.any(-1, keepdim=True)
        memory["edits"] += full
        may = ~full | (memory["edits"] <= knobs.edit_steps)
        edit = may & (view.certainty > knobs.edit_threshold)
        return Decision(commit, rewrite=view.expected.where(edit, view.tokens))
