"""Which objective a model is for: its class says so, and by it the head that it has."""

from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spectune.errors import ConfigError
from spectune.objectives.causal_lm import CAUSAL_LM
from spectune.objectives.labelled_places import model_inside
from spectune.objectives.objective import Objective
from spectune.objectives.sequence_classification import SEQ_CLS, SEQ_REGRESSION
from spectune.objectives.token_classification import TOKEN_CLS

#: PEFT's names
TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")
_HEADS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
_SUPPORTED = "a language-model head, or one for sequence classification, regression or token classification"


def objective_of(model: nn.Module) -> Objective:
    """What `model` is for, by its class. Raises ConfigError: another head than those that are trained here, or none."""
    inner = model_inside(model)
    names = [kind.__name__ for kind in type(inner).__mro__]
    for name in names:
        for ending, task_type in _HEADS.items():
            if name.endswith(ending):
                return objective_for(task_type, inner.config)
    double = next((name for name in names if name.endswith("DoubleHeadsModel")), None)
    if double is None and (_has_vocabulary_head(inner) or not MODEL_CLASSES.isdisjoint(names)):
        return CAUSAL_LM
    raise ConfigError(
        f"{double or type(inner).__name__} has a head that would be neither trained nor stored, or none: expected "
        f"{_SUPPORTED} (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification)"
    )


def objective_for(task_type: str, config: PretrainedConfig) -> Objective:
    """The objective that PEFT calls `task_type`, for a model of this config. Raises ConfigError: an unknown name, or a
    problem type that is not trained here."""
    if task_type == "CAUSAL_LM":
        return CAUSAL_LM
    if task_type == "TOKEN_CLS":
        return TOKEN_CLS
    if task_type != "SEQ_CLS":
        raise ConfigError(f"task_type = {task_type!r}: expected one of {', '.join(TASK_TYPES)}")
    problem, labels = getattr(config, "problem_type", None), int(config.num_labels)
    if problem == "multi_label_classification":
        raise ConfigError(
            "config.problem_type = multi_label_classification (several classes for one text) is not trained here: "
            "expected single_label_classification or regression"
        )
    if problem == "regression" and labels != 1:
        raise ConfigError(f"config.problem_type = regression with {labels} outputs: expected num_labels = 1")
    if problem == "single_label_classification" and labels == 1:
        raise ConfigError("config.problem_type = single_label_classification with one class: expected two or more")
    return SEQ_REGRESSION if labels == 1 else SEQ_CLS


def _has_vocabulary_head(model: Any) -> bool:
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


#: transformers' causal language models, for those types that do not say which module their head is
MODEL_CLASSES = frozenset(
    name
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for name in ([names] if isinstance(names, str) else names)
)
