"""A bank: deltas by name, on the device and off it, each tenant by itself."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import spectune
from spectune.deltas import Attachment, Method, SlotTables, attach, attached, detach
from spectune.errors import BankFullError, ConfigError, DataError, DoesNotFitError
from spectune.methods import BitFit, BottleneckAdapter, DoRA, FullFineTuning, LNTuning, LoRA, PrefixTuning, PromptTuning
from spectune.storage.delta_folder import StoredDelta
from tests.contract.conftest import move
from tests.contract.families import gpt2

METHODS: dict[str, Method] = {
    "lora": LoRA(r=2), "pissa": LoRA(r=2, init_lora_weights="pissa"), "dora": DoRA(r=2), "bitfit": BitFit(),
    "adapter": BottleneckAdapter(bottleneck_dim=4, dropout=0.0), "prefix": PrefixTuning(num_virtual_tokens=3),
    "prompt": PromptTuning(num_virtual_tokens=4), "ln": LNTuning(),
}  # fmt: skip
IDS = torch.randint(1, 90, (1, 6), generator=torch.Generator().manual_seed(5))


def base() -> PreTrainedModel:
    torch.manual_seed(0)
    return gpt2().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, root = base(), tmp_path_factory.mktemp("deltas")
    for number, (name, method) in enumerate(METHODS.items()):
        delta = attach(model, method, name, seed=number)
        move(delta, 0.1)
        delta.save(root / name)
        detach(model, name)
    (root / "no delta").mkdir()
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str | None, Tensor]:
    return answers_alone(folder)


def answers_alone(folder: Path) -> dict[str | None, Tensor]:
    """What each delta answers where it is loaded alone, by `load_delta`."""
    found: dict[str | None, Tensor] = {None: answer(base())}
    for name in METHODS:
        model = base()
        spectune.load_delta(model, folder / name)
        found[name] = answer(model)
    return found


@pytest.fixture(scope="module")
def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each delta's weights on the model."""
    found = {}
    with spectune.Bank(base(), folder) as bank:
        for name in METHODS:
            before = bank.device_bytes
            with bank.hold([name]):
                found[name] = bank.device_bytes - before
    return found


@pytest.fixture
def bank(folder: Path) -> Iterator[spectune.Bank]:
    with spectune.Bank(base(), folder) as made:
        yield made


def answer(model: PreTrainedModel, rows: int = 1) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS.repeat(rows, 1)).logits
    return logits


def test_deltas_are_loaded_by_name_when_they_are_wanted(bank: spectune.Bank, expected: dict[str, Tensor]) -> None:
    assert bank.names() == sorted(METHODS)
    assert "lora" in bank
    assert "nobody" not in bank
    assert "../lora" not in bank
    assert bank.on_device() == []
    for name, logits in expected.items():
        with bank.route(name):
            assert torch.equal(answer(bank.model), logits)
        with bank.route(None):
            assert torch.equal(answer(bank.model), expected[None])  # type: ignore[index]
    assert bank.on_device() == list(METHODS)
    rows = [*METHODS, None]
    with bank.route(rows):
        found = answer(bank.model, len(rows))
    for row, name in enumerate(rows):
        assert torch.allclose(found[row], expected[name][0], atol=1e-5), name  # type: ignore[index]
    assert bank.loads == len(METHODS)


def test_what_was_not_wanted_for_longest_leaves_the_device_and_comes_back_to_the_bit(
    folder: Path, expected: dict[str, Tensor], sizes: dict[str, int]
) -> None:
    whole = sum(sizes.values())
    with spectune.Bank(base(), folder, device_memory=whole // 2) as bank:
        for _ in range(2):
            for name in METHODS:
                with bank.route(name):
                    assert torch.equal(answer(bank.model), expected[name])
                assert bank.device_bytes <= whole // 2
                assert bank.on_device()[-1] == name
        assert bank.loads == len(METHODS)  # the second time out of host memory
        assert bank.host_bytes + bank.device_bytes == whole
        assert sorted(bank.on_device() + bank.in_host_memory()) == sorted(METHODS)


def test_host_memory_has_a_limit_too(folder: Path, expected: dict[str, Tensor], sizes: dict[str, int]) -> None:
    with spectune.Bank(base(), folder, device_memory=sizes["lora"], host_memory=sizes["dora"]) as bank:
        for name in ("bitfit", "lora", "bitfit", "lora", "bitfit"):
            with bank.route(name):
                assert torch.equal(answer(bank.model), expected[name])
        assert bank.loads == 2
        assert bank.in_host_memory() == ["lora"]
        bank.prepare("dora")
        assert bank.in_host_memory() == ["dora"]
        with bank.route("lora"):
            assert torch.equal(answer(bank.model), expected["lora"])
        assert bank.loads == 4


def test_a_delta_in_use_stays_and_one_that_cannot_fit_says_so_by_name(folder: Path, sizes: dict[str, int]) -> None:
    with spectune.Bank(base(), folder, device_memory=sizes["lora"]) as bank:
        with bank.hold(["bitfit", None, "bitfit"]) as keys:
            assert keys == ("bitfit", None, "bitfit")
            with pytest.raises(DoesNotFitError, match=r"delta dora \(0\.0 MiB\) cannot fit: device_memory"):
                bank.route("dora").__enter__()
            with pytest.raises(BankFullError, match=r"delta lora .* cannot fit now"), bank.route("lora"):
                pass
            with pytest.raises(ConfigError, match="in use"):
                bank.forget("bitfit")
            with pytest.raises(ConfigError, match="in use"):
                bank.close()
            assert bank.on_device() == ["bitfit"]
        with bank.route("lora"):
            assert bank.on_device() == ["lora"]


def test_a_damaged_folder_is_its_own_name_s_error_and_nobody_else_s(
    folder: Path, tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    for name in ("lora", "bitfit", "dora"):
        shutil.copytree(folder / name, tmp_path / name)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"abcd")
    (tmp_path / "dora" / "spectune.json").write_text("{")
    with spectune.Bank(base(), tmp_path) as bank:
        for _ in range(2):
            for name in ("lora", "dora"):
                with pytest.raises(DataError, match=str(tmp_path / name)):
                    bank.prepare(name)
            with pytest.raises(DataError, match="lora"), bank.route(["bitfit", "lora"]):
                pass
            with bank.route("bitfit"):
                assert torch.equal(answer(bank.model), expected["bitfit"])
        assert bank.on_device() == ["bitfit"]
        weights.write_bytes(whole)
        with bank.route("lora"):
            assert torch.equal(answer(bank.model), expected["lora"])


def test_a_folder_that_the_base_did_not_take_is_read_again(
    bank: spectune.Bank, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(stored: StoredDelta) -> None:
        raise ConfigError(f"{stored.folder} is refused")

    with monkeypatch.context() as patch:
        patch.setattr(StoredDelta, "attach", refused)
        with pytest.raises(ConfigError, match="lora is refused"), bank.hold(["lora"]):
            pass
    loads = bank.loads
    with bank.route("lora"):
        assert torch.equal(answer(bank.model), expected["lora"])
    assert bank.loads == loads + 1


def test_names_are_folders_paths_or_said_not_to_be_there(folder: Path, expected: dict[str, Tensor]) -> None:
    with spectune.Bank(base(), folder) as bank:
        for name in ("loro", "../lora", "", "a\0b", "nobody/nothing at all", "x" * 5000):
            with pytest.raises(DataError if name else ConfigError, match=r"no delta|a delta's name is"):
                bank.prepare(name)
        with pytest.raises(DataError, match=r"did you mean 'lora'"):
            bank.prepare("loro")
        with pytest.raises(DataError, match="no delta"):
            bank.prepare("no delta")
        path = str(folder / "lora")
        with bank.hold([path, "lora"]) as (key, name):
            assert name == "lora"
            assert key != name
            assert key in attached(bank.model)
        with bank.route(path):
            assert torch.equal(answer(bank.model), expected["lora"])
        assert path in bank
        assert path in bank.names()
    with spectune.Bank(base()) as alone, alone.route(str(folder / "lora")):
        assert torch.equal(answer(alone.model), expected["lora"])
    with pytest.raises(ConfigError, match="is not a folder"):
        spectune.Bank(base(), folder / "nowhere")


def test_a_hub_id_is_fetched_without_pickles(
    folder: Path, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "somebody/gone":
            raise OSError("404")
        return str(folder / "lora")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with spectune.Bank(base()) as bank:
        with bank.route("somebody/lora"):
            assert torch.equal(answer(bank.model), expected["lora"])
        with pytest.raises(DataError, match=r"not to be had from the hub \(404\)"):
            bank.prepare("somebody/gone")
    assert asked == [(name, ["*.json", "*.safetensors"]) for name in ("somebody/lora", "somebody/gone")]


def test_full_models_and_heads_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    model = base()
    attach(model, FullFineTuning(), "full").save(tmp_path / "full")
    with pytest.raises(ConfigError, match="fully tuned as 'full'"):
        spectune.Bank(model, tmp_path)
    with spectune.Bank(base(), tmp_path) as bank, pytest.raises(DataError, match=r"full is a fully tuned model"):
        bank.prepare("full")
    config = base().config
    config.num_labels, config.pad_token_id = 3, 0
    headed = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ConfigError, match=r"has a head of its own \(score\)"):
        spectune.Bank(headed, folder)
    assert Attachment.of(headed) is None


def test_another_base_s_delta_is_refused_by_name(folder: Path) -> None:
    torch.manual_seed(1)
    with spectune.Bank(gpt2().eval(), folder) as bank, pytest.raises(DataError, match=r"lora was trained on another"):
        bank.prepare("lora")


def test_a_closed_bank_leaves_the_model_as_it_was(folder: Path) -> None:
    model = base()
    before, state = answer(model), {name: p.requires_grad for name, p in model.named_parameters()}
    own = attach(model, LoRA(r=2), "own")
    bank = spectune.Bank(model, folder)
    with bank.route(["prefix", "lora"]):
        answer(model, 2)
    bank.close()
    bank.close()
    assert attached(model) == {"own": own}
    detach(model, "own")
    assert Attachment.of(model) is None
    assert torch.equal(answer(model), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == state
    with pytest.raises(ConfigError, match="closed"):
        bank.prepare("lora")


def test_a_copy_of_a_model_is_held_by_no_bank(folder: Path) -> None:
    model = base()
    with spectune.Bank(model, folder) as bank, bank.hold(["lora"]):
        copied = copy.deepcopy(model)
    detach(copied, "lora")
    assert Attachment.of(copied) is None
    assert all(parameter.requires_grad for parameter in copied.parameters())


def test_what_somebody_else_does_with_the_model_is_seen(folder: Path, expected: dict[str, Tensor]) -> None:
    model = base()
    with spectune.Bank(model, folder) as bank:
        with bank.route("lora"):
            pass
        assert answer(model).equal(expected[None])  # type: ignore[index]  # none of the bank's is made the active one
        detach(model, "lora")
        with bank.route("lora"):
            assert torch.equal(answer(model), expected["lora"])
        attach(model, LoRA(r=2), "bitfit")
        with pytest.raises(ConfigError, match="'bitfit' is attached already"), bank.route("bitfit"):
            pass
        detach(model, "bitfit")
        with bank.route("bitfit"):
            assert torch.equal(answer(model), expected["bitfit"])


def test_a_forgotten_delta_is_read_again(folder: Path, tmp_path: Path, expected: dict[str, Tensor]) -> None:
    shutil.copytree(folder / "lora", tmp_path / "legal")
    with spectune.Bank(base(), tmp_path) as bank:
        with bank.route("legal"):
            assert torch.equal(answer(bank.model), expected["lora"])
        shutil.rmtree(tmp_path / "legal")
        shutil.copytree(folder / "bitfit", tmp_path / "legal")
        with bank.route("legal"):
            assert torch.equal(answer(bank.model), expected["lora"])
        bank.forget("legal")
        bank.forget("nobody")
        with bank.route("legal"):
            assert torch.equal(answer(bank.model), expected["bitfit"])


def test_threads_share_a_bank_that_holds_few_of_their_deltas(folder: Path, sizes: dict[str, int]) -> None:
    threads, together = torch.get_num_threads(), 4
    torch.set_num_threads(1)
    expected = answers_alone(folder)  # bit for bit, so by as many threads
    bank = spectune.Bank(base(), folder, device_memory=sum(sizes.values()) // 2)
    start = threading.Barrier(together)

    def work(number: int) -> list[str]:
        torch.set_num_threads(1)  # each thread has a number of its own
        wrong, names = [], [*METHODS]
        start.wait()
        for turn in range(12):
            name = names[(turn * (number + 1) + number) % len(names)]
            try:
                with bank.route(name):
                    logits = answer(bank.model)
            except BankFullError:
                continue
            if not torch.equal(logits, expected[name]):
                wrong.append(name)
        return wrong

    try:
        with ThreadPoolExecutor(together) as pool:
            assert list(pool.map(work, range(together))) == [[]] * together
    finally:
        torch.set_num_threads(threads)
        bank.close()


def test_a_delta_of_peft_s_is_taken_as_it_is(folder: Path, tmp_path: Path, expected: dict[str, Tensor]) -> None:
    shutil.copytree(folder / "lora", tmp_path / "theirs")
    (tmp_path / "theirs" / "spectune.json").unlink()
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    with spectune.Bank(base(), tmp_path) as bank, bank.route("theirs"):
        assert torch.equal(answer(bank.model), expected["lora"])


def test_tables_count_and_do_not_shut_deltas_out_for_good(
    folder: Path, expected: dict[str, Tensor], sizes: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    with spectune.Bank(base(), folder, device_memory=sizes["lora"]) as bank:
        with bank.hold(["lora"]):
            tables = SlotTables(bank.model, 1)
            tables.put("lora")
            assert bank.device_bytes == sizes["lora"] + tables.nbytes
            with pytest.raises(BankFullError), bank.route("bitfit"):
                pass
            tables.take("lora")
        with caplog.at_level("WARNING", logger="spectune"):
            for name in ("bitfit", "lora"):
                with bank.route(name):
                    assert torch.equal(answer(bank.model), expected[name])
                assert bank.on_device() == [name]
        assert caplog.text.count("tables for decoding take so much") == 1
        tables.close()
        assert bank.device_bytes == sizes["lora"]
