"""Prompts in, text out: rows, templates, the KV cache, and batched sampling with refill.

    python sample.py prompt="Write about the baker in the harbor in 60 words."
    python sample.py model=FOLDER prompts=rows.jsonl out=out/answers num_samples=4
    torchrun --nproc_per_node 8 sample.py model=FOLDER prompts=rows.jsonl sample_tp=4

Shapes: R rows that decode together (slots of the cache), P prompts, T tokens of a prompt,
K key/value heads, D head size, V vocabulary.

1. A row of the batch is a slot of the cache: a sequence keeps its slot until it ends, then the
   next one takes it. When no work is left, the last rows move into the gaps, so that the tail
   of a rollout does not pay for empty slots.
2. A token is the arg-max of logits plus Gumbel noise, and the noise is a hash of (seed, step,
   prompt, sample, position, token id). There is no generator state: the same text comes in any
   order, on any number of ranks, after any resume.
3. Log-probs are those of the very distribution sampled from: after temperature, top-k and top-p.
4. A stop string may span tokens. The text ends with the token that completes it; nothing that
   was not sampled is ever appended.
5. With sample_tp ranks to a model, each has slices of the weights, of the cache and of the
   vocabulary. The leader tells which job comes next and what was drawn: sums that a GPU makes in
   another order (of a nucleus, say) must not part the engines of a share.
"""
import fcntl
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import time
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.fx.experimental import _config as shape_config
from tqdm import tqdm

from model import (SHARE_SECONDS, WHOLE, InputError, context_length, die, flatten,
                   has_decode_kernel, head_size, join_share, load_for_sampling, open_folder,
                   parse_config, print_once, script, setup, split_config, writes_to)

CONFIG = dict(
    model="toy/policy",   # folder or hub name
    prompt="Write about the baker in the harbor in 60 words.",  # written to the terminal
    prompts="",           # file of prompt rows instead; their answers go to out/responses.jsonl
    columns={},           # other names of "id", "prompt", "length": {"prompt": "query"}
    out="out/sample",     # folder of responses.jsonl
    resume=True,          # go on where responses.jsonl stops; false refuses a folder that exists
    template="think",     # think, direct or chat
    num_samples=1,        # answers a prompt
    max_tokens=400,       # of a completion
    temperature=0.6,      # 0 is greedy; 0.6 and top-p 0.95 as LongWriter-Zero's authors sample
    top_p=0.95,
    top_k=0,              # 0 is off
    slots=64,             # sequences that decode together
    compile_decode=False,  # decode steps by torch.compile: up to a minute at first, then faster
    sample_tp=1,          # ranks that share one copy of the model
    seed=0,
)
LIMITS = dict(template=["think", "direct", "chat"], max_tokens=1, temperature=0, top_p=(1e-6, 1),
              top_k=0, slots=1, sample_tp=1)
OPTIONS = ("temperature", "top_p", "top_k", "seed", "compile_decode")  # of generate too
STOP_STRINGS = ("</answer>", "<|user|>")
END = r"(<\|endoftext\|>|<\|im_end\|>)\s*$"  # of a completion that a stop token ended
LOOK_EVERY = 8  # decode steps between the host's looks at what was sampled
MIN_ROWS = 16   # below this, fp32 matrix products change in the last bit with the number of rows
PREFILL_TOKENS = 2048  # of prompts read in one pass; more was no faster on a CPU


# ---------------------------------------------------------------- rows in

def read_rows(path):
    """Yield (place, row) from JSONL, JSON, either gzipped, or Parquet; only a JSON list is read as
    a whole. A line that is not UTF-8 JSON comes as its text."""
    if not Path(path).is_file():
        raise InputError(f"{path or repr(path)}: no such file")
    path = Path(path)
    kind = {".json": "a JSON list of rows", ".parquet": "Parquet"}.get(
        kind_of(path), "lines of UTF-8 JSON")
    try:
        for number, row in enumerate(read_any(path), 1):
            if row != b"":
                yield f"{path}:{number}", row
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        raise InputError(f"{path}: expected {kind}: {error}") from None


def kind_of(path):
    """The ending of a name that says what is in the file, .gz or not."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_any(path):
    """The rows of a file of any kind; b"" for an empty line, so that lines can be counted."""
    if kind_of(path) == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise InputError(f"{path}: reading Parquet needs: pip install pyarrow") from None
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
        return
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
        if kind_of(path) == ".json":
            rows = json.loads(file.read().decode("utf-8-sig"))  # some editors put a mark first
            if not isinstance(rows, list):
                raise ValueError(f"found {type(rows).__name__}")
            yield from rows
            return
        yield from map(read_line, file)


def read_line(line):
    """What a line of JSON holds, the beginning of its text where it is none, b"" if empty."""
    line = line.strip()
    try:
        return line and json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # brackets within brackets
        return line.decode(errors="replace")[:40]


def checked_rows(paths, check):
    """Yield what check(row, number) returns of each row of a file, or of several. Rows where it
    raises ValueError are reported and skipped; more than 1% of them all is an error, as is a file
    without rows, but only at the end: use nothing before."""
    num_rows, bad = 0, []
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    for path in paths:
        before = num_rows
        for place, row in read_rows(path):
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, found {row!r}")
                yield check(row, num_rows)
            except ValueError as reason:
                bad.append(f"{place}: {reason}")
            num_rows += 1
        if num_rows == before:
            raise InputError(f"{path}: expected rows, found none")
    if len(bad) > 0.01 * num_rows:
        raise InputError(f"{bad[0]} ({len(bad)} of {num_rows} rows are bad; at most 1% may be)")
    for line in bad:
        print_once(f"skipped {line}")
    if bad:
        print_once(f"skipped {len(bad)} of {num_rows} rows of {', '.join(map(str, paths))}")


def load_rows(path, check):
    """The rows of a file that check(row, number) accepts, as checked_rows yields them."""
    return list(checked_rows(path, check))


def prompt_row(row, number, columns):
    """{"id", "prompt", "length"} from a row; its 0-based place stands in for an id, and a
    conversation gives its first user turn."""
    get = lambda key: row.get(columns.get(key, key))
    prompt = get("prompt")
    for turns in (row.get("messages"), row.get("conversation")):
        if prompt is None and isinstance(turns, list):
            prompt = next((turn.get("content") for turn in turns
                           if isinstance(turn, dict) and turn.get("role") == "user"), None)
    if not isinstance(prompt, str) or not prompt.strip():
        found = f"columns {sorted(row)}" if prompt is None else repr(prompt)
        raise ValueError(f"expected a text under {columns.get('prompt', 'prompt')!r}, "
                         f"found {found:.200}")
    length = get("length")
    if length is not None:
        if not (isinstance(length, list) and len(length) == 2
                and all(isinstance(n, (int, float)) for n in length)):
            raise ValueError(f"expected length [lo, hi], found {length!r}")
        if not 0 <= length[0] <= length[1]:
            raise ValueError(f"expected length with 0 <= lo <= hi, found {length!r}")
    identity = number if get("id") is None else get("id")
    if not isinstance(identity, (str, int)):
        raise ValueError(f"expected an id that is a text or a whole number, found {identity!r}")
    for text in prompt, str(identity):
        text.encode()  # half a surrogate pair is JSON, and no text
    return {"id": identity, "prompt": prompt, "length": length}


def load_prompts(path, columns={}, needs_length=False):
    """Prompt rows of a file; each id is there once."""
    seen = set()
    for key, name in columns.items():
        if key not in ("id", "prompt", "length") or not isinstance(name, str):
            raise InputError(f"columns: expected names for id, prompt or length, "
                             f"found {key!r}: {name!r}")

    def check(row, number):
        found = prompt_row(row, number, columns)
        if found["id"] in seen:
            raise ValueError(f"expected a new id, found {found['id']!r} again")
        if needs_length and found["length"] is None:
            raise ValueError(f"expected length [lo, hi], found columns {sorted(row)}")
        seen.add(found["id"])
        return found

    return load_rows(path, check)


# ---------------------------------------------------------------- templates

TEMPLATES = {
    "think": (
        "Think before you write. Inside <think></think>, plan the text in depth: ask yourself "
        "what the request wants, outline the parts and their lengths, question the outline and "
        "review it. Then put the finished text, and nothing else, inside <answer></answer>.\n"
        "<|user|>: {prompt} <|assistant|>:"),
    "direct": (
        "Write the text that is asked for, and put it, and nothing else, inside "
        "<answer></answer>.\n<|user|>: {prompt} <|assistant|>:"),
}
TEMPLATES_CHINESE = {
    "think": (
        "先思考，再写作。请在<think></think>中深入构思：弄清要求，列出各部分及其篇幅，"
        "反复质疑并检查提纲。然后把完成的正文放在<answer></answer>中，其中不要有别的内容。\n"
        "<|user|>: {prompt} <|assistant|>:"),
    "direct": (
        "请写出所要求的正文，并把它放在<answer></answer>中，其中不要有别的内容。\n"
        "<|user|>: {prompt} <|assistant|>:"),
}
HAN = r"\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
WIDE = (HAN + r"\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
        r"\U0001aff0-\U0001b16f"  # kana
        r"\u1100-\u11ff\ua960-\ua97f\uac00-\ud7ff")  # hangul: each of these characters is a word
FILLERS = "\u115f\u1160\u3164\uffa0"  # hangul letters without a shape


def normalise_text(text):
    """NFKC without invisible characters; a comma between Chinese words joins nothing."""
    if text.isascii():
        return text
    text = re.sub("[\uff0c\uff0e]", " ", text)
    invisible = {ord(c): None for c in set(text)
                 if unicodedata.category(c) == "Cf" or c in FILLERS}
    return unicodedata.normalize("NFKC", text.translate(invisible) if invisible else text)


def word_pattern(text):
    """The pattern of a word in this normalised text: a run holds its letters' combining marks
    (vowels in Hindi or Thai), which re has no class for."""
    marks = "" if text.isascii() else "".join(
        sorted(c for c in set(text) if unicodedata.category(c)[0] == "M"))
    run = rf"(?:[^\W_{WIDE}][{marks}]*)+" if marks else rf"[^\W_{WIDE}]+"
    return rf"[{WIDE}]|{run}(?:['\u2019\u2010.,-]{run})*"


def find_words(text):
    """Words: one per Han, kana or hangul character, one per run of letters and digits with inner
    apostrophes, hyphens, dots and commas; full-width and invisible disguises undone."""
    text = normalise_text(text)
    return re.findall(word_pattern(text), text)


def has_han(text):
    return bool(re.search(f"[{HAN}]", text))


def count_words(text):
    return len(find_words(text))


def render_chat(tokenizer, turns, to_answer):
    """A conversation of {"role", "content"} as text, by the checkpoint's own chat template where
    it has one; to_answer opens the assistant's turn."""
    if tokenizer.chat_template:
        from jinja2 import TemplateError
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False,
                                                 add_generation_prompt=to_answer)
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template says: {error}") from None
    said = (f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return "".join(said) + "<|im_start|>assistant\n" * to_answer


def apply_template(tokenizer, template, prompt):
    """The text that the model goes on from."""
    if template == "chat":
        try:
            return render_chat(tokenizer, [{"role": "user", "content": prompt}], True)
        except ValueError as error:
            raise InputError(f"template=chat: {error}") from None
    texts = TEMPLATES_CHINESE if has_han(prompt) else TEMPLATES
    return texts[template].replace("{prompt}", prompt)


def encode(tokenizer, text):
    """A text's tokens and no others, without transformers' warning when they are more than the
    tokenizer's settings say: the model's config.json decides."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def encode_prompts(tokenizer, template, rows, context, max_tokens):
    """Prompt tokens of each row; an error names the row that does not fit the context."""
    prompts = [encode(tokenizer, apply_template(tokenizer, template, row["prompt"]))
               for row in rows]
    for row, tokens in zip(rows, prompts):
        if len(tokens) + max_tokens > context:
            raise InputError(f"prompt {row['id']!r}: {len(tokens)} tokens and max_tokens="
                             f"{max_tokens} are more than the model's context of {context}")
    return prompts


def find_answer(completion, template):
    """The answer alone: what <answer> holds, closed or not, or "" without one; in chat, where
    there may be no tags, the text after any thinking."""
    completion = re.sub(rf"{END}|<\|user\|>\s*$", "", completion)
    # some chat templates open <think> in the prompt (QwQ, R1)
    before = r"^.*?</think>" if template == "chat" else r"^\s*<think>.*?</think>"
    completion = re.sub(before, "", completion, count=1, flags=re.DOTALL)
    found = re.search(r"<answer>(.*?)(?:</answer>|$)", completion, re.DOTALL)
    if found:
        return found[1].strip()
    if template != "chat":
        return ""
    return re.sub(r"<think>.*", "", completion, flags=re.DOTALL).strip()


class Stops:
    """Stop tokens, and stop strings that may span tokens.

    may_stop (V,) marks the tokens at which the host has to look: stop tokens, and tokens that
    hold the last character of a stop string or part of a character."""

    def __init__(self, tokenizer, strings, num_tokens):
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        self.tokens = {tokenizer.eos_token_id, *ends} - {None}
        last = {string[-1] for string in self.strings} | {"\ufffd"}
        pieces = tokenizer.batch_decode([[i] for i in range(num_tokens)])
        self.may_stop = torch.tensor([i in self.tokens or bool(last & set(piece))
                                      for i, piece in enumerate(pieces)])
        self.reach = max((len(string.encode()) for string in self.strings), default=0)

    def find(self, tokens, start):
        """Length of the completion at its first stop at or after token `start`, else 0."""
        for end in range(start + 1, len(tokens) + 1):
            if tokens[end - 1] in self.tokens:
                return end
            if self.may_stop[tokens[end - 1]]:
                tail = self.tokenizer.decode(tokens[max(0, end - self.reach):end])
                if any(string in tail for string in self.strings):
                    return end
        return 0


# ---------------------------------------------------------------- noise and sampling

def noise_key(*identity):
    """Two int32 from (seed, step, prompt, sample); a step may be a tuple of numbers."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return [int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:])]


def shift_right(x, bits):
    return (x >> bits).bitwise_and_((1 << 32 - bits) - 1)  # int32 shifts keep the sign: mask it


def scramble(x, key):
    """A bijective hash of int32 (the multipliers are lowbias32's); arithmetic wraps."""
    x = x ^ shift_right(x, 16)
    x.mul_(0x7FEB352D).add_(key)
    x.bitwise_xor_(shift_right(x, 15)).mul_(0x846CA68B - (1 << 32))
    return x.bitwise_xor_(shift_right(x, 16))


def exponential_noise(keys, positions, ids):
    """Exponential noise (R, V) of mean 1 in fp32, a pure function of keys (R, 2) int32,
    positions (R,) and token ids (V,) or (R, V). 31 bits decide each value; steps are finest
    near 0, where the arg-max is decided."""
    rows = scramble(keys[:, 0] + positions * -1640531527, keys[:, 1])  # 2^32 / golden ratio
    bits = scramble(rows[:, None] + ids.int() * -1640531527, keys[:, 1:]).bitwise_and_(0x7FFFFFFF)
    minus_u = bits.float().add_(0.5).mul_(-2.0 ** -31).clamp_(min=2.0 ** -24 - 1)
    return minus_u.log1p_().neg_()  # -log(1 - u)


def truncate(logits, top_p, top_k):
    """logits (R, V) with -inf outside the top k, then outside the nucleus of mass top_p."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        is_out = probs.cumsum(-1) - probs >= top_p  # the mass before a token decides
        logits = logits.masked_fill(is_out.scatter(1, order, is_out), -torch.inf)
    return logits


def sample_tokens(logits, keys, positions, temperature, top_p, top_k, first=0):
    """Tokens (R,) and the log-probs (R,) that they were sampled with; greedy ones have 0. The
    logits (R, V) are of the tokens from `first` on."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens + first, logits.amax(-1) * 0  # NaN and infinity show
    logits = truncate(logits / temperature, top_p, top_k)
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    # Gumbel-max, log w + (-log e), without its logarithms: w / e has the same order
    ids = torch.arange(first, first + logits.shape[1], device=logits.device)
    tokens = (weights / exponential_noise(keys, positions, ids)).argmax(-1)
    return tokens + first, (weights.gather(1, tokens[:, None])[:, 0] / weights.sum(-1)).log()


def sample_among_ranks(share, logits, keys, positions, first, columns, **sampling):
    """sample_tokens where each rank of a share has `columns` of the logits, fewer at the end: the
    best of the ranks' own winners wins."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling["temperature"] == 0 or sampling["top_k"] or sampling["top_p"] < 1:
        logits = F.pad(logits, (0, columns - logits.shape[1]), value=-torch.inf)
        logits = share.stack(logits).transpose(0, 1).flatten(1)  # (R, V): these need all of it
        return sample_tokens(logits, keys, positions, **sampling)
    tokens, logprobs = sample_tokens(logits, keys, positions, **sampling, first=first)
    mass = (logits / sampling["temperature"]).logsumexp(-1)
    noise = exponential_noise(keys, positions, tokens[:, None])[:, 0]
    mine = torch.stack([logprobs + mass - noise.log(), tokens, logprobs + mass, mass])
    race, tokens, weights, masses = share.stack(mine).unbind(1)  # (size, R) each
    winner = race.argmax(0, keepdim=True)
    return (tokens.gather(0, winner)[0].long(),  # fp32 holds whole numbers to 16 million
            weights.gather(0, winner)[0] - masses.logsumexp(0))


# ---------------------------------------------------------------- the cache

class Cache:
    """Keys and values of up to `slots` running sequences, each of up to `cap` tokens:
    (slots, K, cap, D) for each layer. `lengths` says what the slots hold."""

    def __init__(self, model, slots, cap):
        config = split_config(model.config, model.share)
        weight = model.model.norm.weight
        shape = slots, config["num_key_value_heads"], cap, head_size(config)
        self.k, self.v = ([torch.zeros(shape, dtype=weight.dtype, device=weight.device)
                           for _ in model.model.layers] for _ in "kv")
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=weight.device)
        self.slots = torch.arange(slots, device=weight.device)
        self.cap = cap
        self.needs_mask = not has_decode_kernel(self.k[0])
        # reach, which follows the longest sequence, is a multiple of this: coarse on CUDA, where
        # each reach has a graph of its own
        self.grain = 16 if not weight.is_cuda else -(-cap // 8) if self.needs_mask else cap

    def use_for_prefill(self, slots, past):
        """The next forward pass reads prompts into these slots; with a past above 0, one goes on
        after so many tokens."""
        self.at = torch.tensor(slots, device=self.lengths.device)
        self.slot, self.rows, self.past, self.lengths[self.at] = slots[0], 0, past, past

    def use_for_decode(self, rows, reach):
        """The next forward passes add a token to each of the first `rows` slots, none of which
        comes to hold more than `reach`."""
        self.at, self.rows, self.past = self.slots[:rows], rows, 0
        self.reach = min(-(-reach // self.grain) * self.grain, self.cap)

    def begin(self, sequence, offsets):
        """Start a forward pass over tokens `offsets` past what their sequence's slot holds.

        Returns their positions (N,), and for a decode step the number of keys (S,) to read and,
        where no kernel reads that, the mask (S, 1, 1, reach) that leaves the others out."""
        slot = self.at[sequence]
        positions = self.lengths[slot].long() + offsets
        heads = torch.arange(self.k[0].shape[1], device=slot.device)
        self.places = slot[:, None], heads, positions[:, None]  # (N, K) of slots, K, cap
        if not self.rows:
            self.reach = self.past + len(positions)
            return positions, None, None
        lengths = self.lengths[:self.rows] + 1
        if not self.needs_mask:
            return positions, lengths, None
        is_past = torch.arange(self.reach, device=lengths.device) < lengths[:, None]
        mask = torch.zeros(is_past.shape, dtype=self.k[0].dtype, device=lengths.device)
        return positions, lengths, mask.masked_fill_(~is_past, -torch.inf)[:, None, None]

    def write(self, layer, k, v):
        """Store this call's keys and values (N, K, D)."""
        for cached, new in (self.k[layer], k), (self.v[layer], v):
            cached[self.places] = new  # of a view torch.compile would copy the whole cache

    def read(self, layer):
        """Keys and values (S, reach, K, D) of a decode step's slots, or (reach, K, D) of the
        prompt that goes on."""
        which = slice(self.rows) if self.rows else self.slot
        return [cached[layer][which, :, :self.reach].transpose(-3, -2)
                for cached in (self.k, self.v)]

    def copy(self, source, target, length):
        for cached in *self.k, *self.v:
            cached[target, :, :length] = cached[source, :, :length]


# ---------------------------------------------------------------- generate

class Completion(NamedTuple):
    prompt: int      # place in the list of prompts
    sample: int      # 0-based among the prompt's samples
    tokens: list     # everything sampled, up to and with what stopped it
    logprobs: list   # of each token, under the distribution it was sampled from
    finish: str      # "stop", or "length" when it was cut at max_tokens


class Engine:
    """The slots of one rank, or of the ranks that share a model: admits work into free ones,
    decodes all, collects what has ended."""

    def __init__(self, model, prompts, stops, max_tokens, slots, seed, step, compile_decode,
                 sampling):
        device = model.model.norm.weight.device
        self.model, self.prompts, self.stops, self.sampling = model, prompts, stops, sampling
        self.identity, self.device = (seed, step), device
        self.limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        longest, most = max(map(len, prompts)), max(self.limits) + LOOK_EVERY
        self.slots = max(slots, MIN_ROWS)
        # with room to spare: a step would be compiled anew for a cache that is full
        self.cache = Cache(model, self.slots, (longest + most) // 16 * 16 + 32)
        zeros = lambda *shape, dtype: torch.zeros(self.slots, *shape, dtype=dtype, device=device)
        self.token = zeros(dtype=torch.long)         # (R,) last token, not yet in the cache
        self.keys = zeros(2, dtype=torch.int32)      # (R, 2) of the noise
        self.count = zeros(dtype=torch.int32)        # (R,) tokens sampled so far
        self.is_active = zeros(dtype=torch.int32)    # (R,) 1; 0: a row that runs for nothing
        self.out_tokens = zeros(most + 1, dtype=torch.long)
        self.out_logprobs = zeros(most + 1, dtype=torch.float32)
        self.may_stop = stops.may_stop.to(device)
        self.cu_seqlens = torch.arange(self.slots + 1, dtype=torch.int32, device=device)
        self.jobs = [None] * self.slots    # (prompt, sample) that runs in a slot
        self.held = [None] * self.slots    # prompt whose keys begin a slot, running or ended
        self.counts = [0] * self.slots     # as count, known to the host without asking
        self.next_logits = {}              # of held prompts
        self.has_work = True
        if compile_decode and model.share.size > 1:
            raise InputError(f"compile_decode=true: expected sample_tp=1, found {model.share.size}")
        if compile_decode:  # once for all engines and sizes
            self.step = torch.compile(self.step, dynamic=True)
        self.graphs, self.pool = {}, None  # CUDA graphs of a decode step by its shape; their memory
        self.start, self.num_tokens, self.ended = time.perf_counter(), 0, Counter()

    def running(self):
        return [slot for slot, job in enumerate(self.jobs) if job]

    def progress(self):
        rate = self.num_tokens / (time.perf_counter() - self.start)
        return (f"{rate:,.0f} tokens/s, {len(self.running())} running, "
                f"{self.ended['stop']} finished, {self.ended['length']} truncated")

    def sample(self, logits, keys, positions):
        """Tokens (R,) and their log-probs (R,) for logits (R, V) of this rank's columns."""
        share, model = self.model.share, self.model
        if share.size == 1:
            return sample_tokens(logits, keys, positions, **self.sampling)
        tokens, logprobs = sample_among_ranks(
            share, logits, keys, positions, model.first_token,
            share.most(model.config["vocab_size"]), **self.sampling)
        tokens, logprobs = share.lead(torch.stack([tokens.to(logprobs.dtype), logprobs]))
        return tokens.long(), logprobs

    @torch.inference_mode()
    def admit(self, work):
        """Fill free slots with (prompt, sample) pairs from work, and sample their first tokens."""
        free = [slot for slot, job in enumerate(self.jobs) if not job]
        admitted = dict(zip(free, work))  # {slot: job}, while there are both
        self.has_work = len(admitted) == len(free)
        if not admitted:
            return
        for slot, job in admitted.items():
            self.jobs[slot], self.counts[slot] = job, 1
        self.prefill(admitted)
        index = torch.tensor(list(admitted), device=self.device)
        keys = [noise_key(*self.identity, *job) for job in admitted.values()]
        self.keys[index] = torch.tensor(keys, dtype=torch.int32, device=self.device)
        logits = torch.stack([self.next_logits[prompt] for prompt, _ in admitted.values()])
        tokens, logprobs = self.sample(logits, self.keys[index], self.count[index] * 0)
        self.token[index] = tokens
        self.out_tokens[index, 0], self.out_logprobs[index, 0] = tokens, logprobs.float()
        self.count[index] = self.is_active[index] = 1

    def prefill(self, slots):
        """Bring the prompts of new jobs into their slots: read once, copied for their groups."""
        source = {prompt: slot for slot, prompt in enumerate(self.held) if slot not in slots}
        fresh = []
        for slot in slots:
            prompt = self.held[slot] = self.jobs[slot][0]
            if prompt not in source:
                source[prompt] = slot
                fresh.append(prompt)
        while fresh:
            pack, size = [], 0
            while fresh and (not pack or size + len(self.prompts[fresh[0]]) <= PREFILL_TOKENS):
                pack.append(fresh.pop(0))
                size += len(self.prompts[pack[-1]])
            for past in range(0, size, PREFILL_TOKENS):
                self.read_prompts(pack, [source[prompt] for prompt in pack], past)
        for slot in slots:
            prompt = self.held[slot]
            if source[prompt] != slot:
                self.cache.copy(source[prompt], slot, len(self.prompts[prompt]))
            self.cache.lengths[slot] = len(self.prompts[prompt])
        self.next_logits = {prompt: self.next_logits[prompt] for prompt in set(self.held) - {None}}

    def read_prompts(self, pack, slots, past):
        """Keys and values of a pack of prompts into P slots, in one pass; their next logits. A
        prompt of more than PREFILL_TOKENS is alone, and comes in chunks."""
        chunks = [self.prompts[prompt][past:past + PREFILL_TOKENS] for prompt in pack]
        self.cache.use_for_prefill(slots, past)
        logits = self.model(*flatten(chunks, self.device), cache=self.cache)
        self.next_logits |= dict(zip(pack, logits))

    def length(self, slot):
        """Tokens of a slot's prompt and completion."""
        return len(self.prompts[self.held[slot]]) + self.counts[slot]

    def num_rows(self, num_running):
        """Rows to decode: on CUDA one of a few sizes, so that few graphs exist."""
        grain = max(8, self.slots // 8) if self.device.type == "cuda" else 1
        return min(max(MIN_ROWS, -(-num_running // grain) * grain), self.slots)

    def step(self, R):
        """A token more for each of the first R rows, all on the device."""
        at, keys, count = self.cache.at, self.keys[:R], self.count[:R]
        logits = self.model(self.token[:R], self.cu_seqlens[:R + 1], cache=self.cache)
        tokens, logprobs = self.sample(logits, keys, count)
        self.out_tokens[at, count], self.out_logprobs[at, count] = tokens, logprobs.float()
        self.token[:R] = tokens
        self.cache.lengths[:R] += self.is_active[:R]
        count += self.is_active[:R]

    def step_graph(self, R):
        """The step as a CUDA graph, or None on a CPU and at a shape's first time, when kernels
        still settle."""
        if self.device.type != "cuda":
            return None
        key = R, self.cache.reach
        if key not in self.graphs:
            self.graphs[key] = None
        elif self.graphs[key] is None:
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool=self.pool,
                                  capture_error_mode="thread_local"):
                self.step(R)  # is only recorded
            self.pool = self.graphs[key].pool()
        return self.graphs[key]

    @torch.inference_mode()
    def decode(self, num_steps):
        """num_steps more tokens for every running row."""
        running = self.running()
        R = self.num_rows(running[-1] + 1)
        self.cache.use_for_decode(R, max(map(self.length, running)) + num_steps)
        with shape_config.patch(use_duck_shape=False):  # sizes that are equal now may differ later
            graph = self.step_graph(R)
            step = graph.replay if graph else functools.partial(self.step, R)
            try:
                step()
            except torch._dynamo.exc.BackendCompilerFailed as error:
                reason = str(error.inner_exception).partition("\n")[0]
                raise InputError(f"compile_decode=true: {reason}") from None
            # what a compiled step was made for is checked once: nothing changes within a look
            with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                for _ in range(num_steps - 1):
                    step()
        for slot in running:
            self.counts[slot] += num_steps
        self.num_tokens += num_steps * len(running)

    def wait(self):
        """Wait for the device, but not for ever: in a CUDA graph nobody else watches over the
        collectives of ranks that share a model."""
        if self.device.type != "cuda" or self.model.share.size == 1:
            return
        done, end = torch.cuda.Event(), time.monotonic() + SHARE_SECONDS
        done.record()
        while not done.query():
            if time.monotonic() > end:
                die(f"a rank that shares the model has not come within {SHARE_SECONDS} seconds")
            time.sleep(1e-4)

    @torch.inference_mode()
    def collect(self, num_steps):
        """Free the slots that stopped within the last num_steps tokens; their Completions."""
        window = (self.count[:, None] - 1  # one more, for the token that admit sampled
                  - torch.arange(num_steps + 1, device=self.device)).clamp(min=0)
        may_stop = self.may_stop[self.out_tokens.gather(1, window)].any(1)
        is_finite = self.out_logprobs.gather(1, window).isfinite().all(1)
        self.wait()
        may_stop, is_finite = torch.stack([may_stop, is_finite]).tolist()
        done = []
        for slot in self.running():
            if not is_finite[slot]:
                raise FloatingPointError(f"prompt {self.jobs[slot][0]}: the model's logits are "
                                         "not finite")
            if may_stop[slot] or self.counts[slot] >= self.limits[self.jobs[slot][0]]:
                done += self.end(slot, num_steps)
        return done

    def end(self, slot, num_steps):
        """[the slot's Completion], or [] if it goes on after all."""
        prompt, sample = self.jobs[slot]
        count = min(self.counts[slot], self.limits[prompt])
        tokens = self.out_tokens[slot, :count].tolist()
        length = self.stops.find(tokens, max(0, self.counts[slot] - num_steps - 1))
        if not length and count < self.limits[prompt]:
            return []
        finish = "stop" if length else "length"
        length = length or count
        self.ended[finish] += 1
        self.release(slot)
        return [Completion(prompt, sample, tokens[:length],
                           self.out_logprobs[slot, :length].tolist(), finish)]

    def release(self, slot):
        self.jobs[slot] = None
        self.is_active[slot] = self.cache.lengths[slot] = self.count[slot] = 0

    @torch.inference_mode()
    def compact(self):
        """When no work is left, move the last running sequences into gaps before them."""
        running = self.running()
        rows = self.num_rows(len(running))
        if self.has_work or not running or running[-1] < rows:
            return
        gaps = (slot for slot in range(rows) if not self.jobs[slot])
        for source in [slot for slot in running if slot >= rows]:
            slot = next(gaps)
            self.cache.copy(source, slot, self.length(source))
            for state in (self.token, self.keys, self.count, self.is_active, self.out_tokens,
                          self.out_logprobs, self.cache.lengths,
                          self.jobs, self.held, self.counts):
                state[slot] = state[source]
            self.release(source)


def generate(model, prompts, work, stops, max_tokens, slots=64, temperature=1.0, top_p=1.0,
             top_k=0, seed=0, step=0, compile_decode=False, on_look=lambda engine: False):
    """Yield a Completion for each (prompt, sample) of work, as they end.

    prompts: lists of tokens; work: an iterable of (place in prompts, sample number), pulled as
    slots free up; max_tokens: of a completion, one number or one for each prompt. Noise is keyed
    by (seed, step, prompt, sample). compile_decode: decode steps by torch.compile, up to a minute
    once in a process. on_look(engine) is called every few tokens; if it returns True, here or on a
    rank that shares the model, the rollout is abandoned. Raises FloatingPointError when logits are
    not finite."""
    sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k)
    engine = Engine(model, prompts, stops, max_tokens, slots, seed, step, compile_decode, sampling)
    work = iter(work)
    while True:
        engine.admit(work)
        if not engine.running():
            return
        engine.decode(LOOK_EVERY)
        yield from engine.collect(LOOK_EVERY)
        engine.compact()
        if model.share.any(on_look(engine) is True):
            return


def deal(jobs, ranks, slots, name, share=WHOLE):
    """This engine's part of jobs: the first wave dealt evenly, the rest pulled one at a time from
    a counter in the store, so that none waits while another has a queue. Of ranks that share an
    engine one pulls, and the others read in the store what it got."""
    engine, engines = ranks.rank // share.size, ranks.world // share.size
    first = engines * slots
    yield from jobs[engine:first:engines]
    for turn in itertools.count():
        told = f"{name}/{engine}/{turn}"
        if share.rank:
            place = int(ranks.wait_for([told])[0])
        else:
            place = first + ranks.store.add(name, 1) - 1
            if share.size > 1:
                ranks.store.set(told, str(place))
        if place >= len(jobs):
            return
        yield jobs[place]


# ---------------------------------------------------------------- writing from the command line

def stream(model, tokenizer, stops, prompts, config):
    """Write one completion to the terminal as it comes, then its size and speed."""
    shown, start = "", time.perf_counter()

    def show(tokens):
        nonlocal shown
        text = tokenizer.decode(tokens).rstrip("\ufffd")  # a character may be half sampled
        print("" if model.share.rank else text[len(shown):], end="", flush=True)
        shown = text

    def on_look(engine):
        if engine.jobs[0]:
            show(engine.out_tokens[0, :engine.counts[0]].tolist())

    options = {key: config[key] for key in OPTIONS}
    c, = generate(model, prompts, [(0, 0)], stops, config["max_tokens"], slots=1,
                  on_look=on_look, **options)
    seconds = time.perf_counter() - start
    show(c.tokens)
    if model.share.rank == 0:
        words = count_words(find_answer(tokenizer.decode(c.tokens), config["template"]))
        print(f"\n[{words} words, {len(c.tokens)} tokens, {len(c.tokens) / seconds:.0f} tokens/s, "
              f"{c.finish}]")


def append_rows(path, rows):
    """Append JSON lines; ranks take turns."""
    with writes_to(path), open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_done(path):
    """Rows that a file of JSON lines holds. A last line cut short by a crash is cut off; one that
    another rank went on after (a full disk) is named and passed over."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[:text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    rows = list(map(read_line, whole.splitlines()))
    for number, row in enumerate(rows, 1):
        if row != b"" and not isinstance(row, dict):
            print_once(f"passed over {path}:{number}: expected a JSON object, found {row!r}")
    return [row for row in rows if isinstance(row, dict)]


def answer_file(model, tokenizer, stops, rows, prompts, config, ranks):
    """Answer every row into out/responses.jsonl, from where it stops."""
    path = Path(config["out"]) / "responses.jsonl"
    # one rank reads, before any can write: all must deal from the same list
    done = set(ranks.gather([(row["index"], row.get("sample", 0)) for row in read_done(path)]
                            if ranks.rank == 0 else []))
    jobs = [(p, s) for p, row in enumerate(rows) for s in range(config["num_samples"])
            if (row["id"], s) not in done]
    options = {key: config[key] for key in (*OPTIONS, "slots")}
    bar = tqdm(total=len(rows) * config["num_samples"], initial=len(done), unit="answer",
               disable=ranks.rank > 0)
    work = deal(jobs, ranks, max(config["slots"], MIN_ROWS), "sample", model.share)

    def show(engine):
        if ranks.rank == 0:
            bar.n = len(done) + ranks.store.add("answered", 0)
            bar.set_postfix_str(engine.progress())

    for c in generate(model, prompts, work, stops, config["max_tokens"], on_look=show, **options):
        if model.share.rank:
            continue
        row, text = rows[c.prompt], tokenizer.decode(c.tokens)
        append_rows(path, [{"index": row["id"], "sample": c.sample,
                            "response": find_answer(text, config["template"]),
                            "completion": text, "prompt": row["prompt"], "length": row["length"],
                            "finish": c.finish}])
        ranks.store.add("answered", 1)
    ranks.meet()
    bar.n = len(done) + ranks.store.add("answered", 0)
    bar.close()
    if ranks.rank == 0:
        print(f"wrote {path}")


@script
def main(argv):
    config = parse_config(CONFIG, argv, LIMITS | dict(num_samples=1))
    ranks = setup()
    rows = [{"id": "prompt", "prompt": config["prompt"]}]
    if config["prompts"]:
        rows = load_prompts(config["prompts"], config["columns"])
    elif not config["prompt"].strip():
        raise InputError("prompt=: expected a text, found none")
    model, tokenizer = load_for_sampling(config["model"], ranks,
                                         join_share(ranks, config["sample_tp"]))
    stops = Stops(tokenizer, STOP_STRINGS, model.num_tokens)
    prompts = encode_prompts(tokenizer, config["template"], rows, context_length(model.config),
                             config["max_tokens"])
    if config["prompts"]:  # only now: a folder keeps the config that made it
        open_folder(config, ranks, may_differ={"slots", "sample_tp", "compile_decode"})
        answer_file(model, tokenizer, stops, rows, prompts, config, ranks)
    elif ranks.rank < config["sample_tp"]:
        stream(model, tokenizer, stops, prompts, config)


if __name__ == "__main__":
    main()
