"""What a GPU makes of attention, decode, the head and a training step, at Qwen2.5's shapes.

    python bench/h100.py size=0.5B                      # all parts
    python bench/h100.py size=7B parts=attention,decode
    OMP_NUM_THREADS=1 python bench/h100.py size=tiny    # smoke test, a minute or two on a CPU

Prints markdown for bench/results.md. Weights are random and made on the device. bf16 with fp32
references on CUDA, fp32 with fp64 ones on the CPU. GB is 1e9 bytes; a peak counts what is held.
Shapes: N tokens, T of a sequence, S sequences, H query heads, K key/value heads, D head size,
C hidden size, V vocabulary.

1. Errors are absolute, max / mean, against naive attention in the wider type. The naive row is
   the same arithmetic in the narrow type: no backend should be much above it.
2. A training step is one sequence. MFU is causal: 6 x parameters (without the input embedding,
   with the head) + 6 x layers x C x T a token, no credit for recomputation, over an H100's 989
   TFLOP/s. "products" is the time that its matrix products and attention, recomputed ones with
   them, take alone, over the step's. Where a model is too large, as many blocks as the plan fits.
3. The bound of a decode step is the weights and the filled part of the cache, read once, at the
   bandwidth of a copy (bytes read and written) measured in the same run.
4. The chunked head computes entropies besides; the full logits are spared that.
"""
import contextlib
import gc
import math
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.distributed.tensor import DTensor

import model
from model import (ChunkedLogProbs, InputError, Ranks, Span, build_model, count_multiplied,
                   count_parameters, find_commit, flops_per_token, head_size, parse_config, script,
                   setup, training_plan)
from pretrain import H100_FLOPS, apply_gradient, make_optimizer
from sample import LOOK_EVERY, MIN_ROWS, generate, sample_tokens

CONFIG = dict(
    size="0.5B",                            # tiny, small, 0.5B, 1.5B, 3B or 7B
    parts="attention,decode,head,train",    # any of them
)
SIZES = {  # hidden, layers, query heads, kv heads, ffn, vocabulary, tied (Qwen2.5's config.json)
    "tiny": (64, 2, 4, 2, 128, 512, True),
    "small": (512, 8, 8, 2, 2048, 32_768, True),  # for a CPU
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
    "3B": (2048, 36, 16, 2, 11_008, 151_936, True),
    "7B": (3584, 28, 28, 4, 18_944, 152_064, False),
}
WORK = dict(tokens=16_384, seq_len=4096, contexts=(512, 4096, 13_700), new_tokens=256,
            keys=4096, trained=(16_384, 32_768))
TINY_WORK = dict(tokens=2048, seq_len=512, contexts=(16, 256), new_tokens=64, keys=256,
                 trained=(1024, 2048))
ROWS = (1, 16, 32, 64, 128, 256)  # that decode together; fewer than 16 are decoded as 16
RAGGED = (1, 7, 130, 257, 1000)   # lengths at which attention is compared
CHECK_TOKENS = 1500               # at which heads are compared: more than a chunk


class Setting(NamedTuple):
    """What every part needs to know."""
    config: dict          # of the model
    work: dict
    ranks: Ranks
    dtype: torch.dtype
    wide: torch.dtype     # of the references
    bandwidth: float      # bytes a second of a copy

    def draw(self, *shape, std=1.0):
        return torch.randn(shape, dtype=self.dtype, device=self.ranks.device) * std

    def draw_tokens(self, *shape):
        return torch.randint(self.config["vocab_size"], shape, device=self.ranks.device)


# ---------------------------------------------------------------- measuring and printing

def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_calls(run, repeats=10):
    """Mean seconds of a call after two that warm up; the device sees them back to back."""
    for _ in range(2):
        run()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - start) / repeats


def peak_bytes():
    """The most that tensors held since the row began; the CPU has no counter."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else math.nan


def gigabytes(count):
    return "-" if math.isnan(count) else f"{count / 1e9:.2f}"


def copy_bandwidth(device):
    """Bytes a second, read and written, of a copy far larger than a GPU's caches."""
    source = torch.ones(2 ** (30 if device.type == "cuda" else 26), dtype=torch.int8,
                        device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / time_calls(lambda: target.copy_(source))


def print_table(title, columns, rows):
    """A markdown table, each row as soon as it is there; rows: {label: function giving cells}."""
    print(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for label, measure in rows.items():
        gc.collect()  # what the last row left may be in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            cells = measure()
        except torch.OutOfMemoryError:
            cells = ["out of memory"] + [""] * (len(columns) - 2)
        print("| " + " | ".join(map(str, [label, *cells])) + " |", flush=True)


def installed(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def print_header(s, size):
    is_cuda = s.ranks.device.type == "cuda"
    name = torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"## {size} on {name}\n\n`{' '.join(sys.argv)}`, commit {find_commit()}\n")
    print(f"torch {torch.__version__}, triton {installed('triton')}, "
          f"flash-attn {installed('flash-attn')}; {count_parameters(s.config):,} parameters; "
          f"copy {s.bandwidth / 1e9:,.0f} GB/s; {s.dtype}, references in {s.wide}", flush=True)


# ---------------------------------------------------------------- a model without a folder

def make_config(hidden, layers, heads, kv_heads, ffn, vocab, tied):
    return dict(architectures=["Qwen2ForCausalLM"], hidden_size=hidden, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=ffn,
                vocab_size=vocab, tie_word_embeddings=tied, rms_norm_eps=1e-6, rope_theta=1e6,
                max_position_embeddings=32_768)


@torch.no_grad()
def make_model(config, device, dtype, **options):
    """As load_model, with random weights made on the device."""
    network = build_model(config, device, dtype, **options)
    for name, parameter in network.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.normal_(0, 0.02) if parameter.dim() > 1 else local.fill_(float("norm" in name))
    return network


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
    return qkv, Span(cu_seqlens, list(lengths), max(lengths), None, None)


def make_decode(s, lengths, has_mask):
    """q (S, H, D), caches k and v (S, keys, K, D), and the Span of a decode step."""
    device, S, keys = s.ranks.device, len(lengths), s.work["keys"]
    is_past = torch.arange(keys, device=device) < lengths[:, None]
    mask = torch.zeros(is_past.shape, dtype=s.dtype, device=device)
    mask = mask.masked_fill_(~is_past, -torch.inf)[:, None, None]  # (S, 1, 1, keys)
    k, v = (s.draw(S, s.config["num_key_value_heads"], keys, head_size(s.config)).transpose(1, 2)
            for _ in "kv")
    q = s.draw(S, s.config["num_attention_heads"], head_size(s.config))
    return [q, k, v], Span(torch.arange(S + 1, dtype=torch.int32, device=device), None, 1,
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
        seconds = time_calls(lambda: function(*qkv, span))
    num_bytes = sum(x.nbytes for x in qkv[1:])
    return [error, f"{seconds * 1e3:.3f}", f"{num_bytes / seconds / s.bandwidth:.0%}"]


def attention_part(s):
    is_cuda, work = s.ranks.device.type == "cuda", s.work
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
    """generate, timed between the looks of its engine: the prefill comes before the first, CUDA
    graphs before the third, the completions after the last."""
    work, V, looks = s.work, s.config["vocab_size"], []
    length = context + work["new_tokens"]
    values = 2 * s.config["num_hidden_layers"] * s.config["num_key_value_heads"] \
        * head_size(s.config)  # of keys and values a token
    needed = (count_parameters(s.config) + max(rows, MIN_ROWS) * length * values) \
        * s.dtype.itemsize
    if s.ranks.device.type == "cuda" and needed > 0.9 * torch.cuda.mem_get_info()[1]:
        return ["does not fit"] + [""] * 6
    network = make_model(s.config, s.ranks.device, s.dtype)
    prompts = s.draw_tokens(1, context).tolist()  # read once, copied for all
    never = SimpleNamespace(may_stop=torch.zeros(V, dtype=torch.bool), find=lambda *_: 0)

    def on_look(engine):
        synchronize()
        looks.append(time.perf_counter())

    for max_tokens in (LOOK_EVERY, work["new_tokens"]):  # the first warms up
        looks[:] = [time.perf_counter()]
        list(generate(network, prompts, [(0, number) for number in range(rows)], never,
                      max_tokens, slots=rows, compile_decode=is_compiled, on_look=on_look))
    peak = gigabytes(peak_bytes())
    step = (looks[-2] - looks[2]) / (LOOK_EVERY * (len(looks) - 4))
    prefill = looks[1] - looks[0] - LOOK_EVERY * step
    logits, keys = s.draw(rows, V), s.draw_tokens(rows, 2).int()
    sampling = time_calls(lambda: sample_tokens(logits, keys, keys[:, 0], 1.0, 1.0, 0))
    cached = rows * (context + work["new_tokens"] / 2) * values
    bound = (count_multiplied(s.config) + cached) * s.dtype.itemsize / s.bandwidth
    return [f"{rows / step:,.0f}", f"{step * 1e3:.2f}", f"{sampling * 1e3:.2f}",
            f"{bound * 1e3:.3f}", f"{bound / step:.1%}", f"{prefill:.2f}", peak]


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


def product_seconds(s, T, recompute):
    """Seconds that a step's matrix products and attention take one after the other, alone."""
    c, D = s.config, head_size(s.config)
    C, ffn = c["hidden_size"], c["intermediate_size"]
    attended, keys = c["num_attention_heads"] * D, c["num_key_value_heads"] * D
    total, times = 0, 1 + (recompute != "none")  # that a block's forward products run
    for size_in, size_out, count in ((C, attended, 1), (C, keys, 2), (attended, C, 1),
                                     (C, ffn, 2), (ffn, C, 1)):
        forward, backward = linear_seconds(s, T, size_in, size_out)
        total += count * (times * forward + backward)
    (q, k, v), span = make_pack(s, [T])
    with torch.no_grad():
        forward = time_calls(lambda: model.attention(q, k, v, span), 5)
    both = time_calls(lambda: torch.autograd.grad(model.attention(q, k, v, span).sum(),
                                                  (q, k, v)), 5)
    total += both + forward * (recompute == "all")
    rows = min(T, max(1, model.HEAD_LOGITS // c["vocab_size"]))  # the head's, in chunks, twice
    forward, backward = linear_seconds(s, rows, C, c["vocab_size"])
    return c["num_hidden_layers"] * total + T / rows * (2 * forward + backward)


def train_row(s, T, recompute, is_compiled):
    device, is_cuda = s.ranks.device, s.ranks.device.type == "cuda"
    s = s._replace(config=dict(s.config))
    room = 0.9 * torch.cuda.mem_get_info()[1] if is_cuda else math.inf
    while (planned := sum(training_plan(s.config, 1, T, recompute).values())) > room:
        s.config["num_hidden_layers"] -= 1  # as many blocks as fit
    products = product_seconds(s, T, recompute)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    network = make_model(s.config, device, torch.float32, ranks=s.ranks if is_cuda else None,
                         recompute=recompute, compile=is_compiled)
    tokens = s.draw_tokens(T)
    step = partial(train_step, network, make_optimizer(network, 0.1, 0.95), tokens,
                   torch.tensor([0, T], dtype=torch.int32, device=device),
                   torch.cat([tokens[1:], tokens[:1] * 0 - 1]))
    seconds = time_calls(step, repeats=3)
    peak = peak_bytes()
    mfu = T * flops_per_token(s.config, T) / seconds / H100_FLOPS
    return [s.config["num_hidden_layers"], f"{seconds:.3f}", f"{T / seconds:,.0f}",
            f"{products / seconds:.1%}", f"{mfu:.1%}" if is_cuda else "-", gigabytes(peak),
            gigabytes(planned), f"{peak / planned:.2f}" if is_cuda else "-"]


def train_part(s):
    kinds = [("none", False), ("all", False), ("all_but_attention", False),
             ("all_but_attention", True)]
    print_table("Train: a step on one sequence of T tokens",
                ["T, recomputed", "blocks", "seconds", "tokens/s", "products", "MFU", "peak GB",
                 "plan GB", "peak over plan"],
                {f"{T}, {recompute}{', compiled' * compiled}": partial(train_row, s, T, recompute,
                                                                       compiled)
                 for T in s.work["trained"] for recompute, compiled in kinds})


PARTS = dict(attention=attention_part, decode=decode_part, head=head_part, train=train_part)


@script
def main(argv):
    config = parse_config(CONFIG, argv)
    size, parts = config["size"], config["parts"].split(",")
    if size not in SIZES:
        raise InputError(f"size={size}: expected one of {', '.join(SIZES)}")
    if not set(parts) <= set(PARTS):
        raise InputError(f"parts={config['parts']}: expected some of {','.join(PARTS)}")
    ranks = setup()
    narrow, wide = ((torch.bfloat16, torch.float32) if ranks.device.type == "cuda"
                    else (torch.float32, torch.float64))
    work = TINY_WORK if size in ("tiny", "small") else WORK
    s = Setting(make_config(*SIZES[size]), work, ranks, narrow, wide,
                copy_bandwidth(ranks.device))
    print_header(s, size)
    for part in parts:
        torch.manual_seed(0)
        PARTS[part](s)


if __name__ == "__main__":
    main()
