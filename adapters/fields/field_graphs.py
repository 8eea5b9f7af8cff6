"""CUDA graphs of field evaluations: launched once by the host, then replayed by the device alone.

An action expert's layers are small. Asked for one state after another, a GPU spends most of an
update waiting for the host to launch them. Here every evaluation of a path, forward and backward,
is recorded when it is first met; from then on it is one launch. The kernels are the same, and so
are the numbers; sums of gradients are taken in another order.

What a recording reads and writes stays where it is: states and shared prefixes are copied in,
velocities and gradients are copied out, and activations belong to the last path alone.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vla_trqam.precision import own_precision

Host = Callable[[], AbstractContextManager[PreTrainedPolicy]]
"""The host policy with the weights of one field in place."""
Evaluate = Callable[[PreTrainedPolicy, Tensor, Tensor, Any], Tensor]
"""``FlowFamily.velocities``: (B, N, H, A), (N,) and what is shared -> (B, N, H, A)."""
Replay = Callable[[], None]
WARM_UPS = 2
"""Libraries choose kernels and take memory at first; that cannot be recorded."""


class Recorder(Protocol):
    """Records what functions compute."""

    def pool(self) -> Any:
        """Memory for recordings.

        What one recording lets go of, a later one in the same pool may keep its results in:
        replayed in another order, the earlier overwrites them.
        """

    def record(self, compute: Callable[[], None], pool: Any) -> Replay:
        """What computes it again, in the same places. Whether it is computed now is open."""


class CUDARecorder:
    """CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        # Recordings keep a weight's node of accumulation, which is of the stream they are made on.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    def pool(self) -> Any:
        """See :class:`Recorder`."""
        return torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], None], pool: Any) -> Replay:
        """See :class:`Recorder`. Other threads may go on with the device."""
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(
            graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with torch.cuda.device(self._device), warnings.catch_warnings():
            # What lies elsewhere would be computed now, and never again.
            warnings.filterwarnings("error", message=".*CUDA Graph is empty")
            with capture:
                compute()
        return graph.replay


class FieldGraphs:
    """The recordings of one policy's fields.

    Args:
        evaluate: the family's.
        trained: weights of the tuned field.
        recorder: makes the recordings.
    """

    def __init__(
        self, evaluate: Evaluate, trained: Sequence[nn.Parameter], recorder: Recorder
    ) -> None:
        self.evaluate, self.recorder = evaluate, recorder
        self.scratch = recorder.pool()  # of recordings that leave nothing for later ones
        self.trained = tuple(trained)
        self.num_paths = 0
        self._fields: dict[tuple[str, bool, Any, Any], GraphedField] = {}
        self._where: tuple[int, ...] = ()

    def begin_path(self) -> None:
        """The activations of the path before are given up."""
        self.num_paths += 1

    def field(self, name: str, host: Host, shared: Any) -> BoundField:
        """One field at one batch of observations.

        Args:
            name: of the field, and of what it is asked for: recordings are kept by it.
            host: with its weights.
            shared: of its evaluations, by ``FlowFamily.share``.
        """
        where = tuple(p.data_ptr() for p in self.trained)
        if where != self._where:  # recordings read addresses
            self._fields.clear()
            self._where = where
        with_gradient = tuple(t.requires_grad for t in _tensors(shared))
        # What recordings depend on, the precision of the networks included.
        key = name, torch.is_autocast_enabled("cuda"), _shapes(shared), with_gradient
        if key not in self._fields:
            self._fields[key] = GraphedField(self, host, shared)
        return BoundField(self._fields[key], shared)


class GraphedField:
    """One field's recordings at observations of one shape.

    Attributes:
        shared: where recordings read what evaluations share.
        gradients: of the path so far, by what has one: trained weights, then shared tensors. None
            where no recording leads to it.
    """

    def __init__(self, graphs: FieldGraphs, host: Host, shared: Any) -> None:
        self.graphs, self.host = graphs, host
        # Evaluations with a gradient leave activations; a path makes them in one order.
        self.activations = graphs.recorder.pool()
        self.shared = _mapped(shared, lambda t: t.detach().clone().requires_grad_(t.requires_grad))
        kept = [t for t in _tensors(self.shared) if t.requires_grad]
        self.leaves = (*graphs.trained, *kept)
        self.gradients: list[Tensor | None] = [None] * len(self.leaves)
        self.bound: object = None
        self._with_gradient: list[Evaluation] = []
        self._without: Evaluation | None = None

    def evaluation(self, x: Tensor, number: int) -> Evaluation:
        """The recording for the next evaluation of a path, made where there is none.

        Args:
            x: the states, (B, H, A).
            number: of evaluations with a gradient on this path before.
        """
        if not torch.is_grad_enabled():
            self._without = self._without or Evaluation(self, x)
            return self._without
        if number == len(self._with_gradient):
            self._with_gradient.append(Evaluation(self, x))
        return self._with_gradient[number]


class BoundField:
    """``v(x, tau)`` of one field at given observations, replayed.

    With gradients on, where the tuned field is asked, gradients to its weights and to what is
    shared are summed by the recordings and handed on once, when all of them have been.
    """

    def __init__(self, field: GraphedField, shared: Any) -> None:
        self._field, self._shared, self._count = field, shared, 0
        self._token = object()
        self._path = field.graphs.num_paths
        self._collected: Tensor | None = None

    def __call__(self, x: Tensor, tau: Tensor) -> Tensor:
        """X (B, H, A), tau (1,) -> (B, H, A), float32."""
        field = self._field
        self._bind()
        evaluation = field.evaluation(x, self._count)
        if not torch.is_grad_enabled():
            return evaluation.value(x, tau)
        self._count += 1
        if not x.requires_grad and self._collected is None:
            leaves = (*field.graphs.trained, *_with_gradient(self._shared))
            self._collected = _Collect.apply(field, self._path, *leaves)
        value: Tensor = _Evaluate.apply(evaluation, self._path, tau, x, self._collected)
        return value

    def _bind(self) -> None:
        """Writes what is shared where recordings read it, unless it is there."""
        if self._field.bound is self._token:
            return
        self._field.bound = self._token
        with torch.no_grad():
            into, values = list(_tensors(self._field.shared)), list(_tensors(self._shared))
            torch._foreach_copy_(into, values)
            if sums := [g for g in self._field.gradients if g is not None]:
                torch._foreach_zero_(sums)


class Evaluation:
    """One evaluation, recorded; with gradients on, its backward pass too.

    To the states where they have a gradient, else to the field's leaves.
    """

    def __init__(self, field: GraphedField, x: Tensor) -> None:
        self._field = field
        self._x = x.detach().clone().requires_grad_(x.requires_grad)
        self._tau = x.new_zeros(1)
        self._value = self._slope = self._x_gradient = x  # until they are computed
        self._constants = constants = Constants()  # kept: recordings read them
        grad = torch.is_grad_enabled()
        wanted = (self._x,) if x.requires_grad else field.leaves
        used = self._warm_up(constants, wanted if grad else ())
        constants.known = True
        self._value = x  # lets go of the activations
        self._slope = torch.zeros_like(self._slope)

        def forward() -> None:
            with torch.set_grad_enabled(grad), constants:
                self._value = self._evaluate()

        def backward() -> None:
            found = [g for g in self._gradients([wanted[i] for i in used]) if g is not None]
            if x.requires_grad:
                (self._x_gradient,) = found
            else:
                sums: Any = [field.gradients[i] for i in used]
                torch._foreach_add_(sums, found)

        recorder, scratch = field.graphs.recorder, field.graphs.scratch
        self._forward = recorder.record(forward, field.activations if grad else scratch)
        if grad:
            self._backward = recorder.record(backward, scratch)

    def _warm_up(self, constants: Constants, wanted: Sequence[Tensor]) -> list[int]:
        """Which of the wanted gradients there are; room is made for their sums."""
        used: list[int] = []
        with _side_stream(self._x.device), torch.set_grad_enabled(bool(wanted)):
            for _ in range(WARM_UPS):
                constants.forget()
                with constants:
                    self._value = self._evaluate()
                if wanted:
                    self._slope = torch.zeros_like(self._value)
                    found = self._gradients(wanted)
                    used = [i for i, g in enumerate(found) if g is not None]
        if wanted and not self._x.requires_grad:
            sums = self._field.gradients
            for i in used:
                sums[i] = torch.zeros_like(wanted[i]) if sums[i] is None else sums[i]
        return used

    def _evaluate(self) -> Tensor:
        field = self._field
        with field.host() as host:
            x = self._x.unsqueeze(1)
            return field.graphs.evaluate(host, x, self._tau, field.shared).squeeze(1).float()

    def _gradients(self, wanted: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        # The graph is kept, and its activations with it: other recordings would take their memory.
        with own_precision(self._slope):
            return torch.autograd.grad(
                self._value, wanted, self._slope, retain_graph=True, allow_unused=True
            )

    @torch.no_grad()
    def value(self, x: Tensor, tau: Tensor) -> Tensor:
        """The forward pass, replayed."""
        assert x.shape == self._x.shape, (x.shape, self._x.shape)
        self._x.copy_(x)
        self._tau.copy_(tau)
        self._forward()
        return self._value.detach().clone()

    @torch.no_grad()
    def pulled_back(self, slope: Tensor) -> Tensor | None:
        """The backward pass, replayed: the states' gradient, where they have one."""
        self._slope.copy_(slope)
        self._backward()
        return self._x_gradient.clone() if self._x.requires_grad else None


class _Evaluate(torch.autograd.Function):
    """A replay as a node of the graph outside."""

    @staticmethod
    def forward(
        ctx: Any, evaluation: Evaluation, path: int, tau: Tensor, x: Tensor, _: Tensor | None
    ) -> Tensor:
        ctx.evaluation, ctx.path = evaluation, path
        return evaluation.value(x, tau)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        _check_path(ctx.evaluation._field, ctx.path)
        x_gradient = ctx.evaluation.pulled_back(slope)
        collected = slope.new_zeros(()) if ctx.needs_input_grad[4] else None
        return None, None, None, x_gradient, collected


class _Collect(torch.autograd.Function):
    """Hands on the sums of gradients, when every evaluation behind it has added its own."""

    @staticmethod
    def forward(ctx: Any, field: GraphedField, path: int, *leaves: Tensor) -> Tensor:
        ctx.field, ctx.path = field, path
        return leaves[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        _check_path(ctx.field, ctx.path)
        sums = ctx.field.gradients
        handed = [None if g is None else g.clone() for g in sums]
        # A second pass through the same path begins anew.
        torch._foreach_zero_([g for g in sums if g is not None])
        return None, None, *handed


def _check_path(field: GraphedField, path: int) -> None:
    if field.graphs.num_paths != path:
        raise RuntimeError(
            "gradients of a path are asked for when another one has been sampled, which took its "
            "activations' place: take them first, or leave policy.cuda_graphs out"
        )


class Constants(TorchFunctionMode):
    """Tensors made of numbers inside: kept at first, then given out again in order.

    Hosts make small masks of lists; to copy them to the device is nothing that can be recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known = False
        self._kept: list[Tensor] = []
        self._next = 0

    def forget(self) -> None:
        """What was kept."""
        self._kept.clear()

    def __enter__(self) -> Constants:
        self._next = 0
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of torch inside."""
        if func is not torch.tensor:
            return func(*args, **(kwargs or {}))
        if not self.known:
            self._kept.append(func(*args, **(kwargs or {})))
            return self._kept[-1]
        self._next += 1
        return self._kept[self._next - 1]


# What evaluations share: tensors in dataclasses, mappings and sequences.


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [f.name for f in dataclasses.fields(tree)]
        return dataclasses.replace(tree, **{n: _mapped(getattr(tree, n), change) for n in names})
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(value, change) for value in tree)
    return tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(tree, note)
    yield from found


def _with_gradient(tree: Any) -> list[Tensor]:
    return [t for t in _tensors(tree) if t.requires_grad]


def _shapes(tree: Any) -> tuple[Any, ...]:
    return tuple((t.shape, t.dtype) for t in _tensors(tree))


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Another stream than the one that is waited for, where the device has streams."""
    if device.type != "cuda":
        yield
        return
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield
    main.wait_stream(side)
