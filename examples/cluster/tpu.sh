#!/usr/bin/env bash
# One study on the four hosts of a Cloud TPU slice: bash tpu.sh
#
# The run directory must be one that all hosts see, such as a Filestore share at /runs.
# After a maintenance event or a preemption, of which hosts are told by SIGTERM, create the
# slice anew and start the same command: it goes on where it stopped.
set -euo pipefail
NAME=mosaic ZONE=us-central1-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite

gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
  --version="$VERSION" --spot
# What a host asks its metadata server: who it is, and where the first one is.
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command='
  pip install mosaic_jax "jax[tpu]"
  attribute() {
    curl -s -H "Metadata-Flavor: Google" \
      "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
  }
  first=$(attribute worker-network-endpoints | cut -d, -f1 | cut -d: -f3)
  mosaic run --config cifar10_mosaic --workdir /runs/cifar10 \
    --coordinator "$first:1234" --num_processes 4 --process_id "$(attribute agent-worker-number)"
'
