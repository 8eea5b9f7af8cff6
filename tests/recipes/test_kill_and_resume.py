"""The recipe as a program on the simulator, killed without warning."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_files import differences, final_state

REAL = """
import sys
from toy_settings import TINY
from vla_trqam.recipes.finetune_robomimic import main
flags = [f for f in TINY if "obs_keys" not in f]
sys.exit(main([*flags, "--pretrain.num_demos=3", *sys.argv[1:]]))
"""


@pytest.mark.long
def test_kill_minus_nine_and_resume_on_the_simulator(tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(code, *flags):
        command = [sys.executable, *code, *flags]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    recipe = ["-m", "vla_trqam.recipes.finetune_robomimic"]
    processes = [
        start(["-c", REAL], f"--output_dir={killed}", "--save_freq=1"),
        start(["-c", REAL], f"--output_dir={whole}"),
    ]
    try:
        deadline = time.monotonic() + 200
        while not (killed / "checkpoints" / "000008").exists():
            assert processes[0].poll() is None, processes[0].stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        processes[0].kill()
        assert processes[0].wait(10) == -signal.SIGKILL
        processes.append(start(recipe, "--resume=true", f"--output_dir={killed}"))
        for process in processes[1:]:
            assert process.wait(200) == 0, process.stderr.read()
    finally:
        for process in processes:
            process.kill()
    assert differences(final_state(killed), final_state(whole)) == []
