from t3d.engine.engine import Engine
from t3d.engine.ray_engine import RayEngine, make_engine
from t3d.engine.session import BlockEvent, EngineStats, FailedEvent, FinishedEvent, StepEvent

__all__ = [
    "BlockEvent",
    "Engine",
    "EngineStats",
    "FailedEvent",
    "FinishedEvent",
    "RayEngine",
    "StepEvent",
    "make_engine",
]
