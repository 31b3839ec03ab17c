"""The judge client under load and under kill -9: how near to the ideal time, is a call repeated?

    python bench/judge.py                       # a minute
    python bench/judge.py calls=5000 kills=20

A local server of its own process answers each question after `latency` seconds with a score that
is a function of the question. First all questions at once; ideal is calls * latency /
concurrency. Then the same from a process that is killed at random moments and started again:
a question is repeated when the server had answered it, and its answer had time to arrive
(`grace`), before the kill.
"""
import collections
import hashlib
import json
import math
import multiprocessing
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import find_commit, parse_config, script
from reward import Endpoint, Judge
from sample import read_done

CONFIG = dict(
    calls=1110,        # 222 prompts with 5 criteria
    latency=0.05,      # seconds
    concurrency=16,
    rounds=3,          # of the load, the files new each time
    kills=10,
    grace=0.25,        # seconds from the server's answer to the line in the file
    seed=0,
    child="",          # for our own use: the address to ask from this process
    folder="",
)


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint. GET gives [[asked, answered, question], ...] of all calls."""
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one write: two would wait for each other (Nagle)
    latency, answered, lock = 0.0, [], threading.Lock()

    def do_POST(self):
        asked = time.time()
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))[
            "messages"][0]["content"]
        time.sleep(self.latency)
        self.send(completion(answer_to(prompt)))
        with self.lock:
            self.answered.append((asked, time.time(), prompt))

    def do_GET(self):
        self.send(self.answered)

    def send(self, found):
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def answer_to(prompt):
    """A verdict that any of our prompts asks for, a function of the prompt alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    names = re.findall(r'"([A-Z][A-Za-z ]+)": N', prompt.replace("\n", " "))
    found = {name: 1 + digest[n] % 5 for n, name in enumerate(names)}
    if '"winner"' in prompt:
        found["winner"] = ("A", "B", "tie")[digest[0] % 3]
    return json.dumps({"reason": f"It is number {digest[1]}.", "score": 1 + digest[0] % 10} | found)


def completion(text):
    return {"model": "bench-judge-1", "usage": {"prompt_tokens": 100, "completion_tokens": 10},
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


class Quiet(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, *_):  # a client that was killed
        pass


def serve(latency, pipe):
    Server.latency = latency
    server = Quiet(("127.0.0.1", 0), Server)
    pipe.send(server.server_port)
    server.serve_forever()


def start_server(latency):
    """(address, process) of a new server."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(latency, there),
                                                           daemon=True)
    process.start()
    return f"http://127.0.0.1:{here.recv()}/v1", process


def ask_all(url, folder, calls, concurrency):
    judge = Judge(Endpoint(url, "bench", concurrency=concurrency), Path(folder) / "judge.jsonl")
    verdicts = judge.ask([(f"question {n}", {"score": range(1, 11)}) for n in range(calls)])
    right = [json.loads(answer_to(f"question {n}"))["score"] for n in range(calls)]
    return sum(v.values.get("score") == score for v, score in zip(verdicts, right))


def under_load(url, config):
    ideal = config["calls"] * config["latency"] / config["concurrency"]
    ask_all(url, tempfile.mkdtemp(), 16, 16)  # imports, and connections of the server
    print("\n| round | seconds | ideal | ratio | right scores |\n|---|---|---|---|---|")
    for number in range(config["rounds"]):
        start = time.perf_counter()
        right = ask_all(url, tempfile.mkdtemp(), config["calls"], config["concurrency"])
        seconds = time.perf_counter() - start
        print(f"| {number + 1} | {seconds:.2f} | {ideal:.2f} | {seconds / ideal:.2f} | "
              f"{right} of {config['calls']} |", flush=True)


def answers_of(url):
    import urllib.request
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return json.loads(opener.open(url.removesuffix("/v1")).read())


def under_kills(config):
    url, server = start_server(config["latency"])
    folder, rng, ends = tempfile.mkdtemp(), random.Random(config["seed"]), []
    options = [f"child={url}", f"folder={folder}", f"calls={config['calls']}",
               f"concurrency={config['concurrency']}"]
    start = lambda: subprocess.Popen([sys.executable, __file__, *options],
                                     stdout=subprocess.DEVNULL)
    path = Path(folder) / "judge.jsonl"
    for _ in range(config["kills"]):
        process, before = start(), path.stat().st_size if path.exists() else 0
        while process.poll() is None and (path.stat().st_size if path.exists() else 0) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        ends.append(time.time())
        process.wait()
    assert start().wait() == 0
    answered, rows = answers_of(url), read_done(path)
    calls = collections.defaultdict(list)
    for asked, done, question in sorted(answered):
        next_kill = min([end for end in ends if end > asked], default=math.inf)
        calls[question].append(done + config["grace"] < next_kill)
    repeated = sum(any(had_time[:-1]) for had_time in calls.values())
    print(f"\n{config['kills']} kills: {len(answered)} calls for {len(calls)} questions, "
          f"{len(answered) - len(calls)} of them again, {repeated} though the answer had come more "
          f"than {config['grace']} s before a kill; {len(rows)} rows, "
          f"{len({row['key'] for row in rows})} keys")
    before = len(answers_of(url))
    assert start().wait() == 0
    print(f"run again: {len(answers_of(url)) - before} calls")
    server.kill()


@script
def main(argv):
    config = parse_config(CONFIG, argv, dict(calls=16, concurrency=1, rounds=0, kills=0))
    if config["child"]:
        ask_all(config["child"], config["folder"], config["calls"], config["concurrency"])
        return
    print(f"commit {find_commit()}, {config['calls']} calls, {config['latency']} s each, "
          f"concurrency {config['concurrency']}", flush=True)
    url, server = start_server(config["latency"])
    under_load(url, config)
    server.kill()
    under_kills(config)


if __name__ == "__main__":
    main()
