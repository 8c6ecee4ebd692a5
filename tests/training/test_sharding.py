from ..conftest import TWO_PROCESSES, run_python


def test_two_processes_agree_with_one_and_sharded_weights_with_whole_ones():
    done = run_python("tests/training/run_sharded.py", launcher=TWO_PROCESSES, PYTHONPATH=".")
    assert done.stdout.split("\n").count("the same") == 1
