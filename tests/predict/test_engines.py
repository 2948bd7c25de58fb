import copy

import numpy as np
import pytest
import torch

from weightnet.errors import UsageError
from weightnet.predict.engines import open_engine

BATCH = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


def test_engine_gives_the_logits_of_the_network(tiny_network):
    expected = tiny_network(torch.from_numpy(BATCH)).detach().numpy()
    for name in ("auto", "torch"):
        logits = open_engine(tiny_network, engine=name, device="cpu").run(BATCH)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, atol=1e-5)


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
    with pytest.raises(UsageError, match=r"engine must be auto, torch, onnxruntime or openvino\. Got engine='onnx'"):
        open_engine(tiny_network, engine="onnx")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "CPU", ""])
def test_engine_refuses_a_device_that_is_not_here(tiny_network, device):
    with pytest.raises(UsageError, match=rf"device must be one .*: auto, .*cpu. Got device='{device}'"):
        open_engine(tiny_network, device=device)


@pytest.mark.parametrize("model", [None, torch.nn.Linear(1, 1), 7])
def test_engine_refuses_a_network_without_a_card(model):
    with pytest.raises(UsageError, match="must have its model card"):
        open_engine(model)
