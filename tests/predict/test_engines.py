import copy

import numpy as np
import pytest
import torch

from weightnet.errors import UsageError
from weightnet.predict.engines import open_engine
from weightnet.predict.interface import OUTPUTS

BATCH = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


def test_engine_gives_the_logits_of_the_network(tiny_network):
    expected = tiny_network(torch.from_numpy(BATCH)).detach().numpy()
    for name in ("auto", "torch"):
        logits = open_engine(tiny_network, engine=name, device="cpu").run(BATCH)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_engine_gives_what_the_network_has_before_its_logits(tiny_network):
    with torch.no_grad():
        features = tiny_network.forward_features(torch.from_numpy(BATCH))
        pooled = tiny_network.forward_head(features, pre_logits=True)
    engine = open_engine(tiny_network, device="cpu")
    outputs = engine.run_outputs(BATCH, OUTPUTS)
    assert tuple(outputs) == OUTPUTS == engine.outputs
    assert all(values.dtype == np.float32 and values.flags.c_contiguous for values in outputs.values())
    np.testing.assert_allclose(outputs["features"], features, atol=1e-5)
    np.testing.assert_allclose(outputs["pre_logits"], pooled, atol=1e-5)
    np.testing.assert_array_equal(outputs["class_weights"], tiny_network.classifier[0].weight.detach())
    for name, values in outputs.items():
        np.testing.assert_allclose(engine.run_outputs(BATCH, [name])[name], values, atol=1e-6)


def test_mean_of_a_classs_heat_map_is_its_logit(tiny_network):
    outputs = open_engine(tiny_network).run_outputs(BATCH, OUTPUTS)
    maps_BKhw = np.einsum("kf,bfhw->bkhw", outputs["class_weights"], outputs["features"])
    bias_K = tiny_network.classifier[0].bias.detach().numpy()
    np.testing.assert_allclose(maps_BKhw.mean((2, 3)) + bias_K, outputs["logits"], atol=1e-4)


def test_engine_refuses_an_output_of_no_network(tiny_network):
    with pytest.raises(UsageError, match=r"gives \(logits, .*\)\. Got output='probabilities'\. Choose one of them"):
        open_engine(tiny_network).run_outputs(BATCH, ["probabilities"])


def test_engine_gives_the_logits_alone_of_another_network(tiny_network):
    class Doubled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.card = tiny_network, tiny_network.card

        def forward(self, x):
            return 2 * self.network(x)

    engine = open_engine(Doubled(), device="cpu")
    assert engine.outputs == ("logits",)
    expected = 2 * tiny_network(torch.from_numpy(BATCH)).detach().numpy()
    np.testing.assert_allclose(engine.run(BATCH), expected, atol=1e-5)
    with pytest.raises(UsageError, match=r"gives \(logits\)\. Got output='features'"):
        engine.run_outputs(BATCH, ["features"])


def test_engine_carries_the_card(tiny_network):
    assert open_engine(tiny_network).card == tiny_network.card


def test_engine_leaves_the_callers_network_alone(tiny_network):
    network = copy.deepcopy(tiny_network).train()
    engine = open_engine(network, device="cpu")
    before = engine.run(BATCH)
    assert network.training
    assert network.features[1].wnet1.wn_fc2.weight.is_contiguous()
    with torch.no_grad():
        network.classifier[0].bias += 1
    np.testing.assert_array_equal(engine.run(BATCH), before)


def test_engine_runs_an_empty_batch(tiny_network):
    assert open_engine(tiny_network).run(BATCH[:0]).shape == (0, 5)


def test_engine_refuses_an_unknown_engine(tiny_network):
    with pytest.raises(UsageError, match=r"engine must be auto, torch, onnxruntime, .* or mnn\. Got engine='onnx'"):
        open_engine(tiny_network, engine="onnx")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "CPU", ""])
def test_engine_refuses_a_device_that_is_not_here(tiny_network, device):
    with pytest.raises(UsageError, match=rf"device must be one .*: auto, .*cpu. Got device='{device}'"):
        open_engine(tiny_network, device=device)


@pytest.mark.parametrize("model", [None, torch.nn.Linear(1, 1), 7])
def test_engine_refuses_a_network_without_a_card(model):
    with pytest.raises(UsageError, match="must have its model card"):
        open_engine(model)
