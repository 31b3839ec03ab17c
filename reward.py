"""The three rewards of long writing, length, format and writing, and the trainer of the third.

    python reward.py responses=responses.jsonl prompts=rows.jsonl     # a table of all components
    python reward.py pairs=pairs.jsonl model=FOLDER out=out/reward    # train a reward model
    torchrun --nproc_per_node 8 reward.py pairs=pairs.jsonl model=FOLDER

Every reward is a function of plain values. Only the answer is counted, checked for copies and
judged; the tags are read in the completion, never in the template, which holds them too.

Where the paper (arXiv:2506.18841) is silent:
1. The length reward falls to 0 at length_max times the upper end of the range: a fixed maximum
   would fall steeply for a range near it and hardly at all for a short one, while a multiple asks
   every request for the same relative care. At 2, half too long costs what half too short does.
2. An unclosed answer counts as an answer for length and writing, with format 0; no answer, or
   one without a word, has length 0 and format 0, and its writing is the score of its text.
3. The repetition penalty is the larger of two shares of the answer's words, nothing up to 0.15
   and all from 0.4: words inside a 13-word span that the text already had, and words of
   paragraphs that resemble an earlier stretch of it. Formulas in laws and songs stay below 0.15,
   texts that loop start at 0.3.
4. The reward model reads the prompt and the answer, not the thinking, in ChatML, and its score
   is taken at the last <|im_end|>.
"""
import math
import re
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F

from model import (InputError, load_config, load_for_sampling, load_for_training,
                   load_tokenizer, parse_config, script, setup)
from pretrain import (TRAINING, TRAINING_LIMITS, Run, deal_evenly, make_optimizer, print_plan,
                      train)
from sample import (FILLERS, LIMITS, find_answer, load_prompts, load_rows,
                    normalise_text, render_chat, word_pattern)

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
NGRAM = 13                   # words; field practice for copies, and free of false alarms in prose
PARAGRAPH, PIECE = 20, 100   # words: a shorter paragraph is not compared, a longer one in pieces
ALIKE = 0.25                 # similarity of a copy: prose reaches 0.1 in nine pieces of ten, 0.19
                             # in 99 of 100; with 30% of its words changed a copy has 0.45
DRIFT = 0.25                 # how far words of a copy may shift, in lengths of the piece
DEAD_ZONE, FULL = 0.15, 0.4  # copied share at which the penalty starts and is complete
BREAKS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"  # ends of a line, and so of a paragraph
LOOK_ALIKES = str.maketrans(  # Cyrillic, Greek, Armenian, small capitals; brackets of tags
    "АВЕЅІЈКМНОРСТУХԌԜаверѕікјмнорстухһԁԛԝӏѵ" "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧαεηικνορτυχ"
    "օսոհᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢɑɡı" "‹›⟨⟩〈〉❮❯˂˃",
    "ABESIJKMHOPCTYXGWabepsikjmhopctyxhdqwlv" "ABEZHIKMNOPTYXaenikvoptux"
    "ounhabcdefghijklmnoprstuvwyzagi" "<><><><><>")


# ---------------------------------------------------------------- length and format

def length_reward(num_words, lo, hi, length_max=2.0):
    """1 within lo..hi words, num_words / lo below, falling to 0 at length_max * hi above and 0
    from there on. lo 0 has no below; hi 0, or length_max 1, no slope above: 1, then 0."""
    if num_words < lo:
        return num_words / lo
    if num_words <= hi:
        return 1.0
    limit = length_max * hi
    return (limit - num_words) / (limit - hi) if num_words < limit else 0.0


def unmask(text):
    """The text as it looks: NFKD, without invisible characters, accents and marks, and with
    Latin letters for those of other scripts that look the same."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKD", text)
    hidden = {ord(c): None for c in set(text) if c in FILLERS
              or unicodedata.category(c) == "Cf" or unicodedata.category(c)[0] == "M"}
    return text.translate(LOOK_ALIKES | hidden)


# as HTML has it, with attributes, or torn by spaces; "guess < answer" in code is neither. No two
# stars can share a space, so that a million of them cost one look
TAG = re.compile(r"</?(?:think|thinking|answer)(?:[\s/][^<>]*)?>|<[\s/\\]*"
                 r"(?:t\s*h\s*i\s*n\s*k(?:\s*i\s*n\s*g)?|a\s*n\s*s\s*w\s*e\s*r)[\s/]*>",
                 re.IGNORECASE)


def plain_tag(tag):
    name = re.search("think|answer", re.sub(r"\s", "", tag), re.IGNORECASE)[0].lower()
    return f"</{name}>" if re.match(r"<\s*[/\\]", tag) else f"<{name}>"


def format_fault(completion, template="think"):
    """What is wrong, in a few words, or "": it is exactly one <think> block, then exactly one
    <answer> block with a word in it, and nothing else. Without the thinking for direct; for chat
    anything goes. A tag in disguise (case, spaces, look-alike letters) counts as a tag."""
    if template == "chat":
        return ""
    tags = ["<think>", "</think>", "<answer>", "</answer>"][2 * (template == "direct"):]
    found = [plain_tag(tag) for tag in TAG.findall(unmask(completion))]
    for tag in dict.fromkeys(tags + found):
        if found.count(tag) != tags.count(tag):
            return f"{found.count(tag) or 'no'} {tag}"
    if found != tags:
        return f"{found[0]} before {tags[0]}" if found[0] != tags[0] else "nested tags"
    parts = re.split("|".join(tags), re.sub(r"(<\|endoftext\|>|<\|im_end\|>)\s*$", "", completion))
    if len(parts) != len(tags) + 1:
        return "a tag in disguise"
    if any(part.strip() for part in parts[::2]):
        return "text outside the blocks"
    return "" if any(map(str.isalnum, parts[-2])) else "no words in <answer>"


def read_words(text):
    """(ids, lines, places, number of words), the first three (N,): equal ids for words that look
    the same, the line of each word, and its place among the tokens of the normalised text. A
    number between words is left out, so that numbered copies are copies; tables stay."""
    text = normalise_text(text)
    tokens = re.findall(token_pattern(text), text)
    known, ids = {}, {}
    codes = np.array([known.setdefault(token, len(known)) for token in tokens], dtype=int)
    words = [ids.setdefault(plain_word(token), len(ids)) for token in known]
    is_break = np.array([token.isspace() for token in known], dtype=bool)[codes]
    is_number = np.array([token[0].isdigit() for token in known], dtype=bool)[codes]
    lines, places = np.cumsum(is_break), np.flatnonzero(~is_break)
    is_number = np.concatenate([[False], is_number[places], [False]])
    kept = places[~is_number[1:-1] | is_number[:-2] | is_number[2:]]
    return np.array(words, dtype=int)[codes[kept]], lines[kept], kept, len(places)


def token_pattern(text):
    """Words and line ends of a normalised text."""
    return rf"{word_pattern(text)}|[{BREAKS}]"


def plain_word(word):
    """A word as it looks, without case, inner points and hyphens; i, l and 1 are one, as are o
    and 0."""
    return "".join(filter(str.isalnum, unmask(word).casefold())).translate(
        {ord("i"): "l", ord("1"): "l", ord("0"): "o"})


def number_spans(ids, n):
    """A number for each span of n ids, equal for equal spans (N-n+1,). Exact: a span is numbered
    by the pair of its two halves' numbers, which overlap where n is not a power of two."""
    size, numbers = 1, ids
    while size < n:
        step = min(size, n - size)
        pairs = numbers[:-step] * (numbers.max() + 1) + numbers[step:]
        numbers = np.unique(pairs, return_inverse=True)[1]
        size += step
    return numbers


def copied_words(ids, n=NGRAM):
    """Whether each word is inside a span of n that occurs earlier (N,)."""
    if len(ids) < n:
        return np.zeros(len(ids), dtype=bool)
    spans = number_spans(ids, n)
    first = np.empty_like(spans)
    first[spans[::-1]] = np.arange(len(spans))[::-1]  # the last to be written stays
    edges = np.zeros(len(ids) + 1, dtype=int)
    is_copy = first[spans] < np.arange(len(spans))
    edges[:len(spans)] += is_copy
    edges[n:] -= is_copy
    return edges[:-1].cumsum() > 0


def cut_pieces(lines):
    """The piece (N,) that each word is of: paragraphs, and equal parts of those over PIECE words;
    -1 for paragraphs under PARAGRAPH words."""
    if not len(lines):
        return lines
    _, starts, paragraph, sizes = np.unique(lines, return_index=True, return_inverse=True,
                                            return_counts=True)
    parts = -(-sizes // PIECE)
    within = np.arange(len(lines)) - starts[paragraph]
    pieces = (parts.cumsum() - parts)[paragraph] + within * parts[paragraph] // sizes[paragraph]
    return np.where(sizes[paragraph] >= PARAGRAPH, pieces, -1)


def similarities(ids, pieces, copied):
    """How much of each piece (P,) was said before, in the same order, 0 to 1.

    The share of its pairs of neighbouring words whose first (or, the larger counts, latest) use
    before the piece is equally far back, give or take DRIFT of its length. A copy keeps that
    distance, whatever words are changed; the phrases that a text is made of do not, while cosines
    of word counts take a story's names or a contract's terms for a copy. Pairs inside copied
    spans are counted there, not here: a paragraph may open with a formula. A piece that is mostly
    such spans is a copy."""
    pairs = np.flatnonzero((pieces[:-1] == pieces[1:]) & (pieces[:-1] >= 0))
    best, N = np.zeros(pieces.max(initial=-1) + 1), len(ids)
    if not len(pairs):
        return best
    spans, owner = number_spans(ids, 2), pieces[pairs]
    sizes, starts = np.bincount(owner), np.zeros(len(best), dtype=int)
    starts[owner[::-1]] = pairs[::-1]
    is_free = ~(copied[pairs] & copied[pairs + 1])
    free = np.bincount(owner[is_free], minlength=len(best))
    uses = np.sort(spans * N + np.arange(len(spans)))  # by span, then by place
    wanted = spans[pairs] * N
    for use in (np.searchsorted(uses, wanted), np.searchsorted(uses, wanted + starts[owner]) - 1):
        earlier = uses[use] - wanted  # a place, or outside the text: a use of another span
        found = is_free & (earlier >= 0) & (earlier < starts[owner])
        # sorted by piece, then by distance: one search finds what is near each distance
        near = np.sort(owner[found] * 4 * N + (pairs - earlier)[found])
        reach = (DRIFT * sizes).astype(int)[near // (4 * N)]
        hits = np.searchsorted(near, near + reach, "right") - np.arange(len(near))
        np.maximum.at(best, near // (4 * N), hits)
    return np.where(free < sizes / 2, 1, best / np.maximum(free, 1))


def similar_words(ids, lines, copied):
    """Whether each word is in a paragraph, or piece of one, that resembles an earlier stretch."""
    pieces = cut_pieces(lines)
    is_alike = np.append(similarities(ids, pieces, copied) >= ALIKE, False)  # -1 reads the last
    return is_alike[pieces]


def find_copies(text):
    """{"words": of the text, "spans": share of its words inside copied spans, "paragraphs": share
    inside similar paragraphs, "runs": [(first, last)] tokens of what is either}."""
    ids, lines, places, num_words = read_words(text)
    copied = copied_words(ids)
    similar = similar_words(ids, lines, copied)
    edges = np.flatnonzero(np.diff(copied | similar, prepend=False, append=False))
    total = max(1, len(ids))
    return {"words": num_words, "spans": copied.sum() / total, "paragraphs": similar.sum() / total,
            "runs": [*zip(places[edges[::2]], places[edges[1::2] - 1])]}


def copied_share(text):
    """Share of the text's words inside a span of NGRAM words that occurs earlier in it."""
    return float(find_copies(text)["spans"])


def penalty_of(copies):
    share = max(copies["spans"], copies["paragraphs"])
    return float(np.clip((share - DEAD_ZONE) / (FULL - DEAD_ZONE), 0, 1))


def repetition_penalty(text):
    """0 for text that does not copy itself, 1 from a copied share of FULL on."""
    return penalty_of(find_copies(text))


def raw_places(text):
    """Where in the text each character of normalise_text(text) comes from, then its end (n+1,).
    What combines with the character before it is normalised with it."""
    joined = "".join(c for c in set(text) if joins_the_last(c))
    pattern = rf"[\x00-\x7f]+(?![{joined}])|.[{joined}]*" if joined else r"[\x00-\x7f]+|."
    clusters = re.findall(pattern, text, re.DOTALL)
    known = {cluster: len(normalise_text(cluster)) for cluster in set(clusters)}
    sizes = np.array([known[cluster] for cluster in clusters], dtype=int)
    lengths = np.array([len(cluster) for cluster in clusters], dtype=int)
    within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
    starts = np.repeat(lengths.cumsum() - lengths, sizes)
    places = starts + np.minimum(within, np.repeat(lengths, sizes) - 1)
    return np.append(places, len(text)).tolist()


def joins_the_last(character):
    first = unicodedata.normalize("NFKD", character)[0]
    return unicodedata.category(first) in ("Mn", "Mc", "Me", "Cf") or "\u1160" <= first <= "\u11ff"


def spans_of(text, runs):
    """[(start, end)] characters of the text, end not included, of runs of its tokens."""
    if not runs:
        return []
    normal = normalise_text(text)
    tokens = [match.span() for match in re.finditer(token_pattern(normal), normal)]
    places = range(len(text) + 1) if normal == text else raw_places(text)
    return [(places[tokens[first][0]], places[tokens[last][1]]) for first, last in runs]


def copied_spans(text):
    """[(start, end)] of the characters that repetition_penalty counts as copied."""
    return spans_of(text, find_copies(text)["runs"])


def copies_reason(copies):
    kind = max("spans", "paragraphs", key=copies.get)
    return f"{copies[kind]:.0%} of the words in copied {kind}"


def rule_rewards(completion, length, template="think", length_max=2.0, is_truncated=False):
    """{"length", "format", "repetition", "words", "answer", "copied", "reason"} of one
    completion; length [lo, hi]; copied: spans of the answer; reason: why format is under 1."""
    answer = find_answer(completion, template)
    copies = find_copies(answer)
    words, penalty = copies["words"], penalty_of(copies)
    fault = format_fault(completion, template) or "no words" * (not words) \
        or "cut at the token limit" * is_truncated
    return {"length": length_reward(words, *length, length_max) if words else 0.0,
            "format": 0.0 if fault else 1 - penalty, "repetition": penalty, "words": words,
            "answer": answer, "copied": spans_of(answer, copies["runs"]),
            "reason": fault or copies_reason(copies) * (penalty > 0)}


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
