#!/usr/bin/env bash
# Fine-tuning on the grammar's own texts against reinforcement learning, from the base and from the
# base after continual pretraining: the paper's comparison, on the embedded toy, pairwise by the
# gold score; and fine-tuning on texts with faults, since no real teacher is the judge's own source.
# Fine-tuning sees as many texts as GRPO: four epochs of 960, 60 steps of 64. Three seeds; GRPO's
# runs are those of runs/toy_pretrain.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
bash runs/toy_pretrain.sh "$@"
KEYS="cache=out/tokens steps=120 batch_rows=8 seq_len=1024 lr=3e-4"
tune() {
    OMP_NUM_THREADS=1 python pretrain.py model=$1 data=out/toy-rows/$2.jsonl \
        out=out/toy-sft/$3-$seed seed=$seed $KEYS
}
for seed in 0 1 2; do
    tune toy/policy sft base & base=$!
    tune toy/policy flawed flawed & flawed=$!
    tune out/toy-pretrain/latest sft continued & continued=$!
    wait $base; wait $flawed; wait $continued
done
python bench/pairwise.py picture=out/toy_sft.png \
    title="The toy: fine-tuning and reinforcement learning, pairwise" \
    caption="In the paper, Arena-Write Elo: SFT 964, RL 1221; after continual pretraining 971, 1447" \
    models='{"SFT": "out/toy-sft/base-{seed}/latest", "RL": "out/arms/default-{seed}/latest",
             "SFT, flawed texts": "out/toy-sft/flawed-{seed}/latest",
             "continued, SFT": "out/toy-sft/continued-{seed}/latest",
             "continued, RL": "out/arms/model-out-toy-pretrain-latest-{seed}/latest"}'
