from t3d.evaluation.compare import Comparison, compare
from t3d.evaluation.config import EvalConfig
from t3d.evaluation.metrics import aup, bootstrap, majority, mcnemar, pareto, pass_at_k, tokps, wilson
from t3d.evaluation.results import write_results
from t3d.evaluation.rows import EvalRow, summarise, table
from t3d.evaluation.runner import evaluate
from t3d.evaluation.summary import read_summary, write_summary

__all__ = [
    "Comparison",
    "EvalConfig",
    "EvalRow",
    "aup",
    "bootstrap",
    "compare",
    "evaluate",
    "majority",
    "mcnemar",
    "pareto",
    "pass_at_k",
    "read_summary",
    "summarise",
    "table",
    "tokps",
    "wilson",
    "write_results",
    "write_summary",
]
