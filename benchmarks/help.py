"""How long does `timm-selfdistill COMMAND --help` take, over `import timm`?

Seconds of new processes that run in turn: `python -c "import timm"`, and --help of the program and of each of its
commands; the medians and the median ratios. No command is to take more than 1.5 times as long as the import.

    python benchmarks/help.py
"""

import re
import subprocess
import sys
from functools import partial
from statistics import median

import torch
from hardware import create_parser, write_json
from timing import interleaved, median_ratio

LIMIT = 1.5
PROGRAM = ("-m", "timm_selfdistill")


def python(*arguments: str) -> str:
    """What a new process prints."""
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def find_commands() -> list[str]:
    return re.findall("^    ([a-z-]+)(?: |$)", python(*PROGRAM, "--help"), re.MULTILINE)


def main() -> None:
    parser = create_parser(__doc__, batch_size=1, rounds=7)
    parser.add_argument("--commands", nargs="+", help="default: all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    commands = ["", *(args.commands or find_commands())]
    calls = [
        partial(python, "-c", "import timm"),
        *(partial(python, *PROGRAM, *command.split(), "--help") for command in commands),
    ]
    timm, *helps = interleaved(calls, args.rounds, seconds=0, warm_up=1)
    rows = []
    print(f"{'command':16}  import timm, s  --help, s  ratio")
    for command, times in zip(commands, helps):
        row = {
            "command": command,
            "timm_s": median(timm) / 1000,
            "help_s": median(times) / 1000,
            "ratio": median_ratio(times, timm),
        }
        rows.append(row)
        print(f"{command or '(none)':16}  {row['timm_s']:14.2f}  {row['help_s']:9.2f}  {row['ratio']:5.2f}")
    over = [row["command"] or "(none)" for row in rows if row["ratio"] > LIMIT]
    print(f"above {LIMIT}: {', '.join(over) or 'none'}")
    write_json(args.output, args.device, rows)


if __name__ == "__main__":
    main()
