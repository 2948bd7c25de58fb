"""The three forms are one function: equal values, equal gradients, sample by sample."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from weightnet.nn import functional as WF

FORMS = {
    "reference": WF.weightnet_conv2d_reference,
    "feature": WF.weightnet_conv2d_feature,
    "matmul": WF.weightnet_conv2d_matmul,
}
CASES = {  # in, out, kernel, G, r, options
    "dense 1x1": (4, 6, (1, 1), 2, 1, {}),
    "dense 3x3 of two kernels": (4, 3, (3, 3), 2, 2, {"padding": 1, "stride": 2}),
    "depthwise": (3, 3, (3, 3), 1, 1, {"padding": 1, "depthwise": True}),
    "depthwise of three kernels": (3, 3, (3, 3), 1, 3, {"padding": 1, "stride": 2, "depthwise": True}),
}
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]


def make(case: str, batch: int = 3, size: tuple[int, int] = (5, 6), *, grad: bool = False) -> Case:
    torch.manual_seed(0)
    in_channels, out_channels, kernel, G, r, options = CASES[case]
    per_block = 1 if options.get("depthwise") else in_channels // G
    x = torch.randn(batch, in_channels, *size, dtype=torch.float64, requires_grad=grad)
    a = torch.rand(batch, out_channels, G, r, dtype=torch.float64, requires_grad=grad)
    bank = torch.randn(out_channels, G, r, per_block, *kernel, dtype=torch.float64, requires_grad=grad)
    return x, a, bank, options


@st.composite
def layers(draw: st.DrawFn) -> Case:
    depthwise = draw(st.booleans())
    G, r = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    blocks = 1 if depthwise else G
    in_channels = draw(st.integers(1, 3)) * G
    out_channels = in_channels if depthwise else draw(st.integers(1, 4))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pairs = {
        name: draw(st.one_of(st.integers(low, 2), st.tuples(st.integers(low, 2), st.integers(low, 2))))
        for name, low in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    torch.manual_seed(draw(st.integers(0, 99)))
    batch, height, width = draw(st.integers(0, 4)), draw(st.integers(5, 8)), draw(st.integers(5, 8))
    x = torch.randn(batch, in_channels, height, width, dtype=torch.float64)
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    a = torch.rand(batch, out_channels, blocks, r, dtype=torch.float64)
    per_block = 1 if depthwise else in_channels // G
    bank = torch.randn(out_channels, blocks, r, per_block, *kernel, dtype=torch.float64)
    return x, a, bank, {**pairs, "depthwise": depthwise}


@given(layers())
@settings(deadline=None, max_examples=80)
def test_forms_are_equal(layer: Case) -> None:
    x, a, bank, options = layer
    expected = WF.weightnet_conv2d_reference(x, a, bank, **options)
    kernel_size = (bank.shape[4], bank.shape[5])
    pairs = (options["stride"], options["padding"], options["dilation"])
    assert expected.shape[2:] == WF.conv_output_size(x.shape[2:], kernel_size, *pairs)
    for form in (WF.weightnet_conv2d_feature, WF.weightnet_conv2d_matmul):
        torch.testing.assert_close(form(x, a, bank, **options), expected, rtol=0, atol=1e-12)


@given(layers())
@settings(deadline=None, max_examples=30)
def test_reference_is_one_convolution_for_each_sample(layer: Case) -> None:
    x, a, bank, options = layer
    pairs = {name: options[name] for name in ("stride", "padding", "dilation")}
    y = WF.weightnet_conv2d_reference(x, a, bank, **options)
    groups = x.shape[1] if options["depthwise"] else 1
    for n in range(len(x)):
        blocks = [
            sum(a[n, :, g, p, None, None, None] * bank[:, g, p] for p in range(a.shape[3])) for g in range(a.shape[2])
        ]
        alone = F.conv2d(x[n : n + 1], torch.cat(blocks, 1), groups=groups, **pairs)
        torch.testing.assert_close(y[n : n + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_form_treats_each_sample_alone(form: str, case: str) -> None:
    x, a, bank, options = make(case, batch=4)
    y = FORMS[form](x, a, bank, **options)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(FORMS[form](x[order], a[order], bank, **options), y[order], rtol=0, atol=1e-12)
    others = x.clone()
    others[1:] = 99.0
    torch.testing.assert_close(FORMS[form](others, a, bank, **options)[:1], y[:1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_form_has_right_gradients(form: str, case: str) -> None:
    x, a, bank, options = make(case, batch=2, size=(3, 4), grad=True)
    function: Callable[..., torch.Tensor] = FORMS[form]
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors, **options), (x, a, bank))


@pytest.mark.parametrize("case", CASES)
def test_forms_have_equal_gradients(case: str) -> None:
    grads = []
    for form in FORMS.values():
        x, a, bank, options = make(case, grad=True)
        y = form(x, a, bank, **options)
        (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        grads.append((x.grad, a.grad, bank.grad))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_form_takes_an_empty_batch_forward_and_backward(form: str, case: str) -> None:
    x, a, bank, options = make(case, batch=0, grad=True)
    y = FORMS[form](x, a, bank, **options)
    full = FORMS[form](*make(case, batch=1)[:3], **options)
    assert y.shape == (0, *full.shape[1:])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_one_kernel_and_one_block_gate_the_output_channels() -> None:
    torch.manual_seed(0)
    x, a = torch.randn(2, 4, 5, 5), torch.rand(2, 6, 1, 1)
    bank = torch.randn(6, 1, 1, 4, 3, 3)
    gated = F.conv2d(x, bank[:, 0, 0]) * a[:, :, 0, 0, None, None]
    torch.testing.assert_close(WF.weightnet_conv2d_reference(x, a, bank), gated, rtol=1e-4, atol=1e-4)


def test_equal_gates_for_all_outputs_mix_experts_as_condconv_does() -> None:
    torch.manual_seed(0)
    x, mix = torch.randn(2, 4, 5, 5), torch.rand(2, 3)
    bank = torch.randn(6, 1, 3, 4, 1, 1)
    experts = torch.einsum("bp,opihw->boihw", mix, bank[:, 0])
    expected = torch.cat([F.conv2d(x[n : n + 1], experts[n]) for n in range(2)])
    a = mix[:, None, None].expand(2, 6, 1, 3)
    torch.testing.assert_close(WF.weightnet_conv2d_reference(x, a, bank), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_split_shuffled_is_the_originals_shuffle(layout) -> None:
    x = torch.randn(2, 6, 3, 4)
    shuffled = x.reshape(2 * 3, 2, 12).permute(1, 0, 2).reshape(2, 2, 3, 3, 4)
    even, odd = WF.split_shuffled(x.contiguous(memory_format=layout))
    assert torch.equal(even, shuffled[0])
    assert torch.equal(odd, shuffled[1])
    assert odd.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("of", [WF.split_shuffled, lambda x: [WF.spatial_mean(x)]])
def test_gradients_keep_the_layout_of_maps(of, layout) -> None:
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=layout).requires_grad_()
    laid_out = []
    x.register_hook(lambda grad: laid_out.append(grad.is_contiguous(memory_format=layout)))
    parts = list(of(x))
    torch.autograd.backward(parts, [torch.randn_like(part) for part in parts])
    assert laid_out == [True]
