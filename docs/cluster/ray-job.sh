#!/usr/bin/env bash
# Runs a suite as a job of a running Ray cluster:
#
#   export RAY_ADDRESS=http://HEAD:8265 STORE=s3://BUCKET/PREFIX
#   docs/cluster/ray-job.sh run suites/paper_table.yaml --profile cifar10
#
# The job's driver runs on the head node and outlives this shell; the same line again goes on from
# what is complete. Where the cluster asks for a token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${RAY_ADDRESS:?the address of the job server, e.g. http://HEAD:8265}"
: "${STORE:?a bucket, or a folder that all nodes see, e.g. s3://BUCKET/PREFIX}"
command=$1
shift
exec ray job submit --address "$RAY_ADDRESS" --working-dir . \
  --runtime-env docs/cluster/runtime-env.yaml -- \
  python -m bench "$command" "$@" --store "$STORE"
