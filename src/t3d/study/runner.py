"""Runs a study's jobs one after another. Each is an ordinary run, so what is complete is skipped."""

from t3d.errors import T3DError
from t3d.log import log
from t3d.pipeline import RunFolder, run_stages
from t3d.study.config import Job, Study
from t3d.study.results import write_study_results


def run_study(study: Study) -> None:
    """Run what is not complete, and write the results anew after every run.

    Raises:
        T3DError: at the end, if a run failed; the others were done.
    """
    failed = []
    for number, job in enumerate(study.jobs, 1):
        if complete(job):
            continue
        log.info("study: run %d of %d, %s, seed %d", number, len(study.jobs), job.variant, job.seed)
        try:
            if job.rollout is not None:
                run_stages(job.rollout, ("rollout",))
            run_stages(job.recipe)
        except T3DError as error:
            log.warning("study: %s, seed %d failed: %s", job.variant, job.seed, error)
            failed.append(f"{job.variant}, seed {job.seed}")
            continue
        write_study_results(study)
    write_study_results(study)
    if failed:
        raise T3DError(f"{len(failed)} of {len(study.jobs)} runs failed ({'; '.join(failed)}); the reasons are above")


def complete(job: Job) -> bool:
    """Whether the job was done with these settings; if it was with others, `run_stages` says so."""
    run = RunFolder(job.recipe.run_dir)
    try:
        for stage in ("train", "eval"):
            run.check(stage, job.recipe)
    except T3DError:
        return False
    return all(run.complete(stage) for stage in ("train", "eval"))
