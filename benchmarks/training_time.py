"""What does a method's training cost, its teacher's included?

Time of a training step of each method of `evidence.py` (forward, losses, backward, SGD update) over the plain
network's, on fixed random images, all in turn, medians. "with teacher" adds the teacher's own steps, as many as the
student's, to those of the methods that need one: the comparison of the paper, section 4.3.

    python benchmarks/training_time.py                 # one core, about two minutes
"""

from collections.abc import Callable
from statistics import median

import torch
from evidence_grid import METHODS, TEACHERS, create_network
from hardware import create_parser, write_json
from timing import interleaved, median_ratio

DATA = "families"
SHOWN = [name for name, method in METHODS.items() if method.like is None and not name.startswith("memory")]


def main() -> None:
    parser = create_parser(__doc__, batch_size=64, rounds=9)
    parser.add_argument("--seconds", type=float, default=120.0, help="at least, where rounds are short")
    parser.add_argument("--network", default="resnet10-16", choices=TEACHERS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    x = torch.randn(args.batch_size, 1, 32, 32, device=args.device)
    y = torch.arange(args.batch_size, device=args.device)
    times = dict(
        zip(SHOWN, interleaved([make_step(name, args.network, x, y) for name in SHOWN], args.rounds, args.seconds))
    )
    rows = []
    print(f"{'method':<12}{'ms':>8}{'over plain':>12}{'with teacher':>14}")
    for name, own in times.items():
        teacher = times["teacher"] if METHODS[name].other == "teacher" else [0.0] * len(own)
        row = {
            "network": args.network,
            "teacher": TEACHERS[args.network],
            "method": name,
            "ms": median(own),
            "time": median_ratio(own, times["plain"]),
            "with_teacher": median_ratio([sum(pair) for pair in zip(own, teacher)], times["plain"]),
        }
        rows.append(row)
        print(f"{name:<12}{row['ms']:>8.1f}{row['time']:>12.3f}{row['with_teacher']:>14.3f}")
    write_json(args.output, args.device, rows)


def make_step(name: str, network: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """A training step of a method around a new network."""
    method = METHODS[name]
    others = {"teacher": TEACHERS[network], "peer": network}
    networks = [TEACHERS[network] if name == "teacher" else network, *([others[method.other]] if method.other else [])]
    backbone, *other = (create_network(one, DATA).to(x.device, memory_format=torch.channels_last) for one in networks)
    task = method.make(backbone, method.weights[0], 1, *other).train()
    optimizer = torch.optim.SGD(
        [parameter for parameter in task.parameters() if parameter.requires_grad], lr=1e-3, momentum=0.9
    )

    def step() -> None:
        optimizer.zero_grad()
        task(x, y)["loss"].backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
