"""What holds for every policy, whatever it says. All changes to a block's tokens go through here.

- A prompt's token never changes, and the mask is never an answer.
- Only masks inside the window are committed; a row that must advance commits at least one.
- Only filled places are rewritten or masked again, each at most so many times as the policy says: edits end.
- A step masks fewer places again than it commits, so that a block gets fuller until its revisions are used up.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from t3d.decoding.policy import Decision, View, at_least_one, rank


@dataclass
class Lawful:
    """What is done. commit, rewrite, remask: bool (rows, block), which do not overlap; new: int64 (rows, block), the
    tokens of rewritten places. The last three are None for a policy that revises nothing."""

    commit: Tensor
    rewrite: Tensor | None = None
    new: Tensor | None = None
    remask: Tensor | None = None


def lawful(
    decision: Tensor | Decision, view: View, mask_id: int, revisions: Callable[[], Tensor], most_revisions: int
) -> Lawful:
    """What is done of what a policy said. revisions: gives int64 (rows, block), how often each place was revised."""
    if isinstance(decision, Tensor):
        decision = Decision(decision)
    commit = at_least_one(decision.commit & view.masked, view)
    result = Lawful(commit)
    if decision.rewrite is not None or decision.remask is not None:
        filled = (view.tokens != mask_id) & ~view.fixed & (revisions() < most_revisions)
    if decision.rewrite is not None:
        new = result.new = decision.rewrite
        result.rewrite = filled & (new != view.tokens) & (new != mask_id)
    if decision.remask is not None:
        remask = decision.remask & filled
        if result.rewrite is not None:
            remask &= ~result.rewrite
        # of too many, the first ones from the left
        keep = (commit.sum(-1) - 1).clamp_(min=0)
        result.remask = remask & (rank(remask.int()) < keep[:, None])
    return result
