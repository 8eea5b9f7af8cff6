import json
from pathlib import Path
from typing import Any

import pytest

from vla_trqam.envs.robomimic.env_kwargs import GRIPPER_NAMES, ROBOT_NAMES
from vla_trqam.envs.robomimic.env_meta import check_env_meta, env_meta_for
from vla_trqam.errors import UserError


@pytest.mark.parametrize("task", ["Lift", "PickPlaceCan", "NutAssemblySquare"])
def test_env_meta_survives_json_and_passes_its_own_check(task):
    env_meta = env_meta_for(task)
    assert json.loads(json.dumps(env_meta)) == env_meta
    check_env_meta(env_meta)


def test_env_meta_is_a_fresh_copy_every_time():
    env_meta_for("Lift")["env_kwargs"]["robots"].append("Sawyer")
    assert env_meta_for("Lift")["env_kwargs"]["robots"] == ["Panda"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env_version": "1.4.1"}, "robosuite 1.4.1.*v1.5 file"),
        ({"env_version": "1.50.0"}, "robosuite 1.50.0"),
        ({"type": 2}, "type 2"),
        ({"env_kwargs": {"robots": object()}}, "JSON"),
    ],
)
def test_env_meta_that_cannot_be_honoured_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        check_env_meta(env_meta_for("Lift") | change)


def test_missing_keys_are_named():
    with pytest.raises(UserError, match="lack env_version, type"):
        check_env_meta({"env_name": "Lift", "env_kwargs": {}})


def test_unknown_task_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"'Can' is unknown.*PickPlaceCan"):
        env_meta_for("Can")


def changed(**arguments: Any) -> dict[str, Any]:
    """What a file of Lift's says, with other arguments of robosuite's."""
    env_meta = env_meta_for("Lift")
    return env_meta | {"env_kwargs": env_meta["env_kwargs"] | arguments}


def changed_arm(**settings: Any) -> dict[str, Any]:
    env_meta = env_meta_for("Lift")
    env_meta["env_kwargs"]["controller_configs"]["body_parts"]["right"].update(settings)
    return env_meta


def changed_controller(**settings: Any) -> dict[str, Any]:
    env_meta = env_meta_for("Lift")
    env_meta["env_kwargs"]["controller_configs"].update(settings)
    return env_meta


HOSTILE = {
    "a path of a controller": (changed(controller_configs="/etc/passwd"), "controller_configs is"),
    "a path among controllers": (changed(controller_configs=["/x"] * 2), "controller_configs is"),
    "a class": (changed(placement_initializer={"class": "os"}), "placement_initializer is"),
    "a renderer's settings": (changed(renderer_config={"x": "/x"}), "renderer_config is {'x'"),
    "an unknown argument": (changed(hook="os.system"), "env_kwargs has 'hook'='os.system'"),
    "an argument of robomimic's": (changed(render=True), "env_kwargs has 'render'=True"),
    "a robot of nobody's": (changed(robots=["../Panda"]), "must be one of Baxter"),
    "many robots": (changed(robots=["Panda"] * 3), "must be one of Baxter"),
    "a gripper of nobody's": (changed(gripper_types="Evil"), "gripper_types is 'Evil'"),
    "a huge image": (changed(camera_heights=10**6), "a number from 1 to 4096"),
    "huge images": (changed(camera_widths=[64, 10**6]), "camera_widths is [64, 1000000]"),
    "many cameras": (changed(camera_names=["agentview"] * 17), "camera_names is"),
    "a camera at a path": (changed(camera_names="../x"), "camera_names is '../x'"),
    "no control": (changed(control_freq=0), "control_freq is 0; it must be a number from 1 to"),
    "no number": (changed(control_freq=True), "control_freq is True"),
    "not a number": (changed(horizon=float("nan")), "horizon is nan"),
    "a text for a switch": (changed(ignore_done="yes"), "ignore_done is 'yes'"),
    "a path within": (changed_arm(custom_fpath="/etc/passwd"), "right has 'custom_fpath'="),
    "a gain out of range": (changed_arm(kp=1e9), "right.kp is 1000000000.0"),
    "a gain that is text": (changed_arm(kp="150"), "right.kp is '150'"),
    "an endless list": (changed_arm(output_max=[0.1] * 65), "right.output_max is [0.1"),
    "an unknown controller": (changed_arm(type="os.system"), "right.type is 'os.system'"),
    "an unknown gripper": (changed_arm(gripper={"type": "x"}), "right.gripper.type is 'x'"),
    "a gripper of text": (changed_arm(gripper="x"), "right.gripper is 'x'"),
    "an unknown robot's controller": (changed_controller(type="PLUGIN"), "type is 'PLUGIN'"),
    "an unknown part": (changed_controller(body_parts={"tail": {}}), "body_parts has 'tail'"),
    "parts that are none": (changed_controller(body_parts="x"), "body_parts is 'x'"),
    "more of a controller": (changed_controller(path="/x"), "controller_configs has 'path'='/x'"),
    "no settings": (env_meta_for("Lift") | {"env_kwargs": [1]}, "env_kwargs are [1]"),
    "a task at a path": (env_meta_for("Lift") | {"env_name": "../Lift"}, "env_name is '../Lift'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_setting_that_no_file_of_robosuites_has_is_refused(name: str) -> None:
    env_meta, message = HOSTILE[name]
    with pytest.raises(UserError) as error:
        check_env_meta(env_meta)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


ORDINARY = {
    "two robots": changed(
        robots=["Panda", "Panda"],
        env_configuration="single-arm-opposed",
        controller_configs=[env_meta_for("Lift")["env_kwargs"]["controller_configs"]] * 2,
    ),
    "cameras": changed(
        camera_names=["agentview", "robot0_eye_in_hand"], camera_heights=[84, 84], horizon=400
    ),
    "the default controller": changed(controller_configs=None),
    "arms by name": changed_controller(body_parts={"arms": {"right": {"type": "OSC_POSE"}}}),
    "gains of every joint": changed_arm(kp=[150] * 7, damping_ratio=1, input_type="delta"),
    "another task": env_meta_for("Lift") | {"env_name": "ToolHang"},
}


@pytest.mark.parametrize("name", ORDINARY)
def test_what_files_of_other_tasks_say_is_let_in(name: str) -> None:
    check_env_meta(ORDINARY[name])


@pytest.mark.slow
def test_robots_grippers_and_controllers_are_robosuites_own() -> None:
    from vla_trqam.envs.robomimic import env as robomimic

    robomimic.create_robomimic_env(env_meta_for("Lift"))  # imports robosuite in quiet
    import robosuite
    from robosuite.robots import ROBOT_CLASS_MAPPING

    assert set(ROBOT_NAMES) == set(ROBOT_CLASS_MAPPING)
    assert set(GRIPPER_NAMES) == set(robosuite.ALL_GRIPPERS) - {None}
    configs = Path(robosuite.__file__).parent / "controllers/config/default/parts"
    parts = [json.loads(path.read_text()) for path in configs.glob("*.json")]
    assert len(parts) > 3
    for part in parts:
        check_env_meta(changed_arm(**part))
