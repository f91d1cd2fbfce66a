"""`dcd`: the teacher's distributions along its trajectory, stitched over the block (ECHO, arXiv 2604.09450)."""

from dataclasses import dataclass

from t3d.distill.objective import AnyStates, Objective, other_default, register
from t3d.distill.objectives.soft import Soft


@register("dcd")
@dataclass(frozen=True)
class DCD(Soft):
    """Direct conditional distillation, into one step per block:

        L = sum_i w_i KL(p_i || q_i) / sum_i w_i + stop_ce * CE at the stop token

    q_i is the student's prediction where all of the block is masked, p_i the teacher's at the state in which it
    committed token i. The weight w_i grows with the step of that commitment (`late_weight`), since the student knows
    least of what came last. `rollout_rounds` gives the rounds of new rollouts. The paper's own weights are not public;
    those here are our choice, not tuned.
    """

    state: str = other_default(AnyStates, "state", "all_masked")
    random_ratio: float = other_default(AnyStates, "random_ratio", 0.0)
    late_weight: float = other_default(Objective, "late_weight", 1.0)
    stop_ce: float = other_default(Objective, "stop_ce", 0.5)
