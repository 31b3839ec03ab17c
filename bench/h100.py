"""What a GPU makes of attention, decode, the head and a training step, at Qwen2.5's shapes.

    python bench/h100.py size=0.5B                   # all parts, a few minutes
    python bench/h100.py size=7B parts=attention,decode
    OMP_NUM_THREADS=1 python bench/h100.py size=tiny # smoke test, also without a GPU

Prints markdown for bench/results.md. Weights are random and made on the device; nothing is
downloaded. bf16 on CUDA with fp32 references, fp32 on the CPU with fp64 ones. GB is 1e9 bytes.
Shapes: N tokens, S sequences, H query heads, K key/value heads, D head size, V vocabulary.

1. Errors are absolute, max / mean, against naive attention in the wider type. The naive row
   is the same arithmetic in the narrow type: a backend should not be much above it.
2. MFU is the causal formula, 6 x parameters (without the input embedding, with the head)
   + 6 x layers x hidden x T a token, no credit for recomputation, over an H100's 989 TFLOP/s.
3. The bound of a decode step is the weights and the filled part of the cache, read once, at
   the bandwidth of a copy (bytes read and written) measured in the same run.
4. The chunked head also computes entropies, which the full logits are spared.
"""
import contextlib
import gc
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
from model import (ChunkedLogProbs, InputError, Qwen2, Ranks, Span, count_parameters,
                   find_commit, head_size, memory_plan, parse_config, rope_frequencies, script,
                   setup, shard)
from pretrain import apply_gradient, make_optimizer
from sample import LOOK_EVERY, generate, sample_tokens

CONFIG = dict(
    size="0.5B",                            # tiny, 0.5B, 1.5B, 3B or 7B
    parts="attention,decode,head,train",    # any of them
)
SIZES = {  # hidden, layers, query heads, kv heads, ffn, vocabulary, tied (Qwen2.5's config.json)
    "tiny": (64, 2, 4, 2, 128, 512, True),
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
    "3B": (2048, 36, 16, 2, 11_008, 151_936, True),
    "7B": (3584, 28, 28, 4, 18_944, 152_064, False),
}
WORK = dict(tokens=16_384, seq_len=4096, prompt=512, new_tokens=256, keys=4096)
TINY_WORK = dict(tokens=2048, seq_len=512, prompt=16, new_tokens=32, keys=256)
ROWS = (64, 16, 32, 128)            # that decode together
RAGGED = (1, 7, 130, 257, 1000)     # lengths at which attention is compared
CHECK_TOKENS = 1500                 # at which heads are compared: more than a chunk
PEAK_FLOPS = 989e12                 # H100 SXM, bf16 dense


class Setting(NamedTuple):
    """What every part needs: a model's config, where it runs, and how much work a call is."""
    config: dict
    ranks: Ranks
    dtype: torch.dtype
    wide: torch.dtype  # of the references
    work: dict

    def draw(self, *shape, std=1.0):
        return torch.randn(shape, dtype=self.dtype, device=self.ranks.device) * std

    def draw_tokens(self, *shape):
        return torch.randint(self.config["vocab_size"], shape, device=self.ranks.device)


# ---------------------------------------------------------------- measuring and printing

def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_calls(run, repeats=10):
    """Mean seconds of a call, after two that warm up; calls are queued one behind the other."""
    for _ in range(2):
        run()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - start) / repeats


def measure_peak(run):
    """Peak GB over the whole of run(), as text; the CPU has no such counter."""
    if not torch.cuda.is_available():
        run()
        return "-"
    torch.cuda.reset_peak_memory_stats()
    run()
    return f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"


def allocated_gb():
    return f"{torch.cuda.memory_allocated() / 1e9:.2f}" if torch.cuda.is_available() else "-"


def copy_bandwidth(device):
    """Bytes a second, read and written, of a copy far larger than any cache on a GPU."""
    source = torch.ones(2 ** (30 if device.type == "cuda" else 26), dtype=torch.int8,
                        device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / time_calls(lambda: target.copy_(source))


def print_table(title, columns, rows):
    """A markdown table, a row as soon as it is there; rows: (label, function giving cells)."""
    print(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for label, measure in rows:
        try:
            cells = measure()
        except torch.OutOfMemoryError:
            cells = ["out of memory"] + [""] * (len(columns) - 2)
        print("| " + " | ".join([label, *cells]) + " |", flush=True)
        gc.collect()  # what a failed pass leaves is in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def installed(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def print_header(s, size, bandwidth):
    cuda = s.ranks.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"## {size} on {device}\n\n`{' '.join(sys.argv)}`\n")
    print(f"torch {torch.__version__}, triton {installed('triton')}, flash-attn "
          f"{installed('flash-attn')}, commit {find_commit()}; "
          f"{count_parameters(s.config):,} parameters; copy {bandwidth / 1e9:,.0f} GB/s; "
          f"{str(s.dtype).split('.')[-1]}, references in {str(s.wide).split('.')[-1]}")


# ---------------------------------------------------------------- a model without a folder

def make_config(hidden, layers, heads, kv_heads, ffn, vocab, tied):
    return dict(architectures=["Qwen2ForCausalLM"], hidden_size=hidden, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=ffn,
                vocab_size=vocab, tie_word_embeddings=tied, rms_norm_eps=1e-6, rope_theta=1e6,
                max_position_embeddings=32_768)


@torch.no_grad()
def make_model(config, device, dtype, ranks=None, recompute=False):
    """As load_model, with random weights made on the device; sharded if ranks are given."""
    with torch.device("meta"):
        network = Qwen2(config, recompute).to(dtype)
    if ranks is not None:
        shard(network, ranks)
    network.to_empty(device=device)
    network.frequencies = rope_frequencies(config)[0].to(device)
    for name, parameter in network.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.dim() > 1:
            local.normal_(0, 0.02)
        else:
            local.fill_(float("norm" in name))
    return network


def count_read(config):
    """Parameters that every token multiplies: all but an input embedding that is not the head."""
    embedding = config["vocab_size"] * config["hidden_size"]
    return count_parameters(config) - (0 if config["tie_word_embeddings"] else embedding)


# ---------------------------------------------------------------- attention

def naive_one(q, k, v):
    """softmax(q k / sqrt(D)) v by the book; q (T, H, D) are the last T of k's positions."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    T, keys = scores.shape[1:]
    is_later = torch.ones(T, keys, dtype=torch.bool, device=q.device).triu(keys - T + 1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(is_later, -torch.inf).softmax(-1), v)


def naive(q, k, v, span):
    """model.attention a sequence at a time, for both kinds of call."""
    if span.lengths is None:
        parts = zip(*(x.split(span.cu_seqlens.diff().tolist()) for x in (q, k, v)))
    else:
        parts = ((q[s:s + 1], k[s, :n], v[s, :n]) for s, n in enumerate(span.lengths.tolist()))
    return torch.cat([naive_one(*part) for part in parts])


def attend(backend, q, k, v, span):
    """model.attention held to one backend: flash-attn's name hidden, or tensors denying CUDA."""
    with contextlib.ExitStack() as stack:
        if backend != "flash-attn":
            for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
                stack.enter_context(mock.patch.object(model, name, None))
        if backend == "SDPA":
            stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", False))
        return model.attention(q, k, v, span)


def find_backends(device, flash, others):
    """{name: function} of the backends that can run here, the naive one first."""
    names = (["flash-attn"] if flash else []) + others if device.type == "cuda" else ["SDPA"]
    return {"naive": naive} | {name: partial(attend, name) for name in names}


def make_pack(s, lengths):
    """q (N, H, D), k and v (N, K, D), and the Span of a pack."""
    H, K = s.config["num_attention_heads"], s.config["num_key_value_heads"]
    cu_seqlens = torch.tensor([0, *lengths], device=s.ranks.device).cumsum(0).int()
    qkv = [s.draw(sum(lengths), heads, head_size(s.config)).requires_grad_()
           for heads in (H, K, K)]
    return qkv, Span(cu_seqlens, max(lengths), None, None)


def make_decode(s, lengths):
    """q (S, H, D), caches k and v (S, keys, K, D), and the Span of a decode step."""
    device, keys, S = s.ranks.device, s.work["keys"], len(lengths)
    is_past = torch.arange(keys, device=device) < lengths[:, None]
    mask = torch.zeros(is_past.shape, dtype=s.dtype, device=device)
    mask = mask.masked_fill_(~is_past, -torch.inf)[:, None, None]  # (S, 1, 1, keys)
    cache = [s.draw(S, keys, s.config["num_key_value_heads"], head_size(s.config))
             for _ in "kv"]
    q = s.draw(S, s.config["num_attention_heads"], head_size(s.config))
    cu_seqlens = torch.arange(S + 1, dtype=torch.int32, device=device)
    return [q, *cache], Span(cu_seqlens, 1, lengths, mask)


def forward_backward(function, qkv, span):
    """The output and the gradients of q, k and v, for one fixed gradient of the output."""
    out = function(*qkv, span)
    grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return out, *torch.autograd.grad(out, qkv, grad)


def errors(found, expected):
    """Absolute errors of a list of tensors, max / mean."""
    gaps = torch.cat([(x - y).abs().flatten() for x, y in zip(found, expected)])
    return f"{gaps.max():.1e} / {gaps.mean():.1e}"


def widen(tensors, dtype):
    return [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in tensors]


def pack_row(s, function):
    qkv, span = make_pack(s, RAGGED)
    found = forward_backward(function, qkv, span)
    expected = forward_backward(naive, widen(qkv, s.wide), span)
    cells = [errors(found[:1], expected[:1]), errors(found[1:], expected[1:])]
    if function is naive:
        return [*cells, "-", "-"]  # (H, T, T) weights: not at length
    seq_len = s.work["seq_len"]
    qkv, span = make_pack(s, [seq_len] * (s.work["tokens"] // seq_len))
    both = time_calls(lambda: forward_backward(function, qkv, span))
    with torch.no_grad():
        forward = time_calls(lambda: function(*qkv, span))
    return [*cells, f"{forward * 1e3:.2f}", f"{both * 1e3:.2f}"]


@torch.inference_mode()
def decode_row(s, function, bandwidth):
    device, keys, S = s.ranks.device, s.work["keys"], ROWS[0]
    qkv, span = make_decode(s, torch.linspace(1, keys, S, device=device).int())
    expected = naive(*widen(qkv, s.wide), span)
    cells = [errors([function(*qkv, span)], [expected])]
    if function is naive:
        return [*cells, "-", "-"]
    qkv, span = make_decode(s, torch.full((S,), keys, dtype=torch.int32, device=device))
    seconds = time_calls(lambda: function(*qkv, span))
    num_bytes = sum(x.nbytes for x in qkv[1:])
    return [*cells, f"{seconds * 1e3:.3f}", f"{num_bytes / seconds / bandwidth:.0%}"]


def attention_part(s, bandwidth):
    device, work = s.ranks.device, s.work
    found = find_backends(device, model.flash_attn_varlen_func, ["torch varlen", "SDPA"])
    print_table(f"Attention, training: lengths {RAGGED}; ms at {work['tokens']} tokens in "
                f"sequences of {work['seq_len']}",
                ["backend", "output error", "gradient error", "ms forward", "ms both ways"],
                [(name, partial(pack_row, s, function)) for name, function in found.items()])
    found = find_backends(device, model.flash_attn_with_kvcache, ["SDPA"])
    print_table(f"Attention, decode: {ROWS[0]} rows of 1 to {work['keys']} keys; ms with all full",
                ["backend", "output error", "ms", "share of copy bandwidth"],
                [(name, partial(decode_row, s, function, bandwidth))
                 for name, function in found.items()])


# ---------------------------------------------------------------- decode

def rollout_row(s, network, rows, bandwidth):
    """generate, timed between the engine's looks: the first holds the prefill, the last the end."""
    work, V = s.work, s.config["vocab_size"]
    prompts = s.draw_tokens(rows, work["prompt"]).tolist()
    never = SimpleNamespace(may_stop=torch.zeros(V, dtype=torch.bool), find=lambda *_: 0)
    looks = []

    def on_look(engine):
        synchronize()
        looks.append(time.perf_counter())

    def roll_out(max_tokens):
        looks[:] = [time.perf_counter()]
        jobs = [(place, 0) for place in range(rows)]
        return list(generate(network, prompts, jobs, never, max_tokens, slots=rows,
                             on_look=on_look))

    roll_out(2 * LOOK_EVERY)
    peak = measure_peak(lambda: roll_out(work["new_tokens"]))
    step = (looks[-2] - looks[1]) / (LOOK_EVERY * (len(looks) - 3))
    prefill = looks[1] - looks[0] - LOOK_EVERY * step
    keys = torch.zeros(rows, 2, dtype=torch.int32, device=s.ranks.device)
    sampling = time_calls(lambda: sample_tokens(s.draw(rows, V), keys, keys[:, 0], 1.0, 1.0, 0))
    per_token = memory_plan(s.config, 1, 1, 1)["cache bytes per completion"]  # in bf16
    cache_bytes = rows * (work["prompt"] + work["new_tokens"] / 2) * per_token
    weight_bytes = count_read(s.config) * s.dtype.itemsize
    bound = (weight_bytes + cache_bytes * s.dtype.itemsize / 2) / bandwidth
    return [f"{rows / step:,.0f}", f"{step * 1e3:.2f}", f"{sampling * 1e3:.2f}",
            f"{bound * 1e3:.3f}", f"{bound / step:.1%}", f"{prefill:.2f}", peak]


def decode_part(s, bandwidth):
    network = make_model(s.config, s.ranks.device, s.dtype)
    print_table(f"Decode: prompts of {s.work['prompt']}, {s.work['new_tokens']} new tokens",
                ["rows", "tokens/s", "ms a step", "of it sampling", "bound ms", "share of bound",
                 "prefill s", "peak GB"],
                [(str(rows), partial(rollout_row, s, network, rows, bandwidth))
                 for rows in ROWS])


# ---------------------------------------------------------------- head

def chunked_head(x, weight, targets):
    return ChunkedLogProbs.apply(x, weight, targets, 1.0)[0]


def full_head(x, weight, targets):
    """The same log-probs with all logits (N, V) there at one time."""
    logits = ChunkedLogProbs.logits(x, weight, 1.0)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def run_head(head, x, weight, targets):
    """Log-probs (N,), and the gradients of x (N, C) and weight (V, C) of their mean."""
    logprobs = head(x, weight, targets)
    return logprobs, *torch.autograd.grad(logprobs.mean(), (x, weight))


def head_row(s, head):
    V, C = s.config["vocab_size"], s.config["hidden_size"]
    x = s.draw(s.work["tokens"], C).requires_grad_()
    weight = s.draw(V, C, std=0.02).requires_grad_()
    targets = s.draw_tokens(len(x))
    few = x[:CHECK_TOKENS].detach().requires_grad_()
    found = run_head(head, few, weight, targets[:CHECK_TOKENS])
    expected = run_head(full_head, *widen((few, weight), s.wide), targets[:CHECK_TOKENS])
    cells = [errors(found[:1], expected[:1])] + [
        f"{(y - z).norm() / z.norm():.1e}" for y, z in zip(found[1:], expected[1:])]
    del found, expected
    peak = measure_peak(lambda: run_head(head, x, weight, targets))
    seconds = time_calls(lambda: run_head(head, x, weight, targets), repeats=3)
    return [*cells, f"{seconds * 1e3:.1f}", peak]


def head_part(s, bandwidth):
    print_table(f"Head: {s.work['tokens']} tokens x {s.config['vocab_size']}, both ways; errors "
                f"at {CHECK_TOKENS} tokens, those of gradients relative",
                ["head", "log-prob error", "input gradient", "weight gradient", "ms", "peak GB"],
                [("chunked", partial(head_row, s, chunked_head)),
                 ("full logits", partial(head_row, s, full_head))])


# ---------------------------------------------------------------- train

def train_step(network, optimizer, tokens, cu_seqlens, targets):
    """Forward, backward, update; the GB held when only the static state is left."""
    logprobs, _ = network(tokens, cu_seqlens, targets=targets)
    (-logprobs.sum() / len(tokens)).backward()
    static = allocated_gb()
    apply_gradient(network, optimizer, 1e-5, 1.0)
    return static


def train_row(s, recompute):
    device, N, T = s.ranks.device, s.work["tokens"], s.work["seq_len"]
    ranks = s.ranks if device.type == "cuda" else None
    network = make_model(s.config, device, torch.float32, ranks, recompute)
    tokens = s.draw_tokens(N)
    cu_seqlens = torch.arange(0, N + 1, T, dtype=torch.int32, device=device)
    targets = tokens.roll(-1)
    targets[T - 1::T] = -1
    step = partial(train_step, network, make_optimizer(network, 0.1, 0.95), tokens, cu_seqlens,
                   targets)
    seconds = time_calls(step, repeats=3)
    peak, static = measure_peak(step), step()
    layers, C = s.config["num_hidden_layers"], s.config["hidden_size"]
    flops = N * 6 * (count_read(s.config) + layers * C * T)
    mfu = f"{flops / seconds / PEAK_FLOPS:.1%}" if device.type == "cuda" else "-"
    return [f"{seconds:.3f}", f"{N / seconds:,.0f}", mfu, peak, static,
            f"{16 * count_parameters(s.config) / 1e9:.2f}"]


def train_part(s, bandwidth):
    print_table(f"Train: a step on {s.work['tokens']} tokens in sequences of {s.work['seq_len']}",
                ["recompute", "seconds", "tokens/s", "MFU", "peak GB", "static GB",
                 "16 N bytes, GB"],
                [(name, partial(train_row, s, name == "on")) for name in ("on", "off")])


@script
def main(argv):
    config = parse_config(CONFIG, argv)
    parts = dict(attention=attention_part, decode=decode_part, head=head_part, train=train_part)
    chosen = config["parts"].split(",")
    if config["size"] not in SIZES:
        raise InputError(f"size={config['size']}: expected one of {', '.join(SIZES)}")
    if set(chosen) - set(parts):
        raise InputError(f"parts={config['parts']}: expected some of {','.join(parts)}")
    ranks = setup()
    dtypes = {"cuda": (torch.bfloat16, torch.float32), "cpu": (torch.float32, torch.float64)}
    s = Setting(make_config(*SIZES[config["size"]]), ranks, *dtypes[ranks.device.type],
                TINY_WORK if config["size"] == "tiny" else WORK)
    bandwidth = copy_bandwidth(ranks.device)
    print_header(s, config["size"], bandwidth)
    for name in chosen:
        torch.manual_seed(0)
        parts[name](s, bandwidth)


if __name__ == "__main__":
    main()
