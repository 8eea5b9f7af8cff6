"""The recipes for LeRobot's policies as a whole on a toy task: what they leave, and refuse."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_files import metrics_lines
from toy_images import (
    CAMERA,
    CHUNK,
    MAX_STEPS,
    SIZE,
    ImageToyPool,
    image_family,
    toy_pool,
    write_toy_policy,
    write_toy_smolvla,
)
from toy_task import ACTION_DIM, Killed
from vla_runs import (
    PI0,
    SMOLVLA,
    Whole,
    files,
    forgetful_pool,
    full,
    killed,
    main,
    no_conclusion,
    tiny,
    whole,
    whole_run,
    without_simulator,
)
from vla_trqam.adapters.lerobot_policy import LeRobotFlowPolicy
from vla_trqam.adapters.loading import load_policy

from vla_trqam.config.parsing import saved_config
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.data.episode import Episode
from vla_trqam.data.replay import Replay
from vla_trqam.engine.acting import chunk_policy
from vla_trqam.engine.cached import Cached
from vla_trqam.engine.playing import EVALUATION_NOISE
from vla_trqam.jobs import vla, vla_preflight
from vla_trqam.jobs.vla import read_config
from vla_trqam.methods.base import FlowActor

__all__ = [  # fixtures
    "files",
    "forgetful_pool",
    "full",
    "no_conclusion",
    "tiny",
    "whole",
    "without_simulator",
]
pytestmark = pytest.mark.slow

OFFLINE = ("--env.type=null", "--online.steps=0", "--base_episodes=0")


def reloaded(run: Whole) -> LeRobotFlowPolicy:
    """The last checkpoint's policy; its adapters on their own base where it has such."""
    folder = run.folder / "checkpoints/last/pretrained_model"
    return load_policy(folder, lora=None, adapter="continue", limits=(-1.0, 1.0))


def trained(policy: LeRobotFlowPolicy) -> dict[str, torch.Tensor]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def episodes_of(policy: LeRobotFlowPolicy, seeds: list[int]) -> list[Episode]:
    """Episodes of the evaluation from these initial states."""
    pool = toy_pool()
    return pool.run(chunk_policy(policy, FlowActor(policy), EVALUATION_NOISE), seeds)


def same(one: list[Episode], other: list[Episode]) -> bool:
    return all(np.array_equal(a.actions, b.actions) for a, b in zip(one, other, strict=True))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# What a whole run leaves.


def test_a_whole_run_leaves_report_plots_evaluation_and_a_checkpoint(whole):
    names = {path.name for path in whole.folder.iterdir()}
    assert names >= {"report.md", "report.json", "evaluation.json", "config.yaml", "plots"}
    plots = {path.name for path in (whole.folder / "plots").glob("*.png")}
    assert plots >= {"kl.png", "lambda.png", "success.png", "q_against_returns.png"}
    last = (whole.folder / "checkpoints/last").resolve()
    assert last.name == "000007"
    assert {path.name for path in last.iterdir()} == {
        "pretrained_model",
        "training_state",
        "manifest.json",
        "algorithm",
    }
    policy = {path.name for path in (last / "pretrained_model").iterdir()}
    assert policy >= {
        "config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
    }


def test_every_phase_evaluation_and_rollout_is_logged_in_order(whole):
    assert [(line["phase"], line["step"]) for line in metrics_lines(whole.folder)] == [
        *[("critic", 0)] * 2,  # the base's episodes
        *[("critic", n) for n in (1, 2, 3)],
        ("eval", 0),
        ("offline", 1),
        ("offline", 2),
        ("eval", 2),
        ("offline", 3),
        *[("online", 3)] * 2,
        ("online", 4),
        ("online", 5),
        ("eval", 5),
        *[("online", 5)] * 2,
        ("online", 6),
        ("online", 7),
        ("eval", 7),
    ]


def test_the_evaluation_is_what_policies_loaded_from_disk_achieve(whole, files):
    evaluation = whole.state["evaluation"]
    base, tuned = whole.rounds[-2:]
    assert not same(base, tuned), "else there would be little to see"
    given = load_policy(files.policy, lora=None, limits=(-1.0, 1.0))
    for name, policy, played in (("base", given, base), ("tuned", reloaded(whole), tuned)):
        episodes = episodes_of(policy, evaluation["seeds"])
        assert same(episodes, played)
        assert evaluation[f"{name}_success"] == [episode.success for episode in episodes]
        assert evaluation[f"{name}_steps"] == [episode.num_steps for episode in episodes]


@pytest.mark.parametrize("kind", ["whole", "full"])
def test_the_saved_policy_is_the_trained_one(kind, request):
    run = request.getfixturevalue(kind)
    mine, theirs = trained(run.policy), trained(reloaded(run))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_merged_checkpoint_is_a_whole_policy_with_the_trained_weights(
    tiny, no_conclusion, whole, files, tmp_path
):
    assert tiny(tmp_path / "run", "--policy.merged=true") == 0
    folder = tmp_path / "run/checkpoints/last/pretrained_model"
    assert not (folder / "adapter_config.json").exists()
    merged, base = (load_file(path / "model.safetensors") for path in (folder, files.policy))
    assert merged.keys() == base.keys()
    tuned = dict(whole.policy.host.named_parameters())
    layers = [name for name in base if not torch.equal(merged[name], base[name])]
    assert layers
    for name in layers:
        layer = name.removesuffix(".weight")
        down, up = (tuned[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        torch.testing.assert_close(merged[name], (base[name] + up @ down).detach())


def test_an_offline_run_needs_no_simulator(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    assert tiny(folder, *OFFLINE) == 0
    assert ImageToyPool.started == 0
    assert (folder / "report.md").is_file()
    assert not (folder / "evaluation.json").exists()
    assert "not evaluated" in capsys.readouterr().out
    assert {line["phase"] for line in metrics_lines(folder)} == {"critic", "offline"}


def test_smolvlas_recipe_runs_whole(files, tmp_path):
    policy = write_toy_smolvla(tmp_path / "smolvla")
    run = whole_run(
        tmp_path / "run", [*files.flags(), f"--policy.path={policy}", "--online.steps=2"], SMOLVLA
    )
    assert (run.folder / "report.md").is_file()
    saved = reloaded(run)
    assert same(episodes_of(saved, run.state["evaluation"]["seeds"]), run.rounds[-1])
    mine, theirs = trained(run.policy), trained(saved)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert first_kls(run)[0] == 0.0


# The base.


def first_kls(run: Whole) -> list[float]:
    return [line["kl_estimate"] for line in metrics_lines(run.folder) if "kl_estimate" in line]


@pytest.mark.parametrize("kind", ["whole", "full"])
def test_the_kl_is_zero_at_the_first_update_and_the_base_never_moves(kind, request, files):
    run = request.getfixturevalue(kind)
    first, *later = first_kls(run)
    assert first == 0.0
    assert all(kl > 0.0 for kl in later)
    given = load_file(files.policy / "model.safetensors")
    with run.policy.base.host() as host:
        base = {k.replace(".base_layer.", "."): v for k, v in host.state_dict().items()}
    assert given.keys() <= base.keys()
    moved = [k for k, v in given.items() if v.numpy().tobytes() != base[k].numpy().tobytes()]
    assert moved == []


def test_a_run_leaves_the_policys_folder_as_it_was(files, tiny, no_conclusion, tmp_path):
    before = folder_bytes(files.policy)
    assert tiny(tmp_path / "run", *OFFLINE, "--critic.warmup_steps=0") == 0
    assert folder_bytes(files.policy) == before


# The critic of a former run.


@contextmanager
def first_update() -> Iterator[list[Cached]]:
    """Ends the run at its first update; afterwards the list holds the learner as it began."""
    seen: list[Cached] = []

    def update(learner: Cached, *_: Any) -> None:
        seen.append(learner)
        raise Killed

    with killed(lambda patch: patch.setattr(Cached, "update", update)):
        yield seen


@pytest.mark.parametrize("adapter", ["merge", "continue"])
def test_a_run_starts_with_the_critic_of_a_checkpoint(adapter, tiny, whole, tmp_path):
    former = whole.folder / "checkpoints/last"
    with first_update() as seen:
        tiny(
            tmp_path / "run",
            f"--policy.path={former / 'pretrained_model'}",
            f"--policy.adapter={adapter}",
            "--policy.merged=true",
            f"--critic.path={former}",
            "--critic.warmup_steps=0",
        )
    method = seen[0].method
    saved = load_file(former / "algorithm/networks.safetensors")
    critic = method.critic.state_dict()
    assert all(torch.equal(saved[f"critic.{name}"], critic[name]) for name in critic)
    scalars = json.loads((former / "algorithm/scalars.json").read_text())
    assert scalars.pop("scheme") == method.config.scheme
    assert scalars.pop("unit").startswith("nats per action of ")
    goes_on = method.trust_region.state_dict() == scalars
    assert goes_on == (adapter == "continue")
    if not goes_on:
        assert method.trust_region.lam == method.config.lam_init != scalars["lam"]
        return
    adapters = trained(method.policy)
    assert all(torch.equal(adapters[name], p) for name, p in trained(whole.policy).items())


def test_a_critic_that_values_by_other_settings_is_not_gone_on_with(tiny, whole, tmp_path, capsys):
    former = whole.folder / "checkpoints/last"
    told = json.loads((former / "algorithm/critic.json").read_text())
    assert told == {
        "discount": 0.99,
        "dataset.kind": "success_minus_one",
        "dataset.reward": None,
        "policy.critic_layer": -1,
        "policy.critic_pooling": "all",
    }
    assert tiny(tmp_path / "run", f"--critic.path={former}", "--discount=0.9") == 2
    said = capsys.readouterr().err
    assert "values by --discount=0.99, this run by --discount=0.9: its numbers would" in said


# Bad input.


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a recipe that must refuse in one sentence and leave nothing."""

    def run(*flags: str, recipe: Path = PI0) -> str:
        capsys.readouterr()
        assert main(*flags, f"--output_dir={tmp_path / 'run'}", recipe=recipe) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1, "one sentence, no traceback"
        assert ImageToyPool.started == 0, "no simulator may start for this"
        assert not (tmp_path / "run").exists(), "no folder for input that is refused"
        return errors

    return run


@pytest.mark.parametrize(("method", "kept"), [("trqam", 3), ("best_of_n", 0), ("ifql", 0)])
def test_room_is_asked_for_the_next_actions_that_a_method_keeps(
    method, kept, tiny, monkeypatch, tmp_path
):
    plans = []

    def measured(policy, readers, plan, **settings):
        plans.append(plan)
        raise Killed

    monkeypatch.setattr(vla_preflight, "preflight_machine", measured)
    own = [] if kept == 0 else [f"--critic.next_actions={kept}"]
    with pytest.raises(Killed):
        tiny(tmp_path / "run", f"--method.type={method}", *own)
    assert [plan.next_actions for plan in plans] == [kept]


def test_a_critic_from_a_folder_without_one_is_refused(refused, files, tmp_path):
    said = refused(*files.flags(), f"--critic.path={files.policy}")
    assert f"{files.policy} has no algorithm/ folder" in said
    said = refused(*files.flags(), f"--critic.path={tmp_path / 'nowhere'}")
    assert f"--critic.path={tmp_path / 'nowhere'} is not a folder" in said


def test_a_critic_of_another_size_is_refused(refused, files, whole):
    former = whole.folder / "checkpoints/last"
    said = refused(*files.flags(), f"--critic.path={former}", "--critic.hidden_dims=[4]")
    assert f"{former / 'algorithm'} does not fit this run's critic" in said


def test_a_dataset_without_the_policys_camera_is_refused(refused, files, tmp_path):
    policy = write_toy_policy(tmp_path / "policy", "wrist")
    said = refused(*files.flags(), f"--policy.path={policy}")
    assert "the policy looks through observation.images.wrist" in said
    assert "the dataset's cameras are observation.images.agentview (a --rename_map maps" in said


def test_a_datasets_camera_can_have_another_name(files, tmp_path):
    policy = write_toy_policy(tmp_path / "policy", "wrist")
    names = "{observation.images.agentview: observation.images.wrist}"
    flags = [*files.flags(), f"--policy.path={policy}", f"--rename_map={names}"]
    alone = ["--env.type=null", "--online.steps=0", "--base_episodes=0"]
    assert main(*flags, *alone, f"--output_dir={tmp_path / 'run'}") == 0
    assert list(Replay.open(tmp_path / "run/replay").cameras) == ["wrist"]
    settings = saved_config(FinetuneVLAConfig, tmp_path / "run/config.yaml")
    assert settings.rename_map == {"observation.images.agentview": "observation.images.wrist"}


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--rename_map={front: top}", "--rename_map names front; the cameras of the dataset"),
        ("--env.cameras=[wrist]", "--env.cameras=[agentview] would be"),
        ("--env.image_size=64", "the simulator's of 64 x 64 x 3 (--env.image_size=64)"),
        ("--policy.n_action_steps=1", "frames lie 2 steps apart, 1 actions are executed"),
    ],
)
def test_cameras_and_horizons_that_do_not_fit_are_refused(refused, files, flag, sentence):
    assert sentence in refused(*files.flags(), flag)


def test_evaluations_alone_may_show_images_of_another_size(files, tmp_path):
    offline = ["--env.image_size=64", "--online.steps=0", "--base_episodes=0", "--steps=1"]
    assert main(*files.flags(), *offline, f"--output_dir={tmp_path / 'run'}") == 0


def test_the_first_actions_of_a_chunk_are_executed_valued_and_saved(files, tmp_path):
    """Of chunks of four, two: what is drawn, rolled out, kept and saved has two."""
    shutil.copytree(files.policy, tmp_path / "policy")
    path = tmp_path / "policy/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chunk_size": 2 * CHUNK, "n_action_steps": CHUNK}))
    flags = [*files.flags(), f"--policy.path={tmp_path / 'policy'}"]
    assert main(*flags, f"--output_dir={tmp_path / 'run'}") == 0
    last = tmp_path / "run/checkpoints/last"
    saved = json.loads((last / "pretrained_model/config.json").read_text())
    assert (saved["chunk_size"], saved["n_action_steps"]) == (2 * CHUNK, CHUNK)
    networks = load_file(last / "algorithm/networks.safetensors")
    assert networks["next_actions.chunks"].shape[2:] == (CHUNK, ACTION_DIM)
    replay = Replay.open(tmp_path / "run/replay")
    firsts = replay.episodes().first_observation
    rows = replay.frame_index.rows_of_frames()
    since = rows - firsts[np.searchsorted(firsts, rows, side="right") - 1]
    assert set(since) == {0, 2, 4, 6, MAX_STEPS}  # the last where the limit cut


def test_the_simulators_state_and_action_are_the_datasets(refused, files, monkeypatch):
    def family(config, **settings):
        return replace(image_family(config, **settings), **different)

    monkeypatch.setattr(vla, "make_family", family)
    different = {"state_size": 9}
    assert "observation.state has 3 numbers in the dataset and 9 in" in refused(*files.flags())
    different = {"action_low": (-1.0,) * 7, "action_high": (1.0,) * 7}
    assert "action has 2 numbers in the dataset and 7 in" in refused(*files.flags())


def test_another_simulators_cameras_are_named_and_what_may_be_done(refused, files, monkeypatch):
    def family(config, **settings):
        seen = {"observation.image": (SIZE, SIZE, 3)}
        return replace(image_family(config, **settings), name="pusht", cameras=seen)

    monkeypatch.setattr(vla, "make_family", family)
    assert (
        "--env.type=pusht has the cameras [observation.image], the dataset [agentview]: name the "
        "dataset's like the simulator's by --rename_map"
    ) in refused(*files.flags())


def test_a_camera_more_and_another_rate_of_the_simulator_are_no_obstacle(
    tiny, no_conclusion, monkeypatch, tmp_path, capsys
):
    def family(config, **settings):
        found = image_family(config, **settings)
        more = {"wrist": (2 * SIZE, SIZE, 3)}
        return replace(found, cameras=more | dict(found.cameras), control_rate=10.0)

    monkeypatch.setattr(vla, "make_family", family)
    assert tiny(tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "the dataset has 20 rows a second and the simulator 10 control steps" in said
    assert tuple(Replay.open(tmp_path / "run/replay").cameras) == (CAMERA,)


@pytest.mark.parametrize("method", ["trqam", "fql"])
def test_a_base_that_would_have_to_train_is_refused_before_anything_is_read(
    method, refused, files, monkeypatch
):
    monkeypatch.setattr(vla, "checked_inputs", None)
    said = refused(*files.flags(), f"--method.type={method}", "--method.train_base=true")
    assert f"is frozen, and {method} would train it" in said
    said = refused(*files.flags(), "--method.type=ifql", "--critic.redraws=3")
    assert "ifql has no use for --critic.next_actions and --critic.redraws: leave it out" in said


@pytest.mark.parametrize("recipe", [SMOLVLA, PI0])
def test_a_recipe_that_packs_no_policy_asks_for_one(recipe, refused):
    said = refused(recipe=recipe)
    assert "give --policy.path and --dataset.repo_id" in said


def test_a_policy_of_ones_own_gets_the_preset_made_for_it(files):
    packed = Path("packed")
    own = [f"--policy.path={files.policy}", "--dataset.repo_id=local/toy"]
    assert read_config(PI0, packed, own).env.type is None
    assert read_config(PI0, packed, []).env.type == "robomimic"
    assert read_config(PI0, packed, [*own, "--preset=default"]).env.type == "robomimic"


def test_the_bases_episodes_come_before_the_first_update_whichever_phase_has_it(tiny, tmp_path):
    rounds = ("--online.steps=2", "--online.episodes_per_round=1", "--online.updates_per_round=1")
    flags = ("--steps=0", "--critic.warmup_steps=0", "--base_episodes=2", *rounds)
    assert tiny(tmp_path / "run", *flags) == 0
    replay = Replay.open(tmp_path / "run/replay")
    assert (replay.episodes().source == "online").sum() == 2 + 2
