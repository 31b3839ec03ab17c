"""Next-token training on text, and the machinery that every training script shares.

    python pretrain.py model=FOLDER data=text.jsonl steps=1000
    torchrun --nproc_per_node 8 pretrain.py model=FOLDER data=text.jsonl
    python pretrain.py model=FOLDER data=text.jsonl init=random   # FOLDER: config.json, tokenizer

    python pretrain.py data='{"books/*.jsonl": 0.99, "thoughts.jsonl": 0.01}' seq_len=32768

Rows are {"text"}, trained on whole; {"prompt", "completion"} or {"messages"}, trained on what the
assistant says; or {"prompt", "plan", "text"}: <think>plan</think><answer>text</answer>.
Documents are tokenised once, into `cache`, each ended by the end-of-text token, joined, and cut
into rows of seq_len tokens. Attention never crosses from one document to another.

1. A run is a folder: config.json, log.jsonl, curves.png, checkpoint-NNNNNN/ (a Hugging Face
   folder, with state/ to go on from), `latest` and, from grpo.py, `best`. The same command
   resumes it.
2. All randomness is a function of (seed, step), so there is no random state to save.
3. The loss is the mean over the tokens of all ranks, normalised once per optimizer step.
4. Rows keep their documents; each epoch shuffles the rows. So neither the shuffle nor the place
   in the data needs more memory than the row numbers, however many tokens there are.
"""
import contextlib
import glob
import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

from model import (InputError, compute_dtype, context_length, count_parameters, differences,
                   flops_per_token, hold, load_config, load_for_training, load_tokenizer,
                   open_folder, parse_config, print_table, read_config, save_folder, script, setup,
                   training_plan, write_text, write_whole, writes_to)
from sample import (TEMPLATES, TEMPLATES_CHINESE, apply_template, checked_rows, read_done,
                    render_chat)

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
    max_hours=0.0,      # save and stop after this long, loading not counted; 0 is no limit
    recompute="",       # in the backward pass: none, all or all_but_attention of a block's
                        # activations; all_but_attention on CUDA, none on the CPU unless set
    compile=True,       # blocks by torch.compile, on CUDA
    offload=False,      # weights, gradient and moments in the CPU's memory, on CUDA
    max_bad_steps=3,    # stop after so many in a row whose loss or gradient is not finite
    wandb=False,        # log to Weights & Biases as well (pip install wandb)
    plan=False,         # print parameters and bytes, and stop
)
CONFIG = dict(
    model="toy/policy",         # folder or hub name
    data="toy/text.jsonl.gz",   # file or glob of rows, [several], or {file or glob: weight}
    val_data="",                # file or glob of rows for val_loss, every eval_every steps
    cache="out/tokens",         # where tokens go, by content and tokenizer; all ranks see it
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
MAY_DIFFER = {"steps", "save_every", "eval_every", "keep", "max_hours", "plan", "wandb"}
TRAINING_LIMITS = dict(seed=(0, 2 ** 63 - 1), steps=1, lr=0, warmup=0, save_every=1,
                       eval_every=1, keep=1, max_hours=0, max_bad_steps=1, clip=0,
                       weight_decay=0, beta2=(0, 1 - 1e-6),
                       schedule=["cosine", "constant", "inverse_sqrt"],
                       recompute=["", "none", "all", "all_but_attention"],
                       save_dtype=["", "float32", "bfloat16", "float16"])
H100_FLOPS, PLAN_MFU = 989e12, 0.4  # bf16, dense; the share that a plan counts on
TOKENS_FORMAT = 1  # of the cache: another number, and all is tokenised anew


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


def apply_gradient(model, optimizer, lr, clip, loss=0.0):
    """Clip the gradient, step, and return its norm before clipping. A loss or gradient that is
    not finite changes nothing."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm + loss):
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ---------------------------------------------------------------- the run: log, checkpoints, ends

class Run:
    """A run's folder: where its log and checkpoints go, where it resumes, when it has to stop."""

    def __init__(self, config, ranks):
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # dcp, of one process
        self.config, self.ranks, self.folder = config, ranks, Path(config["out"])
        self.is_main = ranks.rank == 0
        if config["wandb"] and not importlib.util.find_spec("wandb"):
            raise InputError("wandb=true needs: pip install wandb")
        # where nothing was saved yet there is nothing to go on from: a smaller batch may be tried
        has_saved = os.path.lexists(self.folder / "latest") or any(self.checkpoints())
        open_folder(config, ranks, MAY_DIFFER if has_saved else set(config))
        if self.is_main:
            self.link_newest()
        ranks.meet()
        self.start, self.stop_asked = time.time(), False
        self.checkpoint, self.state = self.find_checkpoint()
        if not (self.folder / "best").exists():  # lost as latest may be: the next one is the best
            self.state.pop("best", None)
        before = self.state.get("steps", config["steps"])
        if self.is_main and config["schedule"] == "cosine" and before != config["steps"]:
            print(f"steps was {before} and is now {config['steps']}: the learning rate goes on "
                  "along another cosine")
        self.state["steps"] = config["steps"]
        self.step = self.state["step"]  # that it goes on from
        if self.is_main:
            self.cut_log()
            for left in self.folder.glob("checkpoint-*.tmp"):
                shutil.rmtree(left)
        self.wandb = None
        if self.is_main and config["wandb"]:
            import wandb
            try:
                self.wandb = wandb.init(project=self.folder.name, config=config, resume="allow",
                                        dir=self.folder, id=self.state.get("wandb"))
            except wandb.Error as error:  # nobody has logged in
                raise InputError(f"wandb=true: {error}") from None
            self.state["wandb"] = self.wandb.id
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)

    def checkpoints(self):
        """{folder: step} of those that there are."""
        return {folder: int(number) for folder in self.folder.glob("checkpoint-*")
                if (number := folder.name.removeprefix("checkpoint-")).isdecimal()}

    def link_newest(self):
        """Make `latest` where a kill came just before it was made, or a copy has lost it."""
        steps = self.checkpoints()
        if steps and not os.path.lexists(self.folder / "latest"):
            point_link(self.folder / "latest", max(steps, key=steps.get).name)

    def find_checkpoint(self):
        """The folder that latest names, or None, and what a script saved beside its weights: small
        and JSON."""
        latest = self.folder / "latest"
        if not os.path.lexists(latest):
            return None, {"step": 0}
        if not latest.is_symlink():
            raise InputError(f"{latest}: expected a link to a checkpoint, found a folder; name it "
                             "checkpoint-NNNNNN, by its step, and link to that")
        if not latest.exists():
            raise InputError(f"{latest}: expected a checkpoint, found a link to "
                             f"{os.readlink(latest)}, which is not there; point it at another")
        checkpoint = latest.resolve()
        told = checkpoint / "state" / "run.json"
        if not told.exists():
            raise InputError(f"{told}: expected what the run goes on from, found none; start "
                             f"another with model={checkpoint}")
        state = read_config(told)
        if not isinstance(state.get("step"), int):
            raise InputError(f"{told}: expected a step, found {state.get('step')!r}")
        return checkpoint, state

    def cut_log(self):
        """Drop rows logged after the checkpoint that the run goes on from."""
        path = self.folder / "log.jsonl"
        logged = self.step if self.checkpoint and "unlogged" not in self.state else self.step - 1
        rows = [row for row in read_done(path) if row.get("step", math.inf) <= logged]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def ask_to_stop(self, number, frame):
        if self.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now
        self.stop_asked = True

    def wants_stop(self):
        """This rank was signalled, or its hours are over; the others may not know yet."""
        hours = self.config["max_hours"]
        return self.stop_asked or bool(hours) and time.time() - self.start > hours * 3600

    def log(self, row):
        """Append a row to log.jsonl, with null for what is not finite."""
        if self.is_main:
            row = {key: value if math.isfinite(value) else None for key, value in row.items()}
            with writes_to(path := self.folder / "log.jsonl"), open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.wandb:
                self.wandb.log(row, step=row["step"])

    def count_bad(self, row, wrong={}):
        """Why to stop after this row's step, or "": its loss or gradient was not finite, or what
        else is wrong, {reason: (whether it is so, limit)}, for `limit` steps in a row."""
        counts, limit = self.state.setdefault("counts", {}), self.config["max_bad_steps"]
        is_bad = not math.isfinite(row.get("loss", 0.0) + row["grad_norm"])
        wrong = wrong | {"the loss or its gradient is not finite": (is_bad, limit)}
        for reason, (is_wrong, limit) in wrong.items():
            counts[reason] = counts.get(reason, 0) + 1 if is_wrong else 0
            if counts[reason] >= limit:
                return f"{reason}, {limit} steps in a row"
        return ""

    def finish(self, panels, alarm):
        """Draw the curves; then end all ranks, if there is an alarm to tell of."""
        if self.is_main:
            draw_curves(self.folder, panels)
        if alarm:
            self.ranks.meet()  # rank 0 has drawn
            sys.exit(f"stopped: {alarm}" if self.is_main else 1)

    def restore(self, model, optimizer):
        """Load the fp32 weights and moments that the run goes on from; collective."""
        if self.checkpoint is None:
            return
        before = read_config(self.checkpoint / "config.json")
        now = dict.fromkeys(before) | model.config  # None for a key that is gone
        if changed := differences(before, now, {"dtype", "torch_dtype"}):
            raise InputError(f"{model.folder}/config.json: expected the model that the run began "
                             f"with, found another: {changed}")
        state = state_of(model, optimizer)
        logging.disable(logging.WARNING)  # torch's tracebacks of what is one line here
        try:
            dcp.load(state, checkpoint_id=self.checkpoint / "state", no_dist=self.ranks.world == 1)
        except CheckpointException as error:
            raise InputError(f"{self.checkpoint}/state: cannot be read: {cause_of(error)}"
                             ) from None
        finally:
            logging.disable(logging.NOTSET)
        set_state_dict(model, optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
        if self.is_main:
            print(f"resumed from {self.folder / self.checkpoint.name}")

    def save(self, step, model, optimizer, is_best=False):
        """Write checkpoint-NNNNNN aside, sync it, rename it, then move the links; collective."""
        target = self.folder / f"checkpoint-{step:06d}"
        aside = target.with_suffix(".tmp")
        try:
            if step != self.state["step"]:  # of the newest checkpoint
                self.write_aside(aside, model, optimizer)
            self.state["step"] = step
            if self.is_main:
                self.publish(aside, target, ["best", "latest"] if is_best else ["latest"])
        except (OSError, SafetensorError, CheckpointException) as error:
            free = shutil.disk_usage(self.folder).free  # torch's words may not say it
            if self.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise InputError(f"{aside}: cannot be written, with {free:,} bytes of disk free: "
                             f"{cause_of(error)}; earlier checkpoints are intact") from None
        self.ranks.meet()
        return target

    def write_aside(self, aside, model, optimizer):
        """The weights for others, and state/ to go on from; collective."""
        name = self.config["save_dtype"]
        dtype = getattr(torch, name) if name else compute_dtype(self.ranks)
        needed = sum(p.numel() for p in model.parameters()) * (dtype.itemsize + 3 * 4)
        if self.ranks.any(self.is_main and shutil.disk_usage(self.folder).free < needed):
            raise InputError(f"{aside}: expected {needed:,} bytes of free disk, found fewer; "
                             "earlier checkpoints are intact")
        save_folder(model, aside, dtype)
        dcp.save(state_of(model, optimizer), checkpoint_id=aside / "state",
                 no_dist=self.ranks.world == 1)

    def publish(self, aside, target, links):
        """What was written aside becomes a checkpoint that links name; older ones go."""
        place = aside if aside.exists() else target  # saved before: only run.json may be new
        write_whole(place / "state" / "run.json", json.dumps(self.state))
        sync_folder(place)
        if place == aside:
            if target.exists():  # of a run that went on from an earlier one
                shutil.rmtree(target)
            os.replace(aside, target)
        for link in links:
            point_link(self.folder / link, target.name)
        sync(self.folder)
        self.prune()

    def prune(self):
        """Remove all but the newest checkpoints and the linked ones. Those of later steps, which
        a run left that went on from an earlier one, are the oldest."""
        kept = {(self.folder / link).resolve().name for link in ("best", "latest")}
        steps = self.checkpoints()
        age = lambda folder: (steps[folder] <= self.state["step"], steps[folder])
        for folder in sorted(steps, key=age)[:-self.config["keep"]]:
            if folder.name not in kept:
                shutil.rmtree(folder)


def state_of(model, optimizer):
    """What state/ holds, by torch.distributed.checkpoint: this rank's share; collective."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))


def cause_of(error):
    """In words, the first rank's reason that a checkpoint failed."""
    failures = getattr(error, "failures", {})
    cause = next(iter(failures.values()))[0] if failures else error
    return str(cause) or type(cause).__name__


def sync(path):
    """Bring a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def sync_folder(folder):
    """Bring a folder's files, then its entries, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


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
    points = lambda key: [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    panels = {title: known for title, keys in panels.items()
              if (known := {key: found for key in keys if (found := points(key))})}
    if not panels:  # stopped before the first row, or nothing in it was finite
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, figsize=(4 * columns, 2.8 * lines))
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for key, curve in curves.items():
            is_eval = key.startswith(("eval/", "val_"))
            axis.plot(*zip(*curve), label=key, marker="o" if is_eval else None,
                      linewidth=2 if is_eval else 0.9)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) - columns:len(panels)]:  # the lowest of each column
        axis.set_xlabel("step", fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    plt.close(figure)


def num_gpus():
    """Of a plan: torchrun's, or what the environment says."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not (text.isdecimal() and int(text)):
        raise InputError(f"WORLD_SIZE={text}: expected a number of GPUs, at least 1")
    return int(text)


def print_plan(config, tokens, pack_tokens, length, changes={}, held={}, sampling={}, seconds={}):
    """What a training run needs, and nothing started. tokens: of a step over all GPUs, in
    sequences of this length; pack_tokens: of a forward pass; changes: to the folder's config;
    held: {kind: bytes} besides; sampling: those that are there while nothing is trained; seconds:
    {what: seconds} of a step besides."""
    gpus, found = num_gpus(), load_config(config["model"])[1] | changes
    if os.environ.get("RANK", "0") != "0":
        return
    kinds = training_plan(found, gpus, pack_tokens, config["recompute"] or "all_but_attention")
    states = next(iter(kinds))  # all that is sharded
    held = {states: kinds.pop(states)} | held
    moved = {f"{states}: on the CPU": held.pop(states)} if config["offload"] else {}
    both = {"together": sum((held | kinds).values())}
    if sampling:
        both = {"together, training": both["together"],
                "together, sampling": sum((held | sampling).values())}
    flops = tokens * flops_per_token(found, length)
    print(f"{config['model']} on {gpus} GPUs; bytes on each")
    print_table(held | kinds | sampling | both | moved)
    print("each step")
    print_table({"parameters": count_parameters(found), "tokens": tokens,
                 "FLOPs": f"{flops:.3g}", f"seconds at {PLAN_MFU:.0%} of an H100's 989 TFLOP/s":
                 f"{flops / (gpus * PLAN_MFU * H100_FLOPS):,.1f}"} | seconds | {
                 "tokens of the run": tokens * config["steps"],
                 "steps for a billion tokens": -(-10 ** 9 // tokens)})


def train(run, model, optimizer, accumulate, validate, panels, tokens, length):
    """Resume, then step until the steps are done or a rank has to stop; log, save and draw.

    accumulate(step) leaves a gradient and returns what to log, a loss at least; validate()
    returns more to log every eval_every steps; tokens: of a step, in sequences of this length,
    for the rate and, on CUDA, the share of an H100's peak (mfu)."""
    config = run.config
    flops = tokens * flops_per_token(model.config, length)
    if run.step >= config["steps"]:
        if run.is_main:
            print(f"{run.folder}: finished at step {run.step}")
        return
    run.restore(model, optimizer)
    bar = tqdm(total=config["steps"], initial=run.step, disable=not run.is_main, unit="step")
    for step in range(run.step + 1, config["steps"] + 1):
        start, is_last = time.perf_counter(), step == config["steps"]
        row = {"step": step} | accumulate(step)
        row["lr"] = learning_rate(step, config["steps"], config["lr"], config["warmup"],
                                  config["schedule"])
        row["grad_norm"] = apply_gradient(model, optimizer, row["lr"], config["clip"], row["loss"])
        seconds = time.perf_counter() - start
        row["tokens_per_second"] = tokens / seconds
        if run.ranks.is_cuda:
            row["mfu"] = flops / seconds / (run.ranks.world * H100_FLOPS)
        alarm = run.count_bad(row)
        if is_last or step % config["eval_every"] == 0:
            row |= validate()
        run.log(row)
        if alarm:
            break
        bar.update()
        shown = f"loss {row['loss']:.3f}, {row['tokens_per_second']:.0f} tokens/s"
        bar.set_postfix_str(shown + (f", mfu {row['mfu']:.0%}" if "mfu" in row else ""))
        stop = run.ranks.any(run.wants_stop())
        if stop or is_last or step % config["save_every"] == 0:
            target = run.save(step, model, optimizer)
        if stop:
            break
    bar.close()
    run.finish(panels, alarm and f"{alarm}; the last checkpoint is {run.folder}/latest")
    if run.is_main:
        print(f"wrote {target}" if step == config["steps"]
              else f"stopped after step {step}, saved in {target}; the same command goes on")


# ---------------------------------------------------------------- documents as tokens

def chat_parts(turns, tokenizer):
    """[(text, is trained)] of a conversation: what the assistant says is trained on."""
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str)
                and isinstance(turn.get("content"), str)):
            raise ValueError(f'expected messages of {{"role", "content"}}, found {turn!r:.80}')
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError("expected a message with role assistant, found none")
    parts, shown = [], ""
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = render_chat(tokenizer, turns[:place], True)
            after = render_chat(tokenizer, turns[:place + 1], False)
            if not (before.startswith(shown) and after.startswith(before)):
                raise ValueError("the tokenizer's chat template rewrites earlier turns")
            parts += [(before[len(shown):], False), (after[len(before):], True)]
            shown = after
    return parts


def row_parts(row, tokenizer):
    """[(text, is trained)] of a row: {"messages"}, {"prompt", "plan", "text"} (the prompt may be
    missing), {"prompt", "completion"} as they are, or {"text"}."""
    has = lambda *keys: all(isinstance(row.get(key), str) for key in keys)
    if isinstance(row.get("messages"), list) and (row["messages"] or not has("text")):
        return chat_parts(row["messages"], tokenizer)
    if has("plan", "text"):
        prompt = apply_template(tokenizer, "think", row["prompt"]) if has("prompt") else ""
        return [(prompt, False),
                (f"<think>{row['plan']}</think><answer>{row['text']}</answer>", True)]
    if has("prompt", "completion"):
        return [(row["prompt"], False), (row["completion"], True)]
    if has("prompt", "text"):  # is the prompt part of it?
        raise ValueError('expected "prompt" with "completion", or with "plan" and "text", or '
                         '"text" alone, found "prompt" and "text"')
    if has("text"):
        return [(row["text"], True)]
    raise ValueError('expected texts under "text", "plan" and "text", "prompt" and "completion", '
                     f'or "messages", found columns {sorted(row)}')


def write_tokens(paths, tokenizer, folder):
    """Tokenise files into folder/tokens.bin, int32, each document ended by end-of-text, ~token
    where it is not trained on; folder/ends.npy says where documents end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{folder.name}-*.tmp"):  # by a run that was killed
        with contextlib.suppress(BlockingIOError):  # another run writes it
            if (handle := hold(left)) is not None:
                shutil.rmtree(left)
                os.close(handle)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", suffix=".tmp", dir=folder.parent))
    aside.chmod(0o755)  # a temporary folder is its owner's alone
    handle = hold(aside)
    try:
        fill_tokens(paths, tokenizer, aside)
        os.replace(aside, folder)
    except OSError:
        if not folder.exists():  # else another run was faster, with the same tokens
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def in_chunks(documents, most=1000, characters=2 ** 22):
    """Lists of documents that are tokenised together: some megabytes, however long one is."""
    chunk, size = [], 0
    for parts in documents:
        chunk.append(parts)
        size += sum(len(text) for text, _ in parts)
        if len(chunk) == most or size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def fill_tokens(paths, tokenizer, aside):
    """The files of write_tokens, on the disk."""
    def check(row, number):
        parts = row_parts(row, tokenizer)
        "".join(text for text, _ in parts).encode()  # half a surrogate pair is JSON, and no text
        return parts

    ends, end = array("q", [0]), np.array([tokenizer.eos_token_id], dtype=np.int32)
    rows = checked_rows(paths, check)
    with open(aside / "tokens.bin", "wb") as file, tqdm(
            desc=f"tokens of {', '.join(map(str, paths))[:60]}", unit=" documents") as bar:
        for documents in in_chunks(rows):
            texts = [text for parts in documents for text, _ in parts]
            found = (np.array(tokens, dtype=np.int32) for tokens in tokenizer(
                texts, add_special_tokens=False, verbose=False)["input_ids"])  # on all cores
            for parts in documents:
                pieces = [tokens if is_trained else ~tokens
                          for (_, is_trained), tokens in zip(parts, found)]
                np.concatenate([*pieces, end]).tofile(file)
                ends.append(ends[-1] + sum(map(len, pieces)) + 1)
            bar.update(len(documents))
            bar.set_postfix_str(f"{ends[-1]:,} tokens")
    if ends[-1] == len(ends) - 1:
        raise InputError(f"{paths[0]}: expected text to train on, found only empty rows")
    np.save(aside / "ends.npy", np.array(ends[1:]))
    sync_folder(aside)


def find_files(names):
    """The files of a name or glob, or of several, in order, each once."""
    files = []
    for name in [names] if isinstance(names, str) else names:
        if Path(name).is_dir():
            raise InputError(f"{name}: expected a file, or a glob like {Path(name) / '*.jsonl'}; "
                             "found a folder")
        found = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
        found = [Path(path) for path in found if Path(path).is_file()]
        if not found:
            raise InputError(f"{name}: no such file")
        files += found
    check_each_once(files)
    return files


def check_each_once(files):
    names = Counter(path.resolve() for path in files)
    if again := [path for path in files if names[path.resolve()] > 1]:
        raise InputError(f"{again[0]}: expected each file once, found two names for it")


def content_key(paths, tokenizer):
    """A name of what the files hold, as this tokenizer reads it."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    settings = [tokenizer.eos_token_id, tokenizer.chat_template, TEMPLATES, TEMPLATES_CHINESE,
                TOKENS_FORMAT]
    digest.update(repr(settings).encode())
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def cache_tokens(paths, tokenizer, cache, ranks):
    """The name of the files' folder in the cache, made if need be; rank 0 reads them, however
    long it takes, and the others wait."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path}: expected a tokenizer with an eos_token")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    keys = []
    if ranks.rank == 0:
        try:
            keys = [content_key(paths, tokenizer)]
            if not (folder := Path(cache) / keys[0]).exists():
                write_tokens(paths, tokenizer, folder)
        except OSError as error:
            raise InputError(f"{error.filename or cache}: {error.strerror or error}") from None
    return ranks.gather(keys)[0]  # of rank 0, the only one; all wait for it


class Documents:
    """The documents of some files as one vector of tokens in a memory map, read in rows.

    Rows are cut every seq_len tokens, the last one shorter, and come in a new order each epoch.
    Every token but a document's first is a target once an epoch; a prompt's tokens never are."""

    def __init__(self, paths, tokenizer, seq_len, seed, cache, ranks):
        self.key = cache_tokens(paths, tokenizer, cache, ranks)
        folder = Path(cache) / self.key
        try:
            self.ends = np.load(folder / "ends.npy", mmap_mode="r")
            size = (folder / "tokens.bin").stat().st_size
            if size != 4 * self.ends[-1]:
                raise ValueError(f"{4 * self.ends[-1]} bytes of tokens, {size} found")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{folder}: expected what we wrote there: {error}; remove the folder"
                             ) from None
        self.tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
        self.seq_len, self.seed, self.epoch = seq_len, seed, None
        self.num_rows = -(-len(self.tokens) // seq_len)

    def row(self, number):
        """(tokens, targets, lengths of the documents' pieces) of a row, counted over epochs."""
        epoch, place = divmod(number, self.num_rows)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        start = int(self.order[place]) * self.seq_len
        stored = np.array(self.tokens[start:start + self.seq_len + 1])  # and what follows
        size = min(self.seq_len, len(self.tokens) - start)
        first, last = np.searchsorted(self.ends, [start, start + size], "right")
        ends = np.array(self.ends[first:last]) - start  # of documents, in 1..size
        targets = np.full(size, -1)
        targets[:len(stored) - 1] = np.maximum(stored[1:], -1)
        targets[ends - 1] = -1  # the next document's first token
        tokens = np.where(stored < 0, ~stored, stored)[:size]
        return tokens, targets, np.diff([0, *ends[ends < size], size])

    def mean_length(self):
        """Of the document's piece that a token is in, by the first million documents."""
        ends = self.ends[:2 ** 20]
        pieces = np.diff(np.union1d(ends, np.arange(0, ends[-1], self.seq_len)))
        return np.square(pieces).sum() / ends[-1]


class Mixture:
    """Several Documents, each with a weight: its share of the rows."""

    def __init__(self, parts, weights):
        self.parts, self.weights = parts, np.array(weights) / sum(weights)
        self.num_drawn = math.inf  # the first row starts the count

    def row(self, number):
        """As Documents.row: of the part that is the furthest behind its share."""
        if number < self.num_drawn:
            self.num_drawn, self.counts = 0, np.zeros(len(self.parts), dtype=int)
        while self.num_drawn <= number:
            self.num_drawn += 1
            part = int((self.weights * self.num_drawn - self.counts).argmax())
            self.counts[part] += 1
        return self.parts[part].row(self.counts[part] - 1)

    def mean_length(self):
        return float(self.weights @ [part.mean_length() for part in self.parts])


def load_data(data, *options):
    """A Mixture of what data names: a file or glob, a list of them, or {file or glob: weight}."""
    if not data or not all(isinstance(name, str) for name in data):
        raise InputError(f"data={data}: expected files or globs")
    # sorted: the same rows, in whatever order they are named
    names, weights = zip(*sorted(data.items()) if isinstance(data, dict) else [(data, 1)])
    for name, weight in zip(names, weights):
        if not (isinstance(weight, (int, float)) and 0 < weight < math.inf):
            raise InputError(f"data: {name}: expected a weight above 0, found {weight!r}")
    files = [find_files(name) for name in names]  # all, before hours go into the first
    check_each_once(sum(files, []))
    return Mixture([Documents(paths, *options) for paths in files], weights)


def to_pack(rows, device):
    """tokens (N,), targets (N,), cu_seqlens (S+1,) of several rows, for one forward pass."""
    tokens, targets, lengths = (np.concatenate(part) for part in zip(*rows))
    cu_seqlens = np.concatenate([[0], lengths.cumsum()])
    return (torch.tensor(tokens, dtype=torch.long, device=device),
            torch.tensor(targets, dtype=torch.long, device=device),
            torch.tensor(cu_seqlens, dtype=torch.int32, device=device))


def draw_places(num_rows, count, step, seed):
    """Places of the `count` rows of 1-based step: all come once an epoch, each epoch in a new
    order, a function of the seed."""
    epochs, places = np.divmod(np.arange((step - 1) * count, step * count), num_rows)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_rows)
              for epoch in set(epochs.tolist())}
    return [int(orders[epoch][place]) for epoch, place in zip(epochs.tolist(), places)]


def make_packs(sizes, costs, world, micro_tokens):
    """Items dealt into packs of at most micro_tokens (or one item) and like costs, as many on
    each rank: a list of lists of places, the costliest first, of which rank r takes every
    world-th from the r-th."""
    sizes, costs = np.asarray(sizes, dtype=int), np.asarray(costs, dtype=float)
    most = world * max(1, math.ceil(len(sizes) / world))  # an item each
    num_packs = min(most, world * max(1, math.ceil(sizes.sum() / (world * micro_tokens))))
    while True:
        packs = [[] for _ in range(num_packs)]
        tokens, loads = np.zeros(num_packs, dtype=int), np.zeros(num_packs)
        for place in np.argsort(-costs, kind="stable").tolist():
            has_room = (tokens == 0) | (tokens + sizes[place] <= micro_tokens)
            if not has_room.any():
                break
            pack = int(np.where(has_room, loads, math.inf).argmin())
            packs[pack].append(place)
            tokens[pack] += sizes[place]
            loads[pack] += costs[place]
        else:
            return [packs[pack] for pack in np.argsort(-loads, kind="stable")]
        more = world * max(1, num_packs // (16 * world))  # thousands grow by a 16th
        num_packs = min(num_packs + more, most)


def next_token_loss(model, data, numbers, ranks, micro_rows, train):
    """Mean loss over the targets of rows `numbers` on all ranks; with train, its gradient."""
    mine, most = numbers[ranks.rank::ranks.world], -(-len(numbers) // ranks.world)
    parts = [[data.row(number) for number in mine[start:start + micro_rows]]
             for start in range(0, most, micro_rows)]  # as many on each rank; some may be empty
    total = sum(ranks.gather([sum(int((targets >= 0).sum()) for part in parts
                                  for _, targets, _ in part)]))
    loss = 0.0
    for part in parts:
        tokens, targets, cu_seqlens = to_pack(part or [data.row(numbers[-1])], ranks.device)
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
        seq_len=2, batch_rows=1, micro_rows=1, init=["folder", "random"]), json_keys={"data"})
    ranks = None if config["plan"] else setup()
    if config["seq_len"] > (most := context_length(load_config(config["model"])[1])):
        raise InputError(f"seq_len={config['seq_len']}: expected at most the model's context of "
                         f"{most} tokens, max_position_embeddings in its config.json")
    world = num_gpus() if config["plan"] else ranks.world
    if config["batch_rows"] % world:
        raise InputError(f"batch_rows={config['batch_rows']}: expected a multiple of the "
                         f"{world} ranks")
    if config["plan"]:
        rows = min(config["micro_rows"], config["batch_rows"] // world)
        return print_plan(config, config["batch_rows"] * config["seq_len"],
                          rows * config["seq_len"], config["seq_len"])
    tokenizer = load_tokenizer(config["model"])
    options = tokenizer, config["seq_len"], config["seed"], config["cache"], ranks
    val_files = config["val_data"] and find_files(config["val_data"])
    data = load_data(config["data"], *options)
    val_data = Documents(val_files, *options) if val_files else None
    model = load_for_training(config, ranks,
                              seed=config["seed"] if config["init"] == "random" else None)
    optimizer = make_optimizer(model, config["weight_decay"], config["beta2"])
    content = [part.key for part in data.parts] + ([val_data.key] if val_data else [])
    run, batch = Run(config | {"data_content": content}, ranks), config["batch_rows"]

    def accumulate(step):
        numbers = range((step - 1) * batch, step * batch)
        loss = next_token_loss(model, data, numbers, ranks, config["micro_rows"], True)
        return dict(loss=loss, tokens=step * batch * config["seq_len"])

    def validate():
        return dict(val_loss=next_token_loss(model, val_data, range(val_data.num_rows), ranks,
                                             config["micro_rows"], False))

    train(run, model, optimizer, accumulate, validate if val_data else dict,
          {"loss": ["loss", "val_loss"], "gradient norm": ["grad_norm"]},
          tokens=batch * config["seq_len"], length=data.mean_length())


if __name__ == "__main__":
    main()
