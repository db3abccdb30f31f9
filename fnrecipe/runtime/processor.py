"""What processor this is, in words, and what kernels that were compiled for it may be read by."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """What decides how fast a product is, and about its last digits: the processor, what of it may be used, and torch."""
    pattern = r"^(?:vendor_id|cpu family|model|model name|stepping)\s*: (.*)$"
    lines = re.findall(pattern, _cpuinfo(), re.MULTILINE)[:5] or [os.uname().machine]
    names = "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"
    limits = [f"{name}={value}" for name in names if (value := os.environ.get(name))]
    return ", ".join([*lines, torch.backends.cpu.get_cpu_capability(), *limits, f"torch {torch.__version__}"])


def instructions() -> str:
    """A name for all of its instructions that may be used, which compiled code depends on: 16 hexadecimal digits."""
    flags = re.findall(r"^(?:flags|Features)\s*: (.*)$", _cpuinfo(), re.MULTILINE)[:1]
    return hashlib.sha256("\n".join([processor(), *flags]).encode()).hexdigest()[:16]


def _cpuinfo() -> str:
    return _CPUINFO.read_text(encoding="utf-8") if _CPUINFO.exists() else ""
