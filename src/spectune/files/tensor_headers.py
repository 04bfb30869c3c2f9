"""What a safetensors file says that it holds, checked to the last byte before any of it is read or allocated.

The format: 8 bytes with the header's length, a JSON object (name -> dtype, shape, where its bytes begin and end), and
the bytes (https://github.com/huggingface/safetensors). A header that lies is found here, whatever its reader would do.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectune.errors import DataError
from spectune.files.metadata import json_object
from spectune.files.regular import opened

#: no header is longer; the largest known, of 90,000 tensors, has a third of it
MAX_HEADER_BYTES = 32 * 2**20
#: bits of a number
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "I64": 64, "U64": 64, "I32": 32, "U32": 32,
    "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
#: what weights are not
WHOLE_NUMBERS = frozenset({"I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL"})
_COPY = "it is damaged or of another kind; copy it again from where it was written"


@dataclass(frozen=True)
class Header:
    """What a file says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def tensor_headers(path: Path, *, links: bool = False) -> dict[str, Header] | None:
    """The tensors of a safetensors file, None where there is no file. `links`: the user named its folder.

    Raises:
        DataError: no regular file, or no safetensors: cut, with a header that is too long, no JSON or names a tensor
            twice, with dtypes that nobody knows, or with places that overlap, leave holes, do not fit the shapes or
            run past the end.
    """
    with opened(path, links=links) as file:
        if file is None:
            return None
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise DataError(
                f"{path} is no readable safetensors file: it has {size:,} bytes, and says that its header has "
                f"{length:,}; {_COPY}"
            )
        content = file.read(length)
    found = json_object(content, f"the header of {path}")
    found.pop("__metadata__", None)
    problem = _problem(found, size - 8 - length)
    if problem is not None:
        raise DataError(f"{path} is no readable safetensors file: {problem}; {_COPY}")
    return {name: Header(entry["dtype"], tuple(entry["shape"])) for name, entry in found.items()}


def _problem(entries: Mapping[str, Any], room: int) -> str | None:
    """What is wrong with a header, over `room` bytes of tensors."""
    places = []
    for name, entry in entries.items():
        found: dict[str, Any] = entry if isinstance(entry, dict) else {}
        shape, dtype, place = (found.get(key) for key in ("shape", "dtype", "data_offsets"))
        if shape is None or not _whole(shape):
            return f"{name[:100]!a} has no shape"
        if not isinstance(dtype, str) or dtype not in BITS:
            return f"{name[:100]!a} is {str(dtype)[:40]!a}, a dtype that nobody knows"
        if place is None or not _whole(place) or len(place) != 2:
            return f"{name[:100]!a} has no place in the file"
        if 8 * (place[1] - place[0]) != math.prod(shape) * BITS[dtype]:
            return f"{name[:100]!a} is {dtype} {shape}, and has {place[1] - place[0]:,} bytes"
        places.append((place[0], place[1], name))
    end = 0
    for begin, after, name in sorted(places):
        if begin != end:
            return f"{name[:100]!a} begins at byte {begin:,}, and the tensor before it ends at {end:,}"
        end = after
    return None if end == room else f"its tensors have {end:,} bytes, and the file has {room:,} for them"


def _whole(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value) and len(value) <= 16
