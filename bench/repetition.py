"""The repetition penalty on real texts, and its cost: does it find the models that loop, alone?

    python bench/repetition.py data=longform.jsonl.gz        # a minute on one core

data: rows {"model", "text", "score"}, the EQ-Bench longform stories. Prints the mean penalty of the
models whose mean score is above 70, below 40 and between, of each model below 40, and the medians
of what rule_rewards takes for an answer of 10,000 words and of a million characters.
"""
import itertools
import random
import re
import statistics
import sys
import timeit
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import InputError, find_commit, parse_config, script
from reward import find_copies, penalty_of, rule_rewards
from sample import find_words, load_rows

CONFIG = dict(
    data="longform.jsonl.gz",
    high=70.0,           # mean score above which a model's texts are to be left alone
    low=40.0,            # and below which they repeat themselves
    repeats=7,           # of each timing
)
COLUMNS = ("| {} | models | texts | score | copied spans | paragraphs | penalty |\n|---|"
           + "---|" * 6)


def story_row(row, number):
    for key, kind in (("model", str), ("text", str), ("score", (int, float))):
        if not isinstance(row.get(key), kind):
            raise ValueError(f"expected {key!r}, found columns {sorted(row)}")
    return row


def measure(rows):
    """{model: [(score, share in copied spans, share in similar paragraphs, penalty)]}."""
    models = defaultdict(list)
    for row in rows:
        copies = find_copies(row["text"])
        models[row["model"]].append((row["score"], copies["spans"], copies["paragraphs"],
                                     penalty_of(copies)))
    return models


def mean_score(texts):
    return statistics.mean(text[0] for text in texts)


def table_line(name, models):
    """Means over models of each model's mean over its texts."""
    means = [statistics.mean(statistics.mean(column) for column in columns)
             for columns in zip(*(zip(*texts) for texts in models))]
    return (f"| {name} | {len(models)} | {sum(map(len, models))} | {means[0]:.1f} | "
            + " | ".join(f"{value:.4f}" for value in means[1:]) + " |")


def answers_to_time(rows):
    """{name: answer} of 10,000 words and of up to a million characters; prose, and the worst."""
    text, rng = "\n\n".join(row["text"] for row in rows)[:1_000_000], random.Random(0)
    words = text.split()
    if len(words) < 10_000:
        raise InputError(f"expected stories of 10,000 words in all, found {len(words)}")
    chinese = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(10_000))
    first = next(itertools.islice(re.finditer(r"\S+", text), 9_999, None)).end()
    return {"prose of 10,000 words": text[:first], "10,000 Han characters": chinese,
            "a paragraph, looped to 10,000 words": " ".join(words[:100] * 100),
            "prose of a million characters": text, "a million Han characters": chinese * 100,
            "one word 200,000 times": "word " * 200_000, "a letter 500,000 times": "a " * 500_000,
            "500,000 one-word paragraphs": "a\n" * 500_000, "a million letters": "a" * 1_000_000,
            "10,000 paragraphs of 20 words": "\n".join(
                " ".join(rng.choices(words, k=20)) for _ in range(10_000))}


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(repeats=1))
    rows = load_rows(config["data"], story_row)
    models = measure(rows)
    groups = {
        f"above {config['high']:g}": lambda score: score > config["high"],
        "between": lambda score: config["low"] <= score <= config["high"],
        f"below {config['low']:g}": lambda score: score < config["low"]}
    print(f"commit {find_commit()}\n\n{COLUMNS.format('mean score')}")
    for name, is_in in groups.items():
        chosen = [texts for texts in models.values() if is_in(mean_score(texts))]
        if not chosen:
            raise InputError(f"{config['data']}: expected models with a score {name}, found none")
        print(table_line(name, chosen))
    print(f"\n{COLUMNS.format('model')}")
    for name, texts in sorted(models.items(), key=lambda pair: mean_score(pair[1])):
        if mean_score(texts) < config["low"]:
            print(table_line(name, [texts]))
    print("\n| answer | characters | words | milliseconds (median) |\n|---|---|---|---|")
    for name, answer in answers_to_time(rows).items():
        completion = f"<think>a</think><answer>{answer}</answer>"
        seconds = timeit.repeat(lambda: rule_rewards(completion, [0, 10_000]), number=1,
                                repeat=config["repeats"])
        print(f"| {name} | {len(answer):,} | {len(find_words(answer)):,} | "
              f"{1000 * statistics.median(seconds):,.0f} |")


if __name__ == "__main__":
    main()
