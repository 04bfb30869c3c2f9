"""What a model is trained for: the head it is loaded with, what a batch holds, and the loss of a batch."""

from spectune.objectives.causal_lm import CAUSAL_LM, CausalLM, LabelledLogits
from spectune.objectives.choice import TASK_TYPES, objective_for, objective_of
from spectune.objectives.objective import Objective, TokenLosses
from spectune.objectives.sequence_classification import SEQ_CLS, SEQ_REGRESSION, padding_of
from spectune.objectives.token_classification import TOKEN_CLS

__all__ = [
    "CAUSAL_LM", "SEQ_CLS", "SEQ_REGRESSION", "TASK_TYPES", "TOKEN_CLS", "CausalLM", "LabelledLogits", "Objective",
    "TokenLosses", "objective_for", "objective_of", "padding_of",
]  # fmt: skip
