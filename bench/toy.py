"""The default run over several seeds, with the gold score that no training ever sees.

    python bench/toy.py                          # seeds 0, 1 and 2, four to five minutes each
    python bench/toy.py seeds=[0] steps=500      # five times as long: does it stay up?

Prints a markdown table per run, before and after, and the wall time; the runs stay in out/toy-*.
"""
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch

from arms import read_run
from model import find_commit, parse_config, script
from sample import load_rows

CONFIG = dict(
    seeds=[0, 1, 2],
    steps=100,
    options=[],           # more keys for grpo.py: ["lr=5e-4"]
    out="out/toy",        # runs go to this name, a dash and the seed
    prompts="toy/held_out.jsonl",
)


def print_run(run, seconds, prompts):
    evals = list(read_run(run, prompts).values())
    names = [key for key in evals[0] if key.startswith("eval/")] + ["gold"]
    print(f"\n{run}: {evals[-1]['step']} steps in {seconds:.0f} s\n")
    print("| step | " + " | ".join(names) + " | repetition | truncated |")
    print("|---" * (len(names) + 3) + "|")
    for row in evals:
        after = [f"{row[key]:.3f}" if key in row else "" for key in ("repetition", "truncated")]
        print("| " + " | ".join([str(row["step"])] + [f"{row[name]:.3f}" for name in names] + after)
              + " |")


@script
def main(argv):
    config = parse_config(CONFIG, argv)
    prompts = {row["id"]: row for row in load_rows(config["prompts"], lambda row, n: row)}
    print(f"commit {find_commit()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for seed in config["seeds"]:
        run, start = f"{config['out']}-{seed}", time.time()
        subprocess.run([sys.executable, str(HERE.parent / "grpo.py"), f"out={run}",
                        f"seed={seed}", f"steps={config['steps']}", *config["options"]],
                       check=True, stdout=subprocess.DEVNULL)
        print_run(run, time.time() - start, prompts)


if __name__ == "__main__":
    main()
