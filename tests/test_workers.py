"""Tiles shared out among workers, some of which are killed: the result of one process."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_predictor import network

from fastunet import DataError, Predictor, input_size
from fastunet.data.images import read_array
from fastunet.data.sources import open_images
from fastunet.errors import FileProblem
from fastunet.job import Wanted, begin, file_hash
from fastunet.journal import finished_tiles, folder_of
from fastunet.predict import main
from fastunet.workers import on_dask, on_devices

TILE = input_size(24, 2)


@pytest.fixture
def job(rng, tmp_path):
    """Of some hundred tiles, and what one process makes of it."""
    model, image = tmp_path / "model.safetensors", tmp_path / "in.npy"
    network(depth=2, classes=3, seed=3).save(model)
    np.save(image, rng.integers(0, 4000, (300, 400)).astype(np.uint16))
    assert (
        main(["-m", str(model), "-i", str(image), "-o", str(tmp_path / "one.npy"), "--tile", str(TILE)]) == 0
    )
    predictor = Predictor(model, tile=TILE)
    images = open_images(image)
    what = folder_of(tmp_path / "out.npy"), predictor, model, file_hash(model), image, None, ".npy"
    return begin(*what, Wanted("probabilities"), images, predictor.plan_source(images[0][1]))


def check(job, tmp_path):
    assert not job.remaining()
    job.finish(tmp_path / "out.npy")
    np.testing.assert_array_equal(read_array(tmp_path / "out.npy"), read_array(tmp_path / "one.npy"))


def test_two_processes_one_of_which_is_killed(job, tmp_path):
    done = []
    work = threading.Thread(target=on_devices, args=(job, ["cpu", "cpu"], 1, done.append))
    work.start()
    while not finished_tiles(job.journal.folder) and work.is_alive():
        time.sleep(0.001)
    for worker in multiprocessing.active_children()[:1]:
        worker.kill()
    work.join()
    check(job, tmp_path)


def test_the_command_shares_among_devices(rng, job, tmp_path):
    names = [str(tmp_path / name) for name in ("model.safetensors", "in.npy", "both.npy")]
    arguments = [part for pair in zip(("-m", "-i", "-o"), names) for part in pair]
    options = ["--tile", str(TILE), "--devices", "cpu,cpu", "--threads", "1", "--quiet"]
    assert main([*arguments, *options]) == 0
    np.testing.assert_array_equal(read_array(tmp_path / "both.npy"), read_array(tmp_path / "one.npy"))


def test_what_is_wrong_with_a_file_comes_back_from_another_process():
    problem = FileProblem("a.tif", "a damaged segment", "a whole file", "copy it again")
    again = pickle.loads(pickle.dumps(problem))
    assert type(again) is FileProblem and str(again) == str(problem) and again.path == Path("a.tif")


def _die(*arguments):
    os._exit(1)


def test_workers_that_die_again_and_again_are_given_up(job, monkeypatch):
    monkeypatch.setattr("fastunet.workers._work", _die)
    with pytest.raises(DataError, match="3 times a worker died before any tile was done"):
        on_devices(job, ["cpu"], 1, print)


@pytest.mark.slow
def test_a_dask_cluster_one_of_whose_workers_is_killed(job, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, dashboard_address=None, local_directory=str(tmp_path / "dask")
    ) as cluster:
        with distributed.Client(cluster) as client:
            (victim, *_) = client.run(os.getpid).values()
        work = threading.Thread(
            target=on_dask, args=(job, cluster.scheduler_address, "cpu", 1, lambda count: None)
        )
        work.start()
        while not finished_tiles(job.journal.folder) and work.is_alive():
            time.sleep(0.001)
        os.kill(victim, signal.SIGKILL)
        work.join()
    check(job, tmp_path)


def test_an_address_where_no_scheduler_is(job, monkeypatch):
    distributed = pytest.importorskip("distributed")

    def nobody(address, timeout):
        raise OSError(f"Timed out trying to connect to {address} after {timeout} s")

    monkeypatch.setattr(distributed, "Client", nobody)
    with pytest.raises(DataError, match=r"--dask tcp://127\.0\.0\.1:9: no scheduler answers"):
        on_dask(job, "tcp://127.0.0.1:9", "cpu", 1, print)
