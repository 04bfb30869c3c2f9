"""What a model does with no gradient: generation, the likelihood of rows and choices, decoding speed."""

from spectune.data.answered import answered_choice
from spectune.inference.answers import UNLIMITED, answer_of, decoded, last_examples, shortened, up_to_stop
from spectune.inference.decode import decode_tokens_per_second
from spectune.inference.drawing import Sampling
from spectune.inference.engine import Engine
from spectune.inference.generate import context_length, generate_ids, generate_texts, stop_ids
from spectune.inference.head_pass import head_outputs
from spectune.inference.likelihood import (
    CHOICE_NORMALIZATIONS,
    ChoiceScores,
    choice_log_likelihoods,
    row_loss_sums,
    target_likelihoods,
)
from spectune.inference.modes import seeded, wait_for
from spectune.inference.out_of_memory import halving
from spectune.inference.request import Request, Ticket, Written
from spectune.inference.warming import warm_up

__all__ = [
    "CHOICE_NORMALIZATIONS", "UNLIMITED", "ChoiceScores", "Engine", "Request", "Sampling", "Ticket", "Written",
    "answer_of", "answered_choice", "choice_log_likelihoods", "context_length", "decode_tokens_per_second", "decoded",
    "generate_ids", "generate_texts", "halving", "head_outputs", "last_examples", "row_loss_sums", "seeded",
    "shortened", "stop_ids", "target_likelihoods", "up_to_stop", "wait_for", "warm_up",
]  # fmt: skip
