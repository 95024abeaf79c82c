# syntax=docker/dockerfile:1
# The server, on CPUs or, with --build-arg EXTRAS=serve,cuda, on NVIDIA GPUs (run it with --gpus all).
#   docker build -t upg-jax . && docker run -p 8000:8000 -v ./model:/model:ro upg-jax
FROM python:3.12-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++=4:12.* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY upg_jax upg_jax
COPY metal_ops metal_ops
ARG EXTRAS=serve
RUN python -m venv /opt/upg-jax \
    && /opt/upg-jax/bin/pip install --no-cache-dir ".[${EXTRAS}]"

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin upg
COPY --from=build /opt/upg-jax /opt/upg-jax
ENV PATH=/opt/upg-jax/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Inside a container "all addresses" are those that it publishes; UPG_JAX_API_KEY asks clients for a key.
ENTRYPOINT ["upg-jax", "serve", "--host", "0.0.0.0"]
CMD ["/model"]
