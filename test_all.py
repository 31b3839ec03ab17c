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
import socket
import traceback
from multiprocessing.connection import wait

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

import model as network
import sample
from model import (ChunkedLogProbs, InputError, Span, copy_weights, full_parameters, load_model,
                   load_tokenizer, parse_config, save_folder)
from sample import (Stops, apply_template, count_words, encode_prompts, find_answer, find_words,
                    generate, gumbel_noise, load_prompts, load_rows, noise_key, sample_tokens)

SMALL = dict(vocab_size=101, hidden_size=32, intermediate_size=50, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             initializer_range=0.2, tie_word_embeddings=True)
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
                replies[connection], error = pickle.loads(connection.recv_bytes())
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
    assert torch.autograd.gradcheck(chunked, [y[:5].clone().requires_grad_() if y is x else
                                              y.clone().requires_grad_() for y in (x, weight)]
                                    ) if len(targets := targets[:5]) else True


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
    """FAILS: FSDP keeps the root gathered, in bf16, after a forward pass without a backward, and
    full_parameters takes that: what is saved after an evaluation has lost 16 bits."""
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
    rows, starts = [], []
    look = lambda engine: engine.running() and rows.append(engine.num_rows())
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


def test_the_text_does_not_depend_on_slots_or_order(policy):
    """Noise keyed by the slot, the order or the batch: a resume or one more GPU would change
    the run. Also caps, stops and their finish, all against one sequence at a time."""
    ours, prompts, stops = load_policy(policy, torch.float64)
    with torch.no_grad():
        expected = {job: naive_completion(ours, prompts[job[0]], (3, 7, *job), stops,
                                          CAPS[job[0]]) for job in ALL_WORK}
    assert {finish for _, finish in expected.values()} == {"stop", "length"}
    for slots in 16, 32, 64:
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
    (prompt,), fits = encode_prompts(tokenizer, "think", [row], 512, 10), 512
    encode_prompts(tokenizer, "think", [row], len(prompt) + 10, 10)
    with pytest.raises(InputError, match=f"'row-7': {len(prompt)} tokens"):
        encode_prompts(tokenizer, "think", [row], len(prompt) + 9, 10)
    with pytest.raises(InputError, match="think, direct, chat"):
        encode_prompts(tokenizer, "thought", [row], 512, 10)


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
