"""A small grammar of English stories: the toy's topics, texts, corruptions and true score.

    python toy/grammar.py        one request with its plan, its text and the scores

A topic pairs a person with a place. A plan is a list of keywords; sentence i of the text is built
around keyword i. Every sentence is a template with its slots filled, and no word fills two kinds
of slot, so that a sentence parses in one pass: put the slots back and look the template up.

1. Words are runs of letters: "[A-Za-z]+".
2. Held out are pairings, never a person or a place alone, and word counts inside the range, never
   its ends: a model is asked to recombine what it knows, not to extrapolate.
3. All nouns are singular or mass nouns, and all places take "in", so that agreement is free.
"""

import random
import re
from itertools import count
from typing import NamedTuple

# Person: six things, five verbs that can be done to any of them.
TRADES = {
    "baker": ("bread dough flour loaf crust cake", "kneads bakes sifts slices glazes"),
    "sailor": ("sail rope mast anchor flag rudder", "hoists lowers secures cleans steers"),
    "clockmaker": ("clock watch gear dial pendulum spring", "winds oils repairs adjusts sets"),
    "painter": ("canvas portrait sketch mural picture scene", "paints frames shades colors signs"),
    "farmer": ("seed wheat corn hay crop barley", "sows reaps harvests waters plants"),
    "tailor": ("cloth coat sleeve collar shirt velvet", "sews stitches mends hems irons"),
    "smith": ("sword blade horseshoe nail chain shield", "forges heats hammers bends sharpens"),
    "fisherman": ("trout salmon carp eel perch pike", "catches hooks hauls nets weighs"),
    "potter": ("clay vase bowl jug pot tile", "shapes molds fires spins smooths"),
    "carpenter": ("plank chair table door bench ladder", "saws planes sands builds measures"),
    "beekeeper": ("hive honey nectar wax swarm queen", "tends inspects guards moves protects"),
    "doctor": ("patient wound fever cough burn ankle", "examines treats heals cures soothes"),
    "musician": ("tune melody song ballad waltz hymn", "plays sings hums rehearses performs"),
    "cook": ("soup sauce stew broth gravy porridge", "stirs boils tastes seasons serves"),
    "florist": ("rose tulip lily daisy bouquet wreath", "prunes arranges clips ties sells"),
    "poet": ("poem verse rhyme stanza sonnet riddle", "writes recites edits copies reads"),
    "weaver": ("wool shawl blanket carpet yarn scarf", "weaves dyes knits folds unrolls"),
    "miner": ("coal ore copper gold tin quartz", "digs crushes sorts drills loads"),
    "jeweler": ("ring ruby pearl crystal diamond jewel", "polishes engraves rinses mounts buffs"),
    "mason": ("brick stone wall arch pillar chimney", "lays stacks chips levels plasters"),
    "chemist": ("acid powder potion syrup salt tonic", "mixes filters pours blends bottles"),
    "shepherd": ("sheep lamb flock goat ram ewe", "feeds leads herds shears counts"),
    "barber": ("hair beard mustache fringe wig ponytail", "shaves combs trims snips parts"),
    "mechanic": ("engine bolt piston brake motor valve", "fixes tightens tests replaces greases"),
}

# Place: six features.
PLACES = {
    "harbor": "gull pier tide crane lighthouse ferry",
    "forest": "oak pine owl fox moss trail",
    "valley": "river bridge mill hill stream mist",
    "village": "church cottage lane square inn fence",
    "castle": "tower moat gate throne banner knight",
    "desert": "camel dune cactus oasis scorpion lizard",
    "garden": "hedge pond fountain snail sparrow lawn",
    "market": "stall crowd basket merchant cart barrel",
    "library": "scroll desk map globe lamp shelf",
    "swamp": "frog reed heron mud turtle crocodile",
    "jungle": "vine parrot monkey tiger fern waterfall",
    "meadow": "clover butterfly cricket rabbit breeze thistle",
    "canyon": "cliff eagle boulder echo ledge hawk",
    "station": "train platform ticket whistle signal track",
    "museum": "statue fossil mask coin skeleton gallery",
    "palace": "mirror staircase curtain prince peacock crown",
}

# Slots that any topic may fill. They begin with consonants: "a" stands before them.
COMMON = {
    "adj": "strange lovely pale dark bright cold quiet splendid gray plain".split(),
    "mood": "happy tired calm proud hopeful weary cheerful lonely".split(),
    "adv": "slowly gently quietly carefully gladly proudly calmly softly".split(),
    "time": "dawn noon dusk night sunrise sunset midday midnight".split(),
    "guest": "child neighbor stranger traveler friend widow visitor student".split(),
    "weather": "rain wind snow fog sunlight moonlight storm frost".split(),
}

# 7 to 13 words each, at least three of every length for a thing and for a feature. No long run of
# words without a slot that varies within a topic, or texts would repeat themselves.
TEMPLATES = """
The {who} {verb} the {thing} very {adv}.
At {time} the {who} {verb} the {thing}.
Today the {who} {verb} the {adj} {thing}.
The {guest} asks about the {adj} {thing}.
The {feature} looks {adj} in the {weather}.
A {guest} waits beside the {adj} {feature}.
Past the {feature} comes a {adj} {guest}.
By {time} the {feature} is {adj} again.
The {mood} {who} {verb} the {thing} until {time}.
Nobody in the {where} {verb} the {adj} {thing}.
Every {time} a {guest} admires the {adj} {thing}.
Near the {feature} the {who} {verb} the {thing}.
The {who} walks {adv} toward the {adj} {feature}.
In the {weather} the {feature} seems very {adj}.
The {guest} dreams of the {feature} at {time}.
While the {guest} sleeps, the {who} {verb} the {thing}.
The {who} {verb} the {thing} and then the {other}.
Without the {thing} the {where} would seem rather {adj}.
Behind the {feature} the {guest} hides the {adj} {thing}.
The {feature} of the {where} is {adj} at {time}.
From the {feature} a {guest} calls to the {who}.
In the {where} the {who} {adv} {verb} the {adj} {thing}.
The {guest} smiles because the {who} {adv} {verb} the {thing}.
The {who} keeps the {thing} safe from the {adj} {weather}.
Between the {feature} and the {thing} sits a {mood} {guest}.
At {time} the {who} rests by the {feature} and smiles.
A {mood} {guest} follows the {who} past the {adj} {feature}.
The {weather} drifts {adv} over the {feature} and the {where}.
Before {time} the {who} {verb} the {thing}, and the {guest} helps.
With a {mood} smile the {who} {verb} the {thing} until {time}.
The {guest} trades the {thing} for the {other} near the {feature}.
The {guest} remembers when the {feature} of the {where} was {adj}.
When the {weather} comes, the {who} {adv} returns to the {feature}.
The {feature} is {adj}, but the {guest} is {mood} until {time}.
A {guest} who found the {adj} {feature} calls the {where} {adj}.
At {time} the {who} {verb} the {thing} while the {guest} waits {adv}.
After the {weather} fades, the {mood} {who} {verb} the {adj} {thing} again.
Across the {where} people speak {adv} of the {who} and the {thing}.
A {mood} {guest} leaves the {thing} by the {feature} and walks home.
When {time} comes to the {where}, a {guest} visits the {adj} {feature}.
The {who} loves the {feature} most when the {weather} makes it {adj}.
At {time} the {mood} {who} {adv} crosses the {where} toward the {feature}.
The {who} {adv} {verb} the {thing}, because the {guest} wants it before {time}.
Once the {guest} lost the {thing}, but the {who} found the {adj} {other}.
The {guest} finds the {thing} beside the {feature} and laughs with the {who}.
In the {weather} the {who} {verb} the {thing} and forgets the {adj} {feature}.
Beyond the {feature} the {where} grows {adj}, and the {guest} soon feels {mood}.
Under a {adj} sky the {who} and the {guest} meet near the {feature}.
""".strip().split("\n")

REQUESTS = (
    "Write about {topic} in {num} words.",
    "Tell a story of {num} words about {topic}.",
    "Describe {topic} in {num} words, please.",
    "I need a text of {num} words on {topic}.",
)

WORD = re.compile(r"[A-Za-z]+")
SLOT = re.compile(r"\{(\w+)\}")
MIN_WORDS, MAX_WORDS = 20, 200


class Topic(NamedTuple):
    who: str
    where: str


def count_words(text):
    return len(WORD.findall(text))


def topic_slots(topic):
    """The topic's own words, by the slot that they fill."""
    things, verbs = TRADES[topic.who]
    return {"who": [topic.who], "thing": things.split(), "verb": verbs.split(),
            "where": [topic.where], "feature": PLACES[topic.where].split()}


TOPICS = [Topic(who, where) for who in TRADES for where in PLACES]
OWN_WORDS = {t: frozenset(w for ws in topic_slots(t).values() for w in ws) for t in TOPICS}
ALL_OWN_WORDS = frozenset().union(*OWN_WORDS.values())
SLOT_OF = {word: slot for slots in (COMMON, *map(topic_slots, TOPICS))
           for slot, words in slots.items() for word in words}
SLOT_WORDS = {slot: [word for word in SLOT_OF if SLOT_OF[word] == slot] for slot in SLOT.findall(
    " ".join(TEMPLATES)) if slot != "other"}
VOCABULARY = sorted({*SLOT_OF, *WORD.findall(SLOT.sub("", " ".join(TEMPLATES)))})
LENGTHS = {template: count_words(template) for template in TEMPLATES}
MEAN_WORDS = sum(LENGTHS.values()) / len(LENGTHS)
PARSES = frozenset(template.replace("{other}", "{thing}") for template in TEMPLATES)


# ---- Topics, counts and requests ----

def split_topics():
    """(train, held_out): every eighth pairing is held out, two per person and three per place."""
    train, held_out = [], []
    for i, who in enumerate(TRADES):
        for j, where in enumerate(PLACES):
            (train if (5 * i + j) % 8 else held_out).append(Topic(who, where))
    return train, held_out


def split_counts():
    """(train, held_out): every sixth word count from 23 to 197 is held out."""
    counts = range(MIN_WORDS, MAX_WORDS + 1)
    return [n for n in counts if n % 6 != 5], [n for n in counts if n % 6 == 5]


def topic_name(topic):
    return f"the {topic.who} in the {topic.where}"


def request(topic, num_words, rng=None):
    """The user's request, in the first phrasing or in one that rng draws."""
    phrasing = rng.choice(REQUESTS) if rng else REQUESTS[0]
    return phrasing.format(topic=topic_name(topic), num=num_words)


# ---- Paragraphs and sentences ----

def split_paragraphs(sentences, rng):
    """Paragraphs of 3 to 5 sentences; a text of one or two sentences is one paragraph."""
    paragraphs, start = [], 0
    while (left := len(sentences) - start) > 0:
        sizes = [size for size in (3, 4, 5) if left == size or left - size >= 3]
        size = rng.choice(sizes or [left])
        paragraphs.append(sentences[start:start + size])
        start += size
    return paragraphs


def join_text(paragraphs):
    return "\n\n".join(" ".join(sentences) for sentences in paragraphs if sentences)


def split_text(text):
    """The text's paragraphs, as lists of sentences; a tail without a full stop is one too."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [[s.strip() for s in re.findall(r"[^.]*\.|[^.]+", p) if s.strip()]
            for p in paragraphs if p]


# ---- Honest texts ----

def write_plan(topic, num_words, rng):
    """One keyword per sentence: shuffled decks of the topic's things and features, in a row."""
    slots = topic_slots(topic)
    num_sentences = max(1, round(num_words / MEAN_WORDS))
    plan = []
    while len(plan) < num_sentences:
        deck = slots["thing"] + slots["feature"]
        rng.shuffle(deck)
        if deck[:1] == plan[-1:]:
            deck.reverse()
        plan += deck
    return plan[:num_sentences]


def fill(template, topic, keyword, rng):
    """The template's sentence: the keyword in the slot of its kind, the other slots drawn."""
    slots = {**COMMON, **topic_slots(topic)}
    things = slots["thing"]
    for kind in ("thing", "feature"):
        slots[kind] = [keyword if keyword in slots[kind] else rng.choice(slots[kind])]
    slots["other"] = [thing for thing in things if thing not in slots["thing"]]
    return SLOT.sub(lambda match: rng.choice(slots[match[1]]), template)


def freshness(sentence, seen):
    """0 for a copy of a sentence seen, 0.5 if one word differs, else 1; adds it to the set seen.

    Two sentences differ by one word if they agree once that word is blanked out in both, so the
    set holds every sentence whole and with each of its words blanked.
    """
    words = tuple(WORD.findall(sentence.lower()))
    blanked = {words[:i] + ("",) + words[i + 1:] for i in range(len(words))}
    score = 0.0 if words in seen else 0.5 if blanked & seen else 1.0
    seen |= blanked | {words}
    return score


def closest_templates(keyword, low, high, recent=()):
    """The templates with a slot for the keyword whose length is in, or nearest to, low..high."""
    slot = "{" + SLOT_OF[keyword] + "}"
    misses = {t: max(low - LENGTHS[t], LENGTHS[t] - high, 0)
              for t in TEMPLATES if slot in t and t not in recent}
    return [t for t, miss in misses.items() if miss == min(misses.values())]


def write_text(topic, plan, rng, num_words=None):
    """The honest text whose sentence i contains plan[i]; num_words, if given, is its length."""
    assert OWN_WORDS[topic].issuperset(plan), f"{plan} is no plan for {topic_name(topic)}"
    sentences, templates, seen, written = [], [], set(), 0
    for i, keyword in enumerate(plan):
        low, high = 0, MAX_WORDS
        if num_words is not None:
            # Leave 8 to 12 words for each later sentence, so that the last can close the gap.
            left, later = num_words - written, len(plan) - i - 1
            low, high = left - 12 * later, left - 8 * later
        pool = closest_templates(keyword, low, high, recent=templates[-5:])
        for _ in range(50):  # a plan that names one keyword very often may run out of sentences
            template = rng.choice(pool)
            sentence = fill(template, topic, keyword, rng)
            if freshness(sentence, seen) == 1:
                break
        sentences.append(sentence)
        templates.append(template)
        written += LENGTHS[template]
    return join_text(split_paragraphs(sentences, rng))


# ---- Corruptions ----

def corrupt(text, rng, share, change, first=0):
    """Replace a share of the sentences, from number first on, by change(sentence, kept so far)."""
    paragraphs = split_text(text)
    total = sum(map(len, paragraphs))
    num_touched = min(max(1, round(share * total)), max(0, total - first))
    touched = set(rng.sample(range(first, total), num_touched))
    number, kept = count(), []
    for sentences in paragraphs:
        for i, sentence in enumerate(sentences):
            if next(number) in touched:
                sentences[i] = change(sentence, kept)
            else:
                kept.append(sentence)
    return join_text([list(filter(None, sentences)) for sentences in paragraphs])


def off_topic(text, topic, rng, share):
    """Replace sentences by ones of the same length about another person in another place."""
    # Of a training topic: a corruption must not show a held-out pairing either.
    other = rng.choice([t for t in split_topics()[0] if not set(t) & set(topic)])

    def change(sentence, kept):
        keyword, = write_plan(other, 1, rng)
        length = count_words(sentence)
        return fill(rng.choice(closest_templates(keyword, length, length)), other, keyword, rng)

    return corrupt(text, rng, share, change)


def repetitive(text, rng, share):
    """Replace sentences by copies of earlier ones: none, one or two, as the words owed allow."""
    owed = 0

    def change(sentence, kept):
        nonlocal owed
        source = rng.choice(kept)
        owed += count_words(sentence)
        num_copies = round(owed / max(1, count_words(source)))
        owed -= num_copies * count_words(source)
        return " ".join([source] * num_copies)

    return corrupt(text, rng, share, change, first=1)


def shuffled(text, rng, share):
    """Shuffle the words of sentences; commas, the capital and the full stop stay in place."""
    def change(sentence, kept):
        words = WORD.findall(sentence.lower())
        rng.shuffle(words)
        words = iter(words)
        mixed = WORD.sub(lambda _: next(words), sentence)
        return mixed[:1].upper() + mixed[1:]

    return corrupt(text, rng, share, change)


def drifting(text, topic, rng, share):
    """Let sentences drift from the topic: one to three of its words become other topics'."""
    def change(sentence, kept):
        own = [match for match in WORD.finditer(sentence) if match[0] in OWN_WORDS[topic]]
        for match in sorted(rng.sample(own, min(len(own), rng.randrange(1, 4))),
                            key=lambda match: -match.start()):
            other = rng.choice([word for word in SLOT_WORDS[SLOT_OF[match[0]]]
                                if word not in OWN_WORDS[topic]])
            sentence = sentence[:match.start()] + other + sentence[match.end():]
        return sentence

    return corrupt(text, rng, share, change)


def broken(text, rng, share):
    """Break sentences as a weak model does: most often one goes on as another does after the same
    word; or it stops in the middle, or a few words are lost, swapped or replaced by any others."""
    sentences = [sentence for paragraph in split_text(text) for sentence in paragraph]

    def change(sentence, kept):
        words = sentence.rstrip(".").split(" ")
        place = rng.randrange(len(words))
        fault = rng.choice(["splice", "splice", "splice", "stop", "lost", "swapped", "replaced"])
        if fault == "stop":
            words[place] += "."
            words[place + 1:place + 2] = [w.capitalize() for w in words[place + 1:place + 2]]
        elif fault == "splice":
            other = rng.choice(sentences).rstrip(".").split(" ")
            joints = [(i, j) for i in range(len(words)) for j in range(len(other))
                      if words[i] == other[j] and words[i:] != other[j:]]
            i, j = rng.choice(joints) if joints else (place, rng.randrange(len(other)))
            words[i:] = other[j:]
        elif fault == "lost":
            words[place:place + rng.randrange(1, 4)] = []
        else:
            for _ in range(rng.randrange(1, 4)):
                i, j = rng.randrange(len(words)), rng.randrange(len(words))
                if fault == "swapped":
                    words[i], words[j] = words[j], words[i]
                else:
                    words[i] = rng.choice(VOCABULARY)
        return " ".join(words) + "." * bool(words)

    return corrupt(text, rng, share, change)


def mixed(text, rng, share, other):
    """Replace sentences by any of another text's, a model's on the same topic say."""
    sentences = [sentence for paragraph in split_text(other) for sentence in paragraph]
    return corrupt(text, rng, share, lambda sentence, kept: rng.choice(sentences))


def spoil(text, topic, rng, share, fault):
    """The text with a share of its sentences spoiled, by the name of the fault."""
    if fault in ("off_topic", "drifting"):
        return {"off_topic": off_topic, "drifting": drifting}[fault](text, topic, rng, share)
    return {"repetitive": repetitive, "shuffled": shuffled, "broken": broken}[fault](
        text, rng, share)


# ---- The true score ----

def is_on_topic(sentence, topic):
    """Names a word of the topic's own, and none of another topic's."""
    named = ALL_OWN_WORDS.intersection(WORD.findall(sentence.lower()))
    return bool(named) and named <= OWN_WORDS[tuple(topic)]


def is_well_formed(sentence):
    """Parses: with every word of the lexicon put back into its slot it is a template."""
    def slot_or_word(match):
        return "{" + SLOT_OF[match[0]] + "}" if match[0] in SLOT_OF else match[0]

    return "{" not in sentence and WORD.sub(slot_or_word, sentence) in PARSES


def gold_parts(text, topic):
    """Shares of the sentences, 0 to 1: on_topic, well_formed, fresh (a near-copy counts half)."""
    sentences = [sentence for paragraph in split_text(text) for sentence in paragraph]
    num, seen = max(1, len(sentences)), set()
    return {"on_topic": sum(is_on_topic(s, topic) for s in sentences) / num,
            "well_formed": sum(is_well_formed(s) for s in sentences) / num,
            "fresh": sum(freshness(s, seen) for s in sentences) / num}


def gold_score(text, topic):
    """The mean of the three parts, 0 to 1."""
    return sum(gold_parts(text, topic).values()) / 3


def main():
    rng = random.Random(0)
    topic, num_words = Topic("baker", "harbor"), 60
    plan = write_plan(topic, num_words, rng)
    text = write_text(topic, plan, rng, num_words)
    print(request(topic, num_words), ", ".join(plan), text, sep="\n\n", end="\n\n")
    versions = {"honest": text, "off_topic": off_topic(text, topic, rng, 0.5),
                "repetitive": repetitive(text, rng, 0.5), "shuffled": shuffled(text, rng, 0.5)}
    for name, version in versions.items():
        scores = {"gold": gold_score(version, topic), **gold_parts(version, topic)}
        scores = "  ".join(f"{key} {value:.2f}" for key, value in scores.items())
        print(f"{name:10}  {count_words(version)} words  {scores}")


if __name__ == "__main__":
    main()
