"""The networks of benchmarks/port.py, written a second time from the original alone: they and ours must agree."""

import pytest
import torch

from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import VARIANTS, NetworkSpec

WIDTHS, REPEATS = (16, 32, 64), (2, 3, 2)


@pytest.fixture
def port(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "benchmarks")
    import port

    return port


@pytest.mark.parametrize(("M", "G"), [(1, 1), (2, 2), (3, 1), (8, 4)])
def test_port_gives_the_same_numbers_and_gradients(port, M, G):
    torch.manual_seed(0)
    network = ShuffleNetV2(NetworkSpec(WIDTHS, M, G, 0.0, REPEATS, 8, 32, 10)).double()
    ported = port.Port(network.spec).double()
    ported.load_state_dict(network.state_dict())
    x, gradients = torch.randn(3, 3, 64, 48, dtype=torch.float64), []
    logits = [network(x), ported(x)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-11)
    for module, y in zip((network, ported), logits, strict=True):
        (y**2).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.spec.M])
def test_port_takes_the_parameters_of_every_network(port, name):
    with torch.device("meta"):
        network, ported = ShuffleNetV2(VARIANTS[name].spec), port.Port(VARIANTS[name].spec)
    shapes = [{key: tuple(value.shape) for key, value in module.state_dict().items()} for module in (network, ported)]
    assert shapes[0] == shapes[1]
