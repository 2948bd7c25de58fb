"""What is given to MNN's converter, and what comes back while the machine is busy."""

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from weightnet import load
from weightnet.export import files
from weightnet.export.graph import build_graph
from weightnet.nn.fold import fold
from weightnet.predict.interface import LOGITS, OUTPUTS


@pytest.mark.parametrize("name", ["plain", "r1", "r2 four blocks"])
def test_convolutions_give_what_fully_connected_layers_do(small, make_pictures, name):
    model = build_graph(fold(small(name), form="feature"), OUTPUTS)
    x = make_pictures(3, 3, 64, 64).float().numpy()
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": x})
    model = files._with_convolutions(model)
    onnx.checker.check_model(model, full_check=True)
    assert "Gemm" not in {node.op_type for node in model.graph.node}
    got = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": x})
    for array, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.skipif(not find_spec("MNN"), reason="needs MNN")
def test_files_are_right_though_several_are_written_at_once(tmp_path, make_pictures, monkeypatch):
    """Of a fully connected layer MNN's converter writes other weights then, nearly always."""
    import MNN.expr
    import MNN.nn

    network = fold(load("default", pretrained=True).eval(), form="feature")
    x = make_pictures(1, 3, 176, 176).float()
    with torch.inference_mode():
        expected = network(x).numpy()
    in_turn = threading.Lock()  # torch.fx traces one network at a time

    def build_in_turn(*args, **options):
        with in_turn:
            return build_graph(*args, **options)

    monkeypatch.setattr(files, "build_graph", build_in_turn)
    paths = [tmp_path / f"{number}.mnn" for number in range(6)]
    with ThreadPoolExecutor(len(paths)) as threads:
        list(threads.map(lambda path: files.write_files(network, path, files.Wanted([LOGITS], "fp32", 176)), paths))
    for path in paths:
        photos = MNN.expr.placeholder(list(x.shape), MNN.expr.NCHW, MNN.expr.float)
        photos.write(x.numpy())
        (logits,) = MNN.nn.load_module_from_file(str(path), ["input"], [LOGITS]).forward([photos])
        assert np.abs(logits.read() - expected).max() < 1e-3 * np.abs(expected).max()
