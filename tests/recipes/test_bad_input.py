"""Bad input is refused in one sentence, before a folder is made or a simulator starts."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from toy_files import write_toy_file
from toy_task import ToyPool
from vla_trqam.adapters.mlp import MLPFlowConfig, MLPFlowPolicy
from vla_trqam.recipes import finetune_robomimic

from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.jobs import states

STRAY_FILE = "a folder must not be made for input that is refused"


@pytest.fixture
def refused(tiny, tmp_path, capsys):
    """Runs `main` and returns its one sentence; nothing else may have happened."""

    def run(*flags, output_dir=None):
        folder = output_dir or tmp_path / "run"
        before = sorted(folder.rglob("*")) if folder.exists() else None
        capsys.readouterr()
        assert tiny(folder, *flags) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1, "one sentence, no traceback"
        assert ToyPool.started == 0, "no simulator may start for this"
        assert (sorted(folder.rglob("*")) if folder.exists() else None) == before, STRAY_FILE
        return errors.removeprefix("error: ").strip()

    return run


def set_action(file, value):
    file["data/demo_1/actions"][0, 0] = value


def empty_demo(file):
    demo = file["data/demo_1"]
    for name in ("actions", "rewards", "obs/object", "next_obs/object"):
        rows = demo[name][:0]
        del demo[name]
        demo[name] = rows
    demo.attrs["num_samples"] = 0


def no_reward(file):
    for demo in file["data"].values():
        demo["rewards"][:] = 0


def old_robosuite(file):
    meta = json.loads(file["data"].attrs["env_args"])
    meta["env_version"] = "1.4.1"
    body = meta["env_kwargs"]["controller_configs"]["body_parts"]["right"]
    meta["env_kwargs"]["controller_configs"] = body
    file["data"].attrs["env_args"] = json.dumps(meta)


def other_simulator(file):
    meta = json.loads(file["data"].attrs["env_args"]) | {"type": 2}
    file["data"].attrs["env_args"] = json.dumps(meta)


def dense_reward(file):
    file["data/demo_1/rewards"][0] = 0.5


SPOILED = {
    "absent actions": (lambda f: f.__delitem__("data/demo_1/actions"), ["demo_1", "actions"]),
    "absent observation": (lambda f: f.__delitem__("data/demo_1/obs/object"), ["object"]),
    "absent data": (lambda f: f.__delitem__("data"), ["data"]),
    "NaN": (lambda f: set_action(f, np.nan), ["demo_1", "actions", "nan", "step 0"]),
    "action out of range": (lambda f: set_action(f, 1.5), ["demo_1", "actions", "1.5"]),
    "no step": (empty_demo, ["demo_1", "no steps"]),
    "no reward": (no_reward, ["succeeds"]),
    "v1.4.1": (old_robosuite, ["1.4.1", "v1.5"]),
    "not robosuite": (other_simulator, ["type 2", "robosuite"]),
    "dense reward": (dense_reward, ["0.5", "'column'"]),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_dataset_is_refused(name, refused, tmp_path):
    change, words = SPOILED[name]
    path = write_toy_file(tmp_path / "spoiled.hdf5", change)
    message = refused(f"--dataset.path={path}")
    assert [word for word in ["spoiled.hdf5", *words] if word not in message] == []


def test_a_missing_or_truncated_dataset_is_refused(refused, toy_file, tmp_path):
    assert "nowhere.hdf5 does not exist" in refused(f"--dataset.path={tmp_path / 'nowhere.hdf5'}")
    cut = tmp_path / "cut.hdf5"
    content = toy_file.read_bytes()
    for size in (0, 100, len(content) // 2):
        cut.write_bytes(content[:size])
        assert "cut.hdf5" in refused(f"--dataset.path={cut}")


SETTINGS = [
    (["--method.kl_budget=0"], ["kl_budget", "0", "positive"]),
    (["--method.kl_budget=-1"], ["kl_budget", "-1", "positive"]),
    (["--method.kl_budget=nan"], ["kl_budget", "nan", "positive"]),
    (["--method.kl_bugdet=1"], ["--method.kl_bugdet", "did you mean --method.kl_budget?"]),
    (["--no_such_thing_at_all=1"], ["--no_such_thing_at_all", "--help"]),
    (["stray"], ["'stray'", "--name=value"]),
    (["--preset=huge"], ["--preset=huge", "default", "full", "paper"]),
    (["--preset=full", "--config_path=x.yaml"], ["--preset", "--config_path", "choose one"]),
    (["--config_path=nowhere.yaml"], ["nowhere.yaml", "cannot be read"]),
    (["--method.type=foo"], ["--method.type=foo", "trqam, qam"]),
    (
        ["--method.type=qam", "--method.inverse_temperature=0"],
        ["inverse_temperature", "0", "positive"],
    ),
    (
        ["--method.inverse_temperature=2"],
        ["inverse_temperature is no knob of trqam", "--method.type=qam"],
    ),
    (
        ["--method.type=qam", "--trqam.inverse_temprature=2"],
        ["--method.inverse_temprature is not a setting", "--method.inverse_temperature?"],
    ),
    (["--dataset.name=lift/ph"], ["--dataset.path", "--dataset.name", "choose one"]),
    (["--dataset.filter_key=nobodys"], ["nobodys", "worse"]),
    (["--pretrain.filter_key=nobodys"], ["nobodys", "worse"]),
    (["--pretrain.num_demos=5"], ["--pretrain.num_demos=5", "4"]),
    (["--pretrain.num_demos=0"], ["--pretrain.num_demos=0"]),
    (["--dataset.obs_keys=object"], ["--dataset.obs_keys", "list"]),
    (["--dataset.obs_keys=[]"], ["observation key"]),
    (["--dataset.reward=much"], ["dataset.reward", "much", "sparse"]),
    (["--policy.hidden_dims=[]"], ["--policy.hidden_dims"]),
    (["--policy.hidden_dims=[8,0]"], ["--policy.hidden_dims"]),
    (["--critic.hidden_dims=8"], ["--critic.hidden_dims", "list"]),
    (["--critic.target_rate=0"], ["--critic.target_rate=0"]),
    (["--critic.pessimism=-1"], ["--critic.pessimism=-1"]),
    (["--critic.gradient_noise=-1"], ["--critic.gradient_noise=-1"]),
    (["--pretrain.optimizer.lr=0"], ["lr", "0", "positive"]),
    (["--policy.chunk_length=11"], ["--eval.max_episode_steps=10", "11"]),
    (
        [
            "--policy.chunk_length=100",
            "--eval.max_episode_steps=100",
            "--dataset.short_chunks=drop",
        ],
        ["pretrain", "100 steps", "--policy.chunk_length"],
    ),
    (["--seed=-1"], ["--seed=-1"]),
    (["--seed=100000"], ["--seed=100000"]),
    (["--seed=1.5"], ["seed", "1.5"]),
    (["--seed=null"], ["--seed"]),
    (["--batch_size=many"], ["batch_size", "many"]),
    (["--batch_size=0"], ["--batch_size=0", "at least 1"]),
    (["--discount=1"], ["--discount=1"]),
    (["--online.fraction=1.5"], ["--online.fraction=1.5"]),
    (["--steps=0", "--online.steps=0", "--base_run=some/run"], ["--steps", "--online.steps"]),
    (["--eval.first_seed=499999"], ["--eval.first_seed=499999"]),
    (["--eval.num_workers=0"], ["--eval.num_workers=0"]),
    (["--eval.videos=-1"], ["--eval.videos=-1"]),
    (["--num_threads=0"], ["--num_threads=0"]),
]


@pytest.mark.parametrize(("flags", "words"), SETTINGS, ids=[" ".join(f) for f, _ in SETTINGS])
def test_a_setting_that_cannot_be_honoured_is_refused(flags, words, refused):
    message = refused(*flags)
    assert [word for word in words if word not in message] == []


def save_policy(folder: Path, observation_dim: int = 3, action_dim: int = 2) -> Path:
    config = MLPFlowConfig(observation_dim, action_dim, 2, hidden_dims=(8,), num_flow_steps=3)
    MLPFlowPolicy(config).save_pretrained(folder)
    return folder


def test_a_policy_of_other_shapes_is_refused(refused, tmp_path):
    message = refused(f"--policy.path={save_policy(tmp_path / 'wide', observation_dim=4)}")
    assert "(4, 2)" in message
    assert "(3, 2)" in message


def test_a_damaged_policy_is_refused(refused, tmp_path):
    folder = save_policy(tmp_path / "policy")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refused(f"--policy.path={folder}")
    save_file({"tuned.other": np.zeros(3, np.float32)}, weights)
    assert "tuned.other" in refused(f"--policy.path={folder}")
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(f"--policy.path={folder}")
    assert "nowhere" in refused(f"--policy.path={tmp_path / 'nowhere'}")


def test_flags_that_a_given_policy_leaves_idle_are_refused(refused, tmp_path):
    folder = save_policy(tmp_path / "policy")
    message = refused(f"--policy.path={folder}", "--policy.chunk_length=3", "--pretrain.steps=9")
    assert "--policy.chunk_length, --pretrain.steps" in message


def test_a_folder_in_use_is_refused(refused, tmp_path):
    folder = tmp_path / "used"
    folder.mkdir()
    (folder / "precious.txt").write_text("keep me")
    message = refused(output_dir=folder)
    assert message == f"{folder} is in use; choose another --output_dir"
    file = tmp_path / "file"
    file.write_text("keep me")
    assert "is a file" in refused(output_dir=file)
    assert file.read_text() == "keep me"
    assert "cannot be made" in refused(output_dir=file / "below")


def test_a_resume_that_cannot_be_is_refused(capsys, toy_pool, tmp_path):
    cases = [
        (["--resume=true"], "--output_dir"),
        (["--resume=true", f"--output_dir={tmp_path / 'nowhere'}"], "no run to go on with"),
        (["--resume=true", f"--output_dir={tmp_path}"], "no run to go on with"),
        (["--resume=true", f"--output_dir={tmp_path}", "--seed=1"], "no run to go on with"),
    ]
    for arguments, words in cases:
        assert finetune_robomimic.main(arguments) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert words in errors
    assert list(tmp_path.iterdir()) == []
    assert toy_pool.started == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("algorithm/networks.safetensors", None),
        ("algorithm/networks.safetensors", b"not safetensors"),
        ("algorithm/scalars.json", b"{"),
        ("algorithm/scalars.json", b"{}"),
        ("training_state/optimizer_state.safetensors", b""),
        ("training_state/rng_state.safetensors", b"\x00" * 20),
        ("training_state/replay_rng.json", b"{}"),
        ("training_state/position.json", b"{}"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_left_alone(
    name, content, tiny, resume, no_conclusion, tmp_path, capsys
):
    assert tiny(tmp_path / "run") == 0
    path = tmp_path / "run" / "checkpoints" / "last" / name
    path.write_bytes(path.read_bytes()[:-50] if content is None else content)
    before = path.read_bytes()
    capsys.readouterr()
    assert resume(tmp_path / "run") == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert str((tmp_path / "run" / "checkpoints").resolve()) in last
    assert path.read_bytes() == before


def test_a_run_without_its_last_link_goes_on_from_the_newest_checkpoint(
    tiny, resume, no_conclusion, tmp_path, capsys
):
    assert tiny(tmp_path / "run") == 0
    (tmp_path / "run" / "checkpoints" / "last").unlink()
    assert resume(tmp_path / "run") == 0
    assert f"going on from {tmp_path / 'run' / 'checkpoints' / '000012'}" in capsys.readouterr().out


def test_two_processes_are_refused(refused, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused()
    assert "2 processes" in message
    assert "--num_processes=1" in message


def test_help_lists_every_flag_and_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        finetune_robomimic.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--output_dir=null", "--dataset.path=null", "--pretrain.optimizer.lr=0.001"):
        assert f"  {flag}\n" in text
    # The default preset's value, and what the docstring of a class further up says.
    assert "--method.kl_budget=0.5\n      eps_KL; nats per chunk" in text
    assert "default, full, paper" in text
    assert "those of --preset=default." in text


def test_help_shows_the_values_of_the_preset_that_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        finetune_robomimic.main(["--preset=paper", "--help"])
    text = capsys.readouterr().out
    discount = yaml.safe_load(finetune_robomimic.PRESETS.read_text())["paper"]["discount"]
    assert "those of --preset=paper." in text
    assert f"  --discount={discount}\n" in text


def holds(settings: object, wanted: dict) -> None:
    for key, value in wanted.items():
        actual = getattr(settings, key)
        if isinstance(value, dict):
            holds(actual, value)
        else:
            assert actual == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize("preset", ["default", "full", "paper"])
def test_a_preset_says_what_the_run_then_does(preset):
    section = yaml.safe_load(finetune_robomimic.PRESETS.read_text())[preset]
    methods = section.pop("methods")
    for method, knobs in methods.items():
        flags = [f"--preset={preset}", f"--method.type={method}"]
        holds(
            states.read_config(FinetuneRobomimicConfig, finetune_robomimic.PRESETS, flags).method,
            knobs,
        )
    holds(
        states.read_config(
            FinetuneRobomimicConfig, finetune_robomimic.PRESETS, [f"--preset={preset}"]
        ),
        section,
    )


@pytest.mark.parametrize(
    ("preset", "scheme"),
    [("default", "posterior"), ("full", "posterior"), ("paper", "shifted_euler")],
)
def test_presets_take_the_posterior_chain_but_the_papers_which_has_the_authors(preset, scheme):
    assert (
        states.read_config(
            FinetuneRobomimicConfig, finetune_robomimic.PRESETS, [f"--preset={preset}"]
        ).method.scheme
        == scheme
    )


def test_the_command_line_wins_over_the_preset():
    config = states.read_config(
        FinetuneRobomimicConfig,
        finetune_robomimic.PRESETS,
        ["--preset=paper", "--method.kl_budget", "0.7"],
    )
    assert config.method.kl_budget == 0.7
    assert config.method.shared_optimizer
