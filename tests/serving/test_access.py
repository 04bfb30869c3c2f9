"""Who may ask for what, when; and what the server says of itself."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from spectune.errors import ConfigError, DataError
from spectune.serving.bounds import Bounds
from spectune.serving.catalogue import Catalogue
from spectune.serving.counters import Counters
from spectune.serving.loaded import Loaded
from spectune.serving.orders import Job, Order, Piece
from spectune.serving.server import is_local, listen
from spectune.serving.worker import Worker
from tests.serving.conftest import Material
from tests.serving.fuzzing import good
from tests.serving.server import Running, running, wait_for


@pytest.fixture(scope="module")
def locked(material: Material) -> Iterator[Running]:
    with running(material.load(), material.catalogue(), api_key="sk-secret") as server:
        server.wait_until_ready()
        yield server


def test_with_a_key_nobody_is_answered_without_it(locked: Running) -> None:
    for given in (None, "Bearer sk-secre", "Bearer sk-secret2", "Basic sk-secret", "sk-secret", "Bearer"):
        headers = {} if given is None else {"authorization": given}
        for path, body in (("/v1/models", None), ("/v1/completions", good("tiny", "a")), ("/v1/nothing", None)):
            status, said = locked.ask(path, body, headers)
            assert (status, said["error"]["code"]) == (401, "invalid_api_key")
    with locked.client(api_key="sk-secret") as client:
        assert client.completions.create(**good("tiny", "a")).choices
    with locked.client() as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert locked.ask("/health")[0] == 200
    assert locked.ask("/metrics")[0] == 200


def test_a_page_that_reaches_this_machine_by_a_name_of_its_own_is_refused(served: Running, locked: Running) -> None:
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
        assert served.ask("/v1/models", headers={"host": host})[0] == 403
    for host in ("localhost", "localhost:1", "127.0.0.1:9", "[::1]:8000", "LOCALHOST"):
        assert served.ask("/v1/models", headers={"host": host})[0] == 200
    # who has the key may have any name for this machine, as behind a proxy
    assert locked.ask("/v1/models", headers={"host": "api.example", "authorization": "Bearer sk-secret"})[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_on_a_web_page_cannot_ask(kind: str, served: Running) -> None:
    status, _ = served.ask("/v1/completions", '{"model": "tiny", "prompt": "a"}', {"content-type": kind})
    assert status == 415
    status, _ = served.ask("/v1/completions", headers={"origin": "https://evil.example"}, method="OPTIONS")
    assert status == 405


def test_no_name_of_a_client_s_is_made_into_a_path(served: Running, material: Material) -> None:
    for name in ("../deltas/lora", str(material.deltas / "lora"), "lora/", ".", "", "lora\0", "user/adapter"):
        status, said = served.ask("/v1/completions", good(name, "a"))
        assert (status, said["error"]["code"]) == (404, "model_not_found")


def test_a_folder_is_served_whatever_its_name_and_as_it_is_when_it_is_written_over(
    material: Material, tmp_path: Path
) -> None:
    name = "meine Läufe 1"
    shutil.copytree(material.deltas / "lora", tmp_path / name)
    with running(material.load(), Catalogue("tiny", tmp_path)) as server:
        server.wait_until_ready()

        def text(asked: str) -> Any:
            return server.ask("/v1/completions", good(asked, "the quick", max_tokens=12))

        with server.client() as client:
            assert client.models.retrieve(name).id == name
        before = text(name)
        shutil.copytree(material.deltas / "dora", tmp_path / "dora")
        for file in (material.deltas / "dora").iterdir():
            shutil.copy(file, tmp_path / name)
        assert text(name)[1]["choices"] == text("dora")[1]["choices"] != before[1]["choices"]
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"")
        assert text(name)[1]["error"]["code"] == "model_unusable"
        assert text("dora")[0] == 200
        shutil.rmtree(tmp_path / name)
        assert text(name)[0] == 404
        assert text("x" * 255)[0] == 404
        assert text("é" * 200)[0] == 404


def test_when_the_engine_gives_up_those_that_wait_are_told_too() -> None:
    class Broken:
        rows = 1

        def engine(self) -> Broken:
            return self

        def text(self, stops: Any) -> None: ...

        def begin(self, *given: Any) -> object:
            return object()

        def step(self) -> None:
            raise MemoryError("broken")

        def cancel(self, ticket: object) -> None: ...

    told: list[Piece] = []
    failed = threading.Event()
    worker = Worker(
        lambda: Broken(),  # type: ignore[arg-type, return-value]
        lambda delivery: told.extend(piece for _, piece in delivery), lambda loaded: None, lambda error: failed.set(),
    )  # fmt: skip
    worker.submit(Job((Order((1,), None, 1),) * 9, told.append))
    worker.start()
    assert failed.wait(30)
    assert sorted(piece.choice for piece in told) == list(range(9))


def test_counting_waits_for_no_gauge() -> None:
    counters, asked, may_go = Counters(), threading.Event(), threading.Event()

    def slow() -> float:
        asked.set()
        may_go.wait(30)
        return 1.0

    counters.describe(slow="A gauge that waits for a lock.")
    counters.gauge("slow", slow)
    with ThreadPoolExecutor(2) as pool:
        text = pool.submit(counters.text)
        assert asked.wait(30)
        pool.submit(counters.count, "requests_total").result(30)
        may_go.set()
        assert "spectune_slow 1" in text.result(30)


def test_while_the_model_loads_health_says_so_and_requests_wait(material: Material) -> None:
    may_load = threading.Event()

    def load() -> Loaded:
        may_load.wait(60)
        return material.load()()

    with running(load, material.catalogue()) as server:
        assert server.ask("/health") == (503, {"status": "loading"})
        assert server.ask("/v1/models")[0] == 200
        assert server.ask("/v1/completions", good("nobody", "a"))[0] == 404
        answers: list[int] = []
        waiting = threading.Thread(target=lambda: answers.append(server.ask("/v1/completions", good("lora", "a"))[0]))
        waiting.start()
        wait_for(lambda: server.metric("waiting_choices") == 1)
        assert not answers
        may_load.set()
        waiting.join(60)
        assert answers == [200]
        assert server.ask("/health") == (200, {"status": "ok"})


def test_a_server_that_is_stopped_while_it_loads_waits_for_nothing(material: Material) -> None:
    may_load = threading.Event()
    unfinished: list[int] = []

    def load() -> Loaded:
        may_load.wait(60)
        raise DataError("nobody asks for it any more")

    with running(load, material.catalogue(), unfinished=unfinished.append) as server:
        server.stop()
        server.thread.join(30)
        assert (server.ended, unfinished) == ([0], [0])
        may_load.set()


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error(material: Material) -> None:
    def load() -> Loaded:
        raise DataError("weights.safetensors is damaged")

    with running(load, material.catalogue()) as server:
        server.thread.join(60)
        [error] = server.ended
        assert isinstance(error, DataError)


def test_an_answer_that_takes_too_long_is_given_up(material: Material) -> None:
    with running(material.load(), material.catalogue(), bounds=Bounds(request_seconds=0.05)) as server:
        wait_for(lambda: "ok" in str(server.ask("/health")))
        status, said = server.ask("/v1/completions", good("tiny", "a", n=60, max_tokens=80))
        assert (status, said["error"]["code"]) == (504, "timeout")
        wait_for(lambda: server.metric("waiting_choices") == 0 == server.metric("running_rows"))


def test_an_engine_that_fails_is_an_error_of_its_requests_and_the_server_goes_on(material: Material) -> None:
    loaded: list[Loaded] = []

    def load() -> Loaded:
        loaded.append(material.load()())
        return loaded[0]

    with running(load, material.catalogue()) as server:
        server.wait_until_ready()
        hook = loaded[0].model.register_forward_pre_hook(lambda *_: 1 / 0)
        status, said = server.ask("/v1/completions", good("tiny", "a"))
        assert (status, said["error"]["code"]) == (500, "internal_error")
        hook.remove()
        assert server.ask("/v1/completions", good("tiny", "a"))[0] == 200


def test_when_it_stops_running_requests_end_and_new_ones_are_refused(material: Material) -> None:
    with running(material.load(), material.catalogue()) as server:
        server.wait_until_ready()
        with server.client() as client:
            stream = client.completions.create(**good("tiny", "a", max_tokens=90), stream=True)
            first = next(iter(stream))
            connection = server.connection()
            connection.request("GET", "/health")
            connection.getresponse().read()
            server.stop()
            texts = [first.choices[0].text, *(chunk.choices[0].text for chunk in stream)]
            connection.close()
        server.thread.join(60)
        assert server.ended == [0]
        assert len(texts) > 1


def test_metrics_are_what_prometheus_reads(served: Running) -> None:
    served.ask("/v1/completions", good("tiny", "the quick"))
    served.ask("/v1/completions", good("lora", "the quick"))
    served.ask("/" + "x" * 30)
    families = {family.name: family for family in text_string_to_metric_families(served.ask("/metrics")[1])}
    assert {"spectune_requests", "spectune_request_seconds", "spectune_tokens", "spectune_ready"} <= set(families)
    paths = {sample.labels["path"] for sample in families["spectune_requests"].samples}
    assert paths <= {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "other"}
    for gauge in ("deltas_on_device", "delta_device_bytes", "delta_loads"):
        assert families[f"spectune_{gauge}"].samples[0].value > 0
    samples = families["spectune_first_token_seconds"].samples
    counts = [sample.value for sample in samples if sample.name.endswith("_bucket")]
    assert counts == sorted(counts)
    assert counts[-1] > 0


def test_an_address_that_cannot_be_had_is_said(served: Running) -> None:
    with pytest.raises(ConfigError, match=f"--port {served.port}: Address already in use"):
        listen("127.0.0.1", served.port)
    with pytest.raises(ConfigError, match="--host nowhere"):
        listen("nowhere.invalid", 0)


def test_addresses_of_this_machine_alone_are_known() -> None:
    assert all(map(is_local, ("127.0.0.1", "::1", "localhost", "127.8.0.1")))
    assert not any(map(is_local, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


def test_a_delta_with_the_base_s_name_is_refused(material: Material) -> None:
    with pytest.raises(ConfigError, match="both called 'lora'"):
        Catalogue("lora", material.deltas)
