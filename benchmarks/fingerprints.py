"""Whether fingerprints tell bases apart, and know the same base again: docs/results/fingerprints.md.

    python -m benchmarks.fingerprints --bases FOLDER_OF_GPT2_27M --out docs/results/fingerprints.md
    python -m benchmarks.fingerprints --shape 8b --device cuda --folder FOLDER --out FILE   # a GPU, 20 GB of disk

Bases of many types, tiny and random, and a real one. Of each: pairs of bases that differ in one part, all of which have
to be told apart, and pairs that are one base in another dtype, precision, sharding or storage, all of which have to be
equal. What is compared has been through JSON, as a folder's has.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.coverage.bases import make
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spectune.errors import ConfigError
from spectune.families import compare_bases, describe, differences, fingerprint
from spectune.storage import quantise_base

TYPES = ("llama", "gpt2", "qwen3", "gemma3_text", "gpt_neox", "opt", "phi", "mixtral", "deepseek_v3", "mamba", "bloom")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = ("fp8", "nf4", "int8")
#: a merged delta's size, in shares of the weights' own
MERGED = (1e-1, 1e-2, 1e-3, 1e-4)

Change = Callable[[PreTrainedModel, torch.Generator], None]


def random(weight: Tensor, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Normal numbers as large as a weight is, times `scale`."""
    size = weight.float().square().mean().sqrt()
    return (torch.randn(weight.shape, generator=generator) * size * scale).to(weight)


def linear_weights(model: PreTrainedModel) -> list[Tensor]:
    return [model.get_submodule(linear.path).weight for linear in describe(model).linears]


def norm_weights(model: PreTrainedModel) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if p.dim() == 1 and name.endswith("weight")]


def chosen(weights: list[Tensor], generator: torch.Generator) -> Tensor:
    return weights[int(torch.randint(len(weights), (), generator=generator))]


def one_linear(model: PreTrainedModel, generator: torch.Generator) -> None:
    weight = chosen(linear_weights(model), generator)
    weight.copy_(random(weight, generator))


def one_row(model: PreTrainedModel, generator: torch.Generator, scale: float = 1.0) -> None:
    weight = chosen(linear_weights(model), generator)
    row = weight[int(torch.randint(len(weight), (), generator=generator))]
    row.add_(random(row, generator, scale))


def one_row_a_little(model: PreTrainedModel, generator: torch.Generator) -> None:
    one_row(model, generator, 0.02)


def one_token(model: PreTrainedModel, generator: torch.Generator) -> None:
    table = model.get_input_embeddings().weight
    table[int(torch.randint(len(table), (), generator=generator))].normal_(generator=generator)


def one_norm(model: PreTrainedModel, generator: torch.Generator) -> None:
    weight = chosen(norm_weights(model), generator)
    weight.add_(random(weight, generator, 0.02))


def one_number_of_a_norm(model: PreTrainedModel, generator: torch.Generator) -> None:
    weight = chosen(norm_weights(model), generator)
    weight[int(torch.randint(len(weight), (), generator=generator))] += 0.05 * weight.abs().max()


def added_token(model: PreTrainedModel, generator: torch.Generator) -> None:
    rows = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(rows + int(torch.randint(1, 5, (), generator=generator)), mean_resizing=False)


def merged(size: float) -> Change:
    """LoRA of rank 2 on every linear, merged: a change of so large a share of each weight."""

    def change(model: PreTrainedModel, generator: torch.Generator) -> None:
        for weight in linear_weights(model):
            low = [torch.randn(*shape, generator=generator) for shape in ((len(weight), 2), (2, weight.shape[1]))]
            delta = low[0] @ low[1]
            weight.add_((delta * (size * float(weight.norm()) / float(delta.norm()))).to(weight))

    return change


CHANGES: dict[str, Change] = {
    "a linear drawn anew": one_linear,
    "a row of a linear drawn anew": one_row,
    "a row of a linear changed by 2%": one_row_a_little,
    "a token's embedding drawn anew": one_token,
    "a norm changed by 2%": one_norm,
    "a number of a norm changed by 5%": one_number_of_a_norm,
    "tokens added": added_token,
    **{f"a merged LoRA, {size:g} of the weights": merged(size) for size in MERGED},
}


def print_of(model: PreTrainedModel) -> dict[str, Any]:
    """As a folder gives it back."""
    return dict(json.loads(json.dumps(fingerprint(model, describe(model)))))


@dataclass
class Tally:
    """Pairs by what they are: how many there were, and those that came out otherwise than they have to."""

    pairs: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    wrong: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def count(self, what: str, right: bool, which: str) -> None:
        self.pairs[what] += 1
        self.wrong[what] += [] if right else [which]

    @property
    def total(self) -> int:
        return sum(self.pairs.values())

    @property
    def failed(self) -> int:
        return sum(map(len, self.wrong.values()))

    def table(self, right: str) -> list[str]:
        lines = [f"| pair | pairs | {right} | otherwise |", "|---|---|---|---|"]
        for what, pairs in self.pairs.items():
            wrong = self.wrong[what]
            lines.append(f"| {what} | {pairs} | {pairs - len(wrong)} | {', '.join(sorted(set(wrong))) or '-'} |")
        return lines


@torch.no_grad()
def tell_apart(base: PreTrainedModel, name: str, tally: Tally, dtypes: tuple[str, ...], seed: int) -> None:
    """Each change of the base, in each dtype, beside the base as it is held in float32."""
    before = print_of(base)
    for number, (what, change) in enumerate(CHANGES.items()):
        for dtype in dtypes:
            other = copy.deepcopy(base)
            change(other, torch.Generator().manual_seed(1000 * seed + number))
            other.to(DTYPES[dtype])
            tally.count(what, bool(differences(before, print_of(other))), f"{name} in {dtype}")


@torch.no_grad()
def same_again(base: PreTrainedModel, name: str, tally: Tally) -> None:
    """The base in other forms, all of which have to be equal to it, whichever of the two was stored."""
    before = print_of(base)
    for what, other in forms(base):
        after = print_of(other)
        found = [compare_bases(*pair) for pair in ((before, after), (after, before))]
        tally.count(what, not any(f.changed or f.added or f.unread for f in found), name)


def forms(base: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    for dtype in ("bfloat16", "float16"):
        yield f"in {dtype}", copy.deepcopy(base).to(DTYPES[dtype])
    yield "saved in bfloat16, read in float32", copy.deepcopy(base).to(torch.bfloat16).float()
    for precision in PRECISIONS:
        other = copy.deepcopy(base)
        try:
            quantise_base(other, precision)
        except ConfigError:
            continue  # sizes that the precision does not take
        yield f"in {precision}", other
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder, max_shard_size="50KB")
        yield "read from a folder of many files", AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype)
    head = base.get_output_embeddings()
    if head is not None and head.weight is base.get_input_embeddings().weight:
        other = copy.deepcopy(base)
        other.get_output_embeddings().weight = nn.Parameter(head.weight.detach().clone())
        yield "with a head of its own instead of a tied one", other
    other = copy.deepcopy(base)
    fully_shard(other, mesh=init_device_mesh("cpu", (1,)))
    yield "sharded (FSDP2)", other


@torch.no_grad()
def under_quantisation(base: PreTrainedModel, name: str, tally: Tally) -> None:
    """What is seen of a change where the other base is quantised: what its precision does not round away."""
    before = print_of(base)
    for number, (what, change) in enumerate(CHANGES.items()):
        for precision in PRECISIONS:
            other = copy.deepcopy(base)
            change(other, torch.Generator().manual_seed(number))
            try:
                quantise_base(other, precision)
            except ConfigError:
                continue
            tally.count(f"{what}; the other base in {precision}", bool(differences(before, print_of(other))), name)


def make_8b(device: str, layers: int) -> PreTrainedModel:
    """Random weights in the shape of Llama 3 8B, bfloat16."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device)
    for weight in model.parameters():
        weight.data.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    whole: PreTrainedModel = model.eval()
    return whole


def timed(model: PreTrainedModel) -> tuple[dict[str, Any], str]:
    """A fingerprint, and the seconds that it and a second one took."""
    family, seconds = describe(model), []
    for _ in range(2):
        begin = time.perf_counter()
        found = fingerprint(model, family)
        seconds.append(f"{time.perf_counter() - begin:.2f}")
    return found, " | ".join(seconds)


def run_8b(device: str, folder: Path, layers: int) -> Iterator[str]:
    """Seconds in the device's memory and from a folder, and the precisions beside each other: lines of a table."""
    yield from ("| base | seconds | seconds again | beside bfloat16 |", "|---|---|---|---|")
    model = make_8b(device, layers)
    before, seconds = timed(model)
    yield f"| bfloat16 on {device}, {len(json.dumps(before)):,} bytes as JSON | {seconds} | - |"
    forms: dict[str, Callable[[PreTrainedModel], object]] = {
        "a row of a linear drawn anew": lambda m: linear_weights(m)[-1][-1].normal_(0, 0.02),
        "a merged LoRA, 0.001 of the weights": lambda m: merged(1e-3)(m, torch.Generator()),
        **{dtype: lambda m, dtype=dtype: m.to(DTYPES[dtype]) for dtype in ("float16", "float32")},  # type: ignore[misc]
        **{kind: lambda m, kind=kind: quantise_base(m, kind) for kind in PRECISIONS},  # type: ignore[misc]
    }
    for name, change in forms.items():
        other = copy.deepcopy(model)
        try:
            with torch.no_grad():
                change(other)
        except ConfigError as error:
            yield f"| {name} | - | - | {error} |"
            continue
        found, seconds = timed(other)
        yield f"| {name} | {seconds} | {'; '.join(differences(before, found)) or 'equal'} |"
        del other
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    for file in folder.glob("*.safetensors"):  # out of the page cache: from the disk itself
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for where in ("the disk", "the page cache"):
        begin = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder)
        loading = time.perf_counter() - begin
        found, seconds = timed(model)
        same = "; ".join(differences(before, found)) or "equal"
        yield f"| on the CPU from {where}, after transformers' own {loading:.2f} s | {seconds} | {same} |"
        del model


def run_pairs(types: tuple[str, ...], real: Path | None, *, quantised: bool) -> tuple[Tally, Tally, Tally]:
    """Pairs that differ, pairs that are the same, and what is seen under quantisation."""
    apart, same, seen = Tally(), Tally(), Tally()
    bases = [(name, make(name)) for name in types]
    if real is not None:
        bases.append((real.name, AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)))
    for seed, (name, base) in enumerate(bases):
        tell_apart(base, name, apart, ("float32", "bfloat16"), seed)
        same_again(base, name, same)
        if quantised:
            under_quantisation(base, name, seen)
    return apart, same, seen


def page(apart: Tally, same: Tally, seen: Tally) -> str:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return "\n".join([
        "# Fingerprints of bases", "",
        f"Made by `python -m benchmarks.fingerprints` with {versions}: tiny random bases of {len(TYPES)} types, and "
        "gpt2-27m. Both sides have been through JSON.", "",
        f"## One part differs: {apart.total - apart.failed} of {apart.total} pairs told apart", "",
        "The first base in float32, the second one in float32 and in bfloat16.", "",
        *apart.table("told apart"), "",
        f"## The same base: {same.total - same.failed} of {same.total} pairs equal", "",
        *same.table("equal"), "",
        f"## One part differs, and the other base is quantised: {seen.total - seen.failed} of {seen.total} told apart",
        "",
        "Nothing has to be: a change that is smaller than what the precision rounds away is not seen, as "
        "[quantised bases](../quantised-bases.md) says. A rank-2 change of 0.1 is as large as NF4's own rounding.", "",
        *seen.table("told apart"), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=Path, help="the folder of a real base")
    parser.add_argument("--shape", choices=["tiny", "8b"], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=32, help="of the 8B model")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the 8B model is written to")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.shape == "8b":
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, args.out.open("w") as out:
            for line in run_8b(args.device, Path(folder), args.layers):
                print(line, file=out, flush=True)
                print(line, flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        text = page(*run_pairs(TYPES, args.bases, quantised=True))
        torch.distributed.destroy_process_group()
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
