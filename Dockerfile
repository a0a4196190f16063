# docker build -t metavpt .                            CPU
# docker build -t metavpt --build-arg DEVICE=cuda .    NVIDIA GPUs: docker run --gpus all ...
# docker run --rm -v "$PWD:/work" metavpt run problem=toy_sources
FROM python:3.12-slim
ARG DEVICE=cpu
ARG EXTRAS=focus
WORKDIR /metavpt
COPY . .
# PyPI's wheels of torch for Linux carry CUDA; those for the CPU alone are much smaller.
RUN if [ "$DEVICE" = cpu ]; then \
        pip install --no-cache-dir --constraint constraints.txt torch torchvision \
            --index-url https://download.pytorch.org/whl/cpu; \
    fi && \
    pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"
WORKDIR /work
ENTRYPOINT ["metavpt"]
