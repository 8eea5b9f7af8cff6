"""The official robomimic datasets by name, for those who have the network.

They lie on the Hugging Face Hub as files for robosuite 1.5, with low-dimensional observations. (The
v1.4.1 files of the same demonstrations are only on robomimic's own server, and no environment of
robosuite 1.5 can be built from them.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vla_trqam.errors import UserError

REPO_ID = "robomimic/robomimic_datasets"
_HUB_TIMEOUT = 10.0  # seconds until we say that the Hub does not answer
_ARM_KEYS = ("eef_pos", "eef_quat", "gripper_qpos")


@dataclass(frozen=True)
class OfficialDataset:
    """One file on the Hub.

    Attributes:
        name: task and kind, such as "lift/ph". Kinds: `ph` 200 demos of one proficient human, `mh`
            300 of six humans, better and worse, `mg` rollouts of SAC checkpoints with many
            failures, `paired` 100 good and 100 failed attempts from the same states.
        filename: path inside the repository.
        horizon: steps that robomimic gives a rollout of this task.
        obs_keys: low-dimensional observations of the study, for `read_robomimic`.
    """

    name: str
    filename: str
    horizon: int
    obs_keys: tuple[str, ...]


# kind -> file, and the rollout horizon of every task that has it (robomimic's own registry).
_RELEASES: dict[str, tuple[str, dict[str, int]]] = {
    "ph": (
        "low_dim_v15.hdf5",
        {"lift": 400, "can": 400, "square": 400, "transport": 700, "tool_hang": 700},
    ),
    "mh": ("low_dim_v15.hdf5", {"lift": 500, "can": 500, "square": 500, "transport": 1100}),
    "mg": ("low_dim_sparse_v15.hdf5", {"lift": 400, "can": 400}),
    "paired": ("low_dim_v15.hdf5", {"can": 400}),
}


def _obs_keys(task: str) -> tuple[str, ...]:
    arms = ("robot0", "robot1") if task == "transport" else ("robot0",)
    return (*(f"{arm}_{key}" for arm in arms for key in _ARM_KEYS), "object")


OFFICIAL_DATASETS: dict[str, OfficialDataset] = {
    f"{task}/{kind}": OfficialDataset(
        f"{task}/{kind}", f"v1.5/{task}/{kind}/{file}", horizon, _obs_keys(task)
    )
    for kind, (file, horizons) in _RELEASES.items()
    for task, horizon in horizons.items()
}


def official_dataset(name: str) -> OfficialDataset:
    """The dataset of this name.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name not in OFFICIAL_DATASETS:
        known = ", ".join(sorted(OFFICIAL_DATASETS))
        raise UserError(f"There is no official dataset '{name}'; there are: {known}.")
    return OFFICIAL_DATASETS[name]


def download_official(
    name: str, *, cache_dir: str | Path | None = None, endpoint: str | None = None
) -> Path:
    """Path of an official dataset on this machine, downloaded unless the Hub's cache has it.

    Args:
        name: such as "lift/ph".
        cache_dir: where to keep it; the Hub's own cache by default.
        endpoint: address of the Hub; its own or that of `HF_ENDPOINT` by default.

    Raises:
        UserError: the name is unknown, or the Hub does not answer or refuses.
    """
    import httpx
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    dataset = official_dataset(name)
    file = dataset.filename
    try:
        return Path(
            hf_hub_download(
                REPO_ID, file, repo_type="dataset", cache_dir=cache_dir, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        pass  # not in the cache: download it
    try:
        # Asked first because it does not retry: the download itself insists for half a minute.
        url = hf_hub_url(REPO_ID, file, repo_type="dataset", endpoint=endpoint)
        get_hf_file_metadata(url, timeout=_HUB_TIMEOUT, endpoint=endpoint)
        return Path(
            hf_hub_download(
                REPO_ID, file, repo_type="dataset", cache_dir=cache_dir, endpoint=endpoint
            )
        )
    except (OSError, httpx.HTTPError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"The official dataset '{name}' cannot be had from the Hugging Face Hub ({reason}): "
            f"get {file} of the dataset {REPO_ID} in another way and name the file "
            "with --dataset.path."
        ) from error
