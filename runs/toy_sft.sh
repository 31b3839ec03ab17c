#!/usr/bin/env bash
# Fine-tuning on the grammar's own texts against reinforcement learning, from the base and from the
# base after continual pretraining: the paper's comparison, on the embedded toy, pairwise by the gold
# score. Fine-tuning sees as many texts as GRPO does (four epochs of 960 against 60 steps of 64).
set -euo pipefail
cd "$(dirname "$0")/.."
bash runs/toy_pretrain.sh "$@"
for seed in 0 1 2; do
    for base in toy/policy out/toy-pretrain/latest; do
        name=${base%/latest}
        OMP_NUM_THREADS=1 python pretrain.py model=$base data=out/toy-rows/sft.jsonl cache=out/tokens \
            out=out/toy-sft/${name##*/}-$seed seed=$seed steps=120 batch_rows=8 seq_len=1024 lr=3e-4
    done
done
python bench/pairwise.py picture=out/toy_sft.png \
    title="The toy: fine-tuning and reinforcement learning, pairwise" \
    models='{"SFT": "out/toy-sft/policy-{seed}/latest", "RL": "out/arms/default-{seed}/latest",
             "continued, SFT": "out/toy-sft/toy-pretrain-{seed}/latest",
             "continued, RL": "out/arms/model-out-toy-pretrain-latest-{seed}/latest"}'
