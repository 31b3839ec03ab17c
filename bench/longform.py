"""Pretraining on real prose: does the loss fall on stories of prompts that it never saw?

    python bench/longform.py data=longform.jsonl.gz        # ten minutes on two cores

data: rows {"prompt", "text"}, the EQ-Bench longform stories: 8 prompts, about 50 models each. Two
prompts are held out. Tokenizer and model (about 4 million parameters) start from nothing. Prints
val_loss as it falls, and the last checkpoint's loss by transformers on the same rows.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "toy")]

import torch
import transformers

import make
import pretrain
from model import (count_parameters, find_commit, load_config, load_tokenizer, parse_config,
                   script, setup)
from sample import load_rows, read_done

CONFIG = dict(
    data="longform.jsonl.gz",
    out="out/longform",
    held_out=2,          # prompts
    val_stories=24,      # of theirs, evenly spread, so that an evaluation takes seconds
    vocab=4096,
    hidden=224,
    layers=6,
    seq_len=1024,
    batch_rows=8,
    steps=200,
)


def split_rows(rows, held_out):
    """(train, held out) texts, by prompt."""
    prompts = sorted({row["prompt"] for row in rows})
    last = set(prompts[-held_out:])
    return ([{"text": row["text"]} for row in rows if (row["prompt"] in last) == is_last]
            for is_last in (False, True))


def make_model(folder, texts, config):
    """A folder with a tokenizer trained on the texts and a config, for init=random."""
    folder.mkdir(parents=True, exist_ok=True)
    make.make_tokenizer(folder, texts, config["vocab"])
    C = config["hidden"]
    (folder / "config.json").write_text(json.dumps(make.ARCHITECTURE | dict(
        vocab_size=config["vocab"], hidden_size=C, intermediate_size=C * 8 // 3,
        num_hidden_layers=config["layers"], num_attention_heads=C // 32,
        num_key_value_heads=1, max_position_embeddings=config["seq_len"])))


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
    config = parse_config(CONFIG, argv, dict(held_out=1, steps=1))
    out = Path(config["out"])
    train, held_out = split_rows(load_rows(config["data"], lambda row, number: row),
                                 config["held_out"])
    held_out = held_out[::max(1, len(held_out) // config["val_stories"])]
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
