#!/usr/bin/env bash
# Thinking against writing at once, the paper's ablation, on the embedded toy. The requests list
# two or three topics, to be covered in their order with as much room for each: a plan should help.
# The base has seen such texts with a plan and without, equally often and equally bad; the reward
# model reads which topic is due. Three seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
ROWS=out/toy-rows OUT=out/toy-think
KEYS="cache=out/tokens beta2=0.99 weight_decay=0.01 batch_rows=16 micro_rows=16"
python toy/rows.py out="$ROWS"
export OMP_NUM_THREADS=2
python reward.py model=toy/reward pairs="$ROWS/outline/pairs.jsonl" out="$OUT/reward" \
    val_pairs="$ROWS/outline/held_out_pairs.jsonl" steps=200 lr=1e-3 beta2=0.99 weight_decay=0.01 &
reward=$!
python pretrain.py model=toy/policy data="$ROWS/outline/clean.jsonl" out="$OUT/clean" \
    steps=800 lr=2e-3 warmup=20 $KEYS
python pretrain.py model="$OUT/clean/latest" data="$ROWS/outline/mixed.jsonl" out="$OUT/base" \
    steps=50 lr=5e-4 $KEYS
wait $reward
python bench/arms.py picture=out/toy_think.png prompts="$ROWS/outline/held_out.jsonl" \
    title="The toy: a plan before the text, and none" \
    caption="In the paper: Arena-Write Elo 1221 with thinking, 668 without, both from the base" \
    options="[\"eval_every=15\", \"model=$OUT/base/latest\", \"reward_model=$OUT/reward/latest\",
              \"prompts=$ROWS/outline/prompts.jsonl\"]" \
    arms='{"think": ["template=think"], "direct": ["template=direct"]}' "$@"
