"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from errors import ExampleError


def draw(metrics: Path, target: Path, title: str) -> None:
    """Write `target` (PNG) from the JSON lines of a run; of a step done twice, the later counts.

    Raises ExampleError if matplotlib is missing, or there is nothing to draw.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ExampleError(
            f"no loss curve, because matplotlib is not installed (python -m pip install -r "
            f"examples/gpt/requirements.txt); its figures are in {metrics}"
        ) from error
    matplotlib.use("Agg")  # draws into files; needs no screen
    from matplotlib import pyplot

    train, heldout = _curves(metrics)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(list(train), list(train.values()), color="tab:blue", alpha=0.3, linewidth=1)
    smooth = _smoothed(list(train.values()))
    axes.plot(list(train), smooth, color="tab:blue", label="training (running mean)")
    axes.plot(
        list(heldout), list(heldout.values()), "o-", color="tab:orange", label="held-out text"
    )
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _curves(metrics: Path) -> tuple[dict[int, float], dict[int, float]]:
    train: dict[int, float] = {}
    heldout: dict[int, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["event"] == "step":
            train[row["step"]] = float(row["loss"])
        elif row["event"] == "evaluation":
            heldout[row["step"]] = float(row["heldout_nats_per_token"])
    if not train:
        raise ExampleError(f"no loss curve: {metrics} has no step yet")
    return dict(sorted(train.items())), dict(sorted(heldout.items()))


def _smoothed(values: list[float]) -> list[float]:
    """Mean over a window around each value, of about a twentieth of all, whole ones at the ends."""
    reach = max(1, len(values) // 40)
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]
