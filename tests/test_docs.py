"""README and docs name no flag that is gone; recorded results keep the commands of their time."""

import re
from pathlib import Path

import pytest
from vla_trqam.recipes import finetune_robomimic

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *ROOT.glob("docs/*.md"))
    if path.name != "CHANGELOG.md"
)
SCRIPTS = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "recipes").glob("*.py")]
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.]*\w)")
OTHERS = {"cpu", "multi_gpu", "nproc_per_node", "num_processes"}  # accelerate launch, torchrun


def flags_in(text: str) -> set[str]:
    return set(FLAG.findall(text))


@pytest.fixture
def known(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """What the recipe's help lists, and what the other scripts declare."""
    with pytest.raises(SystemExit):
        finetune_robomimic.main(["--help"])
    declared = re.findall(r'"--(\w+)"', "".join(path.read_text("utf-8") for path in SCRIPTS))
    return flags_in(capsys.readouterr().out) | set(declared) | OTHERS | {"help"}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_names_only_flags_that_there_are(page: Path, known: set[str]) -> None:
    assert flags_in((ROOT / page).read_text("utf-8")) - known == set()


def test_a_flag_that_is_gone_is_found(known: set[str]) -> None:
    text = "add `--trqam.inverse_temperature=2`, --steps 3 (or --method.name=qam). --preset."
    assert flags_in(text) - known == {"trqam.inverse_temperature"}
