"""What a result was made with: command line, versions, machine, commit."""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import vla_trqam

PACKAGES = (
    *("vla-trqam", "torch", "numpy", "accelerate", "lerobot", "transformers", "robomimic"),
    *("robosuite", "ogbench", "gym-pusht", "metaworld", "mujoco", "gymnasium"),
)


def command_line() -> str:
    """The command that started this process, ready for a shell; Python by its bare name."""
    interpreter, *arguments = sys.orig_argv
    return shlex.join([Path(interpreter).name, *arguments])


def package_versions() -> dict[str, str]:
    """Version of Python and of each library that decides a result; "not installed" where absent."""
    import torch

    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    # torch's own version tells its build as well (2.11.0+cu130), which decides the numbers.
    return versions | {"torch": str(torch.__version__)}


def machine() -> dict[str, str | int]:
    """Operating system, processor cores, threads in use, and the CUDA device."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": allowed_cores(),
        "torch_threads": torch.get_num_threads(),
        "cuda_device": device,
    }


def git_commit(folder: Path | None = None) -> str | None:
    """Commit that the code in `folder` was run from; the package's own folder unless given.

    Returns:
        The hash, with "and uncommitted changes" where tracked files differ from it; None when the
        code is not under git's control (an installed package, or no git on this machine).
    """
    folder = Path(vla_trqam.__file__).parent if folder is None else folder
    # An installed copy may lie inside somebody else's repository: only tracked files count.
    if not _git(folder, "ls-files", "."):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} and uncommitted changes" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command in `folder`; empty when it fails or there is no git."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def allowed_cores() -> int:
    """Cores that this process may use; a container may allow fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
