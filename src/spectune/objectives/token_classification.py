"""Token classification: a class for each scored token, in its own place (labels are not shifted).

Of a word in several tokens the first is scored, as transformers' token classification example has it; the others, and
padding, are labelled -100.
"""

from typing import Any

from transformers import AutoModelForTokenClassification

from spectune.objectives.labelled_places import LabelledPlaces


class TokenClassification(LabelledPlaces):
    """A class for each scored token: cross entropy in nats, summed over them. `labels` `[batch, length]` int64."""

    task_type = "TOKEN_CLS"
    auto_class: Any = AutoModelForTokenClassification


TOKEN_CLS = TokenClassification()
