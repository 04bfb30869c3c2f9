"""Plans of models with heads: the step's own loss, and a head in place of the vocabulary's."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from spectune.methods import METHODS, FullFineTuning, LoRA
from spectune.planning import plan
from tests.support.quick import others_slow

CONFIG = LlamaConfig(
    vocab_size=4000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=128,
)  # fmt: skip


HEADED = [kind() for kind in METHODS]
FEW = [method for method in HEADED if method.name in ("full", "adapter", "prefix", "lora")]


@pytest.mark.parametrize("method", others_slow(HEADED, FEW), ids=lambda method: str(method.name))
def test_a_head_costs_no_logits_of_the_vocabulary_and_counts(method: object) -> None:
    assert isinstance(method, tuple(METHODS))
    words = plan(CONFIG, method, 4, 32, device="cpu", validation=4)
    head = plan(CONFIG, method, 4, 32, device="cpu", validation=4, task_type="SEQ_CLS", num_labels=5)
    assert head.logits < words.logits / 4
    assert head.validation is not None
    of_head = 64 * 5
    if isinstance(method, FullFineTuning):
        assert head.total_parameters == words.total_parameters - 64 * 4000 + of_head
        assert head.trainable_parameters == head.total_parameters
    else:
        assert head.trainable_parameters == words.trainable_parameters + of_head


def test_a_loaded_model_is_planned_as_what_it_is() -> None:
    model = LlamaForSequenceClassification(LlamaConfig(**CONFIG.to_dict() | {"num_labels": 5}))
    by_name = plan(CONFIG, LoRA(r=2), 4, 32, device="cpu", dtype="float32", task_type="SEQ_CLS", num_labels=5)
    loaded = plan(model, LoRA(r=2), 4, 32, device="cpu", dtype="float32")
    assert loaded.trainable_parameters == by_name.trainable_parameters
    assert loaded.peak_allocated == pytest.approx(by_name.peak_allocated, rel=0.01)
