#!/usr/bin/env bash
# GRPO on Qwen2.5-1.5B, completions of up to 8,000 tokens, one GPU of 80 GB. Written, and not yet
# run on a GPU.
#
# in:  out/prompts/, by runs/prompts.sh; out/reward-1.5b/latest, by reward.py as
#      runs/reward_model_32b.sh tells
# out: out/grpo-1.5b/latest and best
#
# python grpo.py plan=true model=Qwen/Qwen2.5-1.5B reward_model=out/reward-1.5b/latest \
#     num_prompts=8 num_samples=8 max_tokens=8000 micro_tokens=8704 slots=0 steps=150
# Computed for a reward model of the same size, bytes on the GPU, at this commit; not measured:
#   fp32 weights, two moments, gradient                24,699,428,864
#   sampling weights                                    3,087,428,608
#   reward model                                        3,087,431,680
#   two gathered blocks, one's gradient                   374,383,024
#   gathered embedding and head, gradient               1,400,242,176
#   saved block inputs                                    748,683,264
#   saved attention outputs                               760,381,440
#   one recomputed block                                  828,899,328
#   a block's gradients on the way                        623,902,720
#   logits of a chunk                                     805,306,368
#   cache of 64 slots                                  15,619,588,096
#   room for decoding                                   3,000,000,000
#   its logits, a step's and a graph's                    311,164,928
#   together, training                                 36,416,087,472
#   together, sampling                                 49,805,042,176
# each step
#   parameters                                          1,543,714,304
#   tokens                                                    512,000
#   FLOPs                                                     5.8e+15
#   seconds at 40% of an H100's 989 TFLOP/s                      14.7
#   seconds of sampling at 2.4 TB/s, waves: 1                    36.3
#   tokens of the run                                      76,800,000
#   steps for a billion tokens                                  1,954
# The rates are an H100's: 40% of its peak in training, four fifths of a copy's 3.0 TB/s in
# sampling, every completion at the cap.
set -euo pipefail
cd "$(dirname "$0")/.."
python grpo.py model=Qwen/Qwen2.5-1.5B reward_model=out/reward-1.5b/latest \
    prompts=out/prompts/prompts.jsonl eval_prompts=out/prompts/held_out.jsonl out=out/grpo-1.5b \
    num_prompts=8 num_samples=8 max_tokens=8000 temperature=0.8 micro_tokens=8704 \
    slots=0 steps=150 lr=1e-6 warmup=5 schedule=constant beta2=0.95 \
    save_every=10 eval_every=25 keep=2
