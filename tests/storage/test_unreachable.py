"""A base that is nowhere is an error at once, not after the hub's retries."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from huggingface_hub import constants

from spectune.errors import DataError
from spectune.storage import bases, descriptions, pretrained


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No network, and transformers must not be asked."""
    asked: list[Any] = []

    def fail(address: tuple[str, int], timeout: float) -> None:
        asked.append((address, timeout))
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained.urllib.request, "getproxies", dict)
    monkeypatch.setattr(pretrained.socket, "create_connection", fail)
    for cls in (descriptions.AutoConfig, descriptions.AutoTokenizer):
        monkeypatch.setattr(cls, "from_pretrained", lambda *_, **__: pytest.fail("transformers was asked"))
    return asked


def test_no_connection_is_said_at_once(no_hub: list[Any]) -> None:
    with pytest.raises(DataError, match=r"no connection to .*Name or service not known"):
        bases.load("nobody/nothing")
    assert len(no_hub) == 1
    assert no_hub[0][1] <= 5


def test_a_name_that_is_no_hub_id_is_not_asked_for(no_hub: list[Any]) -> None:
    with pytest.raises(DataError, match="nobody else"):
        bases.load_config("nobody else")
    assert no_hub == []


def test_a_proxy_or_the_offline_switch_leave_it_to_transformers(
    no_hub: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise OSError("asked")

    monkeypatch.setattr(descriptions.AutoConfig, "from_pretrained", read)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="asked"):
        bases.load("nobody/nothing")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    with pytest.raises(DataError, match="asked"):
        bases.load("nobody/nothing")
    assert no_hub == []
