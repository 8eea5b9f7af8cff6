"""LeRobot imports every distribution named `lerobot_policy_*`; this one brings two policy types.

`tiny_pi0` and `tiny_pi05` have the forward code of pi0 and pi05 and free widths. A checkpoint of
theirs, whole or an adapter, then works as `--policy.path` of any LeRobot command.
"""

from vla_trqam.adapters.tiny.configuration_tiny_pi0 import TinyPI0Config
from vla_trqam.adapters.tiny.configuration_tiny_pi05 import TinyPI05Config

__all__ = ["TinyPI0Config", "TinyPI05Config"]
