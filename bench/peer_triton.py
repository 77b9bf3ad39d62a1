"""Triton with a model of ``ingress``: ``python -m bench.peer_triton PORT MODEL SEED FOLDER``.

Runs in an environment with ``nvidia-pytriton``, whose wheel carries the server. This process lays a
model repository out in the folder and then becomes the server: the Python backend, on the CPU,
with dynamic batching that waits for 200 microseconds.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import sysconfig
from pathlib import Path

from bench.ingress_model import MODELS

__all__ = ["lay_out"]

_CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: {most}
input [ {{ name: "x", data_type: TYPE_FP32, dims: [ {wide} ] }} ]
output [ {{ name: "y", data_type: TYPE_FP32, dims: [ {narrow} ] }} ]
dynamic_batching {{ max_queue_delay_microseconds: 200 }}
instance_group [ {{ kind: KIND_CPU, count: 1 }} ]
"""

_BACKEND = """
import sys
sys.path[:0] = {paths!r}  # the backend's own interpreter does not read PYTHONPATH
import triton_python_backend_utils as utils
from bench.ingress_model import MODELS, Compiled


class TritonPythonModel:
    def initialize(self, args):
        self._compiled = Compiled(MODELS[{name!r}], {seed})

    def execute(self, requests):
        rows = [utils.get_input_tensor_by_name(one, "x").as_numpy() for one in requests]
        return [
            utils.InferenceResponse([utils.Tensor("y", answers)])
            for answers in self._compiled.together(rows)
        ]
"""


def lay_out(folder: Path, name: str, seed: int, site: Path) -> None:
    """Write the model repository, and put the backend where the server looks for it.

    Args:
        folder: gets ``models`` and ``backends``.
        name: of the model.
        seed: of its parameters.
        site: the environment's packages.
    """
    model = MODELS[name]
    version = folder / "models" / name / "1"
    version.mkdir(parents=True)
    sizes = {"wide": model.widths[0], "narrow": model.widths[-1], "most": model.buckets[-1]}
    (version.parent / "config.pbtxt").write_text(_CONFIG.format(name=name, **sizes))
    paths = [str(Path.cwd()), str(site)]
    (version / "model.py").write_text(_BACKEND.format(name=name, seed=seed, paths=paths))
    server = site / "pytriton" / "tritonserver"
    backend = folder / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / python / "triton_python_backend_stub"
    shutil.copy2(stub, backend)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _become(port: str, folder: Path, site: Path) -> None:
    server = str(site / "pytriton" / "tritonserver" / "bin" / "tritonserver")
    libraries = [str(site / "nvidia_pytriton.libs"), f"{sysconfig.get_config_var('LIBDIR')}"]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)}
    command = [
        server, f"--model-repository={folder / 'models'}",
        f"--backend-directory={folder / 'backends'}", "--http-address=127.0.0.1",
        f"--http-port={port}", "--grpc-address=127.0.0.1", f"--grpc-port={_free_port()}",
        f"--metrics-port={_free_port()}", "--log-verbose=0",
    ]  # fmt: skip
    print(f"serving at http://127.0.0.1:{port}", flush=True)
    os.execve(server, command, environment)


if __name__ == "__main__":
    port, name, seed, place = sys.argv[1:]
    packages = Path(sysconfig.get_paths()["purelib"])
    lay_out(Path(place), name, int(seed), packages)
    _become(port, Path(place), packages)
