# The environment of run_skpo.sh, by the same script and pins:
#
#     docker build -t verl-skpo .                             then   docker run --shm-size 4g verl-skpo
#     docker build -t verl-skpo --build-arg PLATFORM=gpu .    then   docker run --gpus all --shm-size 16g verl-skpo
FROM python:3.12-slim-bookworm
ARG PLATFORM=cpu
# A few packages come as source; vLLM's CPU build loads libnuma.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/verl-skpo
ENV SKPO_PLATFORM=$PLATFORM UV_LINK_MODE=copy
COPY . .
RUN --mount=type=cache,target=/root/.cache bash scripts/bootstrap.sh
ENTRYPOINT ["bash", "run_skpo.sh"]
