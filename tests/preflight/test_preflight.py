"""A sound set-up passes the preflight, and each thing that cannot work is told in a sentence."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preflight_problems import (
    ACTION,
    EXECUTED,
    KINDS,
    STATE,
    make_policy,
    make_replay,
    plan_of,
    reader_of,
)
from torch import Tensor

from vla_trqam.data.replay import Replay
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.errors import UserError
from vla_trqam.methods.trqam import TRQAMConfig
from vla_trqam.preflight.checks import RewardSummary, Share, preflight, preflight_machine
from vla_trqam.preflight.prefixes import PrefixCost, PrefixPlan
from vla_trqam.preflight.report import Finding, PreflightReport
from vla_trqam.preflight.tables import FAR_OUT, _misfits, _woken

NAMES = {
    *("dimensions", "cameras", "reward", "chunks", "time direction", "base"),
}
MACHINE = {
    *("outliers", "statistics", "frames", "instructions"),
    *("parameters", "observation", "prefixes", "gradient", "memory", "disk"),
}


@pytest.fixture
def policy() -> Any:
    return make_policy()


def look(
    policy: Any,
    replay: Replay,
    *,
    reward: RewardSpec = RewardSpec("sparse"),  # noqa: B008 - frozen
    chunk_length: int = EXECUTED,
    **changes: Any,
) -> PreflightReport:
    sampler = replay.sampler(
        chunk_length=chunk_length, discount=0.99, short_chunks="pad", reward=reward
    )
    return preflight(policy, replay, sampler, **changes)


def look_before(policy: Any, replay: Replay, **changes: Any) -> PreflightReport:
    """The part that comes before anything is decoded."""
    run = replay.path / "run" / "not" / "yet"
    settings = {"share": Share(4), "output_dir": run, "num_checkpoints": 2}
    settings["method"] = TRQAMConfig()
    settings["prefixes"] = lambda: PrefixPlan(True, True, PrefixCost(2**20, 2**10, 0.5), 100)
    settings["readers"] = {"dataset": reader_of(replay)}
    return preflight_machine(policy, plan=plan_of(replay, run / "replay"), **(settings | changes))


def only_failure(report: PreflightReport) -> Finding:
    (failure,) = report.failures
    assert failure.found
    assert failure.remedy
    with pytest.raises(UserError, match=re.escape(f"{failure.found}. Right would be: ")):
        report.raise_on_failure()
    return failure


# Sound.


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_set_up_passes(tmp_path: Path, kind: str, lora: bool) -> None:
    policy, replay = make_policy(kind, lora=lora), make_replay(tmp_path / "replay")
    for report, names in ((look_before(policy, replay), MACHINE), (look(policy, replay), NAMES)):
        assert report.failures == ()
        assert report.not_run == ()
        assert {finding.name for finding in report.findings} == names
        report.raise_on_failure()
        assert len(report.lines()) == len(names)
        assert all(line.startswith("ok ") for line in report.lines())


@pytest.mark.slow
def test_looking_changes_nothing(policy: Any, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    generator = torch.get_rng_state()
    replay = make_replay(tmp_path / "replay")
    look_before(policy, replay)
    look(policy, replay)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())
    assert all(p.grad is None for p in policy.parameters())
    assert not (tmp_path / "replay" / "run").exists()


# Data.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"state_scale": 1000.0}, r"observation.state\[0\] lies from -\d.* \(MEAN_STD\)"),
        ({"action_scale": 1000.0}, r"action\[2\] lies from -\d.* more than 5 from the middle"),
        ({"state_scale": 0.001}, r"observation.state hardly moves: .* at most 0.00.* in 5 of 5"),
    ],
)
def test_data_in_other_units_is_refused(
    policy: Any, tmp_path: Path, changes: dict[str, float], says: str
) -> None:
    report = look_before(policy, make_replay(tmp_path / "replay", **changes))
    failure = only_failure(report)
    assert failure.name == "statistics"
    assert re.search(says, failure.found)
    assert "instructions" in report.not_run
    assert any(line.startswith("-  ") and "not run" in line for line in report.lines())


@pytest.mark.slow
def test_other_units_of_a_second_dataset_show(policy: Any, tmp_path: Path) -> None:
    """Of which a large first one would hide them."""
    first = make_replay(tmp_path / "first", success=(True, False) * 10)
    second = make_replay(tmp_path / "second", state_scale=1000.0)
    readers = {"dataset": reader_of(first), "dataset_2": reader_of(second)}
    failure = only_failure(look_before(policy, first, readers=readers))
    assert failure.name == "statistics of dataset_2"


def test_radians_hardly_move_where_degrees_are_known() -> None:
    """A gripper has the same unit in both; an arm at rest is a part of the dimensions alone."""
    generator = torch.Generator().manual_seed(0)
    degrees = torch.rand(1000, 7, generator=generator) * 180 - 90
    radians = torch.cat([degrees[:, :6].deg2rad(), degrees[:, 6:]], dim=1)
    resting = degrees * torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    mean, std = degrees.mean(dim=0), degrees.std(dim=0)
    found = [
        list(_misfits("action", data, (data - mean) / std, "MEAN_STD"))
        for data in (degrees, radians, resting)
    ]
    assert (found[0], found[2]) == ([], [])
    assert len(found[1]) == 1
    assert found[1][0].endswith("at most 0.017 in 6 of 7 dimensions")
    # Of a humanoid's 26 joints one arm moves.
    many = torch.randn(1000, 26, generator=generator) * (torch.arange(26) < 7)
    assert list(_misfits("action", many, many, "MEAN_STD")) == []


def test_a_dimension_with_equal_quantiles_did_not_stand_still() -> None:
    raw = torch.tensor([[0.0], [0.5]])
    (said,) = _woken("action", raw, raw * 1e8, "QUANTILES", [0])
    assert said.startswith(
        "action[0] has equal quantiles in the policy's statistics, for it hardly ever moved, and "
        "lies from 0 to 0.5 here"
    )
    (said,) = _woken("action", raw, raw * 1e8, "MIN_MAX", [0])
    assert said.startswith("action[0] stood still in the policy's training and lies from 0 to 0.5")


@pytest.mark.parametrize(("share", "fits"), [(0.06, True), (0.4, False)])
def test_a_tail_far_out_fits_and_other_units_do_not(share: float, fits: bool) -> None:
    normalized = torch.zeros(100, 2)
    normalized[:, 0] = torch.linspace(-1.0, 1.0, 100)
    normalized[: round(100 * share), 1] = 6.0
    assert (not list(_misfits("observation.state", normalized, normalized, "MEAN_STD"))) == fits


@pytest.mark.parametrize("mode", FAR_OUT)
def test_data_fits_the_statistics_that_were_made_of_it(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(4000, 1, generator=generator)
    gripper = torch.where(gaussian > 1.5, 1.0, -1.0)
    heavy = gaussian / torch.randn(4000, 1, generator=generator)  # Cauchy
    data = 7.0 + 3.0 * torch.cat([gaussian, gripper, heavy], dim=1)
    middle, half = _middle_and_half_range(data, mode)
    assert list(_misfits("action", data, (data - middle) / half, mode)) == []
    assert len(list(_misfits("action", data, (10 * data - middle) / half, mode))) >= 2


def _middle_and_half_range(data: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """What LeRobot's normalisation takes off, and divides by."""
    if mode == "MEAN_STD":
        return data.mean(dim=0), data.std(dim=0, correction=0)
    share = {"QUANTILES": 0.01, "QUANTILE10": 0.1, "MIN_MAX": 0.0}[mode]
    low, high = (torch.quantile(data, q, dim=0) for q in (share, 1.0 - share))
    return (low + high) / 2, (high - low) / 2


@pytest.mark.slow
def test_a_dimension_without_spread_is_told_and_not_judged(policy: Any, tmp_path: Path) -> None:
    for pipeline in (policy.processors.before, policy.processors.after):
        for step in pipeline.steps:
            if hasattr(step, "stats"):
                step.stats["action"]["std"][1] = 0.0
                step._tensor_stats["action"]["std"][1] = 0.0
    replay = make_replay(tmp_path / "replay")
    failure = only_failure(look_before(policy, replay))
    assert "action[1] stood still in the policy's training and lies from -" in failure.found
    (mean,) = (s.stats["action"]["mean"][1] for s in pipeline.steps if hasattr(s, "stats"))
    reader = reader_of(replay)
    reader.row_numbers().actions[:, 1] = float(mean)
    report = look_before(policy, replay, readers={"dataset": reader})
    (found,) = [f.found for f in report.findings if f.name == "statistics"]
    assert "not judged, for its statistics have no spread: action[1]" in found
    assert "at most 0.0% beyond 5 (action[0])" in found
    assert report.failures == ()


@pytest.mark.slow
def test_a_camera_that_the_host_does_without_is_told(tmp_path: Path) -> None:
    policy = make_policy()
    features = policy.host.config.input_features
    features["observation.images.wrist"] = features["observation.images.top"]
    report = look(policy, make_replay(tmp_path / "replay"))
    assert report.failures == ()
    (found,) = [f.found for f in report.findings if f.name == "cameras"]
    assert found == "observation.images.top 32x32 uint8; masked: observation.images.wrist"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "found", "right"),
    [
        ({"camera": "side"}, r"looks through observation.images.top; the data has .*side", "with"),
        ({"image": (32, 32, 1)}, r"images.top has 1 channels in the data", "top with 3"),
    ],
)
def test_missing_cameras_and_channels_are_refused(
    policy: Any, tmp_path: Path, changes: dict[str, Any], found: str, right: str
) -> None:
    failure = only_failure(look(policy, make_replay(tmp_path / "replay", **changes)))
    assert failure.name == "cameras"
    assert re.search(found, failure.found)
    assert right in failure.remedy


@pytest.mark.slow
def test_images_of_another_size_are_told_and_resized_by_the_policy(
    policy: Any, tmp_path: Path
) -> None:
    report = look(policy, make_replay(tmp_path / "replay", image=(48, 40, 3)))
    assert report.failures == ()
    assert any("48x40 uint8, trained on 32x32: resized" in line for line in report.lines())


@pytest.mark.slow
def test_other_dimensions_are_refused(policy: Any, tmp_path: Path) -> None:
    report = look(policy, make_replay(tmp_path / "replay", action_dim=7))
    failure = only_failure(report)
    assert failure.found == "action has 7 dimensions in the data"
    assert failure.remedy == "action of 3, as the policy was trained"
    assert "time direction" in report.not_run


@pytest.mark.slow
def test_one_process_may_have_failures_only(policy: Any, tmp_path: Path) -> None:
    replays = [make_replay(tmp_path / "a", success=(False,)), make_replay(tmp_path / "b")]
    parts = [
        RewardSummary.of(
            r,
            r.sampler(
                chunk_length=EXECUTED,
                discount=0.9,
                short_chunks="pad",
                reward=RewardSpec("sparse"),
            ),
        )
        for r in replays
    ]
    joined = RewardSummary.joined(parts)
    assert joined == RewardSummary("sparse", 0.0, 1.0, episodes=4, successes=2, terminated=2)
    assert only_failure(look(policy, replays[0])).name == "reward"
    assert look(policy, replays[0], rewards=joined).failures == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "says"),
    [("sparse", "the reward 0"), ("success_minus_one", "the reward -1"), ("column", "reward 0")],
)
def test_a_reward_that_tells_nothing_is_refused(
    policy: Any, tmp_path: Path, kind: Any, says: str
) -> None:
    replay = make_replay(tmp_path / "replay", success=(False, False))
    failure = only_failure(look(policy, replay, reward=RewardSpec(kind)))
    assert failure.name == "reward"
    assert says in failure.found
    assert "0 of 2 episodes succeed" in failure.found


@pytest.mark.slow
def test_chunks_that_no_episode_holds_are_refused(policy: Any, tmp_path: Path) -> None:
    replay = make_replay(tmp_path / "replay", steps=3, success=(False, False))
    report = look(policy, replay, reward=RewardSpec("column"))
    failure = next(f for f in report.failures if f.name == "chunks")
    assert "no chunk of 4" in failure.found


@pytest.mark.slow
def test_frames_between_decisions_are_refused_of_each_dataset(policy: Any, tmp_path: Path) -> None:
    """Else a sparse one beside a dense one keeps nothing but the ends of its successes."""
    dense = make_replay(tmp_path / "dense", every=1, success=(True, False) * 10)
    sparse = make_replay(tmp_path / "sparse", every=3)
    readers = {"dataset": reader_of(dense), "dataset_2": reader_of(sparse)}
    failure = only_failure(look_before(policy, dense, readers=readers))
    assert failure.name == "frames of dataset_2"
    assert failure.found == "frames lie 3 steps apart, 4 actions are executed"


@pytest.mark.slow
def test_a_part_of_a_chunk_may_be_executed(policy: Any, tmp_path: Path) -> None:
    policy.take_executed_length(2)
    replay = make_replay(tmp_path / "replay", every=2)
    reports = look(policy, replay, chunk_length=2), look_before(policy, replay)
    assert not reports[0].failures + reports[1].failures
    found = {f.name: f.found for report in reports for f in report.findings}
    assert found["chunks"].startswith("2 of 4 actions are executed; ")
    assert found["frames"].startswith("every 2 steps in 3 episodes")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_instructions_that_would_be_cut_are_refused(kind: str, tmp_path: Path) -> None:
    """What is counted is what the preprocessor makes of it, without its cut."""
    policy = make_policy(kind)
    (step,) = [s for s in policy.processors.before.steps if hasattr(s, "input_tokenizer")]
    task = "put the " + 40 * "very " + "red cube on the plate"
    replay = make_replay(tmp_path / "replay", task=task)
    rows = reader_of(replay).row_numbers().states
    counted = policy.processors.prompt_lengths([task], torch.from_numpy(rows[:1]))
    step.max_length = max(counted.lengths) + 20
    told = policy.processors.observe(replay.observation_at(np.array([0])))
    assert told["observation.language.attention_mask"].sum() == counted.lengths[0]
    step.max_length = min(counted.lengths) - 20
    report = look_before(policy, replay)
    failure = next(failure for failure in report.failures if failure.name == "instructions")
    assert failure.found.startswith(f"{task!r} becomes ")
    assert failure.found.endswith(f"what is beyond {step.max_length} is cut")


# Fields.


@contextmanager
def changed_field(policy: Any, change: Callable[..., Tensor]) -> Iterator[None]:
    family = policy.family
    stock = family.velocity
    family.velocity = lambda host, x, tau, condition: change(
        lambda x, tau: stock(host, x, tau, condition), x, tau
    )
    yield
    del family.velocity


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v, x, tau: -v(x, tau), "with its sign reversed it would agree"),
        (lambda v, x, tau: v(x, 1.0 - tau), "with its time reversed it would agree"),
        (lambda v, x, tau: 1.1 * v(x, tau), "allowed 0.00"),
    ],
)
def test_a_field_that_runs_another_way_is_refused(
    tmp_path: Path, kind: str, change: Any, says: str
) -> None:
    policy = make_policy(kind)
    with changed_field(policy, change):
        report = look(policy, make_replay(tmp_path / "replay"))
    failure = next(f for f in report.failures if f.name == "time direction")
    assert says in failure.found


@pytest.mark.slow
def test_a_tuned_field_that_starts_away_from_the_base_is_refused_unless_resumed(
    policy: Any, tmp_path: Path
) -> None:
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
    replay = make_replay(tmp_path / "replay")
    failure = only_failure(look(policy, replay))
    assert failure.name == "base"
    assert "so the KL does not start at 0" in failure.found
    assert look(policy, replay, resumed=True).failures == ()


@pytest.mark.slow
def test_a_full_disk_is_refused_before_it_is_full(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = make_replay(tmp_path / "replay")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    failure = only_failure(look_before(policy, replay))
    assert failure.name == "disk"
    assert "; free 1000 B at " in failure.found
    assert "(--replay.frames=dataset), no prefixes (--prefix_cache=none), fewer" in failure.remedy


# The report.


def test_all_failures_are_told_at_once() -> None:
    report = PreflightReport(
        (
            Finding("reward", "0 to 1"),
            Finding.failure("cameras", "none", "one at least"),
            Finding.failure("disk", "1 B free", "2 B"),
        ),
        ("memory",),
    )
    assert report.lines() == [
        "ok    reward   0 to 1",
        "FAIL  cameras  none",
        "               -> one at least",
        "FAIL  disk     1 B free",
        "               -> 2 B",
        "-     memory   not run: it needs the above",
    ]
    with pytest.raises(UserError) as error:
        report.raise_on_failure()
    assert str(error.value) == (
        "training cannot work, 2 things to change first:\n"
        "- cameras: none. Right would be: one at least\n"
        "- disk: 1 B free. Right would be: 2 B"
    )


@pytest.mark.slow
def test_an_empty_replay_is_refused(policy: Any, tmp_path: Path) -> None:
    replay = Replay.create(
        tmp_path, observation_dim=STATE, action_dim=ACTION, cameras={"top": (8, 8, 3)}, capacity=9
    )
    with pytest.raises(UserError, match="is empty: training begins with data"):
        look(policy, replay)
