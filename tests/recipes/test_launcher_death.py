"""`accelerate launch` hands no signal on; what it started must not go on as an orphan."""

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, sys, time
from pathlib import Path
from vla_trqam.engine.processes.interruption import Interrupted, InterruptGuard
from vla_trqam.engine.launch import exit_status

folder = Path(sys.argv[1])

def work(_):
    with InterruptGuard() as guard:
        (folder / "training").touch()
        deadline = time.monotonic() + 60
        while not guard.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        (folder / ("asked" if guard.requested else "orphan")).touch()
        raise Interrupted("update 3")

class Config:
    output_dir = folder

sys.exit(exit_status(Config, work))
"""


def await_file(path, seconds):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a launcher's death")
def test_a_run_whose_launcher_is_killed_stops_by_itself(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--cpu", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launchers = {}
    for which in (signal.SIGTERM, signal.SIGKILL):
        (tmp_path / which.name).mkdir()
        launchers[which] = subprocess.Popen([*launch, str(tmp_path / which.name)], env=environment)
    try:
        for which, process in launchers.items():
            await_file(tmp_path / which.name / "training", 120)
            process.send_signal(which)
            assert process.wait(20) == -which
        for which in launchers:
            await_file(tmp_path / which.name / "asked", 20)
    finally:
        for process in launchers.values():
            process.kill()
