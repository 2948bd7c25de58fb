"""Load `weightnet serve` with good and hostile requests, and check every answer.

    python benchmarks/serve_load.py [--requests N] [--clients N] [--hostile 0.2] [--model M] [--out FILE] [-- OPTIONS]

Starts the service in a process of its own on this machine (OPTIONS are its), asks by N clients at once, and ends it by
SIGTERM. A good request must get the answer that `Classifier` gives, or 429; a hostile one a refusal that fits it, and
never 5xx. Prints latency, throughput, the rates of decoding and of the network alone, what memory the service takes
after a tenth of the requests and at the end, and the time that the load itself takes of the processor. Linux only.
Code 1 where an answer was wrong, missing, or memory grew by 5% or more.
"""

import argparse
import asyncio
import collections
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import weightnet
from weightnet.images.decode import decode_image
from weightnet.predict.engines import open_engine
from weightnet.predict.interface import Batch

CAT = Path(__file__).parents[1] / "examples" / "cat.png"
PHOTOS = 32
PATIENCE_S = 60.0
HOLD_S = 0.3  # how long a client that dribbles holds its connection
TOLERANCE = 1e-4  # of a probability: batches of different sizes round differently
MAX_GROWTH = 0.05
FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n%s\r\n--x--\r\n'
BOMB = bytes.fromhex("89504e470d0a1a0a0000000d49484452 0000ea60 0000ea60 0802000000") + bytes(100)

Answer = tuple[int, bytes] | None  # status and body; None where the connection ended without one


class Load:
    """A number of requests by clients that each ask one after the other."""

    def __init__(self, port: int, photos: list[bytes], expected: list[Any], *, hostile: float) -> None:
        self._port = port
        self._photos = photos
        self._expected = expected
        self._hostile = hostile
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.mistakes: list[str] = []
        self.latencies_s: list[float] = []

    async def run(self, requests: int, clients: int) -> None:
        """Ask until all requests have their answers."""
        numbers = iter(range(requests))

        async def client() -> None:
            for number in numbers:
                chance = random.Random(number)
                if chance.random() < self._hostile:
                    await self._ask_badly(chance)
                else:
                    await self._ask_well(chance)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def _ask_well(self, chance: random.Random) -> None:
        index = chance.randrange(len(self._photos))
        as_form = chance.random() < 0.5
        body = FORM % self._photos[index] if as_form else self._photos[index]
        kind = "multipart/form-data; boundary=x" if as_form else "image/jpeg"
        begun = time.perf_counter()
        answer = await self._talk(_head(len(body), kind) + body)
        if answer is None:
            self._note("good: lost", wrong=True)
        elif answer[0] == 200:
            self.latencies_s.append(time.perf_counter() - begun)
            right = _same(json.loads(answer[1])["top"], self._expected[index])
            self._note("good: right" if right else "good: wrong", wrong=not right)
        else:
            self._note(f"good: {answer[0]}", wrong=answer[0] != 429)

    async def _ask_badly(self, chance: random.Random) -> None:
        photo = self._photos[0]
        cases: dict[str, tuple[Callable[[], Awaitable[Answer]], set[int | None]]] = {
            "text": (lambda: self._talk(_head(5) + b"hello"), {422}),
            "empty": (lambda: self._talk(_head(0)), {422}),
            "cut off": (lambda: self._talk(_head(500) + photo[:500]), {422}),
            "bomb": (lambda: self._talk(_head(len(BOMB)) + BOMB), {422}),
            "bad form": (lambda: self._talk(_head(500, "multipart/form-data; boundary=x") + photo[:500]), {422}),
            "huge": (lambda: self._talk(_head(10**12)), {413}),
            "k": (lambda: self._talk(_head(5, query="?k=0") + b"hello"), {422}),
            "no such path": (lambda: self._talk(b"GET /../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n"), {404}),
            "not HTTP": (lambda: self._talk(b"\x16\x03\x01\r\n\r\n"), {400}),
            "slow head": (lambda: self._talk(_head(5)[:30], leave_after_s=HOLD_S), {None}),
            "slow body": (lambda: self._talk(_head(len(photo)) + photo[:100], leave_after_s=HOLD_S), {None}),
            "gone": (lambda: self._talk(_head(len(photo)) + photo, leave_after_s=0.0), {None}),
        }
        name = chance.choice(list(cases))
        ask, fitting = cases[name]
        answer = await ask()
        status = None if answer is None else answer[0]
        self._note(f"hostile, {name}: {status or 'no answer'}", wrong=status not in fitting | {429})

    async def _talk(self, data: bytes, *, leave_after_s: float | None = None) -> Answer:
        """Send a request on a connection of its own and return its answer, or leave before it can come."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                try:
                    writer.write(data)
                    if leave_after_s is not None:
                        await asyncio.sleep(leave_after_s)
                        writer.transport.abort()
                        return None
                    return await _read_answer(reader)
                finally:
                    writer.transport.abort()
        except (OSError, EOFError, TimeoutError):
            return None

    def _note(self, outcome: str, *, wrong: bool) -> None:
        self.outcomes[outcome] += 1
        if wrong:
            self.mistakes.append(outcome)


async def _read_answer(reader: asyncio.StreamReader) -> Answer:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    body = await reader.readexactly(int(length[1])) if length else b""
    return int(head.split(b" ", 2)[1]), body


def _head(length: int, kind: str = "image/jpeg", *, query: str = "") -> bytes:
    return (
        f"POST /v1/classify{query} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def _same(top: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Whether probabilities agree, and labels where no two are so close that rounding may swap them."""
    pairs = list(zip(top, expected, strict=True))
    known = {score["label"]: score["probability"] for score in expected}
    near = all(abs(got["probability"] - want["probability"]) < TOLERANCE for got, want in pairs)
    return near and all(
        abs(known.get(got["label"], expected[-1]["probability"]) - got["probability"]) < TOLERANCE for got, _ in pairs
    )


def photos_of(count: int) -> list[bytes]:
    """Return JPEG files of 500 x 375 pixels, parts of one photo."""
    cat = cv2.resize(decode_image(CAT.read_bytes()), (1000, 750))
    chance = random.Random(0)
    parts = []
    for _ in range(count):
        x, y = chance.randrange(500), chance.randrange(375)
        parts.append(cv2.imencode(".jpg", cat[y : y + 375, x : x + 500])[1].tobytes())
    return parts


def rates_alone(model: str, photos: list[bytes]) -> dict[str, float]:
    """Return how many photos a second are decoded and prepared, and run in batches of 8, one after the other."""
    engine = open_engine(model)

    def prepare() -> list[Batch]:
        return [engine.card.preprocess(decode_image(photo)) for photo in photos[:8]]

    batch = np.stack(prepare())

    def rate(work: Callable[[], object]) -> float:
        times = []
        for _ in range(15):
            begun = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun)
        return 8 / statistics.median(times)

    decode, network = rate(prepare), rate(lambda: engine.run(batch))
    return {"decode": decode, "network": network, "one_after_the_other": 1 / (1 / decode + 1 / network)}


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def processor_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(options: argparse.Namespace) -> tuple[subprocess.Popen[str], int]:
    """Start the service and return it with its port."""
    command = [sys.executable, "-m", "weightnet", "serve", "--port", "0", "--model", options.model, *options.service]
    service = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert service.stderr is not None
    text = ""
    while "ready" not in text:
        line = service.stderr.readline()
        if not line:
            raise SystemExit(f"the service did not start:\n{text}")
        text += line
    found = re.search(r"http://127\.0\.0\.1:(\d+)", text)
    assert found is not None
    return service, int(found[1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the load and return the figures."""
    photos = photos_of(PHOTOS)
    expected = [prediction.to_dict()["top"] for prediction in weightnet.Classifier(options.model)(photos)]
    alone = rates_alone(options.model, photos)
    service, port = start(options)
    load = Load(port, photos, expected, hostile=options.hostile)
    first = options.requests // 10
    try:
        asyncio.run(load.run(first, options.clients))
        early_mb, answered_before = resident_mb(service.pid), len(load.latencies_s)
        load_s, service_s, begun = time.process_time(), processor_s(service.pid), time.perf_counter()
        asyncio.run(load.run(options.requests - first, options.clients))
        took_s = time.perf_counter() - begun
        late_mb = resident_mb(service.pid)
        load_s, service_s = time.process_time() - load_s, processor_s(service.pid) - service_s
    finally:
        service.send_signal(signal.SIGTERM)
        code = service.wait(PATIENCE_S)
    assert service.stderr is not None
    requests = options.requests - first
    latencies_ms = sorted(1000 * latency for latency in load.latencies_s[answered_before:])
    return {
        "requests": options.requests,
        "clients": options.clients,
        "outcomes": dict(sorted(load.outcomes.items())),
        "mistakes": load.mistakes[:20],
        "latency_ms": {
            "p50": round(statistics.median(latencies_ms), 1),
            "p99": round(latencies_ms[int(0.99 * len(latencies_ms))], 1),
        },
        "photos_per_s": round(len(latencies_ms) / took_s, 1),
        "requests_per_s": round(requests / took_s, 1),
        "alone_photos_per_s": {name: round(value, 1) for name, value in alone.items()},
        "resident_mb": {"after_a_tenth": round(early_mb, 1), "at_the_end": round(late_mb, 1)},
        "growth": round(late_mb / early_mb - 1, 4),
        "processor_ms_per_request": {
            "load": round(1000 * load_s / requests, 2),
            "service": round(1000 * service_s / requests, 2),
        },
        "exit_code": code,
        "said": service.stderr.read().splitlines()[:20],
    }


def main() -> int:
    """Measure, print the figures and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--hostile", type=float, default=0.2)
    parser.add_argument("--model", default="default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("service", nargs="*", help="options of weightnet serve, after --")
    options = parser.parse_args()
    figures = measure(options)
    report = {
        "command": f"python benchmarks/serve_load.py {' '.join(sys.argv[1:])}".strip(),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "weightnet": weightnet.__version__,
        **figures,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 1 if figures["mistakes"] or figures["growth"] >= MAX_GROWTH or figures["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
