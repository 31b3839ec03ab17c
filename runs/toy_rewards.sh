#!/usr/bin/env bash
# Which reward is gamed when it is alone, and what holds together: the paper's ablation of rewards,
# on the embedded toy. The gold score beside the proxies is computed from the toy's grammar, and no
# run is trained on it. Four one-thread processes at a time; three seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
python bench/arms.py picture=out/toy_rewards.png \
    title="The toy: each reward alone, two, and three averaged or summed" \
    caption="In the paper: the ablation of reward design; the three advantages are averaged" \
    arms='{"length": ["weights={\"length\": 1}"], "format": ["weights={\"format\": 1}"],
           "writing": ["weights={\"writing\": 1}"],
           "length and format": ["weights={\"length\": 1, \"format\": 1}"],
           "all, averaged": [], "all, summed": ["combine=rewards"]}' "$@"
