"""A config is a value: equal ones are one key."""

from __future__ import annotations

from spectune.methods import METHODS, LoRA


def test_configs_are_keys_of_sets_and_dicts() -> None:
    assert len({method() for method in METHODS} | {method() for method in METHODS}) == len(METHODS)
    assert hash(LoRA(rank_pattern={"q": 2})) == hash(LoRA(rank_pattern={"q": 2}))
    assert len({LoRA(rank_pattern={"q": 2}), LoRA(rank_pattern={"q": 4})}) == 2
