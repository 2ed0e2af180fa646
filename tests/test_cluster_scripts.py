"""docs/slurm.sbatch and docs/kubernetes.yaml: they parse, and two hosts, here two launchers, run a stage by them."""

import json
import os
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import TINY

DOCS = Path(__file__).parents[1] / "docs"
ARGUMENTS = ["--preset", "digits-lt", "--until", "pack", *(part for s in TINY for part in ("--set", s))]
TORCHRUN = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run --local-addr=localhost "$@"\n'
# Starts the command once for each host, as tasks of one step, and fails as the first of them that fails.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift || exit 9
for host in 0 1; do SLURM_NODEID=$host "$@" & done
code=0
for host in 0 1; do wait -n || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames a[1-2]" ] || exit 9
printf 'localhost\\nelsewhere\\n'
"""


@pytest.fixture
def tools(tmp_path) -> dict[str, str]:
    """An environment with a torchrun, and a srun and scontrol of two hosts."""
    for name, program in {"torchrun": TORCHRUN, "srun": SRUN, "scontrol": SCONTROL}.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(program)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RUN": str(tmp_path / "run"), "CARDS": "1"}


def free_port() -> int:
    """Below those that the system hands out by itself: nobody else comes by it before it is used."""
    for port in range(20000 + os.getpid() % 10000, 32768):
        with socket.socket() as server, suppress(OSError):
            server.bind(("localhost", port))
            return port
    raise OSError("no port is free")


def assert_packed(run: Path) -> None:
    assert json.loads((run / "pack" / "done.json").read_text())["fingerprint"]
    assert (run / "config.toml").exists()


@pytest.mark.timeout(280)
def test_slurm_script_runs_on_two_hosts(tools, tmp_path):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a[1-2]", "PORT": str(free_port())}
    command = ["bash", str(DOCS / "slurm.sbatch"), *ARGUMENTS]
    out = subprocess.run(command, env=tools | slurm, capture_output=True, text=True, check=False, timeout=250)
    assert out.returncode == 0, out.stderr[-3000:]
    assert_packed(tmp_path / "run")


@pytest.mark.slow  # the same processes as the one above
@pytest.mark.timeout(280)
def test_kubernetes_job_runs_on_two_hosts(tools, tmp_path):
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((DOCS / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    hosts = job["spec"]["completions"]
    assert hosts == job["spec"]["parallelism"] == int(environment["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["CARDS"])
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert environment["ENDPOINT"].startswith(f"{job['metadata']['name']}-0.{pod['subdomain']}:")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    here = {
        "NODES": "2",
        "ENDPOINT": f"localhost:{free_port()}",
        "SETTINGS": " ".join(word.replace(" ", "") for word in ARGUMENTS),
    }
    assert set(here) <= set(environment)
    command = [*container["command"], *container["args"]]
    pods = [
        subprocess.Popen(
            command,
            env=environment | tools | here | {"JOB_COMPLETION_INDEX": str(index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    errors = [pod.communicate(timeout=250)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    assert_packed(tmp_path / "run")
