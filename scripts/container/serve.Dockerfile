# A server on ONNX Runtime's CPU provider. From the top of a clone:
#   docker build -f scripts/container/serve.Dockerfile -t acmix-serve .
#   docker run --rm -p 8000:8000 -v "$PWD/model.fused.onnx:/model.onnx:ro" acmix-serve
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md ./
COPY acmix_deploy acmix_deploy
COPY plugins plugins
COPY scripts/jetson scripts/jetson
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[serve]"
# A number, by which Kubernetes can tell that it is not root.
USER 10001
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --start-period=30s --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["acmix-deploy", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/model.onnx"]
