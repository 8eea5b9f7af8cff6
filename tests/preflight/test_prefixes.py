"""Whether prefixes are kept: the choice, what it costs, and what is refused."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from vla_trqam.data.frame_files import CacheHeader
from vla_trqam.errors import UserError
from vla_trqam.preflight.prefixes import (
    FEATURES_ONLY,
    GIB,
    PrefixCost,
    PrefixPlan,
    plan_prefixes,
)

COST = PrefixCost(size=GIB // 100, beside=1000, seconds=0.25)
Usage = namedtuple("Usage", ["total", "used", "free"])


def planned(
    folder: Path, wanted: Any = "auto", budget: float | None = None, **kw: Any
) -> PrefixPlan:
    settings = {"frames": 500, "batch_size": 8} | kw
    return plan_prefixes(wanted, budget, COST, replay=folder / "replay", **settings)


@pytest.mark.parametrize(("budget", "kept"), [(5.1, True), (4.9, False)])
def test_a_budget_for_all_frames_keeps_them(tmp_path: Path, budget: float, kept: bool) -> None:
    plan = planned(tmp_path, budget=budget)
    assert plan.kept == kept
    assert plan.needed == 500 * COST.size
    assert plan.frame_bytes == (COST.size if kept else COST.beside)


@pytest.mark.parametrize(("free", "kept"), [(10.5, True), (9.5, False)])
def test_without_a_budget_half_of_what_is_free_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, kept: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(free * GIB)))
    assert planned(tmp_path).kept == kept


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_goes_on_as_it_began_whatever_is_free_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    free = 0 if kept else 10**15
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    (tmp_path / "replay").mkdir()
    fingerprint = "abc" if kept else "abc" + FEATURES_ONLY
    CacheHeader(fingerprint, 0, {}).write(tmp_path / "replay")
    assert planned(tmp_path).kept == kept


@pytest.mark.parametrize("wanted", ["disk", "none"])
def test_what_is_asked_for_is_done(tmp_path: Path, wanted: str) -> None:
    assert planned(tmp_path, wanted).kept == (wanted == "disk")


@pytest.mark.parametrize(
    ("wanted", "budget", "says"),
    [
        ("auto", 0.05, "no room for the prefixes of one batch, 8 of 10.2 MiB: --prefix_cache=none"),
        ("disk", 0.05, "no room for the prefixes of one batch"),
        ("disk", 4.0, r"keeps 5\.0 GiB, 500 frames of 10\.2 MiB, .* give 5, or"),
    ],
)
def test_a_budget_that_is_too_small_is_refused(
    tmp_path: Path, wanted: str, budget: float, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        planned(tmp_path, wanted, budget)


def test_the_finding_tells_bytes_and_time(tmp_path: Path) -> None:
    found = planned(tmp_path, "none", frames=100_000).finding().found
    assert found.startswith("10.2 MiB a frame, 1000.0 GiB of 100,000 frames: computed in each")
    assert "kept are 1000 B a frame for the critic" in found
    assert "to encode all takes about 6.9 h, decoding and" in found


@pytest.mark.parametrize(
    ("wanted", "draw_next", "contexts"),
    [("disk", None, 2), ("none", None, 1), ("disk", False, 1), ("none", True, 2)],
)
def test_an_update_holds_the_next_frames_prefixes_where_it_draws_there(
    tmp_path: Path, wanted: str, draw_next: bool | None, contexts: int
) -> None:
    assert planned(tmp_path, wanted, draw_next=draw_next).contexts == contexts
