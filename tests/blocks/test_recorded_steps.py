"""Recorded decoding steps give what steps give. CUDA graphs need a GPU: here what is recorded is run again instead,
into the same memory, which tries all but the recording itself (tests/cuda does that)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from spectune.blocks import recorded_steps
from spectune.blocks.recorded_steps import Form, RecordedSteps
from spectune.blocks.step_attention import Filled, step_attention
from spectune.blocks.step_blocks import Compiling, StepBlocks
from spectune.compute.decode_attention import attend_by_length, attend_by_mask
from spectune.errors import ConfigError
from spectune.families import describe
from tests.contract.families import gpt2, llama

ROWS, PLACES = 4, 32


class Again:
    """Runs what was recorded once more, and puts the results where the first ones are."""

    replays = 0

    def warm_up(self, function: Callable[[], Any]) -> None:
        function()

    def capture(self, function: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
        places = function()

        def replay() -> None:
            type(self).replays += 1
            for place, new in zip(places, function(), strict=True):
                place.copy_(new)

        return places, replay


class Layer(CacheLayerMixin):
    """Keys and values of all rows, each filled up to its own place."""

    is_sliding = False

    def __init__(self, batch: Batch, heads: int, dim: int) -> None:
        super().__init__()
        self.batch = batch
        self.stored = torch.zeros(ROWS, PLACES, heads, dim), torch.zeros(ROWS, PLACES, heads, dim)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows, found = key_states.shape[0], []
        for buffer, new in zip(self.stored, (key_states, value_states), strict=True):
            buffer[torch.arange(rows), self.batch.places[:rows]] = new[:, :, 0]
            found.append(buffer[:rows, : self.batch.capacity].transpose(1, 2))
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.batch.capacity, 0

    def get_seq_length(self) -> int:
        return 1

    def get_max_length(self) -> int:
        return PLACES


class Batch:
    """Rows of unlike lengths, their tensors made once and filled in place."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        config = model.config.get_text_config()
        self.ids = torch.zeros(ROWS, 1, dtype=torch.int64)
        self.places = torch.zeros(ROWS, dtype=torch.int64)
        self.capacity = PLACES
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        shape = heads, config.hidden_size // config.num_attention_heads
        self.cache = Cache(layers=[Layer(self, *shape) for _ in range(config.num_hidden_layers)])
        self.cache.places = self.places  # type: ignore[attr-defined]

    @torch.no_grad()
    def run(self, rows: int, capacity: int) -> Tensor:
        self.capacity = capacity
        places = self.places[:rows]
        mask = (torch.arange(capacity) <= places[:, None])[:, None, None]
        out = self.model(
            input_ids=self.ids[:rows], position_ids=places[:, None], attention_mask=mask, use_cache=True,
            past_key_values=self.cache, logits_to_keep=1,
        )  # fmt: skip
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def written(self, steps: Any, count: int = 6) -> list[Tensor]:
        """Logits of some steps of three rows, which begin one after the other."""
        found = []
        for buffer in (b for layer in self.cache.layers for b in layer.stored):  # type: ignore[attr-defined]
            buffer.zero_()
        self.ids.copy_(torch.tensor([[5], [7], [9], [0]]))
        self.places.zero_()
        for number in range(count):
            active = min(number + 1, 3)
            rows, capacity = steps.rows_for(active), steps.capacity_for(number + 1, PLACES)
            out = steps(rows, capacity)
            found.append(out.logits[:active].clone())
            assert torch.equal(out.tokens, out.logits.argmax(-1))
            self.ids[:active, 0] = out.tokens[:active]
            self.places[:active] += 1
        return found


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_steps, "LEAST_CAPACITY", 4)
    Again.replays = 0


def recorded(batch: Batch, *forms: Form, capture: Any = Again) -> RecordedSteps:
    return RecordedSteps(batch.run, torch.float32, forms or (Form("a step"),), capture=capture)


def by_blocks(batch: Batch, compiling: Compiling | None = None) -> Form:
    blocks = StepBlocks(batch.model, describe(batch.model), compiling)
    return Form("steps by length", lambda rows, capacity: blocks.exchanged(batch.cache, rows, capacity))  # type: ignore[arg-type]


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def plain(batch: Batch) -> list[Tensor]:
    return batch.written(recorded_steps.PlainSteps(batch.run))


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("exchanged", [False, True])
def test_replays_give_what_the_steps_give(make: Any, exchanged: bool) -> None:
    batch = Batch(make())
    expected = plain(batch)
    steps = recorded(batch, *([by_blocks(batch)] if exchanged else []))
    for _ in range(2):
        agree(batch.written(steps), expected)
    assert len(steps.forms) == 1, "a form was given up"
    assert list(steps.graphs) == [(None, 1, 4), (None, 2, 4), (None, 4, 4), (None, 4, 8)]
    assert Again.replays >= len(expected)
    assert batch.model.config._attn_implementation == "sdpa"
    assert not any("_compiled_call_impl" in vars(module) for module in batch.model.modules())


def test_one_compiled_block_serves_all_layers_rows_and_capacities() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    batch = Batch(llama())
    expected = plain(batch)
    steps = recorded(batch, by_blocks(batch, Compiling(backend=backend)))
    agree(batch.written(steps), expected)
    # of one row, of several, and of any
    assert 1 <= len(graphs) <= 3
    assert len(steps.forms) == 1


def test_a_form_that_gives_something_else_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    batch = Batch(llama())
    expected = plain(batch)

    class Stale(Again):
        def capture(self, function: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
            return function(), lambda: None

    class Fails(Again):
        def capture(self, function: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
            raise RuntimeError("operation not permitted when stream is capturing")

    for capture, said in ((Stale, "its replay gives other logits"), (Fails, "operation not permitted")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="spectune"):
            steps = recorded(batch, Form("the first"), Form("the second"), capture=capture)
            agree(batch.written(steps), expected)
        assert f"the first cannot be recorded ({said}" in caplog.text
        assert "the second is tried" in caplog.text
        assert "steps run without CUDA graphs" in caplog.text


@pytest.mark.parametrize(
    ("form_off", "replay_off", "taken"), [(0.06, 0.0, True), (0.0, 0.06, False), (0.4, 0.0, False)]
)
def test_rounding_of_other_kernels_is_no_fault_but_another_replay_is(
    form_off: float, replay_off: float, taken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In bfloat16 logits of a compiled step differ by some percent from the plain one's; a graph that reads what is no
    longer so may differ by no more than that, and is found out by the same kernels unrecorded."""
    torch.manual_seed(0)
    logits, noise = torch.randn(2, 500), torch.randn(2, 500)
    off = [0.0]

    @contextlib.contextmanager
    def other_kernels(rows: int, capacity: int) -> Iterator[None]:
        off[0] = form_off
        try:
            yield
        finally:
            off[0] = 0.0

    class Off(Again):
        def capture(self, function: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], None]]:
            found = [logits + (form_off + replay_off) * noise, logits.argmax(-1)]
            return found, lambda: None

    steps = RecordedSteps(
        lambda rows, capacity: logits + off[0] * noise, torch.bfloat16, [Form("another", other_kernels)],
        capture=cast(Any, Off),
    )  # fmt: skip
    for _ in range(2):
        assert torch.equal(steps(2, 128).logits, logits)
    with caplog.at_level(logging.WARNING, logger="spectune"):
        steps(2, 128)
    assert bool(steps.forms) is taken
    assert any(graph.trusted for graph in steps.graphs.values()) is taken


def test_graphs_are_few_and_forgotten_when_what_they_read_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_steps, "MOST_GRAPHS", 2)
    batch = Batch(llama())
    expected = plain(batch)
    steps = recorded(batch)
    batch.written(steps)
    assert list(steps.graphs) == [(None, 4, 4), (None, 4, 8)]
    steps.forget()
    assert not steps.graphs
    agree(batch.written(steps), expected)


def test_the_attention_of_other_passes_is_as_it_was() -> None:
    model = llama().eval()
    ids = torch.randint(0, 60, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with step_attention(model):
            assert torch.equal(model(input_ids=ids).logits, expected)
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="attends by 'eager'; expected one of sdpa"), step_attention(model):
        raise AssertionError
    assert model.config._attn_implementation == "eager"


def test_heads_that_share_keys_are_queries_of_one() -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(3, 8, 1, 16), torch.randn(2, 3, 2, 10, 16)
    mask = (torch.arange(10) <= torch.tensor([[2], [9], [5]]))[:, None, None]
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    found = attend_by_mask(query, key, value, mask, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_flash_is_asked_for_rows_by_their_lengths() -> None:
    """On `meta`, which has the kernel's shapes and none of its numbers."""
    query = torch.empty(3, 8, 1, 16, dtype=torch.bfloat16, device="meta")
    key = torch.empty(3, 10, 2, 16, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    filled = Filled.of(torch.empty(3, dtype=torch.int64, device="meta"), 10, 8)
    assert attend_by_length(query, key, key, *filled).shape == (3, 1, 8, 16)
