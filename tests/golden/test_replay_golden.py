import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_files import Problem, write_golden
from replay_golden import ATOL, RTOL, main, replay

from vla_trqam.kernel_choice import Kernels, chosen_kernels

BOTH_WAYS = ("fast", "plain")
FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
TRQAM, QAM = FOLDER / "golden_trqam.npz", FOLDER / "golden_qam.npz"
QAM_E = FOLDER / "golden_qam_e.npz"

NETWORKS = (
    "modules_actor_fast/mlp",
    "modules_actor_slow/mlp",
    "modules_target_actor_slow/mlp",
    "modules_critic/value_net",
    "modules_target_critic/value_net",
)
QUANTITIES = (
    *("out/xs", "out/adjoints", "out/next_actions", "out/lambda_raw", "out/kl_ema"),
    *("info/actor/adj_loss", "info/actor/flow_loss", "info/critic/critic_loss"),
    *("info/actor/path_kl", "info/grad/norm", "eval/actions"),
    *(f"final/{name}" for name in NETWORKS),
)


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def with_config(data: dict[str, np.ndarray], **changes: Any) -> dict[str, np.ndarray]:
    config = json.loads(bytes(data["config.json"]).decode()) | changes
    encoded = json.dumps({k: v for k, v in config.items() if v is not None}).encode()
    return data | {"config.json": np.frombuffer(encoded, dtype=np.uint8)}


def test_the_tolerance_is_the_documented_one() -> None:
    assert (RTOL, ATOL) == (2e-4, 2e-5)


@pytest.mark.parametrize("kernels", BOTH_WAYS)
@pytest.mark.parametrize("path", [TRQAM, QAM], ids=["trqam", "qam"])
def test_the_authors_updates_are_reproduced(path: Path, kernels: Kernels) -> None:
    with chosen_kernels(kernels):
        comparison = replay(path)
    assert comparison.failures == []
    expected = [q for q in QUANTITIES if path == TRQAM or q.startswith(("info/", "final/"))]
    assert set(expected) - {"info/actor/path_kl"} <= comparison.worst.keys()
    assert comparison.not_compared == ["batch/terminals", "modules_target_actor_fast/mlp"]


@pytest.mark.parametrize("kernels", BOTH_WAYS)
def test_the_authors_updates_of_qam_e_are_reproduced(kernels: Kernels) -> None:
    with chosen_kernels(kernels):
        comparison = replay(QAM_E, rtol=1e-5, atol=1e-6)
    assert comparison.failures == []
    edits = ("edit_alpha", "edit_alpha_loss", "edit_entropy", "edit_entropy_loss", "edit_q_loss")
    networks = (*NETWORKS, "modules_edit_actor", "modules_edit_alpha")
    assert {f"info/actor/{name}" for name in edits} <= comparison.worst.keys()
    assert {f"final/{name}" for name in networks} <= comparison.worst.keys()
    assert comparison.not_compared == ["batch/terminals", "modules_target_actor_fast/mlp"]


@pytest.mark.parametrize("key", ["u1/draw/01_normal", "u0/draw/15_normal", "u0/draw/16_normal"])
def test_other_noise_of_an_edit_is_found(key: str, tmp_path: Path) -> None:
    data = load(QAM_E)
    data[key] = data[key] + np.float32(0.05)
    np.savez(tmp_path / "perturbed.npz", **data)
    assert main([str(tmp_path / "perturbed.npz")]) == 1


BASELINES = {
    "fql": [
        "info/actor/distill_loss",
        "info/actor/bc_flow_loss",
        "final/modules_actor_onestep_flow/mlp",
    ],
    "ifql": ["info/value/value_loss", "info/value/v_max", "final/modules_value/value_net"],
    "dsrl": ["info/critic/distill_loss", "info/actor/entropy", "final/modules_alpha"],
    "cgql_l": ["info/critic/noisy_critic_loss", "final/modules_target_actor/mlp"],
}
CRITICS = {"cgql_l": "mlp"}
# Derived numbers, and totals of what is compared by its parts.
LEFT_OUT = {"batch/terminals", "info/actor", "info/critic"}


@pytest.mark.parametrize("kernels", BOTH_WAYS)
@pytest.mark.parametrize("agent", BASELINES)
def test_the_authors_baselines_are_reproduced(agent: str, kernels: Kernels) -> None:
    with chosen_kernels(kernels):
        comparison = replay(FOLDER / f"golden_{agent}.npz", rtol=1e-5, atol=1e-6)
    assert comparison.failures == []
    shared = ["info/critic/critic_loss", "info/critic/q_min", "info/grad/norm"]
    critic = CRITICS.get(agent, "value_net")
    shared += [f"final/modules_critic/{critic}", f"final/modules_target_critic/{critic}"]
    assert {*shared, *BASELINES[agent]} <= comparison.worst.keys()
    assert set(comparison.not_compared) <= LEFT_OUT


@pytest.mark.parametrize("agent", BASELINES)
@pytest.mark.parametrize("key", ["u1/draw/00_normal", "u0/batch/actions", "u1/batch/masks"])
def test_a_perturbed_input_of_a_baseline_is_found(agent: str, key: str, tmp_path: Path) -> None:
    data = load(FOLDER / f"golden_{agent}.npz")
    data[key] = 1 - data[key] if key.endswith("masks") else data[key] + np.float32(0.05)
    np.savez(tmp_path / "perturbed.npz", **data)
    assert main([str(tmp_path / "perturbed.npz")]) == 1


@pytest.mark.parametrize("kernels", BOTH_WAYS)
def test_the_documented_command_prints_every_quantity_and_exits_with_0(kernels: Kernels) -> None:
    command = [sys.executable, "benchmarks/replay_golden.py", str(TRQAM), f"--kernels={kernels}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    printed = [line.split()[0] for line in run.stdout.splitlines()]
    assert set(QUANTITIES) <= set(printed)
    assert run.stdout.splitlines()[-1] == "all within tolerance"


RECORDED = [
    *(f"u2/out/{k}" for k in ("xs", "adjoints", "ts", "next_actions", "lambda_raw", "kl_ema")),
    *("u1/in/lambda_raw", "u1/in/kl_ema"),
    *(f"u2/info/actor/{k}" for k in ("adj_loss", "flow_loss", "path_kl", "adj_mean", "adj_max")),
    *(f"u2/info/critic/{k}" for k in ("critic_loss", "q_mean", "q_max", "q_min")),
    *(f"u2/info/grad/{k}" for k in ("norm", "max", "min")),
    *(f"u2/info/dual/{k}" for k in ("lambda", "kl_estimate", "kl_ema", "kl_clipped")),
    *(f"final/{name}/Dense_1/kernel" for name in NETWORKS),
    *("final/modules_critic/value_net/LayerNorm_1/bias", "eval/actions"),
]
USED = [
    *(f"u0/batch/{k}" for k in ("observations", "actions", "next_observations", "rewards")),
    *(f"u0/noise/{k}" for k in ("next_action", "bc_x0", "bc_t", "sde_x0", "sde_steps")),
    *(f"init/{name}/Dense_0/bias" for name in NETWORKS),
    *("u0/in/lambda_raw", "u0/in/kl_ema", "eval/noise"),
]


def nudge(array: np.ndarray) -> np.ndarray:
    """One number moved by ten times the tolerance and a bit."""
    moved = np.array(array)
    # The last number of a batch's fields is read; that of the increments is not (no noise there).
    index = tuple(0 if i == 0 else -1 for i in range(moved.ndim))
    moved[index] += 10 * (ATOL + RTOL * abs(moved[index]))
    return moved


@pytest.mark.parametrize("key", RECORDED)
def test_a_perturbed_output_is_found_and_named(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load(TRQAM)
    data[key] = nudge(data[key])
    np.savez(tmp_path / "perturbed.npz", **data)
    assert main([str(tmp_path / "perturbed.npz")]) == 1
    bad = [x.split()[0] for x in capsys.readouterr().out.splitlines() if "OUT OF TOL" in x]
    assert len(bad) == 1
    assert bad[0] in key


@pytest.mark.parametrize("key", USED)
def test_a_perturbed_input_is_found(key: str, tmp_path: Path) -> None:
    data = load(TRQAM)
    data[key] = data[key] + np.float32(0.02)
    np.savez(tmp_path / "perturbed.npz", **data)
    assert main([str(tmp_path / "perturbed.npz")]) == 1


def test_a_recorded_nan_is_out_of_tolerance(tmp_path: Path) -> None:
    data = load(TRQAM)
    data["u1/out/adjoints"][3, 2, 1] = np.nan
    np.savez(tmp_path / "nan.npz", **data)
    assert main([str(tmp_path / "nan.npz")]) == 1


ONE_STEP = {"horizon_length": 1, "action_dim": 2, "flow_steps": 4, "num_qs": 2}
PROBLEMS = {
    "layer norm in the actor, H=1, K=4, two critics, invalid rows": Problem(
        invalid_rows=(0, 3),
        settings=ONE_STEP | {"actor_layer_norm": True, "actor_hidden_dims": [24]},
    ),
    "the KL clipped at twice a tight budget, lambda at its upper bound": Problem(
        invalid_rows=(1,), settings={"kl_budget": 0.01, "lambda_max": 1.00005, "kl_ema_coef": 1.0}
    ),
    "a wide budget, lambda at its lower bound": Problem(
        settings={"kl_budget": 50.0, "lambda_min": 0.95, "kl_clip_coef": 3.0}
    ),
    "H=5, K=10, ten critics without layer norm, no gradient clip": Problem(
        batch_size=4,
        settings={
            **{"horizon_length": 5, "num_qs": 10, "value_layer_norm": False, "clip_grad": False},
            **{"value_hidden_dims": [48, 24, 16], "actor_hidden_dims": [40, 24, 32], "rho": 0.0},
        },
    ),
    "unclipped critic actions, another scale of lambda": Problem(
        settings={"clip_adj": False, "lam_scale": 1.7, "eta_lambda": 0.2, "lr": 1e-3, "tau": 0.1}
    ),
    "every row invalid": Problem(invalid_rows=(0, 1, 2, 3, 4, 5)),
    "qam with layer norm, H=1, K=4, invalid rows": Problem(
        agent="qam",
        invalid_rows=(2,),
        settings=ONE_STEP | {"actor_layer_norm": True, "inv_temp": 0.3},
    ),
    "qam, H=5, K=7": Problem(
        agent="qam", settings={"horizon_length": 5, "flow_steps": 7, "inv_temp": 10.0}
    ),
    "qam-e with layer norm, H=1, K=4, two critics, invalid rows, wide edits": Problem(
        agent="qam",
        invalid_rows=(0, 3),
        settings=ONE_STEP | {"actor_layer_norm": True, "edit_scale": 0.9},
    ),
    "qam-e, H=5, K=7, ten critics without layer norm, no clips, another target": Problem(
        agent="qam",
        batch_size=4,
        settings={
            **{"horizon_length": 5, "flow_steps": 7, "num_qs": 10, "value_layer_norm": False},
            **{"clip_adj": False, "clip_grad": False, "edit_scale": 0.3, "rho": 0.0},
            **{"edit_target_entropy": 4.0, "actor_hidden_dims": [40, 24], "inv_temp": 0.1},
        },
    ),
}


@pytest.mark.parametrize(("seed", "kernels"), [(0, "fast"), (1, "fast"), (0, "plain")])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_files_of_other_sizes_written_by_the_slow_reference_replay(
    problem: Problem, seed: int, kernels: Kernels, tmp_path: Path
) -> None:
    write_golden(tmp_path / "made.npz", problem, seed)
    with chosen_kernels(kernels):
        comparison = replay(tmp_path / "made.npz")
    assert comparison.failures == [], comparison.worst


def test_the_made_files_reach_the_clip_and_both_bounds(tmp_path: Path) -> None:
    _, tight, wide, *_ = PROBLEMS.values()
    data = write_golden(tmp_path / "tight.npz", tight)
    assert data["u0/info/dual/kl_clipped"] == 1.0
    assert data["u0/out/lambda_raw"] == np.float32(1.00005)
    assert data["u0/out/kl_ema"] == np.float32(0.02)
    data = write_golden(tmp_path / "wide.npz", wide)
    assert data["u0/out/lambda_raw"] == np.float32(0.95)


def test_invalid_rows_change_the_recorded_losses(tmp_path: Path) -> None:
    whole = write_golden(tmp_path / "whole.npz", Problem())
    cut = write_golden(tmp_path / "cut.npz", Problem(invalid_rows=(0, 3)))
    for name in ("critic/critic_loss", "actor/flow_loss"):
        assert cut[f"u0/info/{name}"] < whole[f"u0/info/{name}"]
    assert cut["u0/info/actor/adj_loss"] == whole["u0/info/actor/adj_loss"]


def error_of(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused file leaves on stderr."""
    assert main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.npz does not exist" in error_of(tmp_path / "absent.npz", capsys)


def write_text(path: Path) -> None:
    path.write_text("not an archive\n")


def write_empty(path: Path) -> None:
    path.write_bytes(b"")


def write_single_array(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))


def write_objects(path: Path) -> None:
    np.savez(path, **{"config.json": np.array([{"agent_name": "trqam"}], dtype=object)})


def write_truncated(path: Path) -> None:
    path.write_bytes(TRQAM.read_bytes()[:5000])


@pytest.mark.parametrize(
    "write", [write_text, write_empty, write_single_array, write_objects, write_truncated]
)
def test_what_is_no_npz_of_arrays_is_refused(
    write: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "bad.npz")
    assert "not a readable npz archive" in error_of(tmp_path / "bad.npz", capsys)


REFUSED_SETTINGS = [
    ({"agent_name": "sac_flow"}, "only trqam, qam, fql, ifql, dsrl, cgql, cgql_l are replayed"),
    ({"agent_name": None}, "config.json has no agent_name"),
    ({"kl_budget": None}, "config.json has no kl_budget"),
    ({"kl_budget": -1.0}, "kl_budget is -1.0"),
    ({"best_of_n": 4}, "best_of_n is 4; only 1 is replayed"),
    ({"edit_scale": 0.1}, "edit_scale is 0.1; only 0.0 is replayed"),
    ({"use_target_grad": False}, "use_target_grad is False"),
    ({"target_actor": False}, "target_actor is False"),
    ({"action_chunking": False}, "action_chunking is False"),
    ({"ob_dims": [64, 64, 3]}, "only vectors are replayed"),
    ({"action_dim": 4}, "has shape"),
    ({"num_qs": 10}, "has shape"),
    ({"actor_hidden_dims": [32, 32, 32]}, "init/modules_actor_fast/mlp/Dense_2"),
    ({"actor_layer_norm": True}, "no entry init/modules_actor_fast/mlp/LayerNorm_0/scale"),
    ({"flow_steps": 11}, "u0/noise/sde_steps has shape"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_SETTINGS)
def test_settings_that_are_not_replayed_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "other.npz", **with_config(load(TRQAM), **changes))
    assert message in error_of(tmp_path / "other.npz", capsys)


def test_a_qam_file_with_a_residual_field_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "other.npz", **with_config(load(QAM), residual=True))
    assert "residual is True; only False is replayed" in error_of(tmp_path / "other.npz", capsys)


REQUIRED = [
    *("config.json", "u0/in/lambda_raw", "u0/in/kl_ema", "u1/batch/valid", "u2/noise/bc_t"),
    *(f"u1/out/{k}" for k in ("xs", "adjoints", "next_actions", "lambda_raw", "kl_ema")),
    *("u2/info/actor/adj_loss", "u2/info/actor/flow_loss", "u0/info/critic/critic_loss"),
    *("u0/info/actor/path_kl", "u0/info/grad/norm", "eval/noise"),
    "init/modules_critic/value_net/Dense_0/kernel",
    "final/modules_target_critic/value_net/LayerNorm_1/scale",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_file_without_a_required_entry_is_refused(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load(TRQAM)
    del data[key]
    np.savez(tmp_path / "incomplete.npz", **data)
    assert f"has no entry {key};" in error_of(tmp_path / "incomplete.npz", capsys)


def test_a_file_without_updates_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {k: v for k, v in load(TRQAM).items() if not k.startswith("u")}
    np.savez(tmp_path / "none.npz", **data)
    assert "holds no updates" in error_of(tmp_path / "none.npz", capsys)


def test_a_qam_file_with_a_draw_missing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load(QAM)
    del data["u1/draw/13_normal"]
    np.savez(tmp_path / "short.npz", **data)
    assert "13 u1/draw entries, not 14" in error_of(tmp_path / "short.npz", capsys)


def test_fractions_in_valid_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load(TRQAM)
    data["u0/batch/valid"] = data["u0/batch/valid"] * np.float32(0.5)
    np.savez(tmp_path / "half.npz", **data)
    assert "u0/batch/valid holds more than zeros and ones" in error_of(
        tmp_path / "half.npz", capsys
    )


def test_a_config_that_is_not_json_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, message in [(b"{agent", "is not JSON"), (b"[1]", "is not an object of settings")]:
        data = load(TRQAM) | {"config.json": np.frombuffer(text, dtype=np.uint8)}
        np.savez(tmp_path / "config.npz", **data)
        assert f"config.json {message}" in error_of(tmp_path / "config.npz", capsys)


@pytest.mark.parametrize("flags", [["--rtol", "0"], ["--atol", "-1"], ["--rtol", "nan"]])
def test_a_tolerance_without_meaning_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main([str(TRQAM), *flags])
    assert exit_status.value.code == 2
