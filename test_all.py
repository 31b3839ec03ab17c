"""Every part against a second implementation: transformers, a naive loop, autograd in full.

    python -m pytest test_all.py

Models are tiny and random, the tokenizer is made here, nothing needs a network or toy/.
"""
import gzip
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

import grpo
import model as network
import pretrain
import reward
import sample
from model import (ChunkedLogProbs, InputError, Span, copy_weights, full_parameters, load_model,
                   load_tokenizer, parse_config, save_folder)
from sample import (Stops, apply_template, count_words, encode_prompts, find_answer, find_words,
                    generate, gumbel_noise, load_prompts, noise_key, sample_tokens)

SMALL = dict(vocab_size=101, hidden_size=32, intermediate_size=50, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             initializer_range=0.2, tie_word_embeddings=True)
ALONE = network.Ranks(0, 1, torch.device("cpu"), dist.HashStore())
YARN = dict(factor=4.0, original_max_position_embeddings=16)


# ---------------------------------------------------------------- helpers

def make_model(folder, architecture="Qwen2ForCausalLM", **changes):
    """A random model as transformers makes and writes it; biases and norms are random too."""
    torch.manual_seed(0)
    theirs = getattr(transformers, architecture)(transformers.Qwen2Config(**SMALL | changes))
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(float("norm" in name), 0.2)
    theirs.save_pretrained(folder)
    return theirs.eval()


def make_tokenizer(folder):
    """A byte-level BPE with Qwen's special tokens, trained on the templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator([sample.TEMPLATES["think"]], trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = dict(tokenizer_class="Qwen2Tokenizer", eos_token=special[0], pad_token=special[0],
                    clean_up_tokenization_spaces=False, additional_special_tokens=special[1:])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_sequences(lengths, vocab=SMALL["vocab_size"], seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


def pack(sequences):
    """tokens (N,), cu_seqlens (S+1,) and next-token targets (N,), -1 after each last token."""
    ends = np.cumsum([0] + [len(tokens) for tokens in sequences])
    targets = [token for tokens in sequences for token in tokens[1:] + [-1]]
    return (torch.tensor(sum(sequences, [])), torch.tensor(ends, dtype=torch.int32),
            torch.tensor(targets))


def score(ours, sequences, temperature=1.0):
    """Log-probs of each sequence's tokens after its first, by our forward pass over one pack."""
    tokens, cu_seqlens, targets = pack(sequences)
    logprobs, _ = ours(tokens, cu_seqlens, targets=targets, temperature=temperature)
    return [part[:-1] for part in logprobs.split(cu_seqlens.diff().tolist())]


def serve(connection):
    """A worker: one rank of a fresh gloo group for each function that comes."""
    for message in iter(connection.recv_bytes, b""):
        function, arguments, environment = pickle.loads(message)
        os.environ.update(environment)
        try:
            reply = function(network.setup(), *arguments), None
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:  # SystemExit too: the test has to hear of everything
            reply = None, traceback.format_exc()
        connection.send_bytes(pickle.dumps(reply))


@pytest.fixture(scope="session")
def run_on_ranks():
    """run(world, function, *arguments) -> [function(ranks, *arguments) of each rank].

    Up to four processes, started once; function is a module-level one of this file. A rank that
    fails or hangs fails the test with its traceback, and the next test gets new processes."""
    context, workers = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload([__name__])  # torch is imported once for all

    def start():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # gloo ranks, whatever this machine has
            for _ in range(4):
                here, there = context.Pipe()
                process = context.Process(target=serve, args=(there,), daemon=True)
                process.start()
                there.close()
                workers.append((process, here))

    def stop():
        for process, _ in workers:
            process.kill()
            process.join()
        workers.clear()

    def run(world, function, *arguments):
        if not workers:
            start()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank, (_, connection) in enumerate(workers[:world]):
            environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_PORT=port,
                               LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1")
            connection.send_bytes(pickle.dumps(
                (function, arguments, {key: str(value) for key, value in environment.items()})))
        replies, waiting = {}, [connection for _, connection in workers[:world]]
        while waiting:
            for connection in (ready := wait(waiting, timeout=60)):
                waiting.remove(connection)
                try:
                    replies[connection], error = pickle.loads(connection.recv_bytes())
                except EOFError:
                    error = f"a rank died in {function.__name__}"
                if error:
                    stop()
                    pytest.fail(error)
            if not ready:
                stop()
                pytest.fail(f"{len(waiting)} of {world} ranks hang in {function.__name__}")
        return [replies[connection] for _, connection in workers[:world]]

    yield run
    stop()


# ---------------------------------------------------------------- model: one forward pass

def model_case(name, **changes):
    return pytest.param(changes, id=name)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.12)],
                         ids=["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [
    *(model_case(f"{'tied' if tied else 'untied'}-{heads}", tie_word_embeddings=tied,
                 num_key_value_heads=heads) for tied in (True, False) for heads in (4, 2, 1)),
    model_case("yarn", rope_parameters=dict(rope_type="yarn", rope_theta=5e3, **YARN)),
    model_case("yarn-old", old_spelling=True)])
def test_logits_equal_transformers(changes, dtype, tolerance, tmp_path):
    """A wrong rotary layout, head grouping, norm, bias, head or YaRN scale; a leak in the pack."""
    old_spelling = changes.get("old_spelling")
    make_model(tmp_path, **{} if old_spelling else changes)
    if old_spelling:  # as Qwen2.5's model card asks users to write it
        config = json.loads((tmp_path / "config.json").read_text())
        del config["rope_parameters"]
        config |= dict(rope_theta=5e3, rope_scaling=dict(type="yarn", **YARN))
        (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ours = load_model(str(tmp_path), "cpu", dtype)
    sequences = random_sequences([1, 9, 60, 2, 33])
    tokens, cu_seqlens, _ = pack(sequences)
    with torch.no_grad():
        full = [theirs(torch.tensor([tokens])).logits[0] for tokens in sequences]
        last, logprobs = ours(tokens, cu_seqlens), score(ours, sequences)
    torch.testing.assert_close(last, torch.stack([x[-1] for x in full]), atol=tolerance, rtol=0)
    for found, logits, tokens in zip(logprobs, full, sequences):
        expected = logits.float().log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_log_probs_do_not_depend_on_neighbours(tmp_path):
    """Attention or positions that run over the border between two sequences of a pack."""
    make_model(tmp_path)
    ours = load_model(str(tmp_path), "cpu", torch.float64)
    mine, *others = random_sequences([20, 1, 7, 50, 3])
    alone, = score(ours, [mine])
    for before, after in ([others, []], [[], others], [others[2:], others[:2]], [[mine], [mine]]):
        found = score(ours, before + [mine] + after)[len(before)]
        torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("of_logprob, of_entropy", [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)])
def test_chunked_log_probs_equal_autograd_through_full_logits(of_logprob, of_entropy, temperature,
                                                              monkeypatch):
    """A gradient that forgets the temperature, the entropy, or the rows of a last short chunk."""
    monkeypatch.setattr(network, "HEAD_CHUNK", 4)
    torch.manual_seed(0)
    x, weight = torch.randn(11, 6).double(), torch.randn(9, 6).double()
    targets, scale = torch.randint(9, (11,)), torch.randn(2, 11).double()

    def chunked(x, weight):
        return ChunkedLogProbs.apply(x, weight, targets, temperature)

    def full(x, weight):
        every = (x @ weight.T / temperature).log_softmax(-1)
        return every.gather(1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)

    results = []
    for function in chunked, full:
        leaves = [y.clone().requires_grad_() for y in (x, weight)]
        logprobs, entropies = function(*leaves)
        loss = sum(factor * (y * row).sum() for factor, y, row in zip(
            (of_logprob, of_entropy), (logprobs, entropies), scale) if factor)
        results.append([logprobs, entropies, *torch.autograd.grad(loss, leaves)])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(chunked, [y.clone().requires_grad_() for y in (x, weight)])


def test_rows_past_num_tokens_get_no_probability_and_no_gradient(tmp_path):
    """Qwen pads its vocabulary: sampled or trained, padding rows would leak probability."""
    make_model(tmp_path, tie_word_embeddings=False)
    ours = load_model(str(tmp_path), "cpu", torch.float64)
    ours.num_tokens = 90
    sequences = random_sequences([12, 5], vocab=90)
    tokens, cu_seqlens, targets = pack(sequences)
    logprobs, entropies = ours(tokens, cu_seqlens, targets=targets)
    (logprobs + entropies).sum().backward()
    assert ours(tokens, cu_seqlens).shape == (2, 90)
    assert (logprobs[targets < 0] == 0).all() and (entropies[targets < 0] == 0).all()
    assert ours.lm_head.weight.grad[:90].abs().amin(1).min() > 0
    assert (ours.lm_head.weight.grad[90:] == 0).all()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    every = theirs(torch.tensor(sequences[:1])).logits[0, :-1, :90].log_softmax(-1)
    torch.testing.assert_close(logprobs[:11], every[range(11), sequences[0][1:]])
    torch.testing.assert_close(entropies[:11], -(every.exp() * every).sum(-1))


# ---------------------------------------------------------------- model: attention

def naive_attention(q, k, v):
    """One query (H, D) over its keys and values (T, K, D), head by head, in float64."""
    group = q.shape[0] // k.shape[1]
    out = []
    for head in range(q.shape[0]):
        weights = k[:, head // group].double() @ q[head].double() / math.sqrt(q.shape[1])
        out.append(weights.softmax(0) @ v[:, head // group].double())
    return torch.stack(out)


def check_attention(device, dtype, tolerance):
    """Both kinds of call, a ragged pack and a decode step, against the naive loop."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)
    for heads, kv_heads in (4, 4), (4, 2), (4, 1):
        ends = [0, 5, 6, 45]
        q, k, v = draw(45, heads, 16), draw(45, kv_heads, 16), draw(45, kv_heads, 16)
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        found = network.attention(q, k, v, Span(cu_seqlens, 39, None, None))
        start = lambda n: max(end for end in ends if end <= n)
        expected = torch.stack([naive_attention(q[n], *(x[start(n):n + 1] for x in (k, v)))
                                for n in range(45)])
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)
        q, k, v = draw(3, heads, 16), draw(3, 20, kv_heads, 16), draw(3, 20, kv_heads, 16)
        lengths = torch.tensor([1, 20, 7], dtype=torch.int32, device=device)
        is_past = torch.arange(20, device=device) < lengths[:, None]
        mask = torch.zeros(3, 20, dtype=dtype, device=device)
        mask = mask.masked_fill(~is_past, -torch.inf)[:, None, None]
        found = network.attention(q, k, v, Span(cu_seqlens, 1, lengths, mask))
        expected = torch.stack([naive_attention(q[s], k[s, :n], v[s, :n])
                                for s, n in enumerate(lengths.tolist())])
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


def test_attention_on_the_cpu_equals_a_naive_loop():
    """A query that sees a later key, a stranger's key, a free place of the cache, or the keys of
    another group of heads."""
    check_attention("cpu", torch.float32, 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["torch", "flash_attn"])
def test_attention_on_cuda_equals_a_naive_loop(backend, monkeypatch):
    """The same for both FlashAttentions, whose conventions for ragged packs may change."""
    if backend == "torch":
        monkeypatch.setattr(network, "flash_attn_varlen_func", None)
        monkeypatch.setattr(network, "flash_attn_with_kvcache", None)
    elif network.flash_attn_varlen_func is None:
        pytest.skip("flash-attn is not installed")
    check_attention("cuda", torch.bfloat16, 0.03)


# ---------------------------------------------------------------- model: folders and the config

NAME = "model.layers.1.mlp.up_proj.weight"


def break_tensors(folder, **changes):
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: x for name, x in tensors.items() if x is not None},
              folder / "model.safetensors")


def break_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("damage, words", [
    (lambda f: break_tensors(f, **{NAME: None}), [NAME, "none"]),
    (lambda f: break_tensors(f, **{NAME: torch.zeros(3, 2)}), [NAME, "[50, 32]", "[3, 2]"]),
    (lambda f: break_tensors(f, extra=torch.zeros(1)), ["extra"]),
    (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    (lambda f: (f / "model.safetensors").write_bytes(b"text"), ["model.safetensors"]),
    (lambda f: break_config(f, architectures=["LlamaForCausalLM"]), ["LlamaForCausalLM"]),
    (lambda f: break_config(f, num_hidden_layers=None), ["num_hidden_layers"]),
    (lambda f: break_config(f, use_sliding_window=True), ["use_sliding_window"]),
    (lambda f: break_config(f, rope_parameters=dict(rope_type="dynamic")), ["dynamic"]),
    (lambda f: (f / "config.json").unlink(), ["config.json"]),
    (lambda f: (f / "config.json").write_text('{"a": '), ["config.json", "JSON"])],
    ids=["missing", "shape", "unexpected", "no weights", "not safetensors", "architecture",
         "no number", "sliding window", "rope", "no config", "broken config"])
def test_a_damaged_folder_is_one_line_that_names_it(damage, words, tmp_path):
    """Weights that stay random or are silently left out; a traceback instead of a line."""
    make_model(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        load_model(str(tmp_path), "cpu")
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in [str(tmp_path), *words])


@pytest.mark.parametrize("max_bytes", [5_000_000_000, 5_000], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_folder_round_trips_through_transformers(tied, max_bytes, tmp_path):
    """A tensor lost or renamed at saving, which transformers would fill at random."""
    theirs = make_model(tmp_path / "theirs", tie_word_embeddings=tied)
    ours = load_model(str(tmp_path / "theirs"), "cpu")
    save_folder(ours, tmp_path / "ours", torch.float32, max_bytes)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 5 or max_bytes > 5_000
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in back.state_dict().items())
    again = dict(load_model(str(tmp_path / "ours"), "cpu").named_parameters())
    assert all(torch.equal(x, again[name]) for name, x in ours.named_parameters())


def test_scores_equal_transformers_and_round_trip(tmp_path):
    """A score read at another token. transformers pools at the last token that is not pad, we
    at the last: the same as long as no scored text ends with the pad token."""
    make_model(tmp_path / "theirs", "Qwen2ForSequenceClassification", num_labels=1, pad_token_id=0)
    ours = load_model(str(tmp_path / "theirs"), "cpu")
    save_folder(ours, tmp_path / "ours", torch.float32)
    back, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    sequences = [[token + 1 for token in s] for s in random_sequences([3, 40, 1, 17], vocab=100)]
    padded = torch.tensor([tokens + [0] * (40 - len(tokens)) for tokens in sequences])
    expected = back(padded, attention_mask=(padded > 0).long()).logits[:, 0]
    tokens, cu_seqlens, _ = pack(sequences)
    torch.testing.assert_close(ours(tokens, cu_seqlens), expected, atol=1e-5, rtol=0)


DEFAULTS = dict(steps=10, lr=0.1, resume=True, out="out", columns={})


@pytest.mark.parametrize("argument, words", [
    ("stepz=3", ["stepz", *DEFAULTS]), ("steps=three", ["steps", "int", "three"]),
    ("steps=1.5", ["steps", "int"]), ("lr=nan", ["lr", "float"]), ("resume=maybe", ["resume"]),
    ("columns={a", ["columns", "JSON"]), ("columns=[1]", ["columns", "dict"]),
    ("steps=0", ["steps=0", "at least 1"]), ("steps", ["steps=value"])])
def test_a_wrong_argument_is_one_line_that_says_what_there_is(argument, words):
    """A typo that trains for a day with the default."""
    with pytest.raises(InputError) as error:
        parse_config(DEFAULTS, [argument], limits=dict(steps=1))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_arguments_get_the_types_of_the_defaults():
    """resume=false read as a true string; one run's dict shared with the next."""
    argv = ["steps=3", "--lr=1e-3", "resume=False", "out=a=b", 'columns={"prompt": "query"}']
    assert parse_config(DEFAULTS, argv) == dict(steps=3, lr=1e-3, resume=False, out="a=b",
                                                columns={"prompt": "query"})
    parse_config(DEFAULTS, [])["columns"]["id"] = "x"
    assert DEFAULTS["columns"] == {}


# ---------------------------------------------------------------- model: shards

def use_shards(ranks, folder, out, sequences):
    """All that a sharded model does, as one rank of several; sequences are dealt to the ranks."""
    ours = load_model(folder, ranks.device, ranks=ranks, recompute=True)
    plain = load_model(folder, ranks.device, seed=1)
    copy_weights(ours, plain)
    save_folder(ours, out, torch.float32, max_bytes=20_000)
    loss = sum(part.sum() for part in score(ours, sequences[ranks.rank::ranks.world]))
    (loss * ranks.world).backward()  # FSDP averages over ranks
    return dict(whole=dict(full_parameters(ours)), copied=dict(full_parameters(plain)),
                gradient={name: x.grad.full_tensor() for name, x in ours.named_parameters()},
                logprobs=[x.detach() for x in score(ours, sequences)])


def use_half_shards(ranks, folder):
    """fp32 masters with bf16 compute, as on CUDA: whole parameters after an evaluation."""
    half = network.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(network, "MixedPrecisionPolicy", lambda **_: half)
        ours = load_model(folder, ranks.device, ranks=ranks)
        score(ours, [[1, 2, 3]])
    return {name: x.clone() for name, x in full_parameters(ours)}


def test_whole_parameters_are_the_masters_after_an_evaluation(tmp_path, run_on_ranks):
    """FSDP keeps the root gathered, in bf16, after a forward pass without a backward, and
    full_parameters that took that: what is saved after an evaluation has lost 16 bits."""
    make_model(tmp_path)
    expected = dict(load_model(str(tmp_path), "cpu").named_parameters())
    for whole in run_on_ranks(2, use_half_shards, str(tmp_path)):
        assert [name for name, x in whole.items() if not torch.equal(x, expected[name])] == []


@pytest.mark.parametrize("world, tied", [(2, True), (4, False)])
def test_a_sharded_model_equals_a_plain_one(world, tied, tmp_path, run_on_ranks):
    """Rows of a weight on the wrong rank (101 and 50 do not divide by 4), a head that FSDP has
    not gathered, a gradient that lost a rank, a checkpoint of one shard."""
    make_model(tmp_path / "theirs", tie_word_embeddings=tied)
    plain = load_model(str(tmp_path / "theirs"), "cpu")
    save_folder(plain, tmp_path / "plain", torch.float32, max_bytes=20_000)
    sequences = random_sequences([12, 3, 30, 8, 5])
    logprobs = score(plain, sequences)
    sum(part.sum() for part in logprobs).backward()
    replies = run_on_ranks(world, use_shards, str(tmp_path / "theirs"), str(tmp_path / "shards"),
                           sequences)
    for reply in replies:
        torch.testing.assert_close(reply["logprobs"], list(logprobs), atol=1e-5, rtol=0)
        for name, x in plain.named_parameters():
            assert torch.equal(reply["whole"][name], x) and torch.equal(reply["copied"][name], x)
            torch.testing.assert_close(reply["gradient"][name], x.grad, atol=1e-4, rtol=1e-4)
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert len(files) > 3 and all((tmp_path / "plain" / file).read_bytes() ==
                                  (tmp_path / "shards" / file).read_bytes() for file in files)


# ---------------------------------------------------------------- sample: generate

@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Folder of a tiny policy with a tokenizer of 340 tokens and 5 padding rows."""
    folder = tmp_path_factory.mktemp("policy")
    make_model(folder, vocab_size=345, max_position_embeddings=512)
    make_tokenizer(folder)
    return str(folder)


def load_policy(folder, dtype, strings=("e", "</")):
    """(model, prompts, stops); the one-letter stop lets completions end at uneven lengths."""
    tokenizer, ours = load_tokenizer(folder), load_model(folder, "cpu", dtype)
    ours.num_tokens = len(tokenizer)
    return ours, random_sequences([5, 1, 30, 9, 17, 2, 12, 3, 70, 8, 6], 300), Stops(
        tokenizer, strings, len(tokenizer))


def collect(completions):
    return {(c.prompt, c.sample): c for c in completions}


ALL_WORK = [(prompt, number) for prompt in range(11) for number in range(4)]
CAPS = [30, 3, 60, 1, 9, 8, 40, 17, 5, 50, 16]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)],
                         ids=["float32", "float64"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cached_decoding_equals_the_full_forward(temperature, dtype, tolerance, policy):
    """A stale or misplaced key in the cache, a wrong position, a slot that a refill or the move
    to the low slots left half old. (The engine keeps log-probs in float32: 1e-6.)"""
    ours, prompts, stops = load_policy(policy, dtype)
    rows = []
    look = lambda engine: rows.append(engine.cache.rows)
    done = collect(generate(ours, prompts, iter(ALL_WORK), stops, CAPS, slots=32,
                            temperature=temperature, on_look=look))
    assert set(done) == set(ALL_WORK)  # 44 for 32 slots: refilled
    assert rows[0] == 32 and rows[-1] == 16  # and moved together
    for (prompt, _), c in done.items():
        with torch.no_grad():
            found, = score(ours, [prompts[prompt] + c.tokens], temperature)
        expected = found[len(prompts[prompt]) - 1:].float()
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=tolerance, rtol=1e-6)


def naive_completion(ours, prompt, identity, stops, cap, temperature=1.0):
    """(tokens, finish): one sequence alone, no cache, stops looked for in the whole text."""
    tokens, keys = [], torch.tensor([noise_key(*identity)], dtype=torch.int32)
    while len(tokens) < cap:
        both = torch.tensor(prompt + tokens)
        logits = ours(both, torch.tensor([0, len(both)], dtype=torch.int32)) / temperature
        position = torch.tensor([len(tokens)], dtype=torch.int32)
        tokens.append(int((logits + gumbel_noise(keys, position, logits.shape[1])).argmax()))
        text = stops.tokenizer.decode(tokens)
        if tokens[-1] in stops.tokens or any(string in text for string in stops.strings):
            return tokens, "stop"
    return tokens, "length"


def test_the_text_does_not_depend_on_slots_or_order(policy, monkeypatch):
    """Noise keyed by the slot, the order or the batch: a resume or one more GPU would change
    the run. Also caps, stops, packs of prompts, all against one sequence at a time."""
    ours, prompts, stops = load_policy(policy, torch.float64)
    with torch.no_grad():
        expected = {job: naive_completion(ours, prompts[job[0]], (3, 7, *job), stops,
                                          CAPS[job[0]]) for job in ALL_WORK}
    assert {finish for _, finish in expected.values()} == {"stop", "length"}
    for slots, prefill_tokens in (16, 16_384), (32, 40), (64, 1):
        monkeypatch.setattr(sample, "PREFILL_TOKENS", prefill_tokens)
        jobs = random.Random(slots).sample(ALL_WORK, len(ALL_WORK))
        done = collect(generate(ours, prompts, jobs, stops, CAPS, slots, seed=3, step=7))
        assert {job: (c.tokens, c.finish) for job, c in done.items()} == expected
    for other in dict(seed=4, step=7), dict(seed=3, step=8):
        done = collect(generate(ours, prompts, ALL_WORK, stops, CAPS, **other))
        assert sum(done[job].tokens == expected[job][0] for job in ALL_WORK) < 8


def test_the_text_does_not_depend_on_order_in_float32(policy):
    """A number of rows that follows the work: matrix products differ in the last bit."""
    ours, prompts, stops = load_policy(policy, torch.float32)
    results = [{(c.prompt, c.sample): c.tokens
                for c in generate(ours, prompts, jobs, stops, CAPS, slots=16)}
               for jobs in (ALL_WORK, ALL_WORK[::-1], ALL_WORK[1::2] + ALL_WORK[::2])]
    assert results[0] == results[1] == results[2]  # log-probs may differ in the last bit


def generate_share(ranks, folder):
    ours, prompts, stops = load_policy(folder, torch.float64)
    jobs = sample.deal(ALL_WORK, ranks, 16 // ranks.world, "test")
    return list(generate(ours, prompts, jobs, stops, CAPS, slots=16))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_write_what_one_process_writes(world, policy, run_on_ranks):
    """Work dealt twice or never, and noise that depends on the rank."""
    ours, prompts, stops = load_policy(policy, torch.float64)
    alone = collect(generate(ours, prompts, ALL_WORK, stops, CAPS))
    done = [c for share in run_on_ranks(world, generate_share, policy) for c in share]
    assert len(done) == len(ALL_WORK)
    assert {job: c.tokens for job, c in collect(done).items()} == {
        job: c.tokens for job, c in alone.items()}


def test_greedy_equals_transformers(policy):
    """An off-by-one between prefill and the first decoded token."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64)
    ours, prompts, stops = load_policy(policy, torch.float64, strings=())
    ours.num_tokens = 345
    stops.may_stop = torch.cat([stops.may_stop, torch.zeros(5, dtype=torch.bool)])
    done = collect(generate(ours, prompts, [(p, 0) for p in range(11)], stops, 25, temperature=0))
    for prompt, tokens in enumerate(prompts):
        expected = theirs.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=25,
                                   eos_token_id=list(stops.tokens), pad_token_id=0)
        assert done[prompt, 0].tokens == expected[0, len(tokens):].tolist()


def test_a_stop_string_ends_at_the_token_that_completes_it(policy):
    """A stop string missed because it spans tokens or looks, or a completion cut before it."""
    ours, prompts, free = load_policy(policy, torch.float64, strings=())
    done = collect(generate(ours, prompts, ALL_WORK, free, 40, seed=5))
    checked = 0
    for (prompt, number), c in done.items():
        pieces = [free.tokenizer.decode(token) for token in c.tokens]
        for end in range(4, len(c.tokens)):
            string = "".join(pieces[end - 3:end])[1:]  # begins within a token
            if "\ufffd" in string or len(string) < 4 or checked > 20:
                continue
            stops = Stops(free.tokenizer, ["never", string], ours.num_tokens)
            cut, = generate(ours, prompts, [(prompt, number)], stops, 40, seed=5)
            first = next(n for n in range(41) if string in free.tokenizer.decode(c.tokens[:n]))
            assert (cut.tokens, cut.finish) == (c.tokens[:first], "stop")
            checked += 1
            break
    assert checked > 10


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_stop_the_rollout(temperature, policy):
    """A diverged policy whose arg-max of NaN is token 0 for ever."""
    ours, prompts, stops = load_policy(policy, torch.float32)
    ours.model.norm.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        list(generate(ours, prompts, [(2, 0)], stops, 9, temperature=temperature))


# ---------------------------------------------------------------- sample: the distribution

@pytest.mark.parametrize("temperature, top_p, top_k", [
    (1.0, 1.0, 0), (0.6, 0.95, 0), (1.0, 0.3, 0), (0.8, 1.0, 5), (1.3, 0.7, 12), (1.0, 1e-6, 0)])
def test_tokens_come_from_the_truncated_distribution(temperature, top_p, top_k):
    """Log-probs of another distribution than the one sampled from; a nucleus one token short."""
    torch.manual_seed(0)
    logits = torch.randn(300, 40).double() * 3
    keys = torch.tensor([noise_key(0, n) for n in range(300)], dtype=torch.int32)
    tokens, logprobs = sample_tokens(logits, keys, torch.arange(300, dtype=torch.int32),
                                     temperature, top_p, top_k)
    warped = logits / temperature
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist())):
        z = logits[row].numpy() / temperature
        kept = np.argsort(-z)[:top_k or None]
        mass = np.exp(z[kept]) / np.exp(z[kept]).sum()
        kept = kept[:int((mass.cumsum() < top_p).sum()) + 1]  # the fewest that reach top_p
        assert set(kept) == set(warped[row].isfinite().nonzero()[:, 0].tolist())
        assert token in kept
        assert logprob == pytest.approx(z[token] - np.log(np.exp(z[kept]).sum()), abs=1e-9)


def test_noise_is_gumbel_and_samples_follow_the_softmax():
    """A hash with structure: neighbouring positions, samples or tokens that share their noise."""
    torch.manual_seed(0)
    probs = torch.randn(10).softmax(0)
    for keys, positions in [
            (torch.tensor([noise_key(0, 0)]).expand(20_000, 2), torch.arange(20_000)),
            (torch.tensor([noise_key(0, n) for n in range(20_000)]), torch.zeros(20_000))]:
        keys, positions = keys.int(), positions.int()
        noise = gumbel_noise(keys, positions, 10).double()
        assert abs(noise.mean() - np.euler_gamma) < 0.012  # 4 standard errors
        assert abs(noise.var() - math.pi ** 2 / 6) < 0.035
        assert np.abs(np.corrcoef(noise.T) - np.eye(10)).max() < 0.03
        assert abs(np.corrcoef(noise[1:].flatten(), noise[:-1].flatten())[0, 1]) < 0.01
        tokens, _ = sample_tokens(probs.log().expand(20_000, 10), keys, positions, 1.0, 1.0, 0)
        counts = torch.bincount(tokens, minlength=10)
        assert ((counts - 20_000 * probs) ** 2 / (20_000 * probs)).sum() < 33.7  # chi2 9, p 1e-4


# ---------------------------------------------------------------- sample: rows, templates, words

def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                            for row in rows))
    return path


def test_rows_come_from_every_kind_of_file(tmp_path):
    """An id of 0 taken for none, a renamed column, a system turn taken for the request."""
    rows = [{"id": 0, "query": "one", "length": [5, 9]}, {"query": "two"}, {"messages": [
        {"role": "system", "content": "be"}, {"role": "user", "content": "three"}]}]
    expected = [{"id": 0, "prompt": "one", "length": [5, 9]},
                {"id": 1, "prompt": "two", "length": None},
                {"id": 2, "prompt": "three", "length": None}]
    lines = write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    for name in "a.jsonl", "a.jsonl.gz", "a.json":
        assert load_prompts(tmp_path / name, {"prompt": "query"}) == expected


@pytest.mark.parametrize("bad, words", [
    ("{", "JSON object"), ("[1]", "JSON object"), ({"text": "x"}, "'prompt'"),
    ({"prompt": " "}, "'prompt'"), ({"prompt": 3}, "'prompt'"),
    ({"prompt": "x", "length": [9, 5]}, "lo <= hi"), ({"prompt": "x", "length": 9}, "[lo, hi]"),
    ({"messages": [{"from": "human", "value": "x"}]}, "'prompt'"), ({"messages": "x"}, "'prompt'")])
def test_a_bad_row_is_named_with_file_and_line(bad, words, tmp_path, capsys):
    """One bad row in 200 that stops a night's run, or bad rows that vanish without a word."""
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "x"}, "", bad] + [{"prompt": "x"}] * 198)
    assert len(load_prompts(path)) == 199
    assert f"{path}:3: " in (said := capsys.readouterr().out) and words in said
    write_lines(path, [{"prompt": "x"}] * 9 + [bad])
    with pytest.raises(InputError) as error:
        load_prompts(path)
    assert f"{path}:10: " in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("name, content", [
    ("none.jsonl", None), ("empty.jsonl", b"\n"),
    ("broken.json", b'[{"prompt": '), ("number.json", b"3"), ("text.jsonl.gz", b"text"),
    ("latin.jsonl", b'{"prompt": "\xe9"}\n')])
def test_a_file_that_cannot_be_read_is_one_line(name, content, tmp_path):
    """A traceback for a path typed wrong, or a run on no rows."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_prompts(tmp_path / name)


def test_templates_follow_the_language_and_the_checkpoint(policy):
    """English instructions for a Chinese request; a model's own chat format passed over."""
    tokenizer = load_tokenizer(policy)
    assert "Inside <think>" in apply_template(tokenizer, "think", "Write {it}.")
    assert "Write {it}." in apply_template(tokenizer, "think", "Write {it}.")
    chinese = apply_template(tokenizer, "think", "写一个关于海港的故事")
    assert "先思考" in chinese and "写一个关于海港的故事" in chinese and "Inside" not in chinese
    assert apply_template(tokenizer, "chat", "Hi").startswith("<|im_start|>user\nHi<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert apply_template(tokenizer, "chat", "Hi") == "[Hi]"


def test_a_prompt_that_does_not_fit_the_context_is_named(policy):
    """Positions past what the model knows, found only in its babble."""
    row, tokenizer = {"id": "row-7", "prompt": "Hi"}, load_tokenizer(policy)
    prompt, = encode_prompts(tokenizer, "think", [row], 512, 10)
    encode_prompts(tokenizer, "think", [row], len(prompt) + 10, 10)
    with pytest.raises(InputError, match=f"'row-7': {len(prompt)} tokens"):
        encode_prompts(tokenizer, "think", [row], len(prompt) + 9, 10)


@pytest.mark.parametrize("text, words", [
    ("", []), ("It's a well-known fact.", ["It's", "a", "well-known", "fact"]),
    ("don’t stop … 1,000.5 km!", ["don’t", "stop", "1,000.5", "km"]),
    ("面包师在海港。", list("面包师在海港")), ("用GPT-4写3万字", ["用", "GPT-4", "写", "3", "万", "字"]),
    ("カタ한국", list("カタ한국")), ("ｆｕｌｌ　ｗｉｄｔｈ", ["full", "width"]),
    ("in\u200bvis\u00adible \u2060", ["invisible"]), ("snake_case — a--b", ["snake", "case", "a", "b"]),
    ("Élan cafe\u0301", ["Élan", "café"]),
    ("学Python，Java，Go。", ["学", "Python", "Java", "Go"])])
def test_words_are_counted_as_people_count_them(text, words):
    """A length reward that invisible or full-width characters, or a language, can cheat."""
    assert find_words(text) == words and count_words(text) == len(words)


@pytest.mark.parametrize("completion, template, answer", [
    ("<think>a</think>\n<answer>\nb\nc </answer> d", "think", "b\nc"),
    ("<think>a</think><answer>b<|endoftext|>", "think", "b"), ("<answer></answer>", "direct", ""),
    ("no tags", "think", ""), ("<think>a", "think", ""), ("a<answer>", "think", ""),
    ("<answer>a</answer><answer>b</answer>", "think", "a"), ("no tags<|im_end|>", "chat", "no tags"),
    ("<think>a</think> b", "chat", "b"), ("<think>a", "chat", ""),
    ("<think>a</think><answer>b</answer>", "chat", "b"),
    ("<answer>b\n<|user|>", "think", "b")])
def test_the_answer_alone_is_found(completion, template, answer):
    """Thinking, tags or an end token that are scored as if they were the text."""
    assert find_answer(completion, template) == answer


# ---------------------------------------------------------------- sample: the command

@pytest.fixture
def command(policy, tmp_path, monkeypatch, capsys):
    """run(*arguments) -> (exit status, standard output, standard error) of sample.py on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*arguments):
        try:
            status = sample.main([f"model={policy}", f"out={tmp_path / 'out'}", *arguments]) or 0
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()
    return run


def test_the_command_writes_responses_and_resumes(command, tmp_path):
    """A crash's half line that spoils the file, answers repeated or lost after it, or a resume
    that mixes two settings in one file."""
    path = write_lines(tmp_path / "rows.jsonl", [
        {"id": f"row-{n}", "prompt": "Hi", "length": [5, 9]} for n in range(6)])
    arguments = [f"prompts={path}", "num_samples=2", "max_tokens=12", "slots=16"]
    assert command(*arguments)[0] == 0
    out = tmp_path / "out" / "responses.jsonl"
    lines = out.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert {(row["index"], row["sample"]) for row in rows} == {
        (f"row-{n}", s) for n in range(6) for s in range(2)} and len(rows) == 12
    assert all(row["prompt"] == "Hi" and row["length"] == [5, 9] and row["finish"] in (
        "stop", "length") and row["response"] == find_answer(row["completion"], "think")
        for row in rows)
    out.write_text("".join(lines[:7]) + lines[7][:-9])
    assert command(*arguments)[0] == 0
    assert out.read_text().startswith("".join(lines[:7]))
    assert sorted(out.read_text().splitlines(keepends=True)) == sorted(lines)
    status, _, error = command(*arguments, "temperature=0.9")
    assert status == 2 and error.count("\n") == 1
    assert all(word in error for word in ("temperature", "0.6", "0.9"))
    status, _, error = command(*arguments, "resume=false")
    assert status == 2 and error.count("\n") == 1 and "resume=false" in error


def answer_late(ranks, arguments):
    """sample.main on each rank; rank 1 comes to the file of answers a second late."""
    read_done = sample.read_done
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "read_done", lambda path: time.sleep(ranks.rank) or read_done(path))
        sample.main(arguments)


def test_ranks_that_start_apart_answer_every_prompt_once(policy, tmp_path, run_on_ranks):
    """Ranks that read different lists of what is done, and deal from them: answers are lost."""
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "Hi"}] * 60)
    run_on_ranks(2, answer_late, [f"model={policy}", f"prompts={path}", f"out={tmp_path / 'out'}",
                                  "max_tokens=6", "slots=16"])
    rows = sample.read_done(tmp_path / "out" / "responses.jsonl")
    assert sorted(row["index"] for row in rows) == list(range(60))


@pytest.mark.parametrize("arguments, words", [
    (["model=/nowhere"], "/nowhere"), (["prompts=nowhere.jsonl"], "nowhere.jsonl"),
    (["max_tokens=0"], "max_tokens"), (["temperature=-1"], "temperature"), (["top_p=2"], "top_p"),
    (["top_p=0"], "top_p")])
def test_wrong_input_is_one_line_and_status_2(arguments, words, command):
    """A traceback, or a default used silently, for what the user typed wrong."""
    status, _, error = command(*arguments)
    assert status == 2 and error.count("\n") == 1 and words in error


def test_the_terminal_shows_the_completion_and_nothing_more(command, policy):
    """Tokens decoded past the end of the completion, up to a look's worth, that are printed."""
    status, out, _ = command("prompt=[Hi] there", "max_tokens=3", "temperature=0")
    tokenizer = load_tokenizer(policy)
    assert status == 0 and len(tokenizer.encode(out.split("\n[")[0])) <= 3


# ---------------------------------------------------------------- reward: length and format

@pytest.mark.parametrize("words, lo, hi, expected", [
    (100, 90, 110, 1), (90, 90, 110, 1), (110, 90, 110, 1), (45, 90, 110, 0.5), (0, 90, 110, 0),
    (165, 90, 110, 0.5), (220, 90, 110, 0), (5000, 90, 110, 0), (0, 0, 10, 1), (15, 0, 10, 0.5),
    (7, 7, 7, 1), (0, 0, 0, 1)])
def test_the_length_reward_is_the_papers_piecewise_form(words, lo, hi, expected):
    """A corner that divides by zero, a reward below 0, or one that pays for running on."""
    assert reward.length_reward(words, lo, hi, 2.0) == pytest.approx(expected)


@pytest.mark.parametrize("completion, is_right", [
    ("<think>a</think><answer>b</answer>", True),
    ("\n<think>a</think>\n\n<answer>\nb\n</answer>\n<|endoftext|>", True),
    ("<answer>b</answer>", False), ("<think>a</think>b", False), ("", False),
    ("<think>a</think><answer>b", False), ("<think>a<answer>b</answer>", False),
    ("<think>a</think><think>a</think><answer>b</answer>", False),
    ("<think>a</think><answer>b</answer><answer>c</answer>", False),
    ("<think>a</think><answer>b</answer> and more", False),
    ("x<think></think><answer></answer>", False),
    ("<think>a</think>so<answer>b</answer>", False), ("<answer>b</answer><think>a</think>", False),
    ("<think>a</think><answer><think>b</think></answer>", False),
    ("<think>a</think><answer>b<Answer>c</answer>", False),
    ("<think>a< / think ></think><answer>b</answer>", False)])
def test_the_format_is_one_think_then_one_answer(completion, is_right):
    """Tag games: nested, repeated, re-opened, unclosed, in upper case, or split by spaces."""
    assert reward.has_format(completion) == is_right
    if completion.startswith("<think>a</think><answer>"):
        assert reward.has_format(completion[16:], "direct") == is_right


def test_copied_share_equals_a_quadratic_count():
    """A set of spans that marks the first occurrence too, or misses overlapping copies."""
    rng = random.Random(0)
    for _ in range(60):
        words = [rng.choice("abcd") for _ in range(rng.randrange(60))]
        start = rng.randrange(len(words) + 1)
        words += words[start:start + 20]
        copied = {place + i for place in range(len(words)) for earlier in range(place)
                  for i in range(5) if place + 5 <= len(words)
                  and words[place:place + 5] == words[earlier:earlier + 5]}
        assert reward.copied_share(" ".join(words), 5) == len(copied) / max(1, len(words))
    honest = " ".join(f"w{n}" for n in range(100))
    assert reward.repetition_penalty(honest) == 0 and reward.repetition_penalty("") == 0
    assert reward.repetition_penalty(honest + " " + honest) == 1
    assert reward.copied_share((honest + " ") * 2) == reward.copied_share(
        honest + " " + honest.upper().replace("W", "\u200bW"))


def test_answers_that_are_missing_cut_or_unclosed_have_rewards():
    """A sample without an answer that raises, or one cut at the cap that counts as well formed."""
    right = "<think>a</think><answer>" + "word " * 10 + "</answer>"
    found = reward.rule_rewards(right, [9, 11])
    assert (found["length"], found["format"], found["words"]) == (1, 1, 10)
    assert reward.rule_rewards(right, [9, 11], is_truncated=True)["format"] == 0
    unclosed = reward.rule_rewards(right[:-9], [9, 11])
    assert (unclosed["length"], unclosed["format"]) == (1, 0)
    for text in ("", "<think>a", "<think>a</think><answer></answer>", "<answer>"):
        nothing = reward.rule_rewards(text, [0, 11])
        assert (nothing["length"], nothing["format"], nothing["words"]) == (0, 0, 0)


# ---------------------------------------------------------------- reward: the reward model

@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    return write_lines(path, [{"prompt": f"Say {n}", "chosen": "good " * (n % 7 + 1),
                               "rejected": "bad " * (n % 5 + 1)} for n in range(40)])


@pytest.fixture(scope="module")
def judge(policy, pairs, tmp_path_factory):
    """Folder of a reward model that learned to prefer "good" to "bad"."""
    out = tmp_path_factory.mktemp("judge") / "run"
    reward.main([f"model={policy}", f"pairs={pairs}", f"val_pairs={pairs}", f"out={out}",
                 "steps=8", "lr=1e-2", "warmup=1", "batch_pairs=8", "eval_every=8"])
    return out


def test_a_trained_reward_model_scores_as_transformers_does(judge):
    """Pooling at another token than transformers', a pad token that hides the last one, a score
    head that is not in the folder; and a trainer that does not train."""
    log = [json.loads(line) for line in (judge / "log.jsonl").read_text().splitlines()]
    assert log[-1]["val_accuracy"] > 0.9 and log[-1]["val_loss"] < log[0]["loss"]
    ours = reward.WritingModel(str(judge / "latest"), ALONE)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(judge / "latest")
    prompts, answers = ["Hi", "Say 3", "面"], ["good good", "", "bad " * 30]
    texts = [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>"
             for p, a in zip(prompts, answers)]
    batch = load_tokenizer(judge / "latest")(texts, padding=True, padding_side="right",
                                             return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**batch).logits[:, 0]
    for pack_tokens in (1, 10_000):
        scores = ours.score(prompts, answers, pack_tokens)
        torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-5, rtol=1e-4)


def test_the_pair_loss_is_bradley_terry(policy, judge):
    """A sign, a mean over micro-batches instead of pairs, or a centring term that dominates."""
    ours = reward.WritingModel(str(judge / "latest"), ALONE).model
    token_pairs = [random_sequences([5, 9], 300, seed) for seed in range(5)]
    scores = torch.tensor([[reward.score_packed(ours, [tokens], "cpu").item() for tokens in pair]
                           for pair in token_pairs])
    chosen, rejected = scores.T.double()
    expected = (torch.log1p(torch.exp(rejected - chosen)) + 0.1 * (chosen + rejected) ** 2).mean()
    for micro_pairs in (1, 2, 5):
        loss, accuracy = reward.pair_loss(ours, token_pairs, ALONE, micro_pairs, 0.1, True)
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        assert accuracy == pytest.approx((chosen > rejected).double().mean().item())
        gradient = ours.score.weight.grad.clone()
        ours.zero_grad()
        first = gradient if micro_pairs == 1 else first  # noqa: F821, set in the first round
        torch.testing.assert_close(gradient, first, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- pretrain: rows, loss, runs

def test_rows_hold_every_token_once_an_epoch(policy, tmp_path):
    """Documents lost between rows, attention across them, targets from the next document, or
    the same order in each epoch."""
    texts = [{"text": f"{n} " * (n + 1)} for n in range(9)] + [
        {"prompt": "ask " * 5, "completion": "say " * 6}]
    tokenizer = load_tokenizer(policy)
    documents = pretrain.Documents(write_lines(tmp_path / "t.jsonl", texts), tokenizer, 16, 0)
    whole = [tokens.tolist() for tokens, _ in documents.documents]
    epochs = []
    for epoch in range(2):
        rows = [documents.row(epoch * documents.num_rows + n) for n in range(documents.num_rows)]
        stream = [token for tokens, _, _ in rows for token in tokens.tolist()]
        order, left = [], list(stream)
        while left:  # the stream is the documents in some order, but for a tail under a row
            place = next(i for i, d in enumerate(whole)
                         if i not in order and d[:len(left)] == left[:len(d)])
            order.append(place)
            left = left[len(whole[place]):]
        assert sum(map(len, whole)) - len(stream) < 16
        epochs.append(order)
        piece_ends = np.cumsum(np.concatenate([lengths for _, _, lengths in rows]))
        assert set(np.cumsum([len(whole[i]) for i in order])[:-1]) <= set(piece_ends.tolist())
        targets = np.concatenate([targets for _, targets, _ in rows])
        expected = [token if offset >= max(1, documents.documents[i][1]) else -1
                    for i in order for offset, token in enumerate(whole[i])]
        assert targets[:-1].tolist() == expected[1:len(targets)]
    assert epochs[0] != epochs[1]


def test_the_next_token_loss_equals_transformers(policy, tmp_path):
    """A loss per micro-batch instead of per token, or targets off by one."""
    path = write_lines(tmp_path / "t.jsonl", [{"text": "think before you write " * 9}] * 2)
    documents = pretrain.Documents(path, load_tokenizer(policy), 20, 0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(policy)
    ours = load_model(policy, "cpu")
    total, count = 0.0, 0
    for n in range(4):
        tokens, targets, lengths = documents.row(n)
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends):
            logits = theirs(torch.tensor(tokens[None, start:end]).long()).logits[0]
            total += torch.nn.functional.cross_entropy(
                logits, torch.tensor(targets[start:end]), ignore_index=-1, reduction="sum").item()
            count += int((targets[start:end] >= 0).sum())
    for micro_rows in (1, 3):
        loss = pretrain.next_token_loss(ours, documents, range(4), ALONE, micro_rows, True)
        assert loss == pytest.approx(total / count, rel=1e-5)


def uneven_loss(ranks, folder, path):
    ours = load_model(folder, ranks.device, ranks=ranks)
    documents = pretrain.Documents(path, load_tokenizer(folder), 16, 0)
    return [pretrain.next_token_loss(ours, documents, range(n), ranks, 1, False) for n in (5, 1)]


def test_ranks_with_fewer_rows_take_part_all_the_same(policy, tmp_path, run_on_ranks):
    """A forward pass more on one rank than on another: FSDP's collectives hang or mix."""
    path = write_lines(tmp_path / "t.jsonl", [{"text": "think before you write " * 9}] * 5)
    alone = load_model(policy, "cpu")
    documents = pretrain.Documents(path, load_tokenizer(policy), 16, 0)
    expected = [pretrain.next_token_loss(alone, documents, range(n), ALONE, 1, False)
                for n in (5, 1)]
    for found in run_on_ranks(2, uneven_loss, policy, path):
        assert found == pytest.approx(expected, rel=1e-5)


def test_matrices_decay_and_the_schedule_warms_up(policy):
    """Weight decay on norms and biases; a first step of rate 0, or a last one of full rate."""
    ours = load_model(policy, "cpu")
    decayed, kept = pretrain.make_optimizer(ours, 0.1, 0.95).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() > 1 for p in decayed["params"])
    assert kept["weight_decay"] == 0 and all(p.dim() == 1 for p in kept["params"])
    rates = [pretrain.learning_rate(step, 100, 1.0, 10, "cosine") for step in range(1, 101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert sorted(rates[9:], reverse=True) == rates[9:]


def weights_of(out):
    return load_file(out / "latest" / "model.safetensors")


def same(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


def test_pretraining_resumes_bit_for_bit_and_only_with_its_state(policy, tmp_path):
    """Moments or the place in the data lost at a resume, which nothing else would show."""
    path = write_lines(tmp_path / "t.jsonl", [{"text": f"plan {n} text " * 5} for n in range(30)])
    keys = [f"model={policy}", f"data={path}", "seq_len=32", "batch_rows=2", "save_every=2"]
    run = lambda name, steps: (pretrain.main(keys + [f"out={tmp_path / name}", f"steps={steps}",
                                                     "schedule=constant"]),
                               weights_of(tmp_path / name))[1]
    expected = run("whole", 4)
    run("cut", 2)
    for name in ("no_moments", "no_place"):
        shutil.copytree(tmp_path / "cut", tmp_path / name, symlinks=True)
        (tmp_path / name / "config.json").unlink()
    assert same(run("cut", 4), expected)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.dcp, "load", lambda *_, **__: None)
        patch.setattr(pretrain, "load_for_training", lambda name, ranks, seed=None: load_model(
            str(tmp_path / "no_moments" / "latest"), "cpu"))
        assert not same(run("no_moments", 4), expected)
    with pytest.MonkeyPatch.context() as patch:
        row = pretrain.Documents.row
        patch.setattr(pretrain.Documents, "row", lambda self, number: row(self, number % 4))
        assert not same(run("no_place", 4), expected)


# ---------------------------------------------------------------- grpo: advantages and loss

def test_averaged_advantages_equal_a_plain_loop():
    """Rewards summed before they are normalised, a deviation over the batch instead of the
    group, a floor that is missing, or an unscored sample that counts as 0."""
    rng = np.random.default_rng(0)
    rewards = {name: rng.random((5, 4)) * scale for name, scale in
               [("length", 1), ("format", 0.01), ("writing", 7)]}
    rewards["format"][0] = 1.0
    rewards["writing"][1, 2] = rewards["writing"][2] = np.nan
    scored = [x for x in rewards["writing"].flat if not np.isnan(x)]
    floors = {"length": 0.1, "format": 0.1, "writing": 0.5 * np.std(scored)}
    expected = np.zeros((5, 4))
    for name, table in rewards.items():
        for p in range(5):
            group = [x for x in table[p] if not np.isnan(x)]
            for g in range(4):
                if not np.isnan(table[p, g]):
                    expected[p, g] += ((table[p, g] - np.mean(group))
                                       / max(np.std(group), floors[name])) / 3
    found = grpo.average_advantages({name: torch.tensor(x) for name, x in rewards.items()})
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def make_rollout(num_prompts=3, num_samples=2, seed=0):
    """(prompts, completions, advantages) with lengths from 1 on, sampled by nobody."""
    rng = random.Random(seed)
    prompts = random_sequences([rng.randrange(1, 9) for _ in range(num_prompts)], 300, seed)
    completions = [sample.Completion(p, g, tokens, [-rng.random() for _ in tokens], "stop")
                   for p in range(num_prompts) for g in range(num_samples)
                   for tokens in random_sequences([rng.randrange(1, 20)], 300, 10 * p + g)]
    advantages = torch.randn(num_prompts, num_samples, generator=torch.manual_seed(seed))
    return prompts, completions, advantages


def gradient_of(ours, ranks, rollout, micro_tokens, temperature=0.8):
    ours.zero_grad()
    sequences = grpo.make_sequences(*rollout)
    grpo.accumulate_gradient(ours, sequences, ranks, micro_tokens, temperature, ratio_cap=2.0)
    return {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
            for name, p in ours.named_parameters()}


def test_the_gradient_equals_a_hand_written_reinforce_step(policy):
    """A loss over prompts' tokens, a mean over samples instead of a group's tokens, a ratio that
    is not cut or that carries gradient, the temperature left out, targets off by one."""
    prompts, completions, advantages = rollout = make_rollout()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(policy)
    loss = 0.0
    for p, prompt in enumerate(prompts):
        group = [c for c in completions if c.prompt == p]
        for c in group:
            logits = theirs(torch.tensor([prompt + c.tokens])).logits[0, :, :340] / 0.8
            for i, (token, old) in enumerate(zip(c.tokens, c.logprobs)):
                logprob = logits[len(prompt) + i - 1].log_softmax(-1)[token]
                weight = min(math.exp(logprob.item() - old), 2.0)
                loss = loss - (weight * advantages[p, c.sample] * logprob
                               / sum(len(d.tokens) for d in group) / len(prompts))
    loss.backward()
    ours = load_model(policy, "cpu")
    ours.num_tokens = 340
    gradient = gradient_of(ours, ALONE, rollout, 10_000)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, atol=1e-5, rtol=1e-4)


def gradient_on_ranks(ranks, folder, rollout, micro_tokens):
    return gradient_of(load_model(folder, ranks.device, ranks=ranks), ranks, rollout, micro_tokens)


def test_the_gradient_does_not_depend_on_packs_or_ranks(policy, run_on_ranks):
    """Normalising per micro-batch or per rank, or a rank without work that hangs the others."""
    rollout = make_rollout()
    ours = load_model(policy, "cpu")
    expected = gradient_of(ours, ALONE, rollout, 10_000)
    found = [gradient_of(ours, ALONE, rollout, micro_tokens) for micro_tokens in (1, 40)]
    prompts, completions, advantages = rollout
    found += [gradient_of(ours, ALONE, (prompts, completions[::-1], advantages), 40)]
    found += run_on_ranks(2, gradient_on_ranks, policy, rollout, 20)
    few = make_rollout(1, 2)  # two sequences: half of four ranks have none
    for gradient in run_on_ranks(4, gradient_on_ranks, policy, few, 10_000):
        for name, x in gradient_of(ours, ALONE, few, 10_000).items():
            torch.testing.assert_close(gradient[name], x, atol=1e-5, rtol=1e-4)
    for gradient in found:
        for name, x in expected.items():
            torch.testing.assert_close(gradient[name], x, atol=1e-5, rtol=1e-4)


def test_equal_rewards_give_no_gradient_and_odd_groups_no_nan(policy):
    """0 / 0 in a group of one, of equal rewards, or of samples that no judge could score."""
    equal = grpo.average_advantages({name: torch.full((3, 2), 0.7) for name in grpo.COMPONENTS})
    assert not equal.any()
    prompts, completions, _ = make_rollout()
    ours = load_model(policy, "cpu")
    assert not any(x.any() for x in gradient_of(ours, ALONE, (prompts, completions, equal),
                                                40).values())
    odd = {"length": torch.tensor([[0.3]]), "format": torch.tensor([[0.0]]),
           "writing": torch.tensor([[math.nan]])}
    assert grpo.average_advantages(odd).tolist() == [[0.0]]


def test_packs_hold_everything_once_and_ranks_the_same_number():
    """A sequence trained twice or never, or a rank with one backward pass more than another."""
    rng = random.Random(0)
    for world, micro_tokens, count in [(1, 50, 20), (2, 100, 17), (4, 1000, 2), (3, 10, 9)]:
        sizes = [rng.randrange(1, 60) for _ in range(count)]
        packs = grpo.make_packs(sizes, world, micro_tokens)
        assert sorted(sum(packs, [])) == list(range(count)) and len(packs) % world == 0


def test_every_prompt_comes_once_an_epoch():
    """Prompts drawn with replacement, or in the same order in each epoch."""
    steps = [grpo.choose_prompts(12, 4, step, 0) for step in range(1, 7)]
    assert sorted(sum(steps[:3], [])) == sorted(sum(steps[3:], [])) == list(range(12))
    assert steps[:3] != steps[3:]


def test_spearman_is_the_correlation_of_mean_ranks():
    """Ties ranked by their place, or a constant that divides by zero."""
    x, y = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]
    rank = lambda v: [np.mean([i for i, w in enumerate(sorted(v)) if w == u]) for u in v]
    assert grpo.spearman(x, y) == pytest.approx(np.corrcoef(rank(x), rank(y))[0, 1])
    assert grpo.spearman(x, [1] * 8) == 0


# ---------------------------------------------------------------- grpo: the run

LOG_KEYS = """step reward/length reward/format reward/writing words tokens truncated repetition
    entropy grad_norm lr ratio/mean ratio/p99 ratio/outside zero_std/length zero_std/format
    zero_std/writing seconds/sample seconds/train tokens_per_second""".split()
EVAL_KEYS = ["eval/length", "eval/format", "eval/writing", "eval/spearman"]


@pytest.fixture(scope="module")
def training(policy, judge, tmp_path_factory):
    """Arguments of a small grpo.py run."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_lines(path, [{"id": f"p{n}", "prompt": f"Say {n} words", "length": [n, n + 3]}
                       for n in range(1, 6)])
    return [f"model={policy}", f"reward_model={judge / 'latest'}", f"prompts={path}",
            f"eval_prompts={path}", "num_prompts=2", "num_samples=2", "max_tokens=24",
            "slots=16", "save_every=1", "eval_every=2", "lr=0.01", "keep=1", "template=chat"]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@pytest.fixture(scope="module")
def whole_run(training, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    grpo.main(training + [f"out={out}", "steps=4"])
    return out


def test_a_run_leaves_its_log_checkpoints_and_samples(whole_run, policy):
    """A log key that others read and that is gone, links that do not survive a move, or a
    checkpoint that transformers cannot open."""
    log = read_log(whole_run)
    assert [row["step"] for row in log] == [0, 1, 2, 3, 4]
    assert set(log[0]) == {"step", *EVAL_KEYS} and set(log[4]) == {*LOG_KEYS, *EVAL_KEYS}
    assert all(set(row) - set(EVAL_KEYS) == set(LOG_KEYS) for row in log[1:])
    assert all(abs(row["ratio/mean"] - 1) < 1e-4 and row["grad_norm"] > 1e-3 for row in log[1:])
    assert os.readlink(whole_run / "latest") == "checkpoint-000004"
    assert (whole_run / "best").exists() and (whole_run / "curves.png").exists()
    assert len(list(whole_run.glob("checkpoint-*"))) <= 2
    assert len((whole_run / "samples" / "step-000004.jsonl").read_text().splitlines()) == 20
    config = json.loads((whole_run / "config.json").read_text())
    assert config["num_samples"] == 2 and "command" in config and "commit" in config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole_run / "latest")
    ours = load_model(str(whole_run / "latest"), "cpu")
    assert same(dict(full_parameters(ours)), dict(theirs.named_parameters()))
    assert not same(dict(full_parameters(ours)), dict(full_parameters(load_model(policy, "cpu"))))


def test_a_resumed_run_equals_the_uninterrupted_one(whole_run, training, tmp_path, capsys):
    """Sampling noise, prompts, moments or the log that start over at a resume."""
    grpo.main(training + [f"out={tmp_path}", "steps=2"])
    grpo.main(training + [f"out={tmp_path}", "steps=4"])
    assert "resumed from" in capsys.readouterr().out
    assert same(weights_of(tmp_path), weights_of(whole_run))
    assert without_times(read_log(tmp_path)) == without_times(read_log(whole_run))
    grpo.main(training + [f"out={tmp_path}", "steps=4"])
    assert "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        grpo.main(training + [f"out={tmp_path}", "steps=4", "num_samples=3"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "num_samples was 2 and is now 3" in error


@pytest.mark.parametrize("verb", ["update", "evaluate"])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(verb, whole_run, training,
                                                                   tmp_path, capsys):
    """Ctrl-C in a rollout that loses the last update, logs a row twice, or ends in a traceback."""
    calls, original = [], getattr(grpo.Trainer, verb)

    def interrupted(self, step):
        calls.append(step)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.Trainer, verb, interrupted)
        grpo.main(training + [f"out={tmp_path}", "steps=4"])
    assert "the same command goes on" in capsys.readouterr().out
    grpo.main(training + [f"out={tmp_path}", "steps=4"])
    assert same(weights_of(tmp_path), weights_of(whole_run))
    assert without_times(read_log(tmp_path)) == without_times(read_log(whole_run))


def run_grpo(ranks, arguments):
    grpo.main(arguments)  # joins the group that is there


def test_two_ranks_sample_what_they_train(training, whole_run, tmp_path, run_on_ranks):
    """A sampler that keeps yesterday's weights: the ratio would leave 1 after the first step."""
    run_on_ranks(2, run_grpo, training + [f"out={tmp_path}", "steps=3"])
    log, alone = read_log(tmp_path), read_log(whole_run)
    assert [row["step"] for row in log] == [0, 1, 2, 3]
    assert all(abs(row["ratio/mean"] - 1) < 1e-4 and row["ratio/outside"] == 0 for row in log[1:])
    for key in ("reward/length", "tokens", "grad_norm"):
        assert log[1][key] == pytest.approx(alone[1][key], rel=1e-3)


def test_most_samples_cut_raise_the_alarm(training, tmp_path):
    """A run that burns its hours at the cap with all rewards 0."""
    with pytest.raises(SystemExit, match="most samples are truncated"):
        grpo.main(training + [f"out={tmp_path}", "steps=50", "max_tokens=7"])
    assert read_log(tmp_path)[-1]["step"] == grpo.ALARM_STEPS
    assert (tmp_path / "best").exists()


@pytest.mark.parametrize("arguments, words", [
    (["stepz=3"], "stepz"), (["steps=many"], "steps"), (["num_samples=1"], "at least 2"),
    (["prompts=nowhere.jsonl"], "nowhere.jsonl"), (["model=nowhere"], "nowhere"),
    (["out=/dev/null/run"], "out=/dev/null/run"), (["max_tokens=600"], "context"),
    (["reward_model=toy/prompts.jsonl"], "toy/prompts.jsonl"), (["length_max=1"], "length_max")])
def test_wrong_input_to_grpo_is_one_line_and_status_2(arguments, words, training, tmp_path, capsys):
    """A traceback for a typing error, or a run that starts in spite of it."""
    with pytest.raises(SystemExit, match="2"):
        grpo.main(training + [f"out={tmp_path}"] + arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_rows_without_a_length_or_out_of_reach_are_named(policy, capsys):
    """Prompts that no completion can satisfy, which would only teach that nothing pays."""
    rows = [{"id": n, "prompt": "one two three", "length": [n, n]} for n in (0, 5, 5000)]
    kept = grpo.drop_unreachable(rows, load_tokenizer(policy), 100, True)
    assert [row["id"] for row in kept] == [5]
    out = capsys.readouterr().out
    assert "prompt 0:" in out and "prompt 5000:" in out


@pytest.mark.parametrize("module", [grpo, pretrain, reward, sample, network])
def test_every_key_is_read(module):
    """A dead knob: a key of a script's config that nothing reads."""
    shared = "".join(Path(m.__file__).read_text() for m in (module, pretrain, network))
    for key in module.CONFIG:
        uses = re.findall(rf'config(?:\[|\.get\()"{key}"|"{key}"[,)\]]', shared)
        assert uses or key == "resume", key


# ---------------------------------------------------------------- the toy

def test_held_out_prompts_share_no_topic_and_no_count_with_training():
    """A held-out table that shows memory instead of skill, or ranges wider than promised."""
    toy = Path(network.__file__).parent / "toy"
    train, held_out = ([json.loads(line) for line in (toy / name).open()]
                       for name in ("prompts.jsonl", "held_out.jsonl"))
    counts = [{int(row["id"].split("-")[0]) for row in rows} for rows in (train, held_out)]
    topics = [{tuple(row["topic"]) for row in rows} for rows in (train, held_out)]
    assert not counts[0] & counts[1] and not topics[0] & topics[1]
    for row in train + held_out:
        lo, hi = row["length"]
        assert hi - lo <= 0.2 * (lo + hi) / 2 and row["id"].split("-")[0] in row["prompt"].split()
        assert lo <= int(row["id"].split("-")[0]) <= hi
    for name in ("text", "pairs"):
        rows = [json.loads(line) for line in gzip.open(toy / f"{name}.jsonl.gz")]
        assert not any(f"the {who} in the {where} " in row["prompt"] + " "
                       for row in rows for who, where in topics[1])


def test_the_toys_models_are_small_and_theirs_too():
    """A toy that is too large to commit, or that only our code can open."""
    toy = Path(network.__file__).parent / "toy"
    policy = transformers.AutoModelForCausalLM.from_pretrained(toy / "policy")
    transformers.AutoModelForSequenceClassification.from_pretrained(toy / "reward")
    assert policy.num_parameters() <= 1_200_000 and policy.config.num_hidden_layers <= 4
    sizes = [file.stat().st_size for name in ("policy", "reward")
             for file in (toy / name).iterdir()]
    assert sum(sizes) < 8_000_000 and 500 <= len(load_tokenizer(toy / "policy")) <= 2000
