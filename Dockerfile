# syntax=docker/dockerfile:1
# One image for launcher and workers of Dataflow (docs/dataflow.md):
#
#   docker build --tag IMAGE .                                      with CUDA
#   docker build --tag IMAGE --build-arg PROCESSOR=cpu .            without (cu126: with CUDA 12)
#   docker build --tag IMAGE --build-arg MODELS="org/name@COMMIT …" .   with models under /models/org/name
ARG PROCESSOR=gpu
ARG BEAM_VERSION=2.77.0

# The workers' boot binary, and the versions of Python and Beam that it was built for.
FROM apache/beam_python3.11_sdk:${BEAM_VERSION} AS beam
RUN python -c "import platform, apache_beam; print(platform.python_version()[:4], apache_beam.__version__)" \
    > /opt/apache/beam/made_for

FROM gcr.io/dataflow-templates-base/python311-template-launcher-base:20230622_RC00 AS launcher

FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source

FROM base AS packages
ARG PROCESSOR
COPY . .
RUN tools/install_package.sh /opt/venv "${PROCESSOR}"

# A separate stage, so that a code change does not download the models again.
FROM base AS models
ARG MODELS=""
COPY constraints.txt tools/fetch_models.sh ./
RUN ./fetch_models.sh /models ${MODELS}

FROM base AS pairsift
WORKDIR /template
COPY --from=beam /opt/apache/beam /opt/apache/beam
COPY --from=launcher /opt/google/dataflow/python_template_launcher /opt/google/dataflow/python_template_launcher
COPY --from=models /models /models
COPY --from=packages /opt/venv /opt/venv
COPY templates/main.py main.py
COPY tools/check_package.sh /tmp/check_package.sh
# Workers use these packages directly, without another environment on top.
ENV PATH=/opt/venv/bin:${PATH} \
    RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 \
    FLEX_TEMPLATE_PYTHON_PY_FILE=/template/main.py \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HUB_DISABLE_TELEMETRY=1
# The check runs as an unprivileged user, because pairsift needs no privileges. The image keeps root as its user: Dataflow
# starts containers as root and mounts folders owned by root (logs, the worker's folder).
RUN useradd --create-home pairsift \
    && su pairsift --command "sh /tmp/check_package.sh /opt/venv /template/main.py /opt/apache/beam/made_for" \
    && rm /tmp/check_package.sh
ENTRYPOINT ["/opt/apache/beam/boot"]
