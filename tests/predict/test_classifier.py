import dataclasses
import io
import json
import os
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from weightnet.errors import UnknownModelError, UsageError
from weightnet.predict import classifier as classifier_module
from weightnet.predict.classifier import Classifier, ClassScore, Prediction
from weightnet.zoo.cards import write_card

LABELS = ("cat", "dog", "fox", "tree", "house")


@pytest.fixture(scope="module")
def classify(tiny_network):
    return Classifier(tiny_network, device="cpu", batch_size=4)


def picture(seed: int) -> np.ndarray:
    """A smooth picture, blue, green, red."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.resize(small, (60, 48), interpolation=cv2.INTER_CUBIC)


def png(seed: int) -> bytes:
    return cv2.imencode(".png", picture(seed))[1].tobytes()


def test_classifier_gives_the_softmax_of_the_prepared_photo(classify, tiny_network):
    with torch.inference_mode():
        logits = tiny_network(torch.from_numpy(tiny_network.card.preprocess(picture(1)))[None])
    expected = torch.softmax(logits[0].double(), 0).numpy()
    (prediction,) = classify(picture(1), k=5)
    order = np.argsort(-expected)
    assert [score.index for score in prediction.top] == order.tolist()
    assert [score.label for score in prediction.top] == [LABELS[index] for index in order]
    np.testing.assert_allclose([score.probability for score in prediction.top], expected[order], atol=1e-4)
    assert sum(score.probability for score in prediction.top) == pytest.approx(1, abs=1e-12)


def test_classifier_tells_photos_apart(classify):
    tops = {prediction.top[0].index for prediction in classify([picture(seed) for seed in range(30)])}
    assert len(tops) > 1


def test_classifier_takes_one_photo_of_every_kind_alone(classify, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(1))
    kinds = {
        "path": path,
        "text": str(path),
        "bytes": png(1),
        "bytearray": bytearray(png(1)),
        "memoryview": memoryview(png(1)),
        "file": io.BytesIO(png(1)),
        "array": picture(1),
        "PIL": Image.open(path),
    }
    expected = classify([png(1)])[0].top
    for kind, image in kinds.items():
        (prediction,) = classify(image)
        assert (prediction.status, prediction.top) == ("ok", expected), kind
        assert prediction.path == (str(path) if kind in ("path", "text") else None), kind


def test_classifier_takes_a_batch_of_arrays_as_several_photos(classify):
    several = np.stack([picture(1), picture(2)])
    assert [p.top[0].index for p in classify(several)] == [classify(picture(s))[0].top[0].index for s in (1, 2)]


def test_classifier_of_no_photos_gives_no_predictions(classify):
    assert classify([]) == []


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_classifier_gives_the_same_whatever_the_batch_size(classify, tiny_network, batch_size):
    photos = [png(seed) for seed in range(9)]
    other = Classifier(tiny_network, device="cpu", batch_size=batch_size)(photos)
    for one, two in zip(other, classify(photos), strict=True):
        for score_one, score_two in zip(one.top, two.top, strict=True):
            assert score_one.index == score_two.index
            assert score_one.probability == pytest.approx(score_two.probability, abs=1e-4)


@pytest.fixture(scope="module")
def alone(classify):
    """What each of the first pictures is classified as when it comes alone."""
    return [classify(picture(seed))[0].top[0] for seed in range(12)]


@settings(deadline=None, max_examples=25)
@given(good=st.lists(st.booleans(), max_size=12))
def test_stream_keeps_the_order_and_bad_photos_to_themselves(classify, alone, good):
    photos = [picture(index) if ok else b"not a photo" for index, ok in enumerate(good)]
    predictions = list(classify.stream(photos, k=1))
    assert [prediction.status == "ok" for prediction in predictions] == good
    for prediction, expected in zip(predictions, alone, strict=False):
        if prediction.status == "ok":
            assert prediction.top[0].index == expected.index
            assert prediction.top[0].probability == pytest.approx(expected.probability, abs=1e-4)
        else:
            assert prediction.top == ()
            assert "JPEG, PNG" in prediction.error


def test_stream_takes_photos_at_most_two_batches_ahead(classify):
    taken = 0

    def photos():
        nonlocal taken
        while True:
            taken += 1
            yield png(taken)

    predictions = classify.stream(photos(), k=1)
    assert taken == 0
    for given_back in range(1, 30):
        next(predictions)
        assert taken <= given_back + 2 * classify.batch_size
    predictions.close()
    assert taken < 40


def test_stream_ends_its_threads_when_it_is_closed(classify):
    predictions = classify.stream(png(1) for _ in range(100))
    next(predictions)
    predictions.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weightnet-decode")]


def test_stream_lets_its_source_close_each_photo_after_giving_it(classify, alone, tmp_path):
    def photos():
        for seed in range(12):
            path = tmp_path / f"{seed}.png"
            path.write_bytes(png(seed))
            with path.open("rb") as file:
                yield file
            with Image.open(path) as image:
                yield image

    buffer = np.empty_like(picture(0))

    def frames():
        for seed in range(12):
            buffer[:] = picture(seed)
            yield buffer

    expected = [score.index for score in alone]
    assert [p.top[0].index for p in classify.stream(photos())] == [index for index in expected for _ in range(2)]
    assert [p.top[0].index for p in classify.stream(frames())] == expected


def test_stream_decodes_while_the_network_runs(classify, tmp_path, monkeypatch):
    threads = set()

    def read_slowly(source):
        threads.add(threading.current_thread().name)
        time.sleep(0.01)
        return picture(1)

    monkeypatch.setattr(classifier_module, "read_image", read_slowly)
    classify([b"x"] * 20)
    assert threads
    assert threading.current_thread().name not in threads


def test_stream_passes_on_what_its_source_raises(classify):
    def photos():
        yield png(1)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        list(classify.stream(photos()))


class BrokenFile(io.BytesIO):
    def read(self, *_):
        raise RuntimeError("connection reset")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", "a photo must not be empty"),
        (b"\xff\xd8\xff", "JPEG"),
        ("no/such/file.jpg", "No such file"),
        ("null\0byte.jpg", "a photo must be"),
        (Path(), "Got a folder"),
        (np.zeros((3, 3)), "an array must be uint8"),
        (np.uint8(3), "a photo must be a path"),
        (None, "a photo must be a path"),
        (BrokenFile(), "Got RuntimeError: connection reset"),
        (io.StringIO("text"), "binary mode"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_classifier_says_what_is_wrong_with_a_photo_and_goes_on(classify, bad, message):
    first, wrong, last = classify([png(1), bad, png(2)])
    assert wrong.status == "error"
    assert message in wrong.error
    assert "Traceback" not in wrong.error
    assert first.status == last.status == "ok"


def test_classifier_survives_too_little_memory_for_one_photo(classify, monkeypatch):
    read_image = classifier_module.read_image

    def read_or_fail(source):
        if source == b"large":
            raise MemoryError
        return read_image(source)

    monkeypatch.setattr(classifier_module, "read_image", read_or_fail)
    wrong, right = classify([b"large", png(1)])
    assert "must fit into memory" in wrong.error
    assert right.status == "ok"


@pytest.mark.parametrize("error", [MemoryError("4 GB"), torch.OutOfMemoryError("4 GB")])
def test_classifier_that_has_too_little_memory_for_a_batch_says_what_to_lower(classify, monkeypatch, error):
    def fail(x):
        raise error

    monkeypatch.setattr(classify._engine, "_network", fail)
    with pytest.raises(UsageError, match=r"Got batch_size=\d+: 4 GB\. Use a smaller number\."):
        classify([png(1)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_classifier_reports_output_that_is_not_finite(classify, monkeypatch, value):
    run = classify._engine.run_outputs

    def run_badly(x_BCHW, names):
        outputs = run(x_BCHW, names)
        outputs["logits"][1, 3] = value
        return outputs

    monkeypatch.setattr(classify._engine, "run_outputs", run_badly)
    predictions = classify([png(1), png(2), png(3)])
    assert [prediction.status for prediction in predictions] == ["ok", "error", "ok"]
    assert "must be finite" in predictions[1].error


@settings(deadline=None)
@given(
    logits=st.lists(st.sampled_from([-1e30, -1.0, 0.0, 2.0, 1e30]), min_size=5, max_size=5),
    k=st.integers(1, 7),
)
def test_classifier_ranks_by_probability_then_class(classify, logits, k):
    prediction = classify._prediction(None, np.array(logits, np.float32), k)
    ranking = sorted(range(5), key=lambda index: (-logits[index], index))[:k]
    assert [score.index for score in prediction.top] == ranking
    assert all(0 <= score.probability <= 1 for score in prediction.top)


def test_classifier_names_all_classes_when_asked_for_more(classify):
    assert len(classify(picture(1), k=1000)[0].top) == 5


def test_stream_logits_gives_what_the_predictions_are_made_of(classify, tiny_network):
    photos = [png(1), b"broken", picture(2)]
    (_, first), (_, broken), (path, last) = classify.stream_logits(photos)
    x_BCHW = np.stack([tiny_network.card.preprocess(picture(seed)) for seed in (1, 2)])
    with torch.inference_mode():
        expected = tiny_network(torch.from_numpy(x_BCHW)).numpy()
    np.testing.assert_allclose([first, last], expected, rtol=1e-4, atol=1e-4)
    assert path is None
    assert "JPEG" in broken


@pytest.mark.parametrize("sizes", [{"resize": 64, "crop": 48}, {"crop": 36}, {"resize": 50}])
def test_classifier_takes_other_sizes_than_the_cards(tiny_network, sizes):
    classifier = Classifier(tiny_network, device="cpu", **sizes)
    preprocess = dataclasses.replace(tiny_network.card.preprocess, **sizes)
    assert classifier.card.preprocess == preprocess
    assert tiny_network.card.preprocess.crop == 32
    ((_, logits),) = classifier.stream_logits(picture(1))
    with torch.inference_mode():
        expected = tiny_network(torch.from_numpy(preprocess(picture(1)))[None])[0].numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_classifier_refuses_a_crop_that_is_larger_than_the_photo(tiny_network):
    with pytest.raises(UsageError, match=r"crop must be at most resize\. Got crop=64, resize=40"):
        Classifier(tiny_network, device="cpu", crop=64)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, None])
def test_classifier_refuses_an_impossible_k(classify, k):
    with pytest.raises(UsageError, match="k must be a whole number of at least 1"):
        classify.stream([], k=k)


@pytest.mark.parametrize("batch_size", [0, 1.5])
def test_classifier_refuses_an_impossible_batch_size(batch_size):
    with pytest.raises(UsageError, match="batch_size must be a whole number of at least 1"):
        Classifier(batch_size=batch_size)
    with pytest.raises(UsageError, match="batch_size must be at most 100,000"):
        Classifier(batch_size=100_001)


def test_classifier_refuses_an_unknown_model():
    with pytest.raises(UnknownModelError):
        Classifier("shufflenet_v3")


def test_classifier_refuses_a_network_of_another_number_of_channels():
    from weightnet.images.labels import ClassLabel
    from weightnet.nn.shufflenet import ShuffleNetV2
    from weightnet.nn.variants import NetworkSpec
    from weightnet.zoo.cards import Card

    spec = NetworkSpec((16, 32, 64), head_channels=32, stem_channels=8, num_classes=1, in_channels=1)
    network = ShuffleNetV2(spec)
    network.card = Card("grey", spec, (ClassLabel("thing"),))
    with pytest.raises(UsageError, match="must take 3 channels"):
        Classifier(network)


def test_classifier_opens_a_run_folder_and_a_weights_file(classify, tiny_network, tmp_path):
    save_file(tiny_network.state_dict(), tmp_path / "weights.safetensors")
    write_card(tiny_network.card, tmp_path / "weights.json")
    for model in (tmp_path, str(tmp_path), tmp_path / "weights.safetensors"):
        assert Classifier(model, device="cpu")(picture(1)) == classify(picture(1))


def test_prediction_has_exactly_the_documented_fields():
    prediction = Prediction("a.jpg", "ok", None, (ClassScore("cat", 281, 0.5),))
    assert json.loads(json.dumps(prediction.to_dict())) == {
        "path": "a.jpg",
        "status": "ok",
        "error": None,
        "top": [{"label": "cat", "index": 281, "probability": 0.5}],
    }
    assert list(prediction.to_dict()) == ["path", "status", "error", "top"]
    told = dataclasses.replace(prediction, known=False)
    assert told.to_dict() == {**prediction.to_dict(), "known": False}


def test_classifier_tells_photos_of_none_of_its_classes_by_the_cards_limit(classify, tiny_network, tmp_path):
    photos = [picture(seed) for seed in range(12)]
    best = [prediction.top[0].probability for prediction in classify(photos)]
    limit = sorted(best)[6]
    save_file(tiny_network.state_dict(), tmp_path / "weights.safetensors")
    write_card(dataclasses.replace(tiny_network.card, known_from=limit), tmp_path / "weights.json")
    predictions = Classifier(tmp_path, device="cpu", batch_size=4)([*photos, b"not a photo"], k=2)
    assert [prediction.known for prediction in predictions] == [*(value >= limit for value in best), None]
    assert {len(prediction.top) for prediction in predictions[:-1]} == {2}, "the classes are named all the same"
    assert {prediction.known for prediction in classify(photos)} == {None}, "without a limit, nothing is said"


def test_prediction_keeps_the_bytes_of_a_path(classify, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    try:
        Path(name).write_bytes(png(1))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    (prediction,) = classify(name)
    assert (prediction.status, prediction.path) == ("ok", name)


def test_classifier_embeds_a_photo_as_the_network_pools_it(classify, tiny_network):
    good, bad = classify.embed([png(1), b"hello"])
    x = torch.from_numpy(tiny_network.card.preprocess(picture(1))[None])
    with torch.no_grad():
        expected = tiny_network.forward_head(tiny_network.forward_features(x), pre_logits=True)[0].numpy()
    np.testing.assert_allclose(good.pre_logits, expected, atol=1e-5)
    assert (good.path, good.status, good.error) == (None, "ok", None)
    assert np.array_equal(np.float32(good.to_dict()["pre_logits"]), good.pre_logits)
    assert (bad.status, bad.pre_logits) == ("error", None)
    assert "a photo must be a JPEG" in bad.to_dict()["error"]


def test_classifier_without_features_says_so_before_it_takes_a_photo(classify, monkeypatch):
    monkeypatch.setattr(classify._engine, "outputs", ("logits",))
    with pytest.raises(UsageError, match="--outputs pre_logits"):
        classify.embed([])
