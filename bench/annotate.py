"""runs/annotate.py on 10,000 made-up chats: how fast, what it finds, and what kill -9 repeats.

    pip install pyarrow
    python bench/annotate.py data=writingbench_v2_length.jsonl       # two minutes

The chats are shaped as WildChat-1M's rows, in Parquet: most ask for a text of a stated length on a
subject that no other has; planted are near copies (every 60th character another), requests that
quote 30 words of a prompt of `data`, and other languages. Then the length that annotate.py reads in
the rows of `data` against the marks of annotate_marks.json, made by hand before there was a parser.
Last, a tenth of the chats with a judge that fails at times, killed at random moments.
"""
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "runs"), str(HERE)]

import judge as judging
from annotate import find_length
from model import InputError, find_commit, parse_config, script
from sample import load_rows, read_done

CONFIG = dict(
    data="",         # WritingBench's length subset
    rows=10_000,
    copies=500,      # planted near copies
    quotes=200,      # planted overlaps with data
    foreign=300,     # planted chats in other languages
    kills=5,
    seed=0,
)
WORDS = (
    "amber bridge copper dawn engine forest garden harbor island journal kettle lantern market "
    "needle orchard paper quarry river signal tunnel umbrella valley window yarn zephyr anchor "
    "barrel canvas desert ember feather glacier hammer ink jacket kite ladder mirror").split()
SIGNS = "山水花鸟风月城桥灯船书画茶酒琴棋雪雨春秋夏冬星海路门窗树石田"


def make_prompt(rng, number):
    """A request for a text of a stated length, English or Chinese."""
    count = rng.randrange(5, 40) * 100
    if rng.random() < 0.3:
        subject = "".join(rng.choices(SIGNS, k=24))
        return f"请写一篇关于{subject}的文章，编号{number}，字数{count}字左右，要求语言优美。"
    subject = " ".join(rng.choices(WORDS, k=14))
    return (f"Please write a story number {number} about the {subject}. It should be around "
            f"{count} words, with a clear beginning and end.")


def nearly(rng, prompt):
    letters = list(prompt)
    for place in range(rng.randrange(40), len(letters), 60):
        letters[place] = rng.choice("xyz")
    return "".join(letters)


def make_prompts(config, benchmark):
    """Prompts, with what is planted after those that it copies."""
    rng = random.Random(config["seed"])
    plain = config["rows"] - config["copies"] - config["quotes"] - config["foreign"]
    prompts = [make_prompt(rng, number) for number in range(plain)]
    copies = [nearly(rng, rng.choice(prompts)) for _ in range(config["copies"])]
    quotes = []
    while len(quotes) < config["quotes"]:
        words = rng.choice(benchmark).split()
        if len(words) > 60:
            start = rng.randrange(len(words) - 30)
            quotes.append("Write 800 words about this: " + " ".join(words[start:start + 30]))
    foreign = [" ".join(rng.choices("это была поздняя осень город море".split(), k=30))
               for _ in range(config["foreign"])]
    planted = copies + quotes + foreign
    return prompts + rng.sample(planted, len(planted))


def write_chats(path, prompts):
    """As WildChat-1M's rows, in Parquet."""
    import pyarrow
    from pyarrow import parquet
    chats = [{"conversation_hash": hashlib.md5(prompt.encode() + bytes([n % 256])).hexdigest(),
              "model": "some-model", "turn": 1, "language": "unknown", "conversation": [
                  {"role": "user", "content": prompt},
                  {"role": "assistant", "content": "Here it is."}]}
             for n, prompt in enumerate(prompts)]
    parquet.write_table(pyarrow.Table.from_pylist(chats), path)


class FaultyServer(judging.Server):
    """A judge of requests that fails at times, by a hash of the question and how often it came."""
    latency, seen = 0.02, {}

    def do_POST(self):
        asked = time.time()
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))[
            "messages"][0]["content"]
        with self.lock:
            self.seen[question] = number = self.seen.get(question, 0) + 1
        time.sleep(self.latency)
        digest = hashlib.sha256(question.encode()).digest()
        lo = 100 * (5 + digest[1] % 20)
        said = json.dumps({"reason": "so", "is_writing": "yes" if digest[2] % 4 else "no",
                           "lo": lo, "hi": lo + 500})
        if digest[0] % 10 == 0 or digest[0] % 10 == 1 and number == 1:
            said = "I would rather not say."  # a tenth never, a tenth not at first
        if digest[0] % 10 == 2 and number == 1:
            return self.send_error(500)
        self.send(judging.completion(said))
        with self.lock:
            self.answered.append((asked, time.time(), question))


def serve_faulty(latency, pipe):
    server = judging.Quiet(("127.0.0.1", 0), FaultyServer)
    pipe.send(server.server_port)
    server.serve_forever()


def annotate(out, *keys):
    return subprocess.Popen([sys.executable, str(HERE.parent / "runs/annotate.py"), f"out={out}",
                             *keys], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def under_kills(chats, out, kills, seed):
    judging.serve = serve_faulty
    url, server = judging.start_server(0)
    rng, keys = random.Random(seed), [f"data={chats}", f"judge={url}", "judge_model=bench"]
    for _ in range(kills):
        process = annotate(out, *keys)
        time.sleep(rng.uniform(4, 7))
        process.kill()
        process.wait()
    assert annotate(out, *keys).wait() == 0
    before = len(judging.answers_of(url))
    rows = read_done(out / "judge.jsonl")
    summary = json.loads((out / "summary.json").read_text())
    assert annotate(out, *keys).wait() == 0
    again = len(judging.answers_of(url)) - before
    server.kill()
    lost = summary["rows"] - summary["kept"] - sum(summary["dropped"].values())
    print(f"\nfaulty judge, {kills} kills: {before} answers, {len(rows)} in the file, "
          f"{len(rows) - len({row['key'] for row in rows if 'error' not in row})} of them twice or "
          f"failed; {summary['kept']} kept, {lost} rows lost; run again: {again} calls")
    print(json.dumps(summary["dropped"], indent=2))


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(rows=1000, kills=0))
    if not config["data"]:
        raise InputError("data: expected WritingBench's length subset, found none")
    benchmark = load_rows(config["data"], lambda row, number: row)
    folder = Path(tempfile.mkdtemp())
    prompts = make_prompts(config, [row["query"] for row in benchmark])
    write_chats(folder / "chats.parquet", prompts)
    start = time.perf_counter()
    keys = [f"data={folder / 'chats.parquet'}", f"benchmarks={json.dumps([config['data']])}"]
    assert annotate(folder / "out", *keys).wait() == 0
    seconds = time.perf_counter() - start
    summary = json.loads((folder / "out" / "summary.json").read_text())
    print(f"commit {find_commit()}: {summary['rows']} chats in {seconds:.1f} s\n\n"
          "| planted | | dropped |\n|---|---|---|")
    for kind, reason in (("copies", "near copy of another prompt"),
                         ("quotes", "shares 13 words with a benchmark"),
                         ("foreign", "neither English nor Chinese")):
        print(f"| {kind} | {config[kind]} | {summary['dropped'].get(reason, 0)} |")
    marks = json.loads((HERE / "annotate_marks.json").read_text())
    found = [(find_length(row["query"]), marks[str(row["index"])]) for row in benchmark
             if str(row["index"]) in marks]
    for name, is_kind in (("state a length", lambda mark: mark is not None),
                          ("state none", lambda mark: mark is None)):
        pairs = [pair for pair in found if is_kind(pair[1])]
        print(f"\nof {len(pairs)} marked rows that {name}, "
              f"{sum(read == mark for read, mark in pairs)} are read as marked")
    write_chats(folder / "few.parquet", prompts[::max(1, len(prompts) // 1000)])
    if config["kills"]:
        under_kills(folder / "few.parquet", folder / "judged", config["kills"], config["seed"])


if __name__ == "__main__":
    main()
