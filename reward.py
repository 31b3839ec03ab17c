"""The three rewards of long writing, length, format and writing, and the trainer of the third.

    python reward.py responses=responses.jsonl prompts=rows.jsonl     # a table of all components
    python reward.py pairs=pairs.jsonl model=FOLDER out=out/reward    # train a reward model
    torchrun --nproc_per_node 8 reward.py pairs=pairs.jsonl model=FOLDER

Every reward is a function of plain values. Only the answer is counted, checked for copies and
judged; the tags are read in the completion, never in the template, which holds them too.

Where the paper (arXiv:2506.18841) is silent:
1. The length reward falls to 0 at length_max times the upper end of the range; it is a choice
   because the paper's fixed maximum would tax long requests less than short ones.
2. An unclosed answer counts as an answer for length and writing, with format 0; no answer at
   all has length 0 and format 0, and its writing is the score of the empty text.
3. The repetition penalty is the share of words inside a 13-word span that the text already had,
   nothing up to 0.1 and all from 0.4: human prose has none, and texts that loop have 0.3.
4. The reward model reads the prompt and the answer, not the thinking, in ChatML, and its score
   is taken at the last <|im_end|>. It is trained on whole texts: a pair has two of any length in
   one pass, and passes are filled by tokens, not by pairs.
"""
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from model import (InputError, flops_per_token, is_scorer, load_config, load_for_training,
                   load_model, load_tokenizer, parse_config, script, setup)
from pretrain import (TRAINING, TRAINING_LIMITS, Run, content_key, make_optimizer, make_packs,
                      print_plan, train)
from sample import (LIMITS, count_words, find_answer, find_words, load_prompts, load_rows,
                    read_done, render_chat)

CONFIG = dict(
    model="toy/policy",          # training: the language model to start from; scoring: a judge
    pairs="toy/pairs.jsonl.gz",  # rows {"prompt", "chosen", "rejected"} to train on
    val_pairs="",                # rows for the accuracies every eval_every steps
    responses="",                # rows to score instead: {"index", "response", "completion"}
    prompts="",                  # prompt rows that give responses their length range
    template="think",            # which tags a completion should have: think, direct or chat
    length_max=2.0,              # the length reward is 0 from this multiple of the upper end
    out="out/reward",            # the run's folder
    steps=150,
    batch_pairs=32,              # pairs a step, over all ranks
    micro_tokens=8192,           # tokens a forward pass, on each rank; a pair stays together
    max_len=32_768,              # tokens of a prompt and answer, and at most the model's context;
                                 # the share cut is printed
    centre=0.01,                 # weight of the squared sum of a pair's scores
    lr=3e-4,
    schedule="cosine",           # or constant, inverse_sqrt
    **TRAINING,
)
NGRAM = 13                  # words; field practice for copies, and free of false alarms in prose
DEAD_ZONE, FULL = 0.1, 0.4  # copied share at which the penalty starts and is complete
RATIOS = 0.5, 0.8, 1.25, 2  # words of the chosen over words of the rejected: where accuracy splits


# ---------------------------------------------------------------- length and format

def length_reward(num_words, lo, hi, length_max=2.0):
    """1 within lo..hi words; num_words / lo below; falling to 0 at length_max * hi above."""
    if lo <= num_words <= hi:
        return 1.0
    if num_words < lo:
        return num_words / lo
    return max(0.0, (length_max * hi - num_words) / (length_max * hi - hi))


def has_format(completion, template="think"):
    """Whether it is exactly one <think> block, then exactly one <answer> block, nothing else;
    without the thinking for direct, and anything for chat."""
    if template == "chat":
        return True
    think = r"\s*<think>(.*?)</think>" if template == "think" else ""
    text = re.sub(r"(<\|endoftext\|>|<\|im_end\|>)$", "", completion)  # how a model ends
    found = re.fullmatch(think + r"\s*<answer>(.*?)</answer>\s*", text, re.DOTALL)
    inner_tag = r"<\s*/?\s*(think|answer)\b"
    return bool(found) and not any(re.search(inner_tag, part, re.IGNORECASE)
                                   for part in found.groups())


def copied_share(text, n=NGRAM):
    """Share of the text's words inside an n-word span that occurs earlier in it."""
    words = [word.lower() for word in find_words(text)]
    seen, is_copied = set(), [False] * len(words)
    for start in range(len(words) - n + 1):
        span = tuple(words[start:start + n])
        if span in seen:
            is_copied[start:start + n] = [True] * n
        seen.add(span)
    return sum(is_copied) / max(1, len(words))


def repetition_penalty(text):
    """0 for text that does not copy itself, 1 from a copied share of FULL on."""
    return min(1.0, max(0.0, (copied_share(text) - DEAD_ZONE) / (FULL - DEAD_ZONE)))


def rule_rewards(completion, length, template="think", length_max=2.0, is_truncated=False):
    """{"length", "format", "repetition", "words", "answer"} of one completion; length [lo, hi]."""
    answer = find_answer(completion, template)
    words, penalty = count_words(answer), repetition_penalty(answer)
    is_whole = bool(answer) and not is_truncated and has_format(completion, template)
    return {"length": length_reward(words, *length, length_max) if answer else 0.0,
            "format": (1 - penalty) * is_whole, "repetition": penalty, "words": words,
            "answer": answer}


# ---------------------------------------------------------------- writing

def judged_tokens(tokenizer, texts, max_len):
    """[(tokens that a reward model reads, whether they had to be cut)] of [(prompt, answer)]. A
    folder's own chat template wins; the last token is always the one that ends the assistant's
    turn."""
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
             for prompt, answer in texts]
    rendered = [render_chat(tokenizer, turn, False).rstrip() for turn in turns]
    found = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"] \
        if rendered else []  # on all cores
    return [(np.array(tokens if len(tokens) <= max_len else tokens[:max_len - 1] + tokens[-1:],
                      dtype=np.int32), len(tokens) > max_len) for tokens in found]


def score_packed(model, sequences, device):
    """Scores (S,) of sequences of tokens, in one forward pass."""
    sizes = torch.tensor([0] + [len(tokens) for tokens in sequences])
    tokens = torch.tensor(np.concatenate(sequences), dtype=torch.long, device=device)
    return model(tokens, sizes.cumsum(0).to(device, torch.int32))


def score_sequences(model, sequences, ranks, micro_tokens, together=1, loss=None):
    """Scores, a list, of sequences that all ranks have; collective, with as many forward passes
    on each rank and like costs. Every `together` in a row share a pass. loss: of the scores of
    a pass (groups, together), whose gradient is left; their sum over passes and ranks counts."""
    lengths = np.array([len(tokens) for tokens in sequences], dtype=int).reshape(-1, together)
    costs = (lengths * flops_per_token(model.config, lengths)).sum(1)
    packs = make_packs(lengths.sum(1), costs, ranks.world, micro_tokens)[ranks.rank::ranks.world]
    found = []
    for pack in packs:
        part = [sequences[together * place + i] for place in pack for i in range(together)]
        with torch.set_grad_enabled(loss is not None):  # a rank without work takes part
            scores = score_packed(model, part or [[0]], ranks.device)[:len(part)]
        if loss:  # FSDP averages over ranks; the loss is a sum
            (loss(scores.view(-1, together)) * ranks.world).backward()
        found.append(scores.detach())
    places = [together * place + i for pack in packs for place in pack for i in range(together)]
    scored = ranks.gather(list(zip(places, torch.cat(found).tolist())))
    return [score for _, score in sorted(scored)]


class WritingModel:
    """A Qwen2 folder with a score head, as a judge of answers. Sharded over the ranks as the
    policy is; plain on one CPU process."""

    def __init__(self, folder, ranks):
        _, config = load_config(folder)
        if not is_scorer(config):
            raise InputError(f"{folder}: expected architecture Qwen2ForSequenceClassification, "
                             f"found {config['architectures'][0]}")
        is_cuda = ranks.device.type == "cuda"
        self.model = load_model(folder, ranks.device, torch.bfloat16 if is_cuda else torch.float32,
                                ranks=ranks if is_cuda or ranks.world > 1 else None)
        self.tokenizer = load_tokenizer(folder)
        self.max_len, self.ranks = config["max_position_embeddings"], ranks

    def score(self, prompts, answers, pack_tokens=16_384):
        """A score for each answer to its prompt; higher is better, on the model's own scale.
        Collective: each rank comes with texts of its own, or none, and all share the work."""
        mine = judged_tokens(self.tokenizer, list(zip(prompts, answers)), self.max_len)
        first = sum(self.ranks.gather([len(mine)])[:self.ranks.rank])
        everyone = self.ranks.gather(mine)
        num_cut = sum(is_cut for _, is_cut in everyone)
        if num_cut and self.ranks.rank == 0:
            tqdm.write(f"{num_cut} of {len(everyone)} texts cut at {self.max_len} tokens, the "
                       "reward model's context")
        scores = score_sequences(self.model, [tokens for tokens, _ in everyone], self.ranks,
                                 pack_tokens)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # without a backward pass the root stays gathered
        return scores[first:first + len(mine)]


# ---------------------------------------------------------------- Bradley-Terry training

def pair_row(row, number):
    for key in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"expected a text under {key!r}, found columns {sorted(row)}")
        row[key].encode()  # half a surrogate pair is JSON, and no text
    return row["prompt"], row["chosen"], row["rejected"]


def tokenise_pairs(rows, tokenizer, max_len, ranks, name, batch=64):
    """[(chosen tokens, rejected tokens)] of rows (prompt, chosen, rejected), and the share of
    texts that had to be cut. Each rank reads its share; a text that is in many pairs is read
    once. Collective."""
    places = {text: place for place, text in enumerate(dict.fromkeys(
        (prompt, answer) for prompt, *answers in rows for answer in answers))}
    texts, found = list(places), {}
    with tqdm(total=len(texts), desc=f"tokens of {Path(name).name}", unit=" texts",
              disable=ranks.rank > 0) as bar:
        for start in range(0, len(texts), batch * ranks.world):
            end = min(start + batch * ranks.world, len(texts))
            mine = range(start + ranks.rank, end, ranks.world)
            tokens = judged_tokens(tokenizer, [texts[place] for place in mine], max_len)
            found |= ranks.gather(list(zip(mine, tokens)))
            bar.update(end - start)
    pairs = [[found[places[prompt, answer]][0] for answer in answers] for prompt, *answers in rows]
    return pairs, sum(is_cut for _, is_cut in found.values()) / len(found)


def draw_pairs(pairs, batch_pairs, step, seed):
    """The pairs of 1-based step: all come once an epoch, each epoch in a new order."""
    epochs, places = np.divmod(np.arange((step - 1) * batch_pairs, step * batch_pairs), len(pairs))
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(len(pairs))
              for epoch in set(epochs.tolist())}
    return [pairs[orders[epoch][place]] for epoch, place in zip(epochs.tolist(), places)]


def bradley_terry(scores_P2, centre):
    """-log sigmoid(chosen - rejected) + centre * (chosen + rejected)^2 of each pair, (P,); the
    second term fixes the scale's origin (arXiv:2312.09244)."""
    chosen, rejected = scores_P2.unbind(1)
    return -F.logsigmoid(chosen - rejected) + centre * (chosen + rejected) ** 2


def leave_gradient(model, pairs, ranks, micro_tokens, centre):
    """Scores (P, 2) of pairs, chosen first; leaves the gradient of their mean loss. Collective."""
    loss = lambda scores: bradley_terry(scores, centre).sum() / len(pairs)
    texts = [tokens for pair in pairs for tokens in pair]
    return torch.tensor(score_sequences(model, texts, ranks, micro_tokens, 2, loss)).view(-1, 2)


def score_pairs(model, pairs, ranks, micro_tokens):
    """Scores (P, 2) of pairs, chosen first, each text scored once. Collective."""
    texts = {id(tokens): tokens for pair in pairs for tokens in pair}
    scores = dict(zip(texts, score_sequences(model, list(texts.values()), ranks, micro_tokens)))
    return torch.tensor([[scores[id(tokens)] for tokens in pair] for pair in pairs])


def share_right(scores_P2):
    """Share of pairs whose chosen text scores higher; a tie is half right, no pairs are NaN."""
    return (scores_P2[:, 0] - scores_P2[:, 1]).sign().add(1).div(2).mean().item()


def length_ratios(rows):
    """(P,) words of the chosen over words of the rejected."""
    words = {answer: count_words(answer) + 1 for _, *answers in rows for answer in answers}
    return torch.tensor([words[chosen] / words[rejected] for _, chosen, rejected in rows])


def ratio_buckets(ratios):
    """{name: (P,) mask} of pairs by length ratio, and of those whose chosen is the shorter."""
    edges = [0, *RATIOS, math.inf]
    return {"chosen_shorter": ratios < 1} | {
        f"ratio_{low:g}_to_{high:g}": (low <= ratios) & (ratios < high)
        for low, high in zip(edges, edges[1:])}


def val_row(scores_P2, ratios, centre):
    """The log's val_*: loss, accuracy of all and by length ratio, and of the rule that the longer
    text wins, which any accuracy has to beat."""
    return {"val_loss": bradley_terry(scores_P2, centre).mean().item(),
            "val_accuracy": share_right(scores_P2)} | {
        f"val_accuracy/{name}": share_right(scores_P2[mask])
        for name, mask in ratio_buckets(ratios).items()} | {
        "val_longer_wins": share_right(torch.stack([ratios.log(), -ratios.log()], 1))}


def print_accuracies(log, ratios):
    """The last evaluation of a run, if it came to one, as a table."""
    rows = [row for row in read_done(log) if "val_loss" in row]
    if not rows:
        return
    row = rows[-1]
    counts = {f"val_accuracy/{name}": int(mask.sum())
              for name, mask in ratio_buckets(ratios).items()}
    print(f"\n{'step ' + str(row['step']):<34}{'pairs':>8}{'':>10}")
    for key in [key for key in row if key.startswith("val_")]:
        value = "none" if row[key] is None else f"{row[key]:.3f}"
        print(f"{key:<34}{counts.get(key, len(ratios)):>8}{value:>10}")


def scorer_config(folder, config, tokenizer):
    """A folder's config with a score head. transformers reads the score at the last token that is
    not padding, so that padding must not be the token that ends a turn, nor be missing."""
    end = int(judged_tokens(tokenizer, [("", "")], 999)[0][0][-1])
    pad = tokenizer.pad_token_id
    if pad is None or pad == end:
        raise InputError(f"{folder}: expected a pad_token that no text ends with, found "
                         f"{tokenizer.pad_token!r}; set it in tokenizer_config.json")
    return config | {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1,
                     "id2label": {"0": "score"}, "label2id": {"score": 0}, "pad_token_id": pad}


def train_reward_model(config):
    ranks = setup()
    _, found = load_config(config["model"])
    tokenizer = load_tokenizer(config["model"])
    model_config = scorer_config(config["model"], found, tokenizer)
    max_len = min(config["max_len"], found["max_position_embeddings"])
    files = [config[key] for key in ("pairs", "val_pairs") if config[key]]
    rows = [load_rows(file, pair_row) for file in files]
    (pairs, cut), *rest = [tokenise_pairs(part, tokenizer, max_len, ranks, file)
                           for part, file in zip(rows, files)]
    model = load_for_training(config, ranks, config=model_config,
                              new=set() if is_scorer(found) else {"score.weight"})
    optimizer = make_optimizer(model, config["weight_decay"], config["beta2"])
    if ranks.rank == 0:
        print(f"{len(pairs)} pairs, {cut:.1%} of their texts cut at {max_len} tokens")
    content = [content_key([file], tokenizer) for file in files]
    run, batch = Run(config | {"data_content": content}, ranks), config["batch_pairs"]
    options = ranks, config["micro_tokens"]

    def accumulate(step):
        drawn = draw_pairs(pairs, batch, step, config["seed"])
        scores = leave_gradient(model, drawn, *options, config["centre"])
        return {"loss": bradley_terry(scores, config["centre"]).mean().item(),
                "accuracy": share_right(scores)}

    ratios = length_ratios(rows[-1]) if rest else None
    validate = lambda: val_row(score_pairs(model, rest[0][0], *options), ratios, config["centre"])
    mean_tokens = sum(len(tokens) for pair in pairs for tokens in pair) / len(pairs)
    train(run, model, optimizer, accumulate, validate if rest else dict,
          {"loss": ["loss", "val_loss"], "accuracy": ["accuracy", "val_accuracy"]},
          tokens=batch * mean_tokens, length=mean_tokens / 2)
    if rest and ranks.rank == 0:
        print_accuracies(run.folder / "log.jsonl", ratios)


# ---------------------------------------------------------------- a table of responses

def response_row(row, number):
    if "index" not in row or not isinstance(row.get("response"), str):
        raise ValueError(f"expected index and a text under response, found {sorted(row)}")
    return row


def print_components(config):
    """A line per response: words, range, and each reward; then the means."""
    rows = load_rows(config["responses"], response_row)
    known = {row["id"]: row for row in load_prompts(config["prompts"])} if config["prompts"] else {}
    ranks = setup()
    _, model_config = load_config(config["model"])
    is_judge = model_config["architectures"][0] == "Qwen2ForSequenceClassification"
    prompts = [known.get(row["index"], row).get("prompt") or "" for row in rows]
    writing = (WritingModel(config["model"], ranks).score(
        prompts, [row["response"] for row in rows]) if is_judge else [math.nan] * len(rows))
    table = []
    for row, score in zip(rows, writing):
        length = known.get(row["index"], row).get("length")
        completion = row.get("completion") or row["response"]
        rewards = rule_rewards(completion, length or [0, math.inf],
                               config["template"] if row.get("completion") else "chat",
                               config["length_max"], row.get("finish") == "length")
        table.append([rewards["words"], rewards["length"] if length else math.nan,
                      rewards["format"], rewards["repetition"], score])
    print(f"{'index':<12}{'words':>8}{'length':>9}{'format':>9}{'repeated':>9}{'writing':>9}")
    for row, values in zip(rows, table):
        print(f"{row['index']!s:<12}{values[0]:>8}" + "".join(f"{v:>9.3f}" for v in values[1:]))
    means = torch.tensor(table).nanmean(0).tolist()
    print(f"{'mean':<12}{means[0]:>8.0f}" + "".join(f"{v:>9.3f}" for v in means[1:]))


@script
def main(argv):
    config = parse_config(CONFIG, argv, TRAINING_LIMITS | dict(
        batch_pairs=1, micro_tokens=1, max_len=8, centre=0, length_max=1 + 1e-6,
        template=LIMITS["template"]))
    if config["plan"]:
        length = min(config["max_len"],
                     load_config(config["model"])[1]["max_position_embeddings"])
        print_plan(config, 2 * config["batch_pairs"] * length,
                   max(2 * length, config["micro_tokens"]), length,
                   {"architectures": ["Qwen2ForSequenceClassification"]})
    elif config["responses"]:
        print_components(config)
    else:
        train_reward_model(config)


if __name__ == "__main__":
    main()
