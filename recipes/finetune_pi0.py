"""Makes a π0 or π0.5 policy better with TRQAM; without arguments a tiny one, in Robomimic Lift.

accelerate launch -q recipes/finetune_pi0.py
accelerate launch -q recipes/finetune_pi0.py --policy.path=USER/PI0 --dataset.repo_id=USER/DATA
accelerate launch -q recipes/finetune_pi0.py --resume=true --output_dir=outputs/...
"""

import sys
from pathlib import Path

import vla_trqam.data
from vla_trqam.jobs.vla import main

PACKED = Path(vla_trqam.data.__file__).with_name("lift_pi0")

if __name__ == "__main__":
    sys.exit(main(Path(__file__), PACKED))
