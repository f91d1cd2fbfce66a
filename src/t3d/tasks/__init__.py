from t3d.tasks import word_problems  # registers itself
from t3d.tasks.base import Problem, Task, TaskConfig, get_task, register, task_names
from t3d.tasks.math import verify_math

__all__ = [
    "Problem",
    "Task",
    "TaskConfig",
    "get_task",
    "register",
    "task_names",
    "verify_math",
    "word_problems",
]
