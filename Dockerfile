# The training environment, for the CPU; its default command is the quickstart.
#
#   docker build -t equimoe .                              CPU
#   docker build -t equimoe --build-arg DEVICE=cuda .      NVIDIA GPUs (run it with --gpus all)
#   docker run --rm -v equimoe-runs:/workspace/runs equimoe
#
# Which build of torch goes in is up to the package index. Where the default one carries the CUDA libraries, a small
# CPU image needs the index of the CPU builds: --build-arg TORCH_ARGS="--index-url ...".
ARG DEVICE=cpu
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS cpu
ENV NVIDIA_VISIBLE_DEVICES=void

FROM python:${PYTHON_VERSION}-slim AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Triton compiles the launcher of each kernel with the host's C compiler
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

FROM ${DEVICE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG TORCH=torch==2.13.0
ARG TORCH_ARGS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 MPLBACKEND=Agg OMP_NUM_THREADS=1 \
    OMP_WAIT_POLICY=passive THP_MEM_ALLOC_ENABLE=1

WORKDIR /opt/equimoe
# torch is the large layer: it is made again only when the pins change
COPY constraints.txt ./
RUN grep -v -e '^torch==' -e '^triton==' constraints.txt > pins.txt \
    && pip install -c pins.txt ${TORCH_ARGS} "${TORCH}" \
    && pip install -c pins.txt setuptools wheel
COPY setup.py pyproject.toml README.md LICENSE ./
COPY moe moe
COPY kernels kernels
COPY launch launch
RUN pip list --format freeze | grep -e '^torch==' -e '^triton==' >> pins.txt \
    && { grep -q '^triton==' pins.txt || grep '^triton==' constraints.txt >> pins.txt; } \
    && pip install --no-build-isolation -c pins.txt .

RUN useradd --create-home --uid 1000 equimoe \
    && mkdir -p /workspace/runs && chown -R equimoe:equimoe /workspace
USER equimoe
WORKDIR /workspace
VOLUME /workspace/runs
CMD ["python", "-m", "equimoe.launch.train", "--processes", "2", \
     "--recipe", "quickstart", "--run-dir", "runs/quickstart"]
