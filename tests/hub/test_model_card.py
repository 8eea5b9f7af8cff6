"""The card's numbers are those of the run's files, and it claims nothing that they do not hold."""

from __future__ import annotations

import ast
import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pushed_run import COMMAND, CONFIG, make_adapter, write_checkpoint, write_run

from vla_trqam.errors import UserError
from vla_trqam.hub.card_facts import find_checkpoint, is_on_the_hub, read_facts
from vla_trqam.hub.model_card import model_card
from vla_trqam.hub.push import prepare_push

REPO = "alice/lift"


def card_of(run: Path, checkpoint: str = "last", license_name: str | None = "gemma") -> str:
    return model_card(read_facts(run, find_checkpoint(run, checkpoint)), REPO, license_name)


def metadata(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found is not None
    return dict(yaml.safe_load(found[1]))


def with_config(tmp_path: Path, **changes: Any) -> Path:
    config = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        config[section][key] = value
    return write_run(tmp_path / "run", config=config)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_the_metadata_name_base_data_library_and_licence(run: Path):
    data = metadata(card_of(run))
    assert data["license"] == "gemma"
    assert data["library_name"] == "lerobot"
    assert data["pipeline_tag"] == "robotics"
    assert data["base_model"] == "lab/pi0"
    assert data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["lab/rollouts"]
    assert {"robotics", "pi0", "trqam"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 64.0
    assert result["dataset"]["name"] == "Robomimic Lift"


def test_the_card_gives_rates_and_the_published_interval_of_their_difference(run: Path):
    card = card_of(run)
    assert "| base | 44.0% | 31.2% to 57.7% | 22 of 50 |" in card
    assert "| tuned | 64.0% | 50.1% to 75.9% | 32 of 50 |" in card
    # Newcombe's own example for method 10: 0.0562 to 0.3292.
    assert "| difference | +20.0 points | +5.6 to +32.9 points | 12 gained, 2 lost |" in card
    assert "the same 50 initial states" in card
    assert "The interval of the difference excludes zero." in card


def rewrite_report(run: Path, **changes: Any) -> dict[str, Any]:
    report = json.loads((run / "report.json").read_text())
    changed = report | changes
    (run / "report.json").write_text(json.dumps(changed))
    return dict(report)


def with_base_as_it_came(run: Path, own: int, tuned: int, solved: int) -> None:
    """Its base came with another number of flow steps and then solves the first states alone."""
    raw = rewrite_report(run)["evaluation"]
    came = {
        "num_flow_steps": own,
        "num_flow_steps_of_base_and_tuned": tuned,
        "success": [number < solved for number in range(len(raw["seeds"]))],
        "steps": raw["base_steps"],
    }
    steps = {"own": own, "tuned": tuned}
    rewrite_report(run, evaluation=raw | {"base_as_it_came": came}, flow_steps=steps)
    path = run / "checkpoints/last/pretrained_model/config.json"
    path.write_text(json.dumps({"type": "pi0", "license": None, "num_inference_steps": tuned}))


def test_the_card_names_both_numbers_of_flow_steps_and_both_effects(run: Path):
    with_base_as_it_came(run, own=10, tuned=4, solved=16)
    card = card_of(run)
    assert "- flow steps from noise to action: 4; its base came with 10" in card
    assert "| base as it came, 10 flow steps | 32.0% | 20.8% to 45.8% | 16 of 50 |" in card
    assert "| base, 4 flow steps | 44.0% | 31.2% to 57.7% | 22 of 50 |" in card
    assert "| tuned, 4 flow steps | 64.0% | 50.1% to 75.9% | 32 of 50 |" in card
    assert "| gain of tuning | +20.0 points | +5.6 to +32.9 points | 12 gained, 2 lost |" in card
    assert "| fewer steps alone | +12.0 points | +2.2 to +21.4 points |" in card
    assert "The interval of the gain of tuning excludes zero. The base came with 10 flow" in card
    assert "in total, +32.0 points (95% interval +17.8 to +43.9)." in card


def test_more_steps_than_the_bases_own_are_not_called_fewer(run: Path):
    with_base_as_it_came(run, own=2, tuned=4, solved=16)
    assert "| more steps alone | +12.0 points |" in card_of(run)


def test_a_card_without_a_report_has_the_number_of_the_policys_config(tmp_path: Path):
    run = write_run(tmp_path / "unfinished", finished=False)
    path = run / "checkpoints/last/pretrained_model/config.json"
    path.write_text(json.dumps({"type": "smolvla", "num_steps": 4}))
    assert "- flow steps from noise to action: 4\n" in card_of(run)


def test_the_card_tells_budget_realised_kl_its_share_and_lambda(run: Path):
    card = card_of(run)
    assert "| KL budget (nats per chunk) | 0.5 |" in card
    assert "| realised KL at the end (nats per chunk) | 0.5 |" in card
    # Steps 60 to 100: 0.3 once, then 0.5 four times.
    assert "| realised KL over the last half (nats per chunk) | 0.46; 80.0% within 20%" in card
    assert "| λ at the end | 3 |" in card
    assert "updates of the policy: 100" in card


def test_an_older_checkpoint_is_told_by_its_own_numbers(run: Path):
    card = card_of(run, "000050")
    assert "| realised KL at the end (nats per chunk) | 0.3 |" in card
    assert "0.0% within 20% of the budget" in card
    assert "| λ at the end | 2.5 |" in card
    assert "updates of the policy: 50" in card
    assert "**Not evaluated.** The run compared its last checkpoint, 000100" in card
    assert "model-index" not in metadata(card)


def test_what_was_evaluated_before_a_run_went_on_is_not_told_of_its_new_policy(run: Path):
    write_checkpoint(run / "checkpoints/000250", 250)
    (run / "checkpoints/last").unlink()
    (run / "checkpoints/last").symlink_to("000250")
    card = card_of(run)
    assert "updates of the policy: 250" in card
    assert "**Not evaluated.** The run compared the policy of 100 updates" in card
    assert "model-index" not in metadata(card)
    assert "plots/" not in card
    facts = read_facts(run, find_checkpoint(run))
    assert (facts.plots, facts.outdated) == ((), True)


def test_the_card_names_the_simulator_that_was_played(run: Path):
    played = {"name": "ogbench", "task": "scene-play-singletask-task1-v0"}
    rewrite_report(run, simulator=played)
    (result,) = metadata(card_of(run))["model-index"][0]["results"]
    assert result["dataset"] == {"type": "ogbench", "name": f"OGBench {played['task']}"}


def test_a_run_without_evaluation_says_so(run: Path, tmp_path: Path):
    card = card_of(write_run(tmp_path / "unfinished", finished=False))
    assert "**Not evaluated.** The run was pushed before its end" in card
    assert "model-index" not in metadata(card)
    assert "accelerate launch" not in card
    report = json.loads((run / "report.json").read_text()) | {"evaluation": None}
    (run / "report.json").write_text(json.dumps(report))
    card = card_of(run)
    assert "**Not evaluated.** The run had no simulator" in card
    assert COMMAND in card


def test_no_gain_is_claimed_where_the_interval_includes_zero(run: Path):
    report = json.loads((run / "report.json").read_text())
    raw = report["evaluation"]
    raw["tuned_success"] = [*raw["base_success"][1:], True]
    (run / "report.json").write_text(json.dumps(report))
    card = card_of(run)
    assert "no difference is shown" in card
    assert "excludes zero" not in card


def test_a_method_without_trust_region_says_so(tmp_path: Path):
    run = with_config(tmp_path, method__name="qam")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "kl_budget"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    card = card_of(run)
    assert "QAM logged no KL budget" in card
    assert "qam" in metadata(card)["tags"]


def test_a_policy_that_has_not_moved_is_told_from_one_without_budget(run: Path):
    write_checkpoint(run / "checkpoints/critic_000100", 0)
    assert "The policy had not moved yet: it is its base." in card_of(run, "critic_000100")


def test_a_policy_that_lerobot_does_not_know_says_how_it_is_loaded(run: Path):
    path = run / "checkpoints/last/pretrained_model/config.json"
    path.write_text(json.dumps({"type": "mlp_flow"}))
    card = card_of(run)
    assert metadata(card)["library_name"] == "vla_trqam"
    assert "lerobot-eval" not in card
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    ast.parse(found[1])
    assert "MLPFlowPolicy.from_pretrained" in found[1]


def test_the_kl_has_the_unit_of_the_run(tmp_path: Path):
    assert "KL budget (nats per action)" in card_of(
        with_config(tmp_path, trqam__kl_per_action=True)
    )


def test_the_card_has_command_versions_commit_and_figures(run: Path):
    card, report = card_of(run), json.loads((run / "report.json").read_text())
    assert f"```bash\n{COMMAND}\n```" in card
    for name, version in report["provenance"]["versions"].items():
        assert f"{name} {version}" in card
    assert str(report["provenance"]["commit"]) in card
    assert "- training seed: 3" in card
    assert "- initial states: 50 seeds, 10000 to 10049" in card
    assert "](plots/kl.png)" in card
    assert "](plots/success.png)" in card


def test_the_eval_command_repeats_the_evaluation(run: Path):
    command = re.search(r"```bash\n(lerobot-eval.*?)\n```", card_of(run), re.DOTALL)
    assert command is not None
    assert shlex.split(command[1].replace("\\\n", "")) == [
        "lerobot-eval",
        "--policy.path=alice/lift",
        "--env.type=robomimic",
        "--env.task=Lift",
        "--env.cameras=[agentview]",
        "--env.image_size=96",
        "--env.shadows=false",
        "--env.episode_length=150",
        "--eval.n_episodes=50",
        "--seed=10000",
    ]


def test_the_eval_command_of_lerobots_own_environment_has_that_ones_settings(tmp_path: Path):
    changes = {"env__type": "pusht", "env__task": None, "env__options": {"fps": 10}}
    card = card_of(with_config(tmp_path, **changes))
    command = re.search(r"```bash\n(lerobot-eval.*?)\n```", card, re.DOTALL)
    assert command is not None
    assert shlex.split(command[1].replace("\\\n", "")) == [
        "lerobot-eval",
        "--policy.path=alice/lift",
        "--env.type=pusht",
        "--env.fps=10",
        "--env.episode_length=150",
        "--eval.n_episodes=50",
        "--seed=10000",
    ]
    assert metadata(card)["model-index"][0]["results"][0]["dataset"]["type"] == "pusht"


def test_the_command_to_go_on_with_is_the_runs_own_recipe(run: Path):
    assert (
        "accelerate launch -q recipes/finetune_pi0.py --policy.path=alice/lift"
        " --critic.path=alice/lift --dataset.repo_id=lab/rollouts" in card_of(run)
    )


def test_adapters_name_their_base_and_go_on_against_it(run: Path):
    make_adapter(run, "lab/other")
    card = card_of(run)
    assert metadata(card)["base_model"] == "lab/other"
    assert metadata(card)["base_model_relation"] == "adapter"
    assert "--policy.adapter=continue" in card


def test_nothing_of_this_machine_is_taken_for_a_repository(tmp_path: Path):
    run = with_config(tmp_path, policy__path=str(tmp_path), dataset__root=str(tmp_path))
    data = metadata(card_of(run, license_name=None))
    assert not {"base_model", "datasets", "license"} & data.keys()
    assert "a dataset that is not on the Hub" in card_of(run)


def test_every_dataset_of_a_later_round_is_named_and_no_folder_is(tmp_path: Path):
    """LeRobot's own folder of a dataset that was never pushed looks like a name on the Hub."""
    more = [{"repo_id": "me/round_0"}, {"repo_id": "me/round_1"}]
    run = with_config(tmp_path, dataset__more=more, policy__adapter="continue")
    here = {"asked": "me/round_1", "folder": str(tmp_path), "commit": None, "files": {}}
    there = {"folder": None, "commit": "0" * 40, "files": {}}
    pins = {
        "dataset": there | {"asked": "lab/rollouts"},
        "dataset_2": there | {"asked": "me/round_0"},
        "dataset_3": here,
    }
    (run / "inputs.json").write_text(json.dumps(pins))
    card = card_of(run)
    assert metadata(card)["datasets"] == ["lab/rollouts", "me/round_0"]
    assert "datasets/me/round_0), a dataset that is not on the Hub" in card
    assert "- updates of the policy in this run, beside those before it: 100" in card
    go_on = "--dataset.repo_id=lab/rollouts '--dataset.more=[{repo_id: me/round_0}, {repo_id: "
    assert go_on in card


def test_an_export_of_a_later_round_keeps_the_base_that_its_adapters_name(
    run: Path, tmp_path: Path
):
    make_adapter(run, "lab/other")
    write_checkpoint(tmp_path / "export", 100)
    export = tmp_path / "export/pretrained_model"
    facts = read_facts(run, find_checkpoint(run), export)
    assert facts.base == "lab/other"
    assert not facts.is_adapter
    with pytest.raises(UserError, match="is the base policy's own repository"):
        prepare_push(run, "lab/other", policy=export)


def test_a_policy_that_was_in_a_folder_then_is_no_repository_now(run: Path):
    pin = {"asked": "lab/pi0", "folder": "/home/me/lab/pi0", "commit": None, "files": {}}
    (run / "inputs.json").write_text(json.dumps({"policy": pin}))
    assert read_facts(run, find_checkpoint(run)).base is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lab/pi0", True),
        ("/home/lab/pi0", False),
        ("./pi0", False),
        ("~/pi0", False),
        ("local/packed", False),
        ("a/b/c", False),
        ("pi0", False),
    ],
)
def test_what_is_a_repository(name: str, expected: bool):
    assert is_on_the_hub(name) is expected


def test_a_folder_here_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert is_on_the_hub("lab/pi0")
    (tmp_path / "lab/pi0").mkdir(parents=True)
    assert not is_on_the_hub("lab/pi0")
