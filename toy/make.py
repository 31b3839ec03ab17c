"""Remake the toy from nothing: tokenizer, prompts, base model, reward model.

    python toy/make.py                 writes toy/policy, toy/reward and the toy's rows
    python toy/make.py out=/tmp/toy    the same, elsewhere; 38 minutes on two cores

The same command goes on where it stopped. After a change remove `work` first.

The base model is pretrained twice. First on clean completions, which plan, keep to the plan and
to the requested length: a model this small needs them to learn to copy from prompt and plan at
all. Then on completions of mixed quality, as a base model's corpus is: one in five follows a
plan, a third break the tags, half drift off topic, repeat themselves or shuffle their words. In
both a wrong word slips in here and there, and the text goes on: a model that never read past one
is lost as soon as it samples one. What comes out knows how to do everything, and rarely does it.
The policy is this base with its logits scaled up, since a model this small leaves too much to words
that do not fit. The reward model starts from the base as it is. It learns from honest texts against
spoiled ones: by the grammar's faults, and by sentences that models wrote: the base, and one that
GRPO drove too fast, without a reward model, until it broke.
Topics (pairings of a person and a place) and word counts of the held-out prompts are in no row
that any training sees.
"""
import gzip
import json
import math
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import grammar
import grpo
import pretrain
import reward
import torch
from tqdm import tqdm

from model import load_for_sampling, parse_config, save_folder, script, setup
from sample import (STOP_STRINGS, TEMPLATES, Stops, count_words, encode_prompts, find_answer,
                    generate)

CONFIG = dict(
    out="toy",             # where the toy goes
    work="out/toy",        # where the training runs and their rows go
    clean=24_000,          # completions to pretrain on, first these,
    mixed=16_000,          # then these
    drafts=6_000,          # texts of the models' own, whose faults
    pairs=70_000,          # preference pairs show beside the grammar's
    clean_steps=1600,      # of pretraining, 8k tokens each
    mixed_steps=400,
    sharpen=1.15,          # times the logits of the policy
    rehearsal_steps=60,    # of GRPO without a reward model, until sentences break
    reward_steps=1400,     # of Bradley-Terry training
    vocab=1600,            # tokens
    seed=0,
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # Qwen's
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]  # a token each, as Qwen3 has the first two
ARCHITECTURE = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu", hidden_size=128,
    intermediate_size=320, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=1024, rms_norm_eps=1e-6, rope_theta=10_000.0, attention_dropout=0.0,
    tie_word_embeddings=True, use_sliding_window=False, torch_dtype="float32")
PLAN_SLIPS, TEXT_SLIPS = 0.02, 0.003  # odds of a slip after a word
FAULTS = ["off_topic", "drifting", "repetitive", "shuffled", "broken", "broken"]
MIN_DRAFT = 12  # words
RANGE = 0.1  # a prompt's range is its count, give or take this share


# ---------------------------------------------------------------- rows

def range_around(words):
    """[lo, hi] of a request for so many words."""
    return [math.ceil(words * (1 - RANGE)), int(words * (1 + RANGE))]


def prompt_rows(topics, counts, num_rows, rng):
    """Prompt rows with counts spread evenly; "topic" is there for the gold score alone."""
    rows = []
    for number in range(num_rows):
        topic, words = rng.choice(topics), counts[number * len(counts) // num_rows]
        rows.append({"id": f"{words}-{number}", "prompt": grammar.request(topic, words, rng),
                     "length": range_around(words), "topic": topic})
    rng.shuffle(rows)
    return rows


def spoil_half(text, topic, rng):
    """Half of the texts stay honest; the others lose some of their sentences to a fault."""
    fault = rng.choice(["none", "none", "none", "off_topic", "repetitive", "shuffled"])
    share = rng.uniform(0.2, 1.0)
    return text if fault == "none" else grammar.spoil(text, topic, rng, share, fault)


def plan_line(words, plan):
    return f"{words} words in {len(plan)} parts: {' '.join(plan)}"


def with_slips(words, rng, odds):
    """The words, some of which have one to three pieces behind them that do not belong there."""
    def slip():
        word = rng.choice(grammar.VOCABULARY)
        piece = rng.choice([word, word, word[rng.randrange(len(word)):], rng.choice(",.0123")])
        return rng.choice(["", " ", " "]) + piece

    return [word + "".join(slip() for _ in range(rng.choice([1, 1, 2, 3])))
            if rng.random() < odds else word for word in words]


def in_tags(think, text):
    return f"\n<think>{think}</think>\n<answer>\n{text}\n</answer>"


def dress(think, text, rng):
    """The completion in its tags, a third of the time with a fault in them."""
    fault = rng.choice(["none"] * 9 + ["no think", "open think", "open answer", "no tags"])
    if fault == "no tags":
        return f"\n{text}"
    opening = {"no think": "", "open think": f"\n<think>{think}"}.get(
        fault, f"\n<think>{think}</think>")
    return f"{opening}\n<answer>\n{text}" + "\n</answer>" * (fault != "open answer")


def completion_row(topics, counts, rng, is_clean):
    """{"prompt", "completion"}: a clean one plans to the requested length, keeps to it, and has
    no fault; of the others one in five does, and any may have faults."""
    topic, words = rng.choice(topics), rng.choice(counts)
    is_planned = is_clean or rng.random() < 0.2
    written = words if is_planned else round(math.exp(rng.uniform(math.log(12), math.log(260))))
    plan = grammar.write_plan(topic, written, rng)
    think = f"A story of {grammar.topic_name(topic)}"
    if is_planned:
        think = plan_line(words, with_slips(plan, rng, PLAN_SLIPS))
    text = grammar.write_text(topic, plan, rng, round(written * rng.uniform(0.95, 1.05)))
    if not is_clean:
        text = spoil_half(text, topic, rng)
    text = " ".join(with_slips(text.split(" "), rng, TEXT_SLIPS))
    prompt = TEMPLATES["think"].replace("{prompt}", grammar.request(topic, words, rng))
    completion = in_tags(think, text) if is_clean else dress(think, text, rng)
    return {"prompt": prompt, "completion": completion}


def honest_text(topic, words, rng):
    return grammar.write_text(topic, grammar.write_plan(topic, words, rng), rng, words)


def held_pair_row(topics, counts, rng, fault):
    """An honest text against one of its length with every sentence spoiled."""
    topic, words = rng.choice(topics), rng.choice(counts)
    text = honest_text(topic, words, rng)
    return {"prompt": grammar.request(topic, words, rng), "chosen": text,
            "rejected": grammar.spoil(text, topic, rng, 1.0, fault)}


def write_drafts(folder, topics, counts, num_drafts, temperature, rng):
    """[(topic, what the model in a folder writes about it)]."""
    model, tokenizer = load_for_sampling(folder, setup())
    stops = Stops(tokenizer, STOP_STRINGS, model.num_tokens)
    asked = [rng.choice(topics) for _ in range(num_drafts)]
    rows = [{"id": place, "prompt": grammar.request(topic, rng.choice(counts), rng)}
            for place, topic in enumerate(asked)]
    context = ARCHITECTURE["max_position_embeddings"]
    prompts = encode_prompts(tokenizer, "think", rows, context, max_tokens=400)
    work = tqdm([(place, 0) for place in range(num_drafts)], unit="draft")
    written = generate(model, prompts, work, stops, 400, slots=128, temperature=temperature)
    drafts = [(asked[c.prompt], find_answer(tokenizer.decode(c.tokens), "think"))
              for c in sorted(written, key=lambda c: c.prompt)]
    return [(topic, text) for topic, text in drafts if count_words(text) >= MIN_DRAFT]


def pair_row(topics, counts, drafts, rng):
    """{"prompt", "chosen", "rejected"}: an honest text with one fault, or two, in two degrees;
    half of the time none in the chosen one. Most faults are a draft's sentences in the place of
    the text's own: the faults of a model are not the faults that one thinks of."""
    topic, draft = rng.choice(drafts) if rng.random() < 0.6 else (rng.choice(topics), "")
    words = min(rng.choice(counts), rng.choice(counts))  # short texts teach as much, and cost less
    text = honest_text(topic, words, rng)
    faults = rng.sample(FAULTS, rng.choice([1, 1, 2]))

    def spoil(share):
        if draft and share:
            return grammar.mixed(text, rng, share, draft)
        spoiled = text
        for fault in faults if share else []:
            spoiled = grammar.spoil(spoiled, topic, rng, share, fault)
        return spoiled

    least = rng.choice([0.0, rng.uniform(0.1, 0.7)])
    most = rng.uniform(least + (0.2 if least else 0.1), 1.0)
    return {"prompt": grammar.request(topic, words, rng), "chosen": spoil(least),
            "rejected": spoil(most)}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    # no time stamp in the archive: the same rows are the same bytes
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


# ---------------------------------------------------------------- tokenizer and models

def make_tokenizer(folder, texts, vocab):
    """A byte-level BPE with Qwen's pre-tokenizer (each digit alone) and special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
             r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab - len(TAGS), special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens(TAGS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|endoftext|>",
                    pad_token="<|endoftext|>", bos_token=None, unk_token=None,
                    model_max_length=ARCHITECTURE["max_position_embeddings"],
                    additional_special_tokens=SPECIAL_TOKENS[1:],
                    clean_up_tokenization_spaces=False, add_prefix_space=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def last_checkpoint(run, steps):
    """Its folder; ends here when a signal has stopped the run before."""
    folder = (run / "latest").resolve()
    if folder.name != f"checkpoint-{steps:06}":
        sys.exit(f"{run}: stopped before step {steps}; the same command goes on")
    return folder


@torch.no_grad()
def sharpen(source, folder, factor):
    """Write a model's folder with its logits multiplied, by the weight of its last norm."""
    model, _ = load_for_sampling(source, setup())
    model.model.norm.weight *= factor
    save_folder(model, folder, model.model.norm.weight.dtype)


@script
def main(argv):
    config = parse_config(CONFIG, argv)
    out, work, rng = Path(config["out"]), Path(config["work"]), random.Random(config["seed"])
    topics, held_topics = grammar.split_topics()
    counts, held_counts = grammar.split_counts()
    write_rows(out / "prompts.jsonl", prompt_rows(topics, counts, 2000, rng))
    write_rows(out / "held_out.jsonl", prompt_rows(held_topics, held_counts, 40, rng))
    clean, mixed = ([completion_row(topics, counts, rng, is_clean) for _ in range(number)]
                    for number, is_clean in ((config["clean"], True), (config["mixed"], False)))
    held_pairs = [held_pair_row(held_topics, held_counts, rng, fault) for _ in range(100)
                  for fault in ("off_topic", "repetitive", "shuffled", "broken")]
    write_rows(work / "clean.jsonl", clean)
    write_rows(work / "mixed.jsonl", mixed)
    write_rows(out / "text.jsonl.gz", mixed[:1000])  # a sample, for pretrain.py's default run
    write_rows(out / "held_out_pairs.jsonl.gz", held_pairs)

    seed_folder = work / "random"
    seed_folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(seed_folder, (row[key] for row in clean + mixed for key in row),
                               config["vocab"])
    end = tokenizer.token_to_id("<|endoftext|>")
    ids = dict(eos_token_id=end, pad_token_id=end)
    (seed_folder / "config.json").write_text(json.dumps(
        ARCHITECTURE | ids | {"vocab_size": tokenizer.get_vocab_size()}, indent=2) + "\n")
    (seed_folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")

    shared = [f"seed={config['seed']}", "beta2=0.99", "weight_decay=0.01"]
    text = [*shared, "batch_rows=16", "micro_rows=16", "save_every=10000",
            f"cache={work / 'tokens'}"]
    pretrain.main([f"model={seed_folder}", "init=random", f"data={work / 'clean.jsonl'}",
                   f"out={work / 'clean'}", f"steps={config['clean_steps']}", "lr=3e-3",
                   "warmup=50", *text])
    clean_base = last_checkpoint(work / "clean", config["clean_steps"])
    pretrain.main([f"model={clean_base}", f"data={work / 'mixed.jsonl'}",
                   f"out={work / 'mixed'}", f"steps={config['mixed_steps']}", "lr=1e-3",
                   "warmup=20", *text])
    base = last_checkpoint(work / "mixed", config["mixed_steps"])
    grpo.main([f"model={base}", "reward_model=",
               f"prompts={out / 'prompts.jsonl'}", f"eval_prompts={out / 'held_out.jsonl'}",
               f"out={work / 'rehearsal'}", f"steps={config['rehearsal_steps']}", "lr=7e-4",
               "save_every=10", "keep=100", f"seed={config['seed']}"])
    last_checkpoint(work / "rehearsal", config["rehearsal_steps"])
    writers = [(base, 1.0), (base, 1.2)] + [
        (folder, 1.0) for folder in sorted((work / "rehearsal").glob("checkpoint-*"))]
    drafts = [draft for folder, temperature in writers for draft in write_drafts(
        folder, topics, counts, config["drafts"] // len(writers), temperature, rng)]
    pairs = [pair_row(topics, counts, drafts, rng) for _ in range(config["pairs"])]
    write_rows(work / "pairs.jsonl", pairs)
    write_rows(out / "pairs.jsonl.gz", pairs[:1000])  # a sample, for reward.py's default run
    reward.main([f"model={base}", f"pairs={work / 'pairs.jsonl'}",
                 f"val_pairs={out / 'held_out_pairs.jsonl.gz'}", f"out={work / 'reward'}",
                 f"steps={config['reward_steps']}", "batch_pairs=48", "lr=1e-3", *shared])
    trained = last_checkpoint(work / "reward", config["reward_steps"])
    sharpen(base, out / "policy", config["sharpen"])
    shutil.rmtree(out / "reward", ignore_errors=True)
    shutil.copytree(trained, out / "reward", ignore=shutil.ignore_patterns("state"))


if __name__ == "__main__":
    main()
