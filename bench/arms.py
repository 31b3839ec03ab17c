"""One toy run per arm and seed, side by side, with the gold score that no training ever sees.

    python bench/arms.py arms='{"length": ["weights={\"length\": 1}"], "all": []}' picture=arms.png

An arm is a list of keys for grpo.py; options=["model=FOLDER", "prompts=FILE"] and prompts=HELD_OUT
run it on another model and other prompts, without a gold score. Runs are processes of one thread,
`parallel` at a time, in out/KEYS-SEED: what is finished is not run again, nor what arms of several
experiments share. Prints a markdown table of the last evaluation, and draws each figure over the
steps: the mean over seeds, and a band from the least to the most. A run that grpo.py's alarm stops
(a solved reward teaches nothing more) keeps its last figures.
"""
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "toy")]

import numpy as np
from tqdm import tqdm

import grammar
from model import find_commit, parse_config, script
from rows import follows
from sample import load_rows, read_done

CONFIG = dict(
    arms={"length": ['weights={"length": 1}'], "format": ['weights={"format": 1}'],
          "writing": ['weights={"writing": 1}'], "all three": []},
    options=["eval_every=15"],   # more keys for every arm
    seeds=[0, 1, 2],
    steps=60,
    parallel=4,                  # runs at one time
    prompts="toy/held_out.jsonl",  # to evaluate on
    out="out/arms",
    picture="out/arms/arms.png",
    title="The toy: each reward alone, and all three",
    caption="",                  # what the paper has in its place
)
FIGURES = {"eval/length": "length reward", "eval/format": "format reward",
           "eval/writing": "writing reward (the proxy)", "gold": "gold score (never trained on)",
           "words": "words", "eval/spearman": "asked against written (rank correlation)",
           "outline": "outline score (never trained on)"}  # in the last's place, where there is one


def name_keys(keys):
    """A folder's name for an arm: its keys, or default when it has none."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(keys).lower()).strip("-") or "default"


def run_alone(name, out, keys):
    """A script with one thread: why grpo.py's alarm has stopped it, or ""."""
    command = [sys.executable, str(HERE.parent / name), f"out={out}", *keys]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    told = done.stderr.strip().rpartition("\n")[2]
    if done.returncode and not told.startswith("stopped: "):
        sys.exit(f"{out}: {done.stderr[-2000:]}")
    return told if done.returncode else ""


def run_arm(run, keys):
    """grpo.py, unless its alarm has stopped this run before: why it did, or ""."""
    alarm = Path(run) / "alarm.txt"
    if alarm.is_file():
        return alarm.read_text()
    if told := run_alone("grpo.py", run, keys):
        alarm.write_text(told)
    return told


def true_scores(text, prompt):
    """What no training sees: the grammar's gold score and, where the prompt lists topics, how far
    the text keeps to their order; nothing on prompts that are not the toy's."""
    if "topics" not in prompt:
        return {"gold": grammar.gold_score(text, prompt["topic"])} if "topic" in prompt else {}
    outline = follows(text, prompt["topics"])
    parts = grammar.gold_parts(text, prompt["topics"][0]) | {"on_topic": outline}
    return {"gold": sum(parts.values()) / len(parts), "outline": outline}


def read_run(run, prompts):
    """{step: {figure: value}} of a run's evaluations on prompts {id: row}."""
    found = {}
    for row in read_done(Path(run) / "log.jsonl"):
        if "eval/length" in row:
            samples = read_done(Path(run) / "samples" / f"step-{row['step']:06d}.jsonl")
            measured = [{"words": sample["rewards"]["words"]} | true_scores(
                sample["response"], prompts[sample["index"]]) for sample in samples]
            found[row["step"]] = row | {key: float(np.mean([told[key] for told in measured]))
                                        for key in measured[0]}
    return found


def draw(found, figures, config):
    """found: {arm: [a run's figures by step, for each seed]}; figures: {key: name}, at most 6."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    steps = max((sorted(run) for runs in found.values() for run in runs), key=len)
    at = lambda run, step: run[max(known for known in run if known <= step)]
    for axis in axes.flat[len(figures):]:
        axis.axis("off")
    for axis, (key, name) in zip(axes.flat, figures.items()):
        for arm, runs in found.items():
            values = np.array([[at(run, step)[key] for step in steps] for run in runs])
            axis.fill_between(steps, values.min(0), values.max(0), alpha=0.15)
            axis.plot(steps, values.mean(0), label=arm, marker="o", markersize=3)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(found), fontsize=9, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    save_picture(figure, config)


def save_picture(figure, config):
    figure.suptitle(f"{config['title']} ({len(config['seeds'])} seeds, commit {find_commit()})\n"
                    f"{config['caption']}", fontsize=11)
    Path(config["picture"]).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config["picture"], dpi=100)


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(steps=1, parallel=1))
    prompts = {row["id"]: row for row in load_rows(config["prompts"], lambda row, n: row)}
    runs = {(arm, seed): f"{config['out']}/{name_keys(keys)}-{seed}"
            for arm, keys in config["arms"].items() for seed in config["seeds"]}
    with ThreadPoolExecutor(config["parallel"]) as pool:
        jobs = [pool.submit(run_arm, run, [f"seed={seed}", f"steps={config['steps']}",
                                           f"eval_prompts={config['prompts']}",
                                           *config["options"], *config["arms"][arm]])
                for (arm, seed), run in runs.items()]
        stopped = [job.result() for job in tqdm(jobs, unit="run")]
    found = {arm: [read_run(runs[arm, seed], prompts) for seed in config["seeds"]]
             for arm in config["arms"]}
    measured = next(iter(found.values()))[0]
    figures = {key: name for key, name in FIGURES.items() if key in next(iter(measured.values()))}
    if "outline" in figures:
        del figures["eval/spearman"]
    draw(found, figures, config)
    print(f"commit {find_commit()}, {len(config['seeds'])} seeds, step {config['steps']}: mean "
          "(least to most)\n\n| arm | " + " | ".join(figures.values()) + " |\n"
          + "|---" * (len(figures) + 1) + "|")
    for arm, parts in found.items():
        last = {key: [part[max(part)][key] for part in parts] for key in figures}
        print(f"| {arm} | " + " | ".join(f"{np.mean(v):.2f} ({min(v):.2f} to {max(v):.2f})"
                                         for v in last.values()) + " |")
    for run, reason in zip(runs.values(), stopped):
        if reason:
            print(f"\n{run}: step {read_done(Path(run) / 'log.jsonl')[-1]['step']}, {reason}")
    print(f"\npicture: {config['picture']}")


if __name__ == "__main__":
    main()
