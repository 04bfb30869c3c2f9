"""What is known of model architectures, found by structure: no table of model names."""

from spectune.families.base_comparison import BaseComparison, compare_bases, differences
from spectune.families.base_fingerprint import fingerprint
from spectune.families.base_identity import BaseIdentity
from spectune.families.base_samples import sample_differences
from spectune.families.biases import Bias
from spectune.families.family import Family, FeedForward, Layer, Linear, describe, family_from_config
from spectune.families.matrices import Matrix
from spectune.families.module_kinds import embedding_width, linear_shape, token_embedding, vocabulary_rows
from spectune.families.norms import Norm
from spectune.families.other_modules import OtherModule
from spectune.families.parts import Slice
from spectune.families.quantised import base_precision, dense_weight, quantised_weights
from spectune.families.self_attention import Attention
from spectune.families.trained_head import HeadPart
from spectune.families.weight_digest import is_whole

__all__ = [
    "Attention", "BaseComparison", "BaseIdentity", "Bias", "Family", "FeedForward", "HeadPart", "Layer", "Linear",
    "Matrix", "Norm", "OtherModule", "Slice", "base_precision", "compare_bases", "dense_weight", "describe",
    "differences", "embedding_width", "family_from_config", "fingerprint", "is_whole", "linear_shape",
    "quantised_weights", "sample_differences", "token_embedding", "vocabulary_rows",
]  # fmt: skip
