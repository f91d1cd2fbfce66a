"""Many variants of one recipe, each over several seeds, and what they show."""

from t3d.study.config import Study, load_study
from t3d.study.results import write_study_results
from t3d.study.runner import run_study

__all__ = ["Study", "load_study", "run_study", "write_study_results"]
