"""Kill runs at random moments and at every stage of a save: is the end bit for bit the same?

    python bench/kill.py                                  # both scripts, ten kills each, minutes
    python bench/kill.py 'scripts=["grpo"]' kills=3 signal=SIGTERM

Each kill (SIGKILL unless asked otherwise) is followed by the same command; the last one runs to
its end. Compared with a run that nobody touched: the exported weights, the fp32 weights, the
moments, and the log without its seconds and rates. CPU, one process.

Stages of a save: the export written, the state written, synced, renamed, `latest` moved.
"""
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from tqdm import tqdm

from model import InputError, find_commit, parse_config, script
from sample import read_done

HERE = Path(__file__).parent
CONFIG = dict(
    scripts=["pretrain", "grpo"],
    dtypes=["float32", "bfloat16"],  # of the exported weights
    kills=10,                        # at random moments
    signal="SIGKILL",                # or SIGTERM, SIGINT
    seed=0,
    child="",                        # for our own use: the stage at which this process dies
    command=[],
)
COMMANDS = {
    "pretrain": ["data=toy/text.jsonl.gz", "steps=40", "save_every=4", "batch_rows=8",
                 "seq_len=256", "lr=1e-4"],
    "grpo": ["steps=20", "save_every=2", "eval_every=10", "num_prompts=2", "num_samples=4",
             "max_tokens=80"]}
STAGES = {"export written": "save_folder", "state written": "dcp.save", "synced": "sync_folder",
          "renamed": "os.replace", "latest moved": "point_link"}


def die_at(stage):
    """Make this process die after the second save's stage, as a kill -9 would."""
    import pretrain
    *path, name = STAGES[stage].split(".")
    owner = getattr(pretrain, path[0]) if path else pretrain
    done, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        result = done(*args, **kwargs)
        if name != "replace" or Path(args[1]).name.startswith("checkpoint-"):
            calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def run_child(stage, command):
    import grpo
    import pretrain
    die_at(stage)
    {"pretrain": pretrain, "grpo": grpo}[command[0]].main(command[1:])


def start(command, stage=""):
    """The script as a process; with a stage it dies there."""
    name, *arguments = command
    line = [sys.executable, str(HERE.parent / f"{name}.py"), *arguments]
    if stage:
        line = [sys.executable, __file__, f"child={stage}", "command=" + json.dumps(command)]
    return subprocess.Popen(line, cwd=HERE.parent, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def finish(command):
    process = start(command)
    _, errors = process.communicate()
    if process.returncode:
        raise InputError(f"{' '.join(command)}: exit {process.returncode}: {errors[-500:]}")


def state_of(folder):
    """Every tensor of a checkpoint's state/, by name."""
    reader = dcp.FileSystemReader(folder / "state")
    kept = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(found.size, dtype=found.properties.dtype)
               for name, found in kept.items() if isinstance(found, TensorStorageMetadata)}
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # alone: intended
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def differences(one, other):
    """What differs between two finished runs, as words."""
    found = []
    for what, read in (("exported weights", lambda f: load_file(f / "model.safetensors")),
                       ("state", state_of)):
        a, b = (read(run / "latest") for run in (one, other))
        found += [f"{what}: {name}" for name in sorted(set(a) | set(b))
                  if name not in a or name not in b or not torch.equal(a[name], b[name])]
    a, b = ([{key: value for key, value in row.items()
              if not key.startswith("seconds/") and key != "tokens_per_second"}
             for row in read_done(run / "log.jsonl")] for run in (one, other))
    return found + ["the log"] * (a != b)


def kill_at_random(command, log, kills, steps, number, rng):
    """Start, kill up to steps / kills steps further on, at any moment of a step, and again; then
    finish. Returns how many died by it."""
    died, count_rows = 0, lambda: log.read_bytes().count(b"\n") if log.exists() else 0
    for _ in tqdm(range(kills), desc=f"{command[0]}, {number.name}"):
        target = count_rows() + rng.randrange(max(1, steps // kills))
        process = start(command)
        while process.poll() is None and count_rows() <= target:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(number)
        process.communicate()
        died += process.returncode != 0 or number != signal.SIGKILL
    finish(command)
    return died


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(
        kills=0, child=["", *STAGES], signal=["SIGKILL", "SIGTERM", "SIGINT"]))
    if not set(config["scripts"]) <= set(COMMANDS):
        raise InputError(f"scripts={config['scripts']}: expected some of {', '.join(COMMANDS)}")
    if config["child"]:
        return run_child(config["child"], config["command"])
    rng, number = random.Random(config["seed"]), signal.Signals[config["signal"]]
    print(f"commit {find_commit()}, torch {torch.__version__}\n\n| script | export | what "
          "happened | differs from the untouched run |\n|---|---|---|---|")
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in config["scripts"]:
            for dtype in config["dtypes"]:
                out = Path(folder) / f"{name}-{dtype}"
                command = lambda run: [name, f"out={out / run}", f"save_dtype={dtype}",
                                       *COMMANDS[name]]
                finish(command("whole"))
                steps = read_done(out / "whole" / "log.jsonl")[-1]["step"]
                died = kill_at_random(command("killed"), out / "killed" / "log.jsonl",
                                      config["kills"], steps, number, rng)
                rows = [(f"{died} times {number.name} at random", "killed")]
                for stage in STAGES:
                    run = stage.replace(" ", "-")
                    process = start(command(run), stage)
                    process.communicate()
                    finish(command(run))
                    was = "killed" if process.returncode == -signal.SIGKILL else "not reached"
                    rows.append((f"{was}: {stage}", run))
                for what, run in rows:
                    found = differences(out / "whole", out / run)
                    worst += bool(found) or what.startswith("not reached")
                    print(f"| {name} | {dtype} | {what} | {', '.join(found) or 'nothing'} |",
                          flush=True)
    sys.exit(min(worst, 1))


if __name__ == "__main__":
    main()
