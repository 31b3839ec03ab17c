#!/usr/bin/env bash
# The writing reward model, by Bradley-Terry on pairs of whole texts: 64 pairs a step of up to 16k
# tokens a text. 8 nodes of 8 GPUs: run this on each node, with HEAD the name of the first. Written,
# and not yet run on GPUs. The paper's is a Qwen2.5-72B; the data, rate and length of its training
# are unknown: 1,000 steps at 2e-6 are our choice.
#
# in:  data/pairs.jsonl, data/held_out_pairs.jsonl: rows {"prompt", "chosen", "rejected"}
# out: out/reward-32b/latest. For 7B on one node: torchrun --nproc_per_node 8 reward.py
#      model=Qwen/Qwen2.5-7B out=out/reward-7b and the keys below; for 1.5B on one GPU: python
#
# WORLD_SIZE=64 python reward.py plan=true model=Qwen/Qwen2.5-32B batch_pairs=64 max_len=16384 \
#     micro_tokens=32768 steps=1000 recompute=all     (computed, at this commit; not measured)
#   fp32 weights, two moments, gradient                 7,996,328,448 bytes on each GPU
#   two gathered blocks, one's gradient                 3,900,843,264
#   gathered embedding and head, gradient               4,671,406,080
#   saved block inputs                                 21,474,836,480
#   one recomputed block                                9,865,003,008
#   a block's gradients on the way                      7,247,757,312
#   together                                           55,156,174,592
#   tokens a step 2,097,152; FLOPs 4.6e+17; 18.2 seconds at 40% of 989 TFLOP/s
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a restart meets at a store of its own
torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint "$HEAD:29500" \
    --rdzv_id "${RUN_ID:-reward}" --max-restarts 3 --shutdown-timeout 900 \
    reward.py model=Qwen/Qwen2.5-32B pairs=data/pairs.jsonl val_pairs=data/held_out_pairs.jsonl \
    out=out/reward-32b batch_pairs=64 max_len=16384 micro_tokens=32768 steps=1000 recompute=all \
    lr=2e-6 warmup=30 schedule=cosine save_every=100 eval_every=100 keep=2
