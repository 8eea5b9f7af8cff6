"""LeRobot imports every distribution named `lerobot_env_*`; this one brings `--env.type=robomimic`.

Where it is not installed as one, `--env.discover_packages_path=lerobot_env_robomimic` does the same
for any LeRobot command that is run beside this folder.
"""

from vla_trqam.envs.robomimic.lerobot_env import RobomimicEnvConfig

__all__ = ["RobomimicEnvConfig"]
