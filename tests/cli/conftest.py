"""A tiny base and a few rows on disk, and the command run as a user runs it, but in this process."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from spectune.cli.app import build_app

EOS = "<|endoftext|>"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 of two layers and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate([EOS, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2, n_positions=160, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of prompt and completion."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"number {i}", "completion": f" is {'even' if i % 2 == 0 else 'odd'}"} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


Spectune = Callable[..., Any]


@pytest.fixture
def asked_of_the_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of other machines that were asked for, and not given."""
    asked: list[str] = []
    local = ("", "None", "localhost", "::1", "0.0.0.0", socket.gethostname())

    def guarded(call: Callable[..., Any], place: int) -> Callable[..., Any]:
        def guarded_call(*given: Any, **options: Any) -> Any:
            address = given[place]
            host = str(address[0] if isinstance(address, tuple) else address)
            if (place == 0 or isinstance(address, tuple)) and host not in local and not host.startswith("127."):
                asked.append(str(address))
                raise OSError(f"{address}: tests have no network")
            return call(*given, **options)

        return guarded_call

    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect, 1))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex, 1))
    monkeypatch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, 0))
    return asked


@pytest.fixture
def spectune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_of_the_network: list[str]) -> Iterator[Spectune]:
    """`spectune("train", "--json")` in an empty folder; the result has exit_code, stdout and stderr. No command asks
    another machine for anything, be it in vain."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: str | Path) -> Any:
        result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception  # a traceback is never an answer to a user
        return result

    yield call
    assert not asked_of_the_network


Trained = Callable[[str], Path]


@pytest.fixture(scope="session")
def trained_once(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run of two steps of a method, at a rate at which they matter; made when first asked for."""
    folder = tmp_path_factory.mktemp("trained")

    def run(method: str) -> Path:
        if not (folder / method).exists():
            arguments = ["train", "--method", method, "--model", base, "--data", rows, "--output-dir", folder / method]
            settings = ["--set", "max_steps=2", "--set", "learning_rate=0.01", "--device", "cpu"]
            settings += ["--set", "lora_dropout=0.1"] if method == "lora" else []
            result = CliRunner().invoke(build_app(), [str(argument) for argument in (*arguments, *settings)])
            assert result.exit_code == 0, result.stderr
        return folder / method

    return run


@pytest.fixture
def trained(trained_once: Trained, spectune: Spectune) -> Trained:
    """`trained("lora")`: a copy of such a run under runs/, the newest one there."""

    def copy(method: str) -> Path:
        return Path(shutil.copytree(trained_once(method), Path("runs") / method, symlinks=True))

    return copy
