"""A page's links lead to the same text on GitHub and in the site."""

import re
from pathlib import Path

import pytest
from site_links import (
    file_of,
    for_the_site,
    linked_beyond,
    page_of,
    place_of,
    target_of,
    with_links,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def house(tmp_path: Path) -> Path:
    files = {
        "README.md": "[method](docs/method.md#the-kl) ![run](docs/figures/run.png)",
        "docs/method.md": "[code](../pack/sde.py)",
        "docs/results/README.md": "[how](../../benchmarks/README.md) [page](../method.md)",
        "docs/figures/run.png": "",
        "benchmarks/README.md": "[start](../README.md)\n```\n[not](../pack/sde.py)\n```\n",
        "pack/sde.py": "x = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("docs/method.md", "[a](../pack/sde.py)", "[a](repository/pack/sde.py.md)"),
        ("docs/method.md", "[a](../README.md#start)", "[a](repository/README.md#start)"),
        (
            "docs/results/README.md",
            "[a](../../benchmarks/README.md)",
            "[a](../repository/benchmarks/README.md)",
        ),
        ("README.md", "[a](docs/method.md#the-kl)", "[a](../method.md#the-kl)"),
        ("README.md", "![a](docs/figures/run.png)", "![a](../figures/run.png)"),
        ("benchmarks/README.md", "[a](../docs/method.md)", "[a](../../method.md)"),
        ("docs/method.md", "[a](figures/run.png)", "[a](figures/run.png)"),
    ],
)
def test_a_link_leads_to_the_page_of_its_file(
    house: Path, file: str, text: str, expected: str
) -> None:
    assert for_the_site(text, file, house) == expected


@pytest.mark.parametrize(
    "text",
    ["[a](https://pypi.org/x.md)", "[a](#here)", "[a](gone.md)", "```\n[a](../pack/sde.py)\n```\n"],
)
def test_what_leads_to_no_file_of_ours_stays(house: Path, text: str) -> None:
    assert for_the_site(text, "docs/method.md", house) == text


def test_the_pages_beyond_are_those_that_are_reached(house: Path) -> None:
    assert linked_beyond(["docs/results/README.md"], house) == [
        "README.md",
        "benchmarks/README.md",
    ]
    assert linked_beyond(["docs/method.md"], house) == ["pack/sde.py"]


def test_source_is_shown_as_code_and_markdown_as_it_is(house: Path) -> None:
    assert '`python linenums="1"\nx = 1\n' in page_of("pack/sde.py", house)
    assert page_of("README.md", house) == (house / "README.md").read_text("utf-8")


@pytest.mark.parametrize("file", ["docs/method.md", "README.md", "pack/sde.py"])
def test_a_place_and_its_file_find_each_other(house: Path, file: str) -> None:
    assert file_of(place_of(file), house) == file


def test_a_link_out_of_the_repository_is_none(house: Path) -> None:
    assert target_of("docs/method.md", "../../etc/passwd", house) is None


def test_a_role_becomes_a_link_that_may_lead_nowhere() -> None:
    paths = {"Trajectory": "vla_trqam.sde.Trajectory"}
    text = "Makes a :class:`Trajectory`, see :func:`~torch.cat` and ``x``."
    assert with_links(text, lambda name: paths.get(name, name)) == (
        'Makes a <autoref optional identifier="vla_trqam.sde.Trajectory"><code>Trajectory</code>'
        '</autoref>, see <autoref optional identifier="torch.cat"><code>cat</code></autoref> and '
        "``x``."
    )


def test_no_role_of_a_docstring_is_of_a_kind_that_is_not_known() -> None:
    sources = [*(ROOT / "vla_trqam").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")]
    assert len(sources) > 100
    for path in sources:
        assert re.search(r":\w+:`", with_links(path.read_text("utf-8"), str)) is None, path
