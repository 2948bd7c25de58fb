# The service: `weightnet serve` without PyTorch, for processors. docs/serve.md says how to run it.
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN python -m venv /opt/weightnet \
    && /opt/weightnet/bin/pip install --no-cache-dir -c constraints.txt ".[serve]"

FROM python:3.12-slim
RUN groupadd --system --gid 10001 weightnet \
    && useradd --system --uid 10001 --gid 10001 --no-create-home weightnet \
    && install --directory --owner weightnet --group weightnet /var/cache/weightnet
COPY --from=build /opt/weightnet /opt/weightnet
# Downloaded models lie in $XDG_CACHE_HOME/weightnet.
ENV PATH=/opt/weightnet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/var/cache
USER 10001:10001
WORKDIR /var/cache/weightnet
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
# Inside the container all addresses; which of them others reach, whoever publishes the port says.
CMD ["weightnet", "serve", "--host", "0.0.0.0"]
