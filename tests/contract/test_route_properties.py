"""Any route over any rows: each row as it is alone, whatever the padding and the neighbours (hypothesis)."""

from __future__ import annotations

import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from spectune.deltas import attach, route
from spectune.methods import IA3, BottleneckAdapter, LoRA, PrefixTuning, PromptTuning
from tests.contract.conftest import move
from tests.contract.families import FAMILIES

DELTAS = {
    "lora": LoRA(r=2),
    "adapter": BottleneckAdapter(bottleneck_dim=4),
    "ia3": IA3(),
    "prefix": PrefixTuning(num_virtual_tokens=2),
    "prompt": PromptTuning(num_virtual_tokens=3),
    "long": PromptTuning(num_virtual_tokens=6),
}


@functools.cache
def model(family: str) -> PreTrainedModel:
    torch.manual_seed(7)
    made = FAMILIES[family]().eval()
    for name, method in DELTAS.items():
        move(attach(made, method, name))
    return made


ROWS = st.lists(
    st.tuples(
        st.sampled_from([None, *DELTAS]), st.lists(st.integers(1, 96), min_size=1, max_size=9), st.integers(0, 3)
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(family=st.sampled_from(["gpt2", "gemma3"]), rows=ROWS)
def test_each_row_is_what_it_is_alone(family: str, rows: list[tuple[str | None, list[int], int]]) -> None:
    """Rows: a delta's name, token ids, and padding on the left; the rest of the batch's length is padding behind."""
    base = model(family)
    longest = max(len(ids) + left for _, ids, left in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (_, text, left) in enumerate(rows):
        ids[i, left : left + len(text)] = torch.tensor(text)
        mask[i, left : left + len(text)] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        with route(base, [name for name, _, _ in rows]):
            together = base(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for i, (name, text, left) in enumerate(rows):
            with route(base, name):
                alone = base(input_ids=torch.tensor([text])).logits[0]
            difference = (together[i, left : left + len(text)] - alone).abs().max()
            assert float(difference) <= 1e-5, (name, text, left)
