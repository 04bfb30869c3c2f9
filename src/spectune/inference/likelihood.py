"""How likely a model finds given text: the loss of each row, and the likelihood of each choice of a row."""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune.compute.evaluating import evaluating
from spectune.data import Example, Row, by_length, collate, encode, pad_token_id
from spectune.data.answered import answer_of, answered_choice, bare
from spectune.errors import DataError
from spectune.families import vocabulary_rows
from spectune.inference.answers import UNLIMITED, last_examples, shortened
from spectune.objectives import CAUSAL_LM, objective_of

#: how choices of unlike length are compared: by log p, by its mean over their tokens, or over their UTF-8 bytes
CHOICE_NORMALIZATIONS = ("sum", "token", "byte")


def row_loss_sums(
    model: PreTrainedModel, examples: Sequence[Example], pad_token_id: int, batch_size: int = 16
) -> tuple[list[float], list[int]]:
    """The loss of each example summed over its target tokens (nats, float32 terms summed in float64), and their
    number, in the order given. Evaluation mode, no gradient, the model's current route.

    Examples run in batches of like length, the longest first, so that memory that does not suffice shows at once.
    """
    sums = [0.0] * len(examples)
    counts = [0] * len(examples)
    objective = objective_of(model)
    with evaluating(model):
        for members, batch in _batches(model, examples, pad_token_id, batch_size):
            found = objective.token_losses(model, batch)
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
    objective = objective_of(model)
    for members in by_length(range(len(examples)), [example.length for example in examples], batch_size):
        batch = collate([examples[index] for index in members], pad_token_id)
        objective.precompute(batch)
        yield members, {name: tensor.to(model.device) for name, tensor in batch.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class ChoiceScores:
    """What a model gives each choice of one row."""

    log_likelihoods: tuple[float, ...]
    """log p(choice, EOS | prompt) in nats, in the order of the row's choices."""
    target_tokens: tuple[int, ...]
    """Tokens of each choice, EOS included."""
    target_bytes: tuple[int, ...]
    """UTF-8 bytes of each choice, as the row has it."""

    @property
    def best(self) -> int:
        """Index of the choice with the largest log p."""
        return self.likeliest()

    def likeliest(self, normalization: str = "sum") -> int:
        """Index of the likeliest choice: by log p ("sum"), by log p for each of its tokens ("token"), or for each of
        its bytes ("byte")."""
        sizes = {"token": self.target_tokens, "byte": self.target_bytes}.get(normalization, ())
        values = self.log_likelihoods
        if sizes:
            values = tuple(value / max(size, 1) for value, size in zip(values, sizes, strict=True))
        return max(range(len(values)), key=values.__getitem__)


def choice_log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, max_length: int,
    separator: str = "", batch_size: int = 16, train_on: str = "all", today: str | None = None
) -> list[ChoiceScores]:  # fmt: skip
    """The likelihood of every choice of every row, each written exactly as training would write it after the prompt,
    EOS included: "yes" is then not favoured over "yes, sir" for being its beginning.

    Where the row's own answer is one of them but for outer white space, this is put around all of them. All choices of
    a row are scored whole, on the same prompt; one that does not fit loses its beginning, up to where the longest
    choice fits.

    Args:
        max_length: tokens of prompt and choice together, as in training.
        separator, train_on, today: as in training, see `spectune.data.encode`.

    Raises:
        DataError: a row without choices or without a prompt, with two choices that are the same tokens, or with one
            that leaves no room for a token of the prompt; all of them at once. Or one that `encode` refuses.
    """
    problems = [f"{row.origin}: {wrong}" for row in rows if (wrong := _unfit(row))]
    if problems:
        raise DataError("rows whose choices cannot be compared", problems)
    if not rows:
        return []
    completed = [[row.answered_with(choice) for choice in choices_as_trained(row)] for row in rows]
    flat = [answered for of_row in completed for answered in of_row]
    how: dict[str, Any] = {"separator": separator, "train_on": train_on, "today": today}
    found = last_examples(encode(flat, tokenizer, max_length=UNLIMITED, **how).examples)
    examples: list[Example] = []
    for row, of_row in zip(rows, completed, strict=True):
        encoded = [found[id(answered)] for answered in of_row if id(answered) in found]
        if len(encoded) < len(of_row):
            problems.append(f"{row.origin}: {len(of_row) - len(encoded)} of its choices have no token to score")
            continue
        prompt, targets = _parted(encoded)
        if wrong := _incomparable(row, prompt, targets, max_length):
            problems.append(f"{row.origin}: {wrong}")
            continue
        prompt = shortened(prompt, max_length - max(map(len, targets)), tokenizer.bos_token_id)
        examples += [Example([*prompt, *target], len(prompt), row) for target in targets]
    if problems:
        raise DataError("rows whose choices cannot be compared", problems)
    scored = zip(
        *row_loss_sums(model, examples, pad_token_id(tokenizer, vocabulary_rows(model)), batch_size), strict=True
    )
    scores = []
    for row in rows:
        sums, counts = zip(*itertools.islice(scored, len(row.choices)), strict=True)
        sizes = tuple(len(choice.encode()) for choice in row.choices)
        scores.append(ChoiceScores(tuple(-total for total in sums), counts, sizes))
    return scores


def choices_as_trained(row: Row) -> tuple[str, ...]:
    """The row's choices, with the outer white space of its own answer around each, where the answer is one of them."""
    answer = answer_of(row)
    if answer is None or answer in row.choices or answered_choice(row) is None:
        return row.choices
    before = answer[: len(answer) - len(answer.lstrip())]
    behind = answer[len(answer.rstrip()) :]
    return tuple(
        answer if bare(choice) == bare(answer) else f"{before}{choice.strip()}{behind}" for choice in row.choices
    )


def _unfit(row: Row) -> str | None:
    if not row.choices:
        return "no choices; expected a list of texts under `choices`"
    if row.prompt is None and not row.messages:
        return "no prompt; expected `prompt` or `messages` beside the choices"
    return None


def _parted(encoded: Sequence[Example]) -> tuple[list[int], list[list[int]]]:
    """What all choices of a row stand behind, and what stands there of each."""
    prompts = [example.input_ids[: example.answer_start] for example in encoded]
    # templates that look at the answer before they write the prompt are none that we know; the score is right even so
    shared = len(os.path.commonprefix(prompts))  # noqa: RUF071
    return prompts[0][:shared], [example.input_ids[shared:] for example in encoded]


def _incomparable(row: Row, prompt: list[int], targets: Sequence[list[int]], max_length: int) -> str | None:
    first: dict[tuple[int, ...], int] = {}
    for place, target in enumerate(targets):
        if (other := first.setdefault(tuple(target), place)) != place:
            twins = f"{row.choices[other]!r} and {row.choices[place]!r}"
            return f"its choices {twins} are the same tokens; expected choices that differ"
    choice, longest = max(zip(row.choices, map(len, targets), strict=True), key=lambda pair: pair[1])
    if not prompt:
        return "its prompt has no token; expected at least one to score its choices after"
    if longest >= max_length:
        short = choice if len(choice) <= 40 else choice[:40] + "..."
        return (
            f"its choice {short!r} has {longest} tokens, and max_length = {max_length} has room for "
            f"{max_length - 1} beside one token of the prompt; raise max_length or shorten the choice"
        )
    return None
