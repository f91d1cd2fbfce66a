"""`path`: cross-entropy to the trajectory's tokens, T3D's path-consistency loss alone."""

from dataclasses import dataclass

from t3d.distill.batch import TrainingBatch
from t3d.distill.logprobs import token_logprobs
from t3d.distill.objective import AnyStates, Ask, mean, register
from t3d.distill.objectives.t3d import PathLevels, path_loss


@register("path")
@dataclass(frozen=True)
class Path(AnyStates, PathLevels):
    """`L_path` of arXiv 2602.12262 on trajectory states; with k at least the block size, plain cross-entropy."""

    unit = "sequence"

    def loss(self, batch: TrainingBatch, ask: Ask):
        logp = ask.student(lambda h, w: token_logprobs(h, w, batch.target[:, None], ask.mask_id))[:, 0]
        loss = path_loss(logp, batch, self.path_k)
        return loss, {"loss/path": loss.detach(), "lp/real": mean(logp.detach())}
