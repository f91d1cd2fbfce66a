from dataclasses import dataclass

from t3d.decoding.policy import Policy, best, register


@register("ascending")
@dataclass(frozen=True)
class Ascending(Policy):
    """The `2 ** i` most confident at step i, and all that is left at the last step (arXiv 2509.23924).

    A block of `2 ** S` tokens takes S steps: few while little is known, many once most is.
    """

    @property
    def uses_steps(self):
        return True

    def decide(self, view, knobs, memory):
        left = view.masked.sum(-1)
        step = view.step.minimum(view.steps - 1)
        grown = 2 ** step.clamp(max=40)
        return best(view.confidence, left.where(step == view.steps - 1, grown))
