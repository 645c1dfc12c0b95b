"""How fast vLLM answers: run by generate_speed.py --how=vllm, with the Python of an environment that has vLLM 0.25.

    <that Python> benchmarks/vllm_speed.py benchmarks/work 256

Reads vllm_prompts.json, a list of [token ids of a prompt, tokens of its answer], and vllm_model/config.json of that
folder; the weights are random, the answers as long as they should be. The last line is {"examples_per_second"}.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
WARM_UP = 300  # prompts


def main(work, rows):
    from vllm import LLM, SamplingParams  # in an environment of its own

    answers = json.loads((Path(work) / "vllm_prompts.json").read_text(encoding="utf-8"))
    model = LLM(
        model=str(Path(work) / "vllm_model"),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enable_prefix_caching=True,
        max_model_len=1024,
        gpu_memory_utilization=0.85,
        max_num_seqs=rows,
        max_num_batched_tokens=16384 if rows > 256 else 8192,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in answers]
    forced = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(max_tokens=count, min_tokens=count, **forced) for _, count in answers]
    model.generate(prompts[:WARM_UP], params[:WARM_UP], use_tqdm=False)
    model.reset_prefix_cache()
    start = time.perf_counter()
    model.generate(prompts, params, use_tqdm=False)
    print(json.dumps({"examples_per_second": round(len(prompts) / (time.perf_counter() - start), 2)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
