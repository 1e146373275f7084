"""SIGUSR1 to the driver: a checkpoint after the step under way, status 75, and the same command resumes from it."""

import signal

from chaos.job import Job

from neurostorm.train.checkpoint import checkpoints
from neurostorm.train.health.stop import STOP_FILE, STOPPED_STATUS

STEPS, NEVER = 150, 10_000


def test_a_run_saves_and_stops_on_usr1_and_the_same_command_finishes_it(ball_config):
    config = ball_config(
        train={"epochs": 100, "max_steps": STEPS, "log_every": 1, "validate_every": NEVER},
        checkpoint={"every": NEVER, "preemption_check_every": NEVER}, tracking={"clip_ledger": True, "pictures": False},
    )  # fmt: skip
    config.run.folder.mkdir(parents=True)
    (config.run.folder / STOP_FILE).write_text("")  # of a driver that was killed
    job = Job(config)
    try:
        job.wait_for(lambda: job.steps_done() >= 3, "three steps")
        job.process.send_signal(signal.SIGUSR1)
        job.process.send_signal(signal.SIGUSR1)
        assert job.wait_for_end() == STOPPED_STATUS, job.output()
    finally:
        job.kill()
    said = job.output()
    newest = checkpoints.newest(config.run.folder / "checkpoints")
    assert newest is not None and newest.step == job.reached() < STEPS, said
    assert newest.workers == 2
    assert "SIGUSR1: the run saves a checkpoint after the step under way and ends with status 75" in said
    assert f"stopped as asked, of {STEPS} steps; the newest checkpoint is {newest.path} ({newest.step} steps" in said
    assert "start the same command again to resume from it" in said
    assert "Traceback" not in said
    assert not (config.run.folder / STOP_FILE).exists() and not (config.run.folder / "summary.json").exists()

    again = Job(config)
    try:
        finished = again.finish()
    finally:
        again.kill()
    assert f"steps {newest.step} to {STEPS}" in finished
    assert again.steps() == list(range(STEPS)), "each step once"
