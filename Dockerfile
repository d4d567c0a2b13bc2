# For GPU machines. Written from the images' documentation; it has not been built or run yet.
# The image brings torch, Transformer Engine and Apex that were built for each other: they stay as they are.
FROM nvcr.io/nvidia/pytorch:26.02-py3

WORKDIR /opt/umv2_megatron
COPY . .
RUN pip freeze | grep -iE '^(torch|triton|transformer[-_]engine|apex|numpy)' > /tmp/constraints.txt \
    && pip install --no-cache-dir --no-build-isolation --constraint /tmp/constraints.txt ".[eval]"

WORKDIR /workspace
CMD ["umv2-pretrain", "--help"]
