"""Writing safetensors as a stream: no second copy of all tensors, and digested while it is written."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectune.files.digests import Digest

#: safetensors' names, from the narrowest on; it writes the widest first, so that every tensor is aligned
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}
#: bytes that are written, and hashed in the meantime, at once
_CHUNK = 8 * 2**20
#: smaller tensors are put together first
_SMALL = 2**16


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Digest:
    """Write a safetensors file, byte for byte what `safetensors.torch.save_file` writes of contiguous copies.

    Tensors may be on any device, of any strides, and share memory; one at a time is copied where it has to be. It is
    written under its name as it is, and not waited for: write into an `atomic_folder` or an `atomic_file`.

    Returns:
        size and SHA-256 of what was meant to be written, whatever the disk makes of it.

    Raises:
        OSError: the disk is full, read-only or broken.
        ValueError: a tensor is of a type that safetensors does not have.
    """
    if unknown := [f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in _NAMES]:
        raise ValueError(f"safetensors has no such type: {', '.join(unknown)}")
    ordered = sorted(tensors.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0]))
    header = _header(dict(ordered), metadata)
    found, size = hashlib.sha256(header), len(header)
    hashed: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool, Path(path).open("wb", buffering=0) as file:
        _write(file.fileno(), memoryview(header))
        for chunk in _chunks(ordered):
            if hashed is not None:
                hashed.result()
            hashed = pool.submit(found.update, chunk)
            _write(file.fileno(), chunk)
            size += len(chunk)
        if hashed is not None:
            hashed.result()
    return Digest(bytes=size, sha256=found.hexdigest())


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    described: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        described[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[memoryview]:
    """The tensors' bytes in parts of at most `_CHUNK`; small tensors together in one."""
    small: list[memoryview] = []
    waiting = 0
    for _, tensor in tensors:
        content = _bytes(tensor)
        if len(content) < _SMALL:
            small.append(content)
            waiting += len(content)
        if waiting >= _CHUNK or (small and len(content) >= _SMALL):
            yield memoryview(b"".join(small))
            small, waiting = [], 0
        if len(content) >= _SMALL:
            yield from (content[start : start + _CHUNK] for start in range(0, len(content), _CHUNK))
    yield memoryview(b"".join(small))


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's content, in its own memory where it lies there as it is stored."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    content: Any = plain.view(torch.uint8).numpy()
    return memoryview(content)


def _write(descriptor: int, content: memoryview) -> None:
    while len(content):
        content = content[os.write(descriptor, content) :]
