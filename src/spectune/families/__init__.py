"""What is known of model architectures, found by structure: no table of model names."""

from spectune.families.base_fingerprint import differences, fingerprint
from spectune.families.biases import Bias
from spectune.families.family import Family, FeedForward, Layer, Linear, describe, family_from_config
from spectune.families.module_kinds import embedding_width, linear_shape, token_embedding, vocabulary_rows
from spectune.families.parts import Slice
from spectune.families.quantised import base_precision, dense_weight, quantised_weights
from spectune.families.self_attention import Attention
from spectune.families.trained_head import HeadPart

__all__ = [
    "Attention", "Bias", "Family", "FeedForward", "HeadPart", "Layer", "Linear", "Slice", "base_precision",
    "dense_weight", "describe", "differences", "embedding_width", "family_from_config", "fingerprint", "linear_shape",
    "quantised_weights", "token_embedding", "vocabulary_rows",
]  # fmt: skip
