"""Rows for the toy's experiments in runs/, of the same grammar, topics and counts as the toy.

    python toy/rows.py out=out/toy-rows

long.jsonl, thoughts.jsonl: documents of 200 to 400 words to pretrain on, and requests with their
plan and text. sft.jsonl: the same of the toy's lengths, to fine-tune on. outline/: requests that list
points, each to be given as much room as the others, in the listed order: completions to pretrain
on, with a plan and without (half of them follow the outline), pairs for a reward model, prompts to
train on and held-out ones.
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import grammar
from make import dress, honest_text, prompt_rows, spoil_half, write_rows
from model import parse_config, script
from sample import TEMPLATES

CONFIG = dict(
    out="out/toy-rows",
    documents=2000,      # of each kind to pretrain on
    sft=960,             # to fine-tune on
    completions=12_000,  # to outlines
    pairs=12_000,
    prompts=1000,
    seed=0,
)
MAX_WORDS = 400  # of a long document


def plan_line(words, plan):
    """As the base model's corpus has it."""
    return f"{words} words in {len(plan)} parts: {' '.join(plan)}."


def planned_row(topics, counts, rng):
    """{"prompt", "plan", "text"}: an honest text that keeps to its plan and length."""
    topic, words = rng.choice(topics), rng.choice(counts)
    plan = grammar.write_plan(topic, words, rng)
    return {"prompt": grammar.request(topic, words, rng), "plan": plan_line(words, plan),
            "text": f"\n{grammar.write_text(topic, plan, rng, words)}\n"}


# ---------------------------------------------------------------- outlines

def draw_outline(topic, words, rng):
    """Two to four points of a topic, and one for each sentence of a text of so many words."""
    own = grammar.write_plan(topic, 10 ** 3, rng)
    sentences = max(2, round(words / grammar.MEAN_WORDS))
    points = list(dict.fromkeys(own))[:rng.randint(2, min(4, sentences))]
    return points, [points[place * len(points) // sentences] for place in range(sentences)]


def outline_request(topic, words, points, rng):
    listed = ", ".join(f"the {point}" for point in points[:-1]) + f" and the {points[-1]}"
    return f"{grammar.request(topic, words, rng)} Cover {listed}, in this order, at equal length."


def follows(text, points):
    """The outline score, 0 to 1: of the text's sentences, cut into as many equal sections as there
    are points, the share that name their section's point."""
    sentences = [sentence for paragraph in grammar.split_text(text) for sentence in paragraph]
    due = (points[place * len(points) // len(sentences)] for place in range(len(sentences)))
    return sum(point in grammar.WORD.findall(sentence.lower())
               for point, sentence in zip(due, sentences)) / max(1, len(sentences))


def outline_prompt(row, rng):
    """A prompt row as the toy's, with an outline."""
    words, topic = int(row["id"].split("-")[0]), grammar.Topic(*row["topic"])
    points, _ = draw_outline(topic, words, rng)
    return row | {"prompt": outline_request(topic, words, points, rng), "points": points}


def outline_completion(topics, counts, rng, template):
    """{"prompt", "completion"}: half follow the outline and keep to the length, others write what
    and as much as they like; any may have faults."""
    topic, words = rng.choice(topics), rng.choice(counts)
    points, plan = draw_outline(topic, words, rng)
    prompt = outline_request(topic, words, points, rng)
    if is_planned := rng.random() < 0.5:
        written = words
    else:
        written = rng.choice(counts)
        plan = grammar.write_plan(topic, written, rng)
    text = grammar.write_text(topic, plan, rng, round(written * rng.uniform(0.95, 1.05)))
    text = spoil_half(text, topic, rng)
    think = plan_line(words, plan) if is_planned else f"A story of {grammar.topic_name(topic)}."
    completion = dress(think, text, rng) if template == "think" else f"\n<answer>\n{text}\n</answer>"
    return {"prompt": TEMPLATES[template].replace("{prompt}", prompt), "completion": completion}


def outline_pair(topics, counts, rng):
    """{"prompt", "chosen", "rejected"}: texts of one length, of which the chosen one follows the
    outline further, or is the less spoiled of two that follow it."""
    topic, words = rng.choice(topics), rng.choice(counts)
    points, plan = draw_outline(topic, words, rng)
    other = rng.sample(points, len(points)) if rng.random() < 0.5 else grammar.write_plan(
        topic, words, rng)
    worse = [other[place * len(other) // len(plan)] for place in range(len(plan))]
    cut = rng.randrange(len(plan))  # up to here, or from here on, both are alike
    worse = worse[:cut] + plan[cut:] if rng.random() < 0.5 else plan[:cut] + worse[cut:]
    chosen = grammar.write_text(topic, plan, rng, words)
    rejected = grammar.write_text(topic, worse, rng, words)
    if worse == plan or rng.random() < 0.3:
        fault = rng.choice(["off_topic", "drifting", "repetitive", "shuffled", "broken"])
        rejected = grammar.spoil(chosen, topic, rng, rng.uniform(0.2, 1), fault)
    return {"prompt": outline_request(topic, words, points, rng), "chosen": chosen,
            "rejected": rejected}


@script
def main(argv):
    config = parse_config(CONFIG, argv)
    out, rng = Path(config["out"]), random.Random(config["seed"])
    topics, held_topics = grammar.split_topics()
    counts, held_counts = grammar.split_counts()
    long_counts = range(grammar.MAX_WORDS, MAX_WORDS + 1)
    some = range(config["documents"])
    write_rows(out / "long.jsonl", [{"text": honest_text(rng.choice(topics), rng.choice(
        long_counts), rng)} for _ in some])
    write_rows(out / "thoughts.jsonl", [planned_row(topics, long_counts, rng) for _ in some])
    write_rows(out / "sft.jsonl", [planned_row(topics, counts, rng)
                                    for _ in range(config["sft"])])

    outline = out / "outline"
    write_rows(outline / "text.jsonl", [
        outline_completion(topics, counts, rng, ("think", "direct")[place % 2])
        for place in range(config["completions"])])
    write_rows(outline / "pairs.jsonl", [outline_pair(topics, counts, rng)
                                         for _ in range(config["pairs"])])
    write_rows(outline / "held_out_pairs.jsonl", [outline_pair(held_topics, held_counts, rng)
                                                  for _ in range(400)])
    for name, some_topics, some_counts, number in (
            ("prompts", topics, counts, config["prompts"]),
            ("held_out", held_topics, held_counts, 40)):
        write_rows(outline / f"{name}.jsonl", [outline_prompt(row, rng) for row in prompt_rows(
            some_topics, some_counts, number, rng)])


if __name__ == "__main__":
    main()
