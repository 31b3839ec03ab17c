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
   is taken at the last <|im_end|>.
"""
import math
import re

import torch
import torch.nn.functional as F

from model import (InputError, load_config, load_for_sampling, load_for_training,
                   load_tokenizer, parse_config, script, setup)
from pretrain import (TRAINING, TRAINING_LIMITS, Run, deal_evenly, make_optimizer, print_plan,
                      train)
from sample import (LIMITS, count_words, find_answer, find_words, load_prompts, load_rows,
                    render_chat)

CONFIG = dict(
    model="toy/policy",          # training: the language model to start from; scoring: a judge
    pairs="toy/pairs.jsonl.gz",  # rows {"prompt", "chosen", "rejected"} to train on
    val_pairs="",                # rows for the accuracy every eval_every steps
    responses="",                # rows to score instead: {"index", "response", "completion"}
    prompts="",                  # prompt rows that give responses their length range
    template="think",            # which tags a completion should have: think, direct or chat
    length_max=2.0,              # the length reward is 0 from this multiple of the upper end
    out="out/reward",            # the run's folder
    steps=150,
    batch_pairs=32,              # pairs a step, over all ranks
    micro_pairs=16,              # pairs a forward pass, on each rank
    max_len=1024,                # tokens of a prompt and answer; the share cut is printed
    centre=0.01,                 # weight of the squared sum of a pair's scores
    lr=3e-4,
    schedule="cosine",           # or constant, inverse_sqrt
    **TRAINING,
)
NGRAM = 13                  # words; field practice for copies, and free of false alarms in prose
DEAD_ZONE, FULL = 0.1, 0.4  # copied share at which the penalty starts and is complete


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

def judged_tokens(tokenizer, prompt, answer, max_len):
    """(tokens that a reward model reads, whether the answer had to be cut). A folder's own chat
    template wins; either way the last token is the one that ends the assistant's turn."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    tokens = tokenizer.encode(render_chat(tokenizer, turns, False).rstrip(),
                              add_special_tokens=False)
    is_cut = len(tokens) > max_len
    return (tokens[:max_len - 1] + tokens[-1:] if is_cut else tokens), is_cut


def score_packed(model, sequences, device):
    """Scores (S,) of lists of tokens, in one forward pass."""
    sizes = torch.tensor([0] + [len(tokens) for tokens in sequences])
    tokens = torch.tensor([token for tokens in sequences for token in tokens], device=device)
    return model(tokens, sizes.cumsum(0).to(device, torch.int32))


class WritingModel:
    """A Qwen2 folder with a score head, as a judge of answers."""

    def __init__(self, folder, ranks):
        _, config = load_config(folder)
        if config["architectures"][0] != "Qwen2ForSequenceClassification":
            raise InputError(f"{folder}: expected architecture Qwen2ForSequenceClassification, "
                             f"found {config['architectures'][0]}")
        self.model = load_for_sampling(folder, ranks)
        self.tokenizer = load_tokenizer(folder)
        self.max_len, self.device = config["max_position_embeddings"], ranks.device

    @torch.no_grad()
    def score(self, prompts, answers, pack_tokens=16_384):
        """A score for each answer to its prompt; higher is better, on the model's own scale."""
        sequences = [judged_tokens(self.tokenizer, prompt, answer, self.max_len)[0]
                     for prompt, answer in zip(prompts, answers)]
        scores, pack, size = [], [], 0
        for tokens in sequences:
            if pack and size + len(tokens) > pack_tokens:
                scores += score_packed(self.model, pack, self.device).tolist()
                pack, size = [], 0
            pack.append(tokens)
            size += len(tokens)
        return scores + (score_packed(self.model, pack, self.device).tolist() if pack else [])


# ---------------------------------------------------------------- Bradley-Terry training

def pair_row(row, number):
    for key in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"expected a text under {key!r}, found columns {sorted(row)}")
    return row["prompt"], row["chosen"], row["rejected"]


def load_pairs(path, tokenizer, max_len):
    """[(chosen tokens, rejected tokens)], and the share of answers that had to be cut."""
    pairs = [[judged_tokens(tokenizer, prompt, answer, max_len) for answer in answers]
             for prompt, *answers in load_rows(path, pair_row)]
    cut = sum(is_cut for pair in pairs for _, is_cut in pair) / (2 * len(pairs))
    return [[tokens for tokens, _ in pair] for pair in pairs], cut


def pair_loss(model, pairs, ranks, micro_pairs, centre, train):
    """(mean Bradley-Terry loss, accuracy) over the pairs of all ranks; with train, gradients.

    -log sigmoid(chosen - rejected) + centre * (chosen + rejected)^2, both answers of a pair in
    one packed pass; the second term fixes the scale's origin (arXiv:2312.09244)."""
    sums = torch.zeros(2)
    for part in deal_evenly(pairs, ranks, micro_pairs):
        counts = float(bool(part))  # a rank without pairs takes part all the same
        with torch.set_grad_enabled(train):
            scores = score_packed(model, [tokens for pair in part or pairs[:1] for tokens in pair],
                                  ranks.device).view(-1, 2)
            chosen, rejected = scores.unbind(1)
            loss = -F.logsigmoid(chosen - rejected) + centre * (chosen + rejected) ** 2
            loss = counts * loss.sum() / len(pairs)
        if train:
            (loss * ranks.world).backward()  # FSDP averages over ranks; the loss is a sum
        right = counts * (chosen > rejected).sum().item() / len(pairs)
        sums += torch.tensor([loss.item(), right])
    return torch.tensor(ranks.gather([sums.tolist()])).sum(0).tolist()


def train_reward_model(config):
    ranks = setup()
    if config["batch_pairs"] % ranks.world:
        raise InputError(f"batch_pairs={config['batch_pairs']}: expected a multiple of the "
                         f"{ranks.world} ranks")
    _, model_config = load_config(config["model"])
    tokenizer = load_tokenizer(config["model"])
    pairs, cut = load_pairs(config["pairs"], tokenizer, config["max_len"])
    val_pairs = load_pairs(config["val_pairs"], tokenizer, config["max_len"])[0] \
        if config["val_pairs"] else []
    # transformers finds the last token by skipping pad tokens, so the pad must not be <|im_end|>
    model_config |= {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1,
                     "id2label": {"0": "score"}, "label2id": {"score": 0},
                     "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    model = load_for_training(config, ranks, config=model_config,
                              new={"score.weight"})
    optimizer = make_optimizer(model, config["weight_decay"], config["beta2"])
    if ranks.rank == 0:
        print(f"{len(pairs)} pairs, {cut:.1%} of the answers cut at {config['max_len']} tokens")
    loss = lambda pairs, is_training: dict(zip(("loss", "accuracy"), pair_loss(
        model, pairs, ranks, config["micro_pairs"], config["centre"], is_training)))

    def accumulate(step):
        generator = torch.Generator().manual_seed(config["seed"] * 1_000_003 + step)
        places = torch.randint(len(pairs), (config["batch_pairs"],), generator=generator)
        return loss([pairs[place] for place in places], True)

    def validate():
        return {f"val_{key}": value for key, value in loss(val_pairs, False).items()}

    mean_tokens = sum(len(tokens) for pair in pairs for tokens in pair) / len(pairs)
    train(Run(config, ranks), model, optimizer, accumulate, validate if val_pairs else dict,
          {"loss": ["loss", "val_loss"], "accuracy": ["accuracy", "val_accuracy"]},
          tokens=config["batch_pairs"] * mean_tokens, length=mean_tokens / 2)


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
        batch_pairs=1, micro_pairs=1, max_len=8, length_max=1 + 1e-6,
        template=LIMITS["template"]))
    if config["plan"]:
        print_plan(config, 2 * config["batch_pairs"] * config["max_len"],
                   2 * config["micro_pairs"] * config["max_len"], config["max_len"],
                   {"architectures": ["Qwen2ForSequenceClassification"]})
    elif config["responses"]:
        print_components(config)
    else:
        train_reward_model(config)


if __name__ == "__main__":
    main()
