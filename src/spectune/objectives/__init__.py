"""What a model is trained for: the head it is loaded with, what a batch holds, and the loss of a batch."""

from spectune.objectives.causal_lm import CAUSAL_LM, CausalLM, LabelledLogits, TokenLosses

__all__ = ["CAUSAL_LM", "CausalLM", "LabelledLogits", "TokenLosses"]
