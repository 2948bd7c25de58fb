"""The comparison lets a right file pass and no wrong one."""

import copy

import numpy as np
import pytest
import torch

from weightnet.errors import WeightsError
from weightnet.export.parity import TOLERANCE, check_parity
from weightnet.predict.interface import OUTPUTS


class Runtime:
    """An engine that runs a network in single precision; what it gives can be tampered with."""

    outputs = OUTPUTS

    def __init__(self, network, tamper=lambda x, outputs: outputs):
        self.network, self.card, self.tamper = network, network.card, tamper
        self.shapes = []

    @torch.no_grad()
    def run_outputs(self, x, names):
        assert names == self.outputs
        self.shapes.append(x.shape)
        features = self.network.forward_features(torch.from_numpy(x))
        outputs = {
            "logits": self.network.forward_head(features),
            "pre_logits": self.network.forward_head(features, pre_logits=True),
            "features": features,
            "class_weights": self.network.get_parameter("classifier.0.weight"),
        }
        return self.tamper(x, {name: value.numpy() for name, value in outputs.items()})


def test_parity_of_a_right_file_is_measured_on_four_batches(small):
    engine = Runtime(small("r1"))
    errors = check_parity(small("r1"), engine, precision="fp32")
    assert tuple(errors) == OUTPUTS
    assert errors.pop("class_weights") == 0
    assert all(0 < error < TOLERANCE["fp32"] for error in errors.values())
    assert engine.shapes == [(1, 3, 64, 64), (2, 3, 64, 64), (5, 3, 64, 64), (2, 3, 96, 128)]


@pytest.mark.parametrize("wrong", OUTPUTS)
@pytest.mark.parametrize(("factor", "precision"), [(1 + 3e-4, "fp32"), (1.3, "fp16"), (np.nan, "fp32")])
def test_parity_refuses_an_output_that_is_off(small, wrong, factor, precision):
    engine = Runtime(small("r1"), lambda _, outputs: {**outputs, wrong: outputs[wrong] * np.float32(factor)})
    with pytest.raises(WeightsError, match=rf"must give the network's numbers .* off in {wrong} by "):
        check_parity(small("r1"), engine, precision=precision)


@pytest.mark.parametrize(
    "is_wrong",
    [lambda x: len(x) == 1, lambda x: len(x) == 5, lambda x: x.shape[2:] != (64, 64)],
    ids=["alone", "many", "other size"],
)
def test_parity_refuses_what_is_wrong_for_some_shapes_only(small, is_wrong):
    def swap(x, outputs):
        return {**outputs, "logits": outputs["logits"][:, ::-1]} if is_wrong(x) else outputs

    with pytest.raises(WeightsError, match="off in logits"):
        check_parity(small("r1"), Runtime(small("r1"), swap), precision="fp32")


def test_parity_refuses_an_output_of_another_shape(small):
    engine = Runtime(small("r1"), lambda _, outputs: {**outputs, "logits": outputs["logits"][:, :1]})
    with pytest.raises(WeightsError, match="off in logits by inf"):
        check_parity(small("r1"), engine, precision="fp16")


@pytest.mark.parametrize("precision", TOLERANCE)
def test_parity_refuses_the_network_with_one_gate_changed(small, precision):
    network = copy.deepcopy(small("r1"))
    with torch.no_grad():
        network.features[1].wnet1.wn_fc1.bias[:8] -= 4
    with pytest.raises(WeightsError, match="Check the weights"):
        check_parity(small("r1"), Runtime(network), precision=precision)


def test_parity_refuses_a_network_of_no_numbers(small):
    network = copy.deepcopy(small("plain"))
    network.classifier[0].weight.data[0, 0] = torch.nan
    with pytest.raises(WeightsError, match="off in logits by nan"):
        check_parity(network, Runtime(network), precision="fp32")


def test_parity_leaves_the_network_as_it_was(small):
    network = copy.deepcopy(small("r1")).train()
    before = copy.deepcopy(network.state_dict())
    check_parity(network, Runtime(small("r1")), precision="fp32")
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
