"""Next-token training on text, and the machinery that every training script shares.

    python pretrain.py model=FOLDER data=text.jsonl steps=1000
    torchrun --nproc_per_node 8 pretrain.py model=FOLDER data=text.jsonl
    python pretrain.py model=FOLDER data=text.jsonl init=random   # FOLDER: config.json, tokenizer

Rows are {"text"}, trained on whole, or {"prompt", "completion"}, trained on the completion.
Documents are shuffled each epoch, joined, each ended by the end-of-text token, and cut into rows
of seq_len tokens. Attention never crosses from one document to another.

1. A run is a folder: config.json, log.jsonl, curves.png, checkpoint-NNNNNN/ (a Hugging Face
   folder, with state/ to go on from), `latest` and `best`. The same command resumes it.
2. All randomness is a function of (seed, step), so there is no random state to save.
3. The loss is the mean over the tokens of all ranks, normalised once per optimizer step.
"""
import json
import math
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

from model import (InputError, load_config, load_for_training, load_tokenizer,
                   memory_plan, open_folder, parse_config, save_folder, script, setup)
from sample import load_rows, read_done

TRAINING = dict(  # keys that every training script has
    resume=True,        # go on from out/latest; false refuses a folder that holds a run
    seed=0,
    weight_decay=0.1,   # on matrices only
    beta2=0.95,         # of AdamW
    clip=1.0,           # gradient norm
    warmup=10,          # steps of linear warm-up
    save_every=100,     # steps
    eval_every=100,     # steps
    keep=2,             # newest checkpoints to keep; the best one stays besides
    save_dtype="",      # of the exported weights: float32 on CPU, bfloat16 on CUDA unless set
    max_hours=0.0,      # save and stop after this long; 0 is no limit
    plan=False,         # print parameters and bytes, and stop
)
CONFIG = dict(
    model="toy/policy",         # folder or hub name
    data="toy/text.jsonl.gz",   # rows to train on
    val_data="",                # rows for val_loss every eval_every steps
    out="out/pretrain",         # the run's folder
    init="folder",              # random: model is a folder with only config.json and tokenizer
    steps=200,
    seq_len=512,                # tokens a row
    batch_rows=32,              # rows a step, over all ranks
    micro_rows=8,               # rows a forward pass, on each rank
    lr=1e-3,
    schedule="cosine",          # or constant, inverse_sqrt
    **TRAINING,
)
MAY_DIFFER = {"steps", "save_every", "eval_every", "keep", "max_hours", "plan"}
TRAINING_LIMITS = dict(steps=1, lr=0, warmup=0, save_every=1, eval_every=1, keep=1, max_hours=0,
                       clip=0, weight_decay=0, beta2=(0, 1),
                       schedule=["cosine", "constant", "inverse_sqrt"],
                       save_dtype=["", "float32", "bfloat16", "float16"])


# ---------------------------------------------------------------- optimizer and schedule

def make_optimizer(model, weight_decay, beta2):
    """Fused AdamW that decays matrices only. The caller sets the learning rate at each step."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), fused=True)


def learning_rate(step, steps, lr, warmup, schedule):
    """Of 1-based step: linear warm-up, then constant, falling as 1/sqrt(step), or a cosine to a
    tenth. Only the cosine depends on steps, so the others go on when a run is made longer."""
    if step <= warmup:
        return lr * step / warmup
    if schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return lr * (0.55 + 0.45 * math.cos(math.pi * min(done, 1)))
    return lr * math.sqrt(max(1, warmup) / step) if schedule == "inverse_sqrt" else lr


def apply_gradient(model, optimizer, lr, clip):
    """Clip the gradient, step, and return its norm before clipping. A gradient that is not
    finite changes nothing; its norm tells."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ---------------------------------------------------------------- the run: log, checkpoints, ends

class Run:
    """A run's folder: where its log and checkpoints go, where it resumes, when it has to stop."""

    def __init__(self, config, ranks):
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # dcp, alone: intended
        self.config, self.ranks, self.folder = config, ranks, Path(config["out"])
        self.is_main = ranks.rank == 0
        open_folder(config, ranks, MAY_DIFFER)
        self.start, self.stop_asked = time.time(), False
        self.meetings = self.rollouts = 0  # so that names in the store are used once
        latest = self.folder / "latest"
        self.checkpoint = latest.resolve() if latest.exists() else None
        self.state = {"step": 0}  # what a script saves beside the weights: small and JSON
        if self.checkpoint:
            self.state = json.loads((self.checkpoint / "state" / "run.json").read_text())
        self.step = self.state["step"]
        if self.is_main:
            self.cut_log()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)

    def cut_log(self):
        """Drop rows logged after the checkpoint that the run goes on from."""
        path = self.folder / "log.jsonl"
        logged = self.step if self.checkpoint and "unlogged" not in self.state else self.step - 1
        rows = [row for row in read_done(path) if row["step"] <= logged]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, path)

    def ask_to_stop(self, number, frame):
        if self.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now
        self.stop_asked = True

    def wants_stop(self):
        """This rank was signalled, or its hours are over; the others may not know yet."""
        hours = self.config["max_hours"]
        return self.stop_asked or bool(hours) and time.time() - self.start > hours * 3600

    def agree(self, flag):
        """Whether any rank raised the flag; all ranks wait here for the slowest."""
        self.meetings += 1
        return self.ranks.any(f"meeting/{self.meetings}", flag)

    def log(self, row):
        if self.is_main:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def restore(self, model, optimizer):
        """Load the fp32 weights and moments that the run goes on from; collective."""
        if self.checkpoint is None:
            return
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        dcp.load(state, checkpoint_id=self.checkpoint / "state", no_dist=self.ranks.world == 1)
        set_state_dict(model, optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
        if self.is_main:
            print(f"resumed from {self.folder / self.checkpoint.name}")

    def save(self, step, model, optimizer, is_best=False):
        """Write checkpoint-NNNNNN aside, sync it, rename it, then move the links; collective."""
        target = self.folder / f"checkpoint-{step:06d}"
        aside = target.with_suffix(".tmp")
        if not target.exists():
            if self.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            self.agree(False)
            default = "bfloat16" if self.ranks.device.type == "cuda" else "float32"
            dtype = getattr(torch, self.config["save_dtype"] or default)
            save_folder(model, aside, dtype)
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
            dcp.save(state, checkpoint_id=aside / "state", no_dist=self.ranks.world == 1)
        if self.is_main:
            if aside.exists():
                self.state["step"] = step
                (aside / "state" / "run.json").write_text(json.dumps(self.state))
                sync_folder(aside)
                os.replace(aside, target)
            for link in ["best"] * is_best + ["latest"]:
                point_link(self.folder / link, target.name)
            self.prune()
        self.agree(False)
        return target

    def prune(self):
        kept = {(self.folder / link).resolve().name for link in ("best", "latest")}
        checkpoints = sorted(self.folder.glob("checkpoint-??????"))
        for folder in checkpoints[:-self.config["keep"]]:
            if folder.name not in kept:
                shutil.rmtree(folder)


def sync_folder(folder):
    """Bring a folder's files, then its entries, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def point_link(link, target):
    """Replace a relative link in one step."""
    temporary = link.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def draw_curves(folder, panels):
    """curves.png from log.jsonl; panels: {title: [log keys]}, drawn over steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read_done(Path(folder) / "log.jsonl")
    columns = min(3, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, squeeze=False,
                                figsize=(4 * columns, 2.8 * -(-len(panels) // columns)))
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (title, keys) in zip(axes.flat, panels.items()):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            is_eval = key.startswith(("eval/", "val_"))
            axis.plot(*zip(*points) if points else ([], []), label=key,
                      marker="o" if is_eval else None, linewidth=2 if is_eval else 0.9)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    plt.close(figure)


def print_plan(config):
    """What a training run of this model needs, and nothing started."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    tokens = config.get("max_tokens") or config.get("seq_len") or config.get("max_len")
    _, model_config = load_config(config["model"])
    for name, value in memory_plan(model_config, world, 1, tokens).items():
        print(f"{name:<36} {value:>20,}")


def train(run, model, optimizer, accumulate, validate, panels, tokens):
    """Resume, then step until the steps are done or a rank has to stop; log, save and draw.

    accumulate(step) leaves a gradient and returns what to log, a loss at least; validate()
    returns more to log every eval_every steps; tokens: of a step, for the rate."""
    config = run.config
    if run.step >= config["steps"]:
        return print(f"{run.folder}: finished at step {run.step}")
    run.restore(model, optimizer)
    bar = tqdm(total=config["steps"], initial=run.step, disable=not run.is_main, unit="step")
    for step in range(run.step + 1, config["steps"] + 1):
        start, is_last = time.perf_counter(), step == config["steps"]
        row = {"step": step} | accumulate(step)
        row["lr"] = learning_rate(step, config["steps"], config["lr"], config["warmup"],
                                  config["schedule"])
        row["grad_norm"] = apply_gradient(model, optimizer, row["lr"], config["clip"])
        row["tokens_per_second"] = tokens / (time.perf_counter() - start)
        if is_last or step % config["eval_every"] == 0:
            row |= validate()
        run.log(row)
        bar.update()
        bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:.0f} tokens/s")
        stop = run.agree(run.wants_stop())
        if stop or is_last or step % config["save_every"] == 0:
            target = run.save(step, model, optimizer)
        if stop:
            break
    bar.close()
    if run.is_main:
        draw_curves(run.folder, panels)
        print(f"wrote {target}" if step == config["steps"]
              else f"stopped after step {step}, saved in {target}; the same command goes on")


# ---------------------------------------------------------------- rows of packed documents

def text_row(row, number):
    """("", text) or (prompt, completion) of a row."""
    if isinstance(row.get("text"), str):
        return "", row["text"]
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return row["prompt"], row["completion"]
    raise ValueError(f'expected {{"text"}} or {{"prompt", "completion"}}, found {sorted(row)}')


class Documents:
    """Documents as one vector of tokens, joined in a new order each epoch, read in rows.

    Every token but a document's first is a target once an epoch; a prompt's tokens never are."""

    def __init__(self, path, tokenizer, seq_len, seed):
        pairs = load_rows(path, text_row)
        encode = lambda texts: tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        prompts, texts = (encode(part) for part in zip(*pairs))
        self.documents = [(np.array(p + t + [tokenizer.eos_token_id], dtype=np.int32), len(p))
                          for p, t in zip(prompts, texts)]
        self.seq_len, self.seed, self.epoch = seq_len, seed, None
        self.num_rows = sum(len(d) for d, _ in self.documents) // seq_len
        if not self.num_rows:
            raise InputError(f"{path}: expected at least seq_len={seq_len} tokens, found fewer")

    def open_epoch(self, epoch):
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
        parts = [self.documents[i] for i in order]
        self.epoch = epoch
        self.tokens = np.concatenate([tokens for tokens, _ in parts])
        self.starts = np.cumsum([0] + [len(tokens) for tokens, _ in parts])
        self.is_target = np.concatenate([np.arange(len(tokens)) >= max(1, prompt)
                                         for tokens, prompt in parts])

    def row(self, number):
        """(tokens, targets, lengths of the documents' pieces) of a row, counted over epochs."""
        epoch, place = divmod(number, self.num_rows)
        if epoch != self.epoch:
            self.open_epoch(epoch)
        start, end = place * self.seq_len, (place + 1) * self.seq_len
        targets = np.full(self.seq_len, -1)
        following = slice(start + 1, end + 1)
        found = np.where(self.is_target[following], self.tokens[following], -1)
        targets[:len(found)] = found
        inside = self.starts[(self.starts > start) & (self.starts < end)]
        return self.tokens[start:end], targets, np.diff([start, *inside, end])


def to_pack(rows, device):
    """tokens (N,), targets (N,), cu_seqlens (S+1,) of several rows, for one forward pass."""
    tokens, targets, lengths = (np.concatenate(part) for part in zip(*rows))
    cu_seqlens = np.concatenate([[0], lengths.cumsum()])
    return (torch.tensor(tokens, dtype=torch.long, device=device),
            torch.tensor(targets, dtype=torch.long, device=device),
            torch.tensor(cu_seqlens, dtype=torch.int32, device=device))


def deal_evenly(items, ranks, size):
    """This rank's share of items in parts of at most `size`, as many parts on each rank: the
    collectives of FSDP must match. Some may be empty."""
    mine = items[ranks.rank::ranks.world]
    most = -(-len(items) // ranks.world)
    return [mine[start:start + size] for start in range(0, most, size)]


def next_token_loss(model, documents, numbers, ranks, micro_rows, train):
    """Mean loss over the targets of rows `numbers` on all ranks; with train, its gradient."""
    rows = [documents.row(n) for n in numbers]
    total = sum(int((targets >= 0).sum()) for _, targets, _ in rows)
    loss = 0.0
    for part in deal_evenly(rows, ranks, micro_rows):
        tokens, targets, cu_seqlens = to_pack(part or rows[:1], ranks.device)
        targets = targets if part else targets * 0 - 1  # without rows: take part, count nothing
        with torch.set_grad_enabled(train):
            logprobs, _ = model(tokens, cu_seqlens, targets=targets)
            mean = -logprobs.sum() / max(1, total)
        if train:
            (mean * ranks.world).backward()  # FSDP averages over ranks; the loss is a sum
        loss += mean.item()
    return sum(ranks.gather([loss]))


@script
def main(argv):
    config = parse_config(CONFIG, argv, TRAINING_LIMITS | dict(
        seq_len=2, batch_rows=1, micro_rows=1, init=["folder", "random"]))
    if config["plan"]:
        return print_plan(config)
    ranks = setup()
    if config["batch_rows"] % ranks.world:
        raise InputError(f"batch_rows={config['batch_rows']}: expected a multiple of the "
                         f"{ranks.world} ranks")
    tokenizer = load_tokenizer(config["model"])
    documents, val_documents = (
        Documents(config[key], tokenizer, config["seq_len"], config["seed"])
        if config[key] else None for key in ("data", "val_data"))
    model = load_for_training(config["model"], ranks,
                              seed=config["seed"] if config["init"] == "random" else None)
    optimizer = make_optimizer(model, config["weight_decay"], config["beta2"])
    batch = config["batch_rows"]
    loss = lambda documents, numbers, is_training: next_token_loss(
        model, documents, numbers, ranks, config["micro_rows"], is_training)

    def accumulate(step):
        tokens = step * batch * config["seq_len"]
        return dict(loss=loss(documents, range((step - 1) * batch, step * batch), True),
                    tokens=tokens)

    def validate():
        return dict(val_loss=loss(val_documents, range(val_documents.num_rows), False))

    train(Run(config, ranks), model, optimizer, accumulate, validate if val_documents else dict,
          {"loss": ["loss", "val_loss"], "gradient norm": ["grad_norm"]},
          tokens=batch * config["seq_len"])


if __name__ == "__main__":
    main()
