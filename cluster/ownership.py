"""Whether the packages that are imported are ours.

Our import packages have generic names, and other distributions on PyPI install packages of the
same names over them without a word. Each of our packages says whose it is; one that does not has
been overwritten or hidden.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from types import ModuleType
from typing import Final

from batching.errors import FailedPrecondition

__all__ = ["check_ownership"]

_DISTRIBUTION: Final = "shardserve"
_PACKAGES: Final = ("batching", "shards", "cluster")


def check_ownership() -> None:
    """Refuse to run if another distribution owns one of our packages.

    Raises:
        FailedPrecondition: names the package, the other distribution and what to do.
    """
    modules = {package: importlib.import_module(package) for package in _PACKAGES}
    for package, module in modules.items():
        if getattr(module, "__distribution__", None) != _DISTRIBUTION:
            owners = importlib.metadata.packages_distributions().get(package, [])
            others = sorted({name for name in owners if name != _DISTRIBUTION})
            raise FailedPrecondition(
                f"the package {package!r} in {module.__file__} is not ours but of "
                f"{', '.join(others) or 'another project'}: pip uninstall "
                f"{' '.join(others) or package}, then "
                f"pip install --force-reinstall --no-deps {_DISTRIBUTION}"
            )
    roots = {name: _root(module) for name, module in modules.items()}
    if len(set(roots.values())) != 1:
        places = ", ".join(f"{package} from {root}" for package, root in roots.items())
        raise FailedPrecondition(
            f"our packages are imported from different places ({places}); a folder of the same "
            "name in the working directory hides the installed one: change directory"
        )


def _root(module: ModuleType) -> Path | None:
    return Path(module.__file__).resolve().parent.parent if module.__file__ else None
