"""The hub page's own snippet, run with nothing changed but its import lines."""

import re
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from skimage import data

from weightnet import compat
from weightnet.errors import UnknownModelError, UsageError
from weightnet.nn.shufflenet import ShuffleNetV2
from weightnet.nn.variants import VARIANTS
from weightnet.zoo import hub
from weightnet.zoo.convert import convert
from weightnet.zoo.describe import preprocess_for
from weightnet.zoo.weights import load

IMPORTS = {
    "import megengine.hub": "import weightnet.compat as megengine",
    "import megengine.data.transform as T": "import weightnet.transforms as T",
    "import megengine.functional as F": "import weightnet.compat as F",
}
# The page's two blocks without their comments.
SNIPPET = """
import megengine.hub
model = megengine.hub.load('megengine/models', 'shufflenet_v2_x0_5', pretrained=True)
model.eval()

import urllib
url, filename = ("https://data.megengine.org.cn/images/cat.jpg", "cat.jpg")
try: urllib.URLopener().retrieve(url, filename)
except: urllib.request.urlretrieve(url, filename)

import cv2
import numpy as np
import megengine.data.transform as T
import megengine.functional as F

image = cv2.imread("cat.jpg")
transform = T.Compose([
    T.Resize(256),
    T.CenterCrop(224),
    T.Normalize(mean=[103.530, 116.280, 123.675], std=[57.375, 57.120, 58.395]),  # BGR
    T.ToMode("CHW"),
])
processed_img = transform.apply(image)[np.newaxis, :]  # CHW -> 1CHW
logits = model(processed_img)
probs = F.softmax(logits)
print(probs)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, where the published checkpoint will be found."""
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def run(snippet: str, photo: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the snippet in a folder, its import lines replaced, its photo taken from a file; return its variables."""
    for line, ours in IMPORTS.items():
        assert line in snippet
        snippet = snippet.replace(line, ours)
    assert not re.search(r"import megengine(?!\s*$)", snippet.replace("as megengine", ""))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(urllib.request, "urlretrieve", lambda url, filename: shutil.copy(photo, filename))
    variables: dict[str, Any] = {}
    exec(snippet, variables)
    return variables


@pytest.mark.parametrize("language", ["zh_CN", "en_US"])
def test_snippet_of_the_page_gives_the_originals_probabilities(
    shared: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    language: str,
) -> None:
    shutil.copy(shared / "reference/shufflenet_v2_x0_5.pkl", cache / "snetv2_0.5x_wnet1x_M2G2.model")
    page = (shared / "hub_page.md").read_text(encoding="utf-8")
    beginning, section = re.split(rf"<!-- section: {language} -->", page)
    blocks = [re.findall(r"```python\n(.*?)```", part, re.DOTALL)[0] for part in (beginning, section)]
    variables = run("\n".join(blocks), shared / "reference/cat.jpg", tmp_path, monkeypatch)
    expected = np.load(shared / "reference/outputs_x0_5.npz")
    np.testing.assert_allclose(variables["logits"].numpy(), expected["logits_norm_b1"][:1], atol=2e-4)
    np.testing.assert_allclose(variables["probs"].numpy(), expected["probs_norm_b1"][:1], atol=1e-5)
    assert capsys.readouterr().out.startswith("tensor([[")


def test_snippet_gives_what_the_library_gives(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(ShuffleNetV2(VARIANTS["shufflenet_v2_x0_5"].spec).state_dict(), tmp_path / "new.pt")
    checkpoint = cache / "snetv2_0.5x_wnet1x_M2G2.model"
    convert(tmp_path / "new.pt", checkpoint)
    photo = np.ascontiguousarray(data.chelsea()[:, :, ::-1])
    cv2.imwrite(str(tmp_path / "photo.png"), photo)
    variables = run(SNIPPET, tmp_path / "photo.png", tmp_path, monkeypatch)
    network = load(checkpoint)
    with torch.no_grad():
        expected = network(torch.from_numpy(preprocess_for(network)(photo)[None])).softmax(1)
    torch.testing.assert_close(variables["probs"], expected)
    assert capsys.readouterr().out == f"{variables['probs']}\n"


def test_hub_load_gives_a_new_network_of_any_name() -> None:
    model = compat.hub.load("megvii-model/WeightNet:main", "shufflenet_v2_x0_5.plain")
    assert model.network.spec == VARIANTS["shufflenet_v2_x0_5.plain"].spec
    assert model.network.training
    model.eval()
    assert not model.network.training
    model.train()
    assert model.network.training


def test_hub_load_refuses_other_repositories_and_names() -> None:
    with pytest.raises(UsageError, match="repository must be"):
        compat.hub.load("pytorch/vision", "shufflenet_v2_x0_5")
    with pytest.raises(UnknownModelError):
        compat.hub.load("megengine/models", "resnet50")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_model_takes_arrays_of_any_number_type(dtype: type) -> None:
    model = compat.ArrayModel(ShuffleNetV2(VARIANTS["shufflenet_v2_x0_5.plain"].spec).eval())
    x = np.random.default_rng(0).integers(0, 255, (2, 3, 64, 64)).astype(np.uint8)
    expected = model.network(torch.from_numpy(x).float())
    logits = model(x.astype(dtype))
    torch.testing.assert_close(logits, expected)
    assert not logits.requires_grad
    torch.testing.assert_close(model(torch.from_numpy(x)), expected)


def test_model_takes_arrays_that_are_reversed_or_read_only() -> None:
    model = compat.ArrayModel(ShuffleNetV2(VARIANTS["shufflenet_v2_x0_5.plain"].spec).eval())
    x = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    flipped = np.ascontiguousarray(x[:, ::-1])
    x.flags.writeable = False
    torch.testing.assert_close(model(x[:, ::-1]), model(flipped))


def test_softmax_takes_the_axis_that_the_original_takes() -> None:
    for shape, axis in {(5,): 0, (2, 5): 1, (2, 5, 3): 0, (2, 5, 3, 3): 1}.items():
        logits = np.random.default_rng(0).random(shape, np.float32)
        np.testing.assert_allclose(compat.softmax(logits).sum(axis), 1, rtol=1e-5)
    np.testing.assert_allclose(compat.softmax(np.ones((2, 5, 3)), axis=2).numpy(), 1 / 3, rtol=1e-5)
    assert compat.softmax(torch.ones(2, dtype=torch.int64)).tolist() == [0.5, 0.5]
