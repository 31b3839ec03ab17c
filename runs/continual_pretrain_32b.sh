#!/usr/bin/env bash
# Continual pretraining as LongWriter-Zero's: Qwen2.5-32B on 30 billion tokens of books, reports and
# papers with 1% of long chains of thought, 512 rows of 32k a step. 8 nodes of 8 GPUs: run this on
# each node, with HEAD the name of the first. Written, and not yet run on GPUs.
#
# The paper names neither learning rate nor schedule: 1e-5 to a tenth by a cosine is our choice.
# --max-restarts starts a crashed run again from its last checkpoint; --shutdown-timeout leaves the
# other ranks the time to end (a step and a save) when one is told to stop. The torchrun of torch
# 2.11 does not know the second: leave it out there, here and in the other recipes.
#
# in:  data/books/*.jsonl, rows {"text"}; data/thoughts/*.jsonl, rows {"prompt", "plan", "text"};
#      data/held_out.jsonl, rows {"text"} of the same kind
# out: out/continual-32b/latest
#
# WORLD_SIZE=64 python pretrain.py plan=true model=Qwen/Qwen2.5-32B seq_len=32768 batch_rows=512 \
#     micro_rows=1 steps=1790 recompute=all     (computed, at this commit; not measured)
#   fp32 weights, two moments, gradient                 8,190,969,088 bytes on each GPU
#   two gathered blocks, one's gradient                 3,900,842,624
#   gathered embedding and head, gradient               6,228,541,440
#   saved block inputs                                 21,474,836,480
#   one recomputed block                                9,865,003,008
#   a block's gradients on the way                      7,247,757,312
#   logits of a chunk                                     805,306,368
#   together                                           57,713,256,320
#   tokens a step 16,777,216; FLOPs 4.3e+18; 169.9 seconds at 40% of 989 TFLOP/s: 3.5 days
# To keep attention's outputs as well (the default) would take 21,810,380,800 more: too tight.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a restart meets at a store of its own
torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint "$HEAD:29500" \
    --rdzv_id "${RUN_ID:-continual}" --max-restarts 3 --shutdown-timeout 900 \
    pretrain.py model=Qwen/Qwen2.5-32B \
    data='{"data/books/*.jsonl": 0.99, "data/thoughts/*.jsonl": 0.01}' \
    val_data=data/held_out.jsonl cache=out/tokens out=out/continual-32b \
    seq_len=32768 batch_rows=512 micro_rows=1 steps=1790 recompute=all \
    lr=1e-5 warmup=50 schedule=cosine save_every=50 eval_every=50 keep=2
