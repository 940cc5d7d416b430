"""The mean gradient of one optimizer step's micro-batches, in one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdlocal.averaging.flat_buffer import FlatViews


class GradientBuffer:
    """Collects the gradients of micro-batches and gives their sum back as the parameters' gradients.

    Attributes:
        micro_batches: collected so far.
        empty: of them, those that brought no gradient at all.

    Args:
        parameters: whose `.grad` is collected.
        layout: places of the parameters in `flat`.
        flat: contiguous float32, `layout.numel` elements; zero.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], layout: FlatViews, flat: torch.Tensor) -> None:
        self._parameters = parameters
        self._views = layout.of(flat)
        self._seen = [False] * len(parameters)
        self.flat = flat
        self.micro_batches = self.empty = 0

    def collect(self) -> None:
        """Adds the present gradients and takes them away from the parameters, so that the next backward starts at zero."""
        pairs = [(i, p.grad) for i, p in enumerate(self._parameters) if p.grad is not None]
        first = [(self._views[i], grad) for i, grad in pairs if not self._seen[i] and not self._is_view(i, grad)]
        more = [(self._views[i], grad) for i, grad in pairs if self._seen[i] and not self._is_view(i, grad)]
        if first:
            torch._foreach_copy_([view for view, _ in first], [grad for _, grad in first])
        if more:
            torch._foreach_add_([view for view, _ in more], [grad for _, grad in more])
        for i, _ in pairs:
            self._seen[i] = True
            self._parameters[i].grad = None
        self.micro_batches += 1
        self.empty += not pairs

    def sum_of(self, i: int) -> torch.Tensor | None:
        """What was collected for parameter i; None if nothing was."""
        return self._views[i] if self._seen[i] else None

    def fill_unseen(self) -> None:
        """Makes the gradient of a parameter that took no part zero."""
        for i, seen in enumerate(self._seen):
            if not seen:
                self._views[i].zero_()
                self._seen[i] = True

    def give_back(self) -> None:
        """Sets the parameters' gradients to what was collected, and starts anew; parameters without one keep None."""
        for parameter, view, seen in zip(self._parameters, self._views, self._seen, strict=True):
            parameter.grad = view if seen else None
        self.drop()

    def drop(self) -> None:
        """Forgets what was collected."""
        self._seen = [False] * len(self._parameters)
        self.micro_batches = self.empty = 0

    def state(self) -> dict[str, object]:
        """What was collected so far; empty between two steps."""
        if not self.micro_batches:
            return {}
        counts = {"micro_batches": self.micro_batches, "empty": self.empty}
        return {**counts, "seen": list(self._seen), "sum": self.flat.clone()}

    def load_state(self, state: dict) -> None:
        """The reverse of `state`."""
        self.drop()
        for parameter in self._parameters:
            parameter.grad = None  # it may be a view of what is written below
        if state:
            self.micro_batches = state["micro_batches"]
            self.empty = state.get("empty", 0)
            self._seen = list(state["seen"])
            self.flat.copy_(state["sum"])

    def _is_view(self, i: int, grad: torch.Tensor) -> bool:
        """Whether a gradient lies in the buffer: zero_grad(set_to_none=False) keeps it there, and backward adds to it."""
        return grad.data_ptr() == self._views[i].data_ptr()


def squared_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ ‖g‖² over the tensors, as a 0-dimensional tensor."""
    return torch.stack(torch._foreach_norm(list(gradients))).square_().sum()
