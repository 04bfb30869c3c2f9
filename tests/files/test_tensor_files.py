"""Safetensors as a stream: what safetensors itself writes, and a digest that notices every bit."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune.errors import DataError
from spectune.files import tensor_file
from spectune.files.digests import Digest, check_files, digest_of
from spectune.files.tensor_file import write_tensors

DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.int16, torch.uint16,
    torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.complex64, torch.float64,
    torch.int64, torch.uint64,
)  # fmt: skip
CURE = "Copy it again"


def test_the_file_is_byte_for_byte_what_safetensors_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randn(3, 5, generator=generator).abs().to(dtype) for dtype in DTYPES}
    tensors |= {f"small{i}": torch.randn(i, generator=generator) for i in range(40)}
    tensors |= {f"large{i}": torch.randn(2**14 + i, generator=generator) for i in range(3)}
    tensors |= {"scalar": torch.tensor(1.0), 'é "\\ \n\x01\x7f': torch.zeros(0, 4)}
    for chunk, small in ((2**23, 2**16), (100, 30), (2**12, 2**11)):
        monkeypatch.setattr(tensor_file, "_CHUNK", chunk)
        monkeypatch.setattr(tensor_file, "_SMALL", small)
        for given, metadata in ((tensors, {"format": "pt"}), (tensors, None), ({}, None)):
            found = write_tensors(tmp_path / "ours", given, metadata)
            save_file(given, tmp_path / "theirs", metadata)
            assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
            assert found == digest_of(tmp_path / "ours") == digest_of(tmp_path / "theirs")


def test_views_and_shared_and_tracked_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4).requires_grad_()
    odd = torch.view_as_complex(torch.randn(4, 2)).conj()
    given = {"turned": whole.t(), "row": whole[1], "again": whole, "wide": whole[:, :1].expand(3, 5), "odd": odd}
    write_tensors(tmp_path / "file", given)
    read = load_file(tmp_path / "file")
    assert all(torch.equal(read[name], tensor) for name, tensor in given.items())


def test_a_type_that_safetensors_has_not_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x is torch"):
        write_tensors(tmp_path / "file", {"x": torch.zeros(1, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_no_second_copy_of_the_tensors_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's memory alone; torch's own is one tensor at a time, and only where it has to be copied."""
    monkeypatch.setattr(tensor_file, "_CHUNK", 2**18)
    tensors = {str(i): torch.zeros(2**16) for i in range(16)} | {f"s{i}": torch.zeros(2**10) for i in range(1024)}
    tracemalloc.start()
    write_tensors(tmp_path / "file", tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "file").stat().st_size > 2**23
    assert peak < 2**21


def test_every_flipped_bit_and_every_other_length_is_noticed(tmp_path: Path) -> None:
    digests = {"a": write_tensors(tmp_path / "a", {"x": torch.arange(3.0)})}
    content = (tmp_path / "a").read_bytes()
    check_files(tmp_path, digests, CURE)
    changed = [content[:-1], content + b"\0", b""]
    chance = random.Random(0)
    for place in range(len(content)):
        changed.append(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])
    for other in changed:
        (tmp_path / "a").write_bytes(other)
        with pytest.raises(DataError, match=f"not the ones that were written. {CURE}\na: "):
            check_files(tmp_path, digests, CURE)


def test_all_that_is_wrong_with_files_is_listed_and_nothing_else_is_opened(tmp_path: Path) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    for name in ("same", "other", "best/same"):
        (tmp_path / "run" / name).write_text(name)
    known = digest_of(tmp_path / "run" / "same")
    (tmp_path / "outside").write_text("same")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "outside")
    names = ("same", "other", "missing", "link", "best", "best/same", "../outside", "/dev/zero", "", "..", "a\0b")
    with pytest.raises(DataError) as refused:
        check_files(tmp_path / "run", dict.fromkeys(names, known), CURE)
    said = "\n".join(refused.value.problems)
    assert len(refused.value.problems) == len(names) - 1
    for words in (
        "other: has 5 bytes, 4 were", "missing: is missing", "link is a link to", "best is a folder",
        "best/same: has 9", "'../outside': leads out", "'/dev/zero': leads out",
    ):  # fmt: skip
        assert words in said


@pytest.mark.parametrize("damaged", [{"bytes": -1, "sha256": "0" * 64}, {"bytes": 1, "sha256": "0"}, {"bytes": "1"}])
def test_a_digest_is_a_size_and_64_digits(damaged: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Digest.model_validate(damaged)
