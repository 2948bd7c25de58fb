"""The course of a run as a picture."""

import io
from collections.abc import Sequence

PANELS = {
    "loss (nats)": {"train_loss": "training, as it learns", "loss": "validation"},
    "accuracy": {"top1": "top-1", "top5": "top-5", "class_averaged_top1": "class-averaged top-1"},
}


def draw_curves(history: Sequence[dict[str, float]]) -> bytes:
    """Return a picture, as PNG, of loss and accuracy over the epochs of a run.

    Args:
        history: one mapping of figures per evaluation, as in the run's `log.csv`.

    Example:
        >>> figures = {"train_loss": 2.0, "loss": 1.9, "top1": 0.5, "top5": 0.9, "class_averaged_top1": 0.4}
        >>> draw_curves([{"epoch": 1, **figures}])[1:4]
        b'PNG'
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, (title, curves) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for name, label in curves.items():
            axes.plot(epochs, [row[name] for row in history], marker=".", label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[1].set_ylim(0, 1)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
