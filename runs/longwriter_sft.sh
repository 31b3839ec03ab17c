#!/usr/bin/env bash
# Supervised fine-tuning as LongWriter's, the baseline that LongWriter-Zero compares with: 4 epochs
# over conversations with long answers, packed to 32k, lr 1e-5 by a cosine, warm-up 3%, weight decay
# 0.1. One node of 8 GPUs. Written, and not yet run on GPUs.
#
# data/longwriter.jsonl: rows {"messages": [{"role", "content"}, ...]}; only what the assistant says
# is trained on. steps = 4 x tokens of the file / (batch_rows x seq_len): 600 fits about 40 million
# tokens; the progress bar of the first start, which tokenises, shows how many there are.
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nproc_per_node 8 --max-restarts 3 --shutdown-timeout 900 \
    pretrain.py model=Qwen/Qwen2.5-7B data=data/longwriter.jsonl out=out/sft-7b \
    seq_len=32768 batch_rows=8 micro_rows=1 steps=600 \
    lr=1e-5 warmup=18 weight_decay=0.1 schedule=cosine save_every=100 eval_every=100
