"""Runs that keep no prefixes, and runs that keep no frames: the same runs in less room."""

import errno
import json
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from toy_deaths import dies_at_call, dies_at_update, signalled_at_update
from toy_files import differences
from toy_images import SIZE, images_state, write_toy_dataset
from toy_task import Killed
from vla_runs import (
    Files,
    Whole,
    files,
    forgetful_pool,
    killed,
    main,
    no_conclusion,
    resume,
    tiny,
    whole_run,
    without_conclusion,
    without_simulator,
)
from vla_trqam.adapters.families.base import FlowFamily
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy

from vla_trqam.data import feature_cache
from vla_trqam.data.feature_cache import FRAME, FeatureCache
from vla_trqam.data.frame_files import CacheHeader, FrameHeader
from vla_trqam.data.replay import Replay
from vla_trqam.data.sources import base
from vla_trqam.data.sources.lerobot.source import LeRobotReader
from vla_trqam.engine.cached import Cached, CriticOnly
from vla_trqam.engine.folder.begun import Begun
from vla_trqam.engine.launch import FULL_DISK
from vla_trqam.errors import UserError
from vla_trqam.launched import launcher
from vla_trqam.preflight import prefixes

__all__ = ["files", "forgetful_pool", "no_conclusion", "tiny", "without_simulator"]  # fixtures
pytestmark = pytest.mark.slow

NONE, LENT = "--prefix_cache=none", "--replay.frames=dataset"
OFFLINE = ("--env.type=null", "--online.steps=0", "--base_episodes=0")
BATCH = 4


@pytest.fixture(scope="module")
def uncached(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole_run(tmp_path_factory.mktemp("uncached") / "run", [*files.flags(), NONE])


def test_only_what_the_critic_needs_is_kept(uncached: Whole) -> None:
    header = CacheHeader.read(uncached.folder / "replay")
    assert header is not None
    assert sorted(header.features) == ["first_chunks", "prefix.features"]
    assert header.num_frames == Replay.open(uncached.folder / "replay").num_frames
    assert json.loads((uncached.folder / "evaluation.json").read_text())


def passes(
    monkeypatch: pytest.MonkeyPatch, family: type[FlowFamily], learner: type
) -> list[list[int]]:
    """Rows of every pass of the prefix, by the learner's updates; the first list is before any."""
    found: list[list[int]] = [[]]
    encode, update = family.encode, learner.update

    def counted(self: Any, host: Any, observation: Any, layer: int) -> Any:
        found[-1].append(len(observation["observation.state"]))
        return encode(self, host, observation, layer)

    def noted(self: Any, *arguments: Any, **named: Any) -> None:
        update(self, *arguments, **named)
        found.append([])

    monkeypatch.setattr(family, "encode", counted)
    monkeypatch.setattr(learner, "update", noted)
    return found


def test_an_update_passes_its_batch_through_the_prefix_once(tiny, uncached, monkeypatch, tmp_path):
    """The critic's own batches not at all, and of the next frames those where no chunk begins."""
    found = passes(monkeypatch, type(uncached.policy.family), Cached)
    flags = ("--steps=4", "--critic.warmup_steps=2", f"--batch_size={BATCH}")
    assert tiny(tmp_path / "run", NONE, *OFFLINE, *flags) == 0
    # After the frames' own pass and the preflight, the batch of each update before it is made.
    own, ends = zip(*((sizes[0], sizes[1:]) for sizes in found[1:4]), strict=True)
    assert own == (BATCH,) * 3
    assert all(len(sizes) <= 1 and sum(sizes) < BATCH for sizes in ends)
    assert found[0][-1] == BATCH


def test_kept_or_computed_a_frames_prefix_is_the_same(uncached: Whole, files: Files) -> None:
    policy = uncached.policy
    assert isinstance(policy, LeRobotFlowPolicy)
    replay = Replay.open(uncached.folder / "replay")
    rows = replay.frame_index.rows_of_frames()[:5]
    kept = np.load(uncached.folder / "replay/cache.prefix.features.npy", mmap_mode="r")[:5]
    computed = policy.packed(replay.observation_at(rows))["prefix.features"].numpy()
    np.testing.assert_allclose(computed, kept, rtol=1e-5, atol=1e-6)


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "in the pass over all frames": lambda p: dies_at_call(p, FeatureCache, "_compute_batch", 0),
    "between an episode and its features": lambda p: dies_at_call(p, FeatureCache, "update", 4),
    "in a critic update": lambda p: dies_at_update(p, CriticOnly, 3),
    "in an online update": lambda p: dies_at_update(p, Cached, 7),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_without_prefixes_goes_on_to_the_same_bits(
    when, tiny, no_conclusion, uncached, tmp_path
):
    with killed(KILLS[when]):
        tiny(tmp_path / "run", NONE)
    assert resume(tmp_path / "run") == 0
    assert differences(images_state(tmp_path / "run"), without_conclusion(uncached.state)) == []


PART = 8
"""Frames of a batch of the pass, as many as go through the prefix together."""


@pytest.fixture(scope="module")
def in_parts(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """As :func:`uncached`; chunks that are drawn of another number of frames round otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        take_parts(patch)
        return whole_run(tmp_path_factory.mktemp("parts") / "run", [*files.flags(), NONE])


def take_parts(patch: pytest.MonkeyPatch) -> None:
    update = FeatureCache.update
    patch.setattr(FeatureCache, "update", lambda self, **k: update(self, batch_size=PART, **k))


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, FULL_DISK)


def ends_in_the_pass(patch: pytest.MonkeyPatch, death: Callable[[], BaseException]) -> None:
    """In its second batch."""
    compute, count = FeatureCache._compute_batch, 0

    def mortal(self: FeatureCache, seen: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise death()
        compute(self, seen)

    patch.setattr(FeatureCache, "_compute_batch", mortal)


def ends_in_the_reading(patch: pytest.MonkeyPatch, death: Callable[[], BaseException]) -> None:
    """Of the data, at the second episode."""
    add, count = Replay.add, 0

    def mortal(self: Replay, *episode: Any, **named: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise death()
        add(self, *episode, **named)

    patch.setattr(Replay, "add", mortal)


def rows_computed(patch: pytest.MonkeyPatch) -> list[int]:
    compute, found = FeatureCache._compute_batch, list[int]()

    def counted(self: FeatureCache, seen: Any) -> None:
        found.append(len(seen[FRAME]))
        compute(self, seen)

    patch.setattr(FeatureCache, "_compute_batch", counted)
    return found


@pytest.mark.parametrize("death", [Killed, KeyboardInterrupt, full_disk])
@pytest.mark.parametrize("end", [ends_in_the_pass, ends_in_the_reading])
def test_what_ends_a_run_before_its_first_checkpoint_costs_seconds_of_reading_and_of_the_pass(
    end, death, tiny, no_conclusion, in_parts, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    take_parts(monkeypatch)
    monkeypatch.setattr(feature_cache, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(base, "SAVED_EVERY", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        end(patch, death)
        if death is Killed:
            with pytest.raises(Killed):
                tiny(run, NONE)
        else:
            assert tiny(run, NONE) == (130 if death is KeyboardInterrupt else 2)
            assert f"; go on with: {shlex.join(launcher())} " in capsys.readouterr().err
    frames = num_frames(run)
    computed = rows_computed(monkeypatch)
    assert resume(run) == 0
    assert "with what had been read of its data" in capsys.readouterr().out
    assert not list(run.glob("before_restart_*/replay"))
    assert differences(images_state(run), without_conclusion(in_parts.state)) == []
    every = num_frames(run)
    assert sum(computed) == every - (PART if end is ends_in_the_pass else 0)
    assert 0 < frames < every


def num_frames(run: Path) -> int:
    return Replay.open(run / "replay").num_frames


def test_a_refusal_leaves_nothing_of_what_was_read(tiny, tmp_path, monkeypatch):
    ends_in_the_reading(monkeypatch, lambda: UserError("it cannot be"))
    assert tiny(tmp_path / "run", NONE) == 2
    assert not (tmp_path / "run").exists()


def test_where_prefixes_come_from_is_decided_once(
    tiny, no_conclusion, tmp_path, monkeypatch, capsys
):
    """A run that was killed while it read has less room when it goes on, by what it read."""
    run = tmp_path / "run"
    with killed(lambda patch: ends_in_the_reading(patch, Killed)):
        tiny(run)
    assert "kept on the disk" in capsys.readouterr().out
    monkeypatch.setattr(prefixes, "FREE_SHARE", 0.0)
    assert resume(run) == 0
    assert "kept on the disk" in capsys.readouterr().out


def test_parts_of_other_processes_data_are_not_gone_on_with(
    tiny, no_conclusion, uncached, tmp_path
):
    run = tmp_path / "run"
    with killed(lambda patch: ends_in_the_pass(patch, Killed)):
        tiny(run, NONE)
    begun = Begun.read(run / "replay")
    assert begun is not None
    replace(begun, processes=2).write(run / "replay")
    assert resume(run) == 0
    assert (run / "before_restart_1" / "replay").is_dir()
    assert differences(images_state(run), without_conclusion(uncached.state)) == []


def test_a_budget_decides_and_a_run_goes_on_as_it_began(tiny, no_conclusion, tmp_path, capfd):
    enough = "--prefix_cache_gib=0.001"
    with pytest.MonkeyPatch.context() as patch:
        signalled_at_update(patch, Cached, 1, signal.SIGINT)
        assert tiny(tmp_path / "small", "--prefix_cache_gib=0.00018") == 130
        assert "computed in each update of the policy" in capfd.readouterr().out
    assert tiny(tmp_path / "large", enough, *OFFLINE) == 0
    assert "kept on the disk" in capfd.readouterr().out
    assert resume(tmp_path / "small") == 0
    found = [CacheHeader.read(tmp_path / name / "replay") for name in ("small", "large")]
    assert [header is not None and len(header.features) > 2 for header in found] == [False, True]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prefix_cache_gib=0.000001"], "has no room for the prefixes of one batch, 4 of"),
        (["--prefix_cache=disk", "--prefix_cache_gib=0.0001"], "--prefix_cache=disk keeps"),
        ([NONE, "--prefix_cache_gib=1"], "leave one of both out"),
        (["--prefix_cache_gib=0"], "must be positive"),
        ([LENT], "keeps the pictures of agentview in its tables"),
    ],
)
def test_what_has_no_room_or_cannot_be_read_is_said_before_anything_is_decoded(
    flags, sentence, tiny, tmp_path, capfd, monkeypatch
):
    def never(*_: Any) -> None:
        raise AssertionError("an episode was decoded")

    monkeypatch.setattr(LeRobotReader, "episode", never)
    assert tiny(tmp_path / "run", f"--batch_size={BATCH}", *flags) == 2
    assert sentence in capfd.readouterr().err
    assert not (tmp_path / "run/replay").exists()


# Frames that stay in the dataset.


@pytest.fixture(scope="module")
def filmed(files: Files, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of the run on the same episodes as videos."""
    folder = tmp_path_factory.mktemp("filmed")
    write_toy_dataset(folder / "dataset", folder / "scratch", use_videos=True)
    return [*files.flags(), f"--dataset.root={folder / 'dataset'}"]


def test_a_run_that_keeps_no_frames_is_the_run_that_does(filmed, tmp_path) -> None:
    copied = whole_run(tmp_path / "copied", filmed, concluded=False)
    lent = whole_run(tmp_path / "lent", [*filmed, LENT], concluded=False)
    pictures = copied.state.pop("pictures"), lent.state.pop("pictures")
    assert differences(lent.state, copied.state) == []
    header = FrameHeader.read(lent.folder / "replay")
    frame = SIZE * SIZE * 3
    (own,) = pictures[1].values()
    (whole,) = pictures[0].values()
    assert not any(own[: header.lent_frames * frame])
    assert own[header.lent_frames * frame :] == whole[header.lent_frames * frame :]
    assert 0 < header.lent_frames < len(own) // frame


def test_a_killed_run_that_keeps_neither_goes_on_to_the_same_bits(filmed, no_conclusion, tmp_path):
    flags = [*filmed, LENT, NONE]
    expected = whole_run(tmp_path / "whole", flags, concluded=False)
    with killed(lambda patch: dies_at_update(patch, Cached, 5)):
        main(*flags, f"--output_dir={tmp_path / 'run'}")
    assert resume(tmp_path / "run") == 0
    assert differences(images_state(tmp_path / "run"), expected.state) == []


def test_a_replay_without_its_dataset_shows_no_black_frames(filmed, no_conclusion, tmp_path):
    assert main(*filmed, LENT, *OFFLINE, f"--output_dir={tmp_path / 'run'}") == 0
    replay = Replay.open(tmp_path / "run/replay")
    with pytest.raises(UserError, match=r"frames of the replay .* lie in the datasets"):
        replay.observation_at(np.array([0]))


def test_fresh_next_actions_can_be_had_of_the_batchs_own_frames(tiny, tmp_path):
    """With prefixes kept: one of them an update, and chunks drawn where the batch begins."""
    assert tiny(tmp_path / "run", *OFFLINE, "--critic.draw_next=false") == 0
    networks = load_file(tmp_path / "run/checkpoints/last/algorithm/networks.safetensors")
    drawn = networks["next_actions.drawn"]
    assert int(drawn.max()) == int(networks["next_actions.updates"]) > 0
