"""Claims about jobs on a cluster: stopped at a time limit or by a warning, and given again, a run ends as if never."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from experiment_cases import CONFIG, PHANTOM, latest_digest, trained
from preloaded import finished, start_command

from dwiml_func.cli._training import TimeLimit
from dwiml_func.experiment.signals import StopRequest

GUIDE = Path(__file__).parent.parent / "docs" / "processes.md"
OPTIONS = ("--rnn-layer-sizes", "8", "--dg-dropout", "0.25", "--batch-size-training", "40")
OPTIONS = (*OPTIONS, "--batch-size-validation", "20", "--max-epochs", "2", "--skip-figures")


def test_a_time_limit_saves_the_run_and_the_same_command_goes_on(cli, tmp_path):
    command = ("train", tmp_path, "run", PHANTOM, *OPTIONS)
    outcome = cli(*command, "--stop-after", "0s")
    assert outcome.code == 142
    assert "stopped by --stop-after and saved as checkpoint 0-1. To resume: dwiml-func resume" in outcome.err
    outcome = cli("resume", tmp_path, "run", "--stop-after", "0s")
    assert (outcome.code, "saved as checkpoint 0-2" in outcome.err) == (142, True)
    outcome = cli("fork", tmp_path / "run", "forked", "--stop-after", "0s")
    assert (outcome.code, "saved as checkpoint 0-3" in outcome.err) == (142, True)
    outcome = cli(*command, "--stop-after", "0s")
    assert (outcome.code, "saved as checkpoint 0-3" in outcome.err) == (142, True)
    assert cli(*command, "--stop-after", "1h30m").code == 0
    assert cli(*command, "--stop-after", "0s").code == 0  # it has ended
    assert latest_digest(tmp_path / "run") == latest_digest(trained(tmp_path, CONFIG, "uninterrupted"))


def test_a_time_limit_stops_an_ensemble(cli, tmp_path):
    command = ("train", tmp_path, "two", PHANTOM, *OPTIONS, "--num-models", "2", "--stop-after", "0s")
    assert cli(*command).code == 142
    outcome = cli(*command)
    assert (outcome.code, "saved as checkpoint 0-2" in outcome.err) == (142, True)


def test_a_time_limit_stops_a_sweep_which_the_same_command_continues(cli, tmp_path):
    outcome = cli("train", tmp_path, "all", PHANTOM, *OPTIONS, "--sweep", "dg-dropout=0.1,0.2", "--stop-after", "0s")
    assert outcome.code == 142
    assert f"0-1 of {tmp_path / 'all' / 'dg-dropout=0.1'}. To continue the sweep, give the same command" in outcome.err
    assert not (tmp_path / "all" / "dg-dropout=0.2").exists()


@pytest.mark.parametrize(("text", "seconds"), [("3h55m", 14100), ("90m", 5400), ("1d12h", 129600), ("7s", 7)])
def test_durations_are_days_hours_minutes_and_seconds(monkeypatch, text, seconds):
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    deadline = TimeLimit(stop_after=text).deadline()
    assert deadline == 1000 + seconds
    request = StopRequest(deadline=deadline)
    monkeypatch.setattr("time.monotonic", lambda: 999.0 + seconds)
    assert not request.agreed()
    monkeypatch.setattr("time.monotonic", lambda: 1000.0 + seconds)
    assert request.agreed()
    assert TimeLimit().deadline() is None


@pytest.mark.parametrize("text", ["", "3", "1.5h", "-1h", "3h 5m", "h", "55m3h"])
def test_other_durations_are_refused(cli, tmp_path, text):
    cli("train", tmp_path, "run", PHANTOM, f"--stop-after={text}").check_refusal("stop-after")
    assert list(tmp_path.iterdir()) == []


def test_the_slurm_job_of_the_guide_is_requeued_until_the_run_has_ended(tmp_path):
    (job,) = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert "#SBATCH --signal=USR1@300\n" in job
    command = "train experiments first_run data.hdf5 --max-epochs 100"
    assert command in job
    (tmp_path / "job.sh").write_text(job.replace(command, f"train . run {PHANTOM} {' '.join(OPTIONS)} --max-epochs 10"))
    stand_ins = {  # srun gives its command to this test, and takes the exit code from it
        "scontrol": 'echo "$@" >> requeued',
        "srun": 'printf "%s\\n" "$@" > asked\nexit "$(cat answered)"',
    }
    for name, line in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("asked", "answered"):
        os.mkfifo(tmp_path / name)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    asked, codes = os.open(tmp_path / "asked", os.O_RDWR), []
    for warned in (True, False):
        with subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment) as job:
            assert select.select([asked], [], [], 60)[0], "the job does not call srun"
            program, *arguments = os.read(asked, 4096).decode().splitlines()
            assert program == "dwiml-func"
            process = start_command(*arguments, folder=tmp_path)
            if warned:
                while "Epoch 1/" not in process.out and process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.005)
                os.kill(process.pid, signal.SIGUSR1)
            code = finished(process).wait(0)
            (tmp_path / "answered").write_text(f"{code if code >= 0 else 128 - code}")
            codes.append(job.wait(timeout=120))
    os.close(asked)
    assert codes == [138, 0]
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    longer = replace(CONFIG, training=replace(CONFIG.training, max_epochs=10))
    assert latest_digest(tmp_path / "run") == latest_digest(trained(tmp_path, longer, "uninterrupted"))
