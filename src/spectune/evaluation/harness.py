"""lm-eval-harness (EleutherAI) tasks on a tuned model, under its current route. An optional extra: `lm-eval`.

Contexts are encoded as training encodes prompts, BOS where the tokenizer puts one: what is measured is the model as it
was trained.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectune import inference
from spectune.data import Example, Row, encode, pad_token_id, prompt_ids
from spectune.errors import ConfigError, DataError, first_line
from spectune.families import vocabulary_rows
from spectune.inference import Sampling, context_length, halving, target_likelihoods

DEFAULT_LENGTH = 2048
#: the harness's own limit, where a task names none
NEW_TOKENS = 256


def check_installed() -> None:
    """Raise ConfigError, with the command that installs it, if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval-harness is not installed: pip install 'spectune[lm-eval]'")


def harness_metrics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, batch_size: int = 16,
    limit: int | None = None, include: str | Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """`{"<task>/<metric>": value}` of the harness's tasks; where a filter other than "none" was used, it stands behind
    a comma.

    Args:
        limit: only so many documents of each task.
        include: a folder with tasks (YAML) of one's own.

    Raises:
        ConfigError: lm-eval is not installed, or it knows no such task.
    """
    check_installed()
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        raise ConfigError(
            f"lm-eval tasks {', '.join(unknown) or '(none)'}: not known to lm-eval-harness; `lm-eval ls tasks` lists "
            "those it knows, and a folder with tasks of one's own can be given"
        )
    adapter: Any = type("SpectuneLM", (HarnessModel, LM), {})
    made = adapter(model, tokenizer, batch_size)
    try:
        found = lm_eval.simple_evaluate(made, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"lm-eval tasks {', '.join(tasks)}: {first_line(error)}") from error
    measured: dict[str, float] = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            name, _, kept = key.partition(",")
            if isinstance(value, int | float) and not name.endswith("_stderr") and name != "sample_len":
                measured[f"{task}/{name}" + ("" if kept in ("", "none") else f",{kept}")] = float(value)
    return measured


class HarnessModel:
    """The three questions of the harness's `LM`, answered by a model under its current route. Requests are its
    `Instance`s, of which only `args` is used."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 16) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length = min(context_length(model) or DEFAULT_LENGTH, DEFAULT_LENGTH)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each `(context, continuation)` log p in nats, and whether greedy decoding would write the continuation.

        No EOS is counted. A context that is too long loses its beginning. Spaces at its end go to the continuation,
        where the tokenizer of most bases has them.
        """
        return self._likelihoods([self._example(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For each `(text,)` log p of all its tokens, the first after BOS; a text longer than the context in windows,
        each token predicted once."""
        windows = [self._windows(str(request.args[0])) for request in requests]
        found = iter(self._likelihoods([window for of_text in windows for window in of_text]))
        return [sum((next(found)[0] for _ in of_text), 0.0) for of_text in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each `(context, settings)` the continuation up to the first of the texts in `settings["until"]`.

        Greedy, unless the settings say `do_sample`; `max_gen_toks` limits it.
        """
        texts = [""] * len(requests)
        groups: dict[tuple[int, Sampling | None], list[int]] = {}
        for number, request in enumerate(requests):
            wanted = int(request.args[1].get("max_gen_toks") or NEW_TOKENS), _sampling(request.args[1])
            groups.setdefault(wanted, []).append(number)
        for (tokens, sampling), members in groups.items():
            new = min(tokens, self.max_length - 1)
            prompts = [self._prompt(str(requests[number].args[0]))[new - self.max_length :] for number in members]
            for number, text in zip(members, self._written(prompts, new, sampling), strict=True):
                texts[number] = _until(text, requests[number].args[1])
        return texts

    def _written(self, prompts: list[list[int]], new: int, sampling: Sampling | None) -> list[str]:
        def write(size: int) -> list[str]:
            return inference.generate_texts(
                self.model, self.tokenizer, prompts, max_new_tokens=new, batch_size=size, sampling=sampling
            )

        return halving(write, self.batch_size, f"writing {len(prompts)} answers")

    def _likelihoods(self, examples: Sequence[Example]) -> list[tuple[float, bool]]:
        pad, doing = (
            pad_token_id(self.tokenizer, vocabulary_rows(self.model)),
            f"taking the likelihood of {len(examples)} texts",
        )
        return halving(lambda size: target_likelihoods(self.model, examples, pad, size), self.batch_size, doing)

    def _example(self, context: str, continuation: str) -> Example:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        row = Row("lm-eval", prompt=context, completion=continuation)
        if context:
            [example] = encode([row], self.tokenizer, max_length=2**31).examples
            ids, length = example.input_ids[:-1], example.prompt_length  # training's EOS is none of the harness's
        else:
            ids, length = [self._start, *self._bare(continuation)], 1
        targets = len(ids) - length
        if targets >= self.max_length:
            raise DataError(f"a continuation of {targets} tokens; this base takes {self.max_length} with a context")
        kept = ids[-self.max_length :]
        return Example(kept, len(kept) - targets, row)

    def _windows(self, text: str) -> list[Example]:
        ids = [self._start, *self._bare(text)]
        found = []
        for begin in range(1, len(ids), self.max_length - 1):
            end = min(begin + self.max_length - 1, len(ids))
            window = ids[max(0, end - self.max_length) : end]  # the last one looks back as far as there is room
            found.append(Example(window, len(window) - (end - begin), Row("lm-eval", text=text)))
        return found

    def _prompt(self, context: str) -> list[int]:
        return prompt_ids(Row("lm-eval", prompt=context, completion=""), self.tokenizer) or [self._start]

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def _start(self) -> int:
        """The id that begins a text without context: BOS, or EOS if the tokenizer has no BOS."""
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        if not isinstance(start, int):
            raise ConfigError("the tokenizer has neither a BOS nor an EOS token to begin a text with")
        return start


def _sampling(settings: dict[str, Any]) -> Sampling | None:
    """The harness's settings; None where they are greedy."""
    temperature = settings.get("temperature", 1.0)
    if not settings.get("do_sample") or temperature <= 0:
        return None
    given = {key: settings[key] for key in ("top_p", "top_k") if settings.get(key) is not None}
    return Sampling(temperature=float(temperature), **given)


def _until(text: str, settings: dict[str, Any]) -> str:
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.split(stop)[0]
    return text
