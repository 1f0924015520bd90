# One image for CPU and GPU hosts: torch's default wheels bring their own CUDA libraries and run on a CPU as well.
#   docker build -t cifar-service .                                   # about 6 GB, of which CUDA is 5
#   docker build -t cifar-service --build-arg TORCH_INDEX=URL .       # URL of PyTorch's CPU-only index: a fraction of that
#   docker run --rm -p 8000:8000 --read-only [--gpus all] cifar-service

FROM python:3.13-slim AS packages
ARG TORCH_INDEX=""
WORKDIR /build
COPY pyproject.toml .
# Only the service's packages, read from the one place that lists them; this layer is cached until that file changes.
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], *project['optional-dependencies']['openvino'], sep='\n')" > requirements.txt \
    && python -m venv /venv \
    && if [ -n "$TORCH_INDEX" ]; then \
        /venv/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch>' requirements.txt)"; fi \
    && /venv/bin/pip install --no-cache-dir --requirement requirements.txt

FROM python:3.13-slim
COPY --from=packages /venv /venv
WORKDIR /srv
COPY app app
COPY weights weights
# Nothing is written at run time, so a read-only root works: byte code is made here. The clone's files may be readable
# only by their owner, who is not the user below.
RUN python -m compileall -q app && chmod -R a+rX /srv
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 CIFAR_HOST=0.0.0.0
USER 65534:65534
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["python", "-c", \
    "import http.client, os; p = os.environ.get('CIFAR_PORT', ''); c = http.client.HTTPConnection('127.0.0.1', int(p) if p.isdigit() else 8000, timeout=3); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "app"]
