"""Do evaluate.py's Elo intervals hold? Games of models whose strengths are known.

    python bench/elo.py                     # minutes on one core
    python bench/elo.py simulations=200 prompts=50

Each simulation plays every pair on every prompt in both orders. The two games of a pair at a prompt
are not independent: with chance `same` the second repeats the first. Some games are ties. Prints
how often the interval of each model holds its true Elo, by resampling prompts as evaluate.py does,
and by resampling games as if they were independent; then a model that wins everything.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from tqdm import tqdm

from evaluate import arena_scores, fit_bradley_terry
from model import find_commit, parse_config, script

CONFIG = dict(
    elo=[1000, 1050, 1120, 1200, 1300, 1450],  # the first is the anchor
    prompts=100,
    simulations=1000,
    same=0.6,            # chance that the second order's game goes as the first
    ties=0.1,            # share of games
    seed=0,
)
SCALE = 400 / math.log(10)


def play(elo, num, same, ties, rng):
    """Shares (num, 2, M, M) won by row over column, in either order, each with the chance of the
    true strengths; a tie, as likely for all, is half a win for both."""
    M = len(elo)
    chance = 1 / (1 + np.exp((elo[None] - elo[:, None]) / SCALE))
    # ties take as much from both sides as keeps the mean share at the true chance
    tie = np.minimum(ties, 2 * np.minimum(chance, 1 - chance))
    draw = lambda: (lambda u: np.where(u < chance - tie / 2, 1.0, np.where(
        u < chance + tie / 2, 0.5, 0.0)))(rng.random((num, M, M)))
    first, second = draw(), draw()
    second = np.where(rng.random((num, M, M)) < same, first, second)
    games = np.triu(np.stack([first, second], 1), 1)
    lost = np.triu(np.stack([1 - first, 1 - second], 1), 1)
    return games + lost.swapaxes(-1, -2)


def by_games(games, rng):
    """Intervals (2, M) when games are drawn as if they were independent."""
    flat = games.reshape(-1, *games.shape[2:])  # (num * 2, M, M)
    drawn = np.zeros((1000, *flat.shape[1:]))
    for i in range(flat.shape[1]):
        for j in range(i):
            won = flat[rng.integers(len(flat), size=(1000, len(flat))), i, j].sum(1)
            drawn[:, i, j], drawn[:, j, i] = won, len(flat) - won
    elo = fit_bradley_terry(drawn) * SCALE
    return np.quantile(elo - elo[:, :1] + 1000, [0.025, 0.975], axis=0)


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(prompts=2, simulations=1, same=(0, 1), ties=(0, 0.3)))
    elo, num = np.array(config["elo"], float), config["prompts"]
    names, rng = [f"m{n}" for n in range(len(elo))], np.random.default_rng(config["seed"])
    held, held_games, errors = [], [], []
    for _ in tqdm(range(config["simulations"])):
        games = play(elo, num, config["same"], config["ties"], rng)
        found = arena_scores(names, games.sum(1), "m0")
        rated = [found[name]["overall"] for name in names]
        held.append([r["low"] <= true <= r["high"] for r, true in zip(rated, elo)])
        errors.append([r["mean"] - true for r, true in zip(rated, elo)])
        if len(held_games) < 100:
            low, high = by_games(games, rng)
            held_games.append((low <= elo) & (elo <= high))
    print(f"commit {find_commit()}, {config['simulations']} simulations, {num} prompts, "
          f"{len(elo)} models, both orders, same {config['same']}, ties {config['ties']}\n")
    print("| true Elo | mean error | coverage by prompts | by games (100 simulations) |")
    print("|---|---|---|---|")
    for n in range(1, len(elo)):
        print(f"| {elo[n]:.0f} | {np.mean(errors, 0)[n]:+.1f} | {np.mean(held, 0)[n]:.1%} | "
              f"{np.mean(held_games, 0)[n]:.1%} |")
    every, every_games = (np.mean(some, 0)[1:].mean() for some in (held, held_games))
    print(f"| all | | {every:.1%} | {every_games:.1%} |")
    games = play(elo, num, config["same"], config["ties"], rng).sum(1)
    games[:, -1, :-1], games[:, :-1, -1] = 2, 0
    best = arena_scores(names, games, "m0")[names[-1]]["overall"]
    print("\nwins everything: {mean:.0f} [{low:.0f}, {high:.0f}]".format(**best))


if __name__ == "__main__":
    main()
