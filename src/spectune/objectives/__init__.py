"""What a model is trained for: the head it is loaded with, what a batch holds, and the loss of a batch."""

from spectune.objectives.causal_lm import CAUSAL_LM, CausalLM, LabelledLogits
from spectune.objectives.objective import Objective, TokenLosses

__all__ = ["CAUSAL_LM", "CausalLM", "LabelledLogits", "Objective", "TokenLosses"]
