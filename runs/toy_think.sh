#!/usr/bin/env bash
# Thinking against writing at once, on requests where a plan should help: to cover two to four listed
# points in order, each in as many sentences as the others. One base model that has seen such texts
# with a plan and without, equally often and equally bad; a reward model that reads the outline; three
# seeds. The paper's ablation of thinking, on the embedded toy.
set -euo pipefail
cd "$(dirname "$0")/.."
ROWS=out/toy-rows OUT=out/toy-think
python toy/rows.py out="$ROWS"
python pretrain.py model=toy/policy data="$ROWS/outline/text.jsonl" cache=out/tokens out="$OUT/base" \
    steps=300 batch_rows=16 micro_rows=16 lr=1e-3 warmup=20 beta2=0.99 weight_decay=0.01
python reward.py model=toy/reward pairs="$ROWS/outline/pairs.jsonl" \
    val_pairs="$ROWS/outline/held_out_pairs.jsonl" out="$OUT/reward" \
    steps=300 batch_pairs=48 lr=1e-3 beta2=0.99 weight_decay=0.01
python bench/arms.py picture=out/toy_think.png prompts="$ROWS/outline/held_out.jsonl" \
    title="The toy: a plan before the text, and none" \
    options="[\"eval_every=15\", \"model=$OUT/base/latest\", \"reward_model=$OUT/reward/latest\",
              \"prompts=$ROWS/outline/prompts.jsonl\"]" \
    arms='{"think": ["template=think"], "direct": ["template=direct"]}' "$@"
