"""What a machine may lack: a home, a passwd entry, a cache that can be written to, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fnrecipe.runtime import host, processor
from fnrecipe.runtime.processor import instructions
from tests.helpers import end, pairs, start

ROOT = Path(__file__).resolve().parents[2]
AS_STRANGER = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
AGAIN = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import attrs'], check=True)"
WHO_READS_ALL = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # this Python may be in root's own home
CHEAP = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
}
COMPILES = """
import torch
from fnrecipe.compiler import inductor
from fnrecipe.config.sections.run import TorchSection
from fnrecipe.runtime import host, processor
from fnrecipe.runtime.processor import instructions
from fnrecipe.transforms import jit

host.prepare(TorchSection(num_threads=1), "inductor")
print(jit(lambda x: x * 2 + 1, backend=inductor)(torch.ones(2)).tolist())
"""
SUMS = """
import torch
from fnrecipe.compiler import inductor
from fnrecipe.transforms import jit

torch.set_num_threads(1)
x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
print(jit(lambda x: (x.softmax(-1) * torch.arange(100)).sum(), backend=inductor)(x).item())
"""
HUNGRY = """
import resource
from pathlib import Path
import attrs
from fnrecipe.recipes.lm.train import recipe as lm

def init(config, key, keep):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = (pages << 12) + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return lm.init(config, key, keep)

recipe = attrs.evolve(lm, init=init)
"""


@pytest.fixture
def anyones() -> Iterator[Path]:
    """A folder in which every user may write, with some documents."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "a.jsonl").write_text(f"{json.dumps({'text': 'the fold of a step over a stream'})}\n" * 40)
        yield folder


def stranger() -> list[str]:
    """How the command of a user without a passwd entry begins, who can read this Python; if we are root, or else as we are."""
    ways = [AS_STRANGER, [*AS_STRANGER, *WHO_READS_ALL]] if os.getuid() == 0 else [[]]
    able = [way for way in ways if subprocess.run([*way, sys.executable, "-c", AGAIN], capture_output=True).returncode == 0]
    return able[0]


def as_stranger(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """How Python ends for a user of whom the machine knows neither name nor home."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS") if name in os.environ}
    command = [*stranger(), sys.executable, *args]
    variables = {**kept, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_user_whom_the_machine_does_not_know_trains(anyones: Path) -> None:
    changes = {"regime__num_steps": 4, "dataset__valid_fraction": 0, "dataset__prefetch": 0}
    ended = as_stranger(
        "-m", "fnrecipe.cli", "train", "lm", "--out", str(anyones / "out"), "--config", *pairs(anyones / "a.jsonl", **changes)
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
def test_a_user_whom_the_machine_does_not_know_compiles(anyones: Path) -> None:
    ended = as_stranger("-c", COMPILES, HOME="/nonexistent", TMPDIR=str(anyones), **CHEAP)
    assert (ended.returncode, ended.stdout) == (0, "[3.0, 3.0]\n")
    assert ended.stderr.startswith(f"compiled kernels are in {anyones}/fnrecipe-inductor-")
    assert not list(anyones.glob("fnrecipe-inductor-*"))


@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"])
def test_a_cache_that_cannot_be_written_to_is_replaced_by_a_folder_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv(name, str(tmp_path / "file/cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    host.keep_compiled_kernels()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent == tmp_path
    assert folder.is_dir()
    assert f"compiled kernels are in {folder}, and not kept for the next start: " in caplog.text


def test_a_cache_that_can_be_written_to_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    host.keep_compiled_kernels()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "fnrecipe/inductor" / instructions())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    for _ in range(2):  # as in a process and in its children
        host.keep_compiled_kernels()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine" / instructions())
    assert [*map(str, tmp_path.glob("mine/**"))] == [str(tmp_path / "mine"), str(tmp_path / "mine" / instructions())]


def test_another_processor_has_kernels_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo, found = tmp_path / "cpuinfo", set()
    monkeypatch.setattr(processor, "_CPUINFO", cpuinfo)
    for model, flags in (("1", "sse avx2"), ("1", "sse avx2 avx512_bf16"), ("2", "sse avx2")):
        cpuinfo.write_text(f"vendor_id\t: V\nmodel\t\t: {model}\nflags\t\t: {flags}\n" * 2)
        found.add(instructions())
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2048")
    assert len({*found, instructions()}) == 4


@pytest.mark.slow
def test_kernels_for_vectors_of_another_width_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "compiles.py").write_text(SUMS)
    found = []
    for limits in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}, {}):
        environment = {**os.environ, **CHEAP, **limits, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, str(tmp_path / "compiles.py")]
        ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        found.append(float(ended.stdout))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    assert found[0] == found[2]


@pytest.mark.slow
def test_memory_that_runs_out_is_an_error_that_names_what_takes_less(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "hungry.py").write_text(HUNGRY)
    wide = "{vocab_size: 264, max_seq_len: 32, model_dim: 4096, num_layers: 1, num_attn_heads: 4, ffn_inner_dim: 16384}"
    command = ["train", str(tmp_path / "hungry.py"), "--out", str(tmp_path / "out"), "--config"]
    changes = {"model__config": wide, "trainer__jit": "off", "dataset__prefetch": 0}
    ended = end(start(*command, *pairs(texts, **changes)))
    assert ended.status == 1
    assert ended.errors.count("\n") == 1
    assert ended.errors.startswith("error: out of memory at ")
    assert "dataset.batch_size" in ended.errors
    assert ended.errors.rstrip() in (tmp_path / "out/logs/rank_0.log").read_text()


@pytest.mark.parametrize(
    ("error", "tried"),
    [
        (MemoryError(), ""),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total"), " at 2.50 GiB more"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes. Error"),
            " at 64 bytes more",
        ),
        (RuntimeError("std::bad_alloc"), ""),
    ],
)
def test_what_out_of_memory_is_called(error: Exception, tried: str) -> None:
    assert host.out_of_memory(error).startswith(f"out of memory{tried}; what takes less: ")


def test_another_error_is_not_out_of_memory() -> None:
    assert host.out_of_memory(RuntimeError("shapes do not match")) == ""


def test_a_process_knows_when_it_was_started() -> None:
    program = "import time; time.sleep(0.5); from fnrecipe.runtime import host; print(host.process_started())"
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert before - 0.1 < float(done.stdout) < before + 0.5 + (time.monotonic() - before)
