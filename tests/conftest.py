"""How the tests are carried out: one thread of torch's, two processes where all are run, the longest first."""

import signal

import pytest
import torch

# tiny tensors gain nothing from more, and lose much where the machine is busy
torch.set_num_threads(1)

# in a shell's background this process is deaf to Ctrl-C, and so would be the programs that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ("test_slurm_cluster.py", "test_survival.py", "test_launch.py", "test_cmae_runs.py", "test_evaluation.py")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two where all tests are run, for those on a SLURM cluster mostly wait; files that are named run in this process.

    `pytest -n 4` is another number, `pytest -n 0` none.
    """
    if config.args != config.getini("testpaths"):
        return 0
    config.option.dist = "loadfile"
    config.option.loadscopereorder = False  # or the file with the most tests would come first
    return 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, that no process waits for the other in the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
