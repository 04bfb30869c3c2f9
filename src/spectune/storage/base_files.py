"""The files of a base, which may come from anybody, looked at before a library reads them: what would hang, run code,
take gigabytes or be left out in silence is refused by name. Cheap: configs and headers alone. Nothing here imports
torch."""

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

from spectune.errors import DataError, some
from spectune.files.metadata import read_json
from spectune.files.regular import plain_file, read_bounded
from spectune.files.tensor_headers import Header, tensor_headers
from spectune.storage.base_config import check_config
from spectune.storage.pretrained import cached_file

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
#: an index of 90,000 tensors has a sixth of it
MAX_INDEX_BYTES = 64 * 2**20
#: of anything that is no weights; the largest tokenizers have an eighth of it
MAX_FILE_BYTES = 256 * 2**20
_SMALL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe")
_COPY = "copy the base again from where it was written"


@dataclass(frozen=True)
class Weights:
    """The weights' files of a base.

    Attributes:
        headers: by their names; None of pickles, whose content nothing says before they are read.
        nbytes: of all files together.
    """

    files: list[Path]
    headers: dict[str, Header] | None
    nbytes: int

    @property
    def most_weights(self) -> int:
        """They cannot be more; of quantised ones, two share a byte."""
        if self.headers is None:
            return self.nbytes
        return sum(header.numel for header in self.headers.values())

    @property
    def names(self) -> str:
        """For a message."""
        return some([path.name for path in self.files])


def folder_of(source: str) -> Path | None:
    """The folder with a base's files: itself, or the hub's cache's. None where the cache does not have it yet."""
    path = Path(source)
    if path.is_dir():
        return path
    config = cached_file(source, "config.json")
    return None if config is None else config.parent


def read_config(source: str) -> dict[str, Any]:
    """`config.json` of a base, as it stands there; empty where nobody has it yet. Raises DataError: it, or another file
    beside it, is nothing that transformers may be given; see `check_config`."""
    folder = folder_of(source)
    if folder is None:
        return {}
    _check_kinds(folder)
    found = read_json(folder / "config.json", links=True, non_finite=True) or {}
    check_config(found, folder / "config.json")
    return found


def check_tokenizer(source: str) -> None:
    """Raise DataError where the small files of a tokenizer are no JSON objects, which is passed over in part."""
    folder = folder_of(source)
    for path in [] if folder is None else [folder / name for name in _SMALL]:
        content = read_bounded(path, MAX_INDEX_BYTES, links=True)
        if content is None:
            continue
        try:
            found = json.loads(content)  # with whole numbers of any size: those of transformers have thirty digits
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not readable JSON ({type(error).__name__}: {error}); {_COPY}") from error
        if not isinstance(found, dict):
            raise DataError(f"{path} holds a {type(found).__name__}, expected an object; {_COPY}")


def read_weights(source: str, config: Mapping[str, Any]) -> Weights:
    """What the weights' files of a base say that they hold. Raises DataError: there are none, or one is damaged, or
    missing, or outside of the folder, or two hold the same tensor."""
    folder = folder_of(source)
    assert folder is not None, "the config was read from there"
    named = config.get("transformers_weights")
    if named is not None:
        raise DataError(f"{folder / 'config.json'} names its weights ({str(named)[:100]!a}), which is not read here: "
                        f"give them their usual name, {WHOLE}, and take transformers_weights out")  # fmt: skip
    read_json(folder / "generation_config.json", links=True, non_finite=True)
    for name in (WHOLE, PICKLED):  # the order of transformers
        index = folder / f"{name}.index.json"
        if plain_file(folder / name, links=True):
            return _weights([folder / name])
        if plain_file(index, links=True):
            return _weights(_shards(index))
    raise DataError(
        f"{source} is a folder, but no base that transformers can load: there are no weights. It holds: "
        f"{some(sorted(os.listdir(folder))) or 'nothing'}. Expected {WHOLE}, or {INDEX} and the files that it names."
    )


def _check_kinds(folder: Path) -> None:
    """Whatever of a folder transformers may open is a regular file of a bounded size, and adds nothing in silence."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            _check_entry(entry)


def _check_entry(entry: os.DirEntry[str]) -> None:
    try:
        found = entry.stat()
    except OSError:
        return  # a link to nowhere is no file: what needs it says so
    if stat.S_ISDIR(found.st_mode):
        return
    if not stat.S_ISREG(found.st_mode):
        plain_file(Path(entry.path), links=True)  # says what it is
    if entry.name.endswith(_TEXTS) and found.st_size > MAX_FILE_BYTES:
        raise DataError(f"{entry.path} has {found.st_size:,} bytes, which nothing beside weights has: it is damaged; "
                        f"{_COPY}")  # fmt: skip
    if entry.name == "adapter_config.json":
        raise DataError(
            f"{entry.path} stands in the folder of a base, and transformers would load that adapter over it: name "
            "the delta's folder as a delta (--run, or load_delta), or take the adapter's files out of the base's"
        )
    if entry.name.startswith("shard-") and entry.name.endswith(".safetensors"):
        raise DataError(f"{entry.path}: a checkpoint of several processes is not read; save it as one model: "
                        "model.save_pretrained(folder)")  # fmt: skip


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each once. Raises DataError."""
    found = read_json(index, MAX_INDEX_BYTES, links=True, non_finite=True) or {}
    places = found.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise DataError(f"{index} has no weight_map, expected the name of a file for each tensor; {_COPY}")
    if wrong := [repr(name)[:100] for name in places.values() if not _is_name(name)]:
        raise DataError(f"{index} names {some(sorted(set(wrong)))}, expected files beside it; {_COPY}")
    files = [index.parent / name for name in sorted(set(places.values()))]
    if missing := [path.name for path in files if not plain_file(path, links=True)]:
        raise DataError(f"{index} names {some(missing)}, which {'is' if len(missing) == 1 else 'are'} missing; {_COPY}")
    return files


def _is_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) < 256 and os.path.basename(name) == name and name not in (".", "..")


def _weights(files: list[Path]) -> Weights:
    nbytes = sum(path.stat().st_size for path in files)
    if not files[0].name.endswith(".safetensors"):
        for path in files:
            _check_pickle(path)
        return Weights(files, None, nbytes)
    headers: dict[str, Header] = {}
    for path in files:
        here = tensor_headers(path, links=True) or {}
        if twice := sorted(headers.keys() & here.keys()):
            raise DataError(f"{path} holds {some(twice)}, and so does another file of the base; {_COPY}")
        headers |= here
    return Weights(files, headers, nbytes)


def _check_pickle(path: Path) -> None:
    """An archive of tensors is stored, not packed: one that grows when it is read is refused. It is read by torch, with
    `weights_only`, which makes tensors and nothing else."""
    if not is_zipfile(path):
        return
    try:
        with ZipFile(path) as archive:
            grown = sum(entry.file_size for entry in archive.infolist())
    except (BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise DataError(f"{path} is no readable archive of weights ({error}); {_COPY}") from error
    if grown > math.ceil(1.01 * path.stat().st_size):
        raise DataError(
            f"{path} has {path.stat().st_size:,} bytes, and {grown:,} once it is unpacked: refused; {_COPY}"
        )
