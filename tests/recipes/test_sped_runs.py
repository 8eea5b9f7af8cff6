"""`--policy.compile=true` and `--policy.cuda_graphs=true`: updates that are made otherwise."""

import signal

import pytest
import torch
from safetensors.torch import load_file
from toy_deaths import signalled_at_update
from toy_files import differences
from toy_images import ImageToyPool, images_state
from vla_runs import files, forgetful_pool, main, no_conclusion, resume, tiny, without_simulator
from vla_trqam.adapters.fields import evaluations

from vla_trqam.engine.cached import Cached
from vla_trqam.jobs import vla

__all__ = ["files", "forgetful_pool", "no_conclusion", "tiny", "without_simulator"]  # fixtures
NETWORKS = "checkpoints/last/algorithm/networks.safetensors"
COMPILED = "--policy.compile=true"


def a_process_of_its_own():
    """As far as the compiler and the toy are concerned."""
    torch._dynamo.reset()
    ImageToyPool.forget()


@pytest.mark.long
def test_it_trains_as_without_and_goes_on_to_the_same_bits(tiny, no_conclusion, tmp_path):
    assert tiny(tmp_path / "plain") == 0
    a_process_of_its_own()
    assert tiny(tmp_path / "compiled", COMPILED) == 0
    one, other = (load_file(tmp_path / name / NETWORKS) for name in ("plain", "compiled"))
    weights = [name for name in one if name.startswith(("policy.", "critic."))]
    far = [n for n in weights if not torch.allclose(one[n], other[n], rtol=1e-3, atol=1e-4)]
    assert far == []
    assert any(not torch.equal(one[name], other[name]) for name in weights)
    a_process_of_its_own()
    with pytest.MonkeyPatch.context() as patch:
        signalled_at_update(patch, Cached, 4, signal.SIGINT)
        assert tiny(tmp_path / "cut", COMPILED) == 130
    assert resume(tmp_path / "cut") == 0
    assert differences(images_state(tmp_path / "cut"), images_state(tmp_path / "compiled")) == []


def test_a_machine_without_a_compiler_is_told_before_anything_is_read(
    tmp_path, monkeypatch, capsys
):
    def fails(*_):
        raise RuntimeError("no g++ here")

    monkeypatch.setattr(vla.torch, "compile", lambda _: fails)
    nowhere = ("--policy.path=nowhere", "--dataset.repo_id=local/none", "--dataset.root=nowhere")
    assert main(*nowhere, COMPILED, f"--output_dir={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    assert "torch.compile does not work on cpu here (RuntimeError: no g++ here)" in said


REPLAYED = "--policy.cuda_graphs=true"


@pytest.fixture
def recordings(monkeypatch):
    """Recordings that compute again, for a machine without CUDA graphs."""
    made = []

    class Recorder:
        def __init__(self, device):
            self.replays = 0
            made.append(self)

        def pool(self):
            return None

        def record(self, compute, pool):
            def replay():
                self.replays += 1
                compute()

            return replay

    monkeypatch.setattr(evaluations, "CUDARecorder", Recorder)
    monkeypatch.setattr(vla, "check_cuda_graphs", lambda device: None)
    return made


@pytest.mark.long
@pytest.mark.parametrize("cache", ["disk", "none"])
def test_a_run_that_replays_is_the_plain_one_and_goes_on_to_the_same_bits(
    tiny, no_conclusion, tmp_path, recordings, cache
):
    flags = (f"--prefix_cache={cache}", "--micro_batches=2")
    assert tiny(tmp_path / "plain", *flags) == 0
    assert not recordings
    ImageToyPool.forget()
    assert tiny(tmp_path / "replayed", *flags, REPLAYED) == 0
    assert recordings[0].replays > 0
    one, other = (load_file(tmp_path / name / NETWORKS) for name in ("plain", "replayed"))
    far = [n for n in one if not torch.allclose(one[n], other[n], rtol=1e-3, atol=1e-4)]
    assert far == []
    ImageToyPool.forget()
    with pytest.MonkeyPatch.context() as patch:
        signalled_at_update(patch, Cached, 4, signal.SIGINT)
        assert tiny(tmp_path / "cut", *flags, REPLAYED) == 130
    assert resume(tmp_path / "cut") == 0
    assert differences(images_state(tmp_path / "cut"), images_state(tmp_path / "replayed")) == []
