"""evaluate.py from end to end on the benchmarks' rows, with texts that cost nothing to make.

    python bench/benchmarks.py data=FOLDER     # a minute; FOLDER holds the three files below

data: writingbench_v2_length.jsonl with its _C file, longbench_write_en.jsonl, longform.jsonl.gz.
Three "models" answer: stories of the better and of the worse half of longform.jsonl.gz, cut to
whole paragraphs of about the words asked, and requests of the toy's prompts. The judge is
bench/judge.py's: its scores are noise, so all models should be equal to it. Prints what each run
took and leaves report.html and results.json under out.
"""
import json
import random
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import evaluate
import judge
from model import find_commit, parse_config, script
from sample import count_words, load_rows

CONFIG = dict(
    data=".",
    out="out/bench_evaluate",
    limit=0,              # prompts of each benchmark
    prompts=40,           # of Arena-Write, whose rows are made here: longform prompts and stories
)


def cut(text, words):
    """Whole paragraphs until there are as many words."""
    kept, count = [], 0
    for paragraph in text.split("\n\n"):
        if count >= words:
            break
        kept.append(paragraph)
        count += count_words(paragraph)
    return "\n\n".join(kept)


def write_responses(folder, items, stories, rng):
    """{name: file} of three models' responses to items, near the length asked."""
    sentences = [json.loads(line)["prompt"] for line in open(HERE.parent / "toy/prompts.jsonl")]
    stories = sorted(stories, key=lambda row: row["score"])
    half = len(stories) // 2
    make = {"better": lambda n: cut(rng.choice(stories[half:])["text"], n),
            "worse": lambda n: cut(rng.choice(stories[:half])["text"], n),
            "toy": lambda n: " ".join(rng.choice(sentences) for _ in range(1 + n // 11))}
    files = {}
    for name, write in make.items():
        rows = [{"index": item.id, "response": write(sum(item.length or [1500, 1500]) // 2)}
                for item in items]
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def write_arena(path, stories, num):
    """Rows as Arena-Write has them; the baselines are stories to the same prompt."""
    prompts = sorted({row["prompt"] for row in stories})
    rows = []
    for n in range(num):
        some = [row["text"] for row in stories if row["prompt"] == prompts[n % len(prompts)]]
        rows.append({"idx": n, "question": prompts[n % len(prompts)], "type": "story",
                     "length": 2000, "baseline_response": {
                         f"base-{k}": some[(n + k) % len(some)] for k in range(6)}})
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(limit=0, prompts=1))
    data, out, rng = Path(config["data"]), Path(config["out"]), random.Random(0)
    out.mkdir(parents=True, exist_ok=True)
    stories = load_rows(data / "longform.jsonl.gz", lambda row, number: row)
    url, server = judge.start_server(0.0)
    print(f"commit {find_commit()}")
    for bench, path in (("writingbench", data / "writingbench_v2_length.jsonl"),
                        ("longbench_write", data / "longbench_write_en.jsonl"),
                        ("arena_write", write_arena(out / "arena.jsonl", stories,
                                                    config["prompts"]))):
        folder = out / bench
        folder.mkdir(exist_ok=True)
        items = evaluate.load_items(bench, path, {}, config["limit"])
        files = write_responses(folder, items, stories, rng)
        start = time.perf_counter()
        evaluate.main([f"bench={bench}", f"data={path}", "responses=" + json.dumps(files),
                       f"judge={url}", "judge_model=bench", f"out={folder / 'run'}",
                       f"limit={config['limit']}"])
        size = (folder / "run" / "report.html").stat().st_size
        print(f"{bench}: {time.perf_counter() - start:.1f} s, report.html {size / 1e6:.1f} MB",
              flush=True)
    server.kill()


if __name__ == "__main__":
    main()
