"""Attention over documents of various lengths, against a plain one in float64; and how flash attention is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from spectune.compute import varlen
from spectune.compute.pack_layout import Pack, Spans
from spectune.compute.varlen import flash_by_document, loop_by_document

CPU = torch.device("cpu")


def plain(
    query: Tensor, key: Tensor, value: Tensor, queries: Spans, keys: Spans, scale: float | None, window: int | None
) -> Tensor:
    """Softmax over what each query may see, one query at a time."""
    group = query.shape[1] // key.shape[1]
    found = torch.zeros(*query.shape[:2], value.shape[-1], dtype=torch.float64)
    q0 = k0 = 0
    for count, seen in zip(queries.lengths, keys.lengths, strict=True):
        for i in range(count):
            last = seen - count + i  # the last query sees the last key
            first = 0 if window is None else max(0, last - window + 1)
            for head in range(query.shape[1]):
                k, v = (t[k0 + first : k0 + last + 1, head // group].double() for t in (key, value))
                scores = k @ query[q0 + i, head].double() * (query.shape[-1] ** -0.5 if scale is None else scale)
                found[q0 + i, head] = torch.softmax(scores, 0) @ v
        q0, k0 = q0 + count, k0 + seen
    return found


def tensors(queries: Spans, keys: Spans, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(queries.lengths))
    shapes = [(sum(queries.lengths), heads, 8), *[(sum(keys.lengths), kv_heads, 8)] * 2]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from([None, 1, 3, 20]),
    st.sampled_from([None, 0.3]),
)
def test_the_loop_is_the_plain_one(lengths: list[int], lead: int, window: int | None, scale: float | None) -> None:
    queries, keys = Spans(lengths, CPU), Spans([lead + length for length in lengths], CPU)
    q, k, v = tensors(queries, keys)
    found = loop_by_document(q, k, v, queries, keys, scale=scale, window=window)
    torch.testing.assert_close(found.double(), plain(q, k, v, queries, keys, scale, window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("old", [False, True], ids=["with enable_gqa", "torch 2.11"])
@pytest.mark.parametrize("window", [None, 3])
def test_flash_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch, window: int | None, old: bool) -> None:
    """The kernel itself runs on CUDA alone: here something else stands in that does what its documentation says."""

    def documented(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        queries, keys = (Spans(bounds.diff().tolist(), CPU) for bounds in (cu_seq_q, cu_seq_k))
        assert (queries.longest, keys.longest) <= (max_q, max_k) == (queries.most, keys.most) == (16, 16)
        assert enable_gqa or query.shape[1] == key.shape[1]
        left, right = window_size
        assert right == 0
        return plain(query, key, value, queries, keys, scale, None if left == -1 else left + 1).float()

    def before(*args: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        return documented(*args, scale=scale, window_size=window_size)

    monkeypatch.setattr(torch_varlen, "varlen_attn", before if old else documented)
    queries, keys = Spans([4, 2, 5], CPU), Spans([6, 4, 7], CPU)
    q, k, v = tensors(queries, keys)
    found = flash_by_document(q, k, v, queries, keys, scale=0.2, window=window)
    torch.testing.assert_close(found, loop_by_document(q, k, v, queries, keys, scale=0.2, window=window))


def test_the_installed_kernel_has_the_arguments() -> None:
    import inspect

    known = inspect.signature(torch_varlen.varlen_attn).parameters
    assert {"scale", "window_size"} <= set(known)
    assert known["window_size"].default == (-1, -1)


def test_flash_takes_sixteen_bits_on_cuda_alone() -> None:
    assert not varlen.flash_takes(*[torch.zeros(1, 1, 8, dtype=torch.bfloat16)] * 3)
    on_meta = [torch.zeros(1, 1, 8, dtype=torch.bfloat16, device="meta")] * 3
    assert varlen.flash_takes(*on_meta)
    assert not varlen.flash_takes(*[t.float() for t in on_meta])
    assert not varlen.flash_takes(on_meta[0][..., :4], on_meta[1], on_meta[2])
    assert not varlen.flash_takes(on_meta[0], on_meta[1], on_meta[2].repeat(1, 1, 2))


def test_a_pack_knows_its_documents() -> None:
    pack = Pack.of(torch.tensor([[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]]), CPU)
    assert pack.lengths == ((3, 2), (2,))
    assert pack.documents.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    assert pack.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert pack.spans.lengths == (3, 2, 2, 3)
    assert pack.spans.bounds.tolist() == [0, 3, 5, 7, 10]
    assert pack.longest == 3
    index, spans = pack.with_lead((2,))
    assert index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 0, 1, 7, 8, 0, 1, 9, 10, 11]
    assert spans.lengths == (5, 4, 4, 5)
    index, spans = pack.with_lead((1, 2))
    assert index.tolist() == [0, 3, 4, 5, 0, 6, 7, 1, 2, 8, 9, 1, 2, 10, 11, 12]
    assert spans.lengths == (4, 3, 4, 5)
    seen = pack.mask(2)[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_virtual_tokens_go_before_each_document() -> None:
    pack = Pack.of(torch.tensor([[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]]), CPU)
    longer, source, moved = pack.grown((2,))
    assert longer.lengths == ((5, 4), (4,))
    assert source.tolist() == [[-1, -2, 0, 1, 2, -1, -2, 3, 4], [-1, -2, 0, 1, 0, 0, 0, 0, 0]]
    assert moved.tolist() == [[2, 3, 4, 7, 8], [2, 3, 0, 0, 0]]
    longer, source, moved = pack.grown((0, 2))
    assert longer.lengths == ((3, 2), (4,))
    assert source.tolist() == [[0, 1, 2, 3, 4], [-1, -2, 0, 1, 0]]
    assert moved.tolist() == [[0, 1, 2, 3, 4], [2, 3, 0, 0, 0]]


@pytest.mark.parametrize("documents", [[0, 1, 0], [0, -1, 1], [-1, 0, 0]])
def test_documents_in_pieces_are_refused(documents: list[int]) -> None:
    with pytest.raises(ValueError, match="each in one piece"):
        Pack.of(torch.tensor([documents]), CPU)
