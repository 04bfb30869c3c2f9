"""A weight in few numbers: exact digests of what is sampled of it, and sums that survive quantisation.

What is sampled: every row of a matrix, at the same number of neighbouring columns of it, which move on from row to row
so that every column is met too; a small matrix is read whole. Reading all of an 8B model takes its memory's whole
bandwidth, or its disk's; 32 weights of each row are a hundredth of it, and no row can change unseen.

*Digests.* A float32 model and its bfloat16 copy have no bits in common, so three digests are taken of each row: of the
sampled values as float32, rounded to bfloat16, and rounded to float16. Rounding is defined to the bit: a model that was
itself rounded has the digest that its original has of the rounded values. Each is a sum over rows and columns of
`bits * a_row * b_column` modulo 2^64, with fixed pseudo-random odd `a` and `b` (Carter and Wegman 1979, "Universal
classes of hash functions", give the bound for such sums): exact in integers, so that neither device nor order matters.

*Sums.* Signed sums of the samples, a sketch (Alon, Matias, Szegedy 1999, "The space complexity of approximating the
frequency moments"): the mean square difference of two weights' sums estimates the mean square difference of the
weights themselves, which for a quantised copy is its rounding, and for other weights is as large as they are.
"""

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: matrices of at most so many weights are read whole
WHOLE = 2**16
#: kinds of weights that have a row for each token: more of them may be added
TABLES = ("embeddings", "head")
#: columns read of each row of larger ones: this many, or fewer where a weight has very many rows
COLUMNS, FEWEST, SAMPLES = 32, 8, 2**21
#: of a table (token embeddings), whose rows may become more
TABLE_COLUMNS = 16
#: rows of a table that share a digest
RANGE = 256
#: sums of each block, and blocks of a weight; a table has a block for each range
SUMS, BLOCKS = 8, 4
#: one unit of a stored sum, in standard deviations of the sum
UNIT = 2.0**-12
#: what the digests are of; float32 first
ROUNDINGS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WeightDigest:
    """What is kept of one weight.

    Attributes:
        digests: of each range of rows, one for all of a weight that is no table: three hexadecimal numbers, of the
            values in float32, bfloat16 and float16.
        tail: of each row of a table's last two ranges at most: the same, 32 bits each.
        rms: root of the mean square of the samples.
        sums: signed sums, in standard deviations: int16 in units of `UNIT`, little-endian, base64.
    """

    digests: list[str]
    tail: list[str]
    rms: float
    sums: str

    def as_dict(self) -> dict[str, Any]:
        """As `spectune.json` has it; without `tail` where there is none."""
        tail = {"tail": self.tail} if self.tail else {}
        return {"digests": self.digests, **tail, "rms": self.rms, "sums": self.sums}


@torch.no_grad()
def digest(weight: Tensor, *, table: bool = False, scale: Tensor | None = None) -> WeightDigest:
    """The digest of `weight` `[rows, columns]`, or of `weight * scale` (`scale` `[rows, 1]`), on any device. `table`:
    rows may be added later, and what is said of the others stays."""
    sample = sampled(weight, TABLE_COLUMNS if table else columns_read(*weight.shape)).float()
    if scale is not None:
        sample = sample * scale
    columns = _odd(torch.arange(sample.shape[1], device=sample.device))
    rows = _mixed(torch.stack([_row_sums(sample, columns, dtype) for dtype in ROUNDINGS], 1))  # [rows, 3]
    size = RANGE if table else max(len(rows), 1)
    weighted = rows * _odd(torch.arange(len(rows), device=rows.device) + 2**40)[:, None]
    ranges = [part.sum(0) for part in torch.split(weighted, size)]
    tail = rows[tail_begins(len(rows)) :] if table else rows[:0]
    rms, sums = _sums(sample, table)
    return WeightDigest(
        digests=[_hexadecimal(found, 16) for found in torch.stack(ranges).tolist()] if ranges else [],
        tail=[_hexadecimal(row, 8) for row in (tail & 0xFFFFFFFF).tolist()], rms=rms, sums=sums,
    )  # fmt: skip


def is_whole(part: Mapping[str, Any]) -> bool:
    """Whether what a file has of a weight (kind, shape and `WeightDigest.as_dict`) is as much as `digest` gives."""
    rows = part["shape"][0] if part["shape"] else 1
    table = part["kind"] in TABLES
    ranges = -(-rows // RANGE) if table else 1
    blocks = max(1, ranges) if table else BLOCKS
    return (
        len(part["digests"]) == ranges
        and len(part.get("tail", ())) == (rows - tail_begins(rows) if table else 0)
        and "rms" in part
        and len(base64.b64decode(part.get("sums", ""))) == 2 * SUMS * blocks
    )


def tail_begins(rows: int) -> int:
    """The first row of a table of so many rows that has a digest of its own."""
    return max(0, (rows // RANGE - 1) * RANGE)


def columns_read(rows: int, columns: int) -> int:
    """How many columns of each row are read of a matrix of this shape."""
    if rows * columns <= WHOLE:
        return columns
    return min(columns, max(FEWEST, min(COLUMNS, 1 << max(0, (SAMPLES // rows).bit_length() - 1))))


def sampled(weight: Tensor, width: int) -> Tensor:
    """`width` neighbouring columns of each row of `weight` `[rows, columns]`: `[rows, width]`. Row `i` begins at column
    `(i % m) width`, `m` being what the row has room for; the last place ends with the row."""
    if width >= weight.shape[1]:
        return weight
    if weight.element_size() == 1:  # float8 has few operations
        return _moving_columns(weight.view(torch.uint8), width).view(weight.dtype)
    return _moving_columns(weight, width)


def _moving_columns(weight: Tensor, width: int) -> Tensor:
    rows, columns = weight.shape
    places = -(-columns // width)
    if columns % width:
        begins = ((torch.arange(rows, device=weight.device) % places) * width).clamp(max=columns - width)
        return weight.gather(1, begins[:, None] + torch.arange(width, device=weight.device))
    # a view of the diagonal: nothing else of the weight is read
    down, right = weight.stride()
    groups, rest = divmod(rows, places)
    begin, step = weight.storage_offset(), (places * down, down + width * right, right)
    found = weight.new_empty(rows, width)
    found[: rows - rest].view(groups, places, width).copy_(weight.as_strided((groups, places, width), step, begin))
    found[rows - rest :] = weight.as_strided((rest, width), step[1:], begin + (rows - rest) * down)
    return found


def sums_of(text: str) -> np.ndarray[Any, Any]:
    """The sums of a `WeightDigest`, in standard deviations, float64 `[blocks, SUMS]`."""
    return np.frombuffer(base64.b64decode(text), dtype="<i2").astype(np.float64).reshape(-1, SUMS) * UNIT


def _row_sums(sample: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 `[rows]` of `sample` `[rows, width]`, float32, its values rounded to `dtype`, weighted by `columns`."""
    # as float32 again: values that were rounded before have one digest in both
    bits = (sample.to(dtype).float() + 0.0).view(torch.int32)  # no -0.0
    found = sample.new_empty(len(sample), dtype=torch.int64)
    # piece by piece, which a processor's cache holds: int64 is four times as large as bfloat16
    piece = max(1, 2**18 // max(1, sample.shape[1]))
    if sample.device.type != "cpu":
        piece = max(1, len(sample))
    for begin in range(0, len(sample), piece):
        found[begin : begin + piece] = (bits[begin : begin + piece] * columns).sum(1)
    return found


def _sums(sample: Tensor, table: bool) -> tuple[float, str]:
    rows, width = sample.shape
    rms = float(sample.square().mean().sqrt()) if sample.numel() else 0.0
    if not math.isfinite(rms) or rms == 0:
        rms = 0.0
    block = RANGE * width if table else -(-sample.numel() // (BLOCKS * SUMS)) * SUMS
    blocks = max(1, -(-rows // RANGE)) if table else BLOCKS
    signs = [_mixed(torch.arange(n, device=sample.device) + 2**41).sign() for n in (rows, width)]
    signed = (sample * signs[0][:, None] * signs[1]).flatten()
    signed = torch.nn.functional.pad(signed, (0, blocks * block - signed.numel()))
    found = signed.view(blocks, -1, SUMS).sum(1) / (rms * math.sqrt(max(1, block // SUMS)) or 1.0)
    units = (found / UNIT).nan_to_num().round().clamp(-(2**15), 2**15 - 1)
    return rms, base64.b64encode(units.cpu().numpy().astype("<i2").tobytes()).decode()


def _odd(numbers: Tensor) -> Tensor:
    return _mixed(numbers) | 1


def _mixed(x: Tensor) -> Tensor:
    """Of int64, modulo 2^64: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), whose shifts are unsigned."""
    x = x - 0x61C8864680B583EB
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))


def _hexadecimal(numbers: list[int], digits: int) -> str:
    return " ".join(f"{number & (2 ** (4 * digits) - 1):0{digits}x}" for number in numbers)
