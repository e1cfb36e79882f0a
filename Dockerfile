# The search page of an index, on the CPU; docs/serving.md says how it is built and run.
FROM python:3.12-slim
WORKDIR /anchorage
COPY constraints.txt ./
# What serving imports, and nothing else. The +cpu wheels lack the gigabytes of CUDA.
RUN pip install --no-cache-dir -c constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu \
    torch torchvision numpy pillow tqdm
# What some networks and pictures need on top: --build-arg EXTRA="timm pillow-heif"
ARG EXTRA=""
RUN test -z "$EXTRA" || pip install --no-cache-dir -c constraints.txt $EXTRA
COPY . ./
RUN python -m compileall -q . && useradd --system --uid 10001 --home-dir /tmp anchorage
USER 10001
ENV HOME=/tmp
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=30s --timeout=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/api/info')"]
# In the container every address is the container's own; who reaches it is said by `docker run -p`.
ENTRYPOINT ["python", "search.py", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/shop/shop.index"]
