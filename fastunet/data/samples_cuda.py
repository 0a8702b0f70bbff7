"""Training samples on a GPU: the images lie there, and each sample is warped there while the network learns.

The warps run on a stream of their own, into a ring of buffers, a few samples ahead. Whether a tile has any weight
comes back to the host long before it is asked for, so that nobody waits in practice; a buffer is filled anew only
after all that the reading stream had been given when the next sample was asked for. Nothing is allocated after the
start. Sample i is that of the CPU up to float32 rounding (fastunet.data.warp_cuda): both come from the same draws.

Memory: 4 C + 5 bytes for each pixel of the images, and AHEAD + 1 samples. Traffic of a sample: 4 C bytes written for
each pixel of the tile and 5 of the output, and about as much read, mostly from the second-level cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import cuda

from fastunet.data.launch_cuda import FAILURES, numba_stream
from fastunet.data.samples import IGNORED, PreparedImage, Samples, TrainingSample
from fastunet.data.warp import Warp
from fastunet.data.warp_cuda import apply_warp
from fastunet.memory import format_bytes

AHEAD = 4


class DeviceSamples(Samples):
    """`fastunet.data.samples.Samples` on a GPU.

    Parameters
    ----------
    images, tile, output, seed, start
        As for `Samples`.
    gpu : int
    stream : int
        Address of the stream on which samples are read; 0 is the default one. What reads a sample must have been given
        to it before the next sample is asked for.
    room : int
        Bytes of device memory that images and buffers may take.

    Raises
    ------
    MemoryError
        If they do not fit.
    ImportError
        If Numba cannot use the GPU.
    """

    def __init__(
        self,
        images: Sequence[PreparedImage],
        tile: int,
        output: int,
        seed: int,
        start: int,
        gpu: int,
        stream: int,
        room: int,
    ) -> None:
        super().__init__(images, tile, output, seed, start)
        channels = self._images[0].image.shape[2]
        buffers = (AHEAD + 1) * (4 * channels * tile**2 + 5 * output**2)
        needed = buffers + sum(
            each.nbytes for image in self._images for each in (image.image, image.classes, image.weights)
        )
        if needed > room:
            raise MemoryError(
                f"they take {format_bytes(needed)} on GPU {gpu}, where {format_bytes(max(room, 0))} are left for them"
            )
        self._gpu = gpu
        try:
            with cuda.gpus[gpu]:
                self._reader, self._stream = numba_stream(stream), cuda.stream()
                self._read = cuda.event()
                self._on_device = [
                    [cuda.to_device(np.ascontiguousarray(each)) for each in (i.image, i.classes, i.weights)]
                    for i in self._images
                ]
                self._buffers = [_Buffer(tile, output, channels) for _ in range(AHEAD + 1)]
            for _ in range(AHEAD):
                self._begin_next()
        except FAILURES as error:
            found = (str(error).splitlines() or [repr(error)])[0]
            raise ImportError(f"Numba cannot use GPU {gpu} ({found})") from error

    def _begin(self, index: int) -> Callable[[], TrainingSample]:
        with cuda.gpus[self._gpu]:
            self._read.record(self._reader)
            self._read.wait(self._stream)
            return self._warped(index, self._buffers[index % len(self._buffers)])

    def _warped(self, index: int, buffer: "_Buffer") -> Callable[[], TrainingSample]:
        """Start the warp of a sample; what is returned waits until it is found to have weight."""
        draws = self._draws(index)
        self._start(buffer, *next(draws))

        def finish() -> TrainingSample:
            with cuda.gpus[self._gpu]:
                while not buffer.has_weight():
                    self._start(buffer, *next(draws))
            return buffer.sample

        return finish

    def _start(self, buffer: "_Buffer", chosen: int, warp: Warp) -> None:
        ignored = None if self._images[chosen].ignored is None else IGNORED
        buffer.fill(self._on_device[chosen], warp, ignored, self._stream)

    def sample(self, index: int) -> TrainingSample:
        with cuda.gpus[self._gpu]:
            image, labels, _ = self._buffers[0].tile
            buffer = _Buffer(image.shape[0], labels.shape[0], image.shape[2])
            return self._warped(index, buffer)()

    def close(self) -> None:
        self._ahead.clear()
        with cuda.gpus[self._gpu]:
            self._stream.synchronize()


class _Buffer:
    """Device memory of one sample, and what tells the host when it is there and whether it has weight."""

    def __init__(self, tile: int, output: int, channels: int) -> None:
        image = cuda.device_array((1, tile, tile, channels), np.float32)
        labels = cuda.device_array((1, output, output), np.uint8)
        weights = cuda.device_array((1, output, output), np.float32)
        self.sample = TrainingSample(image, labels, weights)
        x, y, w = (array.reshape(*array.shape[1:]) for array in (image, labels, weights))
        self.tile = x, y, w
        self._zero = cuda.to_device(np.zeros(1, np.int32))
        self._weighted = cuda.device_array(1, np.int32)
        self._seen = cuda.pinned_array(1, np.int32)
        self._done = cuda.event()

    def fill(self, arrays: Sequence[Any], warp: Warp, ignored: int | None, stream: Any) -> None:
        """Start a warp of image, classes and weights into this buffer."""
        image, classes, weights = arrays
        self._weighted.copy_to_device(self._zero, stream)
        apply_warp(
            image, classes, weights, warp, self.tile, ignored=ignored, weighted=self._weighted, stream=stream
        )
        self._weighted.copy_to_host(self._seen, stream)
        self._done.record(stream)

    def has_weight(self) -> bool:
        """Wait for the warp that was started last."""
        self._done.synchronize()
        return bool(self._seen[0])
