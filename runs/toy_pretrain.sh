#!/usr/bin/env bash
# Reinforcement learning from the base, and from the base after continual pretraining on longer
# texts with 1% plans: the paper's ablation of continual pretraining, on the embedded toy. Three
# seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
ROWS=out/toy-rows
python toy/rows.py out="$ROWS"
python pretrain.py model=toy/policy out=out/toy-pretrain cache=out/tokens \
    data="{\"$ROWS/long.jsonl\": 0.99, \"$ROWS/thoughts.jsonl\": 0.01}" \
    steps=100 batch_rows=8 seq_len=1024 lr=1e-4
python bench/arms.py picture=out/toy_pretrain.png \
    title="The toy: GRPO from the base, and from the base after continual pretraining" \
    caption="In the paper: Arena-Write Elo 1221 from the base, 1447 after continual pretraining" \
    arms='{"base": [], "continued": ["model=out/toy-pretrain/latest"]}' "$@"
