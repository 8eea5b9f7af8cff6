"""Runs of the recipe with policies and datasets as people bring them: cameras, adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from peft import PeftModel
from toy_deaths import dies_at_update
from toy_files import differences
from toy_images import CAMERA, images_state, write_toy_dataset, write_toy_policy
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
    whole,
    whole_run,
    without_conclusion,
    without_simulator,
)

from vla_trqam.config.settings import OnlineConfig
from vla_trqam.config.vla_settings import (
    FinetuneVLAConfig,
    PeftConfig,
    VLADatasetConfig,
    VLAPolicyConfig,
)
from vla_trqam.data.frames import image_key
from vla_trqam.data.replay import Replay
from vla_trqam.data.sources.lerobot.pictures import Pictures
from vla_trqam.engine.cached import Cached
from vla_trqam.errors import UserError
from vla_trqam.jobs import vla_inputs
from vla_trqam.preflight import memory as preflight_memory

__all__ = ["files", "forgetful_pool", "no_conclusion", "tiny", "whole", "without_simulator"]
pytestmark = pytest.mark.slow

OFFLINE = ("--env.type=null", "--online.steps=0", "--base_episodes=0", "--steps=4")
BROKEN = "side"


# Cameras.


@pytest.fixture(scope="module")
def two_cameras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    return write_toy_dataset(folder / "dataset", folder / "scratch", (CAMERA, BROKEN))


def test_a_camera_that_nobody_looks_through_is_not_opened(
    tiny: Callable[..., int],
    two_cameras: Path,
    whole: Whole,
    no_conclusion: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decode, opened = Pictures.decode, set()

    def watched(pictures: Pictures, camera: str, *arguments: Any) -> Any:
        opened.add(camera)
        return decode(pictures, camera, *arguments)

    monkeypatch.setattr(Pictures, "decode", watched)
    assert tiny(tmp_path / "run", f"--dataset.root={two_cameras}") == 0
    assert opened == {CAMERA}
    assert f"not looked through, and never opened: {image_key(BROKEN)}" in capsys.readouterr().out
    # With the simulator's one camera, and as if the other did not exist.
    assert differences(images_state(tmp_path / "run"), without_conclusion(whole.state)) == []


def test_a_former_run_whose_replay_has_more_cameras_is_gone_on_with(
    tiny: Callable[..., int],
    two_cameras: Path,
    no_conclusion: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        both = (image_key(CAMERA), image_key(BROKEN))
        patch.setattr(vla_inputs, "camera_names", lambda *_: both)
        with killed(lambda patch: dies_at_update(patch, Cached, 5)):
            cameras = f"--env.cameras=[{CAMERA}, {BROKEN}]"
            tiny(tmp_path / "run", f"--dataset.root={two_cameras}", cameras)
    assert resume(tmp_path / "run") == 0
    replay = Replay.open(tmp_path / "run/replay")
    assert set(replay.cameras) == {CAMERA, BROKEN}
    assert "online" in set(replay.episodes().source.tolist())


def test_a_camera_that_the_dataset_lacks_is_masked_with_a_line(
    tiny: Callable[..., int],
    no_conclusion: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = write_toy_policy(tmp_path / "policy", "wrist", CAMERA)
    assert tiny(tmp_path / "run", *OFFLINE, f"--policy.path={policy}") == 0
    said = capsys.readouterr().out
    assert f"looks through {image_key('wrist')} too, which the data lacks: masked" in said
    assert list(Replay.open(tmp_path / "run/replay").cameras) == [CAMERA]


# Adapters.


def last(run: Path) -> Path:
    return run / "checkpoints/last/pretrained_model"


def chunk(host: Any, observation: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return host.predict_action_chunk(dict(observation), noise=noise)


def stock(folder: Path) -> Any:
    """As LeRobot's ``make_policy`` loads adapters."""
    config = PreTrainedConfig.from_pretrained(folder)
    assert config.use_peft
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    host = get_policy_class(config.type).from_pretrained(base, config=config)
    return PeftModel.from_pretrained(host, str(folder)).eval().get_base_model()


def test_adapters_as_the_policy_become_the_base_from_end_to_end(
    files: Files,
    whole: Whole,
    tiny: Callable[..., int],
    no_conclusion: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = shutil.copytree(last(whole.folder), tmp_path / "given")
    flags = [*OFFLINE, f"--policy.path={given}"]
    run = whole_run(tmp_path / "run", [*files.flags(), *flags], concluded=False)
    base = (tmp_path / "run/base_policy").resolve()
    assert f"is the base: {base}, which must stay there" in capsys.readouterr().out
    assert not (base / "adapter_config.json").exists()

    # Stock LeRobot loads the result, and acts as the trained policy does.
    host, policy = stock(last(tmp_path / "run")), run.policy
    observation = next_observation(run)
    noise = torch.randn(2, *policy.chunk_shape, generator=torch.Generator().manual_seed(0))
    theirs = chunk(host, observation, noise)
    assert torch.equal(theirs, chunk(policy.host, observation, noise))
    former = stock(given)
    # The base is the former run's policy, whose adapters are rounded into the weights once.
    config = PreTrainedConfig.from_pretrained(base)
    assert not config.use_peft
    alone = get_policy_class(config.type).from_pretrained(base, config=config).eval()
    begun = chunk(alone, observation, noise)
    assert not torch.equal(theirs, begun), "else nothing was trained"
    torch.testing.assert_close(begun, chunk(former, observation, noise), rtol=1e-4, atol=1e-5)

    # A killed run goes on from its own copy.
    with killed(lambda patch: dies_at_update(patch, Cached, 3)):
        tiny(tmp_path / "killed", *flags)
    base = tmp_path / "killed/base_policy"
    away = base.rename(tmp_path / "away")
    assert resume(tmp_path / "killed") == 2
    assert f"{base} is gone" in capsys.readouterr().err
    away.rename(base)
    shutil.rmtree(given)
    assert resume(tmp_path / "killed") == 0
    assert differences(elsewhere(images_state(tmp_path / "killed"), "killed"), run.state) == []


def elsewhere(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """As if the run, which names its base, had been in ``run`` instead."""
    names = f"/{folder}/base_policy".encode(), b"/run/base_policy"
    return {k: v.replace(*names) if isinstance(v, bytes) else v for k, v in state.items()}


def next_observation(run: Whole) -> dict[str, Any]:
    replay = Replay.open(run.folder / "replay")
    assert run.policy.processors is not None
    rows = replay.frame_index.rows_of_frames()[:2]
    return run.policy.processors.observe(replay.observation_at(rows))


def test_full_training_of_adapters_needs_no_base(
    whole: Whole, tiny: Callable[..., int], no_conclusion: None, tmp_path: Path
) -> None:
    flags = [*OFFLINE, f"--policy.path={last(whole.folder)}", "--peft.method=full"]
    assert tiny(tmp_path / "run", *flags) == 0
    assert not (tmp_path / "run/base_policy").exists()
    assert (last(tmp_path / "run") / "model.safetensors").is_file()


def test_adapters_on_a_base_of_this_machine_are_not_pushed(
    files: Files, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also where the adapters themselves come from the Hub."""
    given, load = last(whole.folder), vla_inputs.load_policy
    monkeypatch.setattr(vla_inputs, "check_push", lambda *_, **__: None)
    monkeypatch.setattr(vla_inputs, "camera_names", lambda *_: (image_key(CAMERA),))
    monkeypatch.setattr(vla_inputs, "flow_steps_of", lambda *_: 10)
    monkeypatch.setattr(vla_inputs, "load_policy", lambda _, **settings: load(given, **settings))
    push = ("--policy.push_to_hub=true", "--policy.repo_id=me/tuned")
    flags = [*files.flags(), "--policy.path=someone/adapters", *push]
    assert main(*flags, f"--output_dir={tmp_path / 'run'}") == 2
    assert "adapters whose base is a folder of this machine" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("base", "pushed"), [("someone/base", True), (".", False)])
def test_adapters_that_go_on_are_pushed_where_their_own_base_is_on_the_hub(
    base: str, pushed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they lie: each round's are a folder of this machine."""
    monkeypatch.setattr(vla_inputs, "check_push", lambda *_, **__: None)
    fields = {"base_model_name_or_path": base, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    policy = VLAPolicyConfig(
        path=str(tmp_path), adapter="continue", push_to_hub=True, repo_id="me/round_1"
    )
    data = VLADatasetConfig(repo_id="me/data")
    config = FinetuneVLAConfig(
        policy=policy,
        dataset=data,
        peft=PeftConfig(method="lora"),
        online=OnlineConfig(steps=0),
    )
    if pushed:
        vla_inputs._check_push(config)
        return
    with pytest.raises(UserError, match="adapters whose base is a folder of this machine"):
        vla_inputs._check_push(config)


def test_a_method_that_acts_by_its_own_networks_is_not_pushed_for_lerobot(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("check_push", "camera_names", "LeRobotReader"):
        monkeypatch.setattr(vla_inputs, name, None)
    push = ("--policy.push_to_hub=true", "--policy.repo_id=me/tuned", "--peft.method=full")
    flags = [*files.flags(), *push, "--method.type=dsrl", f"--output_dir={tmp_path / 'run'}"]
    assert main(*flags) == 2
    said = capsys.readouterr().err
    assert "what dsrl learns is networks beside it, which no library loads" in said
    assert not (tmp_path / "run").exists()


# The tokenizer.


def test_a_tokenizer_folder_that_is_not_there_is_refused(
    tiny: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny(tmp_path / "run", f"--policy.tokenizer={tmp_path / 'gone'}") == 2
    said = capsys.readouterr().err
    assert f"--policy.tokenizer={tmp_path / 'gone'} is not a folder" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("short", ["disk", "memory"])
def test_what_the_machine_lacks_is_told_before_anything_is_decoded(
    short: str,
    tiny: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def decoded(*_: Any) -> None:
        raise AssertionError("nothing may be decoded")

    monkeypatch.setattr(Pictures, "decode", decoded)
    free = shutil.disk_usage(tmp_path)
    if short == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=1000))
    else:
        monkeypatch.setattr(preflight_memory, "available_memory", lambda _: 1000)
    assert tiny(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: training cannot work, one thing to change first: - {short}: ")
    assert "1000 B" in error
    assert not (tmp_path / "run").exists()
