"""Imports a threestudio checkout and the extension in it, and prints the outcome as JSON.

python -m pcs_3d.threestudio.probe CHECKOUT
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from pcs_3d.threestudio.launch import imported
from pcs_3d.threestudio.stand_ins import absent


def probe(checkout: Path) -> dict[str, Any]:
    """Imports threestudio and the extension.

    Returns:
        A dictionary with `classes`, the number of classes that threestudio registers; `ours`, the names of the classes
        that the extension registers; and `error`, the reason why the extension could not be imported, or None. If
        threestudio itself cannot be imported, the dictionary has only `error`, the reason for that.
    """
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    try:
        threestudio = imported(absent())
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    own = set(threestudio.__modules__)
    extension = checkout / "custom/pcs/__init__.py"
    error = None
    if extension.is_file():
        try:
            spec = importlib.util.spec_from_file_location("pcs", extension)
            assert spec is not None and spec.loader is not None
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
    return {"classes": len(own), "ours": sorted(set(threestudio.__modules__) - own), "error": error}


if __name__ == "__main__":
    print(json.dumps(probe(Path(sys.argv[1]))))
