"""The recipe on the toy task: all of it but the simulator."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "engine"))

import pytest
from toy_files import final_state, write_toy_file
from toy_settings import OF_THE_POLICY, TINY
from toy_task import ToyPool
from vla_trqam.recipes import finetune_robomimic

from vla_trqam.engine import finetune as engine


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_file(tmp_path_factory.mktemp("data") / "toy.hdf5")


@pytest.fixture
def toy_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ToyPool]]:
    monkeypatch.setattr(engine, "RolloutPool", ToyPool)
    ToyPool.started, ToyPool.rounds, ToyPool.before_run = 0, [], None
    yield ToyPool
    ToyPool.before_run = None


@pytest.fixture
def no_conclusion(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Leaves out final evaluation and report, which cost most of a tiny run; keeps what it got."""
    calls: list[dict] = []

    def conclude(
        run: object, base: object, critic: object, sampler: object, **settings: object
    ) -> None:
        calls.append({"run": run, "base": base, "critic": critic, **settings})

    monkeypatch.setattr(engine, "conclude", conclude)
    return calls


@pytest.fixture
def tiny(toy_file: Path, toy_pool: type[ToyPool]) -> Callable[..., int]:
    """Runs `main` with tiny settings; later flags win."""

    def run(output_dir: Path, *flags: str) -> int:
        base = [f"--dataset.path={toy_file}", *TINY]
        if any(flag.startswith("--policy.path=") for flag in flags):
            base = [flag for flag in base if not flag.startswith(OF_THE_POLICY)]
        if "--method.type=reward_matching" in flags:
            base = [flag for flag in base if not flag.startswith("--critic.")]
        return finetune_robomimic.main([*base, f"--output_dir={output_dir}", *flags])

    return run


@pytest.fixture
def resume(toy_pool: type[ToyPool]) -> Callable[[Path], int]:
    def run(output_dir: Path) -> int:
        return finetune_robomimic.main(["--resume=true", f"--output_dir={output_dir}"])

    return run


@pytest.fixture(scope="session")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, toy_file: Path
) -> tuple[dict, Path, list]:
    """A whole run without conclusion: its end, its folder and the seeds of all rollouts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "RolloutPool", ToyPool)
        patch.setattr(engine, "conclude", lambda *a, **k: None)
        ToyPool.rounds, ToyPool.before_run = [], None
        arguments = [f"--dataset.path={toy_file}", *TINY, f"--output_dir={folder}"]
        assert finetune_robomimic.main(arguments) == 0
        return final_state(folder), folder, list(ToyPool.rounds)
