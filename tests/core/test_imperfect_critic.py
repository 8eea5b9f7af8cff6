"""A critic whose gradient is made wrong on purpose, inside an update."""

from dataclasses import replace

import pytest
import torch
from update_problems import BATCH, batch_of, method_of, noise_of

from vla_trqam.critic import made_wrong
from vla_trqam.errors import UserError
from vla_trqam.methods.trqam import TRQAM, TRQAMConfig


def test_the_adjoint_starts_from_the_gradient_with_the_noise_that_no_step_uses() -> None:
    method, noise = method_of(), noise_of()
    right = method.loss(batch_of(), noise, 2.0)
    method.critic.gradient_noise = 0.5
    wrong = method.loss(batch_of(), noise, 2.0)
    assert torch.equal(wrong.trajectory.x, right.trajectory.x)
    expected = -made_wrong(-right.terminal_adjoint, noise.sde_steps[-1], 0.5)
    torch.testing.assert_close(wrong.terminal_adjoint, expected)
    ratio = (wrong.terminal_adjoint - right.terminal_adjoint).flatten(1).norm(dim=1)
    ratio = ratio / right.terminal_adjoint.flatten(1).norm(dim=1)
    assert 0.3 < float(ratio.mean()) < 0.7
    assert float(wrong.adjoint_loss) > float(right.adjoint_loss)


def test_without_noise_an_update_does_not_read_it() -> None:
    noise = noise_of()
    other = replace(noise, sde_steps=noise.sde_steps.clone())
    other.sde_steps[-1] = torch.nan
    first, second = method_of(), method_of()
    for method, given in ((first, noise), (second, other)):
        method.update_with(batch_of(), given)
    for one, two in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(one, two)
    assert len(noise.next_action) == BATCH


def test_a_chain_that_uses_the_last_steps_noise_is_refused() -> None:
    method = method_of()
    method.critic.gradient_noise = 0.1
    config = TRQAMConfig(scheme="shifted_euler", final_step="sde")
    with pytest.raises(UserError, match=r"gradient_noise is 0\.1, .* take 'noiseless_base'"):
        TRQAM(method.policy, method.critic, config)
