from t3d.trajectories.dataset import TrajectoryDataset, as_begun, read_metadata, read_trajectories
from t3d.trajectories.record import CONTEXT, MESSAGES, NFE, Trajectory, validate
from t3d.trajectories.store import TrajectoryWriter

__all__ = [
    "CONTEXT",
    "MESSAGES",
    "NFE",
    "Trajectory",
    "TrajectoryDataset",
    "TrajectoryWriter",
    "as_begun",
    "read_metadata",
    "read_trajectories",
    "validate",
]
