#!/usr/bin/env bash
# The CUDA compiler from PyPI, for x86-64 and aarch64, where there is no toolkit: install_cuda.sh FOLDER [PIP...]
# CUDA_HOME is then FOLDER/nvidia/cu13.
set -euo pipefail
folder=$1
pip=("${@:2}")
"${pip[@]:-pip}" install --target "$folder" nvidia-cuda-nvcc==13.0.88 nvidia-cuda-runtime==13.0.96 \
  nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
ln -sfn lib "$folder/nvidia/cu13/lib64" # where nvcc looks
