"""The plan of a pass that several runs share, held against what such passes take."""

from __future__ import annotations

import pytest

from spectune.deltas import attached
from spectune.methods import BottleneckAdapter, LoRA, PrefixTuning, PromptTuning
from spectune.planning import plan
from spectune.planning.shared_pass import largest_part, planned_together
from spectune.training import Run, TrainingConfig, company, train_together
from spectune.training.company import TooManyTogetherError, most_together
from tests.support import make_model, make_rows, make_tokenizer
from tests.training.test_training import QUIET

METHODS = (
    LoRA(r=8), LoRA(r=2), PrefixTuning(num_virtual_tokens=4), PromptTuning(num_virtual_tokens=4),
    BottleneckAdapter(bottleneck_dim=8, dropout=0.0),
)  # fmt: skip
CONFIG = TrainingConfig(max_steps=2, per_device_train_batch_size=4, packing=False)


def runs(count: int) -> list[Run]:
    return [Run(method, make_rows(8), make_rows(4), CONFIG) for method in METHODS[:count]]


def test_a_shared_pass_takes_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = list[int]()
    monkeypatch.setattr(company, "planned_together", lambda given: plans.append(planned_together(given)) or plans[-1])
    results = train_together(make_model(), make_tokenizer(), runs(5), console=QUIET, share_passes=True)
    measured = results[0].peak_memory_bytes["train_allocated"]
    assert 0.95 * measured < plans[-1] < 1.5 * measured


def test_base_is_counted_once_and_rows_as_long_as_the_longest() -> None:
    base = make_model()
    one, other = (plan(base, LoRA(r=8), batch=2, length=length, device="cpu") for length in (16, 32))
    assert planned_together([one]) == one.peak_reserved
    beside = one.peak_reserved - one.base_weights
    assert 3 * beside < planned_together([one] * 3) - one.base_weights < 3.2 * beside
    assert planned_together([one, other]) > one.peak_reserved + other.peak_reserved - one.base_weights
    prefix = plan(base, PrefixTuning(num_virtual_tokens=4), batch=2, length=16, device="cpu")
    assert planned_together([one, prefix]) > 1.3 * (beside + prefix.peak_reserved - one.base_weights)
    assert planned_together([]) == 0


def test_as_many_share_a_pass_as_have_room_and_gain_from_it() -> None:
    estimate = plan(make_model(), LoRA(r=8), batch=2, length=16, device="cpu")
    room = planned_together([estimate] * 3)
    assert largest_part([estimate] * 5, room, 16) == 3
    assert largest_part([estimate] * 5, room, 2) == 2
    assert largest_part([estimate] * 5, 1, 16) == 1
    assert largest_part([estimate] * 5, None, 16) == 5
    assert most_together("auto", [4, 9, 9, 9, 9], [estimate] * 5, None) == 4
    assert most_together("auto", [9] * 5, [estimate] * 5, room) == 3
    assert most_together(2, [9] * 5, [estimate] * 5, room) == 2
    assert most_together("auto", [9] * 5, [None] * 5, 1) == 5


def test_too_many_runs_are_refused_before_a_step_with_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company, "room_of", lambda given: 1)
    model = make_model()
    with pytest.raises(TooManyTogetherError, match="4 runs in one pass are predicted to take") as raised:
        train_together(model, make_tokenizer(), runs(4), console=QUIET, share_passes=True)
    assert raised.value.most == 1
    assert not attached(model)
