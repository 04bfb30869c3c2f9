"""Writing safetensors as a stream: no second copy of all tensors, and digested while it is written."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectune.files.digests import Digest, Hashing

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


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    handed_on: bool = True,
) -> Digest:
    """Write a safetensors file, byte for byte what `safetensors.torch.save_file` writes of contiguous copies, and wait
    until it is on the disk. It is hashed in the meantime, by another thread.

    Tensors may be on any device, of any strides, and share memory; one at a time is copied where it has to be. It is
    written under its name as it is: write into an `atomic_folder` or an `atomic_file`.

    Args:
        handed_on: see `spectune.files.digests`.

    Returns:
        size and hash of what was to be written, whatever the disk makes of it.

    Raises:
        OSError: the disk is full, read-only or broken.
        ValueError: a tensor is of a type that safetensors does not have.
    """
    if unknown := [f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in _NAMES]:
        raise ValueError(f"safetensors has no such type: {', '.join(unknown)}")
    ordered = sorted(tensors.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0]))
    header = _header(dict(ordered), metadata)
    found = Hashing(handed_on=handed_on)
    found.update(header)
    with Path(path).open("wb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as pool:
        try:
            _write(file.fileno(), memoryview(header))
            for chunk, is_copy in _chunks(tensor for _, tensor in ordered):
                hashed = pool.submit(found.update, chunk)
                _write(file.fileno(), chunk)
                if is_copy:
                    hashed.result()  # else copies would wait in memory for the slower of the two
            os.fsync(file.fileno())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found.digest()


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


def _chunks(tensors: Iterable[Tensor]) -> Iterator[tuple[memoryview, bool]]:
    """The tensors' bytes in parts of at most `_CHUNK`, and whether they are copies; small tensors together in one."""
    small: list[memoryview] = []
    waiting = 0
    for tensor in tensors:
        content, is_copy = _bytes(tensor)
        if len(content) < _SMALL:
            small.append(content)
            waiting += len(content)
        if waiting >= _CHUNK or (small and len(content) >= _SMALL):
            yield memoryview(b"".join(small)), True
            small, waiting = [], 0
        if len(content) >= _SMALL:
            yield from ((content[start : start + _CHUNK], is_copy) for start in range(0, len(content), _CHUNK))
    yield memoryview(b"".join(small)), True


def _bytes(tensor: Tensor) -> tuple[memoryview, bool]:
    """A tensor's content, and whether it is a copy: not where it lies in memory as it is stored."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    content: Any = plain.reshape(-1).view(torch.uint8).numpy()
    return memoryview(content), plain.data_ptr() != tensor.data_ptr()


def _write(descriptor: int, content: memoryview) -> None:
    while len(content):
        content = content[os.write(descriptor, content) :]
