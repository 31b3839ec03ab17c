#!/usr/bin/env bash
# GRPO on Qwen2.5-7B, completions of up to 14,000 tokens, one node of 8 GPUs. Written, and not yet
# run on GPUs.
#
# in:  out/prompts/, by runs/prompts.sh; out/reward-7b/latest, by reward.py as
#      runs/reward_model_32b.sh tells
# out: out/grpo-7b/latest and best
#
# WORLD_SIZE=8 python grpo.py plan=true model=Qwen/Qwen2.5-7B reward_model=out/reward-7b/latest \
#     num_prompts=16 num_samples=16 max_tokens=14000 micro_tokens=16384 slots=0 steps=150
# Computed for a reward model of the same size, bytes on each GPU, at this commit; not measured:
#   fp32 weights, two moments, gradient                15,231,233,024
#   sampling weights                                   15,231,233,024
#   reward model                                        1,767,655,680
#   two gathered blocks, one's gradient                 1,864,463,360
#   gathered embedding and head, gradient               4,359,979,008
#   saved block inputs                                  3,288,334,336
#   saved attention outputs                             3,339,714,560
#   one recomputed block                                3,372,220,416
#   a block's gradients on the way                      2,483,027,968
#   logits of a chunk                                     805,306,368
#   cache of 32 slots                                  26,629,636,096
#   room for decoding                                   3,000,000,000
#   its logits, a step's and a graph's                    155,713,536
#   together, training                                 51,743,167,744
#   together, sampling                                 62,015,471,360
# each step
#   parameters                                          7,615,616,512
#   tokens                                                  3,584,000
#   FLOPs                                                    1.82e+17
#   seconds at 40% of an H100's 989 TFLOP/s                      57.6
#   seconds of sampling at 2.4 TB/s, waves: 1                   166.5
#   tokens of the run                                     537,600,000
#   steps for a billion tokens                                    280
# The rates are an H100's: 40% of its peak in training, four fifths of a copy's 3.0 TB/s in
# sampling, every completion at the cap.
set -euo pipefail
cd "$(dirname "$0")/.."
exec torchrun --nproc_per_node 8 --max-restarts 3 --shutdown-timeout 900 \
    grpo.py model=Qwen/Qwen2.5-7B reward_model=out/reward-7b/latest \
    prompts=out/prompts/prompts.jsonl eval_prompts=out/prompts/held_out.jsonl out=out/grpo-7b \
    num_prompts=16 num_samples=16 max_tokens=14000 temperature=0.8 micro_tokens=16384 \
    slots=0 steps=150 lr=1e-6 warmup=5 schedule=constant beta2=0.95 \
    save_every=10 eval_every=25 keep=2
