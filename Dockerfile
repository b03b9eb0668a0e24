# docker build -t skipless . && docker run --gpus all --ipc=host -v "$PWD:/work" skipless pretrain --help
# (--ipc=host: loader workers hand over batches in shared memory, of which docker gives 64 MB by default.)
FROM python:3.12-slim
COPY . /opt/skipless
RUN pip install --no-cache-dir -c /opt/skipless/constraints.txt "/opt/skipless[gpu]"
WORKDIR /work
ENTRYPOINT ["skipless"]
