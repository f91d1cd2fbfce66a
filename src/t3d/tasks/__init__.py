from t3d.tasks.base import Problem, Task, TaskConfig, Verdict, get_task, register, task_names
from t3d.tasks.math import extract_answer, verify_math

__all__ = [
    "Problem",
    "Task",
    "TaskConfig",
    "Verdict",
    "extract_answer",
    "get_task",
    "register",
    "task_names",
    "verify_math",
]
