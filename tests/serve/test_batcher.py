import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from weightnet.serve.batcher import Batcher


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as executor:
        yield executor


async def logits(batcher, value):
    return (await batcher.outputs(np.float32([value]), ("logits",)))["logits"]


def ask(thread, photos, run=lambda x: x, *, announced=0, cancel=(), **options):
    """Give photos to a batcher, all at once; return what became of each, and the sizes of the batches."""
    sizes = []

    async def main():
        batcher = Batcher(
            lambda x, names: {"logits": run(x)},
            thread=thread,
            on_batch=sizes.append,
            **{"batch_size": 4, "wait_s": 0.2, **options},
        )
        asks = [asyncio.ensure_future(logits(batcher, value)) for value in photos]
        await asyncio.sleep(0)
        for index in cancel:
            asks[index].cancel()

        async def announce():
            with batcher.announced():
                await asyncio.sleep(0.05)
            return await logits(batcher, 9)

        asks += [asyncio.ensure_future(announce()) for _ in range(announced)]
        await asyncio.sleep(0)
        serving = asyncio.ensure_future(batcher.serve())
        outcomes = await asyncio.gather(*asks, return_exceptions=True)
        serving.cancel()
        return outcomes

    return asyncio.run(main()), sizes


def test_batcher_gives_each_photo_its_own_logits(thread):
    outcomes, sizes = ask(thread, range(7), run=lambda x: x * 2)
    assert np.concatenate(outcomes).tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert sizes == [4, 2, 1]


def test_batch_runs_once_for_all_outputs_that_its_photos_want(thread):
    runs = []

    def run(x, names):
        runs.append((len(x), names))
        return {name: x * factor for name, factor in (("logits", 2), ("features", 3)) if name in names}

    async def main():
        batcher = Batcher(run, thread=thread, batch_size=4, wait_s=0, on_batch=lambda size: None)
        wanted = [("logits",), ("logits", "features"), ("logits",), ("features",)]
        asks = [asyncio.ensure_future(batcher.outputs(np.float32([i]), names)) for i, names in enumerate(wanted)]
        await asyncio.sleep(0)
        serving = asyncio.ensure_future(batcher.serve())
        outcomes = await asyncio.gather(*asks)
        serving.cancel()
        return [{name: array.item() for name, array in outputs.items()} for outputs in outcomes]

    assert asyncio.run(main()) == [{"logits": 0}, {"logits": 2, "features": 3}, {"logits": 4}, {"features": 9}]
    assert runs == [(4, ["logits", "features"])]


def test_lone_photo_runs_at_once(thread):
    begun = time.monotonic()
    assert ask(thread, [1], wait_s=20)[1] == [1]
    assert time.monotonic() - begun < 10


def test_photo_waits_for_one_that_is_announced(thread):
    assert ask(thread, [1], announced=1, wait_s=20)[1] == [2]
    assert ask(thread, [1], announced=1, wait_s=0.001)[1] == [1, 1]


def test_full_batch_does_not_wait(thread):
    assert ask(thread, [1, 2], announced=1, batch_size=2, wait_s=20)[1] == [2, 1]


def test_cancelled_photo_is_left_out(thread):
    outcomes, sizes = ask(thread, range(4), cancel=[1])
    assert isinstance(outcomes[1], asyncio.CancelledError)
    assert sum(sizes) == 3


def test_failure_is_told_to_its_batch_alone(thread):
    def run(x):
        if 1 in x:
            raise RuntimeError("no")
        return x

    outcomes, sizes = ask(thread, range(4), run, batch_size=2)
    assert [isinstance(outcome, RuntimeError) for outcome in outcomes] == [True, True, False, False]
    assert sizes == [2, 2]
