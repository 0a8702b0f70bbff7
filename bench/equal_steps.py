"""The same training in fastunet and in PyTorch: same first weights, tiles, dropout masks and learning rates.

    python bench/equal_steps.py [DATA] [--steps 150] [--base 16] [--tile 316] [--out equal_steps.png]

Prints how far the loss curves part, beside how far two PyTorch runs part that differ in memory layout only
(contiguous and channels_last): rounding alone makes curves drift, and that is the yardstick.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", help="data folder (default: the synthetic stack)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--base", type=int, default=16)
    parser.add_argument("--tile", type=int, default=316)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("equal_steps.png"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    import torch
    import torch_unet

    from fastunet import SGD, UNet, backends, ops, output_size
    from fastunet.autograd import Tensor
    from fastunet.data.datasets import open_dataset
    from fastunet.data.samples import HostSamples, prepare
    from fastunet.data.synthetic import synthetic_dataset

    torch.set_num_threads(backends.get_threads())
    dataset = open_dataset(arguments.data) if arguments.data else synthetic_dataset(8, 512, 0)
    images, _ = prepare(dataset, "zscore")
    with HostSamples(images, arguments.tile, output_size(arguments.tile)) as drawn:
        samples = list(itertools.islice(drawn, arguments.steps))
    model = UNet(dataset.in_channels, dataset.num_classes, arguments.base, seed=0)
    first = model.state_dict()

    def masks(draw: int, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        """Our dropout masks of a training pass, for PyTorch."""
        ones = [Tensor.from_numpy(np.ones(shape), model.backend) for shape in shapes]
        drawn = [
            ops.dropout(one, model.dropout, model.seed, 2 * draw + i).numpy() for i, one in enumerate(ones)
        ]
        return [torch.tensor(values).permute(0, 3, 1, 2) for values in drawn]

    def ours() -> list[float]:
        optimiser, losses = SGD(model, arguments.lr), []
        for sample in samples:
            optimiser.zero_grad()
            loss = model.loss(sample.image, sample.labels, sample.weights)
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
        return losses

    def theirs(layout: torch.memory_format) -> list[float]:
        t = {}
        for name, values in first.items():
            tensor = torch.tensor(values)
            t[name] = (
                tensor.contiguous(memory_format=layout) if tensor.ndim == 4 else tensor
            ).requires_grad_()
        optimiser, losses = torch.optim.SGD(t.values(), lr=arguments.lr, momentum=0.99), []
        bottleneck = (arguments.tile + 4) // 2**model.depth - 8
        shapes = [
            (1, 2 * bottleneck + 8, 2 * bottleneck + 8, arguments.base * 2 ** (model.depth - 1)),
            (1, bottleneck, bottleneck, arguments.base * 2**model.depth),
        ]
        for step, sample in enumerate(samples, start=1):
            optimiser.zero_grad()
            x = torch.tensor(sample.image).permute(0, 3, 1, 2).contiguous(memory_format=layout)
            logits = torch_unet.forward(t, x, model.depth, masks(step, shapes))
            labels, weights = torch.tensor(sample.labels.astype(np.int64)), torch.tensor(sample.weights)
            loss = torch_unet.weighted_cross_entropy(logits, labels, weights)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    curves = {
        "fastunet": ours(),
        "PyTorch contiguous": theirs(torch.contiguous_format),
        "PyTorch channels_last": theirs(torch.channels_last),
    }
    reference = np.array(curves["PyTorch contiguous"])
    result = {}
    for name in ("fastunet", "PyTorch channels_last"):
        apart = np.abs(np.array(curves[name]) - reference)
        result[name] = {"mean": float(apart.mean()), "largest": float(apart.max())}
        print(
            f"|loss of {name} - loss of PyTorch contiguous|: mean {apart.mean():.2e}, largest {apart.max():.2e}"
        )
    ratio = result["fastunet"]["mean"] / result["PyTorch channels_last"]["mean"]
    print(
        f"{ratio:.2f} times as far as PyTorch's layouts, at most 1: {'reached' if ratio <= 1 else 'MISSED'}"
    )
    print(
        f"mean loss of the last 20 steps: {', '.join(f'{n} {np.mean(c[-20:]):.4f}' for n, c in curves.items())}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"apart": result, "curves": curves}))

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for (name, curve), style in zip(curves.items(), ("-", "--", ":"), strict=True):
        axes.plot(np.arange(1, len(curve) + 1), curve, style, label=name)
    axes.set(xlabel="step", ylabel="loss", title="The same training in two frameworks")
    axes.legend()
    figure.savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
