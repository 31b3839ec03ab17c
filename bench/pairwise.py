"""Models of the toy against each other, by the gold score that no training sees.

    python bench/pairwise.py models='{"SFT": "out/sft-{seed}/latest", "RL": "out/rl-{seed}/latest"}'

Each model of each seed answers the held-out prompts, `samples` times at temperature 1. At each
prompt, seed and sample every two models play a game, which the higher gold score wins; and another
by gold times the length reward, as a reader judges who asked for a length. Elo as evaluate.py has
it: Bradley-Terry, the first model at 1000, intervals of 95% over 1,000 resamplings of the prompts.
"""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "toy")]

import numpy as np
from tqdm import tqdm

import grammar
from arms import run_alone, save_picture
from evaluate import arena_scores
from model import find_commit, parse_config, script
from reward import rule_rewards
from sample import load_rows, read_done

CONFIG = dict(
    models={"base": "toy/policy", "RL": "out/arms/default-{seed}/latest"},
    prompts="toy/held_out.jsonl",
    seeds=[0, 1, 2],
    samples=4,
    parallel=4,             # models that answer at one time
    out="out/pairwise",
    picture="out/pairwise/pairwise.png",
    title="The toy's models, pairwise",
    caption="",             # what the paper has in its place
)


def answer(folder, out, seed, config):
    """The rows of a model's answers, in order of prompt and sample."""
    run_alone("sample.py", out, [
        f"model={folder}", f"prompts={config['prompts']}", f"seed={seed}",
        f"num_samples={config['samples']}", "temperature=1", "top_p=1"])
    return sorted(read_done(Path(out) / "responses.jsonl"),
                  key=lambda row: (row["index"], row["sample"]))


def measure(row, topics):
    """(gold score, length reward) of an answer."""
    return (grammar.gold_score(row["response"], topics[row["index"]]),
            rule_rewards(row["completion"], row["length"])["length"])


def draw(found, names, config):
    """found: {title: {model: {"mean", "low", "high"}}}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(found), figsize=(11, 1.6 + 0.35 * len(names)), sharey=True,
                                layout="constrained")
    for axis, (title, models) in zip(axes, found.items()):
        for place, name in enumerate(names):
            told = models[name]
            axis.plot([told["low"], told["high"]], [place, place], "C0", alpha=0.5, linewidth=4)
            axis.plot(told["mean"], place, "o", color="C0")
        axis.set_title(title, fontsize=10)
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    save_picture(figure, config)


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(samples=1, parallel=1))
    topics = {row["id"]: row["topic"] for row in load_rows(config["prompts"], lambda row, n: row)}
    names, seeds = list(config["models"]), config["seeds"]
    with ThreadPoolExecutor(config["parallel"]) as pool:
        jobs = [pool.submit(answer, config["models"][name].replace("{seed}", str(seed)),
                            f"{config['out']}/{name.replace(' ', '-')}-{seed}", seed, config)
                for name in names for seed in seeds]
        answers = [job.result() for job in tqdm(jobs, unit="model")]
    measured = np.array([[measure(row, topics) for row in rows] for rows in answers]).reshape(
        len(names), len(seeds), -1, config["samples"], 2)  # of the two measures

    def elo(values):
        """By games on values (M models, seeds, P prompts, samples)."""
        rows, columns = values[:, None], values[None]
        won = (rows > columns) + 0.5 * (rows == columns)        # (M, M, seeds, P, samples)
        wins = won.sum((2, 4)).transpose(2, 0, 1) * (1 - np.eye(len(names)))
        return {name: told["overall"]
                for name, told in arena_scores(names, wins, names[0]).items()}

    def mean(values):
        """Over all, and the least and the most of a seed."""
        by_seed = values.mean((2, 3))
        return {name: {"mean": found.mean(), "low": found.min(), "high": found.max()}
                for name, found in zip(names, by_seed)}

    gold, length = np.moveaxis(measured, -1, 0)
    found = {"Elo by gold": elo(gold), "Elo by gold x length": elo(gold * length),
             "gold score": mean(gold), "length reward": mean(length)}
    draw(found, names, config)
    print(f"commit {find_commit()}, {len(seeds)} seeds, {gold[0].size} answers a model: Elo (95% "
          "interval), means (least to most of a seed)\n\n| model | " + " | ".join(found) + " |\n"
          + "|---" * (len(found) + 1) + "|")
    for name in names:
        cells = [models[name] for models in found.values()]
        print(f"| {name} | " + " | ".join(
            "{mean:.0f} ({low:.0f} to {high:.0f})".format(**cell) if cell["mean"] > 10
            else "{mean:.3f} ({low:.3f} to {high:.3f})".format(**cell) for cell in cells) + " |")
    print(f"\npicture: {config['picture']}")


if __name__ == "__main__":
    main()
