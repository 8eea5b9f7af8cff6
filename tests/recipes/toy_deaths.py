"""Ways for a run to end early."""

import math
import os
from dataclasses import replace

from toy_task import Killed


def dies_at_update(monkeypatch, learner, number, death=Killed):
    """The process ends in the middle of the n-th update of this kind."""
    update, count = learner.update, 0

    def mortal(self, *arguments, **named):
        nonlocal count
        count += 1
        if count == number:
            raise death
        update(self, *arguments, **named)

    monkeypatch.setattr(learner, "update", mortal)


def signalled_at_update(monkeypatch, learner, number, which):
    update, count = learner.update, 0

    def signalled(self, *arguments, **named):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), which)
        update(self, *arguments, **named)

    monkeypatch.setattr(learner, "update", signalled)


def dies_at_call(patch, owner, name, number):
    """The process ends at the beginning of the n-th call, counted from 0."""
    function, count = getattr(owner, name), 0

    def mortal(*arguments, **named):
        nonlocal count
        count += 1
        if count == number + 1:
            raise Killed
        return function(*arguments, **named)

    patch.setattr(owner, name, mortal)


def diverges_at_update(monkeypatch, learner, done):
    """A loss of NaN after so many updates, also of a resumed run, while the steps are whole."""
    update = learner.update

    def diverging(self, batch, generator, **named):
        moments = self.optimizer.state.values()
        taken = max((int(state["step"]) for state in moments), default=0)
        if taken == done and self.step_factor == 1.0:
            batch = replace(batch, chunk_return=batch.chunk_return * math.nan)
        update(self, batch, generator, **named)

    monkeypatch.setattr(learner, "update", diverging)
