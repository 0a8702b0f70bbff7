"""A training run: samples in, a run folder out.

Each step is a sample, the network, the weighted loss, gradients and SGD. Between steps the run validates on
whole held-out images, keeps the best weights, and writes checkpoints from which it goes on as if it had never
stopped: with a number of steps given, everything a step does is a function of the settings and the step.
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from fastunet import backends
from fastunet.checkpoint import Checkpoint, RunState
from fastunet.data.datasets import Dataset
from fastunet.data.images import whole_file
from fastunet.data.samples import (
    PreparedImage,
    Samples,
    TrainingSample,
    WeightSettings,
    open_samples,
    prepare,
)
from fastunet.errors import DataError
from fastunet.geometry import border, input_size, output_size
from fastunet.history import History, read_history
from fastunet.normalization import check_normalization
from fastunet.optim import SGD
from fastunet.predictor import Predictor, model_file
from fastunet.report import chosen_samples, draw_progress, draw_samples
from fastunet.schedule import learning_rate
from fastunet.training_memory import check_training_memory, training_bytes
from fastunet.training_step import TrainingStep
from fastunet.unet import Normalization, UNet
from fastunet.validation import (
    BEST_BY_KIND,
    SCORES_BY_KIND,
    HeldOutImage,
    PredictedImage,
    hold_out,
    larger_is_better,
    predict_images,
    score,
)

CONFIG = "config.json"
METRICS = "metrics.csv"
LATEST = "checkpoint-latest.safetensors"
BEST = "checkpoint-best.safetensors"
MODEL = "model.safetensors"
PROGRESS = "progress.png"
SAMPLES = "samples.png"
FILES = (CONFIG, METRICS, LATEST, BEST, MODEL, PROGRESS, SAMPLES)

STEPS = 10_000
OUTPUT_BY_DEVICE = {"cpu": 132, "cuda": 388}
OBJECTS_ACROSS = 3
"""A tile shows this many objects side by side: of less it learns insides, not borders (bench/NOTES.md)."""
BASE_CHANNELS_BY_DEVICE = {"cpu": 16, "cuda": 64}
RUNNING_HORIZON = 100
VALIDATIONS = 20
VALIDATION_SHARE = 0.1
SHORTEST_INTERVAL = 50
EVENTS_EVERY = 10
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """What a run does; None means: decided from data and device, said, and recorded in config.json.

    Attributes
    ----------
    steps, minutes : int, float
        Length of the run, one or the other; default 10000 steps. With minutes, the learning rate follows
        time.
    base_channels : int
        Default 64 on CUDA, 16 on the CPU; that of `init` where one is given.
    depth : int
        Default 4, or that of `init`.
    tile : int
        Side of the network's input; default 572 on CUDA; on the CPU 316, or more where objects are large, so that
        three fit side by side. Less where all images are smaller.
    lr, momentum : float
    w0, sigma, preset : float, float, str
        The weight map's (`fastunet.weight_map`); the preset's own w0 and sigma when None.
    separation_width : int
        Pixels of background cut from each of two touching instances (`fastunet.separate`); give prediction the
        same.
    best : str
        Validation figure that chooses the best weights: "v_rand" (default for binary masks), "seg" (for
        instances), "iou" (for classes) or "loss".
    normalization : str or list of [offset, scale]
        Default "zscore", or that of `init`.
    dropout : float
    class_names : list of str
    init : str
        A model file, a run folder or the name of a shipped model, whose weights the run begins with.
    checkpoint_every : int
        Steps between checkpoints; default about a minute.
    seed : int
    device, precision : str
    threads : int
        CPU threads; default the cores this process may use.
    tensorboard : bool
        Write events for TensorBoard too.
    """

    steps: int | None = None
    minutes: float | None = None
    base_channels: int | None = None
    depth: int | None = None
    tile: int | None = None
    lr: float = 1e-3
    momentum: float = 0.99
    w0: float | None = None
    sigma: float | None = None
    preset: str = "paper2015"
    separation_width: int = 1
    best: str | None = None
    normalization: Normalization | None = None
    dropout: float = 0.5
    class_names: list[str] | None = None
    init: str | None = None
    checkpoint_every: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    tensorboard: bool = False


@dataclass(frozen=True)
class Result:
    """What came out: the run folder, its steps, and the best validation figures with their step."""

    out: Path
    steps: int
    best: str
    best_step: int
    scores: dict[str, float]


def train(
    training: Dataset,
    validation: Dataset | None = None,
    out: Path | str | None = None,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    source: Mapping[str, Any] | None = None,
    notify: Callable[[str], None] = print,
    quiet: bool = False,
) -> Result:
    """Train a network and write a run folder.

    Parameters
    ----------
    training : Dataset
        Annotated images (`fastunet.data.datasets.open_dataset`).
    validation : Dataset, optional
        Held-out images; without any the run is scored on its own training images, and says so.
    out : path, optional
        The run folder, default runs/DATE-TIME.
    settings : Settings, optional
    overwrite : bool
        Replace a run that `out` holds.
    source : mapping, optional
        How the data was opened, for config.json.
    notify : callable
        Receives what the user should know, a line at a time.
    quiet : bool
        Show no progress bars.

    Returns
    -------
    Result

    Raises
    ------
    ValueError
        If a setting cannot be used, or the loss is not finite.
    DataError
        If the images cannot be used.
    FileExistsError
        If `out` holds a run, or is no folder.
    MemoryError
        If the tile does not fit; the message says what would.
    KeyboardInterrupt
        After Ctrl-C or SIGTERM, with a checkpoint of the last whole step written.
    """
    out = Path(out) if out is not None else Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    check_out(out, overwrite)
    start, settings = _resolve(settings or Settings(), training, notify)
    run = _Run(training, validation, out, settings, start, None, notify, quiet)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    config = {
        "settings": dataclasses.asdict(settings),
        "source": dict(source or {}),
        "data": _describe(training, validation),
    }
    with whole_file(out / CONFIG) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
    return run.go()


def resume(
    out: Path | str,
    training: Dataset,
    validation: Dataset | None = None,
    *,
    device: str | None = None,
    threads: int | None = None,
    notify: Callable[[str], None] = print,
    quiet: bool = False,
) -> Result:
    """Continue a run from its latest checkpoint, bitwise as if it had never stopped.

    Parameters
    ----------
    out : path
        The run folder.
    training, validation : Dataset
        The data the run began with.
    device, threads : str, int, optional
        Another machine's; the run then goes on with rounding of its own.
    notify, quiet
        As for `train`.

    Raises
    ------
    DataError
        If the folder holds no run, its checkpoint is damaged, or the data is not the same.
    """
    out = Path(out)
    settings, config = read_config(out)
    if _describe(training, validation) != config["data"]:
        raise DataError(
            f"{out}: the run began with other images or labels than those given; give it the same data, or "
            f"start a new run from its weights with --init {out}"
        )
    settings = dataclasses.replace(
        settings, device=device or settings.device, threads=threads or settings.threads
    )
    for leftover in out.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    checkpoint = Checkpoint.load(out / LATEST) if (out / LATEST).exists() else None
    if checkpoint is None:
        notify(f"{out} stopped before its first checkpoint; starting at step 0")
    else:
        notify(f"resuming {out} at step {checkpoint.state.step}")
    start, settings = _resolve(settings, training, lambda line: None)
    return _Run(training, validation, out, settings, start, checkpoint, notify, quiet).go()


def holds_run(out: Path) -> bool:
    """Whether a folder holds any file of a run."""
    return any((out / name).exists() for name in FILES)


def check_out(out: Path, overwrite: bool = False) -> None:
    """Raise FileExistsError where a new run cannot be written: it would replace another, or a file is there."""
    if holds_run(out) and not overwrite:
        raise FileExistsError(
            f"{out} holds a run; go on with it by --resume {out}, replace it by --overwrite, or name another"
        )
    nearest = next((path for path in (out, *out.parents) if path.exists()), out)
    if nearest.exists() and not nearest.is_dir():
        raise FileExistsError(
            f"--out {out}: {nearest} is a file, but a folder is expected; name another folder for the run"
        )


def read_config(out: Path | str) -> tuple[Settings, dict[str, Any]]:
    """Read the settings of a run folder, and all of its config.json.

    Raises
    ------
    DataError
        If the folder holds no readable config.json.
    """
    path = Path(out) / CONFIG
    try:
        config = json.loads(path.read_text())
        settings = Settings(**config["settings"])
        config["source"], config["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); --resume expects the folder of a run of fastunet.train"
        ) from error
    return settings, config


def _describe(training: Dataset, validation: Dataset | None) -> dict[str, Any]:
    """Tell what makes data the same data: names, classes and a digest of every image and label."""
    digest = hashlib.blake2b(digest_size=16)
    held_out = validation.samples if validation else []
    for sample in [*training.samples, *held_out]:
        for array in (sample.image, sample.instances, sample.classes, sample.ignored):
            if array is not None:
                digest.update(f"{array.shape}{array.dtype}".encode())
                digest.update(np.ascontiguousarray(array).data)
    return {
        "kind": training.kind,
        "in_channels": training.in_channels,
        "num_classes": training.num_classes,
        "training": [sample.name for sample in training.samples],
        "validation": [sample.name for sample in held_out],
        "digest": digest.hexdigest(),
    }


def _check(settings: Settings, training: Dataset) -> None:
    """Raise ValueError for a setting that no run can use."""
    rules: list[tuple[str, object, bool, str]] = [
        ("--lr", settings.lr, 0 < settings.lr < math.inf, "a positive number"),
        ("--momentum", settings.momentum, 0 <= settings.momentum < 1, "at least 0 and below 1"),
        ("--dropout", settings.dropout, 0 <= settings.dropout < 1, "at least 0 and below 1"),
        ("--w0", settings.w0, settings.w0 is None or 0 <= settings.w0 < math.inf, "0 or a positive number"),
        (
            "--sigma",
            settings.sigma,
            settings.sigma is None or 0 < settings.sigma < math.inf,
            "a positive number of pixels",
        ),
        ("--separation-width", settings.separation_width, settings.separation_width >= 0, "0 or more pixels"),
        ("--seed", settings.seed, 0 <= settings.seed < 2**64, "a whole number from 0 to 2**64 - 1"),
        ("--depth", settings.depth, settings.depth is None or 1 <= settings.depth <= 6, "1 to 6"),
        ("--steps", settings.steps, settings.steps is None or settings.steps > 0, "at least 1"),
        (
            "--minutes",
            settings.minutes,
            settings.minutes is None or 0 < settings.minutes < math.inf,
            "positive",
        ),
        (
            "--best",
            settings.best,
            settings.best in (None, "iou", "v_rand", "seg", "loss"),
            "iou, v_rand, seg or loss",
        ),
        (
            "--class-names",
            settings.class_names,
            settings.class_names is None or len(settings.class_names) == training.num_classes,
            f"{training.num_classes} names, the background's first",
        ),
    ]
    for option, value, allowed, expected in rules:
        if not allowed:
            raise ValueError(f"{option} is {value}, expected {expected}")
    if settings.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ValueError(
            "--tensorboard needs tensorboardX, which is not installed: pip install 'fastunet[tensorboard]'"
        )
    if settings.steps is not None and settings.minutes is not None:
        raise ValueError(
            f"both {settings.steps} steps and {settings.minutes:g} minutes were asked for; give one: the "
            f"learning rate falls towards the end of the run"
        )


def _object_size(dataset: Dataset) -> int:
    """Side in pixels of a square of the median object's area, 0 where objects are not told apart."""
    if dataset.kind != "instances":
        return 0
    areas = [
        np.unique(sample.instances[sample.instances > 0], return_counts=True)[1] for sample in dataset.samples
    ]
    return int(np.sqrt(np.median(np.concatenate(areas)))) if sum(map(len, areas)) else 0


def _resolve(settings: Settings, training: Dataset, notify: Callable[[str], None]) -> tuple[UNet, Settings]:
    """Make the network as it is before the first step, and settings in which nothing is left open."""
    _check(settings, training)
    device = backends.resolve_device(settings.device)
    kind = device.partition(":")[0]
    if settings.threads is not None:
        backends.set_threads(settings.threads)
    init = None
    if settings.init is not None:
        init = UNet.load(model_file(settings.init), device="cpu")
        if init.in_channels != training.in_channels:
            raise ValueError(
                f"--init {settings.init} takes images of {init.in_channels} channels and the data has "
                f"{training.in_channels}; take a model for {training.in_channels}, or train without --init"
            )
        for name in ("base_channels", "depth"):
            if getattr(settings, name) not in (None, getattr(init, name)):
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(settings, name)} and --init {settings.init} has "
                    f"{getattr(init, name)}; leave the option out, or train without --init"
                )
    depth = settings.depth or (init.depth if init else 4)
    base_channels = settings.base_channels or (init.base_channels if init else BASE_CHANNELS_BY_DEVICE[kind])
    longest = max(max(sample.shape[:2]) for sample in training.samples)
    wanted = max(
        OUTPUT_BY_DEVICE[kind], min(OBJECTS_ACROSS * _object_size(training), OUTPUT_BY_DEVICE["cuda"])
    )
    tile = settings.tile or input_size(min(wanted, longest), depth)
    normalization = settings.normalization or (init.normalization if init else "zscore")
    try:
        output = output_size(tile, depth)
    except ValueError as error:
        raise ValueError(f"--tile {tile}: {error}") from None
    try:
        check_normalization(normalization, training.in_channels)
    except ValueError as error:
        raise ValueError(f"--normalization: {error}") from None
    if not settings.base_channels or not settings.tile:
        notify(
            f"network: {base_channels} base channels, depth {depth}, tiles of {tile} pixels in and {output} "
            f"out, on {device}"
        )
    resolved = dataclasses.replace(
        settings,
        steps=settings.steps if settings.steps or settings.minutes else STEPS,
        base_channels=base_channels,
        depth=depth,
        tile=tile,
        best=settings.best or BEST_BY_KIND[training.kind],
        normalization=normalization,
        class_names=settings.class_names or list(training.class_names),
        device=device,
        threads=settings.threads or backends.get_threads(),
    )
    sizes = training.in_channels, training.num_classes, base_channels, depth
    check_training_memory(tile, *sizes, device=device, precision=settings.precision)
    model = UNet(
        in_channels=training.in_channels,
        num_classes=training.num_classes,
        base_channels=base_channels,
        depth=depth,
        dropout=settings.dropout,
        seed=settings.seed,
        device=device,
        precision=settings.precision,
    )
    model.normalization = normalization
    model.class_names = resolved.class_names
    if init is not None:
        weights = init.state_dict()
        if init.num_classes != training.num_classes:
            notify(
                f"--init {settings.init} has {init.num_classes} classes and the data {training.num_classes}: "
                f"its last layer starts anew"
            )
            weights |= {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
        model.load_state_dict(weights)
    return model, resolved


class _Interruption:
    """Let Ctrl-C and SIGTERM end the run after the current step, and a second one at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> "_Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _StartedStep:
    """A step that a device may still be at: its number, rate, time in the run, what it took to start, and its loss."""

    number: int
    rate: float
    seconds: float
    busy: float
    loss: Callable[[], float]


class _Run:
    """One run, from its settings or a checkpoint to its last picture."""

    def __init__(
        self,
        training: Dataset,
        validation: Dataset | None,
        out: Path,
        settings: Settings,
        model: UNet,
        checkpoint: Checkpoint | None,
        notify: Callable[[str], None],
        quiet: bool,
    ) -> None:
        self.out, self.settings, self.model, self.quiet = out, settings, model, quiet
        self.notify = notify
        assert settings.best and settings.tile and settings.depth and settings.threads
        self.best, self.tile = settings.best, settings.tile
        self.output = output_size(settings.tile, settings.depth)
        self.kind = training.kind
        self.images, self.held_out = self._prepare(training, validation)
        self.figures = SCORES_BY_KIND[training.kind]
        if self.best not in self.figures:
            self.figures += (self.best,)
        self.optimizer = SGD(model, lr=settings.lr, momentum=settings.momentum)
        self.training_step = TrainingStep(model, self.optimizer)
        self.predictor = Predictor(model)
        self.state = RunState()
        if checkpoint is not None:
            model.load_state_dict(checkpoint.weights)
            self.optimizer.load_state_dict(checkpoint.momentum)
            self.state = checkpoint.state
            model.draws = self.state.draws
        self.step_seconds = 0.0
        self.told_unmeasured = False

    def _prepare(
        self, training: Dataset, validation: Dataset | None
    ) -> tuple[list[PreparedImage], list[HeldOutImage]]:
        settings = self.settings
        weighting = WeightSettings(settings.w0, settings.sigma, settings.preset)
        threads, normalization = settings.threads or 1, settings.normalization or "zscore"
        width, stream = settings.separation_width, self.model.backend.stream
        images, class_weights = prepare(
            training,
            normalization,
            weighting,
            separation_width=width,
            threads=threads,
            quiet=self.quiet,
            stream=stream,
        )
        if not validation:
            self.notify("no image is held out: scores are those of the training images")
            return images, hold_out(training, images, width)
        held_out, _ = prepare(
            validation,
            normalization,
            weighting,
            class_weights,
            separation_width=width,
            threads=threads,
            quiet=self.quiet,
            stream=stream,
        )
        return images, hold_out(validation, held_out, width)

    def go(self) -> Result:
        """Train to the end, keep the best, draw the pictures."""
        settings, state = self.settings, self.state
        columns = ["step", "seconds", "loss", "running_loss", "lr", *(f"val_{name}" for name in self.figures)]
        self.model.train()
        with (
            closing(History(self.out / METRICS, columns, state.step)) as history,
            _events(self.out, state.step) if settings.tensorboard else nullcontext() as events,
            self._samples() as samples,
            _Interruption() as interruption,
        ):
            self._compile_figures()
            self._start_clock()
            with self._bar() as bar:
                waiting: _StartedStep | None = None
                while waiting or not (state.finished or interruption.asked):
                    # While the device is at a step the one before is recorded; a step that more hangs on, at once.
                    over, waiting = waiting, None
                    if not (state.finished or interruption.asked):
                        waiting = self._start(next(samples))
                        state.finished = self._fraction() >= 1
                    if over is not None:
                        self._record(over, history, events)
                    validated = waiting is not None and (state.finished or self._validation_due())
                    saved = state.finished or interruption.asked or self._checkpoint_due()
                    if waiting is not None and (validated or saved):
                        self._record(waiting, history, events, validated)
                        waiting = None
                    if saved:
                        history.sync()
                        self._save(LATEST)
                        self.saved = time.monotonic()
                    bar.set_postfix_str(self._status(), refresh=False)
                    bar.update(self._done() - bar.n)
        if not state.finished:
            self.notify(f"stopped after step {state.step}; continue with --resume {self.out}")
            raise KeyboardInterrupt
        return self._result()

    def _samples(self) -> Samples:
        """The samples from the next step on, made where the network reads them.

        There they may take half the memory that training leaves; the rest is for validation.
        """
        model, settings = self.model, self.settings
        backend = model.backend
        sizes = model.in_channels, model.num_classes, model.base_channels, model.depth
        needed = training_bytes(self.tile, *sizes, device=backend.name, precision=settings.precision)
        return open_samples(
            self.images,
            self.tile,
            self.output,
            settings.seed,
            self.state.step,
            threads=1 if (settings.threads or 1) <= 2 else 2,
            stream=backend.stream,
            room=(backend.free_memory() - needed) // 2,
            notify=self.notify,
        )

    def _compile_figures(self) -> None:
        """Measure a corner of an image: compiling what validation runs must not count as training time."""
        image = self.held_out[0]
        corner = np.s_[:32, :32]
        probabilities = np.full((*image.classes[corner].shape, self.model.num_classes), 0.5, np.float32)
        score(
            [
                PredictedImage(
                    image.name,
                    image.image[corner],
                    image.instances[corner],
                    None,
                    image.classes[corner],
                    image.weights[corner],
                    probabilities,
                )
            ],
            self.figures,
        )

    def _start_clock(self) -> None:
        self.saved = time.monotonic()
        self.started = self.saved - self.state.seconds
        self._plan_validation()

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _done(self) -> float:
        """How much of the run is over, in steps or seconds."""
        return self.state.step if self.settings.steps else min(self._elapsed(), self._total())

    def _total(self) -> float:
        return self.settings.steps or 60 * (self.settings.minutes or 0)

    def _fraction(self) -> float:
        return self._done() / self._total()

    def _start(self, sample: TrainingSample) -> _StartedStep:
        """Begin a step; its loss may still be on its way."""
        state, settings = self.state, self.settings
        rate = learning_rate(settings.lr, state.step, self._fraction())
        self.optimizer.lr = rate
        began = time.monotonic()
        loss = self.training_step(sample.image, sample.labels, sample.weights)
        state.step += 1
        return _StartedStep(state.step, rate, round(self._elapsed(), 3), time.monotonic() - began, loss)

    def _record(self, step: _StartedStep, history: History, events: Any, validated: bool = False) -> None:
        """Wait for a step's loss and write its row, with figures on the held-out images where they are due."""
        state = self.state
        began = time.monotonic()
        value = step.loss()
        busy = step.busy + time.monotonic() - began
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value} at step {step.number}")
        state.running_loss += (value - state.running_loss) / min(step.number, RUNNING_HORIZON)
        self.step_seconds += (busy - self.step_seconds) * (0.05 if self.step_seconds else 1)
        row = {
            "step": step.number,
            "seconds": step.seconds,
            "loss": value,
            "running_loss": state.running_loss,
            "lr": step.rate,
        }
        if validated:
            row |= self._validate()
        history.append(row)
        if validated:
            self._draw_progress()
        if events is not None and (validated or step.number % EVENTS_EVERY == 0):
            for name, figure in row.items():
                events.add_scalar(name, figure, step.number)

    def _diverged(self, found: str) -> ValueError:
        kept = (
            f"the last good checkpoint is {self.out / LATEST}"
            if (self.out / LATEST).exists()
            else "none was kept"
        )
        return ValueError(
            f"{found} with learning rate {self.optimizer.lr:.2g}: the training has diverged; begin again "
            f"with a smaller --lr such as {self.settings.lr / 3:.1g}, or look for damaged images with "
            f"fastunet.verify ({kept})"
        )

    def _plan_validation(self) -> None:
        """Set the interval between validations: a twentieth of the run, or so long that they take a tenth.

        A run of so many steps must validate at the same steps however fast the machine is, so that the cost
        is reckoned in steps there (forward alone takes a third of a step); a run of so many minutes measures
        it.
        """
        if self.settings.steps:
            lost = 2 * border(self.settings.depth or 4)
            area = sum((h + lost) * (w + lost) for h, w in (image.weights.shape for image in self.held_out))
            cost = area / (3 * self.tile**2)
            longest = max(self._total() / VALIDATIONS, cost / VALIDATION_SHARE, SHORTEST_INTERVAL)
            self.interval: float = math.ceil(longest)
        else:
            self.interval = self._total() / VALIDATIONS
        self.next_validation = (self._done() // self.interval + 1) * self.interval

    def _validation_due(self) -> bool:
        """Whether it is time, and the end of the run, which validates anyway, not almost there."""
        done = self._done()
        return done >= self.next_validation and self._total() - done >= self.interval / 2

    def _validate(self) -> dict[str, float]:
        """Score the network on the held-out images, and keep it, with a picture, if it is the best."""
        began = self._elapsed()
        state = self.state
        self._check_weights()
        predicted = predict_images(self.predictor, self.held_out)
        state.scores = score(predicted, self.figures)
        value = larger_is_better(self.best, state.scores[self.best])
        improved = value >= state.best_score  # of equals the longer trained
        if improved:
            state.best_score, state.best_step = value, state.step
            self._save(BEST)
            self.model.save(self.out / MODEL)
            chosen = chosen_samples(len(predicted))
            draw_samples(self.out / SAMPLES, [predicted[i] for i in chosen], self.kind)
        self._say(
            f"step {state.step}: running loss {state.running_loss:.4f}; held out: "
            + ", ".join(f"{name} {figure:.4f}" for name, figure in state.scores.items())
            + (" (best)" if improved else "")
        )
        if math.isnan(state.scores[self.best]) and not self.told_unmeasured:
            self._say(
                f"{self.best} cannot be measured on the held-out images, which hold no object or nothing but "
                f"ignored pixels: the latest network is kept; hold out others with --val, or choose by another "
                f"figure with --best"
            )
            self.told_unmeasured = True
        if not self.settings.steps:
            self.interval = max(self._total() / VALIDATIONS, (self._elapsed() - began) / VALIDATION_SHARE)
        self.next_validation = self._done() + self.interval
        return {f"val_{name}": figure for name, figure in state.scores.items()}

    def _checkpoint_due(self) -> bool:
        if self.settings.checkpoint_every:
            return self.state.step % self.settings.checkpoint_every == 0
        return time.monotonic() - self.saved >= CHECKPOINT_SECONDS

    def _check_weights(self) -> None:
        if not all(np.isfinite(array).all() for array in self.model.state_dict().values()):
            raise self._diverged(f"weights are not finite after step {self.state.step}")

    def _save(self, name: str) -> None:
        self._check_weights()
        self.state.seconds, self.state.draws = self._elapsed(), self.model.draws
        Checkpoint(self.model.state_dict(), self.optimizer.state_dict(), self.state).save(self.out / name)

    def _draw_progress(self) -> None:
        draw_progress(self.out / PROGRESS, read_history(self.out / METRICS), self.best, self.state.best_step)

    def _bar(self) -> tqdm:
        return tqdm(
            desc="training",
            total=self._total(),
            initial=self._done(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=self.quiet or None,
            dynamic_ncols=True,
        )

    def _status(self) -> str:
        state = self.state
        parts = [
            f"step {state.step}",
            f"{1 / max(self.step_seconds, 1e-9):.1f} steps/s",
            f"loss {state.running_loss:.3f}",
            f"lr {self.optimizer.lr:.1e}",
        ]
        if state.scores:
            parts.append(f"{self.best} {state.scores[self.best]:.4f}")
        return ", ".join(parts)

    def _say(self, line: str) -> None:
        """Tell a line without breaking the bar."""
        with tqdm.external_write_mode():
            self.notify(line)

    def _result(self) -> Result:
        self._draw_progress()
        best = Checkpoint.load(self.out / BEST).state
        return Result(self.out, self.state.step, self.best, best.step, best.scores)


def _events(out: Path, last_step: int) -> Any:
    """Open a TensorBoard writer in the run folder; events of an earlier attempt beyond `last_step` go."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(out), purge_step=last_step + 1)
