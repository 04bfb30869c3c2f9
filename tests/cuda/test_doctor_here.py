"""On a CUDA device: what `spectune doctor` looks at there and nowhere else works."""

from __future__ import annotations

import pytest
import torch

from spectune.health import compiling, numbers
from spectune.health.outcome import FAILED, OK

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:TensorFloat32")]


def test_a_graph_is_recorded_and_replayed() -> None:
    assert compiling.recorded_graph().status == OK


def test_a_block_is_compiled() -> None:
    assert compiling.compiled_block().status == OK
    torch._dynamo.reset()


def test_products_in_few_bits() -> None:
    assert numbers.fp8().status != FAILED
    assert numbers.codes().status != FAILED


def test_attention() -> None:
    assert numbers.attention().status == OK
