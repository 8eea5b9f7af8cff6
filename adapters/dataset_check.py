"""Whether a dataset is one that a policy, as it was loaded, can learn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lerobot.configs.types import FeatureType
from lerobot.utils.constants import ACTION, OBS_STATE
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.adapters.processors import Processors

from vla_trqam.errors import UserError

FAR = 10.0
"""A dataset whose mean lies so far out, normalised, has other units or is of another robot."""


def check_against_dataset(
    policy: LeRobotFlowPolicy,
    features: Mapping[str, Mapping[str, Any]],
    stats: Mapping[str, Mapping[str, Any]] | None = None,
    rename: Mapping[str, str] | None = None,
    *,
    name: str = "this dataset",
) -> None:
    """Raises a UserError with a sentence for each of :func:`dataset_problems`, if there are any."""
    problems = list(dataset_problems(policy, features, stats, rename))
    if problems:
        raise UserError(f"{name} does not fit the policy: " + "; ".join(problems))


def dataset_problems(
    policy: LeRobotFlowPolicy,
    features: Mapping[str, Mapping[str, Any]],
    stats: Mapping[str, Mapping[str, Any]] | None = None,
    rename: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """A sentence for each thing that would go wrong, or go wrong silently.

    Args:
        policy: with its processors.
        features: the dataset's, by key: ``dtype`` and ``shape`` (``LeRobotDataset.meta.features``).
        stats: the dataset's statistics, by key and name, if its numbers are to be compared.
        rename: from the dataset's keys to the policy's, as LeRobot's ``rename_map``.
    """
    names = rename or {}
    renamed = {names.get(key, key): value for key, value in features.items()}
    yield from _missing_cameras(policy, renamed)
    yield from _missing_columns(policy.host.config, renamed)
    yield from _wrong_shapes(policy.host.config, renamed)
    if policy.processors is None:
        yield "the policy has no processors, so nothing would be normalised"
        return
    yield from policy.processors.statistics_problems()
    for key, values in (stats or {}).items():
        yield from _far_away(policy.processors, names.get(key, key), values)


def _missing_cameras(
    policy: LeRobotFlowPolicy, features: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    pictures = sorted(k for k, v in features.items() if v["dtype"] in ("image", "video"))
    cameras = policy.cameras(pictures)
    wrong = [key for key in cameras.missing if key in features]
    for key in wrong:
        yield f"{key} is {features[key]['dtype']} in the dataset, not an image or video"
    for key in () if cameras.fit else cameras.missing:
        if key not in wrong:
            yield (
                f"the policy looks through {key}, the dataset's cameras are "
                f"{', '.join(pictures) or 'none'} (a --rename_map maps its names to the policy's)"
            )


def _missing_columns(config: Any, features: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for key in (OBS_STATE, ACTION):
        wanted = key == ACTION or config.robot_state_feature is not None
        if wanted and key not in features:
            yield f"the dataset has no {key!r}; it holds {sorted(features)}"


def _wrong_shapes(config: Any, features: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for key, feature in ((OBS_STATE, config.robot_state_feature), (ACTION, config.action_feature)):
        if feature is None or key not in features:
            continue
        there, here = tuple(features[key]["shape"]), tuple(feature.shape)
        if there != here:
            yield f"{key} has shape {there} in the dataset; the policy was trained with {here}"


def _far_away(processors: Processors, key: str, values: Mapping[str, Any]) -> Iterator[str]:
    feature = processors.normalizer.features.get(key)
    if feature is None or "mean" not in values or feature.type is FeatureType.VISUAL:
        return
    mean = torch.as_tensor(values["mean"], dtype=torch.float32)
    if mean.shape != tuple(feature.shape):
        return  # said already
    normalized = processors.normalize(key, mean.unsqueeze(0))[0]
    normalized[processors.flat(key).nonzero().flatten()] = 0.0
    worst = int(normalized.abs().argmax())
    if not float(normalized[worst].abs()) < FAR:
        yield (
            f"the mean of {key}[{worst}] is {float(mean[worst]):.4g} in the dataset, "
            f"{float(normalized[worst]):.3g} in the policy's normalised units: other units or "
            "another robot"
        )
