"""Gradients and losses of every method over a base in fp8, int8 and NF4, against the same base as it is.

    PYTHONPATH=src python benchmarks/base_precision.py --base gpt2-27m --data e2e --out base_precision.jsonl
    PYTHONPATH=src python benchmarks/base_precision.py --out base_precision.jsonl --table docs/results/base_precision.md
    PYTHONPATH=src python benchmarks/base_precision.py --steps 4 --rows 32 --device cpu --out tiny.jsonl       a check

`--base`: a folder, a hub id, or spectune-tiny; `--data`: a folder with train.jsonl and valid.jsonl, without it the
embedded rows. For each method: the same steps on the same rows from the same weights over each base ("plain" is the
base in its dtype, once more with another seed, which is how much a loss varies anyway). The gradient is taken at the
weights that the plain run ended with, loaded onto each base, summed over the same batches; its cosine is with the plain
base's gradient, and with that of the base in float32. A delta that was trained over a quantised base is also judged on
the plain one, where it may be served. One JSON line for each run; --out is added to, and what it has is not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import spectune
from spectune import embedded
from spectune.data import collate, encode, load_rows
from spectune.evaluation import row_losses
from spectune.methods import BY_NAME, METHODS, method_from_name
from spectune.objectives import CAUSAL_LM
from spectune.storage import PRECISIONS
from spectune.training.machine import environment
from spectune.training.prepare import pad_token_id

PLAIN = "plain"
FROZEN = [str(m.model_fields["name"].default) for m in METHODS if not m.trains_base]


class Setting:
    """Base, rows and the training config that all runs of this call share."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        folder = given.data
        train, valid = (
            (folder / f"{n}.jsonl" for n in ("train", "valid")) if folder else (embedded.TRAIN, embedded.VALID)
        )
        self.train = load_rows(train)[: given.rows]
        self.valid = load_rows(valid)[: given.valid_rows]
        self.data = folder.name if folder else "embedded"
        self.base = Path(given.base).name

    def load(self, precision: str, dtype: str | None = None) -> tuple[Any, Any]:
        few = None if precision == PLAIN else precision
        dtype = dtype or self.given.dtype
        if dtype == "auto" and self.given.device == "cuda":
            dtype = "bfloat16"
        return spectune.load(self.given.base, device=self.given.device, dtype=dtype, base_precision=few)

    def config(self, seed: int) -> Any:
        return spectune.TrainingConfig(
            max_steps=self.given.steps,
            per_device_train_batch_size=self.given.batch,
            max_length=self.given.length,
            seed=seed,
            eval_steps=self.given.steps,
            memory_check="off",
        )

    def examples(self, rows: list[Any], tokenizer: Any) -> list[Any]:
        return encode(rows, tokenizer, max_length=self.given.length).examples


def trained(setting: Setting, method: Any, precision: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train, and save the delta into `folder`."""
    model, tokenizer = setting.load(precision)
    delta = spectune.attach(model, method, "task", tokenizer=tokenizer, seed=seed)
    begin = time.perf_counter()
    result = spectune.train(
        model, tokenizer, delta, setting.train, setting.valid, setting.config(seed), console=Console(quiet=True)
    )
    seconds = time.perf_counter() - begin
    delta.save(folder)
    weights = {t.data_ptr(): t.numel() * t.element_size() for n, t in model.state_dict().items() if ".deltas." not in n}
    return {
        "base_valid_loss": result.base_valid_loss,
        "valid_loss": result.valid_loss,
        "train_tokens_per_second": result.train_tokens_per_second,
        "seconds": seconds,
        "base_bytes": sum(weights.values()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def gradient(setting: Setting, folder: Path, precision: str, dtype: str | None = None) -> dict[str, Tensor]:
    """Of the mean loss over some batches, for each tensor of the delta in `folder`; float64, on the host."""
    model, tokenizer = setting.load(precision, dtype)
    delta = spectune.load_delta(model, folder, name="task", trainable=True)
    examples = setting.examples(setting.train, tokenizer)[: setting.given.batch * setting.given.gradient_batches]
    total = sum(example.target_tokens for example in examples)
    for start in range(0, len(examples), setting.given.batch):
        batch = collate(examples[start : start + setting.given.batch], pad_token_id(tokenizer))
        loss, _ = CAUSAL_LM.loss_sum(model, {key: value.to(model.device) for key, value in batch.items()})
        (loss / total).backward()
    return {name: p.grad.detach().double().cpu() for name, p in delta.named_parameters() if p.grad is not None}


def loss_over(setting: Setting, folder: Path, precision: str) -> float:
    """The validation loss of a stored delta over the base in that precision."""
    model, tokenizer = setting.load(precision)
    spectune.load_delta(model, folder, name="task")
    examples = setting.examples(setting.valid, tokenizer)
    return row_losses(model, examples, pad_token_id(tokenizer), 16).mean_per_token


def cosines(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Any]:
    """Over all tensors together, and for each; those without any gradient left out."""
    by_tensor = {n: _cosine(g, reference[n]) for n, g in found.items() if bool(g.any()) and bool(reference[n].any())}
    whole = [torch.cat([side[name].flatten() for name in by_tensor]) for side in (found, reference)]
    worst = min(by_tensor, key=by_tensor.__getitem__)
    return {
        "overall": _cosine(*whole),
        "median": statistics.median(by_tensor.values()),
        "worst": by_tensor[worst],
        "worst_tensor": worst,
        "by_tensor": {name: round(value, 5) for name, value in by_tensor.items()},
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def runs_of(setting: Setting, name: str, precisions: list[str], done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """All runs of one method that are not there yet."""
    method = method_from_name(name)
    todo = [(precision, 0) for precision in (PLAIN, *precisions)] + [(PLAIN, 1)]
    todo = [(p, seed) for p, seed in todo if (setting.base, setting.data, name, p, seed) not in done]
    if not todo:
        return
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain"
        first = trained(setting, method, PLAIN, 0, plain)
        reference, exact = gradient(setting, plain, PLAIN), gradient(setting, plain, PLAIN, "float32")
        for precision, seed in todo:
            folder = plain if (precision, seed) == (PLAIN, 0) else Path(scratch) / f"{precision}-{seed}"
            found = first if folder == plain else trained(setting, method, precision, seed, folder)
            line = {"base": setting.base, "data": setting.data, "method": name, "precision": precision, "seed": seed}
            line |= {
                "steps": setting.given.steps,
                "batch": setting.given.batch,
                "device": setting.given.device,
                **found,
            }
            if seed == 0:
                own = reference if precision == PLAIN else gradient(setting, plain, precision)
                line["cosine_to_float32"] = cosines(own, exact)
                if precision != PLAIN:
                    line["cosine_to_plain"] = cosines(own, reference)
                    line["valid_loss_on_plain"] = loss_over(setting, folder, PLAIN)
            yield line | {"environment": environment()}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, one table for each base and data set."""
    parts = ["# Frozen bases in few bits: gradients and losses", "", "Made by benchmarks/base_precision.py; what the "
             "precisions are: [quantised-bases.md](../quantised-bases.md).", ""]  # fmt: skip
    for base, data in dict.fromkeys((line["base"], line["data"]) for line in lines):
        own = [line for line in lines if (line["base"], line["data"]) == (base, data)]
        one, env = own[0], own[0]["environment"]
        parts += [f"## {base} on {data}", ""]
        parts += [
            f"{one['steps']} steps of {one['batch']} rows; the plain base is in {one['dtype']} on {one['device']} "
            f"({', '.join(f'{k} {v}' for k, v in env.items() if isinstance(v, str))}). Losses are validation losses, "
            "nats a token. `seed`: the plain loss with another seed, less that of the first. `served plain`: the delta "
            "that was trained over the quantised base, judged on the plain one. Cosines are of the delta's gradient, "
            "with the plain base's and with that in float32; `worst`: the delta's tensor where it is lowest.",
            "",
            "| method | base | loss | less plain | served plain, less plain | cosine | worst | cosine to float32 | "
            "base, MiB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for method in dict.fromkeys(line["method"] for line in own):
            parts += _rows([line for line in own if line["method"] == method])
        parts.append("")
    return "\n".join(parts)


def _rows(own: list[dict[str, Any]]) -> list[str]:
    """Rows of one method: the plain base's first."""
    plain = {line["seed"]: line for line in own if line["precision"] == PLAIN}
    zero = plain[0]["valid_loss"]
    seed = f"seed: {plain[1]['valid_loss'] - zero:+.4f}" if 1 in plain else ""
    rows = []
    for line in (plain[0], *(line for line in own if line["precision"] != PLAIN)):
        cells = [BY_NAME[line["method"]].label, line["precision"], f"{line['valid_loss']:.4f}"]
        if line["precision"] == PLAIN:
            cells += [seed, "", "", ""]
        else:
            near = line["cosine_to_plain"]
            cells += [f"{line[key] - zero:+.4f}" for key in ("valid_loss", "valid_loss_on_plain")]
            cells += [f"{near['overall']:.4f}", f"{near['worst']:.4f}"]
        cells += [f"{line['cosine_to_float32']['overall']:.4f}", f"{line['base_bytes'] / 2**20:,.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="spectune-tiny")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", default=",".join(FROZEN))
    parser.add_argument("--precisions", help="default: all that run here (nf4 where bitsandbytes is installed)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="of the plain base; auto is bfloat16 on CUDA, else float32")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=None, help="training rows, default all")
    parser.add_argument("--valid-rows", type=int, default=512)
    parser.add_argument("--gradient-batches", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.is_file() else []
    if given.table is not None:
        given.table.write_text(table(lines), encoding="utf-8")
        return
    here = [p for p in PRECISIONS if p != "nf4" or importlib.util.find_spec("bitsandbytes") is not None]
    precisions = given.precisions.split(",") if given.precisions else here
    done = {(line["base"], line["data"], line["method"], line["precision"], line["seed"]) for line in lines}
    setting = Setting(given)
    for name in given.methods.split(","):
        for line in runs_of(setting, name, precisions, done):
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            near = line.get("cosine_to_plain", {}).get("overall")
            print(
                f"{name} {line['precision']} seed {line['seed']}: loss {line['valid_loss']:.4f}, cosine {near}",
                flush=True,
            )


if __name__ == "__main__":
    main()
