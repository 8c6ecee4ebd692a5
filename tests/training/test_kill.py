"""A run that is killed at any moment and resumed ends as if nothing had happened, to the last bit."""

import hashlib
import random
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

from timm_selfdistill.training.loop.memory import FOLDER
from timm_selfdistill.training.state.checkpoint import MEMORY_FILE, REST_FILE, WEIGHTS_FILE, list_checkpoints

from ..conftest import ENVIRONMENT, TWO_PROCESSES, run_python, wait_for
from ..programs import HANGS, ROOT, free_port
from .run_to_kill import EPOCHS, GLOBAL_BATCH, IMAGES

SCRIPT = "tests/training/run_to_kill.py"
UPDATES = EPOCHS * (IMAGES // GLOBAL_BATCH // 2)


def start(output: Path, workers: int, *moment: object, killed: int = 0, **how) -> int:
    """Its exit code."""
    return run_python(SCRIPT, output, workers, *moment, check=not moment, KILLED_RANK=str(killed), **how).returncode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run directory of an undisturbed run on so many processes, made once."""
    made: dict[tuple[int, str], Path] = {}

    def get(processes: int, teacher: str = "ensemble") -> Path:
        if (processes, teacher) not in made:
            made[processes, teacher] = tmp_path_factory.mktemp("undisturbed")
            start(made[processes, teacher], 0, processes=processes, TEACHER=teacher)
        return made[processes, teacher]

    return get


def check_same(output: Path, expected: Path) -> None:
    assert (output / "history.csv").read_bytes() == (expected / "history.csv").read_bytes()
    found, wanted = (list_checkpoints(folder / "checkpoints")[-1] for folder in (output, expected))
    assert found.name == wanted.name == f"step-{UPDATES:08d}"
    for name in (WEIGHTS_FILE, MEMORY_FILE):
        assert (found / name).exists() == (wanted / name).exists()
        if (wanted / name).exists():
            tensors = load_file(wanted / name)
            assert all(torch.equal(value, tensors[key]) for key, value in load_file(found / name).items())
    states = [torch.load(folder / REST_FILE, weights_only=True)["optimizer"] for folder in (found, wanted)]
    leaves = [tree_flatten(state)[0] for state in states]
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for name in ("last", "best"):
        files = [folder / name / "model.safetensors" for folder in (output, expected)]
        assert files[0].read_bytes() == files[1].read_bytes()


def seen(output: Path, processes: int) -> dict[int, list[str]]:
    """What each update saw, the last time that it was made, on all processes: hashes of images."""
    updates: dict[int, list[str]] = defaultdict(list)
    for rank in range(processes):
        lines = [line.split() for line in (output / f"seen-{rank}.txt").read_text().splitlines()]
        for number, hashes in {int(number): hashes for number, *hashes in lines}.items():
            updates[number] += hashes
    return {number: sorted(hashes) for number, hashes in updates.items()}


def kill_and_resume(
    output: Path,
    undisturbed,
    processes: int,
    workers: int,
    moment: str,
    number: int,
    fresh: bool = False,
    teacher: str = "ensemble",
) -> None:
    expected = undisturbed(processes, teacher)
    killed = processes - 1 if moment == "update" else 0  # the others are done by the main process alone
    how = {"processes": processes, "fresh": fresh, "TEACHER": teacher}
    code = start(output, workers, moment, number, killed=killed, **how)
    assert code == -signal.SIGKILL, "the run was not killed"
    assert not (output / "summary.json").exists()
    start(output, workers, **how)
    check_same(output, expected)
    assert seen(output, processes) == seen(expected, processes)


def test_an_undisturbed_run_sees_every_image_once_an_epoch(undisturbed):
    updates = seen(undisturbed(1), 1)
    assert sorted(updates) == list(range(1, UPDATES + 1))
    everything = [image for hashes in updates.values() for image in hashes]
    assert len(everything) == EPOCHS * (IMAGES // GLOBAL_BATCH) * GLOBAL_BATCH
    black = hashlib.sha256(torch.full((1, 32, 32), -1.0).numpy().tobytes()).hexdigest()  # by augmentation
    drawn = [image for image in everything if image != black]
    assert len(set(drawn)) == len(drawn) > 0.98 * len(everything)  # augmented anew in every epoch


@pytest.mark.slow
def test_the_number_of_loading_processes_changes_nothing(undisturbed, tmp_path):
    start(tmp_path, 2)
    check_same(tmp_path, undisturbed(1))
    assert seen(tmp_path, 1) == seen(undisturbed(1), 1)


def test_two_processes_see_the_same_images_in_every_update(undisturbed):
    assert seen(undisturbed(2), 2) == seen(undisturbed(1), 1)


@pytest.mark.parametrize(
    ("processes", "workers", "moment", "number"),
    [
        (1, 2, "checkpoint", 3),
        pytest.param(1, 0, "evaluation", 1, marks=pytest.mark.slow),
        pytest.param(2, 2, "update", 9, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run(processes, workers, moment, number, undisturbed, tmp_path):
    kill_and_resume(tmp_path, undisturbed, processes, workers, moment, number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "workers", "moment", "number"),
    [(1, 2, "update", 8), (1, 0, "rename", 4), (2, 0, "update", 9), (2, 2, "checkpoint", 3)],
)
def test_a_killed_run_whose_teacher_is_a_memory(processes, workers, moment, number, undisturbed, tmp_path):
    """Answers to mixtures are not kept, so that the draws of two processes show in it; its files go with the run."""
    kill_and_resume(tmp_path, undisturbed, processes, workers, moment, number, teacher="memory")
    saved = load_file(list_checkpoints(tmp_path / "checkpoints")[-1] / MEMORY_FILE)
    assert len(saved["counts"]) == IMAGES
    assert 0 < saved["counts"].sum() < EPOCHS * IMAGES
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.slow
def test_a_killed_run_in_processes_with_other_hashes(undisturbed, tmp_path):
    """New processes, not forks, of which each has its own seed of Python's hashes."""
    kill_and_resume(tmp_path, undisturbed, 1, 2, "update", 8, fresh=True)


def random_moments() -> list[tuple[int, int, str, int]]:
    draw = random.Random(0)
    highest = {"update": UPDATES, "evaluation": EPOCHS, "checkpoint": UPDATES // 2, "rename": UPDATES // 2}
    return [
        (processes, workers, moment, draw.randint(1, highest[moment]))
        for processes in (1, 2)
        for workers in (0, 2)
        for moment in highest
        for _ in range(5)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers", "moment", "number"), random_moments())
def test_a_run_killed_at_a_random_moment(processes, workers, moment, number, undisturbed, tmp_path):
    kill_and_resume(tmp_path, undisturbed, processes, workers, moment, number)


@pytest.mark.slow
def test_torchrun_starts_a_killed_group_again_by_itself(undisturbed, tmp_path):
    done = run_python(
        SCRIPT,
        tmp_path,
        0,
        "update",
        9,
        launcher=(*TWO_PROCESSES, "--max-restarts", "3"),
        KILLED_RANK="1",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert "resumed" in done.stdout
    check_same(tmp_path, undisturbed(2))
    assert seen(tmp_path, 2) == seen(undisturbed(2), 2)


@pytest.mark.slow
def test_four_processes(tmp_path):
    """With more than two the order of a sum shows."""
    for name, moment in (("a", ()), ("b", ("update", 9)), ("b", ())):
        start(tmp_path / name, 0, *moment, processes=4)
    check_same(tmp_path / "b", tmp_path / "a")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(undisturbed, tmp_path):
    """With the same images per update it sees what it would have seen; Mixup's draws belong to a process."""
    start(tmp_path, 0, "update", 9, processes=2, killed=1)
    start(tmp_path, 0)
    before = {number: images for number, images in seen(tmp_path, 2).items() if number <= 8}
    after = {number: images for number, images in seen(tmp_path, 1).items() if number > 8}
    assert before | after == seen(undisturbed(1), 1)


@pytest.mark.slow
def test_a_node_that_vanishes_and_comes_back(undisturbed, tmp_path):
    """Two torchrun agents, one of them killed with all its processes and started again."""
    port = free_port()

    def agent(number: int) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--nproc_per_node",
            "1",
            "--max-restarts",
            "3",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"localhost:{port}",
            "--rdzv-conf",
            f"is_host={1 - number},join_timeout={HANGS}",
            "--local-addr",
            "localhost",
            SCRIPT,
            str(tmp_path),
            "0",
        ]
        env = ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else none joins old ones
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    agents = [agent(0), agent(1)]
    try:
        wait_for(lambda: list_checkpoints(tmp_path / "checkpoints") or any(one.poll() is not None for one in agents))
        for process in [*psutil.Process(agents[1].pid).children(recursive=True), psutil.Process(agents[1].pid)]:
            process.kill()
        agents[1].wait()
        agents[1] = agent(1)
        assert [process.wait(timeout=HANGS) for process in agents] == [0, 0]
    finally:
        for process in agents:
            process.kill()
    check_same(tmp_path, undisturbed(2))
