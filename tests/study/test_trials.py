"""The trials that find each method's knobs: as many for each, on other seeds, the best is taken."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from vla_trqam.recipes import compare
from vla_trqam.recipes.study_runs import read_run

from vla_trqam.config.parsing import parse_config
from vla_trqam.engine.folder.run_folder import DIVERGED_NAME
from vla_trqam.errors import UserError
from vla_trqam.study import trials as study
from vla_trqam.study.settings import CompareConfig
from vla_trqam.study.trials import made_trials

FLAGS = {"steps": 100, "online.steps": 50, "evaluate_every": 50}
TRIED = {
    "trqam": [{"kl_budget": 0.1}, {"kl_budget": 1.0}],
    "qam": [{"inverse_temperature": 1.0}, {"inverse_temperature": 10.0}],
}


def config(folder, trials=TRIED, **changes):
    lift = {"recipe": "finetune_robomimic", "flags": FLAGS, "trials": trials}
    plain = {"recipe": "finetune_robomimic", "flags": FLAGS}
    settings = {"methods": ("trqam", "qam"), "tasks": ("lift", "plain"), "seeds": (0, 1)}
    settings["table"] = {"lift": lift, "plain": plain}
    return CompareConfig(output_dir=folder, **settings | changes)


@pytest.fixture
def tried(monkeypatch):
    """Makes trials whose runs end with these rates, by label and seed; a run without one failed."""

    def make(settings, rates):
        plans = []
        monkeypatch.setattr(study, "carried_out", lambda _, plan: plans.append(plan) or [])
        found = [
            SimpleNamespace(task="lift", label=label, seed=seed, final=rate)
            for (label, seed), rate in rates.items()
        ]
        monkeypatch.setattr(study, "read_results", lambda runs: found)
        trials = made_trials(settings, read_run)
        return trials, plans

    return make


def rates(**by_label):
    return {(label, 100): rate for label, rate in by_label.items()}


def test_a_method_is_compared_with_its_best_trials_knobs(tmp_path, tried):
    settings = config(tmp_path)
    ends = rates(trqam_trial0=0.5, trqam_trial1=0.75, qam_trial0=0.875, qam_trial1=0.25)
    trials, _ = tried(settings, ends)
    variants = {
        v.label: v.knobs for v in trials.variants_in(settings.task("lift"), ("trqam", "qam"))
    }
    assert variants == {"trqam": {"kl_budget": 1.0}, "qam": {"inverse_temperature": 1.0}}
    assert (
        trials.text(settings.task("lift"), "qam")
        == "inverse_temperature 1.0: 87.5%; inverse_temperature 10.0: 25.0%"
    )
    others = trials.variants_in(settings.task("plain"), ("trqam", "qam"))
    assert [v.knobs for v in others] == [{}, {}]
    assert trials.text(settings.task("plain"), "qam") == "this value alone"


def test_trials_are_runs_like_the_others_on_seeds_and_states_of_their_own(tmp_path, tried):
    settings = config(tmp_path, trial_flags={"eval.first_seed": 20_000})
    _, (plan,) = tried(settings, {})
    assert [run.step.name for run in plan.runs] == [
        *("lift/trqam_trial0_s100", "lift/trqam_trial1_s100"),
        *("lift/qam_trial0_s100", "lift/qam_trial1_s100"),
    ]
    assert {run.config.seed for run in plan.runs} == {100}
    assert {run.config.eval.first_seed for run in plan.runs} == {20_000}
    assert {run.step.needs for run in plan.runs} == {("lift/base_s100",)}
    assert [run.config.method.kl_budget for run in plan.runs[:2]] == [0.1, 1.0]


def test_of_equal_trials_the_first_is_taken_and_a_failed_one_never(tmp_path, tried):
    settings = config(tmp_path)
    trials, _ = tried(settings, rates(trqam_trial0=0.5, trqam_trial1=0.5, qam_trial1=0.0))
    lift = settings.task("lift")
    assert trials.chosen(lift, "trqam") == {"kl_budget": 0.1}
    assert trials.chosen(lift, "qam") == {"inverse_temperature": 10.0}
    assert trials.text(settings.task("lift"), "qam").startswith("inverse_temperature 1.0: failed; ")
    nothing, _ = tried(settings, {})
    assert nothing.chosen(lift, "qam") == {}


@pytest.mark.parametrize("diverged", [True, False])
def test_a_trial_that_failed_otherwise_than_by_diverging_ends_the_study(
    tmp_path, monkeypatch, diverged
):
    """Its method would be compared on fewer trials than the others."""

    def carried_out(settings, plan):
        lost = plan.runs[1].step
        lost.folder.mkdir(parents=True)
        if diverged:
            (lost.folder / DIVERGED_NAME).write_text("training has diverged")
        return [lost.name]

    monkeypatch.setattr(study, "carried_out", carried_out)
    monkeypatch.setattr(study, "read_results", lambda runs: [])
    if diverged:
        assert made_trials(config(tmp_path), read_run) is not None
        return
    with pytest.raises(UserError, match="the trials lift/trqam_trial1_s100 failed, so their meth"):
        made_trials(config(tmp_path), read_run)


def test_a_trial_lacks_no_seed_where_several_are_asked_for(tmp_path, tried):
    settings = config(tmp_path, trial_seeds=(100, 101))
    ends = {("trqam_trial0", 100): 0.9, ("trqam_trial1", 100): 0.2, ("trqam_trial1", 101): 0.4}
    trials, _ = tried(settings, ends)
    (first, second) = trials.found["lift", "trqam"]
    assert first.rate is None
    assert second.rate == pytest.approx(0.3)


def test_a_study_without_trials_makes_none(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "carried_out", lambda *_: pytest.fail("a run was made"))
    trials = made_trials(config(tmp_path, tasks=("plain",)), read_run)
    assert trials is not None
    assert trials.found == {}


def test_a_comparison_that_cannot_work_is_refused_before_its_trials(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "carried_out", lambda *_: pytest.fail("a trial was made"))
    settings = config(tmp_path, flags={"evaluate_every": 33}, trial_flags={"evaluate_every": 50})
    with pytest.raises(UserError, match="evaluate_every=33 does not meet the end"):
        compare.compare(settings)


def test_stopped_trials_stop_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "carried_out", lambda *_: None)
    assert made_trials(config(tmp_path), read_run) is None


def test_a_task_takes_the_knobs_that_were_found_in_another(tmp_path, tried):
    lent = {"recipe": "finetune_robomimic", "flags": FLAGS, "trials": "lift"}
    own = {"recipe": "finetune_robomimic", "flags": FLAGS, "trials": TRIED}
    settings = config(tmp_path, table={"lift": own, "plain": lent})
    trials, (plan,) = tried(settings, rates(trqam_trial1=0.5, qam_trial0=0.5))
    assert {run.task for run in plan.runs} == {"lift"}
    found = trials.variants_in(settings.task("plain"), settings.methods)
    assert [v.knobs for v in found] == [{"kl_budget": 1.0}, {"inverse_temperature": 1.0}]
    assert trials.text(settings.task("plain"), "qam") == "in lift"
    # The other task's trials are made, or known, where it is not compared itself, too.
    alone = config(tmp_path / "alone", tasks=("plain",), table={"lift": own, "plain": lent})
    ends = rates(trqam_trial0=0.25, trqam_trial1=0.5, qam_trial0=0.5, qam_trial1=0.25)
    trials, (plan,) = tried(alone, ends)
    assert {run.task for run in plan.runs} == {"lift"}
    assert trials.variants_in(alone.task("plain"), alone.methods) == found
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"trials": trials.records()}))
    known, plans = tried(replace(alone, known_trials=path), {})
    assert plans == []
    assert known == trials


def test_trials_that_are_known_are_not_made_again(tmp_path, tried):
    ends = rates(trqam_trial0=0.25, trqam_trial1=0.5, qam_trial0=0.5, qam_trial1=0.25)
    first, _ = tried(config(tmp_path / "one"), ends)
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"trials": first.records()}))
    settings = config(tmp_path / "two", known_trials=path)
    again, plans = tried(settings, {})
    assert plans == []
    assert again == first
    # Of other knobs they are others, which that method alone makes.
    other = {**TRIED, "trqam": [{"kl_budget": 0.1}, {"kl_budget": 2.0}]}
    settings = config(tmp_path / "three", known_trials=path, trials=other)
    found, (plan,) = tried(settings, rates(trqam_trial0=0.25, trqam_trial1=0.75))
    assert {run.config.method.kl_budget for run in plan.runs} == {0.1, 2.0}
    assert found.chosen(settings.task("lift"), "trqam") == {"kl_budget": 2.0}
    assert found.found["lift", "qam"] == first.found["lift", "qam"]
    # With other settings, other seeds or one that diverged, all are made anew.
    for changes in (
        {"flags": {"batch_size": 7}},
        {"trial_flags": {"eval.episodes": 20}},
        {"trial_seeds": (7,)},
    ):
        _, (plan,) = tried(config(tmp_path / "four", known_trials=path, **changes), {})
        assert len(plan.runs) == 4
    # So they are where the recipe's preset has changed since.
    for record in (records := first.records()):
        record["made"]["settings"]["batch_size"] = 7
    path.write_text(json.dumps({"trials": records}))
    _, (plan,) = tried(config(tmp_path / "preset", known_trials=path), {})
    assert len(plan.runs) == 4
    records = first.records()
    records[0]["rate"] = None
    path.write_text(json.dumps({"trials": records}))
    _, (plan,) = tried(config(tmp_path / "five", known_trials=path), {})
    assert {run.config.method.kl_budget for run in plan.runs} == {0.1, 1.0}


def test_known_trials_are_nothing_to_a_task_whose_table_asks_for_none(tmp_path, tried):
    ends = rates(trqam_trial0=0.25, trqam_trial1=0.5, qam_trial0=0.5, qam_trial1=0.25)
    first, _ = tried(config(tmp_path / "one"), ends)
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"trials": first.records()}))
    flags = {**FLAGS, "method.kl_budget": 0.3}
    table = {"lift": {"recipe": "finetune_robomimic", "flags": flags}}
    changes = {"methods": ("trqam",), "tasks": ("lift",), "table": table}
    settings = config(tmp_path / "two", known_trials=path, **changes)
    trials, plans = tried(settings, {})
    lift = settings.task("lift")
    assert plans == []
    assert [variant.knobs for variant in trials.variants_in(lift, ("trqam",))] == [{}]
    assert trials.text(lift, "trqam") == "this value alone"


@pytest.mark.parametrize("content", ["{", "{}", '{"trials": [{"task": "lift"}]}', "[]"])
def test_what_is_no_summary_has_no_known_trials(tmp_path, content):
    path = tmp_path / "summary.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"--known_trials=.* is no summary\.json of a comparison"):
        made_trials(config(tmp_path, known_trials=path), read_run)


def test_trials_that_another_task_has_not_are_refused(tmp_path):
    lent = {"recipe": "finetune_robomimic", "flags": FLAGS, "trials": "lift"}
    with pytest.raises(UserError, match="those of lift, which is no task of the table with trial"):
        config(tmp_path, tasks=("plain",), table={"plain": lent})
    with pytest.raises(UserError, match="there are none"):
        config(tmp_path, tasks=("plain", "lift"), table={"plain": lent, "lift": lent})


@pytest.mark.slow
def test_every_trial_of_the_claim_has_settings_that_work(tmp_path, tried):
    flags = ["--preset=claims_c4", f"--output_dir={tmp_path}"]
    settings = parse_config(CompareConfig, compare.PRESETS, flags)
    _, (plan,) = tried(settings, {})
    assert len(plan.runs) == 3 * len(settings.methods) * len(settings.tuned())
    assert {run.config.online.steps for run in plan.runs} == {0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trials": {"trqam": TRIED["trqam"]}}, r"unequal trials \(trqam 2, qam 0\)"),
        ({"trials": {"trqam": [{"kl_budget": 1.0}]}}, "two or more mappings of knobs"),
        ({"trials": {"trqam": [1.0, 2.0]}}, "two or more mappings of knobs"),
        ({"trials": {"trqam": [{"kl_budget": 1.0}] * 2}}, "have one twice"),
        ({"trials": {"magic": []}}, "magic is no method"),
        ({"trial_seeds": (1, 100)}, "--trial_seeds has 1, which --seeds has too"),
        ({"trial_seeds": ()}, r"--trial_seeds=\[\] is empty"),
    ],
)
def test_unequal_or_strange_trials_are_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        config(tmp_path, **changes)
