"""The Qwen2 network by hand: one flat forward pass for training, scoring, prefill and decode.

    python model.py model=toy/policy                         # what a folder holds, bytes per GPU
    python model.py model=Qwen/Qwen2.5-7B gpus=8 sample_tp=1 max_tokens=14000

Shapes: N tokens, S sequences, H query heads, K key/value heads, D head size, C hidden size,
L layers, V vocabulary. There is no batch dimension: a call takes one vector of tokens (N,) and
cu_seqlens (S+1,), the running sum of the sequences' lengths, so no sequence is padded.

1. A model's config is the dict of its config.json; parameters carry the checkpoint's names, so
   loading is strict and every folder written here opens in transformers unchanged.
2. forward gives one of three answers: log-probs and entropies of given targets, computed in
   chunks so that no (N, V) tensor exists; next-token logits; or the scores of a score head.
3. Attention is flash-attn where it is installed; on other CUDA machines torch's own varlen
   FlashAttention, and for decoding a Triton kernel; on the CPU scaled_dot_product_attention, or
   plain products.
"""
import contextlib
import copy
import fcntl
import functools
import inspect
import itertools
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy,
                                    OffloadPolicy, fully_shard)
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import (CheckpointPolicy, checkpoint,
                                    create_selective_checkpoint_contexts)
from tqdm import tqdm

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:
    flash_attn_varlen_func = flash_attn_with_kvcache = None
try:
    import triton
    import triton.language as tl
except ImportError:  # as with torch for the CPU
    triton = None

CONFIG = dict(
    model="toy/policy",  # folder or hub name
    gpus=1,              # GPUs that train together
    sample_tp=1,         # GPUs that share one copy of the sampling weights
    max_tokens=14_000,   # prompt and completion: of a pack in training, of a cache in sampling
)
LANGUAGE, SCORES = "Qwen2ForCausalLM", "Qwen2ForSequenceClassification"  # all that is supported
WATCHES = []  # this process's PeerWatch, while there is a group of several ranks
LOCKS = {}    # {folder: handle} of those that this process writes to, until its script ends
SHARE_SECONDS = 300  # then a rank of a share counts as lost; its collectives take milliseconds
HEAD_LOGITS = 2 ** 26  # at one time: 441 rows of Qwen's vocabulary, 0.27 GB a copy in fp32


# ---------------------------------------------------------------- scripts: errors, config, ranks

class InputError(Exception):
    """The user's input is wrong: one line that names the file, line or key and what was found."""


def script(main):
    """Wrap a script's main(argv): one line on standard error and exit status 2 for bad input; of
    ranks that fail together, one tells. --help shows the script's docstring and CONFIG."""
    @functools.wraps(main)
    def run(argv=None):
        had_group, arguments = dist.is_initialized(), sys.argv[1:] if argv is None else argv
        if {"-h", "--help"} & set(arguments):
            return show_help(main)
        try:
            main(arguments)
            if dist.is_initialized() and not had_group:
                setup().meet()
        except (InputError, FloatingPointError) as error:  # of a model: logits that are not finite
            if is_first_to_fail():
                tqdm.write(f"error: {error}", file=sys.stderr)  # on a line of its own
            sys.exit(2)
        except Exception as error:
            if WATCHES and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                WATCHES[-1].join(8)  # if a peer has died the watch says so, and ends this process
            if not dist.is_initialized() or is_first_to_fail():
                raise
            sys.exit(1)  # most likely because of the one that has told
        except KeyboardInterrupt:
            if is_first_to_fail() and argv is None:
                tqdm.write("stopped; what was written is kept", file=sys.stderr)
            if argv is not None:  # called from Python
                raise
            sys.exit(130)  # 128 and the number of SIGINT
        except BaseException:  # sys.exit: the store hears of it, so that no rank waits for this one
            is_first_to_fail()
            raise
        finally:
            while WATCHES:
                WATCHES.pop().stop()
            while LOCKS:
                os.close(LOCKS.popitem()[1])
        if dist.is_initialized() and not had_group:
            dist.barrier()  # without it some ranks die at exit
            dist.destroy_process_group()
    return run


def show_help(main):
    """Print what stands at the top of main's file: its docstring, and CONFIG with its comments."""
    module = inspect.getmodule(main)
    keys = inspect.getsource(module).partition("\nCONFIG = dict(\n")[2].partition("\n)")[0]
    print_once(f"{module.__doc__}\nKeys and their defaults:\n\n{keys}")
    shared = [f"{key}={value!r}" for key, value in module.CONFIG.items() if f" {key}=" not in keys]
    if shared:
        print_once(f"    # the others, which pretrain.py explains: {', '.join(shared)}")


def is_first_to_fail():
    """Whether this rank fails before all others, and so is the one to tell; noted in the store.
    Without a process group it is rank 0."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    except RuntimeError:  # the rank that holds the store is gone
        return False


def die(reason):
    """End this process at once, where an orderly end could wait for others or for the device."""
    if is_first_to_fail():
        tqdm.write(f"error: {reason}", file=sys.stderr)
    os._exit(1)


class PeerWatch(threading.Thread):
    """Ends this process soon after another rank has failed or died: nobody is left to finish a
    step with, and nothing half done may be saved."""
    pause, grace = 1, 3  # seconds between looks, and for ranks that end by themselves and tell why

    def __init__(self, store, rank, world):
        super().__init__(daemon=True)
        self.store, self.world, self.over = store, world, threading.Event()
        store.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")
        self.start()

    def run(self):
        peers = [self.store.get(f"process/{peer}").decode().split() for peer in range(self.world)]
        nearby = [int(pid) for host, pid in peers
                  if host == socket.gethostname() and is_alive(int(pid))]
        while self.is_well(nearby):
            if self.over.wait(self.pause):
                return
        if self.over.wait(self.grace):
            return
        die("a rank died without a word (killed, or out of memory?)")

    def is_well(self, nearby):
        try:
            return all(map(is_alive, nearby)) and not self.store.check(["failures"])
        except RuntimeError:  # the rank that holds the store is gone
            return False

    def stop(self):
        self.over.set()
        self.join(5)  # a thread inside the store at the interpreter's end aborts the process


def is_alive(pid):
    try:
        os.kill(pid, 0)  # only asks
    except ProcessLookupError:
        return False
    return True


def parse_value(key, text, default, may_be_json=False):
    """One command-line value in the type of the default; dicts and lists are JSON, and a text
    that may_be_json may hold either ({"file": weight})."""
    kind = type(default)
    try:
        if kind is str:
            return json.loads(text) if may_be_json and text[:1] in ("{", "[") else text
        if kind in (int, float) and math.isfinite(float(text)):
            return kind(text)
        value = json.loads(text.lower() if kind is bool else text)
        if type(value) is kind and kind in (bool, dict, list):
            return value
    except ValueError:
        pass
    expected = f"a JSON {kind.__name__}" if kind in (dict, list) else kind.__name__
    expected = "a text, or a JSON dict or list" if may_be_json else expected
    raise InputError(f"{key}={text}: expected {expected}, found {text!r}")


def parse_config(defaults, argv, limits=None, json_keys=()):
    """defaults overridden by ["key=value", "--key=value", ...]; limits: {key: least value},
    {key: (least, most)} or {key: [each value that it may have]}; json_keys: texts that may be JSON
    dicts or lists."""
    config = copy.deepcopy(defaults)
    for argument in argv:
        key, equals, text = argument.lstrip("-").partition("=")
        if key not in defaults:
            raise InputError(f"unknown key {key!r}; known keys: {', '.join(defaults)}")
        if not equals:
            raise InputError(f"{key}: expected {key}=value, found no value")
        config[key] = parse_value(key, text, defaults[key], key in json_keys)
    for key, limit in (limits or {}).items():
        if isinstance(limit, list):
            is_right, expected = config[key] in limit, "one of " + ", ".join(map(repr, limit))
        elif isinstance(limit, tuple):
            is_right, expected = limit[0] <= config[key] <= limit[1], "{} to {}".format(*limit)
        else:
            is_right, expected = config[key] >= limit, f"at least {limit}"
        if not is_right:
            raise InputError(f"{key}={config[key]}: expected {expected}")
    return config


class Ranks(NamedTuple):
    """This process among all: rank, world size, device, and the store where ranks meet."""
    rank: int
    world: int
    device: torch.device
    store: object

    @property
    def is_cuda(self):
        return self.device.type == "cuda"

    @property
    def shards(self):
        """Whether what is trained is sharded over the ranks: on CUDA always, a mesh of one too."""
        return self.world > 1 or self.is_cuda

    def gather(self, items):
        """The items (a list) of all ranks in the order of ranks; all wait for the slowest."""
        if self.world == 1:
            return items
        self.meet()
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def spread(self, items, work):
        """work(items), a list as long; each rank does every world-th, so that costly neighbours
        are shared; collective."""
        parts = self.gather([work(items[self.rank::self.world])])
        return [parts[i % self.world][i // self.world] for i in range(len(items))]

    def any(self, flag):
        """Whether any rank says so; all meet at the store."""
        if self.world == 1:
            return flag
        meeting = self.store.add(f"meetings/{self.rank}", 1)
        self.store.set(f"meeting {meeting}/{self.rank}", str(int(flag)))
        said = self.wait_for([f"meeting {meeting}/{rank}" for rank in range(self.world)])
        self.store.delete_key(f"meeting {meeting - 1}/{self.rank}")  # all came here, all read it
        return b"1" in said

    def meet(self):
        """Wait until all ranks are here, however long the slowest takes; a collective waits for
        a limited time, and so comes after."""
        self.any(False)

    def wait_for(self, keys):
        """What the store holds under keys, once it is there; signals are heard meanwhile."""
        pause = 1e-3
        while not self.store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return [self.store.get(key) for key in keys]


def print_once(line):
    """Print on rank 0 what all ranks know."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def fresh_store(store):
    """The store under a prefix for each attempt, where torchrun keeps one for all of them: a
    restart must not find what the attempt before left."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":  # each node has a count of its own
        raise InputError("restarts on several nodes: expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
                         "in the environment of torchrun, found none")
    return store


def setup():
    """Join the process group when torchrun started us, or when CUDA needs one for FSDP."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    world = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    if cuda:
        torch.cuda.set_device(device)
    elif world == 1:
        return Ranks(0, 1, device, dist.HashStore())  # alone, without a process group
    else:  # torchrun allows one thread a process unless told otherwise
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_world))
    if not dist.is_initialized():
        if "RANK" in os.environ:
            store, rank, world = next(dist.rendezvous("env://"))
            store = fresh_store(store)
        else:
            store, rank = dist.HashStore(), 0
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank,
                                world_size=world, device_id=device if cuda else None)
        if world > 1:
            WATCHES.append(PeerWatch(dist.distributed_c10d._get_default_store(), rank, world))
    store = dist.distributed_c10d._get_default_store()
    return Ranks(dist.get_rank(), dist.get_world_size(), device, store)


def read_config(path):
    """The dict of a config.json."""
    try:
        config = json.loads(Path(path).read_text())
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, found an error: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


@contextlib.contextmanager
def writes_to(place):
    """Within, a place (a path, or a key with its value) that cannot be written is one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: cannot be written: {error.strerror}") from None


def write_whole(path, text):
    """Write it aside and rename it: a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_text(path, text):
    """As write_whole; a disk that is full is one line."""
    with writes_to(path):
        write_whole(path, text)


def hold(folder):
    """A handle that locks a folder until it is closed or this process ends, or None where the
    file system has no locks; BlockingIOError where another process holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise


def lock(folder):
    """Hold a folder until the script ends: two runs in it would spoil each other's files."""
    try:
        if folder not in LOCKS and (handle := hold(folder)) is not None:
            LOCKS[folder] = handle
    except BlockingIOError:
        raise InputError(f"{folder}: expected no other run in this folder, found one that has not "
                         "ended") from None


def differences(before, now, ignored):
    """What is another value in the dict `now`, in words."""
    return "; ".join(f"{key} was {before.get(key)!r} and is now {now[key]!r}" for key in now
                     if before.get(key) != now[key] and key not in ignored)


def open_folder(config, ranks, may_differ=()):
    """Make the run's folder config["out"] and its config.json (resolved config, command, commit).
    The same command may come again, when the one before has ended; another config is an error
    that names the key."""
    path = Path(config["out"]) / "config.json"
    if not config["out"]:
        raise InputError("out=: expected a folder, found none")
    if ranks.rank == 0:
        with writes_to(f"out={config['out']}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock(path.parent)
            if path.exists() and not config["resume"]:
                raise InputError(f"{path.parent}: expected a new folder with resume=false, "
                                 "found a run")
            before = read_config(path) if path.exists() else config
            if changed := differences(before, config, {"resume", *may_differ}):
                raise InputError(f"{path}: {changed}; resume with the same, or choose another out")
            run = {**config, "command": sys.argv, "commit": find_commit()}
            write_whole(path, json.dumps(run, indent=2) + "\n")
    ranks.meet()


def find_commit():
    """The commit of this code, with a + when files differ from it."""
    if not shutil.which("git"):
        return "unknown"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+",
           "--abbrev=12", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


# ---------------------------------------------------------------- the network

def head_size(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope_settings(config):
    """{"rope_type", "rope_theta", ...} from either spelling: rope_parameters (transformers 5),
    or rope_theta beside rope_scaling, whose kind may be called "type"."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def context_length(config):
    """Tokens that the positions reach: YaRN stretches the original context by its factor."""
    rope = rope_settings(config)
    stretched = rope.get("factor", 1) * (rope.get("original_max_position_embeddings") or 0)
    return max(config["max_position_embeddings"], int(stretched))


def rope_frequencies(config):
    """Rotary frequencies (D/2,) in fp32 and the factor on cos and sin (YaRN, arXiv:2309.00071)."""
    rope, D = rope_settings(config), head_size(config)
    base = rope["rope_theta"]
    frequencies = 1.0 / base ** (torch.arange(0, D, 2).float() / D)
    if rope["rope_type"] == "default":
        return frequencies, 1.0
    factor = rope["factor"]
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]

    def dimension(rotations):  # the dimension that turns this often over the original context
        return D * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension(rope.get("beta_slow") or 1)), D - 1)
    stretched = ((torch.arange(D // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = frequencies / factor * stretched + frequencies * (1 - stretched)
    scale = rope.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return frequencies, scale


def rotate(x, cos, sin):
    """Rotary embedding of x (N, heads, D), Qwen2's half-split layout: (a, b) becomes
    (a cos - b sin, b cos + a sin), with cos (N, 1, D) of both halves and sin as (-sin, sin)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def flatten(sequences, device):
    """tokens (N,) and cu_seqlens (S+1,) of sequences of tokens, for one forward pass."""
    tokens = torch.cat([torch.as_tensor(sequence) for sequence in sequences]).long()
    ends = itertools.accumulate(map(len, sequences), initial=0)
    return tokens.to(device), torch.tensor([*ends], dtype=torch.int32, device=device)


class Span(NamedTuple):
    """Where this call's tokens sit: made once by forward, read by every block's attention."""
    cu_seqlens: torch.Tensor  # (S+1,) int32
    sizes: list               # of the sequences, or None where a kernel reads cu_seqlens
    max_len: int              # longest sequence in this call
    past: int                 # tokens in the cache before a prompt's next chunk, which is alone
    lengths: torch.Tensor     # (S,) int32 keys of each cached sequence, or None: no cache read
    mask: torch.Tensor        # (S, 1, 1, keys) 0 or -inf, or None where a kernel reads lengths


def runs_flash(x):
    """Whether FlashAttention takes x; its kernels read the sequences' lengths on the device."""
    return x.is_cuda and x.dtype != torch.float32


def attention(q, k, v, span):
    """Causal attention within each sequence; q (N, H, D) -> (N, H, D).

    Without span.lengths, k and v (N, K, D) are this call's own, after those of span.past tokens
    where there are. With it, this is a decode step: one query per sequence, k and v (S, cap, K, D)
    the caches, of which lengths[s] keys count."""
    if span.lengths is None:
        if runs_flash(q):
            return flash_varlen(q, k, v, span)
        key_sizes = [size + span.past for size in span.sizes]
        parts = [x.transpose(0, 1).split(sizes, dim=1)  # (heads, T, D)
                 for x, sizes in ((q, span.sizes), (k, key_sizes), (v, key_sizes))]
        mask = None
        if span.past:
            mask = q.new_ones(len(q), len(k), dtype=torch.bool).tril(span.past)
        return torch.cat([
            F.scaled_dot_product_attention(*(x[None] for x in qkv), attn_mask=mask,
                                           is_causal=mask is None, enable_gqa=True)[0]
            for qkv in zip(*parts)], dim=1).transpose(0, 1)
    if span.mask is None and flash_attn_with_kvcache:
        return flash_attn_with_kvcache(q[:, None], k, v, cache_seqlens=span.lengths,
                                       causal=True)[:, 0]
    if span.mask is None:
        return triton_decode(q, k, v, span.lengths)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (S, K, keys, D)
    q = q.unflatten(1, (k.shape[1], -1))  # (S, K, H/K, D)
    if q.is_cuda:  # kernels that take a mask have no grouped heads: a group becomes its queries
        return F.scaled_dot_product_attention(q, k, v, attn_mask=span.mask).flatten(1, 2)
    q = q * q.shape[-1] ** -0.5
    if torch.compiler.is_compiling():
        # Sums that fuse read a key once for its group of queries. as_strided puts the queries in
        # memory: else the compiler rotates them anew at each key.
        q, group = q.as_strided(q.shape, q.stride()), range(q.shape[2])
        scores = torch.stack([(q[:, :, g, None] * k).sum(-1) for g in group], 2) + span.mask
        weights = scores.softmax(-1)
        out = torch.stack([(weights[:, :, g, :, None] * v).sum(2) for g in group], 2)
        return out.flatten(1, 2)
    # For one query a sequence two plain products are faster on the CPU, 1.3 times end to end.
    scores = q @ k.transpose(2, 3)
    return (scores.add_(span.mask).softmax(-1) @ v).flatten(1, 2)  # (S, K, H/K, keys) @ v


if triton:
    @triton.jit
    def decode_kernel(q, k, v, lengths, parts, masses, cap, GROUP: tl.constexpr,
                      HEADS: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr):
        """One sequence, one key head with its GROUP queries (of HEADS places), one part of the
        keys: softmax over them as they come, and the logarithm of its sum.

        Neither the scale nor a stride is an argument: torch.compile makes float64 of a float, and
        loads two bytes at a time along a stride that it cannot prove to be even."""
        row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        num_heads, splits = tl.num_programs(1), tl.num_programs(2)
        length = tl.load(lengths + row)
        chunk = tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS
        end = tl.minimum((part + 1) * chunk, length)
        heads, places, dims = tl.arange(0, HEADS), tl.arange(0, KEYS), tl.arange(0, D)
        is_head = heads < GROUP
        query = tl.load(q + ((row * num_heads + head) * GROUP + heads)[:, None] * D + dims,
                        mask=is_head[:, None], other=0.0)
        start = (row * num_heads + head) * cap
        best = tl.full([HEADS], -float("inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        mean = tl.zeros([HEADS, D], tl.float32)
        for first in range(part * chunk, end, KEYS):
            is_key = first + places < end
            at = (start + first + places)[:, None] * D + dims
            key = tl.load(k + at, mask=is_key[:, None], other=0.0)
            scores = tl.where(is_key, tl.dot(query, tl.trans(key)) * D ** -0.5, -float("inf"))
            top = tl.maximum(best, tl.max(scores, 1))
            weights, fade = tl.exp(scores - top[:, None]), tl.exp(best - top)
            value = tl.load(v + at, mask=is_key[:, None], other=0.0)
            mean = mean * fade[:, None] + tl.dot(weights.to(value.dtype), value)
            total, best = total * fade + tl.sum(weights, 1), top
        place = ((row * num_heads + head) * splits + part) * GROUP + heads
        share = tl.where(total > 0, total, 1)[:, None]  # a part may be empty
        tl.store(parts + place[:, None] * D + dims, mean / share, mask=is_head[:, None])
        tl.store(masses + place, best + tl.log(total), mask=is_head)


def has_decode_kernel(cached):
    """Whether a kernel reads such a cache (..., D) by the lengths of its sequences."""
    has_triton = triton and cached.shape[-1] in TRITON_SIZES
    return runs_flash(cached) and bool(flash_attn_with_kvcache or has_triton)


TRITON_SIZES = (16, 32, 64, 128, 256)  # of a head
PROGRAMS = 512  # that keep a GPU busy: about four on each of an H100's 132 multiprocessors


def triton_decode(q, k, v, lengths):
    """Decode attention that reads each key and value once for all heads of its group, and splits
    long caches among programs (FlashDecoding, https://pytorch.org/blog/flash-decoding).

    q (S, H, D), k and v (S, keys, K, D) as they lie in a cache (S, K, cap, D), lengths (S,) ->
    (S, H, D)."""
    (S, H, D), (keys, K) = q.shape, k.shape[1:3]
    splits = max(1, min(keys // 256, PROGRAMS // (S * K)))
    parts = q.new_empty(S, K, splits, H // K, D, dtype=torch.float32)
    masses = parts.new_empty(parts.shape[:-1])
    decode_kernel[S, K, splits](
        q.contiguous(), k, v, lengths, parts, masses, k.stride(0) // (K * D), GROUP=H // K,
        HEADS=max(16, triton.next_power_of_2(H // K)), D=D, KEYS=64)
    weights = (masses - masses.logsumexp(2, keepdim=True)).exp()
    return (parts * weights[..., None]).sum(2).flatten(1, 2).to(q.dtype)


GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def flash_varlen(q, k, v, span):
    """FlashAttention over sequences of any length, flash-attn's or torch's; a query sees the keys
    up to its own, counted from the end where there are more keys than queries."""
    cu_keys, max_keys = span.cu_seqlens, span.max_len
    if span.past:  # (0, T) becomes (0, past + T)
        cu_keys, max_keys = cu_keys + span.past * cu_keys.sign(), max_keys + span.past
    if flash_attn_varlen_func:
        return flash_attn_varlen_func(q, k, v, span.cu_seqlens, cu_keys, span.max_len, max_keys,
                                      causal=True)
    if not GROUPED:  # torch 2.11 promises no grouped queries there, so keys are repeated
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return varlen_attn(q, k, v, span.cu_seqlens, cu_keys, span.max_len, max_keys,
                       window_size=(-1, 0), **GROUPED)  # no look ahead: causal


class Share(NamedTuple):
    """A rank's place among the `size` ranks that hold one sampler together, each a slice of every
    matrix: tensor parallelism, arXiv:1909.08053."""
    rank: int
    size: int
    group: object

    def sum(self, x):
        """x summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def lead(self, x):
        """x of the first rank, in place."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=0)
        return x

    def stack(self, x):
        """x of each rank, (size, *x.shape)."""
        parts = x.new_zeros(self.size, *x.shape)
        parts[self.rank] = x
        return self.sum(parts)

    def any(self, flag):
        """Whether any of the ranks says so."""
        return bool(self.sum(torch.tensor(int(flag))))

    def most(self, count):
        """Rows of each rank, of `count` in all; the last ranks may have fewer."""
        return -(-count // self.size)


WHOLE = Share(0, 1, None)


def split_config(config, share):
    """The config of a rank's slices: some of the heads, of the MLP, and of the vocabulary."""
    local = {"head_dim": head_size(config)}
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if config[key] % share.size:
            raise InputError(f"sample_tp={share.size}: expected a divisor of the model's {key}, "
                             f"{config[key]}")
        local[key] = config[key] // share.size
    rows = share.most(config["vocab_size"])
    local["vocab_size"] = min(rows, max(0, config["vocab_size"] - share.rank * rows))
    return config | local


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        if x.dtype.itemsize >= 4:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.D = config["hidden_size"], head_size(config)
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(C, heads * self.D, bias=True)
        self.k_proj = nn.Linear(C, kv_heads * self.D, bias=True)
        self.v_proj = nn.Linear(C, kv_heads * self.D, bias=True)
        self.o_proj = nn.Linear(heads * self.D, C, bias=False)

    def forward(self, x, cos, sin, span, stored):
        q, k, v = (proj(x).unflatten(-1, (-1, self.D))  # (N, heads, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(torch.cat([q, k], 1), cos, sin).split([q.shape[1], k.shape[1]], 1)
        if stored:
            cache, layer = stored
            cache.write(layer, k, v)
            if span.past or span.lengths is not None:
                k, v = cache.read(layer)
        return self.o_proj(attention(q, k, v, span).flatten(1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, ffn = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(C, ffn, bias=False)
        self.up_proj = nn.Linear(C, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def keep_attention(context, op, *args, **kwargs):
    """A policy of selective checkpointing: attention's outputs are kept, all else is made anew."""
    is_attention = "attention" in op.name() or "attn" in op.name()
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """A layer; recompute says what its backward pass makes anew instead of keeping: "none",
    "all", or all but attention's outputs ("all_but_attention"). Of the inputs, stored is (cache,
    the layer's number), or () without a cache."""

    def __init__(self, config, recompute):
        super().__init__()
        self.recompute = recompute
        C, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(C, eps)
        self.post_attention_layernorm = RMSNorm(C, eps)

    def forward(self, *inputs):
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(*inputs)
        options = dict(use_reentrant=False, preserve_rng_state=False)
        if self.recompute == "all_but_attention":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts,
                                                      keep_attention)
        return checkpoint(self.compute, *inputs, **options)

    def compute(self, x, cos, sin, span, stored):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, span, stored)
        return x + self.mlp(self.post_attention_layernorm(x))


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probs of targets and entropies from hidden rows, a chunk of logits at a time.

    x (N, C), weight (V, C), targets (N,) -> two times (N,). A chunk holds two copies of its logits
    in fp32. The backward pass makes them anew, unless they were all in one chunk, which is kept."""

    @staticmethod
    def chunks(num_rows, weight):
        """Slices of rows; one, empty, of none."""
        size = max(1, HEAD_LOGITS // len(weight))
        return [slice(start, start + size) for start in range(0, max(1, num_rows), size)]

    @staticmethod
    def logprobs(x, weight, temperature):
        logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
        logits /= temperature
        return logits.sub_(logits.logsumexp(-1, keepdim=True))

    @staticmethod
    def forward(ctx, x, weight, targets, temperature):
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        found, entropies, kept = [], [], None
        chunks = ChunkedLogProbs.chunks(len(x), weight)
        for rows in chunks:
            logprobs = ChunkedLogProbs.logprobs(x[rows], weight, temperature)
            found.append(logprobs.gather(1, targets[rows, None])[:, 0])
            entropies.append(-torch.einsum("rv,rv->r", logprobs.exp(), logprobs))
            kept = logprobs if len(chunks) == 1 else None
            del logprobs  # before the next chunk's are made
        ctx.save_for_backward(x, weight, targets, kept)
        return torch.cat(found), torch.cat(entropies)

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies):
        x, weight, targets, kept = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        if grad_logprobs is None:
            grad_logprobs = torch.zeros(len(x), dtype=wide, device=x.device)
        for rows in ChunkedLogProbs.chunks(len(x), weight):
            logprobs = kept if kept is not None else ChunkedLogProbs.logprobs(
                x[rows], weight, ctx.temperature)
            probs = logprobs.exp()
            if grad_entropies is None:
                grad = probs.mul_(-grad_logprobs[rows, None])
            else:  # d H / d logits = -probs (logprobs + H)
                entropy = -torch.einsum("rv,rv->r", probs, logprobs)[:, None]
                grad = (logprobs + entropy).mul_(-grad_entropies[rows, None])
                grad.sub_(grad_logprobs[rows, None]).mul_(probs)
            del logprobs, probs
            # d logprob / d logits = onehot - probs
            grad.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None])
            grad = grad.div_(ctx.temperature).to(x.dtype)
            grad_x[rows] = grad @ weight
            if grad.dtype == wide:
                grad_weight.addmm_(grad.T, x[rows])
            else:
                grad_weight += grad.T @ x[rows]
            del grad
        return grad_x, grad_weight.to(weight.dtype), None, None


class Backbone(nn.Module):
    def __init__(self, config, recompute):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Block(config, recompute)
                                    for _ in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])


class Qwen2(nn.Module):
    """Qwen2 with a language head, or a score head where the config's architecture says so; with
    a share of several ranks, this rank's slices of it."""

    def __init__(self, config, recompute="none", share=WHOLE):
        super().__init__()
        self.config, self.share = config, share
        self.num_tokens = config["vocab_size"]  # rows from here on have no probability at all
        self.first_token = share.rank * share.most(config["vocab_size"])  # of its rows
        config = split_config(config, share)
        self.model = Backbone(config, recompute)
        if is_scorer(config):
            self.score = nn.Linear(config["hidden_size"], 1, bias=False)
        elif not config.get("tie_word_embeddings"):
            self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        frequencies, self.rope_scale = rope_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens, cu_seqlens, cache=None, targets=None, temperature=1.0):
        """tokens (N,) and cu_seqlens (S+1,) int32 -> one of three answers:

        targets (N,), -1 where there is none: log-probs and entropies (N,) of the next-token
        distribution at this temperature, 0 where there is no target;
        no targets: next-token logits after each sequence (S, V), of a share its columns; a score
        head: scores (S,).
        cache: sequence s goes on from what slot cache.at[s] holds; its length is the caller's to
        advance."""
        N, S = len(tokens), len(cu_seqlens) - 1
        sizes = cu_seqlens.diff()
        sequence = torch.repeat_interleave(sizes, output_size=N)  # (N,) which sequence is it of
        positions = torch.arange(N, device=tokens.device) - cu_seqlens[sequence]
        past, lengths, mask = 0, None, None
        if cache is not None:
            positions, lengths, mask = cache.begin(sequence, positions)
            past = cache.past
        angles = positions[:, None, None].float() * self.frequencies
        x = self.model.embed_tokens(tokens)  # (N, C)
        needs_sizes = lengths is None and not runs_flash(x)
        span = Span(cu_seqlens, sizes.tolist() if needs_sizes else None,
                    1 if N == S else int(sizes.max()), past, lengths, mask)
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        cos, sin = torch.cat([cos, cos], -1).to(x.dtype), torch.cat([-sin, sin], -1).to(x.dtype)
        for layer, block in enumerate(self.model.layers):
            # The number comes with a cache only: torch 2.11 would compile a block for 0 and others.
            x = block(x, cos, sin, span, (cache, layer) if cache else ())
        if targets is None:
            x = x[cu_seqlens[1:].long() - 1]  # (S, C) the last token of each sequence
        x = self.model.norm(x)
        if is_scorer(self.config):
            return self.score(x)[:, 0].float()
        # The head's weight is used inside the root's forward, where FSDP has gathered it.
        head = self.lm_head if hasattr(self, "lm_head") else self.model.embed_tokens
        weight = head.weight[:max(0, self.num_tokens - self.first_token)]
        if targets is None:
            return x @ weight.T
        rows = (targets >= 0).nonzero()[:, 0]
        found = ChunkedLogProbs.apply(x[rows], weight, targets[rows], temperature)
        return tuple(y.new_zeros(N).index_copy(0, rows, y) for y in found)


def is_scorer(config):
    return config["architectures"][0] == SCORES


# ---------------------------------------------------------------- sharding

def join_share(ranks, size):
    """This rank's Share, of `size` neighbouring ranks on one machine."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    if count % size:
        raise InputError(f"sample_tp={size}: expected a divisor of the {count} ranks of a node")
    if size == 1:
        return WHOLE
    ranks.meet()
    group, _ = dist.new_subgroups(size, timeout=timedelta(seconds=SHARE_SECONDS))
    return Share(ranks.rank % size, size, group)


def split(model):
    """Let the slices of a model's share compute together: sums where a product's inner size is
    split, and a token's embedding from the rank that has its row. In place."""
    share, table = model.share, model.model.embed_tokens

    def look_up(tokens):
        row = tokens - model.first_token
        is_here = (row >= 0) & (row < len(table.weight))
        return share.sum(F.embedding(row * is_here, table.weight) * is_here[:, None])

    table.forward = look_up
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.register_forward_hook(lambda linear, inputs, output: share.sum(output))


def part_of(model, name, whole):
    """A model's own part of a parameter: of a tensor, or of a lazily read slice of a file."""
    if model.share.size == 1 or "norm" in name:
        return whole
    shape = model.get_parameter(name).shape
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return whole[:, model.share.rank * shape[1]:(model.share.rank + 1) * shape[1]]
    is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
    start = model.first_token if is_table else model.share.rank * shape[0]
    return whole[start:start + shape[0]]


def shard(model, ranks, offload=False):
    """FSDP2: one group per block, the rest (with a tied head) in the root's. In place.

    On CUDA parameters are fp32 masters, compute is bf16 and gradients are reduced in fp32;
    offload keeps all that is sharded in the CPU's memory."""
    half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = dict(mesh=dist.device_mesh.init_device_mesh(ranks.device.type, (ranks.world,)),
                   mp_policy=MixedPrecisionPolicy(**half if ranks.is_cuda else {}),
                   offload_policy=(CPUOffloadPolicy(pin_memory=ranks.is_cuda) if offload
                                   else OffloadPolicy()))
    for block in model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def let_go(model):
    """Free what FSDP keeps gathered when no backward pass follows: the root's parameters."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full_parameters(model, dtype):
    """(name, whole tensor in this dtype) of every parameter; collective where it is sharded."""
    let_go(model)
    for name, parameter in model.named_parameters():
        whole = parameter.detach().to(dtype)
        yield name, whole.full_tensor() if isinstance(whole, DTensor) else whole


@torch.no_grad()
def copy_weights(source, target):
    """Copy a (sharded) model into a plain one or into a rank's slices of one, a parameter at a
    time; collective."""
    parameters = dict(target.named_parameters())
    for name, whole in full_parameters(source, target.model.norm.weight.dtype):
        parameters[name].copy_(part_of(target, name, whole))


# ---------------------------------------------------------------- folders

def find_folder(name, with_weights=False):
    """A local folder, or a hub repository brought to one (local cache first)."""
    folder = Path(name)
    if not name:
        raise InputError("expected a model folder or a hub name, found an empty text")
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(f"{name}: expected a model folder, found no config.json")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise InputError(f"{name}: no such folder, and not a hub name like Qwen/Qwen2.5-7B")
    patterns = ["*.json", "*.txt", "*.jinja"] + ["*.safetensors"] * with_weights
    for is_local in True, False:
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns,
                                            local_files_only=is_local))
            needed = ["config.json"] + (weight_files(folder) if with_weights else [])
            if not is_local or all((folder / file).exists() for file in needed):
                return folder
        except (OSError, ValueError) as error:  # what the hub raises is either
            reason = str(error).strip().split("\n")[0]
    raise InputError(f"{name}: no such folder, and the hub says: {reason}")


def load_config(name, with_weights=False):
    """(folder, config dict) of a Qwen2 folder, checked."""
    folder = find_folder(name, with_weights)
    path = folder / "config.json"
    config = read_config(path)
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in (LANGUAGE, SCORES):
        raise InputError(f"{path}: expected architecture {LANGUAGE} or {SCORES}, "
                         f"found {architecture}")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings")
    for key in needed:
        if not isinstance(config.get(key), (int, float)):
            raise InputError(f"{path}: expected a number for {key}, found {config.get(key)!r}")
    rope = rope_settings(config)
    if rope["rope_type"] not in ("default", "yarn"):
        raise InputError(f"{path}: expected rope type default or yarn, found {rope['rope_type']}")
    if rope["rope_type"] == "yarn" and not rope.get("factor"):
        raise InputError(f"{path}: expected a factor of YaRN, found {rope}")
    if config.get("use_sliding_window"):
        raise InputError(f"{path}: expected full attention, found use_sliding_window: true")
    return folder, config


def load_tokenizer(name):
    """The folder's tokenizer, by transformers; nothing of it is run as code."""
    from transformers import AutoTokenizer
    folder, config = load_config(name)
    if not any((folder / file).exists() for file in ("tokenizer.json", "vocab.json")):
        raise InputError(f"{name}: expected tokenizer.json or vocab.json, found neither")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{name}: expected a tokenizer, found none: {reason}") from None
    if len(tokenizer) > config["vocab_size"]:
        raise InputError(f"{name}: expected a vocab_size of at least the tokenizer's "
                         f"{len(tokenizer)}, found {config['vocab_size']}")
    return tokenizer


def weight_files(folder):
    """Names of a folder's safetensors: one file, or an index's many."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: expected JSON with a weight_map") from None


def open_tensors(folder):
    """{tensor name: lazily read slice} of a folder's safetensors."""
    tensors = {}
    for file in weight_files(folder):
        if not (folder / file).exists():
            raise InputError(f"{folder / file}: no such file")
        try:
            opened = safe_open(folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder / file}: expected safetensors, found: {error}") from None
        tensors |= {name: opened.get_slice(name) for name in opened.keys()}
    return tensors


@torch.no_grad()
def fill(parameter, rows):
    """Copy rows (a tensor or a lazily read slice) into a parameter, or into this rank's shard."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(rows[:])
        return
    local, mesh = parameter.to_local(), parameter.device_mesh
    start = mesh.get_local_rank() * -(-len(parameter) // mesh.size())  # FSDP's split: torch.chunk
    if len(local):
        local.copy_(rows[start:start + len(local)])


def load_weights(model, folder, new=()):
    """Fill a model strictly from a folder; names in `new` start at zero instead."""
    tensors = open_tensors(folder)
    parameters = dict(model.named_parameters())
    with torch.device("meta"):
        shapes = {name: list(x.shape) for name, x in Qwen2(model.config).named_parameters()}
    unread = {"lm_head.weight", "score.weight"} - set(parameters)  # of tied or replaced heads
    for name in sorted(set(tensors) - set(parameters) - unread):
        if not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{folder}: found tensor {name}, which its config does not have")
    for name, parameter in parameters.items():
        expected = shapes[name]
        if name in new:
            fill(parameter, torch.zeros(expected))
        elif name not in tensors:
            raise InputError(f"{folder}: expected tensor {name}, found none")
        elif (found := list(tensors[name].get_shape())) != expected:
            raise InputError(f"{folder}: tensor {name}: expected shape {expected}, found {found}")
        else:
            fill(parameter, part_of(model, name, tensors[name]))


def init_weights(model, seed):
    """Random weights as GPT-2's: normal 0.02, what writes to the residual stream smaller."""
    depth = (2 * model.config["num_hidden_layers"]) ** -0.5
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 0.02 * (depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
        if parameter.dim() > 1:
            fill(parameter, torch.empty(parameter.shape).normal_(0, std, generator=generator))
        else:
            fill(parameter, torch.full(parameter.shape, float("norm" in name)))


def build_model(config, device, dtype=torch.float32, ranks=None, share=WHOLE, recompute="none",
                compile=False, offload=False):
    """A model without values yet; with ranks that shard it is sharded over them, with a share it
    is this rank's slices, and was never whole.

    recompute: as Block says; compile: each block by torch.compile, once for all; offload: as
    shard says."""
    with torch.device("meta"):
        model = Qwen2(config, recompute, share).to(dtype)
    if share.size > 1:
        split(model)
    if ranks and ranks.shards:
        shard(model, ranks, offload)
    if compile:  # without torch's warning that recomputed code must not work in place: none does
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        for block in model.model.layers:
            block.forward = torch.compile(block.forward)
    model.to_empty(device="cpu" if offload else device)
    model.frequencies = rope_frequencies(config)[0].to(device)
    return model


def load_model(name, device, dtype=torch.float32, ranks=None, config=None, new=(), seed=None,
               head=LANGUAGE, **options):
    """A model from a folder, built as build_model does with these options.

    config replaces the folder's (a score head on a language model, say) and new names the
    parameters that the folder does not have; with a seed all weights are random. A model with
    another head is an error."""
    folder, found = load_config(name, with_weights=seed is None)
    config = config or found
    if config["architectures"][0] != head:
        raise InputError(f"{name}: expected architecture {head}, "
                         f"found {config['architectures'][0]}")
    model = build_model(config, device, dtype, ranks, **options)
    if seed is None:
        load_weights(model, folder, new)
    else:
        init_weights(model, seed)
    model.folder = folder
    return model


def load_for_training(keys, ranks, **options):
    """The model of a training script's config, fp32."""
    recompute = keys["recompute"] or ("all_but_attention" if ranks.is_cuda else "none")
    return load_model(keys["model"], ranks.device, ranks=ranks, recompute=recompute,
                      compile=ranks.is_cuda and keys["compile"],
                      offload=ranks.is_cuda and keys["offload"], **options)


def compute_dtype(ranks):
    """The dtype of weights that are not trained: a sampler's, a reward model's, an export's."""
    return torch.bfloat16 if ranks.is_cuda else torch.float32


def load_for_sampling(name, ranks, share=WHOLE):
    """(a plain copy or a rank's slices of one, its tokenizer)"""
    model = load_model(name, ranks.device, compute_dtype(ranks), share=share)
    tokenizer = load_tokenizer(name)
    model.num_tokens = len(tokenizer)
    return model, tokenizer


def save_folder(model, folder, dtype, max_bytes=5_000_000_000):
    """Write a Hugging Face folder: config, tokenizer files of where the model came from, and
    safetensors of at most max_bytes each. Collective; rank 0 writes."""
    ranks, folder, source = setup(), Path(folder), model.folder
    is_writer = ranks.rank == 0
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(model.config)
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).split(".")[-1]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for pattern in ("token*.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                        "added_tokens.json", "generation_config.json", "chat_template.jinja"):
            for file in source.glob(pattern):
                if file.resolve() != (folder / file.name).resolve():
                    shutil.copy(file, folder / file.name)
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
    sizes = {name: torch.empty(parameter.shape, dtype=dtype, device="meta")
             for name, parameter in model.named_parameters()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=max_bytes)
    parts = {file: {} for file in plan.filename_to_tensors}
    for name, whole in full_parameters(model, dtype):
        file = plan.tensor_to_filename[name]
        parts[file][name] = whole.cpu().contiguous() if is_writer else None
        if len(parts[file]) < len(plan.filename_to_tensors[file]):
            continue
        tensors = parts.pop(file)  # written once it is whole
        if is_writer:
            save_file(tensors, folder / file, metadata={"format": "pt"})
            # safetensors 0.8 lets nobody but the owner read it
            shutil.copymode(folder / "config.json", folder / file)
        ranks.meet()  # rank 0 has written
    if is_writer and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# ---------------------------------------------------------------- the plan of a folder

def count_parameters(config):
    with torch.device("meta"):  # without blocks, and with one
        ends, one = (sum(p.numel() for p in Qwen2(config | {"num_hidden_layers": n}).parameters())
                     for n in (0, 1))
    return ends + config["num_hidden_layers"] * (one - ends)


def count_multiplied(config):
    """Parameters that every token is multiplied by: not an embedding apart from the head."""
    is_head = config.get("tie_word_embeddings") and not is_scorer(config)
    return count_parameters(config) - (0 if is_head else
                                       config["vocab_size"] * config["hidden_size"])


def flops_per_token(config, length):
    """Forward and backward, of a token in a sequence of this length: causal attention, no credit
    for recomputation."""
    return 6 * (count_multiplied(config)
                + config["num_hidden_layers"] * config["hidden_size"] * length)


def training_plan(config, gpus, pack_tokens, recompute="all_but_attention", width=2):
    """{kind: bytes on each GPU} of training in packs of so many tokens, as if all were there at
    one time; recompute: as Block says; width: bytes of a computed value."""
    C, layers = config["hidden_size"], config["num_hidden_layers"]
    count, table = count_parameters(config), config["vocab_size"] * C
    head = 0 if is_scorer(config) else table
    tables = table if config.get("tie_word_embeddings") else table + head
    block = (count - tables) // layers
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    qkv, attended = (n * head_size(config) for n in (heads + 2 * kv_heads, heads))
    ffn = config["intermediate_size"]
    inside = 5 * C + 2 * qkv + 4 * ffn  # what a block's backward reads
    kept = {"saved block inputs": width * C * layers * pack_tokens,
            "saved attention outputs": (width * attended + 4 * heads) * layers * pack_tokens,
            "one recomputed block": width * inside * pack_tokens}
    if recompute == "all":
        del kept["saved attention outputs"]
    elif recompute == "none":
        kept = {"saved activations": width * inside * layers * pack_tokens}
    return {"fp32 weights, two moments, gradient": 16 * count // gpus,
            "two gathered blocks, one's gradient": (2 * width + 4) * block,
            "gathered embedding and head, gradient": width * tables + 4 * table,
            **kept, "a block's gradients on the way": width * 4 * ffn * pack_tokens,
            "logits of a chunk":
                bool(head) * 3 * 4 * min(HEAD_LOGITS, config["vocab_size"] * pack_tokens)}


def sampling_plan(config, sample_tp, max_tokens):
    """{kind: bytes on each GPU} of a bf16 sampler, and of each completion of so many tokens."""
    keys = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_size(config)
    return {"sampling weights": 2 * count_parameters(config) // sample_tp,
            "cache of one completion": keys * max_tokens // sample_tp}


def print_table(values):
    for name, value in values.items():
        print(f"  {name:<46} {f'{value:,}' if isinstance(value, int) else value:>18}")


@script
def main(argv):
    config = parse_config(CONFIG, argv, limits=dict(gpus=1, sample_tp=1, max_tokens=1))
    _, found = load_config(config["model"])
    print(f"{config['model']}: {found['architectures'][0]}; bytes on each GPU")
    print_table({"parameters": count_parameters(found)}
                | training_plan(found, config["gpus"], config["max_tokens"])
                | sampling_plan(found, config["sample_tp"], config["max_tokens"]))


if __name__ == "__main__":
    main()
