from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from spectune.inference import Sampling
from spectune.inference.drawing import draw, likelihoods

LOGITS = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(top_k=5),
        Sampling(top_p=0.6),
        Sampling(temperature=2.0, top_k=20, top_p=0.8),
        Sampling(top_k=1),
        Sampling(top_p=1e-9),
        Sampling(top_k=500),
    ],
)
def test_each_token_has_the_share_of_numbers_that_transformers_gives_it(sampling: Sampling) -> None:
    count = 20_000
    numbers = [(index + 0.5) / count for index in range(count)]
    found = draw(LOGITS.expand(count, -1), [sampling] * count, numbers).bincount(minlength=50) / count
    scores = TemperatureLogitsWarper(sampling.temperature)(None, LOGITS.double())
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    expected = scores.softmax(-1)[0]
    assert torch.equal(found > 0, expected > 1 / count) or float((found - expected).abs().max()) < 1 / count
    assert torch.allclose(found, expected.float(), atol=1.5 / count)


def test_rows_are_drawn_each_by_its_own_settings() -> None:
    settings = [Sampling(), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(temperature=0.1)]
    numbers = [0.9, 0.5, 0.999, 0.0]
    rows = LOGITS + torch.arange(4)[:, None] * LOGITS.flip(-1)
    together = draw(rows, settings, numbers)
    alone = [draw(rows[n : n + 1], [settings[n]], [numbers[n]])[0] for n in range(4)]
    assert together.tolist() == [int(token) for token in alone]


def test_the_largest_number_draws_a_token_that_has_a_share() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    assert draw(logits, [Sampling()], [1 - 2**-53]).tolist() == [1]
    assert draw(logits, [Sampling()], [0.0]).tolist() == [0]
    assert draw(logits.flip(-1), [Sampling()], [0.0]).tolist() == [2]
    assert 0 <= int(draw(logits * torch.nan, [Sampling(top_p=0.5)], [0.5])) < 4


def test_likelihoods_are_of_the_rows_that_asked() -> None:
    found = likelihoods(LOGITS.expand(3, -1), torch.tensor([4, 5, 6]), {0: 2, 2: 0})
    logs = LOGITS.double().log_softmax(-1)[0]
    assert set(found) == {0, 2}
    assert found[0][0] == pytest.approx(float(logs[4]), abs=1e-5)
    assert [token for token, _ in found[0][1]] == logs.topk(2).indices.tolist()
    assert found[2] == (pytest.approx(float(logs[6]), abs=1e-5), ())
    assert likelihoods(LOGITS, torch.tensor([4]), {}) == {}
