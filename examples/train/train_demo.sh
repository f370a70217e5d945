#!/bin/sh
# From text to a trained model and out again, offline: about 4 minutes on 2 cores.
# usage: train_demo.sh [FOLDER]     olmo-bridge on the PATH; STEPS=150 for a shorter run
set -eu
out=${1:-train-demo-output}
root=$(cd "$(dirname "$0")/../.." && pwd)
scripts=$root/examples/train
steps=${STEPS:-300}
rm -rf "$out" && mkdir -p "$out"
cd "$out"
echo "All commands are run in the folder $out."

say() { printf '\n== %s\n' "$*"; }
print() {
    printf '$'
    for word in "$@"; do
        case $word in *" "*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    echo
}
show() {
    print "$@"
    "$@"
}

# Two processes take two GPUs, or the CPU.
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" = 1 ]; then
    echo "There is one GPU here and the demo takes two processes: it runs on the CPU, on gloo."
    export CUDA_VISIBLE_DEVICES=
fi

say "Text: a few MB of made-up stories, in three kinds of files, and some that are held out"
show python "$root/recipes/text/make_text.py" text

say "A tokenizer of 1024 tokens, learned from the text"
show python "$root/recipes/text/train_tokenizer.py" tokenizer text/train-1.jsonl text/train-3.txt

say "Data: text becomes token ids, in the format that megatron-core reads; by two processes"
show olmo-bridge prepare-data text/train-1.jsonl text/train-2.jsonl.gz text/train-3.txt data/train \
    --tokenizer tokenizer --workers 2
show olmo-bridge prepare-data text/held-out.jsonl data/held-out --tokenizer tokenizer --workers 2
show olmo-bridge inspect data/train

# The run: a recipe, and what differs from it.
set -- olmo2_tiny "train.steps=$steps" parallel.tp=2 --processes 2 \
    data.path=data/train data.validation=data/held-out checkpoint.save=run

say "What would be trained, and what it takes: a dry run, which costs nothing"
show olmo-bridge train "$@" --dry-run

say "Train a 1M OLMo-2, each layer shared out over 2 processes; halfway it will be asked to stop"
print olmo-bridge train "$@"
olmo-bridge train "$@" &
training=$!
until grep -qs "\"step\": $((steps / 2))," run/log.jsonl; do
    kill -0 $training 2>/dev/null || { wait $training; exit 1; }
    sleep 1
done
echo "$ kill -TERM $training    # as Slurm does before it takes a machine away"
kill -TERM $training
code=0
wait $training || code=$?
echo "It ended with exit code $code. 75 means: stopped as asked, and saved."
[ $code = 75 ]

say "The same command again: it goes on from the step at which it was stopped"
show olmo-bridge train "$@"

say "The report: curves, key figures, config, in one file. It is also written while training"
show olmo-bridge report run

say "Export to Hugging Face: the two processes' parts become one checkpoint"
show olmo-bridge export run hf

say "Is every bit of it what was trained?"
show olmo-bridge verify run hf

say "Does transformers find the same loss on held-out text, and was more learned than word counts?"
show python -W ignore "$scripts/evaluate.py" run hf --below 1.1

say "It tells stories: trained on two processes, run on one"
show olmo-bridge generate run --prompt "Once upon a time, Anna" --temperature 0.7 --max-new-tokens 120

cat <<TEXT

What was shown
- Text became a tokenizer, token ids, a trained model, and a Hugging Face checkpoint.
- megatron-core trained it with tensor parallelism on 2 processes. A run that was stopped went on
  as if nothing had happened.
- transformers computes the loss that the trainer found, and it is far below the unigram entropy.
Look at $out/run/report.html; $out/hf is what AutoModelForCausalLM.from_pretrained loads.
Next: olmo-bridge recipes lists the published sizes; recipes/README.md says how to train them on a
cluster.
TEXT
