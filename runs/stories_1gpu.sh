#!/usr/bin/env bash
# From nothing to texts of an asked length on one GPU of 80 GB: a tokenizer and a model of 52M
# parameters, pretrained on pieces of 317 long stories whose prompts state their length and whose
# plans count their parts, then GRPO to 500 to 3,000 words by the length and format rewards alone,
# on six prompts; two are held out. Written, and not yet run on a GPU.
#
#     bash runs/stories_1gpu.sh data=longform.jsonl.gz           # the EQ-Bench longform stories
#     MINI=1 bash runs/stories_1gpu.sh data=longform.jsonl.gz    # 30 to 100 words, on a laptop
#
# out: out/stories/base/latest, out/stories/grpo (curves.png, samples/, latest and best) and
#      out/stories/evaluate/report.html: both models' texts on held-out prompts
#
# Plans (plan=true with the keys below), bytes on the GPU, computed and not measured:
#   pretraining, 51,930,432 parameters: 10,730,510,208 together; 65,536 tokens and 4.27e+13 FLOPs a
#   step, 0.1 seconds at 40% of 989 TFLOP/s; 39,321,600 tokens, twice over the rows, whose pieces
#   overlap: each token of the stories comes some ten times
#   GRPO: 10,834,371,072 training, 11,683,724,416 sampling with 128 slots; 1.1 + 9.9 seconds a step
#   if every completion reached the cap
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/stories} SEED=${SEED:-0}
ROWS=(seed="$SEED") BASE=(seed="$SEED") GRPO=(seed="$SEED") TEXTS=(seed="$SEED")
if [ -n "${MINI:-}" ]; then  # of a key that comes twice, the last counts
    ROWS+=(vocab=2048 hidden=192 layers=4 heads=3 kv_heads=1 seq_len=1024 pieces=40
           words='[30, 100]' part=40)
    BASE+=(seq_len=512 micro_rows=8 steps=250 eval_every=50 lr=3e-3 recompute=)
    GRPO+=(num_samples=8 max_tokens=400 micro_tokens=8192 slots=64 steps=40 eval_every=10 lr=3e-4
           warmup=10 recompute=)
    TEXTS+=(max_tokens=400)
fi
python bench/longform.py out="$OUT/rows" pieces=24 vocab=16384 hidden=576 layers=12 heads=9 \
    kv_heads=3 seq_len=8192 words='[500, 3000]' part=250 "${ROWS[@]}" "$@"
python pretrain.py model="$OUT/rows/start" init=random data="$OUT/rows/train.jsonl" \
    val_data="$OUT/rows/held_out.jsonl" cache="$OUT/tokens" out="$OUT/base" \
    seq_len=8192 batch_rows=8 micro_rows=4 steps=600 lr=1e-3 warmup=30 recompute=none \
    eval_every=50 "${BASE[@]}"
python grpo.py model="$OUT/base/latest" reward_model="" prompts="$OUT/rows/prompts.jsonl" \
    eval_prompts="$OUT/rows/held_out_prompts.jsonl" out="$OUT/grpo" \
    num_prompts=8 num_samples=16 max_tokens=6000 micro_tokens=32768 slots=0 steps=150 \
    lr=5e-5 warmup=20 recompute=none save_every=25 eval_every=25 "${GRPO[@]}"
python evaluate.py model="{\"base\": \"$OUT/base/latest\", \"GRPO\": \"$OUT/grpo/latest\"}" \
    data="$OUT/rows/held_out_prompts.jsonl" out="$OUT/evaluate" max_tokens=6000 "${TEXTS[@]}"
