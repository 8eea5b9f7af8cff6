r"""Makes a SmolVLA policy better with TRQAM.

accelerate launch -q recipes/finetune_smolvla.py --policy.path=USER/SMOLVLA \
    --dataset.repo_id=USER/DATA
accelerate launch -q recipes/finetune_smolvla.py --preset=lift --policy.path=lift_smolvla/policy \
    --dataset.repo_id=local/lift --dataset.root=lift_smolvla/dataset  # of make_tiny_vla.py
accelerate launch -q recipes/finetune_smolvla.py --resume=true --output_dir=outputs/...
"""

import sys
from pathlib import Path

from vla_trqam.jobs.vla import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__), None))
