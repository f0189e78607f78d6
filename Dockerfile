# syntax=docker/dockerfile:1
# psaq_mm with mmdet, mmseg, mmpretrain and timm, in the versions of requirements.txt:
#
#   docker build -t psaq_mm --build-arg TORCH_INDEX=INDEX .
#   docker run --rm -v "$PWD:/work" psaq_mm dfq-train my_w8a8.py --method best
#
# INDEX is the address of PyTorch's builds: of its CPU builds for a small image, of those of one CUDA version for a GPU
# (and --gpus all at docker run), see PyTorch's page "Get started". Without it pip takes the default build, which brings
# its CUDA packages (2.5 GB). MMCV_INDEX is a page of prebuilt wheels of mmcv for that torch and CUDA, see MMCV's page
# "Installation"; without one mmcv is compiled, for about 20 minutes on two cores.
ARG PYTHON=3.11

# Everything is installed into /opt/venv; compilers and sources stay behind.
FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH_INDEX=
ARG MMCV_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/src/constraints.txt MMCV_WITH_OPS=1
RUN apt-get update \
    && apt-get install --no-install-recommends -y build-essential \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt requirements.txt requirements-tools.txt ./
# torch stands before mmcv, which is built against it. What only tests and checks need is left out.
RUN sed '/^#/d; /^-r/d' requirements.txt requirements-tools.txt > all.txt \
    && sed -i -E '/^(pytest|hypothesis|ruff|mypy)/d' all.txt \
    && grep -E '^(torch|torchvision|numpy)==' all.txt > torch.txt \
    && pip install ninja setuptools wheel \
    && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r torch.txt \
    && pip install ${MMCV_INDEX:+--find-links "$MMCV_INDEX"} --no-build-isolation --no-deps "$(grep '^mmcv==' all.txt)" \
    && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r all.txt
COPY setup.py pyproject.toml README.md LICENSE model-index.yml ./
COPY psaq_mm psaq_mm
COPY configs configs
COPY tools tools
RUN pip install --no-deps --no-build-isolation .

FROM python:${PYTHON}-slim-bookworm
# The shared libraries that opencv-python asks for.
RUN apt-get update \
    && apt-get install --no-install-recommends -y libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 psaq
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 MPLBACKEND=Agg
USER psaq
WORKDIR /work
ENTRYPOINT ["psaq"]
CMD ["--help"]
