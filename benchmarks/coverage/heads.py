"""`python -m benchmarks.coverage.heads`: every type that transformers has a sequence or token classifier for.

    OMP_NUM_THREADS=1 python -m benchmarks.coverage.heads --out heads.jsonl --page docs/coverage.md

Results are appended to `--out`; what has one there (of the same versions) is not tried again. The page's section on
heads is written anew, the rest of it stays.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.coverage.bases import padded, texts, tokens
from benchmarks.coverage.checks import DEFECT, METHODS, REFUSED, WORKS
from benchmarks.coverage.configs import tiny_config
from benchmarks.coverage.driver import BASE_FAILS, versions
from benchmarks.coverage.page import HEADS, without_heads
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from spectune.deltas import attach, detach
from spectune.errors import SpectuneError
from spectune.objectives import objective_of
from spectune.storage import load_delta

MAPPINGS = {"SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "TOKEN_CLS": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING}
NAMES = {
    "SEQ_CLS": list(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "TOKEN_CLS": list(modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
}
LABELS, LENGTH, SECONDS = 3, 12, 90.0
RATES = (1e-2, 1e-3, 1e-4)
_FORK = multiprocessing.get_context("fork")


def make(task: str, model_type: str, head: int = 0) -> PreTrainedModel:
    """The same base each time, float32; its head is drawn by `head`."""
    config = tiny_config(model_type)
    config.num_labels = LABELS
    config.get_text_config().pad_token_id = 0
    kind = MAPPINGS[task][type(config)]
    if not isinstance(config, kind.config_class):
        config = next(c for name in config.sub_configs if isinstance(c := getattr(config, name), kind.config_class))
        config.num_labels, config.get_text_config().pad_token_id = LABELS, 0
    torch.manual_seed(7)
    model: PreTrainedModel = kind(config).float().eval()
    inside = {name for name, _ in model.base_model.named_parameters(prefix=model.base_model_prefix)}
    base, other = torch.Generator().manual_seed(8), torch.Generator().manual_seed(9 + head)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=base if name in inside else other) * 0.1)
    return model


def outputs(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return found


def padding_error(model: PreTrainedModel, side: str) -> float:
    """The largest difference between what a padded batch gives for a row and the row alone."""
    rows = texts()
    ids, mask = padded(rows, side)
    together, worst = outputs(model, ids, mask), 0.0
    for n, row in enumerate(rows):
        here = together[n] if together.dim() == 2 else together[n][mask[n] == 1]
        worst = max(worst, float((here - outputs(model, row[None])[0]).abs().max()))
    return worst


def check(task: str, model_type: str, case: str) -> dict[str, Any]:
    """Attach, identity, two steps, folder, padding and detach of one method on one type."""
    try:
        model, ids = make(task, model_type), tokens(2, LENGTH)
        bare = outputs(model, ids)
        own = {side: padding_error(model, side) for side in ("left", "right")}
    except Exception as error:
        return {"status": BASE_FAILS, "reason": f"{type(error).__name__}: {str(error)[:200]}"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method = METHODS[case]
    try:
        delta = attach(model, method, "task", keep_base=method.trains_base)
    except SpectuneError as error:
        whole = all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        return {"status": REFUSED if whole else DEFECT, "reason": " ".join(str(error).split())}
    problems = []
    if method.starts_at_identity and not torch.equal(outputs(model, ids), bare):
        problems.append("the first outputs are not the base's")
    labels = torch.tensor([2, 0]) if task == "SEQ_CLS" else ids % LABELS
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    start = {name: tensor.clone() for name, tensor in delta.training_state_dict().items()}
    if not any(_learns(model, delta, batch, start, rate) for rate in RATES):
        problems.append("two steps do not lower the loss")
    tuned = outputs(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        delta.save(f"{folder}/saved")
        other = make(task, model_type, head=1)
        load_delta(other, f"{folder}/saved", "loaded")
        if not torch.equal(outputs(other, ids), tuned):
            problems.append("loaded on another head it answers otherwise")
    for side, alone in own.items():
        if padding_error(model, side) > max(1e-4, 3 * alone):
            problems.append(f"padding on the {side} changes its answers")
    detach(model, "task")
    if not all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items()):
        problems.append("detach leaves other weights")
    notes = [f"as the base: padding on the {side}" for side, alone in own.items() if alone > 1e-4]
    return {"status": DEFECT if problems else WORKS, "problems": problems, "as_base": notes}


def _learns(model: Any, delta: Any, batch: dict[str, Tensor], start: dict[str, Tensor], rate: float) -> bool:
    with torch.no_grad():
        delta.load_training_state_dict(start)
    optimizer, objective = torch.optim.AdamW(delta.parameters(), lr=rate), objective_of(model)
    losses = []
    for _ in range(3):
        total, count = objective.loss_sum(model, batch)
        losses.append(float(total.detach()))
        optimizer.zero_grad()
        (total / count).backward()
        if len(losses) < 3:
            optimizer.step()
    head = [name for name, p in delta.named_parameters() if not (start[name] - p.detach()).abs().sum()]
    part = tuple(f"{part.path}." for part in delta.family.trained_head)
    return losses[2] < losses[0] and not any(name.startswith(part) for name in head)


def _work(task: str, model_type: str, methods: list[str], sender: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("spectune").setLevel(logging.ERROR)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    for case in methods:
        try:
            found = check(task, model_type, case)
        except Exception as error:
            found = {"status": DEFECT, "problems": [f"{type(error).__name__}: {str(error)[:300]}"]}
        sender.send((case, found))


def run(out: Path, methods: list[str], tasks: list[str], types: list[str] | None) -> None:
    done = {(r["task"], r["type"], r["method"]) for r in read(out)}
    for task in tasks:
        for model_type in [t for t in NAMES[task] if types is None or t in types]:
            if not (left := [m for m in methods if (task, model_type, m) not in done]):
                continue
            receiver, sender = _FORK.Pipe(duplex=False)
            process = _FORK.Process(target=_work, args=(task, model_type, left, sender), daemon=True)
            process.start()
            sender.close()
            found, deadline = {}, time.monotonic() + SECONDS
            with contextlib.suppress(EOFError):
                while len(found) < len(left) and receiver.poll(max(0.0, deadline - time.monotonic())):
                    case, row = receiver.recv()
                    found[case] = row
            process.kill()
            process.join()
            for case in left:
                row = found.get(case, {"status": DEFECT, "problems": ["no answer: it died, or took too long"]})
                row = {"task": task, "type": model_type, "method": case, "versions": versions(), **row}
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                words = "; ".join(row.get("problems", [])) or row.get("reason", "")
                print(f"{task:10s}{model_type:24s}{case:8s}{row['status']:10s}{words[:150]}", flush=True)


def read(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return list({(r["task"], r["type"], r["method"]): r for r in rows if r["versions"] == versions()}.values())


def section(rows: list[dict[str, Any]]) -> str:
    """The page's part on heads."""
    methods = [m for m in METHODS if any(row["method"] == m for row in rows)]
    cells = {(r["task"], r["type"], r["method"]): r for r in rows}
    lines = [
        HEADS, "",
        f"Every type of `AutoModelForSequenceClassification` and `AutoModelForTokenClassification` (transformers "
        f"{versions()['transformers']}), tiny, with three labels. *Works* has passed: attach, with the base's outputs "
        "bit for bit where the method starts there; two steps that lower the loss and move the head; save, and load on "
        "the same base with another random head, bit for bit; padding on either side; detach, bit for bit. Only "
        "decoder-only models are meant to work: what reads its text in both directions is refused at attach, by name.",
        "", "```sh", "OMP_NUM_THREADS=1 python -m benchmarks.coverage.heads --out heads.jsonl --page docs/coverage.md",
        "```", "",
    ]  # fmt: skip
    kinds: dict[str, list[str]] = defaultdict(list)
    for task in MAPPINGS:
        types = sorted({row["type"] for row in rows if row["task"] == task})
        counts = {m: Counter(cells[task, t, m]["status"] for t in types if (task, t, m) in cells) for m in methods}
        lines += [f"### {task}", "", f"| {len(types)} types | " + " | ".join(methods) + " |",
                  "|---|" + "---:|" * len(methods)]  # fmt: skip
        for status in (WORKS, REFUSED, DEFECT, BASE_FAILS):
            if any(counts[m][status] for m in methods):
                lines.append(f"| {status} | " + " | ".join(str(counts[m][status]) for m in methods) + " |")
        lines += ["", "| type | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
        for t in types:
            row = [cells.get((task, t, m), {}) for m in methods]
            said = [r.get("status", "") + (" (p)" if r.get("as_base") else "") for r in row]
            lines.append(f"| {t} | " + " | ".join("-" if s == BASE_FAILS else s for s in said) + " |")
            for m, r in zip(methods, row, strict=True):
                if words := r.get("reason") or "; ".join(r.get("problems", [])):
                    kinds[_kind(words)].append(f"{t} ({task}, {m})")
        lines.append("")
    lines += ["p: as the base: padding changes its outputs by itself.  ", "-: the bare base does not run here.", ""]
    for words, where in sorted(kinds.items(), key=lambda item: -len(item[1])):
        some = ", ".join(where[:6]) + (f" and {len(where) - 6} more" if len(where) > 6 else "")
        lines.append(f"- {words}: {some}")
    return "\n".join(lines) + "\n"


def _kind(words: str) -> str:
    """The words without what is the type's own."""
    words = re.sub(r"\b\w+For(Sequence|Token)Classification\b", "the model", words)
    return re.sub(r"\s+", " ", re.sub(r"\([a-z_.]+\)|this \w+ model", "", words))[:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--types", help="model types, separated by commas; default: all")
    parser.add_argument("--methods", default="lora,prompt", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--tasks", default="SEQ_CLS,TOKEN_CLS")
    parser.add_argument("--out", type=Path, default=Path("heads.jsonl"))
    parser.add_argument("--page", type=Path, help="write the section of all results in --out into this page")
    args = parser.parse_args()
    run(args.out, args.methods.split(","), args.tasks.split(","), args.types.split(",") if args.types else None)
    if args.page is not None:
        args.page.write_text(without_heads(args.page.read_text()).rstrip() + "\n\n" + section(read(args.out)))


if __name__ == "__main__":
    main()
