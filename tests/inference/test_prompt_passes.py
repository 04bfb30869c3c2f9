"""Which prompts share a pass."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from tests.contract.families import llama
from transformers import PreTrainedModel

from spectune.deltas import attach
from spectune.inference import Engine, Request
from spectune.inference.prompt_passes import cheapest_passes
from spectune.methods import PromptTuning


def all_ways(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every way to cut so many into stretches."""
    for cuts in itertools.product((False, True), repeat=count - 1):
        ends = [number + 1 for number, cut in enumerate(cuts) if cut] + [count]
        yield list(zip([0, *ends[:-1]], ends, strict=True))


def cost(lengths: Sequence[int], passes: list[list[int]], pass_costs: int) -> int:
    return sum(len(each) * max(lengths[number] for number in each) + pass_costs for each in passes)


def test_no_other_way_costs_less() -> None:
    """Beside every way to cut up the prompts in the order of their lengths."""
    draw = random.Random(0)
    for pass_costs in (0, 5, 32, 1000):
        for _ in range(30):
            lengths = [draw.choice((1, 7, 30, 42, 200)) + draw.randrange(3) for _ in range(draw.randrange(1, 8))]
            most = draw.choice((50, 300, 10_000))
            found = cheapest_passes(lengths, pass_costs, most)
            assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
            assert all(len(p) == 1 or len(p) * max(lengths[n] for n in p) <= most for p in found)
            order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
            ways = [[order[begin:end] for begin, end in way] for way in all_ways(len(order))]
            allowed = [w for w in ways if all(len(p) == 1 or len(p) * lengths[p[0]] <= most for p in w)]
            assert cost(lengths, found, pass_costs) == min(cost(lengths, way, pass_costs) for way in allowed)
            longest = [max(lengths[number] for number in each) for each in found]
            assert longest == sorted(longest, reverse=True)


def test_what_padding_costs_is_weighed_against_a_pass() -> None:
    lengths = [32] * 14 + [42] * 2  # ten virtual tokens more
    assert [len(each) for each in cheapest_passes(lengths, 32)] == [2, 14]
    assert [len(each) for each in cheapest_passes(lengths, 4096)] == [16]
    assert cheapest_passes([], 32) == []
    assert cheapest_passes([9000, 9001], 32) == [[1], [0]]  # each longer than a pass may be


def test_virtual_tokens_of_a_prompt_count(prompt_passes: list[int]) -> None:
    """Two rows of prompt tuning made all of a batch as much longer."""
    model: PreTrainedModel = llama().train(False)
    attach(model, PromptTuning(num_virtual_tokens=12), "prompt")
    engine = Engine(model)
    prompts = torch.randint(5, 60, (8, 10), generator=torch.Generator().manual_seed(0)).tolist()
    tickets = [engine.submit(Request(ids, 2, "prompt" if number < 2 else None)) for number, ids in enumerate(prompts)]
    while not engine.idle:
        engine.step()
    assert prompt_passes == [2, 6]
    assert all(len(ticket.ids) == 2 for ticket in tickets)
