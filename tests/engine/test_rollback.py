"""Runs that diverge, by injection: they stop with all kept, or go back with half the step sizes."""

import json
import math
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from toy_files import metrics_lines
from toy_learners import make_cloning, make_off_policy
from toy_run import filled_replay, make_run, phase
from toy_task import Killed, ToyPool

from vla_trqam.data.replay import Replay
from vla_trqam.engine.divergence import not_finite
from vla_trqam.engine.folder.state import module_tensors, optimizer_tensors
from vla_trqam.engine.processes.interruption import InterruptGuard
from vla_trqam.engine.run import METRICS_NAME
from vla_trqam.errors import DivergenceError
from vla_trqam.report.metrics import MetricsLog

LR = 3e-4
ROLLOUTS = {0: [50], 5: [51, 52], 6: [53]}


@pytest.fixture
def begin(tmp_path):
    """Makes runs of eight updates, with a checkpoint after every second, and goes on with them."""
    ToyPool.rounds, ToyPool.before_run = [], None
    held = {}
    with ExitStack() as stack:

        def start(name="run", *, seed=0, resume=False, **changes):
            folder = tmp_path / name
            learner = make_off_policy(seed)
            if resume:
                held.pop(name).close()  # as the death of its process does
                position = json.loads(
                    (folder / "checkpoints/last/training_state/position.json").read_text()
                )
                buffer = Replay.open(folder / "replay")
                stack.callback(buffer.close)
                buffer.truncate_to(position["replay_episodes"][0])
                log = MetricsLog.resume_after_line(folder / METRICS_NAME, position["metrics_lines"])
            else:
                folder.mkdir()
                buffer = stack.enter_context(filled_replay(folder / "replay"))
                log = MetricsLog(folder / METRICS_NAME)
            stack.enter_context(log)
            held[name] = buffer
            settings = {"save_freq": 2, "log_freq": 1, "on_divergence": "rollback"} | changes
            return make_run(folder, buffer, learner, log, **settings), learner

        yield start


def train(run, learner, steps=8):
    rollouts = phase(run, learner, steps=steps, episodes_before=lambda done: ROLLOUTS.get(done, []))
    return run.train([rollouts], InterruptGuard())


def spoil(run, learner, when, then=None):
    """An update gets returns of NaN, or does something else, by the updates done and the factor."""
    update = learner.update

    def spoilt(batch, generator):
        if when(run.step, learner.step_factor):
            if then is not None:
                then()
            batch = replace(batch, chunk_return=batch.chunk_return * math.nan)
        update(batch, generator)

    learner.update = spoilt


def large_steps(updates, factor):
    """Diverges in the sixth update, as long as the steps are whole."""
    return updates == 5 and factor == 1.0


def state(run, learner):
    return {
        **module_tensors(learner),
        **optimizer_tensors(learner.optimizer),
        "noise": run.generators.noise.get_state(),
        "replay": torch.tensor(run.store.replay.observations.copy()),
        "rewards": torch.tensor(run.store.replay.rewards.copy()),
    }


def assert_same(one, other):
    (first, second) = (state(*pair) for pair in (one, other))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert one[1].scalars() == other[1].scalars()
    generators = [pair[0].generators.replay.bit_generator.state for pair in (one, other)]
    assert generators[0] == generators[1]
    assert metrics_lines(one[0].output_dir) == metrics_lines(other[0].output_dir)


def step_sizes(learner):
    return [group["lr"] for group in learner.optimizer.param_groups]


def test_a_run_stops_with_a_sentence_and_its_checkpoint(begin):
    run, learner = begin(on_divergence="stop")
    spoil(run, learner, large_steps)
    lam = learner.trust_region
    with pytest.raises(DivergenceError) as error:
        train(run, learner)
    expected = f"training has diverged: the loss is nan at lambda {lam.lam:.3g} in offline update 6"
    assert str(error.value) == expected
    assert (run.output_dir / "checkpoints/last").resolve().name == "000004"
    assert not_finite(learner) is None


def test_a_rollback_goes_back_with_half_the_steps_and_says_so(begin, capsys):
    run, learner = begin()
    spoil(run, learner, large_steps)
    assert train(run, learner) is learner
    assert run.step == 8
    assert step_sizes(learner) == [LR / 2, LR / 2]
    assert run.store.num_episodes == 5 + 4  # each rolled out once
    lines = [line for line in metrics_lines(run.output_dir) if "td_loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line.get("step_factor") for line in lines] == [None] * 4 + [0.5] * 4
    said = [line for line in capsys.readouterr().err.splitlines() if "back to" in line]
    last = run.output_dir / "checkpoints" / "000004"
    assert len(said) == 1
    assert said[0].endswith(f"in offline update 6: back to {last}, with 0.5 of the step sizes")


def test_after_a_rollback_the_run_is_the_checkpoints_with_half_the_steps(begin):
    """Also where the learner had moved and has moments that the checkpoint has not."""
    rolled = begin("rolled")
    spoil(*rolled, large_steps)
    train(*rolled)
    other = begin("other")
    spoil(*other, lambda updates, _: updates == 4, then=kill)
    with pytest.raises(Killed):
        train(*other)
    resumed = begin("other", seed=1, resume=True)
    resumed[0].step_factor = 0.5
    train(*resumed)
    assert_same(rolled, resumed)


def kill():
    raise Killed


def test_a_second_divergence_halves_again_though_its_checkpoint_is_the_first_ones(begin):
    run, learner = begin()
    spoil(run, learner, lambda updates, factor: updates == 5 and factor > 0.3)
    train(run, learner)
    assert learner.step_factor == run.step_factor == 0.25
    assert step_sizes(learner) == [LR / 4, LR / 4]
    scalars = run.output_dir / "checkpoints/last/algorithm/scalars.json"
    assert json.loads(scalars.read_text())["step_factor"] == 0.25


def test_five_rollbacks_are_enough(begin, capsys):
    run, learner = begin()
    spoil(run, learner, lambda updates, _: updates == 5)
    with pytest.raises(DivergenceError, match=r"update 6, after 5 rollbacks and with 0\.03125 of"):
        train(run, learner)
    assert capsys.readouterr().err.count("back to") == 5


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(begin):
    run, learner = begin()
    spoil(run, learner, lambda updates, _: updates == 1)
    with pytest.raises(DivergenceError, match="offline update 2"):
        train(run, learner)
    assert not (run.output_dir / "checkpoints").exists()


@pytest.mark.parametrize("died_at", [5, 7])
def test_a_rolled_back_run_resumes_to_the_bits_of_an_uninterrupted_one(died_at, begin):
    """Killed before it has saved anything with the smaller steps, and after."""
    whole = begin("whole")
    spoil(*whole, large_steps)
    train(*whole)
    killed = begin("killed")
    spoil(*killed, large_steps)
    spoil(*killed, lambda updates, factor: updates == died_at and factor == 0.5, then=kill)
    with pytest.raises(Killed):
        train(*killed)
    resumed = begin("killed", seed=1, resume=True)
    spoil(*resumed, large_steps)
    train(*resumed)
    assert resumed[1].step_factor == 0.5
    assert_same(whole, resumed)


SPOILED = {
    "weight critic.online.layers.0.weight": lambda learner: bad(
        learner.critic.online.layers[0].weight
    ),
    "weight critic.target.layers.0.bias": lambda learner: bad(learner.critic.target.layers[0].bias),
    "the optimizer's 0.exp_avg_sq": lambda learner: bad(
        next(iter(learner.optimizer.state.values()))["exp_avg_sq"]
    ),
    "lam": lambda learner: setattr(learner.trust_region, "lam", math.inf),
}


def bad(tensor):
    with torch.no_grad():
        tensor.view(-1)[0] = math.nan


@pytest.mark.parametrize("name", SPOILED)
def test_a_checkpoint_never_holds_a_number_that_is_not_finite(name, begin):
    run, learner = begin(on_divergence="stop", log_freq=100)
    update = learner.update

    def spoilt(*arguments):
        update(*arguments)
        if run.step == 3:
            SPOILED[name](learner)

    learner.update = spoilt
    with pytest.raises(DivergenceError, match=f"{name} is not finite after offline update 4"):
        train(run, learner)
    folders = sorted(path.name for path in (run.output_dir / "checkpoints").iterdir())
    assert folders == ["000002", "last"]
    assert not_finite(learner) == name


def test_bad_weights_before_a_save_are_rolled_back_too(begin):
    run, learner = begin()
    update, spoilt = learner.update, []

    def once(*arguments):
        update(*arguments)
        if run.step == 3 and not spoilt:
            spoilt.append(True)
            bad(learner.critic.online.layers[0].weight)

    learner.update = once
    train(run, learner)
    assert learner.step_factor == 0.5
    assert not_finite(learner) is None


def test_an_old_checkpoint_is_of_whole_steps(begin):
    run, learner = begin()
    train(run, learner, steps=2)
    assert "step_factor" not in learner.scalars()
    learner.step_factor = 0.25
    learner.load_scalars({"lam": 1.0, "kl_ema": 0.0, "scheme": learner.config.scheme})
    assert learner.step_factor == 1.0
    assert step_sizes(learner) == [LR, LR]


def test_pretraining_is_rolled_back_and_its_step_sizes_are_halved_on_their_way_to_zero(begin):
    run, _ = begin()
    cloning = make_cloning(num_steps=8)
    update, seen = cloning.update, []

    def spoilt(batch, generator):
        if cloning._done == 5 and cloning.step_factor == 1.0:
            batch = replace(batch, action=batch.action * math.nan)
        update(batch, generator)
        seen.append(cloning.optimizer.param_groups[0]["lr"] / cloning.config.lr)

    cloning.update = spoilt
    run.policy = cloning.policy
    run.train([phase(run, cloning, "pretrain", 8, moves_policy=False)], InterruptGuard())
    whole, half = [1 - n / 8 for n in range(5)], [0.5 * (1 - n / 8) for n in range(4, 8)]
    assert seen == pytest.approx(whole + half)
    assert cloning.scalars() == {"done": 8, "step_factor": 0.5}


@pytest.mark.parametrize("where", ["action", "gradient"])
def test_behaviour_cloning_moves_nothing_by_a_number_that_is_not_finite(where, begin):
    run, _ = begin()
    cloning = make_cloning()
    batch = phase(run, cloning).sampler.sample(8, run.generators.replay)
    cloning.update(batch, run.generators.noise)
    tensors = module_tensors(cloning) | optimizer_tensors(cloning.optimizer)
    before = {name: value.clone() for name, value in tensors.items()}
    if where == "action":
        batch = replace(batch, action=batch.action * math.nan)
    else:
        parameter = next(cloning.policy.trainable_parameters())
        parameter.register_hook(lambda g: torch.full_like(g, math.inf))
    said = (
        "the behaviour-cloning loss is nan"
        if where == "action"
        else "the norm of its gradient is inf"
    )
    with pytest.raises(DivergenceError, match=said):
        cloning.update(batch, run.generators.noise)
    after = module_tensors(cloning) | optimizer_tensors(cloning.optimizer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert cloning.scalars() == {"done": 1}


def test_a_learner_of_a_later_phase_is_made_anew(begin):
    run, learner = begin()
    learners, cloning = [learner, make_off_policy(0)], make_cloning(num_steps=2)
    run.policy = cloning.policy
    spoil(run, learner, lambda updates, _: updates == 1)
    phases = [
        phase(run, cloning, "pretrain", 2, moves_policy=False),
        replace(
            phase(run, learner, steps=4),
            make_method=lambda: learners[0],
            renew=lambda: learners.pop(0),
        ),
    ]
    found = run.train(phases, InterruptGuard())
    assert found is not learner
    assert learners == [found]
    assert found.step_factor == 0.5


def test_alarms_are_told_once_logged_and_where_they_were_after_a_resume(begin, capsys):
    def lam_rests_on_its_bound(learner):
        learner.trust_region.update = lambda kl: None
        learner.trust_region.lam = learner.config.lam_min

    whole = begin("whole")
    lam_rests_on_its_bound(whole[1])
    train(*whole, steps=14)
    said = [line for line in capsys.readouterr().err.splitlines() if "lam_on_bound" in line]
    assert len(said) == 1
    assert said[0].startswith("alarm lam_on_bound: lambda stays on its lower bound 0.03")
    logged = [line.get("alarm_lam_on_bound") for line in metrics_lines(whole[0].output_dir)]
    assert [value for value in logged if value is not None] == [1] * 5

    killed = begin("killed")
    lam_rests_on_its_bound(killed[1])
    spoil(*killed, lambda updates, _: updates == 9, then=kill)
    with pytest.raises(Killed):
        train(*killed, steps=14)
    resumed = begin("killed", seed=1, resume=True)
    lam_rests_on_its_bound(resumed[1])
    train(*resumed, steps=14)
    assert_same(whole, resumed)


def test_step_sizes_fall_and_what_is_saved_are_whole_ones(begin):
    """By halves again after a rollback, and the same whether a run was killed between."""
    taken = []

    def watch(learner):
        update = learner.update

        def watched(batch, generator):
            taken.append(step_sizes(learner)[0] / LR)
            update(batch, generator)

        learner.update = watched

    falls = {"step_sizes": lambda done: 1.0 - 0.1 * done}
    whole = begin("whole", **falls)
    watch(whole[1])
    train(*whole)
    assert taken == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert step_sizes(whole[1]) == [LR, LR]
    assert whole[1].step_factor == 1.0
    rolled = begin("rolled", **falls)
    spoil(*rolled, lambda updates, factor: updates == 5 and factor == 0.5)
    taken.clear()
    watch(rolled[1])
    train(*rolled)
    first, again = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5], [0.3, 0.25, 0.2, 0.15]
    assert taken == pytest.approx(first + again)
    other = begin("other", **falls)
    spoil(*other, lambda updates, _: updates == 4, then=kill)
    with pytest.raises(Killed):
        train(*other)
    resumed = begin("other", seed=1, resume=True, **falls)
    train(*resumed)
    assert_same(whole, resumed)
