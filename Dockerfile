# docker build -t metavpt .    with NVIDIA GPUs: docker run --gpus all ...
# PyPI's torch for Linux carries CUDA. --build-arg PIP_EXTRA_INDEX_URL=... names an index of smaller wheels for the CPU alone.
# docker run --rm -v "$PWD:/work" metavpt run problem=toy_sources
FROM python:3.12-slim
ARG EXTRAS=focus
ARG PIP_EXTRA_INDEX_URL
WORKDIR /metavpt
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"
WORKDIR /work
ENTRYPOINT ["metavpt"]
