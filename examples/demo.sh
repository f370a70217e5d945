#!/bin/sh
# Converts two models that it makes itself, both ways, and proves that nothing was lost. Offline.
# usage: demo.sh [FOLDER]     needs about 10 GB of disk for the 1B model; olmo-bridge on the PATH
set -eu
work=${1:-demo-output}
here=$(cd "$(dirname "$0")" && pwd)
rm -rf "$work" && mkdir -p "$work"
work=$(cd "$work" && pwd) && cd "$work"
trap 'rm -rf "$work"/olmo2-1b*' EXIT

show() {
    printf '\n$ %s\n' "$*"
    "$@"
}

# Two processes take two GPUs, or the CPU.
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" = 1 ]; then
    echo "There is one GPU here and the demo takes two processes: it runs on the CPU, on gloo."
    export CUDA_VISIBLE_DEVICES=
fi

models="olmo2-tiny"
if [ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -gt 10000000 ]; then
    models="$models olmo2-1b"
else
    echo "Less than 10 GB of disk are free here: the 1B model is left out."
fi
for model in $models; do
    printf '\n== %s: a Hugging Face checkpoint with random weights in the published shape\n' "$model"
    show olmo-bridge synth "$model" "$model"
    printf '\n== To Megatron, without a GPU, without loading the model\n'
    show olmo-bridge import "$model" "$model-megatron"
    show olmo-bridge inspect "$model-megatron"
    printf '\n== Is every bit where it belongs?\n'
    show olmo-bridge verify "$model" "$model-megatron"
    printf '\n== And back\n'
    show olmo-bridge export "$model-megatron" "$model-back"
    show olmo-bridge verify "$model" "$model-back"
    printf '\n== Does transformers compute the same with what came back?\n'
    show python "$here/same_logits.py" "$model" "$model-back"
done

printf '\n== Live: does megatron-core, on two processes, compute what transformers computes?\n'
show olmo-bridge compare olmo2-tiny olmo2-tiny-megatron --tp 2 --sp

cat <<TEXT

What was shown
- A Hugging Face checkpoint of OLMo-2 became a Megatron checkpoint and a Hugging Face checkpoint
  again, at about the speed of copying files, on this machine's CPU.
- Every tensor of source and result is the same, bit for bit, and so is the config.
- transformers loads the result without a missing or an unexpected tensor, and computes the same
  logits, bit for bit.
- megatron-core, with the model split over two processes, computes the same up to rounding.
Next: olmo-bridge import allenai/OLMo-2-0425-1B my-megatron-checkpoint
TEXT
