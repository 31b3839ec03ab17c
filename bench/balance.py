"""How evenly a rollout's work falls on the engines that share it: wall time over its lower bound.

    python bench/balance.py                  # the paper's batch on 8 engines, seconds on a laptop
    python bench/balance.py prompts=64 engines=16 correlation=0.5

A simulation: completions have log-normal lengths, cut at max_tokens, that follow what
their prompt asks for as `correlation` says. An engine is the GPUs that share a copy of the weights;
a step adds a token to each of its running rows and takes the time to read the weights and the rows'
keys and values. Defaults: Qwen2.5-32B in bf16 over 8 GPUs of 3 TB/s each.

Static: every engine gets its prompts beforehand. By group: an engine with room for all samples of a
prompt takes the next prompt. Ours: sample.deal, the first wave dealt and the rest pulled one sample
at a time, the longest requests first. The lower bound: the keys and values read in equal shares,
and the weights read as often as the longest completion needs, or all tokens on full engines.
"""
import math
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from tqdm import tqdm

from model import find_commit, parse_config, script
from sample import LOOK_EVERY, deal

CONFIG = dict(
    prompts=32, samples=32,     # of each
    engines=8, slots=85,        # of each
    median=6000.0, spread=0.6,  # tokens; of the logarithm of a length
    max_tokens=14_000,
    correlation=0.8,            # of what is asked and what comes, as logarithms
    weights_ms=2.7,             # to read the weights once: 65 GB over 24 TB/s
    token_us=0.011,             # to read a token's keys and values: 262 kB over 24 TB/s
    trials=20,
)


class Counter:
    """The one thing that deal asks of a process group's store."""

    def __init__(self):
        self.count = 0

    def add(self, name, amount):
        self.count += amount
        return self.count


def draw_lengths(rng, config):
    """(asked (P,), lengths (P, G)): the logarithms correlate as asked."""
    share = config["correlation"] ** 2
    asked = rng.normal(0, config["spread"] * math.sqrt(share), config["prompts"])
    noise = rng.normal(0, config["spread"] * math.sqrt(1 - share),
                       (config["prompts"], config["samples"]))
    lengths = config["median"] * np.exp(asked[:, None] + noise)
    return asked, lengths.clip(1, config["max_tokens"]).astype(int)


def simulate(take, config):
    """Seconds until the last engine is idle. take(engine, free slots) gives lengths to start;
    the engine that is the furthest behind looks next, as every LOOK_EVERY steps in truth."""
    clocks = np.zeros(config["engines"])
    done = [np.empty(0, int) for _ in clocks]   # tokens of each running row
    goal = [np.empty(0, int) for _ in clocks]
    is_over = np.zeros(config["engines"], bool)
    while not is_over.all():
        engine = int(np.where(is_over, math.inf, clocks).argmin())
        new = take(engine, config["slots"] - len(goal[engine]))
        goal[engine] = np.append(goal[engine], np.array(new, int))
        done[engine] = np.append(done[engine], np.zeros(len(new), int))
        if not len(goal[engine]):
            is_over[engine] = True
            continue
        cached = done[engine].sum() + LOOK_EVERY / 2 * len(done[engine])
        clocks[engine] += LOOK_EVERY * (config["weights_ms"] * 1e-3
                                        + cached * config["token_us"] * 1e-6)
        done[engine] += LOOK_EVERY
        runs = done[engine] < goal[engine]
        done[engine], goal[engine] = done[engine][runs], goal[engine][runs]
    return clocks.max()


def static(asked, lengths, config):
    parts = np.array_split(lengths, config["engines"])
    queues = [part.flatten().tolist() for part in parts]

    def take(engine, room):
        taken, queues[engine] = queues[engine][:room], queues[engine][room:]
        return taken

    return take


def by_group(asked, lengths, config):
    groups = [lengths[p].tolist() for p in np.argsort(-asked)]

    def take(engine, room):
        return groups.pop(0) if groups and room >= min(config["samples"], config["slots"]) else []

    return take


def ours(asked, lengths, config):
    jobs = [length for p in np.argsort(-asked) for length in lengths[p].tolist()]
    store = Counter()
    shares = [deal(jobs, SimpleNamespace(rank=engine, world=config["engines"], store=store),
                   config["slots"], "work") for engine in range(config["engines"])]

    def take(engine, room):
        return [length for _, length in zip(range(room), shares[engine])]

    return take


def lower_bound(lengths, config):
    reads = (lengths.astype(float) ** 2 / 2).sum() * config["token_us"] * 1e-6 / config["engines"]
    steps = max(lengths.max(), lengths.sum() / (config["engines"] * config["slots"]))
    return reads + steps * config["weights_ms"] * 1e-3


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(prompts=1, samples=1, engines=1, slots=1, trials=1,
                                             max_tokens=1, correlation=(0, 1)))
    kinds = {"static": static, "by group": by_group, "ours": ours}
    found = {name: [] for name in kinds}
    for trial in tqdm(range(config["trials"]), unit="trial"):
        asked, lengths = draw_lengths(np.random.default_rng(trial), config)
        for name, make in kinds.items():
            found[name].append(simulate(make(asked, lengths, config), config)
                               / lower_bound(lengths, config))
    print(f"commit {find_commit()}, {config['prompts']} prompts x {config['samples']} samples on "
          f"{config['engines']} engines of {config['slots']} slots, {config['trials']} trials\n\n"
          "| work | wall time over its lower bound, mean | worst |\n|---|---|---|")
    for name, ratios in found.items():
        print(f"| {name} | {np.mean(ratios):.2f} | {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
