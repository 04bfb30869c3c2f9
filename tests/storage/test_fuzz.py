"""Delta folders that are damaged or made to harm: one clear error, the model as it was, no code run, no hang.

Each case is a small change of a folder that loads, and says one thing. Changes at random, of every method's folder and
through every command, are `tests/faults/spoiled_deltas.py`'s.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from spectune.deltas import Method, attach, attached, detach
from spectune.errors import ConfigError, DataError
from spectune.methods import (
    IA3,
    METHODS,
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
from spectune.storage import load_delta
from tests.support import make_model
from tests.support.quick import others_slow

OURS = "spectune.json"
CONFIG = "adapter_config.json"
SMALL: dict[str, Method] = {
    "lora": LoRA(r=2, target_modules=("c_attn", "c_fc")),
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "prompt": PromptTuning(num_virtual_tokens=3),
    "adapter": BottleneckAdapter(bottleneck_dim=2),
    "bitfit": BitFit(),
    "dora": DoRA(r=2, target_modules=("c_attn",)),
    "ia3": IA3(),
    "oft": OFT(oft_block_size=4, target_modules=("c_attn",)),
    "miss": MiSS(r=2, target_modules=("c_attn",)),
    "ln": LNTuning(),
    "full": FullFineTuning(),
}
#: methods whose folders PEFT reads and writes: without spectune.json they are PEFT's
PEFTS = ("lora", "prefix", "prompt", "ia3", "ln")
KINDS = [*SMALL, *(f"{name}-peft" for name in PEFTS)]
#: the code that reads them is one: of ours and of PEFT's, of numbers, lists and none, what every run of the tests has
FEW = ("lora", "prefix", "adapter", "bitfit", "full", "lora-peft", "prompt-peft", "ia3-peft")
#: what reads a weights file knows a delta's, the base's own and PEFT's
READ_ALIKE = ("lora", "prefix", "full", "lora-peft")

Change = Callable[[Path], object]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The model is tiny and there are hundreds of forward passes: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each kind."""
    root = tmp_path_factory.mktemp("saved")
    for kind in KINDS:
        method = SMALL[kind.removesuffix("-peft")]
        model = make_model()
        attach(model, method, "task", keep_base=method.trains_base).save(root / kind)
        if kind.endswith("-peft"):
            (root / kind / OURS).unlink()
    return root


@functools.cache
def base() -> tuple[PreTrainedModel, list[bool], torch.Tensor]:
    """The one model of all cases, as it was: a case that changes it fails, as do all after it."""
    model = make_model()
    next(model.parameters()).requires_grad_(False)
    return model, [p.requires_grad for p in model.parameters()], logits(model)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits


def refusal(folder: Path, change: Change) -> str | None:
    """What `load_delta` says of the changed folder, None where it loads; the model is as it was in either case."""
    model, required, before = base()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    names = set(model.__dict__)
    change(folder)
    said = None
    try:
        load_delta(model, folder, "fuzzed")
    except (DataError, ConfigError) as error:
        said = str(error)
        assert folder.name in said, f"does not name the folder: {said}"
        assert len(said) < 4000
    else:
        detach(model, "fuzzed")
    assert not attached(model)
    assert [p.requires_grad for p in model.parameters()] == required
    assert torch.equal(logits(model), before)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert set(model.__dict__) == names
    return said


def refused(folder: Path, change: Change) -> str:
    said = refusal(folder, change)
    assert said is not None, "it loaded"
    return said


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A fresh copy of a kind's folder at the same place each time."""

    def make(kind: str) -> Path:
        folder = tmp_path / "fuzzed-folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved / kind, folder)
        return folder

    return make


def weights(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.suffix == ".safetensors")


def config(folder: Path) -> Path:
    return folder / (OURS if (folder / OURS).exists() else CONFIG)


def no_digest(folder: Path) -> None:
    """As a folder from before there were digests, so that what comes after them is reached."""
    if (folder / OURS).exists():
        edit(folder, lambda content: content.pop("weights"))


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(config(folder).read_text())
    change(content)
    config(folder).write_text(json.dumps(content))


def test_every_method_is_fuzzed(copy: Callable[[str], Path]) -> None:
    assert {type(method) for method in SMALL.values()} == set(METHODS)
    for kind in KINDS:
        assert refusal(copy(kind), lambda folder: None) is None
        assert refusal(copy(kind), no_digest) is None


# -- the weights file -----------------------------------------------------------------------------------------------


def header_length(raw: bytes) -> int:
    return int(struct.unpack("<Q", raw[:8])[0])


def with_header(raw: bytes, header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + raw[8 + header_length(raw) :]


def edited_header(raw: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    header = json.loads(raw[8 : 8 + header_length(raw)])
    change(header)
    return with_header(raw, json.dumps(header).encode())


def overlap(header: dict[str, Any]) -> None:
    tensors = [value for key, value in header.items() if key != "__metadata__"]
    # a lone tensor overlaps nothing: it gets a gap before it instead
    tensors[-1]["data_offsets"] = tensors[0]["data_offsets"] if len(tensors) > 1 else [4, tensors[0]["data_offsets"][1]]


def stretch(header: dict[str, Any]) -> None:
    first = next(value for key, value in header.items() if key != "__metadata__")
    first["shape"] = [2**40, 2**40]


def out_of_file(header: dict[str, Any]) -> None:
    last = [value for key, value in header.items() if key != "__metadata__"][-1]
    last["data_offsets"][1] = 2**60


def unknown_dtype(header: dict[str, Any]) -> None:
    next(value for key, value in header.items() if key != "__metadata__")["dtype"] = "F99"


RAW: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "one byte": lambda raw: raw[:1],
    "the length alone": lambda raw: raw[:8],
    "cut in the header": lambda raw: raw[: 8 + header_length(raw) // 2],
    "the header alone": lambda raw: raw[: 8 + header_length(raw)],
    "cut in the data": lambda raw: raw[: (8 + header_length(raw) + len(raw)) // 2],
    "a byte short": lambda raw: raw[:-1],
    "a byte long": lambda raw: raw + b"\0",
    "zeros": lambda raw: bytes(len(raw)),
    "huge header": lambda raw: struct.pack("<Q", 2**63) + raw[8:],
    "header of the file's length": lambda raw: struct.pack("<Q", len(raw)) + raw[8:],
    "header of all bits": lambda raw: b"\xff" * 8 + raw[8:],
    "header is no JSON": lambda raw: with_header(raw, b"x" * 64),
    "header is a list": lambda raw: with_header(raw, b"[1, 2, 3]"),
    "header is deep": lambda raw: with_header(raw, b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "no tensor": lambda raw: with_header(raw[: 8 + header_length(raw)], b"{}"),
    "overlapping offsets": lambda raw: edited_header(raw, overlap),
    "shape past the data": lambda raw: edited_header(raw, stretch),
    "offsets past the file": lambda raw: edited_header(raw, out_of_file),
    "unknown dtype": lambda raw: edited_header(raw, unknown_dtype),
}


@pytest.mark.parametrize("name", list(RAW))
def test_damaged_weights(copy: Callable[[str], Path], name: str) -> None:
    for kind in READ_ALIKE:
        said = refused(copy(kind), lambda folder: weights(folder).write_bytes(RAW[name](weights(folder).read_bytes())))
        assert weights(copy(kind)).name in said or "the model in" in said


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    no_digest(folder)
    save_file(change(load_file(weights(folder))), weights(folder), metadata={"format": "pt"})


WRONG_DTYPES = [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("kind", others_slow(KINDS, FEW))
def test_dtypes(copy: Callable[[str], Path], kind: str) -> None:
    for dtype in WRONG_DTYPES:
        said = refused(copy(kind), lambda f, to=dtype: resave(f, lambda t: {n: x.to(to) for n, x in t.items()}))
        assert "expected float32" in said
        assert str(dtype) in said
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert refusal(copy(kind), lambda f, to=dtype: resave(f, lambda t: {n: x.to(to) for n, x in t.items()})) is None


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_names(copy: Callable[[str], Path], kind: str) -> None:
    def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
        def run(folder: Path) -> None:
            resave(folder, lambda t: {n: change(x) if n == min(t) else x for n, x in t.items()})

        return run

    for change in (lambda x: x[:0], lambda x: x[None], lambda x: torch.zeros(()), lambda x: torch.cat([x, x])):
        said = refused(copy(kind), first(change))
        assert "expected" in said or "need" in said
    outside = {"../../x": torch.zeros(1), "/etc/passwd": torch.zeros(1)}
    said = refused(copy(kind), lambda f: resave(f, lambda t: {**t, **outside}))
    assert "surplus: ../../x" in said
    assert not (copy(kind).parent.parent / "x").exists()
    if kind == "ia3-peft":
        return  # each tensor is one place, and PEFT's config may name places that have none
    said = refused(copy(kind), lambda f: resave(f, lambda t: {n: x for n, x in t.items() if n != min(t)}))
    assert "missing" in said


@pytest.mark.parametrize(
    ("kind", "value"),
    [(kind, float("nan")) for kind in KINDS] + [(kind, s * float("inf")) for kind in READ_ALIKE for s in (1, -1)],
)
def test_weights_that_are_not_finite_are_named(copy: Callable[[str], Path], kind: str, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[min(tensors)].view(-1)[0] = value
        return tensors

    said = refused(copy(kind), lambda f: resave(f, spoil))
    assert "1 of" in said
    assert "not finite" in said


def test_too_large_for_float32_is_not_finite(copy: Callable[[str], Path]) -> None:
    for kind in ("lora", "full"):
        said = refused(copy(kind), lambda f: resave(f, lambda t: {n: x.double() + 1e300 for n, x in t.items()}))
        assert "not finite in torch.float32" in said


def test_one_tensor_under_two_names(copy: Callable[[str], Path]) -> None:
    def double(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {name.removeprefix("base_model.model."): x + 1 for name, x in tensors.items()}

    assert "twice" in refused(copy("lora-peft"), lambda f: resave(f, double))


def test_shards_that_both_hold_a_tensor(copy: Callable[[str], Path]) -> None:
    def stray(folder: Path) -> None:
        no_digest(folder)
        shutil.copy(weights(folder), folder / "model-2.safetensors")

    assert "in another file of the folder too" in refused(copy("full"), stray)


# -- digests --------------------------------------------------------------------------------------------------------


def test_digests_that_are_wrong(copy: Callable[[str], Path]) -> None:
    name = "adapter_model.safetensors"
    said = refused(copy("lora"), lambda f: edit(f, lambda c: c["weights"][name].update(sha256="0" * 64)))
    assert "SHA-256" in said
    assert "take the key 'weights' out" in said
    assert "bytes" in refused(copy("lora"), lambda f: edit(f, lambda c: c["weights"][name].update(bytes=7)))
    assert "is not listed" in refused(copy("lora"), lambda f: edit(f, lambda c: c.update(weights={})))
    more = {"second.safetensors": {"bytes": 1, "sha256": "0" * 64}}
    assert "is missing" in refused(copy("lora"), lambda f: edit(f, lambda c: c["weights"].update(more)))
    for path in ("../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin"):
        broken = {path: {"bytes": 1, "sha256": "0" * 64}}
        assert path in refused(copy("lora"), lambda f, b=broken: edit(f, lambda c: c["weights"].update(b)))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_flipped_bit_anywhere_in_what_was_saved_is_noticed(kind: str, copy: Callable[[str], Path]) -> None:
    chance, folder = random.Random(kind), copy(kind)
    for path in sorted(folder.iterdir()):
        before = path.read_bytes()
        for place in sorted(chance.sample(range(len(before)), 12)):
            flipped = bytearray(before)
            flipped[place] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(DataError):
                load_delta(base()[0], folder)
        path.write_bytes(before)
    assert refusal(folder, lambda _: None) is None


def test_a_shard_that_is_gone(copy: Callable[[str], Path]) -> None:
    def add(folder: Path) -> None:
        edit(folder, lambda c: c["weights"].update({"z.safetensors": {"bytes": 1, "sha256": "0" * 64}}))

    assert "z.safetensors is missing" in refused(copy("full"), add)


# -- the config -----------------------------------------------------------------------------------------------------

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{'a': 1}",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "not UTF-8": b'{"a": "\xff"}',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep list": b"[" * 100_000,
    "a number of 100,000 digits": b'{"format": ' + b"1" * 100_000 + b"}",
    "NaN": b'{"format": NaN}',
    "infinity": b'{"format": 1e999}',
    "an empty object": b"{}",
    "very long": b'{"a": "' + b"x" * (17 * 2**20) + b'"}',
}


@pytest.mark.parametrize("name", list(TEXTS))
def test_configs_that_are_no_config(copy: Callable[[str], Path], name: str) -> None:
    for kind in ("lora", "prefix-peft"):
        said = refused(copy(kind), lambda folder: config(folder).write_bytes(TEXTS[name]))
        assert config(copy(kind)).name in said


@pytest.mark.parametrize("kind", others_slow(KINDS, FEW))
def test_configs_cut_or_without_a_key_or_with_a_wrong_type(copy: Callable[[str], Path], kind: str) -> None:
    raw = config(copy(kind)).read_bytes()
    for share in (0.1, 0.5, 0.9):
        said = refused(copy(kind), lambda f, s=share: config(f).write_bytes(raw[: int(len(raw) * s)]))
        assert "not readable JSON" in said
    content = json.loads(raw)
    read = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias", "num_virtual_tokens")
    theirs = kind.endswith("-peft")
    for key in [key for key in content if key in (*read, "peft_type") or not theirs]:
        for wrong in ({"a": [1]}, [[1]], [None], True, "no", -1.5, 1e308, 10**30):
            kinds = {type(wrong), type(content[key])}
            if len(kinds) == 1 or kinds <= {int, float}:
                continue  # the right type; numbers out of range have their own test
            said = refused(copy(kind), lambda f, k=key, w=wrong: edit(f, lambda c: c.update({k: w})))
            assert key in said, f"{key} = {wrong!r}: {said}"
    needed = {"lora-peft": ["r", "lora_alpha"], "ia3-peft": ["peft_type"], "ln-peft": ["target_modules"]}
    for key in needed.get(kind, ["num_virtual_tokens"] if theirs else ["format", "method", "base"]):
        assert key in refused(copy(kind), lambda f, k=key: edit(f, lambda c: c.pop(k)))


def test_everything_wrong_is_listed_at_once(copy: Callable[[str], Path]) -> None:
    wrong = {"base": {"model_type": 1, "parts": {"a": {"kind": "b"}}}, "base_name": 4}
    said = refused(copy("lora"), lambda f: edit(f, lambda c: c.update(wrong)))
    for part in ("base.model_type = 1", "base.decoder", "base.parts.a.shape", "base_name = 4"):
        assert part in said
    said = refused(copy("lora-peft"), lambda f: edit(f, lambda c: c.update(r="4", lora_alpha=True, target_modules=[1])))
    for part in ("r = '4'", "lora_alpha = True", "target_modules = [1]"):
        assert part in said


@pytest.mark.parametrize("version", [0, 3, -1, 10**30])
def test_another_format_says_to_install_what_wrote_it(copy: Callable[[str], Path], version: int) -> None:
    said = refused(copy("lora"), lambda f: edit(f, lambda c: c.update(format=version, method="of the future")))
    assert f"has format {version}" in said
    assert "install the version that wrote it" in said


NUMBERS: dict[str, tuple[str, list[Any]]] = {
    "lora": ("r", [10**12, 10**30, 10**400, -1, 0, 2.5, 3]),
    "adapter": ("bottleneck_dim", [10**12, 10**30, -1, 0, 3]),
    "prefix": ("num_virtual_tokens", [10**12, 10**30, -1, 0, 4]),
    "prompt": ("num_virtual_tokens", [10**12, 10**30, -1, 0, 4]),
}


@pytest.mark.parametrize("kind", [*NUMBERS, *(f"{name}-peft" for name in PEFTS if name in NUMBERS)])
def test_absurd_sizes_allocate_nothing(copy: Callable[[str], Path], kind: str) -> None:
    key, values = NUMBERS[kind.removesuffix("-peft")]
    for value in values:

        def change(folder: Path, value: Any = value) -> None:
            edit(folder, lambda c: c.get("method", c).update({key: value}))

        refused(copy(kind), change)


def test_a_projection_of_absurd_width_is_not_built(copy: Callable[[str], Path]) -> None:
    """A stored prefix has no projection: its width says nothing of the file."""

    def change(folder: Path) -> None:
        edit(folder, lambda c: c.pop("sha256"))
        edit(folder, lambda c: c["method"].update(prefix_projection=True, encoder_hidden_size=10**12))

    assert refusal(copy("prefix"), change) is None


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("lora", {"name": "lorra"}, "did you mean 'lora'"),
        ("lora", {"name": 4}, "no method '4'"),
        ("lora", {"rank": 4}, "'rank'"),
        ("lora", {"__class__": "os.system"}, "__class__"),
        ("lora", {"lora_alpha": -1.0}, "lora_alpha"),
        ("lora", {"lora_alpha": 10**400}, "lora_alpha"),
        ("lora", {"lora_dropout": 1.0}, "lora_dropout"),
        ("lora", {"r": "2"}, "r = '2'"),
        ("lora", {"use_rslora": 0}, "use_rslora"),
        ("lora", {"target_modules": []}, "target_modules"),
        ("lora", {"target_modules": ["../x"]}, "'../x'"),
        ("lora", {"target_modules": "("}, "no regular expression"),
        ("lora", {"target_modules": "\ud800"}, "hex escape"),
        ("adapter", {"activation": "__import__('os')"}, "activation"),
        ("adapter", {"placement": "elsewhere"}, "placement"),
        ("prompt", {"init": "text"}, "init_text"),
        ("bitfit", {"name": "full"}, "missing: "),
        ("full", {"name": "bitfit"}, "is missing"),
        ("prefix", {"name": "prompt", "prefix_projection": None}, "prompt"),
    ],
)
def test_methods_that_are_none(copy: Callable[[str], Path], kind: str, fields: dict[str, Any], expected: str) -> None:
    assert expected in refused(copy(kind), lambda f: edit(f, lambda c: c["method"].update(fields)))


def test_positions_that_disagree_with_the_method(copy: Callable[[str], Path]) -> None:
    said = refused(copy("prompt"), lambda f: edit(f, lambda c: c.update(text_positions_start_at=9)))
    assert "text_positions_start_at is 9" in said


# -- paths and pickles ----------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin", OURS, CONFIG])
def test_a_pickle_is_never_read(copy: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    for kind in ("lora", "full", "lora-peft"):
        for torch_format in (True, False):

            def plant(folder: Path, torch_format: bool = torch_format) -> None:
                if name.endswith(".bin"):
                    weights(folder).unlink()
                target = weights(folder) if name.endswith(".safetensors") else folder / name
                if torch_format:
                    torch.save({"w": Bomb(trace)}, target)
                else:
                    target.write_bytes(pickle.dumps(Bomb(trace)))

            said = refusal(copy(kind), plant)
            assert not trace.exists()
            # beside a spectune.json the file adapter_config.json is for PEFT alone
            assert said is not None or (name == CONFIG and kind != "lora-peft")
            if name.endswith(".bin"):
                assert said is not None
                assert f"there is {name}, a pickle" in said


@pytest.mark.parametrize("kind", ["lora", "full", "lora-peft"])
def test_what_is_no_file(copy: Callable[[str], Path], kind: str) -> None:
    def pipe(path: Path) -> None:
        os.mkfifo(path)

    def loop(path: Path) -> None:
        path.symlink_to(path)

    def dangling(path: Path) -> None:
        path.symlink_to(path.parent / "nowhere")

    def device(path: Path) -> None:
        path.symlink_to("/dev/zero")

    for which in (weights, config):
        for make in (pipe, Path.mkdir, loop, dangling, device):

            def change(folder: Path, which: Any = which, make: Any = make) -> None:
                path = which(folder)
                path.unlink()
                make(path)

            path = which(copy(kind))
            assert str(path) in refused(copy(kind), change)


@pytest.mark.parametrize("kind", ["lora", "full", "lora-peft"])
def test_links(copy: Callable[[str], Path], saved: Path, kind: str) -> None:
    """Out of the folder is refused, within it is not, nor is the layout of the hub's cache."""
    for which in (weights, config):

        def out(folder: Path, which: Any = which) -> None:
            path = which(folder)
            path.unlink()
            path.symlink_to(saved / kind / path.name)

        assert "outside of its folder" in refused(copy(kind), out)

        def within(folder: Path, which: Any = which) -> None:
            path = which(folder)
            path.rename(folder / "real")
            path.symlink_to("real")

        assert refusal(copy(kind), within) is None


def test_the_hub_s_cache(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--me--task" / "snapshots" / "0123abcd"
    blobs = folder.parent.parent / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate((saved / "lora-peft").iterdir()):
        shutil.copy(path, blobs / str(number))
        (folder / path.name).symlink_to(Path("../../blobs") / str(number))
    assert refusal(folder, lambda f: None) is None


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert "is not a folder" in refused(tmp_path / "none", lambda f: None)
    assert "is not a folder" in refused(tmp_path / "file", lambda f: f.write_text(""))
    assert "neither" in refused(tmp_path / "empty", lambda f: f.mkdir())


def test_our_config_without_our_file(copy: Callable[[str], Path]) -> None:
    for kind in ("adapter", "bitfit"):
        assert f"{OURS} is missing" in refused(copy(kind), lambda f: (f / OURS).unlink())
