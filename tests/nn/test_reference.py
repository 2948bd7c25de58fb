"""The networks give the original framework's numbers: logits, blocks, generated kernels, two training steps."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

import weightnet
from weightnet.images.transforms import Preprocess
from weightnet.nn.layers import Form, WeightNet2d, set_form
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.train.step import parameter_groups
from weightnet.zoo.megengine import to_torch_layout

DATA = Path(__file__).parents[1] / "data"
FORMS: tuple[Form, ...] = ("auto", "reference", "feature", "matmul")


@pytest.fixture
def tiny() -> ShuffleNetV2:
    return weightnet.load(DATA / "megengine" / "tiny.pkl")


@pytest.fixture
def golden() -> Iterator[dict[str, npt.NDArray[np.float32]]]:
    with np.load(DATA / "golden" / "tiny.npz") as file:
        yield dict(file)


def inputs(crops_u8_chw: npt.NDArray[np.uint8], preprocess: Preprocess) -> torch.Tensor:
    return torch.from_numpy(np.stack([preprocess.normalize(crop.transpose(1, 2, 0)) for crop in crops_u8_chw]))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_tiny_gives_the_originals_logits(
    tiny: ShuffleNetV2, golden: dict[str, npt.NDArray[np.float32]], form: Form
) -> None:
    x = inputs(golden["crops_u8_chw"], Preprocess())
    set_form(tiny, form)
    logits = tiny(x)
    np.testing.assert_allclose(logits, golden["logits_norm_b3"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(tiny(x[:1]), golden["logits_norm_b3"][:1], rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits.softmax(1), golden["probs_norm_b3"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(tiny.double()(x.double()), golden["logits_norm_f64"], rtol=0, atol=1e-9)


@torch.no_grad()
def test_tiny_gives_the_originals_logits_for_raw_pixels(golden: dict[str, npt.NDArray[np.float32]]) -> None:
    with pytest.warns(weightnet.WeightsWarning, match="raw"):
        network = weightnet.load(DATA / "megengine" / "tiny_rawcal.pkl")
    x = inputs(golden["crops_u8_chw"], weightnet.preprocess_for(network))
    assert x.max() > 200
    np.testing.assert_allclose(network(x), golden["logits_raw_b3"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(network.double()(x.double()), golden["logits_raw_f64"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("file", "name", "atol"), [("tiny", "tiny", 2e-5), ("shufflenet_v2_x0_5", "x0_5", 2e-4)])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_recorded_logits_at_batch_1_and_3(shared: Path, file: str, name: str, atol: float, form: Form) -> None:
    network = weightnet.load(shared / "reference" / f"{file}.pkl")
    set_form(network, form)
    x = torch.from_numpy(np.load(shared / "reference" / "inputs.npz")["normalized_f32"])
    recorded = np.load(shared / "reference" / f"outputs_{name}.npz")
    alone = torch.cat([network(x[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(alone, recorded["logits_norm_b1"].reshape(3, -1), rtol=0, atol=atol)
    np.testing.assert_allclose(network(x), recorded["logits_norm_b3"], rtol=0, atol=atol)
    np.testing.assert_allclose(network(x).softmax(1), recorded["probs_norm_b3"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(network.double()(x.double()), recorded["logits_norm_f64"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("file", "name"), [("tiny", "tiny"), ("shufflenet_v2_x0_5", "x0_5")])
@torch.no_grad()
def test_recorded_outputs_of_every_block(shared: Path, file: str, name: str) -> None:
    network = weightnet.load(shared / "reference" / f"{file}.pkl")
    recorded = dict(np.load(shared / "reference" / f"blocks_{name}_b1.npz"))
    got: dict[str, torch.Tensor] = {}
    for path, module in network.named_modules():
        module.register_forward_hook(lambda module, inputs, output, path=path: got.setdefault(path, output))
    x = torch.from_numpy(np.load(shared / "reference" / "inputs.npz")["normalized_f32"])
    network(x[:1])
    compared = [path for path in recorded if path in got]
    assert {"first_conv", "maxpool", "conv_last", *(f"features.{i}" for i in range(len(network.features)))} <= {
        *compared
    }
    for path in compared:
        expected = recorded[path]
        np.testing.assert_allclose(got[path].reshape(expected.shape), expected, rtol=0, atol=5e-4, err_msg=path)


@torch.no_grad()
def test_recorded_generated_kernels(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = weightnet.load(shared / "reference" / "tiny.pkl")
    recorded = dict(np.load(shared / "reference" / "blocks_tiny_b1.npz"))
    x = torch.from_numpy(np.load(shared / "reference" / "inputs.npz")["normalized_f32"])
    names = {id(module): path for path, module in network.named_modules() if isinstance(module, WeightNet2d)}
    compared = []

    def compare(module: WeightNet2d, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        path = f"{names[id(module)]}.wn_fc2"
        if path in recorded:
            gates = recorded[f"{names[id(module)]}.wn_fc1"].reshape(1, module.out_channels, module.blocks, -1)
            gates = torch.from_numpy(gates).sigmoid()
            kernels = weightnet.functional.generate_kernels(gates, module.bank())
            np.testing.assert_allclose(kernels.flatten(), recorded[path].flatten(), rtol=0, atol=1e-5, err_msg=path)
            compared.append(path)

    for module in network.modules():
        if isinstance(module, WeightNet2d):
            module.register_forward_hook(compare)
    network(x[:1])
    assert len(compared) == 8


def test_recorded_training_steps(shared: Path) -> None:
    recorded = dict(np.load(shared / "reference" / "train_tiny_2steps.npz"))
    network = weightnet.load(shared / "reference" / "tiny.pkl").train().double()  # so that only the recording rounds
    x, labels = torch.from_numpy(recorded["x"]).double(), torch.from_numpy(recorded["labels"]).long()
    sgd = torch.optim.SGD(
        parameter_groups(network, float(recorded["weight_decay"])),
        lr=float(recorded["lr"]),
        momentum=float(recorded["momentum"]),
    )
    for step in ("step0", "step1"):
        logits = network(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        np.testing.assert_allclose(logits.detach(), recorded[f"{step}/logits_train"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(loss.item(), recorded[f"{step}/loss"].item(), rtol=0, atol=1e-5)
        sgd.zero_grad()
        loss.backward()
        for name, parameter in network.named_parameters():
            expected = recorded[f"{step}/grad/{name}"].reshape(parameter.shape)
            np.testing.assert_allclose(parameter.grad, expected, rtol=1e-3, atol=2e-4, err_msg=f"{step} {name}")
        sgd.step()
        prefix = f"{step}/state_after/"
        after = {name.removeprefix(prefix): value for name, value in recorded.items() if name.startswith(prefix)}
        state = network.state_dict()
        expected_state = to_torch_layout(after)
        assert {name for name in state if "num_batches" not in name} == set(expected_state)
        for name, value in expected_state.items():
            np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=1e-5, err_msg=f"{step} {name}")
        # The next step starts from the recorded state, so that rounding does not add up.
        network.load_state_dict({name: torch.from_numpy(value) for name, value in expected_state.items()}, strict=False)
