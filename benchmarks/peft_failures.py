"""PEFT's silent failures on the cases of docs/correctness.md, with the installed versions; ours on the same cases.

    python benchmarks/peft_failures.py                 prints the table
    python benchmarks/peft_failures.py --page F        writes it as Markdown

Tiny random models, float32, CPU, seconds. Each case measures one number or catches one error; nothing is asserted here:
what holds for spectune is asserted in tests/.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import spectune
from spectune.deltas import attached
from spectune.methods import LoRA, PrefixTuning, PromptTuning

warnings.filterwarnings("ignore")
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))
Case = tuple[str, Callable[[], str], Callable[[], str], str]


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).eval()


def with_peft(model: Any, **config: Any) -> Any:
    wrapped = peft.get_peft_model(model, peft.get_peft_config({**config, "task_type": "CAUSAL_LM"})).eval()
    return shaken(wrapped, [p for p in wrapped.parameters() if p.requires_grad])


def with_ours(model: Any, method: Any, name: str = "task") -> Any:
    delta = spectune.attach(model, method, name)
    return shaken(model, list(delta.parameters()))


def shaken(model: Any, parameters: list[torch.Tensor]) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def attempt(function: Callable[[], Any]) -> str:
    """What came out, or the error's first line."""
    try:
        with torch.no_grad():
            found = function()
    except Exception as error:
        line = next((text for text in str(error).splitlines() if text.strip()), "")
        line = re.sub(r"\S*/(?=task/)", "", line)  # the temporary folder
        return f"{type(error).__name__}: {line[:110]}"
    return found if isinstance(found, str) else f"{found:.2g}"


def padding_moves(model: Any) -> float:
    """How far a left-padded row's last logits are from the same row alone."""
    alone = model(input_ids=IDS[:1, 4:], attention_mask=torch.ones(1, 5).long()).logits[:, -1]
    ids = torch.cat([torch.zeros(1, 4).long(), IDS[:1, 4:]], dim=1)
    mask = torch.cat([torch.zeros(1, 4).long(), torch.ones(1, 5).long()], dim=1)
    return float((model(input_ids=ids, attention_mask=mask).logits[:, -1] - alone).abs().max())


def trained(model: Any) -> str:
    return f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} weights trained, no error"


def surplus(make: Callable[[], Any], save: Callable[[Any, Path], Any], load: Callable[[Any, Path], Any]) -> str:
    """A folder with one tensor more than the model has a place for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "task"
        save(make(), folder)
        (folder / "spectune.json").unlink(missing_ok=True)  # without our digest: the keys alone must tell
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        extra = next(key for key in tensors if "layers.1" in key).replace("layers.1", "layers.7")
        save_file({**tensors, extra: tensors[extra.replace("layers.7", "layers.1")].clone()}, path)
        load(llama(), folder)
    return "loaded, no error"


def window(prefix: Callable[[Any], Any]) -> float:
    """The most that a prefix changes the last logits of a text longer than a one-layer model's sliding window."""
    ids = torch.randint(1, 97, (1, 24), generator=torch.Generator().manual_seed(3))

    def base() -> Any:
        torch.manual_seed(0)
        return MistralForCausalLM(MistralConfig(**{**SIZES, "num_hidden_layers": 1}, sliding_window=4)).eval()

    # against a prefix of other values, so that only what it says counts and not where it stands
    first, second = prefix(base()), prefix(base())
    with torch.no_grad():
        for parameter in second.parameters():
            if parameter.requires_grad:
                parameter.mul_(-3)
    return float((first(input_ids=ids).logits[:, -1] - second(input_ids=ids).logits[:, -1]).abs().max())


def hooks_after_error(model: Any, run: Callable[[], Any]) -> str:
    handle = model.get_submodule("model.norm").register_forward_pre_hook(_fail)
    with contextlib.suppress(KeyboardInterrupt):
        run()
    handle.remove()
    after = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return str(after)


def _fail(*_: Any) -> None:
    raise KeyboardInterrupt


LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
ROUTE = ["base", "task"]


def mixed(kind: str) -> str:
    """Row 0 is asked to be the bare base: how far it is from it."""
    model = llama()
    bare = model(input_ids=IDS[:1]).logits
    config = {"peft_type": "IA3"} if kind == "IA3" else {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    wrapped = with_peft(model, **config)
    got = wrapped(input_ids=IDS, attention_mask=torch.ones_like(IDS), adapter_names=["__base__", "default"]).logits
    return f"{float((got[:1, -9:] - bare).abs().max()):.2g}"


def mixed_ours(method: Any) -> float:
    model = llama()
    bare = model(input_ids=IDS[:1]).logits
    with_ours(model, method)
    with spectune.route(model, [None, "task"]):
        return float((model(input_ids=IDS).logits[:1] - bare).abs().max())


def checkpointing(model: Any) -> float:
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.enable_grad():
        model(input_ids=IDS, labels=IDS).loss.backward()
    return max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)


def load_trainable(folder: Path) -> str:
    with_peft(llama(), peft_type="PROMPT_TUNING", num_virtual_tokens=4).save_pretrained(folder)
    peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    return "loads"


def cases(folder: Path) -> list[Case]:
    prompt = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    prefix = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}
    return [
        (
            "A target that matches nothing, beside one that does (`q_proj`, `v_porj`)",
            lambda: trained(with_peft(llama(), peft_type="LORA", target_modules=["q_proj", "v_porj"])),
            lambda: trained(with_ours(llama(), LoRA(target_modules=("q_proj", "v_porj")))),
            "tests/contract/test_contract.py::test_a_failed_attach_leaves_nothing",
        ),
        (
            "Prompt tuning: how far left padding moves a row's last logits",
            lambda: padding_moves(with_peft(llama(), **prompt)),
            lambda: padding_moves(with_ours(llama(), PromptTuning(num_virtual_tokens=4))),
            "test_contract.py::test_left_right_and_no_padding_give_the_same_logits",
        ),
        (
            "Prefix tuning: the same",
            lambda: padding_moves(with_peft(llama(), **prefix)),
            lambda: padding_moves(with_ours(llama(), PrefixTuning(num_virtual_tokens=4))),
            "the same test",
        ),
        (
            "Prefix tuning past a sliding window (one layer): how far a prefix of other values moves the last logits",
            lambda: window(lambda m: with_peft(m, **prefix)),
            lambda: window(lambda m: with_ours(m, PrefixTuning(num_virtual_tokens=4))),
            "tests/deltas/test_prefix_window.py",
        ),
        (
            "Prefix tuning with gradient checkpointing: largest gradient",
            lambda: checkpointing(with_peft(llama(), **prefix)),
            lambda: checkpointing(with_ours(llama(), PrefixTuning(num_virtual_tokens=4))),
            "test_contract.py::test_gradient_checkpointing_changes_nothing",
        ),
        (
            "A folder with a surplus tensor (a layer that the base has not)",
            lambda: surplus(
                lambda: with_peft(llama(), **LORA),
                lambda m, f: m.save_pretrained(f),
                lambda m, f: peft.PeftModel.from_pretrained(m, f),
            ),
            lambda: surplus(
                lambda: spectune.attach(llama(), LoRA(target_modules=("q_proj", "v_proj"))),
                lambda d, f: d.save(f),
                lambda m, f: spectune.load_delta(m, f),
            ),
            "test_contract.py::test_load_refuses_missing_surplus_and_misshapen_tensors_all_at_once",
        ),
        (
            "A row routed to the bare base beside a row of IA3: how far it is from the base",
            lambda: mixed("IA3"),
            lambda: mixed_ours(spectune.IA3()),
            "test_routes.py::test_logits_and_gradients_of_a_mixed_batch_equal_solo_runs",
        ),
        (
            "The same beside a row of prompt tuning",
            lambda: mixed("PROMPT"),
            lambda: mixed_ours(PromptTuning(num_virtual_tokens=4)),
            "the same test",
        ),
        (
            "Loading a stored prompt for further training",
            lambda: load_trainable(folder / "prompt"),
            lambda: _ours_trainable(folder / "ours"),
            "test_peft.py::test_there_and_back_with_one_step_of_training",
        ),
        (
            "Base weights trainable again after the method was taken off (of 21)",
            lambda: f"{sum(p.requires_grad for p in with_peft(llama(), **LORA).unload().parameters())}",
            _ours_after_detach,
            "test_contract.py::test_detach_restores_the_base_bit_for_bit",
        ),
        (
            "LoRA merged into bfloat16: mean logit error as a share of the delta's mean effect",
            _peft_merge,
            _ours_merge,
            "test_contract.py::test_merge_matches_or_is_refused, tests/cli/test_merge.py",
        ),
        (
            "Hooks left on the model by Ctrl-C inside a mixed batch of LoRA",
            _peft_hooks,
            _ours_hooks,
            "test_routes.py::test_after_an_error_inside_a_mixed_forward_nothing_is_left",
        ),
    ]


def _ours_trainable(folder: Path) -> str:
    model = llama()
    spectune.attach(model, PromptTuning(num_virtual_tokens=4)).save(folder)
    delta = spectune.load_delta(llama(), folder, trainable=True)
    return f"loads, {sum(p.numel() for p in delta.parameters() if p.requires_grad)} weights trainable"


def _ours_after_detach() -> str:
    model = with_ours(llama(), LoRA(target_modules=("q_proj", "v_proj")))
    spectune.detach(model, "task")
    return str(sum(p.requires_grad for p in model.parameters()))


def _small(parameters: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.05)


def _peft_merge() -> str:
    bare = llama(torch.bfloat16)(input_ids=IDS).logits.float()
    model = with_peft(llama(torch.bfloat16), **LORA)
    _small([p for p in model.parameters() if p.requires_grad])
    unmerged = model(input_ids=IDS).logits.float()
    merged = model.merge_and_unload()(input_ids=IDS).logits.float()
    return f"{float((merged - unmerged).abs().mean() / (unmerged - bare).abs().mean()):.0%}, no error"


def _ours_merge() -> str:
    model = with_ours(llama(torch.bfloat16), LoRA(r=4, target_modules=("q_proj", "v_proj")))
    _small(list(attached(model)["task"].parameters()))
    spectune.merge(model, "task")
    return "merged"


def _peft_hooks() -> str:
    model = with_peft(llama(), **LORA)
    inner = model.get_base_model()
    return hooks_after_error(inner, lambda: model(input_ids=IDS, adapter_names=["__base__", "default"]))


def _ours_hooks() -> str:
    model = with_ours(llama(), LoRA(target_modules=("q_proj", "v_proj")))
    before = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    def run() -> None:
        with spectune.route(model, [None, "task"]):
            model(input_ids=IDS)

    return f"{int(hooks_after_error(model, run)) - before}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [(what, attempt(theirs), attempt(ours), test) for what, theirs, ours, test in cases(Path(folder))]
    versions = ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch"))
    lines = [
        "# What fails in silence elsewhere",
        "",
        f"Made by `python benchmarks/peft_failures.py --page docs/correctness.md` on {date.today()}: {versions}, CPU, "
        "tiny random models. Each row is one case, run with PEFT and with spectune, and the test that would catch it "
        "here (in tests/contract where no folder is named). The contract, cell by cell: [contract.md](contract.md).",
        "",
        "| case | PEFT | spectune | test |",
        "|---|---|---|---|",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
        "",
    ]
    print("\n".join(lines))
    if args.page:
        # what stands below the table is not of these cases, and stays
        before = args.page.read_text(encoding="utf-8") if args.page.exists() else ""
        below = before[before.index("\n## ") :] if "\n## " in before else ""
        args.page.write_text("\n".join(lines) + below, encoding="utf-8")


if __name__ == "__main__":
    main()
