"""robosuite's control step without its look-ups: the same arithmetic, several times as fast.

A stock step of 25 simulator substeps spends about 85% of its time in Python: names are looked up,
properties rebuilt and every sensor polled in every substep, and the model is brought up to date
three times. Here a substep is five calls: `mj_step1`, the Jacobian, the mass matrix, one compiled
controller kernel that calls robosuite's own compiled functions, `mj_step2`. Tests hold the result
to the stock step within 1e-12 over 150 steps, contacts included.

Importing this module imports robosuite (seconds); `RobomimicEnv` does so on demand.
"""

from collections.abc import Sequence
from typing import Any

import mujoco
import numba
import numpy as np
from robosuite.controllers.composite.composite_controller import CompositeController
from robosuite.controllers.parts.arm.osc import OperationalSpaceController
from robosuite.controllers.parts.gripper.simple_grip import SimpleGripController
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error
from robosuite.utils.observables import NO_CORRUPTION, NO_DELAY, NO_FILTER, Observable

from vla_trqam.errors import UserError


@numba.njit(cache=True)
def osc_torques(
    goal_pos: np.ndarray,
    goal_ori: np.ndarray,
    site_pos: np.ndarray,
    site_ori: np.ndarray,
    jac_pos: np.ndarray,
    jac_ori: np.ndarray,
    full_mass: np.ndarray,
    bias: np.ndarray,
    qpos: np.ndarray,
    qvel: np.ndarray,
    qpos_index: np.ndarray,
    qvel_index: np.ndarray,
    initial_joint: np.ndarray,
    kp: np.ndarray,
    kd: np.ndarray,
    limit_low: np.ndarray,
    limit_high: np.ndarray,
) -> np.ndarray:
    """Joint torques of operational-space control with decoupled position and orientation.

    F = Λ_pos (k_p Δx - k_d ẋ), M = Λ_ori (k_p Δφ - k_d ω), τ = Jᵀ[F; M] + bias + Nᵀ τ_null
    (Khatib 1987), as `OperationalSpaceController.run_controller` computes it over a fixed base.

    Args:
        goal_pos: (3,) world position wanted, m.
        goal_ori: (3, 3) world orientation wanted.
        site_pos: (3,) position of the grip site, m.
        site_ori: (9,) its rotation matrix, row-major.
        jac_pos: (3, V) translational Jacobian of the site.
        jac_ori: (3, V) rotational Jacobian of the site.
        full_mass: (V, V) mass matrix of the whole model.
        bias: (V,) gravity and Coriolis forces of the whole model.
        qpos: positions of the whole model.
        qvel: (V,) velocities of the whole model.
        qpos_index: (7,) where `qpos` holds the arm.
        qvel_index: (7,) where `qvel` holds the arm.
        initial_joint: (7,) the pose that the null space pulls towards, rad.
        kp: (6,) stiffness.
        kd: (6,) damping.
        limit_low: (7,) least torques of the actuators.
        limit_high: (7,) greatest torques of the actuators.

    Returns:
        (7,) torques, N m, within the bounds.
    """
    n = len(qvel_index)
    j_pos, j_ori, j_full = np.empty((3, n)), np.empty((3, n)), np.empty((6, n))
    mass = np.empty((n, n)).T  # Fortran order, as robosuite's fancy indexing leaves it
    joint_pos, joint_vel, arm_bias = np.empty(n), np.empty(n), np.empty(n)
    for k in range(n):
        v = qvel_index[k]
        joint_pos[k], joint_vel[k], arm_bias[k] = qpos[qpos_index[k]], qvel[v], bias[v]
        for i in range(3):
            j_pos[i, k] = j_full[i, k] = jac_pos[i, v]
            j_ori[i, k] = j_full[i + 3, k] = jac_ori[i, v]
        for i in range(n):
            mass[i, k] = full_mass[qvel_index[i], v]
    ori_error = orientation_error(goal_ori, site_ori.reshape(3, 3))
    force = (goal_pos - site_pos) * kp[:3] - np.dot(jac_pos, qvel) * kd[:3]
    torque = ori_error * kp[3:] - np.dot(jac_ori, qvel) * kd[3:]
    _, lambda_pos, lambda_ori, null_space = opspace_matrices(mass, j_full, j_pos, j_ori)
    wrench = np.concatenate((np.dot(lambda_pos, force), np.dot(lambda_ori, torque)))
    torques = np.dot(j_full.T, wrench) + arm_bias
    torques += nullspace_torques(mass, null_space, initial_joint, joint_pos, joint_vel)
    return np.minimum(np.maximum(torques, limit_low), limit_high)


class UnsupportedError(UserError):
    """A robot, controller or sensor of another kind than is done here: robosuite's step does it."""


class SampleClock:
    """When robosuite's sensors sample: once a control step, at a substep that resets shift.

    Repeats `Observable.update`'s floating-point bookkeeping, which all sensors share.
    """

    def __init__(self, observable: Observable, timestep: float) -> None:
        """Take over from one sensor; `timestep` is the substep's length in seconds."""
        self.elapsed = float(observable._time_since_last_sample)
        self.sampled = bool(observable._sampled)
        self.period = float(observable._sampling_timestep)
        self.timestep = timestep

    def tick(self) -> bool:
        """Let one substep pass; True when the sensors sample at its end."""
        self.elapsed += self.timestep
        take = not self.sampled and self.period >= self.elapsed
        self.sampled = self.sampled or take
        if self.elapsed >= self.period:
            take = take or not self.sampled
            self.elapsed %= self.period
            self.sampled = False
        return take


class OscStep:
    """Steps one robosuite environment with one arm (the Panda) under fixed-impedance OSC_POSE.

    After a reset of the environment call `start_episode`, then per control step `step` and
    `observation`. Do not mix with `env.step` within an episode: the sensors' clocks would part.
    """

    def __init__(self, env: Any, obs_keys: Sequence[str]) -> None:
        """Bind to `env`'s simulator, which must outlive this object (no hard resets).

        Raises:
            UnsupportedError: the robot, controller or sensors are not the supported kind.
            UserError: a key names no sensor.
        """
        self._env = env
        self._robot, self._arm, self._grip = _supported_controllers(env)
        self._obs_keys = tuple(obs_keys)
        self._sensors = _needed_sensors(env, self._obs_keys)
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._substeps = int(env.control_timestep / env.model_timestep)
        self._bind_views()
        self.start_episode()

    def _bind_views(self) -> None:
        """Hold on to arrays that MuJoCo updates in place, instead of asking for them anew."""
        model, data, arm = self._model, self._data, self._arm
        self._site = self._env.sim.model.site_name2id(arm.ref_name)
        base = self._env.sim.model.site_name2id(f"{arm.naming_prefix}{arm.part_name}_center")
        self._base_pos = data.site_xpos[base]
        self._base_ori = data.site_xmat[base].reshape(3, 3)
        self._site_pos, self._site_ori = data.site_xpos[self._site], data.site_xmat[self._site]
        self._jac_pos, self._jac_ori = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        self._mass = np.zeros((model.nv, model.nv))
        self._qpos_index = np.array(arm.qpos_index, dtype=np.int64)
        self._qvel_index = np.array(arm.qvel_index, dtype=np.int64)
        actuators = self._robot._ref_actuators_indexes_dict
        self._arm_actuators = np.array(actuators["right"])
        self._grip_actuators = np.array(actuators["right_gripper"])
        limits = model.actuator_ctrlrange
        self._arm_low, self._arm_high = limits[self._arm_actuators].T.copy()
        self._grip_low, self._grip_high = limits[self._grip_actuators].T.copy()

    def start_episode(self) -> None:
        """Take over from a reset, which makes new controllers and restarts the sensors' clocks."""
        self._robot, self._arm, self._grip = _supported_controllers(self._env)
        self._arm.update_origin(self._base_pos, self._base_ori)
        self._initial_joint = np.array(self._arm.initial_joint)
        self._kp, self._kd = np.array(self._arm.kp), np.array(self._arm.kd)
        # robosuite's controller computes its first torques with the mass matrix of its making,
        # which precedes the reset of the gripper and the objects.
        self._first_mass = None if self._arm.new_update else np.array(self._arm.mass_matrix)
        self._clock = SampleClock(self._sensors[0], self._env.model_timestep)
        self._samples = self._env._obs_cache

    def step(self, action: np.ndarray) -> None:
        """Run one control step.

        Args:
            action: (7,) float64: pose change and gripper, each in [-1, 1].
        """
        mj_step1, mj_step2 = mujoco.mj_step1, mujoco.mj_step2
        model, data, ctrl, clock = self._model, self._data, self._data.ctrl, self._clock
        mj_step1(model, data)
        goal_pos, goal_ori = self._goal(action)
        ctrl[self._grip_actuators] = self._grip_command(action[6:])
        for substep in range(self._substeps):
            if substep > 0:
                mj_step1(model, data)
            ctrl[self._arm_actuators] = self._torques(goal_pos, goal_ori)
            mj_step2(model, data)
            if clock.tick():
                self._sample()
        self._env.timestep += 1
        self._env.cur_time += self._env.control_timestep

    def observation(self) -> np.ndarray:
        """The last sample of the wanted keys, concatenated, (O,) float64."""
        return np.concatenate([np.atleast_1d(self._value(key)) for key in self._obs_keys])

    def _goal(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pose wanted in the world: where the site is now, moved by the scaled action."""
        arm = self._arm
        arm.ref_pos[:] = self._site_pos
        arm.ref_ori_mat[:] = self._site_ori.reshape(3, 3)
        delta = arm.scale_action(action[:6])
        goal_pos = arm.compute_goal_pos(delta[:3])
        goal_ori = arm.compute_goal_ori(delta[3:])
        if arm.input_ref_frame == "base":
            goal_pos = self._base_pos + np.dot(self._base_ori, goal_pos)
            goal_ori = np.dot(self._base_ori, goal_ori)
        return goal_pos, goal_ori

    def _grip_command(self, action: np.ndarray) -> np.ndarray:
        grip = self._grip
        grip.set_goal(self._robot.gripper["right"].format_action(action))
        return np.clip(grip.run_controller(), self._grip_low, self._grip_high)

    def _torques(self, goal_pos: np.ndarray, goal_ori: np.ndarray) -> np.ndarray:
        model, data = self._model, self._data
        mujoco.mj_jacSite(model, data, self._jac_pos, self._jac_ori, self._site)
        mujoco.mj_fullM(model, self._mass, data.qM)
        if self._first_mass is not None:
            self._mass[np.ix_(self._qvel_index, self._qvel_index)] = self._first_mass
            self._first_mass = None
        torques: np.ndarray = osc_torques(
            goal_pos,
            goal_ori,
            self._site_pos,
            self._site_ori,
            self._jac_pos,
            self._jac_ori,
            self._mass,
            data.qfrc_bias,
            data.qpos,
            data.qvel,
            self._qpos_index,
            self._qvel_index,
            self._initial_joint,
            self._kp,
            self._kd,
            self._arm_low,
            self._arm_high,
        )
        return torques

    def _sample(self) -> None:
        """Poll the needed sensors in robosuite's order: later ones use earlier ones' samples."""
        for sensor in self._sensors:
            value = np.array(sensor._sensor(self._samples))
            sensor._current_observed_value = value[0] if value.shape == (1,) else value
            self._samples[sensor.name] = np.array(sensor._current_observed_value)

    def _value(self, key: str) -> np.ndarray:
        if key != "object":
            return self._samples[key]
        parts = [s.obs for s in self._sensors if s.modality == "object" and s.is_active()]
        return np.concatenate([np.atleast_1d(part) for part in parts])


def _supported_controllers(env: Any) -> tuple[Any, Any, Any]:
    """The robot, its arm controller and its gripper controller, if they are the kind done here."""
    robot = env.robots[0]
    composite = robot.composite_controller
    parts = dict(composite.part_controllers)
    arm, grip = parts.get("right"), parts.get("right_gripper")
    for wanted, holds in (
        ("one robot with one arm", len(env.robots) == 1 and robot.arms == ["right"]),
        ("a fixed base", not robot.is_mobile),
        ("the BASIC composite controller", type(composite) is CompositeController),
        ("an arm and a gripper, nothing else", set(parts) == {"right", "right_gripper"}),
        ("an OSC controller", type(arm) is OperationalSpaceController),
        ("a GRIP gripper controller", type(grip) is SimpleGripController),
        *_osc_settings(arm),
        ("no gripper interpolation", getattr(grip, "interpolator", None) is None),
        ("observations without camera images", not env.use_camera_obs),
    ):
        if not holds:
            raise UnsupportedError(
                f"fast_step supports fixed-impedance OSC_POSE on one arm and needs {wanted}; "
                f"this task's env_args have another controller: pass fast_step=False."
            )
    return robot, arm, grip


def _osc_settings(arm: Any) -> list[tuple[str, bool]]:
    if type(arm) is not OperationalSpaceController:
        return []
    return [
        ("impedance_mode 'fixed'", arm.impedance_mode == "fixed"),
        ("input_type 'delta'", arm.input_type == "delta"),
        ("orientation control", arm.use_ori is True),
        ("uncouple_pos_ori true", bool(arm.uncoupling)),
        ("no interpolation", arm.interpolator_pos is None and arm.interpolator_ori is None),
        ("no position_limits", arm.position_limits is None),
        ("no orientation_limits", arm.orientation_limits is None),
        ("goals relative to the achieved pose", arm._goal_update_mode == "achieved"),
    ]


def _needed_sensors(env: Any, obs_keys: Sequence[str]) -> list[Observable]:
    """The enabled sensors that feed `obs_keys`, in robosuite's order of sampling.

    All object sensors and the end effector's pose, which the relative ones read, are kept whenever
    `object` is wanted.

    Raises:
        UserError: a key names no sensor.
        UnsupportedError: a sensor has noise, a filter or a delay.
    """
    enabled = {name: s for name, s in env._observables.items() if s.is_enabled()}
    unknown = [key for key in obs_keys if key != "object" and key not in enabled]
    if unknown or not obs_keys:
        raise UserError(
            f"{type(env).__name__} has no observation {unknown}; it has {set(enabled)}."
        )
    names = set(obs_keys)
    if "object" in names:
        names |= {name for name, s in enabled.items() if s.modality == "object"}
        names |= {"robot0_eef_pos", "robot0_eef_quat"}
    if names & {"robot0_joint_pos_cos", "robot0_joint_pos_sin"}:
        names.add("robot0_joint_pos")
    sensors = [s for name, s in enabled.items() if name in names]
    for s in sensors:
        if (s._corrupter, s._filter, s._delayer) != (NO_CORRUPTION, NO_FILTER, NO_DELAY):
            raise UnsupportedError(
                f"fast_step supports no noise, filter or delay on sensor {s.name}."
            )
    return sensors
