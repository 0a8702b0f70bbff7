"""Grey values on their way into the network: the rule a model records and its one implementation.

Training and prediction call the same function, so that an image of 33001 to 36863 meets the network exactly
as one of 0 to 255 does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Normalization = str | Sequence[Sequence[float]]

RULES = ("zscore", "minmax", "none")


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
    for channel, (offset, scale) in enumerate(pairs):
        values = image[:, :, channel].astype(np.float64)
        values -= offset
        values *= scale
        result[:, :, channel] = values
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


def statistics(image: NDArray, moments: bool) -> Iterator[Grey]:
    """Of an image (H, W, C), channel by channel; mean and deviation only where `moments` are wanted."""
    if image.dtype.kind not in "buif":
        raise ValueError(f"the image holds {image.dtype} values; convert it to integers or floats")
    for channel in range(image.shape[2]):
        values = image[:, :, channel].astype(np.float64)
        low, high = float(values.min()), float(values.max())
        bad = 0 if np.isfinite(low) and np.isfinite(high) else int(values.size - np.isfinite(values).sum())
        wanted = moments and not bad and low != high
        mean, deviation = (values.mean(), values.std()) if wanted else (low, 0.0)
        yield Grey(low, high, float(mean), float(deviation), bad)


def offsets_and_scales(
    image: Any,
    how: Normalization,
    statistics: Callable[[Any, bool], Iterable[Grey]] = statistics,
) -> NDArray[np.float64]:
    """One [offset, scale] per channel, (C, 2): what `normalize` does to this image, and when it raises ValueError.

    `statistics` is told the image, and is to be given where that is no ndarray.
    """
    if image.ndim != 3 or image.size == 0:
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
