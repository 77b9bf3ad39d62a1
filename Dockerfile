# One image for every node of a cluster, head and workers alike: the same wheel everywhere.
#
#   docker build -t shardserve .                                   # CPU
#   docker build -t shardserve:cuda12 --build-arg EXTRA=cuda12 .   # NVIDIA; its CUDA comes with pip
#   docker build -t shardserve:tpu --build-arg EXTRA=tpu .
#
# Nothing is set here that `ray start` must have in its environment: kuberay.yaml says it where Ray
# is started, and `shardserve up` sets it by itself.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG EXTRA=""
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY batching batching
COPY shards shards
COPY cluster cluster
# The environment is made where it will lie: its scripts name their Python by path.
RUN python -m venv /opt/shardserve \
    && /opt/shardserve/bin/pip install --no-cache-dir ".${EXTRA:+[${EXTRA}]}"

FROM python:${PYTHON}-slim-bookworm
# KubeRay asks a node whether it lives with wget; Ray's autoscaler and people use ps.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home shardserve
COPY --from=build /opt/shardserve /opt/shardserve
ENV PATH=/opt/shardserve/bin:$PATH
# By number, so that Kubernetes can see that it is not root.
USER 1000
WORKDIR /home/shardserve
CMD ["shardserve", "--help"]
