#!/usr/bin/env bash
# Chats into the prompts that reinforcement learning asks: English requests of WildChat-1M, Chinese
# ones of LMSYS-Chat-1M, as the paper's. JUDGE is an OpenAI-compatible endpoint that serves
# JUDGE_MODEL (the paper's QwQ-32B: `vllm serve Qwen/QwQ-32B`, say); without one, only requests that
# state a length are kept. Run on 10,000 synthetic rows, and not yet on the real files.
#
# in:  data/wildchat/*.parquet, data/lmsys/*.parquet (pip install pyarrow), data/writingbench.jsonl,
#      data/longbench_write.jsonl and data/arena_write.jsonl, whose prompts must not be trained on
# out: out/prompts/prompts.jsonl, out/prompts/held_out.jsonl, out/prompts/summary.json
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/annotate.py data='["data/wildchat/*.parquet", "data/lmsys/*.parquet"]' \
    benchmarks='["data/writingbench.jsonl", "data/longbench_write.jsonl",
                 "data/arena_write.jsonl"]' \
    judge="${JUDGE:-}" judge_model="${JUDGE_MODEL:-}" held_out=64 out=out/prompts
