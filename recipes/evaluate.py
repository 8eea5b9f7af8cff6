"""Evaluates two policies on the same initial states: success, intervals, videos.

python recipes/evaluate.py --a=outputs/finetune_robomimic/DATE
python recipes/evaluate.py --a=outputs/RUN --b=outputs/OTHER_RUN --episodes=200 --videos=4
python recipes/evaluate.py --a=outputs/RUN/checkpoints/000500 --b=some/policy --output_dir=compared
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vla_trqam.jobs import evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return evaluation.main(Path(__file__).with_suffix(".yaml"), arguments)


if __name__ == "__main__":
    sys.exit(main())
