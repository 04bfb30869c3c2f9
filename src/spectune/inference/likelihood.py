"""How likely a model finds given text: the loss of each row, and the likelihood of each choice of a row."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.compute.evaluating import evaluating
from spectune.data import Example, Row, by_length, collate, encode, pad_token_id
from spectune.errors import DataError
from spectune.objectives import CAUSAL_LM


def row_loss_sums(
    model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int, batch_size: int = 16
) -> tuple[list[float], list[int]]:
    """The loss of each example summed over its target tokens (nats, float32 terms summed in float64), and their
    number, in the order given. Evaluation mode, no gradient, the model's current route.

    Examples run in batches of like length, the longest first, so that memory that does not suffice shows at once.
    """
    sums = [0.0] * len(examples)
    counts = [0] * len(examples)
    with evaluating(model):
        for members, batch in _batches(model, examples, pad_token_id, batch_size):
            found = CAUSAL_LM.token_losses(model, batch)
            for row, loss in zip(found.rows.tolist(), found.losses.tolist(), strict=True):
                sums[members[row]] += loss
                counts[members[row]] += 1
    return sums, counts


def target_likelihoods(
    model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int, batch_size: int = 16
) -> list[tuple[float, bool]]:
    """For each example log p(targets | what stands before) in nats, and whether greedy decoding would write them."""
    sums = [0.0] * len(examples)
    greedy = [True] * len(examples)
    with evaluating(model):
        for members, batch in _batches(model, examples, pad_token_id, batch_size):
            found = CAUSAL_LM.labelled_logits(model, batch)
            losses = F.cross_entropy(found.logits.float(), found.targets, reduction="none")
            likeliest = found.logits.argmax(-1) == found.targets
            for row, loss, is_likeliest in zip(found.rows.tolist(), losses.tolist(), likeliest.tolist(), strict=True):
                sums[members[row]] -= loss
                greedy[members[row]] &= is_likeliest
    return list(zip(sums, greedy, strict=True))


def _batches(
    model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int, batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches on the model's device, the longest examples first, each with the indices of its examples."""
    for members in by_length(range(len(examples)), [len(example.input_ids) for example in examples], batch_size):
        batch = collate([examples[index] for index in members], pad_token_id)
        yield members, {name: tensor.to(model.device) for name, tensor in batch.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class ChoiceScores:
    """What a model gives each choice of one row."""

    log_likelihoods: tuple[float, ...]
    """log p(choice, EOS | prompt) in nats, in the order of the row's choices."""
    target_tokens: tuple[int, ...]
    """Tokens of each choice, EOS included."""

    @property
    def best(self) -> int:
        """Index of the likeliest choice; the first of equals."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)


def choice_log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, max_length: int,
    separator: str = "", batch_size: int = 16
) -> list[ChoiceScores]:  # fmt: skip
    """The likelihood of every choice of every row, each written exactly as training would write it after the prompt,
    EOS included: "yes" is then not favoured over "yes, sir" for being its beginning.

    Args:
        max_length: tokens of prompt and choice together, as in training.
        separator: what stands between prompt and completion, as in training.

    Raises:
        DataError: a row without choices or without a prompt, or one that `encode` refuses; all of them at once.
    """
    problems = [f"{row.origin}: {wrong}" for row in rows if (wrong := _unfit(row))]
    if problems:
        raise DataError("rows whose choices cannot be compared", problems)
    completed = [_with_completion(row, choice) for row in rows for choice in row.choices]
    examples = encode(completed, tokenizer, max_length=max_length, separator=separator).examples
    if len(examples) != len(completed):
        raise DataError(f"{len(completed) - len(examples)} of {len(completed)} choices could not be encoded")
    scored = zip(*row_loss_sums(model, examples, pad_token_id(tokenizer), batch_size), strict=True)
    found = []
    for row in rows:
        sums, counts = zip(*itertools.islice(scored, len(row.choices)), strict=True)
        found.append(ChoiceScores(tuple(-total for total in sums), counts))
    return found


def _unfit(row: Row) -> str | None:
    if not row.choices:
        return "no choices; expected a list of texts under `choices`"
    if row.prompt is None and not row.messages:
        return "no prompt; expected `prompt` or `messages` beside the choices"
    return None


def _with_completion(row: Row, choice: str) -> Row:
    """The row as a training row that was answered with `choice`."""
    if row.messages:
        return dataclasses.replace(row, messages=[*row.asked, {"role": "assistant", "content": choice}])
    return dataclasses.replace(row, completion=choice)
