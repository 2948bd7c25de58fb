"""Files for ExecuTorch: one photo of the card's size, run photo by photo. Skipped where it is not installed."""

import copy

import numpy as np
import pytest

from weightnet.errors import UsageError, WeightsError
from weightnet.export import files
from weightnet.export.model import export_model
from weightnet.predict.engines import open_engine
from weightnet.predict.interface import OUTPUTS

pytest.importorskip("executorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its own use of PyTorch


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("executorch")
    export_model(small("r1"), folder / "net.pte", outputs=OUTPUTS)
    return folder


def test_file_for_executorch_gives_the_networks_numbers(small, exported, make_pictures):
    engine, reference = open_engine(exported / "net.pte"), open_engine(small("r1"), device="cpu")
    assert engine.outputs == OUTPUTS
    for count in (3, 1, 0):
        x = make_pictures(count, 3, 64, 64).float().numpy() if count else np.zeros((0, 3, 64, 64), np.float32)
        got, expected = engine.run_outputs(x, OUTPUTS), reference.run_outputs(x, OUTPUTS)
        for name, values in expected.items():
            assert got[name].shape == values.shape
            np.testing.assert_allclose(got[name], values, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("name", ["plain", "r1 one block", "r2 four blocks"])
def test_export_writes_files_for_executorch_that_pass_the_check(small, tmp_path, name):
    card = export_model(small(name), tmp_path / "net.pte", outputs=["features"])
    assert max(card.notes["exports"][".pte"]["largest_error"].values()) < 1e-4


def test_file_for_executorch_refuses_another_size(exported):
    with pytest.raises(UsageError, match=r"size that it was exported for, 64 x 64 px\. Got shape=\(1, 3, 64, 96\)"):
        open_engine(exported / "net.pte").run(np.zeros((1, 3, 64, 96), np.float32))


def test_engine_refuses_a_broken_file_for_executorch(exported, tmp_path):
    (tmp_path / "net.json").write_bytes((exported / "net.json").read_bytes())
    (tmp_path / "net.pte").write_bytes(b"no model\n" * 99)
    with pytest.raises(WeightsError, match="must be one that its runtime runs"):
        open_engine(tmp_path / "net.pte")


def test_export_refuses_to_write_a_wrong_file_for_executorch(small, tmp_path, monkeypatch):
    program_of = files._program

    def program_of_another(network, wanted, *, is_open):
        network = copy.deepcopy(network)
        network.stages[1].blocks[1].bias1.data.zero_()
        return program_of(network, wanted, is_open=is_open)

    monkeypatch.setattr(files, "_program", program_of_another)
    with pytest.raises(WeightsError, match="nothing was written"):
        export_model(small("r1"), tmp_path / "net.pte")
    assert list(tmp_path.iterdir()) == []
