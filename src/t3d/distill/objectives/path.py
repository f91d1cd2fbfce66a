"""`path`: cross-entropy to the trajectory's tokens, T3D's path-consistency loss alone."""

from t3d.distill.config import T3DConfig
from t3d.distill.data import TrainingBatch
from t3d.distill.logprobs import token_logprobs
from t3d.distill.objectives.base import Forward, Objective, mean
from t3d.distill.objectives.t3d import path_loss


class Path(Objective):
    """`L_path` of arXiv 2602.12262 on trajectory states; with k at least the block size, plain cross-entropy."""

    unit = "sequence"

    def loss(self, batch: TrainingBatch, student: Forward, reference, config: T3DConfig, mask_id: int):
        logp = student(lambda h, w: token_logprobs(h, w, batch.target[:, None], mask_id))[:, 0]
        loss = path_loss(logp, batch, config.path_k)
        return loss, {"loss/path": loss.detach(), "lp/real": mean(logp.detach())}
