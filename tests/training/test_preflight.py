"""A sound set-up passes the preflight, and each thing that cannot work is told in a sentence."""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vla_trqam.data.feature_cache import FeatureCache
from vla_trqam.data.frame_replay import FrameEpisode, FrameReplay
from vla_trqam.data.sampling import RewardSpec
from vla_trqam.errors import UserError
from vla_trqam.training import preflight_memory as memory
from vla_trqam.training.preflight import preflight
from vla_trqam.training.preflight_data import FAR_OUT, _misfits
from vla_trqam.training.preflight_report import Finding, PreflightReport

STATE, ACTION, EXECUTED, STEPS = 5, 3, 4, 8
KINDS = ("tiny_pi0", "tiny_pi05", "smolvla", "multi_task_dit")
NAMES = {
    *("dimensions", "cameras", "statistics", "reward", "chunks", "parameters", "observation"),
    *("time direction", "base", "gradient", "memory", "disk"),
}


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A fresh tiny policy of a kind; each is made once."""
    from vla_trqam.adapters.loading import load_policy
    from vla_trqam.adapters.lora import LoRASettings
    from vla_trqam.adapters.tiny import checkpoints as tiny

    folder = tmp_path_factory.mktemp("policies")
    features = tiny.flow_features(STATE, ACTION)
    small = {"chunk_size": EXECUTED, "n_action_steps": EXECUTED}
    dit = {"horizon": EXECUTED, "n_action_steps": EXECUTED, "num_integration_steps": 2}
    configs: dict[str, Callable[[], Any]] = {
        "tiny_pi0": lambda: tiny.tiny_pi0_config(features, num_inference_steps=2, **small),
        "tiny_pi05": lambda: tiny.tiny_pi05_config(features, num_inference_steps=2, **small),
        "smolvla": lambda: tiny.tiny_smolvla_config(
            features, folder / "smolvlm", num_steps=2, **small
        ),
        "multi_task_dit": lambda: tiny.tiny_multi_task_dit_config(features, folder / "clip", **dit),
    }
    made: dict[tuple[str, bool], Any] = {}

    def write(kind: str) -> None:
        tiny.write_checkpoint(configs[kind](), tiny.unit_stats(features), folder / kind)
        # Where the initialisation puts zeros, the time would not matter.
        weights = load_file(folder / kind / "model.safetensors")
        generator = torch.Generator().manual_seed(1)
        for name in sorted(weights):
            if weights[name].is_floating_point() and not bool(weights[name].any()):
                weights[name] = 0.1 * torch.randn(weights[name].shape, generator=generator)
        save_file(weights, folder / kind / "model.safetensors", metadata={"format": "pt"})

    def make(kind: str = "tiny_pi0", *, lora: bool = True) -> Any:
        if not (folder / kind).exists():
            write(kind)
        if (kind, lora) not in made:
            settings = LoRASettings(r=2) if lora else None
            made[kind, lora] = load_policy(folder / kind, lora=settings)
        return copy.deepcopy(made[kind, lora])

    return make


@pytest.fixture
def policy(load: Callable[..., Any]) -> Any:
    return load()


def make_replay(
    path: Path,
    *,
    action_dim: int = ACTION,
    camera: str = "top",
    image: tuple[int, int, int] = (32, 32, 3),
    every: int = EXECUTED,
    steps: int = STEPS,
    success: tuple[bool, ...] = (True, False, True),
    state_scale: float = 0.5,
    action_scale: float = 0.5,
) -> FrameReplay:
    """Episodes of noise that fits the policy's statistics; success ends an episode."""
    generator = np.random.default_rng(0)
    replay = FrameReplay.create(
        path, state_dim=STATE, action_dim=action_dim, cameras={camera: image}, capacity=200
    )
    observed = np.arange(steps + 1) % every == 0
    for succeeds in success:
        images = generator.integers(0, 256, (int(observed.sum()), *image), dtype=np.uint8)
        rewards = np.zeros(steps, np.float32)
        rewards[-1] = succeeds
        episode = FrameEpisode(
            states=state_scale * generator.normal(size=(steps + 1, STATE)).astype(np.float32),
            images={camera: images},
            observed=observed,
            actions=action_scale * generator.normal(size=(steps, action_dim)).astype(np.float32),
            rewards=rewards,
            terminated=succeeds,
            truncated=not succeeds,
            success=succeeds,
            task="lift the cube",
        )
        replay.add_episode(episode, source="test")
    return replay


def look(
    policy: Any,
    replay: FrameReplay,
    *,
    reward: RewardSpec = RewardSpec("sparse"),  # noqa: B008 - frozen
    chunk_length: int = EXECUTED,
    **changes: Any,
) -> PreflightReport:
    sampler = replay.sampler(
        chunk_length=chunk_length, discount=0.99, short_chunks="pad", reward=reward
    )
    settings = {
        "batch_size": 4,
        "output_dir": replay.path / "run" / "not" / "yet",
        "execution_horizon": EXECUTED,
        "num_checkpoints": 2,
    }
    return preflight(policy, replay, sampler, **(settings | changes))


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
def test_a_sound_set_up_passes(load: Any, tmp_path: Path, kind: str, lora: bool) -> None:
    report = look(load(kind, lora=lora), make_replay(tmp_path / "replay"))
    assert report.failures == ()
    assert report.not_run == ()
    assert {finding.name for finding in report.findings} == NAMES
    report.raise_on_failure()
    assert len(report.lines()) == len(NAMES)
    assert all(line.startswith("ok ") for line in report.lines())


@pytest.mark.slow
def test_looking_changes_nothing(policy: Any, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    generator = torch.get_rng_state()
    look(policy, make_replay(tmp_path / "replay"))
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
        ({"state_scale": 0.001}, r"observation.state hardly moves: .* at most 0.00"),
    ],
)
def test_data_in_other_units_is_refused(
    policy: Any, tmp_path: Path, changes: dict[str, float], says: str
) -> None:
    report = look(policy, make_replay(tmp_path / "replay", **changes))
    failure = only_failure(report)
    assert failure.name == "statistics"
    assert re.search(says, failure.found)
    assert {"observation", "time direction", "memory", "disk"} <= set(report.not_run)
    assert any(line.startswith("-  ") and "not run" in line for line in report.lines())


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
def test_a_dimension_without_spread_is_told(policy: Any, tmp_path: Path) -> None:
    step = policy.processors.normalizer
    step.stats["action"]["std"][1] = 0.0
    step._tensor_stats["action"]["std"][1] = 0.0
    replay = make_replay(tmp_path / "replay")
    failure = only_failure(look(policy, replay))
    assert "action[1] lies from" in failure.found


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
    assert "statistics" in report.not_run


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
@pytest.mark.parametrize(
    ("data", "settings", "found"),
    [
        ({"every": 3}, {}, "frames lie 3 steps apart, 4 actions are executed"),
        ({"every": 1}, {"chunk_length": 2}, "chunks of 2 steps are drawn, 4 are executed"),
        (
            {"steps": 3, "success": (False, False)},
            {"reward": RewardSpec("column")},
            "no chunk of 4",
        ),
    ],
)
def test_chunks_that_do_not_fit_are_refused(
    policy: Any, tmp_path: Path, data: dict[str, Any], settings: dict[str, Any], found: str
) -> None:
    report = look(policy, make_replay(tmp_path / "replay", **data), **settings)
    failure = next(f for f in report.failures if f.name == "chunks")
    assert found in failure.found


@pytest.mark.slow
def test_the_horizon_is_that_of_the_policys_config(policy: Any, tmp_path: Path) -> None:
    replay = make_replay(tmp_path / "replay", every=1)
    failure = only_failure(look(policy, replay, execution_horizon=2, chunk_length=2))
    assert "lerobot-eval would run another policy" in failure.found
    assert failure.remedy == "--policy.n_action_steps=2"
    failure = only_failure(look(policy, replay, execution_horizon=9, chunk_length=4))
    assert "9 actions are executed of chunks of 4" in failure.found


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
    load: Any, tmp_path: Path, kind: str, change: Any, says: str
) -> None:
    policy = load(kind)
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


# What is trained, and what it takes.


@pytest.mark.slow
def test_trained_frozen_and_copied_parameters_are_counted(load: Any) -> None:
    adapters, full = load(lora=True), load(lora=False)
    trained = sum(p.numel() for p in adapters.trainable_parameters())
    found = memory.check_parameters(adapters).found
    assert f"adapters: {trained:,} trained" in found
    assert ", 0 copied for the base (0 B)" in found
    expert = sum(p.numel() for p in full.trainable_parameters())
    assert f"{expert:,} trained" in memory.check_parameters(full).found
    assert f"{expert:,} copied for the base" in memory.check_parameters(full).found


@pytest.mark.slow
def test_adapters_with_a_second_copy_and_nothing_trained_are_refused(load: Any) -> None:
    policy = load()
    policy.base = copy.deepcopy(load(lora=False).base)
    assert "the base is the adapters switched off" in memory.check_parameters(policy).remedy
    policy = load().requires_grad_(False)
    assert not memory.check_parameters(policy).ok
    assert "0 trained" in memory.check_parameters(policy).found


def test_a_gradient_that_does_not_arrive_is_refused() -> None:
    policy: Any = SimpleNamespace(trainable_parameters=lambda: [torch.zeros(1)] * 3)
    good = memory.DryPass(prefix=0, activations=0, reached=2, finite=True)
    assert memory.check_gradient(good, policy).found.endswith("reaches 2 of 3 trained tensors")
    for reached, finite in ((0, True), (3, False)):
        dry = memory.DryPass(prefix=0, activations=0, reached=reached, finite=finite)
        assert not memory.check_gradient(dry, policy).ok


def test_saved_bytes_are_what_autograd_keeps() -> None:
    layer, x = nn.Linear(8, 16), torch.randn(4, 8)
    with memory.saved_bytes({p.untyped_storage().data_ptr() for p in layer.parameters()}) as saved:
        y = torch.sin(layer(x)).sum()  # the layer keeps x, the sine its argument
    y.backward()
    assert sum(saved.values()) == (4 * 8 + 4 * 16) * 4
    assert layer.weight.grad is not None


def test_the_batch_that_is_said_to_fit_does() -> None:
    needs = memory.Memory(weights=10**6, gradients=100, optimizer=200, activations=50, prefix=5)
    failure = memory.check_memory(needs, 1000, 64, "cpu")
    assert not failure.ok
    assert "activations of 64 3.12 KiB" in failure.found
    fits = int(re.findall(r"--batch_size=(\d+)", failure.remedy)[0])
    assert fits == (1000 - 300) // 60
    assert memory.check_memory(needs, 1000, fits, "cpu").ok
    assert not memory.check_memory(needs, 1000, fits + 1, "cpu").ok
    assert "adapters instead" in memory.check_memory(needs, 310, 1, "cpu").remedy
    assert "is not known" in memory.check_memory(needs, None, 1, "mps").found


@pytest.mark.slow
def test_memory_counts_adam_and_the_critic(policy: Any, tmp_path: Path) -> None:
    replay, critic = make_replay(tmp_path / "replay"), nn.Linear(10, 10)
    dry = memory.dry_pass(policy, replay)
    alone, both = (memory.measure_memory(policy, c, dry) for c in (None, critic))
    trained = sum(p.numel() for p in policy.trainable_parameters())
    assert alone.gradients == 4 * trained
    assert both.gradients == 4 * (trained + 110)
    assert both.optimizer == 2 * both.gradients
    assert both.weights == alone.weights + 440
    packed = policy.packed(policy.processors.observe(replay.observation_at(np.array([0]))))
    assert dry.prefix == sum(value.nbytes for value in packed.values())
    assert dry.activations > 0


def test_free_memory_is_what_the_system_and_a_containers_limit_leave(tmp_path: Path) -> None:
    available = memory.available_memory(torch.device("cpu"))
    assert available is None or 0 < available <= os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    )
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 50\ninactive_file 200\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_room(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._cgroup_room(tmp_path) == 1000 - 700 + 250
    assert memory._cgroup_room(tmp_path / "none") is None


@pytest.mark.slow
def test_a_full_disk_is_refused_before_it_is_full(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = make_replay(tmp_path / "replay")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    failure = only_failure(look(policy, replay))
    assert failure.name == "disk"
    assert "; free 1000 B at " in failure.found
    assert "fewer checkpoints" in failure.remedy


@pytest.mark.slow
def test_disk_counts_checkpoints_the_replays_rest_and_a_cache_to_come(
    policy: Any, tmp_path: Path
) -> None:
    replay = make_replay(tmp_path / "replay")
    dry = memory.dry_pass(policy, replay)
    needs = memory.measure_memory(policy, None, dry)

    def disk(count: int, caches: bool) -> memory.Disk:
        return memory.measure_disk(
            policy, replay, None, needs, num_checkpoints=count, caches=caches
        )

    trained = sum(p.numel() for p in policy.trainable_parameters()) * 4
    assert disk(3, False).checkpoints - disk(2, False).checkpoints == trained * 3
    whole = memory.module_bytes(policy.model)
    assert disk(0, False).checkpoints == whole
    assert disk(0, True).replay - disk(0, False).replay == dry.prefix * replay.frame_capacity
    frame = 32 * 32 * 3
    assert disk(0, False).replay > (replay.frame_capacity - replay.num_frames - 2) * frame
    FeatureCache(replay, policy.packed, fingerprint="one").update()
    assert disk(0, True).replay > disk(0, False).replay * 0.99


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
    replay = FrameReplay.create(
        tmp_path, state_dim=STATE, action_dim=ACTION, cameras={"top": (8, 8, 3)}, capacity=9
    )
    with pytest.raises(UserError, match="is empty: training begins with data"):
        look(policy, replay)
