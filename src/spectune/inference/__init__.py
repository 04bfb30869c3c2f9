"""What a model does with no gradient: generation, the likelihood of rows and choices, decoding speed."""

from spectune.inference.decode import decode_tokens_per_second
from spectune.inference.generate import Sampling, context_length, generate_ids, generate_texts, stop_ids
from spectune.inference.likelihood import ChoiceScores, choice_log_likelihoods, row_loss_sums, target_likelihoods
from spectune.inference.modes import seeded, wait_for
from spectune.inference.out_of_memory import halving, is_out_of_memory

__all__ = [
    "ChoiceScores", "Sampling", "choice_log_likelihoods", "context_length", "decode_tokens_per_second",
    "generate_ids", "generate_texts", "halving", "is_out_of_memory", "row_loss_sums", "seeded", "stop_ids",
    "target_likelihoods", "wait_for",
]  # fmt: skip
