"""Starts the processes of a run on one machine, by torch's own launcher."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Sequence

from fnrecipe.errors import EXIT_FAILED, FnrecipeError


def launch(size: int, args: Sequence[str]) -> int:
    """Runs `fnrecipe ARGS` in `size` processes; the exit status of the first that failed, or of the signal that came.

    Raises:
        FnrecipeError: if a process was killed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from fnrecipe.signals import EXIT_STATUS

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // size, 1)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "fnrecipe.cli", *args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            how = signal.Signals(-failure.exitcode).name
            raise FnrecipeError(f"rank {rank} was ended by {how}; the same command goes on from the last checkpoint") from None
        return failure.exitcode or EXIT_FAILED
    except SignalException as error:
        return EXIT_STATUS.get(signal.Signals(error.sigval), EXIT_FAILED)
    return 0
