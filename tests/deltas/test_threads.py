"""A route belongs to the thread and the task that entered it: however many share a model, each answers as alone."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.deltas import Attachment, Method, attach, attached, detach, route
from spectune.errors import ConfigError
from spectune.methods import BitFit, BottleneckAdapter, LoRA, PrefixTuning, PromptTuning
from spectune.methods.ia3 import IA3
from tests.contract.conftest import move
from tests.contract.families import gpt2, llama

#: eight deltas of six methods
METHODS: tuple[Method, ...] = (
    LoRA(r=2), LoRA(r=4), BottleneckAdapter(bottleneck_dim=4), PrefixTuning(num_virtual_tokens=3),
    PrefixTuning(num_virtual_tokens=5), PromptTuning(num_virtual_tokens=4), BitFit(), IA3(),
)  # fmt: skip
NAMES = [f"{method.name}-{number}" for number, method in enumerate(METHODS)]


@pytest.fixture(autouse=True)
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[pytest.param(gpt2, marks=pytest.mark.slow), llama], ids=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    found: PreTrainedModel = request.param().eval()
    for number, (name, method) in enumerate(zip(NAMES, METHODS, strict=True)):
        move(attach(found, method, name, seed=number), 0.1)
    return found


def rows(number: int) -> Tensor:
    return torch.randint(1, 50, (2, 5 + number % 3), generator=torch.Generator().manual_seed(number))


def answer(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


def alone(model: Any, name: str | list[str | None] | None, ids: Tensor) -> Tensor:
    with route(model, name):
        return answer(model, ids)


def nothing_in_force(model: PreTrainedModel) -> bool:
    attachment = Attachment.of(model)
    assert attachment is not None
    return not any(attachment.state.in_use(name) for name in NAMES) and attachment.state.current.name == NAMES[-1]


def test_threads_answer_as_alone(model: PreTrainedModel) -> None:
    """8 threads x 100 forward passes over 8 deltas of six methods; a route of one row each among them."""
    expected = [alone(model, name, rows(number)) for number, name in enumerate(NAMES)]
    mixed = [[NAMES[number], None] for number in range(len(NAMES))]
    expected_mixed = [alone(model, names, rows(number)) for number, names in enumerate(mixed)]
    start = threading.Barrier(len(NAMES))

    def work(number: int) -> bool:
        start.wait()
        right = True
        for turn in range(50):
            with route(model, NAMES[number]):
                right &= torch.equal(answer(model, rows(number)), expected[number])
            if turn % 2:
                with route(model, mixed[number]):
                    right &= torch.equal(answer(model, rows(number)), expected_mixed[number])
            else:
                right &= torch.equal(alone(model, None, rows(number)), bare[number])
        return right

    bare = [alone(model, None, rows(number)) for number in range(len(NAMES))]
    with ThreadPoolExecutor(len(NAMES)) as pool:
        assert all(pool.map(work, range(len(NAMES))))
    assert nothing_in_force(model)


def test_coroutines_answer_as_alone(model: PreTrainedModel) -> None:
    expected = [alone(model, name, rows(number)) for number, name in enumerate(NAMES)]

    async def work(number: int) -> bool:
        right = True
        for _ in range(15):
            with route(model, NAMES[number]):
                await asyncio.sleep(0)
                right &= torch.equal(answer(model, rows(number)), expected[number])
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            right &= torch.equal(answer(model, rows(number)), active[number])  # outside: the active delta
        return right

    async def everyone() -> list[bool]:
        return list(await asyncio.gather(*(work(number) for number in range(len(NAMES)))))

    active = [answer(model, rows(number)) for number in range(len(NAMES))]
    assert all(asyncio.run(everyone()))
    assert nothing_in_force(model)


def test_generation_with_beams_in_threads(model: PreTrainedModel) -> None:
    """Beams and return sequences carry their row's delta along, whatever another thread generates."""
    calls: list[tuple[list[str | None], dict[str, Any]]] = [
        ([NAMES[0], None], {"num_beams": 3}),
        ([NAMES[2], NAMES[0]], {"num_beams": 2, "num_return_sequences": 2}),
        ([NAMES[7], NAMES[6]], {}),
    ]

    def generate(names: list[str | None], settings: dict[str, Any]) -> Tensor:
        ids = rows(0)
        with route(model, names):
            made: Tensor = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0, **settings
            )
        return made

    expected = [generate(*call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        for _ in range(4):
            for made, right in zip(pool.map(lambda call: generate(*call), calls), expected, strict=True):
                assert torch.equal(made, right)
    assert nothing_in_force(model)


def test_two_models_in_two_threads_do_not_see_each_other() -> None:
    """A prefix hides SDPA's causal shortcut, packs change masks: of one model, never of the other."""
    models = []
    for make, method in ((gpt2, PrefixTuning(num_virtual_tokens=3)), (llama, PrefixTuning(num_virtual_tokens=4))):
        torch.manual_seed(0)
        made = make().eval()
        move(attach(made, method, "a"), 0.1)
        attach(made, LoRA(r=2), "b")
        models.append(made)
    routes: list[list[str | None]] = [["a", None], ["b", "a"]]
    expected = [alone(made, names, rows(1)) for made, names in zip(models, routes, strict=True)]

    def work(number: int) -> bool:
        return all(torch.equal(alone(models[number], routes[number], rows(1)), expected[number]) for _ in range(60))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


@pytest.mark.slow
def test_compiled_models_follow_the_route_of_their_thread_and_task() -> None:
    torch.compiler.reset()  # what other tests compiled of the same code counts against the limit
    torch.manual_seed(0)
    model = llama(1).eval()
    names = ["one", "two", "three"]
    for name, method in zip(names, (LoRA(r=2), BitFit(), PrefixTuning(num_virtual_tokens=3)), strict=True):
        move(attach(model, method, name), 0.1)
    expected = {name: alone(model, name, rows(0)) for name in names}
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def right(name: str) -> bool:
        return torch.allclose(answer(compiled, rows(0)), expected[name], atol=1e-5)

    for name in names:
        with route(model, name):
            assert right(name)

    def work(name: str) -> bool:
        with route(model, name):
            return all(right(name) for _ in range(10))

    with ThreadPoolExecutor(len(names)) as pool:
        assert all(pool.map(work, names))

    async def task(name: str) -> bool:
        good = True
        with route(model, name):
            for _ in range(10):
                await asyncio.sleep(0)
                good &= right(name)
        return good

    async def everyone() -> list[bool]:
        return list(await asyncio.gather(*map(task, names)))

    assert all(asyncio.run(everyone()))


def test_a_delta_that_another_thread_uses_is_not_detached() -> None:
    model = gpt2()
    attach(model, LoRA(r=2), "a")
    entered, over = threading.Event(), threading.Event()

    def hold() -> None:
        with route(model, "a"):
            entered.set()
            over.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(20)
    with pytest.raises(ConfigError, match="in use"):
        detach(model, "a")
    over.set()
    thread.join()
    detach(model, "a")
    assert not attached(model)


def test_parameters_changed_in_place_are_one_thread_s_at_a_time() -> None:
    """Convolutions' biases are exchanged while their layer runs: another thread's pass waits for that layer."""
    from tests.deltas.test_parameters import mamba

    model = mamba()
    for name in ("a", "b"):
        move(attach(model, BitFit(), name), 0.3 if name == "a" else -0.3)
    expected: dict[str | None, Tensor] = {name: alone(model, name, rows(0)) for name in ("a", "b", None)}

    def work(name: str | None) -> bool:
        return all(torch.equal(alone(model, name, rows(0)), expected[name]) for _ in range(40))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, expected))


# -- routes that are left in other ways than they were entered --------------------------------------------------------


def stream(model: Any, name: str, number: int) -> Iterator[Tensor]:
    with route(model, name):
        while True:
            yield answer(model, rows(number))


def test_generators_that_take_turns_answer_as_alone(model: PreTrainedModel) -> None:
    expected = [alone(model, name, rows(number)) for number, name in enumerate(NAMES)]
    active = answer(model, rows(0))
    streams = [stream(model, name, number) for number, name in enumerate(NAMES)]
    for _ in range(3):
        for number, one in enumerate(streams):
            assert torch.equal(next(one), expected[number])
    for number in (0, 3, 1, 7, 2, 6, 4, 5):  # in no order
        streams[number].close()
    assert torch.equal(answer(model, rows(0)), active)
    assert nothing_in_force(model)


def test_a_context_manager_of_ones_own_around_a_route_is_like_it(model: PreTrainedModel) -> None:
    @contextlib.contextmanager
    def mine(name: str) -> Iterator[None]:
        with route(model, name):
            yield

    def streamed() -> Iterator[Tensor]:
        with route(model, NAMES[0]):
            yield answer(model, rows(0))
            with mine(NAMES[1]):
                yield answer(model, rows(0))
                with route(model, NAMES[2]):
                    yield answer(model, rows(0))
            yield answer(model, rows(0))

    wanted = [alone(model, NAMES[number], rows(0)) for number in (0, 1, 2, 0)]
    assert all(torch.equal(got, right) for got, right in zip(streamed(), wanted, strict=True))
    assert nothing_in_force(model)


@pytest.mark.parametrize("how", ["collected", "closed in another thread", "closed in another order"])
def test_a_generator_that_is_left_half_way_leaves_no_route(model: PreTrainedModel, how: str) -> None:
    active = answer(model, rows(0))
    one, other = stream(model, NAMES[0], 0), stream(model, NAMES[1], 0)
    next(one)
    if how == "collected":
        del one
        gc.collect()
    elif how == "closed in another thread":
        thread = threading.Thread(target=one.close)
        thread.start()
        thread.join()
    else:
        next(other)
        one.close()
        assert torch.equal(next(other), alone(model, NAMES[1], rows(0)))
        other.close()
    assert torch.equal(answer(model, rows(0)), active)
    assert nothing_in_force(model)


def test_tasks_that_are_cancelled_and_asynchronous_generators_that_are_left_leave_no_route(
    model: PreTrainedModel,
) -> None:
    active = answer(model, rows(0))

    async def left() -> None:
        async def streamed() -> AsyncIterator[Tensor]:
            with route(model, NAMES[0]):
                while True:
                    yield answer(model, rows(0))

        async def waits() -> None:
            with route(model, NAMES[1]):
                await asyncio.sleep(60)

        task = asyncio.create_task(waits())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        half = streamed()
        await anext(half)
        del half
        gc.collect()
        for _ in range(3):
            await asyncio.sleep(0)
        assert torch.equal(answer(model, rows(0)), active)

    asyncio.run(left())
    assert nothing_in_force(model)


def test_exceptions_and_nested_routes_restore_what_was_before(model: PreTrainedModel) -> None:
    wanted = {name: alone(model, name, rows(0)) for name in NAMES[:2]}

    def failing() -> None:
        with route(model, NAMES[1]):
            assert torch.equal(answer(model, rows(0)), wanted[NAMES[1]])
            raise ValueError("planted")

    with route(model, NAMES[0]):
        with pytest.raises(ValueError, match="planted"):
            failing()
        assert torch.equal(answer(model, rows(0)), wanted[NAMES[0]])
    assert nothing_in_force(model)


def test_a_route_that_was_taken_along_goes_on_after_its_with_and_says_when_its_delta_is_gone() -> None:
    model = llama().eval()
    move(attach(model, LoRA(r=2), "a"), 0.1)
    attach(model, LoRA(r=2), "b")
    expected = alone(model, "a", rows(0))
    with route(model, "a"):
        taken = contextvars.copy_context()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(taken.run, answer, model, rows(0)).result(), expected)
        detach(model, "a")
        with pytest.raises(ConfigError, match="names delta 'a', which was detached since"):
            pool.submit(taken.run, answer, model, rows(0)).result()


def test_a_mixed_route_that_was_taken_along_uses_the_deltas_that_have_its_names_now() -> None:
    model = llama().eval()
    for name in ("a", "b"):
        move(attach(model, LoRA(r=2), name), 0.1)
    with route(model, ["a", "b"]):
        before = answer(model, rows(0))
        taken = contextvars.copy_context()
    detach(model, "a")
    move(attach(model, LoRA(r=2), "a", seed=1), 0.3)
    with route(model, ["a", "b"]):
        expected = answer(model, rows(0))
    assert not torch.equal(expected, before)
    assert torch.equal(taken.run(answer, model, rows(0)), expected)


def test_a_route_may_begin_while_another_thread_attaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a bank does: the places of deltas become more while they are looked at."""
    model = llama().eval()
    attach(model, LoRA(r=2), "a")
    looked_at, look = Attachment.of(model).places._edges, torch.nn.Module.__getattribute__  # type: ignore[union-attr]

    def attaching(module: torch.nn.Module, name: str) -> Any:
        if name == "_modules":
            looked_at["another"] = model, "model", model.model
        return look(module, name)

    monkeypatch.setattr(torch.nn.Module, "__getattribute__", attaching)
    with route(model, "a"):
        pass


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_backward_in_other_threads_recomputes_each_loss_under_its_own_route(use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model: Any = llama()
        for name, method in (("a", LoRA(r=2)), ("b", PrefixTuning(num_virtual_tokens=3)), ("c", PromptTuning())):
            move(attach(model, method, name), 0.1)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        losses = []
        for name in "abc":
            with route(model, name):
                losses.append(model(input_ids=rows(0), labels=rows(0)).loss)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(torch.Tensor.backward, losses))
        found = [p.grad for name in "abc" for p in attached(model)[name].parameters()]
        assert all(gradient is not None for gradient in found)
        return [gradient for gradient in found if gradient is not None]

    for got, wanted in zip(gradients(True), gradients(False), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)
