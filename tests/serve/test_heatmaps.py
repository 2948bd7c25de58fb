import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from weightnet.export.model import export_model
from weightnet.predict.classifier import Classifier

from .conftest import photo, running


def test_heat_map_of_the_best_class_adds_up_to_its_logit(service, run_folder):
    row = service.classify(photo(3), heatmap="true").json()
    ((_, logits_K),) = Classifier(str(run_folder)).stream_logits(photo(3))
    bias_K = load_file(run_folder / "weights.safetensors")["classifier.0.bias"]
    best = row["top"][0]["index"]
    heatmap = row["heatmap"]
    values = np.array(heatmap["values"])
    assert (heatmap["index"], values.shape) == (best, (heatmap["rows"], heatmap["columns"]))
    assert values.mean() + bias_K[best] == pytest.approx(logits_K[best], abs=1e-5)


def test_heat_map_of_a_class_of_ones_choice(service):
    best = service.classify(photo(3), heatmap="true").json()
    other = best["top"][-1]["index"]
    row = service.classify(photo(3), heatmap=other, k=1).json()
    assert row["heatmap"]["index"] == other
    assert row["heatmap"]["values"] != best["heatmap"]["values"]
    assert [score["index"] for score in row["top"]] == [best["top"][0]["index"]]


def test_heat_map_says_where_it_lies_in_an_upright_photo(service):
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # stored lying on its side: 60 x 48 pixels, 48 x 60 to look at
    Image.open(io.BytesIO(photo(suffix=".png"))).save(turned, "JPEG", exif=exif)
    seen = service.classify(turned.getvalue(), heatmap="true").json()["heatmap"]["seen"]
    across, down = (32 / 40) / 2, (32 / 50) / 2  # of 40 x 50 pixels, the middle 32 x 32
    assert seen == pytest.approx({"left": 0.5 - across, "top": 0.5 - down, "right": 0.5 + across, "bottom": 0.5 + down})


def test_photos_with_and_without_heat_map_run_together(gate, start):
    service = start()
    wanted = {seed: {"heatmap": "true"} if seed % 2 else {} for seed in range(8)}
    expected = {seed: service.classify(photo(seed), **wanted[seed]).json() for seed in wanted}
    warm_up = len(gate.batches)
    gate.open.clear()
    with ThreadPoolExecutor(9) as clients:
        first = clients.submit(service.classify, photo())
        service.until(lambda: len(gate.batches) > warm_up)
        others = {seed: clients.submit(service.classify, photo(seed), **wanted[seed]) for seed in wanted}
        batcher = next(iter(service.service.models.values())).batcher
        service.until(lambda: batcher.queued == 8)
        gate.open.set()
        assert first.result().status_code == 200
        rows = {seed: future.result().json() for seed, future in others.items()}
    assert gate.batches[warm_up:] == [1, 8]
    for seed, row in rows.items():
        assert ("heatmap" in row) == (seed % 2 == 1)
        assert row["top"][0]["label"] == expected[seed]["top"][0]["label"]
        if "heatmap" in row:
            np.testing.assert_allclose(row["heatmap"]["values"], expected[seed]["heatmap"]["values"], atol=1e-5)


@pytest.mark.parametrize("wanted", ["yes", "-1", "1.5", "", "True", "5", str(10**30)])
def test_impossible_heat_map_gets_422(service, wanted):
    answer = service.classify(photo(), heatmap=wanted)
    assert (answer.status_code, answer.json()["status"]) == (422, "error")
    assert answer.json()["error"].startswith("heatmap must ")


def test_exported_model_gives_the_same_heat_map_where_its_file_has_the_outputs(service, run_folder, tmp_path):
    full, plain = tmp_path / "full.onnx", tmp_path / "plain.onnx"
    export_model(str(run_folder), full, outputs=["features", "class_weights"])
    export_model(str(run_folder), plain)
    with running(full, plain) as exported:
        assert [model["heatmap"] for model in exported.client.get("/v1/models").json()] == [True, False]
        there, here = (served.classify(photo(), heatmap="true").json()["heatmap"] for served in (exported, service))
        np.testing.assert_allclose(there.pop("values"), here.pop("values"), atol=1e-4)
        assert there == here
        answer = exported.classify(photo(), heatmap="true", model=str(plain))
        assert (answer.status_code, "--outputs features class_weights" in answer.json()["error"]) == (422, True)
        assert exported.classify(photo(), heatmap="false", model=str(plain)).status_code == 200


def test_page_comes_with_a_policy_and_all_its_parts(service):
    page = service.client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["x-content-type-options"] == "nosniff"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; img-src 'self' blob: data:;")
    assert "unsafe" not in policy
    for path, kind in {
        "page/app.js": "text/javascript",
        "page/heat.js": "text/javascript",
        "page/camera.js": "text/javascript",
        "page/style.css": "text/css",
        "page/icon.svg": "image/svg+xml",
        "page/samples/cat.jpg": "image/jpeg",
        "page/samples/coffee.jpg": "image/jpeg",
    }.items():
        answer = service.client.get(f"/{path}")
        assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, kind)
        assert answer.headers["content-security-policy"] == policy
        assert "://" not in answer.text.replace("http://www.w3.org/", "") or kind == "image/jpeg"
    assert service.client.get("/page/__init__.py").status_code == 404
    assert service.client.get("/page/samples/SOURCES.md").status_code == 404
    assert {"page/app.js", "page/style.css"} <= set(page.text.split('"'))


def test_sample_photos_are_small(service):
    sizes = [len(service.client.get(f"/page/samples/{name}.jpg").content) for name in ("cat", "coffee")]
    assert sum(sizes) < 100_000
    assert service.classify(service.client.get("/page/samples/cat.jpg").content).status_code == 200
