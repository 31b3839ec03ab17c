"""GRPO for long writing: sample, score, average the advantages of three rewards, step.

    python grpo.py                                     # teaches the toy to write to length
    torchrun --nproc_per_node 8 grpo.py model=FOLDER prompts=rows.jsonl reward_model=FOLDER

Shapes: P prompts a step, G samples of each, N tokens of a pack.

Where the paper (arXiv:2506.18841) is silent or differs:
1. Each reward is normalised on its own within its group, and the three advantages are averaged.
   The deviation has a floor (0.1 for length and format, half of the batch's for writing), or
   0.98 against 1.00 would count as much as 0 against 1.
2. One update per batch: there is no old-log-prob pass, and nothing to clip. The ratio of the
   trainer's probability to the sampler's, about 1 in fp32, is a weight per token, cut at 2.
   With top_p or top_k the sampler's is that of the truncated distribution. With more updates,
   each on a share of the prompts, the ratio is PPO's and clipped; a step is still one batch.
3. The loss is the mean over the tokens of a prompt's group, then over prompts, so that a long
   request does not weigh more than a short one; normalised once per step over all ranks.
4. A truncated sample stays in the loss, with format 0: leaving it out would make running to the
   cap a place that the policy never learns to leave.
5. A judge that fails leaves a sample unscored (NaN): out of its group's mean, advantage 0.
"""
import gc
import itertools
import json
import math
import textwrap
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model import (InputError, build_model, compute_dtype, context_length, copy_weights,
                   count_parameters, flatten, flops_per_token, join_share, let_go, load_config,
                   load_for_training, load_tokenizer, parse_config, print_once, sampling_plan,
                   script, setup, write_text)
from pretrain import (TRAINING, TRAINING_LIMITS, Run, apply_gradient, draw_places, learning_rate,
                      make_optimizer, make_packs, num_gpus, print_plan)
from reward import COMPONENTS, is_url, open_writing, page, score_responses, text_block
from sample import (LIMITS, MIN_ROWS, STOP_STRINGS, Stops, count_words, deal, encode,
                    encode_prompts, find_answer, generate, has_han, load_prompts, read_done)

CONFIG = dict(
    model="toy/policy",            # folder or hub name to start from
    reward_model="toy/reward",     # folder with a score head, or the URL of a judge; "" for none
    judge_model="",                # the judge's name there; its answers go to out/judge.jsonl
    concurrency=16,                # questions that each rank has under way at the judge
    prompts="toy/prompts.jsonl",   # rows {"id", "prompt", "length": [lo, hi]}
    eval_prompts="toy/held_out.jsonl",
    columns={},                    # other names of "id", "prompt", "length"
    template="think",              # think, direct or chat
    out="out/grpo",                # the run's folder
    steps=100,
    num_prompts=8,                 # P, prompts a step
    num_samples=8,                 # G, samples a prompt
    max_tokens=400,                # of a completion
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    length_max=2.0,                # the length reward is 0 from this multiple of the upper end
    weights={"length": 1.0, "format": 1.0, "writing": 1.0},  # of the rewards; one left out is 0
    combine="advantages",          # each reward's own, averaged; or rewards: their sum's
    lr=3e-4,
    schedule="inverse_sqrt",       # or constant, cosine
    updates=1,                     # optimizer steps a batch; from 2 on the ratio is clipped
    ratio="token",                 # trainer over sampler; or sequence: the mean (GSPO)
    ratio_cap=2.0,                 # of the ratio as a weight, with one update
    clip_low=0.2,                  # the ratio's range below and above 1, with more
    clip_high=0.28,                # (clip-higher, arXiv:2503.14476)
    loss_mean="prompt",            # over a group's tokens, then prompts; or token, sequence
    divide_by_std=True,            # false: Dr. GRPO's advantages, arXiv:2503.20783
    kl=0.0,                        # weight of the divergence from the model of the start
    resample=0,                    # times that groups of equal rewards give way to other prompts
    micro_tokens=8192,             # tokens a forward pass, on each rank
    slots=64,                      # sequences that decode together; 0: as many as a GPU holds
    sample_tp=1,                   # ranks that share one copy of the sampling weights
    compile_decode=False,          # decode steps by torch.compile: a minute at first, then faster
    **TRAINING | dict(weight_decay=0.0, warmup=20, beta2=0.99, eval_every=25, save_every=50),
)
STD_FLOOR = 0.1     # of length and format, which lie in 0..1
EVAL_SAMPLES = 4    # per held-out prompt, at temperature 1
PROMPT_TOKENS = 512         # that a slot's cache has room for in a plan
DECODE_ROOM = 3 * 10 ** 9   # bytes beside the cache: activations, CUDA graphs
LOGITS_COPIES = 8           # of a slot's fp32 logits, four of a step's and four of a graph's
PLAN_MEMORY = 80 * 10 ** 9  # of an H100
PLAN_BANDWIDTH = 0.8 * 3.0e12  # bytes a second: the part that we aim at of what an H100 copies
ALARM_STEPS = 5     # in a row, of which most samples teach nothing
PANELS = {f"{name} reward": [f"reward/{name}", f"eval/{name}"] for name in COMPONENTS} | {
    "asked against written (rank correlation)": ["eval/spearman"],
    "words": ["words"], "cut and repeated": ["truncated", "repetition"]}


# ---------------------------------------------------------------- prompts

def drop_unreachable(rows, tokenizer, max_tokens):
    """Rows whose range fits into max_tokens, by the tokens per word of all prompts in the same
    script, since a Chinese word is a character; [0, 0] marks a request that cannot be met. The
    others are named."""
    is_chinese = lambda row: has_han(row["prompt"])
    tokens, words = Counter(), Counter()
    for row in rows:
        tokens[is_chinese(row)] += len(encode(tokenizer, row["prompt"]))
        words[is_chinese(row)] += count_words(row["prompt"])
    per_word = lambda row: tokens[is_chinese(row)] / max(1, words[is_chinese(row)])
    fits = lambda row: row["length"][1] > 0 and row["length"][0] * per_word(row) <= max_tokens
    for row in rows:
        if not fits(row):
            print_once(f"dropped prompt {row['id']!r}: {row['length']} words, {per_word(row):.2f} "
                       f"tokens a word, do not fit max_tokens={max_tokens}")
    return [row for row in rows if fits(row)]


# ---------------------------------------------------------------- roll out and score

def score(completions, rows, tokenizer, judge, ranks, template, length_max):
    """What score_responses tells of each completion; writing is 0 without a judge."""
    def score_part(mine):
        texts = [tokenizer.decode(c.tokens) for c in mine]
        scored = score_responses([
            rows[c.prompt] | {"response": find_answer(text, template), "completion": text,
                              "finish": c.finish} for c, text in zip(mine, texts)],
            judge, template, length_max)
        return [rewards | ({} if judge else {"writing": 0.0}) for rewards in scored]

    return ranks.spread(completions, score_part)


def replace_groups(batch, dead, prompts, completions, scored):
    """A batch (prompts, completions, scores) whose groups `dead` are those of other prompts."""
    batch, num_samples = [list(part) for part in batch], len(completions) // len(dead)
    for c, rewards in zip(completions, scored):
        place = dead[c.prompt]
        i = place * num_samples + c.sample
        batch[0][place], batch[1][i] = prompts[c.prompt], c._replace(prompt=place)
        batch[2][i] = rewards
    return batch


# ---------------------------------------------------------------- advantages and loss

def normalise(rewards_PG, floor, divide_by_std):
    """(r - mean) / max(std, floor) within each group; an unscored sample (NaN) gets 0."""
    mean = rewards_PG.nanmean(1, keepdim=True)
    std = (rewards_PG - mean).pow(2).nanmean(1, keepdim=True).sqrt()
    scale = std.clamp(min=floor) if divide_by_std else 1
    return ((rewards_PG - mean) / scale).nan_to_num(0.0)


def combine_advantages(rewards, weights, combine="advantages", divide_by_std=True):
    """{component: (P, G) rewards} -> (P, G): the mean of the components' own advantages by weight;
    or, to compare with, the advantages of the weighted sum of rewards."""
    if combine == "rewards":
        total = sum(weight * rewards[name] for name, weight in weights.items() if weight)
        return normalise(total, STD_FLOOR, divide_by_std)
    parts = []
    for name, weight in weights.items():
        scored = rewards[name][~rewards[name].isnan()]
        spread = scored.std(correction=0).item() if len(scored) else 0.0
        floor = max(0.5 * spread, 1e-6) if name == "writing" else STD_FLOOR
        parts.append(weight * normalise(rewards[name], floor, divide_by_std))
    return sum(parts) / sum(weights.values())


def policy_loss(logprobs, sampled, advantages, weights, sequence, by_sequence, clip, ratio_cap,
                reference, kl):
    """(loss, ratios, divergences) over completion tokens (N,), whose weights hold all
    normalisation; sequence (N,) tells which one a token is of.

    The ratio is the trainer's probability over the sampler's, of a token or the geometric mean of
    its sequence's (GSPO, arXiv:2507.18071). clip None: REINFORCE with the ratio as a weight, cut
    at ratio_cap; (low, high): PPO's surrogate. reference: log-probs of a model to stay near, by
    the estimate k3 (http://joschu.net/blog/kl-approx.html), or None."""
    log_ratio = logprobs - sampled
    if by_sequence:
        means = log_ratio.new_zeros(sequence.max() + 1).scatter_reduce(
            0, sequence, log_ratio, "mean", include_self=False)
        log_ratio = means[sequence]
    ratio = log_ratio.exp()
    if clip:
        low, high = clip
        gains = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    else:
        gains = ratio.detach().clamp(max=ratio_cap) * advantages * logprobs
    divergences = logprobs[:0]  # none without a reference
    if reference is not None:
        divergences = (reference - logprobs).exp() - (reference - logprobs) - 1
        gains = gains - kl * divergences
    return -(weights * gains).sum(), ratio.detach(), divergences.detach()


class Sequence(NamedTuple):
    """What an update needs of a completion."""
    prompt: list        # tokens
    completion: list    # tokens
    logprobs: list      # of the completion's tokens, from the sampler
    advantage: float
    weight: float       # of each of its tokens in the loss


def make_sequences(prompts, completions, advantages_PG, loss_mean="prompt"):
    """Sequences whose weights make the loss a mean over each group's tokens, then over prompts;
    over all tokens; or over each sequence's tokens, then over sequences."""
    group_tokens = {c.prompt: 0 for c in completions}
    for c in completions:
        group_tokens[c.prompt] += len(c.tokens)
    weight = {"prompt": lambda c: 1 / (len(group_tokens) * group_tokens[c.prompt]),
              "token": lambda c: 1 / sum(group_tokens.values()),
              "sequence": lambda c: 1 / (len(completions) * len(c.tokens))}[loss_mean]
    return [Sequence(prompts[c.prompt], c.tokens, c.logprobs,
                     advantages_PG[c.prompt, c.sample].item(), weight(c)) for c in completions]


def pack_tensors(sequences, device, fill=0):
    """One forward pass's tokens, cu_seqlens and targets, and per target: sampled log-probs,
    advantages, weights, and the sequence it is of. The last token of a sequence predicts nothing
    and is left out. Up to `fill` tokens a last sequence without targets makes one shape of all
    packs."""
    empty = [Sequence([0], [0], [0.0], 0.0, 0.0)]  # a rank without work takes part all the same
    inputs, targets, per_token = [], [], []
    for place, s in enumerate(sequences or empty):
        inputs.append((s.prompt + s.completion)[:-1])
        targets += [-1] * (len(s.prompt) - 1) + s.completion
        per_token += [(logprob, s.advantage, s.weight, place) for logprob in s.logprobs]
    if (missing := fill - len(targets)) > 0:
        inputs.append([0] * missing)
        targets += [-1] * missing
    sampled, advantages, weights, sequence = torch.tensor(per_token, device=device).T
    return (*flatten(inputs, device), torch.tensor(targets, device=device),
            (sampled, advantages, weights, sequence.long()))


def accumulate_gradient(model, sequences, ranks, micro_tokens, temperature, ratio_cap=2.0,
                        by_sequence=False, clip=None, reference=None, kl=0.0):
    """Backward over this rank's packs; arrays (entropies, ratios, divergences) of its completion
    tokens. reference: a model whose log-probs policy_loss gets, or None, and no divergences."""
    sizes = np.array([len(s.prompt) + len(s.completion) for s in sequences])
    packs = make_packs(sizes, sizes * flops_per_token(model.config, sizes), ranks.world,
                       micro_tokens)
    found = [(torch.zeros(0, device=ranks.device),) * 3]  # a rank may have no tokens
    fill = micro_tokens if ranks.is_cuda else 0  # one shape: nothing recompiles
    for pack in packs[ranks.rank::ranks.world]:
        tokens, cu_seqlens, targets, per_token = pack_tensors(
            [sequences[place] for place in pack], ranks.device, fill)
        is_target, start = targets >= 0, None
        if reference is not None:
            with torch.no_grad():
                start = reference(tokens, cu_seqlens, targets=targets,
                                  temperature=temperature)[0][is_target]
        logprobs, entropy = model(tokens, cu_seqlens, targets=targets, temperature=temperature)
        loss, *told = policy_loss(logprobs[is_target], *per_token, by_sequence, clip, ratio_cap,
                                  start, kl)
        (loss * ranks.world).backward()  # FSDP averages over ranks; the loss is a sum
        if pack:
            found.append((entropy.detach()[is_target], *told))
    let_go(reference)
    return [torch.cat(values).cpu().numpy() for values in zip(*found)]


# ---------------------------------------------------------------- what a step reports

def reward_table(scored, num_samples):
    """{component: (P, G)} of scored completions in order; in fp64 the mean of equal fp32 values is
    their value, so that a group without spread has no advantages at all."""
    return {name: torch.tensor([rewards[name] for rewards in scored]).double().view(-1, num_samples)
            for name in COMPONENTS}


def mean_of(scored, key):
    """Over those that have one; NaN when none has."""
    values = [rewards[key] for rewards in scored if not math.isnan(rewards[key])]
    return sum(values) / len(values) if values else math.nan


def spearman(x, y):
    """Rank correlation, ties sharing their mean rank; 0 when one of them is constant."""
    ranks = [(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2
             for v in (np.asarray(x, float), np.asarray(y, float))]
    a, b = (r - r.mean() for r in ranks)
    norm = math.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm else 0.0


def step_row(step, completions, scored, rewards, entropies, ratios):
    """The log row of update `step`, but for the times and the gradient."""
    row = {"step": step} | {f"reward/{name}": mean_of(scored, name) for name in COMPONENTS}
    sizes = [{"words": rewards["words"], "tokens": len(c.tokens), "finish": c.finish}
             for c, rewards in zip(completions, scored)]
    finished = [size for size in sizes if size["finish"] == "stop"]
    row |= {"words": mean_of(sizes, "words"), "words/finished": mean_of(finished, "words"),
            "tokens": mean_of(sizes, "tokens"), "tokens/finished": mean_of(finished, "tokens"),
            "truncated": sum(c.finish == "length" for c in completions) / len(completions),
            "repetition": mean_of(scored, "repetition"),
            "entropy": float(entropies.mean()),
            "ratio/mean": float(ratios.mean()), "ratio/p99": float(np.quantile(ratios, 0.99)),
            "ratio/outside": float(((ratios < 0.9) | (ratios > 1.1)).mean())}
    for name in COMPONENTS:
        row[f"zero_std/{name}"] = (rewards[name].std(1, correction=0) == 0).float().mean().item()
        pairs = [(r["words"], r[name]) for r in scored if not math.isnan(r[name])]
        row[f"correlation/{name}"] = spearman(*zip(*pairs)) if pairs else 0.0
    return row


def eval_row(scored):
    asked = [sum(rewards["asked"]) / 2 for rewards in scored]
    return ({f"eval/{name}": mean_of(scored, name) for name in COMPONENTS}
            | {"eval/spearman": spearman(asked, [rewards["words"] for rewards in scored])})


def quality(row, is_judged):
    """What `best` goes by: the evaluated rewards, with writing brought to 0..1: a judge's grade of
    1 to 10, or a reward model's odds to beat a text of score 0."""
    score = row["eval/writing"]
    writing = (score - 1) / 9 if is_judged else (1 + math.tanh(score / 2)) / 2
    return sum(row[f"eval/{name}"] for name in COMPONENTS if name != "writing") + writing


def save_samples(folder, step, completions, scored, rows):
    """samples/step-NNNNNN.jsonl: every evaluated completion with its rewards."""
    path = folder / "samples" / f"step-{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = [{"index": rows[c.prompt]["id"], "sample": c.sample, "response": rewards["answer"],
              "completion": rewards["completion"], "prompt": rewards["prompt"],
              "length": rewards["asked"], "finish": c.finish,
              "rewards": {key: None if math.isnan(rewards[key]) else rewards[key]
                          for key in (*COMPONENTS, "repetition", "words")}}
             for c, rewards in zip(completions, scored)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_rollouts(path, step, scored):
    """A page of a batch: the best and the worst text by each reward."""
    blocks = []
    for name in COMPONENTS:
        known = sorted((r for r in scored if not math.isnan(r[name])), key=lambda r: r[name])
        for kind, chosen in (("best", known[-1:]), ("worst", known[:1])):
            blocks += [text_block(f"{name}, {kind}:", rewards) for rewards in chosen]
    write_text(path, page(f"Rollouts of step {step}", *blocks))


def show_result(folder, column=48):
    """A table before and after, and three completions of held-out prompts side by side."""
    logged = [row for row in read_done(folder / "log.jsonl") if "eval/length" in row]
    files = sorted((folder / "samples").glob("step-*.jsonl"))
    samples = [read_done(file) for file in (files[0], files[-1])]
    number = lambda value: math.nan if value is None else value  # JSON's null: nobody could tell
    print(f"\n{'held-out prompts':<22}{'step ' + str(logged[0]['step']):>12}"
          f"{'step ' + str(logged[-1]['step']):>12}")
    for key in [key for key in logged[0] if key.startswith("eval/")]:
        print(f"{key:<22}{number(logged[0][key]):>12.3f}{number(logged[-1][key]):>12.3f}")
    for key in ("words", "repetition"):
        means = [sum(row["rewards"][key] for row in part) / len(part) for part in samples]
        print(f"{key:<22}{means[0]:>12.3f}{means[1]:>12.3f}")
    pairs = [pair for pair in zip(*samples) if pair[0]["sample"] == 0]
    for pair in pairs[::max(1, len(pairs) // 3)][:3]:
        print(f"\n{pair[0]['prompt']}")
        texts = ["{words} words, length {length:.2f}, format {format:.2f}, writing {writing:.2f}"
                 .format(**{key: number(value) for key, value in row["rewards"].items()})
                 + "\n\n" + row["completion"].strip() for row in pair]
        wrapped = [[line for part in text.split("\n")
                    for line in textwrap.wrap(part, column) or [""]] for text in texts]
        for left, right in itertools.zip_longest(*wrapped, fillvalue=""):
            print(f"{left:<{column}} | {right}")


# ---------------------------------------------------------------- the loop

def plan_sampling(config, gpus, memory, prompt_tokens=PROMPT_TOKENS):
    """({kind: bytes} that a GPU holds beside the trained model, {kind: bytes} while it samples,
    the cache's first, slots). Without slots in the config as many as all that leaves room for in
    a GPU's memory (bytes), and no more than there are completions."""
    if gpus % config["sample_tp"]:
        raise InputError(f"sample_tp={config['sample_tp']}: expected a divisor of the {gpus} GPUs; "
                         "for a plan, WORLD_SIZE says how many")
    policy = load_config(config["model"])[1]
    count, is_there = count_parameters(policy), not config["offload"]
    held = sampling_plan(policy, config["sample_tp"], config["max_tokens"] + prompt_tokens)
    each = held.pop("cache of one completion")
    if config["reward_model"] and not is_url(config["reward_model"]):
        held["reward model"] = 2 * count_parameters(load_config(config["reward_model"])[1]) // gpus
    if config["kl"] and is_there:
        held["the start, for kl"] = 4 * count // gpus
    slots, engines = config["slots"], gpus // config["sample_tp"]
    logits = 4 * LOGITS_COPIES * policy["vocab_size"]
    if not slots:
        room = 0.9 * memory - 16 * count // gpus * is_there - sum(held.values()) - DECODE_ROOM
        if room < MIN_ROWS * each:
            raise InputError(f"slots=0: expected room for {MIN_ROWS} completions of "
                             f"{config['max_tokens']} tokens, {MIN_ROWS * each:,} bytes, "
                             f"found {int(room):,}")
        most = -(-config["num_prompts"] * config["num_samples"] // engines)
        slots = min(int(room // (each + logits)), most)
    slots = max(slots, MIN_ROWS)
    return held, {f"cache of {slots} slots": slots * each, "room for decoding": DECODE_ROOM,
                  "its logits, a step's and a graph's": slots * logits}, slots


class Trainer:
    """What the loop's two verbs, evaluate and update, need: models, prompts, the run."""

    def __init__(self, config, ranks):
        self.config, self.ranks = config, ranks
        self.tokenizer = load_tokenizer(config["model"])
        self.context = context_length(load_config(config["model"])[1])
        self.rows, self.prompts = self.load_prompts("prompts")
        self.eval_rows, self.eval_prompts = self.load_prompts("eval_prompts")
        self.model = load_for_training(config, ranks)
        self.model.num_tokens = len(self.tokenizer)
        self.sampler = self.model  # one copy of the weights serves both on one CPU process
        share = join_share(ranks, config["sample_tp"])
        if ranks.shards:  # a copy of its own, which bring_weights fills
            self.sampler = build_model(self.model.config, ranks.device,
                                       compute_dtype(ranks), share=share)
            self.sampler.num_tokens = self.model.num_tokens
        longest = max(map(len, self.prompts + self.eval_prompts))
        memory = torch.cuda.mem_get_info()[1] if ranks.is_cuda else 0
        self.slots = min(ranks.gather([plan_sampling(config, ranks.world, memory, longest)[2]]))
        self.sync = {}     # log keys of the last bring_weights
        self.rollouts = 0  # so far: each has names of its own in the store
        self.shown = 0.0   # when the bar was last drawn
        self.stops = Stops(self.tokenizer, STOP_STRINGS, self.model.num_tokens)
        self.reference = None
        if config["kl"]:
            self.reference = load_for_training(config, ranks).requires_grad_(False)
            self.reference.num_tokens = self.model.num_tokens
        self.judge = config["reward_model"] and open_writing(
            config["reward_model"], ranks, config["judge_model"],
            f"{config['out']}/judge.jsonl", config["concurrency"])
        self.optimizer = make_optimizer(self.model, config["weight_decay"], config["beta2"])
        self.run = Run(config, ranks)
        self.bar = tqdm(total=config["steps"], initial=self.run.step, unit="step",
                        disable=ranks.rank > 0)

    def load_prompts(self, key):
        """(rows, their tokens) of the file under this key."""
        config = self.config
        rows = load_prompts(config[key], config["columns"], needs_length=True)
        rows = drop_unreachable(rows, self.tokenizer, config["max_tokens"])
        if not rows:
            raise InputError(f"{config[key]}: expected prompts whose range fits max_tokens="
                             f"{config['max_tokens']}, found none")
        return rows, encode_prompts(self.tokenizer, config["template"], rows, self.context,
                                    config["max_tokens"])

    def bring_weights(self):
        """Fill the sampler from the trained shards; notes the seconds, and on CUDA the peak of
        what it took, for the log."""
        if self.sampler is self.model:
            return
        self.ranks.meet()
        start = time.perf_counter()
        if self.ranks.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        copy_weights(self.model, self.sampler)
        if self.ranks.is_cuda:
            torch.cuda.synchronize()
            self.sync["gigabytes/sync"] = (torch.cuda.max_memory_allocated() - held) / 1e9
        self.sync["seconds/sync"] = time.perf_counter() - start

    def on_look(self, engine):
        """Show what the engine does; whether this rank has to stop."""
        if time.time() - self.shown > 0.5:
            self.shown = time.time()
            self.bar.set_description_str(f"sampling {engine.progress()}")
        return self.run.wants_stop()

    def roll_out(self, rows, prompts, num_samples, step, **sampling):
        """(completions in order of prompt and sample, their scores), or None when a rank has to
        stop."""
        config, ranks, share = self.config, self.ranks, self.sampler.share
        self.bring_weights()
        longest_first = sorted(range(len(rows)), key=lambda p: -rows[p]["length"][1])
        jobs = [(p, sample) for p in longest_first for sample in range(num_samples)]
        self.rollouts += 1
        work = deal(jobs, ranks, self.slots, f"rollout/{self.rollouts}", share)
        completions = list(generate(
            self.sampler, prompts, work, self.stops, config["max_tokens"], self.slots,
            seed=config["seed"], step=step, compile_decode=config["compile_decode"],
            on_look=self.on_look, **sampling))
        self.bar.set_description_str("")
        if ranks.is_cuda:  # the cache's memory is training's now
            gc.collect()  # an engine whose step is compiled refers to itself
            torch.cuda.empty_cache()
        if ranks.any(self.run.wants_stop()):
            return None
        mine = [] if share.rank else completions  # ranks that share a model have the same
        completions = sorted(ranks.gather(mine), key=lambda c: (c.prompt, c.sample))
        return completions, score(completions, rows, self.tokenizer, self.judge, ranks,
                                  config["template"], config["length_max"])

    def evaluate(self, step):
        """eval/* on held-out prompts at temperature 1 with the same noise each time; the samples
        are saved. None when a rank has to stop."""
        found = self.roll_out(self.eval_rows, self.eval_prompts, EVAL_SAMPLES, 0)
        if found and self.run.is_main:
            save_samples(self.run.folder, step, *found, self.eval_rows)
        return found and eval_row(found[1])

    def sample_groups(self, places, step):
        """(prompts, completions, scores) of the prompts at these places, or None when a rank has
        to stop."""
        rows, prompts = ([part[place] for place in places] for part in (self.rows, self.prompts))
        found = self.roll_out(rows, prompts, self.config["num_samples"], step, **{
            key: self.config[key] for key in ("temperature", "top_p", "top_k")})
        return found and (prompts, *found)

    def sample_batch(self, step):
        """(prompts, completions, scores, {component: (P, G) rewards}, advantages (P, G)) of a
        step, or None when a rank has to stop; groups without any advantage give way to other
        prompts, up to `resample` times."""
        config = self.config
        batch = self.sample_groups(draw_places(len(self.rows), config["num_prompts"], step,
                                               config["seed"]), step)
        for attempt in range(config["resample"] + 1):
            if batch is None:
                return None
            rewards = reward_table(batch[2], config["num_samples"])
            advantages = combine_advantages(rewards, config["weights"], config["combine"],
                                            config["divide_by_std"])
            dead = (advantages == 0).all(1).nonzero()[:, 0].tolist()
            if not dead or attempt == config["resample"]:
                return *batch, rewards, advantages
            places = np.random.default_rng([config["seed"], step, attempt]).integers(
                len(self.rows), size=len(dead))
            others = self.sample_groups(places, (step, attempt + 1))
            batch = others and replace_groups(batch, dead, *others)

    def update(self, step):
        """One step: the log row, or None when a rank has to stop before it."""
        config, start = self.config, time.perf_counter()
        found = self.sample_batch(step)
        if found is None:
            return None
        prompts, completions, scored, rewards, advantages = found
        sampled = time.perf_counter()
        lr = learning_rate(step, config["steps"], config["lr"], config["warmup"],
                           config["schedule"])
        clip = (config["clip_low"], config["clip_high"]) if config["updates"] > 1 else None
        norms, told = [], []
        for share in range(config["updates"]):
            mine = [c for c in completions if c.prompt % config["updates"] == share]
            told.append(accumulate_gradient(
                self.model, make_sequences(prompts, mine, advantages, config["loss_mean"]),
                self.ranks, config["micro_tokens"], config["temperature"],
                ratio_cap=config["ratio_cap"], by_sequence=config["ratio"] == "sequence",
                clip=clip, reference=self.reference, kl=config["kl"]))
            norms.append(apply_gradient(self.model, self.optimizer, lr, config["clip"]))
        if self.ranks.is_cuda:
            torch.cuda.synchronize()
        done = time.perf_counter()
        *told, divergences = (np.concatenate(self.ranks.gather(list(values)))
                              for values in zip(*told))
        row = step_row(step, completions, scored, rewards, *told)
        if self.run.is_main:
            write_rollouts(self.run.folder / "rollouts.html", step, scored)
        if self.reference is not None:
            row["kl"] = float(divergences.mean())
        row |= self.sync | {"grad_norm": sum(norms) / len(norms), "lr": lr,
                "seconds/sample": sampled - start, "seconds/train": done - sampled,
                "tokens_per_second": sum(len(c.tokens) for c in completions) / (done - start)}
        dead = (advantages == 0).all(1).float().mean().item()
        self.run.state["alarm"] = self.run.count_bad(row, {
            "most samples are truncated": (row["truncated"] > 0.5, ALARM_STEPS),
            "most texts have no score for writing": (
                rewards["writing"].isnan().float().mean() > 0.5, ALARM_STEPS),
            "most groups have equal rewards": (dead > 0.5, ALARM_STEPS)})
        return row

    def loop(self):
        """Evaluate, log, save, update, until the steps are done or a rank has to stop."""
        config, run = self.config, self.run
        step = run.step
        row = run.state.pop("unlogged", {"step": 0} if step == 0 else None)
        while True:
            is_best, is_last = False, step == config["steps"] or bool(run.state.get("alarm"))
            if row is not None:
                if is_last or step % config["eval_every"] == 0:
                    found = self.evaluate(step)
                    if found is None:
                        run.state["unlogged"] = row
                        break
                    row |= found
                    reached = quality(row, is_url(config["reward_model"]))
                    is_best = step > 0 and reached > run.state.get("best", -math.inf)
                    if is_best:
                        run.state["best"] = reached
                run.log(row)
                if step and (is_best or is_last or step % config["save_every"] == 0):
                    run.save(step, self.model, self.optimizer, is_best)
            if is_last:
                break
            row = self.update(step + 1)
            if row is None:
                break
            step += 1
            self.bar.update()
            self.bar.set_postfix_str(" ".join(f"{name} {row['reward/' + name]:.2f}"
                                              for name in COMPONENTS)
                                     + f" words {row['words']:.0f}")
        if step:
            run.save(step, self.model, self.optimizer)
        self.bar.close()
        return step


def plan(config):
    """Print what a run needs: every completion as long as it may be, as many as slots at once."""
    gpus, length = num_gpus(), config["max_tokens"]
    count = config["num_prompts"] * config["num_samples"]
    held, sampling, slots = plan_sampling(config, gpus, PLAN_MEMORY)
    waves = -(-count // (slots * (gpus // config["sample_tp"])))
    cache = next(iter(sampling.values()))
    read = held["sampling weights"] + cache / 2  # half full on average
    print_plan(config, count * length, max(length + PROMPT_TOKENS, config["micro_tokens"]), length,
               held=held, sampling=sampling,
               seconds={f"seconds of sampling at {PLAN_BANDWIDTH / 1e12:.1f} TB/s, waves: {waves}":
                        f"{waves * length * read / PLAN_BANDWIDTH:,.1f}"})


@script
def main(argv):
    config = parse_config(CONFIG, argv, TRAINING_LIMITS | LIMITS | dict(
        num_prompts=1, num_samples=2, temperature=1e-6, length_max=1 + 1e-6, ratio_cap=1,
        concurrency=1, micro_tokens=1, updates=1, ratio=["token", "sequence"], clip_low=(0, 1),
        clip_high=0, loss_mean=["prompt", "token", "sequence"], kl=0, resample=0, slots=0,
        combine=["advantages", "rewards"]))
    weights = config["weights"]
    if not (set(weights) <= set(COMPONENTS) and any(weights.values())
            and all(isinstance(weight, (int, float)) and 0 <= weight < math.inf
                    for weight in weights.values())):
        raise InputError(f"weights={json.dumps(weights)}: expected weights of at least 0, not all "
                         f"0, for some of {', '.join(COMPONENTS)}")
    if config["num_prompts"] < config["updates"]:
        raise InputError(f"updates={config['updates']}: expected at most num_prompts="
                         f"{config['num_prompts']}")
    if config["plan"]:
        return plan(config)
    ranks = setup()
    if not (config["slots"] or ranks.is_cuda):
        raise InputError("slots=0: expected at least 1 without a GPU")
    trainer = Trainer(config, ranks)
    run = trainer.run
    if run.step >= config["steps"] and "unlogged" not in run.state:
        if run.is_main:
            print(f"{run.folder}: finished at step {run.step}")
        return
    run.restore(trainer.model, trainer.optimizer)
    step = trainer.loop()
    alarm = run.state.get("alarm")
    run.finish(PANELS, alarm and f"{alarm}; best is {run.folder}/best")
    if run.is_main and (step < config["steps"] or "unlogged" in run.state):
        saved = f"saved in {run.folder}" if step else "with nothing to save yet"
        print(f"stopped after step {step}, {saved}; the same command goes on")
    elif run.is_main:
        show_result(run.folder)
        print(f"\nlearning curve: {run.folder}/curves.png, model: {run.folder}/latest")


if __name__ == "__main__":
    main()
