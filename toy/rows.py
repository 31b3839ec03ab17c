"""Rows for the toy's experiments in runs/, of the same grammar, topics and counts as the toy.

    python toy/rows.py out=out/toy-rows

long.jsonl, thoughts.jsonl: documents of 200 to 400 words to pretrain on, and requests with their
plan and text. sft.jsonl, flawed.jsonl: the same of the toy's lengths, to fine-tune on; flawed texts
have faults. outline/: requests that list two or three topics, to be covered in this order, each
with as much room as the others: completions to pretrain on, with a plan and without, first clean
ones, then mixed ones, of which half follow the outline; pairs for a reward model; prompts to train
on, and held-out ones.
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import grammar
from make import (completion_row, dress, honest_text, in_tags, plan_line, range_around, spoil_half,
                  write_rows)
from model import parse_config, script
from sample import TEMPLATES

CONFIG = dict(
    out="out/toy-rows",
    documents=2000,      # of each kind to pretrain on
    sft=960,             # of each kind to fine-tune on
    completions=12_000,  # to outlines
    pairs=12_000,
    prompts=1000,
    seed=0,
)
MAX_WORDS = 400  # of a long document


def flawed_row(topics, counts, rng):
    """A completion in its tags, with a plan and of the right length, whose text has the faults
    that the base's corpus has: a teacher who is no better than that."""
    topic, words = rng.choice(topics), rng.choice(counts)
    plan = grammar.write_plan(topic, words, rng)
    text = spoil_half(grammar.write_text(topic, plan, rng, words), topic, rng)
    return {"prompt": TEMPLATES["think"].replace("{prompt}", grammar.request(topic, words, rng)),
            "completion": in_tags(plan_line(words, plan), text)}


# ---------------------------------------------------------------- outlines

def draw_outline(topics, counts, rng):
    """(topics to cover in order, words): two or three topics that share neither person nor place,
    and at least 20 words for each."""
    words, outline = rng.choice([count for count in counts if count >= 40]), []
    number = 2 if words < 60 else rng.choice([2, 3])
    while len(outline) < number:
        outline.append(rng.choice([topic for topic in topics if not any(
            set(topic) & set(other) for other in outline)]))
    return outline, words


def outline_request(outline, words, rng):
    listed = ", then ".join(map(grammar.topic_name, outline))
    return rng.choice(grammar.REQUESTS).format(topic=listed, num=words)


def write_plans(outline, sentences, rng):
    """A keyword for each of the sentences that a topic of the outline has, by topic."""
    return [grammar.write_plan(topic, number * grammar.MEAN_WORDS, rng)
            for topic, number in zip(outline, sentences)]


def write_sections(outline, plans, words, rng):
    """A text of so many words with a section on each topic, by its plan."""
    sections, left = [], sum(map(len, plans))
    for topic, plan in zip(outline, plans):
        share = round(words / left * len(plan))
        words, left = words - share, left - len(plan)
        sections.append(grammar.write_text(topic, plan, rng, share))
    return "\n\n".join(sections)


def equal_shares(num_words, parts):
    """Sentences of a text for each of its parts."""
    sentences = max(parts, round(num_words / grammar.MEAN_WORDS))
    return [sum(due == part for due in places_due(sentences, parts)) for part in range(parts)]


def places_due(sentences, parts):
    """The part that each sentence is due to."""
    return [place * parts // sentences for place in range(sentences)]


def follows(text, outline):
    """The outline score, 0 to 1: the share of the sentences that are on the topic which is due,
    when each topic has as much room as the others, in the listed order."""
    sentences = [sentence for paragraph in grammar.split_text(text) for sentence in paragraph]
    due = places_due(len(sentences), len(outline))
    return sum(grammar.is_on_topic(sentence, outline[place])
               for sentence, place in zip(sentences, due)) / max(1, len(sentences))


def outline_prompt(topics, counts, number, rng):
    """A prompt row as the toy's, whose topics are in order."""
    outline, words = draw_outline(topics, counts, rng)
    return {"id": f"{words}-{number}", "prompt": outline_request(outline, words, rng),
            "length": range_around(words), "topics": outline}


def outline_completion(topics, counts, rng, template, is_clean):
    """{"prompt", "completion"}, as make.py's completion_row: a clean one follows the outline and
    keeps to the length; of the others half do, and any may have faults."""
    outline, words = draw_outline(topics, counts, rng)
    prompt, covered, written = outline_request(outline, words, rng), outline, words
    is_planned = is_clean or rng.random() < 0.5
    if not is_planned:
        written = rng.choice(counts)
        covered = rng.sample(outline, rng.randint(1, len(outline)))
    plans = write_plans(covered, equal_shares(written, len(covered)), rng)
    text = write_sections(covered, plans, round(written * rng.uniform(0.95, 1.05)), rng)
    think = f"A story of {grammar.topic_name(covered[0])}"
    if is_planned:
        think = plan_line(words, sum(plans, []))
    if not is_clean:
        text = spoil_half(text, covered[0], rng)
    completion = in_tags(think, text)
    if template == "think" and not is_clean:
        completion = dress(think, text, rng)
    elif template == "direct":  # as many faults in the tags as with a plan
        fault = "none" if is_clean else rng.choice(["none"] * 4 + ["open answer", "no tags"])
        completion = {"none": f"\n<answer>\n{text}\n</answer>", "no tags": f"\n{text}",
                      "open answer": f"\n<answer>\n{text}"}[fault]
    return {"prompt": TEMPLATES[template].replace("{prompt}", prompt), "completion": completion}


def outline_pair(topics, counts, rng):
    """{"prompt", "chosen", "rejected"}: a text that follows its outline against one of its length
    that has the topics in another order, or not all, or unequally, or that is spoiled."""
    outline, words = draw_outline(topics, counts, rng)
    shares = equal_shares(words, len(outline))
    chosen = write_sections(outline, write_plans(outline, shares, rng), words, rng)
    fault, topics = rng.choice(["order", "missing", "unequal", "spoiled"]), list(outline)
    if fault == "spoiled":
        rejected = grammar.spoil(chosen, outline[0], rng, rng.uniform(0.2, 1), rng.choice(
            ["off_topic", "drifting", "repetitive", "shuffled", "broken"]))
    else:
        if fault == "order":
            topics.reverse()
        elif fault == "missing":
            gone = rng.randrange(len(topics))
            topics[gone] = topics[gone - 1]
        elif sum(shares) > len(shares):
            shares = [1] * (len(shares) - 1) + [sum(shares) - len(shares) + 1]
            rng.shuffle(shares)
        rejected = write_sections(topics, write_plans(topics, shares, rng), words, rng)
    return {"prompt": outline_request(outline, words, rng), "chosen": chosen,
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
    write_rows(out / "thoughts.jsonl", [completion_row(topics, long_counts, rng, is_clean=True)
                                        for _ in some])
    write_rows(out / "sft.jsonl", [completion_row(topics, counts, rng, is_clean=True)
                                   for _ in range(config["sft"])])
    write_rows(out / "flawed.jsonl", [flawed_row(topics, counts, rng)
                                      for _ in range(config["sft"])])

    outline = out / "outline"
    for name, is_clean in (("clean", True), ("mixed", False)):
        write_rows(outline / f"{name}.jsonl", [
            outline_completion(topics, counts, rng, ("think", "direct")[place % 2], is_clean)
            for place in range(config["completions"])])
    write_rows(outline / "pairs.jsonl", [outline_pair(topics, counts, rng)
                                         for _ in range(config["pairs"])])
    write_rows(outline / "held_out_pairs.jsonl", [outline_pair(held_topics, held_counts, rng)
                                                  for _ in range(400)])
    for name, some_topics, some_counts, number in (
            ("prompts", topics, counts, config["prompts"]),
            ("held_out", held_topics, held_counts, 40)):
        write_rows(outline / f"{name}.jsonl", [outline_prompt(some_topics, some_counts, place, rng)
                                               for place in range(number)])


if __name__ == "__main__":
    main()
