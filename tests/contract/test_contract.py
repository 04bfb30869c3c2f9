"""The contract of every method (points 1 to 6), over METHODS x families, against the bare base and plain forms."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from spectune.deltas import Delta, Method, attach, attached, detach, merge, route
from spectune.errors import ConfigError, DataError
from spectune.methods import METHODS, LoRA, PrefixTuning, PromptTuning
from spectune.storage import load_delta
from tests.contract.conftest import CASES, REFUSED, move, of_each_kind, padded, put_on, tokens
from tests.contract.families import CONTEXT, FAMILIES, VOCABULARY

Make = Callable[[], PreTrainedModel]
TOLERANCE = 1e-5


def test_every_method_has_a_case() -> None:
    assert {type(method) for method in CASES.values()} == set(METHODS)


@pytest.mark.parametrize(("refusing", "case"), list(REFUSED))
def test_what_a_family_cannot_take_is_refused_in_words(refusing: str, case: str) -> None:
    torch.manual_seed(7)
    model = FAMILIES[refusing]().eval()
    with pytest.raises(ConfigError, match=REFUSED[refusing, case]):
        put_on(model, CASES[case])
    assert not attached(model)


def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert a.shape == b.shape
    worst = float((a - b).abs().max())
    assert worst <= tolerance, f"largest difference {worst:.3g}"


# -- 1: identity at the start ---------------------------------------------------------------------------------------


def test_starts_at_the_base_or_not_as_the_method_says(make_model: Make, method: Method) -> None:
    model = make_model()
    model.set_attn_implementation("eager")
    before = logits(model, tokens())
    put_on(model, method)
    after = logits(model, tokens())
    assert torch.equal(before, after) is method.starts_at_identity


# -- 2: gradients ---------------------------------------------------------------------------------------------------


def test_every_weight_gets_gradient_within_two_steps_and_no_base_weight_does(
    model: PreTrainedModel, family: str, delta: Delta
) -> None:
    base = {name for name, _ in model.named_parameters()} - {
        name for name, p in model.named_parameters() if any(p is q for q in delta.parameters())
    }
    ids, mask = padded([tokens(1, 9)[0], tokens(1, 4, seed=6)[0]], "right")
    labels = ids.masked_fill(mask == 0, -100)
    moved: set[str] = set()
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        moved |= {
            name for name, p in delta.named_parameters() if p.grad is not None and bool((p.grad.abs() > 1e-9).any())
        }
        optimizer.step()
    # softmax does not change when every key moves by one and the same vector: without rotary positions the gradient
    # of a key bias is zero by mathematics (in GPT-2's fused bias it is the middle third, so no whole tensor is excused)
    assert moved == {name for name, _ in delta.named_parameters()}
    if not delta.method.trains_base:
        named = dict(model.named_parameters())
        assert all(named[name].grad is None for name in base)


def test_every_unit_of_the_prefix_and_of_every_adapter_gets_gradient(model: PreTrainedModel, delta: Delta) -> None:
    """No slot of a prefix and no layer's adapter is counted as trained and left out."""
    move(delta)
    ids, mask = padded([tokens(1, 9)[0], tokens(1, 4, seed=6)[0]], "left")
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    for site, module in delta.sites:
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{site.path}.{name}"
            assert bool(parameter.grad.any()), f"{site.path}.{name}"
            if name in ("key", "value") and parameter.dim() == 3:
                per_slot = parameter.grad.abs().amax(dim=(0, 2))
                assert bool((per_slot > 0).all()), f"{site.path}.{name}: a slot without gradient"
            if name == "prompt_embeddings":
                assert bool((parameter.grad.abs().amax(dim=1) > 0).all())


def test_every_site_changes_the_output(make_model: Make, family: str, method: Method) -> None:
    if method.trains_base:
        pytest.skip("full fine-tuning has no sites")
    model = make_model()
    delta = put_on(model, method)
    before = logits(model, tokens())
    for site, module in delta.sites:
        state = copy.deepcopy(module.state_dict())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        if (family, method.name) == ("opt", "bitfit") and site.path.endswith("k_proj"):
            # softmax does not change when all keys move by one vector, and nothing turns it with the position
            close(logits(model, tokens()), before, 1e-5)
        else:
            assert not torch.allclose(logits(model, tokens()), before, atol=1e-6), f"{site.path} has no effect"
        module.load_state_dict(state)
    assert torch.equal(logits(model, tokens()), before)


# -- 3: padding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_right_and_no_padding_give_the_same_logits(
    make_model: Make, family: str, method: Method, attention: str
) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    move(put_on(model, method))
    rows = [tokens(1, 9)[0], tokens(1, 4, seed=6)[0]]
    alone = [logits(model, row[None])[0] for row in rows]
    for side in ("right", "left"):
        ids, mask = padded(rows, side)
        given = {}
        if family == "gpt2" and method.virtual_tokens == 0:  # absolute positions: what generate would pass
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        together = logits(model, ids, attention_mask=mask, **given)
        for i in range(len(rows)):
            close(together[i][mask[i] == 1], alone[i], 1e-4)


@of_each_kind
def test_padding_in_generate(model: PreTrainedModel, delta: Delta) -> None:
    move(delta, 0.2)
    rows = [tokens(1, 9)[0], tokens(1, 4, seed=6)[0]]
    alone = [
        model.generate(row[None], attention_mask=torch.ones(1, len(row)), max_new_tokens=6, do_sample=False)[
            0, len(row) :
        ]
        for row in rows
    ]
    ids, mask = padded(rows, "left")
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    for row, expected in zip(together, alone, strict=True):
        assert row.tolist()[: len(expected)] == expected.tolist()


# -- 4: attention, checkpointing, caches, compile -------------------------------------------------------------------


def test_eager_equals_sdpa(make_model: Make, method: Method) -> None:
    results = []
    for attention in ("eager", "sdpa"):
        model = make_model()
        model.set_attn_implementation(attention)
        move(put_on(model, method))
        results.append(logits(model, tokens()))
    close(*results)


@of_each_kind
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_may_be_set_after_attach(make_model: Make, method: Method, attention: str) -> None:
    """A prefix must not be left out because somebody chose another attention function later."""
    model = make_model()
    move(put_on(model, method))
    expected = logits(model, tokens())
    model.set_attn_implementation(attention)
    close(logits(model, tokens()), expected)


def test_two_models_may_share_one_config_object(make_model: Make) -> None:
    first = make_model()
    second = type(first)(first.config).eval()
    for model in (first, second):
        move(put_on(model, PrefixTuning(num_virtual_tokens=5)))
    expected = logits(first, tokens())
    detach(second, "task")
    close(logits(first, tokens()), expected)


@of_each_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(make_model: Make, method: Method, reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = make_model()
        delta = put_on(model, method)
        move(delta)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        ids = tokens()
        with route(model, "task"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()  # outside the route: recomputation uses the captured one
        results.append((loss.detach(), {name: p.grad for name, p in delta.named_parameters()}))
    close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        close(gradient, results[1][1][name])


def test_recomputation_uses_the_route_of_the_forward_pass(make_model: Make) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_model()
        first = put_on(model, LoRA(r=2), "first")
        move(first)
        move(put_on(model, LoRA(r=3), "second"))  # the active one
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with route(model, "first"):
            loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        gradients.append([p.grad for p in first.parameters()])
    for a, b in zip(*gradients, strict=True):
        close(a, b)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generation_equals_repeated_forwards(model: PreTrainedModel, delta: Delta, cache: str) -> None:
    move(delta, 0.2)
    ids = tokens(2, 7)
    sequence = ids
    for _ in range(4):
        step = logits(model, sequence, attention_mask=torch.ones_like(sequence))[:, -1].argmax(-1)
        sequence = torch.cat([sequence, step[:, None]], dim=1)
    settings = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        **({} if cache == "dynamic" else settings),
    )
    assert generated.shape == sequence.shape
    # eos (id 0) is kept out by min_new_tokens; the plain loop may take it, so compare up to its first
    for mine, plain in zip(generated.tolist(), sequence.tolist(), strict=True):
        end = plain.index(0, 7) if 0 in plain[7:] else len(plain)
        assert mine[:end] == plain[:end]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_logits_equal_uncached(model: PreTrainedModel, delta: Delta, cache: str) -> None:
    from transformers import DynamicCache, StaticCache

    move(delta)
    ids = tokens(2, 9)
    whole = logits(model, ids, use_cache=False)
    store = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=16)
    pieces = [
        logits(model, ids[:, a:b], past_key_values=store, attention_mask=torch.ones(2, b))
        for a, b in ((0, 6), (6, 7), (7, 9))
    ]
    close(torch.cat(pieces, dim=1), whole)


@of_each_kind
@pytest.mark.parametrize(
    "search",
    [
        pytest.param({"num_beams": 3}, marks=pytest.mark.slow),  # less than the next one
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["beams", "beams-returned", "sampled"],
)
def test_beams_and_samples_with_cache_write_what_they_write_without(
    model: PreTrainedModel, delta: Delta, search: dict[str, object]
) -> None:
    move(delta)
    rows = [tokens(1, 7)[0], tokens(1, 4, seed=6)[0]]
    ids, mask = padded(rows, "left")
    written = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        how = {"max_new_tokens": 4, "min_new_tokens": 4, "use_cache": use_cache, **search}
        written.append(model.generate(ids, attention_mask=mask, **how))
    assert written[0].shape == (2 * int(str(search.get("num_return_sequences", 1))), 11)
    assert torch.equal(*written)


# -- 5: folders -----------------------------------------------------------------------------------------------------


def test_save_and_load_elsewhere_gives_the_same_logits_bit_for_bit(
    make_model: Make, model: PreTrainedModel, delta: Delta, tmp_path: Path
) -> None:
    move(delta)
    expected = logits(model, tokens())
    delta.save(tmp_path / "task")
    elsewhere = make_model()
    loaded = load_delta(elsewhere, tmp_path / "task", name="again")
    got = logits(elsewhere, tokens())
    if delta.method == delta.method.as_stored() or not isinstance(delta.method, PrefixTuning):
        assert torch.equal(got, expected)
    else:  # the projection is computed once, when it is folded away
        close(got, expected)
    assert loaded.num_parameters() == delta.num_parameters()
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not list((tmp_path / "task").glob("*.bin"))


def test_load_refuses_missing_surplus_and_misshapen_tensors_all_at_once(
    make_model: Make, model: PreTrainedModel, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    put_on(model, LoRA(r=2)).save(tmp_path / "task")
    path = tmp_path / "task" / "adapter_model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    tensors["base_model.model.surplus.lora_A.weight"] = torch.zeros(1)
    tensors[names[1]] = torch.zeros(1, 1)
    del tensors[names[0]]
    save_file(tensors, path)
    elsewhere = make_model()
    with pytest.raises(DataError) as caught:
        load_delta(elsewhere, tmp_path / "task")
    text = str(caught.value)
    assert "missing: " in text
    assert "surplus: surplus.lora_A" in text
    assert "wrong shape: " in text
    assert not attached(elsewhere)
    assert all(p.requires_grad for p in elsewhere.parameters())


@of_each_kind
def test_load_refuses_another_base(make_model: Make, model: PreTrainedModel, delta: Delta, tmp_path: Path) -> None:
    delta.save(tmp_path / "task")
    other = make_model()
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_()
    with pytest.raises(DataError, match="another base"):
        load_delta(other, tmp_path / "task")
    same = make_model().to(torch.bfloat16)
    load_delta(same, tmp_path / "task")  # the same base in lower precision is the same base


@of_each_kind
def test_two_saved_deltas_swapped_by_name(make_model: Make, method: Method, tmp_path: Path) -> None:
    if method.trains_base:
        pytest.skip("full fine-tuning stands alone")
    expected = {}
    for name, size in (("one", 0.05), ("two", 0.1)):
        model = make_model()
        delta = put_on(model, method, name)
        move(delta, size)
        delta.save(tmp_path / name)
        expected[name] = load_and_run(make_model(), tmp_path / name)
    both = make_model()
    bare = logits(both, tokens())
    load_delta(both, tmp_path / "one")
    load_delta(both, tmp_path / "two")
    assert torch.equal(logits(both, tokens()), expected["two"])  # the newest is active, alone
    for name in ("one", "two", "one"):
        with route(both, name):
            assert torch.equal(logits(both, tokens()), expected[name])
    with route(both, None):
        close(logits(both, tokens()), bare)
    detach(both, "two")
    close(logits(both, tokens()), bare)  # detaching the active delta leaves the bare base active
    detach(both, "one")
    assert torch.equal(logits(both, tokens()), bare)


def load_and_run(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    load_delta(model, folder)
    return logits(model, tokens())


def test_the_folder_keeps_the_convention_of_positions(delta: Delta, tmp_path: Path) -> None:
    delta.save(tmp_path / "task")
    ours = json.loads((tmp_path / "task" / "spectune.json").read_text())
    assert ours["text_positions_start_at"] == delta.method.virtual_tokens


# -- 6: detach, merge -----------------------------------------------------------------------------------------------


def test_detach_restores_the_base_bit_for_bit(make_model: Make, method: Method) -> None:
    model = make_model()
    frozen = next(iter(dict(model.named_parameters())))
    model.get_parameter(frozen).requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    attention = model.config._attn_implementation
    before = logits(model, tokens())
    delta = put_on(model, method)
    ids = tokens()
    optimizer = torch.optim.SGD([p for p in delta.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    detach(model, "task")
    assert torch.equal(logits(model, tokens()), before)
    assert {name: t.shape for name, t in model.state_dict().items()} == {name: t.shape for name, t in state.items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert model.config._attn_implementation == attention
    assert all(p.grad is None for p in model.parameters())


def test_merge_matches_or_is_refused(
    model: PreTrainedModel, family: str, delta: Delta, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    move(delta)
    expected = logits(model, tokens())
    # a type whose config cannot express the bias: no module has a place for it
    bitfit_without_biases = delta.method.name == "bitfit" and not delta.family.biases
    if not delta.method.can_merge or bitfit_without_biases:
        with pytest.raises(ConfigError, match=r"cannot be merged|no bias to merge into") as refused:
            merge(model, "task")
        record_property("refused", str(refused.value).partition(":")[0].splitlines()[0])
        assert torch.equal(logits(model, tokens()), expected)
        return
    merged = merge(model, "task")
    assert not attached(merged)
    assert attached(model)
    close(logits(merged, tokens()), expected, TOLERANCE * float(expected.abs().max()))
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens()), logits(merged, tokens()))
    assert torch.equal(logits(model, tokens()), expected)  # the model merged from is left as it was


# -- what is refused ------------------------------------------------------------------------------------------------


def test_save_pretrained_is_refused_and_names_the_right_call(model: PreTrainedModel, tmp_path: Path) -> None:
    put_on(model, LoRA(r=2))
    with pytest.raises(ConfigError, match=r"delta\.save"):
        model.save_pretrained(tmp_path)
    detach(model, "task")
    model.save_pretrained(tmp_path)


def test_names(model: PreTrainedModel) -> None:
    """Names that are torch attributes, or hold dots, are fine; others are not."""
    for name in ("items", "keys", "a.b", "forward", "-", "training"):
        put_on(model, LoRA(r=1), name)
    with pytest.raises(ConfigError, match="already"):
        put_on(model, LoRA(r=1), "a.b")
    with pytest.raises(ConfigError, match="letters"):
        put_on(model, LoRA(r=1), "a/b")
    for name in ("items", "keys", "a.b", "forward", "-", "training"):
        detach(model, name)
    assert not attached(model)


def test_a_failed_attach_leaves_nothing(model: PreTrainedModel) -> None:
    before = logits(model, tokens())
    with pytest.raises(ConfigError, match="matches no linear"):
        attach(model, LoRA(target_modules=("q_porj",)))
    assert not attached(model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model, tokens()), before)


def test_full_stands_alone(model: PreTrainedModel) -> None:
    from spectune.methods import FullFineTuning

    put_on(model, LoRA(r=1))
    with pytest.raises(ConfigError, match="beside"):
        attach(model, FullFineTuning(), "full")
    detach(model, "task")
    attach(model, FullFineTuning(), "full")
    with pytest.raises(ConfigError, match="beside"):
        put_on(model, LoRA(r=1))
    with pytest.raises(ConfigError, match="keep_base"):
        detach(model, "full")
    with pytest.raises(ConfigError, match="keep_base"), route(model, None):
        pass


def test_the_bare_base_under_full_fine_tuning(make_model: Make) -> None:
    from spectune.methods import FullFineTuning

    model = make_model()
    before = logits(model, tokens())
    delta = attach(model, FullFineTuning(), "full", keep_base=True)
    move(delta)
    tuned = logits(model, tokens())
    with route(model, None):
        assert torch.equal(logits(model, tokens()), before)
    assert torch.equal(logits(model, tokens()), tuned)


def test_virtual_tokens_past_the_context_are_refused_by_name(model: PreTrainedModel, family: str) -> None:
    if family != "gpt2":
        pytest.skip("rotary positions have no table to run out of")
    for method in (PrefixTuning(num_virtual_tokens=5), PromptTuning(num_virtual_tokens=5)):
        put_on(model, method)
        with pytest.raises(ConfigError, match=f"this base has {CONTEXT}"):
            logits(model, tokens(1, CONTEXT - 2))
        logits(model, tokens(1, CONTEXT - 5))
        detach(model, "task")


def test_weights_stay_float32_when_the_base_is_cast(model: PreTrainedModel, delta: Delta) -> None:
    if delta.method.trains_base:
        pytest.skip("full fine-tuning has no weights beside the base's")
    move(delta)
    before = {name: p.detach().clone() for name, p in delta.named_parameters()}
    model.to(torch.bfloat16)
    assert all(torch.equal(p, before[name]) for name, p in delta.named_parameters())
    assert logits(model, tokens()).dtype == torch.bfloat16


def test_outputs_that_a_caller_may_ask_for(model: PreTrainedModel, delta: Delta) -> None:
    move(delta)
    ids = tokens()
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True, logits_to_keep=1)
        as_tuple = model(input_ids=ids, return_dict=False)
    assert out.logits.shape == (3, 1, VOCABULARY)
    assert all(states.shape[:2] == ids.shape for states in out.hidden_states)
    close(as_tuple[0][:, -1:], out.logits)
