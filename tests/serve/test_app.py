import re
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from weightnet.predict.classifier import Classifier

from .conftest import photo, running


def same(row: dict, expected: dict) -> bool:
    # Other company in a batch is other rounding: up to 1.2e-6, where two classes of one photo are 1.2e-5 apart or more.
    scores = [(score["label"], score["index"], pytest.approx(score["probability"], abs=5e-6)) for score in row["top"]]
    wanted = [(score["label"], score["index"], score["probability"]) for score in expected["top"]]
    return {**row, "top": scores} == {**expected, "top": wanted}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_classify_answers_as_the_classifier_does(service, run_folder, suffix):
    data = photo(3, suffix)
    answer = service.classify(data, k=3)
    assert answer.status_code == 200
    assert same(answer.json(), Classifier(str(run_folder))(data, k=3)[0].to_dict())


def test_classify_takes_a_form_and_names_its_file(service, run_folder):
    answer = service.client.post("/v1/classify", files={"file": ("füchse.png", photo())}, data={"note": "mine"})
    expected = Classifier(str(run_folder))(photo())[0].to_dict()
    assert answer.status_code == 200
    assert same(answer.json(), {**expected, "path": "füchse.png"})


def test_photos_of_many_clients_run_together_and_keep_apart(service, run_folder):
    photos = [photo(seed) for seed in range(40)]
    expected = Classifier(str(run_folder))(photos)
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(service.classify, photos))
    assert [answer.status_code for answer in answers] == [200] * 40
    assert all(same(a.json(), e.to_dict()) for a, e in zip(answers, expected, strict=True))
    assert service.metric("weightnet_batch_photos_count") < service.metric("weightnet_batch_photos_sum")


@pytest.mark.parametrize(("known_from", "known"), [(0.0, True), (1.0, False)])
def test_answer_of_a_model_that_can_tell_says_whether_the_photo_is_known(make_run, known_from, known):
    with running(make_run(known_from=known_from)) as service:
        row = service.classify(photo()).json()
        assert (row["known"], len(row["top"])) == (known, 5)
        assert "known" not in service.classify(b"no photo").json()


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says it is a large picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "a photo must not be empty"),
        (b"hello", "a photo must be a JPEG, PNG"),
        (photo()[:100], "is cut off"),
        (photo(suffix=".jpg")[:300], "cut off"),
        (bomb(16_000, 16_000), "at most 50 million pixels"),
        (bomb(3_000_000_000, 2), "at most 50 million pixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a photo must be a JPEG, PNG"),
    ],
    ids=["empty", "text", "cut PNG", "cut JPEG", "bomb", "absurd size", "SVG"],
)
def test_bad_photo_gets_422_and_a_sentence(service, body, sentence):
    answer = service.classify(body)
    row = answer.json()
    assert answer.status_code == 422
    assert (row["path"], row["status"], row["top"]) == (None, "error", [])
    assert sentence in row["error"]


def test_pixel_limit_is_the_services_own(start):
    service = start(max_megapixels=1)
    answer = service.classify(photo(size=(1100, 1000)))
    assert answer.status_code == 422
    assert "at most 1 million pixels. Got 1100 x 1000 pixels" in answer.json()["error"]
    assert service.classify(photo(size=(1000, 1000))).status_code == 200


PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


@pytest.mark.parametrize(
    ("form", "content_type", "sentence"),
    [
        (PART + photo() + b"\r\n--x--\r\n", "multipart/form-data", "no boundary"),
        (PART + photo(), "multipart/form-data; boundary=x", "last boundary is missing"),
        (PART + photo() + b"\r\n--x--\r\n", "multipart/form-data; boundary=y", "not: "),
        (b"--x--\r\n", "multipart/form-data; boundary=x", "Got 0"),
        ((PART + photo() + b"\r\n") * 2 + b"--x--\r\n", "multipart/form-data; boundary=x", "Got 2"),
        (PART.replace(b"file", b"note", 1).replace(b"; filename", b"; f") + b"1\r\n--x--\r\n", None, "Got 0"),
        ((PART + b"1\r\n") * 30 + b"--x--\r\n", None, "too many parts"),
        (PART + b"\r\n--x--\r\n", None, "must not be empty"),
        (b"--x\r\nA: " + b"a" * 10_000 + b"\r\n\r\n1\r\n--x--\r\n", None, "not: "),
        (b"", None, "last boundary is missing"),
        (photo(), None, "not: "),
    ],
    ids=[
        *("no boundary given", "cut off", "other boundary", "no part", "two photos", "no photo", "many parts"),
        *("empty photo", "long header", "empty", "no form"),
    ],
)
def test_bad_form_gets_422_and_a_sentence(service, form, content_type, sentence):
    headers = {"Content-Type": content_type or "multipart/form-data; boundary=x"}
    answer = service.client.post("/v1/classify", content=form, headers=headers)
    assert (answer.status_code, answer.json()["status"]) == (422, "error")
    assert sentence in answer.json()["error"]


@pytest.mark.parametrize("k", ["0", "-1", "five", "1.5", ""])
def test_k_out_of_range_gets_422(service, k):
    answer = service.classify(photo(), k=k)
    assert (answer.status_code, answer.json()["error"].split(" must")[0]) == (422, "k")


@pytest.mark.parametrize(("k", "named"), [(1, 1), (5, 5), (6, 5), (10**30, 5)])
def test_k_names_as_many_classes_as_there_are(service, k, named):
    assert len(service.classify(photo(), k=k).json()["top"]) == named


def test_models_are_listed_and_chosen_by_name(service, run_folder):
    assert service.client.get("/v1/models").json() == [
        {"name": str(run_folder), "network": "tiny", "classes": 5, "measured": {"top1": 0.25}, "heatmap": True}
    ]
    assert service.classify(photo(), model=str(run_folder)).status_code == 200
    answer = service.classify(photo(), model="other")
    assert (answer.status_code, "Got model='other'" in answer.json()["error"]) == (404, True)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("HEAD", "/healthz", 200),
        ("HEAD", "/v1/models", 200),
        ("GET", "/readyz", 200),
        ("GET", "/metrics", 200),
        ("GET", "/docs", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/nowhere", 404),
        ("POST", "/v1/classify/", 404),
        ("GET", "/v1/classify", 405),
        ("HEAD", "/v1/classify", 405),
        ("OPTIONS", "/v1/classify", 405),
        ("DELETE", "/healthz", 405),
    ],
)
def test_paths_and_methods(service, method, path, status):
    answer = service.client.request(method, path)
    assert answer.status_code == status
    assert ("allow" in answer.headers) == (status == 405)
    assert method != "HEAD" or answer.content == b""


def test_metrics_count_requests_latency_batches_and_queue(start):
    service = start()
    service.classify(photo())
    service.classify(b"hello")
    service.client.get("/nowhere/1")
    assert service.metric('weightnet_requests_total{path="/v1/classify",status="200"}') == 1
    assert service.metric('weightnet_requests_total{path="/v1/classify",status="422"}') == 1
    assert service.metric('weightnet_requests_total{path="other",status="404"}') == 1
    assert service.metric('weightnet_request_seconds_count{path="/v1/classify"}') == 2
    assert service.metric('weightnet_batch_photos_bucket{le="1.0"}') == 1
    assert service.metric("weightnet_queued_photos ") == 0
    assert service.metric("weightnet_requests_in_work ") == 0
    assert service.metric("weightnet_buffered_bytes ") == 0
    assert service.metric("weightnet_connections ") == 1


def test_reference_page_needs_nothing_from_elsewhere(service):
    page = service.client.get("/docs").text
    assert "POST /v1/classify" in page
    assert not re.search(r"://|<script|src=", page)


def test_failure_of_the_network_gets_500_and_ends_there(gate, start):
    service = start()
    gate.fail = RuntimeError("secret")
    answer = service.classify(photo())
    assert (answer.status_code, answer.json()["status"]) == (500, "error")
    assert "secret" not in answer.text
    gate.fail = None
    assert service.classify(photo()).status_code == 200
    gate.nan = True
    answer = service.classify(photo())
    assert (answer.status_code, "finite" in answer.json()["error"]) == (500, True)


def test_answer_that_takes_too_long_gets_504_and_frees_its_place(gate, start):
    service = start(answer_timeout_s=0.2, max_requests=1)
    gate.open.clear()
    answer = service.classify(photo())
    assert (answer.status_code, "within 0.2 s" in answer.json()["error"]) == (504, True)
    assert service.service.admission.requests == 0
    gate.open.set()
    assert service.classify(photo()).status_code == 200


def test_full_service_refuses_at_once_and_recovers(gate, start):
    service = start(max_requests=2)
    gate.open.clear()
    with ThreadPoolExecutor(2) as clients:
        waiting = [clients.submit(service.classify, photo(seed)) for seed in range(2)]
        service.until(lambda: service.service.admission.requests == 2)
        answer = service.classify(photo())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert service.client.get("/healthz").status_code == 200
        gate.open.set()
        assert [future.result().status_code for future in waiting] == [200, 200]
    assert service.classify(photo()).status_code == 200


def test_bodies_together_have_a_limit(gate, start):
    service = start(max_buffered_mb=2, max_body_mb=2)
    large = photo(size=(700, 600), suffix=".bmp")  # 1.26 MB
    gate.open.clear()
    with ThreadPoolExecutor() as clients:
        waiting = clients.submit(service.classify, large)
        service.until(lambda: service.service.admission.buffered_bytes >= len(large))
        answer = service.classify(large)
        assert (answer.status_code, "memory" in answer.json()["error"]) == (429, True)
        gate.open.set()
        assert waiting.result().status_code == 200
    assert service.service.admission.buffered_bytes == 0
    assert service.classify(photo()).status_code == 200


def test_service_says_503_while_it_loads_and_while_it_drains(gate, start):
    gate.open.clear()
    service = start(wait=False)

    def check_refusals(state: str) -> None:
        for answer in (service.classify(photo()), service.client.get("/readyz"), service.client.get("/v1/models")):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert service.client.get("/readyz").json() == {"status": state}
        assert service.client.get("/healthz").json() == {"status": "ok"}

    check_refusals("loading")
    gate.open.set()
    service.until(lambda: service.service.state == "ready")
    assert service.classify(photo()).status_code == 200
    service.service.drain()
    check_refusals("draining")


def test_waiting_photos_run_in_batches_of_powers_of_two(gate, start):
    service = start(batch_size=4)
    warm_up = len(gate.batches)
    gate.open.clear()
    with ThreadPoolExecutor(8) as clients:
        first = clients.submit(service.classify, photo())
        service.until(lambda: len(gate.batches) > warm_up)
        others = [clients.submit(service.classify, photo(seed)) for seed in range(7)]
        batcher = next(iter(service.service.models.values())).batcher
        service.until(lambda: batcher.queued == 7)
        gate.open.set()
        assert {future.result().status_code for future in (first, *others)} == {200}
    assert gate.batches == [1, 2, 4, 1, 4, 2, 1]


def test_client_that_went_away_is_left_out_of_the_batch(gate, start):
    service = start(answer_timeout_s=20)
    warm_up = gate.arrived
    gate.open.clear()
    blocker = threading.Thread(target=service.classify, args=(photo(),))
    blocker.start()
    service.until(lambda: gate.arrived == warm_up + 1)
    with service.connect() as connection:
        data = photo(1)
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        batcher = next(iter(service.service.models.values())).batcher
        service.until(lambda: batcher.queued == 1)
    service.until(lambda: service.service.admission.requests == 1)
    gate.open.set()
    blocker.join()
    assert service.classify(photo()).status_code == 200
    assert gate.arrived == warm_up + 2
    assert service.metric('weightnet_requests_total{path="/v1/classify",status="499"}') == 1
