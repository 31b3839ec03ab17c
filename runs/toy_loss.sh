#!/usr/bin/env bash
# Over what the loss is averaged: a prompt's tokens (the default), all tokens, or each sequence's.
# The paper does not say. On the embedded toy, four one-thread processes at a time; three seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
python bench/arms.py picture=out/toy_loss.png \
    title="The toy: the loss averaged over a prompt's tokens, all tokens, or each sequence's" \
    caption="The paper does not say over what it averages" \
    arms='{"prompt": [], "token": ["loss_mean=token"], "sequence": ["loss_mean=sequence"]}' "$@"
