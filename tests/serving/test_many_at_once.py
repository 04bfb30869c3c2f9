"""Many requests for many deltas at once: each gets what it would alone."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest

from spectune.serving.catalogue import Catalogue
from tests.serving.conftest import METHODS, Material
from tests.serving.fuzzing import PROMPTS, good
from tests.serving.server import Running, running, wait_for


async def all_at_once(server: Running, asked: list[dict[str, Any]]) -> list[str]:
    """The texts, half of them from streams."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def one(number: int, request: dict[str, Any]) -> str:
            if number % 2:
                return str((await client.completions.create(**request)).choices[0].text)
            stream = await client.completions.create(**request, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(one(number, request) for number, request in enumerate(asked)))


def check(server: Running, names: list[str], requests: int) -> None:
    server.wait_until_ready()
    asked = [
        good(names[i % len(names)], PROMPTS[i % len(PROMPTS)] + " and" * (i % 3), max_tokens=8 + i % 5)
        for i in range(requests)
    ]
    together = asyncio.run(all_at_once(server, asked))
    alone = [server.ask("/v1/completions", request)[1]["choices"][0]["text"] for request in asked]
    assert together == alone
    assert len(set(together)) > len(names)


def test_requests_for_deltas_of_all_methods_are_answered_as_each_alone_is(served: Running) -> None:
    check(served, ["tiny", *METHODS], 20)


@pytest.mark.slow
def test_64_requests_over_16_deltas(material: Material, tmp_path: Path) -> None:
    names = [f"tenant-{i}" for i in range(16)]
    for name, method in zip(names, list(METHODS) * 2, strict=False):
        shutil.copytree(material.deltas / method, tmp_path / name)
    with running(material.load(rows=16), Catalogue("tiny", tmp_path)) as server:
        check(server, names, 64)


def test_more_deltas_than_the_device_has_room_for_take_turns(material: Material) -> None:
    """A request whose delta does not fit beside those in use waits until one of them has ended."""
    with running(material.load(rows=8, memory="20kB"), material.catalogue()) as server:
        check(server, ["lora", "bitfit", "ia3", "ln", "prompt"], 15)


def test_a_delta_that_can_never_fit_is_its_own_error(material: Material) -> None:
    with running(material.load(memory="3kB"), material.catalogue()) as server:
        server.wait_until_ready()
        status, said = server.ask("/v1/completions", good("lora-wide", "a"))
        assert (status, said["error"]["code"]) == (503, "out_of_memory")
        assert server.ask("/v1/completions", good("tiny", "a"))[0] == 200


def test_a_damaged_delta_is_its_own_error_until_it_is_mended_and_tells_nothing_of_the_machine(
    material: Material, tmp_path: Path
) -> None:
    for name in ("lora", "ia3"):
        shutil.copytree(material.deltas / name, tmp_path / name)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    with running(material.load(), Catalogue("tiny", tmp_path)) as server:
        server.wait_until_ready()
        status, said = server.ask("/v1/completions", good("lora", "a"))
        assert (status, said["error"]["code"]) == (500, "model_unusable")
        assert str(tmp_path) not in str(said)
        assert server.ask("/v1/completions", good("ia3", "a"))[0] == 200
        weights.write_bytes(whole)
        assert server.ask("/v1/completions", good("lora", "a"))[0] == 200


def test_a_delta_that_comes_while_the_server_runs_is_served(material: Material, tmp_path: Path) -> None:
    with running(material.load(), Catalogue("tiny", tmp_path)) as server:
        server.wait_until_ready()
        assert server.ask("/v1/completions", good("late", "a"))[0] == 404
        shutil.copytree(material.deltas / "lora", tmp_path / "late")
        assert server.ask("/v1/completions", good("late", "a"))[0] == 200
        wait_for(lambda: server.metric("running_rows") == 0)
        assert [model["id"] for model in server.ask("/v1/models")[1]["data"]] == ["tiny", "late"]
