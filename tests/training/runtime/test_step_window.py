"""Notes of a step count once, in order, and only if the step was not skipped."""

from training.runtime.step_window import StepWindow


def test_notes_count_when_their_step_is_settled():
    counted = []
    window = StepWindow(counted.append)
    assert not window
    window.note("a")
    window.note("b")
    assert list(window) == ["a", "b"] and not counted
    window.settle(skipped=False)
    assert counted == ["a", "b"] and not window
    window.settle(skipped=False)
    assert counted == ["a", "b"]


def test_notes_of_a_skipped_step_are_forgotten():
    counted = []
    window = StepWindow(counted.append)
    window.note("a")
    window.settle(skipped=True)
    window.note("b")
    window.settle(skipped=False)
    assert counted == ["b"]


def test_notes_may_serve_the_step_alone():
    window = StepWindow()
    window.note(1)
    assert len(window) == 1
    window.settle(skipped=False)
    assert len(window) == 0
