#!/bin/bash
# The whole job as five SLURM jobs, each after those it needs: two stores, stage 1, stage 2, evaluation.
#
#   infra/slurm/submit.sh [--dry-run] infra/slurm/paper.conf
#
# A job whose forerunner fails is taken off the queue. Run it again after a fault is mended: what is done is done.
set -euo pipefail

if [ "${1:-}" = --dry-run ]; then
  shift
  sbatch() {
    echo "sbatch $*" >&2
    echo 0
  }
fi
if [ $# != 1 ] || [ ! -f "$1" ]; then
  echo "error: expected one configuration file, found '${*:-nothing}'; infra/slurm/paper.conf is an example" >&2
  exit 2
fi
# shellcheck source=infra/slurm/paper.conf
source "$1"
cd "$(dirname "$0")/../.."

after() {
  local jobs=$1
  shift
  sbatch --parsable --kill-on-invalid-dep=yes --dependency="afterok:$jobs" "$@"
}

chat=$(sbatch --parsable "${BUILD_NODES[@]}" --job-name=build-pretrain \
  infra/slurm/build.sbatch "${PRETRAIN_BUILD[@]}" "store=$PRETRAIN_STORE")
talk=$(sbatch --parsable "${BUILD_NODES[@]}" --job-name=build-finetune \
  infra/slurm/build.sbatch "${FINETUNE_BUILD[@]}" "store=$FINETUNE_STORE")
stage1=$(after "$chat" "${TRAIN_NODES[@]}" --job-name=pretrain infra/slurm/train.sbatch \
  training/pretrain.yaml "run=$RUN/pretrain" "data.store=$PRETRAIN_STORE" "${PRETRAIN[@]}")
stage2=$(after "$stage1:$talk" "${TRAIN_NODES[@]}" --job-name=finetune infra/slurm/train.sbatch \
  training/finetune.yaml "run=$RUN/finetune" "model.connector_from=$RUN/pretrain/connector" \
  "data.store=$FINETUNE_STORE" "${FINETUNE[@]}")
answers=$(after "$stage2" --job-name=evaluate --output='%x-%j.log' "${EVALUATE_NODES[@]}" --wrap \
  "$(printf '%q ' python training/evaluate.py "$RUN/finetune/model" "${EVALUATE[@]}" --out "$RUN/answers.jsonl")")

echo "stores $chat and $talk -> stage 1 $stage1 -> stage 2 $stage2 -> evaluation $answers"
