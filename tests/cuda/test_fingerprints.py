"""On a CUDA device: a base has the same fingerprint as on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from spectune.families import describe, differences, fingerprint
from spectune.families.weight_digest import COLUMNS, WHOLE, digest
from tests.support import make_model

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:TensorFloat32")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_digests_are_the_same_bits_on_every_device(dtype: torch.dtype) -> None:
    # tiny numbers too, which float16 holds in fewer bits; read whole, in columns, of rows that do not divide by them
    for shape, scale in (((40, 30), 1.0), ((700, 512), 1e-5), ((700, 500), 0.02), ((1, 33), 1.0)):
        weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
        assert weight.numel() <= WHOLE or shape[1] > COLUMNS
        for table in (False, True):
            assert digest(weight, table=table).digests == digest(weight.cuda(), table=table).digests
            assert digest(weight, table=table).tail == digest(weight.cuda(), table=table).tail


def test_a_base_is_the_same_on_every_device() -> None:
    model = make_model()
    family = describe(model)
    here = fingerprint(model, family)
    there = fingerprint(copy.deepcopy(model).cuda().to(torch.bfloat16), family)
    assert differences(here, there) == []
    changed = copy.deepcopy(model).cuda()
    changed.get_submodule(family.linears[3].path).weight.data[5].neg_()
    assert differences(here, fingerprint(changed, family))[0].startswith("1 of 8 linears differ")
