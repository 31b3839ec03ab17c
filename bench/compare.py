"""Side by side on the CPU: sampling and training against transformers, GRPO steps against TRL.

    pip install -r bench/requirements.txt
    python bench/compare.py                                  # all parts
    python bench/compare.py parts=train,memory
    python bench/compare.py parts=step curve_steps=120 seeds=[0,1,2]

Runs alternate (ours, theirs, ours, ...); the table shows medians and their ratio. Prompts, caps,
rewards (length and format, no reward model), group size, learning rate with its schedule and
threads are the same.
Peers run at their best settings found here, in fp32, without gradient checkpointing, logging or
saving; the settings are printed. Ours run as they are and with compile_decode=true, whose compiling
is not in the median; transformers' static cache, compiled or not, took longer than its dynamic one.

Ragged rows come in the file's order on both sides: how long a text becomes is not known before.
A second line gives the peer batches sorted by what will be their length.

Training: random weights (about 8 million parameters), documents of median 300 tokens in rows of
2,048. The peer is transformers' Qwen2 in a plain loop: full logits, position ids that start anew
and a mask of blocks for each row, made beforehand; rows that one document fills need neither.
Memory: the loss and its backward pass alone, beyond the head's weight and all gradients.

TRL stops at end-of-text only, so its model's generate gets the stop string </answer> as well:
without it, completions would run on after the answer on one side alone.
"""
import functools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import transformers
from tqdm import tqdm

import grpo
from h100 import pad_left, run_ours
from model import (ChunkedLogProbs, InputError, find_commit, load_for_sampling, load_model,
                   load_tokenizer, parse_config, script, setup)
from pretrain import apply_gradient, draw_places, make_optimizer, to_pack
from reward import rule_rewards
from sample import apply_template, encode_prompts, load_prompts

CONFIG = dict(
    model="toy/policy",
    prompts="toy/prompts.jsonl",
    parts="sample,ragged,step,train,memory",  # any of them
    runs=5,                      # of each side
    steps=4,                     # GRPO steps a run, after one to warm up
    curve_steps=0,               # steps of one long run of each side and seed, for its last rewards
    seeds=[0],                   # of the long runs: prompts and samples, on both sides
    threads=2,
)


def alternate(sides, runs):
    """{name: median seconds} of {name: function}, called in turns."""
    seconds = {name: [] for name in sides}
    for _ in tqdm(range(runs), unit="round"):
        for name, function in sides.items():
            start = time.perf_counter()
            found = function()
            seconds[name].append(found or time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_ratios(what, seconds, tokens=None):
    """A line for each of our sides; theirs is the last."""
    *ours, (_, theirs) = seconds.items()
    show = lambda s: f"{tokens / s:.0f} tokens/s" if tokens else f"{s:.2f} s"
    for name, mine in ours:
        print(f"| {name.replace('ours', what)} | {show(mine)} | {show(theirs)} | "
              f"{theirs / mine:.2f} |", flush=True)


# ---------------------------------------------------------------- sampling

def sample_ours(model, prompts, caps, compile_decode):
    seconds, num_tokens = run_ours(model, prompts, caps, compile_decode)
    assert num_tokens == sum(caps)
    return seconds


@torch.inference_mode()
def sample_theirs(model, prompts, caps, batch, order):
    """In batches, each until its longest is done; left padding."""
    for start in range(0, len(order), batch):
        part = order[start:start + batch]
        tokens, mask = pad_left([prompts[p] for p in part], "cpu")
        cap = max(caps[p] for p in part)
        model.generate(tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                       top_p=1.0, min_new_tokens=cap, max_new_tokens=cap, pad_token_id=0)


def compare_sampling(config, what, caps, is_sorted=False):
    ranks = setup()
    ours, tokenizer = load_for_sampling(config["model"], ranks)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(config["model"],
                                                               dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    rows = load_prompts(config["prompts"])[:len(caps)]
    prompts = encode_prompts(tokenizer, "think", rows, 1024, max(caps))
    order = sorted(range(len(caps)), key=lambda p: -caps[p]) if is_sorted else range(len(caps))
    best = {}
    for batch in (64, 32, 16):
        start = time.perf_counter()
        sample_theirs(theirs, prompts, caps, batch, order)
        best[batch] = time.perf_counter() - start
    batch = min(best, key=best.get)
    print(f"theirs: transformers generate, dynamic cache, batches of {batch} (of "
          f"{ {b: round(s, 1) for b, s in best.items()} } s)", file=sys.stderr)
    print_ratios(what, alternate({
        "ours": lambda: sample_ours(ours, prompts, caps, False),
        "ours, compiled": lambda: sample_ours(ours, prompts, caps, True),
        "theirs": lambda: sample_theirs(theirs, prompts, caps, batch, order)},
        config["runs"]), sum(caps))


# ---------------------------------------------------------------- GRPO steps

def grpo_ours(config, steps, compile_decode=False, seed=0):
    """(seconds of each step, {component: mean of each step})."""
    with tempfile.TemporaryDirectory() as out:
        arguments = [f"model={config['model']}", f"prompts={config['prompts']}", f"out={out}",
                     "reward_model=", f"seed={seed}", f"compile_decode={compile_decode}"]
        trainer = grpo.Trainer(parse_config(grpo.CONFIG, arguments), setup())
        rows, seconds = [], []
        for step in range(1, steps + 1):
            start = time.perf_counter()
            rows.append(trainer.update(step))
            seconds.append(time.perf_counter() - start)
            trainer.optimizer.zero_grad()
        trainer.bar.close()
    return seconds, {name: [row[f"reward/{name}"] for row in rows]
                     for name in ("length", "format")}


def grpo_theirs(config, steps, micro_batch=64, seed=0):
    """The same of TRL's GRPOTrainer, on the same prompts in the same order."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    ours = grpo.CONFIG
    tokenizer = load_tokenizer(config["model"])
    rows = load_prompts(config["prompts"])
    chosen = [rows[place] for step in range(1, steps + 1)
              for place in draw_places(len(rows), ours["num_prompts"], step, seed)]
    data = Dataset.from_list([{"prompt": apply_template(tokenizer, "think", row["prompt"]),
                               "length": row["length"]} for row in chosen])
    means, ends = {"length": [], "format": []}, [time.perf_counter()]

    def reward_function(name):
        def score(completions, length, **_):
            found = [rule_rewards(text, bounds)[name] for text, bounds in zip(completions, length)]
            means[name].append(float(np.mean(found)))
            return found
        score.__name__ = name
        return score

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        arguments = GRPOConfig(
            output_dir=out, use_cpu=True, bf16=False, gradient_checkpointing=False,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=64 // micro_batch,
            num_generations=ours["num_samples"], max_completion_length=ours["max_tokens"],
            max_steps=steps, learning_rate=ours["lr"], weight_decay=0.0,
            adam_beta2=ours["beta2"], lr_scheduler_type=ours["schedule"],
            warmup_steps=ours["warmup"], temperature=1.0, beta=0.0,
            multi_objective_aggregation="normalize_then_sum", reward_weights=[0.5, 0.5],
            shuffle_dataset=False, seed=seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(config["model"],
                                                                  dtype=torch.float32)
        trainer = GRPOTrainer(model, [reward_function("length"), reward_function("format")],
                              args=arguments, train_dataset=data, processing_class=tokenizer)
        model.generate = functools.partial(model.generate, tokenizer=tokenizer,
                                           stop_strings=["</answer>"])
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock())
        trainer.train()
    return np.diff(ends).tolist(), means


def compare_steps(config):
    steps = config["steps"] + 1
    micro = min((64, 16), key=lambda size: np.mean(grpo_theirs(config, 3, size)[0][1:]))
    print(f"theirs: TRL GRPOTrainer, normalize_then_sum, fp32, micro-batch {micro} (of 64 and 16),"
          " no gradient checkpointing, logging or saving", file=sys.stderr)
    print_ratios("a GRPO step, 64 samples, cap 400", alternate({
        "ours": lambda: np.mean(grpo_ours(config, steps)[0][1:]),
        "ours, compiled": lambda: np.mean(grpo_ours(config, steps, True)[0][1:]),
        "theirs": lambda: np.mean(grpo_theirs(config, steps, micro)[0][1:])}, config["runs"]))
    for seed in config["seeds"] if config["curve_steps"] else ():
        for name, function in (("ours", grpo_ours),
                               ("theirs", functools.partial(grpo_theirs, micro_batch=micro))):
            seconds, means = function(config, config["curve_steps"], seed=seed)
            last = ", ".join(f"{key} {np.mean(values[-10:]):.3f}" for key, values in means.items())
            print(f"{name}, seed {seed}: {len(seconds)} steps in {sum(seconds):.0f} s, "
                  f"last ten: {last}", flush=True)


# ---------------------------------------------------------------- training

TRAINED = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
               num_key_value_heads=2, vocab_size=8192, max_position_embeddings=2048,
               tie_word_embeddings=True)
ROW, ROWS = 2048, 4  # tokens a row, rows a step


def make_rows(rng, median):
    """Rows as pretrain.Documents.row gives them; documents log-normal, or of whole rows."""
    rows = []
    for _ in range(ROWS):
        lengths = np.array([ROW])
        if median < ROW:
            lengths = np.maximum(2, rng.lognormal(np.log(median), 0.7, 100).astype(int))
            lengths = lengths[:np.searchsorted(lengths.cumsum(), ROW) + 1]
            lengths[-1] -= lengths.sum() - ROW
        tokens = rng.integers(0, TRAINED["vocab_size"], ROW)
        targets = np.append(tokens[1:], -1)
        targets[lengths.cumsum() - 1] = -1
        rows.append((tokens, targets, lengths))
    return rows


def train_ours(model, optimizer, packs, count):
    for tokens, targets, cu_seqlens in packs:
        logprobs, _ = model(tokens, cu_seqlens, targets=targets)
        (-logprobs.sum() / count).backward()
    apply_gradient(model, optimizer, 1e-4, 1.0)


def to_packs(rows, size):
    """Rows for us, `size` at a time."""
    return [to_pack(rows[start:start + size], torch.device("cpu"))
            for start in range(0, len(rows), size)]


def train_theirs(model, optimizer, batches, count):
    for tokens, targets, positions, mask in batches:
        logits = model(tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
        (torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                           ignore_index=-1, reduction="sum") / count).backward()
    apply_gradient(model, optimizer, 1e-4, 1.0)


def to_batches(rows, size):
    """Rows for transformers, `size` at a time: tokens, targets, positions, mask or None."""
    batches = []
    for start in range(0, len(rows), size):
        tokens, targets, lengths = zip(*rows[start:start + size])
        number = torch.tensor(np.stack([np.repeat(np.arange(len(n)), n) for n in lengths]))
        positions = torch.tensor(np.stack([np.concatenate([np.arange(m) for m in n])
                                           for n in lengths]))
        mask = (number[:, None, :, None] == number[:, None, None, :]) & torch.ones(
            ROW, ROW, dtype=torch.bool).tril()
        is_plain = all(len(n) == 1 for n in lengths)
        batches.append((torch.tensor(np.stack(tokens)), torch.tensor(np.stack(targets)), positions,
                        None if is_plain else mask))
    return batches


def compare_training(config):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        made = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TRAINED))
        made.save_pretrained(folder)
        ours = load_model(folder, "cpu")
    theirs = made.train()
    optimizers = [make_optimizer(model, 0.1, 0.95) for model in (ours, theirs)]
    for what, median in (("documents of median 300 tokens", 300), ("documents of 2,048", ROW)):
        rows, sides = make_rows(rng, median), {}
        count = sum(int((targets >= 0).sum()) for _, targets, _ in rows)
        for name, step, split, model, optimizer in (
                ("ours", train_ours, to_packs, ours, optimizers[0]),
                ("theirs", train_theirs, to_batches, theirs, optimizers[1])):
            steps = {size: functools.partial(step, model, optimizer, split(rows, size), count)
                     for size in (1, 2, 4)}
            steps[1]()  # warm
            seconds = alternate(steps, 2)
            size = min(seconds, key=seconds.get)
            sides[name] = steps[size]
            print(f"{name}: {size} rows at a time, of "
                  f"{ {b: round(s, 2) for b, s in seconds.items()} } s; fp32, fused AdamW",
                  file=sys.stderr)
        print_ratios(f"training, {what}", alternate(sides, config["runs"]), ROW * ROWS)


def head_peak(is_ours, tokens, hidden=896, vocab=151_936):
    """Bytes that loss and backward pass take at their peak, beyond weight and gradients."""
    torch.manual_seed(0)
    x, weight = (torch.randn(n, hidden).mul_(0.02).requires_grad_() for n in (tokens, vocab))
    targets = torch.randint(vocab, (tokens,))

    def memory(kind):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts from here
    before = memory("VmRSS")
    if is_ours:
        loss = -ChunkedLogProbs.apply(x, weight, targets, 1.0)[0].mean()
    else:
        loss = torch.nn.functional.cross_entropy(x @ weight.T, targets)
    loss.backward()
    return memory("VmHWM") - before - 4 * (x.numel() + weight.numel()), loss.item()


def compare_memory(config):
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        (ours, loss), (theirs, expected) = (pool.apply(head_peak, (is_ours, 4096))
                                            for is_ours in (True, False))
    assert abs(loss - expected) < 1e-3
    print(f"| loss and backward, 4,096 tokens x 151,936 | {ours / 1e9:.2f} GB | "
          f"{theirs / 1e9:.2f} GB | {theirs / ours:.1f} |")
    print(f"| the same, 16,384 tokens, extrapolated | {ours / 1e9:.2f} GB | "
          f"{4 * theirs / 1e9:.2f} GB | {4 * theirs / ours:.1f} |")


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(runs=1, steps=1, threads=1))
    if not set(config["parts"].split(",")) <= set(CONFIG["parts"].split(",")):
        raise InputError(f"parts={config['parts']}: expected some of {CONFIG['parts']}")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(config["threads"])
    versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    if "step" in config["parts"]:
        import trl
        versions.append(f"trl {trl.__version__}")
    print(f"commit {find_commit()}, {', '.join(versions)}, {config['threads']} threads, median "
          f"of {config['runs']}\n\n| what | ours | theirs | ratio |\n|---|---|---|---|", flush=True)
    if "sample" in config["parts"]:
        compare_sampling(config, "64 prompts x 200 tokens", [200] * 64)
    if "ragged" in config["parts"]:
        lengths = np.random.default_rng(0).integers(20, 401, 64).tolist()
        compare_sampling(config, "64 prompts, 20 to 400 tokens", lengths)
        compare_sampling(config, "the same, the peer's batches sorted", lengths, is_sorted=True)
    if "step" in config["parts"]:
        compare_steps(config)
    if "train" in config["parts"]:
        compare_training(config)
    if "memory" in config["parts"]:
        compare_memory(config)


if __name__ == "__main__":
    main()
