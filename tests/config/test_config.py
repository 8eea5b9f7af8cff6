from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest

from vla_trqam.config.flag_help import attribute_docs
from vla_trqam.config.parsing import (
    dump_config,
    parse_config,
    resumed_config,
    saved_config,
)
from vla_trqam.config.settings import LARGEST_SEED, OnlineConfig
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.errors import UserError


@dataclass
class Inner:
    """Inside.

    Attributes:
        rate: how fast,
            in Hz.
        a, b: two numbers.
    """

    rate: float = 0.5
    a: int = 1
    b: int = 2


@dataclass
class Outer:
    """Outside.

    Attributes:
        name: of it.
        folder: where.
        widths: of layers.
    """

    GROWING: ClassVar[Mapping[str, str]] = {"inner.a": "offline"}

    name: str = "x"
    folder: Path | None = None
    widths: tuple[int, ...] = (1, 2)
    output_dir: Path | None = None
    resume: bool = False
    checkpoint: str | None = None
    num_threads: int | None = None
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def presets(tmp_path):
    path = tmp_path / "presets.yaml"
    path.write_text("default: {name: y, inner: {a: 5}}\nbig:\n  widths: [100]\nwrong: {nmae: z}\n")
    return path


def test_flags_win_over_the_preset_and_the_preset_over_the_code(presets):
    config = parse_config(Outer, presets, ["--inner.a=7", "--widths", "[3, 4]", "--resume"])
    assert config == Outer(name="y", inner=Inner(a=7), widths=(3, 4), resume=True)
    assert parse_config(Outer, presets, ["--preset=big"]) == Outer(widths=(100,))


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("3", 3.0), ("0.25", 0.25), ("-1", -1.0)]
)
def test_numbers_are_read_as_people_write_them(text, value, presets):
    for flags in ([f"--inner.rate={text}"], ["--inner.rate", text]):
        assert parse_config(Outer, presets, flags).inner.rate == value


def test_a_flag_with_an_equals_sign_in_its_value_keeps_it(presets):
    assert parse_config(Outer, presets, ["--folder=a=b"]).folder == Path("a=b")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nmae=z"], "did you mean --name"),
        (["--mixed_precision=bf16"], "is not a setting; it is accelerate's: give it before the re"),
        (["--policy.dtype=bfloat16"], "as the checkpoint's config.json says"),
        (["--policy.num_inference_steps=4"], "here it is --policy.tuned_flow_steps"),
        (["--preset=wrong"], "did you mean --name"),
        (["--preset=huge"], "default, big, wrong"),
        (["--inner=3"], "--inner is not a setting"),
        (["--inner.a=null"], "--inner.a needs a value"),
        (["--widths=3"], r"--widths=3 must be a list, like \[3\]"),
        (["--inner.a=x"], "inner.a"),
        (["--config_path=presets.yaml", "--preset=big"], "choose one"),
        (["--config_path=/nowhere/x.yaml"], "cannot be read"),
        (["name=z"], "no flag"),
    ],
)
def test_a_mistake_is_named(flags, words, presets):
    with pytest.raises(UserError, match=words):
        parse_config(Outer, presets, flags)


def test_what_is_written_reads_back(presets, tmp_path):
    config = Outer("z", Path("/a b"), (7,), None, False, None, 2, Inner(1e-7, 3, 4))
    dump_config(config, tmp_path / "config.yaml")
    assert saved_config(Outer, tmp_path / "config.yaml") == config
    assert parse_config(Outer, presets, [f"--config_path={tmp_path / 'config.yaml'}"]) == config


def test_a_half_written_configuration_never_bears_the_name(tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        dump_config(Outer(), tmp_path / "config.yaml")
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("lines", [1, 3, -1])
def test_a_configuration_that_is_cut_short_is_not_filled_up_with_defaults(tmp_path, lines):
    path = tmp_path / "config.yaml"
    dump_config(Outer(name="first"), path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    with pytest.raises(UserError, match=r"config.yaml is cut short"):
        saved_config(Outer, path)


def test_a_configuration_of_a_version_without_marks_is_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("name: first\ninner: {a: 3}\n")
    assert saved_config(Outer, path) == Outer("first", inner=Inner(a=3))


def test_a_resumed_run_keeps_its_settings_but_may_have_other_threads(tmp_path):
    dump_config(Outer(name="first", num_threads=1), tmp_path / "config.yaml")
    asked = Outer(resume=True, output_dir=tmp_path, num_threads=3)
    arguments = ["--resume=true", f"--output_dir={tmp_path}", "--num_threads", "3"]
    found = resumed_config(asked, "config.yaml", arguments, refuse_nothing)
    assert found == Outer("first", output_dir=tmp_path, resume=True, num_threads=3)
    with pytest.raises(UserError, match=r"but for more of --inner.a; leave out --name"):
        resumed_config(asked, "config.yaml", [*arguments, "--name=second"], refuse_nothing)


def test_the_command_that_began_a_run_goes_on_with_it(presets, tmp_path):
    flags = ["--preset=big", "--name=first", "--inner.b=9", f"--output_dir={tmp_path}"]
    began = parse_config(Outer, presets, flags)
    dump_config(began, tmp_path / "config.yaml")
    again = parse_config(Outer, presets, [*flags, "--resume=true"])
    found = resumed_config(again, "config.yaml", [*flags, "--resume=true"], refuse_nothing)
    assert found == replace(began, resume=True)


def test_a_flag_that_would_change_a_resumed_run_is_refused_with_both_values(presets, tmp_path):
    dump_config(Outer(name="first", output_dir=tmp_path), tmp_path / "config.yaml")

    def refusal(*flags):
        arguments = ["--resume=true", f"--output_dir={tmp_path}", *flags]
        with pytest.raises(UserError) as refused:
            resumed_config(
                parse_config(Outer, presets, arguments), "config.yaml", arguments, refuse_nothing
            )
        return str(refused.value).partition("leave out ")[2]

    changed = "--inner.b, --name: inner.b is 9 here and 2 in the run, name is z here and first in"
    assert refusal("--name=z", "--inner.b=9", "--folder=null").startswith(changed)
    of_a_preset = "--preset: name is x here and first in the run, widths is [100] here and [1, 2] "
    assert refusal("--preset=big").startswith(of_a_preset)


def refuse_nothing(*_):
    pass


def test_a_resumed_run_may_have_more_updates_and_another_checkpoint(tmp_path):
    dump_config(Outer(name="first", inner=Inner(0.1, 3)), tmp_path / "config.yaml")
    looked_at = []
    asked = Outer(resume=True, output_dir=tmp_path, checkpoint="000500", inner=Inner(0.9, 7, 8))
    arguments = ["--resume=true", "--checkpoint=000500", "--inner.a=7"]
    found = resumed_config(asked, "config.yaml", arguments, lambda *a: looked_at.append(a))
    assert found.inner == Inner(0.1, 7, 2)
    assert found.checkpoint == "000500"
    ((saved, wanted),) = looked_at
    assert saved.inner == Inner(0.1, 3, 2)
    assert wanted == {"inner.a": 7}


@pytest.mark.parametrize("flag", ["checkpoint", "name", "folder"])
def test_a_text_that_looks_like_a_number_stays_as_it_is_written(flag, presets):
    for text in ("000500", "0o17", "1e3", "12:30:00", "2026-01-01", "[1]"):
        config = parse_config(Outer, presets, [f"--{flag}={text}"])
        assert str(getattr(config, flag)) == text
    assert parse_config(Outer, presets, ["--checkpoint=null"]).checkpoint is None


def test_the_meaning_of_a_flag_is_what_the_docstring_says():
    docs = attribute_docs(Inner)
    assert docs == {"rate": "how fast, in Hz.", "a": "two numbers.", "b": "two numbers."}


@pytest.mark.parametrize("seed", [0, 1, LARGEST_SEED])
def test_no_seed_is_used_for_two_purposes(seed):
    config = FinetuneRobomimicConfig(
        seed=seed, online=OnlineConfig(steps=1000, updates_per_round=250)
    )
    rollouts = [s for done in range(1000) for s in config.round_seeds(done)]
    uses = [
        config.evaluation_seeds(),
        config.validation_seeds(),
        config.base_seeds(),
        rollouts,
        FinetuneRobomimicConfig(seed=abs(seed - 1)).base_seeds(),
    ]
    every = [s for use in uses for s in use]
    assert len(every) == len(set(every))
    assert len(rollouts) == 4 * 20
    assert max(every) < 2**32  # numpy's global generator takes no more
    assert config.num_training_episodes == len(rollouts) + len(config.base_seeds())


def test_evaluation_states_do_not_depend_on_the_seed():
    one, other = FinetuneRobomimicConfig(seed=1), FinetuneRobomimicConfig(seed=2)
    assert one.evaluation_seeds() == other.evaluation_seeds()
    assert one.validation_seeds() == other.validation_seeds()


HOSTILE = "!!python/object/apply:subprocess.check_call [[touch, {marker}]]"


def test_a_configuration_names_no_python_object_to_make(presets, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "config.yaml"
    path.write_text(f"name: {HOSTILE.format(marker=marker)}\n")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read: could not determine a con"):
        parse_config(Outer, presets, [f"--config_path={path}"])
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        resumed_config(Outer(output_dir=tmp_path), "config.yaml", [], refuse_nothing)
    presets.write_text(f"default: {{name: {HOSTILE.format(marker=marker)}}}\n")
    with pytest.raises(UserError, match=r"presets\.yaml cannot be read"):
        parse_config(Outer, presets, [])
    assert not marker.exists()


def test_a_flag_names_no_python_object_to_make(presets, tmp_path):
    text = HOSTILE.format(marker=tmp_path / "marker")
    assert parse_config(Outer, presets, [f"--name={text}"]).name == text
    assert not (tmp_path / "marker").exists()
