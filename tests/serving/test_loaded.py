"""A server that is to make its steps before the first request is ready whatever becomes of that."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from spectune import inference
from spectune.cli.base_and_deltas import one_of_each_method
from spectune.deltas import attach, detach
from spectune.errors import OutOfMemoryError
from spectune.inference import Engine, Request
from spectune.methods import IA3, LoRA, PromptTuning
from spectune.serving.catalogue import Catalogue
from spectune.serving.loaded import Loaded
from spectune.storage import Bank
from tests.support import make_model, make_tokenizer


@pytest.fixture
def deltas(tmp_path: Path) -> Path:
    model = make_model()
    methods = {"a": LoRA(r=2), "b": LoRA(r=4), "c": IA3(), "d": PromptTuning(num_virtual_tokens=2)}
    for name, method in methods.items():
        attach(model, method, name).save(tmp_path / name)
        detach(model, name)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "adapter_config.json").write_text("{")
    return tmp_path


def writes(engine: Engine) -> bool:
    ticket = engine.submit(Request([5, 6, 7], 3))
    while not engine.idle:
        engine.step()
    return len(ticket.ids) == 3


def test_one_delta_stands_for_all_of_its_method(deltas: Path) -> None:
    found = [Path(name).name for name in one_of_each_method(Catalogue("base", deltas))]
    assert found[0] == "b"  # the larger one, of the method that most have
    assert sorted(found) == ["b", "c", "d"]


def test_deltas_that_cannot_be_had_are_left_out(deltas: Path, caplog: pytest.LogCaptureFixture) -> None:
    (deltas / "c" / "adapter_model.safetensors").write_bytes(b"damaged")
    model, wanted = make_model(), [str(deltas / name) for name in "bcd"]
    loaded = Loaded.of(model, make_tokenizer(), Bank(model), 2, wanted)
    with caplog.at_level(logging.WARNING, logger="spectune"):
        assert writes(loaded.engine())
    assert f"no decoding steps are made for {deltas / 'c'}" in caplog.text


def test_where_memory_does_not_suffice_steps_are_made_as_requests_come(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def short(*_: Any) -> None:
        raise OutOfMemoryError("out of memory while writing one row")

    monkeypatch.setattr(inference, "warm_up", short)
    loaded = Loaded.of(make_model(), make_tokenizer(), None, 2, [])
    with caplog.at_level(logging.WARNING, logger="spectune"):
        assert writes(loaded.engine())
    assert "decoding steps are made as requests come: out of memory" in caplog.text
