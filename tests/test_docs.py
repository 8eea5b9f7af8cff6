"""README and docs name no flag that is gone; recorded results keep the commands of their time."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from vla_trqam.recipes import finetune_robomimic

from vla_trqam.config.evaluate_settings import EvaluateConfig
from vla_trqam.config.ogbench_settings import FinetuneOGBenchConfig
from vla_trqam.config.parsing import parse_config
from vla_trqam.config.state_settings import FinetuneRobomimicConfig
from vla_trqam.config.vla_settings import FinetuneVLAConfig
from vla_trqam.methods.registry import METHODS
from vla_trqam.study.settings import CompareConfig, SweepConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "benchmarks/*.md", "docs/*.md", "docs/methods/*.md")
    for path in ROOT.glob(pattern)
    # What was once, and what is refused.
    if path.name not in ("CHANGELOG.md", "bad_input.md")
)
SCRIPTS = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.]*\w)")
# Of accelerate launch and torchrun, of lerobot-eval with our environment, of lerobot-train and
# lerobot-rollout.
OTHERS = {"cpu", "mixed_precision", "multi_gpu", "nproc_per_node", "num_processes"} | {
    *("env.episode_length", "env.render_every", "eval.batch_size", "eval.n_episodes"),
    *("strategy.type", "teleop.type", "robot.type", "fps"),
    *("dataset.single_task", "dataset.num_episodes", "dataset.no_stamp", "dataset.private"),
    *("dataset.push_to_hub", "inference.type", "policy.type"),
}


def flags_in(text: str) -> set[str]:
    return set(FLAG.findall(text))


@pytest.fixture(scope="module")
def known() -> set[str]:
    """What the recipes' help lists, and what the other scripts declare."""
    with redirect_stdout(StringIO()) as told:
        ask_for_help()
    declared = re.findall(r'"--(\w+)"', "".join(path.read_text("utf-8") for path in SCRIPTS))
    return flags_in(told.getvalue()) | set(declared) | OTHERS | {"help"}


def ask_for_help() -> None:
    presets = Path(finetune_robomimic.__file__)
    for config, name in (
        (FinetuneRobomimicConfig, "finetune_robomimic.yaml"),
        (FinetuneOGBenchConfig, "finetune_ogbench.yaml"),
        (FinetuneVLAConfig, "finetune_pi0.yaml"),
    ):
        for method, entry in METHODS.items():
            if entry.requirements.own_field and not config.OFFERS.own_field:
                continue  # refused there
            with pytest.raises(SystemExit):
                parse_config(config, presets.with_name(name), ["--help", f"--method.type={method}"])
    with pytest.raises(SystemExit):
        parse_config(EvaluateConfig, presets.with_name("evaluate.yaml"), ["--help"])
    for study, name in ((CompareConfig, "compare.yaml"), (SweepConfig, "sweep_kl.yaml")):
        with pytest.raises(SystemExit):
            parse_config(study, presets.with_name(name), ["--help"], preset="smoke")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_names_only_flags_that_there_are(page: Path, known: set[str]) -> None:
    assert flags_in((ROOT / page).read_text("utf-8")) - known == set()


def test_a_flag_that_is_gone_is_found(known: set[str]) -> None:
    text = "add `--method.temperature=2`, --steps 3 (or --method.type=qam). --preset."
    assert flags_in(text) - known == {"method.temperature"}


PROMISES = (ROOT / "SECURITY.md").read_text("utf-8")
TESTS = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def test_every_promise_of_security_has_a_test_that_there_is() -> None:
    named = set(re.findall(r"`(test_\w+)`", PROMISES))
    rows = [
        line for line in PROMISES.splitlines() if line.startswith("| ") and "Promise" not in line
    ]
    assert len(rows) > 15
    assert all("`test_" in row for row in rows)
    assert {name for name in named if f"def {name}(" not in TESTS} == set()
