# The image, for people who have Docker and not Debian:
#
#     docker build --output build .          # build/vmlinux, build/initramfs.cpio, build/manifest.json
#
# Any Debian 12 or later does as a base. Packages come from the base's own apt sources and Python
# packages from where pip is told to look: behind a proxy give the usual build arguments
# (`--build-arg https_proxy=…`), for a mirror or certificates of your own a base that knows them.
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates debian-archive-keyring mmdebstrap python3 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /innkeep
COPY requirements/agent.txt requirements/
COPY agent agent
COPY protocol protocol
COPY initramfs initramfs
RUN python3 -m initramfs.build --output /build

FROM scratch
COPY --from=build /build/vmlinux /build/initramfs.cpio /build/manifest.json /
