from t3d.engine.engine import Engine
from t3d.engine.ray_engine import RayEngine, make_engine
from t3d.engine.session import BlockEvent, EngineStats, FinishedEvent

__all__ = ["BlockEvent", "Engine", "EngineStats", "FinishedEvent", "RayEngine", "make_engine"]
