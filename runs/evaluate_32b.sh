#!/usr/bin/env bash
# The trained model on the three benchmarks, one node of 8 GPUs that share its weights. JUDGE is an
# OpenAI-compatible endpoint that serves JUDGE_MODEL; sampling is WritingBench's. With dry_run=true
# it only tells how many calls and tokens. Written, and not yet run on GPUs.
#
# in:  out/longwriter-zero-32b/best; data/writingbench.jsonl with its subset of length and the _C
#      file beside it, data/arena_write.jsonl, data/longbench_write.jsonl
# out: out/evaluate/*/results.json, report.html
set -euo pipefail
cd "$(dirname "$0")/.."
evaluate() {
    torchrun --nproc_per_node 8 evaluate.py model='{"ours": "out/longwriter-zero-32b/best"}' \
        sample_tp=8 max_tokens=16000 temperature=0.7 top_p=0.8 top_k=20 \
        judge="$JUDGE" judge_model="$JUDGE_MODEL" "$@"
}
evaluate bench=writingbench data=data/writingbench.jsonl out=out/evaluate/writingbench \
    subsets='{"R3": "data/writingbench_length.jsonl"}' "$@"
evaluate bench=arena_write data=data/arena_write.jsonl out=out/evaluate/arena_write "$@"
evaluate bench=longbench_write data=data/longbench_write.jsonl out=out/evaluate/longbench_write "$@"
