from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from tests.contract.families import gemma3, gpt2, mixtral
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from spectune.deltas import Attachment, Method, attach, detach, route
from spectune.errors import ConfigError, OutOfMemoryError
from spectune.inference import Engine, Request, Sampling, Ticket, generate_ids
from spectune.inference.cached_lane import CachedLane
from spectune.inference.engine_bases import why_not_engine
from spectune.inference.generate import generate_batch, plain_config
from spectune.methods import (
    IA3,
    OFT,
    BitFit,
    BottleneckAdapter,
    DoRA,
    FullFineTuning,
    LNTuning,
    LoRA,
    MiSS,
    PrefixTuning,
    PromptTuning,
)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [8, 8], list(range(1, 12))]
METHODS: dict[str, Method] = {
    "lora": LoRA(r=3),
    "wide": LoRA(r=8),
    "dora": DoRA(r=2),
    "adapter": BottleneckAdapter(),
    "bitfit": BitFit(),
    "ia3": IA3(),
    "ln": LNTuning(),
    "miss": MiSS(),
    "oft": OFT(),
    "prefix": PrefixTuning(num_virtual_tokens=4),
    "sliding": PrefixTuning(num_virtual_tokens=7, sliding=True),
    "prompt": PromptTuning(num_virtual_tokens=3),
    "longer": PromptTuning(num_virtual_tokens=5),
}
#: a weight that is not a module's own: its rows share no batch
EXPERTS = LoRA(r=2, target_parameters="all-experts")


def sharp(model: PreTrainedModel) -> PreTrainedModel:
    """With weights so large that each token follows from all before it, and nothing that ends a text."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.train(False)


def with_deltas(model: PreTrainedModel, methods: dict[str, Method]) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, method in methods.items():
        delta = attach(model, method, name)
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def by_generate(model: PreTrainedModel, prompt: list[int], delta: str | None, tokens: int) -> list[int]:
    """What transformers writes for the prompt alone."""
    with torch.no_grad(), route(model, delta):
        return generate_batch(model, [prompt], plain_config(tokens, (), 0))[0]


def finish(engine: Engine, tickets: Sequence[Ticket]) -> list[list[int]]:
    while not engine.idle:
        for written in engine.step():
            if written.error is not None:
                raise written.error
    engine.close()
    return [ticket.ids for ticket in tickets]


def written(model: PreTrainedModel, requests: Sequence[Request], rows: int = 16) -> list[list[int]]:
    engine = Engine(model, rows=rows)
    return finish(engine, [engine.submit(request) for request in requests])


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    from tests.contract.families import llama as make

    torch.manual_seed(0)
    model = sharp(make())
    with_deltas(model, {name: METHODS[name] for name in ("lora", "ia3", "prefix", "prompt")})
    return model


@pytest.mark.parametrize("make", [gpt2, gemma3, mixtral])
def test_rows_of_all_methods_in_one_batch_get_what_generate_writes_for_each_alone(make: object) -> None:
    torch.manual_seed(0)
    model = sharp(make())  # type: ignore[operator]
    with_deltas(model, METHODS | ({"experts": EXPERTS} if make is mixtral else {}))
    names = [None, *Attachment.of(model).deltas, None]  # type: ignore[union-attr]
    requests = [Request(PROMPTS[n % len(PROMPTS)], 9, name) for n, name in enumerate(names)]
    expected = [by_generate(model, list(r.ids), r.delta, 9) for r in requests]
    assert len({tuple(ids) for ids in expected}) > len(expected) // 2
    for rows in (3, 20):
        assert written(model, requests, rows) == expected


def test_rows_come_and_go_and_the_cache_grows(llama: PreTrainedModel) -> None:
    lengths = [3, 50, 1, 20, 7, 40, 2]
    requests = [Request(PROMPTS[n % 6], length, (None, "lora", "prompt")[n % 3]) for n, length in enumerate(lengths)]
    expected = [by_generate(llama, list(r.ids), r.delta, r.max_new_tokens) for r in requests]
    for rows in (1, 2, 5):
        assert written(llama, requests, rows) == expected
    engine = Engine(llama, rows=2)
    first = engine.submit(requests[0])
    engine.step()
    later = [engine.submit(request) for request in requests[1:]]
    assert finish(engine, [first, *later]) == expected


def test_prompts_wait_for_each_other_where_many_do(llama: PreTrainedModel, prompt_passes: list[int]) -> None:
    """One pass over several prompts, and nobody waits for a row where few do."""
    # rows end one after the other
    requests = [Request([5 + n, 6], 2 + n % 4) for n in range(9)]
    for enter_at in (1, 2):
        prompt_passes.clear()
        engine = Engine(llama, rows=4, enter_at=enter_at)
        ids = finish(engine, [engine.submit(request) for request in requests])
        assert [len(each) for each in ids] == [request.max_new_tokens for request in requests]
        assert sum(prompt_passes) == 9
        assert prompt_passes[0] == 4
        assert min(prompt_passes[1:-1]) == enter_at
    engine = Engine(llama, rows=4, enter_at=2)
    for request in requests[1:4]:
        engine.submit(request)
    engine.step()
    assert (engine.free_for(0), engine.free_for(1), engine.free_for(5)) == (0, 1, 0)


def test_a_route_of_as_many_rows_as_prompts_gives_each_prompt_its_own(llama: PreTrainedModel) -> None:
    names = ["lora", None, "prefix", "prompt", "lora", "ia3"]
    expected = [by_generate(llama, prompt, name, 6) for prompt, name in zip(PROMPTS, names, strict=True)]
    with route(llama, names):
        assert generate_ids(llama, PROMPTS, max_new_tokens=6, batch_size=4) == expected
        with pytest.raises(ConfigError, match="each of 6 rows"):
            generate_ids(llama, PROMPTS[:2], max_new_tokens=6)
    state = Attachment.of(llama).state  # type: ignore[union-attr]
    assert not list(state.tables)


def test_a_stop_token_ends_a_row_and_is_not_among_its_tokens(llama: PreTrainedModel) -> None:
    free = by_generate(llama, PROMPTS[0], None, 9)
    engine = Engine(llama)
    ticket = engine.submit(Request(PROMPTS[0], 9, stops=[free[4]], logprobs=0))
    said = []
    while not engine.idle:
        said += engine.step()
    assert ticket.ids == free[: free.index(free[4])]
    assert [one.token for one in said] == [*ticket.ids, None]
    assert [one.finished for one in said] == [None] * len(ticket.ids) + ["stop"]
    assert all(one.logprob is not None for one in said)


def test_log_probabilities_are_those_of_the_plain_pass(llama: PreTrainedModel) -> None:
    engine = Engine(llama)
    asked = engine.submit(Request(PROMPTS[2], 5, "lora", logprobs=3))
    engine.submit(Request(PROMPTS[1], 5, "prefix"))
    said = []
    while not engine.idle:
        said += [one for one in engine.step() if one.ticket is asked]
    with torch.no_grad(), route(llama, "lora"):
        logits = llama(input_ids=torch.tensor([asked.seen])).logits[0, len(PROMPTS[2]) - 1 : -1]
    expected = logits.double().log_softmax(-1)
    for one, logs in zip(said, expected, strict=True):
        assert one.token is not None
        assert one.logprob == pytest.approx(float(logs[one.token]), abs=1e-4)
        values, ids = logs.topk(3)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert said[-1].finished == "length"


def test_what_is_drawn_depends_on_the_seed_and_on_no_neighbour(llama: PreTrainedModel) -> None:
    def drawn(seed: int, stream: int, others: int, rows: int) -> list[int]:
        warm = Sampling(seed=seed, temperature=3.0, top_p=0.95)
        beside = [Request(PROMPTS[n], 4 + n, "lora", sampling=Sampling(seed=n)) for n in range(others)]
        return written(llama, [*beside, Request(PROMPTS[0], 12, sampling=warm, stream=stream)], rows)[-1]

    alone = drawn(3, 0, 0, 1)
    assert [drawn(3, 0, others, rows) for others, rows in ((3, 2), (5, 16))] == [alone, alone]
    assert drawn(4, 0, 0, 1) != alone
    assert drawn(3, 1, 0, 1) != alone
    cold = Request(PROMPTS[0], 6, sampling=Sampling(temperature=0))
    assert written(llama, [cold]) == [by_generate(llama, PROMPTS[0], None, 6)]


def test_a_cancelled_request_leaves_and_the_others_go_on(llama: PreTrainedModel) -> None:
    engine = Engine(llama, rows=2)
    tickets = [engine.submit(Request(prompt, 8, name)) for prompt, name in zip(PROMPTS, ("lora", None, "ia3"))]  # noqa: B905
    engine.step()
    engine.cancel(tickets[0])
    engine.cancel(tickets[0])
    engine.step()
    engine.cancel(tickets[2])
    assert (engine.running, engine.waiting) == (1, 0)
    finish(engine, tickets)
    assert tickets[1].ids == by_generate(llama, PROMPTS[1], None, 8)
    assert [ticket.finished for ticket in tickets] == ["cancelled", "length", "cancelled"]


def test_requests_that_cannot_be_written_are_refused_at_once(llama: PreTrainedModel) -> None:
    engine = Engine(llama)
    for request, message in (
        (Request([1], 4, "nobody"), "no delta 'nobody' is attached; attached are: lora, ia3, prefix, prompt"),
        (Request([], 4), "the prompt is empty"),
        (Request([1, 97], 4), "the token id 97, and the base's embedding has 97 rows"),
        (Request([1, -1], 4), "the token id -1"),
        (Request([1] * 60, 4, "prefix"), "has 60 tokens; this base takes 60"),
        (Request([1], 0), "max_new_tokens = 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.submit(request)
    assert engine.idle
    with pytest.raises(ConfigError, match="rows = 0"):
        Engine(llama, rows=0)


def test_a_fault_is_its_requests_own() -> None:
    torch.manual_seed(0)
    model = sharp(gpt2())
    with_deltas(model, {"a": LoRA(r=2), "b": LoRA(r=4), "lost": IA3()})
    broken = attach(model, LoRA(r=2), "broken")
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(torch.nan)
    engine = Engine(model, rows=2)
    requests = [Request(PROMPTS[n % 6], 6, name) for n, name in enumerate(["broken", "a", "lost", "b", None])]
    expected = [by_generate(model, list(r.ids), r.delta, 6) for r in requests]
    tickets = [engine.submit(request) for request in requests]
    detach(model, "lost")
    errors: dict[Ticket, BaseException] = {}
    while not engine.idle:
        errors |= {one.ticket: one.error for one in engine.step() if one.error is not None}
    assert list(errors) == [tickets[2]]
    assert isinstance(errors[tickets[2]], ConfigError)
    # rows that come into a slot where there was no number find none of it
    assert [tickets[n].ids for n in (1, 3, 4)] == [expected[n] for n in (1, 3, 4)]


def test_a_step_that_fails_is_found_out_by_running_its_rows_again(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(prompt, 8) for prompt in PROMPTS[:3]]
    engine = Engine(llama)
    tickets = [engine.submit(request) for request in requests]
    engine.step()
    advance, calls = CachedLane.advance, [0]

    def failing(self: CachedLane) -> object:
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError("once")
        return advance(self)

    monkeypatch.setattr(CachedLane, "advance", failing)
    assert finish(engine, tickets) == [by_generate(llama, list(r.ids), None, 8) for r in requests]


def test_where_memory_runs_out_half_of_the_rows_wait(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    enter, advance = CachedLane.enter, CachedLane.advance

    def short_of_memory(self: CachedLane) -> object:
        if len(self.tickets) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return advance(self)

    def short_to_enter(self: CachedLane, tickets: Sequence[Ticket]) -> object:
        if len(tickets) > 3:
            raise MemoryError
        return enter(self, tickets)

    monkeypatch.setattr(CachedLane, "advance", short_of_memory)
    monkeypatch.setattr(CachedLane, "enter", short_to_enter)
    requests = [Request(prompt, 8, sampling=Sampling(seed=n)) for n, prompt in enumerate(PROMPTS)]
    with caplog.at_level(logging.WARNING, logger="spectune"):
        found = written(llama, requests)
    assert "out of memory while writing 6 rows; again with 3" in caplog.text
    monkeypatch.undo()
    assert found == written(llama, requests)

    def never(self: CachedLane, tickets: Sequence[Ticket]) -> object:
        raise MemoryError

    monkeypatch.setattr(CachedLane, "enter", never)
    with pytest.raises(OutOfMemoryError, match="out of memory while writing one row of 3 tokens"):
        written(llama, requests[:1])


def test_a_base_that_the_cache_does_not_go_with_is_written_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, eos_token_id=None, pad_token_id=0)
    model = sharp(BloomForCausalLM(config))
    with_deltas(model, {"lora": LoRA(r=2)})
    assert why_not_engine(model) == "it does not take position_ids"
    requests = [Request(prompt, 5, name) for prompt in PROMPTS[:3] for name in (None, "lora")]
    expected = [by_generate(model, list(r.ids), r.delta, 5) for r in requests]
    with caplog.at_level(logging.INFO, logger="spectune"):
        assert written(model, requests, 4) == expected
    assert "each token takes a pass over its whole row: it does not take position_ids" in caplog.text
    with route(model, [r.delta for r in requests]):
        assert generate_ids(model, [r.ids for r in requests], max_new_tokens=5, batch_size=4) == expected


def test_a_base_that_answers_otherwise_is_found_out_once_while_deltas_are_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = sharp(gpt2())
    with_deltas(model, {"lora": LoRA(r=2)})
    passes = []
    model.get_submodule("transformer").register_forward_hook(lambda *_: passes.append(1))
    assert why_not_engine(model) is None
    ran = len(passes)
    assert why_not_engine(model, ["lora"]) is None
    assert len(passes) == ran > 0
    other = sharp(gpt2())
    attention = other.get_submodule("transformer.h.0.attn")
    calls = [0]

    def by_calls(module: object, args: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        calls[0] += 1  # as code with a state of its own
        return output[0] * calls[0], *output[1:]

    attention.register_forward_hook(by_calls)
    assert "logits differ by" in str(why_not_engine(other))


def test_a_fully_tuned_base_and_the_one_before_it(llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    model = sharp(gpt2())
    before = written(model, [Request(PROMPTS[0], 6)])
    attach(model, FullFineTuning(), "full", keep_base=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    tuned = [by_generate(model, PROMPTS[0], "full", 6)]
    assert written(model, [Request(PROMPTS[0], 6, name) for name in ("full", None, "full")]) == [
        *tuned,
        *before,
        *tuned,
    ]
