"""An error on one of two processes, which nobody but the run itself ends."""

import pytest

from ..conftest import ENVIRONMENT
from ..programs import Program, Programs, free_port

FAILED = {
    "images": "ValueError: image 53 cannot be read",
    "saving": "ValueError: the model cannot be saved",
    "staying": "ValueError: image 53 cannot be read",
}


def start_two(*command: object) -> tuple[Programs, list[Program]]:
    programs, port = Programs(ENVIRONMENT), free_port()
    return programs, [
        programs.start(
            *command,
            RANK=str(own),
            LOCAL_RANK=str(own),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for own in (0, 1)
    ]


@pytest.mark.slow
def test_a_refusal_is_printed_once(tmp_path):
    (tmp_path / "config.yaml").touch()
    programs, started = start_two("examples/train.py", "--model", "test_resnet", "--output", tmp_path, "-j", 0)
    first, second = (program.wait() for program in started)
    programs.end_all()
    assert first.stderr.startswith(f"train.py: error: {tmp_path} holds another run")
    assert second.stderr == ""
    assert (first.returncode, second.returncode) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "where"), [(1, "images"), (0, "saving"), (1, "staying")])
def test_an_error_on_one_process_ends_the_other_with_it(rank, where, tmp_path):
    programs, started = start_two("tests/training/run_failing.py", tmp_path / "run", rank, where)
    other = started[1 - rank].wait()
    told = f"process {rank} of 2 failed: {FAILED[where]}"
    if where == "staying":
        assert other.returncode == 1
        assert f"error: {told}; this process is blocked" in other.stderr
    else:
        assert other.returncode == 2
        assert other.stdout.splitlines()[-1] == f"{1 - rank}: PeerError: {told}"
    programs.end_all()
    assert not (tmp_path / "run").exists() or where == "staying"
