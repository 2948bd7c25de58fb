"""One step: schedules, clipping, mixing and parts."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from weightnet.errors import TrainingError
from weightnet.train.config import TrainConfig
from weightnet.train.data import Batch
from weightnet.train.loop import _start, fit, start_fabric
from weightnet.train.run import RunState
from weightnet.train.step import learning_rate, loss_of, mix, update
from weightnet.zoo.cards import numbered_classes

from .conftest import MakeConfig, log_of, weights_of


def one_step(config: TrainConfig, batch: Batch) -> tuple[RunState, float]:
    fabric = start_fabric(config)
    state, model = _start(fabric, config, numbered_classes(3), None, begun=False)
    state.network.dropout.p = 0.0
    return state, update(fabric, model, state, batch, config, 10)


@pytest.fixture
def batch() -> Batch:
    rng = np.random.default_rng(0)
    photos = torch.from_numpy(rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    return Batch(photos, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), [])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_falls_from_the_peak_to_0(make_config: MakeConfig, schedule: str) -> None:
    rates = [learning_rate(make_config(schedule=schedule), step, 100) for step in range(101)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == make_config().peak_learning_rate
    assert rates[50] == pytest.approx(rates[0] / 2)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    at_a_quarter = 0.75 if schedule == "linear" else (1 + math.sqrt(0.5)) / 2
    assert rates[25] / rates[0] == pytest.approx(at_a_quarter)


def test_update_clips_the_gradient(make_config: MakeConfig, batch: Batch) -> None:
    options: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0, "batch_size": 128}
    before = [p.detach().clone() for p in one_step_start(make_config(**options))]
    state, _ = one_step(make_config(clip_norm=0.01, **options), batch)
    moved = torch.cat([(p - q).detach().flatten() for p, q in zip(state.network.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_update_leaves_a_gradient_that_overflows_to_the_next_loss(make_config: MakeConfig, batch: Batch) -> None:
    config = make_config(clip_norm=1.0)
    fabric = start_fabric(config)
    state, model = _start(fabric, config, numbered_classes(3), None, begun=False)
    state.network.classifier[0].bias.register_hook(lambda gradient: gradient * torch.inf)
    update(fabric, model, state, batch, config, 8)
    with pytest.raises(TrainingError, match="lower learning_rate"):
        update(fabric, model, state, batch, config, 8)


def one_step_start(config: TrainConfig) -> list[nn.Parameter]:
    state, _ = _start(start_fabric(config), config, numbered_classes(3), None, begun=False)
    return list(state.network.parameters())


def test_update_by_parts_takes_the_mean_of_their_gradients(make_config: MakeConfig, batch: Batch) -> None:
    options: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 0.1, "batch_size": 8}
    start = [p.detach().clone() for p in one_step_start(make_config(**options))]
    whole, loss = one_step(make_config(accumulate=2, **options), batch)
    halves = [
        one_step(make_config(**options), Batch(batch.photos[rows], batch.labels[rows], []))
        for rows in (slice(0, 4), slice(4, 8))
    ]
    assert loss == pytest.approx((halves[0][1] + halves[1][1]) / 2)
    first, second = (list(half.network.parameters()) for half, _ in halves)
    for p, q, r, before in zip(whole.network.parameters(), first, second, start, strict=True):
        torch.testing.assert_close(p - before, (q + r) / 2 - before, rtol=1e-4, atol=1e-6)


def test_update_never_makes_parts_of_a_single_photo(make_config: MakeConfig, batch: Batch) -> None:
    few = Batch(batch.photos[:5], batch.labels[:5], [])
    _, loss = one_step(make_config(accumulate=4, batch_size=8), few)  # which batch norm would refuse
    assert math.isfinite(loss)


def test_mix_of_classes_is_the_mix_of_losses(make_config: MakeConfig) -> None:
    config = make_config(label_smoothing=0.1)
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    soft = mix(nn.functional.one_hot(labels, 3).double(), 0.3)
    one, other = (loss_of(logits, each, None, config)[0].item() for each in (labels, labels.flip(0)))
    assert loss_of(logits, soft, None, config)[0].item() == pytest.approx(0.3 * one + 0.7 * other)


def test_update_mixes_photos_and_classes_alike(
    make_config: MakeConfig, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightnet.train import step

    seen: list[tuple[tuple[int, ...], float]] = []
    monkeypatch.setattr(step, "mix", lambda rows, share: seen.append((tuple(rows.shape), share)) or mix(rows, share))
    one_step(make_config(mixup=0.2), batch)
    assert [shape for shape, _ in seen] == [(8, 3, 32, 32), (8, 3)]
    assert seen[0][1] == seen[1][1]
    assert 0 <= seen[0][1] <= 1


@pytest.mark.parametrize(
    "options",
    [{"schedule": "cosine"}, {"clip_norm": 0.5}, {"mixup": 0.4}, {"accumulate": 3}],
    ids=lambda options: next(iter(options)),
)
def test_fit_takes_the_option(tmp_path: Any, make_config: MakeConfig, options: dict[str, Any]) -> None:
    fit(make_config(out=str(tmp_path / "plain")))
    for name in ("one", "two"):
        fit(make_config(out=str(tmp_path / name), **options))
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")
    assert log_of(tmp_path / "one") == log_of(tmp_path / "two")
    assert weights_of(tmp_path / "one") != weights_of(tmp_path / "plain")
