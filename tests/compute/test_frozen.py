"""Quantised frozen linears against float64: values, gradients, what is kept, compiled, cast."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from spectune.blocks.compile import compiler_settings
from spectune.compute import fp8
from spectune.compute.fp8 import FrozenFp8Linear, quantise_rows
from spectune.compute.frozen import FrozenLinear
from spectune.compute.int8 import FrozenInt8Linear
from spectune.compute.nf4 import FrozenNf4Linear
from spectune.errors import ConfigError

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="NF4 needs bitsandbytes"
)
#: half a unit of e4m3's last place: relative of normal numbers, and of those below 2^-6 in units of the scale
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10
KINDS = [FrozenFp8Linear, FrozenInt8Linear, pytest.param(FrozenNf4Linear, marks=needs_bitsandbytes)]


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different size, one with an outlier: what one scale for all would round away."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.logspace(-4, 3, shape[-2])[:, None]
    x[..., 0, 3] *= 50
    return x


def rounding(x: Tensor) -> Tensor:
    """The most that quantising each element of `x` `[rows, n]` may be off by, float64."""
    scale = x.abs().amax(-1, keepdim=True).double() / 448
    return torch.maximum(RELATIVE * x.abs().double(), ABSOLUTE * scale) * (1 + 1e-6)


def test_a_rows_elements_are_off_by_at_most_half_a_unit_of_e4m3() -> None:
    x = rows(64, 128)
    q, scale = quantise_rows(x)
    assert q.dtype == torch.float8_e4m3fn
    assert scale.shape == (64, 1)
    off = (q.double() * scale.double() - x.double()).abs()
    assert bool((off <= rounding(x)).all())
    assert float((off / x.double().abs()).max()) > RELATIVE / 2, "nothing was quantised"
    assert torch.equal(q.float().abs().amax(-1), torch.full((64,), 448.0)), "each row uses all of the range"


def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_stays_visible() -> None:
    x = rows(4, 32)
    x[0], x[1, 5], x[2, 5], x[3] = 0, torch.nan, torch.inf, 1e-38
    q, scale = quantise_rows(x)
    decoded = q.float() * scale
    assert torch.equal(decoded[0], torch.zeros(32))
    assert bool(decoded[1].isnan().all())
    assert not bool(decoded[2].isfinite().any())
    assert bool(decoded[3].isfinite().all())


def test_the_product_is_within_what_follows_from_e4m3() -> None:
    x, weight = rows(24, 64), rows(48, 64, seed=1)
    layer = FrozenFp8Linear(weight, None)
    exact = x.double() @ weight.double().T
    off = (layer(x).double() - exact).abs()
    off_x, off_w = rounding(x), rounding(weight)
    bound = off_x @ weight.double().abs().T + x.double().abs() @ off_w.T + off_x @ off_w.T
    assert bool((off <= bound + 1e-5 * x.double().abs() @ weight.double().abs().T).all())


def test_of_normal_numbers_the_product_is_off_by_4_percent() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 256, generator=generator), torch.randn(96, 256, generator=generator)
    exact = x.double() @ weight.double().T
    off = FrozenFp8Linear(weight, None)(x).double() - exact
    assert 0.03 < float(off.norm() / exact.norm()) < 0.045


def test_the_inputs_gradient_is_within_what_follows_from_e4m3() -> None:
    x, weight, grad = rows(24, 64).requires_grad_(), rows(48, 64, seed=1), rows(24, 48, seed=2)
    layer = FrozenFp8Linear(weight, None)
    layer(x).backward(grad)
    assert x.grad is not None
    exact = grad.double() @ weight.double()
    folded = grad * layer.weight_scale.T
    off_g, stored = rounding(folded), layer.weight.double().abs()
    off_w = rounding(weight)
    bound = off_g @ stored + grad.double().abs() @ off_w
    off = (x.grad.double() - exact).abs()
    assert bool((off <= bound + 1e-5 * grad.double().abs() @ weight.double().abs()).all())
    assert layer.weight.grad is None


def test_the_scale_of_the_weight_is_folded_before_the_gradient_is_quantised() -> None:
    """Outputs whose weights are small would else be rounded as coarsely as those whose weights are large count."""
    weight = torch.cat([torch.full((16, 32), 1e-6), torch.ones(16, 32)])
    grad = torch.cat([torch.full((1, 16), 1e3), torch.full((1, 16), 1e-3)], dim=1)
    x = torch.zeros(1, 32, requires_grad=True)
    FrozenFp8Linear(weight, None)(x).backward(grad)
    assert x.grad is not None
    exact = float((grad.double() @ weight.double())[0, 0])
    assert float(x.grad[0, 0]) == pytest.approx(exact, rel=RELATIVE)


def test_the_tensor_cores_product_is_called_as_the_reference_computes() -> None:
    """The call that CUDA gets; this CPU runs it too, where its torch can."""
    a, scale_a = quantise_rows(rows(24, 64))
    b, scale_b = quantise_rows(rows(48, 64, seed=1))
    try:
        found = fp8._kernel(a, scale_a, b, scale_b)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no scaled product on this CPU: {error}")
    assert found.dtype == torch.bfloat16
    exact = fp8._reference(a, scale_a, b, scale_b)
    size = (a.float().abs() @ b.float().abs().T) * scale_a * scale_b.T
    assert float(((found.float() - exact).abs() / size).max()) < 2**-8
    turned, ones = b.t().contiguous(), torch.ones(64, 1)
    c, scale_c = quantise_rows(rows(24, 48, seed=2))
    backward = fp8._kernel(c, scale_c, turned, ones)
    assert float((backward.float() - (c.float() * scale_c) @ b.float()).norm() / backward.float().norm()) < 0.01


def test_a_trace_without_data_goes_through_the_product_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        layer = FrozenFp8Linear(torch.empty(32, 64, dtype=torch.bfloat16), None)
        x = torch.empty(3, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    calls = []
    for kind in ("_kernel", "_reference"):
        plain: Callable[..., Tensor] = getattr(fp8, kind)
        monkeypatch.setattr(fp8, kind, lambda *a, kind=kind, plain=plain: (calls.append(kind), plain(*a))[1])
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(fp8, "meta_runs_as", device)
        y = layer(x)
        assert (y.shape, y.dtype) == ((3, 5, 32), torch.bfloat16)
        y.sum().backward()
    assert calls == ["_kernel", "_kernel", "_reference", "_reference"]
    assert x.grad is not None
    assert x.grad.shape == x.shape


# -- all three formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_decoded_weight(kind: type[FrozenLinear], dtype: torch.dtype) -> None:
    weight, bias = torch.randn(48, 64, dtype=dtype) * 0.1, nn.Parameter(torch.randn(48, dtype=dtype))
    layer = kind(weight, bias)
    decoded = layer.dequantised()
    assert decoded.dtype == torch.float32
    assert (
        0 < float((decoded - weight.float()).norm() / weight.float().norm()) < {"nf4": 0.15}.get(kind.precision, 0.05)
    )
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (2, 5, 48))
    grad = torch.randn(2, 5, 48, dtype=dtype)
    y.backward(grad)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    exact = x.detach().double() @ decoded.double().T + bias.detach().double()
    exact_grad = grad.double() @ decoded.double()
    allowed = 0.05 if kind is FrozenFp8Linear else 1e-6 if dtype == torch.float32 else 0.01
    assert float((y.detach().double() - exact).norm() / exact.norm()) < allowed
    assert float((x.grad.double() - exact_grad).norm() / exact_grad.norm()) < allowed
    assert bias.grad is not None
    assert torch.allclose(bias.grad.float(), grad.float().sum((0, 1)), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_input_nor_a_decoded_weight_is_kept_for_backward(kind: type[FrozenLinear]) -> None:
    layer = kind(torch.randn(48, 64), None)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(torch.randn(200, 64, requires_grad=True))
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    assert [t.shape for t in kept if t.data_ptr() not in own] == []
    assert kept


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager_without_a_break(kind: type[FrozenLinear]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = nn.Sequential(kind(torch.randn(48, 64) * 0.1, None), nn.GELU(), kind(torch.randn(64, 48) * 0.1, None))
    x = torch.randn(7, 64)
    found = []
    for call in (block, torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)):
        given = x.clone().requires_grad_()
        y = call(given)
        y.sin().sum().backward()
        found.append((y.detach(), given.grad))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


@pytest.mark.parametrize("budget", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_block_keeps_no_decoded_weight_for_backward(kind: type[FrozenLinear], budget: float) -> None:
    torch._dynamo.reset()
    block = nn.Sequential(kind(torch.randn(48, 64), None), nn.GELU(), kind(torch.randn(64, 48), None))
    kept: list[Tensor] = []
    decodes = {"forward": 0, "backward": 0}

    def compiler(name: str) -> Callable[..., object]:
        def compile_graph(graph: fx.GraphModule, _: object) -> object:
            if name == "forward":
                [returned] = graph.graph.find_nodes(op="output")
                kept.extend(node.meta["val"] for node in returned.args[0])  # type: ignore[union-attr]
            decodes[name] = sum("decode" in str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        return compile_graph

    backend = aot_autograd(
        fw_compiler=compiler("forward"), bw_compiler=compiler("backward"),
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )  # fmt: skip
    with compiler_settings(budget):
        x = torch.randn(7, 64, requires_grad=True)
        torch.compile(block, backend=backend, fullgraph=True)(x).sin().sum().backward()
    assert x.grad is not None
    assert kept
    decoded = [t for t in kept if t.is_floating_point() and t.element_size() > 1 and t.numel() == 48 * 64]
    assert decoded == []
    if kind is FrozenNf4Linear:
        assert decodes == {"forward": 2, "backward": 2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FrozenFp8Linear, FrozenInt8Linear])
def test_inductor_equals_eager(kind: type[FrozenLinear]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = kind(torch.randn(48, 64) * 0.1, nn.Parameter(torch.randn(48)))
    x = torch.randn(32, 64)
    found = []
    for call in (layer, torch.compile(copy.deepcopy(layer), fullgraph=True)):
        given = x.clone().requires_grad_()
        y = call(given)
        y.sin().sum().backward()
        found.append((y.detach(), given.grad))
    assert float((found[0][0] - found[1][0]).norm() / found[0][0].norm()) < 0.01  # a rounding may fall the other way
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_casting_the_model_leaves_the_stored_weight_alone(kind: type[FrozenLinear]) -> None:
    model = nn.Sequential(kind(torch.randn(48, 64), nn.Parameter(torch.randn(48))), nn.LayerNorm(48))
    before = [(t.dtype, t.detach().clone()) for n, t in sorted(model[0].state_dict().items()) if n != "bias"]
    model.to(torch.bfloat16)
    assert model[0].bias.dtype == model[1].weight.dtype == torch.bfloat16
    for (dtype, old), (_, new) in zip(
        before, [i for i in sorted(model[0].state_dict().items()) if i[0] != "bias"], strict=True
    ):
        assert new.dtype == dtype
        assert torch.equal(new, old)
    assert model(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    again = copy.deepcopy(model)
    assert torch.equal(again[0].dequantised(), model[0].dequantised())


def test_activations_that_the_model_casts_to_the_weights_dtype_are_refused() -> None:
    layer = FrozenFp8Linear(torch.randn(32, 32), None)
    with pytest.raises(TypeError, match=r"float8_e4m3fn came to this linear: the model's own code casts"):
        layer(torch.randn(2, 32).to(layer.weight.dtype))


@needs_bitsandbytes
def test_nf4_decodes_rows_that_are_no_multiple_of_its_blocks() -> None:
    weight = torch.randn(672, 224, generator=torch.Generator().manual_seed(0))
    off = FrozenNf4Linear(weight, None).dequantised() - weight
    assert float(off.norm() / weight.norm()) < 0.1


# -- devices --------------------------------------------------------------------------------------------------------


def test_devices_without_fp8_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    cuda = torch.device("cuda")
    with pytest.raises(ConfigError, match=r"8\.9 or newer.*NVIDIA A100 has 8\.0.*nf4 or int8"):
        fp8.check_device(cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.check_device(cuda, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"computes in torch\.float32: load it with dtype bfloat16"):
        fp8.check_device(cuda, torch.float32)
    with pytest.raises(ConfigError, match="no fp8 products on mps"):
        fp8.check_device(torch.device("mps"), torch.bfloat16)
    fp8.check_device(torch.device("cpu"), torch.float32)
