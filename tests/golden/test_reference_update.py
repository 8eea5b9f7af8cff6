"""The slow reference is only worth something if it gives the authors' numbers itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference_update import Learner, read_learner, read_update, update

FOLDER = Path(__file__).parent
RTOL, ATOL = 2e-5, 2e-6


def load(agent: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"golden_{agent}.npz", allow_pickle=False) as archive:
        return dict(archive)


def assert_close(name: str, ours: object, theirs: np.ndarray) -> None:
    mine = torch.as_tensor(ours).detach().numpy()
    np.testing.assert_allclose(mine, theirs.reshape(mine.shape), RTOL, ATOL, err_msg=name)


def assert_final_weights(learner: Learner, data: dict[str, np.ndarray]) -> None:
    for key, weight in learner.weights.items():
        assert_close(key, weight, data[f"final/{key}"])


@pytest.mark.parametrize(("agent", "updates"), [("trqam", 3), ("qam", 2), ("qam_e", 2)])
def test_the_slow_reference_gives_the_authors_numbers(agent: str, updates: int) -> None:
    data = load(agent)
    learner = read_learner(data)
    for number in range(updates):
        record = update(learner, *read_update(data, number))
        recorded = {k for k in data if k.startswith((f"u{number}/info", f"u{number}/out"))}
        assert recorded <= {f"u{number}/{k}" for k in record}
        for key, value in record.items():
            if f"u{number}/{key}" in data:
                assert_close(key, value, data[f"u{number}/{key}"])
    assert_final_weights(learner, data)
