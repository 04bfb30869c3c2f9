"""Ways to damage a file of tensors, byte by byte and tensor by tensor; and the way that befits any file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.faults.spoiling import BYTES, JSON, NODES, Blow, own_copy

SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4,
    "I64": 8, "F64": 8, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
META = "__metadata__"


def tensors_of(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The header of a safetensors file, and each tensor's bytes."""
    raw = path.read_bytes()
    [length] = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    start = 8 + length
    data = {n: raw[start + v["data_offsets"][0] : start + v["data_offsets"][1]] for n, v in header.items() if n != META}
    return header, data


def write_tensors(path: Path, header: dict[str, Any], data: dict[str, bytes]) -> None:
    """A well-formed file of these tensors, whatever their shapes say of their bytes."""
    at, made = 0, {META: header[META]} if META in header else {}
    for name, values in data.items():
        made[name] = header[name] | {"data_offsets": [at, at + len(values)]}
        at += len(values)
    text = json.dumps(made).encode()
    text += b" " * (-len(text) % 8)
    path.unlink()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data.values()))


def flip_in_data(random: Random, path: Path) -> str | None:
    """A high bit of a stored number, so that it matters."""
    header, data = tensors_of(path)
    if not data:
        return None
    name = random.choice(sorted(data))
    width = SIZES.get(header[name]["dtype"], 1)
    values = bytearray(data[name])
    if not values:
        return None
    place = random.randrange(len(values) // width) * width + width - 1
    values[place] ^= 1 << random.randrange(7)
    write_tensors(path, header, data | {name: bytes(values)})
    return f"a high bit of {name} flipped"


def forged_header(random: Random, path: Path) -> str:
    raw = own_copy(path)
    [length] = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in header if name != META]
    name = random.choice(names) if names else META
    tensor = header.setdefault(name, {})

    def with_header(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + body

    def edited(**fields: Any) -> bytes:
        tensor.update(fields)
        return with_header(json.dumps(header).encode())

    kind = random.choice(FORGERIES)
    if kind == "length":
        number = random.choice([0, 1, 2**63, 2**64 - 1, len(raw), 100_000_001, 2**31])
        path.write_bytes(struct.pack("<Q", number) + raw[8:])
    elif kind == "text":
        path.write_bytes(
            with_header(random.choice([b"x" * 64, b"[1, 2]", b"{}", b"", b'{"a":' * 5000 + b"1" + b"}" * 5000]))
        )
    elif kind == "shape":
        path.write_bytes(edited(shape=random.choice([[2**40, 2**40], [-1], [], [2**63, 2], "x", [1.5], [0], None])))
    elif kind == "offsets":
        path.write_bytes(edited(data_offsets=random.choice([[0, 2**60], [4, 0], [-4, 4], [0, 1], [0], "x", [0.5, 8]])))
    elif kind == "dtype":
        path.write_bytes(edited(dtype=random.choice(["F99", "", None, 3, "I64", "F8_E4M3", "C64"])))
    else:
        header[META] = random.choice([{"format": "tf"}, {"format": 1}, [], "x", {}, {"format": "mlx"}])
        path.write_bytes(with_header(json.dumps(header).encode()))
    return f"header forged: {kind} ({name})"


FORGERIES = ["length", "text", "shape", "offsets", "dtype", "metadata"]


def other_tensors(random: Random, path: Path) -> str | None:
    """Tensors missing, surplus, renamed, of another shape or type, or not finite, in a well-formed file."""
    header, data = tensors_of(path)
    if not data:
        return None
    name, kind = random.choice(sorted(data)), random.choice(TENSOR_KINDS)
    values, width = data[name], SIZES.get(header[name]["dtype"], 1)
    if kind == "missing":
        del data[name]
    elif kind == "surplus":
        new = random.choice(["surplus.weight", "../../x", "a" * 10_000, "\x1b[2J", name + ".lora_A"])
        header[new], data[new] = header[name], values
    elif kind == "renamed":
        new = random.choice([name + "x", name.upper(), "model." + name])
        header[new] = header[name]
        data = {new if n == name else n: v for n, v in data.items()}
    elif kind == "shape":
        shape = header[name]["shape"]
        other = random.choice([shape[::-1], [len(values) // width], [1, *shape], [*shape, 1], [0]])
        header[name] |= {"shape": other}
        data[name] = b"" if other == [0] else values
        if other == shape:
            return None
    elif kind == "fewer":
        shape = header[name]["shape"]
        if not shape or shape[0] < 2:
            return None
        header[name] |= {"shape": [shape[0] - 1, *shape[1:]]}
        data[name] = values[: len(values) // shape[0] * (shape[0] - 1)]
    elif kind == "type":
        alike = [t for t, size in SIZES.items() if size == width and t != header[name]["dtype"]]
        header[name] |= {"dtype": random.choice(alike)}
    else:
        return _other_values(random, path, name, kind)
    write_tensors(path, header, data)
    return f"tensor {name[:60]}: {kind}"


TENSOR_KINDS = ["missing", "missing", "surplus", "renamed", "shape", "fewer", "type", "nan", "inf", "scaled", "zero"]


def _other_values(random: Random, path: Path, name: str, kind: str) -> str | None:
    header, data = tensors_of(path)
    if header[name]["dtype"] not in ("F32", "F16"):
        return None
    numbers = np.frombuffer(data[name], dtype="<f4" if header[name]["dtype"] == "F32" else "<f2").copy()
    if not numbers.size:
        return None
    if kind == "scaled":
        numbers *= numbers.dtype.type(1.01)
    elif kind == "zero":
        numbers[:] = 0
    else:
        numbers[random.randrange(numbers.size)] = float(kind)
    write_tensors(path, header, data | {name: numbers.tobytes()})
    return f"tensor {name}: {kind}"


TENSORS: list[Blow] = [
    flip_in_data,
    flip_in_data,
    forged_header,
    forged_header,
    other_tensors,
    other_tensors,
    other_tensors,
]


def strike(random: Random, path: Path) -> str | None:
    """Damage one file in a way that befits it; the description says how, None where nothing came of it."""
    kinds: list[list[Blow]] = [BYTES, BYTES, NODES]
    if path.suffix == ".json":
        kinds += [JSON, JSON, JSON]
    elif path.suffix == ".safetensors":
        kinds += [TENSORS, TENSORS, TENSORS]
    return random.choice(random.choice(kinds))(random, path)
