"""Films of two policies: which states, and in which order."""

from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
from toy_task import homing_policy, roll_out, toy_family

from vla_trqam.engine.film import Player, film
from vla_trqam.report.evaluation import PairedEvaluation


class FilmedPool:
    """Its frames are as bright as the number that it was made with."""

    def __init__(self, brightness):
        self.brightness, self.asked, self.family = brightness, [], toy_family()

    def record(self, policy, seeds, *, every):
        self.asked.append(list(seeds))
        frames = np.full((3, 32, 32, 3), self.brightness, np.uint8)
        episodes = [vars(roll_out(policy, seed, 10)) for seed in seeds]
        return [SimpleNamespace(**(episode | {"frames": frames})) for episode in episodes]


def test_gained_episodes_come_first_then_lost_ones_each_beside_the_others(tmp_path):
    evaluation = PairedEvaluation(
        np.array([4, 5, 6, 7]),
        np.array([True, True, False, False]),
        np.array([True, False, True, False]),
        np.full(4, 9),
        np.full(4, 9),
    )
    dark, bright = FilmedPool(20), FilmedPool(220)
    act = homing_policy(2, 0.1)
    pair = Player("b", dark, act), Player("a", bright, act)
    paths = film(*pair, evaluation, 3, tmp_path / "videos")
    assert dark.asked == bright.asked == [[6, 5, 4]]
    assert [path.name for path in paths] == [f"seed_{seed}.mp4" for seed in (6, 5, 4)]
    picture = imageio.get_reader(paths[0]).get_data(0)[-32:]
    assert picture[:, :24].mean() < 60 < 180 < picture[:, -24:].mean()
    assert film(*pair, evaluation, 0, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
