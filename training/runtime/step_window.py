"""Window over the batches of a step: what they tell counts only if the step was not skipped."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Told = TypeVar("Told")


class StepWindow(Generic[Told]):
    """Holds what was noted since the last step ended, in order, until this one is settled.

    Args:
        count: takes each note of a step that was not skipped; None where notes only serve the step itself.
    """

    def __init__(self, count: Callable[[Told], None] | None = None):
        self._count, self._notes = count, []

    def note(self, told: Told) -> None:
        """Take note of one batch of the step under way."""
        self._notes.append(told)

    def settle(self, skipped: bool) -> None:
        """End the step: count its notes, or forget them if it was skipped."""
        notes, self._notes = self._notes, []
        if self._count is not None and not skipped:
            for told in notes:
                self._count(told)

    def __len__(self) -> int:
        return len(self._notes)

    def __iter__(self) -> Iterator[Told]:
        return iter(self._notes)
