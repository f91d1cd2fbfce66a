"""Runs a study's jobs: each an ordinary run, so what is complete is skipped, and several processes can share them."""

import time
from pathlib import Path

from t3d.errors import InUseError, T3DError
from t3d.log import log
from t3d.pipeline import RunFolder, check_stages, run_stages
from t3d.pipeline.folder import STAGES, writing
from t3d.study.config import Job, Study
from t3d.study.results import write_study_results

WAIT_SECONDS = 5.0  # before asking again for runs that other processes hold


def run_study(study: Study) -> None:
    """Run what is not complete, and write the results anew after every run; return when all runs are.

    A run that another process holds is left to it, and is taken up if that process ends before the run does.

    Raises:
        T3DError: at the end, if a run failed; the others were done.
    """
    failed, total = [], len(study.jobs)
    pending = dict(enumerate(study.jobs, 1))
    while pending:
        busy = {}
        for number, job in pending.items():
            if complete(job):
                continue
            try:
                if job.rollout is not None and not RunFolder(job.rollout.run_dir).complete("rollout"):
                    check_stages(job.recipe, ("train", "eval"))  # it may be wrong in what comes after hours of decoding
                    run_stages(job.rollout, ("rollout",))
                run_stages(job.recipe, STAGES if job.train else job.stages)
                log.info("study: run %d of %d, %s, seed %d, is complete", number, total, job.variant, job.seed)
            except InUseError:
                busy[number] = job
                continue
            except T3DError as error:
                log.warning("study: %s, seed %d failed: %s", job.variant, job.seed, error)
                failed.append(f"{job.variant}, seed {job.seed}")
                continue
            _write_results(study)
        if len(busy) == len(pending):
            time.sleep(WAIT_SECONDS)
        pending = busy
    _write_results(study)
    if failed:
        raise T3DError(f"{len(failed)} of {total} runs failed ({'; '.join(failed)}); the reasons are above")


def _write_results(study: Study) -> None:
    with writing(Path(study.folder)):
        write_study_results(study)


def complete(job: Job) -> bool:
    """Whether the job was done with these settings; if it was with others, `run_stages` says so."""
    run = RunFolder(job.recipe.run_dir)
    try:
        for stage in job.stages:
            run.check(stage, job.recipe)
    except T3DError:
        return False
    return all(run.complete(stage) for stage in job.stages)
