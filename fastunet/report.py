"""Pictures of a run: progress.png, its curves, and samples.png, its predictions on held-out images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fastunet.data.images import whole_file
from fastunet.instances import find_instances
from fastunet.validation import PredictedImage

SAMPLES = 4
LARGEST_SIDE = 512
LARGEST_CURVE = 2000
PANEL = 4.7  # inches: 512 pixels at the resolution of the file

RAW, SMOOTH, HELD_OUT, BEST = "#9ecae1", "#1f4e8c", "#d95f02", "#1b7837"
TRUTH_LINE, PREDICTED_LINE = np.array([0.0, 0.85, 0.35]), np.array([1.0, 0.25, 0.55])
CLASS_COLOURS = np.array(
    [[0, 0, 0], [31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189], [140, 86, 75],
     [227, 119, 194], [188, 189, 34], [23, 190, 207]]
) / 255.0  # fmt: skip

TITLES = {
    "iou": "IoU of the foreground",
    "v_rand": "V$^{Rand}$ (thinned)",
    "seg": "SEG",
    "pixel_error": "1 - pixel error",
}


def draw_progress(path: Path | str, history: Mapping[str, np.ndarray], best: str, best_step: int) -> None:
    """Draw loss, validation scores and learning rate over the steps of a run.

    Parameters
    ----------
    path : path
        A PNG, written whole or not at all.
    history : mapping of str to (N,) float64
        Columns of metrics.csv (`fastunet.history.read_history`).
    best : str
        The figure that chooses the best checkpoint.
    best_step : int
        Its step, 0 before the first validation.
    """
    step, minutes = history["step"], history["seconds"] / 60
    scores = [name for name in TITLES if np.isfinite(history.get(f"val_{name}", np.nan)).any()]
    figure = Figure(figsize=(9, 8 if scores else 5.5), layout="constrained")
    heights = [3, 3, 1] if scores else [3, 1]
    axes = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))

    loss = axes[0]
    thin = slice(None, None, max(1, len(step) // LARGEST_CURVE))
    loss.plot(step[thin], history["loss"][thin], color=RAW, linewidth=0.6, label="each step")
    loss.plot(
        step[thin],
        history["running_loss"][thin],
        color=SMOOTH,
        linewidth=1.8,
        label="running mean, 100 steps",
    )
    _points(loss, step, history["val_loss"], HELD_OUT, "held-out images")
    loss.set_yscale("log")
    loss.set_ylabel("weighted cross-entropy")
    _plain_log_labels(loss)

    if scores:
        for name, colour in zip(scores, (HELD_OUT, "#7570b3", "#66a61e", "#e7298a")):
            figures = history[f"val_{name}"]
            _points(axes[1], step, 1 - figures if name == "pixel_error" else figures, colour, TITLES[name])
        axes[1].set_ylabel("held-out images")
        axes[1].set_ylim(top=1)
    if best_step:
        column = history[f"val_{best}"]
        at_best = column[step == best_step]
        label_text = (
            f"best {TITLES.get(best, best)}: {at_best[-1]:.4f}, step {best_step}" if len(at_best) else ""
        )
        for panel in axes[:-1]:
            panel.axvline(best_step, color=BEST, linewidth=1, linestyle="--", zorder=0)
        axes[0 if best == "loss" or not scores else 1].plot([], [], "--", color=BEST, label=label_text)
    for panel in axes[:-1]:
        panel.legend(loc="best", fontsize=9, framealpha=0.85)

    axes[-1].plot(step[thin], history["lr"][thin], color="#555555", linewidth=1.4)
    axes[-1].set_ylabel("learning rate")
    axes[-1].set_ylim(bottom=0)
    axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes[-1].set_xlabel("step")
    for panel in axes:
        panel.grid(True, color="#dddddd", linewidth=0.6)
        panel.margins(x=0.01)
    if len(step):
        figure.suptitle(f"{int(step[-1]):,} steps in {minutes[-1]:.1f} minutes", fontsize=12)
    _save(figure, path)


def chosen_samples(count: int) -> list[int]:
    """Which of `count` held-out images samples.png shows: up to four, evenly spaced."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, SAMPLES).round())]


def draw_samples(path: Path | str, images: Sequence[PredictedImage], kind: str) -> None:
    """Draw held-out images, a row each: image, truth, probability, and both outlines over the image.

    Parameters
    ----------
    path : path
        A PNG, written whole or not at all.
    images : sequence of PredictedImage
        Of a large one its middle 512 x 512 pixels are shown.
    kind : str
        "binary", "instances" or "classes" (`Dataset.kind`): a colour for each object or for each class.
    """
    figure = Figure(figsize=(PANEL * 4, (PANEL + 0.1) * len(images) + 0.4), layout="constrained")
    rows = figure.subplots(len(images), 4, squeeze=False)
    for axes, image in zip(rows, images):
        _draw_row(axes, image, kind)
    titles = ("image", "truth", "predicted class" if kind == "classes" else "probability of foreground")
    for axis, title in zip(rows[0], (*titles, "outlines: truth green, predicted pink")):
        axis.set_title(title, fontsize=15)
    _save(figure, path)


def _draw_row(axes: Sequence[Axes], image: PredictedImage, kind: str) -> None:
    height, width = image.classes.shape
    top, left = max(0, height - LARGEST_SIDE) // 2, max(0, width - LARGEST_SIDE) // 2
    window = np.s_[top : top + LARGEST_SIDE, left : left + LARGEST_SIDE]
    picture = _grey(image.image)[window]
    truth_classes = image.classes[window]
    probabilities = image.probabilities[window]
    predicted_classes = probabilities.argmax(axis=2).astype(np.uint8)
    if kind == "classes":
        truth, predicted = truth_classes, predicted_classes
        truth_picture = CLASS_COLOURS[truth % len(CLASS_COLOURS)]
        axes[2].imshow(CLASS_COLOURS[predicted % len(CLASS_COLOURS)])
    else:
        # The truth's objects as the network is to see them: with the gaps that separate them.
        truth = np.where(truth_classes > 0, image.instances[window], 0)
        predicted = find_instances(predicted_classes, image.separation_width)
        truth_picture = _coloured(truth)
        axes[2].imshow(1 - probabilities[:, :, 0], cmap="gray", vmin=0, vmax=1)
    if image.ignored is not None:
        truth_picture[image.ignored[window]] = 0.5
    axes[0].imshow(picture)
    axes[1].imshow(truth_picture)
    overlay = picture * 0.8
    overlay[_outline(truth)] = TRUTH_LINE
    overlay[_outline(predicted)] = PREDICTED_LINE
    axes[3].imshow(overlay)
    name = image.name
    axes[0].set_ylabel(name if len(name) <= 28 else f"...{name[-25:]}", fontsize=13)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])


def _grey(image: np.ndarray) -> np.ndarray:
    """Stretch an image (H, W, C) to RGB 0..1, each channel between its 0.5 and 99.5 percentiles."""
    shown = image[:, :, :3].astype(np.float64) if image.shape[2] >= 3 else image[:, :, :1].astype(np.float64)
    low, high = np.percentile(shown, [0.5, 99.5], axis=(0, 1))
    shown = np.clip((shown - low) / np.where(high > low, high - low, 1), 0, 1)
    return np.broadcast_to(shown, (*shown.shape[:2], 3)).copy()


def _coloured(instances: np.ndarray) -> np.ndarray:
    """Paint instances (H, W) on black, each number in a pastel colour of its own."""
    hue = (np.arange(int(instances.max()) + 1) * 0.618034) % 1
    colours = 0.45 + 0.5 * np.cos(2 * np.pi * (hue[:, None] + np.array([0, 1 / 3, 2 / 3])))
    colours = 0.25 + 0.75 * np.clip(colours, 0, 1)
    colours[0] = 0
    return colours[instances]


def _outline(labels: np.ndarray) -> np.ndarray:
    """Find the pixels of objects that touch, sideways or upright, a pixel of another label."""
    edge = np.zeros(labels.shape, bool)
    down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge & (labels > 0)


def _points(axis: Axes, step: np.ndarray, values: np.ndarray, colour: str, text: str) -> None:
    seen = np.isfinite(values)
    if seen.any():
        axis.plot(step[seen], values[seen], "o-", color=colour, markersize=4, linewidth=1.4, label=text)


def _plain_log_labels(axis: Axes) -> None:
    """Label a logarithmic axis 0.2, 0.3, 0.5 rather than by powers of ten: a loss seldom spans one."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, path: Path | str) -> None:
    FigureCanvasAgg(figure)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110, pil_kwargs={"compress_level": 2})
