"""The info command: what it says about a network is true, and it says it without a model, too."""

import re
import shutil
import subprocess
import sys

import pytest

from fastunet import UNet
from fastunet.backends.cpu import CpuBackend, Predictions, backend
from fastunet.geometry import input_size, output_size
from fastunet.info import main
from fastunet.tiling import forward_flops, prediction_bytes
from fastunet.training_memory import check_training_memory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    network = UNet(2, 3, 4, 3)
    network.class_names = ["background", "nucleus", "membrane"]
    network.normalization = [[0.5, 2.0], [0.0, 1.0]]
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    network.save(path)
    return path


def info(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_the_machine(capsys):
    status, out, _ = info(capsys)
    assert status == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert set(rows) == {"fastunet", "device", "threads", "memory", "models"}
    assert int(rows["threads"]) >= 1 and rows["memory"].endswith("available")


def test_a_network_and_its_parameters(capsys, model):
    status, out, _ = info(capsys, model)
    assert status == 0
    assert "depth 3, 4 base channels, 2 input channels, 3 classes (background, nucleus, membrane)" in out
    assert "normalization [[0.5, 2.0], [0.0, 1.0]]" in out
    smallest = input_size(8, 3)
    assert f"tiles: {smallest} -> {output_size(smallest, 3)} and every 8 more; 44 pixels lost" in out
    state = UNet.load(model).state_dict()
    layers = {name.rpartition(".")[0] for name in state}
    rows = dict(re.findall(r"^(\S+) +\d+ x .* ([\d,]+)$", out, re.M))
    assert set(rows) == layers
    for layer, count in rows.items():
        expected = state[f"{layer}.weight"].size + state[f"{layer}.bias"].size
        assert int(count.replace(",", "")) == expected
    total = sum(values.size for values in state.values())
    assert re.search(rf"^{len(layers)} convolutions .* {total:,}$", out, re.M)


def test_the_plan_of_an_image(capsys, model):
    network = UNet.load(model)
    status, out, _ = info(capsys, model, "--image", "97x150", "--tile", "116")
    assert status == 0
    # 116 -> 28, of which 24 and at the end 28 pixels: 4 rows of tiles and 7 columns.
    assert "image of 97x150 pixels on cpu, fp32: 28 tiles of 116x116 -> 28x28 (4 x 7)" in out
    assert f"{28 * forward_flops(116, 116, network) / 1e9:,.1f} GFLOP" in out
    needed = prediction_bytes(97, 150, 116, 116, network, Predictions.element_bytes)
    assert f"{needed / 2**20:.0f} MiB beyond the network" in out
    assert float(re.search(r"time +about (\S+) s", out)[1]) > 0


def test_the_largest_training_tile(capsys, model, monkeypatch):
    monkeypatch.setattr(CpuBackend, "free_memory", staticmethod(lambda: 2 << 30))
    _, out, _ = info(capsys, model, "--image", "9")
    tile = int(re.search(r"^training on cpu: tiles of up to (\d+)x\1 fit, which take .*B$", out, re.M)[1])
    assert tile % 8 == 4
    check_training_memory(tile, 2, 3, 4, 3)
    with pytest.raises(MemoryError):
        check_training_memory(tile + 8, 2, 3, 4, 3)


def test_little_memory_is_told(capsys, model):
    status, out, _ = info(capsys, model, "--image", "400", "--memory", "44M")
    assert status == 0 and "would be wanted and does not fit into memory" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "0x5"], "--image is '0x5'; expected height x width"),
        (["--image", "large"], "such as 512x696"),
        (["--tile", "117"], "nearest valid tiles are 116 and 124"),
        (["--memory", "1K"], "takes at least"),
    ],
)
def test_mistakes_end_in_one_sentence(capsys, model, arguments, sentence):
    status, out, err = info(capsys, model, *arguments)
    assert status == 2 and out == "" and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize(
    "tile", ["abc", "", "-188", "1e3", "572.0", "\N{ARABIC-INDIC DIGIT FIVE}72", "9" * 20]
)
def test_a_tile_that_is_no_size(capsys, model, tile, kernels, with_model):
    status, out, err = info(capsys, *[model] * with_model, *["--kernels"] * kernels, f"--tile={tile}")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert f"--tile is {tile!r}; expected auto or the network's input size in pixels" in err


@pytest.mark.parametrize(
    ("tile", "nearest"), [(0, "188 and 204"), (187, "188 and 204"), (573, "572 and 588")]
)
def test_a_tile_that_the_network_does_not_take(capsys, tile, nearest):
    status, out, err = info(capsys, "--kernels", "--tile", tile)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert f"input size {tile} is not valid at depth 4" in err and f"valid sizes are {nearest}" in err


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="there is a GPU")
@pytest.mark.parametrize("with_model", [False, True])
def test_a_gpu_that_is_missing_is_said_in_one_sentence(capsys, model, with_model):
    status, out, err = info(capsys, *[model] * with_model, "--device", "cuda")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert re.search("device 'cuda' was asked for, but .*(install|check nvidia-smi)", err)


def test_a_file_that_is_no_model(capsys, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    status, out, err = info(capsys, tmp_path / "x.safetensors")
    assert status == 2 and out == "" and "x.safetensors" in err and err.count("\n") == 1


def test_as_a_subcommand(model):
    done = subprocess.run([sys.executable, "-m", "fastunet", "info", model], capture_output=True, text=True)
    assert done.returncode == 0 and "U-Net of depth 3" in done.stdout


def test_the_kernels_of_every_layer(capsys, model, monkeypatch):
    status, out, _ = info(capsys, "--kernels", "--tile", "188")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "->" in line}
    assert status == 0 and len(rows) == 23
    assert rows["encoder.0.conv1"] == ["186x186", "1", "->", "64", "where", "read", "none", "direct"]
    assert rows["encoder.0.conv2"] == ["184x184", "64", "->", "64", *3 * ["winograd4"]]
    assert rows["bottleneck.conv2"] == ["4x4", "1024", "->", "1024", *3 * ["winograd4"]]
    assert rows["decoder.0.upconv"][4:] == 3 * ["direct"] and rows["head"][:4] == ["4x4", "64", "->", "2"]
    assert {name for name, row in rows.items() if "+" in row} == {
        f"decoder.{step}.{layer}" for step in (1, 2, 3) for layer in ("upconv", "conv1")
    }
    status, out, _ = info(capsys, model, "--kernels", "--tile", "116")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "->" in line}
    assert status == 0 and rows["encoder.0.conv2"] == ["112x112", "4", "->", "4", *3 * ["direct"]]
    assert rows["bottleneck.conv2"][4:] == 3 * ["winograd4"]


def test_the_rule_takes_the_fewest_multiplications():
    def work(algorithm, height, width):
        tile = int(algorithm[-1]) if algorithm != "direct" else 0
        return -(-height // tile) * -(-width // tile) * (tile + 2) ** 2 if tile else 9 * height * width

    for height in range(1, 20):
        for width in range(1, 20):
            found = backend.conv3x3_algorithm(16, 48, height, width)
            assert work(found, height, width) == min(
                work(name, height, width) for name in ("direct", "winograd2", "winograd4")
            )
            assert backend.conv3x3_algorithm(15, 48, height, width) == "direct"
            assert backend.conv3x3_algorithm(16, 15, height, width) == "direct"
