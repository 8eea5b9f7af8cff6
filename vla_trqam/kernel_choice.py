"""Which way the hot parts are computed: by the hand-written kernels, or by ordinary torch.

The models ask :func:`by_kernels` and have both; only here is it decided. The two agree up to
rounding, and what is differentiated more than once needs the plain way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, get_args

from vla_trqam.errors import UserError

Kernels = Literal["fast", "plain"]

_THERE = find_spec("vla_trqam.kernels") is not None
DEFAULT_KERNELS: Kernels = "fast" if _THERE else "plain"
_chosen: Kernels = DEFAULT_KERNELS


def by_kernels() -> bool:
    """Whether the hand-written ones compute."""
    return _chosen == "fast"


def choose_kernels(kernels: Kernels) -> None:
    """From now on, in this process.

    Raises:
        UserError: see :func:`check_kernels`.
    """
    global _chosen
    check_kernels(kernels)
    _chosen = kernels


@contextmanager
def chosen_kernels(kernels: Kernels) -> Iterator[None]:
    """:func:`choose_kernels` for a while."""
    before = _chosen
    choose_kernels(kernels)
    try:
        yield
    finally:
        choose_kernels(before)


def check_kernels(kernels: str) -> None:
    """Refuses what is no choice.

    Raises:
        UserError: it is neither "fast" nor "plain", or the fast ones are not in this copy.
    """
    if kernels not in get_args(Kernels):
        raise UserError(f"--kernels={kernels} must be {' or '.join(get_args(Kernels))}")
    if kernels == "fast" and not _THERE:
        raise UserError(
            "--kernels=fast needs the folder kernels of vla_trqam, which this copy lacks: take "
            "--kernels=plain"
        )
