"""Grey values on their way into the network: the rule a model records and its one implementation.

Training and prediction call the same function, so that an image of 33001 to 36863 meets the network exactly
as one of 0 to 255 does.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Normalization = str | Sequence[Sequence[float]]

RULES = ("zscore", "minmax", "none")
BAND = 64
BLOCK = 1024


def check_normalization(how: Normalization, channels: int) -> None:
    """Raise ValueError unless `how` is a rule for images of this many channels.

    Parameters
    ----------
    how : "zscore", "minmax", "none" or one [offset, scale] per channel
    channels : channels of the images it is meant for
    """
    if isinstance(how, str):
        if how not in RULES:
            raise ValueError(
                f"normalization is {how!r}; expected {', '.join(RULES)} or one [offset, scale] per channel"
            )
        return
    try:
        pairs = np.asarray(how, dtype=np.float64)
    except (TypeError, ValueError):
        pairs = np.empty(0)
    if pairs.shape != (channels, 2) or not np.isfinite(pairs).all():
        raise ValueError(
            f"normalization is {how!r}; expected one of {', '.join(RULES)} or a list of {channels} finite "
            "[offset, scale], one per channel"
        )


def normalize(image: ArrayLike, how: Normalization = "zscore") -> NDArray[np.float32]:
    """Bring an image's grey values to the network's scale, channel by channel, computed in float64.

    Parameters
    ----------
    image : (H, W, C) array of booleans, integers or finite floats
    how : "zscore": (x - mean) / std over all pixels of the channel, a constant channel becomes 0;
        "minmax": (x - min) / (max - min), a constant channel becomes 0; "none": x;
        one [offset, scale] per channel: (x - offset) * scale

    Returns
    -------
    (H, W, C) float32, C-contiguous

    Raises
    ------
    ValueError
        If the image is not three-dimensional, is empty, is complex or no number at all, holds NaN or
        infinity, or if `how` is no rule for its number of channels.
    """
    image = np.asarray(image)
    return scaled(image, offsets_and_scales(image, how))


def scaled(image: NDArray, pairs: NDArray[np.float64]) -> NDArray[np.float32]:
    """(x - offset) * scale of an image (H, W, C), with the [offset, scale] of each channel; computed in float64."""
    result = np.empty(image.shape, np.float32)
    for top in range(0, image.shape[0], BAND):  # so that what is in float64 stays in a cache
        band = slice(top, top + BAND)
        for channel, (offset, scale) in enumerate(pairs):
            values = image[band, :, channel].astype(np.float64)
            values -= offset
            values *= scale
            result[band, :, channel] = values
    return result


@dataclass(frozen=True)
class Grey:
    """Of the pixels of one channel: least and largest value, mean and standard deviation, how many are not finite.

    The least and the largest are of the finite ones; mean and deviation are there where all are finite.
    """

    low: float
    high: float
    mean: float
    deviation: float
    bad: int


class Rectangles(Protocol):
    """An image (H, W, C) read part by part, such as `fastunet.data.sources.Source`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, top: int, left: int, bottom: int, right: int) -> NDArray: ...


def statistics(image: NDArray | Rectangles, moments: bool) -> list[Grey]:
    """Of an image (H, W, C), channel by channel; mean and deviation only where `moments` are wanted.

    One pass over blocks of BLOCK x BLOCK pixels, whose moments are merged (Chan, Golub and LeVeque 1983): the figures
    are the same to the last bit whether the image is an array or read in parts. Of integers of up to 16 bits the sums
    are exact.
    """
    parts = image if isinstance(image, np.ndarray) else image.read(0, 0, 1, 1)
    if parts.dtype.kind not in "buif":
        raise ValueError(f"the image holds {parts.dtype} values; convert it to integers or floats")
    height, width, channels = image.shape
    pixels = height * width
    totals = [_Moments(parts.dtype.kind != "f" and parts.dtype.itemsize <= 2) for _ in range(channels)]
    for top in range(0, height, BLOCK):
        for left in range(0, width, BLOCK):
            bottom, right = min(top + BLOCK, height), min(left + BLOCK, width)
            if isinstance(image, np.ndarray):
                block = image[top:bottom, left:right]
            else:
                block = image.read(top, left, bottom, right)
            for channel, total in enumerate(totals):
                total.add(block[:, :, channel].astype(np.float64), moments)
    return [total.grey(pixels, moments) for total in totals]


class _Moments:
    """Least, largest, mean and deviation of values that come block by block."""

    def __init__(self, exact: bool) -> None:
        self._exact = (
            exact  # integers below 2**16: the sums of a block and of its squares are floats without rounding
        )
        self._low, self._high, self._bad = np.inf, -np.inf, 0
        self._sum = self._squares = 0
        self._count, self._mean, self._around = 0, 0.0, 0.0

    def add(self, values: NDArray[np.float64], moments: bool) -> None:
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            finite = np.isfinite(values)
            self._bad += int(values.size - finite.sum())
            low = float(values.min(where=finite, initial=np.inf))
            high = float(values.max(where=finite, initial=-np.inf))
        self._low, self._high = min(self._low, low), max(self._high, high)
        if not moments or self._bad:
            return
        if self._exact:
            self._sum += int(values.sum())
            self._squares += int(np.square(values, out=values).sum())
            return
        mean = float(values.mean())
        values -= mean
        around = float(np.square(values, out=values).sum())
        count = self._count + values.size
        apart = mean - self._mean
        self._mean += apart * values.size / count
        self._around += around + apart * apart * self._count * values.size / count
        self._count = count

    def grey(self, pixels: int, moments: bool) -> Grey:
        if self._bad or not moments or self._low == self._high:
            return Grey(self._low, self._high, self._low, 0.0, self._bad)
        if self._exact:
            variance = (pixels * self._squares - self._sum**2) / pixels**2
            return Grey(self._low, self._high, self._sum / pixels, variance**0.5, 0)
        return Grey(self._low, self._high, self._mean, (self._around / pixels) ** 0.5, 0)


def offsets_and_scales(
    image: Any,
    how: Normalization,
    statistics: Callable[[Any, bool], Iterable[Grey]] = statistics,
) -> NDArray[np.float64]:
    """One [offset, scale] per channel, (C, 2): what `normalize` does to this image, and when it raises ValueError.

    `statistics` is told the image, and is to be given where that is neither an ndarray nor read in parts.
    """
    if len(image.shape) != 3 or 0 in image.shape:
        raise ValueError(
            f"the image has shape {image.shape}; expected (height, width, channels), none of them 0"
        )
    check_normalization(how, image.shape[2])
    pairs = np.empty((image.shape[2], 2))
    for channel, grey in enumerate(statistics(image, how == "zscore")):
        if grey.bad:
            raise ValueError(
                f"channel {channel} of the image holds {grey.bad} NaN or infinite values; make them finite"
            )
        if not isinstance(how, str):
            pairs[channel] = how[channel]
        elif how == "none":
            pairs[channel] = 0.0, 1.0
        elif grey.low == grey.high:
            # The mean of equal values may miss them by one rounding, and the std would then not be 0.
            pairs[channel] = grey.low, 1.0
        elif how == "zscore":
            pairs[channel] = grey.mean, 1.0 / grey.deviation
        else:
            pairs[channel] = grey.low, 1.0 / (grey.high - grey.low)
    return pairs
