"""Does transformers continue a folder's greedy text as sample.py does, token for token?

    python bench/greedy.py model=out/grpo/latest prompts=toy/held_out.jsonl

20 prompts, 200 tokens each, no stops on either side, fp32 on the CPU.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

from model import load_model, load_tokenizer, parse_config, script
from sample import Stops, encode_prompts, generate, load_prompts

CONFIG = dict(model="out/grpo/latest", prompts="toy/held_out.jsonl", count=20, tokens=200)


@script
def main(argv):
    config = parse_config(CONFIG, argv)
    tokenizer, ours = load_tokenizer(config["model"]), load_model(config["model"], "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(config["model"])
    rows = load_prompts(config["prompts"])[:config["count"]]
    prompts = encode_prompts(tokenizer, "think", rows, ours.config["max_position_embeddings"],
                             config["tokens"])
    stops = Stops(tokenizer, [], ours.num_tokens)
    stops.tokens, stops.may_stop = set(), torch.zeros_like(stops.may_stop)
    work = [(place, 0) for place in range(len(prompts))]
    theirs.generation_config.eos_token_id = None  # no stops on their side either
    same = 0
    for completion in generate(ours, prompts, work, stops, config["tokens"], temperature=0):
        prompt = torch.tensor([prompts[completion.prompt]])
        found = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                min_new_tokens=config["tokens"], max_new_tokens=config["tokens"],
                                pad_token_id=0)[0, prompt.shape[1]:].tolist()
        same += found == completion.tokens
    print(f"{same} of {len(prompts)} prompts: the same {config['tokens']} tokens")


if __name__ == "__main__":
    main()
