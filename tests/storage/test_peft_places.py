"""PEFT's folders whose config names other modules than its tensors are for; and what ours name in PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from spectune.deltas import attach, attached, detach
from spectune.errors import DataError
from spectune.methods import DoRA, LoRA
from spectune.storage import load_delta
from tests.contract.conftest import move, tokens
from tests.contract.families import gpt2, llama, mixtral
from tests.deltas.test_target_names import SLOW, with_a_vision_tower

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def make(family: Callable[[], PreTrainedModel] = llama) -> PreTrainedModel:
    torch.manual_seed(7)
    return family().eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT writes of a LoRA on queries and values."""
    folder = tmp_path_factory.mktemp("peft") / "written"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(make(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def changed(written: Path, tmp_path: Path) -> Callable[..., Path]:
    """That folder with some keys of its config changed; its weights under other names."""

    def change(rename: Callable[[str], str] = str, **keys: Any) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        config = json.loads((written / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **keys}))
        tensors = load_file(written / "adapter_model.safetensors")
        save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
        return folder

    return change


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens()).logits
    return found


OTHERWISE: dict[str, dict[str, Any]] = {
    "names that match nothing": {"target_modules": ["q_proj", "v_proj", "w1", "gate"]},
    "more than was trained": {"target_modules": ["q_proj", "v_proj", "k_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "a pattern of more": {"target_modules": r".*\.(q|k|v|o)_proj"},
    "none given": {"target_modules": None},
    "layers past the last": {"layers_to_transform": [0, 1, 2, 99]},
    "layers of a list by name": {"layers_to_transform": [0, 1, 2], "layers_pattern": ["h", "layers"]},
    "nothing excluded": {"exclude_modules": ["nix"]},
    "excluded elsewhere": {"exclude_modules": r".*mlp.*"},
    "patterns of nothing": {"rank_pattern": {"nix": 7, ".*lm_head": 3}, "alpha_pattern": {"nix": 7}},
    "ranks said twice": {"r": 9, "rank_pattern": {".*_proj": 4, "q_proj": 9}},
    "alphas": {"alpha_pattern": {"nix": 5, r"1\.self_attn\.q_proj": 3, "q_proj": 2}},
    "another start": {"init_lora_weights": "orthogonal"},
    "what only its backward pass sees": {"velora_config": {"num_groups": 4}},
    # what its config leaves out PEFT leaves out
    "less than was trained": {"target_modules": ["q_proj"]},
    "some excluded": {"exclude_modules": ["v_proj"]},
    "one layer": {"layers_to_transform": 1},
    "a layer by pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_its_answers_are_pefts_whatever_its_config_names(
    case: str, changed: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There, here, and back there."""
    folder = changed(**OTHERWISE[case])
    expected = logits(peft.PeftModel.from_pretrained(make(), folder).eval())
    ours = make()
    delta = load_delta(ours, folder, "task")
    assert float((logits(ours) - expected).abs().max()) <= 1e-5
    fewer = list(OTHERWISE).index(case) >= list(OTHERWISE).index("less than was trained")
    assert any("its config leaves out what it has weights for" in r.getMessage() for r in caplog.records) is fewer
    delta.save(tmp_path / "back")
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "back").eval()
    assert float((logits(back) - expected).abs().max()) <= 1e-5
    again = make()
    assert load_delta(again, tmp_path / "back", "task").method == delta.method


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"target_modules": ["up_proj"]}, "name none of the modules that its weights are for"),
        ({"rank_pattern": {"q_proj": 7}}, r"wrong shape: .*q_proj\.lora_A"),
        ({"layers_pattern": "(", "layers_to_transform": [0]}, "cannot be read"),
        ({"exclude_modules": SLOW}, "is not matched in"),
        ({"layers_to_transform": ["0"]}, "expected int or a list of numbers"),
        ({"init_lora_weights": "pissa_niter_4"}, "took a part of the base's weights.*path_initial_model_for"),
        ({"init_lora_weights": "corda"}, "took a part of the base's weights.*from the data"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "took a part.*rounds the base's weights"),
        ({"init_lora_weights": "new"}, "is not known"),
        ({"kasa_config": {"beta": 1.0}}, "uses kasa_config"),
        ({"use_qalora": True, "arrow_config": {"top_k": 2}}, "uses arrow_config, use_qalora"),
        ({"lora_bias": True, "bias": "all"}, "uses lora_bias, bias"),
        ({"alora_invocation_tokens": [1]}, "uses alora_invocation_tokens"),
        ({"use_of_2027": {"a": 1}}, r"does not know: use_of_2027 = .*not ignored"),
        ({"peft_type": "LOHA"}, "'LOHA' is not a method.*merge_and_unload"),
    ],
)
def test_what_would_not_answer_alike_is_refused_by_name(
    keys: dict[str, Any], said: str, changed: Callable[..., Path]
) -> None:
    model = make()
    with pytest.raises(DataError, match=f"(?s)changed.*{said}"):
        load_delta(model, changed(**keys))
    assert not attached(model)


def test_a_key_that_says_nothing_is_no_matter(changed: Callable[..., Path]) -> None:
    load_delta(make(), changed(use_of_2027=None, enable_lora=False, another=[]))


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ("layers.2.", "layers.7.", r"model\.layers\.7\.self_attn\.q_proj: there is no such linear"),
        ("model.layers.0.self_attn.q_proj", "lm_head", "lm_head: the head"),
        ("layers.0.self_attn.q_proj", "embed_tokens", r"model\.embed_tokens: the token embeddings"),
    ],
)
def test_tensors_for_places_that_are_not_here_are_all_named(
    there: str, here: str, said: str, changed: Callable[..., Path]
) -> None:
    folder = changed(lambda name: name.replace(there, here), target_modules=None)
    with pytest.raises(DataError, match=said):
        load_delta(make(), folder)


TARGETS: dict[str, tuple[Callable[[], PreTrainedModel], tuple[Any, ...]]] = {
    "llama": (llama, ("all-linear", ("q_proj", "mlp.down_proj"), r".*layers\.1\.self_attn.*")),
    "gpt2": (gpt2, ("all-linear", ("attn.c_proj",), ("c_proj",))),
    "mixture": (mixtral, ("all-linear", ("q_proj", "o_proj"))),
    "vision-language": (with_a_vision_tower, ("all-linear", ("q_proj", "v_proj"), ("up_proj",))),
}


@pytest.mark.parametrize("family", TARGETS)
def test_peft_wraps_the_modules_that_were_trained_and_no_other(family: str, tmp_path: Path) -> None:
    """Of a LoRA or DoRA that spectune writes; the list is short where short names are exact."""
    build, wanted = TARGETS[family]
    for number, target in enumerate(wanted):
        model = make(build)
        method = (DoRA if number == 1 else LoRA)(r=2, target_modules=target)
        delta = attach(model, method, "task")
        move(delta)
        expected, sites = logits(model), {site.path for site, _ in delta.sites}
        delta.save(tmp_path / str(number))
        detach(model, "task")
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / str(number)).eval()
        found = {
            name.removeprefix("base_model.model.")
            for name, module in wrapped.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        assert found == sites
        assert float((logits(wrapped) - expected).abs().max()) <= 1e-5
        names = json.loads((tmp_path / str(number) / "adapter_config.json").read_text())["target_modules"]
        assert isinstance(names, list)
        if family == "llama" and target == "all-linear":
            assert names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        if family == "gpt2" and target == ("attn.c_proj",):
            assert names == ["attn.c_proj"]
