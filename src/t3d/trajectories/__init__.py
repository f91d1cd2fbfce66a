from t3d.trajectories.record import NFE, Trajectory

__all__ = ["NFE", "Trajectory"]
