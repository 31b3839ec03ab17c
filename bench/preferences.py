"""Bradley-Terry on whole stories: which of two stories by unseen models is the better one?

    python bench/preferences.py data=longform.jsonl.gz     # 17 minutes a split on a busy core

data: rows {"id", "model", "prompt", "text", "score"}, the EQ-Bench longform stories: 421 of about
8,000 words, by 54 models on 8 prompts, with a judge's score. A pair is two stories to one prompt
whose scores are at least 5 apart. Of each split (seeds 0 to 2) the reward model sees 6 prompts and
39 models, and is tested on pairs among the other 15 models on the other 2 prompts. Tokenizer and
model (560,000 parameters, nearly all of them embeddings) start from nothing: pretrain.py on the
training stories, then reward.py on pairs of whole ones.
Beside it: Bradley-Terry on word frequencies, tuned within the training side, and the rule that the
longer story wins. Intervals: 95%, by resampling the 54 models, the same draw in all splits.

inner=true is for choosing settings: the test side is left alone, and 2 prompts and 12 models of
the training side are held out instead. All settings below were chosen so. A split that is in `out`
already is not trained again.
"""
import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "toy")]

import numpy as np
import torch

import make
import pretrain
import reward
from model import count_parameters, find_commit, load_config, parse_config, script, setup
from sample import count_words, find_words, load_rows

CONFIG = dict(
    data="longform.jsonl.gz",
    out="out/preferences",
    inner=False,      # hold out a part of the training side instead of testing
    seeds=[0, 1, 2],  # of splits
    vocab=8192,       # tokens, of each split's own tokenizer
    hidden=64,        # width; one layer with one head, because attention over 12,000 tokens is
    head=32,          # nearly all of the time on a CPU
    context=32_768,   # tokens: every story is whole
    pretrain_steps=200,  # of 4,096 tokens
    pretrain_lr=5e-3,
    steps=40,
    batch_pairs=16,
    lr=3e-3,
    weight_decay=1.0,
    eval_every=1000,  # steps
)
GAP = 5  # points of the judge's 100
DRAWS = 2000
PENALTIES = 1e-3, 1e-2, 1e-1, 1, 10  # of the bag of words: weight of the squared norm


# ---------------------------------------------------------------- splits and pairs

def split_rows(rows, seed, inner):
    """(train, held out) stories: 6 of 8 prompts and 39 of 54 models, and the others; inner: 4 and
    27 of those 6 and 39, and the others of them."""
    rng = random.Random(seed)
    prompts, models = (sorted({row[key] for row in rows}) for key in ("prompt", "model"))
    rng.shuffle(prompts)
    rng.shuffle(models)
    p, m = (4, 27) if inner else (6, 39)
    if inner:
        prompts, models = prompts[:6], models[:39]
    sides = (prompts[:p], models[:m]), (prompts[p:], models[m:])
    return [[row for row in rows if row["prompt"] in of_prompts and row["model"] in of_models]
            for of_prompts, of_models in sides]


def find_pairs(stories):
    """[(better, worse)] to one prompt."""
    return [(a, b) for a, b in itertools.permutations(stories, 2)
            if a["prompt"] == b["prompt"] and a["score"] >= b["score"] + GAP]


def choose_pairs(pairs, number, rng):
    """Pairs from one pairing of all stories after another, so that all are there as often."""
    chosen = []
    while len(chosen) < number:
        used = set()
        for pair in rng.sample(pairs, len(pairs)):
            if not used & {story["id"] for story in pair}:
                used |= {story["id"] for story in pair}
                chosen.append(pair)
    return chosen[:number]


def write_pairs(path, pairs):
    make.write_rows(path, [{"prompt": better["prompt"], "chosen": better["text"],
                            "rejected": worse["text"]} for better, worse in pairs])


# ---------------------------------------------------------------- the reward model

def make_start(folder, texts, config):
    """A tokenizer and the config of a model without weights yet."""
    folder.mkdir(parents=True, exist_ok=True)
    make.make_tokenizer(folder, texts, config["vocab"])
    (folder / "config.json").write_text(json.dumps(make.ARCHITECTURE | dict(
        vocab_size=config["vocab"], hidden_size=config["hidden"], num_hidden_layers=1,
        intermediate_size=config["hidden"] * 5 // 2, num_attention_heads=1, num_key_value_heads=1,
        head_dim=config["head"], max_position_embeddings=config["context"])))


def train_judge(train, test, out, seed, config):
    """{id: score} of test stories by a reward model of train's, and its folder."""
    pairs = choose_pairs(find_pairs(train), config["steps"] * config["batch_pairs"],
                         random.Random(seed))
    make.write_rows(out / "texts.jsonl", [{"text": row["text"]} for row in train])
    write_pairs(out / "pairs.jsonl", pairs)
    write_pairs(out / "test.jsonl", find_pairs(test))
    make_start(out / "start", (row["text"] for row in train), config)
    pretrain.main([
        f"model={out / 'start'}", "init=random", f"data={out / 'texts.jsonl'}",
        f"cache={out / 'tokens'}", f"out={out / 'pretrain'}", "seq_len=256", "batch_rows=16",
        "micro_rows=16", f"steps={config['pretrain_steps']}", f"lr={config['pretrain_lr']}",
        f"seed={seed}", "warmup=20", "save_every=100000"])
    keys = ("steps", "batch_pairs", "lr", "weight_decay", "eval_every")
    reward.main([
        f"model={out / 'pretrain' / 'latest'}", f"pairs={out / 'pairs.jsonl'}",
        f"val_pairs={out / 'test.jsonl'}", f"out={out / 'run'}", f"seed={seed}", "warmup=5",
        "save_every=100000", *(f"{key}={config[key]}" for key in keys)])
    folder = str(out / "run" / "latest")
    scores = reward.WritingModel(folder, setup()).score([row["prompt"] for row in test],
                                                        [row["text"] for row in test])
    return {row["id"]: score for row, score in zip(test, scores)}, folder


# ---------------------------------------------------------------- the baselines

def word_features(train, stories, kind):
    """(stories, words): log rates, standardised, or tf-idf; words that 10 of train have."""
    counts = {row["id"]: Counter(word.lower() for word in find_words(row["text"]))
              for row in train + stories}
    known = Counter(word for row in train for word in counts[row["id"]])
    known = {word: number for word, number in known.items() if number >= 10}

    def table(rows):
        x = np.zeros((len(rows), len(known)), dtype=np.float32)
        for line, row in zip(x, rows):
            found = counts[row["id"]]
            line[:] = [found[word] for word in known]
            if kind == "log rates":
                line[:] = np.log1p(1e4 * line / found.total())
            else:
                line[:] = np.log1p(line) * np.log(len(train) / np.array(list(known.values())))
                line /= np.linalg.norm(line)
        return x

    x, y = table(train), table(stories)
    mean, std = x.mean(0), x.std(0) + 1e-3
    if kind == "tf-idf":
        mean, std = 0, 0.01  # about as long, so that one range of penalties serves both
    return torch.tensor((x - mean) / std), torch.tensor((y - mean) / std)


def fit_words(x, pairs, penalty):
    """Weights (words,) that minimise the Bradley-Terry loss of pairs of places."""
    weights = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = reward.bradley_terry((x @ weights)[pairs], 0.0).mean()
        (loss + penalty * weights.square().sum()).backward()
        return loss + penalty * weights.square().sum()

    optimizer.step(closure)
    return weights.detach()


def score_by_words(train, test, kind, penalty):
    """{id: score} of test stories."""
    x, y = word_features(train, test, kind)
    place = {row["id"]: number for number, row in enumerate(train)}
    pairs = torch.tensor([[place[row["id"]] for row in pair] for pair in find_pairs(train)])
    return dict(zip((row["id"] for row in test), (y @ fit_words(x, pairs, penalty)).tolist()))


def tuned_words(rows, seed):
    """{id: score} of the test side, by the settings that do best on the inner split."""
    train, held_out = split_rows(rows, seed, inner=True)
    settings = list(itertools.product(("log rates", "tf-idf"), PENALTIES))
    best = max(settings, key=lambda setting: accuracy(
        score_by_words(train, held_out, *setting), find_pairs(held_out)))
    print(f"seed {seed}: bag of words by {best[0]}, penalty {best[1]}")
    return score_by_words(*split_rows(rows, seed, inner=False), *best)


# ---------------------------------------------------------------- figures

def accuracy(scores, pairs, weight=None):
    """Share of pairs whose better story scores higher, ties half; weight: {model: times}."""
    right = total = 0.0
    for better, worse in pairs:
        times = weight[better["model"]] * weight[worse["model"]] if weight else 1
        gap = scores[better["id"]] - scores[worse["id"]]
        right += times * (1 if gap > 0 else 0.5 * (gap == 0))
        total += times
    return right / total if total else math.nan


def interval(scores_of_splits, pairs_of_splits, models):
    """95% of the mean accuracy, over draws of as many models with replacement."""
    rng, means = random.Random(0), []
    for _ in range(DRAWS):
        weight = Counter(rng.choices(models, k=len(models)))
        means.append(np.nanmean([accuracy(scores, pairs, weight) for scores, pairs
                                 in zip(scores_of_splits, pairs_of_splits)]))
    return np.quantile(means, [0.025, 0.975])


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(steps=1, batch_pairs=1))
    rows = load_rows(config["data"], lambda row, number: row)
    models, seconds = sorted({row["model"] for row in rows}), []
    pairs, found = [], {"reward model": [], "bag of words": [], "the longer wins": []}
    for seed in config["seeds"]:
        train, test = split_rows(rows, seed, config["inner"])
        pairs.append(find_pairs(test))
        print(f"seed {seed}: {len(train)} stories to train, {len(test)} held out in "
              f"{len(pairs[-1])} pairs")
        start = time.perf_counter()
        scores, folder = train_judge(train, test, Path(config["out"]) / str(seed), seed, config)
        seconds.append(time.perf_counter() - start)
        found["reward model"].append(scores)
        found["the longer wins"].append({row["id"]: count_words(row["text"])
                                         for row in test})
        if not config["inner"]:
            found["bag of words"].append(tuned_words(rows, seed))
    settings = {key: config[key] for key in CONFIG if key not in ("data", "out")}
    print(f"\ncommit {find_commit()}, torch {torch.__version__}, "
          f"{count_parameters(load_config(folder)[1]):,} parameters, {json.dumps(settings)}; "
          f"minutes a split: {', '.join(f'{s / 60:.1f}' for s in seconds)}\n")
    print("| | mean | 95% | " + " | ".join(f"seed {seed}" for seed in config["seeds"]) + " |")
    print("|---|---|---|" + "---|" * len(pairs))
    for name, scores in found.items():
        if scores:
            each = [accuracy(*split) for split in zip(scores, pairs)]
            low, high = interval(scores, pairs, models)
            print(f"| {name} | {np.mean(each):.3f} | {low:.3f} to {high:.3f} | "
                  + " | ".join(f"{value:.3f}" for value in each) + " |")


if __name__ == "__main__":
    main()
