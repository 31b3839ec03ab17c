"""Pretraining on real prose: does the loss fall on stories of prompts that it never saw?

    python bench/longform.py data=longform.jsonl.gz        # ten minutes on two cores
    bash runs/stories_1gpu.sh data=longform.jsonl.gz       # pieces to length, then GRPO

data: rows {"prompt", "plan", "text"}, the EQ-Bench longform stories: 8 prompts, about 50 models
each. Two prompts are held out. Tokenizer and model (about 4 million parameters) start from nothing.
Prints val_loss as it falls, and the last checkpoint's loss by transformers on the same rows.

With pieces= it only writes what runs/stories_1gpu.sh trains on: start/ (tokenizer and config), rows
{"prompt", "plan", "text"} of pieces of the stories whose length their prompt states (train.jsonl,
held_out.jsonl), and prompts for GRPO (prompts.jsonl, held_out_prompts.jsonl). A text is cut at
paragraph ends and comes in numbered parts, which its plan counts: a small model cannot count to
3,000 words, but it can learn how long a part is, and which number it has come to.
"""
import json
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "toy")]

import numpy as np
import torch
import transformers

import make
import pretrain
from model import (count_parameters, find_commit, load_config, load_tokenizer, parse_config,
                   script, setup)
from reward import format_fault
from sample import TEMPLATES, count_words, load_rows, read_done

CONFIG = dict(
    data="longform.jsonl.gz",
    out="out/longform",
    held_out=2,          # prompts
    val_stories=24,      # of theirs, evenly spread, so that an evaluation takes seconds
    vocab=4096,
    hidden=224,
    layers=6,
    heads=7,
    kv_heads=1,
    seq_len=1024,        # also the model's context
    batch_rows=8,
    steps=200,
    pieces=0,            # of each story, with prompt and plan; 0: whole stories, and pretrain
    words=[500, 3000],   # of a piece and of a request, from and to
    part=250,            # words of a part of a text, about
    prompts=600,         # for GRPO
    eval_prompts=24,
    seed=0,
)
CHAPTERS = 8  # of a story, all of about the same length
CHAPTER = re.compile(r"(?im)^[^a-z\n]*(chapter (\d+)\b.*)")  # a line of the story's plan
TRIES = 50    # to find a piece, for each that is wanted


def split_rows(rows, held_out):
    """(train, held out) rows, by prompt."""
    prompts = sorted({row["prompt"] for row in rows})
    last = set(prompts[-held_out:])
    return ([row for row in rows if (row["prompt"] in last) == is_last]
            for is_last in (False, True))


def request(prompt, words):
    return f"{prompt}\n\nWrite {words} words of it."


def draw_words(low, high, rng):
    return 10 * round(rng.uniform(low, high) / 10)


def chapter_lines(plan):
    """{number: what the story's plan says of this chapter, its longest line, up to 30 words}."""
    lines = {}
    for line, number in CHAPTER.findall(plan):
        words = re.sub(r"\*|\([^)]*words\)", "", line).split()[:30]  # not its own counts
        lines[int(number)] = max(lines.get(int(number), ""), " ".join(words), key=len)
    return lines


def dress_piece(paragraphs, words, before, whole, asked, part, chapters):
    """(plan, text, parts as planned) of paragraphs with so many words each, before words into a
    story of `whole`: the parts' numbers in the text, and in the plan where a chapter begins."""
    parts = max(1, round(asked / part))
    plan, text = [f"{asked} words in {parts} parts of {asked // parts}."], []
    number, chapter, done = 0, None, 0
    for paragraph, count in zip(paragraphs, words):
        if done * parts >= number * sum(words):
            number += 1
            text.append(str(number))
            here = 1 + CHAPTERS * (before + done) // whole
            if here != chapter:
                plan.append(f"From part {number}: {chapters.get(here, f'Chapter {here}')}")
            chapter = here
        text.append(paragraph)
        done += count
    return "\n".join(plan), "\n\n".join(text), number == parts


def cut_story(row, config, rng):
    """Up to `pieces` rows {"prompt", "plan", "text"}: pieces that begin and end with a paragraph,
    as long as their prompt says by the range that GRPO asks for."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", row["text"]) if part.strip()]
    words = [count_words(paragraph) for paragraph in paragraphs]
    ends, chapters, found = np.cumsum([0, *words]), chapter_lines(row["plan"]), []
    for _ in range(TRIES * config["pieces"]):
        if len(found) == config["pieces"]:
            break
        asked, first = draw_words(*config["words"], rng), rng.randrange(len(words))
        last = int(np.abs(ends - ends[first] - asked).argmin())
        if abs(ends[last] - ends[first] - asked) > make.RANGE * asked:
            continue  # a paragraph is too long, or the story ends before
        plan, text, is_whole = dress_piece(paragraphs[first:last], words[first:last], ends[first],
                                           ends[-1], asked, config["part"], chapters)
        if is_whole and not format_fault(f"<think>{plan}</think><answer>{text}</answer>"):
            found.append({"prompt": request(row["prompt"], asked), "plan": plan, "text": text})
    return found


def prompt_rows(rows, count, low, high, rng):
    """{"id", "prompt", "length"} of the rows' prompts, with word counts spread evenly."""
    prompts, spread = sorted({row["prompt"] for row in rows}), np.linspace(low, high, count)
    asked = [(prompts[place % len(prompts)], 10 * round(words / 10))
             for place, words in enumerate(spread)]
    found = [{"id": f"{words}-{place}", "prompt": request(prompt, words),
              "length": make.range_around(words)}
             for place, (prompt, words) in enumerate(asked)]
    rng.shuffle(found)
    return found


def write_pieces(out, train, held_out, config):
    """What runs/stories_1gpu.sh trains on; the tokenizer reads the stories to train alone."""
    rng = random.Random(config["seed"])
    make_model(out / "start", [TEMPLATES["think"]] + [
        row[key] for row in train for key in ("prompt", "plan", "text")], config)
    for name, rows, count in (("train", train, config["pieces"]), ("held_out", held_out, 4)):
        pieces = [piece for row in rows
                  for piece in cut_story(row, config | {"pieces": count}, rng)]
        rng.shuffle(pieces)
        make.write_rows(out / f"{name}.jsonl", pieces)
        print(f"{out / name}.jsonl: {len(pieces):,} pieces of {len(rows)} stories, "
              f"{sum(count_words(piece['text']) for piece in pieces):,} words")
    for name, rows, count in (("prompts", train, config["prompts"]),
                              ("held_out_prompts", held_out, config["eval_prompts"])):
        make.write_rows(out / f"{name}.jsonl", prompt_rows(rows, count, *config["words"], rng))


def make_model(folder, texts, config):
    """A folder with a tokenizer trained on the texts and a config, for init=random."""
    folder.mkdir(parents=True, exist_ok=True)
    make.make_tokenizer(folder, texts, config["vocab"])
    C = config["hidden"]
    (folder / "config.json").write_text(json.dumps(make.ARCHITECTURE | dict(
        vocab_size=config["vocab"], hidden_size=C, intermediate_size=C * 8 // 3,
        num_hidden_layers=config["layers"], num_attention_heads=config["heads"],
        num_key_value_heads=config["kv_heads"], max_position_embeddings=config["seq_len"])))


@torch.no_grad()
def loss_by_transformers(folder, documents):
    """Mean loss of rows by a second implementation, each document's piece alone."""
    model, total, count = transformers.AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    for number in range(documents.num_rows):
        tokens, targets, lengths = (torch.tensor(part).long() for part in documents.row(number))
        logits = torch.cat([model(piece[None]).logits[0]
                            for piece in tokens.split(lengths.tolist())])
        total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1,
                                                   reduction="sum").item()
        count += int((targets >= 0).sum())
    return total / count


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(held_out=1, steps=1, pieces=0, part=1, prompts=1,
                                             eval_prompts=1))
    out = Path(config["out"])
    train, held_out = split_rows(load_rows(config["data"], lambda row, number: row),
                                 config["held_out"])
    held_out = held_out[::max(1, len(held_out) // config["val_stories"])]
    if config["pieces"]:
        return write_pieces(out, train, held_out, config)
    train, held_out = ([{"text": row["text"]} for row in rows] for rows in (train, held_out))
    make_model(out / "start", (row["text"] for row in train), config)
    make.write_rows(out / "train.jsonl", train)
    make.write_rows(out / "held_out.jsonl", held_out)
    pretrain.main([
        f"model={out / 'start'}", "init=random", f"data={out / 'train.jsonl'}",
        f"val_data={out / 'held_out.jsonl'}", f"cache={out / 'tokens'}", f"out={out / 'run'}",
        f"seq_len={config['seq_len']}", f"batch_rows={config['batch_rows']}",
        f"steps={config['steps']}", f"eval_every={max(1, config['steps'] // 4)}", "lr=3e-3",
        "warmup=30"])
    last = out / "run" / "latest"
    documents = pretrain.Documents([out / "held_out.jsonl"], load_tokenizer(last),
                                   config["seq_len"], 0, out / "tokens", setup())
    rows = [row for row in read_done(out / "run" / "log.jsonl") if "val_loss" in row]
    print(f"commit {find_commit()}, torch {torch.__version__}, "
          f"{count_parameters(load_config(last)[1]):,} parameters, {len(train)} stories to train, "
          f"{len(held_out)} held out ({len(documents.tokens):,} tokens)")
    print("\n| step | tokens | loss | val_loss |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['step']} | {row['tokens']:,} | {row['loss']:.3f} | {row['val_loss']:.4f} |")
    print(f"\nval_loss of the last by transformers: {loss_by_transformers(last, documents):.4f}")


if __name__ == "__main__":
    main()
