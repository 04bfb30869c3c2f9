"""What is seen of a run where there is no terminal: a line at once, then one every some seconds, with the time left."""

from __future__ import annotations

import io

from rich.console import Console

from spectune.training.display import Display, Heartbeat


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(display: Display, clock: Clock, steps: int, seconds: float) -> list[str]:
    out = display.console.file
    assert isinstance(out, io.StringIO)
    with display:
        for _ in range(steps):
            clock.now += seconds
            display.step(1.25, 3400.0)
    return out.getvalue().splitlines()


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_line_at_once_and_then_every_fifteen_seconds_with_the_time_left() -> None:
    clock = Clock()
    lines = shown(Display(console(), "LoRA", 20, 0, heartbeat=Heartbeat(clock=clock)), clock, 20, 4.0)
    assert lines == [
        "LoRA: step 1 of 20, loss 1.2500, 3,400 tokens/s",
        "LoRA: step 5 of 20, loss 1.2500, 3,400 tokens/s, about 60 s left",
        "LoRA: step 9 of 20, loss 1.2500, 3,400 tokens/s, about 44 s left",
        "LoRA: step 13 of 20, loss 1.2500, 3,400 tokens/s, about 28 s left",
        "LoRA: step 17 of 20, loss 1.2500, 3,400 tokens/s, about 12 s left",
    ]


def test_a_run_that_goes_on_counts_by_its_own_steps() -> None:
    clock = Clock()
    display = Display(console(), "LoRA", 20, 0, heartbeat=Heartbeat(clock=clock))
    display.go_on_from(10)
    lines = shown(display, clock, 4, 10.0)
    assert lines[-1] == "LoRA: step 13 of 20, loss 1.2500, 3,400 tokens/s, about 70 s left"


def test_short_runs_share_a_heartbeat_and_tell_what_comes_after_them() -> None:
    clock, out, left = Clock(), console(), [300.0]
    heartbeat = Heartbeat(clock=clock)
    for number in range(3):
        display = Display(out, f"trial {number}", 4, 0, heartbeat=heartbeat, behind=lambda: left[0], says=False)
        lines = shown(display, clock, 4, 3.0)
        display.say("best so far")
        left[0] -= 100
    assert lines == [
        "trial 0: step 1 of 4, loss 1.2500, 3,400 tokens/s",
        "trial 1: step 2 of 4, loss 1.2500, 3,400 tokens/s, about 6 s left, 3 min in all",
        "trial 2: step 3 of 4, loss 1.2500, 3,400 tokens/s, about 3 s left, 2 min in all",
    ]


def test_a_terminal_has_its_bar_and_no_lines() -> None:
    clock = Clock()
    out = Console(file=io.StringIO(), width=200, force_terminal=True)
    shown(Display(out, "LoRA", 20, 0, heartbeat=Heartbeat(clock=clock)), clock, 20, 20.0)
    assert isinstance(out.file, io.StringIO)
    assert ": step" not in out.file.getvalue()
