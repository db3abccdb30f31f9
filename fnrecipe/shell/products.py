"""What computes the large matrix products of a run: chosen where it begins, and kept in its directory."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import get_args

from fnrecipe.compiler.products import Choose, Kernel, Product
from fnrecipe.errors import CheckpointError
from fnrecipe.recipe import C
from fnrecipe.runtime.files import replace
from fnrecipe.runtime.gang import all_gather_objects
from fnrecipe.runtime.processor import processor
from fnrecipe.runtime.products import measured
from fnrecipe.shell.directory.layout import PRODUCTS
from fnrecipe.shell.session import Session


def chosen_once(session: Session[C]) -> Choose:
    """What rank 0 measures, for all ranks; what the run has chosen before, it goes on with, so that its bits stay."""
    path = session.out / PRODUCTS
    before, where = _read(path) if session.gang.leads else ({}, processor())
    if where != processor():
        session.display.line(f"the run began on {where}; this is {processor()}: its last digits will be others")
    return partial(_chosen, session, path, before)


def _chosen(session: Session[C], path: Path, known: dict[str, Kernel], products: Collection[Product]) -> dict[Product, Kernel]:
    """As `Choose`; what is new is added to `known`, and to the file of that."""
    if session.gang.leads:
        new = [product for product in products if str(product) not in known]
        known.update({str(product): kernel for product, kernel in measured(new).items()} if new else {})
        if new:
            replace(path, (json.dumps({"processor": processor(), "kernels": known}, indent=2) + "\n").encode())
    (found, *_) = all_gather_objects(session.gang, known)
    return {product: found[str(product)] for product in products}


def _read(path: Path) -> tuple[dict[str, Kernel], str]:
    """The kernels that a run has chosen, and on which processor.

    Raises:
        CheckpointError: if the file is not what was written.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kernels, where = dict(values["kernels"]), str(values["processor"])
    except FileNotFoundError:
        return {}, processor()
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected the kernels of the run's matrix products, found {error!r}") from None
    unknown = [kernel for kernel in kernels.values() if kernel not in get_args(Kernel)]
    if unknown:
        raise CheckpointError(f"{path}: expected one of {', '.join(get_args(Kernel))}, found {unknown[0]!r}")
    return kernels, where
