"""A base may come from anybody, and be cut, forged or of two halves: what is wrong with it is one sentence that names
the file, before anything is allocated, run or trained."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectune.errors import DataError, OutOfMemoryError
from spectune.storage import bases, load, load_config, load_tokenizer
from tests.support import make_model, make_tokenizer

WEIGHTS = "model.safetensors"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a bias of its head, two layers, and tied embeddings."""
    path = tmp_path_factory.mktemp("whole")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "base"))


def config(**changes: Any) -> Damage:
    """Change config.json."""
    return described("config.json", **changes)


def described(name: str, **changes: Any) -> Damage:
    def damage(base: Path) -> None:
        path = base / name
        found = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(found | changes))

    return damage


def text(name: str, content: str | bytes) -> Damage:
    return lambda base: (base / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(base: Path) -> None:
        state = load_file(base / WEIGHTS)
        change(state)
        save_file(state, base / WEIGHTS, {"format": "pt"})

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change what the weights' file says of itself, and leave the bytes."""

    def damage(base: Path) -> None:
        content = (base / WEIGHTS).read_bytes()
        [length] = struct.unpack("<Q", content[:8])
        found = json.loads(content[8 : 8 + length])
        new = change(found)
        said = new if isinstance(new, bytes) else json.dumps(found).encode()
        (base / WEIGHTS).write_bytes(struct.pack("<Q", len(said)) + said + content[8 + length :])

    return damage


def cut(share: float) -> Damage:
    return lambda base: os.truncate(base / WEIGHTS, int((base / WEIGHTS).stat().st_size * share))


def sharded(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Two files and an index, which is changed."""

    def damage(base: Path) -> None:
        state = load_file(base / WEIGHTS)
        (base / WEIGHTS).unlink()
        names = sorted(state)
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            save_file({name: state[name] for name in part}, base / f"model-{number}.safetensors", {"format": "pt"})
        places = {name: f"model-{1 + index % 2}.safetensors" for index, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": places}
        new = change(index)
        (base / f"{WEIGHTS}.index.json").write_text(json.dumps(index if new is None else new))

    return damage


def one_more(name: str) -> Damage:
    return tensors(lambda state: state.update({name: torch.zeros(4)}))


def deep(name: str) -> Damage:
    return text(name, '{"a":' * 5000 + "1" + "}" * 5000)


def pickled(base: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(base / "ran"),)

    (base / WEIGHTS).unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": Runs()}))


def bomb(base: Path) -> None:
    (base / WEIGHTS).unlink()
    with zipfile.ZipFile(base / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))


EMBEDDING, LAYER = "transformer.wte.weight", "transformer.h.1.attn.c_attn"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a tensor is gone": (tensors(lambda s: s.pop(f"{LAYER}.weight")), rf"(?s){WEIGHTS}.*{LAYER}\.weight.*--allow-mis"),
    "a norm is gone": (tensors(lambda s: s.pop("transformer.ln_f.bias")), r"lacks.*transformer\.ln_f\.bias"),
    "a shape is another": (
        tensors(lambda s: s.update({f"{LAYER}.bias": torch.zeros(95)})), rf"{LAYER}\.bias.*\[95\].*\[96\]"),
    "a layer more": (one_more("transformer.h.2.ln_1.weight"), r"no place for: transformer\.h\.2\.ln_1\.weight"),
    "a bias more": (one_more("lm_head.bias"), r"no place for: lm_head\.bias"),
    "a tensor of the base more": (one_more("transformer.extra"), r"no place for: transformer\.extra"),
    "whole numbers": (
        tensors(lambda s: s.update({f"{LAYER}.bias": torch.zeros(96, dtype=torch.int32)})), rf"{LAYER}\.bias \(I32\)"),
    "not a number": (
        tensors(lambda s: s[f"{LAYER}.bias"].__setitem__(3, torch.nan)), rf"NaN or infinite weights.*{LAYER}\.bias"),
    "infinite": (tensors(lambda s: s[EMBEDDING].__setitem__(0, -torch.inf)), rf"NaN or infinite weights.*{EMBEDDING}"),
    "half a file": (cut(0.5), rf"{WEIGHTS} is no readable safetensors file"),
    "no byte": (cut(0), rf"{WEIGHTS} is no readable safetensors file: it has 0 bytes"),
    "a length that lies": (text(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"), rf"{WEIGHTS}.*says that its header has"),
    "a header that is no JSON": (text(WEIGHTS, struct.pack("<Q", 8) + b"{{{{{{{{"), rf"the header of .*{WEIGHTS}"),
    "offsets past the end": (header(lambda h: h[EMBEDDING].update(data_offsets=[0, 2**50])), rf"{EMBEDDING}'.*bytes"),
    "offsets that overlap": (
        header(lambda h: h["transformer.ln_f.bias"].update(data_offsets=[0, 128])), rf"{WEIGHTS}.*begins at byte"),
    "a dtype that nobody knows": (header(lambda h: h[EMBEDDING].update(dtype="F33")), r"'F33', a dtype that nobody"),
    "a shape that nobody has": (header(lambda h: h[EMBEDDING].update(shape=[2**62, -1])), "has no shape"),
    "a name twice": (
        header(lambda h: json.dumps(h).replace("ln_f.bias", "ln_f.weight").encode()), r"stands twice"),
    "an index of another form": (sharded(lambda i: {"weights": i["weight_map"]}), r"index\.json has no weight_map"),
    "an index that is a list": (sharded(lambda i: [1]), r"index\.json holds a list"),
    "a shard that is missing": (
        sharded(lambda i: i["weight_map"].update({EMBEDDING: "model-3.safetensors"})), r"model-3\.safetensors, which"),
    "a shard outside": (
        sharded(lambda i: i["weight_map"].update({EMBEDDING: "../model.safetensors"})), r"names '\.\./model"),
    "a shard for two": (
        lambda base: (sharded(lambda i: i["weight_map"].update({EMBEDDING: "x.safetensors"}))(base),
                      shutil.copy(base / "model-1.safetensors", base / "x.safetensors")),
        r"x\.safetensors holds .* and so does another"),
    "no weights": (lambda base: (base / WEIGHTS).unlink(), "there are no weights"),
    "a pickle that runs code": (pickled, r"pytorch_model\.bin"),
    "a pickle that grows": (bomb, r"pytorch_model\.bin has .* once it is unpacked"),
    "a checkpoint of several processes": (
        text("shard-00001-model-00001-of-00002.safetensors", b""), "a checkpoint of several processes"),
    "no config": (lambda base: (base / "config.json").unlink(), r"config\.json"),
    "half a config": (text("config.json", '{"model_type": "gp'), r"config\.json is not readable JSON"),
    "a deep config": (deep("config.json"), r"config\.json is not readable JSON.*deep"),
    "a config that is a list": (text("config.json", "[]"), r"config\.json holds a list"),
    "a config that is no text": (text("config.json", b"\xff\xfe{}"), r"config\.json.*UTF-8"),
    "a type that nobody knows": (config(model_type="nothing"), r"config\.json"),
    "layers without end": (config(n_layer=10**9), r"config\.json.*n_layer is 1000000000"),
    "more layers": (config(n_layer=3), r"(lacks|at most).*transformer\.h\.2"),
    "one layer less": (config(n_layer=1), r"no place for: transformer\.h\.1"),
    "heads below none": (config(n_head=-4), r"config\.json.*n(um_attention)?_heads? is -4"),
    "no positions": (config(n_positions=-1), r"config\.json.*n_positions is -1, expected 1 to"),
    "a switch that is text": (config(is_encoder_decoder="x"), r"config\.json.*is_encoder_decoder is 'x'"),
    "no hidden size": (config(n_embd=0), r"config\.json.*n_embd is 0"),
    "a hidden size that is text": (config(n_embd="x"), r"config\.json"),
    "a hidden size that does not divide": (config(n_embd=33), r"config\.json"),
    "another hidden size": (config(n_embd=64), r"config\.json describes a model of .* weights.*c_attn"),
    "gigabytes of weights": (config(n_inner=10**7), r"config\.json describes a model of [\d,]{11,} weights"),
    "gigabytes of positions": (config(n_positions=10**7), r"config\.json describes a model of"),
    "labels without end": (config(num_labels=10**9), r"config\.json.*num_labels is"),
    "another vocabulary": (config(vocab_size=299), r"another shape: .*wte"),
    "an unknown activation": (config(activation_function="nothing"), r"config\.json.*'nothing'"),
    "an EOS of another type": (config(eos_token_id="0"), r"config\.json.*eos_token_id is '0'|eos_token_id is 0"),
    "a kernel of the hub": (config(attn_implementation="somebody/kernel"), r"config\.json.*somebody/kernel.*code from"),
    "an unknown quantisation": (config(quantization_config={"quant_method": "nothing"}), r"base"),
    "a quantisation that is text": (config(quantization_config="int4"), r"config\.json.*quantization_config is a str"),
    "weights by another name": (config(transformers_weights="../a.safetensors"), r"config\.json names its weights"),
    "half a generation config": (text("generation_config.json", "{"), r"generation_config\.json is not readable JSON"),
    "an adapter beside it": (text("adapter_config.json", "{}"), r"adapter_config\.json stands in the folder of a base"),
    "half a tokenizer": (lambda base: os.truncate(base / "tokenizer.json", 2000), r"tokenizer\.json"),
    "a tokenizer without a model": (described("tokenizer.json", model=None), r"tokenizer"),
    "a tokenizer config of a list": (text("tokenizer_config.json", "[1]"), r"tokenizer_config\.json holds a list"),
    "a tokenizer of class 4": (described("tokenizer_config.json", tokenizer_class=4), r"tokenizer_config\.json"),
    "a length that is text": (described("tokenizer_config.json", model_max_length="x"), r"tokenizer_config\.json.*"),
    "a template that is a number": (described("tokenizer_config.json", chat_template=4), r"chat_template is a int"),
    "an EOS past the vocabulary": (
        lambda base: described("tokenizer_config.json", eos_token="<new>", added_tokens_decoder={
            "900": {"content": "<new>", "special": True}})(base), r"eos_token_id = \d+"),
    "a pipe": (lambda base: os.mkfifo(base / "tokenizer_config2.json"), r"tokenizer_config2\.json is a pipe"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_wrong_with_a_base_is_said_by_name(folder: Path, case: str) -> None:
    damage, words = DAMAGES[case]
    damage(folder)
    with pytest.raises(DataError, match=words) as caught:
        load(folder)
    assert not (folder / "ran").exists()
    assert "Traceback" not in str(caught.value)


def test_what_is_missing_begins_at_random_where_that_is_meant(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors(lambda state: (state.pop(f"{LAYER}.weight"), state.update({"lm_head.bias": torch.ones(300)})))(folder)
    with caplog.at_level(logging.WARNING, logger="spectune"):
        model, _ = load(folder, allow_missing_weights=True, seed=3)
    assert f"not in {WEIGHTS}, and so they begin at random (seed 3): {LAYER}.weight" in caplog.text
    assert "left out, though they are the decoder's: lm_head.bias" in caplog.text
    torch.rand(3)
    again, other = (load(folder, allow_missing_weights=True, seed=seed)[0].state_dict() for seed in (3, 4))
    found = model.state_dict()
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert [name for name in found if not torch.equal(found[name], other[name])] == [f"{LAYER}.weight"]


@pytest.mark.parametrize(
    "name",
    ["score.weight", "v_head.summary.weight", "visual.blocks.0.weight", "mtp.layers.0.w", "transformer.vision_tower.w",
     "transformer.h.0.attn.masked_bias", "h.0.attn.rotary_emb.inv_freq"],
)  # fmt: skip
def test_parts_beside_the_decoder_are_left_out_with_a_line(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    one_more(name)(folder)
    with caplog.at_level(logging.INFO, logger="spectune"):
        load(folder)
    assert all("of other parts than the decoder" in record.message for record in caplog.records)


def test_old_and_other_layouts_of_a_whole_base_are_read(whole: Path, folder: Path, tmp_path: Path) -> None:
    expected = make_model().state_dict()

    def same(base: Path) -> bool:
        found = load(base)[0].state_dict()
        return all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    assert same(whole)
    sharded(lambda index: None)(folder)
    assert same(folder)
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(bare, folder / WEIGHTS, {"format": "pt"})  # as GPT-2's own checkpoint is
    assert same(folder)
    (folder / WEIGHTS).unlink()
    torch.save(make_model().state_dict(), folder / "pytorch_model.bin")
    assert same(folder)


def test_two_values_for_tied_weights_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors(lambda state: state.update({"lm_head.weight": torch.ones(300, 32)}))(folder)
    with caplog.at_level(logging.WARNING, logger="spectune"):
        model, _ = load(folder)
    assert "lm_head.weight and transformer.wte.weight" in caplog.text
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_a_head_that_is_not_tied_has_to_be_there(folder: Path) -> None:
    config(tie_word_embeddings=False)(folder)
    with pytest.raises(DataError, match=r"lacks weights of the base: lm_head\.weight"):
        load(folder)


@pytest.mark.parametrize("read", [load_config, load_tokenizer])
def test_what_reads_no_weights_says_it_too(folder: Path, read: Callable[[Path], object]) -> None:
    (folder / "config.json").write_text("[")
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"config\.json is not readable JSON"):
        read(folder)


class PanicException(BaseException):
    """What a panic in Rust becomes."""


@pytest.mark.parametrize(
    "error", [PanicException("cut at a boundary"), SystemExit(5), RuntimeError("bad"), TypeError()]
)
def test_whatever_a_library_raises_is_one_of_our_errors(
    whole: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("spectune.storage.descriptions.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load(whole)


@pytest.mark.parametrize("said", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
                                  OSError(12, "Cannot allocate memory")])  # fmt: skip
def test_memory_that_runs_out_is_said_with_what_was_loaded(
    whole: Path, said: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise said

    with monkeypatch.context() as patch:
        patch.setattr("transformers.GPT2LMHeadModel.from_pretrained", fail)
        with pytest.raises(OutOfMemoryError, match=rf"{WEIGHTS} \([\d.]+ GiB\)"):
            load(whole)
    monkeypatch.setattr(bases, "check_numbers", fail)
    with pytest.raises(OutOfMemoryError, match=r"GiB in float32\) was put on cpu.*--dtype bfloat16"):
        load(whole)
