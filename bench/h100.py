"""What a GPU makes of each part of this code, at Qwen2.5's shapes.

    python bench/h100.py size=1.5B parts=attention,decode,head,train
    python bench/h100.py size=1.5B parts=sample runs=3               # peers: transformers 5
    python bench/h100.py size=1.5B parts=grpo max_tokens=[4096,14000]
    python bench/h100.py size=0.5B parts=fit                         # from this size on
    OMP_NUM_THREADS=1 python bench/h100.py size=tiny                 # smoke test, on a CPU

Prints markdown for bench/results.md. Weights are random and made on the device. bf16 with fp32
references on CUDA, fp32 with fp64 ones on the CPU. GB is 1e9 bytes; a peak counts what is held.
A row that fails says why, with a traceback on standard error, and the others go on.
Shapes: N tokens, T of a sequence, S sequences, H query heads, K key/value heads, D head size,
C hidden size, V vocabulary.

1. Errors are absolute, max / mean, against naive attention in the wider type. The naive row is
   the same arithmetic in the narrow type: no backend should be much above it.
2. A training step is one sequence, or a ragged pack through GRPO's gradient. MFU is causal: 6 x
   parameters (without the input embedding, with the head) + 6 x layers x C x T a token, no credit
   for recomputation, over an H100's 989 TFLOP/s. "products" is the time that its matrix products
   and attention, recomputed ones with them, take alone, over the step's. Where a model is too
   large, as many blocks as the plan fits.
3. The bound of a decode step is the weights and the filled part of the cache, read once, at the
   bandwidth of a copy (bytes read and written) measured in the same run. What a step consists of
   is timed in CUDA graphs, as the engine runs it.
4. The chunked head computes entropies besides; the full logits are spared that.
5. Samplers take turns at the same requests, all of which run to their caps; the first round does
   not count. Making the cache and the CUDA graphs is in our time, and not in that of continuous
   batching. generate pads, and waits for its longest. Peers use flash-attn, or else SDPA.
6. GRPO steps are scored by rules. Random weights hardly ever stop, so that most completions reach
   the cap; they are of all V tokens, of which the toy's tokenizer knows a part. "sample" contains
   "sync", the bringing of the weights.
7. Lengths double until a training step, the second with moments, runs out of memory; the plan has
   nine tenths of the card.
"""
import contextlib
import gc
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import grpo
import model
from model import (ChunkedLogProbs, InputError, Ranks, Span, build_model, count_multiplied,
                   count_parameters, find_commit, flops_per_token, head_size, parse_config, script,
                   setup, training_plan)
from pretrain import H100_FLOPS, apply_gradient, make_optimizer
from sample import LOOK_EVERY, MIN_ROWS, STOP_STRINGS, Engine, Stops, generate, sample_tokens

CONFIG = dict(
    size="0.5B",                   # tiny, small, 0.5B, 1.5B, 3B, 7B or 14B
    parts="attention,decode,head,train,sample,grpo,fit",  # any of them
    runs=3,                        # of each sampler; the median counts
    max_tokens=[4096, 14_000],     # of a completion in GRPO steps; tiny and small have at most 400
    num_prompts=4,                 # of a GRPO step
    num_samples=8,                 # a prompt
    steps=2,                       # GRPO steps, after one to warm up; medians count
)
SIZES = {  # hidden, layers, query heads, kv heads, ffn, vocabulary, tied (Qwen2.5's config.json)
    "tiny": (64, 2, 4, 2, 128, 2048, True),
    "small": (512, 8, 8, 2, 2048, 32_768, True),  # for a CPU
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
    "3B": (2048, 36, 16, 2, 11_008, 151_936, True),
    "7B": (3584, 28, 28, 4, 18_944, 152_064, False),
    "14B": (5120, 48, 40, 8, 13_824, 152_064, False),
}
WORK = dict(tokens=16_384, seq_len=4096, contexts=(512, 4096, 13_700), new_tokens=256,
            keys=4096, trained=(16_384, 32_768), requests=64, prompts=(32, 512), caps=(64, 1024),
            most_tokens=32_000, micro_tokens=16_896, fitted=(4096, 7))
TINY_WORK = dict(tokens=2048, seq_len=512, contexts=(16, 256), new_tokens=64, keys=256,
                 trained=(1024, 2048), requests=16, prompts=(4, 16), caps=(8, 48),
                 most_tokens=400, micro_tokens=1024, fitted=(1024, 3))
ROWS = (1, 16, 32, 64, 128, 256)  # that decode together; fewer than 16 are decoded as 16
RAGGED = (1, 7, 130, 257, 1000)   # lengths at which attention is compared
CHECK_TOKENS = 1500               # at which heads are compared: more than a chunk


class Setting(NamedTuple):
    """What every part needs to know."""
    options: dict         # of this script
    config: dict          # of the model
    work: dict
    ranks: Ranks
    dtype: torch.dtype
    wide: torch.dtype     # of the references
    bandwidth: float      # bytes a second of a copy

    @property
    def is_cuda(self):
        return self.ranks.device.type == "cuda"

    @property
    def room(self):
        """Bytes that may be planned with."""
        return 0.9 * torch.cuda.mem_get_info()[1] if self.is_cuda else math.inf

    def draw(self, *shape, std=1.0):
        return torch.randn(shape, dtype=self.dtype, device=self.ranks.device) * std

    def draw_tokens(self, *shape):
        return torch.randint(self.config["vocab_size"], shape, device=self.ranks.device)


# ---------------------------------------------------------------- measuring and printing

def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_clock():
    """Seconds, when the device has done all that it was given."""
    synchronize()
    return time.perf_counter()


def time_calls(run, repeats=10):
    """Mean seconds of a call after two that warm up; the device sees them back to back."""
    for _ in range(2):
        run()
    start = read_clock()
    for _ in range(repeats):
        run()
    return (read_clock() - start) / repeats


def time_captured(run, calls=8):
    """As time_calls, on CUDA in a CUDA graph of several calls: to launch kernels as small as a
    decode step's takes longer than they do."""
    if not torch.cuda.is_available():
        return time_calls(run)
    run()  # kernels are built, and settle, before they are recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has a thread
        for _ in range(calls):
            run()
    return time_calls(graph.replay) / calls


def clear_memory():
    """Free what is left of before, in cycles too, and let the peak begin anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def forget_compiled():
    """Compile anew: a function that has seen other shapes is compiled for many, and at last not
    at all."""
    torch.compiler.reset()
    clear_memory()


def peak_bytes():
    """The most that tensors held since it was last asked, or since memory was cleared; the CPU
    has no counter."""
    if not torch.cuda.is_available():
        return math.nan
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def gigabytes(count):
    return "-" if math.isnan(count) else f"{count / 1e9:.2f}"


def against_plan(peak, planned):
    """Three cells."""
    return [gigabytes(peak), gigabytes(planned),
            "-" if math.isnan(peak) else f"{peak / planned:.2f}"]


def copy_bandwidth(device):
    """Bytes a second, read and written, of a copy far larger than a GPU's caches."""
    source = torch.ones(2 ** (30 if device.type == "cuda" else 26), dtype=torch.int8,
                        device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / time_calls(lambda: target.copy_(source))


def attempt(measure):
    """What measure() returns, or in a few words why it failed: what one row or one peer dies of,
    whatever it is, must not end the others."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        traceback.print_exc()
        line = str(error).strip().partition("\n")[0].replace("|", "/")
        return f"{type(error).__name__}: {line}"[:80]


def print_table(title, columns, rows):
    """A markdown table, each row as soon as it is there; rows: {label: function giving cells}."""
    print(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for label, measure in rows.items():
        clear_memory()
        cells = attempt(measure)
        if isinstance(cells, str):
            cells = [cells] + [""] * (len(columns) - 2)
        print("| " + " | ".join(map(str, [label, *cells])) + " |", flush=True)


def installed(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def print_header(s, size):
    name = torch.cuda.get_device_name() if s.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"## {size} on {name}\n\n`{' '.join(sys.argv)}`, commit {find_commit()}\n")
    print(f"torch {torch.__version__}, triton {installed('triton')}, "
          f"flash-attn {installed('flash-attn')}, transformers {installed('transformers')}; "
          f"{count_parameters(s.config):,} parameters; copy {s.bandwidth / 1e9:,.0f} GB/s; "
          f"{s.dtype}, references in {s.wide}", flush=True)


# ---------------------------------------------------------------- a model without a folder

def make_config(hidden, layers, heads, kv_heads, ffn, vocab, tied):
    return dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=hidden,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                intermediate_size=ffn, vocab_size=vocab, tie_word_embeddings=tied,
                rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32_768)


@torch.no_grad()
def fill_randomly(network, *_):
    """As load_weights, without a file: made on the device."""
    for name, parameter in network.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.normal_(0, 0.02) if parameter.dim() > 1 else local.fill_(float("norm" in name))


def make_model(config, device, dtype, **options):
    """As load_model, with random weights."""
    network = build_model(config, device, dtype, **options)
    fill_randomly(network)
    return network


def stop_never(V):
    """Stops of completions that all run to their caps."""
    return SimpleNamespace(may_stop=torch.zeros(V, dtype=torch.bool), find=lambda *_: 0)


# ---------------------------------------------------------------- attention

def naive_one(q, k, v):
    """softmax(q k / sqrt(D)) v by the book; q (T, H, D) stand at the last T of k's places."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    T, keys = scores.shape[1:]
    is_later = torch.ones(T, keys, dtype=torch.bool, device=q.device).triu(keys - T + 1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(is_later, -torch.inf).softmax(-1), v)


def naive(q, k, v, span):
    """model.attention, a sequence at a time, for both kinds of call."""
    if span.lengths is None:
        parts = zip(*(x.split(span.cu_seqlens.diff().tolist()) for x in (q, k, v)))
    else:
        parts = ((q[s:s + 1], k[s, :n], v[s, :n]) for s, n in enumerate(span.lengths.tolist()))
    return torch.cat([naive_one(*part) for part in parts])


@contextlib.contextmanager
def attention_by(backend):
    """The function to call, with model.attention held to one backend meanwhile: flash-attn's
    names hidden, or in training tensors that deny being on CUDA."""
    with contextlib.ExitStack() as stack:
        if backend != "flash-attn":
            for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
                stack.enter_context(mock.patch.object(model, name, None))
        if backend == "SDPA":
            stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", False))
        yield naive if backend == "naive" else model.attention


def make_pack(s, lengths):
    """q (N, H, D), k and v (N, K, D) that require gradients, and the Span of a pack."""
    cu_seqlens = torch.tensor([0, *lengths], device=s.ranks.device).cumsum(0).int()
    heads = [s.config["num_attention_heads"]] + [s.config["num_key_value_heads"]] * 2
    qkv = [s.draw(sum(lengths), n, head_size(s.config)).requires_grad_() for n in heads]
    return qkv, Span(cu_seqlens, list(lengths), max(lengths), 0, None, None)


def make_decode(s, lengths, has_mask):
    """q (S, H, D), caches k and v (S, keys, K, D), and the Span of a decode step."""
    device, S, keys = s.ranks.device, len(lengths), s.work["keys"]
    is_past = torch.arange(keys, device=device) < lengths[:, None]
    mask = torch.zeros(is_past.shape, dtype=s.dtype, device=device)
    mask = mask.masked_fill_(~is_past, -torch.inf)[:, None, None]  # (S, 1, 1, keys)
    k, v = (s.draw(S, s.config["num_key_value_heads"], keys, head_size(s.config)).transpose(1, 2)
            for _ in "kv")
    q = s.draw(S, s.config["num_attention_heads"], head_size(s.config))
    return [q, k, v], Span(torch.arange(S + 1, dtype=torch.int32, device=device), None, 1, 0,
                           lengths, mask if has_mask else None)


def widen(tensors, dtype):
    return [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in tensors]


def errors(found, expected):
    """Absolute errors over a list of tensors, max / mean."""
    gaps = torch.cat([(x - y).detach().abs().flatten() for x, y in zip(found, expected)])
    return f"{gaps.max():.1e} / {gaps.mean():.1e}"


def training_row(s, backend):
    def both_ways(function, qkv, span, grad):
        out = function(*qkv, span)
        return out, *torch.autograd.grad(out, qkv, grad)

    with attention_by(backend) as function:
        qkv, span = make_pack(s, RAGGED)
        grad = s.draw(*qkv[0].shape)
        found = both_ways(function, qkv, span, grad)
        expected = both_ways(naive, widen(qkv, s.wide), span, grad.to(s.wide))
        cells = [errors(found[:1], expected[:1]), errors(found[1:], expected[1:])]
        if backend == "naive":
            return [*cells, "-", "-"]  # (H, T, T) is only for short sequences
        seq_len = s.work["seq_len"]
        qkv, span = make_pack(s, [seq_len] * (s.work["tokens"] // seq_len))
        grad = s.draw(*qkv[0].shape)
        seconds = time_calls(lambda: both_ways(function, qkv, span, grad))
        with torch.no_grad():
            forward = time_calls(lambda: function(*qkv, span))
    return [*cells, f"{forward * 1e3:.2f}", f"{seconds * 1e3:.2f}"]


@torch.inference_mode()
def decode_row(s, backend, rows=64):
    device, keys, has_mask = s.ranks.device, s.work["keys"], backend in ("naive", "SDPA")
    with attention_by("triton" if backend == "SDPA" else backend) as function:
        qkv, span = make_decode(s, torch.linspace(1, keys, rows, device=device).int(), has_mask)
        error = errors([function(*qkv, span)], [naive(*widen(qkv, s.wide), span)])
        if backend == "naive":
            return [error, "-", "-"]
        qkv, span = make_decode(s, torch.full((rows,), keys, dtype=torch.int32, device=device),
                                has_mask)
        seconds = time_captured(lambda: function(*qkv, span))
    num_bytes = sum(x.nbytes for x in qkv[1:])
    return [error, f"{seconds * 1e3:.3f}", f"{num_bytes / seconds / s.bandwidth:.0%}"]


def attention_part(s):
    is_cuda, work = s.is_cuda, s.work
    flash = ["flash-attn"] if is_cuda and model.flash_attn_varlen_func else []
    backends = ["naive", *flash, *(["torch varlen"] if is_cuda else []), "SDPA"]
    print_table(f"Attention, training: errors at lengths {RAGGED}, ms at {work['tokens']} tokens "
                f"in sequences of {work['seq_len']}",
                ["backend", "output error", "gradient error", "ms forward", "ms both ways"],
                {backend: partial(training_row, s, backend) for backend in backends})
    print_table(f"Attention, decode: errors at 64 rows of 1 to {work['keys']} keys, ms with all "
                "full", ["backend", "output error", "ms", "share of copy bandwidth"],
                {backend: partial(decode_row, s, backend) for backend in
                 ["naive", *flash, *(["triton"] if is_cuda and model.triton else []), "SDPA"]})


# ---------------------------------------------------------------- decode

def rollout_row(s, rows, context, is_compiled):
    """generate, timed as its engine admits work, the prefill, and between its looks: CUDA graphs
    come before the second, the completions after the last."""
    work, V, looks, admissions, admit = s.work, s.config["vocab_size"], [], [], Engine.admit
    length, R = context + work["new_tokens"], max(rows, MIN_ROWS)
    values = 2 * s.config["num_hidden_layers"] * s.config["num_key_value_heads"] \
        * head_size(s.config)  # of keys and values a token
    needed = (count_parameters(s.config) + R * length * values) * s.dtype.itemsize
    if needed > s.room:
        return ["does not fit"] + [""] * 6
    network = make_model(s.config, s.ranks.device, s.dtype)
    prompts = s.draw_tokens(1, context).tolist()  # read once, copied for all
    jobs = [(0, number) for number in range(rows)]
    on_look = lambda engine: looks.append(read_clock())

    def timed_admit(engine, work):
        start = read_clock()
        admit(engine, work)
        admissions.append(read_clock() - start)

    with mock.patch.object(Engine, "admit", timed_admit):
        for max_tokens in (LOOK_EVERY, work["new_tokens"]):  # the first warms up
            clear_memory()  # a compiled engine is a cycle, and holds its cache
            looks, admissions = [], []
            list(generate(network, prompts, jobs, stop_never(V), max_tokens, slots=rows,
                          compile_decode=is_compiled, on_look=on_look))
    peak = gigabytes(peak_bytes())
    step = (looks[-2] - looks[1]) / (LOOK_EVERY * (len(looks) - 3))
    logits, keys = s.draw(R, V), s.draw_tokens(R, 2).int()
    sampling = time_captured(lambda: sample_tokens(logits, keys, keys[:, 0], 1.0, 1.0, 0))
    cached = rows * (context + work["new_tokens"] / 2) * values
    bound = (count_multiplied(s.config) + cached) * s.dtype.itemsize / s.bandwidth
    return [f"{rows / step:,.0f}", f"{step * 1e3:.2f}", f"{sampling * 1e3:.2f}",
            f"{bound * 1e3:.3f}", f"{bound / step:.1%}", f"{admissions[0]:.3f}", peak]


def decode_part(s):
    print_table(f"Decode: {s.work['new_tokens']} new tokens",
                ["rows x context", "tokens/s", "ms a step", "of it sampling", "bound ms",
                 "share of bound", "prefill s", "peak GB"],
                {f"{rows} x {context}{', compiled' * is_compiled}":
                 partial(rollout_row, s, rows, context, is_compiled)
                 for context in s.work["contexts"] for rows in ROWS
                 for is_compiled in (False, True)})


# ---------------------------------------------------------------- head

def chunked_head(x, weight, targets):
    return ChunkedLogProbs.apply(x, weight, targets, 1.0)[0]


def full_head(x, weight, targets):
    """The same log-probs with all logits (N, V) there at one time."""
    logits = x @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def run_head(head, x, weight, targets):
    """Log-probs (N,), and the gradients of x (N, C) and weight (V, C) of their mean."""
    logprobs = head(x, weight, targets)
    return logprobs.detach(), *torch.autograd.grad(logprobs.mean(), (x, weight))


def head_row(s, head):
    x = s.draw(s.work["tokens"], s.config["hidden_size"]).requires_grad_()
    weight = s.draw(s.config["vocab_size"], x.shape[1], std=0.02).detach().requires_grad_()
    targets = s.draw_tokens(len(x))
    seconds = time_calls(lambda: run_head(head, x, weight, targets), repeats=3)
    peak = gigabytes(peak_bytes())
    few, few_targets = x[:CHECK_TOKENS].detach().requires_grad_(), targets[:CHECK_TOKENS]
    found = run_head(head, few, weight, few_targets)
    expected = run_head(full_head, *widen((few, weight), s.wide), few_targets)
    relative = [f"{(y - z).norm() / z.norm():.1e}" for y, z in zip(found[1:], expected[1:])]
    return [errors(found[:1], expected[:1]), *relative, f"{seconds * 1e3:.1f}", peak]


def head_part(s):
    print_table(f"Head: {s.work['tokens']} tokens x {s.config['vocab_size']}, both ways; errors "
                f"at {CHECK_TOKENS} tokens, those of gradients relative",
                ["head", "log-prob error", "input gradient", "weight gradient", "ms", "peak GB"],
                {"chunked": partial(head_row, s, chunked_head),
                 "full logits": partial(head_row, s, full_head)})


# ---------------------------------------------------------------- train

def draw_sequence(s, T):
    """tokens (T,), cu_seqlens and next-token targets."""
    tokens = s.draw_tokens(T)
    return (tokens, torch.tensor([0, T], dtype=torch.int32, device=tokens.device),
            torch.cat([tokens[1:], tokens[:1] * 0 - 1]))


def train_step(network, optimizer, tokens, cu_seqlens, targets):
    logprobs, _ = network(tokens, cu_seqlens, targets=targets)
    (-logprobs.sum() / len(tokens)).backward()
    apply_gradient(network, optimizer, 1e-5, 1.0)


def linear_seconds(s, num_rows, size_in, size_out):
    """(forward, backward) seconds of a matrix product and its two gradients."""
    x, weight = s.draw(num_rows, size_in), s.draw(size_out, size_in)
    grad = s.draw(num_rows, size_out)
    return (time_calls(lambda: x @ weight.T, 5),
            time_calls(lambda: (grad @ weight, grad.T @ x), 5))


def product_seconds(s, lengths, recompute):
    """Seconds that a step's matrix products and attention take one after the other, alone."""
    c, D, T = s.config, head_size(s.config), sum(lengths)
    C, ffn = c["hidden_size"], c["intermediate_size"]
    attended, keys = c["num_attention_heads"] * D, c["num_key_value_heads"] * D
    total, times = 0, 1 + (recompute != "none")  # that a block's forward products run
    for size_in, size_out, count in ((C, attended, 1), (C, keys, 2), (attended, C, 1),
                                     (C, ffn, 2), (ffn, C, 1)):
        forward, backward = linear_seconds(s, T, size_in, size_out)
        total += count * (times * forward + backward)
    (q, k, v), span = make_pack(s, lengths)
    with torch.no_grad():
        forward = time_calls(lambda: model.attention(q, k, v, span), 5)
    both = time_calls(lambda: torch.autograd.grad(model.attention(q, k, v, span).sum(),
                                                  (q, k, v)), 5)
    total += both + forward * (recompute == "all")
    rows = min(T, max(1, model.HEAD_LOGITS // c["vocab_size"]))  # the head's, in chunks, twice
    forward, backward = linear_seconds(s, rows, C, c["vocab_size"])
    return c["num_hidden_layers"] * total + T / rows * (2 * forward + backward)


def update_step(network, optimizer, sequences, ranks, micro_tokens):
    grpo.accumulate_gradient(network, sequences, ranks, micro_tokens, temperature=1.0)
    apply_gradient(network, optimizer, 1e-5, 1.0)


def make_sequence(tokens, V):
    """GRPO's, of a short prompt and a long completion; random weights give log-probs like these."""
    size = 1 + len(tokens) // 64
    return grpo.Sequence(tokens[:size], tokens[size:], [-math.log(V)] * (len(tokens) - size),
                         advantage=1.0, weight=1e-4)


def make_step(s, lengths, recompute, is_compiled):
    """A function that takes a training step, on next tokens or, of several sequences, by GRPO."""
    network = make_model(s.config, s.ranks.device, torch.float32,
                         ranks=s.ranks if s.is_cuda else None, recompute=recompute,
                         compile=is_compiled)
    optimizer = make_optimizer(network, 0.1, 0.95)
    if len(lengths) == 1:
        return partial(train_step, network, optimizer, *draw_sequence(s, *lengths))
    sequences = [make_sequence(s.draw_tokens(n).tolist(), s.config["vocab_size"]) for n in lengths]
    return partial(update_step, network, optimizer, sequences, s.ranks, sum(lengths))


def train_row(s, lengths, recompute, is_compiled):
    forget_compiled()
    s, T = s._replace(config=dict(s.config)), sum(lengths)
    while (planned := sum(training_plan(s.config, 1, T, recompute).values())) > s.room:
        s.config["num_hidden_layers"] -= 1  # as many blocks as fit
    products = product_seconds(s, lengths, recompute)
    clear_memory()
    seconds = time_calls(make_step(s, lengths, recompute, is_compiled), repeats=3)
    peak = peak_bytes()
    mfu = sum(n * flops_per_token(s.config, n) for n in lengths) / seconds / H100_FLOPS
    return [s.config["num_hidden_layers"], f"{seconds:.3f}", f"{T / seconds:,.0f}",
            f"{products / seconds:.1%}", f"{mfu:.1%}" if s.is_cuda else "-",
            *against_plan(peak, planned)]


def train_part(s):
    kinds = [("none", False), ("all", False), ("all_but_attention", False),
             ("all_but_attention", True)]
    packs = {f"{T}, {recompute}{', compiled' * is_compiled}": ([T], recompute, is_compiled)
             for T in s.work["trained"] for recompute, is_compiled in kinds}
    T = s.work["trained"][0]
    ragged = [T >> k for k in range(1, 8)] + [T >> 7]  # a half, a quarter, and so on
    packs |= {f"{T} in {len(ragged)} by GRPO, all_but_attention{', compiled' * is_compiled}":
              (ragged, "all_but_attention", is_compiled) for is_compiled in (False, True)}
    print_table("Train: a step on one sequence of T tokens, or on a ragged pack of them",
                ["T, recomputed", "blocks", "seconds", "tokens/s", "products", "MFU", "peak GB",
                 "plan GB", "peak over plan"],
                {name: partial(train_row, s, *pack) for name, pack in packs.items()})


# ---------------------------------------------------------------- sample

def make_peer(s):
    """transformers' model of the same shapes."""
    from transformers import AutoModelForCausalLM, Qwen2Config
    attention = "flash_attention_2" if s.is_cuda and model.flash_attn_varlen_func else "sdpa"
    with s.ranks.device:
        peer = AutoModelForCausalLM.from_config(Qwen2Config(**s.config), dtype=s.dtype,
                                                attn_implementation=attention)
    peer.generation_config.eos_token_id = None
    return peer.eval()


def run_ours(network, prompts, caps, is_compiled):
    start, jobs = read_clock(), [(p, 0) for p in range(len(prompts))]
    done = list(generate(network, prompts, jobs, stop_never(network.num_tokens), caps,
                         slots=len(prompts), compile_decode=is_compiled))
    return read_clock() - start, sum(len(c.tokens) for c in done)


def pad_left(prompts, device):
    """tokens and mask (S, longest), for transformers."""
    width = max(map(len, prompts))
    tokens = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def run_generate(peer, prompts, caps, **options):
    """One batch, padded on the left, until its longest is done."""
    start, (tokens, mask) = read_clock(), pad_left(prompts, peer.device)
    found = peer.generate(tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                          top_p=1.0, max_new_tokens=max(caps), pad_token_id=0, **options)
    return read_clock() - start, sum(min(cap, found.shape[1] - tokens.shape[1]) for cap in caps)


def run_continuous(peer, prompts, caps):
    """From the first request to the last result; room for all of them at one time."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    sampling = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                eos_token_id=-1, max_new_tokens=max(caps))
    pages = sum(2 + (len(prompt) + cap) // 256 for prompt, cap in zip(prompts, caps))
    size, done = ContinuousBatchingConfig(num_blocks=pages,
                                          max_requests_per_batch=len(prompts)), []
    with peer.continuous_batching_context_manager(
            generation_config=sampling, continuous_batching_config=size) as manager:
        start = read_clock()
        for prompt, cap in zip(prompts, caps):
            manager.add_request(prompt, max_new_tokens=cap)
        while len(done) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running() or result and result.error:
                raise RuntimeError(result.error if result else "ended early")
            done += [result] if result and result.is_finished() else []
        return read_clock() - start, sum(len(result.generated_tokens) for result in done)


def alternate(sides, runs, tokens):
    """{name: median seconds, or why there are none} of {name: function that gives seconds and a
    number of tokens}, called in turns after a round that does not count."""
    seconds, failed = {name: [] for name in sides}, {}
    for _ in range(1 + runs):
        for name in [name for name in sides if name not in failed]:
            clear_memory()
            told = attempt(sides[name])
            if isinstance(told, str) or told[1] != tokens:
                failed[name] = told if isinstance(told, str) else f"sampled {told[1]} tokens"
            else:
                seconds[name].append(told[0])
    return {name: failed.get(name) or statistics.median(seconds[name][1:]) for name in sides}


def sample_part(s):
    forget_compiled()
    generator = torch.Generator().manual_seed(0)
    sizes, caps = (torch.randint(low, high + 1, (s.work["requests"],), generator=generator).tolist()
                   for low, high in (s.work["prompts"], s.work["caps"]))
    prompts, tokens = [s.draw_tokens(size).tolist() for size in sizes], sum(caps)
    network, peer = make_model(s.config, s.ranks.device, s.dtype), cache(partial(make_peer, s))
    seconds = alternate({
        "ours": lambda: run_ours(network, prompts, caps, False),
        "ours, compiled": lambda: run_ours(network, prompts, caps, True),
        "generate": lambda: run_generate(peer(), prompts, caps),
        "generate, static cache": lambda: run_generate(peer(), prompts, caps,
                                                       cache_implementation="static"),
        "continuous batching": lambda: run_continuous(peer(), prompts, caps),
    }, s.options["runs"], tokens)

    def cells(name):
        if isinstance(seconds[name], str):
            return seconds[name]
        ratios = ["-" if isinstance(theirs, str) else f"{theirs / seconds[name]:.2f}"
                  for theirs in seconds.values()]
        return [f"{tokens / seconds[name]:,.0f}", f"{seconds[name]:.2f}", *ratios[2:]]

    print_table(f"Sampling: {len(prompts)} requests, prompts of {min(sizes)} to {max(sizes)} "
                f"tokens, completions of {min(caps)} to {max(caps)}, {tokens:,} together; medians "
                f"of {s.options['runs']}", ["", "tokens/s", "seconds", "x generate",
                                            "x generate, static cache", "x continuous batching"],
                {name: partial(cells, name) for name in seconds})


# ---------------------------------------------------------------- grpo

def make_trainer(s, max_tokens, folder):
    """grpo.py's, in a folder: a model of this config, the toy's tokenizer and prompts."""
    toy, policy, keys = ROOT / "toy", folder / "model", ("num_prompts", "num_samples")
    policy.mkdir()
    (policy / "config.json").write_text(json.dumps(s.config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(toy / "policy" / name, policy)
    config = parse_config(grpo.CONFIG, [
        f"model={policy}", f"prompts={toy}/prompts.jsonl", f"eval_prompts={toy}/held_out.jsonl",
        f"out={folder}/run", "reward_model=", f"max_tokens={max_tokens}",
        f"micro_tokens={s.work['micro_tokens']}", f"slots={0 if s.is_cuda else 64}",
        f"compile_decode={s.is_cuda}", *(f"{key}={s.options[key]}" for key in keys)])
    ranks = s.ranks._replace(store=dist.HashStore())  # where an earlier one's counts are not
    with (mock.patch.object(model, "load_weights", fill_randomly), mock.patch("signal.signal"),
          contextlib.redirect_stdout(sys.stderr)):  # prompts that it drops
        trainer = grpo.Trainer(config, ranks)
    V = trainer.model.num_tokens = trainer.sampler.num_tokens = s.config["vocab_size"]
    trainer.stops = Stops(trainer.tokenizer, STOP_STRINGS, V)
    return trainer


def run_steps(trainer, count):
    """The log rows of so many steps, with seconds and the peaks of sampling and training."""
    rows = []

    def sample_batch(step):
        found = grpo.Trainer.sample_batch(trainer, step)
        rows.append({"peak/sample": peak_bytes()})
        return found

    with mock.patch.object(trainer, "sample_batch", sample_batch):
        for step in range(1, 1 + count):
            start = read_clock()
            row = trainer.update(step)
            rows[-1] |= row | {"seconds": read_clock() - start, "peak/train": peak_bytes()}
    trainer.bar.close()
    return rows


def grpo_row(s, max_tokens):
    forget_compiled()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(s, max_tokens, Path(folder))
        longest = max(map(len, trainer.prompts + trainer.eval_prompts))
        held, sampling, slots = grpo.plan_sampling(trainer.config | {"slots": trainer.slots}, 1, 0,
                                                   longest)
        rows = run_steps(trainer, 1 + s.options["steps"])[1:]
    kinds = training_plan(s.config, 1, max(max_tokens, s.work["micro_tokens"]),
                          trainer.model.model.layers[0].recompute)
    states = next(iter(kinds.values()))  # held while sampling too
    median = lambda key: statistics.median(row.get(key, math.nan) for row in rows)
    return [slots, *(f"{median(key):.2f}" for key in (
                "seconds", "seconds/sync", "seconds/sample", "seconds/train")),
            f"{median('tokens'):,.0f}", f"{median('tokens_per_second'):,.0f}",
            *against_plan(median("peak/sample"), states + sum((held | sampling).values())),
            *against_plan(median("peak/train"), sum(kinds.values()) + sum(held.values()))]


def grpo_part(s):
    P, G, steps = (s.options[key] for key in ("num_prompts", "num_samples", "steps"))
    caps = {min(cap, s.work["most_tokens"]): None for cap in s.options["max_tokens"]}
    print_table(f"GRPO: a step of {P} x {G} completions, medians of {steps}",
                ["cap", "slots", "seconds", "sync", "sample", "train", "tokens a completion",
                 "tokens/s", "peak GB sampling", "plan GB", "peak over plan", "peak GB training",
                 "plan GB", "peak over plan"], {cap: partial(grpo_row, s, cap) for cap in caps})


# ---------------------------------------------------------------- fit

def peak_of_training(s, T):
    clear_memory()
    step = make_step(s, [T], "all_but_attention", s.is_cuda)
    for _ in range(2):  # the second has moments from the start
        step()
    return peak_bytes()


def fit_row(s, size):
    forget_compiled()
    s, peaks = s._replace(config=make_config(*SIZES[size])), {}
    lengths = [s.work["fitted"][0] << k for k in range(s.work["fitted"][1])]
    plan = {T: sum(training_plan(s.config, 1, T).values()) for T in lengths}
    for T in lengths:
        if isinstance(told := attempt(partial(peak_of_training, s, T)), str):
            break
        peaks[T], told = told, "not tried"
    longest = max(peaks, default=0)
    ratios = [f"{T}: {peak / plan[T]:.2f}" for T, peak in peaks.items() if s.is_cuda]
    return [longest, told, max((T for T in lengths if plan[T] < s.room), default=0),
            *against_plan(peaks.get(longest, math.nan), plan.get(longest, math.nan))[:2],
            ", ".join(ratios) or "-"]


def fit_part(s):
    names, (first, count) = list(SIZES), s.work["fitted"]
    names = names[names.index(s.options["size"]):][:None if s.is_cuda else 1]
    print_table(f"Fit: the longest sequence of a training step, of {first} tokens and its doubles "
                f"to {first << count - 1}; {s.room / 1e9:.0f} GB to plan with",
                ["size", "longest", "twice as long", "by the plan", "peak GB", "plan GB",
                 "peak over plan at each"], {name: partial(fit_row, s, name) for name in names})


PARTS = dict(attention=attention_part, decode=decode_part, head=head_part, train=train_part,
             sample=sample_part, grpo=grpo_part, fit=fit_part)


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(runs=1, num_prompts=1, num_samples=2, steps=1))
    size, parts = config["size"], config["parts"].split(",")
    if size not in SIZES:
        raise InputError(f"size={size}: expected one of {', '.join(SIZES)}")
    if not set(parts) <= set(PARTS):
        raise InputError(f"parts={config['parts']}: expected some of {','.join(PARTS)}")
    ranks = setup()
    narrow, wide = ((torch.bfloat16, torch.float32) if ranks.device.type == "cuda"
                    else (torch.float32, torch.float64))
    work = TINY_WORK if size in ("tiny", "small") else WORK
    s = Setting(config, make_config(*SIZES[size]), work, ranks, narrow, wide,
                copy_bandwidth(ranks.device))
    print_header(s, size)
    for part in parts:
        torch.manual_seed(0)
        if told := attempt(partial(PARTS[part], s)):
            print(f"\n{part}: {told}", flush=True)


if __name__ == "__main__":
    main()
