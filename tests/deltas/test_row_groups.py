"""Rows of a mixed batch that are computed together: whose are side by side, and that nothing depends on it."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectune.blocks.compile import compiled
from spectune.blocks.recompute import recomputing
from spectune.compute.row_products import row_products
from spectune.deltas import Attachment, Delta, Method, OutputModule, OutputSite, Stacking, attach, detach, route
from spectune.deltas.hooks.module_side import SideHook
from spectune.deltas.modules import Kind, SideModule
from spectune.deltas.row_groups import Grouping
from spectune.methods import IA3, OFT, BitFit, BottleneckAdapter, DoRA, LNTuning, LoRA, MiSS, PrefixTuning
from tests.contract.conftest import CASES, move, tokens
from tests.contract.families import gemma3, gpt2, llama, mixtral


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class _Bump(OutputModule):
    """One number that is added, computed together or alone."""

    def __init__(self, dropout: float = 0.0, *, alone: bool = False) -> None:
        super().__init__()
        self.bump, self.dropout, self.alone = nn.Parameter(torch.ones(3)), dropout, alone

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bump

    def operands(self) -> dict[str, Tensor] | None:
        return None if self.alone else {"bump": self.bump}

    def alike(self) -> Kind:
        return Kind(type(self), (), self.dropout)

    @staticmethod
    def by_row(operands: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + operands["bump"][:, None]


def grouped(text: str, **modules: _Bump) -> tuple[Any, Any, Any]:
    """Sizes of the parts, the batch's rows in their order, and runs and numbers of each group, for rows named by
    letters ("-" is the bare base)."""
    names = tuple(None if letter == "-" else letter for letter in text)
    rows = Grouping(names).make(("path", "side"), modules, Stacking())
    assert rows is not None
    order = None if rows.order is None else rows.order.tolist()
    groups = [part and (part.run, None if part.which is None else part.which.tolist()) for part in rows.parts]
    return rows.sizes, order, groups


def test_rows_side_by_side_are_cut_out_and_nothing_is_moved() -> None:
    a, b, c = _Bump(), _Bump(), _Bump(0.1)
    assert grouped("aabb", a=a, b=b) == ((4,), None, [(2, None)])  # one set of weights for two rows
    assert grouped("aaaabb", a=a, b=b) == ((6,), None, [(2, [0, 0, 1])])
    assert grouped("-aab-cc-", a=a, b=b, c=c) == ((1, 3, 1, 2, 1), None, [None, (1, [0, 0, 1]), None, (2, None), None])
    assert grouped("abab", a=a, b=b) == ((4,), None, [(1, [0, 1, 0, 1])])
    assert grouped("x-a", a=a) == ((2, 1), None, [None, (1, None)])  # a delta that has nothing here is as the base


def test_what_is_computed_one_after_the_other_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Own(_Bump):
        """A kind that nobody has met."""

    with caplog.at_level(logging.INFO, logger="spectune"):
        for text in ("ab", "ba"):
            grouped(text, a=Own(alone=True), b=Own(alone=True))
            grouped(text, a=Own(0.5), b=Own(0.5))
    assert [record.getMessage() for record in caplog.records] == [
        "mixed batches: Own has no form by row, so its deltas run one after the other",
        "mixed batches: Own with dropout draws for each delta, so in training its deltas run one after the other",
    ]


def test_rows_that_are_scattered_are_put_side_by_side_by_delta() -> None:
    a, b, c = _Bump(), _Bump(), _Bump(0.1)
    assert grouped("ac-ab", a=a, b=b, c=c) == ((1, 3, 1), [2, 0, 3, 4, 1], [None, (1, [0, 0, 1]), (1, None)])
    alone = {"a": _Bump(alone=True), "b": _Bump(alone=True)}
    assert grouped("abab", **alone) == ((4,), [0, 2, 1, 3], [(2, None)])  # one delta after the other


@pytest.mark.parametrize("case", [name for name, method in CASES.items() if not method.trains_base])
@pytest.mark.parametrize("make", [gpt2, llama, gemma3, mixtral])
def test_every_method_has_a_form_by_row_and_operands_that_change_nothing(make: Any, case: str) -> None:
    if (make, case) == (mixtral, "prefix-sliding"):
        return
    model = make(1).eval() if make in (gpt2, llama) else make().eval()
    delta = attach(model, CASES[case])
    move(delta)
    for site, module in delta.sites:
        if not isinstance(module, SideModule):
            continue
        assert isinstance(site, OutputSite)
        own, none, kind = module.operands(), module.unchanging(), module.alike()
        assert own is not None
        assert none is not None
        assert own.keys() == none.keys()
        x, y = torch.randn(2, 3, site.in_features), torch.randn(2, 3, site.out_features)
        if type(module).__name__ == "TrainedCopy":  # what it is given is what its host gives
            y = _host_output(model, site.path, x)
        sides = [x] if site.entry else [x, y]
        rows = kind.by_row({name: torch.stack([none[name], own[name]]) for name in own}, *sides)
        torch.testing.assert_close(rows[0], sides[-1][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows[1], module(*(side[1:] for side in sides))[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(rows[1], sides[-1][1], rtol=1e-4, atol=1e-5)


def _host_output(model: PreTrainedModel, path: str, x: Tensor) -> Tensor:
    with route(model, None), torch.no_grad():
        made: Tensor = model.get_submodule(path)(x)
    return made


#: of one kind, unlike in what zeros fill up and in what they do not
UNLIKE: dict[str, Method] = {
    "lora-2": LoRA(r=2),
    "lora-5": LoRA(r=5, use_rslora=True),
    "pissa": LoRA(r=3, init_lora_weights="pissa"),
    "dora-2": DoRA(r=2),
    "dora-5": DoRA(r=5),
    "gelu-3": BottleneckAdapter(bottleneck_dim=3, placement="ffn", dropout=0.0),
    "gelu-8": BottleneckAdapter(bottleneck_dim=8, placement="ffn", dropout=0.0),
    "sigmoid": BottleneckAdapter(bottleneck_dim=5, placement="ffn", dropout=0.0, activation="sigmoid"),
    "prelu": BottleneckAdapter(bottleneck_dim=5, placement="ffn", dropout=0.0, activation="prelu"),
    "parallel": BottleneckAdapter(bottleneck_dim=4, placement="parallel", dropout=0.0),
    "dropping": BottleneckAdapter(bottleneck_dim=4, placement="ffn", dropout=0.5),
    "oft-4": OFT(oft_block_size=4),
    "oft-8": OFT(oft_block_size=8, block_share=True),
    "miss-3": MiSS(r=3),
    "miss-8": MiSS(r=8, init_weights="mini", mini_r=2),
    "bat": MiSS(r=8, init_weights="bat"),
    "ia3": IA3(),
    "ia3-inputs": IA3(target_modules=("c_attn", "mlp.c_proj"), feedforward_modules=("mlp.c_proj",)),
    "bitfit": BitFit(),
    "ln": LNTuning(),
}


def several(make: Any, methods: dict[str, Method]) -> tuple[Any, dict[str, Delta]]:
    torch.manual_seed(2)
    model = make().eval()
    deltas = {name: attach(model, method, name, seed=n) for n, (name, method) in enumerate(methods.items())}
    for delta in deltas.values():
        move(delta)
    return model, deltas


@pytest.mark.parametrize("scattered", [False, True])
def test_unlike_deltas_of_one_kind_equal_their_solo_runs(scattered: bool) -> None:
    model, deltas = several(lambda: gpt2(1), UNLIKE)
    names = [name for name in UNLIKE for _ in (0, 1)] + [None]
    names = names[::3] + names[1::3] + names[2::3] if scattered else names
    ids = tokens(len(names), 5)
    with route(model, names):
        together = model(input_ids=ids).logits
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(1))
    (together * weights).sum().backward()
    found = {name: [p.grad for p in delta.parameters()] for name, delta in deltas.items()}
    model.zero_grad()
    for row, name in enumerate(names):
        with route(model, name):
            alone = model(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5, msg=str(name))
        if name is not None:
            (alone * weights[row]).sum().backward()
    for name, delta in deltas.items():
        for gradient, parameter in zip(found[name], delta.parameters(), strict=True):
            scale = max(1.0, float(parameter.grad.abs().max()))
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_dropout_takes_a_delta_after_the_other_in_training() -> None:
    """Each draws for its own rows what it would draw alone."""
    method = BottleneckAdapter(bottleneck_dim=4, dropout=0.5)
    model, _ = several(lambda: llama(1), {"a": method, "b": method})
    ids = tokens(4, 5)
    model.train()
    with torch.no_grad():
        torch.manual_seed(1)
        with route(model, ["b", "a", "b", "a"]):
            together = model(input_ids=ids).logits
        torch.manual_seed(1)
        for name, rows in (("b", [0, 2]), ("a", [1, 3])):
            with route(model, name):
                torch.testing.assert_close(together[rows], model(input_ids=ids[rows]).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_16_bits_computes_in_its_own_dtype(dtype: torch.dtype) -> None:
    names = ["lora-2", "lora-5", "dora-2", "gelu-3", "oft-4", "miss-3", "ia3", "bitfit", "ln", None]
    model, _ = several(lambda: gpt2(1), {name: UNLIKE[name] for name in names if name is not None})
    model.to(dtype)
    ids = tokens(len(names), 5)
    with torch.no_grad():
        with route(model, names):
            together = model(input_ids=ids).logits
        assert together.dtype == dtype
        for row, name in enumerate(names):
            with route(model, name):
                alone = model(input_ids=ids[row : row + 1]).logits[0].float()
            moved = float((together[row].float() - alone).norm() / alone.norm())
            assert moved <= 2 * torch.finfo(dtype).eps, name


def test_nothing_holds_a_delta_of_a_mixed_batch_that_is_detached() -> None:
    model, deltas = several(lambda: llama(1), {"a": LoRA(r=2), "b": IA3(), "stays": LoRA(r=2)})
    model.train()
    with recomputing(model, True), route(model, ["a", "b", None]):
        loss = model(input_ids=tokens(3, 5)).logits.sum()
    loss.backward()  # computes blocks again, in which the route is in force once more
    found = [weakref.ref(p) for name in ("a", "b") for p in deltas.pop(name).parameters()]
    del loss
    detach(model, "a")
    detach(model, "b")
    gc.collect()
    assert not any(ref() is not None for ref in found)


def test_nothing_holds_a_model_whose_own_modules_were_told_apart_by_row() -> None:
    model, _ = several(lambda: llama(1), {"a": LNTuning(), "b": BottleneckAdapter(activation="prelu")})
    with torch.no_grad(), route(model, ["a", "b"]):
        model(input_ids=tokens(2, 5))
    found = weakref.ref(model)
    del model, _
    gc.collect()
    assert found() is None


def test_a_route_whose_first_pass_ran_in_inference_mode_gives_gradients_later() -> None:
    methods = {"a": LoRA(r=2), "b": IA3(), "c": LoRA(r=2), "prefix": PrefixTuning(num_virtual_tokens=2)}
    model, deltas = several(lambda: llama(1), methods)
    with route(model, ["a", "b", "a", None, "c", "prefix"]):
        with torch.inference_mode():
            model(input_ids=tokens(6, 5))
        model(input_ids=tokens(6, 5)).logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for delta in deltas.values() for p in delta.parameters())


def test_a_mixed_route_may_end_while_another_thread_attaches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = several(lambda: llama(1), {"a": LoRA(r=2), "b": LoRA(r=2)})
    prepare = SideHook.prepare

    def attaching(hook: SideHook, layout: Any) -> None:
        monkeypatch.undo()
        attach(model, LNTuning(), "c")  # at sites that were not open
        prepare(hook, layout)

    with route(model, ["a", "b"]):
        monkeypatch.setattr(SideHook, "prepare", attaching)
    with route(model, ["a", "c"]):
        model(input_ids=tokens(2, 5))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_serve_all_layers_of_a_mixed_route_and_see_another_one() -> None:
    lora = LoRA(r=2, target_modules=("q_proj", "down_proj"))
    methods = {"lora": lora, "other": lora, "ia3": IA3(), "prefix": PrefixTuning(num_virtual_tokens=2)}
    model, deltas = several(llama, methods)
    family = Attachment.of(model).family  # type: ignore[union-attr]
    ids = tokens(5, 6)
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def gradients(names: list[str | None]) -> list[Tensor]:
        model.zero_grad()
        with route(model, names):
            logits = model(input_ids=ids, use_cache=False).logits
        logits.square().sum().backward()
        return [
            logits.detach(),
            *(p.grad.clone() for delta in deltas.values() for p in delta.parameters() if p.grad is not None),
        ]

    model.train()
    routes: list[list[str | None]] = [
        ["lora", "ia3", None, "other", "prefix"],
        ["prefix", "lora", "lora", "ia3", "ia3"],
    ]
    wanted = [gradients(names) for names in routes]
    with compiled(model, family, backend=backend):
        for names, plain in [*zip(routes, wanted, strict=True), (routes[0], wanted[0])]:
            for one, other in zip(gradients(names), plain, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert graphs == 4  # for each route one for all layers but the first, below which nothing is trained


@pytest.mark.usefixtures("fresh_compiler")
def test_one_token_of_each_row_is_multiplied_alike_in_compiled_code() -> None:
    matrices, x = torch.randn(3, 4, 5), torch.randn(3, 1, 5)
    expected = (matrices.double() @ x.double().mT).mT.float()
    torch.testing.assert_close(row_products(matrices, x), expected)
    run = torch.compile(row_products, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(matrices, x), expected)
    half = run(matrices, x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)
