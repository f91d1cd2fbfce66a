from t3d.engine.engine import BlockEvent, Engine, FinishedEvent

__all__ = ["BlockEvent", "Engine", "FinishedEvent"]
