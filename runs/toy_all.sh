#!/usr/bin/env bash
# The whole chain on the embedded toy: chats -> prompts -> continual pretraining -> reward model ->
# GRPO -> evaluation, each step reading what the one before wrote. The same scripts with a real
# model= and real data are the paper's. Five minutes on two cores; one with STEPS=2, to see it work.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/toy-all} STEPS=${STEPS:-100}
python runs/annotate.py data=toy/prompts.jsonl out="$OUT/prompts" min_words=10 held_out=40
python pretrain.py model=toy/policy data=toy/text.jsonl.gz out="$OUT/pretrain" cache="$OUT/tokens" \
    steps="$STEPS" batch_rows=8 seq_len=1024 lr=3e-4 warmup=1
python reward.py model="$OUT/pretrain/latest" pairs=toy/pairs.jsonl.gz \
    val_pairs=toy/held_out_pairs.jsonl.gz out="$OUT/reward" steps="$STEPS" eval_every="$STEPS"
python grpo.py model="$OUT/pretrain/latest" reward_model="$OUT/reward/latest" \
    prompts="$OUT/prompts/prompts.jsonl" eval_prompts="$OUT/prompts/held_out.jsonl" \
    out="$OUT/grpo" steps="$STEPS" eval_every="$STEPS"
python evaluate.py model="{\"before\": \"toy/policy\", \"after\": \"$OUT/grpo/latest\"}" \
    data="$OUT/prompts/held_out.jsonl" out="$OUT/evaluate"
