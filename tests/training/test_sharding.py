import pytest
import torch

from ..conftest import TWO_PROCESSES, run_python


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8's fully_shard gives other weights on CPUs")
def test_two_processes_agree_with_one_and_sharded_weights_with_whole_ones():
    done = run_python("tests/training/run_sharded.py", launcher=TWO_PROCESSES, PYTHONPATH=".")
    assert done.stdout.split("\n").count("the same") == 1
