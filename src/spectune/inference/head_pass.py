"""What a model's head says of texts."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from spectune.compute.evaluating import evaluating
from spectune.data import LabelledExample, by_length, collate
from spectune.objectives import objective_of


def head_outputs(
    model: PreTrainedModel, examples: Sequence[LabelledExample], pad_token_id: int, batch_size: int = 16
) -> list[Tensor]:
    """The head's outputs of each text, in the order given, under the model's current route: float32 on the host,
    `[labels]`; of texts whose words have classes `[words, labels]`, at each word's first token.

    Evaluation mode, no gradient; in batches of like length, the longest first.
    """
    found: dict[int, Tensor] = {}
    with evaluating(model):
        for members in by_length(range(len(examples)), [example.length for example in examples], batch_size):
            batch = collate([examples[index] for index in members], pad_token_id)
            given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            logits = model(**objective_of(model).inputs(model, given)).logits.float().cpu()
            for index, of_text in zip(members, logits, strict=True):
                example = examples[index]
                found[index] = of_text if example.label is not None else of_text[example.places.tolist()]
    return [found[index] for index in range(len(examples))]
