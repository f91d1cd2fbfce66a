from dataclasses import dataclass

from t3d.components import setting
from t3d.decoding.policy import Policy, at_least_one, rank, register


@register("hierarchy")
@dataclass(frozen=True)
class Hierarchy(Policy):
    """All above the threshold, and of every run of adjacent masks the best if it is above `run_threshold`.

    Tokens far apart depend little on each other (dInfer's hierarchy decoder).
    """

    threshold: float = setting(
        0.9, "commit above this confidence", low=0, high=1, slow=1.0, fast=0.0, values=(0.99, 0.95, 0.9, 0.8, 0.7)
    )
    run_threshold: float = setting(
        0.4, "commit the most confident of each run of masks above this confidence", low=0, high=1
    )

    def decide(self, view, knobs, memory):
        masked, block = view.masked, view.masked.shape[1]
        starts = masked.clone()
        starts[:, 1:] &= ~masked[:, :-1]
        run = starts.cumsum(-1)  # 1.. of masked places; 0 or the run before elsewhere
        place = rank(view.confidence).masked_fill(~masked, block)  # so that no place of a run before is its best
        first = place.new_full((len(place), block + 1), block).scatter_reduce(-1, run, place, "amin")
        leads = place == first.gather(-1, run)
        chosen = (leads & (view.confidence > knobs.run_threshold)) | (view.confidence > knobs.threshold)
        return at_least_one(masked & chosen, view)
