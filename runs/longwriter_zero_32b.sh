#!/usr/bin/env bash
# LongWriter-Zero's reinforcement learning: Qwen2.5-32B after continual pretraining, 32 prompts x
# 32 completions a step of up to 14,000 tokens, 150 steps. 8 nodes of 8 GPUs: run this on each node
# with HEAD the name of the first; under Slurm, sbatch runs/longwriter_zero_32b.slurm. Written, and
# not yet run on GPUs.
#
# The paper names neither learning rate nor how many prompts a step has: 1e-6, held, and 32 are our
# choices. Its temperature is 0.8, without top-p. slots=0 sizes the cache by the memory that the
# rest leaves; a node's 8 GPUs share a copy of the sampling weights (sample_tp).
#
# in:  out/prompts/, out/continual-32b/latest and out/reward-32b/latest, by runs/prompts.sh,
#      runs/continual_pretrain_32b.sh and runs/reward_model_32b.sh
# out: out/longwriter-zero-32b/latest and best
#
# WORLD_SIZE=64 python grpo.py plan=true model=Qwen/Qwen2.5-32B reward_model=out/reward-32b/latest \
#     num_prompts=32 num_samples=32 max_tokens=14000 micro_tokens=16384 slots=0 sample_tp=8 \
#     steps=150
# Computed for a reward model of the same size, bytes on each GPU, at this commit; not measured:
#   fp32 weights, two moments, gradient                 8,190,969,088
#   sampling weights                                    8,190,969,088
#   reward model                                          999,541,056
#   two gathered blocks, one's gradient                 3,900,842,624
#   gathered embedding and head, gradient               6,228,541,440
#   saved block inputs                                 10,737,418,240
#   saved attention outputs                            10,905,190,400
#   one recomputed block                                4,932,501,504
#   a block's gradients on the way                      3,623,878,656
#   logits of a chunk                                     805,306,368
#   cache of 107 slots                                 50,881,626,112
#   room for decoding                                   3,000,000,000
#   its logits, a step's and a graph's                    520,667,136
#   together, training                                 58,515,158,464
#   together, sampling                                 71,783,772,480
# each step
#   parameters                                         32,763,876,352
#   tokens                                                 14,336,000
#   FLOPs                                                    3.15e+18
#   seconds at 40% of an H100's 989 TFLOP/s                     124.3
#   seconds of sampling at 2.4 TB/s, waves: 2                   392.4
#   tokens of the run                                   2,150,400,000
#   steps for a billion tokens                                     70
# The rates are an H100's: 40% of its peak in training, four fifths of a copy's 3.0 TB/s in
# sampling, every completion at the cap. Scoring and bringing the weights come on top.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a restart meets at a store of its own
exec torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint "$HEAD:29500" \
    --rdzv_id "${RUN_ID:-longwriter-zero}" --max-restarts 3 --shutdown-timeout 900 \
    grpo.py model=out/continual-32b/latest reward_model=out/reward-32b/latest \
    prompts=out/prompts/prompts.jsonl eval_prompts=out/prompts/held_out.jsonl \
    out=out/longwriter-zero-32b \
    num_prompts=32 num_samples=32 max_tokens=14000 temperature=0.8 micro_tokens=16384 \
    slots=0 sample_tp=8 steps=150 lr=1e-6 warmup=5 schedule=constant beta2=0.95 \
    save_every=10 eval_every=25 keep=2
