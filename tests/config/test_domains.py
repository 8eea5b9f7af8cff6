"""The papers' settings per domain, between the preset and the flags."""

import pytest
from vla_trqam.recipes import finetune_ogbench

from vla_trqam.config.methods import knobs_of
from vla_trqam.config.ogbench_settings import FinetuneOGBenchConfig
from vla_trqam.config.parsing import settings_of
from vla_trqam.envs.ogbench.domains import OF_METHOD, _table, domain_of, settings_of_domain
from vla_trqam.envs.ogbench.family import DOMAINS, task_names
from vla_trqam.errors import UserError
from vla_trqam.jobs import states
from vla_trqam.methods.registry import METHODS

TRIPLE = "cube-triple-play-singletask-task3-v0"


def read(task, *flags, preset="paper"):
    given = [f"--preset={preset}", f"--env.task={task}", *flags]
    return states.read_config(FinetuneOGBenchConfig, finetune_ogbench.PRESETS, given)


def values(domain, *methods):
    return {one.name: one.value for one in settings_of_domain(domain, methods)}


def test_every_domain_has_a_value_of_every_row_and_its_source():
    table = _table()
    assert tuple(table["domains"]) == DOMAINS == tuple(dict.fromkeys(map(domain_of, task_names())))
    for row in table["rows"]:
        assert len(row["values"]) == 10, row["set"]
        assert row["source"] in table["sources"]
        assert ("?" in row["values"]) == ("unknown" in row), row["set"]


def test_the_knobs_of_a_domain_are_those_that_the_methods_have():
    """Also of methods that come later: those that there are must know every knob of their rows."""
    names = [name for row in _table()["rows"] for name in row["set"]]
    for name in names:
        method = OF_METHOD.match(name)
        if method and method[1] in METHODS:
            assert name.removeprefix(method[0]) in knobs_of(method[1]), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_every_method_reads_the_preset_in_every_domain(domain, method):
    config = read(f"{domain}-singletask-task1-v0", f"--method.type={method}")
    expected = values(domain, method)
    found = settings_of(config)
    for name, value in expected.items():
        *path, leaf = name.replace(f"methods.{method}.", "method.").split(".")
        node = found
        for part in path:
            node = node[part]
        assert node[leaf] == value, name


def test_a_domain_lies_above_the_preset_and_below_the_flags(capsys):
    config = read(TRIPLE)
    assert (config.discount, config.method.kl_budget, config.policy.layer_norm) == (
        0.995,
        0.5,
        True,
    )
    assert config.policy.hidden_dims == config.critic.hidden_dims == (1024,) * 4
    assert (config.dataset.reward, config.eval.max_episode_steps) == ("dense", 1000)
    assert config.dataset.swap_every == 1000
    said = capsys.readouterr().out
    assert said.startswith("preset paper, domain cube-triple-play: discount=0.995, ")
    assert "method.kl_budget=0.5" in said
    assert said.count("\n") == 1
    config = read(TRIPLE, "--discount=0.9", "--method.kl_budget=2.0", "--dataset.swap_every=null")
    assert (config.discount, config.method.kl_budget, config.dataset.swap_every) == (0.9, 2.0, None)
    said = capsys.readouterr().out
    assert "discount" not in said
    assert "kl_budget" not in said


def test_what_no_source_says_is_told_with_what_stands_there(capsys):
    config = read("humanoidmaze-large-navigate-singletask-v0")
    assert (config.discount, config.critic.pessimism, config.policy.chunk_length) == (0.999, 0.0, 1)
    assert config.method.kl_budget == 1.0
    assert "; method.kl_budget is in no source: 1.0 stands" in capsys.readouterr().out


def test_a_method_has_its_own_knob_of_the_domain():
    puzzle = "puzzle-4x4-play-singletask-task1-v0"
    assert read(puzzle, "--method.type=fql").method.alpha == 1
    assert read(puzzle, "--method.type=fql").method.hidden_dims == (1024,) * 4
    assert read(puzzle, "--method.type=qam").method.inverse_temperature == 30
    assert (
        read(puzzle, "--method.type=qam", "--method.inverse_temperature=2").method.adjoint_scale
        == 2
    )


def test_rows_of_methods_that_there_are_not_are_left_out():
    assert "methods.qam_e.edit_scale" not in values("scene-play", "trqam")
    assert values("scene-play", "qam_e")["methods.qam_e.edit_scale"] == 0.0
    with pytest.raises(UserError, match=r"--method.type=qan is not known"):
        read(TRIPLE, "--method.type=qan")


def test_a_domain_of_no_paper_leaves_the_preset_as_it_is(capsys):
    config = read("cube-single-play-singletask-task2-v0")
    assert (config.discount, config.policy.chunk_length) == (0.995, 5)
    assert "domain cube-single-play: no paper has it" in capsys.readouterr().out
    read("cube-triple-play-singletask-task2-v0", preset="cube_single")
    assert capsys.readouterr().out == ""
